"""Table 4 of SemPLeS on the toy world: hosts with and without it. Pairs of draw and seed.

    cnn                the toy's generator of WeakTr's kind, trained on image labels
    cnn + SemPLeS      after (a), (b), (c)
    CLIMS              its sibling of CLIMS's kind, by CLIMS's losses, batch and ten background names of VOC,
                       which are three of this world's eight backgrounds (water, rails, leaves)
    CLIMS, longer      continued by the same losses for the epochs of (c): the control
    CLIMS + SemPLeS    instead continued with L_refine and learned prompts
    text, segments     masks from CLIP's text maps and superpixels, as FMA-WSSS makes its seeds; the next two
                       rows are the same from the maps of cnn and of cnn + SemPLeS

Columns: maps at the fixed threshold and masks (dense CRF, or segments) on train, a network trained on the
masks on val. The truth only scores. Draws 100 and 101 chose the recipe.

    python -m ablations.hosts --pairs 8 --jobs 2 --write
    python -m ablations.hosts --pairs 3 --hosts cnn clims --no-network
"""
import argparse

import numpy as np

from ablations import pairs
from plumbing import guard, markdown

ROWS = {"cnn": ["cnn", "cnn + SemPLeS"], "clims": ["CLIMS", "CLIMS, longer", "CLIMS + SemPLeS"],
        "segments": ["text, segments", "cnn, segments", "cnn + SemPLeS, segments"]}
USES = "IMAGES SHARED CLS MATCH PROMPT REFINE THRESHOLD MASKS SEGMENTS VOTE SEG PREDICT LOCALISE"
AGAINST = {"cnn + SemPLeS": "cnn", "CLIMS, longer": "CLIMS", "CLIMS + SemPLeS": "CLIMS, longer",
           "cnn + SemPLeS, segments": "cnn, segments"}

CROPS = "--crop 96 --min-scale 1 --momentum 0.9 --batch-size".split()
# At this rate the backbone does not move: with it, CLIMS's maps get worse on the toy. The classifier learns.
ALONE = ["--lr", "1e-9", "--head-rate"]
CLIMS_CAM = [*CROPS, "32", "--generator", "clims_toy", "--epochs", "8", *ALONE, "1e8"]
CLIMS = [*CROPS, "16", "--epochs", "4", *ALONE, "4e6"]


def parse():
    p = pairs.parser(__doc__, "runs/hosts", pairs=8, first_draw=331)
    p.add_argument("--hosts", nargs="+", choices=list(ROWS), default=list(ROWS))
    p.add_argument("--network", action=argparse.BooleanOptionalAction, default=True,
                   help="--no-network: maps and masks only")
    return p.parse_args()


def recipe():
    return {**pairs.recipe(USES), "CLIMS_CAM": CLIMS_CAM, "CLIMS": CLIMS}


# ---------------------------------------------------------------- hosts: each yields row, folder, source

def train_cnn(pair):
    start, out = pair.root / "cnn", pair.root / "semples"
    pair.run("train_cls.py", start, *pair.recipe["CLS"], "--backbone", pair.data / "backbone.pt")
    yield "cnn", start, "cls"
    pairs.link(start / "cls.pt", out)
    pair.train_semples(out)
    yield "cnn + SemPLeS", out, "refine"


def train_clims(pair):
    start = pair.root / "clims"
    clims = [*pair.clip, *pair.recipe["CLIMS"]]
    pair.run("hosts.train_cam", start, *pair.recipe["CLIMS_CAM"], "--backbone", pair.data / "backbone.pt")
    pair.run("hosts.train_clims", start, *clims)
    yield "CLIMS", start, "match"
    pair.run("train_prompt.py", start, *pair.clip, *pair.recipe["PROMPT"])
    for name, folder, more in (("CLIMS, longer", "clims_longer", ["--lambda-refine", "0"]),
                               ("CLIMS + SemPLeS", "clims_semples", [])):
        out = pair.root / folder
        for weights in ("match.pt", "prompts.pt"):
            pairs.link(start / weights, out)
        pair.run("hosts.train_clims", out, *clims, "--stage", "refine", *more)
        yield name, out, "refine"


def vote_of_segments(pair):
    text = pair.root / "text"
    list(train_cnn(pair))                                     # its generators, if they are not there yet
    pair.run("hosts.make_segments", text, *pair.recipe["SEGMENTS"])
    yield "text, segments", text, "text"
    yield "cnn, segments", pair.root / "cnn", "cls"
    yield "cnn + SemPLeS, segments", pair.root / "semples", "refine"


def fill(pair, args):
    hosts = {"cnn": train_cnn, "clims": train_clims, "segments": vote_of_segments}
    for host in args.hosts:
        for name, out, source in hosts[host](pair):
            pair.rows.setdefault(name, {}).update(score(pair, out, source, host == "segments", args.network))
            pair.save()


def score(pair, out, source, segments, network):
    """mIoU of maps, of their masks by the CRF or by segments, of a network trained on the masks."""
    cam, masks = f"cam_{source}", "pseudo_segments" if segments else "pseudo"
    texts = [*pair.clip, *pair.recipe["LOCALISE"]] if source == "text" else []
    vote = ["--segments", pair.root / "text/segments", *pair.recipe["VOTE"]]
    threshold = pair.recipe["THRESHOLD"]
    pair.maps(out, source, cam, *texts)
    pair.run("make_pseudo.py", out, "--cam", cam, "--pseudo", masks, *threshold,
             *(vote if segments else pair.recipe["MASKS"]))
    found = {"maps": pair.miou(out, "cam", cam, *threshold), "masks": pair.miou(out, "pseudo", masks)}
    if network:
        found["network"] = pair.network(out / f"net_{masks}", out / masks)
    return found


def table(done, names, columns):
    """A line a row: means over the pairs, by pair, and the paired difference to the row in AGAINST."""
    lines = []
    for name in names:
        other = AGAINST.get(name)
        values, less = [], []
        for column in columns:
            of = {row: np.array([pair.rows[row][column] for pair in done]) for row in (name, other) if row}
            values += [f"{of[name].mean():.1f}", pairs.each(of[name])]
            less.append(pairs.interval(of[name] - of[other]) if other else "")
        lines.append([name, *values, *less, other or ""])
    split = {"maps": "maps, train", "masks": "masks, train", "network": "network, val"}
    head = [text for column in columns for text in (split[column], "by pair")]
    return markdown.table(["", *head, *columns, "to"], lines)


def main():
    args = parse()
    names = [name for host in ROWS if host in args.hosts for name in ROWS[host]]
    columns = ["maps", "masks", "network"] if args.network else ["maps", "masks"]
    drawn = pairs.by_draw(args, recipe())
    pairs.study(args, "ablations.hosts", drawn,
                lambda pair: all(set(columns) <= pair.rows.get(name, {}).keys() for name in names),
                lambda pair: fill(pair, args), lambda done: table(done, names, columns))


if __name__ == "__main__":
    guard.run(main)
