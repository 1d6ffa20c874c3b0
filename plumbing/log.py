"""<stage>.jsonl: a first line of arguments and versions, then a line for each log step.

Resumed, the file reads as if the run had never been interrupted.
"""
import atexit
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
    """Appends rows to <stage>.jsonl; rank 0 writes.

    Resumed at `step`, it drops what was logged after the state that is resumed from. A line of the step at
    which Ctrl-C or SIGTERM saved the state stays; the next line's means start there."""

    def __init__(self, path, args, run, step=0, **facts):
        self.path, self.run, self.start, self.board = Path(path), run, time.time(), None
        if not run.main:
            return
        if args.tensorboard:
            self.board = open_board(self.path.parent / "tensorboard" / self.path.stem, step)
        kept = []
        if step and self.path.exists():
            kept = [row for row in read_log(self.path)[1] if row["step"] <= step]
        if kept:
            self.start -= kept[-1]["seconds"]
        head = {"args": flags.plain(args), "versions": versions(), "world": run.world, **facts}
        with files.atomic(self.path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in [head, *kept]))

    def __call__(self, step, **values):
        """Tensors are read here and nowhere else: this is the one place that waits for the device."""
        if not self.run.main:
            return
        row = {"step": step, "seconds": round(time.time() - self.start, 1)}
        for name, value in values.items():
            number = isinstance(value, (float, torch.Tensor))
            row[name] = float(f"{float(value):.6g}") if number else value
            if self.board and isinstance(row[name], (int, float)):
                self.board.add_scalar(name, row[name], step)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:                              # a write does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def open_board(folder, step):
    """TensorBoard's writer; what it holds of steps after `step`, from which a run goes on, is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard: TensorBoard is not installed: pip install tensorboard") from None
    board = SummaryWriter(folder, purge_step=step + 1)
    atexit.register(board.close)  # whatever ends the run, the last values are kept
    return board


class Meter:
    """Means of a step's numbers since the last log line, kept on the device: nothing in a step waits for
    them.

    The first number is the loss. If it was ever not finite, on any rank, `read` stops all of them and names
    the batch; no state was saved since."""

    def __init__(self, run):
        self.run, self.rows, self.batches = run, [], []

    def add(self, images, **values):
        """`images`: the numbers of the batch's images; values: means over the pairs of all ranks."""
        self.names = list(values)
        self.rows.append(torch.stack([value.detach().float() for value in values.values()]))
        self.batches.append(images)

    def read(self, ids):
        rows = torch.stack(self.rows)                         # (steps, values)
        bad = self.run.sum((~rows[:, 0].isfinite()).int()).nonzero().flatten().tolist()
        if bad:                                       # on all ranks: one alone would leave the others waiting
            self.refuse(rows[bad[0], 0].item(), [ids[i] for i in self.batches[bad[0]].tolist()[:8]])
        # Run.mean scales by world: the mean over all pairs
        means = self.run.sum(rows.mean(0)) / self.run.world
        self.rows, self.batches = [], []
        return dict(zip(self.names, means))

    def refuse(self, loss, batch):
        found = [(loss, batch)] * self.run.world
        if self.run.world > 1:
            dist.all_gather_object(found, found[0])
        loss, batch = next(each for each in found if not math.isfinite(each[0]))
        raise ValueError(f"the loss is {loss} on the batch {', '.join(batch)}, ...: look at these images and "
                         "their labels, lower --lr, or take --amp bf16 or off")


def read_log(path):
    """-> the first line, {"args", "versions", "world"}, and the rows; the torn last line of a killed run is
    left out."""
    path = Path(path)
    lines = files.regular(path, 1 << 28).read_text(errors="replace").splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    if not rows or not isinstance(rows[0], dict) or not isinstance(rows[0].get("args"), dict):
        raise ValueError(f"{path} does not begin with a line of arguments: remove it and run its stage again")
    numbered = [row for row in rows[1:] if isinstance(row, dict) and {"step", "seconds"} <= row.keys()]
    return rows[0], numbered


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "platform": platform.platform()}
    git = ["git", "-C", str(files.ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):                        # no git on this machine
        answer = subprocess.run(git, capture_output=True, text=True)
        found["commit"] = answer.stdout.strip() if answer.returncode == 0 else None
    return found
