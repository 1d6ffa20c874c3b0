"""The votes of segments: each rule against a loop over pixels, and no trace of the segments' order."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from wsss import votes

H, W = 26, 34


def blobs(n, seed=0):
    """n overlapping masks (n, H, W) bool, some with holes, some tiny, the last one the whole image."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, H, W), bool)
    for mask in masks:
        y, x, h, w = *rng.integers(0, (H - 3, W - 3)), *rng.integers(2, 14, 2)
        mask[y:y + h, x:x + w] = rng.random(mask[y:y + h, x:x + w].shape) < 0.8
        mask[y, x] = True
    masks[-1] = True
    return masks


def segments_of(masks, levels=None):
    """Masks (H, W) in their tightest boxes, as the rules read them."""
    found = []
    for mask, level in zip(masks, levels or [0] * len(masks)):
        y, x = mask.nonzero()
        box = y.min(), x.min(), y.max() + 1, x.max() + 1
        where = slice(box[0], box[2]), slice(box[1], box[3])
        found.append(SimpleNamespace(box=box, where=where, mask=mask[where], level=level))
    return found


def mask_of(*places):
    """A mask that is true at the given places, each a pair of slices or numbers."""
    mask = np.zeros((H, W), bool)
    for place in places:
        mask[place] = True
    return mask


def naive_fma(masks, levels, maps, power):
    """Every pixel asks all segments that hold it for the best (level, score, smallness, place)."""
    S, P = len(masks), len(maps)
    means = [[np.mean(np.maximum(maps[p][mask], 0), dtype=float) for p in range(P)] for mask in masks]
    score = np.zeros((S, P + 1))
    for p in range(P):
        column = [row[p] for row in means]
        low, high = min(column), max(column)
        for s in range(S):
            score[s, p + 1] = (column[s] - low) / (high - low) if high - low >= 1e-6 else column[s]
    score[:, 0] = (1 - score[:, 1:].max(1)) ** power

    def key(s):
        return levels[s], score[s].max(), -masks[s].sum(), segments_of(masks)[s].box

    ranked = sorted(range(S), key=key)
    out = np.zeros(maps.shape[1:], int)
    for y, x in np.ndindex(*out.shape):
        holders = [s for s in ranked if masks[s][y, x]]
        out[y, x] = score[holders[-1]].argmax() if holders else 0
    return out


def naive_sepl(masks, mask):
    """Every pixel asks all segments that hold it for the one that its class covers most."""
    out, best = mask.copy(), np.full(mask.shape, -1.0)
    for s in masks:
        shared = {c: (s & (mask == c)).sum() for c in sorted(set(mask.ravel()) - {0, 255})}
        shared = {c: n for c, n in shared.items() if n / s.sum() > 0.5 or n / (mask == c).sum() >= 0.85}
        if shared:
            c = max(shared, key=shared.get)
            over = s & (shared[c] / s.sum() > best)
            out[over], best[over] = c, shared[c] / s.sum()
    return out


# ---------------------------------------------------------------- FMA-WSSS

@pytest.mark.parametrize("classes", [1, 3])
def test_fma_is_its_rule_and_knows_no_order(classes):
    masks, rng = blobs(15), np.random.default_rng(classes)
    masks[-1] &= rng.random((H, W)) < 0.97                        # some pixels are in no segment
    levels = rng.integers(0, 3, 15).tolist()
    maps = rng.random((classes, H, W)).astype(np.float32) - 0.2
    want = naive_fma(masks, levels, maps, 0.6)
    assert len(np.unique(want)) == classes + 1
    for order in [range(15), *(rng.permutation(15) for _ in range(4))]:
        segments = segments_of(masks[list(order)], [levels[i] for i in order])
        assert np.array_equal(votes.fma_votes(segments, maps, 0.6), want)
    assert not np.array_equal(votes.fma_votes(segments_of(masks), maps, 0.6), want)       # levels matter
    assert not votes.fma_votes(segments_of(masks), maps[:0], 0.6).any()
    assert not votes.fma_votes([], maps, 0.6).any()


def test_means_that_are_all_equal_are_scores_as_they_are():
    """A single segment, or a flat map: there is nothing to scale by."""
    full, left, right = mask_of(...), mask_of(np.s_[:, :17]), mask_of(np.s_[:, 17:])
    ones = np.ones((1, H, W), np.float32)

    def vote(masks, maps, power=0.6):
        return votes.fma_votes(segments_of(masks), np.float32(maps), power)

    for masks in ([full], halves := [left, right]):
        assert (vote(masks, ones) == 1).all() and not vote(masks, 0 * ones).any()
        assert not vote(masks, ones / 2).any()                    # .5 against the background's .66,
        assert (vote(masks, ones / 2, 2) == 1).all()              # and .25
        assert (vote(masks, ones + 1e-6) == 1).all()              # no root of a number below 0
        assert (vote(masks, np.concatenate([0.7 * ones, 0.8 * ones])) == 2).all()
    assert not vote(halves, 0.03 * ones + 1e-8 * np.arange(W)).any()            # rounding is not scaled
    assert np.array_equal(vote(halves, [np.where(right, 0.3, 0.3 - 1e-4)]), right)        # a difference is
    mixed = [np.where(left, 0.6, 0.1), np.full((H, W), 0.2)]      # the first class is scaled, not the second
    assert np.array_equal(vote(halves, mixed), left)              # .2 against .87
    assert np.array_equal(vote(halves, mixed, 9), np.where(left, 1, 2))         # .2 against .13


def test_fma_paints_the_whole_over_its_part():
    maps = np.zeros((1, H, W), np.float32)
    maps[0, :3] = 1
    part, whole, corner = mask_of(np.s_[:3]), mask_of(np.s_[:5]), mask_of(np.s_[4:6, 4:6])

    def vote(*levels):
        return votes.fma_votes(segments_of([part, whole, corner], levels), maps, 2.0)

    # .6 beats (1 - .6)^2: the whole is class 1. The corner is background.
    assert np.array_equal(vote(0, 2, 0), whole) and np.array_equal(vote(0, 0, 2), whole & ~corner)
    below = votes.fma_votes(segments_of([part, whole, corner], (2, 0, 0)), maps, 0.1)
    assert np.array_equal(below, part)                            # .6 < (1 - .6)^.1: the whole is background


# ---------------------------------------------------------------- painting

def test_ties_are_painted_by_size_place_and_label_whatever_the_order():
    small, large, lower = mask_of(np.s_[2:5, 2:5]), mask_of(np.s_[2:9, 2:9]), mask_of(np.s_[4:7, 4:7])
    frame = mask_of(np.s_[12:16, 8], np.s_[12, 8:12], np.s_[15, 8:12])
    rows = np.arange(12, 16)
    shapes = [frame | mask_of((rows, columns)) for columns in ([8, 9, 10, 11], [11, 10, 9, 8])]
    masks, labels = [large, small, lower, *shapes], [1, 3, 2, 4, 5]
    assert shapes[0].sum() == shapes[1].sum() and (shapes[0] != shapes[1]).any()
    want = np.zeros((H, W), int)
    for mask, label in zip(masks, labels):                        # larger first, then upper, then label
        want[mask] = label
    for order in itertools.permutations(range(5)):
        segments = segments_of([masks[i] for i in order])
        drawn = votes.paint(segments, [labels[i] for i in order], [0] * 5, np.zeros((H, W), int))
        assert np.array_equal(drawn, want)
    drawn = votes.paint(segments_of(masks), labels, [5, 4, 3, 2, 1], np.zeros((H, W), int))
    assert set(np.unique(drawn)) == {0, 1, 4, 5} and (drawn[large] == 1).all()  # `order` comes first


# ---------------------------------------------------------------- SEPL

def test_sepl_is_its_rule_and_knows_no_order():
    masks, rng = blobs(15)[:-1], np.random.default_rng(3)
    mask = np.kron(rng.integers(0, 4, (4, 5)), np.ones((7, 7), int))[:H, :W].astype(np.uint8)
    mask[0, :5] = 255
    want = naive_sepl(masks, mask)
    assert (want != mask).any()
    for order in [range(14), *(rng.permutation(14) for _ in range(4))]:
        assert np.array_equal(votes.sepl_votes(segments_of(masks[list(order)]), mask), want)

    mask = np.zeros((H, W), np.uint8)
    mask[:, :10], mask[:, 10:20] = 1, 2
    wide, sure = mask_of(np.s_[:10, 4:14]), mask_of(np.s_[:3, 10:12])
    drawn = votes.sepl_votes(segments_of([sure, wide]), mask)     # .6 of class 1 below all of class 2
    assert np.array_equal(drawn, np.where(sure, 2, np.where(wide, 1, mask)))


def test_sepl_asks_for_more_than_half_of_the_segment_or_most_of_the_class():
    def vote(*masks):
        return votes.sepl_votes(segments_of(masks), mask)

    mask = np.where(mask_of(np.s_[:, :10]), 1, 0).astype(np.uint8)
    s = mask_of(np.s_[:4, 8:12])
    assert np.array_equal(vote(s), mask)                          # class 1 covers 8 of 16 pixels
    s[0, 11] = False
    assert np.array_equal(vote(s), np.where(s, 1, mask))          # 8 of 15
    mask[mask == 1] = 255                                         # unsure is no class, nor is the background
    assert np.array_equal(vote(s, s[::-1]), mask)

    mask = np.where(mask_of(np.s_[2:5, 2:5]), 1, 0).astype(np.uint8)
    s = mask_of(np.s_[2:12, 2:12])
    s[4, 3:5] = False
    assert np.array_equal(vote(s), mask)                          # it holds 7 of the class's 9 pixels
    s[4, 3] = True
    assert np.array_equal(vote(s), (s | (mask == 1)))             # 8 of 9

    mask[20, 20:25] = 2
    s[20, 20:25] = True
    assert np.array_equal(vote(s), np.where(s, 1, mask))          # it holds two classes: the larger share
