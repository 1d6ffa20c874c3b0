"""The toy world: what its images promise, and what its two networks know of new ones."""
import json
import resource
import shutil

import clip
import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused
from PIL import Image

import make_toy
from ablations import toy_world
from plumbing import checkpoints
from plumbing.folders import Folder
from toy import clip as toy_clip
from toy import drawings
from toy.drawings import CLASSES, GROUNDS
from toy.networks import ToyCNN

C = len(CLASSES)
RECIPE = ("--seed", 7, "--train", 12, "--val", 4)


def make(out, *flags):
    return call("make_toy.py", "--out", out, *flags)


def contents(folder):
    paths = (path for ending in ("jpg", "png", "txt") for path in folder.rglob(f"*.{ending}"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read(name):
    return torch.load(ROOT / "weights" / name, weights_only=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The command itself, once: 12 + 4 images."""
    out = tmp_path_factory.mktemp("toy") / "data"
    done = make(out, *RECIPE)
    assert done.returncode == 0, done.stderr
    return out


# ---------------------------------------------------------------- the data set

def test_same_seed_same_bytes_and_a_longer_set_begins_with_the_shorter(world, tmp_path):
    make_toy.write_images(tmp_path / "longer", 7, 15, 6, 96)
    make_toy.write_images(tmp_path / "other", 8, 12, 4, 96)
    first, longer, other = map(contents, (world, tmp_path / "longer", tmp_path / "other"))
    drawn = [name for name in first if not name.endswith(".txt")]
    assert len(drawn) == 32 and all(longer[name] == first[name] for name in drawn)
    assert not any(other[name] == first[name] for name in drawn)


def test_layout_and_labels_agree_with_masks(world):
    folder = Folder(world)
    train, val = folder.ids("train"), folder.ids("val")
    assert folder.classes == CLASSES and folder.backgrounds == GROUNDS
    assert (len(train), len(val)) == (12, 4) and train[:2] == ["toy_000000", "toy_000001"]
    assert not set(train) & set(val)
    for id in train + val:
        mask, image = Image.open(folder.mask_path(id)), Image.open(folder.image_path(id))
        assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
        assert image.mode == "RGB" and image.size == mask.size == (96, 96)
        first, *shown, last = np.unique(np.array(mask)).tolist()
        assert (first, last) == (0, 255)
        assert [v - 1 for v in shown] == folder.labels([id])[0].nonzero().flatten().tolist()


def test_a_finished_set_is_kept_and_other_arguments_are_refused(world, tmp_path):
    before = (world / "labels.txt").stat().st_mtime_ns
    assert "is complete" in make(world, *RECIPE).stdout
    assert (world / "labels.txt").stat().st_mtime_ns == before
    refused(make(world, "--seed", 9), "other arguments or weights", str(world))
    (tmp_path / "labels.txt").write_text("mine")
    refused(make(tmp_path), "not empty and not a toy data set")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_an_interrupted_set_is_finished_by_the_same_command(world, tmp_path):
    torn, note = tmp_path / "torn", json.loads((world / "toy.json").read_text())
    shutil.copytree(world, torn)
    assert note["finished"] is True
    (torn / "toy.json").write_text(json.dumps({**note, "finished": False}))
    (torn / "labels.txt").write_text("torn")
    (torn / "JPEGImages/toy_000003.jpg").unlink()
    refused(make(torn, "--seed", 9), "other arguments")
    assert make(torn, *RECIPE).returncode == 0 and contents(torn) == contents(world)
    (torn / "toy.json").write_text("{")
    refused(make(torn, *RECIPE), "toy.json is not JSON")


def test_a_full_disk_leaves_no_torn_image(tmp_path):
    """The process's limit of a file's size stands in for the disk: masks fit, JPEGs do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(OSError, match="File too large.*jpg"):
            make_toy.write_images(tmp_path, 0, 2, 1, 96)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_input_is_one_line(tmp_path):
    for flags, text in ((["--size", 5], "--size"), (["--train", 600000], "--train"),
                        (["--weights", "nowhere"], "toy_clip.pt is missing")):
        refused(make(tmp_path / "out", *flags), text)
    for name in ("toy_clip.pt", "toy_backbone.pt", "file"):
        (tmp_path / name).write_text("torn")
    refused(make(tmp_path / "out", "--weights", tmp_path), "toy_clip.pt: not a checkpoint")
    assert not (tmp_path / "out").exists()
    refused(make(tmp_path / "file"), str(tmp_path / "file"))


# ---------------------------------------------------------------- what the drawings promise

@pytest.fixture(scope="module")
def scenes():
    return [drawings.scene(21, i) for i in range(240)]


def test_shares(scenes):
    """A fifth of the images has two classes; nine objects of ten stand on their own background."""
    assert .12 < np.mean([len(s.labels) == 2 for s in scenes]) < .28
    own = [[(s.ground == c).mean() > .02 for s in scenes if c in s.labels] for c in range(C)]
    assert .85 < np.mean(np.concatenate(own)) < .96 and all(np.mean(o) > .75 for o in own)
    assert all(np.mean([c in s.labels for s in scenes]) > .1 for c in range(C))
    assert len({int(s.ground[0, 0]) for s in scenes}) == len(GROUNDS)                   # neutral ones too


def test_backgrounds_touch_and_surround_the_object_in_several_sizes(scenes):
    alone = [(s, s.labels[0]) for s in scenes if len(s.labels) == 1]
    touching = [(s.ground[s.mask == 255] == s.ground[s.mask == c + 1][0]).mean() for s, c in alone]
    assert np.mean(touching) > .95
    share = [((s.ground == c) & (s.mask == 0)).mean() for s, c in alone]
    low, middle, high = np.quantile([x for x in share if x > 0], [.1, .5, .9])
    assert low < .35 and .4 < middle < .65 and high > .85


def test_objects_have_a_border_line_and_some_are_small(scenes):
    area = np.array([(s.mask == c + 1).mean() for s in scenes for c in s.labels])
    assert area.min() > .003 and np.mean(area < .03) > .05 and .05 < area.mean() < .2
    for s in scenes[:50]:
        inside = (s.mask > 0) & (s.mask < 255)
        assert (s.mask[drawings.grow(inside) & ~inside] == 255).all()
    small, large = drawings.scene(0, 3, 48), drawings.scene(0, 3, 131)
    assert small.image.shape == (48, 48, 3) and large.mask.shape == (131, 131)


# ---------------------------------------------------------------- the CLIP

@pytest.fixture(scope="module")
def shipped():
    return toy_world.load(ROOT / "weights" / "toy_clip.pt")


def test_the_shipped_clip_knows_unseen_objects_and_leaks_to_backgrounds(shipped):
    """The papers' problem: rails alone look like "train", and train with rails as much as the train alone."""
    found = toy_world.measure(shipped, draw=31, count=160)
    assert found["top-1 whole"] >= .97 and found["top-1 cut-out"] >= .95
    assert found["class text . own background alone"] > found["class text . other backgrounds"] + .1
    alone = found["class text . its cut-out, same images"]
    assert found["class text . object + own background"] > alone - .05
    assert found["background text . own background"] > found["background text . other"] + .2


def test_the_shipped_clip_localises_by_text(shipped):
    assert toy_world.map_scores(shipped, draw=33, count=96)["mIoU"] > 30


def test_build_model_reads_the_clip_file(world):
    state = torch.load(world / "clip.pt", weights_only=True)
    model = clip.model.build_model(dict(state))
    assert state["token_embedding.weight"].shape == (49408, 128) and model.context_length == 77
    assert model.visual.input_resolution == 64 and (ROOT / "weights/toy_clip.pt").stat().st_size < 4e6


def test_training_a_clip_lowers_the_loss(tmp_path):
    """A few steps of it; what is stored comes back as the same network."""
    losses = []
    model = toy_clip.train_clip(seed=3, steps=16, batch=8, log=lambda step, loss: losses.append(loss))
    assert len(losses) == 16 and np.mean(losses[-5:]) < np.mean(losses[:5]) - .15
    checkpoints.save(tmp_path / "clip.pt", **toy_clip.pack(model))
    back = toy_world.load(tmp_path / "clip.pt").model
    images, texts, *_ = toy_clip.draw_batch(np.random.default_rng([3, 9]), 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(back.encode_image(images), model.encode_image(images), atol=.02, rtol=0)
        u = model.encode_text(clip.tokenize(texts, context_length=16))
        torch.testing.assert_close(back.encode_text(clip.tokenize(texts)), u, atol=.02, rtol=0)


# ---------------------------------------------------------------- the backbone

def pool_features(backbone, seed, count):
    """Pooled features (count, width) and labels of object_on_texture samples."""
    rng = np.random.default_rng([seed, 77])
    images, labels = zip(*(drawings.object_on_texture(rng, 64) for _ in range(count)))
    assert images[0].shape == (64, 64, 3) and images[0].dtype == np.uint8
    model = ToyCNN(1).eval()
    model.load_imagenet(backbone)
    with torch.no_grad():
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return model.trunk((x - model.mean) / model.std).mean((2, 3)), torch.tensor(labels)


def test_the_shipped_backbone_knows_objects_and_textures_it_has_not_seen():
    backbone = read("toy_backbone.pt")["model"]
    known, names = pool_features(backbone, 1, 300)
    probe, truth = pool_features(backbone, 2, 100)
    assert 0 <= names.min() and names.max() < 21 and .3 < (names < C).float().mean() < .7
    centres = torch.stack([known[names == k].mean(0) for k in range(21)])
    right = torch.cdist(probe, centres).argmin(1) == truth
    assert right.float().mean() > .6                                                    # chance is 1 in 21


def test_train_backbone_makes_what_is_shipped():
    """Names and shapes of a few steps; the shipped file is 500 of them."""
    shipped = read("toy_backbone.pt")["model"]
    made = make_toy.train_backbone(0, steps=3, batch=8, count=24)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
    assert made["trunk.1.num_batches_tracked"] == 3 and shipped["trunk.1.num_batches_tracked"] == 500
