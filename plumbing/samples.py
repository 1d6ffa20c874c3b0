"""Datasets and loaders: whole images in batches of one size, augmented training samples, batches over all
ranks."""
import math
import warnings
from functools import partial
from itertools import groupby
from multiprocessing.pool import ThreadPool

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from plumbing import guard
from plumbing.augment import rand_augment
from plumbing.images import decode, image_size, load_within, opened, shown_size, to_tensor, within
from plumbing.masks import IGNORE, load_mask, resize_mask

# ---------------------------------------------------------------- whole images

LARGE = 640 * 640                                             # COCO's largest


class WholeImages(Dataset):
    """Whole images by number, at most `max_side` long (0: as they are); a batch is (numbers, images)."""

    def __init__(self, folder, ids, max_side):
        self.folder, self.ids, self.max_side = folder, ids, max_side

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return i, self.folder.image(self.ids[i], self.max_side)

    def collate(self, batch):
        return [i for i, _ in batch], torch.stack([image for _, image in batch])

    def batches(self, batch_size):
        """Numbers of the images in batches that stack: as many of one size as `batch_size` allows; larger
        images than COCO's one by one, since the memory of attention grows with the square of their size."""
        with ThreadPool(16) as threads:             # a million headers on a network disk: wait for 16 at once
            sizes = threads.map(lambda id: image_size(self.folder.image_path(id)), self.ids)
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
        for _, group in groupby(order, key=lambda i: sizes[i]):
            group = list(group)
            count = batch_size if math.prod(within(sizes[group[0]], self.max_side)) <= LARGE else 1
            yield from (group[n:n + count] for n in range(0, len(group), count))


# More loaders than cores may be right: they also wait for disks.
warnings.filterwarnings("ignore", "This DataLoader will create")


def by_size(folder, ids, batch_size, run, workers=0, max_side=0):
    """DataLoader over all images, each once, in batches of one size: (numbers (b,) list, images (b, 3, H,
    W))."""
    images = WholeImages(folder, ids, max_side)
    return DataLoader(images, batch_sampler=list(images.batches(batch_size)), num_workers=workers,
                      collate_fn=images.collate, pin_memory=run.device.type == "cuda",
                      worker_init_fn=guard.ignore_signals)


# ---------------------------------------------------------------- augmentation

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]     # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def erase_some(share, image):
    """Random erasing by noise that is N(0, 1) in every channel once a network has normalised the image."""
    from torchvision.transforms import v2
    if torch.rand(1) >= share:
        return image
    drawn = v2.RandomErasing(value="random").make_params([image])
    if drawn["v"] is None:                                    # no rectangle was found that fits
        return image
    return v2.functional.erase(image, **{**drawn, "v": drawn["v"] * STD + MEAN})


def train_transform(size, min_scale=0.08, randaugment=False, erase=0.0):
    """-> function of an image's path: RandomResizedCrop and flip; RandAugment and random erasing in (a),
    (c)."""
    # Here and below torchvision is imported where it augments: it takes as long as torch, also for --help.
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1), interpolation=v2.InterpolationMode.BICUBIC,
                                antialias=True)
    steps = [v2.RandomHorizontalFlip()]
    if randaugment:
        steps += [v2.ToPILImage(), rand_augment, v2.ToImage()]
    steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
    if erase:
        steps.append(partial(erase_some, erase))
    return partial(crop_and_augment, crop, v2.Compose(steps))


def crop_and_augment(crop, augment, path):
    """-> (3, h, w) in [0, 1]. The crop is drawn from the size in the header, so that of a large JPEG only
    the pixels it needs are decoded: at 1/2, 1/4 or 1/8 of its sides."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    with opened(path) as file:
        height, width = shown_size(file)
        box = crop.make_params([torch.empty(()).expand(3, height, width)])      # looks at the shape alone
        enough = [math.ceil(n * m / box[side]) for n, m, side in
                  zip((height, width), crop.size, ("height", "width"))]
        image = decode(file, enough)
    reduced = max(round(width / image.width), round(height / image.height))     # 1, 2, 4 or 8
    corners = box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]
    image = image.crop([round(n / reduced) for n in corners])
    image = v2.functional.resize(tv_tensors.Image(to_tensor(image)), crop.size, crop.interpolation,
                                 antialias=crop.antialias)
    return augment(image).as_subclass(torch.Tensor)


def segmentation_transform(crop, low, high):
    """Image and mask alike: a random scale, a random crop, a flip. Outside the image: mean colour, no
    label."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: IGNORE}
    return v2.Compose([partial(resize_both, low, high), v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip(),
                       v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])


def resize_both(low, high, image, mask):
    from torchvision.transforms import v2
    factor = torch.empty(()).uniform_(low, high).item()
    size = [max(1, round(n * factor)) for n in image.shape[1:]]
    return v2.functional.resize(image, size, antialias=True), v2.functional.resize(mask, size)


def mask_paths(folder, ids):
    """id -> path of its mask. All of them must be there; what they hold is checked when they are read."""
    missing = [id for id in ids if not (folder / f"{id}.png").exists()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]}.png is missing, {len(missing)} of {len(ids)} masks "
                                "are: run make_pseudo.py on this --split, or give a --label-dir that has "
                                "them")
    return partial(mask_path, folder)


def mask_path(folder, id):
    return folder / f"{id}.png"


# ---------------------------------------------------------------- training samples

class Samples(Dataset):
    """Augmented training samples. Each draws its noise from (seed, epoch, image) alone: not from the
    process, the worker or the batch it happens to be in. So any number of processes sees the same crops, and
    a resumed run too.

    The hash of whole numbers is the same in every 64-bit CPython, whatever PYTHONHASHSEED."""

    def __init__(self, folder, ids, transform, seed=0, masks=None, max_side=0):
        """`transform` takes the path of an image. For segmentation `masks` gives the path of an id's label
        map, and `transform` takes image and mask together, at most `max_side` long."""
        self.folder, self.ids, self.transform = folder, ids, transform
        self.seed, self.masks, self.max_side = seed, masks, max_side
        self.labels = folder.labels(ids) if masks is None else None

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        """(epoch, i) -> image (3, h, w) in [0, 1], labels (C,) or mask (h, w) int64, i."""
        from torchvision import tv_tensors
        epoch, i = key
        path = self.folder.image_path(self.ids[i])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, i)) & 0x7FFFFFFFFFFFFFFF)
            if self.masks is None:
                return self.transform(path), self.labels[i], i
            image = tv_tensors.Image(to_tensor(load_within(path, self.max_side)))
            image, mask = self.transform(image, tv_tensors.Mask(self.mask(i, image_size(path), image)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long(), i

    def mask(self, i, size, image):
        """The label map of an image of `size`, as large as it is seen."""
        path = self.masks(self.ids[i])
        mask = load_mask(path, len(self.folder.classes))
        if mask.shape != size:
            raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}: "
                             "make the mask again")
        return torch.from_numpy(resize_mask(mask, tuple(image.shape[1:])))

    def collate(self, samples):
        """A batch. A rank whose share of a small batch is empty gets an empty one, or, for segmentation
        networks, which take none, an image without a label."""
        if samples:
            return default_collate(samples)
        image, target, _ = self[0, 0]
        count = 0 if self.masks is None else 1
        target = target.new_full((count, *target.shape), IGNORE)
        return image.new_zeros(count, *image.shape), target, torch.zeros(0, dtype=torch.long)


class Batches(Sampler):
    """Batches of one epoch as lists of (epoch, i) keys, this rank's share of each: `batch_size` counts all
    ranks.

    A last batch that is not full is left out, unless it is the only one. `skip` batches are passed over
    (resume)."""

    def __init__(self, length, batch_size, run, seed=0):
        self.length, self.batch_size, self.run, self.seed = length, min(batch_size, length), run, seed
        self.epoch, self.skip = 0, 0

    def __len__(self):
        return self.length // self.batch_size

    def start(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip

    def __iter__(self):
        seed = hash((self.seed, self.epoch)) & 0x7FFFFFFFFFFFFFFF
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed))
        for step in range(self.skip, len(self)):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size].tolist()
            yield [(self.epoch, i) for i in self.run.shard(batch)]


def make_loader(samples, batch_sampler, run, workers=0):
    """DataLoader over (images, targets, image numbers)."""
    # A generator of its own: an iterator draws a number when it starts, which would move the networks' noise.
    return DataLoader(samples, batch_sampler=batch_sampler, num_workers=workers, collate_fn=samples.collate,
                      generator=torch.Generator(), pin_memory=run.device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=guard.ignore_signals)


def loader(samples, run, args):
    """The training loader; Keeper starts its epochs. Of each batch every rank gets its share."""
    batches = Batches(len(samples), args.batch_size, run, samples.seed)
    return make_loader(samples, batches, run, args.workers)
