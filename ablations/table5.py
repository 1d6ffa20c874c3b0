"""Table 5 of SemPLeS on the toy world: which part of the method does what. Pairs of draw and seed.

All rows of a pair share the draw and the classification start. (b) learns on the maps of (a). (a) and
every (c) train equally long from that start:

    cls     classification start                  random   (c) with prompts as initialised
    match   (a), L_match alone                    text     (c), prompts by the text term alone
    full    (c), prompts by Eq. 2                 image    (c), prompts by the image term alone

More rows: lambda_<x>, (c) with that lambda; lambda_t_<x>, (b) with that lambda_t; from_match, (c) from (a)'s
S, so trained twice as long; again, L_match alone from there; joint and alternate_<n>, Table 6 of the arXiv
version (ablations/schemes.py).

The threshold was fixed beforehand; the truth only scores. Beside mIoU: the share of the objects that is lit
(recall), the share of their own background (own), and that share at the threshold where the row has the
recall of `match` (own at equal recall).

    python -m ablations.table5 --pairs 8 --jobs 2 --write
    python -m ablations.table5 --pairs 4 --rows full lambda_0.05 lambda_0.5 joint alternate_2
"""
import argparse

import numpy as np

from ablations import pairs
from plumbing import folders, guard, markdown
from plumbing.maps import load_cam, resize_maps
from toy import drawings

TABLE5 = ["cls", "match", "random", "text", "image", "full"]
USES = "IMAGES SHARED CLS MATCH PROMPT REFINE THRESHOLD"      # lines of run_toy.sh
GRID = np.linspace(0, 1, 201)                                 # thresholds


def row(text):
    kind, _, number = text.rpartition("_")
    if text not in TABLE5 + ["from_match", "again", "joint"]:
        try:
            {"lambda": float, "lambda_t": float, "alternate": int}[kind](number)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is no row of this table") from None
    return text


def parse():
    p = pairs.parser(__doc__, "runs/table5", pairs=8, first_draw=301)
    p.add_argument("--rows", type=row, nargs="+", default=TABLE5)
    return p.parse_args()


def train(pair, name, out):
    """A row of (c) -> <out>/refine.pt"""
    kind, _, number = name.rpartition("_")
    start = pair.root / "base" / ("match.pt" if name in ("from_match", "again") else "cls.pt")
    if name not in ("again", "random", "joint"):              # these need no (b)
        b = {"text": ["--lambda-i", "0"], "image": ["--lambda-t", "0"]}.get(name, [])
        b += ["--lambda-t", number] if kind == "lambda_t" else []
        if kind == "lambda" and "full" in pair.rows:          # the same prompts
            pairs.link(pair.root / "full/prompts.pt", out)
        pair.run("train_prompt.py", out, *pair.clip, *pair.recipe["PROMPT"], *b,
                 "--init", pair.root / "base/match.pt")
    c = {"again": ["--lambda-refine", "0", "--prompts", "random"], "random": ["--prompts", "random"],
         "lambda": ["--lambda-refine", number], "joint": ["--scheme", "joint"],
         "alternate": ["--scheme", "alternate", "--rounds", number]}.get(kind or name, [])
    script = "ablations.schemes" if "--scheme" in c else "train_refine.py"
    pair.run(script, out, *pair.clip, *pair.recipe["REFINE"], *c, "--init", start)


def measure(pair, cams):
    """Shares of the objects and of their own backgrounds above each threshold of GRID, all images pooled."""
    folder = folders.Folder(pair.data)
    ids = folder.ids("train")
    values = {"object": [], "own": []}
    for id, label in zip(ids, folder.labels(ids)):
        truth, ground = folder.truth(id), drawings.scene(pair.draw, int(id.split("_")[1])).ground
        classes, cam = load_cam(cams / f"{id}.npy", label)
        for k, m in zip(classes, resize_maps(cam, truth.shape).numpy()):
            values["object"].append(m[truth == k + 1])
            values["own"].append(m[(ground == k) & (truth == 0)])
    shares = {}
    for part, found in values.items():
        found = np.sort(np.concatenate(found))
        shares[part] = (1 - np.searchsorted(found, GRID, side="right") / len(found)).tolist()
    return shares


def fill(pair, rows):
    base, threshold = pair.root / "base", pair.recipe["THRESHOLD"]

    def score(name, out, source):
        pair.maps(out, source, f"cam_{source}")
        miou = pair.miou(out, "cam", f"cam_{source}", *threshold)
        pair.rows[name] = {"miou": miou, **measure(pair, out / f"cam_{source}")}

    pair.run("train_cls.py", base, *pair.recipe["CLS"], "--backbone", pair.data / "backbone.pt")
    pair.run("train_match.py", base, *pair.clip, *pair.recipe["MATCH"])
    for name in rows:
        if name not in pair.rows and name in ("cls", "match"):
            score(name, base, name)
        elif name not in pair.rows:
            train(pair, name, pair.root / name)
            score(name, pair.root / name, "refine")
        pair.save()


def add_shares(pair):
    """What the table shows of `measure`, at the threshold and at the recall of `match`."""
    at = round(200 * float(pair.recipe["THRESHOLD"][1]))
    wanted = pair.rows["match"]["object"][at]
    for found in pair.rows.values():
        found["recall"], found["own lit"] = found["object"][at], found["own"][at]
        found["own at equal recall"] = float(np.interp(-wanted, -np.array(found["object"]), found["own"]))


def table(done, rows):
    """A line a row: means over the pairs, and the paired differences to `match` and to `random`."""
    for pair in done:
        add_shares(pair)
    shares = ["recall", "own lit", "own at equal recall"]
    lines = []
    for name in rows:
        of = {other: np.array([pair.rows[other]["miou"] for pair in done]) for other in rows}
        less = [pairs.interval(of[name] - of[other]) if other in rows and other != name else ""
                for other in ("match", "random")]
        means = [f"{np.mean([pair.rows[name][share] for pair in done]):.3f}" for share in shares]
        lines.append([name, f"{of[name].mean():.1f}", pairs.each(of[name]), *less, *means])
    return markdown.table(["row", "mIoU", "by pair", "- match", "- random", *shares], lines)


def main():
    args = parse()
    rows = ["cls", "match", *(name for name in args.rows if name not in ("cls", "match"))]
    drawn = pairs.by_draw(args, pairs.recipe(USES))
    pairs.study(args, "ablations.table5", drawn, lambda pair: set(rows) <= set(pair.rows),
                lambda pair: fill(pair, rows), lambda done: table(done, rows))


if __name__ == "__main__":
    guard.run(main)
