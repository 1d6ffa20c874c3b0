"""Each equation against a loop over scalars, its gradient against finite differences; half precision."""
import math

import pytest
import torch
import torch.nn.functional as F

from wsss import losses

close = torch.testing.assert_close


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape, seed=0):
    """Features whose cosines lie inside the clamp."""
    return random(*shape, seed=seed).abs()


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def places(tensor):
    return torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist()


def cosine(a, b, eps=1e-4):
    """Clamped, as sim."""
    a, b = a.tolist(), b.tolist()
    plain = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return min(max(plain, eps), 1 - eps)


@pytest.mark.parametrize("size", [(7, 9), (3, 5), (2, 1)])
def test_maps_are_resized_corner_to_corner(size):
    """Row i of H stands at i (h - 1) / (H - 1) of the h rows: the corners of map and result are the same."""
    maps = random(2, 3, 4)
    found = losses.resize_map(maps, size)
    assert found.shape == (2, *size)
    for p, i, j in places(found):
        y, x = i * 2 / max(size[0] - 1, 1), j * 3 / max(size[1] - 1, 1)
        want = sum(max(0, 1 - abs(r - y)) * max(0, 1 - abs(c - x)) * maps[p, r, c].item()
                   for r in range(3) for c in range(4))
        assert found[p, i, j].item() == pytest.approx(want, abs=1e-9)


def test_masks_are_min_max_scaled_and_weigh_each_pixel():
    cam = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]])
    want = torch.tensor([[[0.0, 1 / 4.1], [2 / 4.1, 4 / 4.1]], [[0.0, 0.0], [0.0, 0.0]]])
    close(losses.mask_from_map(cam, 0.1), want)
    close(losses.mask_from_map(cam.view(1, 2, 2, 2), 0.1)[0], want)
    images, masks = positive(2, 3, 4, 5), positive(2, 4, 5, seed=1).clamp(0, 1)
    front, back = losses.split_regions(images, masks)
    for p, channel, y, x in places(images):
        pixel, m = images[p, channel, y, x].item(), masks[p, y, x].item()
        assert front[p, channel, y, x].item() == m * pixel
        assert back[p, channel, y, x].item() == (1 - m) * pixel


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
    """Parallel, opposite and orthogonal features: without sim's clamp, a log would be infinite."""
    a = torch.tensor([[1.0, 0.0]] * 3, dtype=dtype).requires_grad_()
    b = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    values = [
        losses.match_loss(a, b, b, 2.4), losses.match_loss(b, a, b, 2.4), losses.refine_loss(a, b),
        losses.prompt_loss(a, b, b, 0.02), losses.prompt_loss(a, b, b, 0.02, repel="log"),
        losses.suppression_loss(a, b, 0.26), losses.cls_loss(a * 1e4, (b > 0).to(dtype)),
        losses.area_loss(a.view(3, 1, 1, 2)), losses.mask_from_map(a.view(3, 1, 2), 1e-4)]
    for value in values:
        assert value.dtype == torch.float32 and value.isfinite().all()
    sum(value.sum() for value in values).backward()
    assert a.grad.isfinite().all()
    sim = losses.similarity(a, b)
    assert sim.tolist() == pytest.approx([1 - 1e-4, 1e-4, 1e-4], rel=1e-6)
    assert not torch.autograd.grad(sim[:2].sum(), a)[0].any()     # no gradient outside of the clamp


def test_gradients_equal_finite_differences():
    a, b, c = (positive(3, 5, seed=s).requires_grad_() for s in range(3))
    cam, image = positive(2, 3, 4, seed=3).requires_grad_(), positive(2, 3, 3, 4, seed=4)
    check = torch.autograd.gradcheck
    assert check(lambda *x: losses.match_loss(*x, 2.4), (a, b, c)) and check(losses.refine_loss, (a, b))
    for repel in ("one_minus", "log"):
        assert check(lambda *x: losses.prompt_loss(*x, 0.02, repel=repel), (a, b, c))         # noqa: B023
    assert check(lambda *x: losses.suppression_loss(*x, 0.5), (a, b))
    assert check(lambda x: losses.split_regions(image, losses.mask_from_map(x, 0.1)), (cam,))
    labels, p_text = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]), positive(3, 3).softmax(1)
    assert check(lambda r: losses.region_contrast(r[:, None] * b[:, None], b, labels, 0.5), (a,))
    assert check(lambda x, w: losses.prototype_loss(x, w, p_text, 0.5), (a, b))


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
    close(losses.assignment(x, z, 0.1), p_text)
    assert not allowed.all()
    close(losses.assignment(x, z, 0.1, allowed), naive_softmax(x, z, 0.1, allowed))
    want = -sum(q * math.log(p_n) for q, p_n in zip(p_text.flatten().tolist(), p.flatten().tolist())) / 6
    assert losses.prototype_loss(x, w, p_text, 0.3).item() == pytest.approx(want, rel=1e-9)
    hard = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 1, 2, 0]]  # with one-hot rows it is Eq. 3
    eq3 = F.cross_entropy(x @ w.T / 0.3, hard.argmax(1))
    close(losses.prototype_loss(x, w, hard, 0.3), eq3)
    x, z, w = x.float(), z.float(), w.float()
    p_text = losses.assignment(x, z, 1e-3)                        # some are 0 in float32, and 0 log 0 is 0
    assert (p_text == 0).any() and losses.prototype_loss(x, w, p_text, 1e-3).isfinite()


def test_rows_above_alpha_become_one_hot():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.2, 0.4, 0.4], [0.0, 0.39, 0.61]])
    want = torch.tensor([[1.0, 0, 0], [0.3, 0.1, 0.6], [0.2, 0.4, 0.4], [0, 0, 1]])       # .6 is not above
    assert torch.equal(losses.harden(p, 0.6), want)


def test_prototype_gradient_is_autograd_of_the_mean_for_any_chunk():
    x, w, p_text = unit(40, 6), unit(5, 6, seed=1).requires_grad_(), positive(40, 5, seed=2).softmax(1)
    loss = losses.prototype_loss(x, w, p_text, 0.03)
    (want,) = torch.autograd.grad(loss, w)
    for chunk in (1, 7, 1000):
        gradient, total = losses.prototype_gradient(x, w, p_text, 0.03, chunk)
        close(gradient / 40, want, rtol=1e-11, atol=1e-12)
        close(total / 40, loss.detach(), rtol=1e-11, atol=0.0)
    nothing = losses.prototype_gradient(x[:0], w, p_text[:0], 0.03)           # a process without a pixel
    assert nothing[0].shape == (5, 6) and not any(part.any() for part in nothing)


def descent(x, w, p_text, tau, lr, steps):
    """Projected gradient descent by autograd, with the halving rule in plain words. -> W, the rates"""
    before, rates = math.inf, []
    for _ in range(steps):
        w = w.detach().requires_grad_()
        losses.prototype_loss(x, w, p_text, tau).backward()
        norm = math.sqrt(sum(g * g for g in w.grad.flatten().tolist()))
        if norm > before:
            lr = lr / 2
        before = norm
        rates.append(lr)
        moved = w.detach() - lr * w.grad
        w = torch.stack([row / row.norm() for row in moved])
    return w, rates


def test_learn_prototypes_is_projected_gradient_descent_with_the_halving_rule():
    x, z = unit(60, 8), unit(5, 8, seed=1)
    p_text = losses.assignment(x, z, 0.05, positive(60, 5, seed=2) > 0.4).nan_to_num(0.2)
    for steps in (1, 2, 12):
        want, rates = descent(x, z, p_text, 0.1, 10.0, steps)
        learned = losses.learn_prototypes(x, z, p_text, 0.1, lr=10.0, steps=steps, chunk=13)
        close(learned, want, rtol=1e-9, atol=1e-9)
    assert rates[0] == 10 and 3 <= len(set(rates)) < 12           # it halved, and not at every step
    assert losses.prototype_loss(x, learned, p_text, 0.1) < losses.prototype_loss(x, z, p_text, 0.1)


def test_region_embeddings_equal_a_scalar_loop():
    v, a = random(2, 3, 4, 5).requires_grad_(), positive(2, 6, 4, 5, seed=1)
    a[1, 2] = 0                                                   # a region without any weight
    pooled = losses.region_embeddings(v, a)
    for i, n, d in places(pooled):
        weights, values = a[i, n].flatten().tolist(), v[i, d].flatten().tolist()
        want = sum(w * x for w, x in zip(weights, values)) / (sum(weights) or 1)
        assert pooled[i, n, d].item() == pytest.approx(want, rel=1e-9)
    assert torch.autograd.grad(pooled.sum(), v)[0].isfinite().all()


def test_region_contrast_equals_a_loop_and_the_papers_form_where_every_image_has_a_class_of_its_own():
    regions, w, own, want = random(3, 5, 4), unit(5, 4, seed=1), [4, 0, 2], 0
    S = [[math.exp(cosine(regions[i, n], w[n], -9) / 0.07) for n in range(5)] for i in range(3)]
    several = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])   # 3 and 4 are in no image
    for i, k in several.nonzero().tolist():
        row = S[i][k] + sum(S[i][n] for n in range(3) if not several[i, n])
        column = S[i][k] + sum(S[j][k] for j in range(3) if not several[j, k])
        want -= (math.log(S[i][k] / row) + math.log(S[i][k] / column)) / 2 / 4
    assert losses.region_contrast(regions, w, several, 0.07).item() == pytest.approx(want, rel=1e-9)

    S = [[row[n] for n in own] for row in S]                      # S_{i,j}: classes numbered as their images
    rows = sum(math.log(S[i][i] / sum(S[i][j] for j in range(3))) for i in range(3))
    columns = sum(math.log(S[i][i] / sum(S[j][i] for j in range(3))) for i in range(3))
    found = losses.region_contrast(regions, w, F.one_hot(torch.tensor(own), 5), 0.07).item()
    assert found == pytest.approx(-rows / 6 - columns / 6, rel=1e-9)
    for labels in (torch.ones(3, 5), torch.zeros(3, 5)):          # nothing against it, or nothing at all
        assert losses.region_contrast(regions, w, labels, 0.07) == 0


def naive_clamp(ce, known, start, tile):
    """A pixel at a time -> clamped losses, and which pixels were."""

    def mean(where):
        return sum(ce[p].item() for p in where) / max(len(where), 1)

    pixels = [tuple(p) for p in places(ce)]
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
    close(found, want)
    assert torch.equal(torch.autograd.grad(found.sum(), ce)[0], (~clamped).double())
    assert clamped.any() == (start == 1.2) and 0.4 < ce[known].mean() < 1.2
    sums = []                                                     # one process an image: their sums add up
    losses.clamp_losses(ce[1:], known[1:], start, 3, total=lambda x: sums.append(x) or x)
    close(losses.clamp_losses(ce[:1], known[:1], start, 3, total=sums[0].add), want[:1])
