"""Stage 0, where the paper starts: the mask generator S learns from image labels alone (WeakTr's, or CLIMS's classifier).

Paper   SemPLeS 4.2 takes WeakTr's generator as S; Table 4 also CLIMS's ResNet-50
Reads   pictures and image labels of --data, ImageNet weights
Writes  <out>/cls.pt, <out>/cls.last.pt (to resume), <out>/cls.jsonl

The loss is the multi-label soft margin of every logit that the generator offers: for WeakTr those of its class tokens, of its
coarse maps and of its fine maps. All of the backbone trains here; the later stages freeze it, CLIMS's do not.

    python train_cls.py --data /data/VOC2012 --out runs/voc
    python train_cls.py --data /data/VOC2012 --out runs/voc --init weaktr.pth          # a published generator as it is, no training
    python train_cls.py --data /data/VOC2012 --out runs/clims --generator resnet50 --optimizer sgd --lr 0.1 --head-rate 10 --momentum 1e-4 --weight-decay 1e-4 \\
        --epochs 5 --batch-size 16 --crop 512 --min-scale 0.5 --no-randaugment --erase 0                                                                 # CLIMS's
    python train_cls.py --data data/toy --out runs/toy --split train --generator cnn_toy --backbone data/toy/backbone.pt --crop 96
"""
import argparse

import torch

from plumbing import checkpoints, flags, folders, guard, log as logs, processes, samples as sampling
from wsss import generator, losses


def parse():
    p = flags.parser(__doc__, batch_size=64)
    p.add_argument("--generator", choices=list(generator.NAMES), default="deit_small", help="architecture of S")
    p.add_argument("--backbone", default="imagenet", help="weights the backbone starts from: imagenet (downloaded once), none, or a file")
    p.add_argument("--pool", choices=["max", "avg"], help="pooling of attention fusion; left out: what the file of --init says, else max (max: VOC, avg: COCO)")
    p.add_argument("--reduction", type=flags.positive, default=8, help="squeeze of attention fusion (8: VOC, 4: COCO)")
    p.add_argument("--train-backbone", action=argparse.BooleanOptionalAction, default=True, help="train all of S; --no-train-backbone: its last layers")
    p.add_argument("--init", help="published generator (WeakTr, SemPLeS, CLIMS, IRN) to take as cls.pt instead of training one")
    g = flags.optimizing(flags.training(p, epochs=60, lr=7.5e-5))
    g.add_argument("--drop-path", type=flags.share, default=0.1, help="stochastic depth of a DeiT while it trains")
    g.add_argument("--warmup", type=flags.number, default=5, help="epochs of linear warm-up from --warmup-lr (AdamW)")
    g.add_argument("--warmup-lr", type=flags.number, default=1e-6)
    g.add_argument("--min-lr", type=flags.number, default=1e-5, help="rate the cosine ends at (AdamW)")
    return p.parse_args()


def build(args, classes):
    if args.init:
        return generator.load_generator(args.init, args.pool, classes)
    start = None if args.backbone == "none" else args.backbone
    return generator.build_generator(args.generator, len(classes), args.pool or "max", args.reduction, start, args.drop_path)


def warmup_cosine(optimizer, args, steps):
    """Linear from --warmup-lr, then cosine to --min-lr; stepped at every batch, `steps` of them an epoch."""
    warm, total = max(1, round(args.warmup * steps)), args.epochs * steps
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, min(1.0, args.warmup_lr / args.lr), total_iters=warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warm), eta_min=min(args.min_lr, args.lr))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "cls.pt", args.out / "cls.last.pt"
    args.inputs = checkpoints.inputs(start=args.init or args.backbone)
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)

    model = env.in_turn(lambda: build(args, folder.classes)).to(env.device)
    args.pool = model.pool
    finish = dict(stage="cls", classes=folder.classes, args=flags.plain(args))
    if args.init:
        if env.main:
            checkpoints.save(out, model=model.state_dict(), **finish)
        return env.close(f"{out}: {args.init} as it is")
    optimizer = processes.optimizer(generator.parameter_groups(model, args.train_backbone, args.lr, args.head_rate), args)
    samples = sampling.Samples(folder, ids, sampling.train_transform(args.crop, (args.min_scale, 1), args.randaugment, args.erase), args.seed)
    loader, batches = sampling.loader(samples, args.batch_size, env, args.workers)
    schedule = warmup_cosine(optimizer, args, len(batches)) if args.optimizer == "adamw" else processes.schedule(optimizer, args, args.epochs * len(batches))
    scaler = env.scaler()
    begin, skip = checkpoints.load_state(last, model, optimizer, schedule, scaler, args)
    S = env.parallel(model.train())
    log, meter = logs.Log(args.out / "cls.jsonl", args, env, begin * len(batches) + skip), logs.Meter(env)

    for epoch in range(begin, args.epochs):
        batches.start(epoch, skip)
        for step, (images, labels, numbers) in enumerate(env.progress(loader, f"cls {epoch + 1}/{args.epochs}", len(batches), skip), skip + 1):
            images, labels = images.to(env.device, non_blocking=True), labels.to(env.device, non_blocking=True)
            with env.autocast():
                _, logits = S(images)                                           # a tuple of (B, C)
            parts = [processes.mean(losses.cls_loss(z, labels)) for z in logits]
            loss = sum(parts)
            lr = optimizer.param_groups[0]["lr"]
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True), schedule.step()

            meter.add(numbers, loss=loss, **{f"loss_{i}": part for i, part in enumerate(parts)},
                      accuracy=processes.mean(((logits[0] > 0) == (labels > 0)).float().flatten()))
            done = epoch * len(batches) + step
            save = env.stopping() or step == len(batches) or done % args.save_every == 0
            if save or done % args.log_every == 0:
                log(done, epoch=epoch, lr=lr, **meter.read(ids))
            if save:
                checkpoints.save_state(last, model, optimizer, schedule, scaler, epoch, step, args)
        skip = 0

    if env.main:
        checkpoints.save(out, model=model.state_dict(), **finish)
    env.close(f"{out} is finished")


if __name__ == "__main__":
    guard.run(main)
