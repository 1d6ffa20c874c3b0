"""Which side waits: the loader that makes training samples, or the step that takes them.

Loader: pictures a second by number of workers, of drawn JPEGs of VOC's size (500x375, 70 KB) and of 12-megapixel photographs (4.5 MB), with the
augmentation of SemPLeS (a), (c) and with that of (b), crop 224. "whole" decodes photographs in full, as PNGs and small pictures are; otherwise
a JPEG is decoded at 1/2, 1/4 or 1/8 where the crop is then still as large as the sample. Step: pictures a second of the stages themselves
(DeiT-S, ViT-B/32, random weights), given one batch again and again.

    python bench/input.py                                                                    # 2 CPU cores
    python bench/input.py --device cuda --amp bf16 --pictures 64 --pairs 100 --steps 100 --workers 1 2 4 8 14
    python bench/input.py --step-rate 4000                                                   # workers for a GPU that takes 4,000 pictures a second
"""
import argparse
import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import stage  # noqa: E402
from flops import make_inputs  # noqa: E402
from plumbing import folders, images as image_files, samples as sampling  # noqa: E402

RECIPES = {"(a), (c)": dict(randaugment=True, erase=0.25), "(b)": {}}
SCRIPTS = {"(a), (c)": "train_match.py", "(b)": "train_prompt.py"}


def photograph(rng, width, height):
    """Noise of every scale, as much of each as a photograph has, roughly."""
    image = Image.new("RGB", (width, height), (124, 116, 104))
    for cell, share in ((256, 0.7), (64, 0.4), (16, 0.3), (8, 0.2), (4, 0.15), (2, 0.1), (1, 0.1)):
        noise = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        image = Image.blend(image, Image.fromarray(noise).resize((width, height), Image.BICUBIC), share)
    return image


def picture_folder(root, count, width, height):
    (root / "JPEGImages").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        photograph(rng, width, height).save(root / f"JPEGImages/{n:04d}.jpg", quality=92)
    (root / "labels.txt").write_text("\n".join(f"{n:04d} {n % 20}" for n in range(count)))
    return folders.Folder(root)


def loader_rate(folder, recipe, workers, pictures, device, whole=False, batch=16):
    """Pictures a second of an epoch of `pictures` crops, at least four batches a worker, of workers that have started before."""
    ids, pictures = folder.ids("train"), max(pictures, 4 * batch * workers)
    samples = sampling.Samples(folder, (ids * math.ceil(pictures / len(ids)))[:pictures], sampling.train_transform(224, **recipe))
    env, decode = SimpleNamespace(device=torch.device(device), shard=list), image_files.decode
    if whole:
        image_files.decode = lambda file, least=None: decode(file)
    loader, batches = sampling.loader(samples, batch, env, workers)
    for _ in loader:                                        # starts the workers, and leaves no batch of theirs on the way
        pass
    batches.start(1)
    start = time.perf_counter()
    seen = sum(len(images) for images, *_ in loader)
    image_files.decode = decode
    return seen / (time.perf_counter() - start)


class Ready:
    """In place of sampling.loader and its Batches: one batch again and again, on its device, so that a step waits for nothing but itself."""

    def __init__(self, pictures, pairs, classes=20, crop=224, steps=3, warm=1):
        self.pictures, self.steps, self.warm, self.batch_size, self.crop = pictures, steps, warm, pictures, crop
        self.labels = torch.zeros(pictures, classes)
        for n in range(pairs):
            self.labels[n % pictures, (n % pictures + n // pictures) % classes] = 1

    def loader(self, samples, batch_size, env, workers=0):
        mine = torch.tensor(env.shard(range(self.pictures)))
        self.device, self.batch = env.device, (torch.rand(len(mine), 3, self.crop, self.crop, device=env.device), self.labels[mine], mine)
        return self, self

    def start(self, epoch, skip=0):
        pass

    def __len__(self):
        return self.warm + self.steps + 1                                     # the last step also saves its state: it is not timed

    def __iter__(self):
        times = []
        for n in range(len(self)):
            if n in (self.warm, self.warm + self.steps):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
            yield self.batch
        self.seconds = times[1] - times[0]

    def run(self, script, *flags):
        """-> seconds a step of a stage"""
        loader, sampling.loader = sampling.loader, self.loader
        with contextlib.redirect_stdout(sys.stderr):
            stage(script, *flags, "--batch-size", self.pictures, "--epochs", 1, "--crop", self.crop, "--limit", self.pictures, "--workers", 0)
        sampling.loader = loader
        return self.seconds / self.steps


def step_rates(root, args):
    make_inputs(root, args.pictures, args.pairs)
    shared = ["--data", root / "data", "--split", "train", "--device", args.device, "--amp", args.amp, "--clip", root / "clip.pt", "--init", root / "generator.pt"]
    ready = lambda: Ready(args.pictures, args.pairs, steps=args.steps, warm=max(1, args.steps // 10))
    return {name: args.pictures / ready().run(script, *shared, "--out", root / script) for name, script in SCRIPTS.items()}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--device", default="cpu", help="of the step")
    p.add_argument("--amp", default="off")
    p.add_argument("--pictures", type=int, default=4, help="batch of the step")
    p.add_argument("--pairs", type=int, default=7, help="pairs in it")
    p.add_argument("--steps", type=int, default=3, help="steps timed, after a tenth as many")
    p.add_argument("--step-rate", type=float, help="pictures a second of a step, instead of measuring it here")
    p.add_argument("--samples", type=int, default=512, help="pictures timed of VOC's size for each number of workers; of large ones an eighth")
    return p.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        steps = {name: args.step_rate for name in RECIPES} if args.step_rate else step_rates(root, args)
        torch.set_num_threads(1)                                               # as a worker has
        voc, large = picture_folder(root / "voc", 16, 500, 375), picture_folder(root / "large", 2, 4032, 3024)
        rows = [("500x375", voc, False, args.samples), ("4032x3024", large, False, args.samples // 8), ("4032x3024, whole", large, True, args.samples // 8)]
        print("| augmentation of | pictures | " + " | ".join(f"{n} workers" for n in args.workers) + " | step takes | workers for it |")
        print("|---" * (len(args.workers) + 4) + "|")
        for name, recipe in RECIPES.items():
            for title, pictures, whole, count in rows:
                rates = [loader_rate(pictures, recipe, n, count, args.device, whole) for n in args.workers]
                one = max(rate / max(1, n) for n, rate in zip(args.workers, rates))
                print(f"| {name} | {title} | " + " | ".join(f"{rate:.0f}" for rate in rates) + f" | {steps[name]:.1f} | {math.ceil(steps[name] / one)} |")
                if title == "500x375":
                    side = "the step waits for the loader" if max(rates) < steps[name] else "the loader waits for the step"
                    print(f"{name}: with {args.workers[int(np.argmax(rates))]} workers {side}", file=sys.stderr)


if __name__ == "__main__":
    main()
