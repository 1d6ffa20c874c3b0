"""Mask2Former's losses (Cheng et al. 2022). Those of transformers know no ignored pixels.

    ce, weight, bce, dice = set_losses(classes, masks, label_map, config, generator)      # of one image

Shapes: L decoder layers, Q queries, M masks of the image, K points. Class logits (L, Q, 2 + C) are those of
the background, the C classes, and null. `config` is transformers' Mask2FormerConfig. Matching needs scipy.
"""
import torch
import torch.nn.functional as F

from wsss.losses import at_least_float32


def mask_cross_entropy(x, t, known):
    """L_ce of a mask: mean binary cross-entropy of logits x and truth t over the known points.

    (..., K) x3 -> (...)
    """
    x, t = at_least_float32(x), at_least_float32(t)
    return ((F.softplus(x) - x * t) * known).sum(-1) / known.sum(-1).clamp(min=1)


def mask_dice(x, t, known):
    """L_dice of a mask: 1 - (2 sum s t + 1) / (sum s + sum t + 1), s = sigmoid(x), over the known points.

    (..., K) x3 -> (...)
    """
    x, t = at_least_float32(x), at_least_float32(t)
    s, t = x.sigmoid() * known, t * known
    return 1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + t.sum(-1) + 1)


def read_at(maps, points):
    """Bilinear values of maps (..., h, w) at points (K, 2), x and y in [0, 1].   -> (..., K)"""
    flat = maps.flatten(0, -3)[None]                              # (1, maps, h, w)
    values = F.grid_sample(flat, 2 * points[None, None] - 1, align_corners=False)         # (1, maps, 1, K)
    return values[0, :, 0].unflatten(0, maps.shape[:-2])


@torch.no_grad()
def match_queries(classes, x, labels, t, known, config):
    """The matching of queries and masks, in each layer the one that costs least in sum.

    class logits (L, Q, 2 + C), mask logits (L, Q, K), labels (M,), truth (M, K), known (K,)
    -> queries and their masks, (L, min(Q, M)) each
    """
    from scipy.optimize import linear_sum_assignment
    x, t = at_least_float32(x), at_least_float32(t)
    s, known_t = x.sigmoid() * known, t * known                   # (L, Q, K), (M, K)
    # mask_cross_entropy and mask_dice of every query and mask, without a tensor of (L, Q, M, K).
    ce = ((F.softplus(x) * known).sum(-1, keepdim=True) - x @ known_t.T) / known.sum().clamp(min=1)
    dice = 1 - (2 * s @ known_t.T + 1) / (s.sum(-1, keepdim=True) + known_t.sum(-1) + 1)
    likely = classes.softmax(-1)[..., labels]
    costs = config.mask_weight * ce + config.dice_weight * dice - config.class_weight * likely
    costs = costs.nan_to_num(1e6, 1e6, -1e6).cpu()                # (L, Q, M); waits for the device
    pairs = [[torch.from_numpy(side) for side in linear_sum_assignment(cost)] for cost in costs]
    queries, masks = (torch.stack(side).to(labels.device) for side in zip(*pairs))
    return queries, masks


def set_losses(classes, masks, label_map, config, generator, ignore=255):
    """The losses of one image, before any mean.

    class logits (L, Q, 2 + C), mask logits (L, Q, h, w), label map (H, W)
    -> cross-entropy and weight of every query (L, Q) x2, cross-entropy and dice of every mask (L, M) x2

    Every class of the label map is a mask. Masks are compared at random points; most of those of the losses
    lie where the mask logit is near 0. A point counts if none of the pixels it is read from is `ignore`.
    """
    K, null = config.train_num_points, classes.shape[-1] - 1
    uncertain, tried = int(config.importance_sample_ratio * K), int(config.oversample_ratio * K)
    points = torch.rand(K, 2, generator=generator).to(masks.device)
    labels = label_map.unique()
    labels = labels[labels != ignore]                             # (M,)
    truth = torch.cat([label_map == labels[:, None, None], (label_map == ignore)[None]]).float()
    t, hidden = read_at(truth, points).split([len(labels), 1])
    query, mask = match_queries(classes, read_at(masks, points), labels, t, hidden[0] == 0, config)

    points = torch.rand(tried + K - uncertain, 2, generator=generator).to(masks.device)
    layer = torch.arange(len(classes), device=labels.device)[:, None]
    t, hidden = read_at(truth, points).split([len(labels), 1])
    x, t = read_at(masks[layer, query], points), t[mask]          # (L, M, points) each
    known = (hidden == 0).expand(*mask.shape, -1)
    doubtful = torch.where(known, -x.detach().abs(), -torch.inf)[..., :tried].topk(uncertain).indices
    others = torch.arange(tried, len(points), device=labels.device).expand(*mask.shape, -1)
    kept = torch.cat([doubtful, others], -1)
    x, t, known = (values.gather(-1, kept) for values in (x, t, known))   # (L, M, K) each

    # As in Mask2Former's code a query without a mask learns null, even if it sees a class under `ignore`.
    target = torch.full(classes.shape[:-1], null, device=labels.device)
    target = target.index_put((layer, query), labels[mask])       # (L, Q)
    weight = torch.where(target == null, config.no_object_weight, 1.0)
    weight = weight * (len(labels) > 0)                           # without any label: no loss
    ce = F.cross_entropy(classes.transpose(1, 2), target, reduction="none")
    return ce, weight, mask_cross_entropy(x, t, known), mask_dice(x, t, known)
