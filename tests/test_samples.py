"""Training samples: noise from the image and the epoch alone, crops of large JPEGs, shares of a batch."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import train_seg
from plumbing import folders, images, masks
from plumbing import samples as sampling
from plumbing.processes import Run


class One:
    rank, world = 0, 1
    shard = Run.shard


class Two(One):
    world = 2

    def __init__(self, rank):
        self.rank = rank


def test_noise_depends_on_picture_and_epoch_alone(voc):
    folder = folders.Folder(voc)
    ids = folder.ids("train")
    samples = sampling.Samples(folder, ids, sampling.train_transform(16, randaugment=True), seed=3)
    image, labels, number = samples[0, 1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert type(image) is torch.Tensor and labels.tolist() == [0, 1, 1] and number == 1
    before = torch.get_rng_state()
    torch.rand(3)
    again, *_ = samples[0, 1]
    assert torch.equal(image, again) and not torch.equal(image, samples[1, 1][0])
    torch.set_rng_state(before)
    samples[0, 2]
    assert torch.equal(before, torch.get_rng_state())                          # the caller's noise is untouched


def test_picture_and_mask_move_together(voc):
    """A picture that shows its own mask: after any crop and flip the two still agree."""
    folder = folders.Folder(voc)
    for id in folder.ids("train"):
        mask = folder.truth(id)
        Image.fromarray(np.repeat((mask > 0)[..., None] * np.uint8(255), 3, 2)).save(voc / "JPEGImages" / f"{id}.png")
        (voc / "JPEGImages" / f"{id}.jpg").unlink()
    samples = sampling.Samples(folder, folder.ids("train"), train_seg.transform(60, 2, 3), masks=folder.mask_path)
    image, mask, _ = samples[0, 1]
    assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 2, 3, 255}
    assert .2 < (mask > 0).float().mean() < .8
    assert ((image[0] > .5) == (mask > 0)).float().mean() > .95                 # bilinear against nearest at the border
    masks.save_mask(voc / "SegmentationClass/a_2.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="a_2.png is 5x5, its picture 40x34"):
        samples[0, 1]


def plainly(path, key, size, scale=(0.08, 1.0), randaugment=False, erase=0.0, seed=0):
    """A training sample as torchvision's own transforms make it of the whole decoded picture."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    steps = [v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.RandAugment(magnitude=9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR)] if randaugment else []
    steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    if erase:                                                                  # noise about 0 where the picture is normalised
        steps += [v2.Normalize(mean.tolist(), std.tolist()), v2.RandomErasing(erase, value="random"), v2.Normalize((-mean / std).tolist(), (1 / std).tolist())]
    with torch.random.fork_rng():
        torch.manual_seed(hash((seed, *key)) & 0x7FFFFFFFFFFFFFFF)
        image = v2.Compose(steps)(tv_tensors.Image(np.array(images.load_image(path)).transpose(2, 0, 1)))
    return image.as_subclass(torch.Tensor).clamp(0, 1)


def smooth(path, width, height, **options):
    """A large picture of three waves, as a photograph is smooth at the scale of its pixels."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 5 * y), np.sin(14 * y), np.cos(11 * x - 7 * y)], -1)
    Image.fromarray(np.uint8(127.5 + 127 * waves)).save(path, **options)


@pytest.mark.parametrize("options", [{}, dict(scale=(0.5, 0.6)), dict(randaugment=True), dict(randaugment=True, erase=0.5)], ids=str)
def test_samples_are_those_of_the_plain_form(voc, options):
    """Bit for bit wherever nothing is reduced; erasing skips a way there and back, so the last bit may differ."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(voc / "JPEGImages/a_1.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (60, 110, 3), dtype=np.uint8)).save(voc / "JPEGImages/a_2.jpg", exif=exif)     # shown 60 wide
    (voc / "JPEGImages/a_3.jpg").unlink()
    Image.fromarray(rng.integers(0, 256, (190, 380, 4), dtype=np.uint8)).save(voc / "JPEGImages/a_3.png")               # large, but no JPEG
    smooth(voc / "JPEGImages/a_4.jpg", 91, 400)
    folder = folders.Folder(voc)
    samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(48, **options))
    for epoch in range(3):
        for i, id in enumerate(samples.ids):
            mine, plain = samples[epoch, i][0], plainly(folder.image_path(id), (epoch, i), 48, **options)
            assert torch.equal(mine, plain) if not options.get("erase") else torch.allclose(mine, plain, rtol=0, atol=1e-6), (epoch, id)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_only_as_far_as_its_crop_needs(voc, monkeypatch, orientation):
    """A sixteenth of the pixels, a sixty-fourth, or all; close to the crop of the whole picture, in place to half a pixel of the sample."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(voc / "JPEGImages/a_1.jpg", 803, 605, quality=95, exif=exif)
    folder, decoded, decode = folders.Folder(voc), [], images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    for size, scale, by in ((100, (0.6, 0.8), 4), (50, (0.6, 0.8), 8), (100, (0.05, 0.06), 1)):
        samples = sampling.Samples(folder, ["a_1"], sampling.train_transform(size, scale))
        for epoch in range(3):
            mine = samples[epoch, 0][0]
            assert decoded[-1].size == (-(-803 // by), -(-605 // by))[::1 if orientation == 1 else -1]
            plain = plainly(folder.image_path("a_1"), (epoch, 0), size, scale)
            assert (mine - plain).abs().mean() < 0.02 < 0.05 < (mine - plain.flip(-1)).abs().mean()


def test_batches_are_shared_out_the_same_for_any_process_count():
    one = sampling.Batches(11, 4, One(), seed=5)
    ranks = [sampling.Batches(11, 4, Two(r), seed=5) for r in (0, 1)]
    for batches in (one, *ranks):
        batches.start(epoch=2)
    whole = list(one)
    assert len(one) == len(whole) == 2 and all(epoch == 2 for batch in whole for epoch, _ in batch)
    assert len({i for batch in whole for _, i in batch}) == 8
    for batch, a, b in zip(whole, *ranks):
        assert a == batch[::2] and b == batch[1::2]
    one.start(epoch=2, skip=1)
    assert list(one) == whole[1:]                                              # resumed inside an epoch
    one.start(epoch=3)
    assert list(one) != whole
    assert len(sampling.Batches(3, 64, One())) == 1 and len(list(sampling.Batches(3, 64, One()))[0]) == 3
