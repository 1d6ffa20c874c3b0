"""make_pseudo.py as a command: its rule pixel by pixel, its CRF, what is kept, bad input in one line.
Segments: which vote is applied to what. (Several processes: test_ranks.py.)"""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import LABELS, call, refused
from PIL import Image
from test_votes import naive_fma, naive_sepl

from plumbing import folders, images, masks
from plumbing.maps import load_cam, present, resize_maps, save_cam
from plumbing.segments import label_segments, load_segments, save_segments
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
    """Images, maps and segments: parts of the truth's own outlines for most, none for a_5."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    (out / "segments").mkdir(parents=True)
    for n, id in enumerate(LABELS):
        truth = folder.truth(id)
        parts = truth.astype(int) * 100 + np.arange(truth.size).reshape(truth.shape) // 500
        found = [s._replace(level=n % 3) for s in label_segments(parts)] if id != "a_5" else []
        save_segments(out / "segments" / f"{id}.npz", truth.shape, found)
    (out / "segments/recipe.json").write_text('{"fingerprint": "first", "args": {"source": "slic"}}')
    return put_maps(voc, out)


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


def test_crf_sees_the_present_classes_and_the_background(world):
    found, note = made(world, "--threshold", "0.4", "--preset", "deeplab", "--ignore-below", "0.9")
    seen = set()
    for id, classes in LABELS.items():
        image = np.array(images.load_image(folders.Folder(world[0]).image_path(id)))
        cam = maps_of(world, id)
        scores = np.concatenate([np.full((1, *cam.shape[1:]), 0.4, np.float32), cam])
        posterior = crf.dense_crf(image, scores, "deeplab")
        want = np.array([0, *(k + 1 for k in classes)])[posterior.argmax(0)]
        want[posterior.max(0) < 0.9] = 255
        assert np.array_equal(found[id], want)
        seen |= set(np.unique(found[id]))
    assert seen >= {0, 1, 3, 255} and not found["a_3"].any()  # a_3 holds no class: all background
    assert (note["crf"], note["ignore_below"], note["images"]) == ("deeplab", 0.9, 5)
    pixels = np.concatenate([mask.ravel() for mask in found.values()])
    assert note["ignored"] == pytest.approx((pixels == 255).mean())
    assert note["share"]["cow"] == pytest.approx((pixels == 3).mean())


def test_coarse_maps_in_a_pool_of_processes_and_a_class_that_is_never_predicted(voc, tmp_path):
    world = put_maps(voc, tmp_path / "out", stride=3)
    for id in ("a_2", "a_5"):                                 # boat is class 1, the first of both
        path = world[1] / "cam" / f"{id}.npy"
        save_cam(path, np.load(path) * np.arange(len(LABELS[id]))[:, None, None])
    here, note = made(world, "--pseudo", "here")
    pooled, other = made(world, "--workers", "2", "--pseudo", "two")
    assert len(here) == 5 and equal(here, pooled) and note["share"] == other["share"]
    assert all(mask.shape == (30 + 4 * n % 8, 40) for n, mask in enumerate(here.values()))
    assert note["never_predicted"] == ["boat"]


def test_segments_vote(world):
    """FMA-WSSS's vote on the maps or, with --crf, on the posterior; SEPL's on the masks."""
    more, voted = ["--threshold", "0.3", "--preset", "deeplab"], ["--segments", world[1] / "segments"]
    plain, _ = made(world, *more, "--no-crf", "--pseudo", "plain")
    by_crf, _ = made(world, *more, "--pseudo", "by_crf")
    sams, note = made(world, *more, *voted, "--pseudo", "sams")
    power, _ = made(world, *more, *voted, "--pseudo", "power", "--power", "1.5", "--crf")
    sepl, other = made(world, *more, *voted, "--pseudo", "sepl", "--vote", "sepl")
    for id, classes in LABELS.items():
        label, cam = np.array([0, *(k + 1 for k in classes)]), maps_of(world, id)
        segments = load_segments(world[1] / "segments" / f"{id}.npz", cam.shape[1:])
        if not segments:                                      # masked as without --segments
            assert np.array_equal(sams[id], plain[id])
            assert np.array_equal(power[id], by_crf[id]) and np.array_equal(sepl[id], by_crf[id])
            continue
        if not classes:
            assert not any(masks[id].any() for masks in (plain, by_crf, sams, power, sepl))
            continue
        full, levels = np.zeros((len(segments), *cam.shape[1:]), bool), [s.level for s in segments]
        for mask, s in zip(full, segments):
            mask[s.where] = s.mask
        assert np.array_equal(sams[id], label[naive_fma(full, levels, cam, 0.7)])
        assert np.array_equal(sepl[id], naive_sepl(full, by_crf[id]))
        assert not np.array_equal(sepl[id], by_crf[id])
        scores = np.concatenate([np.full((1, *cam.shape[1:]), 0.3, np.float32), cam])
        image = np.array(images.load_image(folders.Folder(world[0]).image_path(id)))
        posterior = crf.dense_crf(image, scores, "deeplab")[1:]
        assert np.array_equal(power[id], label[naive_fma(full, levels, posterior, 1.5)])
    facts = ("without_segments", "vote", "background", "value", "crf")
    assert [note[name] for name in facts] == [1, "sams", "power", 0.7, None]
    assert note["pixels"] == {"background": "constant", "value": 0.3} and note["segments"]["source"] == "slic"
    assert [other[name] for name in facts] == [1, "sepl", "constant", 0.3, "deeplab"]


# ---------------------------------------------------------------- interrupted, finished, another recipe

def test_finished_masks_are_kept_and_those_of_another_recipe_refused(world):
    recipe = world[1] / "cam/recipe.json"
    recipe.write_text('{"fingerprint": "first"}')
    made(world, "--no-crf", "--limit", "2")
    kept = {path: path.stat().st_mtime_ns for path in (world[1] / "pseudo").glob("*.png")}
    assert len(kept) == 2
    found, _ = made(world, "--no-crf")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    refused(make(world, "--no-crf", "--threshold", "0.2"), "pseudo was made with --threshold 0.43 (now 0.2)")
    recipe.write_text('{"fingerprint": "second"}')
    refused(make(world, "--no-crf"), "made from another cam", "--no-resume")
    assert equal(found, made(world, "--no-crf", "--no-resume")[0])
    assert not any(path.stat().st_mtime_ns == time for path, time in kept.items())


# ---------------------------------------------------------------- bad input

def test_bad_input_is_one_line(world):
    voc, out = world
    (out / "cam/a_5.npy").rename(out / "a_5.npy")
    refused(make(world), "cam: maps of a_5 are missing", "run make_cam.py --split train first")
    (out / "a_5.npy").rename(out / "cam/a_5.npy")
    assert not (out / "pseudo").exists()
    image = voc / "JPEGImages/a_2.jpg"
    image.rename(out / "a_2.jpg")
    image.write_text("x")
    refused(make(world, "--no-crf", "--workers", "1"), "a_2.jpg is not a readable image")
    assert "a_1" in masks_of(out) and not (out / "pseudo.json").exists()      # what was finished stays
    (out / "a_2.jpg").replace(image)

    voted = ["--segments", out / "segments", "--pseudo", "voted"]
    for _ in range(2):                                        # the second time nothing is left to do
        assert made(world, *voted)[1]["without_segments"] == 1
    refused(make(world, *voted, "--vote", "sepl"), "was made with", "--vote sams (now sepl)")
    (out / "segments/recipe.json").write_text('{"fingerprint": "second"}')
    refused(make(world, *voted), "made from another segments")
    (out / "segments/a_4.npz").unlink()
    refused(make(world, *voted), "segments of a_4 are missing", "run python -m hosts.make_segments")
    Image.new("L", (9, 9)).save(out / "segments/a_4.png")
    refused(make(world, *voted, "--no-resume"), "a_4.png holds no segments of its image", "9x9")
    shutil.rmtree(voc / "JPEGImages")
    refused(make(world), "JPEGImages is missing")
    for more in (["--no-crf", "--ignore-below", "0.9"], [*voted, "--crf", "--ignore-below", ".5"]):
        assert make(world, *more).returncode == 2
