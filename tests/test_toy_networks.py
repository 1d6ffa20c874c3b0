"""The toy's generator and the trunk it starts from (its CLIMS: test_clims.py)."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same

from toy import networks
from wsss import generator


def test_toy_cnn_is_a_plain_cam_with_a_frozen_trunk():
    torch.manual_seed(0)
    model, images = networks.ToyCNN(4).train(), torch.rand(2, 3, 96, 96)
    before = copy.deepcopy(model.state_dict())
    assert len(generator.parameters_to_train(model)) == 2         # the head's
    maps, (logits,) = model(images)
    features = model.trunk((images - model.mean) / model.std)
    coarse = F.conv2d(features, model.head.weight, model.head.bias, padding=1)
    assert maps.shape == (2, 4, 24, 24) and torch.equal(maps, coarse.relu())
    torch.testing.assert_close(logits, coarse.mean((2, 3)))
    assert same(model.state_dict(), before)                       # running statistics too


@pytest.mark.parametrize("kind", [networks.ToyCNN, networks.ToyClims])
def test_sizes_come_from_the_weights_and_the_shipped_trunk_fits(kind):
    model, images = kind(5, width=16, blocks=2).eval(), torch.rand(1, 3, 32, 32)
    again = networks.generator_from_state(model.state_dict()).eval()
    assert type(again) is kind and torch.equal(again.maps(images), model.maps(images))
    state = torch.load(ROOT / "weights/toy_backbone.pt", weights_only=True)["model"]
    trunk = {name.removeprefix("trunk."): value.float() for name, value in state.items()}
    S, deeplab = kind(8), networks.deeplab_toy(8)
    S.load_imagenet(state)
    deeplab.load_backbone(state)
    assert same(S.trunk.state_dict(), trunk) and same(deeplab.backbone.state_dict(), trunk)
