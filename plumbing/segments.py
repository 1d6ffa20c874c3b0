"""Segments of an image without classes: packed in memory and on disk, and read in other projects' layouts.

    found = segments.label_segments(labels)               # of a label map (H, W); segment(mask): of one mask
    with open("dir/a.npz", "wb") as file:
        segments.save_segments(file, (H, W), found)
    path = segments.segments_path("dir", "a")             # dir/a.npz, dir/a.pkl, dir/a.png or dir/a/*.png
    found = segments.load_segments(path, (H, W))
    image[found[0].where][found[0].mask]                  # the pixels (n, 3) of the first
"""
import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from plumbing import files, foreign


class Segment(NamedTuple):
    """One boolean mask of an image, as bits inside its box: hundreds of a large image fit in memory."""
    box: tuple                          # top, left, bottom, right; the last two are outside
    bits: np.ndarray                    # np.packbits of the mask in the box, row by row
    level: int = 0                      # 0 part, 1, 2 whole (SAM); higher levels are painted later
    score: float = float("nan")         # SAM's estimate of its IoU, and its stability
    stability: float = float("nan")

    @property
    def where(self):
        """Slices of the box: image[segment.where][segment.mask] are the segment's pixels."""
        return slice(self.box[0], self.box[2]), slice(self.box[1], self.box[3])

    @property
    def mask(self):
        """(h, w) bool, the mask in its box."""
        h, w = self.box[2] - self.box[0], self.box[3] - self.box[1]
        return np.unpackbits(self.bits, count=h * w).reshape(h, w).view(bool)


def segment(mask, level=0, score=float("nan"), stability=float("nan"), corner=(0, 0)):
    """Boolean mask (h, w), not empty, that begins at `corner` of the image -> Segment in its tightest box."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    box = (top + corner[0], left + corner[1], bottom + corner[0], right + corner[1])
    return Segment(box, np.packbits(mask[top:bottom, left:right]), int(level), float(score), float(stability))


def label_segments(labels):
    """Label map (H, W) of whole numbers -> a Segment for each number in it, 0 too."""
    order = labels.ravel().argsort(kind="stable")             # pixels of one label lie together: no (S, H, W)
    values = labels.ravel()[order]
    found = []
    for pixels in np.split(order, np.flatnonzero(np.diff(values)) + 1):
        y, x = np.divmod(pixels, labels.shape[1])
        mask = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1), bool)
        mask[y - y.min(), x - x.min()] = True
        found.append(segment(mask, corner=(int(y.min()), int(x.min()))))
    return found


# ---------------------------------------------------------------- files

def save_segments(file, size, segments):
    """Segments of an image of `size` (H, W) -> compressed .npz of plain arrays."""
    def column(name, dtype):
        return np.array([getattr(s, name) for s in segments], dtype)

    bits = np.concatenate([np.zeros(0, np.uint8), *(s.bits for s in segments)])
    boxes = column("box", np.int32).reshape(-1, 4)
    np.savez_compressed(file, size=np.array(size, np.int32), boxes=boxes, bits=bits,
                        level=column("level", np.uint8), score=column("score", np.float32),
                        stability=column("stability", np.float32))


def segments_path(folder, id):
    """<id>.npz (ours), <id>.pkl (FMA-WSSS), <id>.png (label map) or <id>/ (binary masks); None: nowhere."""
    paths = [Path(folder) / f"{id}{ending}" for ending in (".npz", ".pkl", ".png", "")]
    return next((path for path in paths if path.exists()), None)


def load_segments(path, size):
    """-> list of Segment of an image of `size` (H, W), from what `segments_path` found."""
    read = {".npz": read_packed, ".pkl": read_fma, ".png": read_label_map}
    with refusing(path):
        found = (read_masks if path.is_dir() else read[path.suffix])(path, tuple(size))
        if not all(0 <= s.level <= 2 for s in found):
            raise ValueError("a level is not 0, 1 or 2")
        return found


def load_levels(path):
    """Levels (S,) of what save_segments wrote, without its masks: to count them."""
    with refusing(path), np.load(path, allow_pickle=False) as file:
        return file["level"]


@contextlib.contextmanager
def refusing(path):
    try:
        yield
    except Exception as error:                               # zip, numpy, pickle and PIL each raise their own
        raise ValueError(f"{path} holds no segments of its image ({files.first_line(error)}): "
                         "make them again, or give another --segments") from None


def read_packed(path, size):
    """What save_segments wrote."""
    with np.load(path, allow_pickle=False) as file:
        check_size(file["size"], size)
        boxes, bits = file["boxes"], file["bits"]
        facts = [file[name].tolist() for name in ("level", "score", "stability")]
    corners, ends = boxes[:, :2], boxes[:, 2:]
    lengths = -(-(ends - corners).prod(1, dtype=np.int64) // 8)
    if (corners < 0).any() or (corners >= ends).any() or (ends > size).any() or lengths.sum() != len(bits):
        raise ValueError("its boxes do not fit its masks")
    parts = np.split(bits, lengths.cumsum()[:-1]) if len(boxes) else []
    return [Segment(tuple(box), *rest) for box, *rest in zip(boxes.tolist(), parts, *facts, strict=True)]


def read_fma(path, size):
    """FMA-WSSS's .pkl, or a list as SAM's own generator gives it: dicts of `segmentation`, perhaps `level`.

    A segmentation is a mask (H, W) or a dict of run lengths down the columns, the first of pixels outside."""
    with open(files.regular(path), "rb") as file:
        table = foreign.load(file)
    if not isinstance(table, list):
        raise ValueError(f"it holds no list but {type(table).__name__}")
    found = []
    for each in table:
        mask = each["segmentation"]
        if isinstance(mask, dict):
            check_size(mask["size"], size)
            counts = mask["counts"]
            if isinstance(counts, (str, bytes)):
                raise ValueError("its run lengths are compressed, SAM's coco_rle: "
                                 "only uncompressed_rle and binary_mask are read")
            if sum(counts) != size[0] * size[1]:
                raise ValueError("its run lengths do not fill the image")
            mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
        facts = each.get("level", 0), each.get("predicted_iou", np.nan), each.get("stability_score", np.nan)
        found += whole_mask(mask, size, *facts)
    return found


def read_label_map(path, size):
    """A PNG of segment numbers, of 8 or 16 bits. Every number is a segment, 0 too."""
    return label_segments(read_numbers(path, size))


def read_masks(path, size):
    """A folder of black and white PNGs, a segment each, as SAM's amg.py writes it."""
    found = []
    for file in sorted(path.glob("[!.]*.png")):
        values = read_numbers(file, size)
        if ((values != 0) & (values != values.max())).any():
            raise ValueError(f"{file.name} is not black and white")
        found += whole_mask(values, size)
    return found


def read_numbers(path, size):
    with Image.open(files.regular(path), formats=["PNG"]) as image:
        check_size(image.size[::-1], size)
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path.name} has mode {image.mode}, not a number a pixel")
        return np.array(image)


def whole_mask(mask, size, *facts):
    """[Segment] of a whole image's mask, [] if it is empty."""
    check_size(np.shape(mask), size)
    mask = np.asarray(mask, bool)
    return [segment(mask, *facts)] if mask.any() else []


def check_size(found, size):
    if tuple(found) != tuple(size):
        raise ValueError(f"of {'x'.join(map(str, found[::-1]))} pixels, its image has {size[1]}x{size[0]}")
