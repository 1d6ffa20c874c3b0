"""Scores maps, pseudo masks or any folder of masks against the true masks of a split.

Paper   mIoU of SemPLeS Tables 1-6 and VPL Tables 1-7
Reads   --data (true masks)   <out>/cam/*.npy (--what cam)   <out>/pseudo/*.png (--what pseudo)   --pred DIR/*.png (--what masks)
Writes  <out>/eval_<what>_<split>.json (of other maps eval_<--cam>_<split>.json): miou, iou by class, pixel_accuracy, protocol

mIoU comes from one confusion matrix over all pixels of the split, background counted, 255 in the truth left out, 255 in a
prediction a miss; it is the mean over the classes that occur in the truth or the prediction, the others are listed.
Every score carries its protocol. The threshold is fixed beforehand; --oracle tries all of them against the truth, in one
pass, and says so in the protocol: such a number uses pixel labels and is no weakly-supervised result.

    python eval.py --data data/toy --out runs/toy --split train --what cam --threshold 0.43
    python eval.py --data /data/VOC2012 --out runs/voc --split val --what masks --pred results/SegmentationClass
"""
from pathlib import Path

import torch

from wsss import common, data, metrics

ORACLE = torch.arange(1, 100).double() / 100                                # thresholds tried by --oracle


def parse():
    p = common.parser(__doc__, split="train")
    p.add_argument("--what", choices=["cam", "pseudo", "masks"], required=True, help="maps, pseudo masks, or the masks in --pred")
    p.add_argument("--pred", type=Path, help="folder of <id>.png label maps (--what masks)")
    p.add_argument("--cam", default="cam", help="folder of maps in --out (--what cam)")
    p.add_argument("--background", choices=["constant", "power"], default="constant",
                   help="background score of a map: a constant, or (1 - max)^alpha as in CLIP-ES")
    p.add_argument("--threshold", type=float, default=0.43, help="the constant (WeakTr and SemPLeS: 0.43 VOC, 0.42 COCO)")
    p.add_argument("--alpha", type=float, default=1.0, help="exponent of --background power")
    p.add_argument("--oracle", action="store_true", help="also the best threshold in hindsight: uses the truth, stamped in the protocol")
    args = p.parse_args()
    if (args.what == "masks") != (args.pred is not None):
        p.error("--pred DIR goes with --what masks, and only with it")
    if not 0 <= args.threshold <= 1 or not args.alpha > 0:
        p.error("--threshold is between 0 and 1, --alpha above 0")
    if args.oracle and args.what != "cam":
        p.error("--oracle sweeps the threshold of maps: it goes with --what cam")
    return args


def foreground(cam, classes, size):
    """Maps (P, h, w) -> at the size of the truth: the label 1..C each pixel takes if it is foreground, and its score."""
    maps = data.resize_maps(cam, size)                                      # (P, H, W)
    if len(classes) == 0:
        return torch.zeros(size, dtype=torch.long), torch.zeros(size)
    score, row = maps.max(dim=0)                                            # (H, W) each
    return torch.as_tensor(classes)[row] + 1, score


def cut(args):
    """The map value above which a pixel is foreground: t, or the root of m = (1 - m)^alpha, both rules being monotone in m."""
    if args.background == "constant":
        return args.threshold
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 - middle) ** args.alpha else (low, middle)
    return low


def score_maps(args, folder, ids, labels, env):
    """Confusion matrices (T, C, C + 1): the fixed threshold first, then ORACLE's if asked for. One pass over the maps."""
    count = len(folder.classes) + 1
    thresholds = torch.tensor([cut(args)], dtype=torch.float64)
    order = torch.zeros(1, dtype=torch.long)
    if args.oracle:
        thresholds, order = torch.cat([thresholds, ORACLE]).sort()
    total = torch.zeros(len(thresholds), count, count + 1, dtype=torch.int64)
    for n in env.progress(env.shard(range(len(ids))), f"eval {args.what}"):
        truth = torch.from_numpy(folder.truth(ids[n]))
        classes, cam = data.load_cam(args.out / args.cam / f"{ids[n]}.npy", labels[n])
        label, score = foreground(cam, classes, truth.shape)
        total[:, :, :count] += metrics.sweep(truth, label, score.double(), thresholds, count)
    return total[order.argsort()]


def score_masks(args, folder, ids, env):
    """Confusion matrix (1, C, C + 1) of <id>.png files."""
    where = args.pred if args.what == "masks" else args.out / "pseudo"
    missing = [i for i in ids if not (where / f"{i}.png").exists()]
    if missing:
        raise FileNotFoundError(f"{where / missing[0]}.png is missing, and {len(missing) - 1} more of {len(ids)}: "
                                "finish the masks, or give the --split they were made for")
    count = len(folder.classes) + 1
    total = torch.zeros(1, count, count + 1, dtype=torch.int64)
    for id in env.progress(env.shard(ids), f"eval {args.what}"):
        truth, mask = folder.truth(id), data.load_mask(where / f"{id}.png", len(folder.classes))
        if truth.shape != mask.shape:
            raise ValueError(f"{where / id}.png is {mask.shape[1]}x{mask.shape[0]}, the truth {truth.shape[1]}x{truth.shape[0]}: "
                             "masks are scored at the picture's own size, make it again")
        metrics.add(total[0], metrics.confusion(truth, mask, count))
    return total


def subject(args):
    """The name of what is scored, in file names: the folder of the maps, or pseudo, masks."""
    return args.cam if args.what == "cam" else args.what


def protocol(args, ids, classes):
    """What a reader must know to compare the number: nothing about it is left to a file name."""
    facts = {"what": args.what, "split": args.split, "pictures": len(ids), "limit": args.limit, "data": args.data.name,
             "pred": args.pred and str(args.pred), "oracle": False, "mean_over": "classes in truth or prediction, background included"}
    if args.what == "cam":
        facts |= {"background": args.background, "value": args.threshold if args.background == "constant" else args.alpha}
    made_by = args.out / f"{subject(args)}.json"                            # cam.json, pseudo.json: source, scales, CRF
    if args.what != "masks":
        facts["made_by"] = common.read_json(made_by) if made_by.exists() else None
        trained = (facts["made_by"] or {}).get("classes", classes)
        if trained != classes:
            raise ValueError(f"{made_by}: made for other classes ({common.describe(trained)}) than --data has ({common.describe(classes)}): make them again")
    return facts


def result(matrix, names, facts):
    if not matrix.sum():
        raise ValueError(f"no scored pixel in split {facts['split']}: its true masks are all 255")
    iou = metrics.iou(matrix)
    by_class = {name: None if torch.isnan(v) else v.item() for name, v in zip(names, iou)}
    return {"miou": iou.nanmean().item(), "pixel_accuracy": metrics.pixel_accuracy(matrix), "iou": by_class,
            "absent": [name for name, v in by_class.items() if v is None], "missed_pixels": matrix[:, -1].sum().item(), "protocol": facts}


def show(found):
    facts = found["protocol"]
    width = max(len(name) for name in found["iou"])
    for name, value in found["iou"].items():
        print(f"  {name:<{width}}  " + ("   -   in neither truth nor prediction: not scored" if value is None else f"{100 * value:5.1f}"))
    rule = f", background {facts['background']} {facts['value']:g}" if facts["what"] == "cam" else ""
    print(f"  {'mIoU':<{width}}  {100 * found['miou']:5.1f}   pixel accuracy {100 * found['pixel_accuracy']:.1f}   "
          f"({facts['what']}, {facts['split']} of {facts['data']}, {facts['pictures']} pictures{rule})")
    if "oracle_best" in found:
        best = found["oracle_best"]
        print(f"  oracle: {100 * best['miou']:.1f} at threshold {best['threshold']:.2f}, chosen with the truth")


def main():
    args = parse()
    env = common.Env(args)
    folder = data.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    names = ["background", *folder.classes]
    facts = protocol(args, ids, folder.classes)
    if args.what == "cam":
        total = score_maps(args, folder, ids, folder.labels(ids), env)
    else:
        total = score_masks(args, folder, ids, env)
    total = env.sum(total).cpu()
    if env.main:
        found = result(total[0], names, facts)
        if args.oracle:
            scores = [metrics.iou(m).nanmean().item() for m in total[1:]]
            best = max(range(len(scores)), key=scores.__getitem__)
            found["protocol"]["oracle"] = "the threshold of oracle_best was chosen on the truth of this split"
            found["oracle_best"] = {"threshold": ORACLE[best].item(), "miou": scores[best]}
            found["oracle_sweep"] = {f"{t:.2f}": s for t, s in zip(ORACLE.tolist(), scores)}
        common.save_json(args.out / f"eval_{subject(args)}_{args.split}.json", found)
        show(found)
    env.close()


if __name__ == "__main__":
    common.run(main)
