"""Train a segmentation network on the pseudo masks, or on any folder of masks.

Paper   SemPLeS Table 2: DeepLab-v2 with ResNet-101; Table 4: Segmenter with DeiT-S (WeakTr's network);
        VPL phase 2, Eq. 12-14 (--model clip_decoder)
Reads   images of --data, masks <out>/pseudo/<id>.png (make_pseudo.py) or --label-dir/<id>.png, ImageNet
        weights; clip_decoder: CLIP and <out>/prototypes.pt (vpl.py)
Writes  <out>/seg.pt, <out>/seg.last.pt (to resume), <out>/seg.jsonl

DeepLab sees a random crop at scales 1, .75 and .5; its loss is the sum of four mean cross-entropies, of the
three predictions and of their elementwise maximum. Segmenter has one prediction, and WeakTr's clamp: pixels
of an unusually large loss do not train. clip_decoder is a decoder over the frozen CLIP, whose pixels V are
compared with the vision prototypes W; its loss is L_CE + lambda_RSC L_RSC, the second contrasting the region
of each class in an image with W. A pixel labelled 255 has no loss. True masks are opened only where
--label-dir points at them.

    python train_seg.py --data /data/VOC2012 --out runs/voc
    torchrun --nproc_per_node 4 train_seg.py --data /data/COCO --out runs/coco --split train \\
        --iterations 100000
    python train_seg.py --data /data/VOC2012 --out runs/truth --label-dir /data/VOC2012/SegmentationClassAug
    python train_seg.py --data /data/VOC2012 --out runs/vpl --model clip_decoder
    python train_seg.py --data /data/VOC2012 --out runs/weaktr --model segmenter_deit_small
    python train_seg.py --data /data/VOC2012 --out runs/coco_start --model deeplabv2_resnet101_caffe \\
        --init deeplabv1_resnet101-coco.pth       # a start that has seen COCO's masks: another experiment
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from plumbing.masks import IGNORE
from wsss import losses, texts

# What each network is trained with; a toy network takes the settings of its full-size kind.
# Not in the paper: rate and crop of VPL's decoder, which are WeCLIP's here.
# Differs from the paper: it says SGD, with which the toy's decoder stays at "all background".
RECIPES = {
    "deeplab": {"init": "imagenet", "batch_size": 10, "iterations": 20_000, "optimizer": "sgd", "lr": 2.5e-4,
                "weight_decay": 5e-4, "crop": 321, "max_scale": 1.5},
    "segmenter": {"init": "imagenet", "batch_size": 4, "iterations": 264_500, "optimizer": "sgd", "lr": 1e-4,
                  "weight_decay": 0.0, "crop": 480, "max_scale": 2.0},
    "clip_decoder": {"init": "none", "batch_size": 6, "iterations": 30_000, "optimizer": "adamw", "lr": 2e-3,
                     "weight_decay": 1e-4, "crop": 320, "max_scale": 1.5},
}
TAU_RSC = 0.07                                    # tau of VPL's Eq. 13, which gives no value


def recipe_of(flag):
    return "if not given: " + ", ".join(f"{name} {of[flag]:,}" for name, of in RECIPES.items())


def parse():
    p = flags.parser(__doc__, batch_size=None)
    g = p.add_argument_group("network and training")
    g.add_argument("--model", choices=[*networks.SEGMENTERS, "clip_decoder"], default="deeplabv2_resnet101")
    g.add_argument("--label-dir", type=Path, help="masks to learn instead of <out>/pseudo, <id>.png each")
    g.add_argument("--init", help="start: imagenet (the default, downloaded once), none (clip_decoder's), or "
                   "a file: of a backbone, or a whole seg.pt")
    g.add_argument("--train-batchnorm", action="store_true",
                   help="DeepLab: BatchNorm learns too, with the statistics of all processes (on GPUs); "
                        "always so with --init none")
    g.add_argument("--iterations", type=flags.positive, help=f"steps; {recipe_of('iterations')}")
    g.add_argument("--optimizer", choices=["sgd", "adamw"], help="SGD, momentum 0.9, or AdamW; "
                   "if not given SGD, for clip_decoder AdamW")
    g.add_argument("--lr", type=flags.number, help="first rate, poly 0.9 to 0. DeepLab: of the backbone, x "
                   "10 for the head, x 20 for its biases; Segmenter: a tenth of it for the encoder; "
                   f"{recipe_of('lr')}")
    g.add_argument("--weight-decay", type=flags.number, help=recipe_of("weight_decay"))
    g.add_argument("--crop", type=flags.positive, help="side of the random crop, for DeepLab best a multiple "
                   "of its stride plus 1, for Segmenter of its patch, and its window at test; "
                   f"{recipe_of('crop')}")
    flags.max_side(g)
    g.add_argument("--min-scale", type=flags.above_zero, default=0.5,
                   help="before the crop, an image is resized by a random factor from this ...")
    g.add_argument("--max-scale", type=flags.above_zero, help=f"... to this; {recipe_of('max_scale')}")
    g.add_argument("--clamp-start", type=flags.number, default=1.2,
                   help="Segmenter: large losses are clamped once their mean is below this; 0: never")
    g = p.add_argument_group("VPL phase 2 (clip_decoder)")
    flags.clip(g, "ViT-B/16")
    g.add_argument("--lambda-rsc", type=flags.number, default=1.0,
                   help="weight of L_RSC (Eq. 14); 0: without")
    g.add_argument("--logits", choices=["raw", "cosine"], default="raw",
                   help="W^T V, as Eq. 12-14 write it, or cos(V, W) / tau_I")
    g.add_argument("--width", type=flags.positive, default=256, help="channels, a multiple of its 8 heads")
    flags.training(p)
    args = p.parse_args()
    for name, value in next(of for kind, of in RECIPES.items() if args.model.startswith(kind)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.min_scale > args.max_scale:
        p.error("--min-scale is at most --max-scale")
    if not args.model.startswith("deeplab") and args.train_batchnorm:
        p.error(f"--train-batchnorm is DeepLab's: {args.model} has none")
    args.train_batchnorm |= args.model.startswith("deeplab") and args.init == "none"
    return args


def build(args, folder, run):
    """The network on its device, its BatchNorm settled; what else seg.pt is to hold."""
    if args.model == "clip_decoder":
        clip = networks.load_clip(args.clip, run, vit=True, gelu=args.clip_gelu)
        backgrounds = folder.backgrounds or texts.backgrounds(folder.classes)
        prototypes = networks.load_prototypes(args.out / "prototypes.pt", folder, backgrounds, clip)
        model = networks.new_decoder(clip, prototypes, args.width, args.logits)
        if args.init != "none":
            start = checkpoints.load(args.init, "seg", folder.classes)["model"]
            start = {**start, "prototypes": model.prototypes, "tau": model.tau}
            checkpoints.load_weights(model, start, args.init)
        return model.to(run.device), {"clip": clip.fingerprint()}
    classes = folder.classes
    model = run.in_turn(lambda: networks.new_segmenter(args.model, len(classes), args.init, classes))
    model = model.to(run.device)
    if args.model.startswith("deeplab") and not args.train_batchnorm:
        model.freeze_batchnorm()
    if args.train_batchnorm and run.world > 1:
        if run.device.type == "cpu":
            raise ValueError("BatchNorm learns over several processes on GPUs only: take one process, "
                             "or leave --train-batchnorm out")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, {}


def labels_on_grid(masks, size):
    """The labels on which the logits sit, corner to corner.   (B, H, W) -> (B, h, w)

    As in DeepLab-v2, labels are thinned out, logits are not enlarged."""
    rows, columns = (torch.linspace(0, n - 1, m, device=masks.device).round().long()
                     for n, m in zip(masks.shape[1:], size))
    return masks[:, rows[:, None], columns]


def pixel_loss(logits, target, run, clamp_start=0):
    """Mean cross-entropy, clamped or not, over labelled pixels.   (B, 1 + C, h, w), (B, h, w) -> scalar"""
    known = target != IGNORE
    ce = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    if clamp_start:
        ce = losses.clamp_losses(ce, known, clamp_start, total=run.sum)               # WeakTr
    return run.mean(ce, known)


def present_classes(masks, C):
    """Which classes the label maps hold.   (B, H, W) -> (B, C) float"""
    return torch.zeros(len(masks), 256, device=masks.device).scatter_(1, masks.flatten(1), 1)[:, 1:C + 1]


def main():
    args = parse()
    run = processes.Run(args)
    label_dir = args.label_dir or args.out / "pseudo"
    decoder = args.model == "clip_decoder"
    more = {"clip": args.clip, "prototypes": args.out / "prototypes.pt"} if decoder else {}
    keeper = checkpoints.Keeper(run, args, "seg.pt", init=args.init, masks=label_dir, **more)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids, C = folder.ids(args.split, args.limit), len(folder.classes)
    masks_of = samples.mask_paths(label_dir, ids)
    network, facts = build(args, folder, run)
    if decoder:
        W = network.prototypes[:C]                                                    # (C, D)

    augment = samples.segmentation_transform(args.crop, args.min_scale, args.max_scale)
    dataset = samples.Samples(folder, ids, augment, args.seed, masks_of, args.max_side)
    loader = samples.loader(dataset, run, args)
    groups, decay = network.groups(args.lr), args.weight_decay
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.iterations, power=0.9)
    clamp_start = args.clamp_start if args.model.startswith("segmenter") else 0
    network = keeper.begin(network, optimizer, schedule, loader, args.iterations)

    for images, masks in keeper.steps():
        masks = masks.to(run.device, non_blocking=True)                               # (B, H, W)
        with run.autocast():
            predictions = network(images)
        outputs = predictions[:1] if decoder else predictions                         # (B, 1 + C, h, w) each
        targets = [labels_on_grid(masks, z.shape[2:]) for z in outputs]
        loss = ce = sum(pixel_loss(z, target, run, clamp_start) for z, target in zip(outputs, targets))
        rsc = torch.zeros_like(ce)
        if decoder and args.lambda_rsc:
            _, coarse, V = predictions                                                # the grid's logits, V
            # Differs from the paper: A is the softmax, not W^T V: a mean needs weights that are not negative.
            A = coarse.softmax(1)[:, 1:]                                              # (B, C, h, w)
            P = losses.region_embeddings(V, A)                                        # Eq. 12: (B, C, D)
            # Differs from the paper: present is what the masks of the crops hold, not the image labels.
            B = loader.batch_sampler.batch_size
            present = run.gather(present_classes(masks, C), B)                        # of all processes
            P = run.gather(P, B)
            rsc = losses.region_contrast(P, W, present, TAU_RSC)                      # Eq. 13
            loss = ce + args.lambda_rsc * rsc                                         # Eq. 14

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        with torch.no_grad():
            label, target = outputs[-1].argmax(1), targets[-1]                        # (B, h, w) each
            known = target != IGNORE
            own = known[:len(keeper.numbers)]                 # not the blank image that fills an empty share
            keeper.after(loss=loss, ce=ce, rsc=rsc, accuracy=run.mean((label == target).float(), known),
                         foreground=run.mean((label > 0).float(), known),
                         scored=run.mean(own.float()))                      # share with a label
    keeper.finish(model=network, classes=folder.classes, **facts)


if __name__ == "__main__":
    guard.run(main)
