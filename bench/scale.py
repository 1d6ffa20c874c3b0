"""How time and memory grow: with processes, pictures, classes, pairs and resolution; and what VOC, COCO and a million pictures would take.

The stages themselves at the real shapes (DeiT-S, ViT-B/32 and /16, random weights, drawn pictures of VOC's size with two classes each), every
measurement in a process of its own: seconds of the stage's own loop, without its start, and the most memory that the process ever held.

    processes   a step of (a), and S's maps, by 1, 2, ... processes of one thread each, the same work in all
    growth      steps by classes, pairs and crop; maps, CRF masks and scores by pictures; CLIP's maps by the size they are made at
    plan        hours of every stage: constants of `growth` x pictures x epochs. Extrapolated, not measured.

    python bench/scale.py
    python bench/scale.py --what growth plan
    python bench/scale.py --device cuda --amp bf16 --pictures 64 --steps 100 --images 256 --processes 1 2 4 8
"""
import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import stage  # noqa: E402
from flops import make_inputs  # noqa: E402
from input import Ready, photograph  # noqa: E402
from plumbing import checkpoints, masks as mask_files  # noqa: E402
from wsss import clip_model, generator, losses  # noqa: E402

# pictures, labels a picture, classes; SemPLeS's and VPL's epochs, batches, views and steps are the defaults of the stages
PLANS = {"VOC": (10_582, 1.5, 20), "COCO": (82_081, 2.9, 80), "a million, as COCO": (1_000_000, 2.9, 80)}
EPOCHS, PROMPT_BATCH, VIEWS, STEPS, MAX_PIXELS, PATCHES = 60, 128, 8, 3000, 4_000_000, 24 * 32


# ---------------------------------------------------------------- one measurement, in its own process

def job(spec):
    """Runs a stage and prints the seconds of a step, or of what is spent in its function `clock`, and the peak memory in MB."""
    spent = clocked(importlib.import_module(spec["script"].removesuffix(".py")), spec["clock"]) if "clock" in spec else None
    if "ready" in spec:
        seconds = Ready(**spec["ready"]).run(spec["script"], *spec["flags"])
        seconds = float(np.mean(spent[1:])) if spent else seconds             # the first call warms up
    else:
        stage(spec["script"], *spec["flags"])
        seconds = sum(spent)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps([seconds, peak / 1e6]))


def clocked(module, name):
    """-> the list that gets the seconds of every call of module.name"""
    spent, function = [], getattr(module, name)
    wait = lambda: torch.cuda.synchronize() if torch.cuda.is_initialized() else None

    def timed(*args):
        wait()
        start = time.perf_counter()
        result = function(*args)
        wait()
        spent.append(time.perf_counter() - start)
        return result

    setattr(module, name, timed)
    return spent


class Bench:
    """The inputs of all measurements, and their common flags."""

    def __init__(self, root, args):
        self.root, self.args, self.runs, self.workers = root, args, 0, 0 if args.device == "cpu" else 4
        make_inputs(root, 1, 1)
        for classes in (20, 80):
            self.folder(root / f"{classes}", classes)
            checkpoints.save(root / f"generator_{classes}.pt", model=generator.build_generator("deit_small", classes).state_dict())
        clip = CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16, context_length=77, vocab_size=49408,
                    transformer_width=512, transformer_heads=8, transformer_layers=12)
        torch.save(clip.half().state_dict(), root / "clip16.pt")

    def folder(self, root, classes):
        for name in ("JPEGImages", "SegmentationClass"):
            (root / name).mkdir(parents=True)
        rng, lines = np.random.default_rng(0), []
        for n in range(self.args.images):
            photograph(rng, 500, 375).save(root / f"JPEGImages/{n:04d}.jpg", quality=92)
            mask_files.save_mask(root / f"SegmentationClass/{n:04d}.png", np.arange(375 * 500).reshape(375, 500) // 40_000)
            lines.append(f"{n:04d} {n % classes} {(n + 1) % classes}")
        (root / "labels.txt").write_text("\n".join(lines))
        (root / "classes.txt").write_text("\n".join(f"class {n}" for n in range(classes)))

    def measure(self, script, flags, processes=1, classes=20, out=None, **spec):
        """-> seconds, MB"""
        self.runs += 1
        out = out or f"out_{self.runs}"
        shared = ["--data", self.root / f"{classes}", "--out", self.root / out, "--split", "train", "--device", self.args.device, "--amp", self.args.amp]
        text = json.dumps({"script": script, "flags": [str(flag) for flag in [*shared, *flags]], **spec})
        head = [sys.executable, "-W", "ignore"] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [])
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if processes else os.environ
        done = subprocess.run([*head, __file__, "--job", text], capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"{script} {' '.join(map(str, flags))}\n{done.stdout}{done.stderr}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def step(self, script, pictures=0, pairs=1, classes=20, crop=224, processes=0, **clock):
        """-> seconds a step on `pictures` with `pairs` each, MB"""
        pictures = pictures or self.args.pictures
        clip = ["--clip", self.root / "clip.pt", "--init", self.root / f"generator_{classes}.pt"]
        flags = {"train_cls.py": ["--backbone", "none"], "train_refine.py": [*clip, "--prompts", "random"]}.get(script, clip)
        ready = dict(pictures=pictures, pairs=pairs * pictures, classes=classes, crop=crop, steps=self.args.steps)
        return self.measure(script, flags, processes, classes, ready=ready, **clock)

    def maps(self, count, processes=0, out=None):
        """-> seconds a picture of S's maps at scales 1 and 1.2 with flips, MB"""
        seconds, peak = self.measure("make_cam.py", ["--init", self.root / "generator_20.pt", "--limit", count, "--batch-size", 2, "--sheets", 0, "--workers", self.workers], processes, out=out, clock="make")
        return seconds / count, peak

    def masks(self, count, out):
        seconds, peak = self.measure("make_pseudo.py", ["--limit", count, "--workers", 0], 0, out=out, clock="make")
        return seconds / count, peak

    def scores(self, count, out):
        seconds, peak = self.measure("eval.py", ["--what", "cam", "--limit", count], 0, out=out, clock="score_maps")
        return seconds / count, peak

    def features(self, count, side=640):
        """-> seconds a picture of CLIP's maps and features, MB"""
        flags = ["--clip", self.root / "clip16.pt", "--limit", count, "--batch-size", 1, "--workers", self.workers, "--steps", 1, "--max-side", side, "--phi", 0.1]
        seconds, peak = self.measure("vpl.py", flags, 0, clock="collect")
        return seconds / count, peak


    def prompts(self, classes):
        """-> seconds of what is left of a step of (b) on stored features: the prompts through the text tower and back; no memory"""
        with contextlib.redirect_stdout(sys.stderr):
            model = clip_model.BackgroundPrompts(clip_model.load_clip(self.root / "clip.pt", self.args.device), classes)
        model().sum().backward()
        return timeit(lambda: model().sum().backward()), 0

    def descent(self, pixels):
        """-> seconds of a step of VPL's descent over `pixels`"""
        x, targets = torch.randn(pixels, 512, device=self.args.device).half(), torch.rand(pixels, 44, device=self.args.device)
        w = torch.randn(44, 512, device=x.device)
        return timeit(lambda: losses.prototype_gradient(x, w, targets, 0.03)[1].item()), 0


def timeit(function):
    """Seconds of the second call."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    function(), wait()
    start = time.perf_counter()
    function(), wait()
    return time.perf_counter() - start


# ---------------------------------------------------------------- tables

def table(*head):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")


def row(*cells):
    shown = (cell if isinstance(cell, str) else f"{cell:,.0f}" if isinstance(cell, int) or cell >= 100 else f"{cell:.3g}" for cell in cells)
    print("| " + " | ".join(shown) + " |", flush=True)


def processes_table(bench):
    table("processes, one thread each", "(a), pictures/s", "efficiency", "S's maps, pictures/s", "efficiency", "MB a process, (a), maps")
    pictures, first = max(bench.args.processes), None
    for n in bench.args.processes:
        (step, mb), (cam, more) = bench.step("train_match.py", pictures * bench.args.pictures, processes=n), bench.maps(bench.args.images, n)
        rates = pictures * bench.args.pictures / step, 1 / cam
        first = first or [rate / n for rate in rates]
        row(n, rates[0], f"{100 * rates[0] / n / first[0]:.0f} %", rates[1], f"{100 * rates[1] / n / first[1]:.0f} %", f"{mb:,.0f}, {more:,.0f}")


def growth_table(bench):
    """-> the constants of the plan: seconds"""
    B, few, many, c = bench.args.pictures, bench.args.images // 4, bench.args.images, {}
    table("", "seconds", "MB")
    def shown(name, found):
        row(name, float(found[0]), int(found[1]) or "")
        return found[0]

    c["cls"] = shown(f"train_cls, a step on {B} pictures", bench.step("train_cls.py")) / B
    one, three = (shown(f"(a), {B} pictures, {n} pairs each", bench.step("train_match.py", pairs=n)) for n in (1, 3))
    c["a pair"] = (three - one) / (2 * B)
    c["a picture"] = one / B - c["a pair"]
    shown(f"(a), {B} pictures, 1 pair each, 80 classes", bench.step("train_match.py", classes=80))
    shown(f"(a), {B} pictures, 1 pair each, crop 448", bench.step("train_match.py", crop=448))
    shown(f"(c), {B} pictures, 1 pair each", bench.step("train_refine.py"))
    one, three = (shown(f"(b), encoding {B} crops, {n} pairs each", bench.step("train_prompt.py", pairs=n, clock="encode_background")) for n in (1, 3))
    c["b pair"] = (three - one) / (2 * B)
    c["b picture"] = one / B - c["b pair"]
    for classes in (20, 80):
        c[f"b {classes}"] = shown(f"(b), a step of all prompts, {classes} classes", bench.prompts(classes))
    for name, stage_of in (("S's maps, scales 1 and 1.2, flips", bench.maps), ("CRF masks", bench.masks), ("scores", bench.scores)):
        for n in (few, many):
            c[name] = shown(f"{name}, a picture of {n}", stage_of(n, out=f"pictures_{n}"))
    for n in (few, many):
        c["CLIP's maps"] = shown(f"CLIP's maps and features, a picture of {n}", bench.features(n))
    shown(f"CLIP's maps and features at half the side, a picture of {few}", bench.features(few, 250))
    for n in (1 << 14, 1 << 16):
        c["descent"] = shown(f"prototypes, a step over {n:,} pixels", bench.descent(n)) / n
    return c


def plan_table(c):
    """Hours here, by data set."""
    table("hours here, extrapolated", *(f"{name}: {n:,} pictures" for name, (n, *_) in PLANS.items()))
    both = lambda f: [f(*plan) / 3600 for plan in PLANS.values()]
    match = lambda n, pairs, classes: EPOCHS * n * (c["a picture"] + pairs * c["a pair"])
    pixels = lambda n: min(n * PATCHES, MAX_PIXELS)
    hours = {
        f"train_cls, {EPOCHS} epochs": both(lambda n, pairs, classes: EPOCHS * n * c["cls"]),
        f"(a), {EPOCHS} epochs": both(match),
        f"(b), {EPOCHS} epochs of {VIEWS} stored views": both(lambda n, pairs, classes: VIEWS * n * (c["b picture"] + pairs * c["b pair"])
                                                              + EPOCHS * n / PROMPT_BATCH * c[f"b {classes}"]),
        f"(c), {EPOCHS} epochs, as (a)": both(match),
        **{name: both(lambda n, pairs, classes: n * c[name]) for name in ("S's maps, scales 1 and 1.2, flips", "CRF masks", "scores")},
        "VPL: maps and features": both(lambda n, pairs, classes: n * c["CLIP's maps"]),
        f"VPL: {STEPS:,} steps": both(lambda n, pairs, classes: STEPS * pixels(n) * c["descent"]),
        "CLIP's maps by prototypes": both(lambda n, pairs, classes: n * c["CLIP's maps"]),
    }
    for name, values in hours.items():
        row(name, *values)
    table("GB", *PLANS)
    disk = lambda f: [f(*plan) / 1e9 for plan in PLANS.values()]
    row("disk: maps, float16, 500x375", *disk(lambda n, pairs, classes: n * pairs * 375 * 500 * 2))
    row("disk: maps at --stride 4", *disk(lambda n, pairs, classes: n * pairs * 94 * 125 * 2))
    row("disk: VPL's features, --max-pixels 4 million", *disk(lambda n, pairs, classes: pixels(n) * 513 * 2))
    row("disk: --cache of CLIP's last block", *disk(lambda n, pairs, classes: n * 2 * ((PATCHES + 1) * 768 + (PATCHES + 1) ** 2)))
    row(f"memory: (b)'s {VIEWS} stored views", *disk(lambda n, pairs, classes: VIEWS * n * pairs * 513 * 4))
    row("memory: labels", *disk(lambda n, pairs, classes: n * classes * 4))


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--what", nargs="+", choices=["processes", "growth", "plan"], default=["processes", "growth", "plan"], help="plan needs growth")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", default="off")
    p.add_argument("--pictures", type=int, default=2, help="pictures of a step, for each process")
    p.add_argument("--steps", type=int, default=2, help="steps timed, after one")
    p.add_argument("--images", type=int, default=8, help="pictures of a stage that goes over all; a quarter of them beside it")
    p.add_argument("--job", type=json.loads, help="one measurement, in this process (used by itself)")
    args = p.parse_args()
    if "plan" in args.what and "growth" not in args.what:
        p.error("--what plan is made of --what growth")
    return args


def main():
    args = parse()
    if args.job:
        return job(args.job)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        if "processes" in args.what:
            processes_table(bench)
        constants = growth_table(bench) if "growth" in args.what else None
        if "plan" in args.what:
            plan_table(constants)


if __name__ == "__main__":
    main()
