"""make_cam.py on a trained S: maps against a loop, what is kept and what is refused, and what other projects
read. (GradCAM's maps: test_vpl.py.)"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused, run_together
from test_networks import tiny
from test_weights import save

from plumbing import exports, folders, masks, sheets
from plumbing.images import image_size, load_image
from plumbing.maps import heat, load_cam, resize_maps
from wsss import generator

FORMATS = ["irn", "psa", "clip_es", "fma"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a generator in `out`, and its maps there at full size in cam_1."""
    root = tmp_path_factory.mktemp("cam")
    make_folder(root / "data")
    (root / "out").mkdir()
    keep_generator(root / "out/refine.pt")
    make(root, root / "out", "--cam", "cam_1", "--batch-size", "1", "--source", "refine")
    return root


def keep_generator(path):
    args = {"pool": "avg", "inputs": {}}
    save(path, {"model": tiny(), "stage": path.stem, "classes": CLASSES, "args": args})


def flags(world, out, *more):
    return ["make_cam.py", "--data", world / "data", "--out", out, "--split", "train", "--device", "cpu",
            "--amp", "off", "--workers", "0", *more]


def make(world, out, *more):
    done = call(*flags(world, out, *more))
    assert done.returncode == 0, done.stderr
    return done


def read(folder, id):
    return np.load(folder / f"{id}.npy").astype(np.float32)


def largest_difference(one, other):
    return max(np.abs(read(one, id) - read(other, id)).max(initial=0) for id in LABELS)


# ---------------------------------------------------------------- maps

def test_maps_are_scales_and_flips_summed(world):
    S = generator.load_generator(world / "out/refine.pt")
    image = folders.Folder(world / "data").image("a_2")[None]                 # classes 1 and 2, 34 x 40
    total = 0
    with torch.no_grad():
        for size in ((34, 40), (41, 48)):                     # scales 1 and 1.2
            for flip in (False, True):
                scaled = F.interpolate(image, size, mode="bilinear")
                m = S.maps(scaled.flip(3) if flip else scaled)
                m = F.interpolate(m, (34, 40), mode="bilinear")[0, 1:]
                total = total + (m.flip(2) if flip else m)
    want = torch.stack([(m - m.min()) / (m.max() - m.min() + 1e-8) for m in total])
    found = np.load(world / "out/cam_1/a_2.npy")
    assert found.dtype == np.float16 and np.abs(found - want.numpy()).max() < 1e-3
    assert np.load(world / "out/cam_1/a_3.npy").shape == (0, 30, 40)                  # no class: no map


def test_maps_depend_on_no_batch_and_no_number_of_processes(world):
    make(world, world / "out", "--cam", "cam_8", "--batch-size", "8")
    run_together([flags(world, world / "out", "--cam", "cam_two")], world)
    assert largest_difference(world / "out/cam_1", world / "out/cam_8") < 2e-3
    assert largest_difference(world / "out/cam_1", world / "out/cam_two") < 2e-3


def test_stride_is_the_mean_of_cells(world, tmp_path):
    make(world, tmp_path, "--init", world / "out/refine.pt", "--stride", "4", "--sheets", "0")
    full, small = read(world / "out/cam_1", "a_2"), read(tmp_path / "cam", "a_2")
    assert small.shape == (2, 9, 10)
    assert small[1, 2, 3] == pytest.approx(full[1, 8:12, 12:16].mean(), abs=2e-3)
    assert small[0, 8, 0] == pytest.approx(full[0, 32:34, :4].mean(), abs=2e-3)   # the last row: two lines


def test_finished_maps_are_kept_and_others_refused(world, tmp_path):
    for name in ("refine", "match"):
        keep_generator(tmp_path / f"{name}.pt")
    make(world, tmp_path, "--limit", "2")
    old = (tmp_path / "cam/a_1.npy").stat().st_mtime_ns
    (tmp_path / "cam/a_2.npy").unlink()                       # as if killed before it
    make(world, tmp_path)                                     # the rest of the split is the same recipe
    assert (tmp_path / "cam/a_1.npy").stat().st_mtime_ns == old
    assert len(list((tmp_path / "cam").glob("*.npy"))) == 5
    make(world, tmp_path, "--pool", "avg")                    # what the file says
    refused(call(*flags(world, tmp_path, "--pool", "max")), "refine.pt: trained with --pool avg")
    refused(call(*flags(world, tmp_path, "--source", "match")), "--source refine (now match)")
    refused(call(*flags(world, tmp_path, "--scales", "1.0")), "--scales")
    make(world, tmp_path, "--format", "psa")                  # asked for later: made now
    assert len(list((tmp_path / "cam_psa").glob("*.npy"))) == 5
    make(world, tmp_path, "--source", "match", "--no-resume")
    assert (tmp_path / "cam/a_1.npy").stat().st_mtime_ns != old
    done = json.loads((tmp_path / "cam.json").read_text())
    assert (done["source"], done["images"], done["maps"]) == ("match", 5, 6)
    refused(call(*flags(world, tmp_path / "empty")), "refine.pt is missing: run train_refine.py")
    wrong = save(tmp_path / "voc20.pth", {"model": tiny(20)})
    refused(call(*flags(world, tmp_path / "empty", "--init", wrong)), "voc20.pth: maps 20 classes")


# ---------------------------------------------------------------- contact sheets

def test_sheets_show_image_maps_and_truth(world, tmp_path):
    """Two images a line, 16 a sheet; a map lies over its image in colours, the truth is in VOC's."""
    labels = {f"s_{n}": [2] if n % 2 else [0, 1] for n in range(18)}
    make_folder(tmp_path / "data", labels)
    (tmp_path / "data/SegmentationClass/s_0.png").unlink()
    make(tmp_path, tmp_path / "out", "--init", world / "out/refine.pt")
    first, second = (load_image(tmp_path / f"out/sheets/cam_{n}.png") for n in (0, 1))
    assert first.size == (2 * 4 * 160, 8 * 174) and second.size == (2 * 4 * 160, 174)

    def tile(column):
        return np.asarray(first.crop((160 * column, 0, 160 * column + 160, 160)))

    image, cam = load_image(tmp_path / "data/JPEGImages/s_1.jpg"), read(tmp_path / "out/cam", "s_1")
    truth = masks.paint(masks.load_mask(tmp_path / "data/SegmentationClass/s_1.png")).convert("RGB")
    for column, want in ((4, image), (5, heat(image, cam[0])), (6, truth)):
        assert np.array_equal(tile(column), np.asarray(sheets.tile(want, "").crop((0, 0, 160, 160))))
    assert (tile(2) != 255).any() and (tile(3) == 255).all()  # s_0: two maps, and no truth
    make(tmp_path, tmp_path / "none", "--init", world / "out/refine.pt", "--sheets", "0")
    assert not list((tmp_path / "none/sheets").glob("*"))


# ---------------------------------------------------------------- what other projects read

@pytest.fixture(scope="module")
def exported(world):
    """Maps at a quarter of the size, and in all formats."""
    for name in FORMATS:
        make(world, world / "out", "--stride", "4", "--format", name, "--sheets", "0")
    return world


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_exports_come_back_as_our_maps(exported, id):
    """By our reader, which test_maps.py holds against these projects' own files; and as IRN reads them, which
    calls cam.cuda(), and PSA, which asks for whole numbers."""
    cam, size = read(exported / "out/cam", id), image_size(exported / f"data/JPEGImages/{id}.jpg")
    large, label = resize_maps(cam, size).numpy(), np.isin(range(3), LABELS[id])
    for name, (_, ending) in exports.FORMATS.items():
        path = exported / f"out/cam_{name}/{id}.{ending}"
        classes, found = load_cam(path, label)
        assert classes.tolist() == LABELS[id]
        assert np.abs(found - (cam if name == "fma" else large)).max(initial=0) < 1e-3, name
    irn, psa = (np.load(exported / f"out/{cam}/{id}.npy", allow_pickle=True).item()
                for cam in ("cam_irn", "cam_psa"))
    small = irn["cam"].to("cpu")
    assert small.dtype == torch.float32 and irn["high_res"].dtype == np.float32
    assert small.shape == (len(cam), *((n - 1) // 4 + 1 for n in size))
    assert (irn["keys"] + 1).tolist() == [k + 1 for k in LABELS[id]]
    assert [type(key) for key in psa] == [int] * len(cam)
