"""The toy's generator and the trunk it starts from (its CLIMS: test_clims.py)."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same

from toy import networks
from wsss import generator

TRUNK = ROOT / "weights/toy_backbone.pt"


def test_toy_cnn_is_a_plain_cam_with_a_frozen_trunk():
    torch.manual_seed(0)
    model, images = networks.ToyCNN(4).train(), torch.rand(2, 3, 96, 96)
    before = copy.deepcopy(model.state_dict())
    trained = generator.parameters_to_train(model)
    assert [id(p) for p in trained] == [id(model.head.weight), id(model.head.bias)]
    maps, (logits,) = model(images)
    features = model.trunk((images - model.mean) / model.std)
    coarse = F.conv2d(features, model.head.weight, model.head.bias, padding=1)        # (2, 4, 24, 24)
    assert maps.shape == (2, 4, 24, 24)
    assert torch.equal(maps, coarse.relu()) and torch.equal(model.maps(images), maps)
    torch.testing.assert_close(logits, coarse.mean((2, 3)))
    maps.mean().backward()
    assert same(model.state_dict(), before)                   # running statistics too
    assert model.trunk[0].weight.grad is None and model.head.weight.grad.any()


@pytest.mark.parametrize("kind", [networks.ToyCNN, networks.ToyClims])
def test_sizes_come_from_the_weights(kind):
    torch.manual_seed(0)
    model, images = kind(5, width=16, blocks=2).eval(), torch.rand(1, 3, 32, 32)
    again = networks.generator_from_state(model.state_dict()).eval()
    assert type(again) is kind and torch.equal(again.maps(images), model.maps(images))


def test_the_shipped_trunk_starts_generators_and_segmenters():
    assert TRUNK.stat().st_size < 2e6
    state = torch.load(TRUNK, weights_only=True)["model"]
    trunk = {name.removeprefix("trunk."): value.float() for name, value in state.items()}
    for model in (networks.ToyCNN(8), networks.ToyClims(8)):
        model.load_imagenet(state)
        assert same(model.trunk.state_dict(), trunk)
    model = networks.deeplab_toy(8)
    model.load_backbone(state)
    assert same(model.backbone.state_dict(), trunk)
