"""eval.py as a command: hand-worked scores, one process against two, every bad input in one line."""
import json

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, refused, run

from wsss import data


def perfect_maps(folder, out, noise=0.0):
    """Maps at a quarter of the size that are 1 inside the object's mask, plus noise."""
    rng = np.random.default_rng(0)
    (out / "cam").mkdir(parents=True)
    for id, present in LABELS.items():
        truth = folder.truth(id)
        cam = np.stack([truth == k + 1 for k in present]).astype(float) if present else np.zeros((0, *truth.shape))
        data.save_cam(out / "cam" / f"{id}.npy", (cam + noise * rng.random(cam.shape)) / (1 + noise))


def scores(out, what="cam", split="train"):
    return json.loads((out / f"eval_{what}_{split}.json").read_text())


def loop(folder, ids, predict):
    """IoU by counting pixels one class at a time."""
    hit, union = np.zeros(4), np.zeros(4)
    for id in ids:
        truth, guess = folder.truth(id).ravel(), predict(id).ravel()
        for k in range(4):
            t, g = (truth == k) & (truth != 255), (guess == k) & (truth != 255)
            hit[k], union[k] = hit[k] + (t & g).sum(), union[k] + (t | g).sum()
    return hit / union


def test_maps_by_the_fixed_threshold(voc, tmp_path):
    folder, out = data.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    done = call("eval.py", "--data", voc, "--out", out, "--split", "train", "--what", "cam", "--threshold", "0.3")

    def predict(id):
        classes, cam = data.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        guess = np.zeros(folder.truth(id).shape, int)
        for y, x in np.ndindex(*guess.shape):
            column = [0.3, *cam[:, y, x]]
            best = int(np.argmax(column))
            guess[y, x] = 0 if best == 0 else classes[best - 1] + 1
        return guess

    want = loop(folder, folder.ids("train"), predict)
    found = scores(out)
    assert done.returncode == 0 and 0.1 < found["miou"] < 0.95
    assert [found["iou"][name] for name in ["background", *CLASSES]] == pytest.approx(want.tolist())
    assert found["miou"] == pytest.approx(want.mean()) and f"{100 * want.mean():.1f}" in done.stdout
    assert found["protocol"] | {"data": "", "made_by": None} == {
        "what": "cam", "split": "train", "pictures": 5, "limit": 0, "data": "", "pred": None, "oracle": False, "background": "constant",
        "value": 0.3, "mean_over": "classes in truth or prediction, background included", "made_by": None}


def test_small_maps_are_resized_to_the_truth(voc, tmp_path):
    folder, out = data.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out)
    for id in LABELS:
        classes, cam = data.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        data.save_cam(out / "cam" / f"{id}.npy", cam[:, ::2, ::2])
    call("eval.py", "--data", voc, "--out", out, "--split", "val", "--what", "cam", "--threshold", "0.5")
    found = scores(out, split="val")
    assert 0.6 < found["miou"] < 1 and found["protocol"]["pictures"] == 2


def test_oracle_is_one_pass_and_stamped(voc, tmp_path):
    folder, out = data.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    flags = ("--data", voc, "--out", out, "--split", "train", "--what", "cam")
    call("eval.py", *flags, "--threshold", "0.3", "--oracle")
    swept = scores(out)
    assert "chosen on the truth" in swept["protocol"]["oracle"] and len(swept["oracle_sweep"]) == 99
    for t in ("0.30", "0.55", f"{swept['oracle_best']['threshold']:.2f}"):
        call("eval.py", *flags, "--threshold", t)
        alone = scores(out)
        assert alone["protocol"]["oracle"] is False
        assert alone["miou"] == pytest.approx(swept["oracle_sweep"][t], abs=1e-12)
    assert swept["miou"] == pytest.approx(swept["oracle_sweep"]["0.30"], abs=1e-12)      # the headline stays the fixed one
    assert swept["oracle_best"]["miou"] == max(swept["oracle_sweep"].values())


def test_power_rule_is_the_argmax_with_its_background(voc, tmp_path):
    folder, out = data.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    call("eval.py", "--data", voc, "--out", out, "--split", "train", "--what", "cam", "--background", "power", "--alpha", "2")

    def predict(id):
        classes, cam = data.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        return np.array([0, *(classes + 1)])[data.add_background(torch.from_numpy(cam), "power", 2.).argmax(0).numpy()]

    assert list(scores(out)["iou"].values()) == pytest.approx(loop(folder, folder.ids("train"), predict).tolist())


def test_masks_and_the_misses(voc, tmp_path):
    folder, pred = data.Folder(voc), tmp_path / "pred"
    pred.mkdir()
    for id in LABELS:
        guess = folder.truth(id).copy()
        guess[guess == 2] = 255                                                # boats are never predicted
        data.save_mask(pred / f"{id}.png", guess)
    call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "masks", "--pred", pred)
    found = scores(tmp_path / "out", "masks")
    assert found["iou"] == {"background": 1, "train": 1, "boat": 0, "cow": 1} and found["miou"] == 0.75
    assert found["missed_pixels"] == sum((folder.truth(id) == 2).sum() for id in LABELS)
    (voc / "ImageSets/Segmentation/one.txt").write_text("a_1\n")
    done = call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "one", "--what", "masks", "--pred", pred)
    found = scores(tmp_path / "out", "masks", "one")
    assert found["iou"]["cow"] is None and found["absent"] == ["boat", "cow"] and found["miou"] == 1.0
    assert "not scored" in done.stdout


def test_pseudo_masks_are_read_from_out(voc, tmp_path):
    (tmp_path / "out/pseudo").mkdir(parents=True)
    for id in LABELS:
        data.save_mask(tmp_path / "out/pseudo" / f"{id}.png", data.Folder(voc).truth(id))
    (tmp_path / "out/pseudo.json").write_text('{"crf": "weaktr"}')
    call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "pseudo")
    found = scores(tmp_path / "out", "pseudo")
    assert found["miou"] == 1 and found["protocol"]["made_by"] == {"crf": "weaktr"}


def test_two_processes_score_as_one(voc, tmp_path):
    perfect_maps(data.Folder(voc), tmp_path / "out", noise=1.0)
    flags = ("--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "cam", "--oracle", "--device", "cpu")
    call("eval.py", *flags)
    one = scores(tmp_path / "out")
    run("eval.py", *flags, processes=2)
    assert scores(tmp_path / "out") == one


@pytest.mark.parametrize("spoil,flags,words", [
    (lambda v, o: None, ["--split", "none"], ["none.txt is missing", "train, val"]),
    (lambda v, o: (o / "cam/a_2.npy").unlink(), [], ["a_2.npy is missing", "make_cam.py"]),
    (lambda v, o: np.save(o / "cam/a_2.npy", np.array([{}])), [], ["a_2.npy is not a plain .npy"]),
    (lambda v, o: data.save_cam(o / "cam/a_2.npy", np.zeros((1, 3, 3))), [], ["a_2.npy has 1 maps", "2 classes"]),
    (lambda v, o: data.save_cam(o / "cam/a_2.npy", np.full((2, 3, 3), np.nan)), [], ["a_2.npy holds NaN"]),
    (lambda v, o: (v / "SegmentationClass/a_2.png").unlink(), [], ["a_2.png is missing", "scoring needs true masks"]),
    (lambda v, o: data.save_mask(v / "SegmentationClass/a_2.png", np.full((34, 40), 9)), [], ["a_2.png holds label 9"]),
    (lambda v, o: (v / "labels.txt").write_text("a_1 zebra\n"), [], ["'zebra' is not in classes.txt"]),
    (lambda v, o: (v / "ImageSets/Segmentation/train.txt").write_text("../a_1"), [], ["is no picture id"]),
    (lambda v, o: (v / "ImageSets/Segmentation/train.txt").write_text(""), [], ["train.txt is empty"]),
    (lambda v, o: None, ["--split", "../x"], ["--split", "'../x' is no picture id"]),
    (lambda v, o: (o / "cam.json").write_text("{"), [], ["cam.json is not JSON"]),
    (lambda v, o: (o / "cam.json").write_text('{"classes": ["boat", "train", "cow"]}'), [], ["cam.json", "other classes"]),
    (lambda v, o: [data.save_mask(p, np.full((30 + 4 * (int(p.stem[2:]) % 2 == 0), 40), 255)) for p in (v / "SegmentationClass").iterdir()], [], ["no scored pixel"]),
])
def test_bad_input_is_one_line(voc, tmp_path, spoil, flags, words):
    perfect_maps(data.Folder(voc), tmp_path / "out")
    spoil(voc, tmp_path / "out")
    refused(call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "cam", *flags), *words)
    assert not list((tmp_path / "out").glob("eval*"))


def test_bad_masks_are_one_line(voc, tmp_path):
    pred, flags = tmp_path / "pred", ["--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "masks", "--pred", tmp_path / "pred"]
    pred.mkdir()
    data.save_mask(pred / "a_1.png", np.zeros((30, 40)))
    refused(call("eval.py", *flags), "a_2.png is missing, and 3 more of 5")
    for id in LABELS:
        data.save_mask(pred / f"{id}.png", np.zeros((7, 8)))
    refused(call("eval.py", *flags), "a_1.png is 8x7, the truth 40x30")
    data.save_mask(pred / "a_1.png", np.full((30, 40), 90))
    refused(call("eval.py", *flags), "a_1.png holds label 90", "90-id COCO")
    (tmp_path / "file").write_text("")
    refused(call("eval.py", *flags[:3], tmp_path / "file", *flags[4:]), "file: File exists")
    assert call("eval.py", *flags[:-4], "--what", "cam", "--threshold", "43").returncode == 2
    assert call("eval.py", *flags[:-2]).returncode == 2                          # --pred is missing: argparse says so
