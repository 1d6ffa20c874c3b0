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

from plumbing import folders, masks, sheets
from plumbing.images import image_size, load_image
from plumbing.maps import heat
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


def maps_of(world, id):
    """-> classes, our maps at the image's size (P, H, W)."""
    cam, size = read(world / "out/cam", id), image_size(world / f"data/JPEGImages/{id}.jpg")
    if not len(cam):
        return LABELS[id], np.zeros((0, *size), np.float32)
    return LABELS[id], F.interpolate(torch.from_numpy(cam)[None], size, mode="bilinear")[0].numpy()


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_their_readers_do_next(exported, id):
    """IRN's cam_to_ir_label.py, and make_sem_seg_labels.py, which calls cam.cuda(); then the other three."""
    classes, maps = maps_of(exported, id)
    P, H, W = maps.shape
    irn, psa, clip_es = (np.load(exported / f"out/cam_{name}/{id}.npy", allow_pickle=True).item()
                         for name in FORMATS[:3])
    assert np.pad(irn["keys"] + 1, (1, 0), mode="constant").tolist() == [0, *(k + 1 for k in classes)]
    high = np.pad(irn["high_res"], ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.3)
    assert high.dtype == np.float32 and (high[0] == np.float32(0.3)).all()
    assert high.shape == (1 + P, H, W) and np.abs(high[1:] - maps).max(initial=0) < 1e-3
    cam = irn["cam"].to("cpu")
    assert cam.dtype == torch.float32 and cam.shape == (P, (H - 1) // 4 + 1, (W - 1) // 4 + 1)
    if P:
        again = F.interpolate(cam[:, None], scale_factor=4, mode="bilinear")[:, 0, :H, :W].numpy()
        assert np.abs(again - maps).mean() < 0.05
    assert list(psa) == classes and all(type(key) is int for key in psa)
    for value, m in zip(psa.values(), maps):
        assert value.dtype == np.float32 and np.abs(value - m).max() < 1e-3
    assert (clip_es["keys"] + 1).tolist() == [k + 1 for k in classes]
    cams = clip_es["attn_highres"]
    assert cams.dtype == np.float32 and cams.shape == maps.shape
    assert np.abs(cams - maps).max(initial=0) < 1e-3
    fma = np.load(exported / f"out/cam_fma/{id}.npz")         # no pickle
    assert set(fma.files) == {"cam", "fg_cls"} and fma["fg_cls"].tolist() == classes
    assert np.abs(fma["cam"] - read(exported / "out/cam", id)).max(initial=0) < 1e-3


def test_exported_folders_are_scored_and_made_into_masks_as_ours(exported):
    out = exported / "out"
    base = flags(exported, out)[1:]
    scores, made = {}, {}
    for cam in ("cam", *(f"cam_{name}" for name in FORMATS)):
        done = call("eval.py", *base, "--what", "cam", "--cam", cam, "--threshold", "0.5")
        assert done.returncode == 0, done.stderr
        scores[cam] = json.loads((out / f"eval_{cam}_train.json").read_text())["miou"]
        more = ["--pseudo", f"p_{cam}", "--no-crf", "--threshold", "0.5"]
        done = call("make_pseudo.py", *base, "--cam", cam, *more)
        assert done.returncode == 0, done.stderr
        made[cam] = np.concatenate([masks.load_mask(out / f"p_{cam}/{id}.png").ravel() for id in LABELS])
    assert len(np.unique(made["cam"])) > 2
    for cam in scores:
        assert scores[cam] == pytest.approx(scores["cam"], abs=0.01)
        assert (made[cam] == made["cam"]).mean() > 0.99
