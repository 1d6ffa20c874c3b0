"""Pseudo masks from localisation maps: a background score, dense CRF, and 255 where the result is not sure.

Paper   SemPLeS 4.2 (CRF as in WeakTr; on COCO as in IRN), VPL "Implementation Details" (CRF as in CLIP-ES)
Reads   pictures and image labels of --data, <out>/cam/<id>.npy (make_cam.py)
Writes  <out>/pseudo/<id>.png: 8-bit palette, 0 background, 1..C, 255 ignored
        <out>/pseudo/recipe.json: the arguments, first
        <out>/pseudo.json, last: arguments, counts, share of every class

True masks are never opened. The CRF sees the present classes and the background only, in --workers processes of one thread each; each mask
is written as it is finished, so a run can be interrupted and goes on; masks of other maps or another recipe are refused, or replaced with --no-resume.

    python make_pseudo.py --data /data/VOC2012 --out runs/voc --workers 16
    python make_pseudo.py --data /data/COCO --out runs/coco --split train --threshold 0.42 --preset irn
    python make_pseudo.py --data /data/VOC2012 --out runs/vpl --background power --preset deeplab --ignore-below 0.95
"""
import argparse

import numpy as np
import torch

from wsss import common, crf, data


def parse():
    p = common.parser(__doc__)
    p.add_argument("--cam", type=common.name, default="cam", help="folder of maps in --out; those of IRN, PSA, CLIP-ES and FMA-WSSS are read too")
    p.add_argument("--pseudo", type=common.name, default="pseudo", help="folder in --out for the masks, to keep those of several sources side by side")
    p.add_argument("--background", choices=["constant", "power"], default="constant", help="background score: a constant, or (1 - max)^alpha as in CLIP-ES")
    p.add_argument("--threshold", type=float, default=0.43, help="the constant (WeakTr and SemPLeS: 0.43 VOC, 0.42 COCO); raise it if masks swallow the background")
    p.add_argument("--alpha", type=float, default=1.0, help="exponent of --background power")
    p.add_argument("--crf", action=argparse.BooleanOptionalAction, default=True, help="dense CRF; --no-crf: the best score of each pixel")
    p.add_argument("--preset", choices=list(crf.PRESETS), default="weaktr", help="weaktr: SemPLeS on VOC; irn: on COCO; deeplab: CLIP-ES and VPL")
    p.add_argument("--iterations", type=common.positive, default=10, help="mean-field iterations")
    p.add_argument("--backend", choices=["auto", "pydensecrf", "torch"], default="auto", help="auto: pydensecrf where it is installed; torch on a GPU")
    p.add_argument("--ignore-below", type=float, default=0.0, help="pixels whose best posterior is lower become 255 (CLIP-ES and VPL: 0.95)")
    args = p.parse_args()
    if not 0 <= args.threshold <= 1 or not args.alpha > 0:
        p.error("--threshold is between 0 and 1, --alpha above 0")
    if not 0 <= args.ignore_below < 1 or args.ignore_below and not args.crf:
        p.error("--ignore-below is a posterior of the CRF, in [0, 1): it goes with --crf")
    return args


def pseudo_mask(image, classes, cam, args, device="cpu"):
    """(H, W, 3) uint8, present classes (P,), their maps (P, h, w) in [0, 1] -> label map (H, W) uint8."""
    value = args.threshold if args.background == "constant" else args.alpha
    scores = data.add_background(data.resize_maps(cam, image.shape[:2]), args.background, value)        # (1 + P, H, W)
    if args.crf:
        scores = torch.from_numpy(crf.dense_crf(image, scores, args.preset, args.iterations, args.backend, device))
    best, row = scores.max(0)                                                                           # (H, W) each
    mask = np.array([0, *(k + 1 for k in classes)], dtype=np.uint8)[row]
    mask[best.numpy() < args.ignore_below] = data.IGNORE
    return mask


def make(picture, id, label, args, device="cpu"):
    """Writes the mask of one picture -> pixels of every label value (256,)."""
    image = np.array(data.load_image(picture))
    classes, cam = data.load_cam(args.out / args.cam / f"{id}.npy", label, image.shape[:2])
    mask = pseudo_mask(image, classes, cam, args, device)
    data.save_mask(args.out / args.pseudo / f"{id}.png", mask)
    return np.bincount(mask.ravel(), minlength=256)


def summary(args, folder, labels, pixels):
    """Content of pseudo.json; `pixels` (256,) of every label value. A class that is present and never predicted is a first sign of trouble."""
    maps = args.out / f"{args.cam}.json"
    maps = common.read_json(maps) if maps.exists() else {}
    share = pixels / pixels.sum()
    return {
        "maps": {k: maps[k] for k in ("source", "weights", "scales", "flip") if k in maps}, "classes": folder.classes, "pictures": len(labels),
        "background": args.background, "value": args.threshold if args.background == "constant" else args.alpha,
        "crf": args.preset if args.crf else None, "iterations": args.iterations, "ignore_below": args.ignore_below,
        "share": dict(zip(["background", *folder.classes], share.tolist())), "ignored": share[data.IGNORE].item(),
        "never_predicted": [name for k, name in enumerate(folder.classes) if labels[:, k].any() and not pixels[k + 1]],
        "args": common.plain(args), "versions": common.versions()}


def main():
    args = parse()
    env = common.Env(args)
    folder = data.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)
    where = args.out / args.pseudo
    missing = [id for id in ids if not data.cam_path(args.out / args.cam / f"{id}.npy").exists()]
    if missing:
        raise FileNotFoundError(f"{args.out / args.cam / missing[0]}.npy is missing, and {len(missing) - 1} more of {len(ids)}: run make_cam.py --split {args.split} first")
    args.inputs = common.inputs(cam=args.out / args.cam)
    common.open_folder(where, args, env, free=("split", "limit", "batch_size", "seed", "amp"), classes=folder.classes)

    mine = env.shard(range(len(ids)))
    todo = [n for n in mine if not (where / f"{ids[n]}.png").exists()]
    pixels = np.zeros(256, np.int64)
    for n in set(mine) - set(todo):
        pixels += np.bincount(data.load_mask(where / f"{ids[n]}.png", len(folder.classes)).ravel(), minlength=256)
    gpu = env.device.type == "cuda" and args.backend != "pydensecrf"       # one GPU is faster than the processes that would share it
    tasks = ((folder.picture(ids[n]), ids[n], labels[n].numpy(), args, env.device) for n in todo)
    made = common.pooled(make, tasks, 0 if gpu else args.workers, where)
    for count in env.progress(made, "pseudo masks", len(mine), len(mine) - len(todo)):
        pixels += count

    found = summary(args, folder, labels, env.sum(torch.from_numpy(pixels)).cpu().double())
    if env.main:
        common.save_json(args.out / f"{args.pseudo}.json", found)
    env.close(f"{where}: {len(ids)} masks, {100 * (1 - found['share']['background'] - found['ignored']):.1f} % foreground, "
              f"{100 * found['ignored']:.1f} % ignored; present but never predicted: {', '.join(found['never_predicted']) or 'no class'}")


if __name__ == "__main__":
    common.run(main)
