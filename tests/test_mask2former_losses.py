"""Mask2Former's losses against scalar loops, matching against all permutations, all against transformers."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hosts import mask2former_losses as m2f

pytest.importorskip("scipy")
CONFIG = SimpleNamespace(class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object_weight=0.1,
                         train_num_points=512, importance_sample_ratio=0.75, oversample_ratio=3.0)
L, B, Q, C = 3, 2, 10, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(images=B):
    """Class logits (L, B, Q, 2 + C) and mask logits (L, B, Q, 24, 24), which want a gradient."""
    classes, masks = random(L, images, Q, 2 + C), 3 * random(L, images, Q, 24, 24, seed=1)
    return classes.requires_grad_(), masks.requires_grad_()


def label_maps():
    maps = torch.zeros(B, 96, 96, dtype=torch.long)
    maps[0, 20:60, 30:60], maps[0, 70:, :50], maps[1, 10:80, 40:90] = 1, 3, 2
    return maps


def mean_losses(classes, masks, maps, seed=0):
    """Class, mask and dice loss, means over images and masks, sums over layers."""
    parts = []
    for i in range(len(maps)):
        generator = torch.Generator().manual_seed(seed + i)
        parts.append(m2f.set_losses(classes[:, i], masks[:, i], maps[i], CONFIG, generator))
    ce, weight, bce, dice = (torch.cat(part, 1) for part in zip(*parts))
    return torch.stack([L * (weight * ce).sum() / weight.sum(), L * bce.mean(), L * dice.mean()])


def test_losses_of_a_mask_equal_a_scalar_loop():
    x, t, known = random(3, 6), random(3, 6, seed=1).sigmoid(), random(3, 6, seed=2) > 0
    known[2] = False
    ce, dice = m2f.mask_cross_entropy(x, t, known), m2f.mask_dice(x, t, known)
    for m in range(3):
        rows = zip(x[m].tolist(), t[m].tolist(), known[m])
        points = [(1 / (1 + math.exp(-a)), b) for a, b, k in rows if k]
        want = sum(-b * math.log(s) - (1 - b) * math.log(1 - s) for s, b in points) / max(len(points), 1)
        assert ce[m].item() == pytest.approx(want, abs=1e-5)
        both, each = sum(s * b for s, b in points), sum(s + b for s, b in points)
        assert dice[m].item() == pytest.approx(1 - (2 * both + 1) / (each + 1), abs=1e-5)
    extreme = m2f.mask_cross_entropy(torch.tensor([100.0, -100.0]), torch.tensor([0.0, 1.0]), torch.ones(2))
    assert extreme.item() == 100                                  # no overflow


def test_read_at_is_bilinear():
    maps = random(2, 3, 4, 5)
    points = torch.tensor([[2.5 / 5, 1.5 / 4], [3 / 5, 1.5 / 4], [2.5 / 5, 3 / 4]])       # x and y
    want = [maps[..., 1, 2], maps[..., 1, 2:4].mean(-1), maps[..., 2:4, 2].mean(-1)]
    torch.testing.assert_close(m2f.read_at(maps, points), torch.stack(want, -1))


def test_losses_are_the_librarys():
    """At the same points, which both draw by torch.rand."""
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = modeling.Mask2FormerConfig(num_labels=1 + C, train_num_points=CONFIG.train_num_points)
    names = {"loss_cross_entropy": 0, "loss_mask": 1, "loss_dice": 2}
    library = modeling.Mask2FormerLoss(config, dict.fromkeys(names, 1.0))
    (classes, masks), maps = logits(), label_maps()
    labels = [m.unique() for m in maps]
    truth = [(m == found[:, None, None]).float() for m, found in zip(maps, labels)]
    K, tried = CONFIG.train_num_points, 3 * CONFIG.train_num_points
    points = {n: random(n, 2, seed=n).sigmoid() for n in (K, tried, K // 4)}
    points[tried + K // 4] = torch.cat([points[tried], points[K // 4]])
    earlier = [{"class_queries_logits": c, "masks_queries_logits": m} for c, m in zip(classes, masks)][:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **how: points[size[-2]].expand(*size).clone())
        found = mean_losses(classes, masks, maps)
        theirs = library(masks[-1], classes[-1], truth, labels, earlier)
    want = torch.zeros(3)
    for name, value in theirs.items():
        want[names[name.rstrip("_0123456789")]] += value
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [classes, masks]) for x in (found, want))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_lies_under_255_changes_nothing_one_logit_from_its_border():
    """The upper half has no label. Points of the lower half read logits from row 11 on: 4 pixels a logit."""
    maps = label_maps()
    maps[:, :48] = 255
    classes, masks = logits()
    values = mean_losses(classes, masks, maps)
    (gradient,) = torch.autograd.grad(values.sum(), masks)
    assert not gradient[..., :11, :].any() and gradient[..., 12:, :].any()
    other, seen = masks.detach().clone(), masks.detach().clone()
    other[..., :11, :], seen[..., 12, :] = random(L, B, Q, 11, 24, seed=2), 0
    assert torch.equal(values, mean_losses(classes, other, maps))
    assert not torch.equal(values, mean_losses(classes, seen, maps))


def test_a_query_that_sees_a_class_only_under_255_learns_null():
    maps = label_maps()[1:]                                       # background and class 2
    maps[:, :48] = 255
    classes, masks = torch.zeros(1, Q, 2 + C), torch.full((1, Q, 24, 24), -9.0)
    masks[:, 7, :10] = 9                                          # where no point counts
    classes[:, 7, 1] = 4
    classes.requires_grad_()
    ce, weight, *_ = m2f.set_losses(classes, masks, maps[0], CONFIG, torch.Generator())
    gradient = torch.autograd.grad((weight * ce).sum(), classes)[0][0, 7]
    assert gradient[-1] < 0 < gradient[1]


def test_an_image_without_a_label_has_no_loss_but_a_gradient():
    (classes, masks), maps = logits(), label_maps()
    maps[1] = 255
    both, one = mean_losses(classes, masks, maps), mean_losses(classes[:, :1], masks[:, :1], maps[:1])
    torch.testing.assert_close(both, one, rtol=1e-6, atol=0)
    for x in torch.autograd.grad(both.sum(), [classes, masks]):   # zero, not absent: DDP needs one
        assert x[:, 0].any() and not x[:, 1].any()


def test_points_come_from_the_generator():
    (classes, masks), maps = logits(), label_maps()
    first, again, other = (mean_losses(classes, masks, maps, seed) for seed in (0, 0, 9))
    assert torch.equal(first, again) and not torch.equal(first[1:], other[1:])


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if torch.is_tensor(x))])
        return out


def test_matching_costs_least_and_holds_no_number_of_pair_and_point():
    """Against all permutations, in 40 layers."""
    layers, queries, M, K = 40, 5, 4, 24
    classes, x, labels = random(layers, queries, 7), 3 * random(layers, queries, K, seed=1), torch.arange(M)
    t, known = random(M, K, seed=2).sigmoid(), random(K, seed=3) > -0.5
    with Largest() as seen:
        found = m2f.match_queries(classes, x, labels, t, known, CONFIG)
    assert seen.numel == layers * queries * K
    for z, p, query, mask in zip(x, classes.softmax(-1), *found):
        cost = m2f.mask_cross_entropy(z[:, None], t, known) + m2f.mask_dice(z[:, None], t, known)
        cost = 5 * cost - 2 * p[:, :M]                            # (queries, M)
        chosen = torch.tensor(list(itertools.permutations(range(queries), M)))
        least = cost[chosen, torch.arange(M)].sum(1).min().item()
        assert cost[query, mask].sum().item() == pytest.approx(least, abs=1e-5)
        assert sorted(mask.tolist()) == list(range(M))
