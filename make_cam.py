"""Localisation maps of the present classes: from a mask generator S, or from CLIP by texts or prototypes.

Paper   SemPLeS 4.3: the refined masks M' are taken as CAMs (--source refine); CLIP-ES (--source text);
        VPL Eq. 1 and its maps by W (--source vision)
Reads   images and image labels of --data; cls.pt, match.pt or refine.pt of <out> (--source), or --init;
        text, vision: CLIP; vision: <out>/prototypes.pt
Writes  <out>/cam/<id>.npy: float16 (P, h, w), a row per present class, ascending, in [0, 1]
        <out>/sheets/cam_<n>.png: images, maps and, where there is one, the truth, to look at
        <out>/<cam>_<format>/: with --format, what IRN, PSA/WeakTr, CLIP-ES and FMA-WSSS read
        <out>/cam.json, last: arguments, texts and counts

Maps of S are added over scales and flips, then min-max scaled; those of CLIP are of the image as it is, as in
CLIP-ES, unless --scales and --flip say otherwise. Vision prototypes take the texts' places in the softmax, at
the temperature they were learned with. A softer softmax alone changes the maps: compare with --source text
--tau-t 0.03.

Finished files are skipped; maps of another source or recipe are refused, or replaced with --no-resume.

    python make_cam.py --data /data/VOC2012 --out runs/voc --source refine
    python make_cam.py --data /data/COCO --out runs/coco --split train --scales 1.0 0.8 1.2 --pool avg
    python make_cam.py --data /data/VOC2012 --out runs/weaktr --init weaktr.pth --format irn
    python make_cam.py --data /data/VOC2012 --out runs/clip_es --source text
    python make_cam.py --data /data/VOC2012 --out runs/vpl --source vision
"""
import argparse

import torch
import torch.nn.functional as F

from plumbing import checkpoints, exports, files, flags, folders, guard, log, networks, processes, sheets
from plumbing.images import image_size
from plumbing.maps import resize_maps, save_cam, shrink_maps
from plumbing.samples import by_size
from wsss import gradcam, texts

GRADCAM = ("text", "vision")                                  # sources that are CLIP's maps
FREE = ("split", "limit", "batch_size", "seed", "sheets", "format")  # do not change an image's maps


def parse():
    p = flags.parser(__doc__, batch_size=16)
    g = p.add_argument_group("maps")
    g.add_argument("--source", choices=["cls", "match", "refine", *GRADCAM], default="refine",
                   help="stage whose generator makes the maps; text: CLIP-ES; vision: VPL's prototypes")
    g.add_argument("--init", help="generator to take instead of <out>/<source>.pt: published or one of ours")
    g.add_argument("--pool", choices=["max", "avg"], help="pooling of S's attention fusion (max: VOC, avg: "
                   "COCO); left out: what the file of S says, else max")
    g.add_argument("--scales", type=flags.above_zero, nargs="+",
                   help="sizes of the image to add maps over (default: 1.0 1.2 for S, 1.0 for CLIP)")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="add the maps of the mirrored image (default: for S)")
    flags.max_side(g)
    g.add_argument("--stride", type=flags.positive, default=1,
                   help="store maps at 1/STRIDE of the image's size: 4 takes 1/16 of the disk")
    g.add_argument("--format", choices=list(exports.FORMATS), help="also write what another project reads")
    g.add_argument("--cam", type=flags.name, default="cam", help="folder in --out, to keep several sources")
    g.add_argument("--sheets", type=flags.natural, default=32, help="images to show on contact sheets")
    g = p.add_argument_group("CLIP's GradCAM (--source text, vision)")
    flags.clip(g, "ViT-B/16")
    g.add_argument("--prompt", choices=list(texts.PROMPTS), default="ensemble", help="texts (VPL Table 4)")
    g.add_argument("--tau-t", type=flags.above_zero,
                   help="temperature of texts (default: CLIP's own, 1 / its logit scale: .01 for OpenAI's)")
    g.add_argument("--tau-i", type=flags.above_zero,
                   help="temperature of vision prototypes (default: the one they were learned with)")
    g.add_argument("--affinity", action=argparse.BooleanOptionalAction, default=True,
                   help="refine the maps by attention (CLIP-ES's CAA)")
    g.add_argument("--box", type=flags.share, default=0.4,
                   help="refined inside boxes around what is above this share of a map's maximum (COCO: 0.7)")
    args = p.parse_args()
    by_clip = args.source in GRADCAM
    args.scales = args.scales or ([1.0] if by_clip else [1.0, 1.2])
    args.flip = not by_clip if args.flip is None else args.flip
    if by_clip and args.init:
        p.error("--init is a generator: it goes with --source cls, match or refine")
    return args


CLIP_FLAGS = ("clip", "clip_gelu", "prompt", "tau_t", "tau_i", "affinity", "box")    # S has no use for them
UNUSED = {"vision": ("prompt", "tau_t", "pool"), "text": ("tau_i", "pool")}           # of each source


def open_generator(args, folder, run):
    """-> maps(images, b, k), the pairs' raw maps (P, h, w); fingerprint of the weights; texts: none"""
    path = args.init or args.out / f"{args.source}.pt"
    S = networks.load_generator(path, run, folder.classes, args.pool).eval()
    args.pool = S.pool
    return lambda images, b, k: S.maps(images)[b, k], files.fingerprint(path), None


def open_clip(args, folder, run):
    """The same by CLIP's GradCAM; the columns of its softmax are texts or vision prototypes."""
    clip = networks.load_clip(args.clip, run, vit=True, gelu=args.clip_gelu)
    backgrounds = folder.backgrounds or texts.backgrounds(folder.classes)
    shown = None
    if args.source == "text":
        shown = texts.prompt_texts(folder.classes, backgrounds, args.prompt)
        columns = clip.encode_ensemble(shown)
        tau = args.tau_t = args.tau_t or clip.tau
        weights = files.fingerprint(args.clip) or args.clip
    else:
        path = args.out / "prototypes.pt"
        content = networks.load_prototypes(path, folder, backgrounds, clip)
        columns = content["model"]["prototypes"].to(run.device)                       # (M, D)
        tau = args.tau_i = args.tau_i or content["tau_i"]
        weights = files.fingerprint(path)
    box = args.box if args.affinity else None

    def maps(images, b, k):
        x, attention, grid = gradcam.last_inputs(clip, images)
        return gradcam.class_maps(clip, x, attention, grid, columns, len(folder.classes), b, k, 1 / tau, box)
    return maps, weights, shown


@torch.no_grad()
def make_maps(maps, images, b, k, args):
    """Maps of the pairs (b, k) over scales and flips: (P, H, W) in [0, 1]. Those of S, which are raw, are
    summed and min-max scaled; those of CLIP, which are in [0, 1], are averaged."""
    size = images.shape[-2:]
    total = images.new_zeros(len(b), *size)
    for scale in args.scales:
        scaled = images
        if scale != 1:
            # From the authors' code, not in the paper: PIL's bicubic, which torch has for bytes on the CPU.
            at = [max(1, round(n * scale)) for n in size]
            scaled = (255 * images).round().byte().cpu()
            scaled = F.interpolate(scaled, at, mode="bicubic", antialias=True).to(images.device) / 255
        for mirrored in (False, True)[:1 + args.flip]:
            part = maps(scaled.flip(-1) if mirrored else scaled, b, k)[:, None].float()  # (P, 1, h, w)
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)[:, 0]
            total += part.flip(-1) if mirrored else part
    if args.source in GRADCAM:
        return total / (len(args.scales) * (1 + args.flip))
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low + 1e-8)


def main():
    args = parse()
    run = processes.Run(args)
    where, exported = args.out / args.cam, args.out / f"{args.cam}_{args.format}"
    guard.claim(where)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)                                                       # (n, C)
    by_clip = args.source in GRADCAM
    args.inputs = {"clip": files.fingerprint(args.clip)} if by_clip else {}
    maps, weights, shown = (open_clip if by_clip else open_generator)(args, folder, run)

    unused = UNUSED.get(args.source, CLIP_FLAGS)
    for place in (exported, where) if args.format else (where,):
        checkpoints.open_folder(place, args, run, FREE + unused, weights=weights, classes=folder.classes)

    def finished(id):
        other = exports.path(exported, id, args.format) if args.format else where
        return args.resume and (where / f"{id}.npy").exists() and other.exists()

    mine = [n for n in run.shard(range(len(ids))) if not finished(ids[n])]
    loader = by_size(folder, [ids[n] for n in mine], args.batch_size, run, args.workers, args.max_side)
    for batch, images in run.progress(loader, f"maps of {args.source}"):
        numbers = [mine[i] for i in batch]
        b, k = run.pairs(labels[numbers])                                             # (P,) image and class
        images = images.to(run.device, non_blocking=True)
        with run.autocast():
            made = make_maps(maps, images, b, k, args)                                # (P, H, W)
        size = image_size(folder.image_path(ids[numbers[0]]))
        made, b, k = shrink_maps(resize_maps(made, size), args.stride).cpu(), b.cpu(), k.cpu()
        for i, n in enumerate(numbers):
            if args.format:
                exports.save(exported, ids[n], args.format, k[b == i], made[b == i], size)
            save_cam(where / f"{ids[n]}.npy", made[b == i])

    run.barrier()
    if run.main:
        sheets.write(args.out / "sheets", args.cam, folder, ids[:args.sheets], labels, where)
        files.save_json(args.out / f"{args.cam}.json", {
            "source": args.init or args.source, "weights": weights, "classes": folder.classes, "texts": shown,
            "scales": args.scales, "flip": args.flip, "images": len(ids), "maps": int(labels.sum()),
            "args": flags.plain(args), "versions": log.versions()})
    also = f"; for {args.format} in {exported}" if args.format else ""
    run.close(f"{where}: {len(ids)} images, {int(labels.sum())} maps of {args.source}{also}")


if __name__ == "__main__":
    guard.run(main)
