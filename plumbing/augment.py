"""RandAugment as timm's rand-m9-mstd0.5-inc1, which DeiT, WeakTr and SemPLeS train with.

    image = rand_augment(image)                   # PIL RGB -> same; draws from torch's generator

Two operations, each applied with probability .5, of magnitude 9 + N(0, .5) of 10; larger magnitudes change
more; corners that become empty are filled with the mean colour. torchvision's RandAugment applies both
always, fills with black, and has other operations. """
import torch
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)                                        # ImageNet's mean colour


def rand_augment(image, magnitude=9.0, spread=0.5, operations=2, probability=0.5):
    for _ in range(operations):
        apply = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        if torch.rand(()) < probability:
            level = min(max(magnitude + spread * torch.randn(()).item(), 0.0), 10.0) / 10          # in [0, 1]
            image = apply(image, level)
    return image


def either_sign(value):
    return value if torch.rand(()) < 0.5 else -value


def move(image, matrix):
    """An affine map (a, b, c, d, e, f) of the pixels: (x, y) comes from (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                           fillcolor=FILL)


def rotate(image, level):
    return image.rotate(either_sign(30 * level), Image.Resampling.BICUBIC, fillcolor=FILL)


def shear_x(image, level):
    return move(image, (1, either_sign(0.3 * level), 0, 0, 1, 0))


def shear_y(image, level):
    return move(image, (1, 0, 0, either_sign(0.3 * level), 1, 0))


def translate_x(image, level):
    return move(image, (1, 0, either_sign(0.45 * level) * image.width, 0, 1, 0))


def translate_y(image, level):
    return move(image, (1, 0, 0, 0, 1, either_sign(0.45 * level) * image.height))


def posterize(image, level):
    """Keeps 4 bits of a channel at level 0, none at level 1; at magnitude 9 it is one."""
    bits = 4 - int(4 * level)
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def solarize(image, level):
    return ImageOps.solarize(image, 256 - int(256 * level))


def solarize_add(image, level):
    """Adds to the pixels below 128."""
    table = [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


def enhance(kind):
    return lambda image, level: kind(image).enhance(max(0.1, 1 + either_sign(0.9 * level)))


OPERATIONS = (
    lambda image, level: ImageOps.autocontrast(image), lambda image, level: ImageOps.equalize(image),
    lambda image, level: ImageOps.invert(image), rotate, posterize, solarize, solarize_add,
    enhance(ImageEnhance.Color), enhance(ImageEnhance.Contrast), enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness), shear_x, shear_y, translate_x, translate_y)
