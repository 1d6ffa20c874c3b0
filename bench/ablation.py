"""Table 5 of SemPLeS on the toy world: which part of the method does what, over draws and seeds, paired.

Runs the stages themselves with the recipe of run_toy.sh. A pair is a data draw and a seed of S and the prompts; all rows of a pair
share the draw, the classification start and stage (a). Every row after (a) is trained for the epochs of (c) from (a):

    cls        classification start                      again    (a) continued by L_match alone: the control for longer training
    match      (a), L_match                              random   (c) with prompts as initialised
    text       (c), prompts by the text term alone       image    (c), prompts by the image term alone
    full       (c), prompts by Eq. 2

More rows by --rows: lambda_<x>, from_cls, joint, alternate_<n>, and vision_a, vision_c: (a) and (c) with --targets vision, VPL's prototypes
in place of texts and prompts.

The threshold was fixed beforehand. Ground truth only scores. Beside mIoU: which share of the objects is lit (recall), which share of
their own background (own), and that share at the threshold where the row's recall equals that of `match` (own at equal recall).

    python bench/ablation.py --pairs 8 --jobs 2 --write
    python bench/ablation.py --pairs 4 --rows full lambda_0.05 lambda_0.5 joint alternate_2

Rows that lie in --out already are kept; another recipe in run_toy.sh is refused there. --write puts the table into docs/results.md.
"""
import argparse
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                            # before bench/, whose eval.py is not the stage
from plumbing import folders, maps  # noqa: E402
from toy import drawings as toy  # noqa: E402

TABLE5 = ["cls", "match", "again", "random", "text", "image", "full"]
GRID = np.linspace(0, 1, 201)


def recipe():
    """The flags of run_toy.sh: the lines NAME="--flag ..."."""
    lines = re.findall(r'^([A-Z]+)="(.*)"$', (ROOT / "run_toy.sh").read_text(), re.M)
    return {name: shlex.split(flags) for name, flags in lines}


def stage(script, *flags):
    """A stage in this process: its start costs more than some stages."""
    sys.argv = [script, *map(str, flags)]
    importlib.import_module(script.removesuffix(".py")).main()


def rows_after_match(name, base):
    """-> flags of train_prompt.py (None: not run) and of train_refine.py for a row."""
    if name == "again":
        return None, ["--lambda-refine", "0", "--prompts", "random"]
    if name == "random":
        return None, ["--prompts", "random"]
    if name == "text":
        return ["--lambda-i", "0"], []
    if name == "image":
        return ["--lambda-t", "0"], []
    if name == "joint":
        return None, ["--scheme", "joint", "--init", base / "cls.pt"]
    if name.startswith("alternate_"):
        return [], ["--scheme", "alternate", "--rounds", name.split("_")[1]]
    if name.startswith("lambda_"):
        return [], ["--lambda-refine", name.split("_")[1]]
    if name == "from_cls":
        return [], ["--init", base / "cls.pt"]
    assert name == "full", name
    return [], []


def measure(folder, ids, labels, cam_dir, draw):
    """Recall and own-background shares over GRID, pixels of all (picture, present class) pairs pooled."""
    lit = {"object": np.zeros(len(GRID)), "own": np.zeros(len(GRID))}
    count = {"object": 0, "own": 0}
    for id, label in zip(ids, labels):
        truth, ground = folder.truth(id), toy.scene(draw, int(id.split("_")[1])).ground
        classes, cam = maps.load_cam(cam_dir / f"{id}.npy", label)
        for k, m in zip(classes, maps.resize_maps(cam, truth.shape).numpy()):
            for part, where in (("object", truth == k + 1), ("own", (ground == k) & (truth == 0))):
                values = np.sort(m[where])
                lit[part] += len(values) - np.searchsorted(values, GRID, side="right")
                count[part] += len(values)
    return {part: (lit[part] / max(count[part], 1)).tolist() for part in lit}


def run_pair(number, args):
    """All rows of one (draw, seed) pair -> <out>/pair_<number>.json"""
    torch.set_num_threads(1)
    flags, draw, seed = recipe(), args.first_draw + number, number
    root = args.out / f"pair_{number}"
    world, base = root / "data", root / "base"
    stage("make_toy.py", "--out", world, "--seed", draw, *flags["PICTURES"])
    folder = folders.Folder(world)
    ids = folder.ids("train")
    labels = folder.labels(ids)
    threshold = float(flags["THRESHOLD"][1])
    path = args.out / f"pair_{number}.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else {}

    def shared(out):
        return ["--data", world, "--out", out, "--seed", seed, *flags["SHARED"]]

    def score(name, out, source):
        stage("make_cam.py", *shared(out), "--source", source, "--cam", f"cam_{source}", "--sheets", 0)
        stage("eval.py", *shared(out), "--what", "cam", "--cam", f"cam_{source}", *flags["THRESHOLD"])
        scores = json.loads((out / f"eval_cam_{source}_train.json").read_text())
        found[name] = {"miou": 100 * scores["miou"], "iou": scores["iou"], **measure(folder, ids, labels, out / f"cam_{source}", draw)}

    clip = ["--clip", world / "clip.pt"]
    stage("train_cls.py", *shared(base), *flags["CLS"], "--backbone", world / "backbone.pt")
    if "cls" not in found:
        score("cls", base, "cls")
    waiting = [row for row in args.rows if row not in found]
    if "match" not in found or any(not row.startswith("vision") for row in waiting):
        stage("train_match.py", *shared(base), *clip, *flags["MATCH"])
    if "match" not in found:
        score("match", base, "match")
    for name in waiting:
        if name.startswith("vision"):
            out, vision = root / "vision", [*clip, "--targets", "vision"]
            stage("vpl.py", *shared(out), *clip, *flags["LOCALISE"], *flags["PROTOTYPES"])
            stage("train_match.py", *shared(out), *vision, *flags["MATCH"], "--init", base / "cls.pt")
            if name == "vision_c":
                stage("train_refine.py", *shared(out), *vision, *flags["REFINE"])
            score(name, out, "match" if name == "vision_a" else "refine")
            continue
        prompt, refine = rows_after_match(name, base)
        out = root / name
        if prompt is not None:
            stage("train_prompt.py", *shared(out), *clip, *flags["PROMPT"], *prompt, "--init", base / "match.pt")
        stage("train_refine.py", *shared(out), *clip, *flags["REFINE"], "--init", base / "match.pt", *refine)
        score(name, out, "refine")
    reference = found["match"]["object"][int(round(threshold * 200))]
    for row in found.values():
        row["recall"], row["own_lit"] = (row[part][int(round(threshold * 200))] for part in ("object", "own"))
        row["own_equal_recall"] = float(np.interp(-reference, -np.array(row["object"]), row["own"]))
    path.write_text(json.dumps({"draw": draw, "seed": seed, "recipe": flags, "rows": found}))


def missing(path, rows, draw):
    """True when a pair lacks a row; what another recipe made is refused."""
    if not path.exists():
        return True
    before = json.loads(path.read_text())
    now = recipe()
    if any(flags != now.get(name) for name, flags in before["recipe"].items()) or before["draw"] != draw:
        sys.exit(f"{path} was made by another recipe of run_toy.sh or another draw: take another --out")
    return not set(rows) <= set(before["rows"])


# Two-sided 95 % points of Student's t for 1..11 degrees of freedom.
STUDENT = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201]


def interval(values):
    """mean +- half width of the 95 % interval"""
    values = np.asarray(values, float)
    if len(values) < 2:
        return f"{values.mean():+.2f}"
    return f"{values.mean():+.2f} +- {STUDENT[min(len(values) - 2, 10)] * values.std(ddof=1) / math.sqrt(len(values)):.2f}"


def table(pairs, names):
    """Markdown: a row of the table each, means over the pairs and the paired difference to `match` and to `again`."""
    column = lambda name, key: np.array([p["rows"][name][key] for p in pairs])
    lines = ["| row | mIoU | by pair | - match | - again | recall | own lit | own at equal recall |", "|---|---|---|---|---|---|---|---|"]
    for name in names:
        miou = column(name, "miou")
        less = [interval(miou - column(other, "miou")) if other in names and other != name else "" for other in ("match", "again")]
        lines.append(f"| {name} | {miou.mean():.1f} | {' '.join(f'{v:.1f}' for v in miou)} | {less[0]} | {less[1]} | "
                     + " | ".join(f"{column(name, key).mean():.3f}" for key in ("recall", "own_lit", "own_equal_recall")) + " |")
    return "\n".join(lines)


def run_jobs(script, args, waiting):
    """The pairs `waiting`, each in a process of its own (--only), --jobs at a time."""
    running = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            n = waiting.pop(0)
            log = open(args.out / f"pair_{n}.log", "w")
            running.append(subprocess.Popen([sys.executable, "-W", "ignore", script, *sys.argv[1:], "--only", str(n)], stdout=log, stderr=log))
        if running[0].wait() != 0:
            [process.kill() for process in running[1:]]
            sys.exit(f"a pair failed: see {args.out}/pair_*.log")
        running.pop(0)


def write(mark, text):
    """Puts a table between its marks in docs/results.md."""
    page = ROOT / "docs/results.md"
    start, end = f"<!-- {mark} -->", "<!-- end -->"
    before, found, rest = page.read_text().partition(start)
    if not found:
        sys.exit(f"{page} has no line {start}")
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def parser(doc, out, pairs, first_draw):
    """The flags of the benchmarks over pairs of a data draw and a seed."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / out)
    p.add_argument("--pairs", type=int, default=pairs)
    p.add_argument("--first-draw", type=int, default=first_draw, help="draws 100 to 110 chose the recipe")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    p.add_argument("--only", type=int, help="run this pair in this process (used by --jobs)")
    return p


def run_pairs(script, args, run_pair, waits, table):
    """`run_pair(n, args)` for each pair n that `waits`, which leaves <out>/pair_<n>.json, then `table` of them all, printed and with --write in docs/."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only is not None:
        return run_pair(args.only, args)
    run_jobs(script, args, [n for n in range(args.pairs) if waits(n)])
    text = table([json.loads((args.out / f"pair_{n}.json").read_text()) for n in range(args.pairs)])
    print(text)
    if args.write:
        write(f"bench/{Path(script).name}", text)


def parse():
    p = parser(__doc__, "runs/ablation", pairs=8, first_draw=301)
    p.add_argument("--rows", nargs="+", default=TABLE5)
    return p.parse_args()


def main():
    args = parse()
    rows = ["cls", "match", *(row for row in args.rows if row not in ("cls", "match"))]
    run_pairs(__file__, args, run_pair, lambda n: missing(args.out / f"pair_{n}.json", rows, args.first_draw + n), lambda pairs: table(pairs, rows))


if __name__ == "__main__":
    main()
