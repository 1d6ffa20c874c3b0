"""Segments of every picture, without classes: SAM's automatic masks at three levels, or superpixels where there is no SAM.

Paper   SemPLeS Table 4, "SAM-based": the seeds of FMA-WSSS (Yang and Gong, WACV 2024), which calls them quasi-superpixels; make_pseudo.py --segments lets them vote
Reads   pictures of --data; --sam: a SAM by its name or folder (pip install transformers scipy), or nothing (pip install scikit-image)
Writes  <out>/segments/<id>.npz: size (2,), boxes (S, 4) top left bottom right, bits (the masks in their boxes, packed), level (S,), score and stability (S,)
        <out>/segments/recipe.json: the arguments, first
        <out>/segments.json, last: arguments and counts

sam     A grid of points over the picture, and in every crop of --crop-layers; each point gives a part (level 0), something between (1), a whole (2).
        Kept: what SAM is sure of (--pred-iou), what moves little with its threshold (--stability), what no crop's edge cuts, one of several with almost
        the same box (--nms), without islands and holes below --min-area. FMA-WSSS prefers wholes: see --whole-bonus, --whole-first, --covered;
        --whole-bonus 0 --no-whole-first --covered 0 gives SAM's own masks. In --amp off it is float32, as published.
felzenszwalb, slic   Superpixels, a partition of the picture for each of --scales. All are of level 0, since the coarsest of several levels would hide the rest;
        every pixel goes to the surest of its superpixels. In the toy world one fine scale makes better masks than several.

SAM takes a GPU a process (torchrun); superpixels take --workers processes. Each file is written as it is finished, so a run can be interrupted and goes
on; segments of another recipe are refused, or replaced with --no-resume.

    python make_segments.py --data /data/VOC2012 --out runs/voc --amp off
    torchrun --nproc_per_node 8 make_segments.py --data /data/COCO --out runs/coco --split train --sam /models/sam-vit-huge --points-per-batch 256
    python make_segments.py --data data/toy --out runs/toy --split train --source felzenszwalb --min-area 20
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from hosts import segments
from plumbing import checkpoints, files as plain_files, flags, folders, guard, images, log, processes, weights as weight_files

SCALES = {"felzenszwalb": [50], "slic": [200]}                          # felzenszwalb's scale; slic's number of superpixels
OVERLAP = 512 / 1500                                                    # of neighbouring crops, as a share of the shorter side (SAM)
EDGE = 20                                                               # pixels; a mask that comes so near to a crop's edge is cut by it (SAM)
AT_ONCE = 2 ** 25                                                       # values of masks at full size at a time: 128 MB
FOR_SAM = ("sam", "points", "points_per_batch", "crop_layers", "pred_iou", "stability", "nms", "whole_bonus", "whole_first", "covered")


def parse():
    p = flags.parser(__doc__)
    p.add_argument("--source", choices=["sam", *SCALES], default="sam", help="sam; felzenszwalb, slic: superpixels, which need no weights")
    p.add_argument("--segments", type=flags.name, default="segments", help="folder in --out, to keep segments of several sources side by side")
    p.add_argument("--min-area", type=flags.natural, default=100, help="pixels; smaller islands and holes go (sam), smaller superpixels are merged (felzenszwalb)")
    g = p.add_argument_group("sam")
    g.add_argument("--sam", default="facebook/sam-vit-huge", help="a SAM on the Hugging Face hub, or a folder with its files")
    g.add_argument("--points", type=flags.positive, default=32, help="points a side of the grid; half as many in the crops of each further layer")
    g.add_argument("--points-per-batch", type=flags.positive, default=64, help="points a pass through the decoder, lower it if memory is short")
    g.add_argument("--crop-layers", type=flags.natural, default=1, help="1: also 2 x 2 overlapping crops; 2: also 4 x 4; 0: the whole picture alone")
    g.add_argument("--pred-iou", type=float, default=0.86, help="least IoU that SAM expects of a mask")
    g.add_argument("--stability", type=float, default=0.92, help="least IoU of a mask's cuts at the logits -1 and 1")
    g.add_argument("--nms", type=float, default=0.7, help="of two masks whose boxes have a larger IoU one stays: SAM's best of a crop, then the smaller crop's")
    g.add_argument("--whole-bonus", type=float, default=0.1, help="wholes (level 2) need that much less of --pred-iou")
    g.add_argument("--whole-first", action=argparse.BooleanOptionalAction, default=True, help="wholes win against parts in --nms")
    g.add_argument("--covered", type=flags.share, default=0.3, help="a part goes if one segment of a higher level that stays covers this share of it; 0: all stay")
    g = p.add_argument_group("superpixels")
    g.add_argument("--scales", type=flags.above_zero, nargs="+", help="felzenszwalb: its scale, larger is coarser (default: 50); slic: how many superpixels (default: 200)")
    args = p.parse_args()
    unused = {"sam": ("scales",), "felzenszwalb": FOR_SAM, "slic": (*FOR_SAM, "min_area")}[args.source]
    changed = [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name) != p.get_default(name)]
    if changed:
        p.error(f"{changed[0]} does not go with --source {args.source}")
    if not args.pred_iou <= 1 or not 0 <= args.stability <= 1 or not 0 <= args.nms <= 1:
        p.error("--stability and --nms are between 0 and 1, --pred-iou at most 1")
    if args.source != "sam":
        args.scales = args.scales or SCALES[args.source]
    if args.source == "slic" and min(args.scales) < 1:
        p.error("--scales of slic are numbers of superpixels, 1 at least")
    return args


# ---------------------------------------------------------------- superpixels

def superpixels(image, args):
    """(H, W, 3) uint8 -> the segments of every scale."""
    from skimage import segmentation
    found = []
    for scale in args.scales:
        if args.source == "felzenszwalb":
            labels = segmentation.felzenszwalb(image, scale=scale, min_size=args.min_area)
        else:
            labels = segmentation.slic(image, n_segments=round(scale))
        found += segments.label_segments(labels)
    return found


# ---------------------------------------------------------------- SAM

def crops(size, layers):
    """(layer, (top, left, bottom, right)) of the picture (H, W) itself, then of 2^n x 2^n crops that overlap, for n up to `layers`."""
    yield 0, (0, 0, *size)
    for layer in range(1, layers + 1):
        n = 2 ** layer
        overlap = int(OVERLAP * min(size) * 2 / n)
        h, w = (math.ceil((overlap * (n - 1) + side) / n) for side in size)
        for x in range(n):
            for y in range(n):
                top, left = y * (h - overlap), x * (w - overlap)
                if top < size[0] and left < size[1]:                    # a picture of few pixels has not that many
                    yield layer, (top, left, min(top + h, size[0]), min(left + w, size[1]))


def grid(n):
    """(n * n, 2) points x, y in the middle of n x n cells of the unit square."""
    ticks = (torch.arange(n) + 0.5) / n
    return torch.cartesian_prod(ticks, ticks)


class Sam:
    """SAM's automatic masks, made on `transformers`' model, because its own generator forgets which of a point's three masks is the part and which the whole."""

    def __init__(self, args, env):
        for library in ("transformers", "scipy"):
            require(library, library)
        import transformers
        transformers.utils.logging.disable_progress_bar()
        self.folder = env.in_turn(lambda: weight_files.from_hub(args.sam))
        try:
            model, report = transformers.SamModel.from_pretrained(self.folder, output_loading_info=True)
            self.processor = transformers.SamProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"--sam {args.sam} cannot be loaded ({str(error).splitlines()[0]}): "
                             "give a name such as facebook/sam-vit-huge, or a folder with config.json, preprocessor_config.json and model.safetensors") from None
        if report["missing_keys"] or report["mismatched_keys"]:         # transformers would go on with random numbers there
            raise ValueError(f"--sam {args.sam} is no whole SAM: {sorted(report['missing_keys'] or report['mismatched_keys'])[0]} is not in it")
        self.model, self.args, self.env = model.float().to(env.device).eval(), args, env

    @torch.no_grad()
    def __call__(self, image):
        """(H, W, 3) uint8 -> its segments."""
        args, size, found, areas = self.args, image.shape[:2], [], []
        for layer, crop in crops(size, args.crop_layers):
            mine = self.in_crop(image, crop, grid(max(1, args.points // 2 ** layer)))
            mine = [mine[i] for i in suppress(mine, [s.score + (s.level == 2) * args.whole_first for s in mine], args.nms)]
            found, areas = found + mine, areas + [(crop[2] - crop[0]) * (crop[3] - crop[1])] * len(mine)
        found = [found[i] for i in suppress(found, [1 / area for area in areas], args.nms)]
        if args.min_area:
            cleaned = [clean(s, args.min_area, size) for s in found]
            found = [cleaned[i] for i in suppress(cleaned, [float(s is before) for s, before in zip(cleaned, found)], args.nms)]
        return uncovered(found, args.covered) if args.covered else found

    def in_crop(self, image, crop, points):
        """The segments that the points, (n, 2) in the unit square of the crop, find there, in coordinates of the picture."""
        top, left, bottom, right = crop
        seen = self.processor(images=image[top:bottom, left:right], return_tensors="pt")
        reshaped = tuple(seen["reshaped_input_sizes"][0].tolist())                                     # the crop as SAM sees it, before it is padded
        points = (points * torch.tensor(reshaped[::-1]))[:, None].to(self.env.device)                  # (n, 1, 2): one point a prompt
        found = []
        with self.env.autocast():
            embedding = self.model.get_image_embeddings(seen["pixel_values"].to(self.env.device))      # once for all points
        for part in points.split(self.args.points_per_batch):
            with self.env.autocast():
                out = self.model(image_embeddings=embedding, input_points=part[None], input_labels=torch.ones_like(part[None, ..., 0], dtype=torch.long))
            found += self.sure(out.pred_masks[0].float(), out.iou_scores[0].float(), seen["pixel_values"].shape[-2:], reshaped, crop, image.shape[:2])
        return found

    def sure(self, logits, ious, padded, reshaped, crop, size):
        """Masks (n, 3, h, w) and their expected IoU (n, 3) -> segments. Few masks at a time are brought to full size: memory does not grow with the picture."""
        args = self.args
        point, level = (ious + torch.tensor([0, 0, args.whole_bonus], device=ious.device) > args.pred_iou).nonzero(as_tuple=True)
        h, w = crop[2] - crop[0], crop[3] - crop[1]
        found = []
        for part in torch.arange(len(point)).split(max(1, AT_ONCE // max(h * w, padded[0] * padded[1]))):
            few = F.interpolate(logits[point[part], level[part]][:, None], tuple(padded), mode="bilinear", align_corners=False)
            few = F.interpolate(few[..., :reshaped[0], :reshaped[1]], (h, w), mode="bilinear", align_corners=False)[:, 0]          # (k, h, w)
            stability = (few > 1).sum((1, 2)) / (few > -1).sum((1, 2))                                 # the one lies in the other; NaN, an empty mask, is not kept
            masks = few > 0
            keep = (stability >= args.stability) & masks.any(2).any(1)
            rows = zip(masks[keep].cpu().numpy(), level[part][keep].tolist(), ious[point[part], level[part]][keep].tolist(), stability[keep].tolist())
            found += [segments.segment(mask, *facts, corner=crop[:2]) for mask, *facts in rows]
        return [s for s in found if not cut(s.box, crop, size)]


def cut(box, crop, size):
    """Whether the box ends at an edge of the crop that is none of the picture's (its last row and column count, as in SAM)."""
    return any(abs(end - edge) <= EDGE and abs(end - last) > EDGE
               for end, edge, last in zip((box[0], box[1], box[2] - 1, box[3] - 1), crop, (0, 0, *size)))


def suppress(segments, scores, iou):
    """Numbers of the segments that stay, best first: of two whose boxes have a larger IoU the one with the better score."""
    boxes = torch.tensor([(s.box[1], s.box[0], s.box[3] - 1, s.box[2] - 1) for s in segments], dtype=torch.float32).reshape(-1, 4)
    return nms(boxes, torch.tensor(scores, dtype=torch.float32), iou).tolist()


def clean(segment, area, size):
    """The segment without holes and islands of fewer pixels than `area`; itself, if it has none. Of islands alone the largest stays."""
    from scipy import ndimage
    around = np.ones((3, 3), bool)                                      # diagonal neighbours are connected (SAM)
    for margin in (1, area):                                            # what is small within the box may be large beyond it; at a distance of `area` it is
        top, left = (max(0, n - margin) for n in segment.box[:2])
        bottom, right = (min(n + margin, side) for n, side in zip(segment.box[2:], size))
        mask = np.zeros((bottom - top, right - left), bool)
        mask[segment.box[0] - top:segment.box[2] - top, segment.box[1] - left:segment.box[3] - left] = segment.mask
        holes = ndimage.label(~mask, around)[0]
        small = np.bincount(holes.ravel()) < area
        small[0] = False                                                # 0 is the mask itself
        rims = ((holes[0], top), (holes[:, 0], left), (holes[-1], size[0] - bottom), (holes[:, -1], size[1] - right))
        if not any(beyond and small[rim].any() for rim, beyond in rims):
            break
    islands = ndimage.label(mask | small[holes], around)[0]
    sizes = np.bincount(islands.ravel())
    sizes[0] = 0
    large = sizes >= area
    large[sizes.argmax()] = True
    kept = large[islands]
    return segment if (kept == mask).all() else segments.segment(kept, segment.level, segment.score, segment.stability, (top, left))


def uncovered(segments, share):
    """FMA-WSSS's filter: from the highest level down, a segment stays unless one that stays and is of a higher level covers `share` of it."""
    kept = []
    for level in (2, 1, 0):
        higher = list(kept)
        for s in segments:
            if s.level == level and all(overlap(s, other) < share * area for area in [s.mask.sum()] for other in higher):
                kept.append(s)
    return kept


def overlap(a, b):
    """Pixels that two segments share."""
    top, left = (max(n, m) for n, m in zip(a.box[:2], b.box[:2]))
    bottom, right = (min(n, m) for n, m in zip(a.box[2:], b.box[2:]))
    if top >= bottom or left >= right:
        return 0
    inside = lambda s: s.mask[top - s.box[0]:bottom - s.box[0], left - s.box[1]:right - s.box[1]]
    return (inside(a) & inside(b)).sum()


# ---------------------------------------------------------------- all pictures

def require(module, package):
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"{package} is missing, --source needs it: pip install {package}") from None


def make(picture, path, args, segmenter):
    """Writes the segments of one picture -> counts of them."""
    image = np.array(images.load_image(picture))
    found = segmenter(image) if segmenter else superpixels(image, args)
    with plain_files.atomic(path) as beside, open(beside, "wb") as file:
        segments.save_segments(file, image.shape[:2], found)
    return count([s.level for s in found])


def count(levels):
    """(4,): segments of every level, and 1 if there is none."""
    return np.append(np.bincount(np.asarray(levels, np.int64), minlength=3)[:3], len(levels) == 0)


def weights(folder):
    """Fingerprints of the weights in a folder, of all its shards."""
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    return " ".join(plain_files.fingerprint(file) for file in files)


def main():
    args = parse()
    env = processes.Env(args)
    guard.claim(args.out / args.segments)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    where = args.out / args.segments
    if args.source == "sam":
        segmenter = Sam(args, env)
        facts = {"weights": weights(segmenter.folder)}
    else:
        require("skimage", "scikit-image")
        segmenter, facts = None, {}
    checkpoints.open_folder(where, args, env, free=("split", "limit", "batch_size", "seed", "points_per_batch", *([] if segmenter else ["amp"])), **facts)

    mine = env.shard(range(len(ids)))
    todo = [n for n in mine if not (where / f"{ids[n]}.npz").exists()]
    total = np.zeros(4, np.int64)
    for n in set(mine) - set(todo):
        total += count(segments.load_levels(where / f"{ids[n]}.npz"))
    tasks = ((folder.picture(ids[n]), where / f"{ids[n]}.npz", args, segmenter) for n in todo)
    made = processes.pooled(make, tasks, 0 if segmenter else args.workers, where)
    for counts in env.progress(made, "segments", len(mine), len(mine) - len(todo)):
        total += counts

    *levels, bare = env.sum(torch.from_numpy(total)).tolist()
    if env.main:
        plain_files.save_json(args.out / f"{args.segments}.json", {"source": args.source, **facts, "pictures": len(ids), "segments": sum(levels), "levels": levels,
                                                              "pictures_without": bare, "args": flags.plain(args), "versions": log.versions()})
    env.close(f"{where}: {len(ids)} pictures, {sum(levels) / len(ids):.1f} segments each ({', '.join(f'{n / len(ids):.1f}' for n in levels)} "
              f"of level 0, 1, 2); {bare} pictures without any")


if __name__ == "__main__":
    guard.run(main)
