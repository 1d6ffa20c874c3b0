"""plumbing/augment.py: each operation against timm's, pixel for pixel; how often, how much, what is left."""
import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import augment
from toy import drawings


def drawn(width, height):
    return Image.fromarray(drawings.scene(0, 3, width).image).crop((0, 0, width, height))


@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_timms(sign, monkeypatch):
    timm, image = pytest.importorskip("timm.data.auto_augment"), drawn(48, 40)
    monkeypatch.setattr(augment, "either_sign", lambda value: sign * value)
    monkeypatch.setattr(timm, "_randomly_negate", lambda value: sign * value)
    settings = {"img_mean": augment.FILL, "interpolation": Image.Resampling.BICUBIC}
    names = timm._RAND_INCREASING_TRANSFORMS
    assert len(names) == len(augment.OPERATIONS)
    for name, ours in zip(names, augment.OPERATIONS):
        for level in (0, 0.35, 0.9, 1):
            if name == "PosterizeIncreasing" and level == 1:      # no bit is left, which a new PIL refuses
                want = Image.new("RGB", image.size)
            else:
                want = timm.AugmentOp(name, 1.0, 10 * level, settings)(image)
            assert np.array_equal(ours(image, level), want), (name, level)


def test_an_operation_is_applied_half_the_time_at_magnitude_9_with_spread_a_half(monkeypatch):
    levels = []
    monkeypatch.setattr(augment, "OPERATIONS", [lambda image, level: levels.append(level) or image])
    torch.manual_seed(0)
    for _ in range(2000):
        augment.rand_augment(None)
    assert len(levels) / 4000 == pytest.approx(0.5, abs=0.03) and max(levels) == 1
    assert abs(np.mean(levels) - 0.9) < 0.005 and abs(np.std(levels) - 0.05) < 0.005


def test_a_quarter_stays_as_it_is_and_corners_get_the_mean_colour_not_black():
    image, found = drawn(32, 32), []
    for seed in range(400):
        torch.manual_seed(seed)
        changed = np.asarray(augment.rand_augment(image))
        found.append([(changed == image).all(), (changed == 0).all(2).mean(),
                      (changed == augment.FILL).all(2).mean()])
    torch.manual_seed(399)
    assert np.array_equal(augment.rand_augment(image), changed)   # it draws from torch's generator
    unchanged, black, mean_colour = np.mean(found, 0)
    assert 0.2 < unchanged < 0.33 and black < 0.06 and 0.04 < mean_colour < 0.1
