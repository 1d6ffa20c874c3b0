"""Scores maps, masks or a network against the true masks of a split.

Paper   mIoU of SemPLeS Tables 1-5 (arXiv v2: 1-6) and VPL Tables 1-7
Reads   --data (true masks), and
        --what cam      <out>/cam/<id>.npy
        --what pseudo   <out>/pseudo/<id>.png
        --what masks    <id>.png in --pred
        --what seg      <out>/seg.pt and the images
Writes  <out>/eval_<what>_<split>.json (of maps and pseudo masks eval_<folder>_<split>.json): miou, iou by
        class, pixel_accuracy, protocol
        <out>/pred/<split>/<id>.png: palette predictions, with --what seg --save

mIoU comes from one confusion matrix over all pixels of the split, background counted, 255 in the truth left
out, 255 in a prediction a miss; it is the mean over the classes that occur in the truth or the prediction,
the others are listed. Every score carries its protocol. The threshold is fixed beforehand; --oracle tries all
of them against the truth, in one pass, and says so in the protocol: such a number uses pixel labels and is
not a weakly-supervised result. predict.py predicts photographs, or VOC's test split for its server.

    python eval.py --data data/toy --out runs/toy --split train --what cam --cam cam_refine --threshold 0.4
    python eval.py --data /data/VOC2012 --out runs/voc --split val --what seg --save
    python eval.py --data /data/VOC2012 --out runs/voc --split val --what masks --pred results
"""
import argparse
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from plumbing import checkpoints, files, flags, folders, guard, networks, processes, scores
from plumbing.images import image_size
from plumbing.maps import load_cam, resize_maps
from plumbing.masks import load_mask, resize_mask, save_mask
from wsss import crf, metrics

# Flags that do not change a network's predictions.
FREE = ("split", "limit", "batch_size", "seed", "what", "save", "clip", "pred", "cam", "pseudo", "background",
        "threshold", "alpha", "oracle")
ORACLE = torch.arange(1, 100).double() / 100                  # thresholds tried by --oracle


def parse():
    p = flags.parser(__doc__, split="train")
    p.add_argument("--what", choices=["cam", "pseudo", "masks", "seg"], required=True,
                   help="maps, pseudo masks, the masks in --pred, or the network")
    p.add_argument("--pred", type=Path, help="folder of <id>.png label maps (--what masks)")
    g = p.add_argument_group("--what cam, pseudo")
    g.add_argument("--cam", type=flags.name, default="cam",
                   help="folder of maps in --out; those of IRN, PSA, CLIP-ES and FMA-WSSS are read too")
    g.add_argument("--pseudo", type=flags.name, default="pseudo", help="folder of pseudo masks in --out")
    g.add_argument("--background", choices=["constant", "power"], default="constant",
                   help="background score of a map: a constant, or (1 - max)^alpha as in CLIP-ES")
    g.add_argument("--threshold", type=flags.share, default=0.43, help="the constant (VOC: 0.43, COCO: 0.42)")
    g.add_argument("--alpha", type=flags.above_zero, default=1.0, help="exponent of --background power")
    g.add_argument("--oracle", action="store_true",
                   help="also the best threshold in hindsight: uses the truth, stamped in the protocol")
    g = p.add_argument_group("--what seg")
    g.add_argument("--scales", type=flags.above_zero, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
                   help="sizes of the image to average probabilities over")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="average with the mirrored image")
    g.add_argument("--crf", action=argparse.BooleanOptionalAction, default=True,
                   help="dense CRF on the probabilities, in --workers processes")
    g.add_argument("--preset", choices=list(crf.PRESETS), default="deeplab", help="its parameters")
    flags.max_side(g)
    g.add_argument("--clip", help="CLIP of a clip_decoder, if it is not where it was in training")
    g.add_argument("--save", action="store_true",
                   help="keep the predictions; those that are there are not made again")
    args = p.parse_args()
    if (args.what == "masks") != (args.pred is not None):
        p.error("--pred DIR goes with --what masks, and only with it")
    if args.oracle and args.what != "cam":
        p.error("--oracle sweeps the threshold of maps: it goes with --what cam")
    return args


# ---------------------------------------------------------------- maps, masks, a network -> confusion

def find_foreground(cam, classes, size):
    """Maps (P, h, w) -> at the truth's size, a pixel's label 1..C if it is foreground, and its score"""
    maps = resize_maps(cam, size)                                                     # (P, H, W)
    if len(classes) == 0:
        return torch.zeros(size, dtype=torch.long), torch.zeros(size)
    score, row = maps.max(dim=0)                                                      # (H, W) each
    return (torch.as_tensor(classes) + 1)[row], score


def find_cut(args):
    """The map value above which a pixel is foreground: t, or the root of m = (1 - m)^alpha"""
    if args.background == "constant":
        return args.threshold
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 - middle) ** args.alpha else (low, middle)
    return low


def score_maps(args, folder, ids, run):
    """Confusion matrices (T, C, C + 1): the fixed threshold first, then ORACLE's if asked for."""
    count, labels = len(folder.classes) + 1, folder.labels(ids)
    thresholds, order = torch.tensor([find_cut(args)], dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    if args.oracle:
        thresholds, order = torch.cat([thresholds, ORACLE]).sort()
    total = torch.zeros(len(thresholds), count, count + 1, dtype=torch.int64)
    for n in run.progress(run.shard(range(len(ids))), "eval cam"):
        truth = torch.from_numpy(folder.truth(ids[n]))
        classes, cam = load_cam(args.out / args.cam / f"{ids[n]}.npy", labels[n], truth.shape)
        label, score = find_foreground(cam, classes, truth.shape)
        total[:, :, :count] += metrics.sweep(truth, label, score.double(), thresholds, count)
    return total[order.argsort()]


def add_score(total, folder, id, mask, where):
    """Adds one prediction to the confusion matrix `total`."""
    truth = folder.truth(id)
    if truth.shape != mask.shape:
        raise ValueError(f"{where / id}.png is {mask.shape[1]}x{mask.shape[0]}, the truth "
                         f"{truth.shape[1]}x{truth.shape[0]}: a mask has its image's size; make it again")
    metrics.add(total, metrics.confusion(truth, mask, len(folder.classes) + 1))


def score_masks(args, folder, ids, run):
    """Confusion matrix (1, C, C + 1) of <id>.png files."""
    where = args.pred if args.what == "masks" else args.out / args.pseudo
    missing = [id for id in ids if not (where / f"{id}.png").exists()]
    if missing:
        raise FileNotFoundError(f"{where / missing[0]}.png is missing, and {len(missing) - 1} more of "
                                f"{len(ids)}: finish the masks, or give the --split they were made for")
    count = len(folder.classes) + 1
    total = torch.zeros(1, count, count + 1, dtype=torch.int64)
    for id in run.progress(run.shard(ids), f"eval {args.what}"):
        add_score(total[0], folder, id, load_mask(where / f"{id}.png", len(folder.classes)), where)
    return total


def finish(id, image, probability, size, args, where, device="cpu"):
    """(H, W, 3) uint8, probabilities (1 + C, H, W) -> (id, label map of the size); written with --save."""
    if args.crf:
        probability = crf.dense_crf(image, probability, args.preset, device=device)
    mask = resize_mask(np.uint8(probability.argmax(0)), size)
    if args.save:
        save_mask(where / f"{id}.png", mask)
    return id, mask


def score_network(args, folder, ids, run):
    """Confusion matrix (1, C, C + 1) of the network's predictions. With --save, finished ones are read."""
    where, count = args.out / "pred" / args.split, len(folder.classes) + 1
    args.inputs = {"network": files.fingerprint(args.out / "seg.pt")}
    if args.save:
        checkpoints.open_folder(where, args, run, FREE, classes=folder.classes, data=args.data.resolve().name)
    mine = run.shard(ids)
    done = {id for id in mine if args.save and (where / f"{id}.png").exists()}
    model = networks.load_segmenter(args.out / "seg.pt", run, args.clip)
    pool = args.workers if args.crf and run.device.type == "cpu" else 0  # a GPU does the CRF itself
    todo = [id for id in mine if id not in done]
    predicted = networks.predict(model, folder, todo, run, args, 0 if pool else args.workers)
    tasks = ((*each, image_size(folder.image_path(each[0])), args, where, run.device) for each in predicted)
    made = processes.pooled(finish, tasks, pool, where)
    kept = ((id, load_mask(where / f"{id}.png", len(folder.classes))) for id in done)
    total, pixels = torch.zeros(1, count, count + 1, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for id, mask in run.progress(chain(kept, made), "predictions", len(mine)):
        add_score(total[0], folder, id, mask, where)
        pixels += torch.from_numpy(np.bincount(mask.ravel(), minlength=256))
    pixels = run.sum(pixels).tolist()
    if run.main:
        never = [name for name, n in zip(folder.classes, pixels[1:]) if n == 0]
        print(f"{100 * (1 - pixels[0] / sum(pixels)):.1f} % foreground; never predicted: "
              f"{', '.join(never) or 'none'}")
    return total


# ---------------------------------------------------------------- the score

def subject(args):
    """What is scored, in file names: the folder of maps or of pseudo masks, or masks, seg."""
    return {"cam": args.cam, "pseudo": args.pseudo}.get(args.what, args.what)


def protocol(args, ids, classes):
    """What a reader must know to compare the number."""
    facts = {"what": args.what, "split": args.split, "images": len(ids), "limit": args.limit,
             "data": args.data.name, "pred": args.pred and str(args.pred), "oracle": False,
             "mean_over": "classes in truth or prediction, background included"}
    if args.what == "cam":
        value = args.threshold if args.background == "constant" else args.alpha
        facts |= {"background": args.background, "value": value}
    if args.what == "seg":
        content = checkpoints.load(args.out / "seg.pt", "seg", classes)
        facts |= {"scales": args.scales, "flip": args.flip, "max_side": args.max_side,
                  "crf": args.preset if args.crf else None,
                  "weights": files.fingerprint(args.out / "seg.pt"), "made_by": content["args"]}
    if args.what in ("cam", "pseudo"):                                                # source, scales, CRF
        note = args.out / f"{subject(args)}.json"
        facts["made_by"] = files.read_json(note) if note.exists() else None
        checkpoints.check_classes(note, (facts["made_by"] or {}).get("classes"), classes)
    return facts


def result(matrices, args, names, facts):
    if not matrices[0].sum():
        raise ValueError(f"no scored pixel in split {args.split}: its true masks are all 255")
    iou = metrics.iou(matrices[0])
    by_class = {name: None if torch.isnan(v) else v.item() for name, v in zip(names, iou)}
    found = {"miou": iou.nanmean().item(), "pixel_accuracy": metrics.pixel_accuracy(matrices[0]),
             "iou": by_class, "absent": [name for name, v in by_class.items() if v is None],
             "missed_pixels": matrices[0, :, -1].sum().item(), "protocol": facts}
    if args.oracle:
        miou = [metrics.iou(m).nanmean().item() for m in matrices[1:]]
        best = max(range(len(miou)), key=miou.__getitem__)
        facts["oracle"] = "the threshold of oracle_best was chosen on the truth of this split"
        found["oracle_best"] = {"threshold": ORACLE[best].item(), "miou": miou[best]}
        found["oracle_sweep"] = {f"{t:.2f}": s for t, s in zip(ORACLE.tolist(), miou)}
    return found


def main():
    args = parse()
    run = processes.Run(args)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    path = args.out / f"eval_{subject(args)}_{args.split}.json"
    guard.claim(path)
    facts = protocol(args, ids, folder.classes)
    score = {"cam": score_maps, "seg": score_network}.get(args.what, score_masks)
    matrices = run.sum(score(args, folder, ids, run)).cpu()
    if run.main:
        found = result(matrices, args, ["background", *folder.classes], facts)
        files.save_json(path, found)
        scores.show(found)
    run.close()


if __name__ == "__main__":
    guard.run(main)
