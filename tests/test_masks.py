"""Masks: a palette PNG gives back what was written, other PNGs the same indices, bad ones are refused."""
import numpy as np
import pytest
from PIL import Image

from plumbing import masks


def test_masks_round_trip_in_voc_colours(tmp_path):
    mask = np.random.default_rng(0).choice([0, 1, 20, 255], (13, 17)).astype(np.uint8)
    masks.save_mask(tmp_path / "m.png", mask)
    image = Image.open(tmp_path / "m.png")
    assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert image.getpalette()[60:63] == [0, 64, 128] and image.getpalette()[765:] == [224, 224, 192]
    assert np.array_equal(masks.load_mask(tmp_path / "m.png", 20), mask)
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]      # nothing beside it
    others = {"colour": image.convert("RGB"), "alpha": image.convert("RGBA"),
              "grey": Image.fromarray(mask), "16 bits": Image.fromarray(mask.astype(np.uint16))}
    for name, other in others.items():
        other.save(tmp_path / "other.png")
        assert np.array_equal(masks.load_mask(tmp_path / "other.png", 20), mask), name


def test_bad_masks_are_refused_by_name(tmp_path):
    path = tmp_path / "m.png"

    def refused(words, num_classes=None, error=ValueError):
        with pytest.raises(error, match=words):
            masks.load_mask(path, num_classes)

    refused("m.png is missing", error=FileNotFoundError)
    masks.save_mask(path, np.full((2, 2), 21))
    refused("label 21, classes.txt has 20", 20)
    for values, words in ((np.full((2, 2, 3), 7, np.uint8), "not VOC's palette"),
                          (np.full((2, 2), 300, np.uint16), "label 300"),
                          (np.full((2, 2, 2), 7, np.uint8), "mode LA")):
        Image.fromarray(values).save(path)
        refused(words)
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path, format="JPEG")     # lossy: no mask
    refused("m.png is not a readable mask")
    path.write_bytes(b"\x89PNG torn")
    refused("m.png is not a readable mask")
    with pytest.raises(ValueError, match="values 0..255"):
        masks.save_mask(path, np.full((2, 2), 256))
