"""VPL on the toy world: vision prototypes against text prototypes at the same temperature, over draws and CLIPs, paired; Tables 3 to 7.

Runs the stages themselves. Temperatures are those of the CLIP at hand: tau_T = 1 / its logit scale, tau_I = 3 tau_T, the paper's ratio.

    text           text maps at tau_T (CLIP-ES)                  text, softened   text maps at tau_I: a softer softmax alone
    literal        vision prototypes, vpl.py's defaults          all classes      with --no-label-mask: P' over all columns, as Eq. 5 is written
    seeds          ... and --no-background-pixels: --phi then cuts 0-1 seeds of the classes, as Table 6 has it
    value seeds    ... and --features value: each patch's own value in the last block

Maps and masks are scored on train: at threshold .4 and .5, and after dense CRF `deeplab` with background (1 - max). Truth only scores.
Draws 5 and 100 chose the rows and their flags; --first-draw 401 was not looked at before.

    python make_toy.py --out runs/clips/data_1 --weights runs/clips/1 --train-weights --weights-seed 1       # another CLIP, 7 CPU-minutes
    python bench/prototypes.py --clips weights/toy_clip.pt runs/clips/1/toy_clip.pt runs/clips/2/toy_clip.pt --draws 5 --write
    python bench/prototypes.py --sweeps --write                       # Tables 4 to 7, with the shipped CLIP
    python bench/prototypes.py --phase2 --write                       # Table 3, with the shipped CLIP; val
    python bench/prototypes.py --speed                                # seconds of a step of the descent against its size, random features
"""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from ablation import ROOT, interval, recipe, run_jobs, stage, write  # noqa: E402
from maps import alternate  # noqa: E402
import make_toy  # noqa: E402
from plumbing import checkpoints  # noqa: E402
from wsss import losses  # noqa: E402

SEEDS = ["--no-label-mask", "--no-background-pixels"]
ROWS = {"literal": [], "all classes": ["--no-label-mask"], "seeds": SEEDS, "value seeds": [*SEEDS, "--features", "value"]}
SWEEPS = {"tau_I / tau_T": [1, 2, 3, 4, 5], "phi": [.2, .3, .4, .5, .6, .7], "steps": [10, 30, 100, 300, 1000], "prompt": ["single", "ensemble"]}


class World:
    """One draw of the toy world, seen by one CLIP."""

    def __init__(self, args, number):
        clips = len(args.clips)
        self.draw, packed = args.first_draw + number // clips, args.clips[number % clips]
        self.flags, self.root = recipe(), args.out / f"cell_{number}"
        self.data, self.clip = self.root / "data", self.root / "clip.pt"
        stage("make_toy.py", "--out", self.data, "--seed", self.draw, *self.flags["PICTURES"])
        checkpoints.save(self.clip, **make_toy.unpack(torch.load(packed, weights_only=True)))
        self.tau = 1 / torch.load(self.clip, weights_only=True)["logit_scale"].exp().item()

    def shared(self, out, split="train"):
        return ["--data", self.data, "--out", out, *self.flags["SHARED"], "--split", split]

    def localise(self, ratio=3, prompt="single"):
        """Flags of vpl.py and make_cam.py."""
        return ["--clip", self.clip, "--tau-t", self.tau, "--tau-i", ratio * self.tau, "--no-affinity", "--prompt", prompt]

    def learn(self, out, *more, ratio=3, prompt="single", features=None):
        """vpl.py -> its report; `features`: a folder with the same pixels."""
        out.mkdir(parents=True, exist_ok=True)
        if features and not (out / "features").exists():
            os.symlink(features / "features", out / "features")
        stage("vpl.py", *self.shared(out), *self.localise(ratio, prompt), "--steps", 300, *more)
        return torch.load(out / "prototypes.pt", weights_only=True)

    def maps(self, out, source, *more, ratio=3, prompt="single", split="train", crf=True):
        """mIoU at .4, .5, and after CRF, of the maps of a source."""
        name = f"{source}_{split}"
        stage("make_cam.py", *self.shared(out, split), *self.localise(ratio, prompt), "--source", source, "--cam", name, "--sheets", 0, *more)
        found = {}
        for threshold in (.4, .5):
            stage("eval.py", *self.shared(out, split), "--what", "cam", "--cam", name, "--threshold", threshold)
            found[f"@{threshold}"] = self.miou(out, name, split)
        if crf:
            stage("make_pseudo.py", *self.shared(out, split), "--cam", name, "--pseudo", f"masks_{name}", "--background", "power", "--preset", "deeplab")
            stage("eval.py", *self.shared(out, split), "--what", "pseudo", "--pseudo", f"masks_{name}")
            found["CRF"] = self.miou(out, f"masks_{name}", split)
        return found

    def miou(self, out, name, split):
        return 100 * json.loads((out / f"eval_{name}_{split}.json").read_text())["miou"]


def main_cell(world):
    """The rows of the main table."""
    found = {"text": world.maps(world.root / "text", "text"),
             "text, softened": world.maps(world.root / "soft", "text", "--tau-t", 3 * world.tau)}
    for name, more in ROWS.items():
        out = world.root / name.replace(" ", "_")
        gap = world.learn(out, *more)["gap"]
        found[name] = {**world.maps(out, "vision"), "gap": gap["after"], "gap_text": gap["before"]}
    return found


def sweep_cell(world):
    """Tables 4 to 7 for the row `value seeds`: each value with the text maps at its temperature beside it; the gap."""
    found = {}
    flags = ROWS["value seeds"]
    for name, values in SWEEPS.items():
        for value in values:
            out, text = world.root / f"{name}_{value}".replace(" / ", "_"), world.root / "texts"
            ratio = value if name == "tau_I / tau_T" else 3
            prompt = value if name == "prompt" else "single"
            more = {"phi": ["--phi", value], "steps": ["--steps", value]}.get(name, [])
            base = world.root / "tau_I_tau_T_1" if name in ("tau_I / tau_T", "steps") and out != world.root / "tau_I_tau_T_1" else None
            gap = world.learn(out, *flags, *more, ratio=ratio, prompt=prompt, features=base)["gap"]
            vision = world.maps(out, "vision", ratio=ratio, prompt=prompt, crf=False)
            same = world.maps(text / f"{ratio}_{prompt}", "text", "--tau-t", ratio * world.tau, prompt=prompt, crf=False)
            found[f"{name} {value}"] = {"vision": vision, "text": same, "gap": gap["after"], "gap_text": gap["before"]}
    return found


def phase2_cell(world):
    """Table 3 on val: text; vision; + CRF; decoder on the masks of train; + RSC; + CRF. The row of phase 1 is `value seeds`."""
    found = {"text": world.maps(world.root / "text", "text", split="val"),
             "text, softened": world.maps(world.root / "soft", "text", "--tau-t", 3 * world.tau, split="val")}
    out = world.root / "value_seeds"
    world.learn(out, *ROWS["value seeds"])
    found["vision"] = world.maps(out, "vision", split="val")
    world.maps(out, "vision", split="train")                       # its masks are in masks_vision_train
    for name, more in (("decoder", ["--lambda-rsc", 0]), ("decoder + RSC", ["--lambda-rsc", 1]), ("decoder + RSC .1", ["--lambda-rsc", .1])):
        net = world.root / name.replace(" ", "_")
        net.mkdir(exist_ok=True)
        if not (net / "prototypes.pt").exists():
            os.symlink(out / "prototypes.pt", net / "prototypes.pt")
        stage("train_seg.py", *world.shared(net), "--clip", world.clip, *world.flags["DECODER"], "--label-dir", out / "masks_vision_train", *more)
        found[name] = {}
        for key, crf in (("net", "--no-crf"), ("net + CRF", "--crf")):
            stage("eval.py", *world.shared(net, "val"), "--what", "seg", *world.flags["PREDICT"], crf)
            found[name][key] = world.miou(net, "seg", "val")
    return found


def main_table(cells, clips):
    """Means over draws for each CLIP; the difference to the softened text of the same draw and CLIP with its interval."""
    lines = ["| CLIP | row | maps @.4 | maps @.5 | masks | masks by draw | @.4 - softened text | @.5 | masks | gap |", "|---|---|---|---|---|---|---|---|---|---|"]
    for c, clip in enumerate(clips):
        mine = [cell for n, cell in enumerate(cells) if n % len(clips) == c]
        column = lambda row, key: np.array([cell["rows"][row][key] for cell in mine])
        for row in mine[0]["rows"]:
            less = [interval(column(row, key) - column("text, softened", key)) if row != "text, softened" else "" for key in ("@0.4", "@0.5", "CRF")]
            gap = f"{column(row, 'gap_text').mean():.2f} -> {column(row, 'gap').mean():.2f}" if row in ROWS else ""
            lines.append(f"| {c} | {row} | {column(row, '@0.4').mean():.1f} | {column(row, '@0.5').mean():.1f} | {column(row, 'CRF').mean():.1f} | "
                         f"{' '.join(f'{v:.1f}' for v in column(row, 'CRF'))} | {' | '.join(less)} | {gap} |")
    return "\n".join(lines)


def sweep_table(cells, clips):
    lines = ["| | vision @.4 | @.5 | - text at the same temperature, @.4 | @.5 | gap |", "|---|---|---|---|---|---|"]
    for row in cells[0]["rows"]:
        column = lambda who, key: np.array([cell["rows"][row][who][key] for cell in cells])
        gap = [np.mean([cell["rows"][row][key] for cell in cells]) for key in ("gap_text", "gap")]
        less = [interval(column("vision", key) - column("text", key)) for key in ("@0.4", "@0.5")]
        lines.append(f"| {row} | {column('vision', '@0.4').mean():.1f} | {column('vision', '@0.5').mean():.1f} | {' | '.join(less)} | {gap[0]:.2f} -> {gap[1]:.2f} |")
    return "\n".join(lines)


def phase2_table(cells, clips):
    lines = ["| row | val mIoU | by draw | paired difference |", "|---|---|---|---|"]
    steps = [("text maps at .4", "text", "@0.4"), ("text maps at .4, softened", "text, softened", "@0.4"), ("vision maps at .4", "vision", "@0.4"),
             ("vision + CRF", "vision", "CRF"), ("text, softened, + CRF", "text, softened", "CRF"), ("decoder on the masks", "decoder", "net"),
             ("decoder + RSC, lambda 1", "decoder + RSC", "net"), ("decoder + RSC, lambda .1", "decoder + RSC .1", "net"),
             ("decoder + CRF", "decoder", "net + CRF"), ("decoder + RSC, lambda .1, + CRF", "decoder + RSC .1", "net + CRF")]
    against = {"vision maps at .4": 1, "vision + CRF": 4, "decoder + RSC, lambda 1": 5, "decoder + RSC, lambda .1": 5, "decoder + RSC, lambda .1, + CRF": 8}
    columns = [np.array([cell["rows"][row][key] for cell in cells]) for _, row, key in steps]
    for (name, *_), column in zip(steps, columns):
        less = f"{interval(column - columns[against[name]])} to {steps[against[name]][0]}" if name in against else ""
        lines.append(f"| {name} | {column.mean():.1f} | {' '.join(f'{v:.1f}' for v in column)} | {less} |")
    return "\n".join(lines)


def speed_table(device="cpu", sizes=(25_000, 50_000, 100_000, 200_000, 400_000), D=512, C=45, runs=3):
    """Markdown: a step of vpl.py's descent, n pixels of D channels as it holds them, C columns (VOC: 20 classes, 25 backgrounds);
    then n = 50,000 with twice the channels and with twice the columns."""
    rows = [(n, D, C) for n in sizes] + [(50_000, 2 * D, C), (50_000, D, 2 * C)]
    lines = ["| pixels n | channels D | columns C | s a step | ns a step and n D C |", "|---|---|---|---|---|"]
    for n, D, C in rows:
        x, w, p = (torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=1) for shape in ((n, D), (C, D), (n, C)))
        x, p = x.half(), p.softmax(1)
        step = lambda: losses.prototype_step(w.double(), losses.prototype_gradient(x, w.double(), p, 0.03)[0] / n, 10.0, torch.inf)
        step()
        seconds = statistics.median(alternate({"step": step}, runs, device)["step"])
        lines.append(f"| {n:,} | {D} | {C} | {seconds:.4f} | {1e9 * seconds / (n * D * C):.3f} |")
    return "\n".join(lines)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "runs/prototypes")
    p.add_argument("--clips", type=Path, nargs="+", default=[ROOT / "weights/toy_clip.pt"], help="packed CLIPs of make_toy.py")
    p.add_argument("--draws", type=int, default=5)
    p.add_argument("--first-draw", type=int, default=401)
    p.add_argument("--sweeps", action="store_true", help="Tables 4 to 7 instead of the main table")
    p.add_argument("--phase2", action="store_true", help="Table 3 instead")
    p.add_argument("--speed", action="store_true", help="time of a step against its size instead")
    p.add_argument("--device", default="cpu", help="of --speed")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    p.add_argument("--only", type=int, help="run this cell in this process (used by --jobs)")
    return p.parse_args()


def main():
    args = parse()
    if args.speed:
        text = speed_table(args.device)
        print(text)
        return write("bench/prototypes.py speed", text) if args.write else None
    kind, cell, table = ("sweeps", sweep_cell, sweep_table) if args.sweeps else ("phase2", phase2_cell, phase2_table) if args.phase2 else ("main", main_cell, main_table)
    args.out = (args.out / kind).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    path = lambda n: args.out / f"pair_{n}.json"
    if args.only is not None:
        torch.set_num_threads(1)
        world = World(args, args.only)
        return path(args.only).write_text(json.dumps({"draw": world.draw, "tau_t": world.tau, "rows": cell(world)}))
    numbers = range(args.draws * len(args.clips))
    run_jobs(__file__, args, [n for n in numbers if not path(n).exists()])
    text = table([json.loads(path(n).read_text()) for n in numbers], args.clips)
    print(text)
    if args.write:
        write(f"bench/prototypes.py {kind}", text)


if __name__ == "__main__":
    main()
