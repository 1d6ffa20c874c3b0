"""make_pseudo.py as a command: the rule pixel by pixel, any number of processes (its segments' too), killed and restarted, every bad input in one line."""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, ROOT, call, make_folder, refused, run_together

from plumbing import folders, images, maps, masks as mask_files
from wsss import crf

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


def put_maps(voc, out, stride=1, seed=0):
    """Smooth maps that lean to the truth, one row per present class."""
    folder, rng = folders.Folder(voc), np.random.default_rng(seed)
    (out / "cam").mkdir(parents=True)
    for id in folder.ids("train"):
        truth, present = folder.truth(id), maps.present(folder.labels([id])[0])
        noise = maps.resize_maps(torch.from_numpy(rng.random((len(present), 5, 7))).float(), truth.shape).numpy()
        cam = np.stack([(truth == k + 1) * 0.5 for k in present]) + noise * 0.5 if len(present) else np.zeros((0, *truth.shape))
        maps.save_cam(out / "cam" / f"{id}.npy", cam[:, ::stride, ::stride])
    shutil.rmtree(voc / "SegmentationClass")                                    # writing masks never opens the truth


def masks(out, name="pseudo"):
    return {path.stem: mask_files.load_mask(path) for path in sorted((out / name).glob("*.png"))}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[id], b[id]) for id in a)


@pytest.fixture
def world(voc, tmp_path):
    put_maps(voc, tmp_path / "out")
    return voc, tmp_path / "out"


@pytest.mark.parametrize("rule", [["--background", "constant", "--threshold", "0.3"], ["--background", "power", "--alpha", "2"]], ids=" ".join)
def test_without_crf_it_is_the_best_score_of_each_pixel(world, rule):
    voc, out = world
    done = call("make_pseudo.py", "--data", voc, "--out", out, *SHARED, "--no-crf", *rule)
    assert done.returncode == 0, done.stderr
    folder, found = folders.Folder(voc), masks(out)
    for id, present in LABELS.items():
        _, cam = maps.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        assert found[id].shape == cam.shape[1:]
        for y, x in np.ndindex(*found[id].shape):
            column = cam[:, y, x]
            ground = 0.3 if "constant" in rule else (1 - max(column, default=0)) ** 2
            best = int(np.argmax([ground, *column]))
            assert found[id][y, x] == (0 if best == 0 else present[best - 1] + 1)


def test_crf_sees_the_present_classes_and_the_background(world):
    voc, out = world
    done = call("make_pseudo.py", "--data", voc, "--out", out, *SHARED, "--threshold", "0.4", "--preset", "deeplab", "--ignore-below", "0.9")
    assert done.returncode == 0, done.stderr
    folder, found, seen = folders.Folder(voc), masks(out), set()
    for id, present in LABELS.items():
        image = np.array(images.load_image(folder.image_path(id)))
        _, cam = maps.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        posterior = crf.dense_crf(image, np.concatenate([np.full((1, *cam.shape[1:]), 0.4, np.float32), cam]), preset="deeplab")
        want = np.array([0, *(k + 1 for k in present)])[posterior.argmax(0)]
        want[posterior.max(0) < 0.9] = 255
        assert np.array_equal(found[id], want)
        seen |= set(np.unique(found[id]))
    assert seen == {0, 1, 2, 3, 255} and not found["a_3"].any()                 # a_3 holds no class: all background
    note = json.loads((out / "pseudo.json").read_text())
    total = np.concatenate([m.ravel() for m in found.values()])
    assert note["share"] == pytest.approx({name: (total == k).mean() for k, name in enumerate(["background", *CLASSES])})
    assert note["ignored"] == pytest.approx((total == 255).mean()) and note["crf"] == "deeplab" and note["never_predicted"] == []


def test_a_class_that_is_never_predicted_is_said(world):
    voc, out = world
    for id, present in LABELS.items():
        if 1 in present:
            cam = np.load(out / "cam" / f"{id}.npy")
            cam[present.index(1)] = 0
            np.save(out / "cam" / f"{id}.npy", cam)
    done = call("make_pseudo.py", "--data", voc, "--out", out, *SHARED, "--no-crf")
    assert "never predicted: boat" in done.stdout and json.loads((out / "pseudo.json").read_text())["never_predicted"] == ["boat"]


def test_any_number_of_processes_and_maps_at_a_stride(voc, tmp_path):
    out = tmp_path / "out"
    put_maps(voc, out, stride=3)
    flags = ["--data", voc, "--out", out, "--split", "train", "--device", "cpu"]
    assert call("make_pseudo.py", *flags, "--workers", "0", "--pseudo", "here").returncode == 0
    assert call("make_pseudo.py", *flags, "--workers", "1", "--pseudo", "one").returncode == 0
    assert call("make_pseudo.py", *flags, "--workers", "2", "--pseudo", "two").returncode == 0
    segmented = lambda segments, pseudo: [
        ("make_segments.py", *flags, "--workers", "0", "--source", "felzenszwalb", "--scales", "5", "40", "--min-area", "8", "--segments", segments),
        ("make_pseudo.py", *flags, "--workers", "0", "--segments", out / segments, "--pseudo", pseudo)] if importlib.util.find_spec("skimage") else []
    run_together([("make_pseudo.py", *flags, "--workers", "0", "--pseudo", "ranks"), *segmented("segments_ranks", "voted_ranks")], tmp_path)
    for job in segmented("segments", "voted"):
        assert call(*job).returncode == 0
    here, note = masks(out, "here"), lambda name: json.loads((out / f"{name}.json").read_text())
    assert len(here) == 5 and all(equal(here, masks(out, name)) and note(name)["share"] == note("here")["share"] for name in ("one", "two", "ranks"))
    if segmented("", ""):
        content = lambda name: {path.name: path.read_bytes() for path in (out / name).glob("*.npz")}
        assert len(content("segments")) == 5 and content("segments") == content("segments_ranks")
        assert len(masks(out, "voted")) == 5 and equal(masks(out, "voted"), masks(out, "voted_ranks")) and note("voted")["share"] == note("voted_ranks")["share"]
        assert all(note("segments")[k] == note("segments_ranks")[k] for k in ("pictures", "segments", "levels", "pictures_without"))


def test_finished_masks_are_kept_and_counted(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED]
    call("make_pseudo.py", *flags, "--limit", "2")
    kept = {path: path.stat().st_mtime_ns for path in (out / "pseudo").glob("*.png")}
    assert len(kept) == 2
    call("make_pseudo.py", *flags)
    whole, note = masks(out), json.loads((out / "pseudo.json").read_text())
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    call("make_pseudo.py", *flags, "--no-resume")
    again = json.loads((out / "pseudo.json").read_text())
    assert equal(masks(out), whole) and again["share"] == note["share"] and note["pictures"] == 5


def children(pid):
    """Processes below `pid` that run tasks: those without a child of their own."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                table[int(entry)] = int(open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[1])
            except OSError:
                pass
    below, found = [pid], []
    while below:
        parent = below.pop()
        mine = [child for child, above in table.items() if above == parent]
        found += [child for child in mine if child not in table.values()]
        below += mine
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for the worker in /proc")
def test_a_killed_worker_and_a_killed_run_go_on_to_the_same_masks(tmp_path):
    voc, out = make_folder(tmp_path / "data", labels={f"b_{n}": [n % 3] for n in range(8)}, size=(120, 160)), tmp_path / "out"
    put_maps(voc, out)
    flags = [str(x) for x in ("--data", voc, "--out", out, "--split", "train", "--device", "cpu", "--preset", "deeplab", "--iterations", "60")]

    def start_and_strike(strike, at_least):
        process = subprocess.Popen([sys.executable, "make_pseudo.py", *flags, "--workers", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))       # a shell's background job ignores it
        while len(list((out / "pseudo").glob("*.png"))) < at_least and process.poll() is None:
            time.sleep(0.005)
        strike(process)
        return process, process.communicate(timeout=60)[1]

    def kill_worker(process):
        for pid in children(process.pid):
            if b"forkserver" in open(f"/proc/{pid}/cmdline", "rb").read():
                os.kill(pid, signal.SIGKILL)

    process, err = start_and_strike(kill_worker, 1)
    assert process.returncode == 1 and "a worker process died" in err and "fewer --workers" in err and "Traceback" not in err, err
    assert 1 <= len(masks(out)) < 8 and not (out / "pseudo.json").exists() and not list((out / "pseudo").glob(".*"))
    before = len(masks(out))
    process, err = start_and_strike(lambda p: p.send_signal(signal.SIGINT), before + 1)
    assert process.returncode == 130 and "nothing finished is lost" in err and "Traceback" not in err, err
    assert before < len(masks(out)) < 8
    assert call("make_pseudo.py", *flags, "--workers", "0").returncode == 0
    interrupted = masks(out)
    assert call("make_pseudo.py", *flags, "--workers", "0", "--no-resume").returncode == 0
    assert len(interrupted) == 8 and equal(interrupted, masks(out))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil,words", [
    (lambda v, o: maps.save_cam(o / "cam/a_2.npy", np.zeros((2, 40, 34))), ["a_2.npy: maps of 34x40 do not fit their image of 40x34"]),
    (lambda v, o: np.save(o / "cam/a_2.npy", np.array([{}])), ["a_2.npy is not a plain .npy"]),
    (lambda v, o: maps.save_cam(o / "cam/a_4.npy", np.zeros((1, 34, 40))), ["a_4.npy has 1 maps", "2 classes"]),
    (lambda v, o: (v / "JPEGImages/a_2.jpg").write_text("no picture"), ["a_2.jpg is not a readable image"]),
])
def test_bad_input_is_one_line_from_any_process(world, spoil, words, workers):
    voc, out = world
    spoil(voc, out)
    refused(call("make_pseudo.py", "--data", voc, "--out", out, *SHARED[:-1], workers, "--no-crf"), *words)
    assert "a_1" in masks(out) and not (out / "pseudo.json").exists()           # what was finished is kept


def test_refused_before_anything_is_written(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED]
    (out / "cam/a_5.npy").rename(out / "a_5.npy")
    refused(call("make_pseudo.py", *flags), "a_5.npy is missing, and 0 more of 5", "make_cam.py")
    assert not (out / "pseudo").exists()
    (out / "a_5.npy").rename(out / "cam/a_5.npy")
    (voc / "ImageSets/Segmentation/empty.txt").write_text("")
    refused(call("make_pseudo.py", *flags, "--split", "empty"), "empty.txt is empty")
    assert call("make_pseudo.py", *flags, "--no-crf", "--ignore-below", "0.9").returncode == 2
    assert call("make_pseudo.py", *flags, "--threshold", "43").returncode == 2


def test_masks_of_another_recipe_or_of_other_maps_are_refused(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED, "--no-crf"]
    (out / "cam/recipe.json").write_text('{"fingerprint": "first"}')
    assert call("make_pseudo.py", *flags).returncode == 0
    refused(call("make_pseudo.py", *flags, "--threshold", "0.2"), "pseudo was made with --threshold 0.43 (now 0.2)", "--no-resume")
    (out / "cam/recipe.json").write_text('{"fingerprint": "second"}')
    refused(call("make_pseudo.py", *flags), "made from another cam")
    first = masks(out)
    assert call("make_pseudo.py", *flags, "--threshold", "0.2", "--no-resume").returncode == 0 and not equal(first, masks(out))
