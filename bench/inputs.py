"""What the benchmarks run on: networks of the real shapes with random weights, folders of drawn images, and
one batch again and again in place of a loader."""
import itertools
from unittest import mock

import numpy as np
import torch
from PIL import Image

from bench import tables
from plumbing import checkpoints, masks, samples
from wsss import clip_model, generator

CLASSES = 20                                                  # as many as VOC's
TEXT = {"context_length": 77, "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8,
        "transformer_layers": 12}


def random_clip(patch=32, **sizes):
    """OpenAI's ViT-B with patches of 32 or 16 pixels, or of other `sizes`; the same at every call."""
    torch.manual_seed(0)
    image = {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12, "vision_width": 768,
             "vision_patch_size": patch}
    return clip_model.openai().model.CLIP(**{**image, **TEXT, **sizes})


def save_networks(root, classes=CLASSES):
    """<root>/clip.pt, a ViT-B/32, and <root>/generator.pt, a DeiT-S."""
    torch.save(random_clip().half().state_dict(), root / "clip.pt")
    save_generator(root / "generator.pt", classes)


def save_generator(path, classes):
    torch.manual_seed(0)
    checkpoints.save(path, model=generator.DeiT(classes).state_dict())


# ---------------------------------------------------------------- images and labels

def deal(images, pairs, classes=CLASSES):
    """The classes of each of `images` images, lists of int: `pairs` in all, of as many classes as can be."""
    numbers = itertools.cycle(range(classes))
    share, more = divmod(pairs, images)
    return [list(itertools.islice(numbers, share + (n < more))) for n in range(images)]


def multi_hot(lists, classes=CLASSES):
    """Lists of class numbers -> (n, C)."""
    labels = torch.zeros(len(lists), classes)
    for row, present in zip(labels, lists):
        row[present] = 1
    return labels


def photograph(rng, width, height):
    """Noise of every scale, as much of each as a photograph has, roughly: a JPEG is then as large as one."""
    image = Image.new("RGB", (width, height), (124, 116, 104))
    shares = {256: 0.7, 64: 0.4, 16: 0.3, 8: 0.2, 4: 0.15, 2: 0.1, 1: 0.1}
    for cell, share in shares.items():
        noise = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        noise = Image.fromarray(noise).resize((width, height), Image.BICUBIC)
        image = Image.blend(image, noise, share)
    return image


def make_folder(root, size, present, classes=CLASSES):
    """A data folder: one image of `size` (width, height), with a mask, for each list of classes."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass"):
        (root / name).mkdir(parents=True)
    lines = []
    width, height = size
    mask = np.arange(height * width).reshape(height, width) * 5 // (height * width)   # five stripes
    for n, numbers in enumerate(present):
        photograph(rng, width, height).save(root / f"JPEGImages/{n:04d}.jpg", quality=92)
        masks.save_mask(root / f"SegmentationClass/{n:04d}.png", mask)
        lines.append(" ".join([f"{n:04d}", *map(str, numbers)]))
    (root / "labels.txt").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(f"class {n}" for n in range(classes)))
    return root


# ---------------------------------------------------------------- a loader that nothing waits for

class Ready:
    """In place of a stage's loader and its batch sampler: one batch that lies on its device, again and again.

    A step then waits for nothing but itself."""

    def __init__(self, size, pairs, steps, classes=CLASSES, crop=224):
        self.size, self.steps, self.warm, self.crop = size, steps, max(1, steps // 10), crop
        self.labels = multi_hot(deal(size, pairs, classes), classes)

    def seconds_of(self, script, *values):
        """-> seconds of one training step of a stage."""
        with mock.patch.object(samples, "loader", self.start_loader):
            tables.stage(script, *values, "--batch-size", self.size, "--crop", self.crop, "--epochs", 1,
                         "--workers", 0)
        return self.seconds

    def start_loader(self, dataset, run, args):
        mine = torch.tensor(run.shard(range(self.size)))
        images = torch.rand(len(mine), 3, self.crop, self.crop, device=run.device)
        self.dataset, self.batch_sampler, self.device = dataset, self, run.device
        self.batch = images, self.labels[mine], mine
        return self

    def start(self, epoch, skip=0):
        pass

    def __len__(self):
        return self.warm + self.steps + 1                     # the last step also writes the log: not timed

    def __iter__(self):
        for n in range(len(self)):
            if n == self.warm:
                start = tables.clock(self.device)
            if n == self.warm + self.steps:
                self.seconds = (tables.clock(self.device) - start) / self.steps
            yield self.batch
