"""bench/steps.py: what is timed side by side computes the same."""
import contextlib
import copy
import sys

import pytest
import torch
from conftest import CLASSES, ROOT

from wsss import clip_model, generator, texts

sys.path.append(str(ROOT / "bench"))
import steps  # noqa: E402


@pytest.mark.parametrize("name", ["match", "prompt", "stored", "refine"])
def test_plain_and_here_have_the_same_loss_and_gradients(tiny_clip, name):
    torch.manual_seed(0)
    S = generator.build_generator("deit_tiny", 3, drop_path=0)
    for weight_name, value in S.state_dict().items():
        value *= {"qkv.weight": 30, "ead.weight": 30}.get(weight_name[-10:], 1)       # sharp maps, as in test_semples.py
    vectors = torch.rand(3, 30, 64)
    images, labels = steps.batch(3, 4, 3, 16)
    labels[1] = 0                                                                     # class 2 in no picture, a picture without a class
    assert labels.sum(0).tolist() == [2, 1, 0]
    values, gradients = [], []
    for side in ("plain", "here"):
        made = steps.SIDES[side](clip_model.read_clip(tiny_clip), copy.deepcopy(S), vectors, texts.class_texts(CLASSES), contextlib.nullcontext)
        loss = getattr(made, "prompt" if side == "plain" and name == "stored" else name)(images, labels)
        loss.backward()
        values.append(loss.detach())
        gradients.append([w.grad for group in made.optimizers[name].param_groups for w in group["params"]])
    torch.testing.assert_close(*values)
    assert len(gradients[0]) == len(gradients[1]) == (1 if name in ("prompt", "stored") else 8)
    for plain, here in zip(*gradients):
        assert plain.abs().max() > 1e-6                                               # similarities are not clamped
        torch.testing.assert_close(plain, here, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
