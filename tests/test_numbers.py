"""Numbers at their edge, through the scripts: images of a few pixels, one class, masks of one value; half
precision; the same bits again; nothing that grows from step to step."""
import gc
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, call, make_folder, rows, run_together, same, weights
from PIL import Image

from plumbing import checkpoints, files, folders, masks
from plumbing.maps import load_cam
from tests.rigs import precision

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]
SMALL = ["--batch-size", "2", "--log-every", "1", "--epochs", "1", "--crop", "24"]
TRAINERS = {"train_cls.py": "cls", "train_match.py": "match", "train_prompt.py": "prompts",
            "train_refine.py": "refine", "train_seg.py": "seg"}
SIZES = {"one": (1, 1), "wide": (3, 200), "tall": (200, 3), "flat": (30, 30), "none": (28, 28),
         "all": (33, 33), "plain": (40, 52), "plain2": (40, 52)}


def make_odd(root):
    """Images of one pixel, of three rows, of three columns, of one colour, without a class. Masks: an object
    and some pixels ignored, all background, all of the class, all ignored."""
    make_folder(root, {id: [] if id == "none" else [0] for id in SIZES}, classes=["dog"])
    rng = np.random.default_rng(0)
    for id, size in SIZES.items():
        image = rng.integers(90, 91 if id == "flat" else 256, (*size, 3), np.uint8)
        (root / f"JPEGImages/{id}.jpg").unlink()
        Image.fromarray(image).save(root / f"JPEGImages/{id}.png")
        mask = np.full(size, {"none": 0, "flat": 255}.get(id, 1), np.uint8)
        if id not in ("none", "all", "flat"):
            mask[size[0] // 2 + 1:] = 255
        masks.save_mask(root / f"SegmentationClass/{id}.png", mask)


def words(script, world, out, *more):
    trunk, clip = ROOT / "weights/toy_backbone.pt", ["--clip", world / "clip.pt"]
    truth = ["--label-dir", world / "data/SegmentationClass"]
    own = {
        "train_cls.py": [*SMALL, "--generator", "cnn_toy", "--backbone", trunk, "--lr", "1e-3"],
        "train_match.py": [*SMALL, *clip, "--lr", "1e-3"], "train_prompt.py": [*SMALL, *clip, "--lr", "0.01"],
        "train_refine.py": [*SMALL, *clip, "--lr", "1e-3"],
        "train_seg.py": ["--model", "deeplab_toy", "--init", trunk, "--crop", "33", "--batch-size", "2",
                         "--log-every", "1", "--iterations", "4", *truth],
        "vpl.py": [*clip, "--tau-t", "0.02", "--steps", "3"]}
    return ["--data", world / "data", "--out", out, *SHARED, *own.get(script, []), *more]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_clip):
    """The odd images, and every trainer's result on them."""
    root = tmp_path_factory.mktemp("odd")
    make_odd(root / "data")
    (root / "clip.pt").symlink_to(tiny_clip)
    for script in [*TRAINERS, "vpl.py"]:
        done = call(script, *words(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def linked(world, out, *names):
    out.mkdir()
    for name in names:
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")
    return out


# ---------------------------------------------------------------- images and masks at their edge

def test_odd_images_through_every_stage(odd):
    """What each stage writes is finite and of the image's size; an image without a class is background."""
    out, ids = odd / "out", list(SIZES)
    for name in TRAINERS.values():
        assert all(math.isfinite(row["loss"]) for row in rows(out / f"{name}.jsonl")), name
    clip = ["--clip", odd / "clip.pt"]
    for job in (["make_cam.py", "--source", "refine", "--cam", "refine", "--scales", "0.5", "1.5", "--flip"],
                ["make_cam.py", "--source", "text", *clip, "--cam", "text", "--no-affinity", "--stride", "4"],
                ["make_cam.py", "--source", "vision", *clip, "--cam", "vision"],
                ["make_pseudo.py", "--cam", "vision", "--background", "power", "--ignore-below", "0.5"],
                ["eval.py", "--what", "cam", "--cam", "vision", "--oracle"], ["eval.py", "--what", "pseudo"],
                ["eval.py", "--what", "seg", "--save", "--scales", "0.5", "1", "1.75"]):
        done = call(job[0], *words(job[0], odd, out, *job[1:]))
        assert done.returncode == 0, (job, done.stderr)
    for id, label in zip(ids, folders.Folder(odd / "data").labels(ids)):
        for source in ("refine", "text", "vision"):
            _, found = load_cam(out / source / f"{id}.npy", label, SIZES[id])      # of its proportions
            assert len(found) == label.sum() and ((found >= 0) & (found <= 1)).all(), (source, id)
        for folder, values in (("pseudo", {0, 1, 255}), ("pred/train", {0, 1})):
            mask = masks.load_mask(out / folder / f"{id}.png")
            assert mask.shape == SIZES[id] and set(np.unique(mask)) <= values, (folder, id)
    assert set(np.unique(masks.load_mask(out / "pseudo/none.png"))) <= {0, 255}
    for name in ("vision", "pseudo", "seg"):
        score = files.read_json(out / f"eval_{name}_train.json")
        assert 0 <= score["miou"] <= 1 and len(score["iou"]) == 2, name


# ---------------------------------------------------------------- precision, and the same bits again

@pytest.mark.parametrize("script", ["train_prompt.py", "train_refine.py"])
def test_half_precision_stays_near_float32(odd, tmp_path, script):
    """Within the bounds that are promised, over 8 steps; tests/rigs/precision.py measures 50."""
    stage, made = TRAINERS[script], {}
    before = list(TRAINERS.values())[:list(TRAINERS).index(script)]
    plain = [] if script == "train_prompt.py" else ["--no-randaugment", "--erase", "0"]
    for amp in ("off", "bf16", "fp16"):
        made[amp] = linked(odd, tmp_path / amp, *before)
        more = ["--epochs", "2", "--save-every", "8", "--amp", amp, *plain]
        done = call(script, *words(script, odd, made[amp], *more))
        assert done.returncode == 0, done.stderr
    for amp, bounds in precision.BOUNDS.items():
        found = precision.compare(made["off"], made[amp], stage, weights(odd / f"out/{stage}.pt"))
        assert 0 < found["loss"] and all(found[name] <= most for name, most in bounds.items()), (amp, found)
        assert found["skipped"] == (0 if amp == "fp16" else None)


def test_another_process_with_other_workers_makes_the_same_bits(odd, tmp_path):
    """Every trainer, maps and masks: one process here, another there, with loader processes."""
    here, there = linked(odd, tmp_path / "here", "refine"), tmp_path / "there"
    later = [["make_cam.py", "--source", "refine", "--sheets", "0"], ["make_pseudo.py"]]
    for script, *more in later:
        assert call(script, *words(script, odd, here, *more)).returncode == 0
    jobs = [[script, *words(script, odd, there, "--deterministic", "--workers", "1")] for script in TRAINERS]
    jobs += [[script, *words(script, odd, there, *more)] for script, *more in later]
    run_together(jobs, tmp_path, processes=1)
    for name in TRAINERS.values():
        assert same(weights(odd / f"out/{name}.pt"), weights(there / f"{name}.pt")), name
    made = [path.relative_to(here) for path in (*here.glob("cam/*.npy"), *here.glob("pseudo/*.png"))]
    assert len(made) == 2 * len(SIZES)
    assert all((here / path).read_bytes() == (there / path).read_bytes() for path in made)


# ---------------------------------------------------------------- memory

def held():
    """What this process holds: bytes of tensors, Python objects, open files."""
    gc.collect()
    objects = gc.get_objects()
    tensors = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in objects
               if type(each) in (torch.Tensor, torch.nn.Parameter)}
    return np.array([sum(tensors.values()), len(objects), len(os.listdir("/proc/self/fd"))])


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts files in /proc")
def test_nothing_stays_from_step_to_step(odd, tmp_path, monkeypatch):
    """After the sixth epoch of twelve, when all that is made once has been made, and after the last."""
    seen, save = [], checkpoints.Keeper.save_state

    def save_and_look(keeper):
        save(keeper)
        seen.append(held())

    monkeypatch.setattr(checkpoints.Keeper, "save_state", save_and_look)
    often = ["--save-every", "4", "--epochs", "12"]
    done = call("train_match.py", *words("train_match.py", odd, linked(odd, tmp_path / "out", "cls"), *often))
    assert done.returncode == 0 and len(seen) == 12, done.stderr
    assert (seen[11] - seen[5] <= [50_000, 12, 0]).all(), seen         # some batches hold more pairs
