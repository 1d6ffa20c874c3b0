"""Mask2Former against transformers' own forward, and hosts/train_mask2former.py as a command."""
import importlib.util
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LABELS, call, make_folder, refused, rows, run_together, same, weights
from PIL import Image

from hosts import mask2former as m2f
from hosts import mask2former_losses
from plumbing import checkpoints, files, log, masks, networks, processes

MISSING = [name for name in ("scipy", "transformers") if importlib.util.find_spec(name) is None]
needs_library = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SWIN = m2f.CONFIGS["mask2former_toy"]["backbone_config"]


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("scipy")
    return pytest.importorskip("transformers")


@pytest.fixture
def model(library):
    torch.manual_seed(0)
    return m2f.new_mask2former("mask2former_toy", 3)


@pytest.mark.parametrize("name", ["transformers", "scipy"])
def test_a_missing_library_is_one_line(monkeypatch, name):
    for each in ("scipy", "transformers"):                    # there, or not here either
        monkeypatch.setitem(sys.modules, each, SimpleNamespace() if each != name else None)
    with pytest.raises(ValueError, match=f"Mask2Former needs the library {name}: pip install"):
        m2f.new_mask2former("mask2former_toy", 3)


# ---------------------------------------------------------------- the network

def test_swin_large_is_built_as_published(library):
    with torch.device("meta"):
        model = m2f.new_mask2former("mask2former_swin_large", 20)
    config, swin = model.network.config, model.network.config.backbone_config
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads)) == (192, [2, 2, 18, 2], [6, 12, 24, 48])
    assert (swin.window_size, swin.image_size, swin.drop_path_rate) == (12, 384, 0.3)
    assert (config.num_labels, config.num_queries, config.decoder_layers) == (21, 100, 10)
    assert (config.encoder_layers, config.hidden_dim, config.train_num_points) == (6, 256, 12544)
    weights = config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight
    assert weights == (2, 5, 5, 0.1)


@pytest.mark.parametrize("size", [(30, 41), (96, 64)])
def test_any_size_is_padded_by_mean_colour(model, size):
    images, h, w = torch.rand(2, 3, *size), -(-size[0] // 32) * 32, 64
    padded = MEAN.expand(2, 3, h, w).clone()
    padded[..., :size[0], :size[1]] = images
    with torch.no_grad():
        found = model.eval()(images)
        out = model.network(pixel_values=(padded - MEAN) / STD)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    masks = F.interpolate(out.masks_queries_logits, (h, w), mode="bilinear", align_corners=False).sigmoid()
    want = torch.einsum("bqc,bqhw->bchw", out.class_queries_logits.softmax(2)[:, :, :-1], masks)
    assert torch.allclose(found.exp(), want[..., :size[0], :size[1]], atol=1e-5)
    assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < 0.1


def test_all_decoder_layers_train_in_groups(model):
    images = torch.rand(2, 3, 64, 96)
    logits, classes, masks = model.train()(images)
    assert logits.shape == (2, 4, 16, 24)
    assert classes.shape == (3, 2, 10, 5) and masks.shape == (3, 2, 10, 16, 24)
    out = model.network(pixel_values=(images - MEAN) / STD, output_auxiliary_logits=True)
    assert torch.equal(classes[-1], out.class_queries_logits)
    assert torch.equal(masks[0], out.auxiliary_logits[0]["masks_queries_logits"])
    (classes.square().sum() + masks.square().sum()).backward()
    fixed = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert fixed == {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert all(".swin.layernorm." in name for name in fixed)

    names = {id(weight): name for name, weight in model.network.named_parameters() if weight.requires_grad}
    groups = [({names[id(weight)] for weight in group["params"]}, group["lr"], group.get("weight_decay"))
              for group in model.groups(1e-4)]
    assert [rest for _, *rest in groups] == [[1e-4, None], [1e-4, 0], [1e-5, None], [1e-5, 0]]
    assert sum(len(found) for found, *_ in groups) == len(names)
    vectors = {name.removesuffix(".weight") for name in names.values()        # norms, then embeddings
               if name.endswith(".weight") and model.network.get_parameter(name).ndim == 1}
    vectors |= {f"model.transformer_module.{name}"
                for name in ("queries_embedder", "queries_features", "level_embed")}
    assert groups[1][0] | groups[3][0] == {
        name for name in names.values()
        if name.rpartition(".")[0] in vectors or name.endswith("relative_position_bias_table")}
    assert groups[2][0] | groups[3][0] == {name for name in names.values() if "_module.encoder." in name}


# ---------------------------------------------------------------- files

def test_a_seg_pt_comes_back_without_a_connection(model, library, tmp_path, monkeypatch):
    """Whatever its configuration names is not looked for: only numbers in it are read."""
    for kind in (library.AutoConfig, library.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", None)
    config = {**model.config, "backbone": "resnet50", "use_timm_backbone": True, "auto_map": {"x": "y"},
              "use_pretrained_backbone": True, "_attn_implementation": "some/kernel"}
    content = {"stage": "seg", "model": model.state_dict(), "classes": ["a", "b", "c"],
               "args": {"model": "mask2former_toy"}, "config": config}
    run, path, images = SimpleNamespace(device="cpu"), tmp_path / "seg.pt", torch.rand(1, 3, 40, 30)
    checkpoints.save(path, **content)
    with torch.no_grad():
        assert torch.equal(networks.load_segmenter(path, run)(images), model.eval()(images))
    checkpoints.save(path, **{**content, "classes": ["a", "b"]})
    with pytest.raises(ValueError, match="seg.pt does not fit this network.*class_predictor"):
        networks.load_segmenter(path, run)
    checkpoints.save(path, **{**content, "config": {**config, "hidden_dim": [64]}})
    with pytest.raises(ValueError, match="seg.pt: its configuration is not one of"):
        networks.load_segmenter(path, run)


def test_it_starts_from_a_swin(library, tmp_path, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setitem(SWIN, "drop_path_rate", 0.25)         # ours, the file's is 0
    swin = library.SwinForImageClassification(library.SwinConfig(**{**SWIN, "drop_path_rate": 0.0},
                                                                 num_labels=7))
    swin.save_pretrained(tmp_path / "0123abc")
    monkeypatch.setattr(m2f.weights, "from_hub", lambda name: str(tmp_path / "0123abc"))
    model = m2f.new_mask2former("mask2former_toy", 3, "somebody/swin")
    read = swin.swin.state_dict()
    encoder = model.network.model.pixel_level_module.encoder.swin.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in read.items())
    assert model.network.config.backbone_config.drop_path_rate == 0.25
    assert model.network.config.num_queries == 10
    assert model.origin.startswith(f"somebody/swin (0123abc): {len(read)} tensors read; fresh are ")
    assert "model.pixel_level_module.encoder (8)" in model.origin     # the norms of the four stages
    assert model.origin.endswith("left out: classifier.bias, classifier.weight")


def test_it_starts_from_another_but_for_its_classes(library, tmp_path):
    other = m2f.new_mask2former("mask2former_toy", 5)
    other.network.save_pretrained(tmp_path)
    model = m2f.new_mask2former("mask2former_toy", 3, str(tmp_path))
    ours, theirs = model.network.state_dict(), other.network.state_dict()
    fresh = {name for name in ours if not torch.equal(ours[name].ravel()[:9], theirs[name].ravel()[:9])}
    assert fresh == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    assert model.network.class_predictor.weight.shape == (5, 64)
    assert "fresh are class_predictor (2), criterion (1); left out: nothing" in model.origin


def test_wrong_starts_are_refused(library, tmp_path):
    for name, changes in (("torn", {}), ("wide", {"embed_dim": 32})):
        swin = library.SwinForImageClassification(library.SwinConfig(**{**SWIN, **changes}))
        swin.save_pretrained(tmp_path / name)
        if name == "torn":
            kept = {key: value for key, value in swin.state_dict().items() if "embeddings.norm" not in key}
            swin.save_pretrained(tmp_path / "lacks", state_dict=kept)
            path = tmp_path / "torn/model.safetensors"
            path.write_bytes(path.read_bytes()[:5000])
    library.BertConfig().save_pretrained(tmp_path / "bert")
    for name, words in (("wide", "has a backbone of width 32 .* a Swin of 16"), ("bert", "bert is a bert"),
                        ("lacks", "lacks 2 weights.*embeddings.norm.bias"),
                        ("torn", "transformers reads no network")):
        with pytest.raises(ValueError, match=words):
            m2f.new_mask2former("mask2former_toy", 3, str(tmp_path / name))
    with pytest.raises(ValueError, match="mask2former_toy has no ImageNet weights"):
        m2f.new_mask2former("mask2former_toy", 3, "imagenet")


# ---------------------------------------------------------------- training

def job(world, out, *more):
    """The gradient has length .01 at most, so the rate is large; AdamW would make much of rounding."""
    return ["hosts.train_mask2former", "--data", world / "data", "--out", out, "--label-dir", world / "masks",
            "--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--init", "none",
            "--model", "mask2former_toy", "--batch-size", "2", "--crop", "32", "--iterations", "5",
            "--optimizer", "sgd", "--lr", "10", "--log-every", "1", *more]


def finish(world, out, *more):
    done = call(*job(world, out, *more))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory, library):
    """Five images, their masks in `masks` and no truth in the data folder; a finished run in `out`."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "data/SegmentationClass").rename(root / "masks")
    finish(root, root / "out")
    return root


def test_the_loss_is_weighted_and_the_rates_fall_by_poly(world):
    log = rows(world / "out/seg.jsonl")
    for step, row in enumerate(log):
        want = 2 * row["classes"] + 5 * row["masks"] + 5 * row["dice"]
        assert row["loss"] == pytest.approx(want, rel=1e-4)
        assert row["lr"] == pytest.approx(10 * (1 - step / 5) ** 0.9, rel=1e-4)


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, monkeypatch):
    steps, add = [], log.Meter.add

    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.Meter, "add", strike)
    assert call(*job(world, tmp_path)).returncode == 130
    finish(world, tmp_path)
    assert same(weights(tmp_path / "seg.pt"), weights(world / "out/seg.pt")) and len(steps) == 5


def test_two_processes_are_one(world, tmp_path):
    run_together([job(world, tmp_path)], tmp_path)
    for one, two in zip(rows(world / "out/seg.jsonl"), rows(tmp_path / "seg.jsonl")):
        del one["seconds"]
        assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_gradients_are_clipped_at_their_own_length_and_points_differ(world, tmp_path, monkeypatch):
    """As with fp16 on a GPU: a scale of the loss, here a power of two, changes nothing. Every image of every
    step has points of its own."""
    seeds, set_losses = [], mask2former_losses.set_losses
    monkeypatch.setattr(mask2former_losses, "set_losses",
                        lambda *args: seeds.append(args[4].initial_seed()) or set_losses(*args))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(processes.Run, "scaler", lambda self: scaler)
    finish(world, tmp_path)
    assert same(weights(tmp_path / "seg.pt"), weights(world / "out/seg.pt"), 1e-5)
    assert len(seeds) == len(set(seeds)) == 10 and min(seeds) < 1_000_003 + 5


def test_two_images_are_learned_and_scored(world, tmp_path):
    make_folder(tmp_path / "data")
    for id in LABELS:
        mask = masks.load_mask(world / "masks" / f"{id}.png")
        image = Image.fromarray(masks.palette()[mask % 255] + 40)
        image.save(tmp_path / "data/JPEGImages" / f"{id}.jpg", quality=95)
    (tmp_path / "masks").symlink_to(world / "masks")
    finish(tmp_path, tmp_path, "--iterations", "16", "--limit", "2", "--optimizer", "adamw", "--lr", "3e-3",
           "--min-scale", "1", "--max-scale", "1")
    losses = [row["loss"] for row in rows(tmp_path / "seg.jsonl")]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    done = call("eval.py", "--data", tmp_path / "data", "--out", tmp_path, "--split", "val", "--what", "seg",
                "--workers", "0", "--device", "cpu", "--amp", "off", "--scales", "1", "2", "--flip", "--save")
    assert done.returncode == 0, done.stderr
    assert masks.load_mask(tmp_path / "pred/val/a_2.png", 3).shape == (34, 40)


def test_what_was_read_is_kept(world, model, tmp_path):
    start = tmp_path / "whole"
    model.network.save_pretrained(start)
    done = finish(world, tmp_path, "--iterations", "1", "--init", start)
    content = torch.load(tmp_path / "seg.pt", weights_only=True)
    assert content["origin"] in done.stdout and content["origin"].startswith(f"{start}: ")
    assert content["args"]["inputs"]["init"] == files.fingerprint(start)


def test_a_run_starts_from_another(world, tmp_path):
    other = world / "out/seg.pt"
    finish(world, tmp_path, "--init", other, "--lr", "0")
    assert same(weights(tmp_path / "seg.pt"), weights(other))
    done = call(*job(world, tmp_path / "new", "--init", other, "--model", "mask2former_swin_large"))
    refused(done, "is a mask2former_toy, not a mask2former_swin_large")
