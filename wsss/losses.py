"""Every equation of the two papers as a pure function of tensors. It needs torch and nothing else.

Letters are the papers': v_f and v_b are CLIP's features of an image's foreground and background, u_f of the
class text, u_b of the learned background prompt. SemPLeS's losses are returned per pair (image, present
class), shape (P,): the caller takes the mean, over all processes if there are several.

The arithmetic is at least float32 whatever comes in: in half precision 1 - 1e-4 rounds to 1, and log(1 - sim)
would be infinite.
"""
import torch
import torch.nn.functional as F


def at_least_float32(x):
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- SemPLeS

def resize_map(maps, size):
    """SemPLeS 3.2.1: raw maps of S, bilinear, to CLIP's input size (H, W).   (P, h, w) -> (P, H, W)"""
    # From the authors' code, not in the paper: corner to corner. Maps for inference are resized without.
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def mask_from_map(cam, eps):
    """SemPLeS 3.2.1, M = S(X): min-max per map, m = (c - min) / (max - min + eps).   (..., H, W) -> same

    The paper gives no formula. eps keeps the mask of a weak map weak: if max - min = eps, m is at most 1/2.
    """
    cam = at_least_float32(cam)
    low = cam.amin(dim=(-2, -1), keepdim=True)
    high = cam.amax(dim=(-2, -1), keepdim=True)
    return (cam - low) / (high - low + eps)


def split_regions(images, masks):
    """SemPLeS 3.2.1: X_f = M X,  X_b = (1 - M) X.   (P, 3, H, W), (P, H, W) -> two of (P, 3, H, W)

    A removed pixel becomes 0: black for images in [0, 1], the mean colour for normalised ones.
    """
    images, masks = at_least_float32(images), at_least_float32(masks)
    masks = masks.unsqueeze(1)                                # (P, 1, H, W)
    return masks * images, (1 - masks) * images


def similarity(a, b, eps=1e-4):
    """SemPLeS 4.2, sim: the cosine clamped to [eps, 1 - eps]; no gradient outside.   (P, D) x2 -> (P,)"""
    # Differs from the paper: it clamps at the lower end only; 1 - sim needs both, as in the authors' code.
    a, b = at_least_float32(a), at_least_float32(b)
    return F.cosine_similarity(a, b, dim=-1).clamp(eps, 1 - eps)


def match_loss(v_f, v_b, u_f, lambda_b):
    """SemPLeS Eq. 1, L_match = -log sim(v_f, u_f) - lambda_b log(1 - sim(v_b, u_f)).   (P, D) x3 -> (P,)"""
    return -similarity(v_f, u_f).log() - lambda_b * (1 - similarity(v_b, u_f)).log()


def prompt_loss(u_b, v_b, u_f, lambda_t, repel="one_minus", lambda_i=1.0):
    """SemPLeS Eq. 2, L_prompt = -log sim(u_b, v_b) - lambda_T log(1 - sim(u_b, u_f)).   (P, D) x3 -> (P,)

    repel="log" is the form of arXiv v2: the second term is + lambda_T log sim(u_b, u_f).
    lambda_i weighs the first term: lambda_i = 0 is the row of Table 5 with the text term alone.
    """
    sim_text = similarity(u_b, u_f)
    if repel == "one_minus":
        away = -(1 - sim_text).log()
    elif repel == "log":
        # From the authors' code and arXiv v2, not in the WACV paper.
        away = sim_text.log()
    else:
        raise ValueError(f"repel is 'one_minus' or 'log', not {repel!r}")
    return -lambda_i * similarity(u_b, v_b).log() + lambda_t * away


def refine_loss(v_f, u_b):
    """SemPLeS Eq. 3, L_refine = -log(1 - sim(v_f, u_b)).   (P, D) x2 -> (P,)

    The loop adds it up: L_total = L_match + lambda L_refine.
    """
    return -(1 - similarity(v_f, u_b)).log()


# ---------------------------------------------------------------- the generators that SemPLeS starts from

def cls_loss(logits, labels):
    """WeakTr / CLIMS, classification, s the sigmoid:   (B, C) x2 -> (B,)

        -1/C sum_k [y_k log s(z_k) + (1 - y_k) log s(-z_k)]
    """
    logits, labels = at_least_float32(logits), at_least_float32(labels)
    return F.multilabel_soft_margin_loss(logits, labels, reduction="none")


def suppression_loss(v_f, u_manual, tau):
    """CLIMS, CBS: -sum_t log(1 - cos(v_f, u_t)) over the texts t with cos > tau.   (P, D), (T, D) -> (P,)

    CLIMS adds these up over the pairs of a batch, where every other term is a mean.
    """
    s = similarity(v_f.unsqueeze(1), u_manual)                # (P, T)
    return torch.where(s > tau, -(1 - s).log(), 0).sum(1)


def area_loss(maps):
    """CLIMS, REG: the mean of an image's maps, of present and absent classes alike.   (B, C, h, w) -> (B,)"""
    return at_least_float32(maps).mean(dim=(1, 2, 3))


# ---------------------------------------------------------------- VPL, vision prototypes
# n pixels; M columns: the C classes, then the backgrounds.

def assignment(x, prototypes, tau, allowed=None):
    """VPL Eq. 5, P'_n = exp(x . z_n / tau_T) / sum_j exp(x . z_j / tau_T).   (n, D), (M, D) -> (n, M)

    With W for Z and tau_I for tau_T it is P. `allowed` (n, M) bool: the columns that take part in a pixel's
    softmax; the others get 0.
    """
    x, prototypes = at_least_float32(x), at_least_float32(prototypes)
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ prototypes.T / tau
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(1)


def harden(p, alpha):
    """InMaP: rows of P' whose maximum exceeds alpha become one-hot.   (n, M) -> same"""
    # Differs from the paper: it speaks of "0-1 seed masks" above Phi; Phi may be this alpha.
    best, column = p.max(1, keepdim=True)
    return torch.where(best > alpha, torch.zeros_like(p).scatter_(1, column, 1), p)


def prototype_loss(x, w, p_text, tau_i):
    """VPL Eq. 7 as the paper computes it, -sum_n P'_n log P_n.   (n, D), (M, D), (n, M) -> mean over pixels

    KL(P' || P) differs by the entropy of P', which W does not change. With one-hot rows for P' it is Eq. 3.
    vpl.py takes value and gradient from prototype_gradient.
    """
    # Differs from the paper: a mean, not a sum, so that lr 10 means the same for any number of pixels.
    x, w, p_text = at_least_float32(x), at_least_float32(w), at_least_float32(p_text)
    with torch.autocast(x.device.type, enabled=False):
        return -(p_text * (x @ w.T / tau_i).log_softmax(1)).sum(1).mean()


@torch.no_grad()
def prototype_gradient(x, w, p_text, tau_i, chunk=8192):
    """The gradient of VPL Eq. 7 at W, (P - P')^T x / tau_I.   (n, D), (M, D), (n, M) -> (M, D), loss

    Both are sums over the n pixels, not means, in float64: the sums of several processes add up. Pixels are
    taken `chunk` at a time, so only `chunk` rows of P are in memory.
    """
    # Differs from the paper: its Eq. 10 bounds ||W'* - W*||^2 and calls that the gradient.
    gradient = torch.zeros_like(w, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    with torch.autocast(x.device.type, enabled=False):
        for part, target in zip(x.split(chunk), p_text.split(chunk)):
            part = at_least_float32(part)
            target = target.to(part.dtype)
            log_p = (part @ w.to(part.dtype).T / tau_i).log_softmax(1)                # (chunk, M)
            gradient += (log_p.exp() - target).T @ part / tau_i
            loss -= (target * log_p).sum()
    return gradient, loss


def prototype_step(w, gradient, lr, last_norm):
    """VPL Eq. 11: W <- W - lr gradient, then every row back to unit length.   -> W, lr, norm of this gradient

    `last_norm`: that of the previous gradient, infinity at the first step. lr halves whenever the norm grows.
    The norm includes the radial part, which the projection removes: it can keep growing, lr shrink to 0.
    """
    # Not in the paper, which says "standard projected gradient descent" and no more: the halving. It is
    # InMaP's (Qian et al. 2023), which starts at 10 too.
    norm = gradient.norm()
    grew = (norm > last_norm).to(norm)                        # 0 or 1, on the device: nothing waits
    lr = lr / (1 + grew)
    return F.normalize(w - lr * gradient, dim=1), lr, norm


@torch.no_grad()
def learn_prototypes(x, z, p_text, tau_i=0.03, lr=10.0, steps=3000, chunk=8192):
    """VPL Eq. 9-11, W'* = argmin_W L(P', W) over unit rows, from W = Z.   (n, D), (M, D), (n, M) -> (M, D)

    Every step sees all pixels. W is kept in float64, but with float32 features the chunk size can still
    matter: halving lr is a branch, and rounding can decide it.
    """
    w, norm = z.double(), torch.inf
    for _ in range(steps):
        gradient, _ = prototype_gradient(x, w, p_text, tau_i, chunk)
        w, lr, norm = prototype_step(w, gradient / len(x), lr, norm)
    return w.to(z.dtype)


# ---------------------------------------------------------------- VPL, regional semantic contrast

def region_embeddings(v, a):
    """VPL Eq. 12, P_{i,n} = sum_hw A_{i,n} V_i / sum_hw A_{i,n}.   (B, D, h, w), (B, C, h, w) -> (B, C, D)

    A must not be negative; a region without any weight is 0.
    """
    v, a = at_least_float32(v), at_least_float32(a)
    weight = a.sum((2, 3)).unsqueeze(2)                       # (B, C, 1)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum("bchw,bdhw->bcd", a, v) / torch.where(weight > 0, weight, 1)


def region_contrast(regions, w, labels, tau):
    """VPL Eq. 13, L_RSC, with S_{i,n} = cos(P_{i,n}, W_n).   (B, C, D), (C, D), (B, C) -> scalar

        - 1/2B sum_i log( exp(S_{i,i} / tau) / sum_j exp(S_{i,j} / tau) )
        - 1/2B sum_i log( exp(S_{i,i} / tau) / sum_j exp(S_{j,i} / tau) )

    Here the sums run over the P pairs (image, present class) and are divided by 2P. A pair's negatives: in
    the row, classes of the batch that the image does not hold; in the column, the images without the class.
    """
    # Differs from the paper: it numbers images and classes alike, as if image i held class i and no other.
    # Both forms are equal where each image has one class that no other image of the batch has.
    regions, w = at_least_float32(regions), at_least_float32(w)
    labels = labels.bool()
    b, k = labels.nonzero(as_tuple=True)                      # (P,)
    s = F.cosine_similarity(regions, w, dim=-1) / tau         # (B, C)
    # Masked: in a row, the image's other classes and those absent from the batch; in a column, images of k.
    row_out = (labels | ~labels.any(0))[b] & ~F.one_hot(k, s.shape[1]).bool()         # (P, C)
    column_out = labels.T[k] & ~F.one_hot(b, s.shape[0]).bool()                       # (P, B)
    row = F.cross_entropy(s[b].masked_fill(row_out, -torch.inf), k, reduction="sum")
    column = F.cross_entropy(s.T[k].masked_fill(column_out, -torch.inf), b, reduction="sum")
    return (row + column) / (2 * max(len(b), 1))


# ---------------------------------------------------------------- WeakTr, segmentation

def clamp_losses(ce, known, start=1.2, tile=120, total=lambda sums: sums):
    """WeakTr, gradient clipping: once mean < start, ce <- min(ce, max(tile mean, mean)).   (B, H, W) -> same

    `mean` is over all labelled pixels, `tile mean` over those of a tile x tile square, in all images of the
    batch. A clamped pixel has no gradient: its label is probably wrong. `known` (B, H, W) bool: the pixels
    that have a label. `total` adds up the sums of several processes.
    """
    # Differs from WeakTr's code, which counts pixels without a label in the means, with a loss of 0.
    ce = at_least_float32(ce)
    H, W = ce.shape[1:]
    sums = torch.stack([torch.where(known, ce.detach(), 0).sum(0), known.sum(0)])     # (2, H, W)
    sums = F.pad(sums, (0, -W % tile, 0, -H % tile))          # to whole tiles
    sums = sums.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))                     # (2, h, tile, w, tile)
    loss, count = total(sums.sum((2, 4)))                     # (h, w) each, a value a tile
    mean = loss.sum() / count.sum().clamp(min=1)
    limit = torch.maximum(loss / count.clamp(min=1), mean)
    limit = limit.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:H, :W]
    return torch.where((ce > limit) & (mean < start), limit, ce)
