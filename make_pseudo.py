"""Pseudo masks from localisation maps: a background score, dense CRF or the vote of segments, and 255 where the result is not sure.

Paper   SemPLeS 4.2 (CRF as in WeakTr; on COCO as in IRN) and Table 4 (seeds as in FMA-WSSS), VPL "Implementation Details" (CRF as in CLIP-ES)
Reads   pictures and image labels of --data, <out>/cam/<id>.npy (make_cam.py), --segments
Writes  <out>/pseudo/<id>.png: 8-bit palette, 0 background, 1..C, 255 ignored
        <out>/pseudo/recipe.json: the arguments, first
        <out>/pseudo.json, last: arguments, counts, share of every class

True masks are never opened. The CRF sees the present classes and the background only, in --workers processes of one thread each; each mask
is written as it is finished, so a run can be interrupted and goes on; masks of other maps or another recipe are refused, or replaced with --no-resume.

--segments DIR takes the outlines from segments without classes: <id>.npz of make_segments.py; <id>.png, a map of segment numbers of 8 or 16 bits, 0 a
number like any other; <id>/*.png, a black and white mask each (SAM's amg.py); <id>.pkl of FMA-WSSS (nothing in it is run). Levels are those of .npz and .pkl,
0 elsewhere. --vote says how a segment finds its class:
sams    FMA-WSSS: the class, or the background (1 - max)^power, with the best mean of its map over the segment, scaled over the picture's segments to
        [0, 1]; painted over each other by level, then by that score; what is in no segment is background. No CRF unless --crf.
        --background, --threshold and --alpha then count only for that CRF, and for a picture without segments.
sepl    SEPL: the masks as they are without segments; a segment of which a class covers more than half, or that holds .85 of a class, becomes that class.
The CRF comes first: sams takes its posterior for the maps, sepl votes over its masks. The order of the segments changes nothing: what is equal by the
rule is painted by size, the smaller on top, then by place. A picture that has no segment at all keeps its mask without segments, and is counted.

    python make_pseudo.py --data /data/VOC2012 --out runs/voc --workers 16
    python make_pseudo.py --data /data/COCO --out runs/coco --split train --threshold 0.42 --preset irn
    python make_pseudo.py --data /data/VOC2012 --out runs/vpl --background power --preset deeplab --ignore-below 0.95
    python make_pseudo.py --data /data/VOC2012 --out runs/voc --segments runs/voc/segments --pseudo pseudo_sam
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from hosts import segments
from plumbing import checkpoints, files, flags, folders, foreign, guard, images, log, maps as map_files, masks, processes
from wsss import crf


def parse():
    p = flags.parser(__doc__)
    p.add_argument("--cam", type=flags.name, default="cam", help="folder of maps in --out; those of IRN, PSA, CLIP-ES and FMA-WSSS are read too")
    p.add_argument("--pseudo", type=flags.name, default="pseudo", help="folder in --out for the masks, to keep those of several sources side by side")
    p.add_argument("--background", choices=["constant", "power"], default="constant", help="background score: a constant, or (1 - max)^alpha as in CLIP-ES")
    p.add_argument("--threshold", type=float, default=0.43, help="the constant (WeakTr and SemPLeS: 0.43 VOC, 0.42 COCO); raise it if masks swallow the background")
    p.add_argument("--alpha", type=float, default=1.0, help="exponent of --background power")
    p.add_argument("--segments", type=Path, help="folder of segments that vote for a class each: make_segments.py's, or another's (see above)")
    p.add_argument("--vote", choices=["sams", "sepl"], help="with --segments: FMA-WSSS's seeds or SEPL's vote (default: sams)")
    p.add_argument("--power", type=flags.above_zero, help="exponent of the segments' background score in --vote sams; raise it if masks are too large (default: 0.6)")
    p.add_argument("--crf", action=argparse.BooleanOptionalAction, help="dense CRF; --no-crf: the best score of each pixel (default: --crf, but not in --vote sams)")
    p.add_argument("--preset", choices=list(crf.PRESETS), default="weaktr", help="weaktr: SemPLeS on VOC; irn: on COCO; deeplab: CLIP-ES and VPL")
    p.add_argument("--iterations", type=flags.positive, default=10, help="mean-field iterations")
    p.add_argument("--backend", choices=["auto", "pydensecrf", "torch"], default="auto", help="auto: pydensecrf where it is installed; torch on a GPU")
    p.add_argument("--ignore-below", type=float, default=0.0, help="pixels whose best posterior is lower become 255 (CLIP-ES and VPL: 0.95)")
    args = p.parse_args()
    if not args.segments and (args.vote or args.power):
        p.error("--vote and --power go with --segments")
    if args.segments:
        args.vote = args.vote or "sams"
        args.power = args.power or 0.6 if args.vote == "sams" else args.power
    args.crf = args.vote != "sams" if args.crf is None else args.crf
    if args.vote == "sepl" and args.power or args.vote == "sams" and args.ignore_below:
        p.error("--power goes with --vote sams, --ignore-below with --vote sepl")
    if not 0 <= args.threshold <= 1 or not args.alpha > 0:
        p.error("--threshold is between 0 and 1, --alpha above 0")
    if not 0 <= args.ignore_below < 1 or args.ignore_below and not args.crf:
        p.error("--ignore-below is a posterior of the CRF, in [0, 1): it goes with --crf")
    return args


# ---------------------------------------------------------------- the vote of segments

def paint(segments, rows, order, canvas):
    """Writes rows[i] over the pixels of segment i, in ascending order[i]; what is equal there by size, larger first, then by place and row, never by position."""
    last = [(-int(s.mask.sum()), s.box, int(row)) for s, row in zip(segments, rows)]
    for i in sorted(range(len(segments)), key=lambda i: (order[i], last[i])):
        canvas[segments[i].where][segments[i].mask] = rows[i]
    return canvas


def sams(segments, maps, power):
    """FMA-WSSS's seeds.  S segments, maps (P, H, W) -> (H, W): 0 background, 1 + p for row p of the maps

    A segment's score for a class is the mean of relu(map) over its pixels, min-max scaled over the segments; its background's is (1 - max)^power.
    Where all means are equal, as those of a single segment, there is nothing to scale by: the mean itself is the score."""
    canvas = np.zeros(maps.shape[1:], np.uint8)
    if not len(maps):
        return canvas
    maps = maps.clip(min=0)
    means = np.array([maps[(slice(None), *s.where)][:, s.mask].mean(1, dtype=np.float64) for s in segments])           # (S, P)
    low, high = means.min(0), means.max(0)
    # Differs from the paper: its division makes such a picture all background, or scales the rounding of a flat map to [0, 1].
    scores = np.divide(means - low, high - low, out=means.copy(), where=np.broadcast_to(high - low >= 1e-6, means.shape))
    scores = np.concatenate([(1 - scores.max(1, keepdims=True)).clip(min=0) ** power, scores], 1)                      # (S, 1 + P)
    return paint(segments, scores.argmax(1), [(s.level, best) for s, best in zip(segments, scores.max(1))], canvas)


def sepl(segments, mask, half=0.5, most=0.85):
    """SEPL's vote over a label map (H, W): a segment becomes the class that covers more than `half` of it, or `most` of which it holds.

    Of several such classes it takes the one that covers most of it, of equal ones the first. Segments over each other are painted by that share."""
    total = np.bincount(mask.ravel(), minlength=256)
    total[[0, masks.IGNORE]] = 0                                            # neither is a class
    chosen, labels, shares = [], [], []
    for s in segments:
        inside = np.bincount(mask[s.where][s.mask], minlength=256)         # (256,) pixels of every label
        area = inside.sum()
        votes = np.where((total > 0) & ((inside > half * area) | (inside >= most * total)), inside, 0)
        if votes.any():
            chosen.append(s), labels.append(votes.argmax()), shares.append(votes.max() / area)
    return paint(chosen, labels, shares, mask.copy())


# ---------------------------------------------------------------- masks

def pseudo_mask(image, classes, cam, segments, args, device="cpu"):
    """(H, W, 3) uint8, present classes (P,), their maps (P, h, w) in [0, 1], segments or none -> label map (H, W) uint8."""
    value = args.threshold if args.background == "constant" else args.alpha
    scores = map_files.add_background(map_files.resize_maps(cam, image.shape[:2]), args.background, value)        # (1 + P, H, W)
    if args.crf:
        scores = torch.from_numpy(crf.dense_crf(image, scores, args.preset, args.iterations, args.backend, device))
    labels = np.array([0, *(k + 1 for k in classes)], dtype=np.uint8)
    if segments and args.vote == "sams":
        return labels[sams(segments, scores[1:].numpy(), args.power)]
    best, row = scores.max(0)                                                                           # (H, W) each
    mask = labels[row.numpy()]                                                                          # a tensor of one pixel would be taken for a number
    mask[best.numpy() < args.ignore_below] = masks.IGNORE
    return sepl(segments, mask) if segments else mask


def load_segments(id, args, size):
    return segments.load_segments(segments.segments_of(args.segments, id), size, foreign.FmaReader) if args.segments else []


def make(picture, id, label, args, device="cpu"):
    """Writes the mask of one picture -> count(its mask, its segments)."""
    image = np.array(images.load_image(picture))
    classes, cam = map_files.load_cam(args.out / args.cam / f"{id}.npy", label, image.shape[:2])
    segments = load_segments(id, args, image.shape[:2])
    mask = pseudo_mask(image, classes, cam, segments, args, device)
    masks.save_mask(args.out / args.pseudo / f"{id}.png", mask)
    return count(mask, segments)


def count(mask, segments):
    """(257,): pixels of every label value, and 1 if the picture has no segment."""
    return np.append(np.bincount(mask.ravel(), minlength=256), not segments)


def summary(args, folder, labels, pixels, bare):
    """Content of pseudo.json; `pixels` (256,) of every label value, `bare` pictures without segments. A class that is present and never predicted is a first sign of trouble."""
    maps = args.out / f"{args.cam}.json"
    maps = files.read_json(maps) if maps.exists() else {}
    share = pixels / pixels.sum()
    rule, voted = {"background": args.background, "value": args.threshold if args.background == "constant" else args.alpha}, {}
    if args.segments:
        recipe = args.segments / "recipe.json"                             # make_segments.py's; others' have none
        recipe = files.read_json(recipe) if recipe.exists() else {}
        source = {"folder": str(args.segments), "source": recipe.get("args", {}).get("source"), "weights": recipe.get("weights")}
        voted = {"segments": source, "vote": args.vote, "without_segments": bare}
    if args.vote == "sams":                                                # the CRF, and a picture without segments, see the other
        rule = {"background": "power", "value": args.power, "pixels": rule}
    return {
        "maps": {k: maps[k] for k in ("source", "weights", "scales", "flip") if k in maps}, "classes": folder.classes, "pictures": len(labels),
        **rule, **voted, "crf": args.preset if args.crf else None, "iterations": args.iterations, "ignore_below": args.ignore_below,
        "share": dict(zip(["background", *folder.classes], share.tolist())), "ignored": share[masks.IGNORE].item(),
        "never_predicted": [name for k, name in enumerate(folder.classes) if labels[:, k].any() and not pixels[k + 1]],
        "args": flags.plain(args), "versions": log.versions()}


def main():
    args = parse()
    env = processes.Env(args)
    guard.claim(args.out / args.pseudo)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)
    where = args.out / args.pseudo
    missing = [id for id in ids if not map_files.cam_path(args.out / args.cam / f"{id}.npy").exists()]
    if missing:
        raise FileNotFoundError(f"{args.out / args.cam / missing[0]}.npy is missing, and {len(missing) - 1} more of {len(ids)}: run make_cam.py --split {args.split} first")
    bare = [id for id in ids if args.segments and not segments.segments_of(args.segments, id)]
    if bare:
        raise FileNotFoundError(f"{args.segments} has no segments of {bare[0]}, and {len(bare) - 1} more of {len(ids)}: run make_segments.py --split {args.split} first")
    args.inputs = checkpoints.inputs(cam=args.out / args.cam, **({"segments": args.segments} if args.segments else {}))
    checkpoints.open_folder(where, args, env, free=("split", "limit", "batch_size", "seed", "amp", "segments"), classes=folder.classes)

    mine = env.shard(range(len(ids)))
    todo = [n for n in mine if not (where / f"{ids[n]}.png").exists()]
    pixels = np.zeros(257, np.int64)
    for n in set(mine) - set(todo):
        mask = masks.load_mask(where / f"{ids[n]}.png", len(folder.classes))
        pixels += count(mask, load_segments(ids[n], args, mask.shape))
    gpu = env.device.type == "cuda" and args.backend != "pydensecrf"       # one GPU is faster than the processes that would share it
    tasks = ((folder.picture(ids[n]), ids[n], labels[n].numpy(), args, env.device) for n in todo)
    made = processes.pooled(make, tasks, 0 if gpu else args.workers, where)
    for counts in env.progress(made, "pseudo masks", len(mine), len(mine) - len(todo)):
        pixels += counts

    *pixels, bare = env.sum(torch.from_numpy(pixels)).tolist()
    found = summary(args, folder, labels, torch.tensor(pixels).double(), bare)
    if env.main:
        files.save_json(args.out / f"{args.pseudo}.json", found)
    env.close(f"{where}: {len(ids)} masks, {100 * (1 - found['share']['background'] - found['ignored']):.1f} % foreground, "
              f"{100 * found['ignored']:.1f} % ignored; present but never predicted: {', '.join(found['never_predicted']) or 'no class'}"
              + (f"; {bare} without segments, masked as without --segments" if args.segments else ""))


if __name__ == "__main__":
    guard.run(main)
