"""Pseudo masks a second by backend and workers, and whether memory stays flat over many pictures.

Pictures of the toy world enlarged to VOC's size, two classes and the background: three labels. make_pseudo.py's own function for one picture
(read, CRF `weaktr`, write) in its own pool. The first picture of each process is left out of the speed: it holds the start.

Memory is what a process holds after each picture (Linux: /proc/self/statm) over 1,000 small pictures: the mean over the first tenth of its
pictures, its very first fiftieth left out, and over the last tenth; of the worker that grew most, and of the main process at the same moments.

    python bench/crf.py
    python bench/crf.py --workers 1 4 16 --pictures 200 --backends pydensecrf
    python bench/crf.py --device cuda --workers 0 --backends torch
"""
import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import write  # noqa: E402
import make_pseudo  # noqa: E402
from plumbing import maps as map_files, processes as ranks  # noqa: E402
from toy import drawings as toy  # noqa: E402


def make_inputs(root, pictures, size):
    """Pictures (H, W) and maps of two classes each -> tasks of make_pseudo.make without arguments: (picture, id, labels)"""
    (root / "cam").mkdir(parents=True)
    labels, tasks = np.zeros(20), []
    labels[[3, 7]] = 1
    for n in range(pictures):
        image, maps = toy.scene(0, n % 50).image, np.random.default_rng(n).random((2, 6, 8), np.float32)
        Image.fromarray(image).resize(size[::-1], Image.BICUBIC).save(root / f"{n:05d}.jpg", quality=95)
        map_files.save_cam(root / f"cam/{n:05d}.npy", map_files.resize_maps(maps, size))
        tasks.append((root / f"{n:05d}.jpg", f"{n:05d}", labels))
    return tasks


def arguments(root, backend):
    """What make_pseudo.parse gives for a run over these."""
    (root / backend).mkdir(exist_ok=True)
    return argparse.Namespace(out=root, cam="cam", pseudo=backend, background="constant", threshold=0.43, alpha=1.0, segments=None, vote=None, crf=True,
                              preset="weaktr", iterations=10, backend=backend, ignore_below=0.0)


def measured(*task):
    """make_pseudo.make -> (its process, the memory that it holds afterwards in MB, the time)"""
    make_pseudo.make(*task)
    return os.getpid(), held(), time.perf_counter()


def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def run(tasks, args, workers, device):
    """-> (process, MB, time) of each picture as it is finished, and the main process's MB then."""
    todo = ((*task, args, device) for task in tasks)
    return [(*row, held()) for row in ranks.pooled(measured, todo, workers, args.out)]


def speed(rows):
    """Pictures a second, each process's first left out."""
    processes = len({row[0] for row in rows})
    times = sorted(row[2] for row in rows)
    return (len(rows) - processes) / (times[-1] - times[processes - 1])


def growth(rows):
    """MB of the first hundred and of the last: of the process that grew most, of the main process."""
    def ends(values):
        skip, n = len(values) // 50, max(1, len(values) // 10)
        return np.mean(values[skip:skip + n]), np.mean(values[-n:])

    by_process = [ends([row[1] for row in rows if row[0] == pid]) for pid in {row[0] for row in rows}]
    return max(by_process, key=lambda pair: pair[1] - pair[0]), ends([row[3] for row in rows])


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="where the backend torch computes")
    p.add_argument("--backends", nargs="+", choices=["pydensecrf", "torch"], default=["pydensecrf", "torch"])
    p.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--pictures", type=int, default=14, help="pictures of a timing")
    p.add_argument("--size", type=int, nargs=2, default=[375, 500])
    p.add_argument("--many", type=int, default=1000, help="small pictures of the look at memory")
    p.add_argument("--small", type=int, nargs=2, default=[60, 80])
    p.add_argument("--write", action="store_true", help="put the tables between their marks in docs/results.md")
    return p.parse_args()


def main():
    args = parse()
    lines = [f"{args.size[0]}x{args.size[1]}, 3 labels; {os.cpu_count()} CPU cores, backend torch on {args.device}; torch {torch.__version__}.", "",
             f"| backend | {' | '.join(f'{n} workers, pictures/s' for n in args.workers)} |", f"|---|{'---|' * len(args.workers)}"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tasks, many = make_inputs(root / "large", args.pictures, args.size), make_inputs(root / "small", args.many, args.small)
        for backend in args.backends:
            found = [speed(run(tasks, arguments(root / "large", backend), n, args.device)) for n in args.workers]
            lines.append(f"| {backend} | {' | '.join(f'{value:.2f}' for value in found)} |")
        title = f"memory over {args.many} pictures of {args.small[0]}x{args.small[1]}, MB"
        lines += ["", f"| {title} | worker: first tenth | last | main process: first tenth | last |", "|---|---|---|---|---|"]
        for backend in args.backends:
            worker, main_process = growth(run(many, arguments(root / "small", backend), max(args.workers), args.device))
            lines.append(f"| {backend}, {max(args.workers)} workers | {worker[0]:.1f} | {worker[1]:.1f} | {main_process[0]:.1f} | {main_process[1]:.1f} |")
    text = "\n".join(lines)
    print(text)
    if args.write:
        write("bench/crf.py", text)


if __name__ == "__main__":
    main()
