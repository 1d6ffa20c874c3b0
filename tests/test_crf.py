"""The dense CRF: torch against pydensecrf, both against the exact sum over all pairs of pixels."""
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toy import drawings
from wsss import crf


@pytest.fixture(params=["torch", "pydensecrf"])
def backend(request):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf")
    return request.param


def noise(size=(40, 36), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def smooth_scores(num_classes, size, seed=0):
    """Blobs of every class, close to each other: the hard case, in which the CRF decides."""
    coarse = np.random.default_rng(seed).random((1, num_classes, 5, 5), dtype=np.float32) ** 2
    return F.interpolate(torch.from_numpy(coarse), size, mode="bilinear")[0]              # (C, H, W)


def object_scores(scene, num_classes, seed=0):
    """What a good network gives: the true object and background, blurred, under noise of all classes."""
    mask = torch.from_numpy(scene.mask % 255 > 0).float()         # (H, W)
    mask = F.avg_pool2d(mask[None, None], 5, 1, 2)[0, 0]
    scores = np.random.default_rng(seed).random((num_classes, *mask.shape), dtype=np.float32)
    scores = 0.6 * torch.from_numpy(scores)
    scores[:2] += 0.8 * torch.stack([1 - mask, mask])
    return scores


def exact_kernel(f):
    """K = D^-1/2 G D^-1/2, all N x N of it."""
    G = (-(torch.cdist(f.double(), f.double()) ** 2) / 2).exp()
    return G / (G.sum(1)[:, None] * G.sum(1)).sqrt()


def exact_dense_crf(image, scores, preset, iterations=10):
    """The docstring of wsss/crf.py, every pair of pixels summed."""
    p = crf.PRESETS[preset]
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


# ---------------------------------------------------------------- the numbers

@pytest.mark.parametrize("preset", crf.PRESETS)
@pytest.mark.parametrize("num_classes", [2, 3, 21])
def test_backends_agree(preset, num_classes):
    pytest.importorskip("pydensecrf.densecrf")
    for image in (drawings.scene(0, num_classes, 48).image, noise(seed=num_classes)):
        scores = smooth_scores(num_classes, image.shape[:2], seed=num_classes)
        ours = crf.dense_crf(image, scores, preset, backend="torch")
        theirs = crf.dense_crf(image, scores, preset, backend="pydensecrf")
        # One lattice: only rounding differs, 1e-7 on most images, 2e-5 on the worst of 480, and no label.
        assert np.abs(ours - theirs).mean() < 1e-4
        assert (ours.argmax(0) != theirs.argmax(0)).mean() <= 0.001


@pytest.mark.parametrize("preset", crf.PRESETS)
def test_close_to_the_exact_sum_over_all_pairs(backend, preset):
    difference, moved, labels = [], [], []
    for number, num_classes in enumerate((2, 2, 4, 4)):
        scene = drawings.scene(0, number, 24)
        scores = object_scores(scene, num_classes, seed=number)
        want = exact_dense_crf(scene.image, scores, preset)
        got = crf.dense_crf(scene.image, scores, preset, backend=backend)
        difference.append(np.abs(got - want).mean())
        moved.append(np.abs(exact_dense_crf(scene.image, scores, preset, 0) - want).mean())
        labels.append((got.argmax(0) != want.argmax(0)).mean())
    # The lattice approximates values to a tenth. Measured: 0.0003 (psa) to 0.0023 (irn), labels 0.3 %.
    assert np.mean(difference) < 0.005 and np.mean(labels) < 0.01
    assert np.mean(moved) > 0.1                                   # the CRF itself moves the posterior by 0.23


@pytest.mark.parametrize("name", ["d=1", "d=2", "d=3", "d=5", "bilateral"])
def test_kernel_is_the_normalised_gaussian(name):
    rng = torch.Generator().manual_seed(0)
    xy = torch.cartesian_prod(torch.arange(24), torch.arange(24)).float()
    rgb = torch.from_numpy(drawings.scene(0, 3, 24).image).reshape(-1, 3)
    f = {
        "d=1": torch.rand(500, 1, generator=rng) * 10,
        "d=2": xy / 3,
        "d=3": torch.rand(500, 3, generator=rng) * 4,
        "d=5": torch.randn(500, 5, generator=rng) / 2,
        "bilateral": torch.cat([xy / 83, rgb / 5], 1),
    }[name]
    want, got = exact_kernel(f), crf.Kernel(f)(torch.eye(len(f))).double()      # (N, N)
    assert (got - want).norm() / want.norm() < 0.16               # 0.05 for d = 1, 0.09 for 2, 0.13 for 5
    smooth = torch.rand(len(f), 1, generator=rng).double()        # sums over many, as in the mean field
    assert ((got - want) @ smooth).abs().mean() / (want @ smooth).mean() < 0.03


def test_barycentric_weights():
    f = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 20
    keys, weights, steps = crf.lattice(f)
    assert keys.shape == weights.shape == (200, 6) and steps.shape == (6,)
    torch.testing.assert_close(weights.sum(1), torch.ones(200))
    assert weights.min() > -1e-5 and all(len(set(row)) == 6 for row in keys.tolist())


def test_unaries_by_hand():
    own, other = -math.log(0.7), -math.log(0.15)
    want = [[[own, other], [other, other]], [[other, other], [own, own]], [[other, own], [other, other]]]
    torch.testing.assert_close(crf.labels_unary(torch.tensor([[0, 2], [1, 1]]), 3), torch.tensor(want))
    want = [-math.log(0.5), -math.log(1e-5), -math.log(1e-5)]
    prob = np.array([0.5, 0, 1e-9])[:, None, None]
    torch.testing.assert_close(crf.softmax_unary(prob).flatten(), torch.tensor(want))


@pytest.mark.parametrize("preset, want", [
    ("weaktr", ("labels", 4, 3, 83, 5, 3)),
    ("irn", ("labels", 3, 3, 50, 5, 10)),
    ("deeplab", ("softmax", 1, 3, 67, 3, 4)),
    ("psa", ("softmax", 3, 3, 80, 13, 10)),
])
def test_presets_are_the_published_ones(preset, want):
    names = ("unary", "sxy_gaussian", "compat_gaussian", "sxy_bilateral", "srgb", "compat_bilateral")
    assert crf.PRESETS[preset] == dict(zip(names, want))


# ---------------------------------------------------------------- what it does

def test_wrong_labels_in_a_plain_region_are_put_right(backend):
    rng = np.random.default_rng(0)
    truth = np.arange(40)[None].repeat(30, 0) // 20               # (30, 40) left 0, right 1
    image = np.array([[200, 60, 40], [30, 90, 160]])[truth] + rng.integers(-4, 5, (30, 40, 3))
    given = np.where(rng.random(truth.shape) < 0.15, 1 - truth, truth)
    posterior = crf.dense_crf(image.astype(np.uint8), np.stack([1 - given, given]), backend=backend)
    assert (given != truth).sum() > 100 and (posterior.argmax(0) == truth).all()


@pytest.mark.parametrize("preset", crf.PRESETS)
def test_posterior(backend, preset):
    image, scores = noise(), smooth_scores(3, (40, 36))
    image.flags.writeable = False                                 # as PIL's are
    posterior = crf.dense_crf(image, scores, preset, backend=backend)
    assert posterior.dtype == np.float32 and posterior.shape == (3, 40, 36) and posterior.min() >= 0
    np.testing.assert_allclose(posterior.sum(0), 1, rtol=1e-5)
    assert (posterior == crf.dense_crf(image, scores.numpy().copy(), preset, backend=backend)).all()
    scaled = crf.dense_crf(image, scores * 7, preset, backend=backend)
    np.testing.assert_allclose(scaled, posterior, atol=1e-4)      # scores need not add up to 1
    for size in ((1, 1), (1, 5), (8, 6)):                         # one class: all ones
        assert (crf.dense_crf(noise(size), np.full((1, *size), 0.4), preset, backend=backend) == 1).all()


def test_own_parameters(backend):
    image, scores = noise(), smooth_scores(3, (40, 36))
    own = {k: v for k, v in crf.PRESETS["psa"].items() if k != "unary"}

    def field(**more):
        return crf.mean_field(crf.softmax_unary(scores), image, **{**own, **more}, backend=backend)

    assert (field() == crf.dense_crf(image, scores, "psa", backend=backend)).all()
    assert not np.allclose(field(), field(srgb=30), atol=0.05)
    np.testing.assert_allclose(field(iterations=0), scores / scores.sum(0), atol=1e-4)
    with pytest.raises(TypeError):
        crf.mean_field(crf.softmax_unary(scores), image, *own.values())


# ---------------------------------------------------------------- which backend, and what is refused

def test_auto_is_torch_without_pydensecrf(monkeypatch):
    image, scores = noise((12, 10)), smooth_scores(2, (12, 10))
    monkeypatch.setitem(sys.modules, "pydensecrf", None)          # as if it were not installed
    assert crf.find_pydensecrf("auto", "cpu") is None
    assert (crf.dense_crf(image, scores) == crf.dense_crf(image, scores, backend="torch")).all()
    with pytest.raises(ValueError, match="pip install pydensecrf2"):
        crf.dense_crf(image, scores, backend="pydensecrf")


def test_auto_is_pydensecrf_on_the_cpu_and_torch_on_a_gpu():
    package = pytest.importorskip("pydensecrf.densecrf")
    assert crf.find_pydensecrf("auto", "cpu") is package is crf.find_pydensecrf("pydensecrf", "cuda")
    assert crf.find_pydensecrf("auto", torch.device("cuda", 0)) is crf.find_pydensecrf("torch", "cpu") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_the_same():
    image, scores = drawings.scene(0, 5, 64).image, smooth_scores(4, (64, 64))
    for preset in crf.PRESETS:
        ours = crf.dense_crf(image, scores.cuda(), preset, backend="torch", device="cuda")
        theirs = crf.dense_crf(image, scores, preset, backend="torch")
        assert np.abs(ours - theirs).mean() < 1e-4


@pytest.mark.parametrize("change, words", [
    (dict(preset="voc"), "'voc'.*weaktr, irn, deeplab, psa"),
    (dict(backend="gpu"), "'gpu'.*auto, pydensecrf or torch"),
    (dict(prob=np.ones((4, 6))), r"\(C, H, W\).*\(4, 6\)"),
    (dict(prob=np.ones((0, 4, 6))), r"\(0, 4, 6\)"),
    (dict(prob=np.full((2, 4, 6), np.nan)), "48 of the CRF's 48 scores are not finite"),
    (dict(prob=np.ones((2, 6, 4))), r"\(2, 6, 4\) and \(4, 6, 3\)"),
    (dict(image=np.zeros((4, 6), np.uint8)), r"\(4, 6\) uint8"),
    (dict(image=np.zeros((4, 6, 3))), "float64"),
])
def test_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        crf.dense_crf(**{"image": np.zeros((4, 6, 3), np.uint8), "prob": np.ones((2, 4, 6)), **change})
    assert "\n" not in str(error.value)


def test_impossible_deviations_are_refused():
    own = dict(sxy_gaussian=3, compat_gaussian=3, sxy_bilateral=60, compat_bilateral=5, backend="torch")
    for srgb, words in ((0, "above 0"), (0.001, "raise srgb or sxy")):
        with pytest.raises(ValueError, match=words):
            crf.mean_field(torch.ones(2, 8, 8), noise((8, 8)), srgb=srgb, **own)
