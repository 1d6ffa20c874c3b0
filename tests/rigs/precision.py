"""bf16 and fp16 beside float32: losses of the first steps of SemPLeS (a), (b), (c), and weights after them.

The stages themselves on the toy world, with the recipe of run_toy.sh, from the same start, on the same crops.
Two starts: the toy generator, and a small DeiT with attention fusion, as WeakTr's, whose blocks are all in
half precision. By stage and precision:

    loss      largest and mean relative difference of a step's loss to float32's in the same step
    way       |w - w_float32| over |w_float32 - start|: how far apart, as a share of the way float32 went
    weights   |w - w_float32| over |w_float32|
    skipped   fp16 steps that were left out, since a gradient overflowed at the scale of the loss

    python -m tests.rigs.precision --device cuda
"""
import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from ablations.pairs import recipe, stage
from plumbing import checkpoints, processes
from plumbing.networks import TINY
from wsss import clip_model, generator

BOUNDS = {  # over 50 steps; a run that exceeds them ends with 1
    "bf16": {"loss": 0.25, "mean": 0.05, "weights": 0.15},
    "fp16": {"loss": 0.03, "mean": 0.005, "weights": 0.015},
}
STEPS, IMAGES, BATCH = 50, 80, 8
STAGES = {"match": ("train_match.py", "MATCH"), "prompts": ("train_prompt.py", "PROMPT"),
          "refine": ("train_refine.py", "REFINE")}


def weights(path):
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.double() for name, value in content["model"].items() if value.is_floating_point()}


def losses(path):
    lines = path.read_text().splitlines()[1:]
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def apart(a, b):
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in b))


def compare(plain, half, name, start):
    """A row: `half` against `plain`, the folders of two runs of a stage from the weights `start`."""
    one, other = losses(plain / f"{name}.jsonl"), losses(half / f"{name}.jsonl")
    a, b = weights(plain / f"{name}.pt"), weights(half / f"{name}.pt")
    loss = (other - one).abs() / one.abs()
    last = torch.load(half / f"{name}.last.pt", map_location="cpu", weights_only=True)
    zero = {key: 0 * value for key, value in a.items()}
    return {"loss": loss.max().item(), "mean": loss.mean().item(), "way": apart(b, a) / apart(start, a),
            "weights": apart(b, a) / apart(zero, a),
            "skipped": math.log2(2 ** 10 / last["scaler"]["scale"]) if last["scaler"] else None}


def sharpened():
    """The weights of a fresh small DeiT whose maps are not flat: its attention and its head enlarged."""
    processes.seed_all(0)
    state = generator.DeiT(8, **TINY).state_dict()
    for name, value in state.items():
        value *= 30 if name.endswith(("qkv.weight", "head.weight")) else 1
    return state


def first_prompts(out, world):
    """The prompts as train_prompt.py draws them before the first step."""
    shape = weights(out / "prompts.pt")["vectors"].shape
    clip = clip_model.clip_from_state(torch.load(world / "clip.pt", weights_only=True))
    processes.seed_all(0)
    return {"vectors": clip_model.BackgroundPrompts(clip, *shape[:2]).vectors.detach().double()}


def measure(root, device):
    """{(generator, stage, precision): row}; each stage starts from what float32 has made before it."""
    flags, world, rows = recipe("CLS MATCH PROMPT REFINE"), root / "data", {}
    shared = ["--data", world, "--split", "train", "--workers", 0, "--device", device]
    epochs = STEPS * BATCH // IMAGES
    steps = ["--batch-size", BATCH, "--epochs", epochs, "--log-every", 1, "--save-every", STEPS]
    stage("make_toy.py", "--out", world, "--train", IMAGES, "--val", 1)
    for kind in ("cnn_toy", "deit_tiny_toy"):
        made = root / kind
        if kind == "cnn_toy":
            stage("train_cls.py", *shared, "--out", made, *flags["CLS"], "--backbone", world / "backbone.pt")
        else:
            made.mkdir()
            classes = torch.load(root / "cnn_toy/cls.pt", weights_only=True)["classes"]
            checkpoints.save(made / "cls.pt", stage="cls", classes=classes, args={"pool": "max"},
                             model=sharpened())
        for name, (script, own) in STAGES.items():
            out = {amp: root / f"{kind}_{name}_{amp}" for amp in ("off", "bf16", "fp16")}
            views = ["--views", 0] if name == "prompts" else []
            for amp, folder in out.items():
                folder.mkdir()
                for before in made.glob("*.pt"):
                    if not before.name.endswith(".last.pt"):
                        (folder / before.name).symlink_to(before)
                stage(script, *shared, "--out", folder, "--clip", world / "clip.pt", *flags[own], *views,
                      "--amp", amp, *steps)
            start = first_prompts(out["off"], world) if name == "prompts" else weights(made / "cls.pt")
            rows |= {(kind, script, amp): compare(out["off"], out[amp], name, start) for amp in BOUNDS}
            (made / f"{name}.pt").symlink_to(out["off"] / f"{name}.pt")
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    device = p.parse_args().device
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), device)
    for key, row in rows.items():
        print(*key, *(f"{name} {value}" for name, value in row.items()))
    sys.exit(any(row[name] > bound for key, row in rows.items() for name, bound in BOUNDS[key[2]].items()))


if __name__ == "__main__":
    main()
