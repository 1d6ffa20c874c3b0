"""Floating-point operations of a SemPLeS step at the paper's real shapes, beside the arithmetic minimum.

DeiT-S, ViT-B/32, 224 px, 20 classes, random weights. The stages themselves run on random pictures, once for one step and once for two; the
difference of what torch.utils.flop_counter counts is a step, with all that a step really does. The minimum is put together from parts that are
counted alone: S forward on every picture, CLIP forward on every region, its gradient down to the pixels in (a) and (c), and in (b) the prompts
of the batch's classes through the text tower and back; with stored features (--views) nothing else. The pairs of a batch are of as many classes
as can be. A multiplication and an addition are two operations; elementwise ones are not counted.

    python bench/flops.py                                   # 4 pictures with 7 pairs, as the public code's step is usually counted
    python bench/flops.py --pictures 64 --pairs 100         # a batch of VOC: 12 GB, half an hour on a CPU

Public step, from reading what it computes, at 4 pictures and 7 pairs: 652 / 693 / 1,224 GFLOP in (a) / (b) / (c).
"""
import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import stage  # noqa: E402
from plumbing import checkpoints  # noqa: E402
from wsss import clip_model, generator  # noqa: E402

COMMON = "--split train --device cpu --workers 0 --amp off".split()
CLASSES = 20


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def make_inputs(root, pictures, pairs):
    """A data folder of 2 x `pictures` whose halves hold `pairs` pairs each; a random ViT-B/32 and a random DeiT-S in files."""
    (root / "data/JPEGImages").mkdir(parents=True)
    rng, lines, classes = np.random.default_rng(0), [], itertools.cycle(map(str, range(CLASSES)))
    for n in range(2 * pictures):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(root / f"data/JPEGImages/{n:04d}.jpg")
        count = pairs // pictures + (n % pictures < pairs % pictures)
        lines.append(" ".join([f"{n:04d}", *itertools.islice(classes, count)]))
    (root / "data/labels.txt").write_text("\n".join(lines))
    torch.manual_seed(0)
    clip = CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32, context_length=77, vocab_size=49408,
                transformer_width=512, transformer_heads=8, transformer_layers=12)
    torch.save(clip.half().state_dict(), root / "clip.pt")
    checkpoints.save(root / "generator.pt", model=generator.build_generator("deit_small", CLASSES).state_dict())


def step(root, script, pictures, *flags, stored=False):
    """GFLOP of one training step of a stage; with stored features of its second epoch, for the first one encodes."""
    name, runs = script.removesuffix(".py").removeprefix("train_"), []
    for steps in (1, 2):
        out = root / f"{name}_{stored}_{steps}"
        out.mkdir()
        if name == "refine":
            (out / "prompts.pt").symlink_to(root / "prompt_False_1/prompts.pt")
        size = ("--limit", pictures, "--epochs", steps) if stored else ("--limit", steps * pictures, "--epochs", 1)
        runs.append(counted(lambda: stage(script, "--data", root / "data", "--out", out, *COMMON, "--clip", root / "clip.pt", "--init", root / "generator.pt",
                                          "--batch-size", pictures, *size, *flags)))
    return runs[1] - runs[0]


def parts(root):
    """GFLOP of S forward on a picture; CLIP forward on a region, and with the gradient to its pixels; a prompt forward and back."""
    S = generator.load_generator(root / "generator.pt")
    generator.parameters_to_train(S)
    clip = clip_model.load_clip(root / "clip.pt")
    prompts = clip_model.BackgroundPrompts(clip, 1)
    picture, region = torch.rand(1, 3, 224, 224), torch.rand(1, 3, 224, 224, requires_grad=True)
    return {"S forward": counted(lambda: S(picture)), "CLIP forward": counted(lambda: clip.encode_normalized(region.detach())),
            "CLIP forward + pixels' gradient": counted(lambda: clip.encode_normalized(region).sum().backward()),
            "a prompt forward + gradient": counted(lambda: prompts().sum().backward())}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", type=int, default=4)
    p.add_argument("--pairs", type=int, default=7)
    return p.parse_args()


def main():
    args = parse()
    B, P = args.pictures, args.pairs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, B, P)
        each = parts(root)
        matching = B * each["S forward"] + 2 * P * each["CLIP forward + pixels' gradient"]
        prompts = min(P, CLASSES) * each["a prompt forward + gradient"]
        minimum = {"(a)": matching, "(b)": B * each["S forward"] + P * each["CLIP forward"] + prompts, "(b), stored features": prompts, "(c)": matching}
        found = {"(b)": step(root, "train_prompt.py", B), "(b), stored features": step(root, "train_prompt.py", B, "--views", 1, stored=True),
                 "(a)": step(root, "train_match.py", B), "(c)": step(root, "train_refine.py", B)}
    print(f"{B} pictures, {P} pairs, {CLASSES} classes; GFLOP. " + ", ".join(f"{name} {value:.1f}" for name, value in each.items()))
    print("| step | here | minimum | here / minimum |\n|---|---|---|---|")
    for name in minimum:
        print(f"| {name} | {found[name]:.0f} | {minimum[name]:.0f} | {found[name] / minimum[name]:.3f} |")


if __name__ == "__main__":
    main()
