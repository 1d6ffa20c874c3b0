"""Localisation maps on disk, ours and other projects'; resizing, background scores, heat maps."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from plumbing import files
from plumbing.foreign import read_pickled


def present(labels):
    """Ascending indices of the present classes of one image's multi-hot labels (C,)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels are multi-hot (C,), not {labels.tolist()}")
    return np.flatnonzero(labels)


# ---------------------------------------------------------------- files

def save_cam(path, cam):
    """Maps (P, h, w), one row per present class, ascending -> plain float16 .npy."""
    cam = np.asarray(cam, dtype=np.float16)
    if not np.isfinite(cam).all():
        raise ValueError(f"{path}: its maps are not finite: look at the image, "
                         "take --amp bf16 or off, or other weights")
    with files.atomic(path) as beside, open(beside, "wb") as file:
        np.save(file, cam, allow_pickle=False)


def load_cam(path, labels, size=None):
    """-> (indices of the present classes (P,), maps (P, h, w) float32). `labels` is multi-hot (C,).

    With `size` (H, W) of the image, maps of other proportions are refused; they may be coarser. Maps in the
    format of IRN, PSA, CLIP-ES or FMA-WSSS are read too: --cam names a folder of them beside ours."""
    path = cam_path(path)
    classes = present(labels)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make_cam.py first (README.md has the order)")
    try:
        keys, cam = read_maps(path)
    except Exception as error:                               # numpy, zip, pickle raise errors of many types
        raise ValueError(f"{path} is not a plain .npy array ({files.first_line(error)}): "
                         "remove it and run make_cam.py again") from None
    if cam.dtype.kind != "f" or cam.ndim != 3 or 0 in cam.shape[1:]:
        raise ValueError(f"{path} holds {cam.dtype} {cam.shape}, maps are float (P, h, w): "
                         "run make_cam.py again")
    if keys is not None and sorted(keys) != classes.tolist():
        raise ValueError(f"{path} holds maps of the classes {sorted(keys)}, the image's label has "
                         f"{classes.tolist()}: is it of another data set, or counted from 1?")
    if len(cam) != len(classes):
        raise ValueError(f"{path} has {len(cam)} maps, the image's label has {len(classes)} classes: "
                         "was it made with other labels? run make_cam.py again")
    cam = cam.astype(np.float32)                             # first of all: numpy is slow in half precision
    if not np.isfinite(cam).all():
        raise ValueError(f"{path} holds NaN or infinity: remove it and run make_cam.py again")
    if keys is not None:
        if cam.size and (cam.min() < -1e-3 or cam.max() > 1.001):
            raise ValueError(f"{path} holds maps from {cam.min():.3g} to {cam.max():.3g}: "
                             "scale them to [0, 1], each class by itself")
        cam = cam[np.argsort(keys)]
    h, w = cam.shape[1:]
    # Both sides were rounded alike, by less than a cell.
    if size is not None and (h > size[0] or w > size[1] or abs(h * size[1] - w * size[0]) >= max(size)):
        raise ValueError(f"{path}: maps of {w}x{h} do not fit their image of {size[1]}x{size[0]}: "
                         "run make_cam.py again")
    return classes, cam


def cam_path(path):
    """<id>.npy, or FMA-WSSS's <id>.npz where there is only that."""
    path = Path(path)
    return path if path.exists() or not path.with_suffix(".npz").exists() else path.with_suffix(".npz")


def read_maps(path):
    """-> (classes of the rows or None, maps (P, h, w)). None: ours, whose rows are the present classes.

    IRN, CLIP-ES: a pickled dict of `keys` and maps. PSA, WeakTr, SemPLeS: {class: map}. FMA-WSSS: an .npz."""
    if path.suffix == ".npz":
        with np.load(files.regular(path), allow_pickle=False) as file:
            return classes_of(file["fg_cls"]), floats(file["cam"])
    table = read_pickled(path)
    if table is None:
        return None, files.read_npy(path)
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    if "keys" in table:
        name = next((name for name in ("high_res", "attn_highres", "highres") if name in table), None)
        return classes_of(table["keys"]), floats(table.get(name))
    if not table:
        return [], np.zeros((0, 1, 1), np.float32)           # no class, so no map says the size
    return [int(key) for key in table], np.stack([floats(cam) for cam in table.values()])


def classes_of(keys):
    """Classes of the rows as a list of int; IRN's are floats where there is none."""
    keys = np.asarray(keys)
    if keys.dtype.kind not in "iuf" or keys.ndim != 1:
        raise ValueError("its classes are not a list of numbers")
    return keys.astype(int).tolist()


def floats(cam):
    if not isinstance(cam, np.ndarray) or cam.dtype.kind not in "biuf":
        raise ValueError("its maps are not an array of numbers")
    return cam.astype(np.float32)


# ---------------------------------------------------------------- work on maps

def resize_maps(cam, size):
    """(P, h, w) -> (P, H, W) bilinear torch tensor; P = 0 is ordinary."""
    cam = torch.as_tensor(cam)
    if cam.shape[0] == 0:
        return cam.new_zeros((0, *size))
    if tuple(cam.shape[1:]) == tuple(size):
        return cam
    return F.interpolate(cam[None].float(), tuple(size), mode="bilinear", align_corners=False)[0]


def shrink_maps(maps, stride):
    """(P, H, W) -> (P, ceil(H / stride), ceil(W / stride)), the mean of each cell."""
    if stride == 1 or maps.shape[0] == 0:
        return maps[:, ::stride, ::stride]
    return F.avg_pool2d(maps[None], stride, ceil_mode=True, count_include_pad=False)[0]


def add_background(cam, rule="constant", value=0.43):
    """(P, H, W) maps in [0, 1] -> (1 + P, H, W), the background first.

    `constant`: its score is t everywhere. `power`: (1 - max)^a (CLIP-ES)."""
    if rule == "constant":
        background = cam.new_full((1, *cam.shape[1:]), value)
    elif cam.shape[0] == 0:
        background = cam.new_ones((1, *cam.shape[1:]))
    else:
        background = (1 - cam.amax(dim=0, keepdim=True)).clamp(min=0) ** value
    return torch.cat([background, cam])


def heat(image, cam):
    """A PIL image in grey under a map (h, w) in [0, 1]: dark violet, red, orange, light yellow."""
    value = np.asarray(Image.fromarray(np.float32(cam)).resize(image.size, Image.BILINEAR)).clip(0, 1)
    anchors = np.array([[20, 11, 53], [101, 21, 110], [186, 54, 85], [249, 140, 10], [252, 255, 164]])
    colour = np.stack([np.interp(value, np.linspace(0, 1, 5), channel) for channel in anchors.T], -1)
    grey = np.asarray(image.convert("L"))[..., None]
    return Image.fromarray(np.uint8(0.3 * grey + 0.7 * colour))                 # (H, W, 3)
