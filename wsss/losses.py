"""Every equation of the papers as a pure function of tensors: torch only, no flags, no device, no state.

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
