"""SemPLeS (c), prompt-guided semantic refinement: S drops what the prompt of its class describes.

Paper   SemPLeS 3.2.3, Eq. 3
Reads   images and image labels of --data, CLIP, <out>/cls.pt (train_cls.py) or --init,
        <out>/prompts.pt (train_prompt.py)
Writes  <out>/refine.pt, <out>/refine.last.pt (to resume), <out>/refine.jsonl

v_f, v_b, u_f and L_match as in train_match.py; u_b = E_T(p_k) of train_prompt.py, fixed:

    L_refine = -log(1 - sim(v_f, u_b)),   L_total = L_match + lambda L_refine              Eq. 3

The other learning schemes of the arXiv version's Table 6 are in ablations/schemes.py.

    python train_refine.py --data /data/VOC2012 --out runs/voc
    python train_refine.py --data /data/VOC2012 --out runs/voc --init runs/voc/match.pt   # on from (a)
    python train_refine.py --data /data/COCO --out runs/coco --split train --batch-size 24 --lr 2.4e-7 \\
        --lambda-b 0.75 --lambda-refine 0.2 --pool avg
"""
import argparse

import torch

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import clip_model, generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=64)
    g = p.add_argument_group("SemPLeS (c)")
    g.add_argument("--lambda-b", type=flags.number, default=2.4,
                   help="weight of the background term of L_match")
    g.add_argument("--lambda-refine", type=flags.number, default=0.05,
                   help="weight lambda of L_refine; raise it if co-occurring backgrounds stay lit")
    g.add_argument("--prompts", choices=["learned", "random"], default="learned",
                   help="random: 30 untrained vectors a class, uniform in [0, 1), a row of Table 5")
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
    # From the authors' code, not in the paper: (c) starts from the classification S again; only the prompts
    # carry over from (a) and (b). Fig. 2 may be read as going on from (a): --init <out>/match.pt.
    start = args.init or args.out / "cls.pt"
    learned = args.out / "prompts.pt" if args.prompts == "learned" else None
    keeper = checkpoints.Keeper(run, args, "refine.pt", start=start, clip=args.clip, prompts=learned)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    S = networks.load_generator(start, run, folder.classes, args.pool, args.drop_path, masks=False)
    args.pool = S.pool                                        # as the file of S says: saved with this one
    clip = networks.load_clip(args.clip, run, gelu=args.clip_gelu)
    if args.prompts == "learned":
        prompts = networks.load_prompts(args, clip, folder.classes)
    else:                                                     # Table 5: as initialised, on all ranks the same
        processes.seed_all(args.seed)
        prompts = clip_model.BackgroundPrompts(clip, len(folder.classes))
        processes.seed_all(args.seed + run.rank)
    class_texts = texts.class_texts(folder.classes, aliases=not args.raw_names)
    with torch.no_grad():
        u_f = clip.encode_text(class_texts)                                           # (C, D), once
        u_b = prompts()                                       # (C, D), once: p_k are fixed

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
        match = run.mean(losses.match_loss(v_f, v_b, u_f[k], args.lambda_b))          # Eq. 1
        refine = run.mean(losses.refine_loss(v_f, u_b[k]))                            # Eq. 3
        loss = match + args.lambda_refine * refine

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        with torch.no_grad():
            keeper.after(loss=loss, match=match, refine=refine, mask=run.mean(masks.mean((1, 2))),
                         sim_f=run.mean(losses.similarity(v_f, u_f[k])),
                         sim_b=run.mean(losses.similarity(v_b, u_f[k])),
                         sim_prompt=run.mean(losses.similarity(v_f, u_b[k])))
    keeper.finish(model=S, classes=folder.classes, prompts=prompts.state_dict())


if __name__ == "__main__":
    guard.run(main)
