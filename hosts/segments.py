"""Segments of a picture without classes, a part or a whole each: packed in memory and on disk, and read in others' layouts.

    found = segments.label_segments(labels)                          # (H, W) whole numbers; segments.segment(mask, level=2) packs one mask
    with open("a.npz", "wb") as file:
        segments.save_segments(file, (H, W), found)
    found = segments.load_segments(segments.segments_of("dir", "a"), (H, W))      # dir/a.npz, a.png, a/*.png; a.pkl if an unpickler is given
    picture[found[0].where][found[0].mask]                           # the pixels (n, 3) of the first

A file is bounded by the size of its picture before it is read, and runs no code; what does not fit is refused in one line that names it.
"""
import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# Bytes of an array in .npz, at most, for each pixel of the picture: a few bytes can unpack to gigabytes. 512 are 4096 masks of the whole picture.
ROOM = {"bits": 512, "size": 64, "boxes": 64, "level": 64, "score": 64, "stability": 64}
MOST = 4096, 1 << 29                                                       # segments of one picture in others' layouts; bytes of an array, or of all masks, whatever the picture
WALKED = 1 << 33                                                           # pixels of all masks of one picture in others' layouts: a few bytes can name one mask many times


class Segment(NamedTuple):
    """One boolean mask of a picture, as bits inside its box: hundreds of a large picture fit, and work on one costs its box, not the picture."""
    box: tuple                          # top, left, bottom, right; the last two are outside
    bits: np.ndarray                    # np.packbits of the mask in the box, row by row
    level: int = 0                      # 0 part, 1, 2 whole (SAM); the higher is painted later
    score: float = float("nan")         # SAM's estimate of its IoU, and its stability
    stability: float = float("nan")

    @property
    def where(self):
        """Slices of the box: picture[segment.where][segment.mask] are the segment's pixels."""
        return slice(self.box[0], self.box[2]), slice(self.box[1], self.box[3])

    @property
    def mask(self):
        """(h, w) bool, the mask in its box."""
        h, w = self.box[2] - self.box[0], self.box[3] - self.box[1]
        return np.unpackbits(self.bits, count=h * w).reshape(h, w).view(bool)


def segment(mask, level=0, score=float("nan"), stability=float("nan"), corner=(0, 0)):
    """Boolean mask (h, w) whose first pixel is `corner` of the picture -> Segment in its tightest box; an empty mask is an error."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    box = (top + corner[0], left + corner[1], bottom + corner[0], right + corner[1])
    return Segment(box, np.packbits(mask[top:bottom, left:right]), int(level), float(score), float(stability))


def label_segments(labels):
    """Label map (H, W) of whole numbers -> a Segment for each number in it, 0 too."""
    return list(each_label(labels))


def each_label(labels):
    order = labels.ravel().argsort(kind="stable")                          # pixels of one label lie together: no (S, H, W) is made
    values = labels.ravel()[order]
    for pixels in np.split(order, np.flatnonzero(np.diff(values)) + 1):
        y, x = np.divmod(pixels, labels.shape[1])
        top, left, bottom, right = (int(n) for n in (y.min(), x.min(), y.max() + 1, x.max() + 1))
        mask = np.zeros((bottom - top, right - left), bool)
        mask[y - top, x - left] = True
        yield Segment((top, left, bottom, right), np.packbits(mask))


# ---------------------------------------------------------------- files

def save_segments(file, size, segments):
    """Segments of one picture of `size` (H, W) -> compressed .npz of plain arrays: size, boxes, bits, level, score, stability."""
    column = lambda name, dtype, shape=(-1,): np.array([getattr(s, name) for s in segments], dtype).reshape(shape)
    bits = np.concatenate([np.zeros(0, np.uint8), *(s.bits for s in segments)])
    np.savez_compressed(file, size=np.array(size, np.int32), boxes=column("box", np.int32, (-1, 4)), bits=bits, level=column("level", np.uint8),
                        score=column("score", np.float32), stability=column("stability", np.float32))


def segments_of(folder, id):
    """Where `folder` keeps the segments of one picture: <id>.npz (ours), .pkl (FMA-WSSS), .png (label map), <id>/ (binary masks); None: nowhere."""
    files = (Path(folder) / f"{id}{ending}" for ending in (".npz", ".pkl", ".png"))
    return next((path for path in files if path.is_file()), Path(folder) / id if (Path(folder) / id).is_dir() else None)


def load_segments(path, size, unpickler=None):
    """Segments of a picture of `size` (H, W), from what `segments_of` found -> list of Segment. `unpickler`: a class that reads .pkl and runs nothing in it."""
    path = Path(path)
    read = {".npz": read_packed, ".pkl": lambda path, size: read_fma(path, size, unpickler), ".png": read_label_map}[path.suffix] if path.is_file() else read_masks
    with refusing(path):
        found = collected(read(path, tuple(size)))
        if not all(0 <= s.level <= 2 for s in found):
            raise ValueError("a level is not 0, 1 or 2")
        return found


def collected(segments):
    """-> list of them, of no more bytes together than fit."""
    found, room = [], MOST[1]
    for each in segments:
        room -= each.bits.nbytes
        if room < 0:
            raise ValueError("its masks together are larger than any")
        found.append(each)
    return found


def load_levels(path):
    """Levels (S,) of what save_segments wrote, without its masks: to count them."""
    with refusing(path), np.load(path, allow_pickle=False) as file:
        if file.zip.getinfo("level.npy").file_size > MOST[1]:
            raise ValueError("its level is larger than any")
        return file["level"]


@contextlib.contextmanager
def refusing(path):
    try:
        yield
    except Exception as error:                                             # zip, numpy, pickle and PIL each raise what a foreign file's bytes provoke
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise ValueError(f"{path} holds no segments of its picture ({reason}): make them again, or give another --segments") from None


def read_packed(path, size):
    """What save_segments wrote."""
    with np.load(path, allow_pickle=False) as file:
        large = [name for name, room in ROOM.items() if file.zip.getinfo(f"{name}.npy").file_size > min(room * size[0] * size[1] + 1024, MOST[1])]
        if large:
            raise ValueError(f"its {large[0]} are larger than any segments of a picture of {size[1]}x{size[0]}")
        of, boxes, bits, level, score, stability = (file[name] for name in ("size", "boxes", "bits", "level", "score", "stability"))
    kinds = [(boxes, "i", (len(boxes), 4)), (bits, "u", (bits.size,)), (level, "u", (len(boxes),)), (score, "f", (len(boxes),)), (stability, "f", (len(boxes),))]
    if any(array.dtype.kind != kind or array.shape != shape for array, kind, shape in kinds) or bits.dtype != np.uint8:
        raise ValueError("its arrays are not those that make_segments.py writes")
    same_size(of.tolist() if of.shape == (2,) else of.shape, size)
    corners, ends = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    lengths = -(-(ends - corners).prod(1) // 8)
    if (corners < 0).any() or (corners >= ends).any() or (ends > size).any() or lengths.sum() != len(bits):
        raise ValueError("its boxes do not fit its masks")
    parts = np.split(bits, lengths.cumsum()[:-1]) if len(boxes) else []
    found = [Segment(tuple(box), *rest) for box, *rest in zip(boxes.tolist(), parts, level.tolist(), score.tolist(), stability.tolist())]
    if not all(s.mask.any() for s in found):
        raise ValueError("a mask is empty")
    return found


def read_fma(path, size, unpickler):
    """FMA-WSSS's <id>.pkl, or a list as SAM's own generator gives it: dicts with `segmentation`, an array (H, W) or run lengths down the columns, and `level`."""
    if unpickler is None:
        raise ValueError("a pickle can run code, and no unpickler was given")
    with open(path, "rb") as file:
        table = unpickler(file).load()
    if not isinstance(table, list) or len(table) > MOST[0]:
        raise ValueError(f"it holds no list of at most {MOST[0]:,} segments but {type(table).__name__}")
    walkable(len(table), size)
    for each in table:
        mask = each["segmentation"]
        if isinstance(mask, dict):                                         # first the number of pixels outside, then inside, ...
            same_size(mask["size"], size)
            if isinstance(mask["counts"], (str, bytes)):
                raise ValueError("its run lengths are compressed, SAM's coco_rle: only uncompressed_rle and binary_mask are read")
            if len(mask["counts"]) > size[0] * size[1] + 1 or sum(mask["counts"]) != size[0] * size[1] or min(mask["counts"]) < 0:
                raise ValueError("its run lengths do not fill the picture")
            mask = np.repeat(np.arange(len(mask["counts"])) % 2 == 1, mask["counts"]).reshape(size[::-1]).T
        if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biuf":
            raise ValueError("a mask in it is no array of numbers")
        yield from checked(mask, size, each.get("level", 0), each.get("predicted_iou", np.nan), each.get("stability_score", np.nan))


def read_label_map(path, size):
    """A PNG of segment numbers, of 8 or 16 bits. Every number is a segment, 0 too."""
    numbers = read_numbers(path, size)
    if len(np.unique(numbers)) > MOST[0]:
        raise ValueError(f"it numbers more than {MOST[0]:,} segments")
    return each_label(numbers)


def read_masks(path, size):
    """A folder of black and white PNGs, a segment each, as SAM's amg.py writes it; its metadata.csv is not needed."""
    files = sorted(path.glob("[!.]*.png"))
    if len(files) > MOST[0]:
        raise ValueError(f"more than {MOST[0]:,} of them")
    walkable(len(files), size)
    for file in files:
        values = read_numbers(file, size)
        if ((values != 0) & (values != values.max())).any():
            raise ValueError(f"{file.name} is not black and white")
        yield from checked(values != 0, size)


def walkable(count, size):
    if count * size[0] * size[1] > WALKED:
        raise ValueError(f"{count:,} masks of {size[1]}x{size[0]} are more than {WALKED:,} pixels together")


def read_numbers(path, size):
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")                        # a pipe would be read forever
    with Image.open(path, formats=["PNG"]) as image:
        same_size(image.size[::-1], size)                                  # before it is decoded
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path.name} has mode {image.mode}, not a number a pixel")
        return np.array(image)


def checked(mask, size, *facts):
    """[Segment] of a whole picture's mask, [] if it is empty."""
    same_size(np.shape(mask), size)
    mask = np.asarray(mask, bool)
    return [segment(mask, *facts)] if mask.any() else []


def same_size(found, size):
    if len(found) > 3 or not all(isinstance(n, (int, np.integer)) for n in found):
        raise ValueError("its size is no pair of numbers")
    if tuple(found) != tuple(size):
        raise ValueError(f"of {found[1]}x{found[0]} pixels, its picture has {size[1]}x{size[0]}" if len(found) == 2 else f"of shape {tuple(found)}"[:60])
