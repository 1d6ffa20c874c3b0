"""Pictures: decoding, sizes, tensors."""
import contextlib
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing import files


PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")                    # what lies under these endings; Pillow's other decoders are not asked
PIXELS = 1 << 26                                                   # of a picture, at most: 8192 x 8192, 20,000 x 3,355; a file of a few bytes can claim any number
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")           # a JPEG's: marker, length 2 n + 6, n components; a phone appends films, which hold the marker by chance


def header(path, formats=FORMATS):
    """A picture of which the header is read, and its pixels are not yet."""
    image = Image.open(files.regular(path, 1 << 28), formats=formats)
    if image.width * image.height > PIXELS or max(image.size) > 65_535:    # a row costs memory, too
        image.close()
        raise ValueError(f"{image.width}x{image.height} are more than {PIXELS:,} pixels, or a side of more than 65,535: make it smaller")
    return image


@contextlib.contextmanager
def opened(path):
    """A picture's file with its header read. Whatever is wrong with it, here or while its pixels are read, is one line."""
    try:
        with header(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:                                             # PIL raises whatever a foreign file's bytes provoke
        raise ValueError(f"{path} is not a readable picture ({files.why(error)}): replace it or take it off the list") from None


TURNS = dict(zip(range(2, 9), (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                               Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


def orientation(file):
    """The EXIF flag of an opened picture, 1 to 8; 1 turns nothing, as does a flag or an EXIF block that cannot be read: its pixels can be."""
    if file.format == "PNG" and "exif" not in file.info:
        file.load()                                                        # EXIF may follow the pixels; what is wrong with these is told
    with contextlib.suppress(Exception):
        flag = file.getexif().get(0x0112, 1)
        return flag if flag in TURNS else 1
    return 1


def shown_size(file):
    """(height, width) of an opened picture as a viewer shows it."""
    return file.size if orientation(file) in (5, 6, 7, 8) else file.size[::-1]             # these swap the sides


def decode(file, least=None):
    """An opened picture -> PIL RGB as a viewer shows it: turned by its EXIF flag, 16 bits scaled, transparency on white.

    With `least` (height, width) a JPEG comes at 1/2, 1/4 or 1/8 of its sides, if both are then still that long: most of its pixels are never made."""
    if file.format in ("JPEG", "MPO") and len(SCAN.findall(Path(file.filename).read_bytes())) > 100:
        raise ValueError("it has more than 100 scans")                     # each of a few bytes can cost as much as the picture
    if least:
        file.draft(None, least if shown_size(file) == file.size else least[::-1])          # draft counts (width, height) of the stored, unturned picture
    file.load()                                                            # reads the pixels: a truncated file ends here
    if (flag := orientation(file)) != 1:
        file = file.transpose(TURNS[flag])                                 # ImageOps.exif_transpose would write the other tags anew, and fails at odd ones
    if file.mode.startswith("I"):
        values = np.asarray(file)
        top = 65535 if file.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
        table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)
        return Image.fromarray(table[values.clip(0, top)]).convert("RGB")
    if "A" in file.getbands() or "transparency" in file.info:
        shown = Image.new("RGB", file.size)
        for top in range(0, file.height, 512):                             # by strips: several copies of a large picture would be gigabytes
            strip = file.crop((0, top, file.width, min(top + 512, file.height))).convert("RGBA")
            shown.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
        return shown
    return file if file.mode == "RGB" else file.convert("RGB")             # convert would copy it


def load_image(path, least=None):
    """Any picture -> PIL RGB, by `decode`."""
    with opened(path) as file:
        return decode(file, least)


def picture_size(path):
    """(height, width) as load_image returns it, from the header alone."""
    with opened(path) as file:
        return shown_size(file)


def to_tensor(image):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(image):
    return to_tensor(image).float() / 255
