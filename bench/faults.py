"""What a kill costs: the stages of run_toy.sh, killed at random moments and started again, against the same stages left alone.

Every stage runs undisturbed in <out>/whole, then in <out>/killed, where SIGKILL, SIGTERM and Ctrl-C (in turn) meet it at a moment drawn uniformly from
the time that it took, until it has had its share of --kills; what was killed is started again. A stage that ended before its moment came is asked
again, and may be killed then. Most starts are forks of a process that has loaded torch, so that kills meet the work; every sixth is a
fresh python. Pictures are few, as under LOOK=1, but trainers have many steps and save their state at every fifth; every other stage has a loader's or pool's process.

Counted, and 0 where the promises hold:
    redone       finished maps, masks, segments, features and weights that a restart touched; steps of a trainer repeated from before its last state
    loud         ends with another exit status than 143 (SIGTERM), 130 (Ctrl-C) or 0, or with a traceback
    left         processes alive 10 seconds after the one that was killed
    differences  files that are not those of the undisturbed run: checkpoints tensor by tensor, logs line by line but for their seconds, the rest (but for the report's minutes) byte by byte

    python bench/faults.py --kills 100 --write
    python bench/faults.py --kills 12 --stages train_cls.py make_cam.py --out runs/faults_few

--seconds ends a call after that time; the same command goes on.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

BEGUN = time.time()
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from ablations.pairs import write  # noqa: E402

import wsss  # noqa: E402
from plumbing import files as plain_files, guard, log  # noqa: E402

SAVE = 5
STEPS = f"--batch-size 4 --log-every 1 --save-every {SAVE}"
MORE = {"train_cls.py": f"{STEPS} --epochs 20", "train_match.py": f"{STEPS} --epochs 8", "train_prompt.py": f"{STEPS} --epochs 30",
        "train_refine.py": f"{STEPS} --epochs 8", "train_seg.py": f"{STEPS} --iterations 40", "vpl.py": f"--log-every 1 --save-every {SAVE} --steps 400"}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
ENDS = {"SIGKILL": (-9, 0), "SIGTERM": (143, 0), "Ctrl-C": (130, 0)}            # 0: it ended in that moment
COUNTS = ("redone", "loud", "left", "differences")
FRESH, YOUNG = 6, 0.5                     # every FRESHth start is a new python; before YOUNG seconds it is not ours yet, and ends in its own way


def stages(out):
    """The lines of run_toy.sh as it would run them, with paths relative to the folder of a run: its python is one that writes them down."""
    record, bin = out / "record", out / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    recorder = f'#!/bin/bash\ncase "$1" in *.py) printf "%q " "$@" >> {shlex.quote(str(out))}/lines; echo >> {shlex.quote(str(out))}/lines;; *) exec {sys.executable} "$@";; esac\n'
    (bin / "python3").write_text(recorder)
    (bin / "python3").chmod(0o755)
    (out / "lines").unlink(missing_ok=True)
    env = {**os.environ, "LOOK": "1", "DATA": f"{record}/data", "OUT": f"{record}/out", "PATH": f"{bin}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(ROOT / "run_toy.sh"), "--no-resume"], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [shlex.split(line.replace(f"{record}/", "")) for line in (out / "lines").read_text().splitlines()]
    found = []
    for n, (script, *flags) in enumerate(lines):
        flags = [flag for flag in flags if flag != "--no-resume"] + MORE.get(script, "").split()
        found.append([script, *flags, *(["--workers", str(n % 2)] if "--workers" in flags and script != "report.py" else [])])
    return found


# ---------------------------------------------------------------- one start

def begin(line, folder, fresh):
    """The process of a stage: here, or, if `fresh`, a python of its own."""
    signal.signal(signal.SIGINT, wsss.leave), signal.signal(signal.SIGTERM, wsss.leave)        # as in a script of its own, until guard.run
    os.chdir(folder)
    output = os.open(folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.setsid()                                                             # as on a terminal: Ctrl-C is for all of its processes
    script, *flags = line
    if fresh:
        os.execv(sys.executable, [sys.executable, "-W", "ignore", str(ROOT / script), *flags])
    sys.argv = [str(ROOT / script), *flags]
    guard.run(importlib.import_module(script.removesuffix(".py")).main)


def start(line, folder, fresh=False):
    process = multiprocessing.get_context("fork").Process(target=begin, args=(line, folder, fresh))
    process.start()
    return process


def alive(session):
    """Whether a process of that session is left."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:                                                     # it has just ended
            continue
        if int(of) == session and state != "Z":
            return True
    return False


def strike(process, name):
    while process.is_alive() and os.getpgid(process.pid) != process.pid:    # it has just been forked
        time.sleep(0.001)
    if process.is_alive():
        (os.killpg if name == "Ctrl-C" else os.kill)(process.pid, SIGNALS[name])


def undisturbed(line, folder):
    """Runs a stage to its end -> the seconds it took."""
    begun = time.time()
    process = start(line, folder)
    process.join()
    if process.exitcode:
        sys.exit(f"{shlex.join(line)} in {folder} ended with {process.exitcode}:\n{(folder.parent / 'output.txt').read_text()}")
    return time.time() - begun


# ---------------------------------------------------------------- what must not change

def files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def finished(folder):
    """Path -> what is different once it has been written again. Contact sheets and summaries are made anew at every start."""
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files(folder).items()
            if path.suffix in (".npy", ".npz", ".png", ".jpg", ".pt") and not path.name.endswith(".last.pt") and "sheets" not in path.parts}


def logs(folder):
    """Path -> the lines of steps, whole ones."""
    return {name: [line for line in path.read_text().splitlines()[1:] if log.whole(line)] for name, path in files(folder).items() if path.suffix == ".jsonl"}


def redone(before, after, lines_before, lines_after, saved):
    """How many finished files are others now, and steps that were run again though a state held them: those since the last state, SAVE at most, are no fault."""
    count = sum(after.get(name) != facts for name, facts in before.items())
    for name, lines in lines_before.items():
        kept = sum(a == b for a, b in zip(lines, lines_after[name]))
        count += max(0, len(lines) - kept - (0 if saved else SAVE))
    return count


def equal(a, b):
    """Of two loaded checkpoints: bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def content(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".jsonl":
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
    if path.suffix == ".html":                                              # the minutes of the logs
        return re.sub(r"[\d.]+ min", "", path.read_text())
    return path.read_bytes()


def differences(whole, killed, known):
    """Names of the files that differ or are in one folder alone, `known` and unchanged ones passed over."""
    a, b, found = files(whole), files(killed), []
    for name in sorted({*a, *b}):
        facts = [path.stat().st_mtime_ns for path in (a.get(name), b.get(name)) if path]
        if known.get(name) == facts:
            continue
        known[name] = facts
        if name not in a or name not in b or not equal(content(a[name]), content(b[name])):
            found.append(name)
    return found


# ---------------------------------------------------------------- a stage under fire

def torment(line, folder, kills, duration, loading, draw, row):
    """Kills a stage `kills` times and lets it end. Adds what happened to `row`."""
    saved, lines, sessions = False, logs(folder), []
    for n in range(10 * kills + 1):
        landed = sum(row[name] for name in SIGNALS)
        name = list(SIGNALS)[(row["first"] + landed) % len(SIGNALS)]
        fresh = row["starts"] % FRESH == FRESH - 1
        before = finished(folder)
        begun, moment = time.time(), draw.uniform(0, duration + loading * fresh) if landed < kills else None
        process = start(line, folder, fresh)
        process.join(moment)
        ended = process.exitcode is not None
        struck = time.time()
        strike(process, name)
        process.join(60)
        sessions.append((process.pid, struck))
        text = (folder.parent / "output.txt").read_text()
        row["starts"] += 1
        if ended:
            duration = struck - begun - loading * fresh if landed < kills else duration
            duration = max(duration, 0.05)
            loud = process.exitcode != 0
        else:
            row[name] += 1
            row["slowest"] = max(row["slowest"], time.time() - struck)
            loud = process.exitcode not in ENDS[name] and not (fresh and moment < YOUNG)
        if loud or "Traceback" in text and not (fresh and moment is not None and moment < YOUNG):
            row["loud"] += 1
            print(f"{name} after {moment} s, exit {process.exitcode}: {shlex.join(line)}\n{text}", flush=True)
        now = logs(folder)
        again = redone(before, finished(folder), lines, now, saved)
        if again:
            print(f"{again} redone: {shlex.join(line)}", flush=True)
        row["redone"] += again
        saved, lines = " is saved in " in text, now
        if ended and moment is None:
            break
    else:
        sys.exit(f"{shlex.join(line)} has ended before each of its kills: is it that quick?")
    for session, struck in sessions:
        while alive(session) and time.time() < struck + 10:
            time.sleep(0.02)
        row["left"] += alive(session)


def attack(number, line, kills, args, done):
    """One stage in both folders -> its row."""
    whole, killed = args.out / "whole", args.out / "killed"
    row = {"script": line[0], "kills": kills, "starts": 0, "slowest": 0.0, "first": sum(r["kills"] for r in done.values()), **dict.fromkeys([*SIGNALS, *COUNTS], 0)}
    row["seconds"] = undisturbed(line, whole)
    if kills:
        torment(line, killed, kills, row["seconds"], args.loading, random.Random(f"{args.seed} {number}"), row)
    else:
        undisturbed(line, killed)
    wrong = differences(whole, killed, args.known)
    row["differences"] = len(wrong)
    print(f"{number:2d} {line[0]}: {kills} kills, {row['starts']} starts, " + ", ".join(f"{row[name]} {name}" for name in COUNTS), *wrong, flush=True)
    return row


def table(rows):
    """Markdown, a line a script."""
    names = [*SIGNALS, *COUNTS]
    lines = [f"| stage | runs | seconds | kills | {' | '.join(SIGNALS)} | starts | slowest end | {' | '.join(COUNTS)} |", "|---" * (7 + len(names)) + "|"]
    scripts = list(dict.fromkeys(row["script"] for row in rows if row["kills"]))
    for title, of in [*((script, [row for row in rows if row["script"] == script]) for script in scripts), ("all", rows)]:
        total = {name: sum(row[name] for row in of) for name in ("kills", "starts", "seconds", *names)}
        lines.append(f"| {title} | {len(of)} | {total['seconds']:.0f} | {total['kills']} | {' | '.join(str(total[name]) for name in SIGNALS)} | {total['starts']} | "
                     f"{max(row['slowest'] for row in of):.1f} s | {' | '.join(str(total[name]) for name in COUNTS)} |")
    return "\n".join(lines)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "runs/faults")
    p.add_argument("--kills", type=int, default=100, help="over all stages together")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--stages", nargs="+", help="kill only these scripts; what is needed before them runs undisturbed, the rest not at all")
    p.add_argument("--seconds", type=float, default=float("inf"), help="begin no further stage after this time")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    return p.parse_args()


def main():
    args = parse()
    torch.set_num_threads(1)
    os.environ["GIT_DIR"] = os.devnull                                      # logs name the commit, which may change while this runs
    args.out, args.known = args.out.resolve(), {}
    for name in ("whole", "killed"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    path = args.out / "faults.json"
    lines = stages(args.out)
    mine = [n for n, line in enumerate(lines) if not args.stages or line[0] in args.stages]
    lines = lines[:max(mine) + 1]
    shares = {n: args.kills // len(mine) + (i < args.kills % len(mine)) for i, n in enumerate(mine)}
    done = {int(n): row for n, row in json.loads(path.read_text()).items()} if path.exists() else {}
    for script in {line[0] for line in lines}:
        importlib.import_module(script.removesuffix(".py"))                 # what forks then have
    args.loading = time.time() - BEGUN                                      # so long takes a python of its own
    for n, line in enumerate(lines):
        if n in done:
            continue
        if time.time() - BEGUN > args.seconds:
            sys.exit(f"{len(done)} of {len(lines)} stages are done: the same command goes on")
        done[n] = attack(n, line, shares.get(n, 0), args, done)
        plain_files.save_json(path, done)
    text = table([done[n] for n in sorted(done)])
    print(text)
    if args.write:
        write("bench/faults.py", text)
    sys.exit(any(row[name] for row in done.values() for name in COUNTS))


if __name__ == "__main__":
    main()
