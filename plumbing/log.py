"""<stage>.jsonl: arguments and versions, then one line for each log step."""
import contextlib
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing import files, flags



class Log:
    """<stage>.jsonl: first line arguments and versions, then one line for each log step. Rank 0 writes.

    Resumed at `step`, it drops what was logged after the state that is resumed from: the file reads as if never interrupted, but for a line of the
    step at which Ctrl-C or SIGTERM saved the state; the next line's means start there."""

    def __init__(self, path, args, env, step=0):
        self.path, self.env, self.start = Path(path), env, time.time()
        if not env.main:
            return
        lines = log_lines(self.path) if step and self.path.exists() else []
        kept = [line for line in lines[1:] if whole(line) and json.loads(line)["step"] <= step]
        self.start -= json.loads(kept[-1])["seconds"] if kept else 0
        with files.atomic(self.path) as beside:
            beside.write_text("\n".join([json.dumps({"args": flags.plain(args), "versions": versions(), "world": env.world}), *kept]) + "\n")

    def __call__(self, step, **values):
        """Tensors are read here and nowhere else: this is the one place that waits for the device."""
        if self.env.main:
            row = {k: float(f"{float(v):.6g}") if isinstance(v, (float, torch.Tensor)) else v for k, v in values.items()}
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step, "seconds": round(time.time() - self.start, 1), **row}) + "\n")
            except OSError as error:                          # a write does not say which file
                raise OSError(error.errno, error.strerror, str(self.path)) from error


class Meter:
    """Means of a step's numbers since the last log line, kept on the device: nothing in a step waits for them.

    The first number is the loss. If it was ever not finite, on any rank, `read` stops all of them and names the batch; no state was saved since."""

    def __init__(self, env):
        self.env, self.rows, self.batches = env, [], []

    def add(self, pictures, **values):
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float() for v in values.values()]))
        self.batches.append(pictures)

    def read(self, ids):
        rows = torch.stack(self.rows)                         # (steps, values)
        bad = self.env.sum((~rows[:, 0].isfinite()).int()).nonzero().flatten().tolist()      # steps: ranks that go on alone would wait for the others
        if bad:
            found = [(rows[bad[0], 0].item(), [ids[i] for i in self.batches[bad[0]].tolist()[:8]])] * self.env.world
            if self.env.world > 1:
                dist.all_gather_object(found, found[0])
            value, batch = next(seen for seen in found if not math.isfinite(seen[0]))
            raise ValueError(f"the loss is {value} on the batch {', '.join(batch)}, ...: look at these pictures and their labels, "
                             "lower --lr, or take --amp bf16 or off; the last saved state is from before")
        means = self.env.sum(rows.mean(0)) / self.env.world   # common.mean scales by world, so this is the mean over all pairs
        self.rows, self.batches = [], []
        return dict(zip(self.names, means))


def log_lines(path):
    if not path.is_file() or path.stat().st_size > 1 << 26:
        raise ValueError(f"{path} is no log, but a pipe, a folder or a large file: remove it")
    return path.read_text(errors="replace").splitlines()


def whole(line):
    """False for the torn last line of a killed run."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in ("step", "seconds")) and all(not isinstance(v, int) or abs(v) < 1 << 62 for v in row.values())


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "platform": platform.platform()}
    git = ["git", "-C", str(files.ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):                        # no git on this machine
        answer = subprocess.run(git, capture_output=True, text=True)
        found["commit"] = answer.stdout.strip() if answer.returncode == 0 else None
    return found
