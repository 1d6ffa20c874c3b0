"""Label maps as palette PNG: 0 background, 1..C, 255 ignored."""
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing import files
from plumbing.images import opened

IGNORE = 255


def palette():
    """The 256 colours of VOC, (256, 3) uint8: bits of the index spread over the channels, highest first."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def load_mask(path, num_classes=None):
    """Label map (H, W) uint8 from a PNG: palette, grey, or RGB in exact palette colours.

    With `num_classes`, values other than 0..C and 255 are refused."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that makes it")
    with opened(path, "mask", ("PNG",)) as image:
        values = np.array(image)
        mode = image.mode
    if mode in ("RGB", "RGBA"):
        values = indices_of(values[..., :3], path)
    elif mode not in ("P", "L", "I", "I;16", "1"):
        raise ValueError(f"{path} has mode {mode}: a mask is a palette or grey PNG of class indices")
    if values.max() > 255:
        raise ValueError(f"{path} holds label {values.max()}: masks hold 0..C and 255")
    values = values.astype(np.uint8)
    if num_classes is not None:
        outside = values[(values > num_classes) & (values != IGNORE)]
        if outside.size:
            raise ValueError(f"{path} holds label {outside.max()}, classes.txt has {num_classes} classes: "
                             "is it of another data set, or 90-id COCO? (prepare_data.py check)")
    return values


def indices_of(colours, path):
    """(H, W, 3) in exact palette colours -> indices (H, W); other colours are refused."""
    table = palette() @ np.array([1 << 16, 1 << 8, 1])
    code = colours @ np.array([1 << 16, 1 << 8, 1])
    order = np.argsort(table)
    indices = order[np.searchsorted(table, code, sorter=order).clip(0, 255)]
    if (table[indices] != code).any():
        raise ValueError(f"{path} is a colour image whose colours are not VOC's palette: "
                         "write class indices, as a grey or palette PNG")
    return indices


def save_mask(path, mask):
    """Label map (H, W) -> 8-bit palette PNG in VOC's colours."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.min() < 0 or mask.max() > 255:
        raise ValueError(f"{path}: a mask is (H, W) with values 0..255, not {mask.shape}")
    with files.atomic(path) as beside:
        paint(mask).save(beside, format="PNG")


def resize_mask(mask, size):
    """A label map at the size (H, W)."""
    return mask if mask.shape == size else np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))


def paint(mask):
    """Label map (H, W) -> PIL image of mode P in VOC's colours."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(palette().ravel().tolist())                       # turns L into P, the indices stay
    return image
