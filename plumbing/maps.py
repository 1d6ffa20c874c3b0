"""Localisation maps on disk, ours and others'."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing import files, foreign



def heat(image, cam):
    """A PIL picture in grey under a map (h, w) in [0, 1]: dark violet, red, orange, light yellow."""
    value = np.asarray(Image.fromarray(np.float32(cam)).resize(image.size, Image.BILINEAR)).clip(0, 1)
    anchors = np.array([[20, 11, 53], [101, 21, 110], [186, 54, 85], [249, 140, 10], [252, 255, 164]])
    colour = np.stack([np.interp(value, np.linspace(0, 1, 5), channel) for channel in anchors.T], -1)      # (H, W, 3)
    return Image.fromarray(np.uint8(0.3 * np.asarray(image.convert("L"))[..., None] + 0.7 * colour))


def present(labels):
    """Ascending indices of the present classes of one picture's multi-hot labels (C,)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels are multi-hot (C,), not {labels.tolist()}")
    return np.flatnonzero(labels)


def save_cam(path, cam):
    """Maps (P, h, w), one row per present class, ascending -> plain float16 .npy."""
    cam = np.asarray(cam, dtype=np.float16)
    if not np.isfinite(cam).all():
        raise ValueError(f"{path}: its maps are not finite: look at the picture, take --amp bf16 or off, or other weights")
    with files.atomic(path) as beside, open(beside, "wb") as file:
        np.save(file, cam, allow_pickle=False)


def load_cam(path, labels, size=None):
    """-> (indices of the classes present (P,), maps (P, h, w) float32). `labels` multi-hot (C,) says which rows these are.

    With `size` (H, W) of the picture, maps of other proportions are refused; they may be coarser. Maps in IRN's, PSA's, CLIP-ES's or
    FMA-WSSS's format are read too: a folder of them beside ours goes by its name, --cam."""
    path, classes = cam_path(path), present(labels)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make_cam.py first (README.md has the order)")
    try:
        keys, cam = read_maps(path)
    except Exception as error:                                             # numpy's header parser, zip and memory each raise their own
        raise ValueError(f"{path} is not a plain .npy array ({files.why(error)}): remove it and run make_cam.py again") from None
    if not isinstance(cam, np.ndarray) or cam.dtype.kind != "f" or cam.ndim != 3 or 0 in cam.shape[1:]:
        raise ValueError(f"{path} holds {getattr(cam, 'dtype', type(cam).__name__)} {np.shape(cam)}, maps are float (P, h, w): run make_cam.py again")
    if keys is not None and (sorted(keys) != classes.tolist() or len(cam) != len(keys)):
        raise ValueError(f"{path} holds {len(cam)} maps of the classes {sorted(keys)}, the picture's label has {classes.tolist()}: is it of another data set, or counted from 1?")
    if len(cam) != len(classes):
        raise ValueError(f"{path} has {len(cam)} maps, the picture's label has {len(classes)} classes: was it made with other labels? run make_cam.py again")
    with np.errstate(over="ignore"):                                       # 1e300 is infinity from here on
        cam = cam.astype(np.float32)                                       # first: numpy is slow in half precision
    if not np.isfinite(cam).all():
        raise ValueError(f"{path} holds NaN or infinity: remove it and run make_cam.py again")
    if keys is not None:
        if cam.size and (cam.min() < -1e-3 or cam.max() > 1.001):
            raise ValueError(f"{path} holds maps from {cam.min():.3g} to {cam.max():.3g}: scale them to [0, 1], each class by itself")
        cam = cam[np.argsort(keys)]
    h, w = cam.shape[1:]
    if size is not None and (h > size[0] or w > size[1] or abs(h * size[1] - w * size[0]) >= max(size)):      # both sides rounded alike, by less than a cell
        raise ValueError(f"{path}: maps of {w}x{h} do not fit their picture of {size[1]}x{size[0]}: run make_cam.py again")
    return classes, cam


def cam_path(path):
    """<id>.npy, or FMA-WSSS's <id>.npz where there is only that."""
    path = Path(path)
    return path if path.exists() or not path.with_suffix(".npz").exists() else path.with_suffix(".npz")


def read_maps(path):
    """-> (classes of the rows, maps (P, h, w)). Ours are a plain array, whose rows are the present classes: None.

    Others': IRN's and CLIP-ES's dict of `keys` and maps, PSA's (and WeakTr's, SemPLeS's) {class: map}, FMA-WSSS's .npz of `fg_cls` and `cam`."""
    if path.suffix == ".npz":
        with np.load(files.regular(path), allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.infolist()) > ROOM:
                raise ValueError("it unpacks to more than any maps")
            return classes_of(file["fg_cls"]), floats(file["cam"])
    table = foreign.read_pickled(path)
    if table is None:
        return None, files.read_npy(path)
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    if "keys" in table:
        return classes_of(table["keys"]), floats(next((table[name] for name in ("high_res", "attn_highres", "highres") if name in table), None))
    if len(table) > 254:
        raise ValueError(f"it holds {len(table):,} maps")
    keys, maps = [int(key) for key in table], [floats(value) for value in table.values()]
    if sum(value.nbytes for value in maps) > ROOM:                                        # before the stack: one map can be named many times
        raise ValueError("its maps are larger than any")
    return keys, np.stack(maps) if maps else np.zeros((0, 1, 1), np.float32)              # no class: no map that would say the size


ROOM = 1 << 29                                                             # bytes of one picture's maps


def classes_of(keys):
    keys = np.asarray(keys if isinstance(keys, np.ndarray) or isinstance(keys, list) and all(type(key) is int for key in keys) else None)
    if keys.dtype.kind not in "iuf" or keys.ndim != 1 or len(keys) > 254:
        raise ValueError("its classes are not a list of numbers")
    return keys.astype(int).tolist()


def floats(maps):
    if not isinstance(maps, np.ndarray) or maps.dtype.kind not in "biuf" or maps.nbytes > ROOM:
        raise ValueError("its maps are no array of numbers")
    with np.errstate(over="ignore"):
        return maps.astype(np.float32)


def resize_maps(cam, size):
    """(P, h, w) -> (P, H, W) bilinear torch tensor; P = 0 is ordinary."""
    cam = torch.as_tensor(cam)
    if cam.shape[0] == 0 or tuple(cam.shape[1:]) == tuple(size):
        return cam.new_zeros((0, *size)) if cam.shape[0] == 0 else cam
    return torch.nn.functional.interpolate(cam[None].float(), tuple(size), mode="bilinear", align_corners=False)[0]


def shrink_maps(maps, stride):
    """(P, H, W) -> (P, ceil(H / stride), ceil(W / stride)), the mean of each cell."""
    if stride == 1 or maps.shape[0] == 0:
        return maps[:, ::stride, ::stride]
    return torch.nn.functional.avg_pool2d(maps[None], stride, ceil_mode=True, count_include_pad=False)[0]


def add_background(cam, rule="constant", value=0.43):
    """(P, H, W) maps in [0, 1] -> (1 + P, H, W) with the background first: `constant` t, or `power` a: (1 - max)^a (CLIP-ES)."""
    if rule == "constant" or cam.shape[0] == 0:
        background = torch.full_like(cam.new_empty((1, *cam.shape[1:])), value if rule == "constant" else 1.0)
    else:
        background = (1 - cam.amax(dim=0, keepdim=True)).clamp(min=0) ** value
    return torch.cat([background, cam])
