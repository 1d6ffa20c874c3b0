"""Stage 0, where the papers start: the mask generator S learns from image labels alone, as WeakTr trains it.

Paper   WeakTr, a host of SemPLeS Table 4; SemPLeS does not say how its S starts
Reads   images and image labels of --data, ImageNet weights
Writes  <out>/cls.pt, <out>/cls.last.pt (to resume), <out>/cls.jsonl

The loss is the multi-label soft margin of every logit that the generator offers: those of its class tokens,
of its coarse maps and of its fine maps. All of the backbone trains here; the later stages freeze it.

    python train_cls.py --data /data/VOC2012 --out runs/voc
    python train_cls.py --data /data/VOC2012 --out runs/voc --init weaktr.pth   # a published S as it is
    python train_cls.py --data data/toy --out runs/toy --split train --generator cnn_toy \\
        --backbone data/toy/backbone.pt --crop 96
"""
import argparse

import torch

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import generator, losses


def parse():
    p = flags.parser(__doc__, batch_size=64)
    g = p.add_argument_group("SemPLeS 4.2, WeakTr")
    g.add_argument("--generator", choices=["deit_small", "deit_tiny_toy", "cnn_toy"], default="deit_small",
                   help="architecture of S")
    g.add_argument("--backbone", default="imagenet",
                   help="weights the backbone starts from: imagenet (downloaded once), none, or a file")
    g.add_argument("--init", help="published generator (WeakTr, SemPLeS) to take as cls.pt instead of "
                                  "training")
    g.add_argument("--pool", choices=["max", "avg"], help="pooling of attention fusion (max: VOC, avg: "
                   "COCO); left out: what the file of --init says, else max")
    g.add_argument("--reduction", type=flags.positive, default=8,
                   help="squeeze of attention fusion (COCO: 4)")
    g.add_argument("--train-backbone", action=argparse.BooleanOptionalAction, default=True,
                   help="train all of S; --no-train-backbone: its last layers")
    g.add_argument("--epochs", type=flags.positive, default=60)
    g.add_argument("--lr", type=flags.above_zero, default=7.5e-5, help="AdamW's rate: 6e-4 x batch / 512")
    g.add_argument("--min-lr", type=flags.number, default=1e-5, help="rate the cosine ends at")
    g.add_argument("--warmup", type=flags.number, default=5, help="epochs of linear warm-up from --warmup-lr")
    g.add_argument("--warmup-lr", type=flags.above_zero, default=1e-6)
    g.add_argument("--weight-decay", type=flags.number, default=0.03)
    g.add_argument("--crop", type=flags.positive, default=224, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.08, help="least share of an image in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=True)
    g.add_argument("--erase", type=flags.share, default=0.25, help="probability of random erasing")
    g.add_argument("--drop-path", type=flags.share, default=0.1, help="stochastic depth while S trains")
    flags.training(p)
    return p.parse_args()


def warmup_cosine(optimizer, args, steps):
    """Linear from --warmup-lr, then cosine to --min-lr; stepped at every batch, `steps` of them an epoch."""
    warm, total = round(args.warmup * steps), args.epochs * steps
    schedulers = torch.optim.lr_scheduler
    fall = schedulers.CosineAnnealingLR(optimizer, max(1, total - warm), eta_min=min(args.min_lr, args.lr))
    if not warm:
        return fall
    rise = schedulers.LinearLR(optimizer, min(1.0, args.warmup_lr / args.lr), total_iters=warm)
    return schedulers.SequentialLR(optimizer, [rise, fall], [warm])


def main():
    args = parse()
    run = processes.Run(args)
    keeper = checkpoints.Keeper(run, args, "cls.pt", start=args.init or args.backbone)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    if args.init:
        S = networks.load_generator(args.init, run, folder.classes, args.pool)
        args.pool = S.pool
        return keeper.finish(model=S, classes=folder.classes)

    S = run.in_turn(lambda: networks.new_generator(
        args.generator, len(folder.classes), args.backbone, args.pool, args.drop_path, args.reduction))
    S = S.to(run.device)
    args.pool = S.pool
    augment = samples.train_transform(args.crop, args.min_scale, args.randaugment, args.erase)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    trained = generator.parameters_to_train(S, args.train_backbone)
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)
    schedule = warmup_cosine(optimizer, args, len(loader))
    S = keeper.begin(S, optimizer, schedule, loader, args.epochs * len(loader))

    for images, labels in keeper.steps():
        labels = labels.to(run.device)                                                # (B, C)
        with run.autocast():
            _, logits = S(images, from_labels=True)                                   # a tuple of (B, C)
        parts = [run.mean(losses.cls_loss(z, labels)) for z in logits]
        loss = sum(parts)

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        right = ((logits[0] > 0) == (labels > 0)).float()
        keeper.after(loss=loss, **{f"loss_{i}": part for i, part in enumerate(parts)},
                     accuracy=run.mean(right.flatten()))
    keeper.finish(model=S, classes=folder.classes)


if __name__ == "__main__":
    guard.run(main)
