"""What the tables share: the stages run in this process with the recipe of run_toy.sh, jobs, intervals.

A table is made of pairs: a data draw of the toy world, and a seed of everything that is trained on it. A pair
runs in a process of its own and writes <out>/pair_<n>.json; rows that are there are kept.
"""
import argparse
import importlib
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from plumbing import files, flags, markdown

# ---------------------------------------------------------------- the stages and their recipe


def recipe(names):
    """The flags in run_toy.sh, its lines NAME="--flag ...", those that a study uses -> {NAME: list of str}"""
    found = re.findall(r'^([A-Z]+)="(-[^"]*)"', (files.ROOT / "run_toy.sh").read_text(), re.M)
    return {name: shlex.split(text) for name, text in found if name in names.split()}


def stage(script, *values):
    """Runs a script in this process: a start costs more than some stages. `script`: x.py or hosts.x"""
    sys.argv = [script, *map(str, values)]
    importlib.import_module(script.removesuffix(".py")).main()


class Pair:
    """One draw and one seed: the data, the folders of the rows, and the scores that are there."""

    def __init__(self, out, number, draw, seed, recipe, weights="weights"):
        self.number, self.draw, self.seed, self.recipe, self.weights = number, draw, seed, recipe, weights
        self.root, self.path = out / f"pair_{number}", out / f"pair_{number}.json"
        self.data = self.root / "data"
        self.clip = ["--clip", self.data / "clip.pt"]
        self.read()

    def read(self):
        """The rows in <out>/pair_<n>.json, which must be of this draw and recipe."""
        content = files.read_json(self.path) if self.path.exists() else {**self.facts(), "rows": {}}
        used = {name: content["recipe"].get(name) for name in self.recipe}
        if any({**content, "recipe": used}[name] != value for name, value in self.facts().items()):
            raise ValueError(f"{self.path} was made with another draw or another recipe of run_toy.sh: "
                             "take another --out")
        self.rows = content["rows"]

    def facts(self):
        return {"draw": self.draw, "seed": self.seed, "weights": str(self.weights), "recipe": self.recipe}

    def save(self):
        files.save_json(self.path, {**self.facts(), "rows": self.rows})

    def make_data(self):
        stage("make_toy.py", "--out", self.data, "--seed", self.draw, "--weights", self.weights,
              *self.recipe["IMAGES"])

    def run(self, script, out, *more, split="train"):
        """A stage on this pair's data."""
        stage(script, "--data", self.data, "--out", out, "--seed", self.seed, *self.recipe["SHARED"],
              "--split", split, *more)

    def maps(self, out, source, cam, *more, split="train"):
        self.run("make_cam.py", out, "--source", source, "--cam", cam, "--sheets", 0, *more, split=split)

    def miou(self, out, what, name, *more, split="train"):
        """Scores maps (what: cam), masks (pseudo) or a network (seg) -> mIoU in percent"""
        which = [] if what == "seg" else [f"--{what}", name]
        self.run("eval.py", out, "--what", what, *which, *more, split=split)
        return 100 * files.read_json(out / f"eval_{name}_{split}.json")["miou"]

    def train_semples(self, out):
        """(a), (b) and (c) from <out>/cls.pt"""
        self.run("train_match.py", out, *self.clip, *self.recipe["MATCH"])
        self.run("train_prompt.py", out, *self.clip, *self.recipe["PROMPT"])
        self.run("train_refine.py", out, *self.clip, *self.recipe["REFINE"])

    def network(self, out, masks):
        """mIoU on val of a network that has learned a folder of masks."""
        self.run("train_seg.py", out, *self.recipe["SEG"], "--init", self.data / "backbone.pt",
                 "--label-dir", masks)
        return self.miou(out, "seg", "seg", *self.recipe["PREDICT"], split="val")


def link(path, out):
    """Puts a file that another row has made into a row's folder."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / path.name).is_symlink():
        (out / path.name).symlink_to(path.resolve())


# ---------------------------------------------------------------- a study: flags, jobs, the table

def parser(doc, out, pairs, first_draw):
    p = argparse.ArgumentParser(flags.program(), description=doc, formatter_class=flags.Manual)
    p.add_argument("--out", type=Path, default=files.ROOT / out)
    p.add_argument("--pairs", type=flags.positive, default=pairs)
    p.add_argument("--first-draw", type=flags.natural, default=first_draw,
                   help="draws 100 and 101 chose the recipe")
    p.add_argument("--jobs", type=flags.positive, default=2, help="pairs at a time, a process each")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    p.add_argument("--only", type=flags.natural, help="run this pair in this process (used by --jobs)")
    return p


def by_draw(args, recipe):
    """The pairs of --first-draw, the next draw, ...; the seeds are 0, 1, ..."""
    return [Pair(args.out, n, args.first_draw + n, n, recipe) for n in range(args.pairs)]


def study(args, name, pairs, complete, fill, table, mark=None):
    """`fill(pair)` for each pair that is not `complete(pair)`; then `table(pairs)`, printed, and with --write
    put into docs/results.md. `name`: the module, as in python -m ablations.name"""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only is not None:
        torch.set_num_threads(1)
        pairs[args.only].make_data()
        fill(pairs[args.only])
        return pairs[args.only].save()
    run_jobs(args, name, [pair.number for pair in pairs if not complete(pair)])
    for pair in pairs:
        pair.read()
    text = table(pairs)
    print(text)
    if args.write:
        write(mark or name, text)


def run_jobs(args, name, waiting):
    """The pairs `waiting`, each in a process of its own, --jobs at a time."""
    waiting, running = list(waiting), []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                number = str(waiting.pop(0))
                command = [sys.executable, "-W", "ignore", "-m", name, *sys.argv[1:], "--only", number]
                with open(args.out / f"pair_{number}.log", "w") as log:      # a Ctrl-C here is not for them
                    running.append(subprocess.Popen(command, cwd=files.ROOT, stdout=log, stderr=log,
                                                    start_new_session=True))
            if running[0].wait() != 0:
                raise ValueError(f"a pair has failed: see {args.out}/pair_*.log")
            running.pop(0)
    finally:
        for process in running:                               # they finish and save their step
            process.terminate()
        for process in running:
            process.wait()


# Two-sided 95 % points of Student's t for 1 to 11 degrees of freedom; beyond, the last is a little wide.
STUDENT = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201]


def half_width(values):
    """Half the width of the mean's 95 % interval."""
    return STUDENT[min(len(values) - 2, 10)] * np.std(values, ddof=1) / math.sqrt(len(values))


def interval(values):
    """Mean +- half the width of its 95 % interval, as text."""
    mean = f"{np.mean(values):+.2f}"
    return mean if len(values) < 2 else f"{mean} +- {half_width(values):.2f}"


def each(values):
    return " ".join(f"{value:.1f}" for value in values)


def write(mark, text):
    """Puts a table between its marks in docs/results.md."""
    markdown.put(files.ROOT / "docs/results.md", mark, text)
