"""Localisation maps of the present classes, from a trained mask generator S, over scales and flips.

Paper   SemPLeS 4.3: the refined masks M' are taken as CAMs
Reads   pictures and image labels of --data, <out>/cls.pt, match.pt or refine.pt (--source) or --init
Writes  <out>/cam/<id>.npy: float16 (P, h, w), one row per present class, ascending, each min-max scaled to [0, 1]
        <out>/sheets/cam_<n>.png: pictures, maps and, where there is one, the truth, to look at
        <out>/cam_<format>/: with --format, what IRN, PSA/WeakTr, CLIP-ES and FMA-WSSS read
        <out>/cam.json, last: arguments and counts

Finished files are skipped; maps of another source or recipe are refused, or replaced with --no-resume.

    python make_cam.py --data /data/VOC2012 --out runs/voc --source refine
    python make_cam.py --data /data/COCO --out runs/coco --split train --scales 1.0 0.8 1.2 --pool avg
    python make_cam.py --data /data/VOC2012 --out runs/weaktr --init weaktr.pth --format irn
"""
import argparse
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from wsss import common, data, generator


def parse():
    p = common.parser(__doc__, batch_size=16)
    p.add_argument("--source", choices=["cls", "match", "refine"], default="refine", help="stage whose generator makes the maps")
    p.add_argument("--init", help="generator to take instead of <out>/<source>.pt: a published checkpoint or one of ours")
    p.add_argument("--pool", choices=["max", "avg"], default="max", help="pooling of S's attention fusion (max: VOC, avg: COCO)")
    p.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.2], help="sizes of the picture to add maps over")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="add the maps of the mirrored picture")
    p.add_argument("--stride", type=common.positive, default=1, help="store maps at 1/STRIDE of the picture's size: 4 takes 1/16 of the disk")
    p.add_argument("--format", choices=list(FORMATS), help="also write what another project reads")
    p.add_argument("--cam", default="cam", help="folder in --out for the maps, to keep those of several sources side by side")
    p.add_argument("--sheets", type=common.natural, default=32, help="pictures to show on contact sheets")
    return p.parse_args()


# ---------------------------------------------------------------- what other projects read

def irn(path, classes, cam, size):
    """keys 0..C-1, maps at a quarter of the size and at full size."""
    small = data.resize_maps(cam, [(n - 1) // 4 + 1 for n in size])                     # as IRN's edge map
    np.save(path, {"keys": np.asarray(classes), "cam": small.numpy(), "high_res": data.resize_maps(cam, size).numpy()}, allow_pickle=True)


def psa(path, classes, cam, size):
    """{class: map}, as PSA, WeakTr and SemPLeS's public code."""
    np.save(path, {int(k): m.numpy() for k, m in zip(classes, data.resize_maps(cam, size))}, allow_pickle=True)


def clip_es(path, classes, cam, size):
    np.save(path, {"keys": np.asarray(classes), "attn_highres": data.resize_maps(cam, size).numpy()}, allow_pickle=True)


def fma(path, classes, cam, size):
    np.savez(path, cam=np.asarray(cam), fg_cls=np.asarray(classes))


FORMATS = {"irn": irn, "psa": psa, "clip_es": clip_es, "fma": fma}


def exported(args, id):
    return args.out / f"{args.cam}_{args.format}" / f"{id}.{'npz' if args.format == 'fma' else 'npy'}"


def finished(args, id):
    return (args.out / args.cam / f"{id}.npy").exists() and (not args.format or exported(args, id).exists())


def export(args, id, classes, cam, size):
    with data.atomic(exported(args, id)) as beside, open(beside, "wb") as file:
        FORMATS[args.format](file, classes, torch.as_tensor(cam).float(), size)


# ---------------------------------------------------------------- maps

class Pictures(Dataset):
    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.folder.image(self.ids[i])


def batches_of_equal_size(folder, ids, batch_size):
    """Numbers of the pictures in batches that stack: as many of one size as --batch-size allows."""
    sizes = [data.picture_size(folder.picture(id)) for id in ids]
    for _, group in groupby(sorted(range(len(ids)), key=lambda i: (sizes[i], i)), key=lambda i: sizes[i]):
        group = list(group)
        yield from (group[n:n + batch_size] for n in range(0, len(group), batch_size))


@torch.no_grad()
def maps_of(S, images, b, k, args):
    """Maps of the pairs (b, k) summed over scales and flips, then min-max per map: (P, H, W) in [0, 1]."""
    size = images.shape[-2:]
    total = images.new_zeros(len(b), *size)
    for scale in args.scales:
        scaled = images
        if scale != 1:
            scaled = F.interpolate(images, [max(1, round(n * scale)) for n in size], mode="bilinear", align_corners=False)
        for flip in [False, True][:1 + args.flip]:
            maps = S.maps(scaled.flip(-1) if flip else scaled)[b, k][:, None].float()                   # (P, 1, h, w)
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]
            total += maps.flip(-1) if flip else maps
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low + 1e-8)


def make(S, folder, ids, labels, args, env):
    """Writes the maps of this process's pictures that are not there yet."""
    mine = [n for n in env.shard(range(len(ids))) if not (args.resume and finished(args, ids[n]))]
    batches = list(batches_of_equal_size(folder, [ids[n] for n in mine], args.batch_size))
    loader = DataLoader(Pictures(folder, [ids[n] for n in mine]), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=env.device.type == "cuda")
    for batch, images in zip(batches, env.progress(loader, f"maps of {args.source}", len(batches))):
        numbers = [mine[i] for i in batch]
        b, k = labels[numbers].nonzero(as_tuple=True)
        with env.autocast():
            maps = maps_of(S, images.to(env.device, non_blocking=True), b, k, args)
        stored = data.shrink_maps(maps, args.stride).cpu()
        for i, n in enumerate(numbers):
            if args.format:                                                             # first: the map below marks the picture as finished
                export(args, ids[n], k[b == i].numpy(), stored[b == i], images.shape[-2:])
            data.save_cam(args.out / args.cam / f"{ids[n]}.npy", stored[b == i])


# ---------------------------------------------------------------- contact sheets

TILE = 160


def tile(image, caption):
    """A picture in a TILE x TILE square with its name below."""
    canvas = Image.new("RGB", (TILE, TILE + 14), "white")
    image = image.resize([round(n * (TILE - 4) / max(image.size)) for n in image.size], Image.BILINEAR)
    canvas.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    ImageDraw.Draw(canvas).text((4, TILE), caption, fill="black")
    return canvas


def heat(image, cam):
    """The map over the grey picture: dark blue where it is 0, through red to yellow where it is 1."""
    value = np.asarray(Image.fromarray(np.float32(cam)).resize(image.size, Image.BILINEAR))[..., None].clip(0, 1)
    colour = np.concatenate([np.minimum(1, 2 * value), np.maximum(0, 2 * value - 1), 0.5 * (1 - value)], -1) * 255
    grey = np.asarray(image.convert("L").convert("RGB"))
    return Image.fromarray(np.uint8(0.35 * grey + 0.65 * colour))


def sheet(folder, ids, labels, args, path):
    """Rows of picture, a map for each present class, truth."""
    rows = []
    for id, label in zip(ids, labels):
        image = data.load_image(folder.picture(id))
        classes, cam = data.load_cam(args.out / args.cam / f"{id}.npy", label)
        row = [tile(image, id)] + [tile(heat(image, m), folder.classes[k]) for k, m in zip(classes, cam)]
        if folder.has_mask(id):
            row.append(tile(data.paint(folder.truth(id)).convert("RGB"), "truth"))
        rows.append(row)
    width = max(map(len, rows))
    canvas = Image.new("RGB", (2 * width * TILE, -(-len(rows) // 2) * (TILE + 14)), "white")             # two pictures a line
    for n, row in enumerate(rows):
        for m, part in enumerate(row):
            canvas.paste(part, ((n % 2 * width + m) * TILE, n // 2 * (TILE + 14)))
    with data.atomic(path) as beside:
        canvas.save(beside, format="PNG")


FREE = ("split", "limit", "batch_size", "seed", "sheets", "format")          # these do not change a picture's maps


def open_folder(args, weights, classes, env):
    """Maps that lie there must be of the same weights and recipe: their note is written before the first of them."""
    note = args.out / args.cam / "recipe.json"
    if args.resume and note.exists():
        before = common.read_json(note)
        common.same_recipe(note.parent, before["args"], args, FREE)
        if before["classes"] != classes:
            raise ValueError(f"{note.parent} holds maps of other classes ({common.describe(before['classes'])}): --no-resume replaces them")
        if before["weights"] != weights:
            raise ValueError(f"{note.parent} holds maps of other weights ({before['weights']}, now {weights}): --no-resume replaces them")
    env.barrier()
    if env.main:
        for name in [args.cam, "sheets"] + ([f"{args.cam}_{args.format}"] if args.format else []):
            (args.out / name).mkdir(exist_ok=True)
        if not args.resume:
            for path in note.parent.glob("*.npy"):
                path.unlink()
        (args.out / f"{args.cam}.json").unlink(missing_ok=True)                         # it stands for a finished folder
        common.save_json(note, {"args": common.plain(args), "weights": weights, "classes": classes})
    env.barrier()


def main():
    args = parse()
    env = common.Env(args)
    folder = data.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels = folder.labels(ids)
    path = args.init or args.out / f"{args.source}.pt"
    if not args.init:
        common.load(path, args.source, folder.classes)
    S = generator.load_generator(path, args.pool, len(folder.classes)).to(env.device).eval()
    weights = common.fingerprint(path)

    open_folder(args, weights, folder.classes, env)
    make(S, folder, ids, labels, args, env)
    env.barrier()
    if env.main:
        for n in range(0, min(args.sheets, len(ids)), 16):
            part = slice(n, min(n + 16, args.sheets))
            sheet(folder, ids[part], labels[part], args, args.out / "sheets" / f"{args.cam}_{n // 16}.png")
        common.save_json(args.out / f"{args.cam}.json", {"source": args.init or args.source, "weights": weights, "classes": folder.classes, "scales": args.scales, "flip": args.flip,
                                                         "pictures": len(ids), "maps": int(labels.sum()), "args": common.plain(args), "versions": common.versions()})
    env.close(f"{args.out / args.cam}: {len(ids)} pictures, {int(labels.sum())} maps of {args.source}")


if __name__ == "__main__":
    common.run(main)
