"""Floating-point operations of a SemPLeS step at the paper's real shapes, beside the arithmetic minimum.

DeiT-S, ViT-B/32, 224 px, 20 classes; random weights and images. The stages themselves run one step and two
steps on a CPU, and the difference of what torch counts is a step, with all that a step really does. The
minimum is put together from parts that are counted alone: S forward on every image, CLIP forward on every
region, its gradient down to the pixels in (a) and (c), and in (b) the prompts of the batch's classes through
the text tower and back; with stored features (--views) nothing else.

    python -m bench.flops                                     # 4 images with 7 pairs: a minute
    python -m bench.flops --batch 64 --pairs 100              # a batch of VOC: 12 GB, half an hour

Public steps, by reading what they compute, at 4 images and 7 pairs: 652 / 693 / 1,224 GFLOP in (a) / (b) /
(c).
"""
import tempfile
from pathlib import Path

import torch

from bench import inputs, tables
from plumbing import flags, markdown
from wsss import clip_model, generator

CPU = ["--split", "train", "--device", "cpu", "--workers", 0, "--amp", "off"]
STEPS = {"(a)": ["train_match.py"], "(b)": ["train_prompt.py"],
         "(b), stored features": ["train_prompt.py", "--views", 1],
         "(c)": ["train_refine.py", "--prompts", "random"]}


def count_step(root, batch, script, *more):
    """GFLOP of one training step of a stage: an epoch is a step, and views are encoded in the first."""
    counts = []
    for epochs in (1, 2):
        with tempfile.TemporaryDirectory(dir=root) as out:
            values = ["--data", root / "data", "--out", out, "--clip", root / "clip.pt", "--init",
                      root / "generator.pt", "--batch-size", batch, "--epochs", epochs, *CPU, *more]
            counts.append(tables.gflop(lambda values=values: tables.stage(script, *values)))
    return counts[1] - counts[0]


def count_parts(root):
    """GFLOP of S on an image; of CLIP on a region, without and with the gradient to its pixels; of a prompt
    forward and back."""
    S = generator.load_generator(root / "generator.pt")
    generator.parameters_to_train(S)
    clip = clip_model.load_clip(root / "clip.pt")
    prompts = clip_model.BackgroundPrompts(clip, 1)
    image, region = torch.rand(1, 3, 224, 224), torch.rand(1, 3, 224, 224, requires_grad=True)
    return {"S forward": tables.gflop(lambda: S(image)),
            "CLIP forward": tables.gflop(lambda: clip.encode_normalized(image)),
            "CLIP forward and back": tables.gflop(lambda: clip.encode_normalized(region).sum().backward()),
            "prompt forward and back": tables.gflop(lambda: prompts().sum().backward())}


def minimum(parts, B, P):
    prompts = min(P, inputs.CLASSES) * parts["prompt forward and back"]
    matching = B * parts["S forward"] + 2 * P * parts["CLIP forward and back"]
    fresh = B * parts["S forward"] + P * parts["CLIP forward"] + prompts
    return {"(a)": matching, "(b)": fresh, "(b), stored features": prompts, "(c)": matching}


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--batch", type=flags.positive, default=4, help="images of a step")
    p.add_argument("--pairs", type=flags.positive, default=7, help="pairs of an image and a class in it")
    return p.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs.make_folder(root / "data", (256, 256), inputs.deal(args.batch, args.pairs))
        inputs.save_networks(root)
        parts = count_parts(root)
        found = {name: count_step(root, args.batch, *stage) for name, stage in STEPS.items()}
    least = minimum(parts, args.batch, args.pairs)
    table = markdown.table(["step", "GFLOP here", "minimum", "here / minimum"],
                            [[name, f"{found[name]:,.0f}", f"{least[name]:,.0f}",
                              f"{found[name] / least[name]:.3f}"] for name in STEPS])
    each = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    facts = f"{args.batch} images, {args.pairs} pairs, {inputs.CLASSES} classes. {each} GFLOP."
    tables.show("bench.flops", args.write, table, facts)


if __name__ == "__main__":
    main()
