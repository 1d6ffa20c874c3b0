"""The dense CRF: torch against pydensecrf, both against the exact sum over all pairs of pixels."""
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toy import drawings
from wsss import crf

NAMES = "unary", "sxy_gaussian", "compat_gaussian", "sxy_bilateral", "srgb", "compat_bilateral"
PUBLISHED = {"weaktr": ("labels", 4, 3, 83, 5, 3), "irn": ("labels", 3, 3, 50, 5, 10),
             "deeplab": ("softmax", 1, 3, 67, 3, 4), "segmenter": ("softmax", 3, 3, 83, 5, 3),
             "psa": ("softmax", 3, 3, 80, 13, 10)}


@pytest.fixture(params=["torch", "pydensecrf"])
def backend(request):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf")
    return request.param


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)


def smooth_scores(num_classes, size, seed=0):
    """Blobs of every class, close to each other: the hard case, in which the CRF decides."""
    coarse = np.random.default_rng(seed).random((1, num_classes, 5, 5), dtype=np.float32) ** 2
    return F.interpolate(torch.from_numpy(coarse), size, mode="bilinear")[0]          # (C, H, W)


def exact_kernel(f):
    """K = D^-1/2 G D^-1/2, all N x N of it."""
    G = (-(torch.cdist(f.double(), f.double()) ** 2) / 2).exp()
    return G / (G.sum(1)[:, None] * G.sum(1)).sqrt()


def exact_dense_crf(image, scores, preset, iterations=10):
    """The docstring of wsss/crf.py, every pair of pixels summed."""
    p = dict(zip(NAMES, PUBLISHED[preset]))
    C, H, W = scores.shape
    if p["unary"] == "softmax":
        unary = -scores.clamp(min=1e-5).log()
    else:
        others = torch.full((C, H, W), -math.log(0.3 / (C - 1)))
        unary = others.scatter(0, scores.argmax(0, keepdim=True), -math.log(0.7))
    unary = unary.reshape(C, -1).double()
    xy = torch.tensor([(x, y) for y in range(H) for x in range(W)])
    rgb = torch.from_numpy(image).reshape(-1, 3)
    K = p["compat_gaussian"] * exact_kernel(xy / p["sxy_gaussian"])
    K += p["compat_bilateral"] * exact_kernel(torch.cat([xy / p["sxy_bilateral"], rgb / p["srgb"]], 1))
    q = (-unary).softmax(0)
    for _ in range(iterations):
        q = (q @ K - unary).softmax(0)
    return q.reshape(C, H, W).numpy()


@pytest.mark.parametrize("preset", crf.PRESETS)
def test_torch_equals_pydensecrf(preset):
    pytest.importorskip("pydensecrf.densecrf")
    for num_classes, image in ((2, noise(0)), (3, drawings.scene(0, 3, 48).image), (21, noise(1))):
        scores = smooth_scores(num_classes, image.shape[:2], seed=num_classes)
        ours = crf.dense_crf(image, scores, preset, backend="torch")
        theirs = crf.dense_crf(image, scores, preset, backend="pydensecrf")
        # One lattice: only rounding differs, 1e-7 on most images, 2e-5 on the worst of 480, and no label.
        assert np.abs(ours - theirs).mean() < 1e-4
        assert (ours.argmax(0) != theirs.argmax(0)).mean() <= 0.001
        np.testing.assert_allclose(crf.dense_crf(image, 7 * scores, preset), theirs, atol=1e-4)   # any scale
        if torch.cuda.is_available():
            gpu = crf.dense_crf(image, scores.cuda(), preset, backend="torch", device="cuda")
            assert np.abs(gpu - ours).mean() < 1e-4


@pytest.mark.parametrize("preset", PUBLISHED)
def test_close_to_the_exact_sum_over_all_pairs(backend, preset):
    assert crf.PRESETS[preset] == dict(zip(NAMES, PUBLISHED[preset]))
    difference, moved, labels = [], [], []
    for number, num_classes in enumerate((2, 4, 4)):
        scene = drawings.scene(0, number, 24)                     # object and background, under noise of all
        scores = 0.6 * torch.rand(num_classes, 24, 24, generator=torch.Generator().manual_seed(number))
        scores[:2] += 0.8 * torch.from_numpy(np.stack([scene.mask == 0, scene.mask > 0]))
        want = exact_dense_crf(scene.image, scores, preset)
        got = crf.dense_crf(scene.image, scores, preset, backend=backend)
        difference.append(np.abs(got - want).mean())
        moved.append(np.abs(exact_dense_crf(scene.image, scores, preset, 0) - want).mean())
        labels.append((got.argmax(0) != want.argmax(0)).mean())
    # The lattice approximates values to a tenth. Measured: 0.0003 (psa) to 0.0023 (irn), labels 0.3 %.
    assert np.mean(difference) < 0.005 and np.mean(labels) < 0.01
    assert np.mean(moved) > 0.1                                   # the CRF itself moves the posterior by 0.23


def test_auto_is_pydensecrf_on_the_cpu_where_it_is_installed_and_torch_elsewhere(monkeypatch):
    package = pytest.importorskip("pydensecrf.densecrf")
    assert crf.find_pydensecrf("auto", "cpu") is package and not crf.find_pydensecrf("auto", "cuda")
    monkeypatch.setitem(sys.modules, "pydensecrf", None)          # as if it were not installed
    assert not crf.find_pydensecrf("auto", "cpu")
    with pytest.raises(ValueError, match="pip install pydensecrf2"):
        crf.find_pydensecrf("pydensecrf", "cpu")


@pytest.mark.parametrize("change, words", [
    (dict(preset="voc"), "'voc'.*weaktr, irn, deeplab, segmenter, psa"),
    (dict(backend="gpu"), "'gpu'.*auto, pydensecrf or torch"),
    (dict(prob=np.ones((0, 4, 6))), r"\(C, H, W\).*\(0, 4, 6\)"),
    (dict(prob=np.full((2, 4, 6), np.nan)), "48 of the CRF's 48 scores are not finite"),
    (dict(prob=np.ones((2, 6, 4))), r"\(2, 6, 4\) and \(4, 6, 3\)"),
    (dict(image=np.zeros((4, 6, 3))), "float64"),
])
def test_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        crf.dense_crf(**{"image": np.zeros((4, 6, 3), np.uint8), "prob": np.ones((2, 4, 6)), **change})
    assert "\n" not in str(error.value)
