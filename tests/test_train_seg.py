"""train_seg.py as a command: its losses against naive loops and Mask2Former's against its library, what rests, resumed against uninterrupted, two processes against one."""
import importlib.util
import itertools
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, ROOT, call, make_folder, refused, rows, run_together, same, weights
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors

import train_seg
from plumbing import checkpoints, files, folders, masks as mask_files, processes, samples as sampling
from wsss import losses, segmenter
from hosts import mask2former as m2f

TRUNK = ROOT / "weights/toy_backbone.pt"


def flags(world, out, *more):
    return ["--data", world / "data", "--out", out, "--label-dir", world / "masks", "--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0",
            "--model", "deeplab_toy", "--init", TRUNK, "--batch-size", "2", "--crop", "33", "--iterations", "5", "--lr", "1e-4", "--log-every", "1", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five pictures, their masks in `masks` and no truth in the data folder; one finished run in `out`: two epochs and a half."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "data/SegmentationClass").rename(root / "masks")
    done = call("train_seg.py", *flags(root, root / "out"))
    assert done.returncode == 0, done.stderr
    return root


NETWORKS = {"segmenter_toy": ["--crop", "32", "--lr", "1e-2", "--clamp-tile", "12", "--clamp-start", "9"], "mask2former_toy": ["--crop", "32", "--optimizer", "sgd", "--lr", "10"]}      # its gradient has length .01; AdamW would make much of rounding
MISSING = [name for name in ("scipy", "transformers") if importlib.util.find_spec(name) is None]
BOTH = ["segmenter_toy", pytest.param("mask2former_toy", marks=pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}"))]


def network_flags(world, out, model, *more):
    return flags(world, out, "--model", model, "--init", "none", *NETWORKS[model], *more)


@pytest.fixture(scope="module")
def networks(world):
    """Their names, a finished run of each in a folder of its name."""
    names = list(NETWORKS)[:1 if MISSING else 2]
    for model in names:
        done = call("train_seg.py", *network_flags(world, world / model, model))
        assert done.returncode == 0, done.stderr
    return names


# ---------------------------------------------------------------- what a step does

def test_labels_lie_under_their_logits():
    masks = torch.arange(33 * 17).view(1, 33, 17)
    assert torch.equal(train_seg.on_grid(masks, (9, 5)), masks[:, ::4, ::4])                 # scale 1
    want = [[masks[0, round(i * 32 / 6), round(j * 16 / 3)] for j in range(4)] for i in range(7)]
    assert train_seg.on_grid(masks, (7, 4)).tolist() == [want]                               # scale .75, on the grid of 25 x 13 pixels


def test_pixel_loss_is_the_mean_cross_entropy_of_labelled_pixels():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 2, 2), torch.tensor([[[0, 255], [2, 1]], [[255, 255], [1, 0]]])
    want = [math.log(logits[b, :, i, j].exp().sum()) - logits[b, target[b, i, j], i, j].item()
            for b in range(2) for i in range(2) for j in range(2) if target[b, i, j] != 255]
    assert train_seg.pixel_loss(logits, target).item() == pytest.approx(sum(want) / len(want), abs=1e-6)
    assert train_seg.pixel_loss(logits, torch.full_like(target, 255)).item() == 0             # a batch without a label is no NaN


def test_logged_loss_is_the_loss_of_that_batch(world):
    """The first line of seg.jsonl against loops over pixels: the batch, the crops and the weights are known by the seed."""
    folder = folders.Folder(world / "data")
    samples = sampling.Samples(folder, folder.ids("train"), train_seg.transform(33, 0.5, 1.5), 0, lambda id: world / "masks" / f"{id}.png")
    keys = next(iter(sampling.Batches(5, 2, SimpleNamespace(shard=list))))
    images, masks = (torch.stack(x) for x in list(zip(*(samples[key] for key in keys)))[:2])
    processes.seed_all(0)                                                                       # as Env does
    model = segmenter.build_segmenter("deeplab_toy", 3, TRUNK)
    model.rest_batchnorm()
    losses, right, foreground = [], [], []
    with torch.no_grad():
        outputs = [z.double() for z in model.train()(images)]
    for z in outputs:
        h, w = z.shape[2:]
        pixels = [(b, i, j, masks[b, round(i * 32 / (h - 1)), round(j * 32 / (w - 1))].item()) for b in range(2) for i in range(h) for j in range(w)]
        pixels = [(z[b, :, i, j], label) for b, i, j, label in pixels if label != 255]
        losses.append(sum(-values.softmax(0)[label].log().item() for values, label in pixels) / len(pixels))
        right = [values.argmax().item() == label for values, label in pixels]                # of the last, the maximum
        foreground = [values.argmax().item() > 0 for values, label in pixels]
    first = rows(world / "out/seg.jsonl")[0]
    assert first["loss"] == pytest.approx(sum(losses), rel=1e-4) and first["accuracy"] == pytest.approx(np.mean(right), abs=1e-5)
    assert first["foreground"] == pytest.approx(np.mean(foreground), abs=1e-5) and first["scored"] == pytest.approx(len(pixels) / 162, abs=1e-5)


def test_rates_fall_to_zero_and_batchnorm_rests(world):
    groups = torch.load(world / "out/seg.last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-4, 1e-3, 2e-3]) and all(g["momentum"] == 0.9 and g["weight_decay"] == 5e-4 for g in groups)
    log = rows(world / "out/seg.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in log] == pytest.approx([1e-4 * (1 - n / 5) ** 0.9 for n in range(5)], rel=1e-4)
    torch.manual_seed(0)
    fresh, trained = segmenter.build_segmenter("deeplab_toy", 3, TRUNK), weights(world / "out/seg.pt")
    norms = {f"{name}.{k}" for name, m in fresh.named_modules() if isinstance(m, torch.nn.BatchNorm2d) for k in m.state_dict()}
    rest = {k for k, v in fresh.state_dict().items() if torch.equal(v, trained[k])}
    assert rest == norms and len(norms) == 8 * 5


def test_batchnorm_trains_from_nothing_and_on_demand(world, tmp_path):
    for more, start in ((["--init", "none"], None), (["--train-batchnorm"], TRUNK)):
        out = tmp_path / str(start is None)
        assert call("train_seg.py", *flags(world, out, *more, "--iterations", "2")).returncode == 0
        torch.manual_seed(0)
        fresh, trained = segmenter.build_segmenter("deeplab_toy", 3, start).state_dict(), weights(out / "seg.pt")
        assert not any(torch.equal(fresh[k], trained[k]) for k in fresh if "running" in k or "backbone" in k)
        assert torch.load(out / "seg.pt", weights_only=True)["args"]["train_batchnorm"] is True


def test_what_is_saved_loads_and_says_what_it_is(world):
    content = torch.load(world / "out/seg.pt", weights_only=True)
    assert content["stage"] == "seg" and content["classes"] == ["train", "boat", "cow"]
    assert content["args"]["inputs"] == {"init": files.fingerprint(TRUNK), "masks": files.folder_fingerprint(world / "masks")}
    assert segmenter.load_segmenter(world / "out/seg.pt")(torch.rand(1, 3, 30, 40)).shape == (1, 4, 30, 40)


def test_the_network_learns(world, tmp_path):
    """Pictures that show their masks."""
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.copytree(world / "masks", tmp_path / "masks")
    for id in LABELS:
        mask = mask_files.load_mask(tmp_path / "masks" / f"{id}.png")
        Image.fromarray(mask_files.palette()[mask % 255] + 40).save(tmp_path / "data/JPEGImages" / f"{id}.jpg", quality=95)
    done = call("train_seg.py", *flags(tmp_path, tmp_path / "out", "--train-batchnorm", "--iterations", "28", "--batch-size", "5", "--min-scale", "1", "--max-scale", "1"))
    assert done.returncode == 0, done.stderr
    log = rows(tmp_path / "out/seg.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] / 4 and log[-1]["accuracy"] > 0.9 and log[-1]["foreground"] > 0.1


# ---------------------------------------------------------------- samples

def test_picture_and_mask_move_together():
    values = torch.zeros(40, 60, dtype=torch.uint8)
    values[:, 20:40], values[10:20, 40:] = 1, 2
    image = tv_tensors.Image(100 * values.expand(3, -1, -1))
    shapes, sizes = set(), []
    for seed in range(40):
        torch.manual_seed(seed)
        x, mask = train_seg.transform(50, 0.5, 1.5)(image, tv_tensors.Mask(values))
        shapes.add((tuple(x.shape), tuple(mask.shape), x.dtype, mask.dtype))
        inside = mask != 255
        sizes.append(inside.sum().item())
        shown = (x[0] * 255 - 100 * mask)[inside].abs()
        assert (shown < 60).float().mean() > 0.94                                            # all but the blurred edges
        assert (x[:, ~inside] * 255).round().unique(dim=1).T.tolist() in ([], [[124, 116, 104]])
        assert set(mask.unique().tolist()) <= {0, 1, 2, 255}
    assert shapes == {((3, 50, 50), (50, 50), torch.float32, torch.uint8)}
    assert min(sizes) < 900 < 2000 < max(sizes) <= 2500                                      # 20 x 30 at scale .5, 50 x 50 at 1.5


def test_scales_and_flips_are_drawn():
    values = torch.zeros(10, 20, dtype=torch.uint8)
    values[:, :10] = 1
    widths, left = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        _, mask = train_seg.transform(60, 0.5, 1.5)(tv_tensors.Image(values.expand(3, -1, -1)), tv_tensors.Mask(values))
        row = mask[(mask == 1).any(1)][0]
        widths.add((row != 255).sum().item())
        left.add(row[row != 255][0].item())
    assert min(widths) <= 12 and max(widths) >= 28 and 10 <= min(widths) and max(widths) <= 30 and left == {0, 1}


def test_steps_run_over_epochs():
    """Steps 4 to 9 over epochs of 4 batches, the last one cut; after a resume the same batches come."""
    env = SimpleNamespace(shard=list, device=torch.device("cpu"))
    loader = lambda: sampling.loader(Numbers(), 2, env)
    whole = [(n, batch.tolist()) for n, batch in train_seg.stream(*loader(), 0, 9)]
    assert [n for n, _ in whole] == list(range(1, 10))
    assert sorted(sum((batch for _, batch in whole[:4]), [])) == list(range(8)) and whole[:4] != whole[4:8]
    for done in (3, 4, 9):
        assert [(n, batch.tolist()) for n, batch in train_seg.stream(*loader(), done, 9)] == whole[done:]


class Numbers(torch.utils.data.Dataset):
    seed = 0

    def __len__(self):
        return 8

    def __getitem__(self, key):
        return key[1]

    collate_fn = collate = staticmethod(torch.tensor)


# ---------------------------------------------------------------- interrupted, resumed, finished

def test_killed_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, monkeypatch):
    saves, save_state = [], checkpoints.save_state

    def killed(*args):
        save_state(*args)
        saves.append(args[6])
        if saves == [1, 2, 3]:                                                               # inside the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", killed)
    done = call("train_seg.py", *flags(world, tmp_path, "--save-every", "1"))
    assert done.returncode == 130 and not (tmp_path / "seg.pt").exists()
    done = call("train_seg.py", *flags(world, tmp_path, "--save-every", "1"))
    assert done.returncode == 0 and saves == [1, 2, 3, 4, 5], done.stderr
    strip = lambda path: [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]
    for again in (False, True):                                                              # and as if killed after the last state, before seg.pt
        assert same(weights(tmp_path / "seg.pt"), weights(world / "out/seg.pt"))
        assert strip(tmp_path / "seg.jsonl") == strip(world / "out/seg.jsonl")
        (tmp_path / "seg.pt").unlink()
        assert again or call("train_seg.py", *flags(world, tmp_path)).returncode == 0
    assert saves == [1, 2, 3, 4, 5]


def test_finished_is_skipped_and_another_recipe_refused(world, tmp_path):
    before = (world / "out/seg.pt").stat().st_mtime_ns
    done = call("train_seg.py", *flags(world, world / "out"))
    assert done.returncode == 0 and "is finished" in done.stdout and (world / "out/seg.pt").stat().st_mtime_ns == before
    refused(call("train_seg.py", *flags(world, world / "out", "--lr", "1e-3")), "--lr 0.0001 (now 0.001)")
    other = torch.load(TRUNK, weights_only=True)
    torch.save({"model": other["model"]}, tmp_path / "other.pt")
    refused(call("train_seg.py", *flags(world, world / "out", "--init", tmp_path / "other.pt")), "made from another init file")


def test_two_processes_are_one(world, networks, tmp_path):
    """Batches of 2: each rank has one picture, with its own number of labelled pixels and of masks."""
    jobs = {"out": flags(world, tmp_path / "out"), **{model: network_flags(world, tmp_path / model, model) for model in networks}}
    run_together([["train_seg.py", *more] for more in jobs.values()], tmp_path)
    for name in jobs:
        assert same(weights(tmp_path / name / "seg.pt"), weights(world / name / "seg.pt"), 1e-5)
        for one, two in zip(rows(world / name / "seg.jsonl"), rows(tmp_path / name / "seg.jsonl"), strict=True):
            assert all(two[k] == pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in one.items() if k != "seconds")


def test_bf16_is_close(world, tmp_path):
    done = call("train_seg.py", *flags(world, tmp_path, "--amp", "bf16"))
    assert done.returncode == 0, done.stderr
    first, plain = rows(tmp_path / "seg.jsonl")[0], rows(world / "out/seg.jsonl")[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=0.03) and first["loss"] != plain["loss"]


# ---------------------------------------------------------------- masks

def broken(world, root, id="a_2"):
    """A copy of the masks with one of them to be changed."""
    shutil.copytree(world / "masks", root / "masks")
    (root / "data").symlink_to(world / "data")
    return root / "masks" / f"{id}.png"


def test_masks_come_from_pseudo_unless_a_folder_is_given(world, tmp_path):
    plain = [f for f in flags(world, tmp_path / "out") if f not in ("--label-dir", world / "masks")]
    refused(call("train_seg.py", *plain), "out/pseudo/a_1.png is missing, 5 of 5 masks are", "make_pseudo.py", "--label-dir")
    (tmp_path / "out/pseudo").symlink_to(world / "masks")
    assert call("train_seg.py", *plain).returncode == 0
    assert same(weights(tmp_path / "out/seg.pt"), weights(world / "out/seg.pt"))


def test_masks_without_a_label_have_no_loss(world, tmp_path):
    for id in LABELS:
        path = broken(world, tmp_path, id) if id == "a_1" else tmp_path / "masks" / f"{id}.png"
        mask_files.save_mask(path, np.full_like(mask_files.load_mask(path), 255))
    done = call("train_seg.py", *flags(tmp_path, tmp_path / "out", "--weight-decay", "0"))
    assert done.returncode == 0, done.stderr
    assert all(row["loss"] == row["scored"] == 0 for row in rows(tmp_path / "out/seg.jsonl"))
    processes.seed_all(0)
    assert same(weights(tmp_path / "out/seg.pt"), segmenter.build_segmenter("deeplab_toy", 3, TRUNK).state_dict())


def test_wrong_masks_are_one_line(world, tmp_path):
    path = broken(world, tmp_path)
    run_it = lambda *more: call("train_seg.py", *flags(tmp_path, tmp_path / "out", *more))
    mask = mask_files.load_mask(path)
    path.unlink()
    refused(run_it(), "masks/a_2.png is missing, 1 of 5 masks are", "--label-dir")
    mask_files.save_mask(path, mask[:-2])
    refused(run_it(), "masks/a_2.png is 40x32, its picture 40x34: make the mask again")
    mask_files.save_mask(path, np.where(mask == 2, 7, mask))
    refused(run_it(), "masks/a_2.png holds label 7, classes.txt has 3 classes")
    path.write_bytes(b"no picture")
    refused(run_it(), "masks/a_2.png is not a readable mask")
    assert not list((tmp_path / "out").glob("*.pt"))


def test_wrong_flags_are_one_line(world, tmp_path):
    refused(call("train_seg.py", *flags(world, tmp_path, "--init", tmp_path / "no.pt")), "no.pt: no such file")
    refused(call("train_seg.py", *flags(world, tmp_path, "--init", "imagenet")), "deeplab_toy has no ImageNet weights")
    (world / "data/ImageSets/Segmentation/nothing.txt").write_text("")
    refused(call("train_seg.py", *flags(world, tmp_path, "--split", "nothing")), "nothing.txt is empty")
    done = call("train_seg.py", *flags(world, tmp_path, "--min-scale", "2"))
    assert done.returncode == 2 and "--min-scale is above 0" in done.stderr


def test_processes_on_a_cpu_cannot_train_batchnorm(world, tmp_path, monkeypatch):
    class Two(processes.Env):
        def __init__(self, args):
            super().__init__(args)
            self.world = 2

    monkeypatch.setattr(processes, "Env", Two)
    refused(call("train_seg.py", *flags(world, tmp_path, "--init", "none")), "several processes", "--no-train-batchnorm")


def test_the_manual_names_flags_that_exist():
    help = call("train_seg.py", "--help")
    assert help.returncode == 0
    for flag in set(re.findall(r"--[a-z-]+", train_seg.__doc__)) - {"--nproc"}:              # torchrun's
        assert flag in help.stdout


def test_masks_need_no_image_labels(world, tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "labels.txt").unlink()
    (root / "SegmentationClass").rename(tmp_path / "masks")
    done = call("train_seg.py", *flags(tmp_path, tmp_path / "out", "--iterations", "1"))
    assert done.returncode == 0, done.stderr


def test_a_whole_network_of_other_classes_is_no_start(world, tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "SegmentationClass").rename(tmp_path / "masks")
    (root / "classes.txt").write_text("boat\ntrain\ncow\n")
    refused(call("train_seg.py", *flags(tmp_path, tmp_path / "out", "--init", world / "out/seg.pt")), "seg.pt was trained on other classes")
    assert call("train_seg.py", *flags(world, tmp_path / "same", "--init", world / "out/seg.pt", "--iterations", "1")).returncode == 0


def test_a_damaged_state_is_one_line(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/seg.last.pt").write_bytes(b"torn")
    refused(call("train_seg.py", *flags(world, tmp_path / "out")), "seg.last.pt is damaged", "remove it")


# ---------------------------------------------------------------- Segmenter: WeakTr's clamp

def naive_clamp(ce, known, start, tile):
    """A pixel at a time -> clamped losses, and which pixels were."""
    B, H, W = ce.shape
    mean = lambda where: sum(ce[p].item() for p in where) / max(len(where), 1)
    pixels = [(b, i, j) for b in range(B) for i in range(H) for j in range(W)]
    whole, out, clamped = mean([p for p in pixels if known[p]]), ce.clone(), torch.zeros_like(known)
    for b, i, j in pixels:
        limit = max(whole, mean([p for p in pixels if known[p] and p[1] // tile == i // tile and p[2] // tile == j // tile]))
        if whole < start and ce[b, i, j] > limit:
            out[b, i, j], clamped[b, i, j] = limit, True
    return out, clamped


RECIPES = {  # batch, steps, optimizer, rate, decay, crop, scales, clamp: from the papers, not from the code
    "deeplabv2_resnet101": ("imagenet", 10, 20_000, "sgd", 2.5e-4, 5e-4, 321, 0.5, 1.5, None, None),
    "segmenter_deit_small": ("imagenet", 4, 264_500, "sgd", 1e-4, 0, 480, 0.5, 2, 1.2, 120),
    "mask2former_swin_large": ("imagenet", 4, 80_000, "adamw", 1e-4, 0.05, 512, 0.5, 2, None, None),
    "clip_decoder": ("none", 6, 30_000, "sgd", 0.01, 1e-4, 320, 0.5, 1.5, None, None),
}


@pytest.mark.parametrize("model", RECIPES)
def test_a_network_without_flags_has_its_papers_recipe(model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_seg.py", "--data", "data", "--out", "out", "--model", model])
    args = train_seg.parse()
    assert RECIPES[model] == (args.init, args.batch_size, args.iterations, args.optimizer, args.lr, args.weight_decay, args.crop, args.min_scale, args.max_scale,
                              args.clamp_start, args.clamp_tile)


@pytest.mark.parametrize("start", [0.4, 1.2])
def test_large_losses_are_clamped_to_their_tile(start):
    torch.manual_seed(0)
    ce = torch.rand(2, 7, 5, dtype=torch.double).pow(3).requires_grad_()                     # tiles of 3: the last ones are cut
    ce.data[:, :3, :3] += 1
    known = torch.rand(2, 7, 5) > 0.3
    known[:, 3:6, 3:] = False                                                                # a tile without a label
    want, clamped = naive_clamp(ce, known, start, 3)
    found = losses.clamp_losses(ce, known, start, 3)
    assert torch.allclose(found, want) and torch.equal(torch.autograd.grad(found.sum(), ce)[0], (~clamped).double())
    assert clamped.any() == (start == 1.2) and 0.4 < ce[known].mean() < 1.2
    halves = [torch.stack([torch.stack([torch.where(known, ce.detach(), 0), known])[:, b, 3 * i:3 * i + 3, 3 * j:3 * j + 3].sum((1, 2)) for i in range(3) for j in range(2)])
              .T.view(2, 3, 2) for b in range(2)]
    for b in range(2):                                                                       # a process a picture
        share = losses.clamp_losses(ce[b:b + 1], known[b:b + 1], start, 3, total=lambda sums: sums + halves[1 - b])
        assert torch.allclose(share, want[b:b + 1])


def test_flags_of_other_networks_are_refused(world, tmp_path):
    for flag, words in ((["--clamp-start", "1"], "Segmenter's loss"), (["--model", "mask2former_toy"], "multiple of 32"), (["--model", "segmenter_toy"], "multiple of 8"),
                        (["--model", "segmenter_toy", "--crop", "32", "--train-batchnorm"], "--train-batchnorm is DeepLab's"),
                        (["--model", "clip_decoder", "--train-batchnorm"], "clip_decoder has none")):
        done = call("train_seg.py", *flags(world, tmp_path, *flag))
        assert done.returncode == 2 and words in done.stderr


# ---------------------------------------------------------------- Mask2Former: its loss

def test_losses_of_a_mask():
    torch.manual_seed(0)
    x, t, known = torch.randn(3, 6), torch.rand(3, 6), torch.rand(3, 6) > 0.4
    known[2] = False
    ce, dice = losses.mask_cross_entropy(x, t, known), losses.mask_dice(x, t, known)
    for m in range(3):
        s = [1 / (1 + math.exp(-v)) for v in x[m].tolist()]
        points = [(a, b) for a, b, k in zip(s, t[m].tolist(), known[m].tolist()) if k]
        assert ce[m].item() == pytest.approx(sum(-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in points) / max(len(points), 1), abs=1e-5)
        both, each = sum(a * b for a, b in points), sum(a + b for a, b in points)
        assert dice[m].item() == pytest.approx(1 - (2 * both + 1) / (each + 1), abs=1e-5)
    assert losses.mask_cross_entropy(torch.tensor([100.0, -100.0]), torch.tensor([0.0, 1.0]), torch.ones(2)).item() == 100        # no overflow


@pytest.fixture(scope="module")
def mask2former():
    if MISSING:
        pytest.skip(f"needs {MISSING}")
    torch.manual_seed(0)
    return m2f.build_mask2former("mask2former_toy", 3).train()


ONE = SimpleNamespace(world=1, sum=lambda x: x)


def label_maps():
    maps = torch.zeros(2, 96, 96, dtype=torch.long)
    maps[0, 20:60, 30:60], maps[0, 70:, :50], maps[1, 10:80, 40:90] = 1, 3, 2
    return maps


def test_set_loss_is_the_librarys(mask2former, monkeypatch):
    """At the same points, which both draw by torch.rand."""
    config = mask2former.network.config
    K, tried = config.train_num_points, int(config.oversample_ratio * config.train_num_points)
    rest = K - int(config.importance_sample_ratio * K)
    torch.manual_seed(1)
    points = {n: torch.rand(n, 2) for n in (K, tried, rest)}
    points[tried + rest] = torch.cat([points[tried], points[rest]])
    images, maps = torch.rand(2, 3, 96, 96), label_maps()
    _, classes, masks = mask2former(images)
    labels = [m.unique() for m in maps]
    monkeypatch.setattr(torch, "rand", lambda *size, **how: points[size[-2]].expand(*size).clone())
    parts = train_seg.set_loss(classes, masks, maps, torch.tensor([0, 1]), 0, 1, config, ONE)
    want = mask2former.network(pixel_values=(images - mask2former.mean) / mask2former.std, class_labels=labels,
                               mask_labels=[(m == found[:, None, None]).float() for m, found in zip(maps, labels)]).loss
    monkeypatch.undo()
    found = config.class_weight * parts["classes"] + config.mask_weight * parts["masks"] + config.dice_weight * parts["dice"]
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    weights = [mask2former.network.class_predictor.weight, mask2former.network.model.transformer_module.queries_features.weight]
    for a, b in zip(torch.autograd.grad(found, weights), torch.autograd.grad(want, weights)):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())


def test_what_lies_under_255_changes_nothing_one_logit_from_its_border(mask2former):
    """The upper half has no label. A point of the lower half reads logits from row 11 on, one above the border: 4 pixels a logit."""
    torch.manual_seed(2)
    classes, masks = torch.randn(3, 2, 10, 5), 3 * torch.randn(3, 2, 10, 24, 24)
    maps = label_maps()
    maps[:, :48] = 255

    def loss(masks):
        masks = masks.clone().requires_grad_()
        parts = train_seg.set_loss(classes, masks, maps, torch.tensor([0, 1]), 0, 1, mask2former.network.config, ONE)
        return torch.stack(list(parts.values())), torch.autograd.grad(sum(parts.values()), masks)[0]

    other, seen = masks.clone(), masks.clone()
    other[..., :11, :], seen[..., 12, :] = torch.randn(3, 2, 10, 11, 24), 0
    (values, gradient), (again, same_gradient) = loss(masks), loss(other)
    assert torch.equal(values, again) and torch.equal(gradient, same_gradient) and not gradient[..., :11, :].any()
    assert gradient[..., 12:, :].any() and not torch.equal(values, loss(seen)[0])


def test_a_query_that_sees_a_class_only_under_255_learns_null(mask2former):
    maps = label_maps()[1:]                                                                  # background and class 2
    maps[:, :48] = 255
    classes, masks = torch.zeros(1, 1, 10, 5), torch.full((1, 1, 10, 24, 24), -9.0)
    masks[:, :, 7, :10] = 9                                                                  # where no point counts
    classes[:, :, 7, 1] = 4
    classes.requires_grad_()
    parts = train_seg.set_loss(classes, masks, maps, torch.tensor([0]), 0, 1, mask2former.network.config, ONE)
    gradient = torch.autograd.grad(parts["classes"], classes)[0][0, 0, 7]
    assert gradient[4] < 0 < gradient[1]


def test_matching_costs_least_and_holds_no_number_of_pair_and_point(mask2former):
    """Against all permutations, in 40 layers."""
    config = SimpleNamespace(class_weight=2.0, mask_weight=5.0, dice_weight=5.0)
    torch.manual_seed(3)
    L, Q, M, K = 40, 5, 4, 24
    classes, x, labels, t, known = torch.randn(L, Q, 7), 3 * torch.randn(L, Q, K), torch.arange(M), torch.rand(M, K), torch.rand(K) > 0.3
    with Largest() as seen:
        queries, masks = losses.match(classes, x, labels, t, known, config)
    assert seen.numel == L * Q * K
    for z, p, query, mask in zip(x, classes.softmax(-1), queries, masks):
        cost = 5 * losses.mask_cross_entropy(z[:, None], t, known) + 5 * losses.mask_dice(z[:, None], t, known) - 2 * p[:, :M]
        least = min(cost[list(chosen), range(M)].sum().item() for chosen in itertools.permutations(range(Q), M))
        assert cost[query, mask].sum().item() == pytest.approx(least, abs=1e-5) and sorted(mask.tolist()) == list(range(M))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.numel = max([self.numel, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))])
        return out


def test_points_are_drawn_from_seed_step_and_picture_by_arithmetic(mask2former, monkeypatch):
    """So that another Python draws the same."""
    seeds, classes, masks = [], torch.randn(3, 2, 10, 5), torch.randn(3, 2, 10, 24, 24)
    set_losses = losses.set_losses
    monkeypatch.setattr(losses, "set_losses", lambda *args: seeds.append(args[4].initial_seed()) or set_losses(*args))
    losses_of = lambda seed, step: train_seg.set_loss(classes, masks, label_maps(), torch.tensor([5, 8]), seed, step, mask2former.network.config, ONE)
    first, again, *others = [losses_of(*at)["masks"].item() for at in ((0, 1), (0, 1), (0, 2), (1, 1), (2 ** 32 - 1, 10 ** 6))]
    assert first == again and len({first, *others}) == 4
    assert seeds[:2] == seeds[2:4] == [1_000_008, 1_000_011] and len(set(seeds)) == 8


def test_a_picture_without_a_label_has_no_loss(mask2former):
    torch.manual_seed(2)
    classes, masks, maps = torch.randn(3, 2, 10, 5).requires_grad_(), torch.randn(3, 2, 10, 24, 24).requires_grad_(), label_maps()
    maps[1] = 255
    loss = lambda n: train_seg.set_loss(classes[:, :n], masks[:, :n], maps[:n], torch.arange(n), 0, 1, mask2former.network.config, ONE)
    both, one = loss(2), loss(1)
    assert all(both[k].item() == pytest.approx(one[k].item(), rel=1e-6) for k in one)
    for x in torch.autograd.grad(sum(both.values()), [classes, masks]):                      # zero, not absent: a process may have only such pictures
        assert x[:, 0].any() and not x[:, 1].any()


# ---------------------------------------------------------------- both, as commands

@pytest.mark.parametrize("model", BOTH)
def test_networks_resume_bit_for_bit(world, networks, tmp_path, monkeypatch, model):
    save_state = checkpoints.save_state

    def killed(*args):
        save_state(*args)
        if args[6] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", killed)
    assert call("train_seg.py", *network_flags(world, tmp_path, model, "--save-every", "3")).returncode == 130
    monkeypatch.undo()
    assert call("train_seg.py", *network_flags(world, tmp_path, model)).returncode == 0
    assert same(weights(tmp_path / "seg.pt"), weights(world / model / "seg.pt"))


@pytest.mark.parametrize("model", BOTH)
def test_networks_learn_two_pictures(world, tmp_path, model):
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.copytree(world / "masks", tmp_path / "masks")
    for id in LABELS:
        mask = mask_files.load_mask(tmp_path / "masks" / f"{id}.png")
        Image.fromarray(mask_files.palette()[mask % 255] + 40).save(tmp_path / "data/JPEGImages" / f"{id}.jpg", quality=95)
    done = call("train_seg.py", *network_flags(tmp_path, tmp_path / "out", model, "--iterations", "16", "--limit", "2", "--optimizer", "adamw", "--lr", "3e-3",
                                               "--min-scale", "1", "--max-scale", "1", *(["--clamp-start", "0"] if model == "segmenter_toy" else [])))
    assert done.returncode == 0, done.stderr
    log = rows(tmp_path / "out/seg.jsonl")
    mean = lambda rows: np.mean([row["loss"] for row in rows])
    assert mean(log[-3:]) < 0.7 * mean(log[:3]), (mean(log[-3:]), mean(log[:3]))


@pytest.mark.parametrize("model", BOTH)
def test_networks_are_evaluated(world, networks, tmp_path, model):
    assert torch.load(world / model / "seg.pt", weights_only=True)["args"]["model"] == model
    make_folder(tmp_path / "data")
    done = call("eval.py", "--data", tmp_path / "data", "--out", world / model, "--split", "val", "--what", "seg", "--workers", "0", "--device", "cpu", "--amp", "off",
                "--scales", "1", "3", "--flip", "--crf", "--save")                           # 120 pixels wide at scale 3: windows
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (world / model / "pred/val").glob("*.png")) == ["a_1.png", "a_2.png"]
    assert mask_files.load_mask(world / model / "pred/val/a_2.png", 3).shape == (34, 40)


@pytest.mark.parametrize("model", BOTH)
def test_networks_in_half_precision_are_close(world, networks, tmp_path, model):
    done = call("train_seg.py", *network_flags(world, tmp_path, model, "--amp", "bf16", "--iterations", "2"))
    assert done.returncode == 0, done.stderr
    first, plain = rows(tmp_path / "seg.jsonl")[0], rows(world / model / "seg.jsonl")[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=0.03) and first["loss"] != plain["loss"]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")
def test_gradients_are_clipped_at_their_own_length_and_points_differ(world, networks, tmp_path, monkeypatch):
    """As with a GPU's fp16: a scale of the loss, here a power of two, changes nothing. Every picture of every step has points of its own."""
    seeds, set_losses = [], losses.set_losses
    monkeypatch.setattr(losses, "set_losses", lambda *args: seeds.append(args[4].initial_seed()) or set_losses(*args))
    monkeypatch.setattr(processes.Env, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert call("train_seg.py", *network_flags(world, tmp_path, "mask2former_toy")).returncode == 0
    assert same(weights(tmp_path / "seg.pt"), weights(world / "mask2former_toy/seg.pt"), 1e-5)
    assert len(seeds) == len(set(seeds)) == 10                                               # 5 steps of 2


@pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")
def test_another_mask2former_is_no_start(world, networks, tmp_path):
    more = flags(world, tmp_path, "--model", "mask2former_swin_large", "--crop", "32", "--init", world / "mask2former_toy/seg.pt")
    refused(call("train_seg.py", *more), "seg.pt has a backbone of width 16", "mask2former_swin_large a Swin of 192")


def test_what_was_read_is_said_and_kept(mask2former, world, tmp_path):
    mask2former.network.save_pretrained(tmp_path / "whole")
    more = network_flags(world, tmp_path / "out", "mask2former_toy", "--iterations", "1")
    more[more.index("none")] = tmp_path / "whole"
    done, words = call("train_seg.py", *more), f"whole: {len(mask2former.state_dict()) - 3} tensors read; fresh are class_predictor (2), criterion (1)"
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    content, start = torch.load(tmp_path / "out/seg.pt", weights_only=True), tmp_path / "whole/model.safetensors"
    assert words in content["origin"] and content["args"]["inputs"]["init"] == files.folder_fingerprint(tmp_path / "whole")
    assert "is finished" in call("train_seg.py", *more).stdout
    for path in (start, tmp_path / "whole/config.json"):                                     # other weights, or another configuration, under the same name
        before, time = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(before + b" ")
        refused(call("train_seg.py", *more), "seg.pt was made from another init file")
        path.write_bytes(before), os.utime(path, ns=(time, time))
    assert "is finished" in call("train_seg.py", *more).stdout


def test_a_missing_library_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace())                             # there, or not here either
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(call("train_seg.py", *flags(world, tmp_path, "--model", "mask2former_toy", "--crop", "32", "--init", "none")), "pip install transformers")
