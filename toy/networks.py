"""The small networks of the toy world, siblings of those of wsss/ and hosts/ with the same interfaces, on
one trunk: a residual CNN at stride 4 that stands for ImageNet's weights."""
import torch
import torch.nn as nn

from hosts.clims import Clims, freeze_statistics
from wsss.segmenter import DeepLabV2, Segmenter


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def toy_trunk(width=64, blocks=3):
    """Stride 4: (B, 3, H, W) -> (B, width, h, w)"""
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *(Residual(width) for _ in range(blocks)))


def load_trunk(trunk, state):
    trunk.load_state_dict({name.removeprefix("trunk."): value for name, value in state.items()})


class ToyCNN(nn.Module):
    """The toy world's S: the trunk and a 3x3 head; map = relu(head), a plain CAM.

    Differs from the paper: a DeiT of this size does not learn to localise. Interface and training are the
    DeiT's."""

    last_layers = ("head.",)
    never_train = ()
    maps_are_masks = False
    pool = None

    def __init__(self, num_classes, width=64, blocks=3):
        super().__init__()
        self.trunk = toy_trunk(width, blocks)
        self.head = nn.Conv2d(width, num_classes, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return freeze_statistics(super().train(mode))

    def maps(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w), >= 0"""
        return self(images)[0]

    def forward(self, images, from_labels=False):
        """RGB in [0, 1] (B, 3, H, W) -> maps (B, C, h, w); a tuple of one: the CAM classifier's logits (B,
        C)"""
        coarse = self.head(self.trunk((images - self.mean) / self.std)).float()            # (B, C, h, w)
        return coarse.relu(), (coarse.mean((-2, -1)),)

    def load_imagenet(self, state):
        load_trunk(self.trunk, state)


class ToyClims(Clims):
    """The toy world's S of CLIMS's kind."""

    def __init__(self, num_classes, width=64, blocks=3):
        super().__init__(width, num_classes)
        self.trunk = toy_trunk(width, blocks)

    def features(self, x):
        return self.trunk(x)

    def load_imagenet(self, state):
        load_trunk(self.trunk, state)


def generator_from_state(state):
    """The ToyCNN or ToyClims whose sizes are those of a state dict, and its weights."""
    kind, last = (ToyCNN, "head.weight") if "head.weight" in state else (ToyClims, "classifier.weight")
    blocks = sum(name.endswith("conv1.weight") for name in state)
    model = kind(len(state[last]), width=len(state["trunk.3.weight"]), blocks=blocks)
    model.load_state_dict(state)
    return model


def deeplab_toy(num_classes):
    return DeepLabV2(toy_trunk(), 64, num_classes, stride=4, dilations=(1, 2, 4, 6))


def segmenter_toy(num_classes):
    return Segmenter(num_classes, width=64, depth=3, heads=4, patch=8, grid=12, window=(96, 64),
                     drop_path=0.0, dropout=0.0)
