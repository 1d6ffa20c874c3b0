"""train_seg.py as a command: the step of every network against its losses written out, what is frozen, masks,
interrupted against uninterrupted, two processes against one. (Mask2Former: test_mask2former.py.)"""
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, ROOT, arguments, call, make_folder, refused, rows, run_together, same, weights

from plumbing import checkpoints, folders, masks, networks, processes, samples
from wsss import losses

TRUNK = ROOT / "weights/toy_backbone.pt"
SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--log-every", "1"]
NETWORKS = {
    "deeplab_toy": ["--init", TRUNK, "--crop", "33", "--lr", "1e-4"],
    "segmenter_toy": ["--init", "none", "--crop", "32", "--lr", "1e-2", "--clamp-start", "9"],
    "clip_decoder": ["--crop", "32", "--batch-size", "3", "--lr", "0.05", "--width", "16"],
}


def flags(world, out, *more, model="deeplab_toy"):
    clip = ["--clip", world / "clip.pt"] if model == "clip_decoder" else []
    return ["train_seg.py", "--data", world / "data", "--out", out, "--label-dir", world / "masks", *SHARED,
            "--model", model, "--batch-size", "2", "--iterations", "4", *NETWORKS[model], *clip, *more]


def prepare(world, out):
    out.mkdir(exist_ok=True)
    if not (out / "prototypes.pt").exists():
        (out / "prototypes.pt").symlink_to(world / "prototypes.pt")
    return out


def finish(world, out, *more, model="deeplab_toy"):
    done = call(*flags(world, prepare(world, out), *more, model=model))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Images, their masks in `masks` and no truth in the data folder; vision prototypes; of every network a
    finished run in a folder of its name: two epochs of two steps, or four of one."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "data/SegmentationClass").rename(root / "masks")
    (root / "data/backgrounds.txt").write_text("sky\nwater\n")
    (root / "clip.pt").symlink_to(tiny_clip)
    torch.manual_seed(1)
    W = F.normalize(torch.randn(5, 16), dim=1)
    clip = networks.load_clip(tiny_clip, processes.Run(arguments(root)))
    checkpoints.save(root / "prototypes.pt", stage="prototypes", model={"prototypes": W}, classes=CLASSES,
                     args={}, backgrounds=["sky", "water"], clip=clip.fingerprint(), tau_i=0.5)
    for model in NETWORKS:
        finish(root, root / model, model=model)
    return root


# ---------------------------------------------------------------- the step, written out

def first_batch(world, size, crop):
    """Images (size, 3, crop, crop) and masks of the first step, known by the seed alone."""
    folder, run = folders.Folder(world / "data"), processes.Run(arguments(world / "scratch"))
    ids = folder.ids("train")
    augment = samples.segmentation_transform(crop, 0.5, 1.5)
    dataset = samples.Samples(folder, ids, augment, masks=samples.mask_paths(world / "masks", ids))
    keys = next(iter(samples.Batches(5, size, run)))
    return [torch.stack(part) for part in list(zip(*(dataset[key] for key in keys)))[:2]]


def fresh(name, init):
    """The network as the script draws it, right after the seed."""
    processes.seed_all(0)
    return networks.new_segmenter(name, 3, init).train()


def close_step(model, out, rates):
    """The first step of SGD took every weight by its rate along the gradient that `model` holds; AdamW's
    (decay 0) took it by the rate along the gradient's sign."""
    after = weights(out / "seg.pt")
    adam = torch.load(out / "seg.pt", weights_only=True)["args"]["optimizer"] == "adamw"
    for name, w in model.named_parameters():
        step, want = w.detach() - after[name], torch.zeros_like(w)
        if w.requires_grad:
            sure = w.grad.abs() > 1e-5 if adam else torch.ones_like(w, dtype=torch.bool)
            want = rates(name) * (w.grad.sign() if adam else w.grad)
            step, want = step[sure], want[sure]
            assert adam or want.any(), name
        least = 2e-3 if adam else 1e-3 * want.abs().max().item() + 1e-7
        torch.testing.assert_close(step, want, rtol=1e-3, atol=least)


ONE_STEP = ["--iterations", "1", "--lr", "1", "--weight-decay", "0"]


def test_deeplabs_step_sums_the_losses_of_three_scales_and_their_maximum(world, tmp_path):
    images, target = first_batch(world, 2, 33)
    model, total = fresh("deeplab_toy", TRUNK), 0
    model.freeze_batchnorm()
    for z in model(images):
        at = [[round(i * 32 / (n - 1)) for i in range(n)] for n in z.shape[2:]]       # corner on corner
        labels = target[:, at[0]][:, :, at[1]]
        known, best = labels != 255, z.argmax(1)
        total = total - z.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0][known].mean()
    total.backward()
    out = finish(world, tmp_path / "out", *ONE_STEP)
    row = rows(out / "seg.jsonl")[0]
    assert row["loss"] == pytest.approx(total.item(), rel=1e-4) and row["rsc"] == 0
    seen = [(best == labels)[known], (best > 0)[known], known]                        # of the maximum
    assert [row[name] for name in ("accuracy", "foreground", "scored")] == pytest.approx(
        [part.float().mean().item() for part in seen], abs=1e-5)
    close_step(model, out, lambda name: 1 if "backbone" in name else 20 if "bias" in name else 10)


def test_segmenters_step_clamps_large_losses(world, tmp_path):
    """In tiles of 120 pixels, over both images."""
    images, target = first_batch(world, 2, 128)
    model = fresh("segmenter_toy", "none")
    ce = F.cross_entropy(model(images)[0], target, ignore_index=255, reduction="none")
    known, kept, clamped = target != 255, [], 0
    for tile in ((..., slice(i, i + 120), slice(j, j + 120)) for i in (0, 120) for j in (0, 120)):
        here = ce[tile][known[tile]]
        limit = max(ce[known].mean().item(), here.mean().item()) if len(here) else torch.inf
        kept += [here[here <= limit], torch.full_like(here[here > limit], limit)]
        clamped += (here > limit).sum().item()
    loss = torch.cat(kept).mean()
    loss.backward()
    out = finish(world, tmp_path / "out", *ONE_STEP, "--crop", "128", "--max-scale", "1.5",
                 model="segmenter_toy")
    assert rows(out / "seg.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=1e-4) and clamped > 100
    close_step(model, out, lambda name: 0.1 if name.startswith("encoder.") else 1)


@pytest.mark.parametrize("weight,more", [(1.0, []), (0.3, ["--optimizer", "sgd"]),
                                         (0.0, ["--optimizer", "sgd", "--logits", "cosine"])])
def test_the_decoders_step_is_equations_12_to_14(world, tmp_path, weight, more):
    """By AdamW on W^T V, if nothing is said."""
    images, target = first_batch(world, 3, 32)
    run = processes.Run(arguments(world / "scratch"))         # seeds, as in the script
    clip, content = networks.load_clip(world / "clip.pt", run), checkpoints.load(world / "prototypes.pt")
    kind, W = "cosine" if "cosine" in more else "raw", content["model"]["prototypes"]
    model = networks.new_decoder(clip, content, 16, kind).train()
    logits, coarse, V = model(images)
    unit = V / V.norm(dim=1, keepdim=True) / 0.5 if kind == "cosine" else V
    seen = torch.einsum("bdhw,md->bmhw", unit, W)
    torch.testing.assert_close(coarse, torch.cat([seen[:, 3:].exp().sum(1, True).log(), seen[:, :3]], 1))
    present = torch.tensor([[(mask == n + 1).any() for n in range(3)] for mask in target]).float()
    ce = F.cross_entropy(logits, target, ignore_index=255)
    P = losses.region_embeddings(V, coarse.softmax(1)[:, 1:])             # Eq. 12, and 13: test_losses.py
    rsc = losses.region_contrast(P, W[:3], present, 0.07)
    (ce + weight * rsc).backward()                            # Eq. 14
    out = finish(world, tmp_path / "out", *ONE_STEP, "--lambda-rsc", str(weight), *more, model="clip_decoder")
    row = rows(out / "seg.jsonl")[0]
    want = [ce.item(), rsc.item() if weight else 0, (ce + weight * rsc).item()]
    assert [row["ce"], row["rsc"], row["loss"]] == pytest.approx(want, rel=1e-4, abs=1e-4) and rsc > 0.1
    close_step(model, out, lambda name: 1)
    content = torch.load(out / "seg.pt", weights_only=True)
    assert torch.equal(content["model"]["prototypes"], W) and content["clip"] == clip.fingerprint()
    assert not any("conv1" in name for name in content["model"])          # CLIP is not stored


def test_a_decoder_begun_from_another_reads_the_prototypes_that_are_there(world, tmp_path):
    content = checkpoints.load(world / "prototypes.pt")
    W = content["model"]["prototypes"].flip(1)
    checkpoints.save(tmp_path / "prototypes.pt", **{**content, "model": {"prototypes": W}, "tau_i": 0.25})
    start = world / "clip_decoder/seg.pt"
    finish(world, tmp_path, "--init", start, "--iterations", "1", "--lr", "1e-9", model="clip_decoder")
    before, after = weights(start), weights(tmp_path / "seg.pt")
    assert torch.equal(after["prototypes"], W) and after["tau"] == 0.25 and before["tau"] == 0.5
    torch.testing.assert_close(after["mix.weight"], before["mix.weight"])


# ---------------------------------------------------------------- what trains, and at which rate

def test_rates_fall_to_zero_and_frozen_batchnorm_stays(world, tmp_path):
    log = rows(world / "deeplab_toy/seg.jsonl")
    want = [1e-4 * (1 - n / 4) ** 0.9 for n in range(4)]
    assert [row["lr"] for row in log] == pytest.approx(want, rel=1e-4)
    before = fresh("deeplab_toy", TRUNK)
    norms = {f"{name}.{part}" for name, m in before.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
             for part in m.state_dict()}
    learning = finish(world, tmp_path, "--train-batchnorm")
    for out, want in (world / "deeplab_toy", norms), (learning, set()):
        after = weights(out / "seg.pt")
        assert {name for name, w in before.state_dict().items() if torch.equal(w, after[name])} == want


# ---------------------------------------------------------------- resumed, finished, shared out, scored

@pytest.mark.parametrize("model", NETWORKS)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, model, ctrl_c):
    done = call(*flags(world, prepare(world, tmp_path), model=model))
    assert done.returncode == 130 and f"step 3 is saved in {tmp_path / 'seg.last.pt'}" in done.stderr
    assert not (tmp_path / "seg.pt").exists()
    finish(world, tmp_path, model=model)
    assert len(ctrl_c) == 4 and same(weights(tmp_path / "seg.pt"), weights(world / model / "seg.pt"))
    logs = [[{**row, "seconds": 0} for row in rows(out / "seg.jsonl")] for out in (tmp_path, world / model)]
    assert logs[0] == logs[1]


def test_two_processes_are_one(world, tmp_path):
    """Batches of 2 and of 3: the ranks hold unequal numbers of labelled pixels, and of regions. By SGD: AdamW
    makes whole steps of what rounding leaves of a gradient of 0."""
    sgd = ["--optimizer", "sgd"]
    run_together([flags(world, prepare(world, tmp_path / m), *sgd, model=m) for m in NETWORKS], tmp_path)
    for model in NETWORKS:
        one, two = finish(world, tmp_path / f"one_{model}", *sgd, model=model), tmp_path / model
        assert same(weights(two / "seg.pt"), weights(one / "seg.pt"), 1e-5), model
        for row, other in zip(rows(one / "seg.jsonl"), rows(two / "seg.jsonl"), strict=True):
            assert other == pytest.approx({**row, "seconds": other["seconds"]}, rel=1e-4, abs=1e-5), model


# ---------------------------------------------------------------- masks, and bad input

def test_masks_come_from_pseudo_and_other_inputs_are_refused(world, tmp_path):
    out = world / "deeplab_toy"
    assert "is finished" in call(*flags(world, out)).stdout
    refused(call(*flags(world, out, "--lr", "1e-3")), "--lr 0.0001 (now 0.001)")
    torch.save({"model": torch.load(TRUNK, weights_only=True)["model"]}, tmp_path / "other.pt")
    refused(call(*flags(world, out, "--init", tmp_path / "other.pt")), "made from another init file")
    line = [word for word in flags(world, tmp_path) if word not in ("--label-dir", world / "masks")]
    refused(call(*line), "pseudo/a_1.png is missing, 5 of 5 masks are", "make_pseudo.py", "--label-dir")
    (tmp_path / "pseudo").symlink_to(world / "masks")
    assert call(*line).returncode == 0
    assert same(weights(tmp_path / "seg.pt"), weights(world / "deeplab_toy/seg.pt"))


@pytest.fixture
def other(world, tmp_path):
    """The same data, with a copy of the masks to be changed."""
    shutil.copytree(world / "masks", tmp_path / "masks")
    for name in ("data", "prototypes.pt", "clip.pt"):
        (tmp_path / name).symlink_to(world / name)
    return tmp_path


@pytest.mark.parametrize("model", NETWORKS)
def test_pixels_without_a_label_have_no_loss(other, model):
    for path in (other / "masks").iterdir():
        masks.save_mask(path, np.full_like(masks.load_mask(path), 255))
    more = ["--weight-decay", "0", "--iterations"]
    one, four = (finish(other, other / n, *more, n, model=model) for n in "14")
    assert all(row["loss"] == row["scored"] == 0 for row in rows(four / "seg.jsonl"))
    assert same(weights(one / "seg.pt"), weights(four / "seg.pt"))


def test_bad_input_is_one_line(world, other, monkeypatch):
    def refuses(words, *more, where=other, model="deeplab_toy"):
        refused(call(*flags(where, other / "out", *more, model=model)), words)

    path = other / "masks/a_2.png"
    mask = masks.load_mask(path)
    path.unlink()
    refuses("masks/a_2.png is missing, 1 of 5 masks are")
    masks.save_mask(path, mask[:-2])
    refuses("masks/a_2.png is 40x32, its image 40x34: make the mask again")
    masks.save_mask(path, np.where(mask == 2, 7, mask))
    refuses("masks/a_2.png holds label 7, classes.txt has 3 classes")
    refuses("no.pt is missing", "--init", "no.pt", where=world)
    refuses("prototypes.pt is missing: run vpl.py", where=world, model="clip_decoder")
    trained = world / "deeplab_toy/seg.pt"                    # a whole network of the same classes is a start
    finish(world, other / "same", "--init", trained, "--iterations", "1")
    cows = make_folder(other / "cows/data", classes=["boat", "train", "cow"])
    (cows / "SegmentationClass").rename(other / "cows/masks")
    refuses("seg.pt was trained on other classes", "--init", trained, where=other / "cows")
    monkeypatch.setattr(processes.Run, "in_turn", lambda run, make: setattr(run, "world", 2) or make())
    refuses("BatchNorm learns over several processes on GPUs only", "--train-batchnorm", where=world)
    assert not list((other / "out").glob("*.pt"))
