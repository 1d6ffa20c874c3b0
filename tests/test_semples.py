"""The four SemPLeS stages as commands on a tiny world of VOC's classes: each script's own step against
Eq. 1-3, what trains and what rests, resumed against uninterrupted, two processes against one."""
import argparse
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, call, make_folder, refused, rows, run_together, same, weights

import train_cls
from plumbing import checkpoints, folders, log, networks, processes, samples
from wsss import clip_model, generator

TABLE, PERSON, PLANT, SHEEP, TV = 10, 14, 15, 16, 19
LABELS = {"a_1": [TABLE], "a_2": [PERSON, PLANT], "a_3": [], "a_4": [TABLE, TV], "a_5": [SHEEP]}
RAW = {TABLE: "diningtable", PERSON: "person", PLANT: "pottedplant", SHEEP: "sheep", TV: "tvmonitor"}
NAMES = {TABLE: "dining table", PERSON: "player", PLANT: "potted plant", SHEEP: "sheep", TV: "tv monitor"}
FLAGS = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--epochs", "2",
         "--batch-size", "2", "--log-every", "1", "--crop", "24"]
STAGES = {"train_cls.py": "cls", "train_match.py": "match", "train_prompt.py": "prompts",
          "train_refine.py": "refine"}
LATER = list(STAGES)[1:]
LAST_LAYERS = ("head.", "adaptive_attention_fusion.")


def flags(script, world, out, *more):
    """The flags of a stage on the tiny world."""
    own = ["--lr", "1e-3", "--drop-path", "0"]
    if script == "train_cls.py":
        own += ["--generator", "deit_tiny_toy", "--backbone", "none", "--warmup", "1"]
    if script == "train_prompt.py":
        own = ["--lr", "0.01"]
    clip = [] if script == "train_cls.py" else ["--clip", world / "clip.pt"]
    return ["--data", world / "data", "--out", out, *FLAGS, *own, *clip, *more]


def finish(script, world, out, *more):
    done = call(script, *flags(script, world, out, *more))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, a finished train_cls.py in `first`, and a finished run of the later stages in `out`.

    CLIP leans more than tiny_clip does, so that no cosine is clamped. The later stages start from a sharpened
    S: after four steps attention is uniform and maps are flat, and min-max would enlarge their rounding."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data", LABELS, classes=folders.VOC_CLASSES)
    clip = torch.load(tiny_clip, weights_only=True)
    for name in ("text_projection", "visual.proj"):
        clip[name] += 0.01
    torch.save(clip, root / "clip.pt")
    finish("train_cls.py", root, root / "first")
    (root / "out").mkdir()
    content = torch.load(root / "first/cls.pt", weights_only=True)
    for name, value in content["model"].items():
        value *= 30 if name.endswith(("qkv.weight", "head.weight")) else 1
    torch.save(content, root / "out/cls.pt")
    for script in LATER:
        finish(script, root, root / "out")
    return root


def copy_inputs(world, out, stage):
    """An output folder that holds what the stages before `stage` made."""
    out.mkdir()
    for name in STAGES.values():
        if name == stage:
            return out
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")


# ---------------------------------------------------------------- the step, written out

def first_batch(world, randaugment, erase):
    """[(image (3, 24, 24), [its classes])] of the first step, known by the seed alone."""
    folder = folders.Folder(world / "data")
    transform = samples.train_transform(24, randaugment=randaugment, erase=erase)
    dataset = samples.Samples(folder, folder.ids("train"), transform)
    order = samples.Batches(5, 2, processes.Run(arguments(world / "scratch")))
    batch = [dataset[key] for key in next(iter(order))]
    return [(image, labels.nonzero().flatten().tolist()) for image, labels, _ in batch]


def regions(model, S, image, k, eps, fill):
    """M of class k, and CLIP's features of M X and (1 - M) X."""
    m = F.interpolate(S.maps(image[None])[:, [k]], (16, 16), mode="bilinear", align_corners=True)[0, 0]
    m = (m - m.min()) / (m.max() - m.min() + eps)
    mean = {"imagenet": [0.485, 0.456, 0.406], "mean": [0.48145466, 0.4578275, 0.40821073]}[fill]
    std = {"imagenet": [0.229, 0.224, 0.225], "mean": [0.26862954, 0.26130258, 0.27577711]}[fill]
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    x = F.interpolate(image[None], (16, 16), mode="bicubic", antialias=True).clamp(0, 1)[0]
    seen = m * (x - mean) / std, (1 - m) * (x - mean) / std
    return m, *(model.encode_image(part[None])[0] for part in seen)


def encode_tokens(model, embedded, end):
    """OpenAI's encode_text from the embeddings of all 77 tokens on."""
    x = (embedded + model.positional_embedding)[:, None]
    x = model.ln_final(model.transformer(x)[:, 0])
    return x[end] @ model.text_projection


def prompt(model, vectors):
    """E_T of SOS a photo of [p_1 .. p_30] . EOS, for one class."""
    tokens = clip_model.openai().tokenize("a photo of " + 30 * "x " + ".")
    embedded = model.token_embedding(tokens)[0].detach()
    return encode_tokens(model, torch.cat([embedded[:4], vectors, embedded[34:]]), 35)


def text(model, name):
    tokens = clip_model.openai().tokenize(f"a photo of {name}.")
    return encode_tokens(model, model.token_embedding(tokens)[0], tokens.argmax()).detach()


def cos(a, b):
    value = (a @ b) / (a.norm() * b.norm())
    assert 0.02 < value < 0.98                                # not clamped: the numbers mean something
    return value


@pytest.fixture
def gradients(monkeypatch):
    """Of every step that a script takes: weight's name -> its gradient."""
    steps, step = [], checkpoints.Keeper.step

    def spy(keeper):
        steps.append({name: w.grad.clone() for name, w in keeper.model.named_parameters() if w.requires_grad})
        step(keeper)

    monkeypatch.setattr(checkpoints.Keeper, "step", spy)
    return steps


@pytest.mark.parametrize("script,more", [
    ("train_match.py", {}), ("train_match.py", {"lambda-b": 0.75, "mask-eps": 0.01}),
    ("train_match.py", {"mask-fill": "imagenet", "raw-names": None}),
    ("train_prompt.py", {}), ("train_prompt.py", {"repel": "log", "lambda-i": 0.5, "lambda-t": 0.3}),
    ("train_refine.py", {}), ("train_refine.py", {"prompts": "random", "lambda-refine": 2.0}),
    ("train_refine.py", {"init": "match.pt", "lambda-refine": 2.0})],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value)
def test_a_scripts_own_step_is_the_papers_equations(world, tmp_path, gradients, script, more):
    """Loss and gradient of the first step: pair by pair, through OpenAI's own forward, by autograd.

    (c) starts from cls.pt as (a) does; VOC's classes are fed by the authors' aliases."""
    stage = STAGES[script]
    out = copy_inputs(world, tmp_path / "out", stage)
    start = out / more.get("init", "match.pt" if stage == "prompts" else "cls.pt")
    given = {**more, "init": start} if "init" in more else more
    words = [(f"--{name}", value) for name, value in given.items()]
    finish(script, world, out, *(word for pair in words for word in pair if word is not None))

    prompts_train = script == "train_prompt.py"
    model = clip_model.load_clip(world / "clip.pt").model
    S = generator.load_generator(start).requires_grad_(False)
    if script == "train_refine.py" and "prompts" not in more:
        vectors = weights(out / "prompts.pt")["vectors"]
    else:                                                     # drawn right after the seed
        torch.manual_seed(0)
        vectors = torch.empty(20, 30, 64).uniform_()
    trained = {"vectors": vectors} if prompts_train else {
        name: w for name, w in S.named_parameters() if name.startswith(LAST_LAYERS)}
    for w in trained.values():
        w.requires_grad_()

    values, areas, names = [], [], RAW if "raw-names" in more else NAMES
    for image, classes in first_batch(world, not prompts_train, 0 if prompts_train else 0.25):
        for k in classes:
            eps = more.get("mask-eps", 1e-4 if prompts_train else 0.1)
            m, v_f, v_b = regions(model, S, image, k, eps, more.get("mask-fill", "mean"))
            u_f = text(model, names[k])
            areas.append(m.mean())
            if prompts_train:                                 # Eq. 2
                u_b = prompt(model, vectors[k])
                sim = cos(u_b, u_f)
                away = sim.log() if more.get("repel") == "log" else -(1 - sim).log()
                near = -cos(u_b, v_b).log()
                values.append(more.get("lambda-i", 1.0) * near + more.get("lambda-t", 0.02) * away)
                continue
            away = -(1 - cos(v_b, u_f)).log()                 # Eq. 1
            values.append(-cos(v_f, u_f).log() + more.get("lambda-b", 2.4) * away)
            if script == "train_refine.py":                   # Eq. 3
                sim = cos(v_f, prompt(model, vectors[k]))
                values[-1] = values[-1] - more.get("lambda-refine", 0.05) * (1 - sim).log()
    assert len(values) > 1
    loss = torch.stack(values).mean()
    loss.backward()

    row = rows(out / f"{stage}.jsonl")[0]
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["mask"] == pytest.approx(torch.stack(areas).mean().item(), abs=1e-5)
    assert gradients[0].keys() == trained.keys() and len(trained) == (1 if prompts_train else 8)
    for name, w in trained.items():
        close_gradient(gradients[0][name], w.grad)
    fed = json.loads((out / f"{stage}.jsonl").read_text().splitlines()[0])["texts"]    # the log says which
    assert len(fed) == 20 and all(fed[k] == f"a photo of {name}." for k, name in names.items())


def close_gradient(found, want):
    largest = want.abs().max().item()
    assert largest > 1e-9
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * largest)


def test_train_cls_step_is_the_soft_margin_of_all_logits(world, tmp_path, gradients):
    """The loss of the fine maps moves the fusion alone: the coarse map enters them detached."""
    finish("train_cls.py", world, tmp_path)
    processes.seed_all(0)                                     # as Run does before S is drawn
    S = networks.new_generator("deit_tiny_toy", 20, "none", drop_path=0)
    batch = first_batch(world, True, 0.25)
    parts = [0, 0, 0]
    for image, classes in batch:
        for n, z in enumerate(S(image[None])[1]):             # of tokens, coarse map, fine map
            for k in range(20):
                s = 1 / (1 + (-z[0, k]).exp())
                parts[n] = parts[n] - (s if k in classes else 1 - s).log() / (20 * len(batch))
    fusion = dict(S.adaptive_attention_fusion.named_parameters(prefix="adaptive_attention_fusion"))
    fine = torch.autograd.grad(parts[2], list(fusion.values()), retain_graph=True)
    (parts[0] + parts[1]).backward()
    want = {name: w.grad for name, w in S.named_parameters()} | dict(zip(fusion, fine))
    row = rows(tmp_path / "cls.jsonl")[0]
    assert [row["loss"], *(row[f"loss_{n}"] for n in range(3))] == pytest.approx(
        [sum(parts).item(), *(part.item() for part in parts)], abs=1e-4)
    for name, gradient in gradients[0].items():
        close_gradient(gradient, want[name])


# ---------------------------------------------------------------- what trains

def test_only_head_and_fusion_of_S_move(world, tmp_path):
    before, after, refined = (weights(world / "out" / f"{name}.pt") for name in ("cls", "match", "refine"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(LAST_LAYERS)} and len(moved) == 8
    assert {name for name in before if not torch.equal(before[name], refined[name])} == moved
    prompts = torch.load(world / "out/refine.pt", weights_only=True)["prompts"]
    assert same(prompts, weights(world / "out/prompts.pt"))   # these rest in (c)

    processes.seed_all(0)                                     # from labels and on demand all of S trains
    fresh = networks.new_generator("deit_tiny_toy", 20, "none").state_dict()
    out = copy_inputs(world, tmp_path / "out", "match")
    finish("train_match.py", world, out, "--train-backbone")
    for old, new in ((fresh, weights(world / "first/cls.pt")), (before, weights(out / "match.pt"))):
        rest = {name for name in old if torch.equal(old[name], new[name])}
        assert rest == {"norm.weight", "norm.bias"}           # on no path to a map


def test_stored_features_of_every_epoch_are_the_fresh_crops(world, tmp_path):
    for views in ("2", "1"):
        out = copy_inputs(world, tmp_path / views, "prompts")
        finish("train_prompt.py", world, out, "--views", views)
        close = same(weights(out / "prompts.pt"), weights(world / "out/prompts.pt"), 1e-5)
        assert close == (views == "2")                        # of two epochs


def test_rates_rise_and_fall(world):
    """train_cls.py: linear in its first epoch, of two steps, then cosine to --min-lr; the others: to 0."""
    want = {"first/cls": [1e-6, (1e-6 + 1e-3) / 2, 1e-3, (1e-3 + 1e-5) / 2]}
    for stage, lr in (("match", 1e-3), ("prompts", 0.01), ("refine", 1e-3)):
        want[f"out/{stage}"] = [lr * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    for stage, rates in want.items():
        assert [row["lr"] for row in rows(world / f"{stage}.jsonl")] == pytest.approx(rates, rel=1e-4), stage


def test_half_precision_is_close(world, tmp_path):
    out = copy_inputs(world, tmp_path / "out", "match")
    finish("train_match.py", world, out, "--amp", "fp16")
    found, plain = rows(out / "match.jsonl")[0], rows(world / "out/match.jsonl")[0]
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.03) and found["loss"] != plain["loss"]


def test_batches_without_any_pair(tmp_path, tiny_clip):
    """All images but one hold no class: batches with 0 and with 1 pair are ordinary."""
    make_folder(tmp_path / "data", labels={f"b_{n}": [1] if n == 2 else [] for n in range(6)})
    (tmp_path / "clip.pt").symlink_to(tiny_clip)
    for script, stage in STAGES.items():
        finish(script, tmp_path, tmp_path / "out")
        assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "out" / f"{stage}.jsonl"))
    zeros = sum(row["loss"] == 0 for row in rows(tmp_path / "out/match.jsonl"))
    assert zeros == 4                                         # two of three batches in two epochs


# ---------------------------------------------------------------- interrupted, resumed, finished

@pytest.mark.parametrize("script,more", [
    ("train_cls.py", ["--drop-path", "0.5"]), ("train_prompt.py", ["--views", "2"]),
    ("train_refine.py", ["--drop-path", "0.5", "--prompts", "random"])])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, script, more, monkeypatch):
    """Ctrl-C in the third of four steps. With stochastic depth, whose noise must go on as it was."""
    stage = STAGES[script]
    whole, out = (copy_inputs(world, tmp_path / name, stage) for name in ("whole", "out"))
    finish(script, world, whole, *more)
    steps, add = [], log.Meter.add

    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.Meter, "add", strike)
    done = call(script, *flags(script, world, out, *more))
    assert done.returncode == 130, done.stderr
    assert f"step 3 is saved in {out / stage}.last.pt: to go on, run the same command" in done.stderr
    assert not (out / f"{stage}.pt").exists() and not list(out.glob(".*"))
    finish(script, world, out, *more)
    assert len(steps) == 4                                    # none was done again
    assert same(weights(out / f"{stage}.pt"), weights(whole / f"{stage}.pt"))
    logs = [[{**row, "seconds": 0} for row in rows(folder / f"{stage}.jsonl")] for folder in (out, whole)]
    assert logs[0] == logs[1]


def test_missing_and_wrong_inputs_are_one_line(world, tmp_path, tiny_clip):
    def line(script, out, *more):
        return call(script, *flags(script, world, out, *more))

    empty, out = tmp_path / "empty", copy_inputs(world, tmp_path / "out", "prompts")
    refused(line("train_match.py", empty), "cls.pt is missing: run train_cls.py")
    refused(line("train_prompt.py", empty), "match.pt is missing: run train_match.py")
    refused(line("train_refine.py", out), "prompts.pt is missing: run train_prompt.py")
    (out / "prompts.pt").symlink_to(world / "out/prompts.pt")
    refused(line("train_refine.py", out, "--clip", tiny_clip), "prompts.pt was learned with another --clip")
    refused(line("train_match.py", empty, "--init", world / "out/prompts.pt"), "not a mask generator")
    refused(line("train_match.py", empty, "--init", out / "cls.pt", "--clip", "ViT-Z"), "ViT-Z: no such file")
    make_folder(tmp_path / "other", classes=folders.VOC_CLASSES[::-1])
    done = line("train_match.py", empty, "--init", out / "cls.pt", "--data", tmp_path / "other")
    refused(done, "cls.pt was trained on other classes")
    torch.save(networks.new_generator("clims_toy", 20, "none").state_dict(), tmp_path / "clims.pt")
    for script, more in (("train_match.py", []), ("train_refine.py", ["--prompts", "random"])):
        refused(line(script, empty, "--init", tmp_path / "clims.pt", *more),
                "clims.pt is a ToyClims of CLIMS's kind", "python -m hosts.train_clims")
    assert os.listdir(empty) == []
    done = line("train_match.py", out, "--min-scale", "3")
    assert done.returncode == 2 and "--min-scale: 3 is not in (0, 1]" in done.stderr


def test_the_classifiers_rate_rises_then_falls():
    """4 steps an epoch; 2 epochs of warm-up, or none."""
    for warmup, want in ((2, [0.1 + 0.9 * n / 8 for n in range(8)]), (0, [])):
        args = argparse.Namespace(lr=1.0, warmup_lr=0.1, warmup=warmup, min_lr=0.2, epochs=6)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.lr)
        schedule, found = train_cls.warmup_cosine(optimizer, args, 4), []
        for _ in range(24):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        left = 24 - len(want)
        want = want + [0.2 + 0.8 * (1 + math.cos(math.pi * n / left)) / 2 for n in range(left)]
        assert found == pytest.approx(want)


# ---------------------------------------------------------------- two processes

def test_two_processes_are_one(world, tmp_path):
    """Five images with 0 to 2 classes in batches of 2: ranks hold unequal numbers of pairs, often none."""
    first, out = tmp_path / "first", copy_inputs(world, tmp_path / "out", "match")
    stored, two, one = (copy_inputs(world, tmp_path / name, "prompts") for name in ("stored", "two", "one"))
    jobs = [("train_cls.py", first), ("train_match.py", out), ("train_prompt.py", out),
            ("train_refine.py", out), ("train_prompt.py", stored, "--views", "2"),
            ("train_refine.py", two, "--prompts", "random")]
    run_together([(job[0], *flags(job[0], world, *job[1:])) for job in jobs], tmp_path)
    finish("train_refine.py", world, one, "--prompts", "random")
    pairs = [(out, world / "out", STAGES[script]) for script in LATER]
    pairs += [(first, world / "first", "cls"), (stored, world / "out", "prompts"), (two, one, "refine")]
    for many, single, stage in pairs:
        assert same(weights(many / f"{stage}.pt"), weights(single / f"{stage}.pt"), 1e-5), stage
        logs = [rows(folder / f"{stage}.jsonl") for folder in (single, many)]
        assert len(logs[0]) == len(logs[1]) == 4
        for wanted, found in zip(*logs):
            assert found == pytest.approx({**wanted, "seconds": found["seconds"]}, abs=1e-4), stage
