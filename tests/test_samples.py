"""Training samples: noise from the image and the epoch alone, crops of large JPEGs, shares of a batch."""
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from plumbing import folders, images, masks
from plumbing import samples as sampling
from plumbing.processes import Run


class Rank:
    """As much of a run as batches need."""
    shard, device = Run.shard, torch.device("cpu")

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world


# ---------------------------------------------------------------- one sample

def test_noise_depends_on_image_and_epoch_alone(voc):
    folder = folders.Folder(voc)
    augment = sampling.train_transform(16, randaugment=True)
    samples = sampling.Samples(folder, folder.ids("train"), augment, seed=3)
    image, labels, number = samples[0, 1]
    assert type(image) is torch.Tensor and image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and labels.tolist() == [0, 1, 1] and number == 1
    before = torch.get_rng_state()
    torch.rand(3)
    again, *_ = samples[0, 1]
    assert torch.equal(image, again) and not torch.equal(image, samples[1, 1][0])
    torch.set_rng_state(before)
    samples[0, 2]
    assert torch.equal(before, torch.get_rng_state())                  # the caller's noise is untouched


def test_image_and_mask_move_together(voc):
    """An image that shows its own mask: after any scale, crop and flip the two still agree."""
    folder = folders.Folder(voc)
    for id in folder.ids("train"):
        shown = np.repeat((folder.truth(id) > 0)[..., None] * np.uint8(255), 3, 2)
        Image.fromarray(shown).save(voc / "JPEGImages" / f"{id}.png")
        (voc / "JPEGImages" / f"{id}.jpg").unlink()
    augment = sampling.segmentation_transform(60, 2, 3)
    samples = sampling.Samples(folder, folder.ids("train"), augment, masks=folder.mask_path)
    image, mask, _ = samples[0, 1]
    assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 2, 3, 255}
    assert .2 < (mask > 0).float().mean() < .8
    assert ((image[0] > .5) == (mask > 0)).float().mean() > .95        # but at edges
    masks.save_mask(voc / "SegmentationClass/a_2.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="a_2.png is 5x5, its image 40x34"):
        samples[0, 1]


def whole_crop(path, key, size, min_scale=0.08):
    """A training sample as torchvision's own transforms make it of the whole decoded image."""
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, (min_scale, 1), interpolation=bicubic, antialias=True)
    steps = [crop, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    with torch.random.fork_rng():
        torch.manual_seed(hash((0, *key)) & 0x7FFFFFFFFFFFFFFF)
        image = v2.Compose(steps)(tv_tensors.Image(np.array(images.load_image(path)).transpose(2, 0, 1)))
    return image.as_subclass(torch.Tensor)


def save_smooth(path, width, height, **options):
    """A large image of three waves, as a photograph is smooth at the scale of its pixels."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 5 * y), np.sin(14 * y), np.cos(11 * x - 7 * y)], -1)
    Image.fromarray(np.uint8(127.5 + 127 * waves)).save(path, **options)


def test_samples_are_crops_of_the_whole_image_bit_for_bit_where_nothing_is_reduced(voc):
    rng, place, exif = np.random.default_rng(1), voc / "JPEGImages", Image.Exif()
    exif[0x0112] = 6                                                   # turned: shown 60 wide
    for name, shape, more in (("a_1.jpg", (96, 96, 3), {}), ("a_2.jpg", (60, 110, 3), {"exif": exif}),
                              ("a_3.png", (190, 380, 4), {})):         # large, but no JPEG
        (place / name).with_suffix(".jpg").unlink()
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(place / name, **more)
    save_smooth(place / "a_4.jpg", 91, 400)
    folder = folders.Folder(voc)
    for scale in (0.08, 0.9):
        samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(48, scale))
        for key in ((epoch, i) for epoch in range(3) for i in range(5)):
            plain = whole_crop(folder.image_path(samples.ids[key[1]]), key, 48, scale)
            assert torch.equal(samples[key][0], plain), key


def test_randaugment_leaves_a_quarter_as_it_is(voc):
    """Of two operations each is applied half the time; some do nothing to some images."""
    folder = folders.Folder(voc)
    plain, augmented = (sampling.Samples(folder, ["a_1"], sampling.train_transform(16, randaugment=on))
                        for on in (False, True))
    unchanged = [torch.equal(plain[epoch, 0][0], augmented[epoch, 0][0]) for epoch in range(400)]
    assert 0.2 < np.mean(unchanged) < 0.33


def test_erasing_draws_n_0_1_in_the_normalised_image_and_is_not_clamped(voc):
    folder = folders.Folder(voc)
    plain, erased = (sampling.Samples(folder, folder.ids("train"), sampling.train_transform(64, erase=share))
                     for share in (0.0, 1.0))
    noise = []
    for epoch in range(20):
        before, after = plain[epoch, 0][0], erased[epoch, 0][0]
        changed = (before != after).any(0)
        height, width = (changed.any(axis).sum() for axis in (1, 0))
        assert changed.sum() == height * width and 0.02 < changed.float().mean() < 0.34      # a rectangle
        noise.append(((after - sampling.MEAN) / sampling.STD)[:, changed])
    noise = torch.cat(noise, 1)
    assert noise.mean(1).abs().max() < 0.03 and (noise.std(1) - 1).abs().max() < 0.03
    assert (noise > 1).float().mean() == pytest.approx(0.1587, abs=0.01)        # as of N(0, 1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_only_as_far_as_its_crop_needs(voc, monkeypatch, orientation):
    """A sixteenth of the pixels, a sixty-fourth, or all; close to the crop of the whole image, in place to
    half a pixel of the sample."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    save_smooth(voc / "JPEGImages/a_1.jpg", 803, 605, quality=95, exif=exif)
    folder, decoded = folders.Folder(voc), []

    def decode(*args):
        decoded.append(images.decode(*args))
        return decoded[-1]

    monkeypatch.setattr(sampling, "decode", decode)
    for size, by in ((100, 4), (50, 8), (400, 1)):
        samples = sampling.Samples(folder, ["a_1"], sampling.train_transform(size, 0.9))
        for epoch in range(3):
            found = samples[epoch, 0][0]
            assert decoded[-1].size == (-(-803 // by), -(-605 // by))[::1 if orientation == 1 else -1]
            plain = whole_crop(folder.image_path("a_1"), (epoch, 0), size, 0.9)
            assert (found - plain).abs().mean() < 0.02 < 0.05 < (found - plain.flip(-1)).abs().mean()


# ---------------------------------------------------------------- batches

def test_batches_are_shared_out_the_same_for_any_number_of_processes():
    one = sampling.Batches(11, 4, Rank(), seed=5)
    ranks = [sampling.Batches(11, 4, Rank(n, 2), seed=5) for n in (0, 1)]
    for batches in (one, *ranks):
        batches.start(epoch=2)
    all_of = list(one)
    assert len(one) == len(all_of) == 2 and all(epoch == 2 for batch in all_of for epoch, _ in batch)
    assert len({i for batch in all_of for _, i in batch}) == 8
    for batch, a, b in zip(all_of, *ranks):
        assert a == batch[::2] and b == batch[1::2]
    one.start(epoch=2, skip=1)
    assert list(one) == all_of[1:]                                     # resumed inside an epoch
    one.start(epoch=3)
    assert list(one) != all_of
    small = sampling.Batches(3, 64, Rank())
    assert len(small) == 1 and len(list(small)[0]) == 3


def test_an_empty_share_is_an_empty_batch_or_an_image_without_a_label(voc):
    folder = folders.Folder(voc)
    plain = sampling.Samples(folder, ["a_1"], sampling.train_transform(8))
    images_, labels, numbers = plain.collate([])
    assert (images_.shape, labels.shape, len(numbers)) == ((0, 3, 8, 8), (0, 3), 0)
    augment = sampling.segmentation_transform(8, 1, 1)
    images_, target, numbers = sampling.Samples(folder, ["a_1"], augment, masks=folder.mask_path).collate([])
    assert images_.shape == (1, 3, 8, 8) and (target == masks.IGNORE).all() and len(numbers) == 0


def test_all_images_once_in_batches_of_one_size(voc):
    folder = folders.Folder(voc)                                       # 30 and 34 rows in turn
    loader_run = SimpleNamespace(device=torch.device("cpu"))
    loader = sampling.by_size(folder, folder.ids("train"), 2, loader_run)
    found = [(numbers, batch) for numbers, batch in loader]
    assert [numbers for numbers, _ in found] == [[0, 2], [4], [1, 3]]
    for numbers, batch in found:
        assert all(torch.equal(image, folder.image(f"a_{n + 1}")) for n, image in zip(numbers, batch))
    loader = sampling.by_size(folder, folder.ids("train"), 2, loader_run, max_side=20)
    assert [tuple(batch.shape[2:]) for _, batch in loader] == [(15, 20), (15, 20), (17, 20)]


def test_loaders_work_where_processes_are_spawned(voc):
    """As on macOS: what a loader's process needs can be pickled, and draws the same."""
    folder, ids = folders.Folder(voc), ["a_1", "a_2"]
    masks_of = sampling.mask_paths(voc / "SegmentationClass", ids)
    for dataset in (sampling.Samples(folder, ids, sampling.train_transform(16, 0.5, True, 1.0)),
                    sampling.Samples(folder, ids, sampling.segmentation_transform(16, 1, 2), masks=masks_of),
                    sampling.WholeImages(folder, ids, 20)):
        sent = pickle.loads(pickle.dumps([dataset, dataset.collate]))[0]
        key = 1 if isinstance(dataset, sampling.WholeImages) else (2, 1)
        for one, other in zip(dataset[key], sent[key], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_networks_train_on_what_they_are_tested_on(voc):
    """At most --max-side long, the mask with the image."""
    masks_of, transform = sampling.mask_paths(voc / "SegmentationClass", ["a_1"]), lambda *pair: pair
    folder = folders.Folder(voc)
    image, mask, _ = sampling.Samples(folder, ["a_1"], transform, masks=masks_of, max_side=20)[0, 0]
    assert torch.equal(image.float() / 255, folder.image("a_1", 20)) and mask.shape == (15, 20)
    assert torch.equal(mask, torch.from_numpy(masks.resize_mask(folder.truth("a_1"), (15, 20))).long())


def test_images_larger_than_cocos_go_one_by_one(voc, monkeypatch):
    """Also where they become as large by --max-side."""
    folder, sizes = folders.Folder(voc), {"a_1": (3000, 4000), "a_2": (480, 640), "a_3": (3000, 4000),
                                          "a_4": (480, 640), "a_5": (480, 640)}
    monkeypatch.setattr(sampling, "image_size", lambda path: sizes[path.stem])
    for max_side, large in ((0, [[0], [2]]), (800, [[0], [2]]), (640, [[0, 2]])):
        images = sampling.WholeImages(folder, list(sizes), max_side)
        assert list(images.batches(2)) == [[1, 3], [4], *large]
