"""The votes of segments: each rule against a loop over pixels, and no trace of the segments' order."""
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
    """SEPL's program, a pixel at a time: a class takes what it wins, of its own it keeps what is nobody's."""
    out, free = np.zeros_like(mask), set(range(len(masks)))
    for c in sorted(set(mask.ravel()) - {0, 255}):
        shared = {s: (masks[s] & (mask == c)).sum() for s in free}
        won = {s for s in free
               if shared[s] / masks[s].sum() > 0.5 or shared[s] / (mask == c).sum() >= 0.85}
        for y, x in np.ndindex(*mask.shape):
            holders = {s for s in free if masks[s][y, x]}
            if holders & won or mask[y, x] == c and not holders:
                out[y, x] = c
        free -= won
    return np.where((mask == 255) & (out == 0), 255, out)


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
    assert not np.array_equal(votes.fma_votes(segments_of(masks), maps, 0.6), want)   # levels matter
    assert not votes.fma_votes(segments_of(masks), maps[:0], 0.6).any()
    assert not votes.fma_votes([], maps, 0.6).any()


def test_means_that_are_all_equal_are_scores_as_they_are():
    """A single segment, or a flat map: there is nothing to scale by."""
    ones, left = np.ones((1, H, W), np.float32), np.broadcast_to(np.arange(W) < 17, (H, W))
    masks = [left, ~left]
    for score, power, want in ((1, 0.6, 1), (0, 0.6, 0), (0.5, 0.6, 0), (0.5, 2, 1)):         # .66, .25 of it
        assert (votes.fma_votes(segments_of(masks), score * ones, power) == want).all()
    assert not votes.fma_votes(segments_of(masks), (0.03 * ones + 1e-8 * np.arange(W)), 0.6).any()  # rounding


@pytest.mark.parametrize("share", [0.3, 1])
def test_sepl_is_its_rule_and_knows_no_order(share):
    masks, rng = blobs(25)[:-1], np.random.default_rng(3)
    mask = np.kron(rng.integers(0, 4, (4, 5)), np.ones((7, 7), int))[:H, :W].astype(np.uint8)
    mask[rng.random(mask.shape) > share] = 0                      # thin classes, which a segment can cover
    mask[0, :5], mask[10, 10:17], masks[0], masks[0, 8:12, 8:16] = 255, 5, False, True        # 6 of 7 pixels
    want = naive_sepl(masks, mask)
    assert (want != mask).any() and set(np.unique(want)) >= {0, 255}
    for order in [range(24), *(rng.permutation(24) for _ in range(4))]:
        assert np.array_equal(votes.sepl_votes(segments_of(masks[list(order)]), mask), want)
