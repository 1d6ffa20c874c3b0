"""Several processes against one, starts that must end, and memory over epochs, on a few pictures of the toy world.

The first table has a row a stage and a column a number of processes: the largest difference to what one process makes of the same inputs, and what is
compared. Losses and the other numbers of the log, weights and scores are float32 sums in another order; maps are stored as float16; masks are equal.
Batches of 3 give some of four processes no picture, pictures without a class give others no pair; the split `few` holds two pictures, `bare` only such
without a class. A frozen DeiT's stochastic depth, which every process draws for itself, is left out. Exit 1 if a difference is above its bound.

--starts N     N short starts of 2 to 4 processes under torchrun, also of a finished stage and of one that a process refuses: how they end, how long they take
--memory N     resident memory, open files and children of a training run after each of N epochs, without and with loader processes

    python bench/processes.py
    python bench/processes.py --splits few --processes 1 4 --only seg
    python bench/processes.py --starts 50
    python bench/processes.py --memory 24
"""
import argparse
import importlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                            # before bench/, whose eval.py is not the stage
from plumbing import checkpoints, folders, foreign, guard, masks  # noqa: E402

fork = multiprocessing.get_context("fork")                                # ranks of one parent that has imported everything: no start costs 4 seconds

LIMITS = {"log": 1e-4, "weights": 1e-4, "maps": 2e-3, "masks": 0, "scores": 1e-5}
TRAIN = "--epochs 2 --batch-size 3 --log-every 1 --crop 64 --min-scale 0.5"
SMALL = f"{TRAIN} --lr 1e-3 --drop-path 0"
CLIMS = f"{TRAIN} --train-backbone --optimizer sgd --lr 0.01 --lambda-match 10 --lambda-b 2.4 --lambda-cbs 1 --lambda-reg 0.2 --tau-cbs 0.5"
SEG = "--batch-size 3 --iterations 4 --log-every 1 --crop 64"
NETWORK = "--scales 1 0.75 --batch-size 2"
# name -> what it reads of the stages before, and its command; CLIP and BACKBONE are files of the toy world
JOBS = {
    "cls": ("", f"train_cls.py --generator cnn_toy --backbone BACKBONE {SMALL}"),
    "cls_deit": ("", f"train_cls.py --generator deit_tiny --backbone none --pool avg {SMALL}"),
    "cls_clims": ("", f"train_cls.py --generator clims_toy --backbone BACKBONE {TRAIN} --optimizer sgd --lr 0.1"),
    "match": ("cls/cls.pt", f"train_match.py --clip CLIP {SMALL}"),
    "match_deit": ("cls_deit/cls.pt", f"train_match.py --clip CLIP {SMALL} --micro-batch 2"),
    "match_clims": ("cls_clims/cls.pt", f"train_match.py --clip CLIP {CLIMS}"),
    "prompt": ("match/match.pt", f"train_prompt.py --clip CLIP {TRAIN} --lr 0.01"),
    "prompt_views": ("match/match.pt", f"train_prompt.py --clip CLIP {TRAIN} --lr 0.01 --views 2"),
    "refine": ("match/match.pt prompt/prompts.pt", f"train_refine.py --clip CLIP {SMALL}"),
    "refine_alternate": ("match/match.pt prompt/prompts.pt", f"train_refine.py --clip CLIP {SMALL} --scheme alternate --rounds 2"),
    "refine_joint": ("cls/cls.pt", f"train_refine.py --clip CLIP {SMALL} --scheme joint"),
    "refine_clims": ("match_clims/match.pt prompt/prompts.pt", f"train_refine.py --clip CLIP {CLIMS}"),
    "vpl": ("", "vpl.py --clip CLIP --batch-size 2 --tau-t 0.0665 --tau-i 0.1995 --phi 0.5 --features value --max-pixels 600 --steps 20 --lr 1 --log-every 5"),
    "match_vision": ("cls/cls.pt vpl/prototypes.pt", f"train_match.py --clip CLIP {SMALL} --targets vision"),
    "refine_vision": ("match/match.pt vpl/prototypes.pt", f"train_refine.py --clip CLIP {SMALL} --targets vision"),
    "cam_cls": ("cls/cls.pt", "make_cam.py --source cls --batch-size 2 --sheets 2"),
    "cam_match": ("match_deit/match.pt", "make_cam.py --source match --batch-size 2 --stride 4 --format irn --sheets 0"),
    "cam_text": ("", "make_cam.py --source text --clip CLIP --batch-size 2 --tau-t 0.0665 --sheets 0 --cache"),
    "cam_vision": ("vpl/prototypes.pt", "make_cam.py --source vision --clip CLIP --batch-size 2 --sheets 0"),
    "segments": ("", "make_segments.py --source felzenszwalb --min-area 10"),
    "pseudo": ("cam_cls/cam", "make_pseudo.py --preset deeplab --threshold 0.4"),
    "pseudo_segments": ("cam_cls/cam segments/segments", "make_pseudo.py --segments OUT/segments"),
    "seg_deeplab": ("pseudo/pseudo", f"train_seg.py --model deeplab_toy --init BACKBONE {SEG} --lr 1e-4"),
    "seg_segmenter": ("pseudo/pseudo", f"train_seg.py --model segmenter_toy --init none {SEG} --lr 1e-2 --clamp-tile 12 --clamp-start 9"),
    "seg_mask2former": ("pseudo/pseudo", f"train_seg.py --model mask2former_toy --init none {SEG} --optimizer sgd --lr 10"),
    "seg_decoder": ("pseudo/pseudo vpl/prototypes.pt", f"train_seg.py --model clip_decoder --clip CLIP {SEG} --lr 0.05 --width 16"),
    "eval_cam": ("cam_cls/cam", "eval.py --what cam --oracle"),
    "eval_pseudo": ("pseudo/pseudo", "eval.py --what pseudo"),
    "eval_deeplab": ("seg_deeplab/seg.pt", f"eval.py --what seg --save {NETWORK}"),
    "eval_segmenter": ("seg_segmenter/seg.pt", f"eval.py --what seg --save --no-crf {NETWORK}"),
    "eval_mask2former": ("seg_mask2former/seg.pt", f"eval.py --what seg --save --no-crf {NETWORK}"),
    "eval_decoder": ("seg_decoder/seg.pt", f"eval.py --what seg --save --no-crf --clip CLIP {NETWORK}"),
    "report": ("eval_cam/eval_cam_train.json cam_cls/cam pseudo/pseudo", "report.py"),
}
OPTIONAL = {"segments": "skimage", "mask2former": "transformers"}         # a part of a job's name -> what it needs
BARE = ("cls", "cls_clims", "match", "match_clims", "prompt", "prompt_views", "refine", "cam_cls", "cam_text", "pseudo", "eval_pseudo", "seg_deeplab")          # what there is to do without any class
PARTS = {".jsonl": "log", ".pt": "weights", ".npy": "maps", ".npz": "masks", ".png": "masks", ".json": "scores", ".html": "masks"}


# ---------------------------------------------------------------- the world, and processes

def make_pictures(root, count):
    sys.argv = ["make_toy.py", "--out", str(root), "--train", str(count), "--val", "2"]
    importlib.import_module("make_toy").main()


def make_world(root):
    """Six pictures of the toy world and two lists of two: one of them of two sizes, two without a class, which `bare` holds."""
    make_pictures(root, 6)
    ids = folders.Folder(root).ids("train")
    for place, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        path = root / place / f"{ids[1]}.{suffix}"
        Image.open(path).crop((0, 0, 80, 64)).save(path)
    lines = (root / "labels.txt").read_text().splitlines()
    for n in (2, 5):
        lines[n] = lines[n].split()[0]
        masks.save_mask(root / "SegmentationClass" / f"{ids[n]}.png", 0 * masks.load_mask(root / "SegmentationClass" / f"{ids[n]}.png"))
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    for split, some in (("few", ids[:2]), ("bare", [ids[2], ids[5]])):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(some) + "\n")


def rank(number, processes, port, log, jobs):
    """The life of one process: its place among the others, then the jobs."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    dist.destroy_process_group = lambda: None                              # one group for all jobs
    for script, *flags in jobs:
        sys.argv = [script, *flags]
        print(f"== {processes} processes: {shlex.join(sys.argv)}", flush=True)
        guard.run(importlib.import_module(script.removesuffix(".py")).main)


def alone(function, *args):
    """Calls it in a process of its own: this one computes nothing, for it forks."""
    process = fork.Process(target=function, args=args)
    process.start(), process.join()


def together(jobs, processes, log, run=rank, more=(), limit=600):
    """Runs the jobs one after the other in some processes. -> True if all of them ended well"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork.Process(target=run, args=(n, processes, port, log, jobs, *more)) for n in range(processes)]
    [process.start() for process in ranks]
    end = time.time() + limit
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks) and time.time() < end:
        time.sleep(0.02)
    [process.kill() for process in ranks if process.is_alive()]
    [process.join() for process in ranks]
    return all(process.exitcode == 0 for process in ranks)


# ---------------------------------------------------------------- the same as one process?

def command(root, name, processes, split):
    """The job as words. It reads what one process made, and writes to a folder of its own."""
    needs, line = JOBS[name]
    out = root / split / str(processes) / name
    out.mkdir(parents=True)
    for need in needs.split():
        (out / Path(need).name).symlink_to(root / split / "1" / need.replace("_train.json", f"_{split}.json"))
    line = line.replace("CLIP", str(root / "world/clip.pt")).replace("BACKBONE", str(root / "world/backbone.pt")).replace("OUT", str(out))
    shared = ["--data", root / "world", "--out", out, "--split", split, "--device", "cpu", "--amp", "off", "--workers", "0"]
    script, *flags = shlex.split(line)
    return [script, *map(str, shared), *flags]


def files(folder):
    """{name: path} of what a job made; not what it was given, its recipes and its states to resume from."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.suffix in PARTS}
    return {name: path for name, path in found.items() if not any((folder / part).is_symlink() for part in (name, name.split("/")[0]))
            and path.name != "recipe.json" and ".last" not in name}


def numbers(value):
    """All numbers of a JSON or a checkpoint, in order. Those of another run's arguments, times and fingerprints are no results."""
    if isinstance(value, dict):
        return [x for key, part in value.items() if key not in ("args", "versions", "seconds", "world", "protocol", "maps", "segments", "inputs") for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    if torch.is_tensor(value):
        return value.double().flatten().tolist()
    return [float(value)] if isinstance(value, (int, float)) else []


def read(path):
    """What a file holds, as one array of numbers."""
    if path.suffix == ".jsonl":
        return np.array(numbers([json.loads(line) for line in path.read_text().splitlines()[1:]]))
    if path.suffix == ".pt":
        return np.array(numbers(torch.load(path, weights_only=True)))
    if path.suffix == ".npy":
        table = foreign.read_pickled(path)                                    # --format irn
        return (np.load(path) if table is None else np.asarray(table["high_res"])).astype(float)
    if path.suffix == ".npz":
        return np.concatenate([part.ravel().astype(float) for part in np.load(path).values()])
    if path.suffix == ".png":
        return np.array(Image.open(path)).astype(float)
    text = path.read_text()
    return np.frombuffer(text.replace(str(path.parent), "").encode(), np.uint8).astype(float) if path.suffix == ".html" else np.array(numbers(json.loads(text)))


def compare(one, several):
    """{what: largest difference} of two folders; infinite where a file or a number is missing, NaN is equal to NaN. Masks: how many values differ."""
    ours, theirs = files(one), files(several)
    found = {}
    for name in sorted(ours.keys() | theirs.keys()):
        part, difference = PARTS[Path(name).suffix], math.inf
        if name in ours and name in theirs:
            a, b = read(ours[name]), read(theirs[name])
            if a.shape == b.shape:
                apart = np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
                apart[np.isnan(apart)] = math.inf                          # NaN on one side
                difference = float((apart != 0).sum() if part == "masks" else (apart / np.maximum(1, np.abs(a))).max(initial=0))
        found[part] = max(found.get(part, 0), difference)
    return found


def agreement(root, args):
    """The table, split by split; says how many differences are above their bounds."""
    have = lambda name: all(importlib.util.find_spec(module) for part, module in OPTIONAL.items() if part in name)
    bad = 0
    for split in args.splits:
        names = [name for name in JOBS if have(name) and (split != "bare" or name in BARE)]
        wanted = [name for name in names if not args.only or any(name.startswith(only) for only in args.only)]
        names = names if args.only is None else [name for name in names if name in needed(wanted)]
        ended = {}
        for n in [1, *(n for n in args.processes if n > 1)]:
            log = root / f"{split}_{n}.log"
            start = time.time()
            ended[n] = together([command(root, name, n, split) for name in (names if n == 1 else wanted)], n, log)
            print(f"{split}, {n} processes: {time.time() - start:.0f} s", file=sys.stderr)
            if not ended[n]:
                print(log.read_text()[-3000:], file=sys.stderr)
                bad += 1
        print(f"\n| {split} | compared | " + " | ".join(f"{n} processes" for n in ended if n > 1) + " |\n|---|---|" + "---|" * (len(ended) - 1))
        for name in wanted:
            found = {n: compare(root / split / "1" / name, root / split / str(n) / name) for n in ended if n > 1}
            parts = sorted({part for difference in found.values() for part in difference}, key=list(LIMITS).index)
            bad += sum(difference > LIMITS[part] for differences in found.values() for part, difference in differences.items()) + (not parts)
            print(f"| {name} | {', '.join(parts)} | " + " | ".join(", ".join(f"{d[part]:.0g}" if part in d else "-" for part in parts) for d in found.values()) + " |")
    return bad


def needed(names):
    """These jobs and what they read."""
    before = {need.split("/")[0] for name in names for need in JOBS[name][0].split()}
    return set(names) | (needed(before) if before else set())


# ---------------------------------------------------------------- starts

STARTS = {  # kind -> command, and what the error must say where one is due; each ends after seconds whatever its processes wait for
    "train": ("train_match.py --clip CLIP --split few --epochs 1 --batch-size 2 --crop 32", None),
    "loaders": ("train_match.py --clip CLIP --split few --epochs 1 --batch-size 2 --crop 32 --workers 1", None),
    "pool": ("make_pseudo.py --split few --workers 1", None),
    "scores": ("eval.py --split few --what cam", None),
    "finished": ("train_cls.py --split few --generator cnn_toy --backbone BACKBONE --epochs 1", "is finished"),
    "one refuses": ("eval.py --split train --limit 3 --what cam", "is missing: run make_cam.py first"),        # the others wait for its share of the third map
    "all refuse": ("make_cam.py --split few --source vision --clip none.pt", "none.pt: no such file"),
}


def stopwatch(words, processes, limit=60):
    """A start under torchrun -> (seconds, exit status or None if it had to be killed, its output, the processes it left)"""
    mark, start = f"START={time.time_ns()}", time.time()
    head = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **dict([mark.split("=")])}
    started = subprocess.Popen([*head, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, status = started.communicate(timeout=limit)[0], started.returncode
    except subprocess.TimeoutExpired:
        [os.kill(pid, signal.SIGKILL) for pid in marked(mark)]
        output, status = started.communicate()[0], None
    return time.time() - start, status, output, marked(mark)


def marked(mark):
    """The processes that have this in their environment: those of one start, wherever they hang."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in read_environment(path)]


def read_environment(path):
    try:
        return path.read_bytes().split(b"\0")
    except OSError:                                                       # gone, or another user's
        return []


def starts(root, args):
    """The table of --starts; says how many ended otherwise than they should."""
    base = {name: command(root, name, 1, "few") for name in ("cls", "cam_cls")}
    together(base.values(), 1, root / "base.log")
    found, several = {}, [n for n in args.processes if n > 1]
    for n in range(args.starts):
        kind, processes = list(STARTS)[n % len(STARTS)], several[n // len(STARTS) % len(several)]
        line, says = STARTS[kind]
        out = root / f"start_{n}"
        out.mkdir()
        for need in ("cls/cls.pt", "cam_cls/cam"):
            (out / Path(need).name).symlink_to(root / "few/1" / need)
        words = base["cls"] if kind == "finished" else shlex.split(line.replace("CLIP", str(root / "world/clip.pt"))) + [
            "--data", str(root / "world"), "--out", str(out), "--device", "cpu", "--amp", "off", *([] if "--workers" in line else ["--workers", "0"])]
        seconds, status, output, left = stopwatch(words, processes)
        well = (status == 0) == (not says or kind == "finished") and status is not None and (says or "") in output and not left
        found.setdefault(kind, []).append((seconds, status is None, well))
        print(f"start {n + 1}, {kind}, {processes} processes: exit {status}, {seconds:.1f} s, left {len(left)}{'' if well else output[-2000:]}", file=sys.stderr)
    print("| start | starts | ended as they should | did not end | median s | longest s |\n|---|---|---|---|---|---|")
    for kind, rows in found.items():
        seconds, hung, well = zip(*rows)
        print(f"| {kind} | {len(rows)} | {sum(well)} | {sum(hung)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return sum(not well for rows in found.values() for *_, well in rows)


# ---------------------------------------------------------------- memory

MEMORY = {  # on 48 pictures in batches of 8: an epoch is 6 steps, and ends with a state saved
    "match": ("cls/cls.pt", "train_match.py --clip CLIP --batch-size 8 --crop 64 --lr 1e-3 --epochs EPOCHS"),
    "prompt": ("match/match.pt", "train_prompt.py --clip CLIP --batch-size 8 --crop 64 --epochs EPOCHS --views 3"),
    "seg": ("", "train_seg.py --model deeplab_toy --init BACKBONE --label-dir MASKS --batch-size 8 --crop 65 --lr 1e-4 --iterations STEPS --save-every 6"),
    "seg_segmenter": ("", "train_seg.py --model segmenter_toy --init none --label-dir MASKS --batch-size 8 --crop 64 --iterations STEPS --save-every 6"),
}
GROWTH = 8                                                                # MB in the second half of the epochs; before that, larger batches than before still come


def usage():
    """This process and its children: MB of resident memory, open files, how many children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ["self", *children])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir("/proc/self/fd")), len(children)


def watched(number, processes, port, log, jobs, path):
    """As `rank`; writes `usage` down whenever a state is saved."""
    rows, save_state = [], checkpoints.save_state

    def save_and_look(*args):
        save_state(*args)
        rows.append(usage())

    checkpoints.save_state = save_and_look
    rank(number, processes, port, log, jobs)
    if number == 0:
        path.write_text(json.dumps(rows))


def memory(root, args):
    """The table of --memory; says how many runs grow by more than GROWTH, or gather files or children."""
    world, epochs, bad = root / "larger", args.memory, 0
    alone(make_pictures, world, 48)
    together([command(root, name, 1, "train") for name in ("cls", "match")], 1, root / "base.log")
    print("| stage | processes | loader processes | MB after epoch 2 | " + f"{epochs // 2} | {epochs} | second half | open files | children |\n|---|---|---|---|---|---|---|---|---|")
    for name, (need, line) in MEMORY.items():
        for processes, workers in ((1, 0), (1, 2), (2, 0)):
            out = root / f"{name}_{processes}_{workers}"
            out.mkdir()
            if need:
                (out / Path(need).name).symlink_to(root / "train/1" / need)
            for word, value in (("CLIP", world / "clip.pt"), ("BACKBONE", world / "backbone.pt"), ("MASKS", world / "SegmentationClass"), ("EPOCHS", epochs), ("STEPS", 6 * epochs)):
                line = line.replace(word, str(value))
            job = [*shlex.split(line), "--data", str(world), "--out", str(out), "--split", "train", "--device", "cpu", "--amp", "off", "--workers", str(workers)]
            if not together([job], processes, root / "memory.log", run=watched, more=(out / "usage.json",)):
                sys.exit((root / "memory.log").read_text()[-3000:])
            rows = json.loads((out / "usage.json").read_text())
            (first, files, children), (half, *_), (last, *now) = rows[1], rows[epochs // 2 - 1], rows[-1]
            bad += last - half > GROWTH or [files, children] != now
            print(f"| {name} | {processes} | {workers} | {first:.0f} | {half:.0f} | {last:.0f} | {last - half:+.1f} | {files} -> {now[0]} | {children} -> {now[1]} |", flush=True)
    return bad


# ---------------------------------------------------------------- the command

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    p.add_argument("--splits", nargs="+", choices=["train", "few", "bare"], default=["train", "few", "bare"])
    p.add_argument("--only", nargs="+", help="only stages whose row begins so, and in one process what they read")
    p.add_argument("--starts", type=int, help="how many")
    p.add_argument("--memory", type=int, help="how many epochs, more than two")
    p.add_argument("--keep", type=Path, help="folder for what the stages make, to look at; else it is removed")
    return p.parse_args()


def main():
    args = parse()
    root = args.keep or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    for script in {line.split()[0] for _, line in JOBS.values()} | {"make_toy.py"}:
        importlib.import_module(script.removesuffix(".py"))
    alone(make_world, root / "world")
    try:
        sys.exit(1 if (starts if args.starts else memory if args.memory else agreement)(root, args) else 0)
    finally:
        if not args.keep:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
