"""Files of segments: what is written is read, other layouts give the same masks, bad files are refused."""
import itertools
import os
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from plumbing.segments import (
    label_segments,
    load_levels,
    load_segments,
    save_segments,
    segment,
    segments_path,
)

H, W = 26, 34


def blobs(n, seed=0, size=(H, W)):
    """n overlapping boolean masks (n, H, W), some with holes, some tiny, one of the whole image."""
    rng = np.random.default_rng(seed)
    found = np.zeros((n, *size), bool)
    for mask in found:
        y, x = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
        h, w = rng.integers(2, 14, 2)
        mask[y:y + h, x:x + w] = rng.random((min(h, size[0] - y), min(w, size[1] - x))) < 0.8
        mask[y, x] = True
    found[-1] = True
    return found


def packed(found, levels=None):
    return [segment(mask, 0 if levels is None else levels[n]) for n, mask in enumerate(found)]


def whole(segment, size=(H, W)):
    mask = np.zeros(size, bool)
    mask[segment.where] = segment.mask
    return mask


def same_masks(segments, masks):
    return all(np.array_equal(whole(s), mask) for s, mask in zip(segments, masks, strict=True))


# ---------------------------------------------------------------- our file

def test_a_segment_is_its_mask_in_the_tightest_box():
    for mask, s in zip(blobs(12), packed(blobs(12))):
        y, x = mask.nonzero()
        assert s.box == (y.min(), x.min(), y.max() + 1, x.max() + 1) and np.array_equal(whole(s), mask)
        assert s.bits.nbytes == -(-s.mask.size // 8)
    assert segment(blobs(1)[0][:5, :7], corner=(3, 4)).box == (3, 4, 8, 11)


def test_a_label_map_becomes_one_segment_a_number():
    labels = np.random.default_rng(0).integers(0, 5, (H, W)) * 100
    labels[3:5, 7] = 600                                                    # its box does not begin at 0, 0
    found = label_segments(labels)
    assert same_masks(found, [labels == value for value in (0, 100, 200, 300, 400, 600)])
    assert found[-1].box == (3, 7, 5, 8)


@pytest.mark.parametrize("n", [0, 1, 9])
def test_the_file_gives_back_what_was_written(tmp_path, n):
    facts = lambda s: (s.box, s.level, s.score, s.stability, s.bits.tobytes())  # noqa: E731
    segments = packed(blobs(n) if n else [])
    segments = [s._replace(level=i % 3, score=i / 8, stability=i / 16) for i, s in enumerate(segments)]
    save_segments(tmp_path / "a.npz", (H, W), segments)
    back = load_segments(segments_path(tmp_path, "a"), (H, W))
    assert list(map(facts, back)) == list(map(facts, segments))
    assert load_levels(tmp_path / "a.npz").tolist() == [s.level for s in segments]
    assert segments_path(tmp_path, "b") is None


@pytest.mark.parametrize("other,word", [
    ({"bits": np.array([{}], dtype=object)}, "allow_pickle"), ({"level": None}, "level"),
    ({"size": np.array([9, 9], np.int32)}, "9x9"), ({"level": np.full(3, 3, np.uint8)}, "level"),
    ({"level": np.zeros(2, np.uint8)}, "shorter"), ({"bits": np.zeros(5, np.uint8)}, "boxes"),
    ({"boxes": np.array([[0, 0, 99, 1]] * 3, np.int32), "bits": np.zeros(39, np.uint8)}, "boxes"),
    ({"boxes": np.array([[5, 5, 5, 9]] * 3, np.int32), "bits": np.zeros(0, np.uint8)}, "boxes"),
    ({"boxes": np.array([[-1, 0, 1, 4]] * 3, np.int32), "bits": np.zeros(3, np.uint8)}, "boxes")])
def test_files_that_do_not_fit_are_refused(tmp_path, other, word):
    save_segments(tmp_path / "a.npz", (H, W), packed(blobs(3)))
    with np.load(tmp_path / "a.npz") as file:
        content = {**file, **other}
    np.savez(tmp_path / "a.npz", **{name: value for name, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=f"a.npz holds no segments.*{word}"):
        load_segments(tmp_path / "a.npz", (H, W))


def test_a_torn_file_is_refused(tmp_path):
    save_segments(tmp_path / "a.npz", (H, W), packed(blobs(3)))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    for read in (load_levels, lambda path: load_segments(path, (H, W))):
        with pytest.raises(ValueError, match="a.npz holds no segments"):
            read(tmp_path / "a.npz")


# ---------------------------------------------------------------- other projects' layouts

def run_lengths(mask):
    """Down the columns, first the pixels outside."""
    counts = [len(list(run)) for _, run in itertools.groupby(mask.T.ravel())]
    return {"size": list(mask.shape), "counts": counts if not mask[0, 0] else [0, *counts]}


def put_fma(path, found, levels):
    """As FMA-WSSS pickles: a list and an empty dict of its own classes, which are not there later."""
    modules = {}
    for module, name, base in (("libs.sam.custom_sam.sam_auto", "SamAnns", list),
                               ("alchemy_cat.py_tools.adict", "ADict", dict)):
        for part in itertools.accumulate(module.split("."), "{}.{}".format):
            modules[part] = types.ModuleType(part)
        setattr(modules[module], name, type(name, (base,), {"__module__": module}))
    sys.modules.update(modules)
    anns = modules["libs.sam.custom_sam.sam_auto"].SamAnns(
        {"segmentation": run_lengths(mask), "level": level, "predicted_iou": 0.5, "stability_score": 0.25}
        for mask, level in zip(found, levels))
    anns.data = modules["alchemy_cat.py_tools.adict"].ADict()
    path.write_bytes(pickle.dumps(anns))
    for part in modules:
        del sys.modules[part]


def test_pickles_of_fma_and_of_sam(tmp_path):
    found = blobs(6)
    put_fma(tmp_path / "a.pkl", found, [0, 1, 2, 0, 1, 2])
    back = load_segments(segments_path(tmp_path, "a"), (H, W))
    assert same_masks(back, found) and [s.level for s in back] == [0, 1, 2, 0, 1, 2]
    assert back[0].score == 0.5 and back[0].stability == 0.25
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([{"segmentation": mask} for mask in found]))
    assert same_masks(load_segments(segments_path(tmp_path, "b"), (H, W)), found)


def test_folders_of_masks_and_label_maps(tmp_path):
    found = blobs(6)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metadata.csv").write_text("id,area\n")
    for n, mask in enumerate([*found, np.zeros((H, W), bool)]):                # an empty one is no segment
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "a" / f"{n}.png")
    assert same_masks(load_segments(segments_path(tmp_path, "a"), (H, W)), found)
    labels = np.arange(H * W).reshape(H, W) // 300 * 1000
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "b.png")
    back = load_segments(segments_path(tmp_path, "b"), (H, W))
    assert same_masks(back, [labels == value for value in (0, 1000, 2000)])


@pytest.mark.parametrize("content,word", [
    (5, "no list but int"), ([{"segmentation": np.ones((H, W + 1), bool)}], f"{W + 1}x{H}"),
    ([{"segmentation": {"size": [H, W], "counts": [5, 5]}}], "do not fill"),
    ([{"segmentation": {"size": [W, H], "counts": [5, 5]}}], f"{H}x{W}"),
    ([{"segmentation": {"size": [H, W], "counts": "Ud0j0"}}], "coco_rle.*uncompressed_rle"),
    ([{"segmentation": {"size": [H, W], "counts": b"Ud0j0"}}], "coco_rle.*uncompressed_rle"),
    ([{"segmentation": np.ones((H, W), bool), "level": 3}], "level"), ([{"area": 3}], "segmentation")])
def test_bad_pickles_are_refused(tmp_path, content, word):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"a.pkl holds no segments of its image.*{word}"):
        load_segments(segments_path(tmp_path, "a"), (H, W))


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bombed"),)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"segmentation": Evil()}]))
    with pytest.raises(ValueError, match="a.pkl holds no segments.*mkdir"):
        load_segments(segments_path(tmp_path, "a"), (H, W))
    assert not (tmp_path / "bombed").exists()


def test_bad_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(tmp_path / "a" / "grey.png")
    Image.new("RGB", (W, H)).save(tmp_path / "b.png")
    Image.new("L", (W, H + 1)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"\x89PNG torn")
    words = {"a": "grey.png is not black and white", "b": "mode RGB", "c": f"{W}x{H + 1}", "d": ""}
    for id, word in words.items():
        with pytest.raises(ValueError, match=f"{id}(.png)? holds no segments of its image.*{word}"):
            load_segments(segments_path(tmp_path, id), (H, W))
