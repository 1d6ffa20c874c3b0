"""What a kill costs: the stages of run_toy.sh, killed at random moments and started again, against the same
stages left alone.

Every stage runs undisturbed in <out>/whole. In <out>/killed SIGKILL, SIGTERM and Ctrl-C meet it in turn, at
moments drawn uniformly from the time it took, until it has had its share of --kills. Images are few, but
trainers have many steps and save a state at every fifth; most stages have a loader's or a pool's process.
Counted, and 0 where the promises hold:

    redone       finished files that a restart wrote again; steps run again though a state held them
    loud         ends with another exit status than 143 (SIGTERM), 130 (Ctrl-C) or 0, or with a traceback
    left         processes alive 10 seconds after the one that was killed
    differences  files that are not those of the undisturbed run, bit for bit; times in logs left aside

    python -m tests.rigs.faults --kills 100
"""
import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from tests.rigs import launch

SAVE = 5
STEPS = f"--log-every 1 --save-every {SAVE} --batch-size 4"
MORE = {"train_cls.py": f"{STEPS} --epochs 20", "train_match.py": f"{STEPS} --epochs 10",
        "train_prompt.py": f"{STEPS} --epochs 30", "train_refine.py": f"{STEPS} --epochs 10",
        "train_seg.py": f"{STEPS} --iterations 40", "vpl.py": f"{STEPS} --steps 400"}
SIGNALS = {"SIGKILL": (signal.SIGKILL, -9), "SIGTERM": (signal.SIGTERM, 143), "Ctrl-C": (signal.SIGINT, 130)}
COUNTS = ("redone", "loud", "left", "differences")


def stages(out):
    """The lines of run_toy.sh, with paths relative to the folder of a run. A python that does nothing makes
    the shell believe that all of them end well: it keeps them in commands.txt."""
    stub, record = out / "bin/python3", out / "record"
    shutil.rmtree(record, ignore_errors=True)
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    (record / "data").mkdir(parents=True)
    env = {**os.environ, "LOOK": "1", "DATA": f"{record}/data", "OUT": f"{record}/out",
           "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(launch.ROOT / "run_toy.sh")], env=env, check=True, capture_output=True)
    found = []
    lines = (record / "out/commands.txt").read_text().replace(f"{record}/", "").splitlines()
    for n, line in enumerate(lines):
        script, *flags = shlex.split(line)
        if script == "-m":
            script, *flags = flags
        flags += MORE.get(script, "").split()
        if "--workers" in flags and script != "report.py":
            flags += ["--workers", "1" if n % 3 else "0"]
        found.append([script, *flags])
    return found


def start(line, folder):
    """-> the process of a stage, and the file of its output, once it is in its main function."""
    output = folder.parent / "output.txt"
    output.unlink(missing_ok=True)
    process = launch.start([line], output, {"GIT_DIR": os.devnull}, folder)   # logs would name a commit
    while process.is_alive() and not (output.exists() and "== 1 processes" in output.read_text()):
        time.sleep(0.005)
    return process, output


def alive(session):
    """Is a process of that session left?"""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:                                                     # it has just ended
            continue
        if int(of) == session and state != "Z":
            return True
    return False


def files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def finished(folder):
    """Path -> what is different once it was written again. Sheets and summaries are made at every start."""
    kinds = ".npy", ".npz", ".png", ".jpg", ".pt"
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files(folder).items()
            if path.suffix in kinds and not name.endswith(".last.pt") and "sheets" not in path.parts}


def logged(folder):
    """Path -> its lines of steps, without a torn last one."""
    return {name: [line for line in path.read_text().splitlines()[1:] if line.endswith("}")]
            for name, path in files(folder).items() if path.suffix == ".jsonl"}


def redone(before, after, lines_before, lines_after, saved):
    """How many finished files are others now, and how many steps were run again. Those since the last state,
    SAVE at most, are no fault."""
    count = sum(after.get(name) != facts for name, facts in before.items())
    for name, lines in lines_before.items():
        kept = sum(a == b for a, b in zip(lines, lines_after[name]))
        count += max(0, len(lines) - kept - (0 if saved else SAVE))
    return count


def content(path):
    """The leaves of a checkpoint and its structure, or bytes without the times in logs and the report."""
    if path.suffix != ".pt":
        return re.sub(rb'"seconds": [\d.]+|[\d.]+ min', b"", path.read_bytes())
    leaves, structure = pytree.tree_flatten(torch.load(path, weights_only=True))
    return structure, [(x.dtype, x.shape, x.tolist()) if torch.is_tensor(x) else x for x in leaves]


def differences(whole, killed):
    """Names of the files that differ or are in one folder alone."""
    a, b = files(whole), files(killed)
    return [name for name in sorted({*a, *b})
            if name not in a or name not in b or content(a[name]) != content(b[name])]


# ---------------------------------------------------------------- a stage under fire

def torment(line, folder, kills, draw, row):
    """Kills a stage `kills` times and lets it end. Adds what happened to `row`."""
    saved, lines, sessions, ended, window = False, logged(folder), [], False, row["seconds"]
    while not ended or (kills > sum(row[name] for name in SIGNALS) and row["starts"] <= 10 * kills):
        landed = sum(row[name] for name in SIGNALS)
        name = list(SIGNALS)[(row["first"] + landed) % len(SIGNALS)]
        before, moment = finished(folder), draw.uniform(0, window) if landed < kills else None
        process, output = start(line, folder)
        process.join(moment)
        struck, ended = time.time(), process.exitcode is not None
        window = window / 2 if ended else row["seconds"]      # what is nearly finished ends sooner than that
        if not ended:
            with contextlib.suppress(ProcessLookupError):                   # it has just ended
                (os.killpg if name == "Ctrl-C" else os.kill)(process.pid, SIGNALS[name][0])
            process.join(60)
            row[name] += 1
        sessions.append((process.pid, struck))
        row["starts"] += 1
        text, now = output.read_text(), logged(folder)
        traced = "Traceback" in text and (ended or name != "SIGKILL")       # of loaders left without parent
        if traced or process.exitcode not in ((0,) if ended else (0, SIGNALS[name][1])):
            row["loud"] += 1
            print(f"{name} after {moment} s, exit {process.exitcode}: {shlex.join(line)}\n{text}", flush=True)
        row["redone"] += redone(before, finished(folder), lines, now, saved)
        saved, lines = " is saved in " in text, now
    for session, struck in sessions:
        while alive(session) and time.time() < struck + 10:
            time.sleep(0.02)
        row["left"] += alive(session)


def attack(lines, out, kills, scripts=None):
    """All stages in both folders -> a row each; `kills` are shared among those of `scripts`."""
    for name in ("whole", "killed"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    rows, mine = [], [n for n, line in enumerate(lines) if not scripts or line[0] in scripts]
    for n, line in enumerate(lines[:max(mine) + 1]):
        share = kills // len(mine) + (mine.index(n) < kills % len(mine)) if n in mine else 0
        row = {"script": line[0], "kills": share, "first": sum(row["kills"] for row in rows), "starts": 0,
               **dict.fromkeys([*SIGNALS, *COUNTS], 0)}
        process, output = start(line, out / "whole")
        begun = time.time()
        process.join()
        assert process.exitcode == 0, output.read_text()
        row["seconds"] = time.time() - begun
        torment(line, out / "killed", share, random.Random(n), row)
        wrong = differences(out / "whole", out / "killed")
        row["differences"] = len(wrong)
        rows.append(row)
        print(n, *(f"{name} {value}" for name, value in row.items()), *wrong, flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=launch.ROOT / "runs/faults")
    p.add_argument("--kills", type=int, default=100, help="over all stages together")
    args = p.parse_args()
    out = args.out.resolve()
    rows = attack(stages(out), out, args.kills)
    print({name: sum(row[name] for row in rows) for name in ("kills", "starts", *SIGNALS, *COUNTS)})
    sys.exit(any(row[name] for row in rows for name in COUNTS))


if __name__ == "__main__":
    main()
