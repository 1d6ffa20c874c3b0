"""The papers' claims, and what the pairs of the other tables say: yes, in part or no.

A claim is one test or two on paired differences; it shows if all of them hold.

    above   the 95 % interval of a - b lies above 0
    level   the 95 % interval of a - b holds 0
    peak    a curve's best value is none of its ends, and is above both of them as `above` says. The best is
            the best of the same pairs, which favours it a little.

VPL's maps are scored at threshold .4, and compared with the text maps of the same temperature and of CLIP's
own.

    python -m ablations.claims --write
"""
import argparse
from pathlib import Path

import numpy as np

from ablations import pairs, vpl_tables
from plumbing import files, flags, guard, markdown


def parse():
    p = argparse.ArgumentParser(flags.program(), description=__doc__, formatter_class=flags.Manual)
    p.add_argument("--runs", type=Path, default=files.ROOT / "runs", help="where the tables keep their pairs")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    return p.parse_args()


# ---------------------------------------------------------------- what the pairs have measured

def measured(folder, *names):
    """-> (pairs, names), of the pairs in `folder` that have all of the names, "row:column"."""
    found = []
    for path in sorted(folder.glob("pair_*.json")):
        rows = files.read_json(path)["rows"]
        try:
            found.append([look_up(rows, name) for name in names])
        except KeyError:
            continue
    return np.array(found).reshape(-1, len(names))


def look_up(rows, name):
    for key in name.split(":"):
        rows = rows[key]
    return rows


# ---------------------------------------------------------------- tests: each gives a text and its answer

def compare(folder, a, b):
    """-> means and interval as text; a - b of every pair, none if there are fewer than two"""
    values = measured(folder, a, b)
    if len(values) < 2:
        return "not measured", np.array([])
    less = values[:, 0] - values[:, 1]
    a, b = (f"{mean:.1f}" if mean > 2 else f"{mean:.2f}" for mean in values.mean(0))  # points, or a gap
    return f"{a} against {b} ({pairs.interval(less)}, {len(less)} pairs)", less


def is_above(less):
    return less.mean() > pairs.half_width(less)


def above(folder, a, b):
    text, less = compare(folder, a, b)
    return text, len(less) > 0 and is_above(less)


def level(folder, a, b):
    text, less = compare(folder, a, b)
    return text, len(less) > 0 and not is_above(less) and not is_above(-less)


def peak(folder, *names):
    values = measured(folder, *names)
    if len(values) < 2:
        return "not measured", False
    best = values.mean(0).argmax()
    label = names[best].split(":")[0]
    if best in (0, len(names) - 1):
        return f"no peak: best at the end, {label} ({len(values)} pairs)", False
    less = [values[:, best] - values[:, end] for end in (0, -1)]
    shown = " and ".join(pairs.interval(each) for each in less)
    return f"peak at {label}, {shown} to the ends ({len(values)} pairs)", all(map(is_above, less))


# ---------------------------------------------------------------- the claims

LAMBDAS = ["match:miou", "lambda_0.05:miou", "full:miou", "lambda_0.5:miou", "lambda_1:miou"]  # full: .2


def curve(name):
    return [f"{name} {value}:vision:@0.4" for value in vpl_tables.SWEEPS[name]]


CLAIMS = [  # claim; the paper's figures, VOC; folder of the table; its tests
    ("L_match improves the classification start", "65.9 -> 67.6", "table5",
     [(above, "match:miou", "cls:miou")]),
    ("L_refine with random prompts adds nothing", "67.6", "table5",
     [(level, "random:miou", "match:miou"), (above, "full:miou", "random:miou")]),
    ("prompts by the text term alone hardly help", "67.7", "table5",
     [(level, "text:miou", "match:miou"), (above, "full:miou", "text:miou")]),
    ("prompts by the image term alone: part of the gain", "67.9", "table5",
     [(above, "image:miou", "match:miou"), (above, "full:miou", "image:miou")]),
    ("both terms: best", "68.7", "table5", [(above, "full:miou", "match:miou")]),
    ("lambda: too little and too much both lose", "0 67.6, .05 68.7, .1 67.8", "table5", [(peak, *LAMBDAS)]),
    ("joint training loses", "65.9 to 68.7", "table5", [(above, "full:miou", "joint:miou")]),
    ("masks (CRF) above maps", "68.7 -> 78.4 (SAM)", "masks", [(above, "masks", "maps")]),
    ("a network on masks beats one on maps", "", "masks", [(above, "net on masks", "net on maps")]),
    ("SemPLeS improves every host (Table 4)", "+.6, +1.0, +.8 (networks)", "hosts",
     [(above, "cnn + SemPLeS:network", "cnn:network"),
      (above, "cnn + SemPLeS, segments:network", "cnn, segments:network"),
      (above, "CLIMS + SemPLeS:network", "CLIMS, longer:network")]),
    ("vision prototypes above texts, maps", "+4.9 to +5.5", "vpl_tables/main",
     [(above, "vision:@0.4", "text, softened:@0.4"), (above, "vision:@0.4", "text:@0.4")]),
    ("... after CRF", "75.0 -> 78.4", "vpl_tables/main",
     [(above, "vision:CRF", "text, softened:CRF"), (above, "vision:CRF", "text:CRF")]),
    ("the modality gap falls", ".76 -> .51", "vpl_tables/main",
     [(above, "vision:gap:before", "vision:gap:after")]),
    ("tau_I: a peak", "66.9 67.3 68.2 67.8 67.2", "vpl_tables/sweeps",
     [(peak, *curve("tau"))]),
    ("Phi: a peak", "67.2 67.7 68.2 67.9 67.3 67.9", "vpl_tables/sweeps",
     [(peak, *curve("phi"))]),
    ("many steps needed", "65.9 -> 68.2", "vpl_tables/sweeps",
     [(above, "steps 1000:vision:@0.4", "steps 10:vision:@0.4")]),
    ("prompt ensemble above single", "+1.4", "vpl_tables/sweeps",
     [(above, "prompt ensemble:vision:@0.4", "prompt single:vision:@0.4"),
      (above, "prompt templates:vision:@0.4", "prompt single:vision:@0.4")]),
    ("a decoder above its masks", "71.3 -> 75.5", "vpl_tables/phase2",
     [(above, "decoder:net", "vision:CRF")]),
    ("RSC (lambda 1) above none", "75.5 -> 77.2", "vpl_tables/phase2",
     [(above, "decoder + RSC:net", "decoder:net")]),
]


def judge(root, claim, paper, folder, tests):
    texts, answers = zip(*(test(root / folder, *names) for test, *names in tests))
    if "not measured" in texts:
        return [claim, paper, "; ".join(texts), "not measured"]
    verdict = "yes" if all(answers) else "in part" if any(answers) else "no"
    return [claim, paper, "; ".join(texts), verdict]


def main():
    args = parse()
    lines = [judge(args.runs, *claim) for claim in CLAIMS]
    verdicts = [line[-1] for line in lines]
    kinds = "yes", "in part", "no", "not measured"
    count = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds if kind in verdicts)
    text = f"{markdown.table(['claim', 'paper (VOC)', 'toy', 'shows?'], lines)}\n\n{count}."
    print(text)
    if args.write:
        pairs.write("ablations.claims", text)


if __name__ == "__main__":
    guard.run(main)
