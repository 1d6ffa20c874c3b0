"""Every equation of the papers as a pure function of tensors: torch only (and scipy to match masks), no flags, no device, no state.

Letters are the papers': v_f, v_b are CLIP's features of the foreground and background image, u_f of the class text, u_b of the learned
prompt. A loss is returned per pair (image, present class), shape (P,): the caller takes the mean, over all processes if there are several.
Whatever comes in, the arithmetic is at least float32: in half precision 1 - 1e-4 rounds to 1, and log(1 - sim) would be infinite.
"""

import torch
import torch.nn.functional as F


def at_least_float32(*tensors):
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


# ------------------------------------------------------------------------------------------------------------ SemPLeS

def mask_from_map(cam, eps):
    """SemPLeS 3.2.1, M = S(X): min-max per map, m = (c - min) / (max - min + eps).   (..., H, W) -> same, in [0, 1)

    The paper gives no formula. eps decides how strong a mask a small map may become: a map of amplitude eps peaks at 1/2.
    """
    cam, = at_least_float32(cam)
    low, high = cam.amin(dim=(-2, -1), keepdim=True), cam.amax(dim=(-2, -1), keepdim=True)
    return (cam - low) / (high - low + eps)


def split_regions(images, masks):
    """SemPLeS 3.2.1: X_f = M X,  X_b = (1 - M) X.   (P, 3, H, W), (P, H, W) -> two of (P, 3, H, W)

    A removed pixel becomes 0: black for images in [0, 1], the mean colour for normalised ones.
    """
    images, masks = at_least_float32(images, masks)
    masks = masks.unsqueeze(1)                                                        # (P, 1, H, W)
    return masks * images, (1 - masks) * images


def similarity(a, b, eps=1e-4):
    """SemPLeS 4.2, sim: the cosine, clamped to [eps, 1 - eps]; outside it has no gradient.   (P, D) x2 -> (P,)"""
    a, b = at_least_float32(a, b)
    return F.cosine_similarity(a, b, dim=-1).clamp(eps, 1 - eps)


def match_loss(v_f, v_b, u_f, lambda_b):
    """SemPLeS Eq. 1, L_match = -log sim(v_f, u_f) - lambda_b log(1 - sim(v_b, u_f)).   (P, D) x3 -> (P,)"""
    return -similarity(v_f, u_f).log() - lambda_b * (1 - similarity(v_b, u_f)).log()


def prompt_loss(u_b, v_b, u_f, lambda_t, repel="one_minus", lambda_i=1.0):
    """SemPLeS Eq. 2, L_prompt = -log sim(u_b, v_b) - lambda_T log(1 - sim(u_b, u_f)).   (P, D) x3 -> (P,)

    repel="log" is the form of the arXiv version 2: the second term is + lambda_T log sim(u_b, u_f), which has no lower bound but the clamp's.
    lambda_i weighs the first term: 0 leaves the text term alone, a row of Table 5.
    """
    s = similarity(u_b, u_f)
    if repel == "one_minus":
        away = -(1 - s).log()
    elif repel == "log":
        # From the authors' code, not in the paper: (of WACV; arXiv v2 prints it).
        away = s.log()
    else:
        raise ValueError(f"repel is 'one_minus' or 'log', not {repel!r}")
    return -lambda_i * similarity(u_b, v_b).log() + lambda_t * away


def refine_loss(v_f, u_b):
    """SemPLeS Eq. 3, L_refine = -log(1 - sim(v_f, u_b)); L_total = L_match + lambda L_refine.   (P, D) x2 -> (P,)"""
    return -(1 - similarity(v_f, u_b)).log()


# ---------------------------------------------------------------------------- the generators SemPLeS starts from

def cls_loss(logits, labels):
    """WeakTr / CLIMS, classification: -1/C sum_k [y_k log s(z_k) + (1 - y_k) log s(-z_k)], s the sigmoid.   (B, C) x2 -> (B,)"""
    logits, labels = at_least_float32(logits, labels)
    return F.multilabel_soft_margin_loss(logits, labels, reduction="none")


def suppression_loss(v_f, u_manual, tau):
    """CLIMS, CBS: -sum_t log(1 - cos(v_f, u_t)) over the manual background texts with cos > tau.   (P, D), (T, D) -> (P,)

    CLIMS adds these up over the pairs of a batch, where every other term is a mean: its weight depends on the batch size.
    """
    s = similarity(v_f.unsqueeze(1), u_manual)                                        # (P, T)
    return torch.where(s > tau, -(1 - s).log(), 0).sum(1)


def area_loss(maps):
    """CLIMS, REG: the mean of an image's maps, of present and absent classes alike.   (B, C, h, w) -> (B,)"""
    maps, = at_least_float32(maps)
    return maps.mean(dim=(1, 2, 3))


# ---------------------------------------------------------------------------------------- VPL, vision prototypes

def assignment(x, prototypes, tau, allowed=None):
    """VPL Eq. 5, P'_n = exp(x . z_n / tau_T) / sum_j exp(x . z_j / tau_T); with W and tau_I it is P.   (n, D), (C, D) -> (n, C)

    `allowed` (n, C) bool leaves columns out of a pixel's softmax: they get 0."""
    x, prototypes = at_least_float32(x, prototypes)
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ prototypes.T / tau
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(1)


def prototype_loss(x, w, p_text, tau_i):
    """VPL Eq. 7 as the paper computes it, -sum_n P'_n log P_n, the mean over pixels.   (n, D), (C, D), (n, C) -> scalar

    KL(P' || P) differs by the entropy of P', which no W changes. With 0-1 rows for P' it is Eq. 3."""
    # Differs from the paper: a mean where it writes a sum, or the rate 10 would mean something else for every number of pixels.
    x, w, p_text = at_least_float32(x, w, p_text)
    with torch.autocast(x.device.type, enabled=False):
        return -(p_text * (x @ w.T / tau_i).log_softmax(1)).sum(1).mean()


@torch.no_grad()
def prototype_gradient(x, w, p_text, tau_i, chunk=8192):
    """VPL Eq. 10: n times the gradient of prototype_loss at W, (P - P')^T x / tau_I, and n times the loss, float64.   -> (C, D), scalar

    Sums over pixels, `chunk` at a time: the sums of several processes add up, and only `chunk` rows of P are ever in memory."""
    gradient, loss = torch.zeros_like(w, dtype=torch.float64), torch.zeros((), dtype=torch.float64, device=w.device)
    with torch.autocast(x.device.type, enabled=False):
        for part, target in zip(x.split(chunk), p_text.split(chunk)):
            part, = at_least_float32(part)
            target = target.to(part.dtype)
            log_p = (part @ w.to(part.dtype).T / tau_i).log_softmax(1)                # (chunk, C)
            gradient += (log_p.exp() - target).T @ part / tau_i
            loss -= (target * log_p).sum()
    return gradient, loss


def prototype_step(w, gradient, lr, norm):
    """VPL Eq. 11, W <- W - lr gradient, then every row back to unit length; `norm` of the gradient before.   -> W, lr, norm of this gradient"""
    # Differs from the paper: it says "standard projected gradient descent" and no more. The rate that halves whenever the norm of the gradient
    # grows is InMaP's (Qian et al. 2023), which starts at 10 too. The norm is the whole gradient's, with the part along the rows that the
    # projection undoes. That part stays at the optimum and may grow there step after step: the rate then dies, as it may.
    now = gradient.norm()
    lr = lr / (1 + (now > norm).to(now))                                              # on the device: nothing waits
    return F.normalize(w - lr * gradient, dim=1), lr, now


@torch.no_grad()
def learn_prototypes(x, z, p_text, tau_i=0.03, lr=10.0, steps=3000, chunk=8192):
    """VPL Eq. 9-11, W'* = argmin_W prototype_loss over unit rows, by `steps` full-batch steps from W = Z.   (n, D), (C, D), (n, C) -> (C, D)

    In float32, W is still kept in float64, but the halving is a branch: two chunk sizes can part ways by a few steps of it."""
    w, norm = z.double(), torch.inf
    for _ in range(steps):
        gradient, _ = prototype_gradient(x, w, p_text, tau_i, chunk)
        w, lr, norm = prototype_step(w, gradient / len(x), lr, norm)
    return w.to(z.dtype)


# --------------------------------------------------------------------------------- VPL, regional semantic contrast

def region_embeddings(v, a):
    """VPL Eq. 12, P_{i,n} = sum_hw A_{i,n} V_i / sum_hw A_{i,n}.   (B, D, h, w), (B, C, h, w) -> (B, C, D)

    A must not be negative; a region without any weight is 0."""
    v, a = at_least_float32(v, a)
    weight = a.sum((2, 3)).unsqueeze(2)                                               # (B, C, 1)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum("bchw,bdhw->bcd", a, v) / torch.where(weight > 0, weight, 1)


def region_contrast(regions, w, labels, tau):
    """VPL Eq. 13, L_RSC, with S_{i,n} the cosine of image i's region n and prototype n.   (B, C, D), (C, D), (B, C) -> scalar"""
    # Differs from the paper: it numbers images and classes alike, as if each image held one class of its own. Here every pair (image, present
    # class) is a positive; against it stand, in its row, the batch's classes that the image does not hold, in its column, the images without
    # the class. Where each image does hold one class of its own, this is the paper's form.
    regions, w = at_least_float32(regions, w)
    labels = labels.bool()
    b, k = labels.nonzero(as_tuple=True)                                              # (P,)
    s = F.cosine_similarity(regions, w, dim=-1) / tau                                 # (B, C)
    row_out = (labels | ~labels.any(0))[b] & ~F.one_hot(k, s.shape[1]).bool()         # (P, C): neither the pair itself nor a negative
    column_out = labels.T[k] & ~F.one_hot(b, s.shape[0]).bool()                       # (P, B)
    row = F.cross_entropy(s[b].masked_fill(row_out, -torch.inf), k, reduction="sum")
    column = F.cross_entropy(s.T[k].masked_fill(column_out, -torch.inf), b, reduction="sum")
    return (row + column) / (2 * max(len(b), 1))


# ------------------------------------------------------------------- segmentation networks: WeakTr's loss, Mask2Former's

def clamp_losses(ce, known, start=1.2, tile=120, total=lambda sums: sums):
    """WeakTr, gradient clipping: once the mean of all losses is below `start`, a pixel whose loss exceeds max(mean of its tile over the batch,
    mean of all) takes that value, and has no gradient: it is likely labelled wrong.   (B, H, W), (B, H, W) bool -> (B, H, W)

    `known`: the pixels with a label; `total` adds up the sums of several processes."""
    # Differs from the paper: WeakTr's code counts a pixel without a label in the means, with a loss of 0; here it is in none.
    ce, = at_least_float32(ce)
    H, W = ce.shape[1:]
    sums = torch.stack([torch.where(known, ce.detach(), 0).sum(0), known.sum(0)])     # (2, H, W): losses, pixels
    sums = F.pad(sums, (0, -W % tile, 0, -H % tile)).unflatten(2, (-1, tile)).unflatten(1, (-1, tile))
    loss, count = total(sums.sum((2, 4)))                                             # (h, w) tiles each
    mean = loss.sum() / count.sum().clamp(min=1)
    limit = torch.maximum(loss / count.clamp(min=1), mean)
    limit = limit.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:H, :W]
    return torch.where((ce > limit) & (mean < start), limit, ce)


def mask_cross_entropy(x, t, known):
    """Mask2Former, L_ce of a mask: the mean binary cross-entropy of logits x and truth t over the known points.   (..., K) x3 -> (...)"""
    x, t = at_least_float32(x, t)
    return ((F.softplus(x) - x * t) * known).sum(-1) / known.sum(-1).clamp(min=1)


def mask_dice(x, t, known):
    """Mask2Former, L_dice of a mask: 1 - (2 sum s t + 1) / (sum s + sum t + 1), s = sigmoid(x), over the known points.   (..., K) x3 -> (...)"""
    x, t = at_least_float32(x, t)
    s, t = x.sigmoid() * known, t * known
    return 1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + t.sum(-1) + 1)


def read_at(maps, points):
    """Bilinear values of maps (..., h, w) at points (K, 2), x and y in [0, 1] from edge to edge.   -> (..., K)"""
    return F.grid_sample(maps.flatten(0, -3)[None], 2 * points[None, None] - 1, align_corners=False)[0, :, 0].unflatten(0, maps.shape[:-2])


@torch.no_grad()
def match(classes, x, labels, t, known, config):
    """Mask2Former, matching: in each layer the query for each mask, such that the whole costs least.
    (L, Q, 2 + C), (L, Q, K), (M,), (M, K), (K,) -> queries and their masks (L, min(Q, M)) each"""
    from scipy.optimize import linear_sum_assignment
    x, t = at_least_float32(x, t)
    s, known_t = x.sigmoid() * known, t * known                                       # (L, Q, K), (M, K)
    # mask_cross_entropy and mask_dice of every query and mask: by products of matrices, for a pair has no K numbers of its own.
    ce = ((F.softplus(x) * known).sum(-1, keepdim=True) - x @ known_t.T) / known.sum().clamp(min=1)
    dice = 1 - (2 * s @ known_t.T + 1) / (s.sum(-1, keepdim=True) + known_t.sum(-1) + 1)
    costs = config.mask_weight * ce + config.dice_weight * dice - config.class_weight * classes.softmax(-1)[..., labels]
    costs = costs.nan_to_num(1e6, 1e6, -1e6).cpu()                                    # (L, Q, M); the step waits here for the device
    pairs = [[torch.from_numpy(side) for side in linear_sum_assignment(cost)] for cost in costs]
    return (torch.stack(side).to(labels.device) for side in zip(*pairs))


def set_losses(classes, masks, label_map, config, generator, ignore=255):
    """Mask2Former's losses of one picture, of L decoder layers, before any mean: class logits (L, Q, 2 + C), null last, mask logits (L, Q, h, w),
    label map (H, W) -> cross-entropy and weight of every query (L, Q) x2; cross-entropy and dice of every matched mask (L, M) x2

    Every class of the label map is a mask. All is read at random points, of the last three quarters where the mask is least sure of itself.
    A point counts, in matching and in the loss, where none of the pixels it is read from is `ignore`. `config`: transformers' Mask2FormerConfig."""
    K, null = config.train_num_points, classes.shape[-1] - 1
    uncertain, tried = int(config.importance_sample_ratio * K), int(config.oversample_ratio * K)
    points = torch.rand(K, 2, generator=generator).to(masks.device)
    labels = label_map.unique()
    labels = labels[labels != ignore]                                                 # (M,)
    truth = torch.cat([label_map == labels[:, None, None], (label_map == ignore)[None]]).float()
    t, hidden = read_at(truth, points).split([len(labels), 1])
    query, mask = match(classes, read_at(masks, points), labels, t, hidden[0] == 0, config)           # (L, M) each

    points = torch.rand(tried + K - uncertain, 2, generator=generator).to(masks.device)
    layer = torch.arange(len(classes), device=labels.device)[:, None]
    t, hidden = read_at(truth, points).split([len(labels), 1])
    x, t, known = read_at(masks[layer, query], points), t[mask], (hidden == 0).expand(*mask.shape, -1)                # (L, M, points) each
    doubtful = torch.where(known, -x.detach().abs(), -torch.inf)[..., :tried].topk(uncertain).indices
    kept = torch.cat([doubtful, torch.arange(tried, len(points), device=labels.device).expand(*mask.shape, -1)], -1)
    x, t, known = (values.gather(-1, kept) for values in (x, t, known))               # (L, M, K) each

    # As in Mask2Former's code a query without a mask learns null, and `ignore` does not excuse it: one that sees a class only there does too.
    target = torch.full(classes.shape[:-1], null, device=labels.device).index_put((layer, query), labels[mask])       # (L, Q)
    weight = torch.where(target == null, config.no_object_weight, 1.0) * (len(labels) > 0)            # a picture without a label has no loss
    ce = F.cross_entropy(classes.transpose(1, 2), target, reduction="none")
    return ce, weight, mask_cross_entropy(x, t, known), mask_dice(x, t, known)
