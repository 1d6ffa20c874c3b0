"""Data folders in VOC layout: lists, labels, class names, where images and true masks are."""
import functools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from plumbing import files
from plumbing.foreign import read_pickled
from plumbing.images import IMAGE_ENDINGS, load_float
from plumbing.masks import load_mask

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor").split()
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")


class Folder:
    """One data folder.

    JPEGImages/  ImageSets/Segmentation/<split>.txt  (no ImageSets/: the split `train` is all of labels.txt)
    labels.txt, or other projects' cls_labels.npy, or VOC's Annotations/*.xml
    classes.txt (none: VOC's twenty)  backgrounds.txt (none: .backgrounds is None)
    SegmentationClass/, SegmentationClassAug/: true masks, only to score"""

    def __init__(self, root):
        self.root = Path(root)
        images = self.root / "JPEGImages"
        if not images.is_dir():
            raise FileNotFoundError(f"{images} is missing: --data is a folder in VOC layout "
                                    "(make_toy.py makes one, prepare_data.py prepares VOC and COCO)")
        self.classes = read_names(self.root / "classes.txt") or list(VOC_CLASSES)
        self._labels = None

    @functools.cached_property
    def backgrounds(self):
        """The names in backgrounds.txt; None without that file."""
        names = read_names(self.root / "backgrounds.txt")
        if both := set(self.classes) & set(names or ()):
            raise ValueError(f"{self.root / 'backgrounds.txt'}: {min(both)} is a class here, take it out")
        return names

    # -- lists

    def ids(self, split, limit=0):
        """Ids of a split, in the order of its list; the first `limit` if that is not 0."""
        path = self.root / "ImageSets" / "Segmentation" / f"{check_id(split, '--split')}.txt"
        if not path.exists() and split == "train_aug":
            ids = self._train_aug()
        elif split == "train" and self.unlisted():
            ids = list(read_label_list(self.root / "labels.txt", self.classes))
        elif not path.exists():
            there = sorted(p.stem for p in path.parent.glob("*.txt")) + ["train"] * self.unlisted()
            choice = f"--split is one of {', '.join(there)}" if there else "write it, or labels.txt"
            raise FileNotFoundError(f"{path} is missing: {choice}")
        else:
            ids = [parse_id(line, path) for line in files.read_lines(path) if line.strip()]
        if not ids:
            raise ValueError(f"{path} is empty: give a split that holds images")
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise ValueError(f"{path} lists {twice} twice: remove one line")
        return ids[:limit] if limit else ids

    def unlisted(self):
        """Is there no ImageSets/ but a labels.txt? Then `train` is every image of labels.txt."""
        return not (self.root / "ImageSets").exists() and (self.root / "labels.txt").exists()

    def _train_aug(self):
        """Every mask of SegmentationClassAug that is not in val: SBD and VOC train less VOC val, 10,582."""
        masks = self.root / "SegmentationClassAug"
        if not masks.is_dir():
            raise FileNotFoundError(f"{self.root}: neither ImageSets/Segmentation/train_aug.txt nor "
                                    "SegmentationClassAug/ is there: run prepare_data.py voc, "
                                    "or give --split train")
        return sorted({p.stem for p in masks.glob("*.png")} - set(self.ids("val")))

    # -- labels

    def labels(self, ids):
        """(n, C) float32, 1 where the image holds the class; a row of zeros for an image without any."""
        if self._labels is None:
            self._labels = self._read_labels()
        labels = np.zeros((len(ids), len(self.classes)), np.float32)
        for row, id in zip(labels, ids):
            row[self._present(id)] = 1
        return torch.from_numpy(labels)

    def _read_labels(self):
        """{id: class indices} and the file they came from; with XML, {} and None: read when asked for."""
        for name, read in (("labels.txt", read_label_list), ("cls_labels.npy", read_cls_labels)):
            if (self.root / name).exists():
                return read(self.root / name, self.classes), self.root / name
        if (self.root / "Annotations").is_dir():
            return {}, None
        raise FileNotFoundError(f"{self.root} holds no labels: "
                                "write labels.txt (a line an image: id class class ...)")

    def _present(self, id):
        table, source = self._labels
        key = id
        if id not in table and source is None:
            table[id] = read_xml(self.root / "Annotations" / f"{id}.xml", self.classes)
        elif id not in table and id.replace("_", "").isdecimal():
            key = int(id.replace("_", ""))                      # IRN's keys: 2007000032 for 2007_000032
        if key not in table:
            raise ValueError(f"{source} has no entry for {id}: write labels.txt, a line an image "
                             "(the id alone if no class is present)")
        return table[key]

    # -- images and truth

    def image_path(self, id):
        for ending in IMAGE_ENDINGS:
            path = self.root / "JPEGImages" / f"{id}{ending}"
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.root / 'JPEGImages' / id}.jpg is missing: "
                                f"put the image there, or take {id} off the list")

    def image(self, id, max_side=0):
        """(3, H, W) float RGB in [0, 1]."""
        return load_float(self.image_path(id), max_side)

    def mask_path(self, id):
        """Native VOC masks (with 255 borders) before SBD's."""
        for path in self._mask_paths(id):
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.root / 'SegmentationClass' / id}.png is missing: "
                                "scoring needs true masks, training does not")

    def has_mask(self, id):
        return any(path.exists() for path in self._mask_paths(id))

    def _mask_paths(self, id):
        return [self.root / name / f"{id}.png" for name in ("SegmentationClass", "SegmentationClassAug")]

    def truth(self, id):
        """(H, W) uint8 label map: 0 background, 1..C, 255 ignored."""
        return load_mask(self.mask_path(id), len(self.classes))


# ---------------------------------------------------------------- names and ids

def read_names(path):
    """The names in classes.txt or backgrounds.txt, one a line; None where there is no such file."""
    if not path.exists():
        return None
    names = [plain_blanks(line.strip()) for line in files.read_lines(path) if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} must hold one name a line, none twice")
    if "background" in names:
        raise ValueError(f"{path} lists 'background': remove it, it is label 0 of every mask and no class")
    if odd := [name for name in names if not printable(name)]:
        raise ValueError(f"{path} lists {odd[0]!r:.60}, which holds characters that do not print: "
                         "write plain letters and blanks")
    if len(names) > 254:
        raise ValueError(f"{path} lists {len(names)} names, an 8-bit mask holds 254")
    return names


def plain_blanks(name):
    """The name with blanks for no-break spaces, which look the same."""
    return name.replace("\u00a0", " ")


def printable(name):
    """Can it be shown? Joiners inside a name can: emoji, Persian and Indian scripts are written with them."""
    return name.strip("\u200c\u200d") == name and re.sub("[\u200c\u200d]", "", name).isprintable()


def parse_id(line, path):
    """The id in a line of a list: `2007_000032`, or `/JPEGImages/x.jpg /SegmentationClassAug/x.png`."""
    text = line.strip()
    first = Path(text.split(maxsplit=1)[0])
    if "/" in text and first.parent.name == "JPEGImages" and ".." not in first.parts:
        return check_id(first.stem, path)
    return check_id(text, path)


def check_id(id, path):
    """`id`, if it is a file name without folder and ending: it becomes the name of files we write."""
    if (not id or id != id.strip() or id.startswith(".") or id.endswith(IMAGE_ENDINGS)
            or re.search(r"[/\\\x00-\x1f\x7f]", id)):
        raise ValueError(f"{path}: {id!r:.100} is no image id: write the file name without folder and ending")
    return id


# ---------------------------------------------------------------- labels in three layouts

def index_labels(classes):
    """What labels.txt may call a class -> its index"""
    index = {name: k for k, name in enumerate(classes)}
    index |= {name.replace(" ", "_"): k for name, k in index.items()}
    return {str(k): k for k in range(len(classes))} | index


def split_labels(line):
    """A line of labels.txt -> its id, then its names"""
    id, *names = [t.strip() for t in line.split("\t")] if "\t" in line else line.split()
    return [id, *(plain_blanks(name) for name in names if name)]


def read_label_list(path, classes):
    """labels.txt -> {id: class indices}. A line is `id class class ...`: names or indices 0..C-1.

    A line with a tab is split at tabs. Else it is split at blanks, and blanks in names are written _."""
    index, labels = index_labels(classes), {}
    for number, line in enumerate(files.read_lines(path), 1):
        if not line.strip():
            continue
        id, *names = split_labels(line)
        check_id(id, path)
        if id in labels:
            raise ValueError(f"{path}:{number}: {id} has a second line: put its classes on one; "
                             "fields are parted by tabs where a file name holds blanks")
        if unknown := [name for name in names if name not in index]:
            raise ValueError(f"{path}:{number}: {unknown[0]!r:.100} is not in classes.txt "
                             f"({len(classes)} classes: {', '.join(classes[:4])}, ...); "
                             "blanks in names are written _, or fields are parted by tabs")
        labels[id] = sorted({index[name] for name in names})
    return labels


def read_xml(path, classes):
    """Indices of the objects in a VOC annotation, "difficult" ones included."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: labels come from labels.txt or from one XML an image")
    try:
        objects = ElementTree.fromstring(files.regular(path).read_bytes()).findall("object")
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is not readable XML ({files.first_line(error)}): "
                         "download it again or write labels.txt") from None
    names = {plain_blanks((o.findtext("name") or "").strip()) for o in objects}
    if unknown := names - set(classes):
        raise ValueError(f"{path}: {min(unknown)!r:.100} is not in classes.txt ({len(classes)} classes): "
                         "add it there or correct the annotation")
    return sorted(classes.index(name) for name in names)


def read_cls_labels(path, classes):
    """Other projects' cls_labels.npy, id -> multi-hot (C,), to {id: class indices}. IRN's ids are numbers."""
    try:
        table = read_pickled(path)
        if not isinstance(table, dict):
            raise ValueError("it holds no dict")
        for key, row in table.items():
            if np.shape(row) != (len(classes),):
                raise ValueError(f"the labels of {key!r:.60} have shape {np.shape(row)}, "
                                 f"classes.txt has {len(classes)} classes")
        rows = np.array(list(table.values()))
        if rows.dtype.kind not in "biuf":
            raise ValueError("its labels are not numbers")
        return {key: row.nonzero()[0].tolist() for key, row in zip(table, rows)}
    except Exception as error:                                  # numpy and pickle raise errors of many types
        raise ValueError(f"{path} is refused ({files.first_line(error)}): a dict from id to multi-hot labels "
                         "is expected; labels.txt says the same in plain text") from None
