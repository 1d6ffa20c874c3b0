"""eval.py as a command: scores against counts by hand, the protocol, bad input in one line.
(Several processes: test_ranks.py.)"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, refused
from PIL import Image

from plumbing import checkpoints, folders, images, masks, networks
from plumbing.maps import add_background, load_cam, resize_maps, save_cam
from wsss import crf

MEAN_OVER = "classes in truth or prediction, background included"


def flags(voc, out, what, *more):
    return ["eval.py", "--data", voc, "--out", out, "--split", "train", "--what", what, "--device", "cpu",
            "--amp", "off", "--workers", "0", *more]


def score(voc, out, what, *more):
    """Scores -> eval_<what>_<split>.json, what was printed."""
    done = call(*flags(voc, out, what, *more))
    assert done.returncode == 0, done.stderr
    split = more[more.index("--split") + 1] if "--split" in more else "train"
    return json.loads((out / f"eval_{what}_{split}.json").read_text()), done.stdout


def loop(folder, predict):
    """IoU by counting pixels one class at a time."""
    hit, union = np.zeros(4), np.zeros(4)
    for id in folder.ids("train"):
        truth, guess = folder.truth(id).ravel(), predict(id).ravel()
        for k in range(4):
            t, g = truth == k, (guess == k) & (truth != 255)
            hit[k] += (t & g).sum()
            union[k] += (t | g).sum()
    return (hit / union).tolist()


# ---------------------------------------------------------------- masks

def test_a_score_counted_by_hand(voc, tmp_path):
    """255 in the truth is left out, 255 in a prediction a miss, a class in neither is absent."""
    truth = [[0, 1, 1, 255], [0, 1, 2, 2]]
    guess = [[0, 1, 0, 1], [1, 1, 2, 255]]
    masks.save_mask(voc / "SegmentationClass/tiny.png", truth)
    (voc / "ImageSets/Segmentation/one.txt").write_text("tiny\n")
    (tmp_path / "pred").mkdir()
    masks.save_mask(tmp_path / "pred/tiny.png", guess)
    more = ["--split", "one", "--pred", tmp_path / "pred"]
    found, printed = score(voc, tmp_path / "out", "masks", *more)
    assert found["iou"] == {"background": 1 / 3, "train": 2 / 4, "boat": 1 / 2, "cow": None}
    assert found["miou"] == pytest.approx(4 / 9) and found["pixel_accuracy"] == pytest.approx(4 / 7)
    assert (found["missed_pixels"], found["absent"]) == (1, ["cow"])
    assert "mIoU         44.4" in printed and "cow            -   in neither" in printed
    assert found["protocol"] == {
        "what": "masks", "split": "one", "images": 1, "limit": 0, "data": "data", "oracle": False,
        "pred": str(tmp_path / "pred"), "mean_over": MEAN_OVER}
    (tmp_path / "pred").rename(tmp_path / "out/pseudo")       # the same as pseudo masks
    (tmp_path / "out/pseudo.json").write_text('{"crf": "weaktr", "background": "power", "value": 1}')
    again, _ = score(voc, tmp_path / "out", "pseudo", "--split", "one")
    assert again["iou"] == found["iou"] and again["protocol"]["made_by"]["crf"] == "weaktr"


# ---------------------------------------------------------------- maps

@pytest.fixture
def mapped(voc, tmp_path):
    """Maps that lean to the truth, at full size; of a_4 at half."""
    folder, rng = folders.Folder(voc), np.random.default_rng(0)
    (tmp_path / "out/cam").mkdir(parents=True)
    for id, present in LABELS.items():
        truth = folder.truth(id)
        cam = np.stack([truth == k + 1 for k in present]) if present else np.zeros((0, *truth.shape))
        cam = 0.5 * cam + 0.5 * rng.random(cam.shape)
        save_cam(tmp_path / "out/cam" / f"{id}.npy", cam[:, ::2, ::2] if id == "a_4" else cam)
    return voc, tmp_path / "out"


@pytest.mark.parametrize("more,rule,value", [
    (["--threshold", "0.3", "--oracle"], "constant", 0.3),
    (["--background", "power", "--alpha", "2"], "power", 2.0)])
def test_maps_are_the_argmax_with_their_background_and_an_oracle_is_stamped(mapped, more, rule, value):
    voc, out = mapped
    folder = folders.Folder(voc)

    def predict(id):
        classes, cam = load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        cam = resize_maps(cam, folder.truth(id).shape)
        return np.array([0, *(classes + 1)])[add_background(cam, rule, value).argmax(0).numpy()]

    found, printed = score(voc, out, "cam", *more)
    want = loop(folder, predict)
    assert [found["iou"][name] for name in ["background", *CLASSES]] == pytest.approx(want)
    assert found["miou"] == pytest.approx(np.mean(want)) and 0.1 < found["miou"] < 0.95
    facts = found["protocol"]
    assert (facts["background"], facts["value"], facts["images"]) == (rule, value, 5)
    if "--oracle" not in more:
        assert facts["oracle"] is False and "oracle_best" not in found and "truth" not in printed
        return
    sweep, best = found["oracle_sweep"], found["oracle_best"]
    assert "was chosen on the truth" in facts["oracle"] and "used the truth" in printed and len(sweep) == 99
    for t in ("0.55", f"{best['threshold']:.2f}"):            # one pass gives what many would
        assert score(voc, out, "cam", "--threshold", t)[0]["miou"] == pytest.approx(sweep[t], abs=1e-12)
    assert best["miou"] == max(sweep.values()) > found["miou"] == sweep["0.30"]


def test_what_cannot_be_scored_is_one_line(mapped, tmp_path):
    voc, out = mapped
    pred, truth = tmp_path / "pred", voc / "SegmentationClass"
    pred.mkdir()
    line = flags(voc, out, "masks", "--pred", pred)
    masks.save_mask(pred / "a_1.png", np.zeros((40, 30)))
    refused(call(*line), "a_2.png is missing, and 3 more of 5")
    refused(call(*line, "--limit", "1"), "a_1.png is 30x40, the truth 40x30: a mask has its image's size")
    masks.save_mask(pred / "a_1.png", np.full((30, 40), 90))
    refused(call(*line, "--limit", "1"), "a_1.png holds label 90", "90-id COCO")
    masks.save_mask(pred / "a_1.png", np.zeros((30, 40)))
    masks.save_mask(truth / "a_1.png", np.full((30, 40), 255))
    refused(call(*line, "--limit", "1"), "no scored pixel in split train: its true masks are all 255")
    line = flags(voc, out, "cam")
    (out / "cam.json").write_text('{"classes": ["boat", "train", "cow"]}')
    refused(call(*line), "cam.json was trained on other classes")
    (out / "cam.json").unlink()
    (out / "cam/a_2.npy").unlink()
    refused(call(*line), "a_2.npy is missing: run make_cam.py")
    (truth / "a_1.png").unlink()
    refused(call(*line), "a_1.png is missing: scoring needs true masks, training does not")
    line = flags(voc, out, "seg", "--no-crf", "--scales", "1")
    refused(call(*line), "seg.pt is missing: run train_seg.py")
    put_network(out, ["cow", "boat", "train"])
    refused(call(*line), "seg.pt was trained on other classes")
    assert not list(out.glob("eval*"))
    for what, more in (("masks", []), ("pseudo", ["--oracle"])):
        assert call(*flags(voc, tmp_path, what, *more)).returncode == 2


# ---------------------------------------------------------------- a network

def put_network(out, classes=CLASSES, sharp=30.0):
    """A random network as seg.pt, sharpened so that its predictions differ from place to place."""
    torch.manual_seed(0)
    model = networks.new_segmenter("deeplab_toy", len(classes))
    for branch in model.aspp:
        branch.weight.data *= sharp
    out.mkdir(exist_ok=True)
    checkpoints.save(out / "seg.pt", model=model.state_dict(), stage="seg", classes=list(classes),
                     args={"model": "deeplab_toy", "init": "none", "label_dir": "x"})
    return model.eval()


@torch.no_grad()
def mean_probability(model, image, sizes):
    """Over `sizes` of the image and its mirror -> (1 + C, H, W)."""
    total = 0
    for size in sizes:
        x = F.interpolate(image[None], size, mode="bilinear")
        for flip in (False, True):
            p = F.interpolate(model(x.flip(3) if flip else x).softmax(1), image.shape[1:], mode="bilinear")
            total = total + (p.flip(3) if flip else p)[0] / 2 / len(sizes)
    return total


def test_network_is_scored_on_its_mean_probability(voc, tmp_path):
    """Two scales and flips, then the CRF in a pool of processes; --save keeps palette predictions, and a
    second call takes them."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    model = put_network(out)

    def predict(id):
        h, w = folder.truth(id).shape
        sizes = (h, w), (round(h * 0.75), round(w * 0.75))
        image = np.array(images.load_image(folder.image_path(id)))
        return crf.dense_crf(image, mean_probability(model, folder.image(id), sizes), "deeplab").argmax(0)

    more = ["--scales", "1", "0.75", "--save"]
    found, _ = score(voc, out, "seg", *more, "--batch-size", "2", "--workers", "1")
    saved = {path.stem: masks.load_mask(path) for path in (out / "pred/train").glob("*.png")}
    assert len(saved) == 5 and all(np.array_equal(saved[id], predict(id)) for id in LABELS)
    assert len(np.unique(np.concatenate([mask.ravel() for mask in saved.values()]))) > 2
    assert Image.open(out / "pred/train/a_1.png").mode == "P"
    assert list(found["iou"].values()) == pytest.approx(loop(folder, predict))
    facts = found["protocol"]
    assert (facts["scales"], facts["flip"], facts["crf"]) == ([1, 0.75], True, "deeplab")
    assert facts["made_by"]["model"] == "deeplab_toy" and len(facts["weights"]) == 16

    kept = (out / "pred/train/a_1.png").stat().st_mtime_ns
    saved["a_2"] = folder.truth("a_2")
    masks.save_mask(out / "pred/train/a_2.png", saved["a_2"])
    again, _ = score(voc, out, "seg", *more)
    assert list(again["iou"].values()) == pytest.approx(loop(folder, saved.get))
    assert (out / "pred/train/a_1.png").stat().st_mtime_ns == kept
    refused(call(*flags(voc, out, "seg", *more, "--no-flip")), "pred/train was made with --flip True")
    put_network(out, sharp=29.0)
    refused(call(*flags(voc, out, "seg", *more)), "made from another network file")
