"""Train a segmentation network on the pseudo masks, or on any folder of masks.

Paper   SemPLeS Tables 2 and 3, the rows of DeepLab-v2 with ResNet-101, of Segmenter with DeiT-S (WeakTr) and of Mask2Former with Swin-L;
        VPL phase 2, Eq. 12-14 (--model clip_decoder)
Reads   pictures of --data, masks <out>/pseudo/<id>.png (make_pseudo.py) or --label-dir/<id>.png, ImageNet weights;
        clip_decoder: CLIP and <out>/prototypes.pt (vpl.py)
Writes  <out>/seg.pt, <out>/seg.last.pt (to resume), <out>/seg.jsonl

DeepLab sees a random crop at scales 1, .75 and .5; the loss is the sum of four mean cross-entropies, of the three predictions
and of their elementwise maximum. Segmenter has one prediction, and WeakTr's clamp: pixels of an unusually large loss do not train.
Mask2Former (pip install transformers scipy) predicts a set of masks with a class each: they are matched with the masks of the picture's classes,
the background's among them, at random points. clip_decoder is a decoder over the frozen CLIP, whose pixels V are compared with the vision prototypes W:
lambda_ce L_CE + lambda_RSC L_RSC, the second contrasting the region of each class in a picture with W. A pixel labelled 255 has no loss. True masks are opened only where --label-dir points at them.

    python train_seg.py --data /data/VOC2012 --out runs/voc                                                             # VOC
    torchrun --nproc_per_node 4 train_seg.py --data /data/COCO --out runs/coco --split train --iterations 100000        # COCO
    python train_seg.py --data /data/VOC2012 --out runs/truth --label-dir /data/VOC2012/SegmentationClassAug            # the upper bound
    python train_seg.py --data /data/VOC2012 --out runs/vpl --model clip_decoder                                        # VPL phase 2
    python train_seg.py --data /data/VOC2012 --out runs/weaktr --model segmenter_deit_small
    python train_seg.py --data /data/VOC2012 --out runs/m2f --model mask2former_swin_large
    python train_seg.py --data data/toy --out runs/toy --split train --model deeplab_toy --init data/toy/backbone.pt \\
        --train-batchnorm --crop 97 --min-scale 0.75 --max-scale 1.25 --batch-size 8 --iterations 240 --lr 1e-4
"""
import argparse
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from hosts import mask2former
from plumbing import checkpoints, flags, folders, guard, log as logs, masks as mask_files, processes, samples as sampling, weights as weight_files
from wsss import clip_model, gradcam, losses, segmenter

# What each paper trains its network with; a toy network takes its big sister's. VPL gives neither rate nor crop: ours, and WeCLIP's.
# 264,500 steps of 4 are WeakTr's 100 epochs of train_aug. Of scales SemPLeS says nothing; the decay of Mask2Former is that of its own paper.
# Differs from the paper: in WeakTr's code SGD's momentum is Nesterov's, and the rate ends at 1e-5, not at 0. Scales are there of pictures whose shorter
# side is 520, x .5 to 2 in training and x .5 to 1.75 at test; here they are of the picture itself, whose shorter side is about 375 in VOC: objects are 1.4 times
# smaller in both. --min-scale .7 --max-scale 2.8 here and 1.4 times its --scales in eval.py come close. Its PhotoMetricDistortion is missing, and its second
# try of a crop of which one class takes more than .75. On COCO that code has 256 epochs of batches of 16 at a rate of 1e-3; the defaults here are VOC's.
PAPERS = {
    "deeplab": {"init": "imagenet", "batch_size": 10, "iterations": 20_000, "optimizer": "sgd", "lr": 2.5e-4, "weight_decay": 5e-4, "crop": 321, "max_scale": 1.5},
    "segmenter": {"init": "imagenet", "batch_size": 4, "iterations": 264_500, "optimizer": "sgd", "lr": 1e-4, "weight_decay": 0.0, "crop": 480, "max_scale": 2.0,
                  "clamp_start": 1.2, "clamp_tile": 120},
    "mask2former": {"init": "imagenet", "batch_size": 4, "iterations": 80_000, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "crop": 512, "max_scale": 2.0},
    "clip_decoder": {"init": "none", "batch_size": 6, "iterations": 30_000, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "crop": 320, "max_scale": 1.5},
}


def papers(flag):
    return "; if not given, the paper's: " + ", ".join(f"{name} {values[flag]:,}" for name, values in PAPERS.items())


def parse():
    p = flags.parser(__doc__, batch_size=None)
    p.add_argument("--model", choices=[*segmenter.NAMES, *mask2former.NAMES], default="deeplabv2_resnet101", help="architecture")
    p.add_argument("--label-dir", type=Path, help="masks to learn instead of <out>/pseudo, one <id>.png for each picture of --split")
    p.add_argument("--init", help="weights to start from: imagenet (the default, downloaded once), none (clip_decoder's), or a file: of a backbone, or a whole seg.pt; "
                   "for Mask2Former also the name or the folder of a Swin, or of a whole Mask2Former (which has seen true masks), as transformers has them")
    p.add_argument("--train-batchnorm", action=argparse.BooleanOptionalAction,
                   help="DeepLab: BatchNorm learns too, with the statistics of all processes (on GPUs); if not given, only with --init none")
    g = p.add_argument_group("training")
    g.add_argument("--iterations", type=flags.positive, help=f"steps{papers('iterations')} (COCO: DeepLab 100,000). --batch-size{papers('batch_size')}")
    g.add_argument("--lr", type=flags.number, help="first rate, poly 0.9 to 0. DeepLab: of the backbone, x 10 for the head, x 20 for its biases; "
                   f"Segmenter and Mask2Former: a tenth of it for the backbone{papers('lr')}")
    g.add_argument("--optimizer", choices=["sgd", "adamw"], help="SGD, momentum 0.9, if not given, for Mask2Former AdamW; AdamW moves a fresh decoder in few steps")
    g.add_argument("--weight-decay", type=flags.number, help=f"decay{papers('weight_decay')}")
    g.add_argument("--crop", type=flags.positive, help="side of the random crop in pixels, for DeepLab best a multiple of its stride plus 1, "
                   f"for Segmenter a multiple of its patch, and its window at test, for Mask2Former a multiple of 32{papers('crop')}")
    g.add_argument("--min-scale", type=float, default=0.5, help="before the crop, a picture is resized by a random factor from this ...")
    g.add_argument("--max-scale", type=float, help=f"... to this{papers('max_scale')}")
    g.add_argument("--log-every", type=flags.positive, default=20, help="steps between two lines of the log")
    g.add_argument("--save-every", type=flags.positive, default=500, help="steps between two states to resume from")
    g = p.add_argument_group("Segmenter (WeakTr)")
    g.add_argument("--clamp-start", type=flags.number, help="large losses are clamped once their mean is below this, 1.2 if not given; 0: never")
    g.add_argument("--clamp-tile", type=flags.positive, help="to the mean of their tile over the batch; its side in pixels, 120 if not given")
    g = p.add_argument_group("clip_decoder (VPL phase 2)")
    g.add_argument("--clip", default="ViT-B/16", help="the frozen CLIP, that of vpl.py: OpenAI name, or a file with CLIP's weights")
    g.add_argument("--lambda-ce", type=flags.number, default=1.0, help="weight of the cross-entropy (Eq. 14)")
    g.add_argument("--lambda-rsc", type=flags.number, default=1.0, help="weight of regional semantic contrast (Eq. 14); 0: without")
    g.add_argument("--tau-rsc", type=float, default=0.07, help="temperature of Eq. 13")
    g.add_argument("--width", type=flags.positive, default=256, help="channels of the decoder, a multiple of its 8 heads")
    args = p.parse_args()
    if not args.model.startswith("segmenter") and (args.clamp_start is not None or args.clamp_tile is not None):
        p.error("--clamp-start and --clamp-tile are of Segmenter's loss")
    for name, value in next(values for kind, values in PAPERS.items() if args.model.startswith(kind)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.width % 8 or args.tau_rsc <= 0:
        p.error("--width is a multiple of 8, --tau-rsc above 0")
    if not 0 < args.min_scale <= args.max_scale:
        p.error("--min-scale is above 0 and at most --max-scale")
    unit = mask2former.Mask2Former.stride if args.model in mask2former.NAMES else segmenter.SEGMENTER.get(args.model, {"patch": 1})["patch"]
    if args.crop % unit:
        p.error(f"--crop of {args.model} is a multiple of {unit}")
    if args.train_batchnorm and not args.model.startswith("deeplab"):
        p.error(f"--train-batchnorm is DeepLab's: {args.model} has none")
    if args.train_batchnorm is None:
        args.train_batchnorm = args.init == "none" and args.model.startswith("deeplab")   # the others have none
    return args


def transform(crop, low, high):
    """Picture and mask alike: a random scale, a random crop, a flip. Where the crop leaves the picture it is mean colour without a label."""
    def scale(image, mask):
        factor = torch.empty(()).uniform_(low, high).item()
        size = [max(1, round(n * factor)) for n in image.shape[1:]]
        return v2.functional.resize(image, size, antialias=True), v2.functional.resize(mask, size)       # a mask by nearest

    fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: mask_files.IGNORE}
    return v2.Compose([scale, v2.RandomCrop(crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(),
                       v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])


def masks_in(folder, ids):
    """id -> path of its mask. All of them must be there; what they hold is checked when they are read."""
    missing = [id for id in ids if not (folder / f"{id}.png").exists()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]}.png is missing, {len(missing)} of {len(ids)} masks are: "
                                "run make_pseudo.py on this --split, or give a --label-dir that has them")
    return lambda id: folder / f"{id}.png"


def stream(loader, batches, done, total):
    """(number, batch) of the steps after number `done`, up to number `total`, over as many epochs as that takes."""
    while done < total:
        batches.start(done // len(batches), done % len(batches))
        for done, batch in enumerate(islice(loader, total - done), done + 1):
            yield done, batch


def on_grid(masks, size):
    """The labels on which the logits sit, corner to corner: as in DeepLab-v2 labels are thinned out, not logits enlarged.   (B, H, W) -> (B, h, w)"""
    rows, columns = (torch.linspace(0, n - 1, m, device=masks.device).round().long() for n, m in zip(masks.shape[1:], size))
    return masks[:, rows[:, None], columns]


def pixel_loss(logits, target, clamp=lambda ce, known: ce):
    """Mean cross-entropy, clamped or not, over the pixels of all processes that have a label.   (B, 1 + C, h, w), (B, h, w) -> scalar"""
    known = target != mask_files.IGNORE
    return processes.mean(clamp(F.cross_entropy(logits.float(), target, ignore_index=mask_files.IGNORE, reduction="none"), known), known)


def pixel_losses(logits, more, masks, clamp, contrast):
    """The losses of a network of pixels: the cross-entropies of all its `logits`, summed, and what `contrast` says to its other outputs, if it is one."""
    ce = sum(pixel_loss(z, on_grid(masks, z.shape[2:]), clamp) for z in logits)
    return {"ce": ce, "rsc": contrast(*more, masks) if contrast else 0 * ce}


def set_loss(classes, masks, label_maps, numbers, seed, step, config, env):
    """Mask2Former's three losses, sums over its L decoder layers of means over all processes.   (L, B, Q, 2 + C), (L, B, Q, h, w), (B, H, W)"""
    # Differs from the paper: it draws points for every mask and layer. Here a picture has its own, from (seed, step, picture): the same in any process.
    draw = lambda n: torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_003 + n) % 2 ** 63)
    pictures = [losses.set_losses(classes[:, i], masks[:, i], label_maps[i], config, draw(n)) for i, n in enumerate(numbers.tolist() or [0])]
    ce, weight, bce, dice = (torch.cat(part, 1) for part in zip(*pictures))     # (L, B Q) twice, (L, masks) twice
    ce = (weight * ce).sum() * env.world / env.sum(weight.sum()).clamp(min=1e-6)
    return {"classes": len(masks) * ce, "masks": len(masks) * processes.mean(bce), "dice": len(masks) * processes.mean(dice)}


def build(args, folder, env):
    """The network on its device, its BatchNorm settled."""
    init = None if args.init == "none" else args.init
    whole = None
    if init and Path(init).is_file() and "stage" in segmenter.read(init):
        whole = checkpoints.load(init, "seg", folder.classes)                        # of these classes, in this order
    if args.model in mask2former.NAMES:
        if init and Path(init).is_file():
            return mask2former.rebuild_mask2former(whole or {}, init, args.model).to(env.device)
        model = mask2former.build_mask2former(args.model, len(folder.classes), init, weight_files.from_hub).to(env.device)
        if env.main and model.origin:
            print(model.origin)
        return model
    if args.model != "clip_decoder":
        model = segmenter.build_segmenter(args.model, len(folder.classes), init).to(env.device)
        if args.model.startswith("deeplab") and not args.train_batchnorm:
            model.rest_batchnorm()
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if env.world > 1 and args.train_batchnorm else model
    clip = clip_model.load_clip(args.clip, env.device)
    visual = clip.model.visual
    if not hasattr(visual, "transformer"):
        raise ValueError(f"--clip {args.clip} is no vision transformer: clip_decoder reads its blocks")
    model = segmenter.build_decoder(lambda images: gradcam.block_outputs(clip, images), visual.conv1.out_channels, len(visual.transformer.resblocks) - 1,
                                    checkpoints.load_prototypes(args, folder, clip), args.width)
    if init:
        here = model.prototypes.clone()
        checkpoints.load_weights(model, checkpoints.load(init, "seg", folder.classes)["model"], init)
        if not torch.equal(here, model.prototypes):
            raise ValueError(f"{init} was trained with other prototypes than {args.out / 'prototypes.pt'}: put its own there")
    model.clip = clip.fingerprint()
    return model.to(env.device)


def region_loss(coarse, v, masks, prototypes, tau, env, batch_size):
    """VPL Eq. 12, 13 over the whole batch, of all processes: A is the softmax of the grid's logits, an image's classes are those of its mask."""
    C = coarse.shape[1] - 1
    regions = losses.region_embeddings(v, coarse.softmax(1)[:, 1:])             # (B, C, D)
    present = regions.new_zeros(len(masks), 256).scatter_(1, masks.flatten(1), 1)[:, 1:C + 1]
    regions, present = (env.gather(rows, batch_size) for rows in (regions, present))
    return losses.region_contrast(regions, prototypes[:C], present, tau)


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "seg.pt", args.out / "seg.last.pt"
    label_dir = args.label_dir or args.out / "pseudo"
    decoder = {"clip": args.clip, "prototypes": args.out / "prototypes.pt"} if args.model == "clip_decoder" else {}
    sets = args.model in mask2former.NAMES
    folder_of_weights = sets and Path(args.init).is_dir()                       # as transformers keeps them
    args.inputs = checkpoints.inputs(init=Path(args.init) if folder_of_weights else args.init, masks=label_dir, **decoder)
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    if args.train_batchnorm and env.world > 1 and env.device.type == "cpu":
        raise ValueError("BatchNorm learns over several processes on GPUs only: take one process, or --no-train-batchnorm and an --init")
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    if args.train_batchnorm and env.world > min(args.batch_size, len(ids)):
        raise ValueError(f"{env.world} processes share batches of {min(args.batch_size, len(ids))}: where BatchNorm learns each needs a picture, "
                         "so take fewer processes or a larger --batch-size")
    mask_path = masks_in(label_dir, ids)

    model = env.in_turn(lambda: build(args, folder, env))
    groups, decay = model.groups(args.lr), args.weight_decay
    optimizer = torch.optim.AdamW(groups, weight_decay=decay) if args.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)
    schedule, scaler = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.iterations, power=0.9), env.scaler()
    samples = sampling.Samples(folder, ids, transform(args.crop, args.min_scale, args.max_scale), args.seed, mask_path)
    loader, batches = sampling.loader(samples, args.batch_size, env, args.workers)
    _, begin = checkpoints.load_state(last, model, optimizer, schedule, scaler, args)
    network = env.parallel(model.train())
    clamp = (lambda ce, known: losses.clamp_losses(ce, known, args.clamp_start, args.clamp_tile, env.sum)) if args.clamp_start else lambda ce, known: ce
    contrast = ((lambda coarse, v, masks: region_loss(coarse, v, masks, model.prototypes, args.tau_rsc, env, batches.batch_size))
                if decoder and args.lambda_rsc else None)
    config = model.network.config if sets else None
    weights = ({"classes": config.class_weight, "masks": config.mask_weight, "dice": config.dice_weight} if sets else
               {"ce": args.lambda_ce, "rsc": args.lambda_rsc})                  # VPL Eq. 14; DeepLab and Segmenter have the first term only
    dense = 4 if args.model.startswith("deeplab") else 1                        # how many of a network's outputs are logits of the labels
    log, meter = logs.Log(args.out / "seg.jsonl", args, env, begin), logs.Meter(env)

    for step, (images, masks, numbers) in env.progress(stream(loader, batches, begin, args.iterations), "seg", args.iterations, begin):
        images, masks = images.to(env.device, non_blocking=True), masks.to(env.device, non_blocking=True)
        with env.autocast():
            predictions = network(images)
        logits, more = predictions[:dense], predictions[dense:]                 # (B, 1 + C, h, w) each
        parts = set_loss(*more, masks, numbers, args.seed, step, config, env) if sets else pixel_losses(logits, more, masks, clamp, contrast)
        loss = sum(weights[name] * part for name, part in parts.items())
        lr = optimizer.param_groups[0]["lr"]
        scaler.scale(loss).backward()
        if sets:                                                                # From the authors' code, not in the paper: (Mask2Former's)
            scaler.unscale_(optimizer), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True), schedule.step()

        with torch.no_grad():
            label, target = logits[-1].argmax(1), on_grid(masks, logits[-1].shape[2:])            # (B, h, w) each
            scored = target != mask_files.IGNORE
            meter.add(numbers, loss=loss, **parts, accuracy=processes.mean((label == target).float(), scored),
                      foreground=processes.mean((label > 0).float(), scored), scored=processes.mean(scored[:len(numbers)].float()))
        save = env.stopping() or step == args.iterations or step % args.save_every == 0
        if save or step % args.log_every == 0:
            log(step, lr=lr, **meter.read(ids))
        if save:
            checkpoints.save_state(last, model, optimizer, schedule, scaler, 0, step, args)

    if env.main:
        checkpoints.save(out, stage="seg", model=model.state_dict(), classes=folder.classes, args=flags.plain(args), clip=getattr(model, "clip", None),
                    config=getattr(model, "config", None), origin=getattr(model, "origin", None))
    env.close(f"{out} is finished")


if __name__ == "__main__":
    guard.run(main)
