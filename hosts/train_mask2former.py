"""Train Mask2Former on the pseudo masks, or on any folder of masks (pip install transformers scipy).

Paper   SemPLeS Tables 2 and 4, Mask2Former with Swin-L on FMA-WSSS's masks; Mask2Former: Cheng et al. 2022
Reads   images of --data, masks <out>/pseudo/<id>.png (make_pseudo.py) or --label-dir/<id>.png, a Swin
Writes  <out>/seg.pt, <out>/seg.last.pt (to resume), <out>/seg.jsonl; eval.py --what seg scores it

Every query predicts a class, or null, and a mask. In each decoder layer the queries are matched with the
masks of the image's classes, the background's among them, and

    L = lambda_class L_class + sum over matched masks (lambda_mask L_ce + lambda_dice L_dice),

with the weights 2, 5, 5 of Mask2Former's paper; masks are compared at random points. A pixel labelled 255
has no loss. True masks are opened only where --label-dir points at them.

    python -m hosts.train_mask2former --data /data/VOC2012 --out runs/voc_fma
    torchrun --nproc_per_node 4 -m hosts.train_mask2former --data /data/COCO --out runs/coco --split train \\
        --iterations 100000
    python -m hosts.train_mask2former --data data/toy --out runs/toy --split train --model mask2former_toy \\
        --init none --crop 96 --batch-size 8 --iterations 600 --lr 3e-3
"""
from pathlib import Path

import torch

from hosts import mask2former, mask2former_losses
from plumbing import checkpoints, flags, folders, guard, processes, samples
from plumbing.masks import IGNORE


def parse():
    p = flags.parser(__doc__, batch_size=4)
    g = p.add_argument_group("SemPLeS Table 4, FMA-WSSS's Mask2Former")
    g.add_argument("--model", choices=mask2former.NAMES, default="mask2former_swin_large")
    g.add_argument("--label-dir", type=Path, help="masks to learn instead of <out>/pseudo, an <id>.png each")
    g.add_argument("--init", default="imagenet",
                   help="imagenet (a Swin-L, downloaded once), none, a seg.pt of ours, or a name or folder "
                        "that transformers reads: a Swin, or a Mask2Former (which has seen true masks)")
    g.add_argument("--iterations", type=flags.positive, default=80_000, help="steps (COCO: 100,000)")
    g.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    g.add_argument("--lr", type=flags.number, default=1e-4,
                   help="first rate, poly 0.9 to 0; the Swin's is a tenth of it")
    g.add_argument("--weight-decay", type=flags.number, default=0.05)
    g.add_argument("--crop", type=flags.positive, default=512,
                   help="side of the random crop in pixels, a multiple of 32")
    g.add_argument("--min-scale", type=flags.above_zero, default=0.5,
                   help="before the crop, an image is resized by a random factor from this ...")
    g.add_argument("--max-scale", type=flags.above_zero, default=2.0, help="... to this")
    flags.training(p)
    args = p.parse_args()
    if args.crop % mask2former.Mask2Former.stride:
        p.error(f"--crop is a multiple of {mask2former.Mask2Former.stride}")
    if args.min_scale > args.max_scale:
        p.error("--min-scale is at most --max-scale")
    return args


def build(args, classes):
    """The network that --model and --init say."""
    if not Path(args.init).is_file():
        return mask2former.new_mask2former(args.model, len(classes), args.init)
    content = checkpoints.load(args.init, "seg", classes)
    if content["args"]["model"] != args.model:
        raise ValueError(f"{args.init} is a {content['args']['model']}, not a {args.model}: "
                         "give another --init, or its --model")
    model = mask2former.from_checkpoint(content, args.init)
    checkpoints.load_weights(model, content["model"], args.init)
    return model


def set_loss(classes, masks, label_maps, numbers, seed, step, config, run):
    """L_class, L_ce and L_dice, sums over the L decoder layers of means over all processes.

    class logits (L, B, Q, 2 + C), mask logits (L, B, Q, h, w), label maps (B, H, W), image numbers (B,)
    """
    parts = []
    for i, n in enumerate(numbers.tolist() or [0]):           # a rank without a share has an unlabelled image
        # Differs from the paper: it draws points for every mask and layer. Here an image has its own, from
        # (seed, step, image): the same in any process.
        drawn = ((seed * 1_000_003 + step) * 1_000_003 + n) % 2 ** 63
        generator = torch.Generator().manual_seed(drawn)
        parts.append(mask2former_losses.set_losses(classes[:, i], masks[:, i], label_maps[i], config,
                                                   generator))
    ce, weight, bce, dice = (torch.cat(part, 1) for part in zip(*parts))  # (L, B Q) twice, (L, masks) twice
    ce = (weight * ce).sum() * run.world / run.sum(weight.sum()).clamp(min=1e-6)
    return len(masks) * ce, len(masks) * run.mean(bce), len(masks) * run.mean(dice)


def main():
    args = parse()
    run = processes.Run(args)
    label_dir = args.label_dir or args.out / "pseudo"
    keeper = checkpoints.Keeper(run, args, "seg.pt", init=args.init, masks=label_dir)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    transform = samples.segmentation_transform(args.crop, args.min_scale, args.max_scale)
    masks_of = samples.mask_paths(label_dir, ids)
    loader = samples.loader(samples.Samples(folder, ids, transform, args.seed, masks_of), run, args)
    model = run.in_turn(lambda: build(args, folder.classes)).to(run.device)
    if run.main and model.origin:
        print(model.origin)
    config = model.network.config
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.groups(args.lr), weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.groups(args.lr), momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.iterations, power=0.9)
    network = keeper.begin(model, optimizer, schedule, loader, args.iterations)

    for images, label_maps in keeper.steps():
        label_maps = label_maps.to(run.device, non_blocking=True)                     # (B, H, W)
        with run.autocast():
            logits, classes, masks = network(images)
        ce, bce, dice = set_loss(classes, masks, label_maps, keeper.numbers, args.seed, keeper.done + 1,
                                 config, run)
        loss = config.class_weight * ce + config.mask_weight * bce + config.dice_weight * dice

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        # From the authors' code, not in the paper: (Mask2Former's) the gradient is clipped to length .01.
        keeper.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        keeper.step()
        with torch.no_grad():
            step = images.shape[-1] // logits.shape[-1]       # pixels a logit
            label, target = logits.argmax(1), label_maps[:, ::step, ::step]           # (B, h, w) each
            known = target != IGNORE
            keeper.after(loss=loss, classes=ce, masks=bce, dice=dice,
                         accuracy=run.mean((label == target).float(), known),
                         foreground=run.mean((label > 0).float(), known))
    keeper.finish(model=model, classes=folder.classes, config=model.config, origin=model.origin)


if __name__ == "__main__":
    guard.run(main)
