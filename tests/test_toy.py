"""The toy world: what its images promise, and what its two networks know of new ones."""
import json
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

C = len(CLASSES)
RECIPE = ("--seed", 7, "--train", 12, "--val", 4)


def make(out, *flags):
    return call("make_toy.py", "--out", out, *flags)


def contents(folder):
    paths = (path for ending in ("jpg", "png", "txt") for path in folder.rglob(f"*.{ending}"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The command itself, once: 12 + 4 images."""
    out = tmp_path_factory.mktemp("toy") / "data"
    done = make(out, *RECIPE)
    assert done.returncode == 0, done.stderr
    return out


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
    assert (len(train), len(val)) == (12, 4) and not set(train) & set(val)
    for id in train + val:
        mask, image = Image.open(folder.mask_path(id)), Image.open(folder.image_path(id))
        assert mask.mode == "P" and image.mode == "RGB" and image.size == mask.size == (96, 96)
        first, *shown, last = np.unique(np.array(mask)).tolist()
        assert (first, last) == (0, 255)
        assert [v - 1 for v in shown] == folder.labels([id])[0].nonzero().flatten().tolist()


def test_an_interrupted_set_is_finished_by_the_same_command_alone(world, tmp_path):
    assert "is complete" in make(world, *RECIPE).stdout
    torn, note = tmp_path / "torn", json.loads((world / "toy.json").read_text())
    shutil.copytree(world, torn)
    (torn / "toy.json").write_text(json.dumps({**note, "finished": False}))
    (torn / "labels.txt").write_text("torn")
    (torn / "JPEGImages/toy_000003.jpg").unlink()
    refused(make(torn, "--seed", 9), "other arguments or weights", str(torn))
    assert make(torn, *RECIPE).returncode == 0 and contents(torn) == contents(world)
    (tmp_path / "labels.txt").write_text("mine")
    refused(make(tmp_path), "not empty and not a toy data set")


def test_objects_stand_on_their_own_background_which_surrounds_them_in_several_sizes():
    """A fifth of the images has two classes; nine objects of ten stand on their own background."""
    scenes = [drawings.scene(21, i) for i in range(160)]
    assert .12 < np.mean([len(s.labels) == 2 for s in scenes]) < .28
    own = [[(s.ground == c).mean() > .02 for s in scenes if c in s.labels] for c in range(C)]
    assert .85 < np.mean(np.concatenate(own)) < .96 and all(np.mean(o) > .75 for o in own)
    alone = [(s, s.labels[0]) for s in scenes if len(s.labels) == 1]
    share = [((s.ground == c) & (s.mask == 0)).mean() for s, c in alone]
    low, middle, high = np.quantile([x for x in share if x > 0], [.1, .5, .9])
    assert low < .35 and .4 < middle < .65 and high > .85


def test_the_shipped_clip_knows_unseen_objects_and_leaks_to_backgrounds(world):
    """The papers' problem: rails alone look like "train", and train with rails as much as the train alone."""
    model = clip.model.build_model(dict(torch.load(world / "clip.pt", weights_only=True)))
    assert model.context_length == 77 and model.visual.input_resolution == 64
    shipped = toy_world.load(ROOT / "weights" / "toy_clip.pt")
    found = toy_world.measure(shipped, draw=31, count=192)
    assert found["top-1 whole"] >= .97 and found["top-1 cut-out"] >= .95
    own, other = (found[f"class text . {which}"] for which in ("own background alone", "other backgrounds"))
    alone = found["class text . its cut-out, same images"]
    assert own > other + .25 * (alone - other)
    assert found["class text . object + own background"] > alone - .05
    assert found["background text . own background"] > found["background text . other"] + .15
    assert toy_world.map_scores(shipped, draw=33, count=48)["mIoU"] > 40      # and localises by text
    assert .7 < found["class text . other class text"] < .9                   # a cone, as OpenAI's texts


def test_training_makes_what_is_shipped(tmp_path):
    """A few steps lower CLIP's loss; what is stored comes back as the same network."""
    losses = []
    model = toy_clip.train_clip(seed=3, steps=16, batch=8, log=lambda step, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - .15
    checkpoints.save(tmp_path / "clip.pt", **toy_clip.pack(model))
    back = toy_world.load(tmp_path / "clip.pt").model
    images, texts, *_ = toy_clip.draw_batch(np.random.default_rng([3, 9]), 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(back.encode_image(images), model.encode_image(images), atol=.02, rtol=0)
        u = model.encode_text(clip.tokenize(texts, context_length=16))
        torch.testing.assert_close(back.encode_text(clip.tokenize(texts)), u, atol=.02, rtol=0)
    backbone = torch.load(ROOT / "weights/toy_backbone.pt", weights_only=True)["model"]
    made = make_toy.train_backbone(0, steps=3, batch=8, count=24)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in backbone.items()}
