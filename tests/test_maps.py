"""Maps on disk: what was written is read, bad maps are refused by name; background scores and resizing."""
import re

import numpy as np
import pytest
import torch

from plumbing import maps


def test_maps_round_trip(tmp_path):
    cam = np.random.default_rng(0).random((2, 3, 4))
    maps.save_cam(tmp_path / "a.npy", torch.from_numpy(cam))
    raw = np.load(tmp_path / "a.npy")                                        # no pickle, no torch needed
    assert raw.dtype == np.float16 and raw.shape == (2, 3, 4)
    for labels in ([1, 0, 1], np.array([1., 0, 1]), torch.tensor([True, False, True])):
        classes, found = maps.load_cam(tmp_path / "a.npy", labels)
        assert classes.tolist() == [0, 2] and found.dtype == np.float32 and np.abs(found - cam).max() < 5e-4
    maps.save_cam(tmp_path / "none.npy", np.zeros((0, 3, 4)))
    classes, found = maps.load_cam(tmp_path / "none.npy", [0, 0, 0])
    assert len(classes) == 0 and found.shape == (0, 3, 4)
    with pytest.raises(ValueError, match="multi-hot"):
        maps.load_cam(tmp_path / "a.npy", [0, 2])
    with pytest.raises(ValueError, match="nan.npy: its maps are not finite"):
        maps.save_cam(tmp_path / "nan.npy", np.full((1, 3, 4), np.nan))
    assert not (tmp_path / "nan.npy").exists()


HUGE = b"{'descr': '<f2', 'fortran_order': False, 'shape': (2, 99999999, 99999999), }".ljust(118)
HUGE = b"\x93NUMPY\x01\x00v\x00" + HUGE


@pytest.mark.parametrize("content,word", [
    (b"torn", "not a plain .npy"), (HUGE, "not a plain .npy"), (np.zeros((2, 12), np.float16), "are float"),
    (np.zeros((1, 3, 4), np.float16), "1 maps, the image's label has 2"), (None, "run make_cam.py first"),
    (np.zeros((2, 3, 4), np.int64), "are float"), (np.full((2, 3, 4), np.nan, np.float16), "NaN")])
def test_bad_maps(tmp_path, content, word):
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(word)) as error:
        maps.load_cam(path, [1, 1, 0])
    assert "a.npy" in str(error.value)


def test_maps_must_fit_their_image(tmp_path):
    for size in ((375, 500), (188, 250), (23, 31)):
        maps.save_cam(tmp_path / "x.npy", np.zeros((1, *size)))
        maps.load_cam(tmp_path / "x.npy", [1, 0], (375, 500))
    for h, w in ((374, 500), (500, 375), (750, 1000)):
        maps.save_cam(tmp_path / "x.npy", np.zeros((1, h, w)))
        with pytest.raises(ValueError, match=f"maps of {w}x{h} do not fit"):
            maps.load_cam(tmp_path / "x.npy", [1, 0], (375, 500))


def test_maps_of_other_projects(tmp_path):
    """Rows in any order; IRN's keys and small maps are tensors."""
    cam = np.random.default_rng(0).random((2, 6, 8), dtype=np.float32)
    tables = {"psa": {2: cam[0], 0: cam[1]}, "clip_es": {"keys": np.array([2, 0]), "attn_highres": cam},
              "irn": {"keys": torch.tensor([2, 0]), "cam": torch.zeros(2, 2, 2), "high_res": cam}}
    for name, table in tables.items():
        np.save(tmp_path / f"{name}.npy", table)
    np.savez(tmp_path / "fma.npz", cam=cam, fg_cls=np.array([2, 0]))
    for name in (*tables, "fma"):
        path = tmp_path / f"{name}.npy"
        classes, found = maps.load_cam(path, [1, 0, 1], (6, 8))
        assert classes.tolist() == [0, 2] and found.dtype == np.float32 and np.array_equal(found, cam[::-1])
        with pytest.raises(ValueError, match=r"maps of the classes \[0, 2\], the image's label"):
            maps.load_cam(path, [1, 1, 0], (6, 8))
    np.save(tmp_path / "x.npy", {0: 7 * np.ones((2, 3), np.float32)})
    with pytest.raises(ValueError, match="x.npy holds maps from 7 to 7: scale them"):
        maps.load_cam(tmp_path / "x.npy", [1, 0, 0])


@pytest.mark.parametrize("table,word", [
    ({0: np.zeros((3, 4)), 1: np.zeros((3, 5))}, "same shape"), ({"keys": [0, 1]}, "not an array of numbers"),
    ({"keys": [0, 1], "high_res": np.zeros((3, 3, 4))}, "has 3 maps")])
def test_bad_maps_of_other_projects(tmp_path, table, word):
    content = np.empty((), object)
    content[()] = table
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=f"a.npy.*{word}"):
        maps.load_cam(tmp_path / "a.npy", [1, 1, 0])


def test_background_rules():
    cam = torch.tensor([[[.2, .9]], [[.5, .1]]])                              # (2, 1, 2)
    constant = torch.cat([torch.full((1, 1, 2), .4), cam])
    assert torch.equal(maps.add_background(cam, "constant", .4), constant)
    assert torch.allclose(maps.add_background(cam, "power", 2.)[0], torch.tensor([[.25, .01]]))
    empty = maps.add_background(torch.zeros(0, 2, 3), "power", 1.)
    assert empty.shape == (1, 2, 3) and (empty == 1).all()


def test_sizes():
    assert maps.resize_maps(np.zeros((0, 2, 2), np.float32), (5, 6)).shape == (0, 5, 6)
    cam = torch.arange(12.).view(1, 3, 4)
    assert torch.equal(maps.resize_maps(cam, (3, 4)), cam)
    assert maps.resize_maps(torch.tensor([[[0., 1.]]]), (1, 4)).tolist() == [[[0, .25, .75, 1]]]
    assert maps.shrink_maps(cam, 2).tolist() == [[[2.5, 4.5], [8.5, 10.5]]]   # means of what each cell holds
    assert maps.shrink_maps(cam[:0], 2).shape == (0, 2, 2)
