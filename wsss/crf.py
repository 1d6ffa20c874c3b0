"""Dense CRF (Kraehenbuehl and Koltun 2011): pixels that are near or alike pull each other to one label.

Mean field over the N = H W pixels with two kernels, of the features f = (x, y) and f = (x, y, r, g, b), each
divided by its standard deviation:

    Q_0 = softmax(-unary),   Q_t+1 = softmax(-unary + sum_m compat_m K_m Q_t),
    K = D^-1/2 G D^-1/2,   G_ij = exp(-|f_i - f_j|^2 / 2),   D = diag(G 1)

G Q is approximated on the permutohedral lattice (Adams, Baek and Davis 2010), by the package pydensecrf or by
the same steps in torch, which need no compiler and run on a GPU. The two differ by rounding only.

    crf.dense_crf(image, prob, preset="weaktr")       # (H, W, 3) uint8, (C, H, W) -> posterior (C, H, W)
    crf.mean_field(crf.softmax_unary(prob), image, sxy_gaussian=3, compat_gaussian=3,
                   sxy_bilateral=60, srgb=8, compat_bilateral=5)
"""
import math
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

# sxy in pixels, srgb in grey levels. The unary is made of the scores, or of their argmax alone ("labels").
PRESETS = {
    "weaktr": dict(unary="labels", sxy_gaussian=4, compat_gaussian=3,
                   sxy_bilateral=83, srgb=5, compat_bilateral=3),
    "irn": dict(unary="labels", sxy_gaussian=3, compat_gaussian=3,
                sxy_bilateral=50, srgb=5, compat_bilateral=10),
    "deeplab": dict(unary="softmax", sxy_gaussian=1, compat_gaussian=3,
                    sxy_bilateral=67, srgb=3, compat_bilateral=4),
    "segmenter": dict(unary="softmax", sxy_gaussian=3, compat_gaussian=3,
                      sxy_bilateral=83, srgb=5, compat_bilateral=3),
    "psa": dict(unary="softmax", sxy_gaussian=3, compat_gaussian=3,
                sxy_bilateral=80, srgb=13, compat_bilateral=10),
}


@torch.no_grad()
def dense_crf(image, prob, preset="weaktr", iterations=10, backend="auto", device="cpu"):
    """(H, W, 3) uint8, scores (C, H, W) -> posterior (C, H, W), float32 numpy. The rest as in mean_field."""
    if preset not in PRESETS:
        raise ValueError(f"no CRF preset {preset!r}: there are {', '.join(PRESETS)}")
    prob = torch.as_tensor(prob)
    if prob.ndim != 3 or not prob.numel():
        raise ValueError(f"the CRF takes scores (C, H, W), not {tuple(prob.shape)}")
    if not prob.isfinite().all():
        raise ValueError(f"{(~prob.isfinite()).sum()} of the CRF's {prob.numel()} scores are not finite")
    parameters = dict(PRESETS[preset])
    if parameters.pop("unary") == "labels":
        unary = labels_unary(prob.argmax(0), len(prob))
    else:
        unary = softmax_unary(prob)
    return mean_field(unary, image, **parameters, iterations=iterations, backend=backend, device=device)


def labels_unary(labels, num_classes, gt_prob=0.7):
    """-log gt_prob for a pixel's label, -log((1 - gt_prob) / (C - 1)) for others.   (H, W) -> (C, H, W)"""
    labels = torch.as_tensor(labels)
    own = labels == torch.arange(num_classes, device=labels.device)[:, None, None]
    return torch.where(own, -math.log(gt_prob), -math.log((1 - gt_prob) / max(num_classes - 1, 1)))


def softmax_unary(prob):
    """-log of the scores. They need not add up to 1: a factor of all classes cancels.   (C, H, W) -> same"""
    return -torch.as_tensor(prob).float().clamp(min=1e-5).log()


@torch.no_grad()
def mean_field(unary, image, *, sxy_gaussian, compat_gaussian, sxy_bilateral, srgb, compat_bilateral,
               iterations=10, backend="auto", device="cpu"):
    """Energies (C, H, W), (H, W, 3) uint8 -> posterior (C, H, W), float32 numpy.

    backend: pydensecrf, torch (on `device`), or auto: pydensecrf where it is installed and `device` is
    the CPU, else torch.
    """
    image = np.array(image, order="C")                        # a copy: pydensecrf needs it writable
    if image.shape != (*unary.shape[1:], 3) or image.dtype != np.uint8:
        raise ValueError(f"the CRF takes scores (C, H, W) and an (H, W, 3) uint8 image, "
                         f"not {tuple(unary.shape)} and {image.shape} {image.dtype}")
    if min(sxy_gaussian, sxy_bilateral, srgb) <= 0:
        raise ValueError("the CRF's standard deviations must be above 0, "
                         f"not {sxy_gaussian}, {sxy_bilateral} (sxy) and {srgb} (srgb)")
    C, H, W = unary.shape
    unary = torch.as_tensor(unary, dtype=torch.float32, device=device).reshape(C, -1)  # (C, N)

    package = find_pydensecrf(backend, device)
    if package:
        model = package.DenseCRF2D(W, H, C)
        model.setUnaryEnergy(np.ascontiguousarray(unary.cpu().numpy()))
        model.addPairwiseGaussian(sxy=sxy_gaussian, compat=compat_gaussian)
        model.addPairwiseBilateral(sxy=sxy_bilateral, srgb=srgb, rgbim=image, compat=compat_bilateral)
        return np.array(model.inference(iterations)).reshape(C, H, W)

    rgb = torch.from_numpy(image).to(device).reshape(-1, 3).float()                   # (N, 3)
    # x before y, as in pydensecrf. The lattice is not symmetric in them: y first changes 1 % of the labels.
    xy = torch.cartesian_prod(torch.arange(H), torch.arange(W)).flip(1).to(rgb)       # (N, 2)
    gaussian = Kernel(xy / sxy_gaussian)
    bilateral = Kernel(torch.cat([xy / sxy_bilateral, rgb / srgb], 1))
    energy = unary.T.contiguous()                             # (N, C)
    q = softmax(-energy)
    for _ in range(iterations):
        q = softmax(compat_gaussian * gaussian(q) + compat_bilateral * bilateral(q) - energy)
    return q.T.reshape(C, H, W).cpu().numpy()


def softmax(x):
    """Over the classes of (N, C). Along short rows a CPU takes four times as long."""
    return x.T.softmax(0).T.contiguous()


def find_pydensecrf(backend, device):
    """The package, or None where torch does it."""
    if backend not in ("auto", "pydensecrf", "torch"):
        raise ValueError(f"no CRF backend {backend!r}: auto, pydensecrf or torch")
    if backend == "torch" or backend == "auto" and torch.device(device).type != "cpu":
        return None
    try:
        from pydensecrf import densecrf
        return densecrf
    except (ImportError, ValueError) as error:                # ValueError: built for another numpy
        if backend == "auto":
            return None
        raise ValueError(f"pydensecrf does not import ({error}): pip install pydensecrf2 (compiles C++), "
                         "or take the CRF's backend torch") from None


# ---------------------------------------------------------------- the kernel in torch

class Kernel:
    """K of the features f (N, d) as a function: (N, C) -> (N, C).

    Splat each pixel's values on the d + 1 lattice points around it, blur along the d + 1 directions of the
    lattice, slice: read the values back at each pixel. All three sum a few weighted rows into each row, which
    is what an embedding bag does: fast, and without atomic sums, so the same each time.
    """

    def __init__(self, f):
        d = f.shape[1]
        keys, weights, steps = lattice(f)                     # (N, d + 1) x2, (d + 1,)
        order = keys.flatten().argsort(stable=True)
        runs = keys.flatten()[order].unique_consecutive(return_inverse=True, return_counts=True)
        points, inverse, count = runs                         # the M lattice points that pixels hit
        pixels = order // (d + 1)                             # those of the first point, then the second, ...
        around = torch.empty_like(order).index_copy_(0, order, inverse).view_as(keys)  # a pixel's points
        # A bag: which rows to sum, where the sum of each result starts, the weights.
        splat = pixels, count.cumsum(0) - count, weights.flatten()[order]
        read = around, None, weights / (1 + 2 ** -d)          # the divisor is what the blur gains
        self.bags = [splat, *(blur(points, step) for step in steps), read]
        norm = (self(torch.ones_like(f[:, :1])) + 1e-20).rsqrt()  # (N, 1) D^-1/2: here self(q) is still G q
        splat[-1].mul_(norm[pixels, 0])
        read[-1].mul_(norm)

    def __call__(self, q):
        for rows, starts, weights in self.bags:
            q = F.embedding_bag(rows, q, starts, mode="sum", per_sample_weights=weights)
        return q


def blur(points, step):
    """Each lattice point plus half of its two neighbours; one without pixels is 0.   keys (M,) -> a bag"""
    wanted = torch.stack([points - step, points + step], 1)   # (M, 2)
    found = torch.searchsorted(points, wanted).clamp(max=len(points) - 1)
    itself = torch.arange(len(points), device=points.device)[:, None]
    weights = F.pad(0.5 * (points[found] == wanted), (1, 0), value=1.0)               # (M, 3)
    return torch.cat([itself, found], 1), None, weights


def lattice(f):
    """The simplex around each f (N, d): keys of its corners, f's barycentric weights, the keys' steps.

    -> (N, d + 1), (N, d + 1), (d + 1,)

    Lattice points are the integer points of sum 0 in R^(d+1) whose coordinates have one remainder modulo d +
    1; a simplex has one corner of each remainder. A key is linear in the first d coordinates (the last
    follows from them), so the move to a neighbour in one direction always changes it by the same step.
    """
    d = f.shape[1]
    # From R^d to the plane of sum 0, scaled: splat, blur and slice together have a standard deviation of 1.
    i = torch.arange(1, d + 1, device=f.device)[:, None]
    f = f.T * (math.sqrt(2 / 3) * (d + 1) / (i * (i + 1)).sqrt())
    x = F.pad(f.flip(0).cumsum(0).flip(0), (0, 0, 0, 1)) - F.pad(i * f, (0, 0, 1, 0))  # (d + 1, N)

    # The corner of remainder 0: round to multiples of d + 1. If their sum is not 0, round those that moved
    # most the other way.
    base = (x / (d + 1)).round()                              # in units of d + 1
    rank = torch.zeros_like(x, dtype=torch.int64)             # of x - corner, 0 the largest
    for a, b in combinations(range(d + 1), 2):
        less = x[a] - base[a] * (d + 1) < x[b] - base[b] * (d + 1)
        rank[a] += less
        rank[b] += ~less
    rank += base.sum(0).long()
    turn = (rank < 0).int() - (rank > d).int()
    base, rank = base + turn, rank + turn * (d + 1)
    y = torch.empty_like(x).scatter_(0, rank, (x - base * (d + 1)) / (d + 1))         # descending
    weights = torch.cat([1 + y[-1:] - y[:1], (y[:-1] - y[1:]).flip(0)])               # (d + 1, N)

    # Corner k is corner k - 1 plus 1 everywhere, less d + 1 in the coordinate of rank d + 1 - k: one step in
    # its direction. The extent leaves room for the corners and their neighbours.
    first = base[:d].long() * (d + 1)
    extent = (first.amax(1) - first.amin(1) + 4 * d + 1).tolist()
    if math.prod(extent) >= 2 ** 63:
        raise ValueError("the CRF's standard deviations are too small for this image: raise srgb or sxy")
    stride = torch.tensor([math.prod(extent[:k]) for k in range(d)] + [0], device=f.device)
    steps = stride.sum() - (d + 1) * stride
    by_rank = torch.empty_like(rank).scatter_(0, rank, steps[:, None].expand_as(rank))
    keys = torch.cat([(first * stride[:d, None]).sum(0, keepdim=True), by_rank[1:].flip(0)]).cumsum(0)
    return keys.T.contiguous(), weights.T.contiguous(), steps
