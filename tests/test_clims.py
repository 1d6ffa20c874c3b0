"""SemPLeS on CLIMS (Table 4): its generators, its losses in the stages' own steps against loops over scalars, SGD resumed and over two processes."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, call, make_folder, refused, rows, run_together, same, weights

from plumbing import checkpoints, flags as flag_types, folders, maps, processes, samples as sampling
from wsss import clip_model, generator

TAU = 0.16                                                                     # of CBS: some of the texts' cosines are above it, some below
SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0"]
TRAIN = ["--epochs", "2", "--batch-size", "2", "--log-every", "1", "--crop", "24"]
SGD = ["--optimizer", "sgd", "--lr", "0.01", "--head-rate", "10", "--weight-decay", "1e-4"]
CLIMS = ["--train-backbone", "--lambda-match", "10", "--lambda-b", "2.4", "--lambda-cbs", "1", "--lambda-reg", "0.2", "--tau-cbs", str(TAU)]


def flags(script, world, out, *more):
    own = {"train_cls.py": ["--generator", "clims_toy", "--backbone", "none", *SGD], "train_prompt.py": ["--lr", "0.01"]}.get(script, [*SGD, *CLIMS])
    clip = [] if script == "train_cls.py" else ["--clip", world / "clip.pt"]
    return ["--data", world / "data", "--out", out, *SHARED, *TRAIN, *own, *clip, *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, and one finished run of all stages of SemPLeS on CLIMS in `out`."""
    root = tmp_path_factory.mktemp("clims")
    make_folder(root / "data")
    (root / "clip.pt").symlink_to(tiny_clip)
    for script in ("train_cls.py", "train_match.py", "train_prompt.py", "train_refine.py"):
        done = call(script, *flags(script, root, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def copy_inputs(world, out, *names):
    out.mkdir()
    for name in names:
        (out / f"{name}.pt").symlink_to(world / "out" / f"{name}.pt")
    return out


# ---------------------------------------------------------------- the generators

def test_the_toy_sibling_is_a_1x1_classifier_on_the_toy_trunk(tmp_path):
    torch.manual_seed(0)
    model, images = generator.build_generator("clims_toy", 4).eval(), torch.rand(2, 3, 96, 96)
    features = model.trunk((images - model.mean) / model.std)
    want = torch.zeros(2, 4, 24, 24)
    for k in range(4):
        for d in range(64):
            want[:, k] += model.classifier.weight[k, d, 0, 0] * features[:, d]
    masks, (logits,) = model(images)
    assert model.maps_are_masks and 0 < masks.min() and masks.max() < 1
    torch.testing.assert_close(masks, 1 / (1 + (-want).exp()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.maps(images), want.clamp(min=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, want.mean((2, 3)), atol=1e-4, rtol=1e-4)
    sibling = generator.build_generator("cnn_toy", 4)
    assert {k: v.shape for k, v in model.trunk.state_dict().items()} == {k: v.shape for k, v in sibling.trunk.state_dict().items()}

    state, path = model.state_dict(), tmp_path / "cls.pt"
    torch.save({"model": state, "stage": "cls", "classes": list("abcd"), "args": {}}, path)
    loaded = generator.load_generator(path, classes=["a", "b", "c", "d"]).eval()
    assert type(loaded) is generator.ToyClims and torch.equal(loaded.maps(images), model.maps(images))
    with pytest.raises(ValueError, match="cls.pt: maps 4 classes, the data folder has 3"):
        generator.load_generator(path, classes=["a", "b", "c"])
    torch.save({"model": {**state, "classifier.bias": torch.zeros(4)}}, path)
    with pytest.raises(ValueError, match="cls.pt.*classifier.bias"):
        generator.load_generator(path)


@pytest.mark.parametrize("name,rest", [("resnet50", {"backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}), ("clims_toy", set()),
                                       ("deit_tiny", {"norm.weight", "norm.bias"})])
def test_last_layers_have_a_rate_of_their_own(name, rest):
    model = generator.build_generator(name, 3)
    backbone, last = generator.parameter_groups(model, True, 0.1, 10)
    assert (backbone["lr"], last["lr"]) == (0.1, 1.0)
    found = {id(w): n for n, w in model.named_parameters()}
    names = [found[id(w)] for w in last["params"]]
    assert names == [n for n in found.values() if n.startswith(model.trains_when_frozen)]
    assert {found[id(w)] for w in backbone["params"]} == set(found.values()) - set(names) - rest
    assert {n for n, w in model.named_parameters() if not w.requires_grad} == rest
    backbone, last = generator.parameter_groups(model, False, 0.1, 10)
    assert backbone["params"] == [] and [found[id(w)] for w in last["params"]] == names


def test_sgd_falls_by_poly_and_starts_at_its_rates(world):
    log = rows(world / "out/match.jsonl")
    assert [row["lr"] for row in log] == pytest.approx([0.01 * (1 - step / 4) ** 0.9 for step in range(4)], rel=1e-5)
    state = torch.load(world / "out/match.last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["initial_lr"] for g in state] == [0.01, 0.1] and all(g["momentum"] == 0.9 and g["weight_decay"] == 1e-4 for g in state)


# ---------------------------------------------------------------- the losses in a step

def first_batch(world):
    folder = folders.Folder(world / "data")
    samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(24, randaugment=True, erase=0.25))
    batches = sampling.Batches(5, 2, processes.Env(flag_types.parser("").parse_args(["--data", "x", "--out", str(world / "out"), "--device", "cpu"])))
    return [samples[key] for key in next(iter(batches))]


@pytest.mark.parametrize("stage,start", [("match", "cls"), ("refine", "match")])
def test_first_logged_loss_equals_a_scalar_loop(world, stage, start):
    """10 OTM + 24 BTM + 1 CBS + 0.2 REG of the first batch, written out; in (c) + .05 L_refine."""
    clip, S = clip_model.load_clip(world / "clip.pt"), generator.load_generator(world / f"out/{start}.pt").eval()
    manual = clip.encode_text([f"a photo of {name}." for name in
                               ("tree", "river", "sea", "lake", "water", "railway", "railroad", "track", "stone", "rocks")])
    prompts = clip_model.BackgroundPrompts(clip, 3, 30)
    checkpoints.load_weights(prompts, weights(world / "out/prompts.pt"), "")
    clamp = lambda c: min(max(c.item(), 1e-4), 1 - 1e-4)
    log, otm, btm, cbs, reg, refine, counted, pairs = math.log, 0, 0, 0, 0, 0, 0, 0
    with torch.no_grad():
        batch, u_b = first_batch(world), prompts()
        for image, labels, _ in batch:
            logits = S.class_logits(image[None])[0]
            reg += sum(1 / (1 + math.exp(-z)) for z in logits.flatten().tolist()) / logits.numel() / len(batch)
            for k in labels.nonzero().flatten().tolist():
                m = F.interpolate((1 / (1 + (-logits[k]).exp()))[None, None], (16, 16), mode="bilinear")[0, 0]
                x = clip.normalize(image[None])
                v_f, v_b = clip.encode_normalized(m * x)[0], clip.encode_normalized((1 - m) * x)[0]
                u = clip.encode_text([f"a photo of {CLASSES[k]}."])[0]
                otm, btm, refine = otm - log(clamp(v_f @ u)), btm - log(1 - clamp(v_b @ u)), refine - log(1 - clamp(v_f @ u_b[k]))
                near = [c for c in (manual @ v_f).tolist() if c > TAU]
                cbs, counted, pairs = cbs - sum(log(1 - c) for c in near), counted + len(near), pairs + 1
    assert 0 < counted < 10 * pairs and pairs > 1                               # texts on both sides of the threshold
    first = rows(world / f"out/{stage}.jsonl")[0]
    want = 10 * otm / pairs + 24 * btm / pairs + cbs + 0.2 * reg + (0.05 * refine / pairs if stage == "refine" else 0)
    assert first["cbs"] == pytest.approx(cbs, rel=1e-4) and first["reg"] == pytest.approx(reg, rel=1e-4)
    assert first["loss"] == pytest.approx(want, rel=1e-4)


def test_every_loss_moves_all_of_S_but_statistics(world):
    before, match, refine = (weights(world / f"out/{name}.pt") for name in ("cls", "match", "refine"))
    frozen = {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    for old, new in ((before, match), (match, refine)):
        assert {k for k in old if torch.equal(old[k], new[k])} == frozen


@pytest.mark.parametrize("scheme,phases", [("joint", ["joint"]), ("alternate", ["refine", "prompt", "refine"])])
def test_schemes_of_prompts_with_masks_that_are_masks(world, tmp_path, scheme, phases):
    """No min-max anywhere: --mask-eps, which decides it for other generators, changes nothing. Prompts train by AdamW, S with them."""
    jobs = {eps: copy_inputs(world, tmp_path / eps, "cls", "match", "prompts") for eps in ("0.1", "5")}
    for eps, out in jobs.items():
        more = ["--scheme", scheme, "--mask-eps", eps, "--epochs", "1", "--optimizer", "adamw", "--lr", "1e-3"] + (["--rounds", "2"] if scheme == "alternate" else [])
        done = call("train_refine.py", *flags("train_refine.py", world, out, *more))
        assert done.returncode == 0, done.stderr
    assert same(weights(jobs["0.1"] / "refine.pt"), weights(jobs["5"] / "refine.pt"))
    log = rows(jobs["0.1"] / "refine.jsonl")
    assert [row["phase"] for row in log] == [phase for phase in phases for _ in range(2)]
    for row in log:
        of_S = 10 * row["match"] + row["cbs"] + 0.2 * row["reg"] + 0.05 * row["refine"]
        assert row["loss"] == pytest.approx({"refine": of_S, "prompt": row["prompt"], "joint": of_S + row["prompt"]}[row["phase"]], rel=1e-4)
    assert call("train_refine.py", *flags("train_refine.py", world, tmp_path / "0.1", "--scheme", scheme)).returncode == 2          # by SGD


def test_maps_are_relu_summed_over_views(world, tmp_path):
    content = torch.load(world / "out/refine.pt", weights_only=True)
    content["model"]["classifier.weight"] *= -1                                  # after four steps the logits are negative, and relu leaves nothing to compare
    torch.save(content, tmp_path / "refine.pt")
    done = call("make_cam.py", "--data", world / "data", "--out", tmp_path, *SHARED, "--source", "refine", "--scales", "1.0", "--sheets", "0")
    assert done.returncode == 0, done.stderr
    S, image = generator.load_generator(tmp_path / "refine.pt").eval(), folders.Folder(world / "data").image("a_2")
    with torch.no_grad():
        total = sum(F.interpolate(z.relu(), image.shape[1:], mode="bilinear") for z in
                    (S.class_logits(image[None]), S.class_logits(image.flip(2)[None]).flip(3)))[0, 1:]
    want = torch.stack([(m - m.min()) / (m.max() - m.min() + 1e-8) for m in total])
    classes, cam = maps.load_cam(tmp_path / "cam/a_2.npy", [0, 1, 1])
    assert classes.tolist() == [1, 2] and total.amax((1, 2)).min() > 0 and (torch.from_numpy(cam) - want).abs().max() < 5e-3


def test_backgrounds_of_a_file(world, tmp_path):
    out, names = copy_inputs(world, tmp_path / "out", "cls"), tmp_path / "names.txt"
    more = ["--background-texts", names, "--epochs", "1"]
    names.write_text("tree\n\nriver\nsea\nlake\nwater\nrailway\nrailroad\ntrack\nstone\nrocks\n")
    assert call("train_match.py", *flags("train_match.py", world, out, *more)).returncode == 0
    assert rows(out / "match.jsonl")[0]["cbs"] == rows(world / "out/match.jsonl")[0]["cbs"]                   # CLIMS's ten, by name
    names.write_text("tree\n")
    refused(call("train_match.py", *flags("train_match.py", world, out, *more)), "match.pt was made from another backgrounds file")
    assert call("train_match.py", *flags("train_match.py", world, out, *more, "--no-resume")).returncode == 0
    assert rows(out / "match.jsonl")[0]["cbs"] < rows(world / "out/match.jsonl")[0]["cbs"]
    names.write_text("\n")
    refused(call("train_match.py", *flags("train_match.py", world, out, *more, "--no-resume")), "names.txt is empty")


# ---------------------------------------------------------------- interrupted, several processes

@pytest.mark.parametrize("script,stage", [("train_cls.py", "cls"), ("train_match.py", "match"), ("train_refine.py", "refine")])
def test_sgd_killed_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, script, stage, monkeypatch):
    out = copy_inputs(world, tmp_path / "out", *{"cls": [], "match": ["cls"], "refine": ["match", "prompts"]}[stage])
    saves, save_state = [], checkpoints.save_state

    def killed(*args):
        save_state(*args)
        saves.append(args[5:7])
        if len(saves) == 3:                                                      # inside the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", killed)
    assert call(script, *flags(script, world, out, "--save-every", "1")).returncode == 130 and not (out / f"{stage}.pt").exists()
    monkeypatch.setattr(checkpoints, "save_state", save_state)
    done = call(script, *flags(script, world, out, "--save-every", "1"))
    assert done.returncode == 0, done.stderr
    assert same(weights(out / f"{stage}.pt"), weights(world / f"out/{stage}.pt"))
    strip = lambda path: [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]
    assert strip(out / f"{stage}.jsonl") == strip(world / f"out/{stage}.jsonl")


def test_two_processes_are_one(world, tmp_path):
    """CBS is a sum over all pairs, the others are means; the ranks hold unequal numbers of pairs, one often none."""
    out = copy_inputs(world, tmp_path / "out", "cls", "prompts")
    run_together([(script, *flags(script, world, out)) for script in ("train_match.py", "train_refine.py")], tmp_path)
    for stage in ("match", "refine"):
        assert same(weights(out / f"{stage}.pt"), weights(world / f"out/{stage}.pt"), 1e-4), stage
        for one, two in zip(rows(world / f"out/{stage}.jsonl"), rows(out / f"{stage}.jsonl")):
            assert all(two[k] == pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in one.items() if k not in ("seconds", "phase")), stage
        assert min(row["cbs"] for row in rows(out / f"{stage}.jsonl")) > 0


# ---------------------------------------------------------------- the real size

def test_resnet50_through_match_refine_and_maps(world, tmp_path):
    torch.manual_seed(0)
    model = generator.build_generator("resnet50", 3)
    for name, weight in model.named_parameters():
        weight.data *= 0.1 if "bn3" in name else 1                               # an untrained network's logits would saturate every mask
    start, out = tmp_path / "cls.pt", tmp_path / "out"
    torch.save({"model": model.state_dict(), "stage": "cls", "classes": CLASSES, "args": {}}, start)
    small = ["--init", start, "--epochs", "1", "--limit", "2", "--crop", "64"]
    for script, more in (("train_match.py", []), ("train_refine.py", ["--prompts", "random"])):
        done = call(script, *flags(script, world, out, *small, *more))
        assert done.returncode == 0, done.stderr
    before, match, refine = torch.load(start, weights_only=True)["model"], weights(out / "match.pt"), weights(out / "refine.pt")
    for after in (match, refine):
        still = {k for k in before if torch.equal(before[k], after[k])}
        assert {k for k in still if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))} == {
            "backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}
    done = call("make_cam.py", "--data", world / "data", "--out", out, *SHARED, "--source", "refine", "--limit", "2", "--sheets", "0")
    assert done.returncode == 0, done.stderr
    assert maps.load_cam(out / "cam/a_2.npy", [0, 1, 1])[1].shape == (2, 34, 40)
