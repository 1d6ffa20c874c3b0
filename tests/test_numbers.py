"""Numbers at their edge, through the scripts: what is not finite, one class and a thousand, pictures of a few pixels, masks of one value; half precision; the same bits again."""
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, rows, run_together, same, weights
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.append(str(ROOT / "bench"))
import precision  # noqa: E402

from plumbing import checkpoints, files as plain_files, flags as flag_types, folders, log, maps as map_files, masks, processes
from wsss import clip_model, crf, generator, gradcam, losses, metrics, segmenter, texts as names

TRUNK = ROOT / "weights/toy_backbone.pt"
SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]
TRAINERS = {"train_cls.py": "cls", "train_match.py": "match", "train_prompt.py": "prompts", "train_refine.py": "refine", "train_seg.py": "seg"}
SIZES = {"one": (1, 1), "wide": (3, 200), "tall": (200, 3), "flat": (30, 30), "none": (28, 28), "all": (33, 33), "plain": (40, 52), "plain2": (40, 52)}


def make_odd(root, classes):
    """Pictures of one pixel, of three rows, of three columns, of one colour, without any class, with all classes.

    Masks: of one pixel, all background, all of a class, all ignored, an object, some of it ignored."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for n, (id, (h, w)) in enumerate(SIZES.items()):
        Image.fromarray(np.full((h, w, 3), 90, np.uint8) if id == "flat" else rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / f"JPEGImages/{id}.png")
        k = n % len(classes)
        mask = np.full((h, w), {"none": 0, "all": 1, "flat": 255}.get(id, 0), np.uint8)
        if id not in ("none", "all", "flat"):
            mask[h // 4:h // 2 + 1, w // 4:w // 2 + 1], mask[h // 2 + 1:h // 2 + 3] = k + 1, 255
        masks.save_mask(root / f"SegmentationClass/{id}.png", mask)
        lines.append(" ".join([id, *([] if id == "none" else classes if id == "all" else [classes[k]])]))
    (root / "classes.txt").write_text("\n".join(classes))
    (root / "labels.txt").write_text("\n".join(lines))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(SIZES))
    return root


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_clip):
    """The odd pictures with one class, and every stage of SemPLeS done on them."""
    root = tmp_path_factory.mktemp("one")
    make_odd(root / "data", ["dog"])
    (root / "clip.pt").symlink_to(tiny_clip)
    for script in TRAINERS:
        done = call(script, *flags(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def flags(script, world, out, *more):
    own = {"train_cls.py": ["--generator", "cnn_toy", "--backbone", TRUNK, "--lr", "1e-3", "--warmup", "0.5"], "train_prompt.py": ["--lr", "0.01"],
           "train_seg.py": ["--model", "deeplab_toy", "--init", TRUNK, "--label-dir", world / "data/SegmentationClass", "--crop", "33", "--iterations", "4", "--lr", "1e-4"]}
    clip = [] if script in ("train_cls.py", "train_seg.py") else ["--clip", world / "clip.pt"]
    length = [] if script == "train_seg.py" else ["--epochs", "1", "--crop", "24"]
    return ["--data", world / "data", "--out", out, *SHARED, "--amp", "off", "--batch-size", "2", "--log-every", "1", *length, *clip, *own.get(script, ["--lr", "1e-3"]), *more]


def copy_inputs(world, out, stage):
    """A folder that holds what the stages before `stage` made."""
    out.mkdir()
    for name in TRAINERS.values():
        if name == stage:
            return out
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")


# ---------------------------------------------------------------- what is not finite

@pytest.mark.parametrize("script", TRAINERS)
def test_weights_that_a_step_breaks_are_not_saved(one, tmp_path, script):
    """The loss of step 1 is finite, its gradient is not: the next loss would show it, after the state of step 1 was saved."""
    stage = TRAINERS[script]
    out = copy_inputs(one, tmp_path / "out", stage)

    def spoil(optimizer, *_):
        next(w for group in optimizer.param_groups for w in group["params"] if w.grad is not None).grad.view(-1)[0] = float("nan")

    hook = register_optimizer_step_pre_hook(spoil)
    try:
        done = call(script, *flags(script, one, out, "--save-every", "1"))
    finally:
        hook.remove()
    refused(done, f"{stage}.last.pt: ", "holds NaN or infinity after step 1 of epoch 0", "not saved", "lower --lr")
    assert not (out / f"{stage}.last.pt").exists() and not (out / f"{stage}.pt").exists()
    assert len(rows(out / f"{stage}.jsonl")) == 1 and math.isfinite(rows(out / f"{stage}.jsonl")[0]["loss"])


@pytest.mark.parametrize("script", TRAINERS)
def test_a_loss_that_is_not_finite_leaves_the_state_from_before(one, tmp_path, script, monkeypatch):
    """From the third step on the loss is NaN: the state of the second stays, and the run goes on from it to the same bits."""
    stage = TRAINERS[script]
    out, mean, steps = copy_inputs(one, tmp_path / "out", stage), processes.mean, []
    add = log.Meter.add

    def count(meter, pictures, **values):
        steps.append(pictures)
        return add(meter, pictures, **{**values, "loss": values["loss"] * (float("nan") if len(steps) >= 3 else 1)})

    monkeypatch.setattr(log.Meter, "add", count)
    done = call(script, *flags(script, one, out, "--save-every", "2"))
    names = [list(SIZES)[i] for i in steps[-1].tolist()]
    refused(done, f"the loss is nan on the batch {', '.join(names)}, ...", "--lr", "--amp", "the last saved state is from before")
    assert torch.load(out / f"{stage}.last.pt", weights_only=True)["step"] == 2 and not (out / f"{stage}.pt").exists()
    monkeypatch.undo()
    assert mean is processes.mean and call(script, *flags(script, one, out, "--save-every", "2")).returncode == 0
    assert same(weights(out / f"{stage}.pt"), weights(one / f"out/{stage}.pt"))


def test_rates_that_overflow_make_no_prototypes(one, tmp_path):
    base = ["--data", one / "data", "--clip", one / "clip.pt", *SHARED, "--amp", "off", "--tau-t", "0.02", "--steps", "4", "--save-every", "1"]
    done = call("vpl.py", *base, "--out", tmp_path, "--lr", "1e308")
    assert done.returncode == 1 and "vpl.py: after step 1 the prototypes are not of unit length: a smaller --lr" in done.stderr and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flag", ["--lr", "--weight-decay", "--momentum", "--lambda-b", "--mask-eps", "--drop-path"])
def test_flags_take_numbers(one, tmp_path, flag):
    for wrong in ("nan", "inf", "-1", *["1e39"] * (flag != "--mask-eps")):
        done = call("train_match.py", *flags("train_match.py", one, tmp_path / "out", f"{flag}={wrong}"))
        assert done.returncode == 2 and f"argument {flag}: {wrong} is not" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_one_rank_sees_stops_both(monkeypatch, rank):
    """Of two ranks the second has a NaN in its second step. Both stop and name its batch: one that went on alone would wait for the other for ever."""
    seen = [torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])]
    env = SimpleNamespace(world=2, sum=lambda tensor: tensor + seen[1 - rank] if tensor.dtype == torch.int32 else None)

    def all_gather_object(found, mine):
        assert mine == ((1.0, ["picture1"]) if rank == 0 else (pytest.approx(float("nan"), nan_ok=True), ["picture11"]))
        found[:] = [(1.0, ["picture1"]), (float("nan"), ["picture11"])]

    monkeypatch.setattr(log.dist, "all_gather_object", all_gather_object)
    meter = log.Meter(env)
    for step in range(3):
        meter.add(torch.tensor([10 * rank + step]), loss=torch.tensor(float("nan") if seen[rank][step] else 1.0))
    with pytest.raises(ValueError, match="the loss is nan on the batch picture11, ..."):
        meter.read([f"picture{n}" for n in range(20)])


# ---------------------------------------------------------------- fp16

def test_fp16_leaves_out_steps_whose_gradients_overflow(tmp_path):
    """A skipped step changes neither weights nor optimizer and halves the scale; where every step is, the state is refused."""
    args = flag_types.parser("").parse_args(["--data", "x", "--out", str(tmp_path), "--device", "cpu", "--amp", "fp16"])
    env, w = processes.Env(args), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(w.weight, 0.5)
    optimizer, scaler = torch.optim.AdamW(w.parameters(), 0.1), env.scaler()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    save = lambda: checkpoints.save_state(tmp_path / "x.last.pt", w, optimizer, schedule, scaler, 0, 1, args)

    def step(factor):
        scaler.scale(w(torch.ones(1, 1)).sum() * factor).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True)

    step(1e38)                                                                                       # times 1,024: infinite
    assert w.weight.item() == 0.5 and not optimizer.state and scaler.get_scale() == 512
    step(1.0)
    assert w.weight.item() == pytest.approx(0.4, abs=1e-3) and scaler.get_scale() == 512
    save()
    for _ in range(40):
        step(float("inf"))
    (tmp_path / "x.last.pt").unlink()
    with pytest.raises(ValueError, match="x.last.pt: no step is taken, since fp16 gradients are not finite at any scale, after step 1.*--amp bf16 or off"):
        save()
    assert not list(tmp_path.glob("*.pt")) and w.weight.item() == pytest.approx(0.4, abs=1e-3)


# ---------------------------------------------------------------- one class, few pixels, masks of one value

def cam_ok(folder, labels, ids):
    for id, label in zip(ids, labels):
        maps = np.load(folder / f"{id}.npy")
        assert len(maps) == label.sum() and np.isfinite(maps).all() and (maps >= 0).all() and (maps <= 1).all(), id
        if maps.size:
            map_files.load_cam(folder / f"{id}.npy", label, SIZES[id])                                    # of the picture's proportions


def masks_ok(folder, ids, values):
    for id in ids:
        mask = masks.load_mask(folder / f"{id}.png", 1)
        assert mask.shape == SIZES[id] and set(np.unique(mask)) <= values, id


def test_odd_pictures_of_one_class_through_every_stage(one, tmp_path):
    """What each stage writes is finite and of the picture's size; a picture without a class is background."""
    out, ids = tmp_path / "out", list(SIZES)
    out.mkdir()
    for name in TRAINERS.values():
        (out / f"{name}.pt").symlink_to(one / "out" / f"{name}.pt")
        assert all(math.isfinite(row["loss"]) for row in rows(one / f"out/{name}.jsonl"))
    base, clip = ["--data", one / "data", "--out", out, *SHARED, "--amp", "off"], ["--clip", one / "clip.pt"]
    labels = folders.Folder(one / "data").labels(ids)
    jobs = [["vpl.py", *clip, "--tau-t", "0.02", "--steps", "3"], *(["make_cam.py", "--source", source, *clip * (source != "refine"), "--cam", source] for source in ("refine", "text", "vision")),
            ["make_cam.py", "--source", "text", *clip, "--cam", "scaled", "--no-affinity", "--scales", "0.5", "1.5", "--flip", "--stride", "4"],
            *(["make_pseudo.py", "--cam", "vision", "--pseudo", preset, "--preset", preset, "--background", "power", "--ignore-below", "0.5"] for preset in crf.PRESETS),
            ["make_pseudo.py", "--cam", "refine", "--pseudo", "torch", "--backend", "torch"], ["make_pseudo.py", "--cam", "refine", "--pseudo", "plain", "--no-crf"],
            ["eval.py", "--what", "cam", "--cam", "vision", "--oracle"], ["eval.py", "--what", "pseudo", "--pseudo", "weaktr"],
            ["eval.py", "--what", "seg", "--save", "--scales", "0.5", "1", "1.75"], ["report.py"]]
    for job in jobs:
        done = call(job[0], *base, *job[1:])
        assert done.returncode == 0, (job, done.stderr)
    for source in ("refine", "text", "vision", "scaled"):
        cam_ok(out / source, labels, ids)
    for folder in (*crf.PRESETS, "torch", "plain"):
        masks_ok(out / folder, ids, {0, 1, 255} if folder in crf.PRESETS else {0, 1})
        assert set(np.unique(masks.load_mask(out / folder / "none.png"))) <= {0, 255}
    masks_ok(out / "pred/train", ids, {0, 1})
    for name in ("vision", "pseudo_weaktr", "seg"):
        score = plain_files.read_json(next(out.glob(f"eval_{name.removeprefix('pseudo_')}_train.json")))
        assert 0 <= score["miou"] <= 1 and len(score["iou"]) == 2, name


@pytest.mark.parametrize("model,more", [("segmenter_toy", ["--crop", "32"]), ("clip_decoder", ["--crop", "32", "--width", "16"])])
def test_odd_pictures_train_and_test_other_networks(one, tmp_path, model, more):
    pictures = ["--data", one / "data", "--out", tmp_path, *SHARED, "--amp", "off"]
    clip = ["--clip", one / "clip.pt"] if model == "clip_decoder" else []
    if clip:
        assert call("vpl.py", *pictures, *clip, "--tau-t", "0.02", "--steps", "2").returncode == 0
    done = call("train_seg.py", *pictures, "--model", model, "--init", "none", "--label-dir", one / "data/SegmentationClass", "--batch-size", "2", "--iterations", "4", "--log-every", "1", *clip, *more)
    assert done.returncode == 0 and all(math.isfinite(row["loss"]) for row in rows(tmp_path / "seg.jsonl")), done.stderr
    assert call("eval.py", *pictures, "--what", "seg", "--save", "--no-crf", "--scales", "0.5", "1").returncode == 0
    masks_ok(tmp_path / "pred/train", list(SIZES), {0, 1})


def test_superpixels_of_odd_pictures(one, tmp_path):
    pytest.importorskip("skimage")
    base = ["--data", one / "data", "--out", tmp_path, *SHARED, "--amp", "off"]
    (tmp_path / "match.pt").symlink_to(one / "out/match.pt")
    for job in (["make_cam.py", "--source", "match"], ["make_segments.py", "--source", "felzenszwalb"], ["make_segments.py", "--source", "slic", "--segments", "slic"],
                ["make_pseudo.py", "--segments", tmp_path / "segments", "--pseudo", "sams"], ["make_pseudo.py", "--segments", tmp_path / "slic", "--vote", "sepl", "--pseudo", "sepl"]):
        done = call(job[0], *base, *job[1:])
        assert done.returncode == 0, (job, done.stderr)
    for folder in ("sams", "sepl"):
        masks_ok(tmp_path / folder, list(SIZES), {0, 1})


def test_a_mask_of_one_value_shows_clip_all_or_nothing():
    """A flat map is an empty mask, in float32 and without a division by 0; a mask of ones leaves no background."""
    for value in (0.0, 3.0):
        assert not losses.mask_from_map(torch.full((1, 4, 4), value), 0.1).any() and not losses.mask_from_map(torch.full((1, 1, 1), value), 1e-4).any()
    images = torch.rand(1, 3, 4, 4)
    for mask, (front, back) in ((torch.ones(1, 4, 4), (images, 0 * images)), (torch.zeros(1, 4, 4), (0 * images, images))):
        found = losses.split_regions(images, mask)
        assert torch.equal(found[0], front) and torch.equal(found[1], back)


def test_no_pair_at_all_is_a_zero_with_a_gradient():
    """What every trainer's loss is made of, for a batch or a rank without a pair: 0, and a gradient of 0, not NaN."""
    w, none = torch.randn(4, 8, requires_grad=True), torch.zeros(0, dtype=torch.long)
    v, u = w[none], torch.randn(0, 8)
    values = [losses.match_loss(v, v, u, 2.4), losses.prompt_loss(v, u, u, 0.02), losses.refine_loss(v, u), losses.suppression_loss(v, torch.randn(3, 8), 0.26)]
    loss = sum(processes.mean(x) for x in values) + processes.total(values[3]) + losses.region_contrast(w[None].transpose(1, 2)[:, :3, :1], torch.randn(3, 1), torch.zeros(1, 3), 0.07)
    loss.backward()
    assert loss.item() == 0 and not w.grad.any()


def test_gradcam_of_one_text_without_a_rival(tiny_clip):
    """L = t_k alone: the maps of cosine and patches, as autograd has them; of one patch, a map of 0."""
    clip = clip_model.load_clip(tiny_clip)
    text, b = clip.encode_text(["a photo of a dog."]), torch.zeros(1, dtype=torch.long)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 24, 24)
    x, attention, grid = gradcam.last_inputs(clip, images)
    found = gradcam.class_maps(clip, x, attention, grid, text, 1, b, b, 100)
    u = gradcam.last_block(clip, x).u.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        norm = gradcam.layer_norm
        patch.setattr(gradcam, "layer_norm", lambda module, y: u if module is clip.model.visual.transformer.resblocks[-1].ln_1 else norm(module, y))
        e = torch.nn.functional.normalize(gradcam.last_block(clip, x).patches.mean(1), dim=-1)
    weights, = torch.autograd.grad((100 * e @ text.T).sum(), u)
    want = (u[:, 1:] @ weights[:, 1:].mean(1).unsqueeze(-1)).relu().view(1, *grid)
    assert found.max() == 1 and torch.allclose(found, gradcam.min_max(want), atol=1e-3)
    for size in ((1, 1), (3, 200)):
        maps = gradcam.class_maps(clip, *gradcam.last_inputs(clip, torch.rand(1, 3, *size)), text, 1, b, b, 100, box=0.4)
        assert maps.shape == (1, 1, max(1, size[1] // 8)) and maps.isfinite().all()


# ---------------------------------------------------------------- a thousand classes

def test_a_mask_of_8_bits_holds_254_classes(tmp_path):
    make_odd(tmp_path / "data", ["dog"])
    names = [f"class{n}" for n in range(1000)]
    (tmp_path / "data/classes.txt").write_text("\n".join(names))
    with pytest.raises(ValueError, match=r"data/classes.txt lists 1000 classes, an 8-bit mask holds 254"):
        folders.Folder(tmp_path / "data")
    (tmp_path / "data/classes.txt").write_text("\n".join(names[:254]))
    (tmp_path / "data/labels.txt").write_text("\n".join(f"{id} 253" for id in SIZES))
    mask = np.full((33, 33), 254, np.uint8)
    mask[0] = 255
    masks.save_mask(tmp_path / "data/SegmentationClass/all.png", mask)
    folder = folders.Folder(tmp_path / "data")
    assert folder.labels(["all"]).argmax() == 253 and folder.truth("all").max() == 255
    matrix = metrics.confusion(folder.truth("all"), np.full((33, 33), 254, np.uint8), 255)
    assert metrics.iou(matrix).nanmean() == 1 and matrix.sum() == 32 * 33                              # 254 is a class, 255 is none


def test_functions_take_a_thousand_classes(tiny_clip):
    """Shapes, finite numbers, and for the last class the same as alone."""
    C = 1000
    clip = clip_model.load_clip(tiny_clip)
    texts = clip.encode_text(names.class_texts([f"class {n}" for n in range(C)]))
    assert texts.shape == (C, 16) and torch.allclose(texts[-1:], clip.encode_text(["a photo of class 999."]), atol=1e-6)
    prompts = clip_model.BackgroundPrompts(clip, C, 2)
    prompts().sum().backward()
    assert prompts.vectors.grad.isfinite().all() and prompts.vectors.grad.shape == (C, 2, 64)
    maps, logits = generator.build_generator("deit_tiny", C)(torch.rand(1, 3, 24, 24))
    labels = torch.zeros(1, C).index_fill(1, torch.tensor([0, 999]), 1)
    assert maps.shape == (1, C, 4, 4) and all(losses.cls_loss(z, labels).isfinite() for z in logits)

    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    p_text = losses.assignment(x, texts, 0.01)
    W = losses.learn_prototypes(x, texts, p_text, 0.03, 0.1, 3)
    assert p_text.sum(1).allclose(torch.ones(50), atol=1e-4) and W.norm(dim=1).allclose(torch.ones(C), atol=1e-5)
    assert losses.prototype_loss(x, W, p_text, 0.03) < losses.prototype_loss(x, texts, p_text, 0.03)
    regions = losses.region_embeddings(torch.randn(1, 16, 3, 3), torch.rand(1, C, 3, 3))
    assert losses.region_contrast(regions, W, labels, 0.07).isfinite() and losses.region_contrast(regions[:, [0, 999]], W[[0, 999]], torch.ones(1, 2), 0.07).isfinite()
    probability = segmenter.predict(segmenter.build_segmenter("deeplab_toy", C).eval(), torch.rand(1, 3, 5, 5))
    assert probability.shape == (1, 1 + C, 5, 5) and probability.sum(1).allclose(torch.ones(1, 5, 5), atol=1e-4)
    posterior = crf.dense_crf(np.zeros((3, 3, 3), np.uint8), probability[0, :, :3, :3], backend="torch", iterations=1)
    assert posterior.shape == (1 + C, 3, 3) and np.allclose(posterior.sum(0), 1, atol=1e-4)


# ---------------------------------------------------------------- half precision, and the same bits again

@pytest.mark.parametrize("script", ["train_match.py", "train_prompt.py", "train_refine.py"])
def test_half_precision_stays_near_float32(one, tmp_path, script):
    """The bounds that the README states, over 8 steps; bench/precision.py measures 50 on the toy world."""
    stage, more = TRAINERS[script], ["--epochs", "2", "--no-randaugment", "--erase", "0"]
    runs = {amp: copy_inputs(one, tmp_path / amp, stage) for amp in ("off", "bf16", "fp16")}
    for amp, out in runs.items():
        done = call(script, *flags(script, one, out, *more, "--amp", amp))
        assert done.returncode == 0, done.stderr
    for amp in ("bf16", "fp16"):
        found = precision.compare(runs["off"], runs[amp], stage, weights(one / f"out/{stage}.pt"))
        assert 0 < found["loss"] and all(found[name] <= bound for name, bound in precision.BOUNDS[amp].items()), (amp, found)
        assert found["skipped"] == (0 if amp == "fp16" else None)


def test_a_fresh_process_with_other_workers_makes_the_same_bits(one, tmp_path):
    """Every trainer, maps, prototypes and masks: one process here, another there, with loader processes and --deterministic."""
    out, base = tmp_path / "out", ["--data", one / "data", *SHARED, "--amp", "off"]
    later = [["vpl.py", "--tau-t", "0.02", "--steps", "3", "--clip", one / "clip.pt"], ["make_cam.py", "--source", "refine"], ["make_pseudo.py"]]
    whole = tmp_path / "here"
    whole.mkdir()
    for name in TRAINERS.values():
        (whole / f"{name}.pt").symlink_to(one / "out" / f"{name}.pt")
    for script, *more in later:
        done = call(script, *base, "--out", whole, *more)
        assert done.returncode == 0, done.stderr
    other = ["--deterministic", "--workers"]
    run_together([[script, *flags(script, one, out, *other, 1)] for script in TRAINERS] +
                 [[script, *base, "--out", out, *more, *other, int(script != "make_pseudo.py")] for script, *more in later], tmp_path, processes=1)
    for name in (*TRAINERS.values(), "prototypes"):
        assert same(weights(whole / f"{name}.pt"), weights(out / f"{name}.pt")), name
    files = [path.relative_to(whole) for path in (*whole.glob("cam/*.npy"), *whole.glob("pseudo/*.png"), *whole.glob("features/*.npy"))]
    assert len(files) == 3 * len(SIZES) and all((whole / path).read_bytes() == (out / path).read_bytes() for path in files)


def test_deterministic_asks_pytorch_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *how, **more: asked.append((how, more)))
    for more, found in (([], []), (["--deterministic"], [((True,), {"warn_only": True})])):
        args = flag_types.parser("").parse_args(["--data", "x", "--out", str(tmp_path), "--device", "cpu", *more])
        processes.Env(args)
        assert asked == found and ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == bool(found) and "deterministic" not in flag_types.recipe(args)


def test_the_seeds_of_crops_are_those_of_every_cpython():
    """hash() of whole numbers: were it another, the same --seed would give other crops and another order."""
    assert [hash(key) & 0x7FFFFFFFFFFFFFFF for key in ((0, 0), (0, 1, 2), (7, 59, 10581))] == [765232833172254823, 2187946392326065592, 1527410775293990675]
