"""The embedded world: what its pictures promise, and what its CLIP knows on pictures it was not trained on."""

import json
import shutil
import sys
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, run
from PIL import Image

sys.path.append(str(ROOT / "bench"))
import make_toy  # noqa: E402
import toy_world  # noqa: E402
from plumbing import checkpoints, folders  # noqa: E402
from toy import drawings as toy  # noqa: E402
from wsss import generator  # noqa: E402

C = len(make_toy.CLASSES)


def make(out, *flags):
    return call("make_toy.py", "--out", out, *flags)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".jpg", ".png", ".txt")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The command itself, once: 24 + 8 pictures."""
    out = tmp_path_factory.mktemp("toy") / "data"
    done = make(out, "--seed", 7, "--train", 24, "--val", 8)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def scenes():
    return [make_toy.scene(21, i) for i in range(400)]


@pytest.fixture(scope="module")
def shipped():
    return toy_world.load(ROOT / "weights" / "toy_clip.pt")


# ------------------------------------------------------------------------------------------------ drawing

def test_same_seed_same_bytes_and_a_longer_set_begins_with_the_shorter(world, tmp_path):
    make_toy.write_pictures(tmp_path / "again", 7, 24, 8, 96)
    make_toy.write_pictures(tmp_path / "longer", 7, 30, 10, 96)
    make_toy.write_pictures(tmp_path / "other", 8, 24, 8, 96)
    first, again, longer, other = files(world), files(tmp_path / "again"), files(tmp_path / "longer"), files(tmp_path / "other")
    assert again == first
    pictures = [name for name in first if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 64 and all(longer[name] == first[name] for name in pictures)
    assert not any(other[name] == first[name] for name in pictures)


def test_layout_and_labels_agree_with_masks(world):
    folder = folders.Folder(world)
    assert folder.classes == make_toy.CLASSES and folder.backgrounds == make_toy.GROUNDS
    assert [len(folder.ids(split)) for split in ("train", "val")] == [24, 8] and folder.ids("train")[:2] == ["toy_000000", "toy_000001"]
    assert not set(folder.ids("train")) & set(folder.ids("val"))
    for name in folder.ids("train") + folder.ids("val"):
        with Image.open(world / "SegmentationClass" / f"{name}.png") as mask, Image.open(world / "JPEGImages" / f"{name}.jpg") as image:
            assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0] and image.mode == "RGB" and image.size == mask.size == (96, 96)
            values = np.unique(np.array(mask))
        shown = [v - 1 for v in values if v not in (0, 255)]
        assert shown == folder.labels([name])[0].nonzero().flatten().tolist() and 255 in values


def test_finished_set_is_kept_and_other_arguments_are_refused(world):
    before = (world / "labels.txt").stat().st_mtime_ns
    assert make(world, "--seed", 7, "--train", 24, "--val", 8).returncode == 0
    assert (world / "labels.txt").stat().st_mtime_ns == before
    refused(make(world, "--seed", 9), "other arguments or weights", str(world))


def test_an_interrupted_set_is_finished_by_the_same_command(world, tmp_path):
    shutil.copytree(world, tmp_path / "torn")
    note = json.loads((world / "toy.json").read_text())
    assert note.pop("finished") is True
    (tmp_path / "torn" / "toy.json").write_text(json.dumps({**note, "finished": False}))
    (tmp_path / "torn" / "labels.txt").write_text("torn")
    refused(make(tmp_path / "torn", "--seed", 9), "other arguments")                   # an interrupted set too
    assert make(tmp_path / "torn", "--seed", 7, "--train", 24, "--val", 8).returncode == 0
    assert files(tmp_path / "torn") == files(world)
    (tmp_path / "torn" / "toy.json").write_text("{")
    refused(make(tmp_path / "torn", "--seed", 7), "toy.json is not JSON")


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "labels.txt").write_text("mine")
    refused(make(tmp_path / "voc", "--train", 1, "--val", 1), "not empty and not a toy data set")
    assert [p.name for p in (tmp_path / "voc").iterdir()] == ["labels.txt"]


def test_weights_that_are_none(tmp_path):
    for name in ("toy_clip.pt", "toy_backbone.pt"):
        (tmp_path / name).write_text("torn")
    refused(make(tmp_path / "out", "--weights", tmp_path), "no checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_torn_picture(tmp_path):
    """The process's file size limit stands in for the disk: masks fit, JPEGs do not."""
    script = tmp_path / "small.py"
    script.write_text("import resource, signal, sys, pathlib\nimport make_toy\nfrom plumbing import guard\n"
                      "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))\n"
                      "common.run(lambda: make_toy.write_pictures(pathlib.Path(sys.argv[1]), 0, 2, 1, 96))\n")
    refused(run(script, tmp_path / "out", check=False), ".jpg: File too large")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize("flags, says", [(["--size", 5], "--size"), (["--train", 600000], "--train"), (["--weights", "nowhere"], "toy_clip.pt")])
def test_bad_input_is_one_line(tmp_path, flags, says):
    refused(make(tmp_path / "out", "--train", 1, "--val", 1, *flags), says)
    assert not (tmp_path / "out").exists()                                              # nothing half-made


def test_unwritable_out_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(make(tmp_path / "file"), str(tmp_path / "file"))


# ------------------------------------------------------------------------------------------------ what the world promises

def test_shares(scenes):
    """A fifth of the pictures have two classes; nine objects of ten stand on their own background; all classes are equally frequent."""
    assert .13 < np.mean([len(s.labels) == 2 for s in scenes]) < .27
    own = [[(s.ground == c).mean() > .02 for s in scenes if c in s.labels] for c in range(C)]
    assert .85 < np.mean(np.concatenate(own)) < .95 and all(np.mean(o) > .75 for o in own)
    assert all(np.mean([c in s.labels for s in scenes]) > .1 for c in range(C))
    assert len({int(s.ground[0, 0]) for s in scenes}) == len(make_toy.GROUNDS)          # neutral textures too


def test_backgrounds_touch_and_surround_the_object_in_several_sizes(scenes):
    share, touching = [], []
    for s in scenes:
        if len(s.labels) == 1:
            ring = s.mask == 255
            touching.append((s.ground[ring] == s.ground[s.mask == s.labels[0] + 1][0]).mean())
            share.append(((s.ground == s.labels[0]) & (s.mask == 0)).mean())
    assert np.mean(touching) > .95
    low, middle, high = np.quantile([x for x in share if x > 0], [.1, .5, .9])
    assert low < .35 and .4 < middle < .65 and high > .85


def test_objects_have_a_border_line_and_some_are_small(scenes):
    area = np.array([(s.mask == c + 1).mean() for s in scenes for c in s.labels])
    assert area.min() > .003 and np.mean(area < .03) > .05 and .05 < area.mean() < .2
    for s in scenes[:50]:
        inside = (s.mask > 0) & (s.mask < 255)
        assert (s.mask[make_toy.grow(inside) & ~inside] == 255).all()


def test_pictures_of_any_size(scenes):
    assert make_toy.scene(0, 3, 48).image.shape == (48, 48, 3) and make_toy.scene(0, 3, 131).mask.shape == (131, 131)


def test_object_on_texture_is_independent_of_the_background():
    samples = [make_toy.object_on_texture(np.random.default_rng([5, i]), 64) for i in range(200)]
    labels = [label for _, label in samples]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image, _ in samples)
    assert 0 <= min(labels) and max(labels) < C + len(make_toy.GROUNDS) and .3 < np.mean(np.array(labels) < C) < .7


# ------------------------------------------------------------------------------------------------ the small CLIP

def test_shipped_clip_knows_unseen_objects_whole_and_cut_out(shipped):
    found = toy_world.measure(shipped, draw=31, count=160)
    assert found["top-1 whole"] >= .97 and found["top-1 cut-out"] >= .95


def test_shipped_clip_takes_a_background_for_its_class(shipped):
    """The papers' problem: rails alone look like "train", more than other backgrounds do; train with rails as much as the train alone."""
    found = toy_world.measure(shipped, draw=32, count=160)
    assert found["class text . own background alone"] > found["class text . other backgrounds"] + .1
    assert found["class text . object + own background"] > found["class text . its cut-out, same pictures"] - .05
    assert found["background text . own background"] > found["background text . other"] + .2


def test_shipped_clip_localises_by_text(shipped):
    assert toy_world.map_scores(shipped, draw=33, count=96, resolution=96)["miou"][toy_world.THRESHOLD] > 30


def test_clip_file_is_what_build_model_reads(world):
    state = torch.load(world / "clip.pt", weights_only=True)
    model = clip.model.build_model(dict(state))
    assert state["token_embedding.weight"].shape == (49408, 128) and model.visual.input_resolution == 64 and model.context_length == 77
    assert (ROOT / "weights" / "toy_clip.pt").stat().st_size < 4e6


def test_training_lowers_the_loss_and_beats_chance(tmp_path):
    """--train-weights' CLIP, a few dozen steps of it; what it stores comes back as the same network."""
    losses = []
    model = make_toy.train_clip(seed=3, steps=30, batch=24, log=lambda step, loss, model: losses.append(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - .5
    checkpoints.save(tmp_path / "toy_clip.pt", **make_toy.pack(model, make_toy.words()))
    back = clip.model.build_model(make_toy.unpack(torch.load(tmp_path / "toy_clip.pt", weights_only=True))).float()
    images, texts, *_ = make_toy.clip_batch(np.random.default_rng([3, 9]), 3, 8)
    with torch.no_grad():
        assert torch.allclose(back.encode_image(images), model.encode_image(images), atol=.02)
        assert torch.allclose(back.encode_text(clip.tokenize(texts)), model.encode_text(clip.tokenize(texts, context_length=16)), atol=.02)
    assert toy_world.measure(back, draw=34, count=48)["top-1 whole"] > .2


# ------------------------------------------------------------------------------------------------ the generic trunk

def features(trunk, seed, count):
    """Pooled features (count, width) and labels of object_on_texture samples."""
    rng = np.random.default_rng([seed, 77])
    images, labels = zip(*(toy.object_on_texture(rng, 96) for _ in range(count)))
    model = generator.build_generator("cnn_toy", 1)
    model.load_imagenet(trunk)
    with torch.no_grad():
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return model.eval().trunk((x - model.mean) / model.std).mean((2, 3)), torch.tensor(labels)


def test_shipped_trunk_knows_objects_and_textures_it_has_not_seen():
    trunk = torch.load(ROOT / "weights" / "toy_backbone.pt", weights_only=True)["model"]
    known, names = features(trunk, 1, 300)
    probe, truth = features(trunk, 2, 100)
    centres = torch.stack([known[names == k].mean(0) for k in range(21)])
    right = torch.cdist(probe, centres).argmin(1) == truth
    assert right.float().mean() > .6                                                    # chance is 1 in 21


def test_train_backbone_makes_what_is_shipped():
    """Names and shapes of a few steps; the shipped file is 500 of them."""
    shipped = torch.load(ROOT / "weights" / "toy_backbone.pt", weights_only=True)["model"]
    made = make_toy.train_backbone(0, steps=3, batch=8, pictures=24)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
    assert made["trunk.1.num_batches_tracked"] == 3 and shipped["trunk.1.num_batches_tracked"] == 500
