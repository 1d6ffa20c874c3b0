"""Predicts your own photographs with a trained network, or VOC 2012's test split for its server.

Reads   <out>/seg.pt (train_seg.py); --images: photographs, or --voc-test: split test of --data
Writes  <out>/pred/<folder>/<name>.png: palette label maps at the photographs' size; <name>.jpg: overlays;
        with --save-prob <name>.npy: float16 (1 + C, h, w), the background first, at the size that was seen
        <out>/comp6_test.tgz: the VOC server's archive, checked (comp6: CLIP and ImageNet are outside data)

Finished predictions are kept: an interrupted run goes on.

    python predict.py --out runs/voc --images photos
    python predict.py --out runs/voc --images "trip/*/IMG_*.jpg" holiday/beach.png --save-prob
    python predict.py --data /data/VOC2012 --out runs/voc --voc-test
"""
import argparse
import glob
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from plumbing import checkpoints, files, flags, folders, guard, networks, processes
from plumbing.images import IMAGE_ENDINGS, image_size, load_float
from plumbing.masks import IGNORE, load_mask, palette, resize_mask, save_mask
from wsss import crf

# What does not change a prediction.
FREE = ("split", "limit", "batch_size", "seed", "clip", "images", "voc_test", "save_prob")
VOC_TEST = 1456                                               # images of VOC 2012's test set


def parse():
    p = flags.parser(__doc__, split="test", data=False)
    g = p.add_argument_group("prediction")
    g.add_argument("--images", nargs="+", help="your own images, folders, files or patterns: no --data, no "
                   "truth")
    g.add_argument("--save-prob", action="store_true", help="keep the probabilities, too")
    flags.max_side(g)
    g.add_argument("--voc-test", action="store_true",
                   help="predict VOC's test split and write the server's archive")
    g.add_argument("--scales", type=flags.above_zero, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
                   help="sizes of the image to average probabilities over")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="average with the mirrored image")
    g.add_argument("--crf", action=argparse.BooleanOptionalAction, default=True,
                   help="dense CRF on the probabilities, in --workers processes")
    g.add_argument("--preset", choices=list(crf.PRESETS), default="deeplab", help="its parameters")
    g.add_argument("--clip", help="CLIP of a clip_decoder, if it is not where it was in training")
    args = p.parse_args()
    if (args.images is None) != args.voc_test:
        p.error("one of --images DIR and --voc-test")
    if args.voc_test and args.data is None:
        p.error("--voc-test needs --data")
    return args


def find_photos(name):
    """A folder, a file or a pattern -> the paths of its images."""
    if Path(name).is_file():
        return [Path(name)]
    pattern = os.path.join(glob.escape(name), "*") if Path(name).is_dir() else name
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in paths if path.suffix in IMAGE_ENDINGS]
    if not found:
        raise FileNotFoundError(f"{name}: no image there ({', '.join(IMAGE_ENDINGS[:3])}); --images takes "
                                "folders, files and patterns")
    return found


class Photos:
    """Somebody's own images, by file name without ending; as much of Folder as prediction needs."""

    def __init__(self, names):
        self.paths = {}
        for path in (path for name in names for path in find_photos(name)):
            if self.paths.setdefault(path.stem, path) != path:
                raise ValueError(f"{path} and {self.paths[path.stem]} would both be written to "
                                 f"{path.stem}.png: rename one, or give each an --out")
        self.folder = Path(os.path.commonpath([path.resolve().parent for path in self.paths.values()]))

    def image_path(self, id):
        return self.paths[id]

    def image(self, id, max_side):
        return load_float(self.paths[id], max_side)


def keep_names(path, paths, resume):
    """Which image each prediction is of: two of one name, of two calls, are not taken for each other, and one
    that has changed is predicted again."""
    known = files.read_json(path) if path.exists() and resume else {}
    for id, image in paths.items():
        now = [str(image.resolve()), image.stat().st_mtime_ns]
        before = known.get(id, now)
        if before[0] != now[0]:
            raise ValueError(f"{path.parent / id}.png is of {before[0]}, not of {now[0]}: rename one, or "
                             "give another --out")
        if before != now:
            for ending in ("png", "jpg", "npy"):
                (path.parent / f"{id}.{ending}").unlink(missing_ok=True)
        known[id] = now
    files.save_json(path, known)


def finish(id, image, probability, path, args, classes, where, device="cpu"):
    """An image as it was predicted (H, W, 3) uint8, probabilities (1 + C, H, W) -> its label map, written."""
    if args.crf:
        probability = crf.dense_crf(image, probability, args.preset, device=device)
    mask = np.uint8(probability.argmax(0))
    if args.save_prob:
        with files.atomic(where / f"{id}.npy") as beside, open(beside, "wb") as file:
            np.save(file, probability.astype(np.float16), allow_pickle=False)
    if args.images:
        jpeg = io.BytesIO()                                   # PIL's JPEG writer does not notice a full disk
        draw_overlay(image, mask, classes).save(jpeg, format="JPEG", quality=92)
        with files.atomic(where / f"{id}.jpg") as beside:
            beside.write_bytes(jpeg.getvalue())
    mask = resize_mask(mask, image_size(path))
    save_mask(where / f"{id}.png", mask)                      # last: it marks the image as finished
    return mask


def draw_overlay(image, mask, classes):
    """The image under the colours of its prediction, outlined, with the names of the classes below."""
    colour = palette()[mask]                                  # (H, W, 3)
    edge = np.zeros(mask.shape, bool)
    edge[1:] = mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    shown = np.where(mask[..., None] > 0, 0.45 * image + 0.55 * colour, image)
    shown[edge] = 255
    found = [k for k in np.unique(mask) if k > 0]
    height, width = mask.shape
    canvas = Image.new("RGB", (width, height + 16 * max(1, len(found))), "white")
    canvas.paste(Image.fromarray(np.uint8(shown)))
    draw = ImageDraw.Draw(canvas)
    for row, k in enumerate(found):
        top = height + 16 * row
        draw.rectangle((3, top + 3, 13, top + 13), fill=tuple(palette()[k].tolist()))
        draw.text((18, top + 2), f"{classes[k - 1]}  {100 * (mask == k).mean():.0f} %", fill="black")
    return canvas


def write_archive(path, where, folder, ids):
    """The VOC server's archive of the predictions. Every file is checked first."""
    with files.atomic(path) as beside, tarfile.open(beside, "w:gz") as tar:
        for id in ids:
            file = where / f"{id}.png"
            mask, size = load_mask(file, len(folder.classes)), image_size(folder.image_path(id))
            with Image.open(file) as image:
                if image.mode != "P" or mask.shape != size or (mask == IGNORE).any():
                    raise ValueError(f"{file} is not a palette mask of {size[1]}x{size[0]} without 255: "
                                     "remove it and run this command again")
            tar.add(file, f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png")


def main():
    args = parse()
    run = processes.Run(args)
    folder = Photos(args.images) if args.images else folders.Folder(args.data)
    source = folder.folder if args.images else args.data.resolve()
    where = args.out / "pred" / (source.name or "images" if args.images else args.split)
    if source == where.resolve():
        raise ValueError(f"{source} is where predictions are written: move the images to another folder")
    ids = list(folder.paths)[:args.limit or None] if args.images else folder.ids(args.split, args.limit)
    if args.voc_test and (folder.classes != folders.VOC_CLASSES or len(ids) != VOC_TEST):
        raise ValueError(f"--voc-test: {args.data} has {len(folder.classes)} classes and {len(ids)} images "
                         f"in its split test, VOC 2012 has 20 and {VOC_TEST:,}")
    seg = args.out / "seg.pt"
    classes = checkpoints.load(seg, "seg", folder.classes if args.voc_test else None)["classes"]
    guard.claim(where)
    args.inputs = {"network": files.fingerprint(seg)}
    checkpoints.open_folder(where, args, run, FREE, classes=classes, data=source.name)

    if args.images and run.main:
        keep_names(where / "photos.json", {id: folder.paths[id] for id in ids}, args.resume)
    run.barrier()
    endings = ("png", "npy")[:1 + args.save_prob]
    todo = [id for id in run.shard(ids) if not all((where / f"{id}.{ending}").exists() for ending in endings)]
    model = networks.load_segmenter(seg, run, args.clip)
    pool = args.workers if args.crf and run.device.type == "cpu" else 0  # a GPU does the CRF itself
    predicted = networks.predict(model, folder, todo, run, args, 0 if pool else args.workers)
    tasks = ((*each, folder.image_path(each[0]), args, classes, where, run.device) for each in predicted)
    for _ in run.progress(processes.pooled(finish, tasks, pool, where), "predictions", len(todo)):
        pass
    run.barrier()
    files_made = "<name>.png label maps" + (", <name>.jpg overlays" if args.images else "")
    files_made += ", <name>.npy probabilities" if args.save_prob else ""
    message = f"{where}: {len(ids)} predictions, {files_made}"
    if args.voc_test and run.main:
        archive = args.out / "comp6_test.tgz"
        write_archive(archive, where, folder, ids)
        message = f"{archive}: to be sent to the VOC server as comp6"
    run.close(message)


if __name__ == "__main__":
    guard.run(main)
