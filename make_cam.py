"""Localisation maps of the present classes: from a trained mask generator S, or from CLIP's GradCAM by texts or by vision prototypes.

Paper   SemPLeS 4.3: the refined masks M' are taken as CAMs (--source refine); VPL Eq. 1 and its maps by W (--source vision); CLIP-ES (--source text)
Reads   pictures and image labels of --data; <out>/cls.pt, match.pt, refine.pt (--source) or --init; CLIP (text, vision); <out>/prototypes.pt (vision)
Writes  <out>/cam/<id>.npy: float16 (P, h, w), one row per present class, ascending, each min-max scaled to [0, 1]
        <out>/sheets/cam_<n>.png: pictures, maps and, where there is one, the truth, to look at
        <out>/cam_<format>/: with --format, what IRN, PSA/WeakTr, CLIP-ES and FMA-WSSS read
        <out>/cam.json, last: arguments and counts

Maps of S are added over scales and flips; those of CLIP are of the picture as it is, as in CLIP-ES, unless --scales and --flip say otherwise.
Vision prototypes take the texts' places in the softmax, at the temperature they were learned with. Compare text and vision maps at the same
temperature (--source text --tau-t 0.03): a softer softmax alone changes the maps.

Finished files are skipped; maps of another source or recipe are refused, or replaced with --no-resume.

    python make_cam.py --data /data/VOC2012 --out runs/voc --source refine
    python make_cam.py --data /data/COCO --out runs/coco --split train --scales 1.0 0.8 1.2 --pool avg
    python make_cam.py --data /data/VOC2012 --out runs/weaktr --init weaktr.pth --format irn
    python make_cam.py --data /data/VOC2012 --out runs/clip_es --source text
    python make_cam.py --data /data/VOC2012 --out runs/vpl --source vision
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from plumbing import checkpoints, files, flags, folders, guard, images as image_files, log, maps as map_files, masks, processes, samples
from wsss import clip_model, generator, gradcam, texts

GRADCAM = ("text", "vision")                                                            # sources that are CLIP's own maps


def parse():
    p = flags.parser(__doc__, batch_size=16)
    p.add_argument("--source", choices=["cls", "match", "refine", "text", "vision"], default="refine",
                   help="stage whose generator makes the maps; text: CLIP-ES; vision: VPL's prototypes")
    p.add_argument("--init", help="generator to take instead of <out>/<source>.pt: a published checkpoint or one of ours")
    p.add_argument("--pool", choices=["max", "avg"], help="pooling of S's attention fusion; left out: what the file of S says, else max (max: VOC, avg: COCO)")
    p.add_argument("--scales", type=float, nargs="+", help="sizes of the picture to add maps over (default: 1.0 1.2 for S, 1.0 for CLIP)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="add the maps of the mirrored picture (default: for S)")
    p.add_argument("--stride", type=flags.positive, default=1, help="store maps at 1/STRIDE of the picture's size: 4 takes 1/16 of the disk")
    p.add_argument("--format", choices=list(FORMATS), help="also write what another project reads")
    p.add_argument("--cam", type=flags.name, default="cam", help="folder in --out for the maps, to keep those of several sources side by side")
    p.add_argument("--sheets", type=flags.natural, default=32, help="pictures to show on contact sheets")
    g = flags.localising(p)
    g.add_argument("--tau-i", type=flags.above_zero, help="temperature for vision prototypes (default: the one they were learned with)")
    args = p.parse_args()
    by_clip = args.source in GRADCAM
    args.scales = args.scales or ([1.0] if by_clip else [1.0, 1.2])
    args.flip = not by_clip if args.flip is None else args.flip
    if by_clip and args.init:
        p.error("--init is a generator: it goes with --source cls, match or refine")
    if args.cache and (not by_clip or args.scales != [1.0] or args.flip):
        p.error("--cache goes with --source text or vision, one scale of 1 and no flip")
    if min(args.scales) <= 0:
        p.error("--scales are above 0")
    return args


# ---------------------------------------------------------------- what other projects read

def irn(path, classes, cam, size):
    """keys 0..C-1, maps at a quarter of the size and at full size; keys and cam are tensors, since IRN's next stage asks cam for .cuda()."""
    small = map_files.resize_maps(cam, [(n - 1) // 4 + 1 for n in size])                     # as IRN's edge map
    np.save(path, {"keys": torch.as_tensor(classes), "cam": small, "high_res": map_files.resize_maps(cam, size).numpy()}, allow_pickle=True)


def psa(path, classes, cam, size):
    """{class: map}, as PSA, WeakTr and SemPLeS's public code."""
    np.save(path, {int(k): m.numpy() for k, m in zip(classes, map_files.resize_maps(cam, size))}, allow_pickle=True)


def clip_es(path, classes, cam, size):
    np.save(path, {"keys": np.asarray(classes), "attn_highres": map_files.resize_maps(cam, size).numpy()}, allow_pickle=True)


def fma(path, classes, cam, size):
    np.savez(path, cam=np.asarray(cam), fg_cls=np.asarray(classes))


FORMATS = {"irn": irn, "psa": psa, "clip_es": clip_es, "fma": fma}


def exported(args, id):
    return args.out / f"{args.cam}_{args.format}" / f"{id}.{'npz' if args.format == 'fma' else 'npy'}"


def finished(args, id):
    return (args.out / args.cam / f"{id}.npy").exists() and (not args.format or exported(args, id).exists())


def export(args, id, classes, cam, size):
    with files.atomic(exported(args, id)) as beside, open(beside, "wb") as file:
        FORMATS[args.format](file, classes, torch.as_tensor(cam).float(), size)


# ---------------------------------------------------------------- maps

def open_generator(args, folder, env):
    """-> (maps(images, b, k, ids) -> (P, h, w) raw maps of the pairs, fingerprint of the weights)"""
    path = args.init or args.out / f"{args.source}.pt"
    if args.init:
        checkpoints.inputs(init=path)                                           # must be sound
    else:
        checkpoints.load(path, args.source, folder.classes)
    S = generator.load_generator(path, args.pool, folder.classes).to(env.device).eval()
    args.pool = S.pool
    return lambda images, b, k, ids: S.maps(images)[b, k], files.fingerprint(path)


def open_clip(args, folder, env):
    """The same by CLIP's GradCAM; the columns of its softmax are texts or vision prototypes."""
    clip = env.in_turn(lambda: clip_model.load_clip(args.clip, env.device, vit=True))
    if args.source == "text":
        columns, tau = clip.encode_text(texts.prompt_texts(folder, args.prompt, args.template)), args.tau_t
        weights = args.inputs["clip"] or args.clip
    else:
        content = checkpoints.load_prototypes(args, folder, clip)
        columns, tau, weights = content["model"]["prototypes"].to(env.device), args.tau_i or content["tau_i"], files.fingerprint(args.out / "prototypes.pt")
    box = args.box if args.affinity else None

    def maps(images, b, k, ids):
        look = lambda: gradcam.last_inputs(clip, images, size=gradcam.within(images.shape[-2:], args.max_side))
        seen = gradcam.stored_inputs(args.out / "cache", ids, look, checkpoints.sound) if args.cache else look()
        x, attention, grid = (part.to(env.device) if torch.is_tensor(part) else part for part in seen)
        return gradcam.class_maps(clip, x, attention, grid, columns, len(folder.classes), b, k, 1 / tau, box)

    if args.cache:
        checkpoints.open_folder(args.out / "cache", argparse.Namespace(resume=args.resume, amp=args.amp, max_side=args.max_side), env, (), keep=True, clip=clip.fingerprint())
    return maps, weights


@torch.no_grad()
def maps_of(maps, images, b, k, ids, args):
    """Maps of the pairs (b, k) summed over scales and flips, then min-max per map: (P, H, W) in [0, 1]."""
    size = images.shape[-2:]
    total = images.new_zeros(len(b), *size)
    for scale in args.scales:
        scaled = images
        if scale != 1:
            scaled = F.interpolate(images, [max(1, round(n * scale)) for n in size], mode="bilinear", align_corners=False)
        for flip in [False, True][:1 + args.flip]:
            part = maps(scaled.flip(-1) if flip else scaled, b, k, ids)[:, None].float()                # (P, 1, h, w)
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)[:, 0]
            total += part.flip(-1) if flip else part
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low + 1e-8)


def make(maps, folder, ids, labels, args, env):
    """Writes the maps of this process's pictures that are not there yet."""
    mine = [n for n in env.shard(range(len(ids))) if not (args.resume and finished(args, ids[n]))]
    loader = samples.by_size(folder, [ids[n] for n in mine], args.batch_size, env, args.workers)
    for batch, images in env.progress(loader, f"maps of {args.source}"):
        numbers = [mine[i] for i in batch]
        b, k = labels[numbers].nonzero(as_tuple=True)
        with env.autocast():
            stored = maps_of(maps, images.to(env.device, non_blocking=True), b.to(env.device), k.to(env.device), [ids[n] for n in numbers], args)
        stored = map_files.shrink_maps(stored, args.stride).cpu()
        for i, n in enumerate(numbers):
            if args.format:                                                             # first: the map below marks the picture as finished
                export(args, ids[n], k[b == i].numpy(), stored[b == i], images.shape[-2:])
            map_files.save_cam(args.out / args.cam / f"{ids[n]}.npy", stored[b == i])


# ---------------------------------------------------------------- contact sheets

TILE = 160


def tile(image, caption):
    """A picture in a TILE x TILE square with its name below."""
    canvas = Image.new("RGB", (TILE, TILE + 14), "white")
    image = image.resize([round(n * (TILE - 4) / max(image.size)) for n in image.size], Image.BILINEAR)
    canvas.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    ImageDraw.Draw(canvas).text((4, TILE), caption, fill="black")
    return canvas


def sheet(folder, ids, labels, args, path):
    """Rows of picture, a map for each present class, truth."""
    rows = []
    for id, label in zip(ids, labels):
        image = image_files.load_image(folder.picture(id))
        classes, cam = map_files.load_cam(args.out / args.cam / f"{id}.npy", label)
        row = [tile(image, id)] + [tile(map_files.heat(image, m), folder.classes[k]) for k, m in zip(classes, cam)]
        if folder.has_mask(id):
            row.append(tile(masks.paint(folder.truth(id)).convert("RGB"), "truth"))
        rows.append(row)
    width = max(map(len, rows))
    canvas = Image.new("RGB", (2 * width * TILE, -(-len(rows) // 2) * (TILE + 14)), "white")             # two pictures a line
    for n, row in enumerate(rows):
        for m, part in enumerate(row):
            canvas.paste(part, ((n % 2 * width + m) * TILE, n // 2 * (TILE + 14)))
    with files.atomic(path) as beside:
        canvas.save(beside, format="PNG")


FREE = ("split", "limit", "batch_size", "seed", "sheets", "format")          # these do not change a picture's maps


def main():
    args = parse()
    env = processes.Env(args)
    guard.claim(args.out / args.cam)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)
    args.inputs = checkpoints.inputs(clip=args.clip) if args.source in GRADCAM else {}
    maps, weights = (open_clip if args.source in GRADCAM else open_generator)(args, folder, env)

    unused = {"vision": ("prompt", "template", "tau_t", "pool"), "text": ("tau_i", "pool")}.get(args.source, ())
    checkpoints.open_folder(args.out / args.cam, args, env, FREE + unused, weights=weights, classes=folder.classes)
    for name in ["sheets"] + ([f"{args.cam}_{args.format}"] if args.format else []):
        (args.out / name).mkdir(exist_ok=True)
    make(maps, folder, ids, labels, args, env)
    env.barrier()
    if env.main:
        for n in range(0, min(args.sheets, len(ids)), 16):
            part = slice(n, min(n + 16, args.sheets))
            sheet(folder, ids[part], labels[part], args, args.out / "sheets" / f"{args.cam}_{n // 16}.png")
        files.save_json(args.out / f"{args.cam}.json", {"source": args.init or args.source, "weights": weights, "classes": folder.classes, "scales": args.scales, "flip": args.flip,
                                                         "pictures": len(ids), "maps": int(labels.sum()), "args": flags.plain(args), "versions": log.versions()})
    env.close(f"{args.out / args.cam}: {len(ids)} pictures, {int(labels.sum())} maps of {args.source}")


if __name__ == "__main__":
    guard.run(main)
