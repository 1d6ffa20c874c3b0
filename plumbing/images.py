"""Images: decoded as a viewer shows them, their sizes, tensors."""
import contextlib

import numpy as np
import torch
from PIL import Image

from plumbing import files

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")       # found under these endings; Pillow's EPS runs a program
TURNS = dict(zip(range(2, 9), (                       # EXIF orientation -> what undoes it
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))


@contextlib.contextmanager
def opened(path, kind="image", formats=FORMATS):
    """An image's file with its header read. An error, here or while its pixels are read, is one line."""
    try:
        with Image.open(files.regular(path), formats=formats) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:                        # PIL raises errors of many types
        raise ValueError(f"{path} is not a readable {kind} ({files.first_line(error)}): "
                         "replace it or take it off the list") from None


def orientation(file):
    """The EXIF orientation of an opened image, 1 to 8; 1 (as it is) where there is none that can be read."""
    with contextlib.suppress(Exception):              # a broken EXIF block does not spoil the pixels
        flag = file.getexif().get(0x0112, 1)
        return flag if flag in TURNS else 1
    return 1


def shown_size(file):
    """(height, width) of an opened image as a viewer shows it."""
    return file.size if orientation(file) in (5, 6, 7, 8) else file.size[::-1]          # these swap the sides


def decode(file, least=None):
    """An opened image -> PIL RGB as a viewer shows it: turned by EXIF, 16 bits scaled, transparency on white.

    With `least` (height, width), a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides if both stay that long."""
    if least:                                         # draft wants (width, height) of the unturned image
        file.draft(None, least if shown_size(file) == file.size else least[::-1])
    file.load()                                       # reads the pixels: a truncated file fails here
    if (flag := orientation(file)) != 1:
        file = file.transpose(TURNS[flag])            # ImageOps.exif_transpose fails at some other tags
    if file.mode.startswith("I"):
        values = np.asarray(file)
        top = 65535 if file.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
        table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)
        return Image.fromarray(table[values.clip(0, top)]).convert("RGB")
    if "A" in file.getbands() or "transparency" in file.info:
        white = Image.new("RGBA", file.size, "white")
        white.alpha_composite(file.convert("RGBA"))
        return white.convert("RGB")
    return file if file.mode == "RGB" else file.convert("RGB")                        # convert would copy it


def load_image(path, least=None):
    """Any image file -> PIL RGB, by `decode`."""
    with opened(path) as file:
        return decode(file, least)


def image_size(path):
    """(height, width) as load_image returns it, from the header alone."""
    with opened(path) as file:
        return shown_size(file)


def to_tensor(image):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(image):
    """PIL RGB -> (3, H, W) float32 in [0, 1]."""
    return to_tensor(image).float() / 255


def within(size, max_side):
    """(H, W), smaller if its longer side is over `max_side`; 0: never"""
    factor = min(1, max_side / max(size)) if max_side else 1
    return tuple(max(1, round(n * factor)) for n in size)


def load_within(path, max_side=0):
    """Any image file -> PIL RGB, its longer side at most `max_side`; 0: as it is."""
    with opened(path) as file:
        size = shown_size(file)
        height, width = within(size, max_side)
        if (height, width) == size:
            return decode(file)
        return decode(file, (2 * height, 2 * width)).resize((width, height), Image.BICUBIC)


def load_float(path, max_side=0):
    """The same -> (3, H, W) float32 in [0, 1]"""
    return to_float(load_within(path, max_side))
