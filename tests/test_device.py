"""What touches a device: TEST_DEVICE=cuda python -m pytest tests/test_device.py (bench/gpu.sh does it). On a
CPU, the default, the same stages in float32 and bf16.

Losses in half precision, the same bits by --deterministic, resuming, and what is computed on a device against
the CPU."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, call, make_folder, rows, same, weights

from plumbing.networks import new_generator
from wsss import clip_model, crf, gradcam, losses

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
GPU = DEVICE != "cpu"
STAGES = {"train_match.py": "match", "train_prompt.py": "prompts", "train_refine.py": "refine"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and a start of S, once as cls.pt and once as match.pt."""
    root = tmp_path_factory.mktemp("device")
    make_folder(root / "data")
    torch.manual_seed(0)
    state = new_generator("deit_tiny_toy", len(CLASSES), "none").state_dict()
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in state.items()}
    for stage in ("cls", "match"):
        content = {"stage": stage, "model": state, "classes": CLASSES, "args": {"pool": "max", "inputs": {}}}
        torch.save(content, root / f"{stage}.pt")
    return root


def train(world, out, clip, script, device, amp, *more):
    """-> the stage's finished weights and its losses"""
    out.mkdir(exist_ok=True)
    still = ["--drop-path", "0", "--init", world / "cls.pt"]
    start = {"train_match.py": still, "train_prompt.py": ["--init", world / "match.pt", "--views", "2"],
             "train_refine.py": [*still, "--prompts", "random"]}[script]
    done = call(script, "--data", world / "data", "--out", out, "--split", "train", "--clip", clip, *start,
                "--device", device, "--amp", amp, "--workers", "0", "--epochs", "3", "--batch-size", "2",
                "--crop", "32", "--log-every", "1", *more)
    assert done.returncode == 0, done.stderr
    stage = STAGES[script]
    return weights(out / f"{stage}.pt"), [row["loss"] for row in rows(out / f"{stage}.jsonl")]


@pytest.mark.parametrize("script", STAGES)
def test_losses_are_those_of_float32_on_a_cpu(world, tmp_path, tiny_clip, script):
    _, want = train(world, tmp_path / "cpu", tiny_clip, script, "cpu", "off")
    for amp, near in (("off", 1e-3), ("bf16", 0.1), *([("fp16", 0.02)] if GPU else [])):
        _, found = train(world, tmp_path / amp, tiny_clip, script, DEVICE, amp)
        assert found == pytest.approx(want, rel=near), amp


def test_deterministic_resumed_or_not_is_the_same_bits(world, tmp_path, tiny_clip, ctrl_c):
    """Ctrl-C comes in the third step; the second run goes on from there, the third is never interrupted."""
    flags = world, tmp_path / "out", tiny_clip, "train_match.py", DEVICE, "auto", "--deterministic"
    with pytest.raises(AssertionError, match="interrupted"):
        train(*flags)
    resumed, _ = train(*flags)
    whole, _ = train(world, tmp_path / "whole", *flags[2:])
    assert len(ctrl_c) == 6 + 6 and same(resumed, whole)


def test_the_crf_in_torch_is_that_of_a_cpu():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    scores = F.interpolate(torch.rand(1, 3, 5, 7), (40, 52), mode="bicubic")[0].softmax(0)
    found, want = (crf.dense_crf(image, scores.to(device), "deeplab", backend="torch", device=device)
                   for device in (DEVICE, "cpu"))
    assert np.abs(found - want).mean() < 1e-4 and (found.argmax(0) != want.argmax(0)).mean() <= 0.002


def test_maps_and_prototypes_are_those_of_a_cpu(tiny_clip):
    torch.manual_seed(0)
    images, columns = torch.rand(2, 3, 32, 24), F.normalize(torch.randn(6, 16), dim=1)
    b, k = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    found = []
    for device in (DEVICE, "cpu"):
        clip = clip_model.load_clip(tiny_clip, device)
        x, attention, grid = gradcam.last_inputs(clip, images.to(device))
        pairs = b.to(device), k.to(device)
        cams = gradcam.class_maps(clip, x, attention, grid, columns.to(device), 3, *pairs, 9)
        features = gradcam.patch_features(clip, x, "value").flatten(0, 1)
        p = losses.assignment(features, columns.to(device), 0.1)
        W = losses.learn_prototypes(features, columns.to(device), p, tau_i=0.3, lr=1.0, steps=30)
        found.append((cams.cpu(), W.cpu().float()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
