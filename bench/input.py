"""Which side waits: the loader that makes training samples, or the step that takes them.

Loader: images a second by number of workers, from drawn JPEGs of VOC's size (500x375, 70 KB) and of 12
megapixels (4.5 MB), with the augmentation of SemPLeS (a), (c) and with that of (b), crop 224. A JPEG is
decoded at 1/2, 1/4 or 1/8 of its sides where the crop is then still as large as the sample; `in full` decodes
all of it, as a PNG must be. Step: images a second of the stages themselves (DeiT-S, ViT-B/32, random
weights), given one batch again and again.

    python -m bench.input
    python -m bench.input --device cuda --amp bf16 --batch 64 --pairs 100 --steps 100 --workers 1 2 4 8 14
    python -m bench.input --step-rate 4000                    # workers for a GPU of 4,000 images a second
"""
import argparse
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from bench import inputs, tables
from plumbing import flags, folders, images, markdown, samples

RECIPES = {"(a), (c)": {"randaugment": True, "erase": 0.25}, "(b)": {}}
SCRIPTS = {"(a), (c)": "train_match.py", "(b)": "train_prompt.py"}
BATCH = 16


def decode_in_full(file, least=None):
    return images.decode(file)


def loader_rate(folder, recipe, workers, count, device):
    """Images a second over an epoch of at least `count` crops, by workers that have started before."""
    ids = folder.ids("train")
    count = max(count, 4 * BATCH * workers)
    ids = (ids * math.ceil(count / len(ids)))[:count]
    dataset = samples.Samples(folder, ids, samples.train_transform(224, **recipe))
    run = SimpleNamespace(device=torch.device(device), shard=list)
    loader = samples.loader(dataset, run, argparse.Namespace(batch_size=BATCH, workers=workers))
    for _ in loader:                                          # starts the workers
        pass
    loader.batch_sampler.start(1)
    start = tables.clock()
    seen = sum(len(batch) for batch, *_ in loader)
    return seen / (tables.clock() - start)


def step_rates(root, args):
    """Images a second of the training stages."""
    inputs.make_folder(root / "data", (256, 256), inputs.deal(args.batch, args.pairs))
    inputs.save_networks(root)
    rates = {}
    for name, script in SCRIPTS.items():
        ready = inputs.Ready(args.batch, args.pairs, args.steps)
        took = ready.seconds_of(
            script, "--data", root / "data", "--out", root / script, "--split", "train", "--device",
            args.device, "--amp", args.amp, "--clip", root / "clip.pt", "--init", root / "generator.pt")
        rates[name] = args.batch / took
    return rates


def make_rows(root, steps, args):
    small = inputs.make_folder(root / "small", (500, 375), [[0]] * min(16, args.samples))
    large = inputs.make_folder(root / "large", (4032, 3024), [[0]] * 2)
    kinds = [("500x375", small, images.decode, args.samples),
             ("4032x3024", large, images.decode, args.samples // 8),
             ("4032x3024, in full", large, decode_in_full, args.samples // 8)]
    for name, recipe in RECIPES.items():
        for kind, where, decode, count in kinds:
            with mock.patch.object(samples, "decode", decode):
                rates = [loader_rate(folders.Folder(where), recipe, n, count, args.device)
                         for n in args.workers]
            one = max(rate / max(1, n) for n, rate in zip(args.workers, rates))       # of a worker
            yield [name, kind, *(f"{rate:.0f}" for rate in rates), f"{steps[name]:.1f}",
                   math.ceil(steps[name] / one)]


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--workers", type=flags.natural, nargs="+", default=[0, 1, 2])
    p.add_argument("--device", default="cpu", help="of the step")
    p.add_argument("--amp", choices=flags.PRECISIONS, default="off")
    p.add_argument("--batch", type=flags.positive, default=4, help="images of the step")
    p.add_argument("--pairs", type=flags.positive, default=7, help="pairs of an image and a class in it")
    p.add_argument("--steps", type=flags.positive, default=3, help="steps timed, after a tenth as many")
    p.add_argument("--step-rate", type=flags.above_zero,
                   help="images a second of a step, instead of timing it")
    p.add_argument("--samples", type=flags.positive, default=512,
                   help="images of VOC's size for each number of workers; of large ones an eighth")
    return p.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        steps = {name: args.step_rate for name in RECIPES} if args.step_rate else step_rates(root, args)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                              # a loader process has one
        rows = list(make_rows(root, steps, args))
        torch.set_num_threads(threads)
    head = ["augmentation of", "images", *(f"{n} workers" for n in args.workers), "step takes",
            "workers for it"]
    facts = f"Images a second; a step of {args.batch} images with {args.pairs} pairs, amp {args.amp}."
    tables.show("bench.input", args.write, markdown.table(head, rows), facts, args.device)


if __name__ == "__main__":
    main()
