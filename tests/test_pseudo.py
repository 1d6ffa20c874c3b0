"""make_pseudo.py as a command: its rule pixel by pixel, its CRF, what is kept, bad input in one line.
(Segments: test_pseudo_votes.py. Several processes: test_ranks.py. A worker that dies: test_processes.py.)"""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, refused

from plumbing import folders, images, masks
from plumbing.maps import load_cam, present, resize_maps, save_cam
from wsss import crf

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


def put_maps(voc, out, stride=1):
    """Smooth maps that lean to the truth, a row per present class. The truth then goes: no mask needs it."""
    folder, rng = folders.Folder(voc), np.random.default_rng(0)
    (out / "cam").mkdir(parents=True)
    for id in folder.ids("train"):
        truth, classes = folder.truth(id), present(folder.labels([id])[0])
        noise = resize_maps(torch.from_numpy(rng.random((len(classes), 5, 7))).float(), truth.shape).numpy()
        cam = 0.5 * (truth == classes[:, None, None] + 1) + 0.5 * noise
        save_cam(out / "cam" / f"{id}.npy", cam[:, ::stride, ::stride])
    (voc / "SegmentationClass").rename(voc / "hidden")
    (voc / "SegmentationClass").symlink_to("/nowhere")
    return voc, out


@pytest.fixture
def world(voc, tmp_path):
    return put_maps(voc, tmp_path / "out")


def make(world, *more):
    voc, out = world
    return call("make_pseudo.py", "--data", voc, "--out", out, *SHARED, *more)


def made(world, *more):
    """Makes masks -> {id: mask}, pseudo.json."""
    done = make(world, *more)
    assert done.returncode == 0, done.stderr
    name = more[more.index("--pseudo") + 1] if "--pseudo" in more else "pseudo"
    return masks_of(world[1], name), json.loads((world[1] / f"{name}.json").read_text())


def masks_of(out, name="pseudo"):
    return {path.stem: masks.load_mask(path) for path in sorted((out / name).glob("*.png"))}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[id], b[id]) for id in a)


def maps_of(world, id):
    voc, out = world
    return load_cam(out / "cam" / f"{id}.npy", folders.Folder(voc).labels([id])[0])[1]


# ---------------------------------------------------------------- the rule

@pytest.mark.parametrize("more,ground", [
    (["--threshold", "0.3"], lambda top: 0.3),
    (["--background", "power", "--alpha", "2"], lambda top: (1 - top) ** 2)])
def test_without_crf_it_is_the_best_score_of_each_pixel(world, more, ground):
    found, _ = made(world, "--no-crf", *more)
    for id, classes in LABELS.items():
        cam = maps_of(world, id)
        assert found[id].shape == cam.shape[1:]
        for y, x in np.ndindex(*found[id].shape):
            column = cam[:, y, x]
            best = int(np.argmax([ground(max(column, default=0)), *column]))
            assert found[id][y, x] == (0 if best == 0 else classes[best - 1] + 1)


@pytest.mark.parametrize("preset", ["weaktr", "irn", "deeplab"])
def test_crf_sees_the_present_classes_and_the_background(world, preset):
    found, note = made(world, "--threshold", "0.4", "--preset", preset, "--ignore-below", "0.9")
    seen = set()
    for id, classes in LABELS.items():
        image = np.array(images.load_image(folders.Folder(world[0]).image_path(id)))
        cam = maps_of(world, id)
        scores = np.concatenate([np.full((1, *cam.shape[1:]), 0.4, np.float32), cam])
        posterior = crf.dense_crf(image, scores, preset)
        want = np.array([0, *(k + 1 for k in classes)])[posterior.argmax(0)]
        want[posterior.max(0) < 0.9] = 255
        assert np.array_equal(found[id], want)
        seen |= set(np.unique(found[id]))
    assert seen >= {0, 1, 3, 255} and not found["a_3"].any()  # a_3 holds no class: all background
    pixels = np.concatenate([mask.ravel() for mask in found.values()])
    share = {name: (pixels == k).mean() for k, name in enumerate(["background", *CLASSES])}
    assert note["share"] == pytest.approx(share) and note["ignored"] == pytest.approx((pixels == 255).mean())
    assert (note["crf"], note["ignore_below"], note["images"]) == (preset, 0.9, 5)


def test_a_class_that_is_never_predicted_is_named(world):
    for id in ("a_2", "a_5"):                                 # boat is class 1, the first of both
        path = world[1] / "cam" / f"{id}.npy"
        save_cam(path, np.load(path) * np.arange(len(LABELS[id]))[:, None, None])
    assert "present but never predicted: boat" in make(world, "--no-crf").stdout
    assert json.loads((world[1] / "pseudo.json").read_text())["never_predicted"] == ["boat"]


def test_coarse_maps_and_a_pool_of_processes(voc, tmp_path):
    world = put_maps(voc, tmp_path / "out", stride=3)
    here, note = made(world, "--pseudo", "here")
    pooled, other = made(world, "--workers", "2", "--pseudo", "two")
    assert len(here) == 5 and equal(here, pooled) and note["share"] == other["share"]
    assert all(mask.shape == (30 + 4 * n % 8, 40) for n, mask in enumerate(here.values()))


# ---------------------------------------------------------------- interrupted, finished, another recipe

def test_finished_masks_are_kept_and_those_of_another_recipe_refused(world):
    recipe = world[1] / "cam/recipe.json"
    recipe.write_text('{"fingerprint": "first"}')
    made(world, "--no-crf", "--limit", "2")
    kept = {path: path.stat().st_mtime_ns for path in (world[1] / "pseudo").glob("*.png")}
    assert len(kept) == 2
    found, note = made(world, "--no-crf")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    refused(make(world, "--no-crf", "--threshold", "0.2"), "pseudo was made with --threshold 0.43 (now 0.2)")
    recipe.write_text('{"fingerprint": "second"}')
    refused(make(world, "--no-crf"), "made from another cam", "--no-resume")
    again, fresh = made(world, "--no-crf", "--no-resume")
    assert equal(found, again) and fresh["share"] == note["share"] and note["images"] == 5
    assert not any(path.stat().st_mtime_ns == time for path, time in kept.items())


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_input_is_one_line_from_any_process(world, workers):
    (world[0] / "JPEGImages/a_2.jpg").write_text("x")
    refused(make(world, "--no-crf", "--workers", workers), "a_2.jpg is not a readable image")
    assert "a_1" in masks_of(world[1]) and not (world[1] / "pseudo.json").exists()  # what was finished stays


def test_refused_before_anything_is_written(world):
    voc, out = world
    (out / "cam/a_5.npy").rename(out / "a_5.npy")
    refused(make(world), "cam: maps of a_5 are missing", "run make_cam.py --split train first")
    (out / "a_5.npy").rename(out / "cam/a_5.npy")
    shutil.rmtree(voc / "JPEGImages")
    refused(make(world), "JPEGImages is missing")
    assert not (out / "pseudo").exists()
    for more in (["--no-crf", "--ignore-below", "0.9"], ["--threshold", "43"], ["--iterations", "0"]):
        assert make(world, *more).returncode == 2
