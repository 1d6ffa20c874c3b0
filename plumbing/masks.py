"""Label maps as palette PNG: 0 background, 1..C, 255 ignored."""
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing import files, images


IGNORE = 255


def palette():
    """The 256 colours of VOC, (256, 3) uint8: bits of the index spread over the channels, highest colour bit first."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def load_mask(path, num_classes=None):
    """Label map (H, W) uint8 from a palette, grey or exact-palette-colour PNG. With `num_classes`, values outside 0..C and 255 are refused."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that makes it")
    try:
        with images.header(path, ("PNG",)) as image:
            values, mode = np.array(image), image.mode
    except Exception as error:                                             # PIL raises whatever a foreign file's bytes provoke
        raise ValueError(f"{path} is not a readable mask ({files.why(error)}): replace it") from None
    if mode in ("RGB", "RGBA"):
        values = from_colours(values[..., :3], path)
    elif values.ndim != 2 or mode not in ("P", "L", "I", "I;16", "1"):
        raise ValueError(f"{path} has mode {mode}: a mask is a palette or grey PNG of class indices")
    if values.size and values.max() > 255 or values.min(initial=0) < 0:
        raise ValueError(f"{path} holds label {values.max()}: masks hold 0..C and 255")
    values = values.astype(np.uint8)
    if num_classes is not None:
        outside = values[(values > num_classes) & (values != IGNORE)]
        if outside.size:
            raise ValueError(f"{path} holds label {outside.max()}, classes.txt has {num_classes} classes: "
                             "is it of another data set, or 90-id COCO? (prepare_data.py check)")
    return values


def from_colours(values, path):
    """Three channels: exact palette colours become indices, anything else is refused."""
    table = palette().astype(np.int64) @ [65536, 256, 1]
    order = np.argsort(table)
    place = np.zeros(values.shape[:2], np.uint8)
    for rows, out in zip(np.array_split(values, 1 + len(values) // 256), np.array_split(place, 1 + len(values) // 256)):       # 64-bit numbers of all would be large
        code = rows.astype(np.int64) @ [65536, 256, 1]
        out[:] = order[np.searchsorted(table[order], code).clip(0, 255)]
        if (table[out] != code).any():
            raise ValueError(f"{path} is a colour picture whose colours are not VOC's palette: write class indices (data.save_mask does)")
    return place


def save_mask(path, mask):
    """Label map (H, W) -> 8-bit palette PNG in VOC's colours, whole or not at all."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size and (mask.min() < 0 or mask.max() > 255):
        raise ValueError(f"{path}: a mask is (H, W) with values 0..255, not {mask.shape}")
    with files.atomic(path) as beside:
        paint(mask).save(beside, format="PNG")


def paint(mask):
    """Label map (H, W) -> PIL picture of mode P in VOC's colours."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8), mode="L")
    image.putpalette(palette().ravel().tolist())                           # turns L into P, the indices stay
    return image
