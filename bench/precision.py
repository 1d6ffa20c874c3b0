"""bf16 and fp16 beside float32: the losses of the first steps of SemPLeS (a), (b) and (c), and the weights after them.

The stages themselves on the toy world, with the recipe of run_toy.sh, from the same start, on the same crops. Two starts: the toy generator, and a small
DeiT with attention fusion, as WeakTr's, whose blocks are all in half precision. By stage and precision:

    loss      largest and mean relative difference of a step's loss to float32's in the same step
    weights   |w - w_float32| over |w_float32 - start|: how far apart, as a share of the way that float32 went; and over |w_float32|
    skipped   fp16 steps that were left out, since a gradient overflowed at the scale of the loss

    python bench/precision.py                                # 50 steps of 8 pictures
    python bench/precision.py --device cuda --write

--write puts the table into docs/results.md.
"""
import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import recipe, stage, write  # noqa: E402
from plumbing import checkpoints, processes  # noqa: E402
from wsss import clip_model, generator  # noqa: E402

BOUNDS = {  # what the README states, over 50 steps; a run that exceeds them ends with 1
    "bf16": {"loss": 0.25, "mean": 0.05, "weights": 0.15},
    "fp16": {"loss": 0.03, "mean": 0.005, "weights": 0.015},
}
STAGES = {"match": "MATCH", "prompts": "PROMPT", "refine": "REFINE"}
SCRIPTS = {"match": "train_match.py", "prompts": "train_prompt.py", "refine": "train_refine.py"}


def weights(path):
    return {name: value.double() for name, value in torch.load(path, map_location="cpu", weights_only=True)["model"].items() if value.is_floating_point()}


def losses(path):
    return torch.tensor([json.loads(line)["loss"] for line in path.read_text().splitlines()[1:]], dtype=torch.float64)


def apart(a, b):
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in b))


def compare(plain, half, name, start):
    """One row: `half` against `plain`, folders of two runs of a stage from `start`, the weights before it."""
    one, other = losses(plain / f"{name}.jsonl"), losses(half / f"{name}.jsonl")
    a, b = weights(plain / f"{name}.pt"), weights(half / f"{name}.pt")
    loss = (other - one).abs() / one.abs()
    scale = torch.load(half / f"{name}.last.pt", map_location="cpu", weights_only=True)["scaler"].get("scale")
    return {"loss": loss.max().item(), "mean": loss.mean().item(), "way": apart(b, a) / apart(start, a), "weights": apart(b, a) / apart({k: 0 * v for k, v in a.items()}, a),
            "skipped": round(math.log2(2 ** 10 / scale)) if scale else None}


def sharpened():
    """The weights of a fresh small DeiT whose maps are not flat: its attention and its head enlarged."""
    processes.seed_all(0)
    state = generator.build_generator("deit_tiny", 8).state_dict()
    for name, value in state.items():
        value *= 30 if name.endswith(("qkv.weight", "head.weight")) else 1
    return state


def run(name, world, S, out, flags, args, amp):
    """A stage in `out`, from the finished stages in `S`."""
    out.mkdir(parents=True)
    for done in S.glob("*.pt"):
        (out / done.name).symlink_to(done)
    steps_an_epoch = args.pictures // args.batch_size
    stage(SCRIPTS[name], "--data", world, "--out", out, "--split", "train", "--workers", 0, "--device", args.device, "--clip", world / "clip.pt", *flags[STAGES[name]],
          *(["--views", 0] if name == "prompts" else []), "--amp", amp, "--batch-size", args.batch_size, "--epochs", args.steps // steps_an_epoch, "--log-every", 1)
    return out


def table(rows):
    lines = ["| generator | stage | precision | loss, largest | loss, mean | weights, of the way | of themselves | fp16 steps skipped |", "|---|---|---|---|---|---|---|---|"]
    for (kind, name, amp), row in rows.items():
        skipped = "" if row["skipped"] is None else row["skipped"]
        lines.append(f"| {kind} | {SCRIPTS[name]} | {amp} | {row['loss']:.1e} | {row['mean']:.1e} | {row['way']:.1e} | {row['weights']:.1e} | {skipped} |")
    return "\n".join(lines)


def measure(root, args):
    """{(generator, stage, precision): row}; every run of a stage starts from what float32 has made before it."""
    flags, world, rows = recipe(), root / "data", {}
    stage("make_toy.py", "--out", world, "--train", args.pictures, "--val", 1)
    for kind in ("cnn_toy", "deit_tiny"):
        S = root / kind
        if kind == "cnn_toy":
            stage("train_cls.py", "--data", world, "--out", S, "--split", "train", "--workers", 0, "--device", args.device, *flags["CLS"], "--amp", "off", "--backbone", world / "backbone.pt")
        else:
            S.mkdir()
            classes = torch.load(root / "cnn_toy/cls.pt", weights_only=True)["classes"]
            checkpoints.save(S / "cls.pt", stage="cls", classes=classes, args={"pool": "max"}, model=sharpened())
        for name in STAGES:
            made = {amp: run(name, world, S, root / f"{kind}_{name}_{amp}", flags, args, amp) for amp in ("off", "bf16", "fp16")}
            start = weights(S / {"match": "cls.pt", "refine": "match.pt"}[name]) if name != "prompts" else first_prompts(made["off"], world, args)
            rows |= {(kind, name, amp): compare(made["off"], made[amp], name, start) for amp in ("bf16", "fp16")}
            (S / f"{name}.pt").symlink_to(made["off"] / f"{name}.pt")
    return rows


def first_prompts(out, world, args):
    """The prompts as train_prompt.py draws them before the first step."""
    found = torch.load(out / "prompts.pt", map_location="cpu", weights_only=True)
    processes.seed_all(found["args"]["seed"])
    return {"vectors": clip_model.BackgroundPrompts(clip_model.load_clip(world / "clip.pt"), len(found["classes"]), found["args"]["prompt_length"]).vectors.detach().double()}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=50, help="of each stage, a multiple of --pictures / --batch-size")
    p.add_argument("--pictures", type=int, default=80)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--device", default="cpu")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    args = p.parse_args()
    if args.steps % (args.pictures // args.batch_size):
        p.error("--steps is a multiple of --pictures / --batch-size")
    return args


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    print(table(rows))
    if args.write:
        write("bench/precision.py", table(rows))
    beyond = [" ".join(key) for key, row in rows.items() if any(row[name] > bound for name, bound in BOUNDS[key[2]].items())]
    if beyond:
        sys.exit(f"beyond the bounds: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
