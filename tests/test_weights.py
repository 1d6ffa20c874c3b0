"""plumbing/weights.py: files of weights as others publish them. No code in them is run, what is not read is
named, and a download of another SHA-256 does not stay."""
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused

from plumbing import weights


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def save(path, content):
    torch.save(content, path)
    return path


# ---------------------------------------------------------------- reading

def test_what_public_trainers_keep_beside_the_weights_is_passed_over(tmp_path):
    beside = {"args": Namespace(lr=1e-3), "miou": np.float64(69.4), "best": np.float32(1), "epoch": 41}
    state = {"module.a": torch.ones(2), "module.b": torch.zeros(1)}
    new, old = save(tmp_path / "numpy2.pth", {"model": state, **beside}), tmp_path / "numpy1.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    for path in (new, old):
        found, notes = weights.state_of(weights.read(path), path)
        assert {name: value.tolist() for name, value in found.items()} == {"a": [1, 1], "b": [0]}
        assert notes == ["'model' around it", "args, miou, best, epoch beside it",
                         "module. before every name"]
    for content, words in (({"model": {}}, "holds no state dict"), ({"a": 1}, "holds no state dict"),
                           ({"a": torch.tensor([0, float("nan")])}, "a holds NaN or infinity")):
        with pytest.raises(ValueError, match=f"x.pth: {words}"):
            weights.state_of(weights.read(save(tmp_path / "x.pth", content)), "x.pth")


def test_a_file_that_torch_did_not_write_or_that_asks_for_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, junk = io.BytesIO(), tmp_path / "junk.pth"
    torch.save({"a": torch.ones(300)}, whole)
    for content in (b"hello, world", b"", whole.getvalue()[:700], pickle.dumps([1, 2], 2)[:-2]):
        junk.write_bytes(content)
        with pytest.raises(ValueError, match="junk.pth: .*torn, or torch did not write it"):
            weights.read(junk)
    for content, asked in ((Bomb(), "posix.mkdir"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear")):
        with pytest.raises(ValueError, match=f"junk.pth: .*it asks for {asked}") as error:
            weights.read(save(junk, {"model": {"a": torch.ones(1)}, "net": content}))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "bombed").exists()


# ---------------------------------------------------------------- downloads

def test_imagenet_weights_come_from_their_publisher_and_nothing_else_stays(monkeypatch, tmp_path):
    """Through torch.hub's folder; a download, and a kept file, of another SHA-256 is refused and removed."""
    file = "resnet101-63fe2227.pth"
    url, _ = weights.PUBLISHED[file]
    place, other = tmp_path / "checkpoints" / file, save(tmp_path / "x.pth", {"fc.bias": torch.ones(3)})
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen",
                        lambda request: asked.append(request.full_url) or urlopen(other.as_uri()))
    message = rf'{file} cannot be downloaded \(invalid hash value .*\): put {url}{file} at {place}, or give'
    with pytest.raises(ValueError, match=message):
        weights.download(file)
    assert asked == [url + file] and os.listdir(tmp_path / "checkpoints") == []
    place.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{place}: its SHA-256 is not .* it is removed: run the same"):
        weights.download(file)
    assert not place.exists() and len(asked) == 1
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, file, (url, digest))
    for _ in range(2):                                        # downloaded, then kept
        assert weights.download(file)["fc.bias"].sum() == 3
    assert len(asked) == 2


def test_a_file_named_by_its_checksum_must_have_it(tmp_path):
    path = save(tmp_path / "x.pth", {"a": torch.ones(3)})
    right = tmp_path / f"resnet50-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    wrong = tmp_path / "resnet50-0676ba61.pth"
    right.symlink_to(path)
    wrong.symlink_to(path)
    assert weights.read(right)["a"].sum() == 3
    with pytest.raises(ValueError, match=f"{wrong.name}: its SHA-256 is not the one .* 0676ba61"):
        weights.read(wrong)


def test_a_download_from_the_hub_is_checked(tmp_path, monkeypatch):
    """huggingface_hub keeps files of weights as links to blobs named by their SHA-256."""
    digest = hashlib.sha256(b"weights").hexdigest()
    folder, blob = tmp_path / "snapshot", tmp_path / digest
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)

    def snapshot_download(name, allow_patterns):
        if name == "none/swin":
            raise OSError("no such\nmodel")
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    blob.write_bytes(b"weights")
    assert weights.from_hub("some/swin") == str(folder)
    blob.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"safetensors: its SHA-256 is not {digest[:16]}.*removed, run"):
        weights.from_hub("some/swin")
    assert os.listdir(tmp_path) == ["snapshot"] and os.listdir(folder) == []
    with pytest.raises(ValueError, match=r"none/swin cannot be loaded: .*\(no such\): give a model's name"):
        weights.from_hub("none/swin")


def test_the_weights_in_the_repository_are_those_of_their_list(tmp_path):
    """sha256sum reads the list too; a changed file is refused before it is read."""
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=ROOT / "weights").returncode == 0
    copy = shutil.copytree(ROOT / "weights", tmp_path / "weights") / "toy_clip.pt"
    copy.write_bytes(copy.read_bytes() + b"x")
    done = call("make_toy.py", "--out", tmp_path / "toy", "--weights", copy.parent)
    refused(done, f"{copy}: its SHA-256 is not", "SHA256SUMS", "--train-weights")
    assert not (tmp_path / "toy").exists()
