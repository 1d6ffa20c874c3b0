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
