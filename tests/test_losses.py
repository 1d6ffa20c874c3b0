"""Each equation against a loop over scalars, its gradient against finite differences, and its behaviour in half precision."""
import math

import pytest
import torch

from wsss import losses


def features(*shape, seed=0, positive=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.abs() if positive else x                             # positive: cosines inside the clamp


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    c = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    return min(max(c, 1e-4), 1 - 1e-4)


def test_mask_from_map_by_hand():
    cam = torch.tensor([[[0., 1.], [2., 4.]], [[3., 3.], [3., 3.]]])
    want = torch.tensor([[[0., 1 / 4.1], [2 / 4.1, 4 / 4.1]], [[0., 0.], [0., 0.]]])
    torch.testing.assert_close(losses.mask_from_map(cam, 0.1), want)
    torch.testing.assert_close(losses.mask_from_map(cam.view(1, 2, 2, 2), 0.1)[0], want)              # any leading dimensions


def test_regions_add_up_and_weigh_each_pixel():
    images, masks = features(2, 3, 4, 5), features(2, 4, 5, seed=1).clamp(0, 1)
    front, back = losses.split_regions(images, masks)
    torch.testing.assert_close(front + back, images)
    for p in range(2):
        for channel in range(3):
            for y in range(4):
                for x in range(5):
                    assert front[p, channel, y, x] == masks[p, y, x] * images[p, channel, y, x]


def test_similarity_is_clamped_and_has_no_gradient_there():
    a = torch.tensor([[1., 0.], [1., 0.], [1., 1.]], requires_grad=True)
    s = losses.similarity(a, torch.tensor([[1., 0.], [-1., 0.], [1., 0.]]))
    torch.testing.assert_close(s, torch.tensor([1 - 1e-4, 1e-4, 2 ** -0.5]))
    s.sum().backward()
    assert a.grad[:2].abs().max() == 0 and a.grad[2].abs().max() > 0


@pytest.mark.parametrize("positive", [True, False])
def test_match_refine_and_prompt_losses_equal_a_scalar_loop(positive):
    v_f, v_b, u_f, u_b = (features(5, 7, seed=s, positive=positive) for s in range(4))
    match, refine = losses.match_loss(v_f, v_b, u_f, 2.4), losses.refine_loss(v_f, u_b)
    one_minus, log = losses.prompt_loss(u_b, v_b, u_f, 0.02), losses.prompt_loss(u_b, v_b, u_f, 0.02, repel="log")
    for p in range(5):
        repelled = cosine(u_b[p], u_f[p])
        assert match[p].item() == pytest.approx(-math.log(cosine(v_f[p], u_f[p])) - 2.4 * math.log(1 - cosine(v_b[p], u_f[p])), rel=1e-9)
        assert refine[p].item() == pytest.approx(-math.log(1 - cosine(v_f[p], u_b[p])), rel=1e-9)
        assert one_minus[p].item() == pytest.approx(-math.log(cosine(u_b[p], v_b[p])) - 0.02 * math.log(1 - repelled), rel=1e-9)
        assert log[p].item() == pytest.approx(-math.log(cosine(u_b[p], v_b[p])) + 0.02 * math.log(repelled), rel=1e-9)
    with pytest.raises(ValueError, match="one_minus"):
        losses.prompt_loss(u_b, v_b, u_f, 0.02, repel="exp")


def test_classification_suppression_and_area_equal_a_scalar_loop():
    logits, labels = features(3, 4, positive=False), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    v_f, texts, maps = features(3, 7, positive=False), features(6, 7, seed=9, positive=False), features(3, 4, 2, 2)
    cls, cbs, area = losses.cls_loss(logits, labels), losses.suppression_loss(v_f, texts, 0.26), losses.area_loss(maps)
    assert any(0.26 < cosine(v, t) for v in v_f for t in texts) and any(cosine(v, t) <= 0.26 for v in v_f for t in texts)
    for i in range(3):
        want = -sum(math.log(1 / (1 + math.exp(-z))) if y else math.log(1 / (1 + math.exp(z)))
                    for z, y in zip(logits[i].tolist(), labels[i].tolist())) / 4
        assert cls[i].item() == pytest.approx(want, rel=1e-6)     # labels are whole numbers, so this one is float32 or better
        near = [cosine(v_f[i], t) for t in texts]
        assert cbs[i].item() == pytest.approx(sum(-math.log(1 - c) for c in near if c > 0.26), rel=1e-9)
        assert area[i].item() == pytest.approx(sum(maps[i].flatten().tolist()) / 16, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite_float32_and_with_finite_gradients_at_the_extremes(dtype):
    """Parallel, opposite and orthogonal features: where 1 - cos or cos is 0 and, unclamped, a log is infinite."""
    a = torch.tensor([[1., 0.], [1., 0.], [1., 0.]], dtype=dtype).requires_grad_()
    b = torch.tensor([[1., 0.], [-1., 0.], [0., 1.]], dtype=dtype)
    values = [losses.match_loss(a, b, b, 2.4), losses.match_loss(b, a, b, 2.4), losses.refine_loss(a, b),
              losses.prompt_loss(a, b, b, 0.02), losses.prompt_loss(a, b, b, 0.02, repel="log"), losses.suppression_loss(a, b, 0.26),
              losses.cls_loss(a * 1e4, (b > 0).to(dtype)), losses.area_loss(a.view(3, 1, 1, 2)), losses.mask_from_map(a.view(3, 1, 2), 1e-4)]
    for value in values:
        assert value.dtype == torch.float32 and value.isfinite().all()
    sum(value.sum() for value in values).backward()
    assert a.grad.isfinite().all()
    assert losses.refine_loss(a, b)[0].item() == pytest.approx(-math.log(1e-4), rel=1e-2)             # not the infinity of half precision


def test_gradients_equal_finite_differences_and_float64_stays():
    a, b, c = (features(3, 5, seed=s).requires_grad_() for s in range(3))
    cam = features(2, 3, 4, seed=3).requires_grad_()
    image = features(2, 3, 3, 4, seed=4)
    logits, labels = features(3, 5, seed=5, positive=False).requires_grad_(), (features(3, 5, seed=6) > 0.5).double()
    assert losses.match_loss(a, b, c, 2.4).dtype == torch.float64
    check = torch.autograd.gradcheck
    assert check(lambda *x: losses.match_loss(*x, 2.4), (a, b, c))
    assert check(lambda *x: losses.prompt_loss(*x, 0.02), (a, b, c))
    assert check(lambda *x: losses.prompt_loss(*x, 0.02, repel="log"), (a, b, c))
    assert check(losses.refine_loss, (a, b))
    assert check(lambda *x: losses.suppression_loss(*x, 0.5), (a, b))
    assert check(lambda x: losses.cls_loss(x, labels), (logits,))
    assert check(lambda x: losses.split_regions(image, losses.mask_from_map(x, 0.1)), (cam,))
