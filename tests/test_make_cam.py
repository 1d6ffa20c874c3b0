"""make_cam.py on a trained S: maps against a loop, what is kept and refused, what other projects read.
(GradCAM's maps: test_vpl.py. Several processes: test_ranks.py.)"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused
from PIL import Image
from test_networks import tiny
from test_weights import save

from plumbing import exports, folders, sheets
from plumbing.images import image_size, load_image, to_float
from plumbing.maps import heat, load_cam, resize_maps
from wsss import generator


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


def read(folder, id):
    return np.load(folder / f"{id}.npy").astype(np.float32)


def test_maps_are_scales_and_flips_summed(world):
    """Resized as PIL does it, antialiased bicubic, of 8-bit pixels; PIL also rounds between the axes."""
    S, folder = generator.load_generator(world / "out/refine.pt"), folders.Folder(world / "data")
    image, total = load_image(folder.image_path("a_2")), 0                    # classes 1 and 2, 34 x 40
    with torch.no_grad():
        for size in ((40, 34), (48, 41)):                     # scales 1 and 1.2
            scaled = to_float(image.resize(size, Image.BICUBIC))[None]
            for flip in (False, True):
                m = S.maps(scaled.flip(3) if flip else scaled)
                m = F.interpolate(m, (34, 40), mode="bilinear")[0, 1:]
                total = total + (m.flip(2) if flip else m)
    want = torch.stack([(m - m.min()) / (m.max() - m.min() + 1e-8) for m in total])
    found = np.load(world / "out/cam_1/a_2.npy")
    assert found.dtype == np.float16 and np.abs(found - want.numpy()).max() < 2e-2
    assert np.load(world / "out/cam_1/a_3.npy").shape == (0, 30, 40)                  # no class: no map
    make(world, world / "out", "--cam", "cam_8", "--batch-size", "8")         # whatever the batch
    assert max(np.abs(read(world / "out/cam_1", id) - read(world / "out/cam_8", id)).max(initial=0)
               for id in LABELS) < 2e-3
    sheet = load_image(world / "out/sheets/cam_1_0.png")      # image, two maps, truth, of two images a line
    assert sheet.size == (2 * 4 * 160, 3 * 174)
    tile, heated = sheet.crop((800, 0, 960, 160)), heat(image, read(world / "out/cam_1", "a_2")[0])
    assert tile.tobytes() == sheets.tile(heated, "").crop((0, 0, 160, 160)).tobytes()


def test_large_images_are_seen_small_and_their_maps_enlarged(world, tmp_path):
    """As S sees the image of that size; twelve pixels beside six are no other map."""
    make_folder(tmp_path / "data")
    path = folders.Folder(tmp_path / "data").image_path("a_2")
    large, small = load_image(path).resize((240, 200), Image.BICUBIC), tmp_path / "small.png"
    large.resize((48, 40), Image.BICUBIC).save(small)
    large.save(path, format="PNG")
    (tmp_path / "out").mkdir()
    keep_generator(tmp_path / "out/refine.pt")
    make(tmp_path, tmp_path / "out", "--max-side", "48", "--cam", "large")
    load_image(small).save(path, format="PNG")
    make(tmp_path, tmp_path / "out", "--cam", "small")
    found, seen = read(tmp_path / "out/large", "a_2"), read(tmp_path / "out/small", "a_2")
    assert found.shape == (2, 200, 240) and seen.shape == (2, 40, 48)
    assert np.abs(found - resize_maps(seen, (200, 240)).numpy()).max() < 2e-3
    refused(call(*flags(tmp_path, tmp_path / "out", "--cam", "large")), "--max-side")


def test_finished_maps_are_kept_and_others_refused(world, tmp_path):
    for name in ("refine", "match"):
        keep_generator(tmp_path / f"{name}.pt")
    make(world, tmp_path, "--limit", "2")
    old = (tmp_path / "cam/a_1.npy").stat().st_mtime_ns
    (tmp_path / "cam/a_2.npy").unlink()                       # as if killed before it
    make(world, tmp_path, "--pool", "avg")                    # the rest of the split; what the file says
    assert (tmp_path / "cam/a_1.npy").stat().st_mtime_ns == old
    assert len(list((tmp_path / "cam").glob("*.npy"))) == 5
    refused(call(*flags(world, tmp_path, "--pool", "max")), "refine.pt: trained with --pool avg")
    refused(call(*flags(world, tmp_path, "--source", "match")), "--source refine (now match)")
    refused(call(*flags(world, tmp_path, "--scales", "1.0")), "--scales")
    make(world, tmp_path, "--source", "match", "--no-resume")
    assert (tmp_path / "cam/a_1.npy").stat().st_mtime_ns != old
    done = json.loads((tmp_path / "cam.json").read_text())
    assert (done["source"], done["images"], done["maps"], done["texts"]) == ("match", 5, 6, None)
    refused(call(*flags(world, tmp_path / "empty")), "refine.pt is missing: run train_refine.py")
    wrong = save(tmp_path / "voc20.pth", {"model": tiny(20)})
    refused(call(*flags(world, tmp_path / "empty", "--init", wrong)), "voc20.pth: maps 20 classes")


def test_other_projects_read_our_maps(world):
    """At a quarter of the size, cells' means; by our reader, which test_maps.py holds against these projects'
    own files; and as IRN reads them, which calls cam.cuda(), and PSA, which asks for whole numbers."""
    out = world / "out"
    for name in exports.FORMATS:                              # asked for later: made now
        make(world, out, "--stride", "4", "--format", name, "--sheets", "0")
    full, small = read(out / "cam_1", "a_2"), read(out / "cam", "a_2")
    assert small.shape == (2, 9, 10)
    assert small[1, 2, 3] == pytest.approx(full[1, 8:12, 12:16].mean(), abs=2e-3)
    assert small[0, 8, 0] == pytest.approx(full[0, 32:34, :4].mean(), abs=2e-3)   # the last row: two lines
    for id in ("a_2", "a_3"):
        cam, size = read(out / "cam", id), image_size(world / f"data/JPEGImages/{id}.jpg")
        large, label = resize_maps(cam, size).numpy(), np.isin(range(3), LABELS[id])
        for name, (_, ending) in exports.FORMATS.items():
            classes, found = load_cam(out / f"cam_{name}/{id}.{ending}", label)
            assert classes.tolist() == LABELS[id]
            assert np.abs(found - (cam if name == "fma" else large)).max(initial=0) < 1e-3, name
        irn, psa = (np.load(out / f"{folder}/{id}.npy", allow_pickle=True).item()
                    for folder in ("cam_irn", "cam_psa"))
        small = irn["cam"].to("cpu")
        assert small.dtype == torch.float32 and irn["high_res"].dtype == np.float32
        assert small.shape == (len(cam), *((n - 1) // 4 + 1 for n in size))
        assert irn["keys"].tolist() == LABELS[id] and [type(key) for key in psa] == [int] * len(cam)
    make(world, out, "--no-resume", "--sheets", "0")          # other maps: the exports are of the old ones
    refused(call(*flags(world, out, "--format", "irn")), "cam_irn was made with --stride 4 (now 1)")
