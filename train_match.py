"""SemPLeS (a), segment-label matching: the class belongs in the foreground, not in the background.

Paper   SemPLeS 3.2.1, Eq. 1
Reads   images and image labels of --data, CLIP, <out>/cls.pt (train_cls.py) or --init
Writes  <out>/match.pt, <out>/match.last.pt (to resume), <out>/match.jsonl

For every pair of an image X and a class k present in it:

    M = S(X)_k,   v_f = E_I(M X),   v_b = E_I((1 - M) X),   u_f = E_T("a photo of k.")
    L_match = -log sim(v_f, u_f) - lambda_b log(1 - sim(v_b, u_f))                         Eq. 1

CLIP (E_I, E_T) is frozen, and so is S's backbone: its head and its attention fusion train.

    python train_match.py --data /data/VOC2012 --out runs/voc
    torchrun --nproc_per_node 4 train_match.py --data /data/COCO --out runs/coco --split train \\
        --batch-size 32 --lr 3.2e-7 --lambda-b 0.75 --pool avg
"""
import argparse

import torch

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=64)
    g = p.add_argument_group("SemPLeS (a)")
    g.add_argument("--lambda-b", type=flags.number, default=2.4,
                   help="weight of the background term; raise it if the masks miss parts of the object")
    g.add_argument("--init", help="generator to start from instead of <out>/cls.pt: published or ours")
    flags.clip(g, "ViT-B/32")
    g.add_argument("--raw-names", action="store_true",
                   help="feed VOC's names as they are (diningtable), not the authors' (dining table, player)")
    # From the authors' code, not in the paper: eps 0.1 in (a) and (c), 1e-4 in (b).
    g.add_argument("--mask-eps", type=flags.above_zero, default=0.1,
                   help="m = (c - min) / (max - min + eps): a small map stays a weak mask")
    g.add_argument("--mask-fill", choices=["mean", "imagenet"], default="mean",
                   help="a removed pixel is the mean colour; imagenet: and all pixels that CLIP sees are "
                        "normalised by ImageNet's statistics, as in the authors' code")
    g.add_argument("--pool", choices=["max", "avg"],
                   help="S's attention fusion, max: VOC, avg: COCO; left out: as in the file of S, else max")
    g.add_argument("--train-backbone", action="store_true", help="train all of S, as the paper can be read")
    g.add_argument("--epochs", type=flags.positive, default=60)
    # From the authors' code, not in the paper, which prints 5e-4: 5.12e-4 x batch / 512 (COCO 5.12e-6).
    g.add_argument("--lr", type=flags.number, default=6.4e-5,
                   help="AdamW's rate as it is used, whatever --batch-size")
    g.add_argument("--weight-decay", type=flags.number, default=0.03)
    g.add_argument("--crop", type=flags.positive, default=224, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.08, help="least share of an image in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=True)
    g.add_argument("--erase", type=flags.share, default=0.25, help="probability of random erasing")
    # From the authors' code, not in the paper: stochastic depth stays on in S's frozen backbone.
    g.add_argument("--drop-path", type=flags.share, default=0.1, help="stochastic depth while S trains")
    flags.training(p)
    return p.parse_args()


def main():
    args = parse()
    run = processes.Run(args)
    start = args.init or args.out / "cls.pt"
    keeper = checkpoints.Keeper(run, args, "match.pt", start=start, clip=args.clip)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    S = networks.load_generator(start, run, folder.classes, args.pool, args.drop_path, masks=False)
    args.pool = S.pool                                        # as the file of S says: saved with this one
    clip = networks.load_clip(args.clip, run, gelu=args.clip_gelu)
    class_texts = texts.class_texts(folder.classes, aliases=not args.raw_names)
    u_f = clip.encode_text(class_texts)                                               # (C, D), once

    augment = samples.train_transform(args.crop, args.min_scale, args.randaugment, args.erase)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    trained = generator.parameters_to_train(S, args.train_backbone)
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    S = keeper.begin(S, optimizer, schedule, loader, args.epochs * len(loader), texts=class_texts)

    for images, labels in keeper.steps():
        b, k = run.pairs(labels)                                                      # (P,) image, class
        with run.autocast():
            maps, _ = S(images)                                                       # (B, C, h, w)
            maps = losses.resize_map(maps[b, k], clip.size)                           # (P, H, W), CLIP's size
            masks = losses.mask_from_map(maps, args.mask_eps)
            x_f, x_b = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
            v_f, v_b = clip.encode_normalized(torch.cat([x_f, x_b])).chunk(2)             # (P, D) each
        loss = run.mean(losses.match_loss(v_f, v_b, u_f[k], args.lambda_b))           # Eq. 1

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        with torch.no_grad():
            sim_f, sim_b = losses.similarity(v_f, u_f[k]), losses.similarity(v_b, u_f[k])
            keeper.after(loss=loss, foreground=run.mean(-sim_f.log()),
                         background=run.mean(-(1 - sim_b).log()), mask=run.mean(masks.mean((1, 2))),
                         sim_f=run.mean(sim_f), sim_b=run.mean(sim_b))
    keeper.finish(model=S, classes=folder.classes)


if __name__ == "__main__":
    guard.run(main)
