"""How time and memory grow: with processes, images, classes, pairs and resolution.

The stages themselves at the real shapes (DeiT-S, ViT-B/32 and /16, random weights, drawn images of VOC's size
with two classes each). A measurement has a process of its own: the seconds of a training step or of one
image, without the start, and the most memory that the process ever held.

    processes   a step of (a), and S's maps, by 1, 2, ... processes of one thread each; the same work in all
    growth      steps by classes, pairs and crop; maps, CRF masks, scores and CLIP's features by images

    python -m bench.scale
    python -m bench.scale --what growth --images 4 --batch 1 --steps 1
    python -m bench.scale --device cuda --amp bf16 --batch 64 --steps 100 --images 256 --processes 1 2 4 8
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from bench import inputs, tables
from plumbing import files, flags, markdown, processes

# ---------------------------------------------------------------- one measurement, in its own process

def job(spec):
    """Runs a stage; prints the seconds of a training step, or of its loop over images, and the peak in MB."""
    if "ready" in spec:
        seconds = inputs.Ready(**spec["ready"]).seconds_of(spec["script"], *spec["flags"])
    else:
        seconds = loop_seconds(spec["script"], spec["flags"])
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * int(tables.read_if_there("/proc/self/status").partition("VmHWM:")[2].split()[0])
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps([seconds, peak / 1e6]))


def loop_seconds(script, values):
    """Seconds of the first loop over images that a stage shows a bar for."""
    progress, seconds = processes.Run.progress, []

    def timed(run, items, *rest):
        start = tables.clock(run.device)
        yield from progress(run, items, *rest)
        seconds.append(tables.clock(run.device) - start)

    with mock.patch.object(processes.Run, "progress", timed):
        tables.stage(script, *values)
    return seconds[0]


class Bench:
    """The inputs of all measurements, and what is measured: each gives seconds and MB."""

    def __init__(self, root, args):
        self.root, self.args, self.runs = root, args, 0
        self.workers = 0 if args.device == "cpu" else 4
        inputs.save_networks(root)
        torch.save(inputs.random_clip(16).half().state_dict(), root / "clip16.pt")
        for classes in (20, 80):
            present = [[n % classes, (n + 1) % classes] for n in range(args.images)]
            inputs.make_folder(root / f"{classes}", (500, 375), present, classes)
            inputs.save_generator(root / f"generator_{classes}.pt", classes)

    def measure(self, script, values, ranks=0, classes=20, out=None, **spec):
        """Runs `job` in a process with all threads, or under torchrun in `ranks` processes of one thread."""
        self.runs += 1
        shared = ["--data", self.root / f"{classes}", "--out", self.root / (out or f"out_{self.runs}"),
                  "--split", "train", "--device", self.args.device, "--amp", self.args.amp]
        spec |= {"script": script, "flags": [str(value) for value in [*shared, *values]]}
        command, env = [sys.executable, "-W", "ignore"], dict(os.environ)
        if ranks:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            env["OMP_NUM_THREADS"] = "1"
        command += ["-m", "bench.scale", "--job", json.dumps(spec)]
        done = subprocess.run(command, cwd=files.ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{script} {spec.get('ready', '')}: {seconds:.3g} s, {peak:,.0f} MB", file=sys.stderr)
        return seconds, peak

    def step(self, script, pairs=1, size=0, classes=20, crop=224, ranks=0):
        """A training step on --batch or `size` images with `pairs` each."""
        size = size or self.args.batch
        clip = ["--clip", self.root / "clip.pt", "--init", self.root / f"generator_{classes}.pt"]
        values = {"train_cls.py": ["--backbone", "none"],
                  "train_refine.py": [*clip, "--prompts", "random"]}.get(script, clip)
        ready = {"size": size, "pairs": pairs * size, "classes": classes, "crop": crop,
                 "steps": self.args.steps}
        return self.measure(script, values, ranks, classes, ready=ready)

    def image(self, count, script, *values, ranks=0):
        """One of the `count` images that a stage goes over. Masks and scores read the maps of as many."""
        out = None if ranks else f"images_{count}"
        seconds, peak = self.measure(script, ["--limit", count, *values], ranks, out=out)
        return seconds / count, peak

    def maps(self, count, ranks=0):
        return self.image(count, "make_cam.py", "--init", self.root / "generator_20.pt", "--batch-size", 2,
                          "--sheets", 0, "--workers", self.workers, ranks=ranks)

    def features(self, count, side=640):
        return self.image(count, "vpl.py", "--clip", self.root / "clip16.pt", "--batch-size", 1, "--workers",
                          self.workers, "--steps", 1, "--phi", 0.1, "--max-side", side, "--no-resume")


# ---------------------------------------------------------------- tables

def cell(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def processes_rows(bench, counts):
    size, first = max(counts) * bench.args.batch, None
    for n in counts:
        step, step_mb = bench.step("train_match.py", size=size, ranks=n)
        maps, maps_mb = bench.maps(bench.args.images, ranks=n)
        rates = [size / step, 1 / maps]
        first = first or [rate / n for rate in rates]
        efficiency = [f"{100 * rate / n / one:.0f} %" for rate, one in zip(rates, first)]
        yield [n, cell(rates[0]), efficiency[0], cell(rates[1]), efficiency[1], cell(step_mb), cell(maps_mb)]


def growth_rows(bench):
    B, few, many = bench.args.batch, max(1, bench.args.images // 4), bench.args.images
    yield f"train_cls.py, a step on {B} images", bench.step("train_cls.py")
    for step, script in (("(a)", "train_match.py"), ("(b)", "train_prompt.py")):
        yield f"{step}, {B} images, a pair each", bench.step(script)
        yield f"{step}, {B} images, 3 pairs each", bench.step(script, pairs=3)
        yield f"{step}, {B} images, a pair each, 80 classes", bench.step(script, classes=80)
        yield f"{step}, {B} images, a pair each, crop 448", bench.step(script, crop=448)
    yield f"(c), {B} images, a pair each", bench.step("train_refine.py")
    for n in (few, many):
        yield f"S's maps, scales 1 and 1.2, flips, an image of {n}", bench.maps(n)
        yield f"CRF masks, an image of {n}", bench.image(n, "make_pseudo.py", "--workers", 0)
        yield f"scores, an image of {n}", bench.image(n, "eval.py", "--what", "cam")
        yield f"CLIP's maps and features, an image of {n}", bench.features(n)
    yield f"CLIP's maps and features at half the side, an image of {few}", bench.features(few, side=250)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--what", nargs="+", choices=["processes", "growth"], default=["processes", "growth"])
    p.add_argument("--processes", type=flags.positive, nargs="+", default=[1, 2])
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
    p.add_argument("--batch", type=flags.positive, default=2, help="images of a step, for each process")
    p.add_argument("--steps", type=flags.positive, default=2, help="steps timed, after a tenth as many")
    p.add_argument("--images", type=flags.positive, default=8,
                   help="images of a stage that goes over all; a quarter of them beside it")
    p.add_argument("--job", type=json.loads, help="one measurement, in this process (used by itself)")
    return p.parse_args()


def main():
    args = parse()
    if args.job:
        return job(args.job)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        if "processes" in args.what:
            head = ["processes, one thread each", "(a), images/s", "efficiency", "S's maps, images/s",
                    "efficiency", "MB a process, (a)", "maps"]
            found["processes"] = head, list(processes_rows(bench, args.processes))
        if "growth" in args.what:
            rows = [[title, cell(seconds), cell(mb)] for title, (seconds, mb) in growth_rows(bench)]
            found["growth"] = ["", "seconds", "MB"], rows
    facts = f"{args.batch} images a step, {args.images} in a folder, amp {args.amp}."
    for name, (head, rows) in found.items():
        tables.show(f"bench.scale {name}", args.write, markdown.table(head, rows), facts, args.device)


if __name__ == "__main__":
    main()
