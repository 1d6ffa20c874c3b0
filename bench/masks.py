"""From maps to a network on the toy world: what the CRF adds, and what a network makes of it, over draws and seeds, paired.

Runs the stages themselves with the recipe of run_toy.sh. A pair is a data draw and a seed of everything trained:

    maps           refined maps of SemPLeS at the fixed threshold           train
    masks          the same after the dense CRF                             train    (weaktr, irn: with the papers' other presets)
    net on maps    network trained on the thresholded maps                  val
    net on masks   network trained on the CRF's masks                       val
    net on truth   network trained on the true masks, the upper bound       val

Ground truth only scores, but for the last row. Draws 100 and 101 chose the preset and the network's schedule.

    python bench/masks.py --pairs 3 --jobs 2 --write

Pairs that lie in --out already are kept. --write puts the table into docs/results.md.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from ablation import interval, parser, recipe, run_pairs, stage  # noqa: E402

ROWS = {"maps": "train", "masks": "train", "masks, weaktr": "train", "masks, irn": "train", "net on maps": "val", "net on masks": "val", "net on truth": "val"}


def run_pair(number, args):
    """All rows of one (draw, seed) pair -> <out>/pair_<number>.json"""
    torch.set_num_threads(1)
    flags, draw, seed = recipe(), args.first_draw + number, number
    root = args.out / f"pair_{number}"
    world, base, found = root / "data", root / "base", {}
    stage("make_toy.py", "--out", world, "--seed", draw, *flags["PICTURES"])

    def shared(out, split="train"):
        return ["--data", world, "--out", out, "--seed", seed, *flags["SHARED"], "--split", split]

    def score(name, out, what, *more):
        stage("eval.py", *shared(out, ROWS[name]), "--what", what, *more)
        report = more[1] if what in ("cam", "pseudo") else what
        found[name] = 100 * json.loads((out / f"eval_{report}_{ROWS[name]}.json").read_text())["miou"]

    clip = ["--clip", world / "clip.pt"]
    stage("train_cls.py", *shared(base), *flags["CLS"], "--backbone", world / "backbone.pt")
    stage("train_match.py", *shared(base), *clip, *flags["MATCH"])
    stage("train_prompt.py", *shared(base), *clip, *flags["PROMPT"])
    stage("train_refine.py", *shared(base), *clip, *flags["REFINE"])
    stage("make_cam.py", *shared(base), "--source", "refine", "--sheets", 0)
    score("maps", base, "cam", "--cam", "cam", *flags["THRESHOLD"])
    for name, folder, more in (("", "plain", ["--no-crf"]), ("masks", "pseudo", []), ("masks, weaktr", "weaktr", ["--preset", "weaktr"]), ("masks, irn", "irn", ["--preset", "irn"])):
        stage("make_pseudo.py", *shared(base), "--pseudo", folder, *flags["THRESHOLD"], *flags["MASKS"], *more)
        if name:
            score(name, base, "pseudo", "--pseudo", folder)
    for name, masks in (("net on maps", base / "plain"), ("net on masks", base / "pseudo"), ("net on truth", world / "SegmentationClass")):
        out = root / name.replace(" ", "_")
        stage("train_seg.py", *shared(out), *flags["SEG"], "--init", world / "backbone.pt", "--label-dir", masks)
        score(name, out, "seg", *flags["PREDICT"])
    (args.out / f"pair_{number}.json").write_text(json.dumps({"draw": draw, "seed": seed, "recipe": flags, "rows": found}))


def table(pairs):
    """Markdown: a row each, by pair, and the paired difference to what it is made from."""
    column = lambda name: np.array([p["rows"][name] for p in pairs])
    against = {"masks": "maps", "masks, weaktr": "maps", "masks, irn": "maps", "net on masks": "net on maps", "net on truth": "net on masks"}
    lines = ["| | split | mIoU | by pair | paired difference |", "|---|---|---|---|---|"]
    for name, split in ROWS.items():
        other = against.get(name)
        less = f"{interval(column(name) - column(other))} to {other}" if other else ""
        lines.append(f"| {name} | {split} | {column(name).mean():.1f} | {' '.join(f'{v:.1f}' for v in column(name))} | {less} |")
    return "\n".join(lines)


def parse():
    return parser(__doc__, "runs/masks", pairs=3, first_draw=321).parse_args()


def main():
    args = parse()
    run_pairs(__file__, args, run_pair, lambda n: not (args.out / f"pair_{n}.json").exists(), table)


if __name__ == "__main__":
    main()
