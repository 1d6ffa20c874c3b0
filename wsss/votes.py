"""How segments without classes (SAM's, superpixels) find their class: FMA-WSSS's seeds and SEPL's vote.

    rows = fma_votes(segments, maps, power=0.6)       # maps (P, H, W) -> (H, W): 0 background, 1 + p row p
    mask = sepl_votes(segments, mask)                 # label map (H, W) uint8 -> same

A segment has `.box` (top, left, bottom, right), `.where` (the box as slices), `.mask` (bool, in the box) and,
for fma_votes, `.level` (0 part, 1, 2 whole): image[s.where][s.mask] are its pixels. Both rules give the same
result for any order of the segments.
"""
import numpy as np

IGNORE = 255


def fma_votes(segments, maps, power):
    """FMA-WSSS's seeds.   S segments, maps (P, H, W) -> (H, W) uint8: 0 background, 1 + p where map p wins

    1. m_sp is the mean of relu(map p) over the pixels of segment s.
    2. f_sp = (m_sp - min_s m_sp) / (max_s m_sp - min_s m_sp), the background's f_s0 = (1 - max_p f_sp)^power.
    3. Segment s gets the row of its largest f.
    4. Segments are painted in ascending order of level, then of that f. The rest is background.
    """
    painted = np.zeros(maps.shape[1:], np.uint8)
    if not len(maps) or not len(segments):
        return painted
    maps = maps.clip(min=0)
    means = [maps[(slice(None), *s.where)][:, s.mask].mean(1, dtype=np.float64) for s in segments]
    means = np.array(means)                                   # (S, P)
    low, high = means.min(0), means.max(0)
    # Differs from the paper: where all means are equal, as those of a single segment, the mean is the score.
    # The paper's division gives background there, or scales rounding to [0, 1].
    spread = np.broadcast_to(high - low >= 1e-6, means.shape)
    scores = np.divide(means - low, high - low, out=means.copy(), where=spread)
    background = (1 - scores.max(1, keepdims=True)).clip(min=0) ** power              # (S, 1)
    scores = np.concatenate([background, scores], 1)          # (S, 1 + P)
    order = [(s.level, best) for s, best in zip(segments, scores.max(1))]
    return paint_segments(segments, scores.argmax(1), order, painted)


def sepl_votes(segments, mask, half=0.5, most=0.85):
    """SEPL's vote.   S segments, label map (H, W) uint8 -> same

    For each class c of the label map, in ascending order:
    1. Of the segments that no class has won yet, c wins s if |s & c| > half |s| or |s & c| >= most |c|.
    2. Their pixels become c, over what smaller classes painted.
    3. c's other pixels stay c only where none of the segments lies that were free before this turn.
    What no class paints is background.
    """
    painted, free = np.zeros_like(mask), list(segments)
    for c in np.unique(mask[(mask > 0) & (mask != IGNORE)]):
        own = mask == c
        inside = [own[s.where][s.mask].sum() for s in free]   # |s & c|
        wins = [n > half * s.mask.sum() or n >= most * own.sum() for s, n in zip(free, inside)]
        outside = own.copy()
        for s, won in zip(free, wins):
            outside[s.where][s.mask] = False
            if won:
                painted[s.where][s.mask] = c
        painted[outside] = c
        free = [s for s, won in zip(free, wins) if not won]
    # Differs from SEPL's masks, which have no 255: here such a pixel stays so where no class is painted.
    painted[(mask == IGNORE) & (painted == 0)] = IGNORE
    return painted


def paint_segments(segments, labels, order, canvas):
    """Writes labels[i] over the pixels of segments[i], in ascending order[i].

    Where that is equal, larger segments come first, then place and label decide, never the list's order.
    """
    ties = [(-int(s.mask.sum()), s.box, int(label)) for s, label in zip(segments, labels)]
    for i in sorted(range(len(segments)), key=lambda i: (order[i], ties[i])):
        canvas[segments[i].where][segments[i].mask] = labels[i]
    return canvas
