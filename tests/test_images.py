"""Images: any file is decoded as a viewer shows it, its size comes from the header, a bad one is refused."""
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from plumbing import images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def written(path, image, **options):
    image.save(path, **options)
    return np.asarray(images.load_image(path))


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def test_ordinary_modes(tmp_path):
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
    grey = np.stack([RAMP] * 3, -1)
    assert np.array_equal(written(tmp_path / "a.png", Image.fromarray(rgb)), rgb)
    assert np.array_equal(written(tmp_path / "b.png", Image.fromarray(RAMP)), grey)
    deep = RAMP.astype(np.uint16)                                             # 16 bits
    assert np.array_equal(written(tmp_path / "c.png", Image.fromarray(257 * deep)), grey)
    assert written(tmp_path / "d.png", Image.fromarray(deep)).max() == 1      # dark
    assert np.array_equal(written(tmp_path / "e.png", Image.fromarray(RAMP > 127)), 255 * (grey > 127))
    indexed = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(written(tmp_path / "f.png", indexed), np.asarray(indexed.convert("RGB")))
    cmyk = written(tmp_path / "g.jpg", Image.fromarray(rgb).convert("CMYK"), quality=95)
    assert cmyk.shape == (16, 16, 3) and abs(cmyk.astype(int) - rgb).mean() < 12
    assert np.array_equal(written(tmp_path / "h.jpg", Image.fromarray(rgb), format="PNG"), rgb)


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    white = [[[255] * 3, [127] * 3, [0] * 3]]
    assert written(tmp_path / "a.png", Image.fromarray(pixels)).tolist() == white
    assert written(tmp_path / "b.png", Image.fromarray(pixels[..., 2:])).tolist() == white


@pytest.mark.parametrize("mode,ending,options", [
    ("RGB", "jpg", {}), ("CMYK", "jpg", {}), ("RGBA", "png", {}),
    ("P", "png", {"transparency": bytes(range(0, 240, 30))})])
def test_images_are_turned_as_pillow_turns_them(tmp_path, mode, ending, options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (9, 14), dtype=np.uint8)))
    path, upright = tmp_path / f"a.{ending}", tmp_path / "b.png"
    for flag in range(1, 9):
        image.save(path, exif=exif(flag), **options)
        with Image.open(path) as file:
            turned = ImageOps.exif_transpose(file)
        turned.info.pop("exif", None)
        turned.convert("RGB" if mode == "CMYK" else turned.mode).save(upright, **options)
        found = images.load_image(path)
        assert found.mode == "RGB" and np.array_equal(found, images.load_image(upright)), flag
        assert images.image_size(path) == found.size[::-1] == ((9, 14) if flag < 5 else (14, 9))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_or_written_spoils_no_image(tmp_path):
    path, image = tmp_path / "a.jpg", Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    turn = struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0)
    fraction = struct.pack("<HHIf", 0x0100, 11, 1, 1.5)                       # a width that is a fraction
    header = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    image.save(path, exif=header + fraction + turn)
    with Image.open(path) as file, pytest.raises((struct.error, AttributeError)):
        ImageOps.exif_transpose(file)
    assert images.image_size(path) == images.load_image(path).size[::-1] == (20, 10)
    for block in (b"no header of TIFF's", b"II*\0\xff\xff\xff\xff", exif(9).tobytes()[6:]):
        image.save(path, exif=b"Exif\0\0" + block)
        assert images.image_size(path) == images.load_image(path).size[::-1] == (10, 20), block


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path):
    Image.new("RGB", (803, 605)).save(tmp_path / "a.jpg", exif=exif(6))       # shown 605 wide, 803 high
    for least, size in (((803, 605), (605, 803)), ((400, 100), (303, 402)), ((101, 75), (152, 201)),
                        ((100, 75), (76, 101))):
        assert images.load_image(tmp_path / "a.jpg", least).size == size


def test_unreadable_images(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RAMP).resize((99, 99)).save(path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"               # Pillow gives it to Ghostscript
    torn = path.read_bytes()[:500]
    for content, word in ((torn, "truncated"), (b"", "cannot identify"),
                          (b"GIF89a nonsense", ""), (eps, "cannot identify")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.jpg is not a readable image .*{word}.*: replace") as error:
            images.load_image(path, (9, 9))
        assert "\n" not in str(error.value)
    Image.new("1", (20_000, 20_000)).save(path, format="PNG")
    with pytest.raises(ValueError, match="a.jpg is not a readable image .*400000000 pixels"):
        images.image_size(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="a.jpg is not a file"):
        images.load_image(path)
