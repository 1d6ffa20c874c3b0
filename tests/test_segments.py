"""Segments and their vote: the rules against loops over pixels, no trace of an order, every layout that is read, and SAM's masks against one point at a time."""
import importlib.util
import itertools
import json
import os
import pickle
import shutil
import sys
import types

import make_pseudo
import make_segments
import numpy as np
import pytest
import torch
from conftest import LABELS, call, refused
from PIL import Image
from test_pseudo import masks, put_maps

from hosts import segments
from plumbing import files as plain_files, folders, foreign as others, maps as map_files, processes
from hosts.segments import label_segments, load_levels, load_segments, save_segments, segment, segments_of

H, W = 26, 34
SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


def blobs(n, seed=0, size=(H, W)):
    """n overlapping boolean masks (n, H, W), some with holes, some tiny, one of the whole picture."""
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


# ---------------------------------------------------------------- the file

def test_a_segment_is_its_mask_in_the_tightest_box():
    for mask, s in zip(blobs(12), packed(blobs(12))):
        y, x = mask.nonzero()
        assert s.box == (y.min(), x.min(), y.max() + 1, x.max() + 1) and np.array_equal(whole(s), mask)
        assert s.bits.nbytes == -(-s.mask.size // 8)
    moved = segment(blobs(1)[0][:5, :7], corner=(3, 4))
    assert moved.box == (3, 4, 8, 11)


def test_a_label_map_becomes_one_segment_a_number():
    labels = np.random.default_rng(0).integers(0, 5, (H, W)) * 100
    found = label_segments(labels)
    assert [np.array_equal(whole(s), labels == value) for s, value in zip(found, (0, 100, 200, 300, 400))] == [True] * 5 and len(found) == 5


@pytest.mark.parametrize("n", [0, 1, 9])
def test_the_file_gives_back_what_was_written(tmp_path, n):
    segments = [s._replace(level=i % 3, score=i / 8, stability=i / 16) for i, s in enumerate(packed(blobs(n) if n else []))]
    save_segments(tmp_path / "a.npz", (H, W), segments)
    back = load_segments(segments_of(tmp_path, "a"), (H, W))
    assert [(s.box, s.level, s.score, s.stability, s.bits.tobytes()) for s in back] == [(s.box, s.level, s.score, s.stability, s.bits.tobytes()) for s in segments]
    assert segments_of(tmp_path, "b") is None and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def spoilt(path, **other):
    save_segments(path, (H, W), packed(blobs(3)))
    with np.load(path) as file:
        content = {**file, **other}
    np.savez(path, **{k: v for k, v in content.items() if v is not None})


@pytest.mark.parametrize("other,word", [
    ({"bits": np.array([{}], dtype=object)}, "allow_pickle"), ({"level": None}, "level"), ({"size": np.array([9, 9], np.int32)}, "9x9"),
    ({"size": np.zeros((2, 2), np.int32)}, "pixels"), ({"bits": np.zeros(5, np.uint8)}, "boxes"), ({"boxes": np.array([[0, 0, 99, 9]] * 3, np.int32)}, "boxes"),
    ({"boxes": np.array([[5, 5, 5, 9]] * 3, np.int32)}, "boxes"), ({"boxes": np.array([[-1, 0, 5, 9]] * 3, np.int32)}, "boxes"), ({"level": np.zeros(2, np.uint8)}, "arrays"),
    ({"boxes": np.zeros((3, 4), np.float32)}, "arrays"), ({"boxes": np.array([[0, 0, 2, 4]] * 3, np.int32), "bits": np.array([1, 0, 1], np.uint8)}, "empty"),
    ({"level": np.full(3, 3, np.uint8)}, "level")])
def test_files_that_do_not_fit_are_refused(tmp_path, other, word):
    spoilt(tmp_path / "a.npz", **other)
    with pytest.raises(ValueError, match=f"a.npz holds no segments.*{word}"):
        load_segments(tmp_path / "a.npz", (H, W))


def test_a_torn_file_and_one_that_runs_code_are_refused(tmp_path):
    save_segments(tmp_path / "a.npz", (H, W), packed(blobs(3)))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="a.npz holds no segments"):
        load_segments(tmp_path / "a.npz", (H, W))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/run",)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([{"segmentation": Evil()}]))
    with pytest.raises(ValueError, match="b.pkl holds no segments.*system"):
        load_segments(segments_of(tmp_path, "b"), (H, W), others.FmaReader)
    with pytest.raises(ValueError, match="b.pkl holds no segments.*no unpickler"):
        load_segments(segments_of(tmp_path, "b"), (H, W))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name,dtype,most", [("bits", np.uint8, 512), ("boxes", np.int32, 64), ("level", np.uint8, 64), ("score", np.float32, 64),
                                              ("stability", np.float32, 64), ("size", np.int32, 64)])
def test_a_few_bytes_that_unpack_to_gigabytes_are_not_unpacked(tmp_path, monkeypatch, name, dtype, most):
    """A file's own word for its size is compared with its picture's; nothing is read."""
    spoilt(tmp_path / "a.npz", **{name: np.zeros(most * H * W // np.dtype(dtype).itemsize + 1024, dtype)})
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(ValueError, match=f"a.npz holds no segments.*its {name} are larger than"):
        load_segments(tmp_path / "a.npz", (H, W))


def test_what_is_written_of_the_smallest_picture_and_of_many_segments_is_read(tmp_path):
    one = [segment(np.ones((1, 1), bool))]
    save_segments(tmp_path / "a.npz", (1, 1), one * 9)
    assert len(load_segments(tmp_path / "a.npz", (1, 1))) == 9
    save_segments(tmp_path / "b.npz", (H, W), [segment(np.ones((H, W), bool))] * 2000)
    assert len(load_segments(tmp_path / "b.npz", (H, W))) == 2000


def test_levels_are_read_alone(tmp_path, monkeypatch):
    save_segments(tmp_path / "a.npz", (H, W), packed(blobs(4), [2, 0, 1, 2]))
    save_segments(tmp_path / "b.npz", (H, W), [])
    monkeypatch.setattr(np, "unpackbits", None)
    assert [make_segments.count(load_levels(tmp_path / f"{id}.npz")).tolist() for id in "ab"] == [[1, 1, 2, 0], [0, 0, 0, 1]]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="a.npz holds no segments"):
        load_levels(tmp_path / "a.npz")


# ---------------------------------------------------------------- other projects' layouts

def run_lengths(mask):
    """Down the columns, first the pixels outside."""
    counts = [len(list(run)) for _, run in itertools.groupby(mask.T.ravel())]
    return {"size": list(mask.shape), "counts": counts if not mask[0, 0] else [0, *counts]}


def put_fma(path, found, levels):
    """As FMA-WSSS pickles: a list and an empty dict of classes of its own, which are not there when it is read."""
    modules = {}
    for module, name, base in (("libs.sam.custom_sam.sam_auto", "SamAnns", list), ("alchemy_cat.py_tools.adict", "ADict", dict)):
        for part in itertools.accumulate(module.split("."), "{}.{}".format):
            modules[part] = types.ModuleType(part)
        setattr(modules[module], name, type(name, (base,), {"__module__": module}))
    sys.modules.update(modules)
    anns = modules["libs.sam.custom_sam.sam_auto"].SamAnns(
        {"segmentation": run_lengths(mask), "level": level, "predicted_iou": 0.5, "stability_score": 0.25, "area": int(mask.sum())} for mask, level in zip(found, levels))
    anns.data = modules["alchemy_cat.py_tools.adict"].ADict()
    path.write_bytes(pickle.dumps(anns))
    for part in modules:
        del sys.modules[part]


def test_other_layouts_are_read(tmp_path):
    found = blobs(6)
    put_fma(tmp_path / "a.pkl", found, [0, 1, 2, 0, 1, 2])
    back = load_segments(segments_of(tmp_path, "a"), (H, W), others.FmaReader)
    assert all(np.array_equal(whole(s), mask) for s, mask in zip(back, found, strict=True)) and [s.level for s in back] == [0, 1, 2, 0, 1, 2]
    assert back[0].score == 0.5 and back[0].stability == 0.25
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps([{"segmentation": mask} for mask in found]))              # SAM's own generator
    assert all(np.array_equal(whole(s), mask) for s, mask in zip(load_segments(tmp_path / "plain.pkl", (H, W), others.FmaReader), found, strict=True))

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metadata.csv").write_text("id,area\n")
    for n, mask in enumerate([*found, np.zeros((H, W), bool)]):                                                 # an empty one is no segment
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "b" / f"{n}.png")
    back = load_segments(segments_of(tmp_path, "b"), (H, W))
    assert all(np.array_equal(whole(s), mask) for s, mask in zip(back, found, strict=True))

    labels = np.arange(H * W).reshape(H, W) // 300 * 1000
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "c.png")
    back = load_segments(segments_of(tmp_path, "c"), (H, W))
    assert [np.array_equal(whole(s), labels == value) for s, value in zip(back, (0, 1000, 2000), strict=True)] == [True] * 3


def test_layouts_that_are_none_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(tmp_path / "a" / "grey.png")
    Image.new("RGB", (W, H)).save(tmp_path / "b.png")
    Image.new("L", (W, H + 1)).save(tmp_path / "c.png")
    lengths = lambda counts: {"segmentation": {"size": [H, W], "counts": counts}}
    for id, content in (("d", [lengths([5, 5])]), ("e", [{"segmentation": np.ones((H, W + 1), bool)}]), ("f", 5), ("g", [lengths("Ud0j0")]), ("h", [lengths(b"Ud0j0")]),
                        ("i", [{"segmentation": np.ones((H, W), bool), "level": 3}]), ("j", [{"segmentation": np.ones((H, W), bool), "level": -1}])):
        (tmp_path / f"{id}.pkl").write_bytes(pickle.dumps(content))
    for id, word in (("a", "grey.png is not black and white"), ("b", "mode RGB"), ("c", f"{W}x{H + 1}"), ("d", "run lengths"), ("e", f"{W + 1}x{H}"), ("f", "int"),
                     ("g", "coco_rle.*uncompressed_rle"), ("h", "coco_rle.*uncompressed_rle"), ("i", "level"), ("j", "level")):
        with pytest.raises(ValueError, match=word):
            load_segments(segments_of(tmp_path, id), (H, W), others.FmaReader)


def test_masks_that_are_too_many_together_are_refused(tmp_path, monkeypatch):
    """A pickle of a few bytes can name one mask many times, and a label map can give each number the whole picture as its box."""
    monkeypatch.setattr(segments, "MOST", (4096, 10 * H * W // 8))
    one = {"segmentation": {"size": [H, W], "counts": [0, H * W]}}
    (tmp_path / "b").mkdir()
    for n in (8, 11):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([one] * n))
        for k in range(n):
            Image.new("1", (W, H), 1).save(tmp_path / "b" / f"{k}.png")
        Image.fromarray((np.arange(H * W) % n).astype(np.uint8).reshape(H, W)).save(tmp_path / "c.png")
        for id in "abc":
            if n == 8:
                assert len(load_segments(segments_of(tmp_path, id), (H, W), others.FmaReader)) == 8
                continue
            with pytest.raises(ValueError, match="its masks together are larger than any"):
                load_segments(segments_of(tmp_path, id), (H, W), others.FmaReader)
    monkeypatch.setattr(segments, "WALKED", 10 * H * W)
    monkeypatch.setattr(segments, "checked", None)                                                              # before any mask is made
    for id in "ab":
        with pytest.raises(ValueError, match=f"11 masks of {W}x{H} are more than"):
            load_segments(segments_of(tmp_path, id), (H, W), others.FmaReader)


# ---------------------------------------------------------------- the vote

def slow_sams(found, levels, maps, power):
    """Every pixel asks all segments that hold it for the best (level, score, smallness, place)."""
    S, P = len(found), len(maps)
    mean = [[np.mean([max(maps[p, y, x], 0) for y, x in zip(*found[s].nonzero())], dtype=np.float64) for p in range(P)] for s in range(S)]
    score = np.zeros((S, P + 1))
    for p in range(P):
        column = [mean[s][p] for s in range(S)]
        for s in range(S):
            score[s, p + 1] = (mean[s][p] - min(column)) / (max(column) - min(column)) if max(column) - min(column) >= 1e-6 else mean[s][p]
    score[:, 0] = (1 - score[:, 1:].max(1)) ** power
    out = np.zeros(maps.shape[1:], int)
    for y, x in np.ndindex(*out.shape):
        key = lambda s: (levels[s], score[s].max(), -found[s].sum(), segment(found[s]).box)
        out[y, x] = max((s for s in range(S) if found[s, y, x]), key=key, default=None) if found[:, y, x].any() else -1
    return np.where(out < 0, 0, score.argmax(1)[out])


def slow_sepl(found, mask):
    out, key = mask.copy(), np.full(mask.shape, -1.0)
    for s in found:
        votes = {}
        for c in set(mask.ravel()) - {0, 255}:
            shared = (s & (mask == c)).sum()
            if shared / s.sum() > 0.5 or shared / (mask == c).sum() >= 0.85:
                votes[c] = shared
        if votes:
            c = max(sorted(votes), key=votes.get)
            over = s & (votes[c] / s.sum() > key)
            out[over], key[over] = c, votes[c] / s.sum()
    return out


@pytest.mark.parametrize("classes", [1, 3])
def test_sams_is_its_rule_and_knows_no_order(classes):
    found, rng = blobs(15), np.random.default_rng(classes)
    found[-1] &= rng.random((H, W)) < 0.97                                          # some pixels are in no segment
    levels = rng.integers(0, 3, 15).tolist()
    maps = rng.random((classes, H, W)).astype(np.float32) - 0.2
    segments = packed(found, levels)
    want = slow_sams(found, levels, maps, 0.6)
    assert len(np.unique(want)) == classes + 1 and np.array_equal(make_pseudo.sams(segments, maps, 0.6), want)
    for _ in range(4):
        assert np.array_equal(make_pseudo.sams([segments[i] for i in rng.permutation(15)], maps, 0.6), want)
    assert not np.array_equal(make_pseudo.sams([s._replace(level=0) for s in segments], maps, 0.6), want)


def test_means_that_are_all_equal_are_scores_as_they_are():
    """A single segment, or a flat map: min-max scaling has nothing to say there."""
    ones, halves = np.ones((2, 1, H, W), np.float32) * np.float32([1, 0.5])[:, None, None, None]
    full, left, right = np.ones((3, H, W), bool)
    left[:, 17:], right[:, :17] = False, False
    for found in ([full], [left, right]):
        draw = lambda maps, power: make_pseudo.sams(packed(found), maps, power)
        assert (draw(ones, 0.6) == 1).all() and not draw(0 * ones, 0.6).any()
        assert not draw(halves, 0.6).any() and (draw(halves, 2) == 1).all()                                         # .5 against .66, and against .25
        assert (draw(ones + 1e-6, 0.6) == 1).all()                                                                  # no root of a number below 0
        assert (draw(np.concatenate([0.7 * ones, 0.8 * ones]), 0.6) == 2).all()
    coarse = map_files.resize_maps(torch.full((1, 4, 5), 0.3), (H, W)).numpy()
    noisy = coarse + 1e-7 * np.arange(W, dtype=np.float32)                                                          # rounding, on one side more
    assert not make_pseudo.sams(packed([left, right]), coarse, 0.6).any() and not make_pseudo.sams(packed([left, right]), noisy * 0.1, 0.6).any()
    slope = np.where(right, 0.3, 0.3 - 1e-4)[None].astype(np.float32)                                               # a difference: scaled, as published
    assert np.array_equal(make_pseudo.sams(packed([left, right]), slope, 0.6), right)
    mixed = np.stack([np.where(left, 0.6, 0.1), np.full((H, W), 0.2)]).astype(np.float32)                           # one class is flat, the other is scaled
    assert np.array_equal(make_pseudo.sams(packed([left, right]), mixed, 0.6), left)                                # .2 against .87
    assert np.array_equal(make_pseudo.sams(packed([left, right]), mixed, 9), np.where(left, 1, 2))                  # .2 against .13


def test_equal_scores_are_painted_by_size_and_place_not_by_order():
    """Segments of one class each under maps of ones and zeros: all scores are 1."""
    maps = np.zeros((2, H, W), np.float32)
    maps[0, :, :9], maps[1, :, 9:18] = 1, 1
    found = np.zeros((4, H, W), bool)
    found[0, 2:9, 2:9], found[1, 4:7, 9:12], found[2, 4:9, 12:17], found[3, :, 20:] = True, True, True, True     # one, the other, the other, background
    maps[0, 5, 10:15] = 0
    for a, b in ((1, 2), (2, 1)):
        wide = found[a].copy()
        wide[4:9, 9:17] = True                                                      # the larger one now holds the smaller
        segments = packed([found[0], wide, found[b], found[3]])
        drawn = [make_pseudo.sams([segments[i] for i in order], maps, 0.6) for order in itertools.permutations(range(4))]
        assert all(np.array_equal(drawn[0], each) for each in drawn) and set(np.unique(drawn[0])) == {0, 1, 2}
    maps[:] = 0
    maps[0, :9], maps[1, 9:] = 1, 1                                                 # a pair of the same size, of two classes, with the same scores over each other
    pair = np.zeros((2, H, W), bool)
    pair[0, 2:9, 3:6], pair[1, 9:16, 3:6] = True, True
    pair[0, 9], pair[1, 8] = pair[1, 9], pair[0, 8]
    pair[0, 9, 3:6] = pair[1, 8, 3:6] = True
    one, two = (make_pseudo.sams(packed(order), maps, 0.6) for order in (pair, pair[::-1]))
    assert np.array_equal(one, two) and {1, 2} == set(one[8:10, 3])  | set(one[3:15, 3]) - {0}


def test_what_is_equal_is_painted_by_size():
    small, large = np.zeros((2, H, W), bool)
    small[2:5, 2:5], large[2:9, 2:9] = True, True
    for order in ([small, large], [large, small]):
        rows = [1 if mask is small else 2 for mask in order]
        drawn = make_pseudo.paint(packed(order), rows, [0, 0], np.zeros((H, W), int))
        assert np.array_equal(drawn, np.where(small, 1, np.where(large, 2, 0)))


def test_what_is_equal_in_size_and_place_is_painted_by_row():
    """Two shapes in one box, of as many pixels: whichever comes first, the later row is on top."""
    shapes = np.zeros((2, H, W), bool)
    shapes[:, 3:7, 4:8] = np.eye(4, dtype=bool), np.eye(4, dtype=bool)[::-1]
    shapes[:, 3:7, 4] = shapes[:, 3, 4:8] = shapes[:, 6, 4:8] = True
    assert shapes[0].sum() == shapes[1].sum() and (shapes[0] != shapes[1]).any()
    for order in ((0, 1), (1, 0)):
        drawn = make_pseudo.paint(packed(shapes[list(order)]), [order[0] + 1, order[1] + 1], [0, 0], np.zeros((H, W), int))
        assert np.array_equal(drawn, np.where(shapes[1], 2, shapes[0]))


def test_sams_paints_the_whole_over_its_part():
    maps = np.zeros((1, 6, 6), np.float32)
    maps[0, :3] = 1
    part, whole_ = np.zeros((2, 6, 6), bool)
    part[:3], whole_[:5] = True, True
    corner = np.zeros((6, 6), bool)
    corner[4:, 4:] = True
    draw = lambda levels: make_pseudo.sams(packed([part, whole_, corner], levels), maps, 2.0)
    assert draw([0, 2, 0])[:5, :4].all() and not draw([0, 2, 0])[5].any() and draw([0, 2, 0])[4, 5] == 1         # .6 beats (1 - .6)^2: all of the whole
    assert draw([2, 0, 2])[:3].all() and draw([2, 0, 2])[4, 5] == 0                                              # background is painted, too


def test_sepl_is_its_rule_and_knows_no_order():
    found, rng = blobs(15)[:-1], np.random.default_rng(3)
    mask = np.kron(rng.integers(0, 4, (4, 5)), np.ones((7, 7), int))[:H, :W].astype(np.uint8)
    mask[0, :5] = 255
    want = slow_sepl(found, mask)
    assert (want != mask).any() and np.array_equal(make_pseudo.sepl(packed(found), mask), want)
    for _ in range(4):
        assert np.array_equal(make_pseudo.sepl([packed(found)[i] for i in rng.permutation(len(found))], mask), want)

    mask[:] = 0
    mask[:, :10], mask[:, 10:20] = 1, 2
    sure, small = np.zeros((2, H, W), bool)
    sure[:10, :11], small[:3, 9:12] = True, True                                    # 10 of 11 columns, and 2 of 3: the larger is on top
    drawn = make_pseudo.sepl(packed([sure, small]), mask)
    assert (drawn[:3, :11] == 1).all() and (drawn[:3, 11] == 2).all() and np.array_equal(drawn, slow_sepl([small, sure], mask))

    mask[:] = 0
    mask[2:5, 2:5] = 1                                                              # 9 pixels
    around = np.zeros((H, W), bool)
    around[2:12, 2:12] = True
    around[4, 3:5] = False                                                          # it holds 7 of 9: not .85
    assert np.array_equal(make_pseudo.sepl(packed([around]), mask), mask)
    around[4, 3] = True                                                             # 8 of 9
    assert np.array_equal(make_pseudo.sepl(packed([around]), mask) == 1, around | (mask == 1))


def test_sepl_asks_for_more_than_half_of_a_class():
    mask, s = np.zeros((H, W), np.uint8), np.zeros((H, W), bool)
    mask[:, :10], s[:4, 8:12] = 1, True                                             # 8 of its 16 pixels, and 8 of the class's 260
    assert np.array_equal(make_pseudo.sepl(packed([s]), mask), mask)
    s[0, 11] = False                                                                # 8 of 15
    assert np.array_equal(make_pseudo.sepl(packed([s]), mask), np.where(s, 1, mask))
    mask[mask == 1] = 255                                                           # unsure is no class: neither where it covers most of a segment,
    assert np.array_equal(make_pseudo.sepl(packed([s, s[::-1]]), mask), mask)
    mask[:], mask[1, 9] = 0, 255                                                    # nor where a segment holds it all; nor is the background
    assert np.array_equal(make_pseudo.sepl(packed([s]), mask), mask)
    mask[1, 9], mask[8:12, 20:24] = 2, 1
    s[8:12, 20:24] = True                                                           # two classes that it holds: the one that covers more
    assert np.array_equal(make_pseudo.sepl(packed([s]), mask), s)


# ---------------------------------------------------------------- make_pseudo.py --segments

@pytest.fixture
def world(voc, tmp_path):
    """Pictures, maps and segments: superpixels of the truth's own outlines for most, none for a_5."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    (out / "segments").mkdir(parents=True)
    for n, id in enumerate(LABELS):
        truth = folder.truth(id)
        labels = truth.astype(int) * 100 + np.arange(truth.size).reshape(truth.shape) // 500
        save_segments(out / "segments" / f"{id}.npz", truth.shape, [s._replace(level=n % 3) for s in label_segments(labels)] if id != "a_5" else [])
    (out / "segments/recipe.json").write_text('{"fingerprint": "first", "args": {"source": "slic"}}')
    put_maps(voc, out)                                                              # removes the truth: masks are made without it
    return voc, out


def test_the_command_votes(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED, "--threshold", "0.3", "--preset", "deeplab"]
    for name, more in (("plain", ["--no-crf"]), ("crf", []), ("sams", ["--segments", out / "segments"]),
                       ("sams_crf", ["--segments", out / "segments", "--crf", "--power", "1.5"]), ("sepl", ["--segments", out / "segments", "--vote", "sepl"])):
        done = call("make_pseudo.py", *flags, "--pseudo", name, *more)
        assert done.returncode == 0, done.stderr
        assert ("1 without segments" in done.stdout) == name.startswith("s"), done.stdout
    folder = folders.Folder(voc)
    for id, present in LABELS.items():
        label, row = np.array([0, *(k + 1 for k in present)]), {name: masks(out, name)[id] for name in ("plain", "crf", "sams", "sams_crf", "sepl")}
        segments = load_segments(out / "segments" / f"{id}.npz", row["plain"].shape)
        _, cam = map_files.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        if not segments:
            assert np.array_equal(row["sams"], row["plain"]) and np.array_equal(row["sams_crf"], row["crf"]) and np.array_equal(row["sepl"], row["crf"])
        elif not present:
            assert not any(mask.any() for mask in row.values())
        else:
            levels = [s.level for s in segments]
            assert np.array_equal(row["sams"], label[slow_sams(np.array([whole(s, cam.shape[1:]) for s in segments]), levels, cam, 0.6)])
            assert np.array_equal(row["sepl"], slow_sepl([whole(s, cam.shape[1:]) for s in segments], row["crf"])) and not np.array_equal(row["sepl"], row["crf"])
            assert set(np.unique(row["sams_crf"])) <= set(label)
    note = json.loads((out / "sams.json").read_text())
    assert (note["without_segments"], note["vote"], note["background"], note["value"], note["crf"]) == (1, "sams", "power", 0.6, None)
    assert note["pixels"] == {"background": "constant", "value": 0.3} and note["segments"] == {"folder": str(out / "segments"), "source": "slic", "weights": None}
    note = json.loads((out / "sepl.json").read_text())
    assert (note["without_segments"], note["vote"], note["background"], note["value"], note["crf"]) == (1, "sepl", "constant", 0.3, "deeplab") and "pixels" not in note
    assert json.loads((out / "crf.json").read_text())["args"]["vote"] is None and "vote" not in json.loads((out / "crf.json").read_text())


def test_what_goes_on_and_what_is_refused(world):
    voc, out = world
    flags = ["--data", voc, "--out", out, *SHARED, "--segments", out / "segments"]
    assert call("make_pseudo.py", *flags, "--limit", "2").returncode == 0
    assert call("make_pseudo.py", *flags).returncode == 0 and json.loads((out / "pseudo.json").read_text())["without_segments"] == 1
    again = call("make_pseudo.py", *flags)                                          # nothing is left to do: still counted
    assert "1 without segments" in again.stdout
    refused(call("make_pseudo.py", *flags, "--vote", "sepl"), "pseudo was made with", "--vote sams (now sepl)")
    (out / "again").mkdir()
    spelt = call("make_pseudo.py", *flags[:-1], out / "again/../segments")          # another spelling of the same folder
    assert spelt.returncode == 0 and "1 without segments" in spelt.stdout, spelt.stderr
    (out / "segments/recipe.json").write_text('{"fingerprint": "second"}')
    refused(call("make_pseudo.py", *flags), "made from another segments")
    (out / "segments/a_4.npz").unlink()
    refused(call("make_pseudo.py", *flags, "--pseudo", "new"), "no segments of a_4, and 0 more of 5", "make_segments.py")
    assert not (out / "new").exists()
    Image.new("L", (9, 9)).save(out / "segments/a_4.png")
    refused(call("make_pseudo.py", *flags, "--pseudo", "new"), "a_4.png holds no segments of its picture", "9x9")
    for wrong in (["--segments", "x", "--vote", "sepl", "--power", "1"], ["--vote", "sams"], ["--segments", "x", "--crf", "--ignore-below", ".5"]):
        assert call("make_pseudo.py", *flags[:-2], *wrong).returncode == 2


def test_others_segments_that_were_replaced_are_noticed(world):
    voc, out = world
    foreign, folder = out / "foreign", folders.Folder(voc)
    for id in LABELS:
        (foreign / id).mkdir(parents=True)
        h, w = folder.image(id).shape[1:]
        for n in (0, 1):
            Image.fromarray((np.arange(w) // 20 % 2 == n)[None].repeat(h, 0)).save(foreign / id / f"{n}.png")
    flags = ["--data", voc, "--out", out, *SHARED, "--segments"]
    assert call("make_pseudo.py", *flags, foreign).returncode == 0
    note, before = json.loads((out / "pseudo/recipe.json").read_text())["args"]["inputs"]["segments"], masks(out)
    assert note == plain_files.folder_fingerprint(foreign) and json.loads((out / "pseudo.json").read_text())["segments"]["source"] is None
    (foreign / "a_1/.thumbnail.png").write_bytes(b"")                               # what a file browser leaves is no segment
    foreign.rename(out / "moved")
    assert call("make_pseudo.py", *flags, out / "moved").returncode == 0            # the same files elsewhere
    path = out / "moved/a_5/1.png"
    content, time, renamed = path.read_bytes(), path.stat().st_mtime_ns, path.with_name("2.png")
    kept = lambda at: os.utime(path, ns=(at, at))
    for change in (lambda: kept(time + 10**6), lambda: (path.write_bytes(content + b" "), kept(time)), lambda: path.rename(renamed), path.unlink):
        change()
        refused(call("make_pseudo.py", *flags, out / "moved"), "made from another segments", "--no-resume")
        renamed.unlink(missing_ok=True), path.write_bytes(content), kept(time)
        assert plain_files.folder_fingerprint(out / "moved") == note
    Image.new("1", (40, 30)).save(path)                                             # a segment less: the other is the only one
    assert call("make_pseudo.py", *flags, out / "moved", "--no-resume").returncode == 0
    again = masks(out)
    assert np.array_equal(again["a_1"], before["a_1"]) and not np.array_equal(again["a_5"], before["a_5"])


# ---------------------------------------------------------------- make_segments.py, superpixels

FELZENSZWALB = ["--source", "felzenszwalb", "--scales", "5", "40", "--min-area", "8"]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npz"))}


def test_superpixels_are_partitions_and_a_run_goes_on(voc, tmp_path):
    pytest.importorskip("skimage")
    flags = ["--data", voc, *SHARED, *FELZENSZWALB, "--out"]
    folder, out = folders.Folder(voc), tmp_path / "out"
    assert call("make_segments.py", *flags, out, "--limit", "2").returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in (out / "segments").glob("*.npz")}
    assert len(kept) == 2
    done = call("make_segments.py", *flags, out)
    assert done.returncode == 0 and all(path.stat().st_mtime_ns == time for path, time in kept.items()) and "0 pictures without any" in done.stdout
    total = 0
    for id in LABELS:
        size = folder.image(id).shape[1:]
        segments = load_segments(segments_of(out / "segments", id), size)
        assert (sum(whole(s, size).astype(int) for s in segments) == 2).all()       # every pixel is in one of each scale
        total += len(segments)
    note = json.loads((out / "segments.json").read_text())
    assert note["segments"] == total and note["levels"] == [total, 0, 0] and note["pictures"] == 5
    refused(call("make_segments.py", *flags, out, "--scales", "5"), "was made with --scales")
    before = files(out / "segments")
    assert call("make_segments.py", *flags, out, "--scales", "5", "--no-resume").returncode == 0 and files(out / "segments") != before
    assert call("make_segments.py", *flags, out, "--min-area", "100", "--source", "slic", "--scales", "9", "--segments", "slic").returncode == 0
    assert len(files(out / "slic")) == 5


def test_a_missing_library_is_one_line(voc, tmp_path, monkeypatch):
    cases = [("skimage", "scikit-image", "slic"), ("transformers", "transformers", "sam")] + [("scipy", "scipy", "sam")] * (importlib.util.find_spec("transformers") is not None)
    for module, package, source in cases:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(call("make_segments.py", "--data", voc, "--out", tmp_path / "out", *SHARED, "--source", source), f"pip install {package}")
    assert not (tmp_path / "out/segments").exists()


@pytest.mark.parametrize("flags,word", [
    ("--source slic --scales 0.3", "--scales of slic"), ("--source slic --scales 9 0.9", "--scales of slic"), ("--source slic --min-area 20", "--min-area does not go with --source slic"),
    ("--source felzenszwalb --nms 0.5", "--nms does not go with --source felzenszwalb"), ("--source slic --no-whole-first", "--whole-first does not"), ("--source slic --sam x", "--sam does not"),
    ("--scales 5", "--scales does not go with --source sam"), ("--stability 92", "--stability"), ("--stability -0.1", "--stability"), ("--pred-iou 86", "--pred-iou"),
    ("--pred-iou nan", "--pred-iou"), ("--nms 70", "--nms"), ("--nms -1", "--nms")])
def test_flags_that_say_nothing_or_nonsense_are_refused(voc, tmp_path, flags, word):
    done = call("make_segments.py", "--data", voc, "--out", tmp_path / "out", *SHARED, *flags.split())
    assert done.returncode == 2 and word in done.stderr and not (tmp_path / "out").exists()


def test_weights_are_all_shards(tmp_path):
    shards = [tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, path in enumerate(shards):
        path.write_bytes(bytes([n]))
    was = make_segments.weights(tmp_path)
    assert was == f"{plain_files.fingerprint(shards[0])} {plain_files.fingerprint(shards[1])}"
    (tmp_path / "pytorch_model.bin").write_bytes(b"not what is read")
    assert make_segments.weights(tmp_path) == was
    shards[1].write_bytes(b"other")
    assert make_segments.weights(tmp_path) != was
    for path in shards:
        path.unlink()
    assert make_segments.weights(tmp_path) == plain_files.fingerprint(tmp_path / "pytorch_model.bin")


def test_crops_have_an_area_and_cover_the_picture():
    for size in ((1, 1), (2, 300), (300, 2), (3, 5), (60, 90), (375, 500)):
        for layers in (0, 1, 2):
            found = list(make_segments.crops(size, layers))
            assert found[0] == (0, (0, 0, *size)) and all(0 <= top < bottom <= size[0] and 0 <= left < right <= size[1] for _, (top, left, bottom, right) in found), (size, layers)
            for layer in range(layers + 1):
                seen = np.zeros(size, bool)
                for _, (top, left, bottom, right) in [crop for crop in found if crop[0] == layer]:
                    seen[top:bottom, left:right] = True
                assert seen.all() and (min(size) < 9 or sum(n == layer for n, _ in found) == 4 ** layer)


def test_only_a_higher_level_hides_a_segment():
    part, same, third = np.zeros((3, H, W), bool)
    part[2:12, 2:12], same[2:12, 2:11], third[2:12, 2:5] = True, True, True         # `same` and `third` lie in `part`, third covers .3 of it
    left = lambda levels, share: [s.level for s in make_segments.uncovered(packed([part, same, third], levels), share)]
    for level in (0, 1, 2):
        assert left([level] * 3, 0.1) == [level] * 3
    assert left([0, 0, 2], 0.3) == [2] and left([0, 0, 2], 0.31) == [2, 0] and left([0, 0, 2], 0.35) == [2, 0, 0]      # of 100 and of 90 pixels 30
    assert left([2, 1, 0], 1) == [2] and left([0, 1, 2], 0.31) == [2, 0]             # what is hidden itself hides nothing: part stays


# ---------------------------------------------------------------- make_segments.py, SAM

@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A random SAM of the real classes, in a few channels; its masks are crisp."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    decoder = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, mlp_dim=32, iou_head_hidden_dim=16)
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8, window_size=4,
                  global_attn_indexes=[0], num_pos_feats=8, mlp_dim=32)
    model = transformers.SamModel(transformers.SamConfig(vision_config=vision, mask_decoder_config=decoder,
                                                         prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    for mlp in model.mask_decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.data *= 100
    model.save_pretrained(path)
    transformers.SamProcessor(transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})).save_pretrained(path)
    return path


SAM = ["--points", "4", "--pred-iou", "-0.5", "--stability", "0.5", "--min-area", "6", "--nms", "0.9", "--amp", "off"]


def near(model, sigma):
    """Makes the model's masks end at some distance from their point, so that there are boxes of many sizes."""
    def hook(module, args, kwargs, out):
        n = out.pred_masks.shape[-1]
        ticks = (torch.arange(n) + 0.5) * 64 / n
        x, y = kwargs["input_points"][0, :, 0, 0], kwargs["input_points"][0, :, 0, 1]
        far = (ticks[None, None] - x[:, None, None]) ** 2 + (ticks[None, :, None] - y[:, None, None]) ** 2
        out.iou_scores = out.iou_scores - torch.tensor([0, 0, 0.6])                 # wholes are no longer the best anyway
        out.pred_masks = 0.3 * out.pred_masks + 8 - (far[None, :, None] / torch.tensor(sigma)[:, None, None] ** 2)
        return out
    model.register_forward_hook(hook, with_kwargs=True)


def naive_nms(boxes, scores, least):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        def iou(a, b):
            inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
        if all(iou(boxes[i], boxes[j]) <= least for j in kept):
            kept.append(i)
    return kept


def box(mask):
    y, x = mask.nonzero()
    return y.min(), x.min(), y.max(), x.max()


def naive_clean(mask, area):
    """Whole components of the whole picture, by flooding."""
    def components(of):
        of, found = of.copy(), []
        while of.any():
            stack, member = [tuple(np.argwhere(of)[0])], []
            of[stack[0]] = False
            while stack:
                y, x = stack.pop()
                member.append((y, x))
                for v, u in itertools.product(range(max(0, y - 1), min(of.shape[0], y + 2)), range(max(0, x - 1), min(of.shape[1], x + 2))):
                    if of[v, u]:
                        of[v, u] = False
                        stack.append((v, u))
            found.append(tuple(np.array(member).T))
        return found
    mask = mask.copy()
    for hole in components(~mask):
        mask[hole] |= len(hole[0]) < area
    islands = components(mask)
    most = max(len(island[0]) for island in islands)
    for island in islands:
        mask[island] = len(island[0]) >= min(area, most)
    return mask


def one_point_at_a_time(sam, image, args):
    """Full-size masks, the whole model for each single point, the processor's own way back to the picture."""
    size, kept = image.shape[:2], []
    crops = [((0, 0, 60, 90), 4), ((0, 0, 40, 55), 2), ((20, 0, 60, 55), 2), ((0, 35, 40, 90), 2), ((20, 35, 60, 90), 2)]      # 20 of 60 overlap: 512 / 1500
    for (top, left, bottom, right), n in crops:
        found = []
        for i, j, level in itertools.product(range(n), range(n), range(3)):
            point = [(j + 0.5) / n * (right - left), (i + 0.5) / n * (bottom - top)]
            inputs = sam.processor(image[top:bottom, left:right], input_points=[[point]], return_tensors="pt")
            with torch.no_grad():
                out = sam.model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float(), multimask_output=True)
            logits = sam.processor.post_process_masks(out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False,
                                                      pad_size={"height": 64, "width": 64})[0][0, level].numpy()
            score = out.iou_scores[0, 0, level].item()
            if not (logits > 0).any() or score + args.whole_bonus * (level == 2) <= args.pred_iou or (logits > 1).sum() / (logits > -1).sum() < args.stability:
                continue
            mask = np.zeros(size, bool)
            mask[top:bottom, left:right] = logits > 0
            ends = zip(box(mask), (top, left, bottom, right), (0, 0, *size))
            if not any(abs(end - edge) <= 20 and abs(end - last) > 20 for end, edge, last in ends):
                found.append((mask, level, score, (logits > 1).sum() / (logits > -1).sum(), (bottom - top) * (right - left)))
        kept += [found[i] for i in naive_nms([box(f[0]) for f in found], [f[2] + (f[1] == 2) * args.whole_first for f in found], args.nms)]
    kept = [kept[i] for i in naive_nms([box(f[0]) for f in kept], [1 / f[4] for f in kept], args.nms)]
    clean = [naive_clean(f[0], args.min_area) for f in kept]
    order = naive_nms([box(mask) for mask in clean], [float((mask == f[0]).all()) for mask, f in zip(clean, kept)], args.nms)
    found, stay = [(clean[i], *kept[i][1:4]) for i in order], []
    for level in (2, 1, 0):
        higher = list(stay)
        stay += [f for f in found if f[1] == level and all((f[0] & other[0]).sum() / f[0].sum() < args.covered for other in higher)]
    return stay


@pytest.mark.parametrize("flags", [["--nms", "0.7"], ["--nms", "0.45", "--pred-iou", "-0.4", "--whole-bonus", "0.3", "--min-area", "30"]], ids=["few", "many"])
def test_sams_masks_are_those_of_one_point_at_a_time(sam, tmp_path, monkeypatch, flags):
    image = np.array(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.BICUBIC))
    monkeypatch.setattr(sys, "argv", ["make_segments.py", "--data", "x", "--out", str(tmp_path), "--sam", str(sam), *SAM, "--covered", "0.8", *flags, "--points-per-batch", "5", "--device", "cpu"])
    args = make_segments.parse()
    segmenter = make_segments.Sam(args, processes.Env(args))
    near(segmenter.model, [3.0, 5.0, 7.0])
    monkeypatch.setattr(make_segments, "AT_ONCE", 3 * 64 * 64)                      # three masks at full size at a time
    want, found = one_point_at_a_time(segmenter, image, args), segmenter(image)
    table = lambda rows: sorted((level, mask.tobytes(), score, stability) for mask, level, score, stability in rows)
    got = table((whole(s, (60, 90)), s.level, s.score, s.stability) for s in found)
    assert len(want) > 8 and len({f[1] for f in want}) > 1
    assert [g[:2] for g in got] == [w[:2] for w in table(want)]
    assert np.allclose([g[2:] for g in got], [w[2:] for w in table(want)], atol=1e-5)


def test_the_whole_and_what_was_clean_are_preferred(monkeypatch):
    square, spotted = np.zeros((2, 60, 90), bool)
    square[10:30, 10:30] = True
    spotted[11:30, 10:30] = spotted[50, 80] = True                                  # its spot goes: then its box is almost the square's
    segmenter = object.__new__(make_segments.Sam)

    def left(segments, **flags):
        segmenter.args = types.SimpleNamespace(**{**dict(crop_layers=0, points=1, nms=0.7, min_area=0, whole_first=True, covered=0), **flags})
        monkeypatch.setattr(make_segments.Sam, "in_crop", lambda self, image, crop, points: segments)
        return [(s.level, s.score) for s in segmenter(np.zeros((60, 90, 3), np.uint8))]

    part, same = segment(square, 0, 0.75, 1), segment(square, 2, 0.5, 1)
    assert left([part, same]) == [(2, 0.5)] and left([part, same], whole_first=False) == [(0, 0.75)]
    dirty = segment(spotted, 1, 0.875, 1)
    assert left([dirty, part]) == [(1, 0.875), (0, 0.75)] and left([dirty, part], min_area=20) == [(0, 0.75)]


def test_small_islands_and_holes_go_exactly():
    rng = np.random.default_rng(1)
    for n in range(12):
        mask = rng.random((H, W)) < (0.4, 0.6)[n % 2]
        if n > 5:                                                                   # a strip beside the box that is large, or small, only beyond it
            mask[:] = False
            mask[1 + n % 3:, 2:W - n % 4], mask[8:11, 2:5] = True, False
        got = make_segments.clean(segment(mask, 2, 0.5, 0.25), 12, (H, W))
        assert np.array_equal(whole(got), naive_clean(mask, 12)) and (got.level, got.score, got.stability) == (2, 0.5, 0.25)
    square = np.zeros((H, W), bool)
    square[3:8, 3:8] = True
    s = segment(square)
    assert make_segments.clean(s, 12, (H, W)) is s and make_segments.clean(s, 30, (H, W)) is s                   # 24 pixels around the box are no hole


def test_of_two_boxes_that_are_much_the_same_the_better_one_stays():
    found = [mask for mask in blobs(60, seed=2) if min(np.subtract(box(mask)[2:], box(mask)[:2])) > 0]          # a line has no area in SAM's boxes
    scores = np.random.default_rng(0).random(len(found)).tolist()
    for least in (0.0707, 0.1717, 0.2323):                                           # no quotient of small numbers
        got = make_segments.suppress(packed(found), scores, least)
        assert got == naive_nms([box(mask) for mask in found], scores, least) and 1 < len(got) < len(found)
    assert make_segments.suppress([], [], 0.5) == []


def test_the_command_with_sam(sam, voc, tmp_path):
    flags = ["--data", voc, *SHARED, "--sam", sam, *SAM, "--out"]
    assert call("make_segments.py", *flags, tmp_path / "a", "--limit", "2").returncode == 0
    done = call("make_segments.py", *flags, tmp_path / "a", "--points-per-batch", "3")                           # goes on
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "a/segments.json").read_text())
    assert note["segments"] >= 5 and note["weights"] == plain_files.fingerprint(sam / "model.safetensors")
    call("make_segments.py", *flags, tmp_path / "b", "--nms", "1", "--covered", "0")                             # nothing is too alike: also parts
    more = json.loads((tmp_path / "b/segments.json").read_text())
    assert more["segments"] == sum(more["levels"]) > note["segments"] and min(more["levels"]) > 0
    other = shutil.copytree(sam, tmp_path / "other")
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END), file.write(b"\0\0\0\0")
    refused(call("make_segments.py", "--data", voc, *SHARED, "--sam", other, *SAM, "--out", tmp_path / "a"), "--sam")
    refused(call("make_segments.py", "--data", voc, *SHARED, "--sam", voc, *SAM, "--out", tmp_path / "c"), "cannot be loaded", "sam-vit-huge")
    model = importlib.import_module("transformers").SamModel.from_pretrained(sam)
    model.save_pretrained(other, state_dict={k: v for k, v in model.state_dict().items() if "iou_token" not in k})
    refused(call("make_segments.py", "--data", voc, *SHARED, "--sam", other, *SAM, "--out", tmp_path / "c"), "is no whole SAM", "iou_token")
