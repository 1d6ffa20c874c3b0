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

from plumbing import folders, masks
from plumbing.images import image_size
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


def test_a_published_generator_is_taken_as_it_is(world, tmp_path):
    init = save(tmp_path / "weaktr.pth", {"model": tiny(), "epoch": 1})
    make(world, tmp_path, "--init", init, "--pool", "avg")
    assert largest_difference(tmp_path / "cam", world / "out/cam_1") < 2e-3
    done = json.loads((tmp_path / "cam.json").read_text())
    assert done["source"] == str(init) and done["args"]["pool"] == "avg"


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
def test_what_irn_does_next(exported, id):
    """Its cam_to_ir_label.py, then make_sem_seg_labels.py, which calls cam.cuda()."""
    table = np.load(exported / f"out/cam_irn/{id}.npy", allow_pickle=True).item()
    classes, maps = maps_of(exported, id)
    P, H, W = maps.shape
    keys = np.pad(table["keys"] + 1, (1, 0), mode="constant")
    assert keys.tolist() == [0, *(k + 1 for k in classes)]
    high = np.pad(table["high_res"], ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.3)
    ours = np.concatenate([np.full((1, H, W), 0.3, np.float32), maps])
    assert high.dtype == np.float32 and high.shape == ours.shape and np.abs(high - ours).max() < 1e-3
    cam = table["cam"].to("cpu")
    assert cam.dtype == torch.float32 and cam.shape == (P, (H - 1) // 4 + 1, (W - 1) // 4 + 1)
    if P:
        again = F.interpolate(cam[:, None], scale_factor=4, mode="bilinear")[:, 0, :H, :W].numpy()
        assert np.abs(again - maps).mean() < 0.05


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_psa_weaktr_clip_es_and_fma_do_next(exported, id):
    classes, maps = maps_of(exported, id)
    psa = np.load(exported / f"out/cam_psa/{id}.npy", allow_pickle=True).item()
    assert list(psa) == classes and all(type(key) is int for key in psa)
    for value, m in zip(psa.values(), maps):
        assert value.dtype == np.float32 and np.abs(value - m).max() < 1e-3
    table = np.load(exported / f"out/cam_clip_es/{id}.npy", allow_pickle=True).item()
    assert np.pad(table["keys"] + 1, (1, 0), mode="constant").tolist() == [0, *(k + 1 for k in classes)]
    cams = table["attn_highres"]
    assert cams.dtype == np.float32 and cams.shape == maps.shape and np.abs(cams - maps).max(initial=0) < 1e-3
    fma = np.load(exported / f"out/cam_fma/{id}.npz")         # no pickle
    assert set(fma.files) == {"cam", "fg_cls"} and fma["fg_cls"].tolist() == classes
    assert fma["cam"].dtype == np.float32
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
