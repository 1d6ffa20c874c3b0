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


# ---------------------------------------------------------------- VPL, vision prototypes

def unit(*shape, seed=0, dtype=torch.float64):
    return torch.nn.functional.normalize(features(*shape, seed=seed, positive=False), dim=-1).to(dtype)


def naive_softmax(x, prototypes, tau, allowed=None):
    rows = []
    for i in range(len(x)):
        e = [math.exp(sum(a * b for a, b in zip(x[i].tolist(), z.tolist())) / tau) if allowed is None or allowed[i, n] else 0.0
             for n, z in enumerate(prototypes)]
        rows.append([v / sum(e) for v in e])
    return torch.tensor(rows, dtype=torch.float64)


def test_assignment_and_prototype_loss_equal_a_scalar_loop():
    x, z, w, allowed = unit(6, 5), unit(4, 5, seed=1), unit(4, 5, seed=2), features(6, 4, seed=3) > 0.5
    allowed[:, 0] = True
    p_text, p = naive_softmax(x, z, 0.1), naive_softmax(x, w, 0.3)
    torch.testing.assert_close(losses.assignment(x, z, 0.1), p_text)
    restricted = losses.assignment(x, z, 0.1, allowed)
    torch.testing.assert_close(restricted, naive_softmax(x, z, 0.1, allowed))
    assert (restricted[~allowed] == 0).all() and not allowed.all()
    want = -sum(p_text[i, n].item() * math.log(p[i, n].item()) for i in range(6) for n in range(4)) / 6
    assert losses.prototype_loss(x, w, p_text, 0.3).item() == pytest.approx(want, rel=1e-9)
    hard = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 1, 2, 0]]                  # with 0-1 rows it is Eq. 3, the cross-entropy
    torch.testing.assert_close(losses.prototype_loss(x, w, hard, 0.3), torch.nn.functional.cross_entropy(x @ w.T / 0.3, hard.argmax(1)))


def test_prototype_loss_is_finite_where_probabilities_are_not():
    """tau 0.001: P' and P underflow to 0 in float32, and 0 log 0 is 0."""
    x, w = unit(50, 8, dtype=torch.float32), unit(4, 8, seed=1, dtype=torch.float32)
    p_text = losses.assignment(x, w.flip(0), 1e-3)
    assert (p_text == 0).any() and losses.prototype_loss(x, w, p_text, 1e-3).isfinite()
    learned = losses.learn_prototypes(x.half(), w, p_text, 1e-3, steps=5)
    assert learned.isfinite().all() and learned.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_prototype_gradient_is_autograd_of_the_mean_in_chunks_of_any_size(chunk):
    x, w, p_text = unit(40, 6), unit(5, 6, seed=1).requires_grad_(), features(40, 5, seed=2).softmax(1)
    loss = losses.prototype_loss(x, w, p_text, 0.03)
    want, = torch.autograd.grad(loss, w)
    gradient, total = losses.prototype_gradient(x, w, p_text, 0.03, chunk)
    torch.testing.assert_close(gradient / 40, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(total / 40, loss.detach(), rtol=1e-11, atol=0.0)
    nothing = losses.prototype_gradient(x[:0], w, p_text[:0], 0.03, chunk)               # a process without a pixel
    assert nothing[0].shape == (5, 6) and not any(part.any() for part in nothing)


def descent(x, w, p_text, tau, lr, steps):
    """Projected gradient descent by autograd, row by row, with the halving rule in plain words. -> W, the rates"""
    before, rates = None, []
    for _ in range(steps):
        w = w.detach().requires_grad_()
        losses.prototype_loss(x, w, p_text, tau).backward()
        norm = math.sqrt(sum(g * g for g in w.grad.flatten().tolist()))
        if before is not None and norm > before:
            lr = lr / 2
        before = norm
        rates.append(lr)
        w = torch.stack([(row - lr * g) / (row - lr * g).norm() for row, g in zip(w.detach(), w.grad)])
    return w, rates


def test_learn_prototypes_is_projected_gradient_descent_with_the_halving_rule():
    x, z = unit(60, 8), unit(5, 8, seed=1)
    p_text = losses.assignment(x, z, 0.05, torch.rand(60, 5, generator=torch.Generator().manual_seed(0)) > 0.3)
    p_text = p_text.nan_to_num(0.2)                                               # a row without any column
    for steps in (1, 2, 12):
        want, rates = descent(x, z, p_text, 0.1, 10.0, steps)
        learned = losses.learn_prototypes(x, z, p_text, 0.1, lr=10.0, steps=steps)
        torch.testing.assert_close(learned, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(learned.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert rates[0] == 10 and 3 <= len(set(rates)) < 12                           # it halved, and not at every step
    before, after = (losses.prototype_loss(x, w, p_text, 0.1) for w in (z, losses.learn_prototypes(x, z, p_text, 0.1, steps=300)))
    assert after < before


def test_rate_halves_only_where_the_norm_grows():
    w, gradient, lr, norm, rates = unit(3, 4), unit(3, 4, seed=1), 8.0, math.inf, []
    for size in (1, 2, 2, 1, 1.5, 1.2):
        w, lr, norm = losses.prototype_step(w, size * gradient, lr, norm)
        rates.append(lr.item())
        torch.testing.assert_close(w.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert rates == [8, 4, 4, 4, 2, 2]


def test_learned_prototypes_do_not_depend_on_the_chunks():
    x, z = unit(90, 8), unit(6, 8, seed=1)
    p_text = losses.assignment(x, z, 0.02)
    whole = losses.learn_prototypes(x, z, p_text, steps=200)
    for chunk in (1, 13, 89):
        torch.testing.assert_close(losses.learn_prototypes(x, z, p_text, steps=200, chunk=chunk), whole, rtol=0, atol=1e-9)


def test_texts_are_the_fixed_point_of_their_own_assignment():
    """P' of all columns at tau_I = tau_T: W = Z is where the loss is least, so W stays; with columns left out it moves."""
    x, z = unit(50, 8), unit(6, 8, seed=1)
    learned = losses.learn_prototypes(x, z, losses.assignment(x, z, 0.03), tau_i=0.03, steps=50)
    torch.testing.assert_close(learned, z, rtol=0, atol=1e-10)
    allowed = torch.ones(50, 6, dtype=torch.bool)
    allowed[:25, 0] = False
    assert (losses.learn_prototypes(x, z, losses.assignment(x, z, 0.03, allowed), tau_i=0.03, steps=50) - z).abs().max() > 0.01


# ---------------------------------------------------------------- VPL, regional semantic contrast

def test_region_embeddings_equal_a_scalar_loop():
    v, a = features(2, 3, 4, 5, positive=False), features(2, 6, 4, 5, seed=1)
    a[1, 2] = 0                                                                   # a region without any weight
    pooled = losses.region_embeddings(v, a)
    for i in range(2):
        for n in range(6):
            weight = sum(a[i, n].flatten().tolist())
            for d in range(3):
                total = sum(a[i, n, y, x].item() * v[i, d, y, x].item() for y in range(4) for x in range(5))
                assert pooled[i, n, d].item() == pytest.approx(total / weight if weight else 0, rel=1e-9)
    v, a = v.requires_grad_(), a.requires_grad_()
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.region_embeddings(v, a).sum(), (v, a)))


def plain_cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_region_contrast_is_the_papers_form_when_every_image_has_a_class_of_its_own():
    regions, w, tau, own = features(3, 5, 4, positive=False), unit(5, 4, seed=1), 0.07, [4, 0, 2]
    labels = torch.zeros(3, 5)
    labels[range(3), own] = 1
    S = [[plain_cosine(regions[i, own[j]], w[own[j]]) for j in range(3)] for i in range(3)]             # S_{i,j}: classes numbered as their images
    want = 0
    for i in range(3):
        want -= math.log(math.exp(S[i][i] / tau) / sum(math.exp(S[i][j] / tau) for j in range(3))) / 6
        want -= math.log(math.exp(S[i][i] / tau) / sum(math.exp(S[j][i] / tau) for j in range(3))) / 6
    assert losses.region_contrast(regions, w, labels, tau).item() == pytest.approx(want, rel=1e-9)


def test_region_contrast_with_several_classes_equals_a_loop_over_pairs():
    regions, w, tau = features(3, 5, 4, positive=False), unit(5, 4, seed=1), 0.07
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])    # classes 3 and 4 are in no image: no negatives either
    score = lambda i, n: math.exp(plain_cosine(regions[i, n], w[n]) / tau)
    want = []
    for i, k in labels.nonzero().tolist():
        others = [n for n in range(3) if not labels[i, n]]
        images = [j for j in range(3) if not labels[j, k]]
        want.append(-math.log(score(i, k) / (score(i, k) + sum(score(i, n) for n in others))) / 2
                    - math.log(score(i, k) / (score(i, k) + sum(score(j, k) for j in images))) / 2)
    assert losses.region_contrast(regions, w, labels, tau).item() == pytest.approx(sum(want) / 4, rel=1e-9)


@pytest.mark.parametrize("labels", [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [1, 0]]])
def test_region_contrast_without_negatives_or_positives_is_a_zero_with_a_gradient(labels):
    regions, w = features(2, 2, 4, positive=False).requires_grad_(), unit(2, 4, seed=1)
    loss = losses.region_contrast(regions, w, torch.tensor(labels), 0.07)
    loss.backward()
    assert loss.item() == 0 and regions.grad.isfinite().all()


def test_gradients_of_regional_contrast_equal_finite_differences():
    v, a, w = features(2, 3, 2, 2).requires_grad_(), features(2, 4, 2, 2, seed=1).requires_grad_(), unit(4, 3, seed=2).requires_grad_()
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
    assert torch.autograd.gradcheck(lambda v, a, w: losses.region_contrast(losses.region_embeddings(v, a), w, labels, 0.5), (v, a, w))
    p_text = features(5, 4).softmax(1)
    assert torch.autograd.gradcheck(lambda x, w: losses.prototype_loss(x, w, p_text, 0.5), (unit(5, 3).requires_grad_(), w))
