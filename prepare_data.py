"""Turns VOC 2012 or COCO 2014 as downloaded into a data folder, and says what is wrong with any data folder.

    python prepare_data.py voc --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE       # SegmentationClassAug, train_aug.txt
    python prepare_data.py coco --coco coco --out data/coco                          # masks, labels.txt, classes.txt, lists
    python prepare_data.py check data/mine                                           # exit 1 if anything is wrong
    python prepare_data.py remap data/coco                                           # 90-id COCO masks -> 1..80

voc     Reads VOC's tar (VOC2012) and SBD's (benchmark_RELEASE/dataset/cls/*.mat; pip install scipy). Writes SegmentationClassAug/<id>.png,
        12,031 palette masks, and ImageSets/Segmentation/train_aug.txt: every mask that is not in val, 10,582. Where VOC and SBD both have
        a mask VOC's is taken: drawn for the benchmark, with a 255 border; SBD's has none. A mask that is already there always stays, and
        is counted aloud. All goes into the VOC tree, or to --out, where pictures, annotations and VOC's masks are links to it.
coco    Reads annotations/instances_{train,val}2014.json, train2014/, val2014/ (pip install pycocotools). Writes JPEGImages/ (links, or
        --copy), SegmentationClass/<id>.png, labels.txt, classes.txt, lists of the pictures with at least one annotation (82,081 and 40,137),
        and the painting rule to SegmentationClass/README.txt: large areas first, small ones on top; category ids 1..90 become 1..80.
check   Reads all lists, pictures, masks and labels, and writes nothing. Each finding is one line: lists, ids, missing or unreadable files,
        sizes, label values, colour masks, 90-id COCO. Without ImageSets/ the one list, train, is that of labels.txt. A split without any mask, or without any label, is no fault; a split with some is.
        Doubts (labels that differ from the mask, pictures of val in train) are warnings and leave the exit status alone.
remap   Masks that hold COCO's category ids 1..90: the folder is renamed to SegmentationClass.90id, and SegmentationClass is written from it.

A file that exists is whole and is not made again: an interrupted command goes on where it was. No file of yours is replaced by another.
"""
import argparse
import json
import os
import re
import shutil
import struct
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing import files as plain_files, flags, folders, guard, images as image_files, masks as mask_files, samples

MASKS = ("SegmentationClass", "SegmentationClassAug")
LISTS = Path("ImageSets") / "Segmentation"
VOC_COUNTS = {"masks of VOC": 2913, "masks of SBD": 11355, "masks together": 12031, "pictures of train_aug": 10582}
COCO_COUNTS = {"train": 82081, "val": 40137}
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)                        # category ids that were never used
COCO_INDEX = {i: k for k, i in enumerate(i for i in range(1, 91) if i not in COCO_GAPS)}    # category id -> class index 0..79
RULE = """Label maps: 0 background, 1..80 the line of classes.txt (contiguous, not COCO's category ids 1..90), 255 ignored.
Painted from instances_{{train,val}}2014.json, areas in descending order: small objects lie on top of large ones, of equal ones the later.
Crowd regions (iscrowd): {}.
labels.txt names the classes of all annotations{}, also of one whose pixels are hidden under others.
"""
CROWDS = {"include": ("painted like any object", ""), "ignore": ("255, beneath all objects", ""),
          "skip": ("left out", " but crowds")}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name, function, text):
        c = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.set_defaults(function=function)
        c.add_argument("--workers", type=flags.natural, default=4, help="processes; 0: none besides this one")
        return c

    c = command("voc", voc, "VOC 2012 and SBD -> SegmentationClassAug, train_aug.txt")
    c.add_argument("--voc", type=Path, required=True, help="VOCdevkit/VOC2012")
    c.add_argument("--sbd", type=Path, required=True, help="benchmark_RELEASE")
    c.add_argument("--out", type=Path, help="another folder than --voc; the rest of VOC is linked there")
    c.add_argument("--allow-partial", action="store_true", help="go on when the counts are not those of the whole of VOC and SBD")
    c = command("coco", coco, "COCO 2014 -> a data folder")
    c.add_argument("--coco", type=Path, required=True, help="holds annotations/, train2014/, val2014/")
    c.add_argument("--out", type=Path, required=True, help="the data folder to make")
    c.add_argument("--crowd", choices=list(CROWDS), default="include", help="crowd regions: painted, 255 beneath all objects, or left out")
    c.add_argument("--copy", action="store_true", help="copy the pictures instead of linking them")
    c = command("check", check, "says what is wrong with a data folder")
    c.add_argument("data", type=Path, metavar="DIR")
    c.add_argument("--show", type=flags.natural, default=20, help="lines for each kind of finding; 0: all")
    c = command("remap", remap, "90-id COCO masks -> 1..80")
    c.add_argument("data", type=Path, metavar="DIR")
    return p.parse_args()


def each(function, jobs, desc, workers):
    """function(job) of all jobs, in their order, in as many processes as there is work for, under a bar."""
    jobs = list(jobs)
    workers = min(workers, os.cpu_count() or 1, len(jobs) // 50)
    results = DataLoader(jobs, batch_size=None, collate_fn=function, num_workers=workers, worker_init_fn=samples.serve)
    return tqdm(results, desc=desc, total=len(jobs), dynamic_ncols=True, mininterval=0.5)


def named(folder, suffix):
    """{id: path}, ascending."""
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}")) if not path.name.startswith(".")}


def write_new(path, text, same=None):
    """A text file, unless it is there. With another content it is not ours to replace."""
    if path.exists():
        if not (same(path) if same else path.read_text(encoding="utf-8") == text):
            raise ValueError(f"{path} is there with another content: move it away or give another --out")
        return
    with plain_files.atomic(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_list(path, ids):
    """A list of bare ids; one with the same ids in another order or notation stays."""
    def same(path):
        return sorted(folders.parse_id(line, path) for line in plain_files.read_lines(path) if line.strip()) == sorted(ids)
    write_new(path, "".join(f"{id}\n" for id in ids), same)


def link(source, target, copy=False):
    """`target` becomes `source`, by a link or a copy; one that leads nowhere (the original has moved) is made again."""
    if target.exists():
        return
    target.unlink(missing_ok=True)
    if not copy:
        target.symlink_to(source.resolve())
        return
    with plain_files.atomic(target) as beside:
        shutil.copyfile(source, beside)


# ---------------------------------------------------------------- VOC

def sources(native, sbd, there):
    """{id: the file its mask comes from}: what is already there, else VOC's, else SBD's."""
    return {id: there.get(id) or native.get(id) or sbd[id] for id in sorted({**sbd, **native, **there})}


def compare(found, partial):
    """The counts, against those of the whole of VOC and SBD."""
    wrong = [f"{found[name]:,} {name} where {count:,} belong" for name, count in VOC_COUNTS.items() if found[name] != count]
    if wrong and not partial:
        raise ValueError(f"{', '.join(wrong)}: unpack VOC2012 and SBD again, take masks of your own out of SegmentationClassAug, "
                         "or go on with --allow-partial")
    print(f"{', '.join(f'{count:,} {name}' for name, count in found.items())}{': not the whole of VOC and SBD' if wrong else ''}")


def bounded(content, depth=0, room=None):
    """Refuses the elements of a .mat that scipy would follow down its stack, or unpack, without end. `room`: [bytes that all of them may still unpack to]."""
    at, room = 0, [1 << 26] if room is None else room
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, at)
        part = content[at + 8:at + 8 + size]
        if kind == 15:                                                      # compressed
            unpacker = zlib.decompressobj()
            part = memoryview(unpacker.decompress(part, 1 << 24))
            room[0] -= len(part)
            if unpacker.unconsumed_tail or room[0] < 0:
                raise ValueError("it unpacks to more than a mask")
        if kind in (14, 15):                                                # 14: a matrix; its class is in byte 8
            if depth > 6 or kind == 14 and part[8] not in (1, 2, *range(4, 16)):
                raise ValueError("it nests without end, or holds what is no matrix")
            bounded(part, depth + 1, room)
        at += 8 if kind >> 16 else 8 + size + (-size % 8 if kind < 14 else 0)         # up to 4 bytes lie in the element's head


def read_sbd(path):
    """SBD's .mat -> (H, W) uint8: 0 background, 1..20."""
    import scipy.io                                                         # optional; voc() has said so when it is missing
    try:
        bounded(memoryview(plain_files.regular(path, 1 << 22).read_bytes())[128:])
        mask = np.asarray(scipy.io.loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:                                              # scipy raises its own and whatever the bytes provoke
        raise ValueError(f"{path} is not a class mask of SBD ({type(error).__name__}: {plain_files.why(error)}): unpack benchmark.tgz again") from None
    if mask.ndim != 2 or mask.dtype.kind not in "uif" or not np.isin(mask, range(21)).all():
        raise ValueError(f"{path} is not a class mask of SBD: (H, W) with 0..20 is expected; unpack benchmark.tgz again")
    return mask.astype(np.uint8)


def write_voc(job):
    source, target = job
    mask_files.save_mask(target, read_sbd(source) if source.suffix == ".mat" else mask_files.load_mask(source, len(folders.VOC_CLASSES)))


def voc(args):
    folder, out = folders.Folder(args.voc), args.out or args.voc
    if not (args.sbd / "dataset" / "cls").is_dir():
        raise FileNotFoundError(f"{args.sbd / 'dataset' / 'cls'} is missing: --sbd is the benchmark_RELEASE folder of SBD's benchmark.tgz")
    native, sbd, there = (named(*p) for p in ((args.voc / MASKS[0], ".png"), (args.sbd / "dataset" / "cls", ".mat"), (out / MASKS[1], ".png")))
    found = sources(native, sbd, there)
    train_aug = sorted(set(found) - set(folder.ids("val")))
    compare(dict(zip(VOC_COUNTS, map(len, (native, sbd, found, train_aug)))), args.allow_partial)
    todo = {id: path for id, path in found.items() if id not in there}
    if any(path.suffix == ".mat" for path in todo.values()):
        require("scipy.io", "scipy", "SBD's .mat files")
    if there:
        print(f"{len(there):,} masks are in {out / MASKS[1]} already and stay as they are")
    guard.claim(out / MASKS[1])
    (out / MASKS[1]).mkdir(parents=True, exist_ok=True)
    (out / LISTS).mkdir(parents=True, exist_ok=True)
    if out.resolve() != args.voc.resolve():
        for name in ("JPEGImages", "Annotations", MASKS[0]):
            link(args.voc / name, out / name)
        for path in (args.voc / LISTS).glob("*.txt"):
            write_new(out / LISTS / path.name, path.read_text(encoding="utf-8"))
    for _ in each(write_voc, [(path, out / MASKS[1] / f"{id}.png") for id, path in todo.items()], "voc", args.workers):
        pass
    write_list(out / LISTS / "train_aug.txt", train_aug)
    print(f"{out}: train_aug has {len(train_aug):,} pictures; python prepare_data.py check {out} looks at all of them")


def require(module, package, purpose):
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"{package} is missing, it reads {purpose}: pip install {package}") from None


# ---------------------------------------------------------------- COCO

def read_instances(path):
    """-> [(file name, (H, W), [(class index, segmentation, is crowd)])] of the pictures with an annotation, count of those without."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: --coco holds annotations/ (annotations_trainval2014.zip), train2014/ and val2014/")
    try:
        content = json.loads(plain_files.regular(path, 1 << 30).read_bytes())
        names = {c["name"]: folders.COCO_CLASSES[COCO_INDEX[c["id"]]] for c in content["categories"]}
        objects = defaultdict(list)
        for a in content["annotations"]:
            objects[a["image_id"]].append((COCO_INDEX[a["category_id"]], a["segmentation"], bool(a.get("iscrowd"))))
        images = [(Path(i["file_name"]).name, (i["height"], i["width"]), objects[i["id"]]) for i in content["images"] if i["id"] in objects]
        for name, (height, width), _ in images:
            if Path(name).suffix not in image_files.PICTURES or type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width > image_files.PIXELS:
                raise ValueError(f"{name:.60} of {width!r:.20} x {height!r:.20} pixels is no picture")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not COCO's instances file ({type(error).__name__}: {plain_files.why(error)}): "
                         "unpack annotations_trainval2014.zip again") from None
    other = [f"{name} (here {ours})" for name, ours in names.items() if name != ours]
    if other:
        raise ValueError(f"{path} has other categories than COCO 2014: {', '.join(other[:3])}; for classes of your own write masks and labels.txt")
    return images, len(content["images"]) - len(images)


def decode(segmentation, shape):
    """Polygons, uncompressed or compressed run lengths -> (H, W) bool."""
    from pycocotools import mask as rle                                     # optional; coco() has said so when it is missing
    if isinstance(segmentation, list):
        segmentation = [p for p in segmentation if len(p) >= 6]             # four numbers would be read as a box
        if not segmentation:
            return np.zeros(shape, dtype=bool)
        if not all(-max(shape) <= n <= 2 * max(shape) for p in segmentation for n in p):              # pycocotools walks along its edges, pixel by pixel
            raise ValueError("a polygon lies outside the picture")
        runs = rle.merge(rle.frPyObjects(segmentation, *shape))
    else:
        if list(segmentation["size"]) != list(shape):                       # pycocotools makes room for it
            raise ValueError(f"run lengths are of a picture of {segmentation['size']!r:.60}, not {tuple(shape)}")
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            text = counts.decode("latin1") if isinstance(counts, bytes) else counts
            if not isinstance(text, str) or re.search(r"[^0-o]|[P-o]{7}|[P-o]\Z", text):     # P-o: the number goes on; pycocotools would follow it past the end
                raise ValueError("its run lengths are torn")
        runs = rle.frPyObjects(segmentation, *shape) if isinstance(counts, list) else segmentation
    mask = rle.decode(runs).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"run lengths are of a picture of {mask.shape}, not {tuple(shape)}")
    return mask


def paint(shape, objects):
    """[(label, (H, W) bool)] -> (H, W) uint8: 255 beneath all, then large areas first, so that small ones lie on top."""
    out = np.zeros(shape, dtype=np.uint8)
    for label, mask in sorted(objects, key=lambda o: (o[0] != mask_files.IGNORE, -int(o[1].sum()))):
        out[mask] = label
    return out


def crowds(objects, rule):
    """[(class index, segmentation, is crowd)] -> [(label, segmentation)] by --crowd."""
    return [(mask_files.IGNORE if crowd and rule == "ignore" else k + 1, s) for k, s, crowd in objects if not (crowd and rule == "skip")]


def write_coco(job):
    source, picture, mask, shape, objects, copy = job
    try:
        found = paint(shape, [(label, decode(s, shape)) for label, s in objects])
    except Exception as error:                                              # pycocotools raises bare Exception
        raise ValueError(f"{source.name}: its segmentation cannot be decoded ({plain_files.why(error)}): unpack annotations_trainval2014.zip again") from None
    link(source, picture, copy)
    mask_files.save_mask(mask, found)


def coco(args):
    require("pycocotools.mask", "pycocotools", "COCO's segmentations")
    masks, text = args.out / MASKS[0], RULE.format(*CROWDS[args.crowd])
    readme = masks / "README.txt"
    if (readme.exists() or named(masks, ".png")) and not (readme.exists() and readme.read_text(encoding="utf-8") == text):
        raise ValueError(f"{masks} holds masks painted by another rule ({readme.name}) than --crowd {args.crowd}: give another --out, or remove it")
    jobs, labels, lists = [], {}, {}
    for split, whole in COCO_COUNTS.items():
        print(f"reading instances_{split}2014.json ...", flush=True)
        images, without = read_instances(args.coco / "annotations" / f"instances_{split}2014.json")
        lists[split] = [folders.check_id(Path(name).stem, "file_name") for name, _, _ in images]
        for id, (name, shape, objects) in zip(lists[split], images):
            labels[id] = sorted({k for k, _, crowd in objects if not (crowd and args.crowd == "skip")})
            jobs.append((args.coco / f"{split}2014" / name, args.out / "JPEGImages" / name, masks / f"{id}.png", shape,
                         crowds(objects, args.crowd), args.copy))
        note = "" if len(images) == whole else f"; the whole of COCO 2014 has {whole:,}"
        print(f"{split}: {len(images):,} pictures with at least one annotation, {without:,} without are left out{note}")
    if len(labels) < len(jobs):
        raise ValueError(f"{args.coco / 'annotations'}: a picture occurs twice, in one file or in both: unpack annotations_trainval2014.zip again")
    todo = [job for job in jobs if not (job[1].exists() and job[2].exists())]
    missing = [job[0] for job in todo if not job[0].exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing, and {len(missing) - 1:,} more pictures: "
                                f"unpack train2014.zip and val2014.zip in {args.coco}")
    guard.claim(masks)
    for folder in (args.out / "JPEGImages", masks, args.out / LISTS):
        folder.mkdir(parents=True, exist_ok=True)
    write_new(readme, text)
    write_new(args.out / "classes.txt", "".join(f"{name}\n" for name in folders.COCO_CLASSES))
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo):,} masks are in {masks} already and stay as they are")
    for _ in each(write_coco, todo, "coco", args.workers):
        pass
    names = [name.replace(" ", "_") for name in folders.COCO_CLASSES]
    write_new(args.out / "labels.txt", "".join(f"{' '.join([id, *(names[k] for k in present)])}\n" for id, present in labels.items()))
    for split, ids in lists.items():
        write_list(args.out / LISTS / f"{split}.txt", ids)
    print(f"{args.out}: finished; crowds {CROWDS[args.crowd][0]}; python prepare_data.py check {args.out} looks at all of it")


# ---------------------------------------------------------------- check

def read_lists(folder, found):
    """{split: ids}. A line that is no id, or an id's second line, is a finding and is passed over."""
    splits = {}
    for path in sorted((folder.root / LISTS).glob("*.txt")):
        ids = splits.setdefault(path.stem, {})                              # a dict keeps the order
        try:
            lines = [line for line in plain_files.read_lines(path) if line.strip()]
        except ValueError as error:
            found["bad list"].append(error)
            continue
        for line in lines:
            try:
                id = folders.parse_id(line, path)
            except ValueError as error:
                found["bad id"].append(error)
                continue
            if id in ids:
                found["duplicate id"].append(f"{path} lists {id} twice: remove one line")
            ids[id] = None
        if not lines:
            found["bad list"].append(f"{path} is empty: remove it or write ids")
    if not splits:
        found["bad list"].append(f"{folder.root / LISTS} holds no list: write train.txt there, one id a line")
    for split in ("train", "train_aug"):
        both = sorted(splits.get(split, {}).keys() & splits.get("val", {}).keys())
        found["warning: in two splits"] += [f"{id} is in {split}.txt and val.txt" for id in both]
    return splits


def read_labels(folder, ids, found):
    """{id: class indices}, None where the entry is a finding. labels.txt is read line by line: folders.read_label_list ends at the first error."""
    path, table = folder.root / "labels.txt", {}
    index = {name.replace(" ", "_"): k for k, name in enumerate(folder.classes)}
    try:
        if not path.exists():
            folder.labels([])                                               # none at all, or a cls_labels.npy that is refused
            return {id: label for id in ids if (label := read_label(folder, id, found)) is not False}
        lines = plain_files.read_lines(path)
    except (ValueError, FileNotFoundError) as error:
        found["bad label"].append(error)
        return dict.fromkeys(ids)
    for number, line in enumerate(lines, 1):
        id, *names = [t.strip() for t in line.split("\t")] if "\t" in line else line.split() or [""]
        names = [name.replace(" ", "_") for name in names if name]
        unknown = [name for name in names if name not in index and not (name.isdecimal() and len(name) < 4 and int(name) < len(index))]
        try:
            id and folders.check_id(id, f"{path}:{number}")
        except ValueError as error:
            found["bad id"].append(error)
            continue
        if id in table:
            found["duplicate id"].append(f"{path}:{number}: {id} has a second line: put its classes on one; fields are parted by tabs where a file name holds blanks")
        if unknown:
            found["bad label"].append(f"{path}:{number}: {unknown[0]!r} is not in classes.txt; blanks in names are written _, or fields are parted by tabs")
        if id:
            table[id] = None if unknown else {index[name] if name in index else int(name) for name in names}
    return table


def read_label(folder, id, found):
    """From XML or cls_labels.npy: class indices; None where it is a finding; False where there is none, which is told for the split."""
    try:
        return set(folder.labels([id])[0].nonzero().flatten().tolist())
    except FileNotFoundError:
        return False
    except ValueError as error:
        found["bad label"].append(error)
        return None


def look(job):
    """One picture and its masks -> [(kind, line)]."""
    picture, masks, label, classes = job
    found, size = [], None
    try:
        size = image_files.load_image(picture).size[::-1] if picture else None
    except (ValueError, OSError) as error:
        found.append(("unreadable picture", str(error)))
    for path in masks:
        try:
            mask = mask_files.load_mask(path)
            with Image.open(path) as file:
                colour = file.mode in ("RGB", "RGBA")
        except (ValueError, OSError) as error:
            found.append(("bad mask", str(error)))
            continue
        if colour:
            found.append(("warning: colour mask", f"{path} holds VOC's colours: read as indices here, not by other programs"))
        if size and mask.shape != size:
            found.append(("size", f"{path} is {mask.shape[1]}x{mask.shape[0]}, its picture {size[1]}x{size[0]}: make the mask again"))
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        beyond = values[(values > len(classes)) & (values != mask_files.IGNORE)]
        if beyond.size and classes == folders.COCO_CLASSES and beyond.max() <= 90:
            found.append(("90-id COCO masks", str(path)))
        elif beyond.size:
            found.append(("label value", f"{path} holds {', '.join(map(str, beyond[:5]))}: masks hold 0..{len(classes)} and 255"))
        elif path == masks[0] and label is not None:
            drawn = set((values[(values > 0) & (values != mask_files.IGNORE)] - 1).tolist())
            shown, said = (", ".join(classes[k] for k in sorted(s)) or "nothing" for s in (drawn, label))
            if drawn != label:
                found.append(("warning: labels differ", f"{path} shows {shown}; its label says {said}"))
    return found


def check(args):
    folder, found = folders.Folder(args.data), defaultdict(list)               # kind -> lines; a kind that starts with "warning" is a doubt
    splits = {"train": read_labels(folder, [], defaultdict(list))} if folder.unlisted() else read_lists(folder, found)
    ids = {id: split for split, members in reversed(splits.items()) for id in members}
    there = {path.name for path in (folder.root / "JPEGImages").iterdir() if path.exists()}         # a link may lead nowhere
    pictures = {id: [folder.root / "JPEGImages" / f"{id}{s}" for s in image_files.PICTURES if f"{id}{s}" in there] for id in ids}
    drawn = [named(folder.root / name, ".png") for name in MASKS]
    masks = {id: [files[id] for files in drawn if id in files] for id in ids}
    labels = read_labels(folder, ids, found)
    for id, split in ids.items():
        if not pictures[id]:
            found["missing picture"].append(f"{folder.root / 'JPEGImages' / id}.jpg, listed in {'labels' if folder.unlisted() else split}.txt")
        if len(pictures[id]) > 1:
            found["warning: two pictures"].append(f"{id}: {pictures[id][0].name} is taken, {pictures[id][1].name} is not")
    if folder.unlisted():
        found["warning: no label"] += [f"{name} has no line in labels.txt, so it is not used" for name in sorted(there) if Path(name).stem not in ids]
    for split, members in splits.items():
        for kind, having in (("mask", {id for id in members if masks[id]}), ("label", members.keys() & labels.keys())):
            without = [id for id in members if id not in having] if having else []
            found[f"missing {kind}"] += [f"{folder.root}: {id} in {split}.txt has none, {len(having):,} others there have one" for id in without]
    jobs = [((pictures[id] or [None])[0], masks[id], labels.get(id), folder.classes) for id in ids]
    for result in each(look, jobs, "check", args.workers):
        for kind, text in result:
            found[kind].append(text)
    if coco90 := found.pop("90-id COCO masks", []):
        found["90-id COCO masks"].append(f"{len(coco90):,} masks, {coco90[0]} first, hold labels 81..90 where classes.txt has 80: "
                                         f"run prepare_data.py remap {args.data}")
    for split, members in splits.items():
        known = [labels[id] for id in members if labels.get(id) is not None]
        mean = f", {sum(map(len, known)) / len(known):.3f} classes a picture, {known.count(set()):,} without any" if known else ""
        print(f"{split}: {len(members):,} ids, {sum(bool(pictures[id]) for id in members):,} pictures, "
              f"{sum(bool(masks[id]) for id in members):,} with a mask, {len(known):,} with labels{mean}")
    show(args, found, len(folder.classes))


def show(args, found, classes):
    for kind in sorted(found, key=lambda kind: kind.startswith("warning")):
        for text in found[kind][:args.show or None]:
            print(f"{kind}: {text}")
        if len(found[kind]) > args.show > 0:
            print(f"{kind}: ... and {len(found[kind]) - args.show:,} more (--show 0: all)")
    doubts = sum(len(texts) for kind, texts in found.items() if kind.startswith("warning"))
    problems = sum(map(len, found.values())) - doubts
    print(f"{args.data}: {classes} classes, {problems or 'no'} problem{'s' * (problems != 1)}, {doubts or 'no'} warning{'s' * (doubts != 1)}")
    if problems:
        sys.exit(1)


# ---------------------------------------------------------------- remap

def values_of(path):
    return set(np.unique(mask_files.load_mask(path)).tolist())


def write_remapped(job):
    source, target = job
    table = np.zeros(256, dtype=np.uint8)
    table[list(COCO_INDEX)] = np.arange(1, 81)
    table[mask_files.IGNORE] = mask_files.IGNORE
    mask_files.save_mask(target, table[mask_files.load_mask(source)])


def remap(args):
    folder = folders.Folder(args.data)
    if folder.classes != folders.COCO_CLASSES:
        raise ValueError(f"{args.data / 'classes.txt'} does not list COCO's 80 classes: remap is for COCO alone")
    guard.claim(args.data / MASKS[0])
    for masks in (args.data / name for name in MASKS if (args.data / name).is_dir() or (args.data / f"{name}.90id").is_dir()):
        kept = masks.with_name(f"{masks.name}.90id")                        # once it is there the question is settled: never mapped twice
        if not kept.exists():
            values = set().union(*each(values_of, named(masks, ".png").values(), "looking", args.workers))
            if not any(80 < v <= 90 for v in values):
                raise ValueError(f"{masks} holds no label 81..90: nothing says that these are 90-id masks, they stay as they are")
            if odd := sorted(v for v in values if v in COCO_GAPS or 90 < v < mask_files.IGNORE):
                raise ValueError(f"{masks} holds label {odd[0]}, which is no category id of COCO: not 90-id masks, they stay as they are")
            os.rename(masks, kept)
        masks.mkdir(exist_ok=True)
        todo = [(path, masks / path.name) for path in named(kept, ".png").values() if not (masks / path.name).exists()]
        for _ in each(write_remapped, todo, "remap", args.workers):
            pass
        write_new(masks / "README.txt", f"Label maps 1..80, remapped from the category ids 1..90 in {kept.name}. 0 background, 255 ignored.\n")
        print(f"{masks}: {len(todo):,} masks remapped from 90 ids to 80; the originals are in {kept}")


def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    guard.run(main)
