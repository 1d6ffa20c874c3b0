"""make_pseudo.py --segments as a command: which rule is applied to what, what goes on and what is refused."""
import json

import numpy as np
import pytest
from conftest import LABELS, call, refused
from PIL import Image
from test_pseudo import masks, put_maps
from test_votes import naive_fma, naive_sepl

from plumbing import folders
from plumbing.maps import load_cam
from plumbing.segments import label_segments, load_segments, save_segments

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


@pytest.fixture
def world(voc, tmp_path):
    """Images, maps and segments: parts of the truth's own outlines for most, none for a_5."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    (out / "segments").mkdir(parents=True)
    for n, id in enumerate(LABELS):
        truth = folder.truth(id)
        labels = truth.astype(int) * 100 + np.arange(truth.size).reshape(truth.shape) // 500
        found = [s._replace(level=n % 3) for s in label_segments(labels)] if id != "a_5" else []
        save_segments(out / "segments" / f"{id}.npz", truth.shape, found)
    (out / "segments/recipe.json").write_text('{"fingerprint": "first", "args": {"source": "slic"}}')
    put_maps(voc, out)                                            # removes the truth
    return voc, out


def note(out, name):
    return json.loads((out / f"{name}.json").read_text())


RUNS = {
    "plain": ["--no-crf"],
    "crf": [],
    "sams": ["--segments"],
    "sams_crf": ["--crf", "--power", "1.5", "--segments"],
    "sepl": ["--vote", "sepl", "--segments"],
}


def test_the_command_votes(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED, "--threshold", "0.3", "--preset", "deeplab"]
    for name, more in RUNS.items():
        voted = "--segments" in more
        done = call("make_pseudo.py", *flags, "--pseudo", name, *more, *([out / "segments"] if voted else []))
        assert done.returncode == 0, done.stderr
        assert ("1 without segments" in done.stdout) == voted, done.stdout
    folder = folders.Folder(voc)
    made = {name: masks(out, name) for name in RUNS}
    for id, present in LABELS.items():
        row, label = {name: made[name][id] for name in RUNS}, np.array([0, *(k + 1 for k in present)])
        segments = load_segments(out / "segments" / f"{id}.npz", row["plain"].shape)
        _, cam = load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        if not segments:                                          # masked as without --segments
            for name, same in (("sams", "plain"), ("sams_crf", "crf"), ("sepl", "crf")):
                assert np.array_equal(row[name], row[same])
            continue
        if not present:
            assert not any(mask.any() for mask in row.values())
            continue
        full = np.zeros((len(segments), *cam.shape[1:]), bool)
        for mask, s in zip(full, segments):
            mask[s.where] = s.mask
        assert np.array_equal(row["sams"], label[naive_fma(full, [s.level for s in segments], cam, 0.6)])
        assert np.array_equal(row["sepl"], naive_sepl(full, row["crf"]))
        assert not np.array_equal(row["sepl"], row["crf"])
        assert set(np.unique(row["sams_crf"])) <= set(label)

    facts = ("without_segments", "vote", "background", "value", "crf")
    assert [note(out, "sams")[k] for k in facts] == [1, "sams", "power", 0.6, None]
    assert note(out, "sams")["pixels"] == {"background": "constant", "value": 0.3}
    source = {"folder": str(out / "segments"), "source": "slic", "weights": None}
    assert note(out, "sams")["segments"] == source
    assert [note(out, "sepl")[k] for k in facts] == [1, "sepl", "constant", 0.3, "deeplab"]
    assert "vote" not in note(out, "crf")


def test_what_goes_on_and_what_is_refused(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED, "--segments", out / "segments"]
    assert call("make_pseudo.py", *flags, "--limit", "2").returncode == 0
    for _ in range(2):                                            # the second time nothing is left to do
        assert "1 without segments" in call("make_pseudo.py", *flags).stdout
        assert note(out, "pseudo")["without_segments"] == 1
    refused(call("make_pseudo.py", *flags, "--vote", "sepl"), "was made with", "--vote sams (now sepl)")
    (out / "segments/recipe.json").write_text('{"fingerprint": "second"}')
    refused(call("make_pseudo.py", *flags), "made from another segments")
    (out / "segments/a_4.npz").unlink()
    done = call("make_pseudo.py", *flags, "--pseudo", "new")
    refused(done, "no segments of a_4, and 0 more of 5", "make_segments.py")
    assert not (out / "new").exists()
    Image.new("L", (9, 9)).save(out / "segments/a_4.png")
    refused(call("make_pseudo.py", *flags, "--pseudo", "new"), "a_4.png holds no segments of its", "9x9")
    for wrong in (["--segments", "x", "--vote", "sepl", "--power", "1"], ["--vote", "sams"],
                  ["--segments", "x", "--crf", "--ignore-below", ".5"]):
        assert call("make_pseudo.py", *flags[:-2], *wrong).returncode == 2


def test_others_segments_that_were_replaced_are_noticed(world):
    voc, out = world
    foreign, folder = out / "foreign", folders.Folder(voc)
    for id in LABELS:
        (foreign / id).mkdir(parents=True)
        h, w = folder.image(id).shape[1:]
        for n in (0, 1):
            stripes = (np.arange(w) // 20 % 2 == n)[None].repeat(h, 0)
            Image.fromarray(stripes).save(foreign / id / f"{n}.png")
    flags = ["--data", voc, "--out", out, *SHARED, "--segments"]
    assert call("make_pseudo.py", *flags, foreign).returncode == 0
    before = masks(out)
    assert note(out, "pseudo")["segments"]["source"] is None
    foreign.rename(out / "moved")
    assert call("make_pseudo.py", *flags, out / "moved").returncode == 0        # the same files elsewhere
    Image.new("1", (40, 30)).save(out / "moved/a_5/1.png")                      # a segment less
    refused(call("make_pseudo.py", *flags, out / "moved"), "made from another segments", "--no-resume")
    assert call("make_pseudo.py", *flags, out / "moved", "--no-resume").returncode == 0
    after = masks(out)
    assert np.array_equal(after["a_1"], before["a_1"]) and not np.array_equal(after["a_5"], before["a_5"])
