"""Pseudo masks from localisation maps: a background score, then dense CRF or the vote of segments.

Paper   SemPLeS 4.3, Table 4; VPL "Implementation Details"; CRF as in WeakTr (VOC), IRN (COCO), CLIP-ES (VPL)
Reads   images and image labels of --data, <out>/cam/<id>.npy (make_cam.py), --segments
Writes  <out>/pseudo/<id>.png: 8-bit palette, 0 background, 1..C, 255 ignored (unsure)
        <out>/pseudo/recipe.json: the arguments, first
        <out>/pseudo.json, last: arguments, counts, share of every class

True masks are never opened. The CRF sees the present classes and the background only, in --workers processes
of one thread each. A mask is written as it is finished: a run can be interrupted and goes on. Masks of other
maps or another recipe are refused, or replaced with --no-resume.

--segments DIR: segments without classes give the outlines, as <id>.npz of hosts/make_segments.py, <id>.png of
segment numbers, <id>/*.png (SAM's amg.py) or <id>.pkl (FMA-WSSS). --vote says how a segment finds its class:

    sams    FMA-WSSS: the class, or the background (1 - max)^power, of the best mean map over the segment;
            with --crf of the best mean posterior
    sepl    SEPL, over the masks as they are without segments: a segment of which a class covers more than
            half, or that holds .85 of a class, becomes that class

An image without any segment is masked as without --segments, and counted.

    python make_pseudo.py --data /data/VOC2012 --out runs/voc --workers 16
    python make_pseudo.py --data /data/COCO --out runs/coco --split train --threshold 0.42 --preset irn
    python make_pseudo.py --data /data/VOC2012 --out runs/vpl --background power --preset deeplab \\
        --ignore-below 0.95
    python make_pseudo.py --data /data/VOC2012 --out runs/voc --segments runs/voc/segments --pseudo pseudo_sam
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from plumbing import checkpoints, files, flags, folders, guard, log, processes, segments
from plumbing.images import load_image
from plumbing.maps import add_background, cam_path, load_cam, resize_maps
from plumbing.masks import IGNORE, load_mask, save_mask
from wsss import crf, votes

FREE = ("split", "limit", "batch_size", "seed", "amp", "segments")  # do not change a mask


def parse():
    p = flags.parser(__doc__)
    g = p.add_argument_group("masks")
    g.add_argument("--cam", type=flags.name, default="cam",
                   help="folder of maps in --out; those of IRN, PSA, CLIP-ES and FMA-WSSS are read too")
    g.add_argument("--pseudo", type=flags.name, default="pseudo", help="folder in --out for the masks")
    g.add_argument("--background", choices=["constant", "power"], default="constant",
                   help="background score: a constant, or (1 - max)^alpha as in CLIP-ES")
    g.add_argument("--threshold", type=flags.share, default=0.43,
                   help="the constant (VOC: 0.43, COCO: 0.42); raise it if masks swallow the background")
    g.add_argument("--alpha", type=flags.above_zero, default=1.0, help="exponent of --background power")
    g.add_argument("--crf", action=argparse.BooleanOptionalAction,
                   help="dense CRF; --no-crf: the best score (default: --crf, but not with --vote sams)")
    g.add_argument("--preset", choices=list(crf.PRESETS), default="weaktr",
                   help="weaktr: SemPLeS on VOC; irn: on COCO; deeplab: CLIP-ES and VPL")
    g.add_argument("--iterations", type=flags.positive, default=10, help="mean-field iterations")
    g.add_argument("--backend", choices=["auto", "pydensecrf", "torch"], default="auto",
                   help="auto: pydensecrf where it is installed; torch on a GPU")
    g.add_argument("--ignore-below", type=flags.share, default=0.0,
                   help="pixels whose best posterior is lower become 255 (CLIP-ES and VPL: 0.95)")
    g.add_argument("--segments", type=Path, help="folder of segments that vote for a class each (see above)")
    g.add_argument("--vote", choices=["sams", "sepl"], default="sams",
                   help="with --segments: FMA-WSSS's or SEPL's")
    g.add_argument("--power", type=flags.above_zero, default=0.7,
                   help="exponent of the segments' background score in --vote sams (FMA-WSSS: 0.7 for "
                        "its final VOC seeds, 0.6 for coarse ones, 1 on COCO); raise it if masks are "
                        "too large")
    args = p.parse_args()
    args.vote = args.vote if args.segments else None
    args.crf = args.vote != "sams" if args.crf is None else args.crf
    if args.ignore_below and (args.vote == "sams" or not args.crf):
        p.error("--ignore-below is a posterior of the CRF: it goes with --crf, and not with --vote sams")
    return args


def make_mask(image, classes, cam, found, args, device="cpu"):
    """(H, W, 3) uint8, present classes (P,), maps (P, h, w) in [0, 1], segments -> labels (H, W) uint8"""
    value = args.threshold if args.background == "constant" else args.alpha
    maps = resize_maps(cam, image.shape[:2])                                          # (P, H, W)
    scores = add_background(maps, args.background, value)                             # (1 + P, H, W)
    if args.crf:
        scores = crf.dense_crf(image, scores, args.preset, args.iterations, args.backend, device)
        scores = torch.from_numpy(scores)
    labels = np.array([0, *(k + 1 for k in classes)], dtype=np.uint8)
    if found and args.vote == "sams":
        return labels[votes.fma_votes(found, scores[1:].numpy(), args.power)]
    best, row = scores.max(0)                                                         # (H, W) each
    mask = labels[row.numpy()]
    mask[best.numpy() < args.ignore_below] = IGNORE
    return votes.sepl_votes(found, mask) if found else mask


def load_segments(id, args, size):
    if not args.segments:
        return []
    return segments.load_segments(segments.segments_path(args.segments, id), size)


def write_mask(image_path, id, label, args, device="cpu"):
    """Writes the mask of one image -> count(its mask, its segments)."""
    image = np.array(load_image(image_path))
    classes, cam = load_cam(args.out / args.cam / f"{id}.npy", label, image.shape[:2])
    found = load_segments(id, args, image.shape[:2])
    mask = make_mask(image, classes, cam, found, args, device)
    save_mask(args.out / args.pseudo / f"{id}.png", mask)
    return count(mask, found)


def count(mask, found):
    """(257,): pixels of every label value, and 1 if the image has no segment."""
    return np.append(np.bincount(mask.ravel(), minlength=256), not found)


def summary(args, folder, labels, pixels, bare):
    """Content of pseudo.json; `pixels` (256,) of every label value, `bare` images without segments."""
    note = args.out / f"{args.cam}.json"
    maps = files.read_json(note) if note.exists() else {}
    share = (pixels / pixels.sum()).tolist()
    value = args.threshold if args.background == "constant" else args.alpha
    found = {
        "maps": {k: maps[k] for k in ("source", "weights", "scales", "flip") if k in maps},
        "classes": folder.classes, "images": len(labels), "background": args.background, "value": value,
        "crf": args.preset if args.crf else None, "iterations": args.iterations,
        "ignore_below": args.ignore_below,
        "share": dict(zip(["background", *folder.classes], share)), "ignored": share[IGNORE],
        "never_predicted": [name for k, name in enumerate(folder.classes)
                            if labels[:, k].any() and not pixels[k + 1]]}
    if args.segments:
        note = args.segments / "recipe.json"                  # hosts/make_segments.py's
        recipe = files.read_json(note) if note.exists() else {}
        source = {"folder": str(args.segments), "source": recipe.get("args", {}).get("source"),
                  "weights": recipe.get("weights")}
        found |= {"segments": source, "vote": args.vote, "without_segments": bare}
    if args.vote == "sams":                                   # "pixels": where no segment is, and for the CRF
        found |= {"pixels": {"background": args.background, "value": value}, "background": "power",
                  "value": args.power}
    return {**found, "args": flags.plain(args), "versions": log.versions()}


def refuse_missing(ids, there, what, script, args):
    missing = [id for id in ids if not there(id)]
    if missing:
        raise FileNotFoundError(f"{what} of {missing[0]} are missing, and of {len(missing) - 1} more of "
                                f"{len(ids)} images: run {script} --split {args.split} first")


def main():
    args = parse()
    run = processes.Run(args)
    where, cams = args.out / args.pseudo, args.out / args.cam
    guard.claim(where)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)                                                       # (n, C)
    refuse_missing(ids, lambda id: cam_path(cams / f"{id}.npy").exists(), f"{cams}: maps", "make_cam.py",
                   args)
    args.inputs = {"cam": files.fingerprint(cams)}
    if args.segments:
        refuse_missing(ids, lambda id: segments.segments_path(args.segments, id),
                       f"{args.segments}: segments", "python -m hosts.make_segments", args)
        args.inputs["segments"] = files.fingerprint(args.segments)
    checkpoints.open_folder(where, args, run, free=FREE, classes=folder.classes)

    mine = run.shard(range(len(ids)))
    todo = [n for n in mine if not (where / f"{ids[n]}.png").exists()]
    counts = np.zeros(257, np.int64)
    for n in set(mine) - set(todo):
        mask = load_mask(where / f"{ids[n]}.png", len(folder.classes))
        counts += count(mask, load_segments(ids[n], args, mask.shape))
    gpu = run.device.type == "cuda" and args.backend != "pydensecrf"                  # faster than the pool
    tasks = ((folder.image_path(ids[n]), ids[n], labels[n].numpy(), args, run.device) for n in todo)
    made = processes.pooled(write_mask, tasks, 0 if gpu else args.workers, where)
    for each in run.progress(made, "pseudo masks", len(mine), len(mine) - len(todo)):
        counts += each

    *pixels, bare = run.sum(torch.from_numpy(counts)).tolist()
    found = summary(args, folder, labels, torch.tensor(pixels).double(), bare)
    if run.main:
        files.save_json(args.out / f"{args.pseudo}.json", found)
    foreground = 1 - found["share"]["background"] - found["ignored"]
    never = ", ".join(found["never_predicted"]) or "none"
    run.close(f"{where}: {len(ids)} masks, {100 * foreground:.1f} % foreground, {100 * found['ignored']:.1f} "
              f"% ignored; present but never predicted: {never}"
              + (f"; {bare} without segments, masked as without --segments" if args.segments else ""))


if __name__ == "__main__":
    guard.run(main)
