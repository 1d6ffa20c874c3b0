"""Time of a step of VPL's projected gradient descent against its size, on random features.

n pixels of D channels in half precision, as vpl.py holds them, and M columns (VOC: 20 classes, 25
backgrounds). If time is linear, the last column is constant.

    python -m bench.prototypes
    python -m bench.prototypes --device cuda --pixels 400000 4000000
"""
import statistics

import torch
import torch.nn.functional as F

from bench import tables
from plumbing import flags, markdown
from wsss import losses


def step_of(n, D, M, device):
    """-> a step of vpl.py's descent, as a function without arguments."""
    x = F.normalize(torch.randn(n, D, device=device), dim=1).half()
    w = F.normalize(torch.randn(M, D, device=device), dim=1).double()
    p_text = torch.randn(n, M, device=device).softmax(1)

    def step():
        gradient, _ = losses.prototype_gradient(x, w, p_text, 0.03)
        return losses.prototype_step(w, gradient / n, 10.0, torch.inf)

    return step


def make_table(sizes, runs, device):
    rows = []
    for n, D, M in sizes:
        step = step_of(n, D, M, device)
        step()
        times = [tables.seconds(step, device) for _ in range(runs)]
        took = statistics.median(times)
        rows.append([f"{n:,}", D, M, f"{took:.4f}", f"{1e9 * took / (n * D * M):.3f}"])
    return markdown.table(["pixels n", "channels D", "columns M", "s a step", "ns a step and n D M"], rows)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--device", default="cpu")
    p.add_argument("--pixels", type=flags.positive, nargs="+",
                   default=[25_000, 50_000, 100_000, 200_000, 400_000])
    p.add_argument("--runs", type=flags.positive, default=3)
    return p.parse_args()


def main():
    args = parse()
    D, M, few = 512, 45, min(args.pixels)
    sizes = [(n, D, M) for n in args.pixels] + [(few, 2 * D, M), (few, D, 2 * M)]
    facts = f"Median of {args.runs} steps."
    tables.show("bench.prototypes", args.write, make_table(sizes, args.runs, args.device), facts, args.device)


if __name__ == "__main__":
    main()
