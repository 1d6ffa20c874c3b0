"""VPL's Tables 3 to 7 on the toy world: vision prototypes against texts at the same temperature.

Temperatures are those of the CLIP at hand: tau_T = 1 / its logit scale, tau_I = 9 tau_T (the paper: 3 tau_T).

    text             text maps at tau_T (CLIP-ES)
    text, softened   text maps at tau_I: a softer softmax alone changes maps
    vision           vision prototypes: x and P' by the defaults of vpl.py, the rest as in run_toy.sh
    soft             with --harden 0: P' as Eq. 5 is written
    labels           with --label-mask: P' over an image's own classes and the backgrounds
    patch            with --features patch: x is a patch's output, not its value
    literal          all three: the reading of the first version
    modify gap       no learning: the texts shifted by the gap (Table 4)

--table main: these rows for each CLIP; maps at threshold .4 and .5, masks by CRF `deeplab` with background
(1 - max), on train. --table sweeps: Tables 4 to 7, from `vision`. --table phase2: Table 3, on val.
Differences are paired by CLIP and draw. The truth only scores. Draws 5 and 100 chose the defaults of vpl.py
and tau_I.

    python -m ablations.vpl_tables --write
    python -m ablations.vpl_tables --table sweeps --write
    python -m ablations.vpl_tables --table phase2 --write
    python make_toy.py --out runs/clips/data_1 --weights runs/clips/1 --train-weights --weights-seed 1
    python -m ablations.vpl_tables --clips weights runs/clips/1 runs/clips/2
"""
from pathlib import Path

import numpy as np
import torch

from ablations import pairs
from plumbing import checkpoints, guard, markdown

RATIO = 9                                                     # tau_I / tau_T
SOFT, LABELS, PATCH = ["--harden", "0"], ["--label-mask"], ["--features", "patch"]
ROWS = {"vision": [], "soft": SOFT, "labels": LABELS, "patch": PATCH, "literal": [*SOFT, *LABELS, *PATCH],
        "modify gap": ["--modify-gap"]}
STEPS = 300
USES = {"main": "IMAGES SHARED", "sweeps": "IMAGES SHARED", "phase2": "IMAGES SHARED DECODER ENLARGED"}
SWEEPS = {"tau": [1, 3, 9, 15, 27], "phi": [.2, .4, .6, .7, .8, .9, .95, .98],
          "steps": [10, 30, 100, 300, 1000],
          "prompt": ["single", "ensemble", "templates"]}     # tau: tau_I / tau_T
SWEPT = {f"{name} {value}": (name, value) for name, values in SWEEPS.items() for value in values}


def parse():
    p = pairs.parser(__doc__, "runs/vpl_tables", pairs=5, first_draw=401)
    p.add_argument("--table", choices=["main", "sweeps", "phase2"], default="main")
    p.add_argument("--clips", type=Path, nargs="+", default=[Path("weights")],
                   help="folders of weights that make_toy.py has made")
    return p.parse_args()


# ---------------------------------------------------------------- a draw

def temperature(pair):
    state = torch.load(pair.data / "clip.pt", weights_only=True)
    return 1 / state["logit_scale"].exp().item()


def localise(pair, ratio, prompt):
    """Flags of vpl.py and make_cam.py; tau_I is `ratio` times tau_T."""
    return [*pair.clip, "--tau-i", ratio * temperature(pair), "--no-affinity", "--prompt", prompt]


def learn(pair, out, more, ratio=RATIO, prompt="single"):
    """vpl.py -> the gap with texts and with prototypes"""
    pair.run("vpl.py", out, *localise(pair, ratio, prompt), "--steps", STEPS, *more)
    return checkpoints.load(out / "prototypes.pt", "prototypes")["gap"]


def score(pair, out, source, ratio=RATIO, prompt="single", split="train", crf=True, more=()):
    """mIoU of a source's maps at .4 and .5, and after the CRF. Texts at `ratio` times tau_T."""
    flags = [*localise(pair, ratio, prompt), *more]
    cam = f"{source}_{split}"
    if source == "text":
        flags += ["--tau-t", ratio * temperature(pair)]
    pair.maps(out, source, cam, *flags, split=split)
    found = {f"@{t}": pair.miou(out, "cam", cam, "--threshold", t, split=split) for t in (.4, .5)}
    if crf:
        pair.run("make_pseudo.py", out, "--cam", cam, "--pseudo", f"masks_{cam}", "--background", "power",
                 "--preset", "deeplab", split=split)
        found["CRF"] = pair.miou(out, "pseudo", f"masks_{cam}", split=split)
    return found


def fill_main(pair):
    pair.rows["text"] = score(pair, pair.root / "text", "text", ratio=1)
    pair.rows["text, softened"] = score(pair, pair.root / "soft", "text")
    for name, more in ROWS.items():
        out = pair.root / name.replace(" ", "_")
        gap = learn(pair, out, more)
        pair.rows[name] = {**score(pair, out, "vision"), "gap": gap}
        pair.save()


def fill_sweeps(pair):
    """Each value with the text maps at its temperature beside it. All learn in one folder, by --no-resume:
    a setting that does not change the pixels' features takes those that are there."""
    found = {}
    for row, (name, value) in SWEPT.items():
        if row in pair.rows:
            continue
        setting = {"tau": RATIO, "phi": .4, "steps": STEPS, "prompt": "single", name: value}
        at = {"ratio": setting["tau"], "prompt": setting["prompt"]}
        if (key := tuple(setting.values())) not in found:
            more = ["--phi", setting["phi"], "--steps", setting["steps"], "--no-resume"]
            gap = learn(pair, pair.root / "vision", more, **at)
            vision = score(pair, pair.root / "vision", "vision", **at, crf=False, more=["--no-resume"])
            found[key] = {"vision": vision, "gap": gap}
        texts = tuple(at.values())
        if texts not in found:
            found[texts] = score(pair, pair.root / "text", "text", **at, crf=False, more=["--no-resume"])
        pair.rows[row] = {**found[key], "text": found[texts]}


def fill_phase2(pair):
    pair.rows["text"] = score(pair, pair.root / "text", "text", ratio=1, split="val")
    pair.rows["text, softened"] = score(pair, pair.root / "soft", "text", split="val")
    vision = pair.root / "vision"
    learn(pair, vision, [])
    pair.rows["vision"] = score(pair, vision, "vision", split="val")
    score(pair, vision, "vision")                             # the decoder learns from these masks of train
    for name, weight in (("decoder", 0), ("decoder + RSC", 1), ("decoder + RSC .1", .1)):
        out = pair.root / name.replace(" ", "_")
        pairs.link(vision / "prototypes.pt", out)
        pair.run("train_seg.py", out, *pair.clip, *pair.recipe["DECODER"], "--lambda-rsc", weight,
                 "--label-dir", vision / "masks_vision_train")
        pair.rows[name] = {key: pair.miou(out, "seg", "seg", *pair.recipe["ENLARGED"], crf, split="val")
                           for key, crf in (("net", "--no-crf"), ("net + CRF", "--crf"))}
        pair.save()


# ---------------------------------------------------------------- tables

def show_gap(gaps):
    before, after = (np.mean([gap[when] for gap in gaps]) for when in ("before", "after"))
    return f"{before:.2f} -> {after:.2f}"


def main_table(done, clips):
    """Means over draws for each CLIP; differences to the softened text of the same draw and CLIP."""
    lines, columns = [], ("@0.4", "@0.5", "CRF")
    for c, clip in enumerate(clips):
        some = [pair.rows for pair in done if pair.weights == clip]
        for name in some[0]:
            of = {row: {column: np.array([rows[row][column] for rows in some]) for column in columns}
                  for row in (name, "text, softened")}
            means = [f"{of[name][column].mean():.1f}" for column in columns]
            less = [pairs.interval(of[name][column] - of["text, softened"][column])
                    if name != "text, softened" else "" for column in columns]
            gap = show_gap([rows[name]["gap"] for rows in some]) if name in ROWS else ""
            lines.append([c, name, *means, pairs.each(of[name]["CRF"]), *less, gap])
    head = ["CLIP", "row", "maps @.4", "maps @.5", "masks", "masks by draw", "@.4 - softened text", "@.5",
            "masks", "gap"]
    return markdown.table(head, lines)


def sweep_table(done, clips):
    lines = []
    for name in SWEPT:
        vision, text = ({at: np.array([pair.rows[name][source][at] for pair in done])
                         for at in ("@0.4", "@0.5")} for source in ("vision", "text"))
        less = [pairs.interval(vision[at] - text[at]) for at in vision]
        lines.append([name, *(f"{values.mean():.1f}" for values in vision.values()), *less,
                      show_gap([pair.rows[name]["gap"] for pair in done])])
    head = ["", "vision @.4", "@.5", "- text at the same temperature, @.4", "@.5", "gap"]
    return markdown.table(head, lines)


PHASE2 = {  # what the table calls it: row, column, what it is compared with
    "text maps at .4": ("text", "@0.4", None),
    "text maps at .4, softened": ("text, softened", "@0.4", None),
    "vision maps at .4": ("vision", "@0.4", "text maps at .4, softened"),
    "vision + CRF": ("vision", "CRF", "text, softened, + CRF"),
    "text, softened, + CRF": ("text, softened", "CRF", None),
    "decoder on the masks": ("decoder", "net", None),
    "decoder + RSC, lambda 1": ("decoder + RSC", "net", "decoder on the masks"),
    "decoder + RSC, lambda .1": ("decoder + RSC .1", "net", "decoder on the masks"),
    "decoder + CRF": ("decoder", "net + CRF", None),
    "decoder + RSC, lambda .1, + CRF": ("decoder + RSC .1", "net + CRF", "decoder + CRF"),
}


def phase2_table(done, clips):
    of = {name: np.array([pair.rows[row][column] for pair in done])
          for name, (row, column, _) in PHASE2.items()}
    lines = []
    for name, (_, _, other) in PHASE2.items():
        less = f"{pairs.interval(of[name] - of[other])} to {other}" if other else ""
        lines.append([name, f"{of[name].mean():.1f}", pairs.each(of[name]), less])
    return markdown.table(["row", "val mIoU", "by draw", "paired difference"], lines)


def main():
    args = parse()
    clips = args.clips
    fill, table, wanted = {"main": (fill_main, main_table, set(ROWS)),
                           "sweeps": (fill_sweeps, sweep_table, SWEPT.keys()),
                           "phase2": (fill_phase2, phase2_table, {"decoder + RSC .1"})}[args.table]
    args.out = (args.out / args.table).resolve()
    recipe = pairs.recipe(USES[args.table])
    drawn = [pairs.Pair(args.out, n, args.first_draw + n // len(clips), 0, recipe, clips[n % len(clips)])
             for n in range(args.pairs * len(clips))]
    pairs.study(args, "ablations.vpl_tables", drawn, lambda pair: wanted <= pair.rows.keys(), fill,
                lambda done: table(done, clips), mark=f"ablations.vpl_tables {args.table}")


if __name__ == "__main__":
    guard.run(main)
