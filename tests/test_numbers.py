"""Numbers at their edge, through the scripts: what is not finite, one class and a thousand, pictures of a few pixels, masks of one value; half precision; the same bits again."""
import math
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, rows, run, run_together, same, weights
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wsss import clip_model, common, crf, data, generator, losses, metrics, segmenter

TRUNK = ROOT / "weights/toy_backbone.pt"
SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]
TRAINERS = {"train_cls.py": "cls", "train_match.py": "match", "train_prompt.py": "prompts", "train_refine.py": "refine", "train_seg.py": "seg"}
SIZES = {"one": (1, 1), "wide": (3, 200), "tall": (200, 3), "flat": (30, 30), "none": (28, 28), "all": (33, 33), "plain": (40, 52), "plain2": (40, 52)}


def make_odd(root, classes):
    """Pictures of one pixel, of three rows, of three columns, of one colour, without any class, with all classes.

    Masks: of one pixel, all background, all of a class, all ignored, an object, some of it ignored."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for n, (id, (h, w)) in enumerate(SIZES.items()):
        Image.fromarray(np.full((h, w, 3), 90, np.uint8) if id == "flat" else rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / f"JPEGImages/{id}.png")
        k = n % len(classes)
        mask = np.full((h, w), {"none": 0, "all": 1, "flat": 255}.get(id, 0), np.uint8)
        if id not in ("none", "all", "flat"):
            mask[h // 4:h // 2 + 1, w // 4:w // 2 + 1], mask[h // 2 + 1:h // 2 + 3] = k + 1, 255
        data.save_mask(root / f"SegmentationClass/{id}.png", mask)
        lines.append(" ".join([id, *([] if id == "none" else classes if id == "all" else [classes[k]])]))
    (root / "classes.txt").write_text("\n".join(classes))
    (root / "labels.txt").write_text("\n".join(lines))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(SIZES))
    return root


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_clip):
    """The odd pictures with one class, and every stage of SemPLeS done on them."""
    root = tmp_path_factory.mktemp("one")
    make_odd(root / "data", ["dog"])
    (root / "clip.pt").symlink_to(tiny_clip)
    for script in TRAINERS:
        done = call(script, *flags(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def flags(script, world, out, *more):
    own = {"train_cls.py": ["--generator", "cnn_toy", "--start", TRUNK, "--lr", "1e-3", "--warmup", "0.5"], "train_prompt.py": ["--lr", "0.01"],
           "train_seg.py": ["--model", "deeplab_toy", "--init", TRUNK, "--label-dir", world / "data/SegmentationClass", "--crop", "33", "--iterations", "4", "--lr", "1e-4"]}
    clip = [] if script in ("train_cls.py", "train_seg.py") else ["--clip", world / "clip.pt"]
    length = [] if script == "train_seg.py" else ["--epochs", "1", "--crop", "24"]
    return ["--data", world / "data", "--out", out, *SHARED, "--amp", "off", "--batch-size", "2", "--log-every", "1", *length, *clip, *own.get(script, ["--lr", "1e-3"]), *more]


def copy_inputs(world, out, stage):
    """A folder that holds what the stages before `stage` made."""
    out.mkdir()
    for name in TRAINERS.values():
        if name == stage:
            return out
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")


# ---------------------------------------------------------------- what is not finite

@pytest.mark.parametrize("script", TRAINERS)
def test_weights_that_a_step_breaks_are_not_saved(one, tmp_path, script):
    """The loss of step 1 is finite, its gradient is not: the next loss would show it, after the state of step 1 was saved."""
    stage = TRAINERS[script]
    out = copy_inputs(one, tmp_path / "out", stage)

    def spoil(optimizer, *_):
        next(w for group in optimizer.param_groups for w in group["params"] if w.grad is not None).grad.view(-1)[0] = float("nan")

    hook = register_optimizer_step_pre_hook(spoil)
    try:
        done = call(script, *flags(script, one, out, "--save-every", "1"))
    finally:
        hook.remove()
    refused(done, f"{stage}.last.pt: ", "holds NaN or infinity after step 1 of epoch 0", "not saved", "lower --lr")
    assert not (out / f"{stage}.last.pt").exists() and not (out / f"{stage}.pt").exists()
    assert len(rows(out / f"{stage}.jsonl")) == 1 and math.isfinite(rows(out / f"{stage}.jsonl")[0]["loss"])


@pytest.mark.parametrize("script", TRAINERS)
def test_a_loss_that_is_not_finite_leaves_the_state_from_before(one, tmp_path, script, monkeypatch):
    """From the third step on the loss is NaN: the state of the second stays, and the run goes on from it to the same bits."""
    stage = TRAINERS[script]
    out, mean, steps = copy_inputs(one, tmp_path / "out", stage), common.mean, []
    add = common.Meter.add

    def count(meter, pictures, **values):
        steps.append(pictures)
        return add(meter, pictures, **{**values, "loss": values["loss"] * (float("nan") if len(steps) >= 3 else 1)})

    monkeypatch.setattr(common.Meter, "add", count)
    done = call(script, *flags(script, one, out, "--save-every", "2"))
    names = [list(SIZES)[i] for i in steps[-1].tolist()]
    refused(done, f"the loss is nan on the batch {', '.join(names)}, ...", "--lr", "--amp", "the last saved state is from before")
    assert torch.load(out / f"{stage}.last.pt", weights_only=True)["step"] == 2 and not (out / f"{stage}.pt").exists()
    monkeypatch.undo()
    assert mean is common.mean and call(script, *flags(script, one, out, "--save-every", "2")).returncode == 0
    assert same(weights(out / f"{stage}.pt"), weights(one / f"out/{stage}.pt"))
