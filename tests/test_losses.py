"""Each equation against a loop over scalars, its gradient against finite differences; half precision."""
import math

import pytest
import torch
import torch.nn.functional as F

from wsss import losses


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape, seed=0):
    """Features whose cosines lie inside the clamp."""
    return random(*shape, seed=seed).abs()


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def cosine(a, b):
    """Clamped, as sim."""
    return min(max(plain_cosine(a, b), 1e-4), 1 - 1e-4)


def plain_cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# ---------------------------------------------------------------- SemPLeS

def test_resize_map_by_hand():
    maps = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    row = torch.tensor([0.0, 1.0, 3.0, 4.0])                      # a quarter of a pixel beside each centre
    torch.testing.assert_close(losses.resize_map(maps, (4, 4))[0], row + 2 * row[:, None])


def test_mask_from_map_by_hand():
    cam = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]])
    want = torch.tensor([[[0.0, 1 / 4.1], [2 / 4.1, 4 / 4.1]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(losses.mask_from_map(cam, 0.1), want)
    torch.testing.assert_close(losses.mask_from_map(cam.view(1, 2, 2, 2), 0.1)[0], want)


def test_regions_weigh_each_pixel():
    images, masks = positive(2, 3, 4, 5), positive(2, 4, 5, seed=1).clamp(0, 1)
    front, back = losses.split_regions(images, masks)
    for p, channel, y, x in torch.cartesian_prod(*map(torch.arange, images.shape)).tolist():
        pixel, m = images[p, channel, y, x].item(), masks[p, y, x].item()
        assert front[p, channel, y, x].item() == m * pixel
        assert back[p, channel, y, x].item() == (1 - m) * pixel


def test_similarity_is_clamped_and_has_no_gradient_there():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    s = losses.similarity(a, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(s, torch.tensor([1 - 1e-4, 1e-4, 2**-0.5]))
    s.sum().backward()
    assert a.grad[:2].abs().max() == 0 and a.grad[2].abs().max() > 0


@pytest.mark.parametrize("features", [positive, random])
def test_semples_losses_equal_a_scalar_loop(features):
    v_f, v_b, u_f, u_b = (features(5, 7, seed=s) for s in range(4))
    match, refine = losses.match_loss(v_f, v_b, u_f, 2.4), losses.refine_loss(v_f, u_b)
    one_minus = losses.prompt_loss(u_b, v_b, u_f, 0.02)
    log = losses.prompt_loss(u_b, v_b, u_f, 0.02, repel="log", lambda_i=0.5)
    for p in range(5):
        pull, push = -math.log(cosine(v_f[p], u_f[p])), -math.log(1 - cosine(v_b[p], u_f[p]))
        assert match[p].item() == pytest.approx(pull + 2.4 * push, rel=1e-9)
        assert refine[p].item() == pytest.approx(-math.log(1 - cosine(v_f[p], u_b[p])), rel=1e-9)
        image, text = -math.log(cosine(u_b[p], v_b[p])), cosine(u_b[p], u_f[p])
        assert one_minus[p].item() == pytest.approx(image - 0.02 * math.log(1 - text), rel=1e-9)
        assert log[p].item() == pytest.approx(0.5 * image + 0.02 * math.log(text), rel=1e-9)
    with pytest.raises(ValueError, match="one_minus"):
        losses.prompt_loss(u_b, v_b, u_f, 0.02, repel="exp")


def test_classification_suppression_and_area_equal_a_scalar_loop():
    logits, labels = random(3, 4), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    v_f, texts, maps = random(3, 7), random(6, 7, seed=9), positive(3, 4, 2, 2)
    cls, cbs = losses.cls_loss(logits, labels), losses.suppression_loss(v_f, texts, 0.26)
    area = losses.area_loss(maps)
    near = [[c for t in texts if (c := cosine(v, t)) > 0.26] for v in v_f]
    assert 0 < sum(map(len, near)) < 18
    for i in range(3):
        signed = [z if y else -z for z, y in zip(logits[i].tolist(), labels[i].tolist())]
        assert cls[i].item() == pytest.approx(sum(math.log(1 + math.exp(-z)) for z in signed) / 4, rel=1e-6)
        assert cbs[i].item() == pytest.approx(sum(-math.log(1 - c) for c in near[i]), rel=1e-9)
        assert area[i].item() == pytest.approx(sum(maps[i].flatten().tolist()) / 16, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite_float32_and_with_finite_gradients_at_the_extremes(dtype):
    """Parallel, opposite and orthogonal features: without the clamp, a log would be infinite."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=dtype).requires_grad_()
    b = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    values = [
        losses.match_loss(a, b, b, 2.4),
        losses.match_loss(b, a, b, 2.4),
        losses.refine_loss(a, b),
        losses.prompt_loss(a, b, b, 0.02),
        losses.prompt_loss(a, b, b, 0.02, repel="log"),
        losses.suppression_loss(a, b, 0.26),
        losses.cls_loss(a * 1e4, (b > 0).to(dtype)),
        losses.area_loss(a.view(3, 1, 1, 2)),
        losses.mask_from_map(a.view(3, 1, 2), 1e-4),
    ]
    for value in values:
        assert value.dtype == torch.float32 and value.isfinite().all()
    sum(value.sum() for value in values).backward()
    assert a.grad.isfinite().all()
    assert losses.refine_loss(a, b)[0].item() == pytest.approx(-math.log(1e-4), rel=1e-2)


def test_gradients_equal_finite_differences_and_float64_stays():
    a, b, c = (positive(3, 5, seed=s).requires_grad_() for s in range(3))
    cam, image = positive(2, 3, 4, seed=3).requires_grad_(), positive(2, 3, 3, 4, seed=4)
    logits, labels = random(3, 5, seed=5).requires_grad_(), (positive(3, 5, seed=6) > 0.5).double()
    assert losses.match_loss(a, b, c, 2.4).dtype == torch.float64
    check = torch.autograd.gradcheck
    assert check(lambda *x: losses.match_loss(*x, 2.4), (a, b, c))
    assert check(lambda *x: losses.prompt_loss(*x, 0.02), (a, b, c))
    assert check(lambda *x: losses.prompt_loss(*x, 0.02, repel="log"), (a, b, c))
    assert check(losses.refine_loss, (a, b))
    assert check(lambda *x: losses.suppression_loss(*x, 0.5), (a, b))
    assert check(lambda x: losses.cls_loss(x, labels), (logits,))
    assert check(lambda x: losses.split_regions(image, losses.mask_from_map(x, 0.1)), (cam,))
    assert check(lambda x: losses.resize_map(x, (5, 7)), (cam,))


# ---------------------------------------------------------------- VPL, vision prototypes

def naive_softmax(x, prototypes, tau, allowed=None):
    rows = []
    for i in range(len(x)):
        dots = [sum(a * b for a, b in zip(x[i].tolist(), z.tolist())) for z in prototypes]
        e = [math.exp(dot / tau) if allowed is None or allowed[i, n] else 0.0 for n, dot in enumerate(dots)]
        rows.append([v / sum(e) for v in e])
    return torch.tensor(rows, dtype=torch.float64)


def test_assignment_and_prototype_loss_equal_a_scalar_loop():
    x, z, w, allowed = unit(6, 5), unit(4, 5, seed=1), unit(4, 5, seed=2), positive(6, 4, seed=3) > 0.5
    allowed[:, 0] = True
    p_text, p = naive_softmax(x, z, 0.1), naive_softmax(x, w, 0.3)
    torch.testing.assert_close(losses.assignment(x, z, 0.1), p_text)
    restricted = losses.assignment(x, z, 0.1, allowed)
    torch.testing.assert_close(restricted, naive_softmax(x, z, 0.1, allowed))
    assert (restricted[~allowed] == 0).all() and not allowed.all()
    want = -sum(q * math.log(p_n) for q, p_n in zip(p_text.flatten().tolist(), p.flatten().tolist())) / 6
    assert losses.prototype_loss(x, w, p_text, 0.3).item() == pytest.approx(want, rel=1e-9)
    hard = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 1, 2, 0]]  # with one-hot rows it is Eq. 3
    eq3 = F.cross_entropy(x @ w.T / 0.3, hard.argmax(1))
    torch.testing.assert_close(losses.prototype_loss(x, w, hard, 0.3), eq3)


def test_prototype_loss_is_finite_where_probabilities_underflow():
    """tau 0.001: P' and P become 0 in float32, and 0 log 0 is 0."""
    x, w = unit(50, 8).float(), unit(4, 8, seed=1).float()
    p_text = losses.assignment(x, w.flip(0), 1e-3)
    assert (p_text == 0).any() and losses.prototype_loss(x, w, p_text, 1e-3).isfinite()
    learned = losses.learn_prototypes(x.half(), w, p_text, 1e-3, steps=5)
    assert learned.isfinite().all() and learned.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_prototype_gradient_is_autograd_of_the_mean_for_any_chunk(chunk):
    x, w, p_text = unit(40, 6), unit(5, 6, seed=1).requires_grad_(), positive(40, 5, seed=2).softmax(1)
    loss = losses.prototype_loss(x, w, p_text, 0.03)
    (want,) = torch.autograd.grad(loss, w)
    gradient, total = losses.prototype_gradient(x, w, p_text, 0.03, chunk)
    torch.testing.assert_close(gradient / 40, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(total / 40, loss.detach(), rtol=1e-11, atol=0.0)
    nothing = losses.prototype_gradient(x[:0], w, p_text[:0], 0.03, chunk)      # a process without a pixel
    assert nothing[0].shape == (5, 6) and not any(part.any() for part in nothing)


def descent(x, w, p_text, tau, lr, steps):
    """Projected gradient descent by autograd, with the halving rule in plain words. -> W, the rates"""
    before, rates = None, []
    for _ in range(steps):
        w = w.detach().requires_grad_()
        losses.prototype_loss(x, w, p_text, tau).backward()
        norm = math.sqrt(sum(g * g for g in w.grad.flatten().tolist()))
        if before is not None and norm > before:
            lr = lr / 2
        before = norm
        rates.append(lr)
        moved = w.detach() - lr * w.grad
        w = torch.stack([row / row.norm() for row in moved])
    return w, rates


def test_learn_prototypes_is_projected_gradient_descent_with_the_halving_rule():
    x, z = unit(60, 8), unit(5, 8, seed=1)
    allowed = positive(60, 5, seed=2) > 0.4
    p_text = losses.assignment(x, z, 0.05, allowed).nan_to_num(0.2)
    for steps in (1, 2, 12):
        want, rates = descent(x, z, p_text, 0.1, 10.0, steps)
        learned = losses.learn_prototypes(x, z, p_text, 0.1, lr=10.0, steps=steps)
        torch.testing.assert_close(learned, want, rtol=1e-9, atol=1e-9)
    assert rates[0] == 10 and 3 <= len(set(rates)) < 12           # it halved, and not at every step
    learned = losses.learn_prototypes(x, z, p_text, 0.1, steps=300)
    assert losses.prototype_loss(x, learned, p_text, 0.1) < losses.prototype_loss(x, z, p_text, 0.1)
    for chunk in (1, 13, 59):
        other = losses.learn_prototypes(x, z, p_text, 0.1, steps=300, chunk=chunk)
        torch.testing.assert_close(other, learned, rtol=0, atol=1e-9)


def test_rate_halves_only_where_the_norm_grows():
    w, gradient, lr, norm, rates = unit(3, 4), unit(3, 4, seed=1), 8.0, math.inf, []
    for size in (1, 2, 2, 1, 1.5, 1.2):
        w, lr, norm = losses.prototype_step(w, size * gradient, lr, norm)
        rates.append(lr.item())
        torch.testing.assert_close(w.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert rates == [8, 4, 4, 4, 2, 2]


def test_texts_are_the_fixed_point_of_their_own_assignment():
    """P' over all columns at tau_I = tau_T: the loss is least at W = Z. With columns left out W moves."""
    x, z = unit(50, 8), unit(6, 8, seed=1)
    learned = losses.learn_prototypes(x, z, losses.assignment(x, z, 0.03), tau_i=0.03, steps=50)
    torch.testing.assert_close(learned, z, rtol=0, atol=1e-10)
    allowed = torch.ones(50, 6, dtype=torch.bool)
    allowed[:25, 0] = False
    p_text = losses.assignment(x, z, 0.03, allowed)
    assert (losses.learn_prototypes(x, z, p_text, tau_i=0.03, steps=50) - z).abs().max() > 0.01


# ---------------------------------------------------------------- VPL, regional semantic contrast

def test_region_embeddings_equal_a_scalar_loop():
    v, a = random(2, 3, 4, 5), positive(2, 6, 4, 5, seed=1)
    a[1, 2] = 0                                                   # a region without any weight
    pooled = losses.region_embeddings(v, a)
    for i, n, d in torch.cartesian_prod(*map(torch.arange, pooled.shape)).tolist():
        weights, values = a[i, n].flatten().tolist(), v[i, d].flatten().tolist()
        want = sum(w * x for w, x in zip(weights, values)) / (sum(weights) or 1)
        assert pooled[i, n, d].item() == pytest.approx(want, rel=1e-9)
    v, a = v.requires_grad_(), a.requires_grad_()
    gradients = torch.autograd.grad(losses.region_embeddings(v, a).sum(), (v, a))
    assert all(g.isfinite().all() for g in gradients)


def test_region_contrast_is_the_papers_form_when_every_image_has_a_class_of_its_own():
    regions, w, tau, own = random(3, 5, 4), unit(5, 4, seed=1), 0.07, [4, 0, 2]
    labels = torch.zeros(3, 5)
    labels[range(3), own] = 1
    # S_{i,j}: classes numbered as their images
    S = [[math.exp(plain_cosine(regions[i, n], w[n]) / tau) for n in own] for i in range(3)]
    rows = sum(math.log(S[i][i] / sum(S[i][j] for j in range(3))) for i in range(3))
    columns = sum(math.log(S[i][i] / sum(S[j][i] for j in range(3))) for i in range(3))
    want = -rows / 6 - columns / 6
    assert losses.region_contrast(regions, w, labels, tau).item() == pytest.approx(want, rel=1e-9)


def test_region_contrast_with_several_classes_equals_a_loop_over_pairs():
    regions, w, tau, want = random(3, 5, 4), unit(5, 4, seed=1), 0.07, 0
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])  # 3 and 4 are in no image
    S = [[math.exp(plain_cosine(regions[i, n], w[n]) / tau) for n in range(5)] for i in range(3)]
    for i, k in labels.nonzero().tolist():
        row = S[i][k] + sum(S[i][n] for n in range(3) if not labels[i, n])
        column = S[i][k] + sum(S[j][k] for j in range(3) if not labels[j, k])
        want -= (math.log(S[i][k] / row) + math.log(S[i][k] / column)) / 2 / 4
    assert losses.region_contrast(regions, w, labels, tau).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("labels", [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [1, 0]]])
def test_region_contrast_without_negatives_or_positives_is_a_zero_with_a_gradient(labels):
    regions, w = random(2, 2, 4).requires_grad_(), unit(2, 4, seed=1)
    loss = losses.region_contrast(regions, w, torch.tensor(labels), 0.07)
    loss.backward()
    assert loss.item() == 0 and regions.grad.isfinite().all()


def test_vpls_gradients_equal_finite_differences():
    v, a, w = positive(2, 3, 2, 2), positive(2, 4, 2, 2, seed=1), unit(4, 3, seed=2)
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])

    def contrast(v, a, w):
        return losses.region_contrast(losses.region_embeddings(v, a), w, labels, 0.5)

    assert torch.autograd.gradcheck(contrast, [x.requires_grad_() for x in (v, a, w)])
    x, p_text = unit(5, 3).requires_grad_(), positive(5, 4).softmax(1)
    assert torch.autograd.gradcheck(lambda x, w: losses.prototype_loss(x, w, p_text, 0.5), (x, w))


# ---------------------------------------------------------------- WeakTr, segmentation

def naive_clamp(ce, known, start, tile):
    """A pixel at a time -> clamped losses, and which pixels were."""

    def mean(where):
        return sum(ce[p].item() for p in where) / max(len(where), 1)

    pixels = [tuple(p) for p in torch.cartesian_prod(*map(torch.arange, ce.shape)).tolist()]
    overall, out, clamped = mean([p for p in pixels if known[p]]), ce.clone(), torch.zeros_like(known)
    for b, i, j in pixels:
        near = [p for p in pixels if known[p] and (p[1] // tile, p[2] // tile) == (i // tile, j // tile)]
        limit = max(overall, mean(near))
        if overall < start and ce[b, i, j] > limit:
            out[b, i, j], clamped[b, i, j] = limit, True
    return out, clamped


@pytest.mark.parametrize("start", [0.4, 1.2])
def test_large_losses_are_clamped_to_their_tile(start):
    ce = positive(2, 7, 5).pow(3) / 3                             # tiles of 3: the last ones are cut
    ce[:, :3, :3] += 1
    ce.requires_grad_()
    known = positive(2, 7, 5, seed=1) > 0.3
    known[:, 3:6, 3:] = False                                     # a tile without a label
    want, clamped = naive_clamp(ce, known, start, 3)
    found = losses.clamp_losses(ce, known, start, 3)
    torch.testing.assert_close(found, want)
    assert torch.equal(torch.autograd.grad(found.sum(), ce)[0], (~clamped).double())
    assert clamped.any() == (start == 1.2) and 0.4 < ce[known].mean() < 1.2

    sums = []                                                     # one process an image: their sums add up
    for b in range(2):
        losses.clamp_losses(ce[b:b + 1], known[b:b + 1], start, 3, total=lambda x: sums.append(x) or x)
    for b, other in enumerate(sums[::-1]):
        share = losses.clamp_losses(ce[b:b + 1], known[b:b + 1], start, 3, total=other.add)
        torch.testing.assert_close(share, want[b:b + 1])
