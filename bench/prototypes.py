"""The speed of VPL's descent: seconds of a step against its size, on random features.

    python bench/prototypes.py --write
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from maps import alternate  # noqa: E402

from ablations.pairs import write  # noqa: E402
from wsss import losses  # noqa: E402


def speed_table(device="cpu", sizes=(25_000, 50_000, 100_000, 200_000, 400_000), D=512, C=45, runs=3):
    """Markdown: a step of vpl.py's descent, n pixels of D channels as it holds them, C columns (VOC: 20 classes, 25 backgrounds);
    then n = 50,000 with twice the channels and with twice the columns."""
    rows = [(n, D, C) for n in sizes] + [(50_000, 2 * D, C), (50_000, D, 2 * C)]
    lines = ["| pixels n | channels D | columns C | s a step | ns a step and n D C |", "|---|---|---|---|---|"]
    for n, D, C in rows:
        x, w, p = (torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=1) for shape in ((n, D), (C, D), (n, C)))
        x, p = x.half(), p.softmax(1)
        step = lambda: losses.prototype_step(w.double(), losses.prototype_gradient(x, w.double(), p, 0.03)[0] / n, 10.0, torch.inf)
        step()
        seconds = statistics.median(alternate({"step": step}, runs, device)["step"])
        lines.append(f"| {n:,} | {D} | {C} | {seconds:.4f} | {1e9 * seconds / (n * D * C):.3f} |")
    return "\n".join(lines)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--speed", action="store_true", help="what it does anyway")
    p.add_argument("--device", default="cpu")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    return p.parse_args()


def main():
    args = parse()
    text = speed_table(args.device)
    print(text)
    if args.write:
        write("bench/prototypes.py speed", text)


if __name__ == "__main__":
    main()
