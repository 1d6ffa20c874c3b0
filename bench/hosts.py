"""Table 4 of SemPLeS on the toy world: hosts with and without it, over draws and seeds, paired.

Runs the stages themselves with the recipe of run_toy.sh. A pair is a data draw and a seed of everything trained:

    cnn                the toy's generator of WeakTr's kind, trained on image labels
    cnn + SemPLeS      after (a), (b), (c)
    CLIMS              its sibling of CLIMS's kind, by CLIMS's losses with backgrounds named by hand: the data's backgrounds.txt, which
                       names all of this world's; CLIMS's ten on VOC do not name all of VOC's
    CLIMS, longer      continued by the same losses for the epochs of (c): the control
    CLIMS + SemPLeS    instead continued with L_refine and learned prompts
    text, segments     masks from CLIP's text maps and superpixels, as FMA-WSSS makes its seeds; the next two from the maps of cnn and cnn + SemPLeS
    cnn, segments
    cnn + SemPLeS, segments

Columns: maps at the fixed threshold and masks (dense CRF, or segments) on train, a network trained on the masks on val. Ground truth only scores.
Draws 100 and 101 chose the recipe.

    python bench/hosts.py --pairs 3 --jobs 2 --write
    python bench/hosts.py --pairs 3 --hosts cnn clims --no-network

What lies in --out already is kept. --write puts the table into docs/results.md.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
import ablation  # noqa: E402
from ablation import interval, parser, run_pairs, stage  # noqa: E402

ROWS = {"cnn": ["cnn", "cnn + SemPLeS"], "clims": ["CLIMS", "CLIMS, longer", "CLIMS + SemPLeS"],
        "segments": ["text, segments", "cnn, segments", "cnn + SemPLeS, segments"]}
AGAINST = {"cnn + SemPLeS": "cnn", "CLIMS, longer": "CLIMS", "CLIMS + SemPLeS": "CLIMS, longer", "cnn + SemPLeS, segments": "cnn, segments"}

CROP = "--crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32"
CLIMS_CLS = f"{CROP} --generator clims_toy --no-train-backbone --epochs 8 --lr 5e-2 --warmup 1".split()
# CLIMS's weights and SGD, but its classifier alone, on a frozen trunk, at a batch of 32. L_refine is to L_match as in run_toy.sh, .2 to 1.
CLIMS = f"{CROP} --epochs 4 --optimizer sgd --lr 1e-2 --weight-decay 1e-4 --lambda-match 10 --lambda-b 2.4 --lambda-cbs 1 --lambda-reg 0.2".split()
REFINE = ["--lambda-refine", "2"]


def recipe():
    return {**ablation.recipe(), "CLIMS_CLS": CLIMS_CLS, "CLIMS": CLIMS, "CLIMS_REFINE": REFINE}


class Pair:
    """One (draw, seed) pair and the folders of its rows."""

    def __init__(self, number, args):
        self.flags, self.draw, self.seed = recipe(), args.first_draw + number, number
        self.root, self.network = args.out / f"pair_{number}", args.network
        self.path = args.out / f"pair_{number}.json"
        self.world = self.root / "data"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}
        stage("make_toy.py", "--out", self.world, "--seed", self.draw, *self.flags["PICTURES"])

    def shared(self, out, split="train"):
        return ["--data", self.world, "--out", out, "--seed", self.seed, *self.flags["SHARED"], "--split", split]

    def clip(self):
        return ["--clip", self.world / "clip.pt"]

    def score(self, name, out, source, masks=(), more=()):
        """Maps of `source`, their masks and a network on these -> the row `name`. `masks`, `more`: flags of make_pseudo.py and make_cam.py."""
        found = self.rows.setdefault(name, {})
        cam, pseudo = f"cam_{source}", "pseudo_segments" if masks else "pseudo"
        stage("make_cam.py", *self.shared(out), "--source", source, "--cam", cam, "--sheets", 0, *more)
        stage("eval.py", *self.shared(out), "--what", "cam", "--cam", cam, *self.flags["THRESHOLD"])
        stage("make_pseudo.py", *self.shared(out), "--cam", cam, "--pseudo", pseudo, *self.flags["THRESHOLD"], *(masks or self.flags["MASKS"]))
        stage("eval.py", *self.shared(out), "--what", "pseudo", "--pseudo", pseudo)
        reports = {"maps": f"{cam}_train", "masks": f"{pseudo}_train"}
        if self.network:
            stage("train_seg.py", *self.shared(out / f"net_{pseudo}"), *self.flags["SEG"], "--init", self.world / "backbone.pt", "--label-dir", out / pseudo)
            stage("eval.py", *self.shared(out / f"net_{pseudo}", "val"), "--what", "seg", *self.flags["PREDICT"])
            reports["network"] = "seg_val"
        for column, report in reports.items():
            where = out / f"net_{pseudo}" if column == "network" else out
            found[column] = 100 * json.loads((where / f"eval_{report}.json").read_text())["miou"]
        self.path.write_text(json.dumps({"draw": self.draw, "seed": self.seed, "recipe": self.flags, "rows": self.rows}))


def linked(out, *weights):
    """A folder of its own for a row, holding the weights it shares with others."""
    out.mkdir(parents=True, exist_ok=True)
    for path in weights:
        if not (out / path.name).exists():
            (out / path.name).symlink_to(path.resolve())
    return out


def cnn(pair):
    flags, start, out = pair.flags, pair.root / "cnn", pair.root / "semples"
    stage("train_cls.py", *pair.shared(start), *flags["CLS"], "--backbone", pair.world / "backbone.pt")
    yield "cnn", start, "cls"
    linked(out, start / "cls.pt")
    stage("train_match.py", *pair.shared(out), *pair.clip(), *flags["MATCH"])
    stage("train_prompt.py", *pair.shared(out), *pair.clip(), *flags["PROMPT"])
    stage("train_refine.py", *pair.shared(out), *pair.clip(), *flags["REFINE"])
    yield "cnn + SemPLeS", out, "refine"


def clims(pair):
    start = pair.root / "clims"
    losses = [*pair.clip(), *CLIMS, "--background-texts", pair.world / "backgrounds.txt"]
    stage("train_cls.py", *pair.shared(start), *CLIMS_CLS, "--backbone", pair.world / "backbone.pt")
    stage("train_match.py", *pair.shared(start), *losses)
    yield "CLIMS", start, "match"
    stage("train_prompt.py", *pair.shared(start), *pair.clip(), *pair.flags["PROMPT"])
    for name, folder, refine in (("CLIMS, longer", "clims_longer", ["--lambda-refine", "0"]), ("CLIMS + SemPLeS", "clims_semples", REFINE)):
        out = linked(pair.root / folder, start / "match.pt", start / "prompts.pt")
        stage("train_refine.py", *pair.shared(out), *losses, *refine)
        yield name, out, "refine"


def segments(pair):
    text = pair.root / "text"
    list(cnn(pair))                                                             # its generators, if they are not there yet
    stage("make_segments.py", *pair.shared(text), *pair.flags["SEGMENTS"])
    masks = ["--segments", text / "segments", *pair.flags["VOTE"]]
    yield "text, segments", text, "text", masks, [*pair.clip(), *pair.flags["LOCALISE"]]
    yield "cnn, segments", pair.root / "cnn", "cls", masks
    yield "cnn + SemPLeS, segments", pair.root / "semples", "refine", masks


def run_pair(number, args):
    """All rows of one (draw, seed) pair -> <out>/pair_<number>.json"""
    torch.set_num_threads(1)
    pair = Pair(number, args)
    for host in args.hosts:
        for row in {"cnn": cnn, "clims": clims, "segments": segments}[host](pair):
            pair.score(*row)


def incomplete(number, args, names):
    """True when a pair lacks a row or its network; what another recipe made is refused."""
    path = args.out / f"pair_{number}.json"
    if not path.exists():
        return True
    before, now = json.loads(path.read_text()), recipe()
    if any(flags != now.get(name) for name, flags in before["recipe"].items()) or before["draw"] != args.first_draw + number:
        sys.exit(f"{path} was made by another recipe or another draw: take another --out")
    last = "network" if args.network else "masks"
    return any(last not in before["rows"].get(name, {}) for name in names)


def table(pairs, names):
    """Markdown: a row each, means over the pairs, and the paired difference to the row it is compared with."""
    lines = ["| | maps, train | by pair | masks, train | by pair | network, val | by pair | maps | masks | network | to |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        values, less = [], []
        for column in ("maps", "masks", "network"):
            mine = np.array([p["rows"][name].get(column, np.nan) for p in pairs])
            there = not np.isnan(mine).any()
            values += [f"{mine.mean():.1f}", " ".join(f"{v:.1f}" for v in mine)] if there else ["", ""]
            less.append(interval(mine - np.array([p["rows"][AGAINST[name]][column] for p in pairs])) if there and name in AGAINST else "")
        lines.append("| " + " | ".join([name, *values, *less, AGAINST.get(name, "")]) + " |")
    return "\n".join(lines)


def parse():
    p = parser(__doc__, "runs/hosts", pairs=3, first_draw=331)
    p.add_argument("--hosts", nargs="+", choices=list(ROWS), default=list(ROWS))
    p.add_argument("--network", action=argparse.BooleanOptionalAction, default=True, help="--no-network: maps and masks only")
    return p.parse_args()


def main():
    args = parse()
    names = [name for host in ROWS if host in args.hosts for name in ROWS[host]]
    run_pairs(__file__, args, run_pair, lambda n: incomplete(n, args, names), lambda pairs: table(pairs, names))


if __name__ == "__main__":
    main()
