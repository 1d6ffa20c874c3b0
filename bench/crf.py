"""Pseudo masks a second by CRF backend and number of workers; and whether memory stays flat over many images.

Images of the toy world enlarged to VOC's size, two classes and the background: three labels. make_pseudo.py's
own function for one image (read, CRF `weaktr`, write) runs in its own pool. The first image of each process
is left out of the speed: it holds the start.

Memory is what a process holds after each image (Linux: /proc/self/statm) over 1,000 small images: the mean
over the first tenth of them, the first fiftieth left out, and over the last tenth; of the worker that grew
most, and of the main process at the same moments.

    python -m bench.crf
    python -m bench.crf --workers 1 4 16 --images 200 --backends pydensecrf
    python -m bench.crf --device cuda --workers 0 --backends torch
"""
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import make_pseudo
from bench import inputs, tables
from plumbing import flags, markdown, processes
from plumbing.maps import resize_maps, save_cam
from toy import drawings

CLASSES = [3, 7]


def make_inputs(root, images, size):
    """Images of `size` (H, W) and two maps each -> (image path, id, labels), as make_pseudo.write_mask takes
    them."""
    (root / "cam").mkdir(parents=True)
    labels, tasks = inputs.multi_hot([CLASSES])[0].numpy(), []
    for n in range(images):
        path, id = root / f"{n:05d}.jpg", f"{n:05d}"
        image = Image.fromarray(drawings.scene(0, n % 50).image)
        image.resize(size[::-1], Image.BICUBIC).save(path, quality=95)
        maps = np.random.default_rng(n).random((2, 6, 8), np.float32)
        save_cam(root / "cam" / f"{id}.npy", resize_maps(maps, size))
        tasks.append((path, id, labels))
    return tasks


def process(*task):
    """make_pseudo.write_mask -> this process, the MB it holds afterwards, the time."""
    make_pseudo.write_mask(*task)
    return os.getpid(), held(), time.perf_counter()


def held():
    """MB of resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def run(root, tasks, backend, workers, device):
    """-> of each image, as it is finished: process, MB, time, and the MB of the main process then."""
    args = tables.arguments(make_pseudo, "--data", root, "--out", root, "--pseudo", backend,
                            "--backend", backend)
    (root / backend).mkdir(exist_ok=True)
    todo = ((*task, args, device) for task in tasks)
    return [(*row, held()) for row in processes.pooled(process, todo, workers, root)]


def speed(rows):
    """Images a second, the first of each process left out."""
    count = len({row[0] for row in rows})
    times = sorted(row[2] for row in rows)
    return (len(rows) - count) / (times[-1] - times[count - 1])


def growth(rows):
    """MB over the first images and over the last: of the process that grew most, of the main process."""
    by_process = [ends([row[1] for row in rows if row[0] == pid]) for pid in {row[0] for row in rows}]
    return max(by_process, key=lambda pair: pair[1] - pair[0]), ends([row[3] for row in rows])


def ends(values):
    """The means of the first tenth, without the first fiftieth, and of the last tenth."""
    skip, n = len(values) // 50, max(1, len(values) // 10)
    return np.mean(values[skip:skip + n]), np.mean(values[-n:])


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--device", default="cpu", help="where the backend torch computes")
    p.add_argument("--backends", nargs="+", choices=["pydensecrf", "torch"], default=["pydensecrf", "torch"])
    p.add_argument("--workers", type=flags.natural, nargs="+", default=[0, 1, 2],
                   help="0: in the main process, torch then with all its threads")
    p.add_argument("--images", type=flags.positive, default=14, help="images of a timing")
    p.add_argument("--size", type=flags.positive, nargs=2, default=[375, 500])
    p.add_argument("--many", type=flags.positive, default=1000, help="small images of the look at memory")
    p.add_argument("--small", type=flags.positive, nargs=2, default=[60, 80])
    return p.parse_args()


def main():
    args = parse()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        tasks, many = make_inputs(large, args.images, args.size), make_inputs(small, args.many, args.small)
        speeds = [[backend, *(f"{speed(run(large, tasks, backend, n, device)):.2f}" for n in args.workers)]
                  for backend in args.backends]
        memory = []
        for backend in args.backends:
            worker, main_process = growth(run(small, many, backend, max(args.workers), device))
            memory.append([backend, *(f"{mb:.1f}" for mb in (*worker, *main_process))])
    first = markdown.table(["backend", *(f"{n} workers, images/s" for n in args.workers)], speeds)
    second = markdown.table([f"memory over {args.many} images, {max(args.workers)} workers, MB",
                              "worker: first tenth", "last", "main process: first tenth", "last"], memory)
    facts = (f"{args.size[0]}x{args.size[1]}, 3 labels, backend torch on {args.device}; memory at "
             f"{args.small[0]}x{args.small[1]}.")
    tables.show("bench.crf", args.write, f"{first}\n\n{second}", facts)


if __name__ == "__main__":
    main()
