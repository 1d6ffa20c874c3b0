"""Datasets and loaders: whole pictures by size, augmented training samples."""
import math
import signal
from functools import partial
from itertools import groupby
from multiprocessing.pool import ThreadPool

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from plumbing import images, masks



class Pictures(Dataset):
    """Whole pictures by number; a batch is (numbers, images)."""

    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return i, self.folder.image(self.ids[i])

    def collate(self, batch):
        return [i for i, _ in batch], torch.stack([image for _, image in batch])

    def equal_sizes(self, batch_size):
        """Numbers of the pictures in batches that stack: as many of one size as `batch_size` allows."""
        with ThreadPool(16) as threads:                                        # headers of a million files far away: threads wait for them together
            sizes = threads.map(lambda id: images.picture_size(self.folder.picture(id)), self.ids)
        for _, group in groupby(sorted(range(len(sizes)), key=lambda i: (sizes[i], i)), key=lambda i: sizes[i]):
            group = list(group)
            yield from (group[n:n + batch_size] for n in range(0, len(group), batch_size))


def by_size(folder, ids, batch_size, env, workers=0):
    """DataLoader over all pictures, each once, in batches of one size: (numbers (b,) list, images (b, 3, H, W) in [0, 1])."""
    pictures = Pictures(folder, ids)
    return DataLoader(pictures, batch_sampler=list(pictures.equal_sizes(batch_size)), num_workers=workers, collate_fn=pictures.collate,
                      pin_memory=env.device.type == "cuda", worker_init_fn=serve)


def serve(worker):
    """A loader's process leaves Ctrl-C, and one SIGTERM, to the one that it works for: both may be sent to all processes of a run, which is to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class Erase(v2.RandomErasing):
    """Random erasing by noise: the mean colour +- its spread, cut to [0, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def make_params(self, flat_inputs):
        drawn = super().make_params(flat_inputs)
        if drawn["v"] is not None:
            drawn["v"] = (drawn["v"] * self.std + self.mean).clamp(0, 1)
        return drawn


def train_transform(size, scale=(0.08, 1.0), randaugment=False, erase=0.0):
    """-> function of a picture's path: RandomResizedCrop and flip; RandAugment m9 and random erasing if asked (SemPLeS (a), (c))."""
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    steps = [v2.RandomHorizontalFlip()]
    if randaugment:
        steps.append(v2.RandAugment(magnitude=9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR))     # 9 of 10, as timm counts
    steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
    if erase:
        steps.append(Erase(erase, value="random", inplace=True))
    return partial(crop_and_augment, crop, v2.Compose(steps))


def crop_and_augment(crop, augment, path):
    """-> (3, h, w) in [0, 1]. The crop is drawn from the size that the header tells, so that of a large JPEG only the pixels it needs are decoded."""
    with images.opened(path) as file:
        height, width = images.shown_size(file)
        box = crop.make_params([torch.empty(()).expand(3, height, width)])                 # looks at the shape alone
        image = images.decode(file, [math.ceil(n * m / box[side]) for n, m, side in zip((height, width), crop.size, ("height", "width"))])
    reduced = max(round(width / image.width), round(height / image.height))                # 1, 2, 4 or 8: its last row and column may be partial ones
    left, top, right, bottom = box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]
    image = image.crop([round(n / reduced) for n in (left, top, right, bottom)])
    image = v2.functional.resize(tv_tensors.Image(images.to_tensor(image)), crop.size, crop.interpolation, antialias=crop.antialias)
    return augment(image).as_subclass(torch.Tensor)


class Samples(Dataset):
    """Augmented training samples. Each draws its noise from (seed, epoch, picture) alone: not from the process, the
    worker or the batch it happens to be in. So any number of processes sees the same crops, and a resumed run too.

    The hash of whole numbers is the same in every 64-bit CPython from 3.8 on, whatever PYTHONHASHSEED; what is drawn from it is torch's."""

    def __init__(self, folder, ids, transform, seed=0, masks=None):
        """`transform` takes the path of a picture. With `masks`, id -> path of a label map, for segmentation, it takes picture and mask together."""
        self.folder, self.ids, self.labels = folder, ids, folder.labels(ids) if masks is None else None
        self.transform, self.seed, self.masks = transform, seed, masks

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        """(epoch, i) -> picture (3, h, w) in [0, 1], labels (C,) or mask (h, w) int64, i."""
        epoch, i = key
        path = self.folder.picture(self.ids[i])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, i)) & 0x7FFFFFFFFFFFFFFF)
            if self.masks is None:
                return self.transform(path), self.labels[i], i
            image = tv_tensors.Image(images.to_tensor(images.load_image(path)))
            image, mask = self.transform(image, tv_tensors.Mask(self.mask(i, image)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long(), i

    def collate(self, samples):
        """A batch. Where a rank's share of a small batch is empty: an empty one, or for segmentation, whose networks take none, a picture without a label."""
        if samples:
            return default_collate(samples)
        image, target, _ = self[0, 0]
        count = 0 if self.masks is None else 1
        return image.new_zeros(count, *image.shape), target.new_full((count, *target.shape), masks.IGNORE), torch.zeros(0, dtype=torch.long)

    def mask(self, i, image):
        path = self.masks(self.ids[i])
        mask = masks.load_mask(path, len(self.folder.classes))
        if mask.shape != tuple(image.shape[1:]):
            raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its picture {image.shape[2]}x{image.shape[1]}: make the mask again")
        return torch.from_numpy(mask)


class Batches(Sampler):
    """Batches of one epoch as lists of (epoch, i) keys, this rank's share of each: `batch_size` counts all processes.

    A last batch that is not full is left out while training, unless it is the only one. `skip` batches are passed over (resume)."""

    def __init__(self, length, batch_size, env, seed=0):
        self.length, self.batch_size, self.env, self.seed = length, min(batch_size, length), env, seed
        self.epoch, self.skip = 0, 0

    def __len__(self):
        return self.length // self.batch_size

    def start(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(hash((self.seed, self.epoch)) & 0x7FFFFFFFFFFFFFFF))
        for step in range(self.skip, len(self)):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size].tolist()
            yield [(self.epoch, i) for i in self.env.shard(batch)]


def loader(samples, batch_size, env, workers=0):
    """-> DataLoader over (images, targets, picture numbers) and its Batches: `batches.start(epoch, skip)` before each epoch."""
    batches = Batches(len(samples), batch_size, env, samples.seed)
    # A generator of its own: an iterator draws a number when it starts, which would move the networks' noise in a resumed epoch.
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=samples.collate, generator=torch.Generator(),
                      pin_memory=env.device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=serve), batches
