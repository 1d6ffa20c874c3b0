"""Segments of every image, without classes: SAM's automatic masks at three levels, or superpixels.

Paper   SemPLeS Table 4, "SAM-based": the seeds of FMA-WSSS (Yang and Gong, WACV 2024)
Reads   images of --data; SAM needs pip install transformers scipy, superpixels pip install scikit-image
Writes  <out>/segments/<id>.npz: masks packed in their boxes, with level, score and stability
        (plumbing/segments.py); make_pseudo.py --segments lets them vote
        <out>/segments/recipe.json first: the arguments; <out>/segments.json last: counts

sam     A grid of points over the image, and over every crop of --crop-layers; each point gives a part
        (level 0), something between (1) and a whole (2). Kept: what SAM is sure of (--pred-iou), what moves
        little with its threshold (--stability), what no crop's edge cuts, one of several with almost the
        same box (--nms). FMA-WSSS prefers wholes; --whole-bonus 0 --no-whole-first --covered 0 gives SAM's
        own masks. SAM was published in float32: --amp off. It takes a GPU a process (torchrun).
felzenszwalb, slic   Superpixels, a partition of the image for each of --scales, all of level 0, made by
        --workers processes. In the toy world one fine scale makes better masks than several.

    python -m hosts.make_segments --data /data/VOC2012 --out runs/voc --amp off
    torchrun --nproc_per_node 8 -m hosts.make_segments --data /data/COCO --out runs/coco --split train \\
        --sam /models/sam-vit-huge --points-per-batch 256 --amp off
    python -m hosts.make_segments --data data/toy --out runs/toy --split train --source felzenszwalb \\
        --min-area 20
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import checkpoints, files, flags, folders, guard, log, processes, segments, weights
from plumbing.images import load_image

SCALES = {"felzenszwalb": [50], "slic": [200]}                # its scale; its number of superpixels
# Of SAM's generator: how far crops overlap, as a share of the shorter side; a mask that comes so near to a
# crop's edge, in pixels, is cut by it.
OVERLAP, EDGE = 512 / 1500, 20
AT_ONCE = 2 ** 25                                             # values of masks at full size at a time: 128 MB


def parse():
    p = flags.parser(__doc__)
    p.add_argument("--source", choices=["sam", *SCALES], default="sam")
    p.add_argument("--segments", type=flags.name, default="segments", help="folder in --out")
    p.add_argument("--min-area", type=flags.natural, default=100, help="smallest island and hole (sam), or "
                   "superpixel (felzenszwalb), in pixels")
    p.add_argument("--scales", type=flags.above_zero, nargs="+", help="felzenszwalb: its scale, larger is "
                   "coarser (if not given, 50); slic: how many superpixels (200)")
    g = p.add_argument_group("sam")
    g.add_argument("--sam", default="facebook/sam-vit-huge", help="a SAM of the Hugging Face hub or a folder")
    g.add_argument("--points", type=flags.positive, default=32, help="points a side of the grid; half as "
                   "many in the crops of each further layer")
    g.add_argument("--points-per-batch", type=flags.positive, default=64, help="points a pass through the "
                   "decoder; lower it if memory is short")
    g.add_argument("--crop-layers", type=flags.natural, default=1, help="1: also 2 x 2 overlapping crops; 2: "
                   "also 4 x 4; 0: the whole image alone")
    g.add_argument("--pred-iou", type=float, default=0.86, help="least IoU that SAM expects of a mask")
    g.add_argument("--stability", type=float, default=0.92, help="least IoU of its cuts at logits -1 and 1")
    g.add_argument("--nms", type=float, default=0.7, help="of two masks whose boxes have a larger IoU one "
                   "stays: SAM's best of a crop, then the smaller crop's")
    g.add_argument("--whole-bonus", type=float, default=0.1, help="wholes (level 2) need that much less of "
                   "--pred-iou")
    g.add_argument("--whole-first", action=argparse.BooleanOptionalAction, default=True,
                   help="wholes win against parts in --nms")
    g.add_argument("--covered", type=flags.share, default=0.3, help="a segment goes if one of a higher level "
                   "that stays covers this share of it; 0: all stay")
    args = p.parse_args()
    if not args.pred_iou <= 1 or not 0 <= args.stability <= 1 or not 0 <= args.nms <= 1:
        p.error("--stability and --nms are between 0 and 1, --pred-iou is at most 1")
    args.scales = args.scales or SCALES.get(args.source)
    return args


# ---------------------------------------------------------------- superpixels

def superpixels(image, args):
    """(H, W, 3) uint8 -> the segments of every scale."""
    try:
        from skimage import segmentation
    except ImportError:
        raise ValueError(f"--source {args.source} needs scikit-image: pip install scikit-image") from None
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
    """(layer, (top, left, bottom, right)) of the image (H, W), then of 2^n x 2^n overlapping crops, n = 1 ..
    `layers`."""
    yield 0, (0, 0, *size)
    for layer in range(1, layers + 1):
        n = 2 ** layer
        overlap = int(OVERLAP * min(size) * 2 / n)
        h, w = (math.ceil((overlap * (n - 1) + side) / n) for side in size)
        for x in range(n):
            for y in range(n):
                top, left = y * (h - overlap), x * (w - overlap)
                if top < size[0] and left < size[1]:          # a tiny image has fewer
                    yield layer, (top, left, min(top + h, size[0]), min(left + w, size[1]))


class Sam:
    """SAM's automatic masks, made on transformers' model: its own generator forgets which of a point's three
    masks is the part and which the whole."""

    def __init__(self, args, run):
        try:
            import scipy  # noqa: F401
            import transformers
        except ImportError as error:
            raise ValueError(f"--source sam needs {error.name}: pip install transformers scipy") from None
        transformers.utils.logging.disable_progress_bar()
        self.folder = run.in_turn(lambda: weights.from_hub(args.sam))
        try:
            model, report = transformers.SamModel.from_pretrained(self.folder, output_loading_info=True)
            self.processor = transformers.SamProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"--sam {args.sam} cannot be loaded ({files.first_line(error)}): give a name "
                             "such as facebook/sam-vit-huge, or a folder with config.json, "
                             "preprocessor_config.json and model.safetensors") from None
        missing = sorted(report["missing_keys"]) or sorted(report["mismatched_keys"])
        if missing:                                     # transformers would go on with random numbers there
            raise ValueError(f"--sam {args.sam} is not a whole SAM: {missing[0]} is not in it")
        self.model, self.args, self.run = model.float().to(run.device).eval(), args, run

    @torch.no_grad()
    def __call__(self, image):
        """(H, W, 3) uint8 -> its segments."""
        args, size, found, areas = self.args, image.shape[:2], [], []
        for layer, crop in crops(size, args.crop_layers):
            mine = self.in_crop(image, crop, max(1, args.points // 2 ** layer))
            scores = [s.score + (s.level == 2) * args.whole_first for s in mine]
            mine = [mine[i] for i in suppress(mine, scores, args.nms)]
            found += mine
            areas += [(crop[2] - crop[0]) * (crop[3] - crop[1])] * len(mine)
        found = [found[i] for i in suppress(found, [1 / area for area in areas], args.nms)]
        if args.min_area:
            cleaned = [clean(s, args.min_area, size) for s in found]
            untouched = [float(s is before) for s, before in zip(cleaned, found)]
            found = [cleaned[i] for i in suppress(cleaned, untouched, args.nms)]
        return uncovered(found, args.covered) if args.covered else found

    def in_crop(self, image, crop, n):
        """The segments that n x n points find in the crop, in coordinates of the image."""
        top, left, bottom, right = crop
        seen = self.processor(images=image[top:bottom, left:right], return_tensors="pt")
        pixels = seen["pixel_values"].to(self.run.device)
        resized = tuple(seen["reshaped_input_sizes"][0].tolist())     # of the crop, before SAM pads it
        ticks = (torch.arange(n) + 0.5) / n
        points = torch.cartesian_prod(ticks, ticks) * torch.tensor(resized[::-1])     # (n n, 2), x and y
        points = points[:, None].to(self.run.device)                  # (n n, 1, 2): one point a prompt
        found = []
        with self.run.autocast():
            embedding = self.model.get_image_embeddings(pixels)       # once for all points
        for part in points.split(self.args.points_per_batch):
            labels = torch.ones_like(part[None, ..., 0], dtype=torch.long)
            with self.run.autocast():
                out = self.model(image_embeddings=embedding, input_points=part[None], input_labels=labels)
            found += self.sure(out.pred_masks[0].float(), out.iou_scores[0].float(), pixels.shape[-2:],
                               resized, crop)
        return [s for s in found if not is_cut(s.box, crop, image.shape[:2])]

    def sure(self, logits, ious, padded, resized, crop):
        """Masks (n, 3, h, w) and their expected IoU (n, 3) -> segments. Few masks at a time are brought to
        full size: memory does not grow with the image."""
        args, found = self.args, []
        bonus = torch.tensor([0, 0, args.whole_bonus], device=ious.device)
        point, level = (ious + bonus > args.pred_iou).nonzero(as_tuple=True)
        size = crop[2] - crop[0], crop[3] - crop[1]
        at_once = max(1, AT_ONCE // max(math.prod(size), math.prod(padded)))
        for k, n in zip(level.split(at_once), point.split(at_once)):
            few = F.interpolate(logits[n, k][:, None], tuple(padded), mode="bilinear", align_corners=False)
            few = few[..., :resized[0], :resized[1]]
            few = F.interpolate(few, size, mode="bilinear", align_corners=False)[:, 0]            # (n, H, W)
            # The one cut lies in the other. NaN, of an empty mask, is not kept.
            stability = (few > 1).sum((1, 2)) / (few > -1).sum((1, 2))
            masks = few > 0
            keep = (stability >= args.stability) & masks.any(2).any(1)
            facts = (x[keep].tolist() for x in (k, ious[n, k], stability))
            for mask, *each in zip(masks[keep].cpu().numpy(), *facts):
                found.append(segments.segment(mask, *each, corner=crop[:2]))
        return found


def is_cut(box, crop, size):
    """Does the box end at an edge of the crop that is not the image's?"""
    ends = box[0], box[1], box[2] - 1, box[3] - 1             # the last row and column count (SAM)
    return any(abs(end - edge) <= EDGE and abs(end - last) > EDGE
               for end, edge, last in zip(ends, crop, (0, 0, *size)))


def suppress(found, scores, iou):
    """Numbers of the segments that stay, best first: of two whose boxes have a larger IoU the better one."""
    boxes = [(s.box[1], s.box[0], s.box[3] - 1, s.box[2] - 1) for s in found]
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    from torchvision.ops import nms
    return nms(boxes, torch.tensor(scores, dtype=torch.float32), iou).tolist()


def clean(segment, area, size):
    """The segment without holes and islands of fewer pixels than `area`; itself, if it has none. Of islands
    alone the largest stays."""
    from scipy import ndimage
    around = np.ones((3, 3), bool)                            # diagonal neighbours are connected (SAM)
    # A hole that goes on beyond the box is large at a distance of `area`: no need to look farther.
    top, left = (max(0, n - area) for n in segment.box[:2])
    bottom, right = (min(n + area, side) for n, side in zip(segment.box[2:], size))
    image = np.zeros(size, bool)
    image[segment.where] = segment.mask
    mask = image[top:bottom, left:right]
    holes = ndimage.label(~mask, around)[0]
    small = np.bincount(holes.ravel()) < area
    small[0] = False                                          # 0 is the mask itself
    islands = ndimage.label(mask | small[holes], around)[0]
    sizes = np.bincount(islands.ravel())
    sizes[0] = 0
    large = sizes >= area
    large[sizes.argmax()] = True
    kept = large[islands]
    if (kept == mask).all():
        return segment
    return segments.segment(kept, segment.level, segment.score, segment.stability, (top, left))


def uncovered(found, share):
    """FMA-WSSS's filter: from the highest level down, a segment stays unless one of a higher level that
    stays covers `share` of it."""
    kept = []
    for level in (2, 1, 0):
        higher = list(kept)
        for s in found:
            area = s.mask.sum()
            if s.level == level and all(overlap(s, other) < share * area for other in higher):
                kept.append(s)
    return kept


def overlap(a, b):
    """Pixels that two segments share."""
    top, left = (max(n, m) for n, m in zip(a.box[:2], b.box[:2]))
    bottom, right = (min(n, m) for n, m in zip(a.box[2:], b.box[2:]))
    if top >= bottom or left >= right:
        return 0
    parts = [s.mask[top - s.box[0]:bottom - s.box[0], left - s.box[1]:right - s.box[1]] for s in (a, b)]
    return (parts[0] & parts[1]).sum()


# ---------------------------------------------------------------- all images

def make(image_path, path, args, sam):
    """Writes the segments of one image -> their levels."""
    image = np.array(load_image(image_path))
    found = sam(image) if sam else superpixels(image, args)
    with files.atomic(path) as beside, open(beside, "wb") as file:
        segments.save_segments(file, image.shape[:2], found)
    return np.array([s.level for s in found], np.uint8)


def main():
    args = parse()
    run = processes.Run(args)
    where = args.out / args.segments
    guard.claim(where)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    sam, facts = None, {}
    unused = "sam" if args.source == "sam" else "amp"         # SAM's weights are among the facts
    free = "split", "limit", "batch_size", "seed", "points_per_batch", unused
    if args.source == "sam":
        sam = Sam(args, run)
        shards = sorted(Path(sam.folder).glob("*.safetensors")) or sorted(Path(sam.folder).glob("*.bin"))
        facts = {"weights": " ".join(map(files.fingerprint, shards))}
    checkpoints.open_folder(where, args, run, free, **facts)

    mine = run.shard(range(len(ids)))
    todo = [n for n in mine if not (where / f"{ids[n]}.npz").exists()]
    counts = np.zeros(3, np.int64)                            # of every level
    for n in set(mine) - set(todo):
        counts += np.bincount(segments.load_levels(where / f"{ids[n]}.npz"), minlength=3)
    tasks = ((folder.image_path(ids[n]), where / f"{ids[n]}.npz", args, sam) for n in todo)
    made = processes.pooled(make, tasks, 0 if sam else args.workers, where)
    for levels in run.progress(made, "segments", len(mine), len(mine) - len(todo)):
        counts += np.bincount(levels, minlength=3)

    counts = run.sum(torch.from_numpy(counts)).tolist()
    if run.main:
        files.save_json(args.out / f"{args.segments}.json", {
            "source": args.source, **facts, "images": len(ids), "segments": sum(counts), "levels": counts,
            "args": flags.plain(args), "versions": log.versions()})
    each = ", ".join(f"{n / len(ids):.1f}" for n in counts)
    run.close(f"{where}: {len(ids)} images, each of about {each} segments of levels 0, 1, 2")


if __name__ == "__main__":
    guard.run(main)
