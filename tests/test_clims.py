"""CLIMS, and SemPLeS on CLIMS: each script's own step against scalars, SGD resumed, two processes as one."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, arguments, call, make_folder, refused, rows, run_together, same, weights

from hosts import clims, train_clims
from plumbing import folders, networks, processes, samples
from plumbing.maps import load_cam
from wsss import clip_model

TAU = 0.16                          # of L_CBS: the cosines of some texts are above it, of some below
BACKGROUNDS = ["tree", "river", "sea", "lake", "water", "railway", "railroad", "track", "stone", "rocks"]
SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0"]
TRAIN = [*SHARED, "--epochs", "2", "--batch-size", "2", "--log-every", "1", "--crop", "24"]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
FIRST = {"backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}         # of ResNet-50
SCRIPTS = {"cls": ["hosts.train_cam", "--generator", "clims_toy", "--backbone", "none", "--lr", "0.01"],
           "match": ["hosts.train_clims", "--tau-cbs", TAU, "--lr", "0.01"],
           "prompts": ["train_prompt.py", "--lr", "0.01"],
           "refine": ["hosts.train_clims", "--stage", "refine", "--tau-cbs", TAU, "--lr", "0.01"]}


def job(stage, world, out, *more):
    clip = [] if stage == "cls" else ["--clip", world / "clip.pt"]
    return [*SCRIPTS[stage], "--data", world / "data", "--out", out, *TRAIN, *clip, *more]


def finish(stage, world, out, *more):
    done = call(*job(stage, world, out, *more))
    assert done.returncode == 0, done.stderr
    return out / f"{stage}.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, and one finished run of all stages of SemPLeS on CLIMS in `out`."""
    root = tmp_path_factory.mktemp("clims")
    make_folder(root / "data")
    (root / "clip.pt").symlink_to(tiny_clip)
    for stage in SCRIPTS:
        finish(stage, root, root / "out")
    return root


def copy_inputs(world, out, *stages):
    out.mkdir()
    for stage in stages:
        (out / f"{stage}.pt").symlink_to(world / f"out/{stage}.pt")
    return out


# ---------------------------------------------------------------- the step

def first_batch(world):
    """[(image (3, 24, 24), labels (C,))] of the first step, known by the seed alone."""
    folder = folders.Folder(world / "data")
    dataset = samples.Samples(folder, folder.ids("train"), samples.train_transform(24, 0.5))
    order = samples.Batches(5, 2, processes.Run(arguments(world / "scratch")))
    return [dataset[key][:2] for key in next(iter(order))]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_first_loss_of_the_classifier_equals_a_scalar_loop(world):
    processes.seed_all(0)                                     # as Run does before S is drawn
    S, batch, want = networks.new_generator("clims_toy", 3, "none").eval(), first_batch(world), 0
    for image, labels in batch:
        with torch.no_grad():
            logits = S.class_logits(image[None])[0].mean((1, 2)).tolist()
        for z, y in zip(logits, labels.tolist()):
            want -= math.log(sigmoid(z) if y else 1 - sigmoid(z)) / 3 / len(batch)
    assert rows(world / "out/cls.jsonl")[0]["loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("stage,start", [("match", "cls"), ("refine", "match")])
def test_first_loss_equals_a_scalar_loop(world, stage, start):
    """10 OTM + 24 BTM + CBS + 0.2 REG of the first batch, written out; in (c) + 0.5 L_refine."""
    clip = clip_model.load_clip(world / "clip.pt")
    S = networks.load_generator(world / f"out/{start}.pt", processes.Run(arguments(world / "scratch"))).eval()
    u_t = clip.encode_text([f"a photo of {name}." for name in BACKGROUNDS])
    prompts = clip_model.BackgroundPrompts(clip, 3)
    prompts.load_state_dict(weights(world / "out/prompts.pt"))
    otm, btm, cbs, reg, refine, counted, pairs = 0, 0, 0, 0, 0, 0, 0

    def cos(a, b):
        return min(max((a @ b).item(), 1e-4), 1 - 1e-4)

    with torch.no_grad():
        batch, u_b = first_batch(world), prompts()
        for image, labels in batch:
            logits = S.class_logits(image[None])[0]
            reg += sum(map(sigmoid, logits.flatten().tolist())) / logits.numel() / len(batch)
            for k in labels.nonzero().flatten().tolist():
                m = F.interpolate(logits[k].sigmoid()[None, None], (16, 16), mode="bilinear",
                                  align_corners=True)[0, 0]
                x = clip.normalize(image[None])
                v_f, v_b = (clip.encode_normalized(part * x)[0] for part in (m, 1 - m))
                u_f = clip.encode_text([f"a photo of {CLASSES[k]}."])[0]
                otm -= math.log(cos(v_f, u_f))
                btm -= math.log(1 - cos(v_b, u_f))
                refine -= math.log(1 - cos(v_f, u_b[k]))
                near = [c for c in (u_t @ v_f).tolist() if c > TAU]
                cbs -= sum(math.log(1 - c) for c in near)
                counted, pairs = counted + len(near), pairs + 1
    assert 0 < counted < 10 * pairs and pairs > 1
    first = rows(world / f"out/{stage}.jsonl")[0]
    want = 10 * otm / pairs + 24 * btm / pairs + cbs + 0.2 * reg
    want += 0.5 * refine / pairs if stage == "refine" else 0
    assert first["cbs"] == pytest.approx(cbs, rel=1e-4) and first["reg"] == pytest.approx(reg, rel=1e-4)
    assert first["loss"] == pytest.approx(want, rel=1e-4)


def test_every_stage_moves_all_of_S_but_statistics_and_rates_fall_by_poly(world):
    for stage in ("cls", "match", "refine"):
        want = [0.01 * (1 - step / 4) ** 0.9 for step in range(4)]
        assert [row["lr"] for row in rows(world / f"out/{stage}.jsonl")] == pytest.approx(want, rel=1e-5)
    cls, match, refine = (weights(world / f"out/{stage}.pt") for stage in ("cls", "match", "refine"))
    for before, after in ((cls, match), (match, refine)):
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert still == {name for name in before if name.endswith(STATISTICS)}


def test_resnet50s_classifier_learns_ten_times_as_fast_and_its_first_layers_never():
    S = networks.new_generator("resnet50", 3, "none").train()
    backbone, last = clims.parameter_groups(S, 0.1, 10)
    before = {name: value.clone() for name, value in S.state_dict().items()}
    S(torch.rand(2, 3, 64, 64))[0].sum().backward()
    assert {name for name, weight in S.named_parameters() if weight.grad is None} == FIRST
    assert same(S.state_dict(), before)                       # its BatchNorms' statistics stay, too
    names = {id(weight): name for name, weight in S.named_parameters()}
    assert (backbone["lr"], last["lr"]) == (0.1, 1.0)
    assert [names[id(weight)] for weight in last["params"]] == ["classifier.weight"]
    others = set(names.values()) - {"classifier.weight"}
    assert {names[id(weight)] for weight in backbone["params"]} == others - FIRST


# ---------------------------------------------------------------- what it reads

def test_masks_are_not_scaled_while_prompts_learn(world, tmp_path):
    """--mask-eps, which decides how other generators' maps are scaled, changes nothing."""
    out = copy_inputs(world, tmp_path / "out", "match")
    assert same(weights(finish("prompts", world, out, "--mask-eps", "5")), weights(world / "out/prompts.pt"))


def test_backgrounds_are_vocs_ten_or_cocos_88_or_those_of_a_file(world, tmp_path):
    names, coco = tmp_path / "names.txt", train_clims.background_names("clims", folders.COCO_CLASSES)
    assert train_clims.background_names("clims", CLASSES) == BACKGROUNDS
    assert len(set(coco)) == 88 and coco[::29] == ["street sign", "fruit", "body", "park"]
    names.write_text("\n\n".join(BACKGROUNDS) + "\n")
    out, more = copy_inputs(world, tmp_path / "out", "cls"), ["--background-texts", names, "--epochs", "1"]
    finish("match", world, out, *more)
    ten = rows(world / "out/match.jsonl")[0]["cbs"]
    assert rows(out / "match.jsonl")[0]["cbs"] == ten
    names.write_text("tree\n")
    refused(call(*job("match", world, out, *more)), "match.pt was made from another backgrounds file")
    finish("match", world, out, *more, "--no-resume")
    assert rows(out / "match.jsonl")[0]["cbs"] < ten
    names.write_text("\n")
    refused(call(*job("match", world, out, *more, "--no-resume")), "names.txt is empty")


def test_wrong_inputs_are_one_line(world, tmp_path):
    refused(call(*job("match", world, tmp_path)), "cls.pt is missing: run hosts.train_cam")
    torch.save(networks.new_generator("deit_tiny_toy", 3, "none").state_dict(), tmp_path / "deit.pth")
    refused(call(*job("match", world, tmp_path, "--init", tmp_path / "deit.pth")), "is a DeiT", "not masks")
    out, other = copy_inputs(world, tmp_path / "out", "match", "prompts"), tmp_path / "other.pt"
    clip = torch.load(world / "clip.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in clip.items()}, other)
    refused(call(*job("refine", world, out, "--clip", other)), "learned with another --clip")


def test_maps_are_relu_summed_over_views(world, tmp_path):
    content = torch.load(world / "out/refine.pt", weights_only=True)
    content["model"]["classifier.weight"] *= -1     # after four steps no logit is positive: relu would be 0
    torch.save(content, tmp_path / "refine.pt")
    done = call("make_cam.py", "--data", world / "data", "--out", tmp_path, *SHARED, "--source", "refine",
                "--scales", "1.0", "--sheets", "0")
    assert done.returncode == 0, done.stderr
    S = networks.load_generator(tmp_path / "refine.pt", processes.Run(arguments(tmp_path))).eval()
    image = folders.Folder(world / "data").image("a_2")[None]
    with torch.no_grad():
        views = S.class_logits(image).relu(), S.class_logits(image.flip(3)).flip(3).relu()
        total = sum(F.interpolate(z, image.shape[2:], mode="bilinear") for z in views)[0, 1:]
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    classes, cam = load_cam(tmp_path / "cam/a_2.npy", [0, 1, 1])
    assert classes.tolist() == [1, 2] and high.min() > 0
    want = (total - low) / (high - low + 1e-8)
    torch.testing.assert_close(torch.from_numpy(cam).float(), want, atol=5e-3, rtol=0)


# ---------------------------------------------------------------- interrupted, several processes

@pytest.mark.parametrize("stage,inputs", [("cls", []), ("match", ["cls"]), ("refine", ["match", "prompts"])])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, stage, inputs, ctrl_c):
    out = copy_inputs(world, tmp_path / "out", *inputs)
    assert call(*job(stage, world, out)).returncode == 130 and not (out / f"{stage}.pt").exists()
    assert same(weights(finish(stage, world, out)), weights(world / f"out/{stage}.pt")) and len(ctrl_c) == 4


def test_two_processes_are_one(world, tmp_path):
    """L_CBS is a sum over all pairs, the others are means; ranks hold unequal numbers of pairs, or none."""
    out = copy_inputs(world, tmp_path / "out", "cls", "prompts")
    run_together([job(stage, world, out) for stage in ("match", "refine")], tmp_path)
    for stage in ("match", "refine"):
        assert same(weights(out / f"{stage}.pt"), weights(world / f"out/{stage}.pt"), 1e-4)
        for one, two in zip(rows(world / f"out/{stage}.jsonl"), rows(out / f"{stage}.jsonl")):
            del one["seconds"]
            assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-3, abs=1e-4)
