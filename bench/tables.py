"""What the benchmarks share: the --write flag, time taken in turns, scripts run in this process, and tables.

A table is printed under the machine and versions that made it. With --write it also goes between its marks
in docs/benchmarks.md, <!-- bench.NAME --> and <!-- end -->.
"""
import argparse
import contextlib
import importlib
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plumbing import files, flags, markdown

PAGE = files.ROOT / "docs/benchmarks.md"


def parser(doc):
    p = argparse.ArgumentParser(flags.program(), description=doc, formatter_class=flags.Manual)
    p.add_argument("--write", action="store_true",
                   help="put the table between its marks in docs/benchmarks.md")
    return p


# ---------------------------------------------------------------- scripts in this process

def stage(script, *values):
    """Runs a script in this process; what it prints goes to stderr. `script`: x.py"""
    argv = [script, *map(str, values)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(script.removesuffix(".py")).main()


def arguments(module, *values):
    """The arguments of a script, as its own parse() reads them."""
    with mock.patch.object(sys, "argv", [module.__file__, *map(str, values)]):
        return module.parse()


# ---------------------------------------------------------------- measuring

def clock(device="cpu"):
    """The time in seconds, once the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function, device="cpu"):
    start = clock(device)
    function()
    return clock(device) - start


def take_turns(ways, runs, device="cpu"):
    """{name: function} -> {name: the seconds of each run}. The ways take turns: load on the machine meets all
    of them."""
    times = {name: [] for name in ways}
    for _ in range(runs):
        for name, function in ways.items():
            times[name].append(seconds(function, device))
    return times


def ratio(others, mine):
    """The median over the turns of how many times as long the other way takes."""
    return statistics.median(a / b for a, b in zip(others, mine))


def gflop(function):
    """Floating-point operations in 10^9. A multiplication and an addition are two; elementwise ones are not
    counted. Fused attention, inside of which torch does not count, is taken apart."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------- tables

def machine(device="cpu"):
    """The processor or GPU, and the versions that decide speed."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = re.findall(r"model name\s*: (.*)", read_if_there("/proc/cpuinfo")) or [platform.machine()]
        name = f"{models[0]}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, python {platform.python_version()}"


def read_if_there(path):
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def show(mark, write, table, facts, device="cpu"):
    """Prints a table under the machine and a line of facts; with `write` it goes into docs/benchmarks.md."""
    text = f"{machine(device)}. {facts}\n\n{table}"
    print(text, flush=True)
    if write:
        markdown.put(PAGE, mark, text)
