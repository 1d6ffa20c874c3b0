"""CLIMS, and SemPLeS on CLIMS: S learns its maps from CLIP, with backgrounds named by hand or learned.

Paper   SemPLeS Table 4, the host CLIMS (Xie et al. 2022); Eq. 1, Eq. 3
Reads   images and image labels of --data, CLIP, and of <out>
        --stage match    cls.pt (hosts.train_cam), or --init
        --stage refine   match.pt, or --init, and prompts.pt (train_prompt.py)
Writes  <out>/match.pt or refine.pt, its .last.pt (to resume), its .jsonl

    L_CLIMS = lambda_match L_match + lambda_cbs L_CBS + lambda_reg L_REG                    --stage match
    L_total = L_CLIMS + lambda L_refine,   L_refine = -log(1 - sim(v_f, u_b))               --stage refine

L_match (Eq. 1) is CLIMS's OTM and BTM: its 10 OTM + 24 BTM is lambda_match 10 with lambda_b 2.4. L_CBS keeps
ten backgrounds, named by hand, out of the foreground, L_REG keeps the masks small. SemPLeS adds the prompts
that it has learned (Eq. 3). The masks are S's own, the sigmoid of its logits: no min-max. All of S trains.

The defaults are CLIMS's on VOC. It is finished with CLIMS after --stage match; for SemPLeS go on with
train_prompt.py --crop 512 --min-scale 0.5, then --stage refine, then make_cam.py --source refine.

    python -m hosts.train_clims --data /data/VOC2012 --out runs/voc_clims
    python -m hosts.train_clims --data /data/VOC2012 --out runs/voc_clims --stage refine
    torchrun --nproc_per_node 4 -m hosts.train_clims --data /data/COCO --out runs/coco_clims --split train \\
        --epochs 8 --lr 5e-4 --lambda-match 2 --lambda-b 7 --lambda-cbs 1.25 --tau-cbs 0.285 \\
        --lambda-refine 0.4
    python -m hosts.train_clims --data data/toy --out runs/clims --split train --clip data/toy/clip.pt \\
        --crop 96
"""
from pathlib import Path

import torch

from hosts import clims
from plumbing import checkpoints, files, flags, folders, guard, networks, processes, samples
from wsss import losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=16)
    g = p.add_argument_group("SemPLeS Table 4, CLIMS")
    g.add_argument("--stage", choices=["match", "refine"], default="match",
                   help="CLIMS alone, or with SemPLeS's L_refine")
    g.add_argument("--lambda-match", type=flags.number, default=10.0, help="weight of L_match (COCO: 2)")
    g.add_argument("--lambda-b", type=flags.number, default=2.4,
                   help="weight of L_match's background term (COCO: 7)")
    g.add_argument("--lambda-cbs", type=flags.number, default=1.0,
                   help="weight of L_CBS (COCO: 1.25), a sum over pairs and texts, which counts more in a "
                        "larger batch: CLIMS's weight is one for 16")
    g.add_argument("--tau-cbs", type=float, default=0.26,
                   help="L_CBS counts a text from this cosine on (COCO: 0.285)")
    g.add_argument("--background-texts", default="clims",
                   help="backgrounds of L_CBS: clims for CLIMS's own (VOC ten, COCO 88), or a file of names, "
                        "one a line")
    g.add_argument("--lambda-reg", type=flags.number, default=0.2,
                   help="weight of L_REG, the mean of all maps; raise it if masks swallow the image")
    # Not in the paper, which gives no lambda for CLIMS: its 0.05 times lambda_match.
    g.add_argument("--lambda-refine", type=flags.number, default=0.5,
                   help="weight lambda of L_refine, for --stage refine")
    g.add_argument("--init", help="generator to start from instead: CLIMS's, IRN's, or one of ours")
    flags.clip(g, "ViT-B/32")
    g.add_argument("--mask-fill", choices=["mean", "imagenet"], default="mean",
                   help="what CLIP sees, as in train_match.py")
    g.add_argument("--epochs", type=flags.positive, default=15, help="(COCO: 8)")
    g.add_argument("--lr", type=flags.number, default=2.5e-4, help="SGD's rate, poly 0.9 to 0 (COCO: 5e-4)")
    g.add_argument("--head-rate", type=flags.above_zero, default=10.0,
                   help="rate of the classifier, times --lr")
    # From the authors' code, not in the paper: as in hosts/train_cam.py.
    g.add_argument("--momentum", type=flags.share, default=1e-4, help="SGD's momentum")
    g.add_argument("--weight-decay", type=flags.number, default=1e-4)
    g.add_argument("--crop", type=flags.positive, default=512, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.5, help="least share of an image in a crop")
    flags.training(p)
    return p.parse_args()


def load_start(path, run, classes):
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: run hosts.train_cam (cls.pt) or hosts.train_clims "
                                "(match.pt) first, or give --init")
    return networks.load_generator(path, run, classes, masks=True)


def background_names(given, classes):
    if given == "clims":
        return texts.clims_backgrounds(classes)
    names = [line.strip() for line in files.read_lines(given) if line.strip()]
    if not names:
        raise ValueError(f"{given} is empty: write a name a line")
    return names


def main():
    args = parse()
    run = processes.Run(args)
    refines = args.stage == "refine"
    start = args.init or args.out / ("match.pt" if refines else "cls.pt")
    learned = args.out / "prompts.pt" if refines else None
    keeper = checkpoints.Keeper(run, args, f"{args.stage}.pt", start=start, clip=args.clip,
                                backgrounds=args.background_texts, prompts=learned)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    clip = networks.load_clip(args.clip, run, gelu=args.clip_gelu)
    S = load_start(start, run, folder.classes)
    u_f = clip.encode_text(texts.class_texts(folder.classes))                         # (C, D), once
    names = background_names(args.background_texts, folder.classes)
    u_t = clip.encode_text(texts.class_texts(names, aliases=False))                   # (T, D)
    u_b = networks.load_prompts(args, clip, folder.classes)().detach() if refines else None       # (C, D)

    ids = folder.ids(args.split, args.limit)
    augment = samples.train_transform(args.crop, args.min_scale)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    optimizer = torch.optim.SGD(clims.parameter_groups(S, args.lr, args.head_rate), momentum=args.momentum,
                                weight_decay=args.weight_decay)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    S = keeper.begin(S, optimizer, schedule, loader, steps)

    for images, labels in keeper.steps():
        b, k = run.pairs(labels)                                                      # (P,) image and class
        with run.autocast():
            maps = S(images)[0]                                                       # (B, C, h, w) in (0, 1)
            masks = losses.resize_map(maps[b, k], clip.size)                # (P, H, W) of CLIP's input
            x_f, x_b = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
            v_f, v_b = clip.encode_normalized(torch.cat([x_f, x_b])).chunk(2)             # (P, D) each
        match = run.mean(losses.match_loss(v_f, v_b, u_f[k], args.lambda_b))          # Eq. 1: OTM, BTM
        refine = torch.zeros_like(match)
        if u_b is not None:
            refine = run.mean(losses.refine_loss(v_f, u_b[k]))                        # Eq. 3
        cbs = run.total(losses.suppression_loss(v_f, u_t, args.tau_cbs))
        reg = run.mean(losses.area_loss(maps))
        loss = (args.lambda_match * match + args.lambda_cbs * cbs + args.lambda_reg * reg
                + args.lambda_refine * refine)

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        with torch.no_grad():
            keeper.after(loss=loss, match=match, refine=refine, cbs=cbs, reg=reg,
                         mask=run.mean(masks.mean((1, 2))),
                         sim_f=run.mean(losses.similarity(v_f, u_f[k])),
                         sim_b=run.mean(losses.similarity(v_b, u_f[k])))
    keeper.finish(model=S, classes=folder.classes)


if __name__ == "__main__":
    guard.run(main)
