"""Turns VOC 2012 or COCO 2014, as downloaded, into a data folder, and checks any data folder.

    python prepare_data.py voc --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE   # SegmentationClassAug, lists
    python prepare_data.py coco --coco coco --out data/coco                      # masks, labels, names, lists
    python prepare_data.py coco --json mine.json --images photos --out data/mine # one file in COCO's format
    python prepare_data.py check data/mine                                       # exit 1 if anything is wrong
    python prepare_data.py remap data/coco                                       # 90-id COCO masks -> 1..80

voc     Reads VOC's tar (VOC2012) and SBD's (benchmark_RELEASE/dataset/cls/*.mat; pip install scipy). Writes
        SegmentationClassAug/<id>.png, 12,031 palette masks, and ImageSets/Segmentation/train_aug.txt: every
        mask that is not in val, 10,582. Where both have a mask VOC's is taken: it was drawn for the benchmark
        and has a 255 border. A mask that is already there always stays. All goes into the VOC tree, or to
        --out, where images, annotations and VOC's masks are links to it.
coco    Reads annotations/instances_{train,val}2014.json, train2014/, val2014/ (pip install pycocotools).
        Writes JPEGImages/ (links), SegmentationClass/<id>.png, labels.txt, classes.txt, lists of
        the images with at least one annotation (82,081 and 40,137), and SegmentationClass/README.txt, the
        painting rule: large areas first, small ones on top; category ids 1..90 become 1..80.
        --json: a file as CVAT, Label Studio or Roboflow export it, of any ids and names. Categories without
        an annotation and images without one are left out. Where all objects have outlines, every image has a
        mask and every fifth is val; where only those of some images have, these are val, at most a fifth of
        all images; where none has, all are train.
check   Reads all lists, images, masks and labels, and writes nothing. Each finding is one line: lists, ids,
        missing or unreadable files, sizes, label values, 90-id COCO masks. Without ImageSets/ the one
        list, train, is that of labels.txt. A split may lack all masks or all labels, but not only some.
        Doubts (labels that differ from the mask, images of val in train) are warnings: exit 0.
remap   For masks that hold COCO's category ids 1..90: the folder is renamed to SegmentationClass.90id, and
        SegmentationClass is written from it.

An interrupted command goes on where it was. No file of yours is replaced.
"""
import argparse
import json
import math
import os
import sys
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing import files, flags, folders, guard, processes
from plumbing.folders import COCO_CLASSES, VOC_CLASSES, Folder
from plumbing.images import IMAGE_ENDINGS, image_size, load_image
from plumbing.masks import IGNORE, load_mask, save_mask
from wsss.generator import COCO_GAPS

MASKS = ("SegmentationClass", "SegmentationClassAug")
LISTS = Path("ImageSets") / "Segmentation"
VOC_COUNTS = {"masks of VOC": 2913, "masks of SBD": 11355, "masks together": 12031, "train_aug images": 10582}
COCO_COUNTS = {"train": 82081, "val": 40137}
COCO_IDS = [i for i in range(1, 91) if i not in COCO_GAPS]    # the others were never used
COCO_INDEX = {i: k for k, i in enumerate(COCO_IDS)}           # category id -> class index 0..79
RULE = """Label maps: 0 background, 1 and more the line of classes.txt, not category ids; 255 ignored.
Painted from {}, areas in descending order: small objects lie on top of large
ones, of equal ones the later. Crowd regions (iscrowd): {}.
labels.txt names the classes of all annotations{}, also of one whose pixels are hidden under others.
"""
CROWDS = {"include": ("painted like any object", ""), "ignore": ("255, beneath all objects", ""),
          "skip": ("left out", " but crowds")}
AGAIN = "unpack annotations_trainval2014.zip again"


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def add_command(name, function, text):
        c = commands.add_parser(name, help=text, formatter_class=flags.Manual)
        c.set_defaults(function=function)
        c.add_argument("--workers", type=flags.natural, default=4, help="processes; 0: none besides this one")
        return c

    c = add_command("voc", prepare_voc, "VOC 2012 and SBD -> SegmentationClassAug, train_aug.txt")
    c.add_argument("--voc", type=Path, required=True, help="VOCdevkit/VOC2012")
    c.add_argument("--sbd", type=Path, required=True, help="benchmark_RELEASE")
    c.add_argument("--out", type=Path, help="another folder than --voc; the rest of VOC is linked there")
    c.add_argument("--allow-partial", action="store_true", help="go on with a part of VOC or SBD")
    c = add_command("coco", prepare_coco, "COCO 2014 -> a data folder")
    source = c.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", type=Path, help="holds annotations/, train2014/, val2014/")
    source.add_argument("--json", type=Path, help="one file in COCO's format, of any classes")
    c.add_argument("--images", type=Path, default=Path(), help="the folder of its images")
    c.add_argument("--out", type=Path, required=True, help="the data folder to make")
    c.add_argument("--crowd", choices=list(CROWDS), default="include",
                   help="crowd regions: painted, 255 beneath all objects, or left out")
    c = add_command("check", check_folder, "says what is wrong with a data folder")
    c.add_argument("data", type=Path, metavar="DIR")
    c.add_argument("--show", type=flags.natural, default=20, help="lines for each kind of finding; 0: all")
    c = add_command("remap", remap_folder, "90-id COCO masks -> 1..80")
    c.add_argument("data", type=Path, metavar="DIR")
    return p.parse_args()


def run_all(function, jobs, desc, workers, where):
    """function(job) of all jobs, in as many processes as there is work for. -> results, in any order"""
    workers = min(workers, os.cpu_count() or 1, len(jobs) // 50)
    results = processes.pooled(function, ((job,) for job in jobs), workers, where)
    return list(tqdm(results, desc=desc, total=len(jobs), dynamic_ncols=True, mininterval=0.5))


def files_by_id(folder, *endings):
    """{id: path} of the files with one of these endings; of several the first ending counts."""
    paths = [path for ending in reversed(endings) for path in sorted(folder.glob(f"[!.]*{ending}"))]
    return {path.stem: path for path in paths if path.exists()}  # a link may lead nowhere


def require(module, package, purpose):
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"{package} is missing, it reads {purpose}: pip install {package}") from None


def write_new(path, text):
    """Writes a text file. One that is there with another content is the user's and stays."""
    if not path.exists():
        with files.atomic(path) as beside:
            beside.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} is there with another content: move it away or give another --out")


def write_list(path, ids):
    """Writes a list of ids. One with the same ids in another order or notation stays."""
    lines = files.read_lines(path) if path.exists() else []
    if sorted(folders.parse_id(line, path) for line in lines if line.strip()) != sorted(ids):
        write_new(path, "".join(f"{id}\n" for id in ids))


def link(source, target):
    """Makes `target` a link to `source`. A link that leads nowhere is made again."""
    if not target.exists():
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve())


# ---------------------------------------------------------------- VOC

def check_counts(counts, partial):
    """Prints the counts. Others than those of the whole of VOC and SBD need --allow-partial."""
    wrong = [f"{counts[name]:,} {name}, not {n:,}" for name, n in VOC_COUNTS.items() if counts[name] != n]
    if wrong and not partial:
        raise ValueError(f"{', '.join(wrong)}: unpack VOC2012 and SBD again, take masks of your own out of "
                         "SegmentationClassAug, or go on with --allow-partial")
    text = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    print(f"{text}{': not the whole of VOC and SBD' if wrong else ''}")


def read_sbd(path):
    """SBD's .mat -> (H, W) uint8: 0 background, 1..20."""
    import scipy.io  # optional, see `require`
    try:
        content = scipy.io.loadmat(path, variable_names=["GTcls"])
        mask = np.asarray(content["GTcls"]["Segmentation"][0, 0])
        if mask.ndim != 2 or not np.isin(mask, range(21)).all():
            raise ValueError("(H, W) with 0..20 is expected")
    except Exception as error:                                # scipy raises many kinds
        reason = f"{type(error).__name__}: {files.first_line(error)}"
        raise ValueError(f"{path} is not a mask of SBD ({reason}): unpack benchmark.tgz again") from None
    return mask.astype(np.uint8)


def write_voc(job):
    source, target = job
    save_mask(target, read_sbd(source) if source.suffix == ".mat" else load_mask(source, len(VOC_CLASSES)))


def prepare_voc(args):
    folder, out = Folder(args.voc), args.out or args.voc
    cls, masks, lists = args.sbd / "dataset" / "cls", out / MASKS[1], out / LISTS
    if not cls.is_dir():
        raise FileNotFoundError(f"{cls} is missing: --sbd is the folder benchmark_RELEASE of benchmark.tgz")
    native = files_by_id(args.voc / MASKS[0], ".png")
    sbd = files_by_id(cls, ".mat")
    there = files_by_id(masks, ".png")
    sources = sbd | native | there                            # the last one has the mask
    train_aug = sorted(set(sources) - set(folder.ids("val")))
    check_counts(dict(zip(VOC_COUNTS, map(len, (native, sbd, sources, train_aug)))), args.allow_partial)
    jobs = [(path, masks / f"{id}.png") for id, path in sorted(sources.items()) if id not in there]
    if any(path.suffix == ".mat" for path, _ in jobs):
        require("scipy.io", "scipy", "SBD's .mat files")
    print(f"{len(there):,} masks are in {masks} already and stay as they are")
    guard.claim(masks)
    masks.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    if out.resolve() != args.voc.resolve():
        for name in ("JPEGImages", "Annotations", MASKS[0]):
            link(args.voc / name, out / name)
        for path in (args.voc / LISTS).glob("*.txt"):
            write_new(lists / path.name, path.read_text(encoding="utf-8"))
    run_all(write_voc, jobs, "voc", args.workers, masks)
    write_list(lists / "train_aug.txt", train_aug)
    print(f"{out}: train_aug has {len(train_aug):,} images; next: python prepare_data.py check {out}")


# ---------------------------------------------------------------- COCO

# An image as downloaded, its place and its mask's, (H, W), [(label, segmentation)], class indices.
Job = namedtuple("Job", "source image mask shape objects present")


def read_objects(content, index):
    """{image id: [(class index, crowd, segmentation)]}; `index`: category id -> class index"""
    objects = defaultdict(list)
    for a in content["annotations"]:
        crowd, shape = bool(a.get("iscrowd")), a.get("segmentation") or []
        objects[a["image_id"]].append((index[a["category_id"]], crowd, shape))
    return objects


def make_job(args, source, shape, objects):
    kept = [o for o in objects if not (o[1] and args.crowd == "skip")]
    labelled = [(IGNORE if crowd and args.crowd == "ignore" else k + 1, s) for k, crowd, s in kept]
    mask = args.out / MASKS[0] / f"{source.stem}.png"
    present = sorted({o[0] for o in kept})
    return Job(source, args.out / "JPEGImages" / source.name, mask, shape, labelled, present)


def read_split(args, split):
    """instances_<split>2014.json -> a Job for each image with an annotation"""
    path = args.coco / "annotations" / f"instances_{split}2014.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: unpack annotations_trainval2014.zip in {args.coco}")
    print(f"reading {path} ...", flush=True)
    try:
        content = json.loads(path.read_bytes())
        names = {c["name"]: COCO_CLASSES[COCO_INDEX[c["id"]]] for c in content["categories"]}
        objects = read_objects(content, COCO_INDEX)
        jobs = []
        for image in (image for image in content["images"] if image["id"] in objects):
            source = args.coco / f"{split}2014" / Path(image["file_name"]).name
            folders.check_id(source.stem, path)
            jobs.append(make_job(args, source, (image["height"], image["width"]), objects[image["id"]]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {files.first_line(error)}"
        raise ValueError(f"{path} is not COCO's instances file ({reason}): {AGAIN}") from None
    if other := [f"{name} (here {expected})" for name, expected in names.items() if name != expected]:
        raise ValueError(f"{path} has other categories than COCO 2014: {', '.join(other[:3])}; "
                         "for classes of your own write masks and labels.txt")
    note = "" if len(jobs) == COCO_COUNTS[split] else f"; the whole of COCO 2014 has {COCO_COUNTS[split]:,}"
    without = len(content["images"]) - len(jobs)
    print(f"{split}: {len(jobs):,} images with an annotation, {without:,} without are left out{note}")
    return jobs


def read_own(args):
    """One file in COCO's format -> the names of its classes, {split: jobs}"""
    try:
        content = json.loads(args.json.read_bytes())
        used = {a["category_id"] for a in content["annotations"]}
        known = {c["id"]: str(c["name"]).strip() for c in content["categories"] if c["id"] in used}
        index = {id: k for k, id in enumerate(sorted(known))}
        objects = read_objects(content, index)
        images = [i for i in content["images"] if i["id"] in objects]
        listed = [str(i["file_name"]) for i in images]
    except FileNotFoundError:
        raise FileNotFoundError(f"{args.json} is missing: --json is the file with the annotations") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {files.first_line(error)}"
        raise ValueError(f"{args.json} is not in COCO's format ({reason}): export it as COCO, with "
                         "categories, images and annotations") from None
    names = [known[id] for id in sorted(known)]
    if odd := [name for name in names if not name or names.count(name) > 1 or name == "background"]:
        raise ValueError(f"{args.json}: the name {odd[0]!r} is of two categories or no class: rename it")
    if not images:
        raise ValueError(f"{args.json} annotates no image: were the annotations exported?")
    jobs = []
    for path, image in zip(find_images(args, listed), images):
        shape, drawn = image_size(path), (image.get("height"), image.get("width"))
        if None not in drawn and drawn != shape:
            raise ValueError(f"{path} is {shape[1]}x{shape[0]}, {drawn[1]}x{drawn[0]} in {args.json}: give "
                             "the --images that were annotated; it may be turned by its EXIF")
        job = make_job(args, path, shape, objects[image["id"]])
        jobs.append(job if all(s for _, s in job.objects) else job._replace(mask=None))
    masked, most = [job for job in jobs if job.mask], len(jobs) // 5
    val = masked[::max(1, math.ceil(len(masked) / max(1, most)))] if len(jobs) > 1 else []
    kept = {job.image for job in val}
    train = [job for job in jobs if job.image not in kept]
    if len(masked) < len(jobs):                               # a list has all masks or none
        train = [job._replace(mask=None) for job in train]
    splits = {"train": train, "val": val}
    print(f"{len(names)} classes, {len(jobs):,} images with an annotation, "
          f"{len(content['images']) - len(jobs):,} without are left out; {len(masked):,} have segmentations; "
          f"train {len(splits['train']):,}, val {len(val):,}")
    return names, {split: members for split, members in splits.items() if members}


def find_images(args, names):
    """The files that a COCO file names: by their path in --images, or by their name wherever it is there."""
    if not args.images.is_dir():
        raise FileNotFoundError(f"{args.images} is not a folder: --images is the folder of the images that "
                                f"{args.json} names")
    there = defaultdict(list)
    for path in sorted(args.images.rglob("[!.]*")):
        there[path.name] += [path] if path.is_file() else []
    found, ids = [], {}
    for name in (name.replace("\\", "/") for name in names):
        places = [args.images / name] if (args.images / name).is_file() else there[Path(name).name]
        if len(places) > 1:
            raise ValueError(f"{args.json}: {name} may be {places[0]} or {places[1]}: rename one")
        if not places:
            lost = sum(not there[Path(other.replace("\\", "/")).name] for other in names)
            raise FileNotFoundError(f"{args.images} holds no {name}, {lost} of {len(names)} images that "
                                    f"{args.json} names are missing: give the --images they are in")
        path = places[0]
        if path.suffix not in IMAGE_ENDINGS:
            raise ValueError(f"{path}: images end in {', '.join(IMAGE_ENDINGS[:3])}: convert it and export "
                             "again")
        id = folders.check_id(path.stem, args.json)
        if id in ids:
            raise ValueError(f"{args.json}: {name} and {ids[id]} would both be image {id}: rename one")
        ids[id] = name
        found.append(path)
    return found


def read_outline(segmentation, shape):
    """Polygons, uncompressed or compressed run lengths -> (H, W) bool."""
    from pycocotools import mask as rle  # optional, see `require`
    runs = segmentation
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if len(p) >= 6]   # four numbers would be read as a box
        if not polygons:
            return np.zeros(shape, dtype=bool)
        runs = rle.merge(rle.frPyObjects(polygons, *shape))
    elif isinstance(segmentation["counts"], list):
        runs = rle.frPyObjects(segmentation, *shape)
    mask = rle.decode(runs).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"run lengths are of an image of {mask.shape}, not {tuple(shape)}")
    return mask


def paint_objects(shape, objects):
    """[(label, (H, W) bool)] -> (H, W) uint8: 255 beneath all, then large areas first, small ones on top."""
    out = np.zeros(shape, dtype=np.uint8)
    for label, mask in sorted(objects, key=lambda o: (o[0] != IGNORE, -int(o[1].sum()))):
        out[mask] = label
    return out


def write_coco(job):
    if not job.mask:
        return link(job.source, job.image)
    try:
        mask = paint_objects(job.shape, [(label, read_outline(s, job.shape)) for label, s in job.objects])
    except Exception as error:                                # pycocotools raises bare Exception
        raise ValueError(f"{job.source.name}: its segmentation cannot be decoded "
                         f"({files.first_line(error)}): take its annotations from a whole file") from None
    link(job.source, job.image)
    save_mask(job.mask, mask)


def prepare_coco(args):
    if args.json:
        classes, splits = read_own(args)
    else:
        classes, splits = COCO_CLASSES, {split: read_split(args, split) for split in COCO_COUNTS}
    masks = args.out / MASKS[0]
    sources = "instances_{train,val}2014.json"
    if args.json:                                             # another export makes other masks
        sources = f"{args.json.name} (SHA-256 {files.fingerprint(args.json)})"
    rule = RULE.format(sources, *CROWDS[args.crowd])
    readme = masks / "README.txt"
    painted = readme.exists() or files_by_id(masks, ".png")
    if painted and not (readme.exists() and readme.read_text(encoding="utf-8") == rule):
        raise ValueError(f"{masks} holds masks that are not of these files with --crowd {args.crowd}: "
                         "give another --out, or remove the folder")
    jobs = [job for members in splits.values() for job in members]
    if any(job.mask for job in jobs):
        require("pycocotools.mask", "pycocotools", "COCO's segmentations")
    if len({job.image for job in jobs}) < len(jobs):
        raise ValueError(f"{args.json or args.coco / 'annotations'}: an image occurs twice: {AGAIN}")
    todo = [job for job in jobs if not (job.image.exists() and (not job.mask or job.mask.exists()))]
    missing = [job.source for job in todo if not job.source.exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} and {len(missing) - 1:,} more images are missing: "
                                f"unpack train2014.zip and val2014.zip in {args.coco}")
    guard.claim(masks)
    for folder in (args.out / "JPEGImages", masks, args.out / LISTS):
        folder.mkdir(parents=True, exist_ok=True)
    write_new(readme, rule)
    write_new(args.out / "classes.txt", "".join(f"{name}\n" for name in classes))
    print(f"{len(jobs) - len(todo):,} masks are in {masks} already and stay as they are")
    run_all(write_coco, todo, "coco", args.workers, masks)
    lines = ["\t".join([job.image.stem, *(classes[k] for k in job.present), ""]) for job in jobs]
    write_new(args.out / "labels.txt", "".join(f"{line}\n" for line in lines))
    for split, members in splits.items():
        write_list(args.out / LISTS / f"{split}.txt", [job.image.stem for job in members])
    print(f"{args.out}: crowds {CROWDS[args.crowd][0]}; next: python prepare_data.py check {args.out}")


# ---------------------------------------------------------------- check
# `found` is {kind: lines}; a kind that starts with "warning" is a doubt.

def attempt(lines, function, *args):
    """function(*args). Where it refuses its input the reason is added to `lines`, and None comes back."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        lines.append(str(error))


def read_lists(folder, found):
    """{split: ids}. A line that is no id, or an id's second line, is a finding and is passed over."""
    splits = {}
    for path in sorted((folder.root / LISTS).glob("*.txt")):
        ids = splits[path.stem] = {}                          # a dict keeps the order
        lines = attempt(found["bad list"], files.read_lines, path)
        if lines is not None and not any(line.strip() for line in lines):
            found["bad list"].append(f"{path} is empty: remove it or write ids")
        for line in lines or []:
            id = attempt(found["bad id"], folders.parse_id, line, path) if line.strip() else None
            if id in ids:
                found["duplicate id"].append(f"{path} lists {id} twice: remove one line")
            elif id:
                ids[id] = None
    if not splits:
        found["bad list"].append(f"{folder.root / LISTS} holds no list: write train.txt there, one id a line")
    for split in ("train", "train_aug"):
        both = sorted(splits.get(split, {}).keys() & splits.get("val", {}).keys())
        found["warning: in two splits"] += [f"{id} is in {split}.txt and val.txt" for id in both]
    return splits


def read_labels_txt(path, classes, found):
    """{id: class indices}, None where the entry is a finding. The stages' reader ends at the first error."""
    index, labels = folders.index_labels(classes), {}
    for number, line in enumerate(attempt(found["bad label"], files.read_lines, path) or [], 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        id, *names = folders.split_labels(line)
        unknown = [name for name in names if name not in index]
        if any(field.endswith(",") for field in (id, *names)):
            found["bad label"].append(f"{where}: no commas: blanks or tabs part the fields")
            continue
        if not attempt(found["bad id"], folders.check_id, id, where):
            continue
        if id in labels:
            found["duplicate id"].append(f"{where}: {id} has a second line: put its classes on one; "
                                         "where a file name holds blanks, part the fields by tabs")
        if unknown:
            found["bad label"].append(f"{where}: {unknown[0]!r} is not in classes.txt; "
                                      "write _ for a blank in a name, or part the fields by tabs")
        labels[id] = None if unknown else {index[name] for name in names}
    return labels


def read_labels(folder, ids, found):
    """The same from XML or cls_labels.npy. An id without an entry is left out."""
    labels = {}
    if attempt(found["bad label"], folder.labels, []) is None:                        # no labels at all
        return labels
    for id in ids:
        try:
            labels[id] = set(folder.labels([id])[0].nonzero().flatten().tolist())
        except FileNotFoundError:
            continue
        except ValueError as error:
            found["bad label"].append(error)
            labels[id] = None
    return labels


def find_missing(folder, splits, images, masks, labels, found):
    """What is listed and has no image, mask or label; images that are not listed."""
    unlisted = folder.unlisted()
    for split, members in splits.items():
        source = "labels.txt" if unlisted else f"{split}.txt"
        without = [folder.root / "JPEGImages" / f"{id}.jpg" for id in members if id not in images]
        found["missing image"] += [f"{path}, listed in {source}" for path in without]
        for kind, known in (("mask", masks), ("label", labels)):
            having = members.keys() & known.keys()
            note = f"in {source} has none, {len(having):,} others there have one"
            without = [id for id in members if having and id not in having]
            found[f"missing {kind}"] += [f"{folder.root}: {id} {note}" for id in without]
    if unlisted:
        names = [path.name for id, path in images.items() if id not in labels]
        found["warning: no label"] += [f"{name} has no line in labels.txt: it is not used" for name in names]


def inspect(job):
    """An image and its mask, None where they are missing -> [(kind, line)]"""
    image_path, path, label, classes = job
    found = defaultdict(list)
    image = attempt(found["unreadable image"], load_image, image_path) if image_path else None
    mask = attempt(found["bad mask"], load_mask, path) if path else None
    if image and mask is not None and mask.shape != image.size[::-1]:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image {image.width}x{image.height}"
        found["size"].append(f"{path} is {sizes}: make the mask again")
    values = set() if mask is None else set(np.unique(mask).tolist()) - {0, IGNORE}
    beyond = sorted(v for v in values if v > len(classes))
    drawn = {v - 1 for v in values}
    if beyond and classes == COCO_CLASSES and beyond[-1] <= 90:
        found["90-id COCO mask"].append(f"{path} holds {beyond[-1]}, classes.txt has 80 classes: "
                                        "run prepare_data.py remap")
    elif beyond:
        some = ", ".join(map(str, beyond[:5]))
        found["label value"].append(f"{path} holds {some}: masks hold 0..{len(classes)} and 255")
    elif mask is not None and label is not None and label != drawn:
        shown, listed = (", ".join(classes[k] for k in sorted(s)) or "nothing" for s in (drawn, label))
        found["warning: labels differ"].append(f"{path} shows {shown}; its label says {listed}")
    return [(kind, line) for kind, lines in found.items() for line in lines]


def check_folder(args):
    folder, found = Folder(args.data), defaultdict(list)
    attempt(found["bad background"], getattr, folder, "backgrounds")
    labels_txt, labels = folder.root / "labels.txt", None
    if labels_txt.exists():
        labels = read_labels_txt(labels_txt, folder.classes, found)
    splits = {"train": labels} if folder.unlisted() else read_lists(folder, found)
    ids = dict.fromkeys(id for members in splits.values() for id in members)
    if labels is None:
        labels = read_labels(folder, ids, found)
    images = files_by_id(folder.root / "JPEGImages", *IMAGE_ENDINGS)
    for path in sorted((folder.root / "JPEGImages").iterdir()):
        if path.suffix in IMAGE_ENDINGS and images.get(path.stem, path) != path:
            found["warning: two images"].append(f"{path} is not used, {images[path.stem].name} is")
    masks = {id: folder.mask_path(id) for id in ids if folder.has_mask(id)}
    find_missing(folder, splits, images, masks, labels, found)
    jobs = [(images.get(id), masks.get(id), labels.get(id), folder.classes) for id in ids]
    results = run_all(inspect, jobs, "check", args.workers, folder.root)
    for kind, line in sorted(pair for pairs in results for pair in pairs):
        found[kind].append(line)
    for split, members in splits.items():
        known = [labels[id] for id in members if labels.get(id) is not None]
        line = (f"{split}: {len(members):,} ids, {len(members.keys() & images.keys()):,} images, "
                f"{len(members.keys() & masks.keys()):,} with a mask, {len(known):,} with labels")
        if known:
            mean = sum(map(len, known)) / len(known)
            line += f", {mean:.3f} classes an image, {known.count(set()):,} without any"
        print(line)
    print_findings(args, found, len(folder.classes))


def print_findings(args, found, classes):
    for kind in sorted(found, key=lambda kind: kind.startswith("warning")):
        for text in found[kind][:args.show or None]:
            print(f"{kind}: {text}")
        if len(found[kind]) > args.show > 0:
            print(f"{kind}: ... and {len(found[kind]) - args.show:,} more (--show 0: all)")
    doubts = sum(len(lines) for kind, lines in found.items() if kind.startswith("warning"))
    problems = sum(map(len, found.values())) - doubts
    note = "" if (args.data / "classes.txt").exists() else " (no classes.txt: VOC's)"
    print(f"{args.data}: {classes} classes{note}, {problems or 'no'} problem{'s' * (problems != 1)}, "
          f"{doubts or 'no'} warning{'s' * (doubts != 1)}")
    if problems:
        sys.exit(1)


# ---------------------------------------------------------------- remap

def read_values(path):
    return set(np.unique(load_mask(path)).tolist())


def write_remapped(job):
    source, target = job
    table = np.zeros(256, dtype=np.uint8)
    table[COCO_IDS] = np.arange(1, 81)
    table[IGNORE] = IGNORE
    save_mask(target, table[load_mask(source)])


def remap_folder(args):
    if Folder(args.data).classes != COCO_CLASSES:
        raise ValueError(f"{args.data / 'classes.txt'} does not list COCO's 80 classes: remap is for COCO")
    guard.claim(args.data / MASKS[0])
    if not any((args.data / f"{name}{end}").is_dir() for name in MASKS for end in ("", ".90id")):
        raise FileNotFoundError(f"{args.data / MASKS[0]} is missing: remap is for a folder of masks")
    for masks in (args.data / name for name in MASKS):
        kept = masks.with_name(f"{masks.name}.90id")          # once made, nothing is mapped twice
        if not kept.exists() and masks.is_dir():
            paths = list(files_by_id(masks, ".png").values())
            values = set().union(*run_all(read_values, paths, "reading", args.workers, masks))
            odd = sorted(v for v in values if v in COCO_GAPS or 90 < v < IGNORE)
            if odd or not any(80 < v <= 90 for v in values):
                reason = f"label {odd[0]}, which is no category id of COCO" if odd else "no label 81..90"
                raise ValueError(f"{masks} holds {reason}: not 90-id masks, they stay as they are")
            os.rename(masks, kept)
        if kept.exists():
            masks.mkdir(exist_ok=True)
            there, originals = files_by_id(masks, ".png"), files_by_id(kept, ".png")
            todo = [(path, masks / path.name) for id, path in originals.items() if id not in there]
            run_all(write_remapped, todo, "remap", args.workers, masks)
            write_new(masks / "README.txt", f"Label maps 1..80, 255 ignored, made from {kept.name}.\n")
            print(f"{masks}: {len(todo):,} masks remapped from 90 ids to 80; the originals are in {kept}")


def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    guard.run(main)
