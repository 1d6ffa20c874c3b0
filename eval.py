"""Scores maps, masks or a network against the true masks of a split; predicts with the network, for the VOC server or for your own photographs.

Paper   mIoU of SemPLeS Tables 1-6 and VPL Tables 1-7
Reads   --data (true masks)   <out>/cam/*.npy (--what cam)   <out>/pseudo/*.png (--what pseudo)   --pred DIR/*.png (--what masks)
        <out>/seg.pt and pictures (--what seg)
Writes  <out>/eval_<what>_<split>.json (of maps and pseudo masks in other folders eval_<folder>_<split>.json): miou, iou by class, pixel_accuracy, protocol
        <out>/pred/<split>/<id>.png: palette predictions, with --save; of --images DIR <out>/pred/<DIR>/<name>.png and an overlay <name>.jpg
        <out>/comp6_test.tgz: the VOC server's archive, with --voc-test

mIoU comes from one confusion matrix over all pixels of the split, background counted, 255 in the truth left out, 255 in a
prediction a miss; it is the mean over the classes that occur in the truth or the prediction, the others are listed.
Every score carries its protocol. The threshold is fixed beforehand; --oracle tries all of them against the truth, in one
pass, and says so in the protocol: such a number uses pixel labels and is no weakly-supervised result.

    python eval.py --data data/toy --out runs/toy --split train --what cam --threshold 0.43
    python eval.py --data /data/VOC2012 --out runs/voc --split val --what seg --save
    python eval.py --data /data/VOC2012 --out runs/voc --what seg --voc-test
    python eval.py --out runs/voc --what seg --images ~/photos
    python eval.py --data /data/VOC2012 --out runs/voc --split val --what masks --pred results/SegmentationClass
"""
import argparse
import io
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from hosts import mask2former
from plumbing import checkpoints, files, flags, folders, guard, images as image_files, maps as map_files, masks, processes, samples
from wsss import clip_model, crf, gradcam, metrics, segmenter

ORACLE = torch.arange(1, 100).double() / 100                                # thresholds tried by --oracle
FREE = ("split", "limit", "batch_size", "seed", "what", "save", "voc_test", "clip", "pred", "cam", "pseudo", "background", "threshold", "alpha", "oracle")
VOC_TEST = 1456                                                             # pictures of VOC 2012's test set


def parse():
    p = flags.parser(__doc__, split="train", data=False)
    p.add_argument("--what", choices=["cam", "pseudo", "masks", "seg"], required=True, help="maps, pseudo masks, the masks in --pred, or the network")
    p.add_argument("--pred", type=Path, help="folder of <id>.png label maps (--what masks)")
    g = p.add_argument_group("--what cam, pseudo")
    g.add_argument("--cam", type=flags.name, default="cam", help="folder of maps in --out; those of IRN, PSA, CLIP-ES and FMA-WSSS are read too")
    g.add_argument("--pseudo", type=flags.name, default="pseudo", help="folder of pseudo masks in --out")
    g.add_argument("--background", choices=["constant", "power"], default="constant",
                   help="background score of a map: a constant, or (1 - max)^alpha as in CLIP-ES")
    g.add_argument("--threshold", type=float, default=0.43, help="the constant (WeakTr and SemPLeS: 0.43 VOC, 0.42 COCO)")
    g.add_argument("--alpha", type=float, default=1.0, help="exponent of --background power")
    g.add_argument("--oracle", action="store_true", help="also the best threshold in hindsight: uses the truth, stamped in the protocol")
    g = p.add_argument_group("--what seg")
    g.add_argument("--scales", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], help="sizes of the picture to average probabilities over")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="average with the mirrored picture")
    g.add_argument("--crf", action=argparse.BooleanOptionalAction, default=True, help="dense CRF on the probabilities, in --workers processes")
    g.add_argument("--preset", choices=list(crf.PRESETS), default="deeplab", help="its parameters")
    g.add_argument("--clip", help="CLIP of a clip_decoder, if it is not where it was in training")
    g.add_argument("--save", action="store_true", help="keep the predictions; those that are there are not made again")
    g.add_argument("--images", type=Path, help="folder of your own pictures to predict: no --data, no truth")
    g.add_argument("--max-side", type=flags.natural, default=640, help="--images: larger pictures are predicted at this longer side; 0: as they are")
    g.add_argument("--voc-test", action="store_true", help="predict VOC's test split and write the server's archive (comp6), checked")
    args = p.parse_args()
    if (args.what == "masks") != (args.pred is not None):
        p.error("--pred DIR goes with --what masks, and only with it")
    if not 0 <= args.threshold <= 1 or not args.alpha > 0:
        p.error("--threshold is between 0 and 1, --alpha above 0")
    if args.oracle and args.what != "cam":
        p.error("--oracle sweeps the threshold of maps: it goes with --what cam")
    if args.what != "seg" and (args.save or args.images or args.voc_test):
        p.error("--save, --images and --voc-test go with --what seg")
    if args.images and args.voc_test:
        p.error("--images and --voc-test are two runs")
    if not args.images and args.data is None:
        p.error("the following arguments are required: --data")
    if min(args.scales) <= 0:
        p.error("--scales are above 0")
    if args.voc_test:
        args.split = "test"
    args.save = args.save or args.voc_test or args.images is not None
    return args


# ---------------------------------------------------------------- maps and masks

def foreground(cam, classes, size):
    """Maps (P, h, w) -> at the size of the truth: the label 1..C each pixel takes if it is foreground, and its score."""
    maps = map_files.resize_maps(cam, size)                                      # (P, H, W)
    if len(classes) == 0:
        return torch.zeros(size, dtype=torch.long), torch.zeros(size)
    score, row = maps.max(dim=0)                                            # (H, W) each
    return (torch.as_tensor(classes) + 1)[row], score


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
        classes, cam = map_files.load_cam(args.out / args.cam / f"{ids[n]}.npy", labels[n], truth.shape)
        label, score = foreground(cam, classes, truth.shape)
        total[:, :, :count] += metrics.sweep(truth, label, score.double(), thresholds, count)
    return total[order.argsort()]


def score_masks(args, folder, ids, env):
    """Confusion matrix (1, C, C + 1) of <id>.png files."""
    where = args.pred if args.what == "masks" else args.out / args.pseudo
    missing = [i for i in ids if not (where / f"{i}.png").exists()]
    if missing:
        raise FileNotFoundError(f"{where / missing[0]}.png is missing, and {len(missing) - 1} more of {len(ids)}: "
                                "finish the masks, or give the --split they were made for")
    count = len(folder.classes) + 1
    total = torch.zeros(1, count, count + 1, dtype=torch.int64)
    for id in env.progress(env.shard(ids), f"eval {args.what}"):
        truth, mask = folder.truth(id), masks.load_mask(where / f"{id}.png", len(folder.classes))
        if truth.shape != mask.shape:
            raise ValueError(f"{where / id}.png is {mask.shape[1]}x{mask.shape[0]}, the truth {truth.shape[1]}x{truth.shape[0]}: "
                             "masks are scored at the picture's own size, make it again")
        metrics.add(total[0], metrics.confusion(truth, mask, count))
    return total


# ---------------------------------------------------------------- a network

class Photos:
    """A folder of somebody's own pictures, by file name without ending; as much of folders.Folder as prediction needs."""

    def __init__(self, root, max_side):
        self.max_side = max_side
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder: --images is a folder of pictures")
        self.paths = {}
        for path in sorted(path for path in root.iterdir() if path.suffix in image_files.PICTURES):
            if path.stem in self.paths:
                raise ValueError(f"{path} and {self.paths[path.stem].name} would both be written to {path.stem}.png: rename one")
            self.paths[path.stem] = path
        if not self.paths:
            raise FileNotFoundError(f"{root} holds no picture ({', '.join(image_files.PICTURES[:3])})")

    def picture(self, id):
        return self.paths[id]

    def image(self, id):
        twice = (2 * self.max_side, 2 * self.max_side)                      # what a large JPEG must still have for a good filter
        image = image_files.load_image(self.paths[id], twice if self.max_side else None)
        if self.max_side:                                                   # a phone's 12 million pixels would take 37 GB at the default scales
            image.thumbnail((self.max_side, self.max_side), Image.BICUBIC)
        return image_files.to_float(image)


def finish(id, picture, image, probability, args, classes, where, device="cpu"):
    """A picture as it was predicted (H, W, 3) uint8 and its probabilities (1 + C, H, W) -> (id, label map); written if asked."""
    if args.crf:
        probability = crf.dense_crf(image, probability, args.preset, device=device)
    mask = np.uint8(np.asarray(probability).argmax(0))
    if args.images:
        jpeg = io.BytesIO()                                                 # PIL's JPEG writer does not notice a full disk, Python's file does
        overlay(image, mask, classes).save(jpeg, format="JPEG", quality=92)
        with files.atomic(where / f"{id}.jpg") as beside:
            beside.write_bytes(jpeg.getvalue())
        mask = np.array(Image.fromarray(mask).resize(image_files.picture_size(picture)[::-1], Image.NEAREST))      # at the photograph's size again
    if args.save:                                                           # last: it marks the picture as finished
        masks.save_mask(where / f"{id}.png", mask)
    return id, mask


def overlay(image, mask, classes):
    """The picture under the colours of its prediction, outlined, with the names of the classes below."""
    colour = masks.palette()[mask]                                           # (H, W, 3)
    edge = np.zeros(mask.shape, bool)
    edge[1:], edge[:, 1:] = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    shown = np.where(edge[..., None], 255, np.where(mask[..., None] > 0, 0.45 * image + 0.55 * colour, image))
    found = [k for k in np.unique(mask) if k > 0]
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + 16 * max(1, len(found))), "white")
    canvas.paste(Image.fromarray(np.uint8(shown)))
    draw = ImageDraw.Draw(canvas)
    for row, k in enumerate(found):
        top = image.shape[0] + 16 * row
        draw.rectangle((3, top + 3, 13, top + 13), fill=tuple(masks.palette()[k].tolist()))
        draw.text((18, top + 2), f"{classes[k - 1]}  {100 * (mask == k).mean():.0f} %", fill="black")
    return canvas


def load_network(args, env):
    """<out>/seg.pt on its device; VPL's decoder with the frozen CLIP it was trained on."""
    path = args.out / "seg.pt"
    content = checkpoints.load(path, "seg")
    if content["args"]["model"] in mask2former.NAMES:
        return mask2former.rebuild_mask2former(content, path).eval().to(env.device)
    if content["args"]["model"] != "clip_decoder":
        return segmenter.load_segmenter(path).to(env.device)
    name = args.clip or content["args"]["clip"]
    checkpoints.inputs(clip=name)                                               # must be sound
    clip = env.in_turn(lambda: clip_model.load_clip(name, env.device))
    if clip.fingerprint() != content["clip"]:
        raise ValueError(f"{path} was trained on another CLIP than {name}: give its name or file with --clip")
    return segmenter.load_segmenter(path, lambda images: gradcam.block_outputs(clip, images)).to(env.device)


def predict(args, folder, ids, classes, env, where):
    """Yields (id, label map) of this process's pictures, in any order. With --save, what is in `where` is taken, the rest written there."""
    mine = env.shard(ids)
    done = dict.fromkeys(id for id in mine if args.save and (where / f"{id}.png").exists())
    todo = [id for id in mine if id not in done]
    model = load_network(args, env)
    busy = args.workers if args.crf and env.device.type == "cpu" else 0     # the CRF is what takes time; a GPU does it faster itself
    loader = samples.by_size(folder, todo, args.batch_size, env, 0 if busy else args.workers)

    def tasks():
        for numbers, images in loader:
            with env.autocast():
                probabilities = segmenter.predict(model, images.to(env.device, non_blocking=True), args.scales, args.flip).cpu().numpy()
            for i, image, probability in zip(numbers, images, probabilities):
                yield todo[i], folder.picture(todo[i]), np.uint8((255 * image).round().permute(1, 2, 0)), probability, args, classes, where, env.device

    made = processes.pooled(finish, tasks(), busy, where)
    kept = ((id, masks.load_mask(where / f"{id}.png", len(classes))) for id in done)
    yield from env.progress(chain(kept, made), "predictions", len(mine))


def score_network(args, folder, ids, classes, env):
    """Confusion matrix (1, C, C + 1) of the network's predictions, zeros where there is no truth to score with. Says what was predicted."""
    where = args.out / "pred" / (args.images.resolve().name if args.images else args.split)
    if args.save:
        checkpoints.open_folder(where, args, env, FREE, classes=classes, data=(args.images or args.data).resolve().name)
    count = len(classes) + 1
    total, pixels = torch.zeros(1, count, count + 1, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for id, mask in predict(args, folder, ids, classes, env, where):
        pixels += torch.from_numpy(np.bincount(mask.ravel(), minlength=256))
        if not (args.images or args.voc_test):
            truth = folder.truth(id)
            if truth.shape != mask.shape:
                raise ValueError(f"{folder.mask_path(id)} is {truth.shape[1]}x{truth.shape[0]}, the prediction {mask.shape[1]}x{mask.shape[0]}: "
                                 f"a mask has its picture's size; if the prediction is of another picture, remove {where}")
            metrics.add(total[0], metrics.confusion(truth, mask, count))
    pixels = env.sum(pixels).cpu()
    if env.main:
        never = [name for name, n in zip(classes, pixels[1:].tolist()) if n == 0]
        print(f"{len(ids)} predictions{f' in {where}' if args.save else ''}: {100 * (1 - pixels[0] / pixels.sum()):.1f} % foreground; never predicted: {', '.join(never) or 'no class'}")
    return total


def archive(args, folder, ids):
    """The VOC server's archive of the saved predictions, as comp6: CLIP and ImageNet are outside data. Every file is checked first."""
    where, path = args.out / "pred" / "test", args.out / "comp6_test.tgz"
    with files.atomic(path) as beside, tarfile.open(beside, "w:gz") as tar:
        for id in ids:
            file = where / f"{id}.png"
            mask, size = masks.load_mask(file, len(folder.classes)), image_files.picture_size(folder.picture(id))
            with Image.open(file) as image:
                if image.mode != "P" or mask.shape != size or (mask == masks.IGNORE).any():
                    raise ValueError(f"{file} is no palette mask of {size[1]}x{size[0]} without 255: remove it and run this command again")
            tar.add(file, f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png")
    return path


# ---------------------------------------------------------------- the score

def subject(args):
    """The name of what is scored, in file names: the folder of maps or of pseudo masks, or masks, seg."""
    return {"cam": args.cam, "pseudo": args.pseudo}.get(args.what, args.what)


def protocol(args, ids, classes):
    """What a reader must know to compare the number: nothing about it is left to a file name."""
    facts = {"what": args.what, "split": args.split, "pictures": len(ids), "limit": args.limit, "data": args.data.name,
             "pred": args.pred and str(args.pred), "oracle": False, "mean_over": "classes in truth or prediction, background included"}
    if args.what == "cam":
        facts |= {"background": args.background, "value": args.threshold if args.background == "constant" else args.alpha}
    if args.what == "seg":
        content = checkpoints.load(args.out / "seg.pt", "seg", classes)
        facts |= {"scales": args.scales, "flip": args.flip, "crf": args.preset if args.crf else None, "weights": files.fingerprint(args.out / "seg.pt"),
                  "made_by": content["args"]}                               # network, its start, its masks, its schedule
    made_by = args.out / f"{subject(args)}.json"                            # cam.json, pseudo.json: source, scales, CRF
    if args.what in ("cam", "pseudo"):
        facts["made_by"] = files.read_json(made_by) if made_by.exists() else None
        trained = (facts["made_by"] or {}).get("classes", classes)
        if trained != classes:
            raise ValueError(f"{made_by}: made for other classes ({checkpoints.describe(trained)}) than --data has ({checkpoints.describe(classes)}): make them again")
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
    if facts["what"] == "seg":
        rule = f", scales {' '.join(map(str, facts['scales']))}{' and flips' if facts['flip'] else ''}, {'CRF ' + facts['crf'] if facts['crf'] else 'no CRF'}"
    print(f"  {'mIoU':<{width}}  {100 * found['miou']:5.1f}   pixel accuracy {100 * found['pixel_accuracy']:.1f}   "
          f"({facts['what']}, {facts['split']} of {facts['data']}, {facts['pictures']} pictures{rule})")
    if "oracle_best" in found:
        best = found["oracle_best"]
        print(f"  oracle: {100 * best['miou']:.1f} at threshold {best['threshold']:.2f}, chosen with the truth")


def main():
    args = parse()
    env = processes.Env(args)
    if args.images and args.images.resolve().parent == (args.out / "pred").resolve():
        raise ValueError(f"{args.images} is where predictions are written: move the pictures to another folder")
    folder = Photos(args.images, args.max_side) if args.images else folders.Folder(args.data)
    ids = list(folder.paths)[:args.limit or None] if args.images else folder.ids(args.split, args.limit)
    path = args.out / f"eval_{subject(args)}_{args.split}.json"
    guard.claim(args.out / "pred" / args.images.resolve().name if args.images else path)
    if args.voc_test and (folder.classes != folders.VOC_CLASSES or len(ids) != VOC_TEST):
        raise ValueError(f"--voc-test: {args.data} has {len(folder.classes)} classes and {len(ids)} pictures in its split test, VOC 2012 has 20 and {VOC_TEST:,}")
    if args.what == "seg":
        args.inputs = checkpoints.inputs(network=args.out / "seg.pt")
        classes = checkpoints.load(args.out / "seg.pt", "seg", None if args.images else folder.classes)["classes"]
    else:
        classes = folder.classes
    if args.images or args.voc_test:
        score_network(args, folder, ids, classes, env)
        env.barrier()
        return env.close(f"{archive(args, folder, ids)}: to be sent to the VOC server as comp6" if args.voc_test and env.main else None)

    facts = protocol(args, ids, classes)
    if args.what == "cam":
        total = score_maps(args, folder, ids, folder.labels(ids), env)
    elif args.what == "seg":
        total = score_network(args, folder, ids, classes, env)
    else:
        total = score_masks(args, folder, ids, env)
    total = env.sum(total).cpu()
    if env.main:
        found = result(total[0], ["background", *classes], facts)
        if args.oracle:
            scores = [metrics.iou(m).nanmean().item() for m in total[1:]]
            best = max(range(len(scores)), key=scores.__getitem__)
            found["protocol"]["oracle"] = "the threshold of oracle_best was chosen on the truth of this split"
            found["oracle_best"] = {"threshold": ORACLE[best].item(), "miou": scores[best]}
            found["oracle_sweep"] = {f"{t:.2f}": s for t, s in zip(ORACLE.tolist(), scores)}
        files.save_json(path, found)
        show(found)
    env.close()


if __name__ == "__main__":
    guard.run(main)
