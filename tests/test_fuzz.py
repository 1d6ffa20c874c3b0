"""Hostile and broken files, the short form of bench/fuzz.py with fixed seeds; and that its verdicts are not empty."""
import mmap
import os
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from hosts import mask2former
from plumbing import checkpoints, files, images, maps
from wsss import generator

sys.path.append(str(ROOT / "bench"))
import fuzz  # noqa: E402


def test_hostile_files_are_refused_in_one_line(tmp_path):
    """Of every reader the valid file, the pipe, folder and links, the first that are built to hurt, and changed ones; of cheap readers all that are built to hurt."""
    names = list(fuzz.readers())
    all_of = {name: ((0, 5 + len(fuzz.Cases(name, 1).built())), (500, 506)) for name, (file, *_) in fuzz.readers().items() if file.endswith((".txt", ".xml", ".json", ".jsonl")) and name != "instances"}
    jobs = [(name, first, last) for name in names for first, last in all_of.get(name, ((0, 7), (8, 12), (28, 33), (500, 506)))]
    found = fuzz.judge(jobs, 1, tmp_path)
    assert len(all_of) == 10 and len(found) == sum(last - first for _, first, last in jobs) and [row for row in found if row[2] not in ("accepted", "refused")] == []
    assert {row[0] for row in found if row[1:3] == (0, "accepted")} == set(names)        # what is valid is read


@pytest.mark.parametrize("reader,expected", [
    (lambda path: True, "accepted"), (lambda path: False, "wrong error"), (lambda path: files.regular(path, 1), "refused"), (lambda path: {}["x"], "wrong error"),
    (lambda path: (path.parent.parent / "b").mkdir(), "escaped"), (lambda path: open(path.parent.parent / "outside/canary").read(), "escaped"),
    (lambda path: os.system("true"), "escaped"), (lambda path: mmap.mmap(-1, 1 << 28).write(bytes(1 << 28)) > 0, "memory")])       # numpy's might be memory that this process had before
def test_the_judge_sees_what_it_should(tmp_path, monkeypatch, reader, expected):
    (tmp_path / "outside").mkdir(), (tmp_path / "in").mkdir(), (tmp_path / "outside/canary").write_text("x"), (tmp_path / "in/a_1.txt").write_text("xyz")
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 27)
    watch = fuzz.Watch()
    assert fuzz.verdict(reader, tmp_path / "in/a_1.txt", watch)[0] == expected
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    if expected == "accepted":
        begin = time.process_time()
        assert fuzz.verdict(lambda path: all(time.process_time() > begin for _ in range(10 ** 6)), tmp_path / "in/a_1.txt", watch)[0] == "hung"


def test_a_process_that_dies_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "child.py"))
    (tmp_path / "child.py").write_text("import json, os, sys\n(name, first, last), = json.loads(sys.argv[2])\nfor n in range(first, last):\n    print(json.dumps([name, n]), flush=True)\n"
                                       "    n == 1 and os.abort()\n    print(json.dumps([name, n, 'refused', '']), flush=True)\n")
    assert [row[1:3] for row in fuzz.judge([("x", 0, 4)], 0, tmp_path)] == [(0, "refused"), (1, "crashed"), (2, "refused"), (3, "refused")]


def test_a_process_ends_with_its_parent():
    """The child of a child that leaves: its end of the pipe closes long before it would."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            fuzz.end_with_parent()
            os.write(theirs, b"x")
            time.sleep(60)
        else:
            os.close(theirs)
            time.sleep(0.5)
        os._exit(0)
    os.close(theirs), os.waitpid(child, 0)
    begin = time.time()
    assert os.read(ours, 2) == b"x" and os.read(ours, 2) == b"" and time.time() - begin < 30
    os.close(ours)


# ---------------------------------------------------------------- what checkpoints claim

def test_a_sound_checkpoint_is_read_as_torch_reads_it(tmp_path):
    """Shared storages, views, scalars, half precision, old and new layouts."""
    whole = torch.arange(24.).view(4, 6)
    content = {"model": {"a": whole, "b": whole, "c": whole[1:, ::2], "d": torch.tensor(3), "e": whole.bfloat16(), "f": torch.nn.Parameter(whole)}, "stage": "x", "args": {"lr": 0.1}, "n": (1, None, "x")}
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        assert checkpoints.sound(tmp_path / "a.pt") == tmp_path / "a.pt"
        found = checkpoints.load(tmp_path / "a.pt", "x")
        assert all(torch.equal(found["model"][name], value) for name, value in content["model"].items()) and found["n"] == content["n"]
    with pytest.raises(ValueError, match="a.pt has no 'classes': remove it"):
        found["classes"]
    with pytest.raises(ValueError, match="a.pt has no 'pool'"):
        found["args"]["pool"]


@pytest.mark.parametrize("claim,word", [(dict(count=10 ** 12), "larger than its part"), (dict(size=(10 ** 9,), stride=(0,)), "not in the file"), (dict(size=(4,), stride=(1,)), "not in the file"),
                                        (dict(offset=-1), "not in the file"), (dict(size=(10 ** 9, 0), stride=(0, 0)), "not in the file"), (dict(storage=b"QInt8Storage"), "asks for torch.QInt8Storage")])
def test_claims_beyond_the_file_are_refused(tmp_path, claim, word):
    words = b"\x80\x02}X\x01\0\0\0a" + fuzz.tensor_words(**{"count": 3, "size": (3,), "stride": (1,), **claim}) + b"s."
    parts = [("x/data.pkl", words), ("x/data/0", bytes(12)), ("x/version", b"3")]
    (tmp_path / "a.pt").write_bytes(fuzz.zipped(parts))
    with pytest.raises(ValueError, match=f"a.pt: not a checkpoint of plain tensors .*{word}"):
        checkpoints.sound(tmp_path / "a.pt")
    good = b"\x80\x02}X\x01\0\0\0a" + fuzz.tensor_words() + b"s."
    (tmp_path / "a.pt").write_bytes(fuzz.zipped([("x/data.pkl", good), *parts[1:]]))
    assert checkpoints.read_tensors(tmp_path / "a.pt")["a"].tolist() == [0, 0, 0]
    (tmp_path / "a.pt").write_bytes(fuzz.zipped([("x/data.pkl", good), *parts[1:]], deflate=True))
    assert zipfile.is_zipfile(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="compressed"):
        checkpoints.sound(tmp_path / "a.pt")


# ---------------------------------------------------------------- pictures

def test_large_pictures_up_to_the_bound(tmp_path):
    """A panorama is read; a row more than the bound, and it is refused by its header."""
    for height, width, word in ((400, 20_000, None), (3_356, 20_000, "67,108,864 pixels"), (2, 70_000, "65,535")):
        (tmp_path / "a.png").write_bytes(fuzz.png(width, height, 1, 0, fuzz.zlib.compress(bytes(height * (width // 8 + 1)))))
        if word is None:
            assert images.load_image(tmp_path / "a.png").size == (width, height) and images.image_size(tmp_path / "a.png") == (height, width)
        else:
            with pytest.raises(ValueError, match=f"a.png is not a readable image.*{word}"):
                images.image_size(tmp_path / "a.png")


def test_transparency_over_many_strips(tmp_path):
    from PIL import Image
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 3, 4), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(images.load_image(tmp_path / "a.png")), np.asarray(whole))


# ---------------------------------------------------------------- other parts

@pytest.mark.parametrize("config", [{"backbone": "x"}, {"a": [{"use_timm_backbone": True}]}, {"hidden_dim": 10 ** 9}, fuzz.doubled(list)])
def test_a_configuration_that_downloads_or_is_huge_is_refused(config):
    mask2former.tame({"hidden_dim": 256, "backbone": None, "backbone_config": {"depths": [2, 2, 18, 2]}}, "seg.pt")
    with pytest.raises(ValueError, match="seg.pt: its configuration"):
        mask2former.tame(config, "seg.pt")


def test_a_loaded_generator_owns_its_weights(tmp_path):
    """The first network, without memory, leaves nothing in the state that the second reads: float64 weights become float32."""
    torch.manual_seed(0)
    state = generator.build_generator("deit_tiny", 3).state_dict()
    double = type(state)((name, value.double()) for name, value in state.items())
    double._metadata = state._metadata                            # as state_dict() gives it
    torch.save({"model": double}, tmp_path / "a.pt")
    before = torch.get_rng_state()
    loaded = generator.load_generator(tmp_path / "a.pt").state_dict()
    assert all(loaded[name].dtype == torch.float32 and torch.equal(loaded[name], value) for name, value in state.items())
    torch.set_rng_state(before)
    generator.build_generator("deit_tiny", 3)
    drawn = torch.rand(1)
    torch.set_rng_state(before)
    generator.load_generator(tmp_path / "a.pt")
    assert torch.equal(torch.rand(1), drawn)                      # and draws no number more than building one did


def test_metadata_of_a_file_is_not_obeyed(tmp_path):
    torch.manual_seed(0)
    state = generator.build_generator("deit_tiny", 3).state_dict()
    double = type(state)((name, value.double()) for name, value in state.items())
    double._metadata = {name: {**facts, "assign_to_params_buffers": True} for name, facts in state._metadata.items()}
    torch.save({"model": double}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["model"]._metadata == double._metadata
    assert {value.dtype for value in generator.load_generator(checkpoints.sound(tmp_path / "a.pt")).state_dict().values()} == {torch.float32}


def test_maps_beyond_float32_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((1, 2, 3), 1e300))
    with pytest.raises(ValueError, match="a.npy holds NaN or infinity"):
        maps.load_cam(tmp_path / "a.npy", [1, 0])
