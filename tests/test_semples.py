"""The SemPLeS stages as commands on a tiny world: what trains and what rests, resumed against uninterrupted, two processes against one."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, make_folder, refused, rows, run_together, same, weights
from test_published import coco, coco_match

from plumbing import flags as flag_types, folders, log as logs, maps as map_files, processes, samples as sampling
from wsss import clip_model, generator, losses

SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0"]
TRAIN = ["--epochs", "2", "--batch-size", "2", "--log-every", "1", "--crop", "24"]
STAGES = {"train_cls.py": "cls", "train_match.py": "match", "train_prompt.py": "prompts", "train_refine.py": "refine"}
LATER = list(STAGES)[1:]


def flags(script, world, out, *more):
    """The flags of a stage on the tiny world."""
    own = {"train_cls.py": ["--generator", "deit_tiny", "--backbone", "none", "--lr", "1e-3", "--warmup", "0.5", "--drop-path", "0"],
           "train_prompt.py": ["--lr", "0.01"]}.get(script, ["--lr", "1e-3", "--drop-path", "0"])
    clip = [] if script == "train_cls.py" else ["--clip", world / "clip.pt"]
    return ["--data", world / "data", "--out", out, *SHARED, *TRAIN, *own, *clip, *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, one finished train_cls.py in `first`, and one finished run of all later stages in `out`.

    The later stages start from a sharpened S: after four steps attention is uniform and maps are flat, and min-max blows up their rounding."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "clip.pt").symlink_to(tiny_clip)
    done = call("train_cls.py", *flags("train_cls.py", root, root / "first"))
    assert done.returncode == 0, done.stderr
    (root / "out").mkdir()
    content = torch.load(root / "first/cls.pt", weights_only=True)
    for name, value in content["model"].items():
        value *= {"qkv.weight": 30, "ead.weight": 30}.get(name[-10:], 1)
    torch.save(content, root / "out/cls.pt")
    for script in LATER:
        done = call(script, *flags(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def copy_inputs(world, out, stage):
    """An output folder that holds what the stages before `stage` made."""
    out.mkdir()
    for name in STAGES.values():
        if name == stage:
            return out
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")


# ---------------------------------------------------------------- what a stage does

def test_only_head_and_fusion_of_S_train(world):
    before, after, refined = (weights(world / "out" / f"{name}.pt") for name in ("cls", "match", "refine"))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith(("head.", "adaptive_attention_fusion."))} and len(moved) == 8
    assert {k for k in before if not torch.equal(after[k], refined[k])} == moved


def test_all_of_S_trains_from_labels_and_on_demand(world, tmp_path):
    processes.seed_all(0)                                                           # as Env does
    fresh, trained = generator.build_generator("deit_tiny", 3).state_dict(), weights(world / "first/cls.pt")
    assert {k for k in fresh if torch.equal(fresh[k], trained[k])} == {"norm.weight", "norm.bias"}
    out = copy_inputs(world, tmp_path / "out", "match")
    call("train_match.py", *flags("train_match.py", world, out, "--train-backbone"))
    before, after = weights(out / "cls.pt"), weights(out / "match.pt")
    assert {k for k in before if torch.equal(before[k], after[k])} == {"norm.weight", "norm.bias"}       # on no path to a map


def test_prompts_learn(world):
    log = rows(world / "out/prompts.jsonl")
    vectors = weights(world / "out/prompts.pt")["vectors"]
    assert vectors.shape == (3, 30, 64) and log[-1]["loss"] < log[0]["loss"] and log[-1]["sim_image"] > log[0]["sim_image"]


def test_logged_loss_is_the_equation_on_that_batch(world):
    """The first line of match.jsonl against Eq. 1 written out: the batch, the crops and the weights are known by the seed."""
    folder = folders.Folder(world / "data")
    samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(24, randaugment=True, erase=0.25))
    batches = sampling.Batches(5, 2, processes.Env(flag_types.parser("").parse_args(["--data", "x", "--out", str(world / "out"), "--device", "cpu"])))
    clip = clip_model.load_clip(world / "clip.pt")
    S = generator.load_generator(world / "out/cls.pt").eval()
    values, sims, masks = [], [], []
    for key in next(iter(batches)):
        image, labels, _ = samples[key]
        for k in labels.nonzero().flatten().tolist():
            m = torch.nn.functional.interpolate(S.maps(image[None])[:, [k]], (16, 16), mode="bilinear")[0, 0]
            m = (m - m.min()) / (m.max() - m.min() + 0.1)
            x = clip.normalize(image[None])
            v_f, v_b = clip.encode_normalized(m * x)[0], clip.encode_normalized((1 - m) * x)[0]
            u = clip.encode_text([f"a photo of {CLASSES[k]}."])[0]
            values.append(-(v_f @ u).log() - 2.4 * (1 - v_b @ u).log())
            sims.append(v_f @ u), masks.append(m.mean())
    first = rows(world / "out/match.jsonl")[0]
    assert 0.1 < first["sim_f"] < 0.95                                           # not clamped: the numbers mean something
    assert first["loss"] == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)
    assert first["sim_f"] == pytest.approx(torch.stack(sims).mean().item(), abs=1e-5)
    assert first["mask"] == pytest.approx(torch.stack(masks).mean().item(), abs=1e-5)


def test_vision_prototypes_in_place_of_texts_and_prompts(world, tmp_path):
    """First lines of match.jsonl and refine.jsonl under --targets vision: u_f is W's row, u_b the background row nearest to v_b."""
    folder, out = folders.Folder(world / "data"), copy_inputs(world, tmp_path / "out", "match")
    done = call("vpl.py", "--data", world / "data", "--out", out, *SHARED, "--clip", world / "clip.pt", "--steps", "3", "--lr", "0.1", "--phi", "0.6")
    assert done.returncode == 0, done.stderr
    for script, stage, start in (("train_match.py", "match", "cls"), ("train_refine.py", "refine", "match")):
        done = call(script, *flags(script, world, out, "--targets", "vision"))
        assert done.returncode == 0, done.stderr
        W = torch.load(out / "prototypes.pt", weights_only=True)["model"]["prototypes"]
        samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(24, randaugment=True, erase=0.25))
        batches = sampling.Batches(5, 2, processes.Env(flag_types.parser("").parse_args(["--data", "x", "--out", str(out), "--device", "cpu"])))
        clip, S = clip_model.load_clip(world / "clip.pt"), generator.load_generator(out / f"{start}.pt").eval()
        match, refine = [], []
        for image, labels, _ in (samples[key] for key in next(iter(batches))):
            for k in labels.nonzero().flatten().tolist():
                m = torch.nn.functional.interpolate(S.maps(image[None])[:, [k]], (16, 16), mode="bilinear")[0, 0]
                m, x = (m - m.min()) / (m.max() - m.min() + 0.1), clip.normalize(image[None])
                v_f, v_b = clip.encode_normalized(m * x)[0], clip.encode_normalized((1 - m) * x)[0]
                u_b = max(W[3:], key=lambda row: (row @ v_b).item())
                match.append(losses.match_loss(v_f[None], v_b[None], W[[k]], 2.4)), refine.append(losses.refine_loss(v_f[None], u_b[None]))
        first = rows(out / f"{stage}.jsonl")[0]
        match, refine = torch.cat(match).mean().item(), torch.cat(refine).mean().item()
        assert first["loss"] == pytest.approx(match + (0.05 * refine if stage == "refine" else 0), abs=1e-4)
    assert not (out / "prompts.pt").exists()
    assert call("train_refine.py", *flags("train_refine.py", world, out, "--targets", "vision", "--scheme", "joint")).returncode == 2
    refused(call("train_match.py", *flags("train_match.py", world, tmp_path / "none", "--targets", "vision", "--init", world / "out/cls.pt")), "prototypes.pt is missing: run vpl.py")


def test_total_loss_of_refine_is_match_plus_lambda_refine(world):
    for row in rows(world / "out/refine.jsonl"):
        assert row["loss"] == pytest.approx(row["match"] + 0.05 * row["refine"], rel=1e-4) and row["phase"] == "refine"


def test_logged_parts_add_up_to_the_loss(world):
    for row in rows(world / "out/match.jsonl"):
        assert row["loss"] == pytest.approx(row["foreground"] + 2.4 * row["background"], rel=1e-4) and 0 < row["mask"] < 1
    for row in rows(world / "out/prompts.jsonl"):
        assert row["loss"] == pytest.approx(row["image"] + 0.02 * row["text"], rel=1e-4) and 0 < row["mask"] < 1


def test_views_of_every_epoch_are_the_fresh_crops(world, tmp_path):
    out = copy_inputs(world, tmp_path / "out", "prompts")
    call("train_prompt.py", *flags("train_prompt.py", world, out, "--views", "2"))
    assert same(weights(out / "prompts.pt"), weights(world / "out/prompts.pt"), 1e-5)
    once = copy_inputs(world, tmp_path / "once", "prompts")
    call("train_prompt.py", *flags("train_prompt.py", world, once, "--views", "1"))
    assert not same(weights(once / "prompts.pt"), weights(world / "out/prompts.pt"), 1e-5)


@pytest.mark.parametrize("scheme,phases", [(["--scheme", "joint"], ["joint"] * 2), (["--scheme", "alternate", "--rounds", "2"], ["refine", "refine", "prompt", "prompt", "refine", "refine"])])
def test_schemes(world, tmp_path, scheme, phases):
    out = copy_inputs(world, tmp_path / "out", "refine")
    done = call("train_refine.py", *flags("train_refine.py", world, out, *scheme))
    assert done.returncode == 0, done.stderr
    log = rows(out / "refine.jsonl")
    assert [r["phase"] for r in log] == [p for p in phases for _ in range(2)]
    for row in log:
        want = {"joint": row["match"] + 0.05 * row["refine"] + row["prompt"], "prompt": row["prompt"], "refine": row["match"] + 0.05 * row["refine"]}
        assert row["loss"] == pytest.approx(want[row["phase"]], rel=1e-4)
    moved = not same(torch.load(out / "refine.pt", weights_only=True)["prompts"], weights(world / "out/prompts.pt"))
    assert moved                                                                 # prompts trained here; sequential leaves them:
    assert same(torch.load(world / "out/refine.pt", weights_only=True)["prompts"], weights(world / "out/prompts.pt"))


@pytest.mark.parametrize("more", [["--mask-fill", "black"], ["--mask-fill", "imagenet"], ["--micro-batch", "1"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_options_of_match(world, tmp_path, more):
    out = copy_inputs(world, tmp_path / "out", "match")
    done = call("train_match.py", *flags("train_match.py", world, out, *more))
    assert done.returncode == 0, done.stderr
    close = same(weights(out / "match.pt"), weights(world / "out/match.pt"), 1e-5)
    assert close == ("--micro-batch" in more)                                    # the others change the numbers, memory does not
    first, plain = rows(out / "match.jsonl")[0], rows(world / "out/match.jsonl")[0]
    if "--amp" in more:
        assert first["loss"] == pytest.approx(plain["loss"], rel=0.03)


def test_batches_without_any_pair(world, tmp_path, tiny_clip):
    """Every picture but one holds no class: batches with 0 and with 1 pair are ordinary."""
    root = tmp_path / "w"
    make_folder(root / "data", labels={f"b_{n}": [1] if n == 2 else [] for n in range(6)})
    (root / "clip.pt").symlink_to(tiny_clip)
    for script, stage in STAGES.items():
        done = call(script, *flags(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
        assert all(np.isfinite(row["loss"]) for row in rows(root / "out" / f"{stage}.jsonl"))
    assert sum(row["loss"] == 0 for row in rows(root / "out/match.jsonl")) == 4         # two of three batches in two epochs


# ---------------------------------------------------------------- interrupted, resumed, finished

@pytest.mark.parametrize("script", STAGES)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, script, monkeypatch):
    """Ctrl-C inside the second epoch saves that step. With stochastic depth on, so that the noise of every later step must be the same too."""
    stage = STAGES[script]
    noise = [] if stage == "prompts" else ["--drop-path", "0.5"]
    whole, out = copy_inputs(world, tmp_path / "whole", stage), copy_inputs(world, tmp_path / "out", stage)
    assert call(script, *flags(script, world, whole, *noise)).returncode == 0
    steps, add = [], logs.Meter.add

    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(logs.Meter, "add", strike)
    done = call(script, *flags(script, world, out, *noise))
    assert done.returncode == 130 and f"step 1 of epoch 2 is saved in {out / stage}.last.pt" in done.stderr and "the same command" in done.stderr, done.stderr
    assert not (out / f"{stage}.pt").exists() and not list(out.glob(".*"))
    done = call(script, *flags(script, world, out, *noise))
    assert len(steps) == 4                                                       # two epochs of two: none was done again
    assert done.returncode == 0, done.stderr
    assert same(weights(out / f"{stage}.pt"), weights(whole / f"{stage}.pt"))
    strip = lambda path: [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]
    assert strip(out / f"{stage}.jsonl") == strip(whole / f"{stage}.jsonl")


def test_finished_is_skipped_and_another_recipe_refused(world):
    before = (world / "out/match.pt").stat().st_mtime_ns
    done = call("train_match.py", *flags("train_match.py", world, world / "out"))
    assert done.returncode == 0 and "is finished" in done.stdout and (world / "out/match.pt").stat().st_mtime_ns == before
    refused(call("train_match.py", *flags("train_match.py", world, world / "out", "--lambda-b", "0.75")), "--lambda-b 2.4 (now 0.75)", "another --out")


def test_other_inputs_are_another_recipe(world, tmp_path, tiny_clip):
    """A stage that was finished from other weights is not taken for finished; prompts of another CLIP are refused."""
    out = copy_inputs(world, tmp_path / "out", "match")
    assert call("train_match.py", *flags("train_match.py", world, out)).returncode == 0
    assert call("train_prompt.py", *flags("train_prompt.py", world, out)).returncode == 0
    assert call("train_match.py", *flags("train_match.py", world, out, "--lambda-b", "0.1", "--no-resume")).returncode == 0
    refused(call("train_prompt.py", *flags("train_prompt.py", world, out)), "prompts.pt was made from another start file", "--no-resume")
    other = torch.load(tiny_clip, weights_only=True)
    other["text_projection"] = other["text_projection"] * 1.1
    torch.save(other, tmp_path / "other.pt")
    refused(call("train_refine.py", *flags("train_refine.py", world, out, "--clip", tmp_path / "other.pt")), "learned with another --clip")


# ---------------------------------------------------------------- two processes

def test_two_processes_are_one(world, tmp_path, tiny_clip):
    """Five pictures with 0 to 2 classes in batches of 2: the two ranks hold unequal numbers of pairs, one often none."""
    out = copy_inputs(world, tmp_path / "out", "match")
    jobs = [("train_cls.py", *flags("train_cls.py", world, tmp_path / "first"))]
    jobs += [(script, *flags(script, world, out)) for script in LATER]
    jobs.append(("make_cam.py", "--data", world / "data", "--out", out, *SHARED))
    start = ["--init", coco(tmp_path / "coco"), "--pool", "avg"]
    jobs.append(coco_match(tmp_path / "coco", "two", tiny_clip, *start))
    run_together(jobs, tmp_path)
    assert call(*coco_match(tmp_path / "coco", "one", tiny_clip, *start)).returncode == 0
    assert same(weights(tmp_path / "coco/two/match.pt"), weights(tmp_path / "coco/one/match.pt"), 1e-4)
    for stage in STAGES.values():
        name = f"{'first' if stage == 'cls' else 'out'}/{stage}"
        assert same(weights(tmp_path / f"{name}.pt"), weights(world / f"{name}.pt"), 1e-5), stage
        assert len(rows(world / f"{name}.jsonl")) == len(rows(tmp_path / f"{name}.jsonl")) > 2
        for one, two in zip(rows(world / f"{name}.jsonl"), rows(tmp_path / f"{name}.jsonl")):
            assert all(two[k] == pytest.approx(v, abs=1e-4) for k, v in one.items() if k not in ("seconds", "phase")), stage
    call("make_cam.py", "--data", world / "data", "--out", out, *SHARED, "--cam", "cam_one")
    for id in LABELS:
        assert np.abs(np.load(out / f"cam/{id}.npy").astype(float) - np.load(out / f"cam_one/{id}.npy")).max(initial=0) < 2e-3


# ---------------------------------------------------------------- maps

@pytest.fixture(scope="module")
def maps(world):
    done = call("make_cam.py", "--data", world / "data", "--out", world / "out", *SHARED, "--source", "refine", "--cam", "cam_1", "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    return world / "out/cam_1"


def test_maps_are_scales_and_flips_summed(world, maps):
    S = generator.load_generator(world / "out/refine.pt").eval()
    folder = folders.Folder(world / "data")
    image = folder.image("a_2")                                                  # classes 1 and 2, 34 x 40
    total = 0
    with torch.no_grad():
        for size in ((34, 40), (41, 48)):
            scaled = image[None] if size == (34, 40) else torch.nn.functional.interpolate(image[None], size, mode="bilinear")
            for flip in (False, True):
                m = S.maps(scaled.flip(3) if flip else scaled)
                m = torch.nn.functional.interpolate(m, (34, 40), mode="bilinear")[0, 1:]
                total = total + (m.flip(2) if flip else m)
    want = torch.stack([(m - m.min()) / (m.max() - m.min() + 1e-8) for m in total])
    classes, cam = map_files.load_cam(maps / "a_2.npy", [0, 1, 1])
    assert classes.tolist() == [1, 2] and np.abs(cam - want.numpy()).max() < 1e-3
    assert np.load(maps / "a_3.npy").shape == (0, 30, 40)                         # no class: no map, an ordinary picture


def test_maps_do_not_depend_on_the_batch(world, maps):
    call("make_cam.py", "--data", world / "data", "--out", world / "out", *SHARED, "--cam", "cam_8", "--batch-size", "8")
    for id in LABELS:
        assert np.abs(np.load(maps / f"{id}.npy").astype(float) - np.load(world / f"out/cam_8/{id}.npy")).max(initial=0) < 2e-3


def test_finished_maps_are_kept_and_others_refused(world, tmp_path):
    out = copy_inputs(world, tmp_path / "out", "refine")
    (out / "refine.pt").symlink_to(world / "out/refine.pt")
    base = ["make_cam.py", "--data", world / "data", "--out", out, *SHARED]
    assert call(*base, "--limit", "2").returncode == 0
    old = (out / "cam/a_1.npy").stat().st_mtime_ns
    (out / "cam/a_2.npy").unlink()                                               # as if killed before it
    assert call(*base).returncode == 0                                           # the rest of the split, the same recipe
    assert (out / "cam/a_1.npy").stat().st_mtime_ns == old and len(list((out / "cam").glob("*.npy"))) == 5
    refused(call(*base, "--source", "match"), "--source refine (now match)")
    refused(call(*base, "--scales", "1.0"), "--scales")
    assert call(*base, "--format", "psa").returncode == 0 and len(list((out / "cam_psa").glob("*.npy"))) == 5      # asked for later: made now
    assert call(*base, "--source", "match", "--no-resume").returncode == 0
    assert (out / "cam/a_1.npy").stat().st_mtime_ns != old
    done = json.loads((out / "cam.json").read_text())
    assert done["source"] == "match" and done["pictures"] == 5 and done["maps"] == 6


def test_stride_is_the_mean_of_cells(world, maps, tmp_path):
    out = copy_inputs(world, tmp_path / "out", "refine")
    (out / "refine.pt").symlink_to(world / "out/refine.pt")
    call("make_cam.py", "--data", world / "data", "--out", out, *SHARED, "--stride", "4", "--sheets", "0")
    full, small = np.load(maps / "a_2.npy").astype(float), np.load(out / "cam/a_2.npy").astype(float)
    assert small.shape == (2, 9, 10) and small[1, 2, 3] == pytest.approx(full[1, 8:12, 12:16].mean(), abs=2e-3)
    assert small[0, 8, 0] == pytest.approx(full[0, 32:34, :4].mean(), abs=2e-3)   # the last row holds two lines


def test_formats_of_other_projects(world, maps, tmp_path):
    full = np.load(maps / "a_2.npy").astype(np.float32)
    for name in ("irn", "psa", "clip_es", "fma"):
        out = copy_inputs(world, tmp_path / name, "refine")
        (out / "refine.pt").symlink_to(world / "out/refine.pt")
        done = call("make_cam.py", "--data", world / "data", "--out", out, *SHARED, "--format", name, "--sheets", "0")
        assert done.returncode == 0, done.stderr
        if name == "fma":
            found = np.load(out / "cam_fma/a_2.npz")
            assert found["fg_cls"].tolist() == [1, 2] and np.abs(found["cam"] - full).max() < 1e-3
            continue
        table = np.load(out / f"cam_{name}/a_2.npy", allow_pickle=True).item()
        if name == "psa":
            assert list(table) == [1, 2] and table[2].dtype == np.float32 and np.abs(table[2] - full[1]).max() < 1e-3
        else:
            high = table["high_res" if name == "irn" else "attn_highres"]
            assert list(table["keys"]) == [1, 2] and np.abs(high - full).max() < 1e-3
            assert name != "irn" or table["cam"].shape == (2, 9, 10)


# ---------------------------------------------------------------- bad input

def test_missing_and_wrong_inputs_are_one_line(world, tmp_path):
    empty = tmp_path / "empty"
    refused(call("train_match.py", *flags("train_match.py", world, empty)), "cls.pt is missing: run train_cls.py")
    refused(call("train_prompt.py", *flags("train_prompt.py", world, empty)), "match.pt is missing: run train_match.py")
    refused(call("make_cam.py", "--data", world / "data", "--out", empty, *SHARED), "refine.pt is missing: run train_refine.py")
    out = copy_inputs(world, tmp_path / "out", "prompts")
    refused(call("train_refine.py", *flags("train_refine.py", world, out)), "prompts.pt is missing: run train_prompt.py")
    (out / "prompts.pt").symlink_to(world / "out/cls.pt")
    refused(call("train_refine.py", *flags("train_refine.py", world, out)), "is of stage 'cls', 'prompts' is needed")
    (tmp_path / "other").mkdir()
    make_folder(tmp_path / "other/data")
    (tmp_path / "other/data/classes.txt").write_text("boat\ntrain\ncow\n")
    (tmp_path / "other/clip.pt").symlink_to(world / "clip.pt")
    refused(call("train_match.py", *flags("train_match.py", tmp_path / "other", out, "--no-resume")), "was trained on other classes")
    refused(call("train_match.py", *flags("train_match.py", world, tmp_path / "new", "--init", world / "out/prompts.pt")), "not a mask generator")
    refused(call("train_match.py", *flags("train_match.py", world, tmp_path / "new", "--clip", "ViT-Z/1")), "ViT-Z/1: no such file")
    assert not list(tmp_path.glob("new/*.pt"))


def test_a_loss_that_is_not_finite_names_its_batch(world, tmp_path):
    out = copy_inputs(world, tmp_path / "out", "match")
    (out / "cls.pt").unlink()
    content = torch.load(world / "out/cls.pt", weights_only=True)
    content["model"]["head.weight"][:] = 3e38                       # sums to infinity; NaN itself would be refused as it is read
    torch.save(content, out / "cls.pt")
    line = refused(call("train_match.py", *flags("train_match.py", world, out)), "the loss is nan on the batch", "a_")
    assert not (out / "match.last.pt").exists() and not (out / "match.pt").exists() and "--lr" in line
