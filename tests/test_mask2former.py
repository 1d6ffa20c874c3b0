"""Mask2Former: its losses against a scalar loop and transformers', its network against
transformers' own forward, hosts/train_mask2former.py as a command."""
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, make_folder, refused, rows, run_together, same, weights
from PIL import Image

from hosts import mask2former as m2f
from hosts import mask2former_losses as m2f_losses
from plumbing import checkpoints, files, masks, networks, processes

pytest.importorskip("scipy")
library = pytest.importorskip("transformers")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SWIN = m2f.CONFIGS["mask2former_toy"]["backbone_config"]
CONFIG = SimpleNamespace(class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object_weight=0.1,
                         train_num_points=512, importance_sample_ratio=0.75, oversample_ratio=3.0)
L, B, Q, C = 3, 2, 10, 3


# ---------------------------------------------------------------- the losses

def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(images=B):
    """Class logits (L, B, Q, 2 + C) and mask logits (L, B, Q, 24, 24), which want a gradient."""
    classes, masks = random(L, images, Q, 2 + C), 3 * random(L, images, Q, 24, 24, seed=1)
    return classes.requires_grad_(), masks.requires_grad_()


def label_maps():
    maps = torch.zeros(B, 96, 96, dtype=torch.long)
    maps[0, 20:60, 30:60], maps[0, 70:, :50], maps[1, 10:80, 40:90] = 1, 3, 2
    return maps


def mean_losses(classes, masks, maps, seed=0):
    """Class, mask and dice loss, means over images and masks, sums over layers."""
    parts = []
    for i in range(len(maps)):
        generator = torch.Generator().manual_seed(seed + i)
        parts.append(m2f_losses.set_losses(classes[:, i], masks[:, i], maps[i], CONFIG, generator))
    ce, weight, bce, dice = (torch.cat(part, 1) for part in zip(*parts))
    return torch.stack([L * (weight * ce).sum() / weight.sum(), L * bce.mean(), L * dice.mean()])


def test_losses_of_a_mask_equal_a_scalar_loop():
    x, t, known = random(3, 6), random(3, 6, seed=1).sigmoid(), random(3, 6, seed=2) > 0
    known[2] = False
    ce, dice = m2f_losses.mask_cross_entropy(x, t, known), m2f_losses.mask_dice(x, t, known)
    for m in range(3):
        rows = zip(x[m].tolist(), t[m].tolist(), known[m])
        points = [(1 / (1 + math.exp(-a)), b) for a, b, k in rows if k]
        want = sum(-b * math.log(s) - (1 - b) * math.log(1 - s) for s, b in points) / max(len(points), 1)
        assert ce[m].item() == pytest.approx(want, abs=1e-5)
        both, each = sum(s * b for s, b in points), sum(s + b for s, b in points)
        assert dice[m].item() == pytest.approx(1 - (2 * both + 1) / (each + 1), abs=1e-5)
    extreme = m2f_losses.mask_cross_entropy(torch.tensor([100.0]), torch.tensor([0.0]), torch.ones(1))
    assert extreme.item() == 100                                  # no overflow


def test_losses_are_the_librarys():
    """At the same points, which both draw by torch.rand."""
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = modeling.Mask2FormerConfig(num_labels=1 + C, train_num_points=CONFIG.train_num_points)
    names = {"loss_cross_entropy": 0, "loss_mask": 1, "loss_dice": 2}
    library = modeling.Mask2FormerLoss(config, dict.fromkeys(names, 1.0))
    (classes, masks), maps = logits(), label_maps()
    labels = [m.unique() for m in maps]
    truth = [(m == found[:, None, None]).float() for m, found in zip(maps, labels)]
    K, tried = CONFIG.train_num_points, 3 * CONFIG.train_num_points
    points = {n: random(n, 2, seed=n).sigmoid() for n in (K, tried, K // 4)}
    points[tried + K // 4] = torch.cat([points[tried], points[K // 4]])
    earlier = [{"class_queries_logits": c, "masks_queries_logits": m} for c, m in zip(classes, masks)][:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **how: points[size[-2]].expand(*size).clone())
        found = mean_losses(classes, masks, maps)
        theirs = library(masks[-1], classes[-1], truth, labels, earlier)
    want = torch.zeros(3)
    for name, value in theirs.items():
        want[names[name.rstrip("_0123456789")]] += value
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [classes, masks]) for x in (found, want))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_lies_under_255_changes_nothing_one_logit_from_its_border():
    """The upper half has no label. Points of the lower half read logits from row 11 on: 4 pixels a logit."""
    maps = label_maps()
    maps[:, :48] = 255
    classes, masks = logits()
    values = mean_losses(classes, masks, maps)
    (gradient,) = torch.autograd.grad(values.sum(), masks)
    assert not gradient[..., :11, :].any() and gradient[..., 12:, :].any()
    other, seen = masks.detach().clone(), masks.detach().clone()
    other[..., :11, :], seen[..., 12, :] = random(L, B, Q, 11, 24, seed=2), 0
    assert torch.equal(values, mean_losses(classes, other, maps))
    assert not torch.equal(values, mean_losses(classes, seen, maps))


def test_an_image_without_a_label_has_no_loss_but_a_gradient():
    (classes, masks), maps = logits(), label_maps()
    maps[1] = 255
    both, one = mean_losses(classes, masks, maps), mean_losses(classes[:, :1], masks[:, :1], maps[:1])
    torch.testing.assert_close(both, one, rtol=1e-6, atol=0)
    for x in torch.autograd.grad(both.sum(), [classes, masks]):   # zero, not absent: DDP needs one
        assert x[:, 0].any() and not x[:, 1].any()


# ---------------------------------------------------------------- the network

@pytest.fixture
def model():
    torch.manual_seed(0)
    return m2f.new_mask2former("mask2former_toy", 3)


def flat(model):
    """transformers 5.20, Python 3.10's, starts fresh queries and mask heads at a std of .02, where 5.24 has
    PyTorch's: they learn slowly."""
    return model.network.model.transformer_module.queries_features.weight.std() < 0.1


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
    assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < (0.2 if flat(model) else 0.1)


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
    groups = model.groups(1e-4)
    rates = [(group["lr"], group.get("weight_decay")) for group in groups]
    assert rates == [(1e-4, None), (1e-4, 0), (1e-5, None), (1e-5, 0)]
    main, fixed, swin, swin_fixed = ({names[id(weight)] for weight in g["params"]} for g in groups)
    assert sorted([*main, *fixed, *swin, *swin_fixed]) == sorted(names.values())
    assert swin | swin_fixed == {name for name in names.values() if "_module.encoder." in name}
    still = {name.removesuffix(".weight") for name in names.values()          # norms, then embeddings
             if name.endswith(".weight") and model.network.get_parameter(name).ndim == 1}
    still |= {f"model.transformer_module.{name}"
              for name in ("queries_embedder", "queries_features", "level_embed")}
    assert fixed | swin_fixed == {name for name in names.values() if name.rpartition(".")[0] in still
                                  or name.endswith("relative_position_bias_table")}


# ---------------------------------------------------------------- files

def test_a_seg_pt_comes_back_without_a_connection(model, tmp_path, monkeypatch):
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


def test_it_starts_from_a_swin_or_from_another_but_for_its_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(SWIN, "drop_path_rate", 0.25)         # ours, the file's is 0
    config = library.SwinConfig(**{**SWIN, "drop_path_rate": 0.0}, num_labels=7)
    swin = library.SwinForImageClassification(config)
    swin.save_pretrained(tmp_path / "0123abc")
    with monkeypatch.context() as patch:
        patch.setattr(m2f.weights, "from_hub", lambda name: str(tmp_path / "0123abc"))
        model = m2f.new_mask2former("mask2former_toy", 5, "somebody/swin")
    read, encoder = swin.swin.state_dict(), model.network.model.pixel_level_module.encoder.swin.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in read.items())
    assert model.network.config.backbone_config.drop_path_rate == 0.25
    assert model.origin.startswith(f"somebody/swin (0123abc): {len(read)} tensors read; fresh are ")
    assert "model.pixel_level_module.encoder (8)" in model.origin     # the norms of the four stages
    model.network.save_pretrained(tmp_path / "whole")
    again = m2f.new_mask2former("mask2former_toy", 3, str(tmp_path / "whole"))
    ours, theirs = again.network.state_dict(), model.network.state_dict()
    fresh = {name for name in ours if not torch.equal(ours[name].ravel()[:9], theirs[name].ravel()[:9])}
    assert fresh == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    assert "fresh are class_predictor (2), criterion (1); left out: nothing" in again.origin


def test_wrong_starts_are_refused(tmp_path, monkeypatch):
    for name, width, lost in (("torn", 16, "?"), ("wide", 32, "?"), ("lacks", 16, "embeddings.norm")):
        swin = library.SwinForImageClassification(library.SwinConfig(**{**SWIN, "embed_dim": width}))
        kept = {key: value for key, value in swin.state_dict().items() if lost not in key}
        swin.save_pretrained(tmp_path / name, state_dict=kept)
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
    for name in ("transformers", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"Mask2Former needs the library {name}: pip install"):
            m2f.new_mask2former("mask2former_toy", 3)


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
def world(tmp_path_factory):
    """Five images in their masks' colours, the masks not in the data folder; a finished run in `out`."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "data/SegmentationClass").rename(root / "masks")
    for path in (root / "masks").iterdir():
        image = Image.fromarray(masks.palette()[masks.load_mask(path) % 255] + 40)
        image.save(root / f"data/JPEGImages/{path.stem}.jpg", quality=95)
    finish(root, root / "out")
    return root


def test_the_loss_is_weighted_and_the_rates_fall_by_poly(world):
    log = rows(world / "out/seg.jsonl")
    for step, row in enumerate(log):
        want = 2 * row["classes"] + 5 * row["masks"] + 5 * row["dice"]
        assert row["loss"] == pytest.approx(want, rel=1e-4)
        assert row["lr"] == pytest.approx(10 * (1 - step / 5) ** 0.9, rel=1e-4)


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, ctrl_c):
    assert call(*job(world, tmp_path)).returncode == 130
    finish(world, tmp_path)
    assert same(weights(tmp_path / "seg.pt"), weights(world / "out/seg.pt")) and len(ctrl_c) == 5


def test_two_processes_are_one(world, tmp_path):
    run_together([job(world, tmp_path)], tmp_path)
    for one, two in zip(rows(world / "out/seg.jsonl"), rows(tmp_path / "seg.jsonl")):
        del one["seconds"]
        assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_gradients_are_clipped_at_their_own_length_and_points_differ(world, tmp_path, monkeypatch):
    """As with fp16 on a GPU: a scale of the loss, here a power of two, changes nothing. Every image of every
    step has points of its own."""
    seeds, set_losses = [], m2f_losses.set_losses
    monkeypatch.setattr(m2f_losses, "set_losses",
                        lambda *args: seeds.append(args[4].initial_seed()) or set_losses(*args))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(processes.Run, "scaler", lambda self: scaler)
    finish(world, tmp_path)
    assert same(weights(tmp_path / "seg.pt"), weights(world / "out/seg.pt"), 1e-5)
    assert len(seeds) == len(set(seeds)) == 10 and min(seeds) < 1_000_003 + 5


def test_two_images_are_learned_and_scored(world, model, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data/SegmentationClass").symlink_to(world / "masks")
    (tmp_path / "masks").symlink_to(world / "masks")
    finish(tmp_path, tmp_path, "--iterations", "32", "--limit", "2", "--optimizer", "adamw", "--lr", "3e-3",
           "--min-scale", "1", "--max-scale", "1")
    losses = [row["loss"] for row in rows(tmp_path / "seg.jsonl")]
    assert np.mean(losses[-3:]) < (0.9 if flat(model) else 0.7) * np.mean(losses[:3])
    done = call("eval.py", "--data", tmp_path / "data", "--out", tmp_path, "--split", "val", "--what", "seg",
                "--workers", "0", "--device", "cpu", "--amp", "off", "--scales", "1", "2", "--flip", "--save")
    assert done.returncode == 0, done.stderr
    assert masks.load_mask(tmp_path / "pred/val/a_2.png", 3).shape == (34, 40)


def test_a_run_starts_from_another_and_keeps_what_was_read(world, model, tmp_path):
    start, other = tmp_path / "whole", world / "out/seg.pt"
    model.network.save_pretrained(start)
    done = finish(world, tmp_path / "hub", "--iterations", "1", "--init", start)
    content = torch.load(tmp_path / "hub/seg.pt", weights_only=True)
    assert content["origin"] in done.stdout and content["origin"].startswith(f"{start}: ")
    assert content["args"]["inputs"]["init"] == files.fingerprint(start)
    finish(world, tmp_path, "--init", other, "--lr", "0")
    assert same(weights(tmp_path / "seg.pt"), weights(other))
    done = call(*job(world, tmp_path / "new", "--init", other, "--model", "mask2former_swin_large"))
    refused(done, "is a mask2former_toy, not a mask2former_swin_large")
