"""Data folders in VOC layout: lists, labels, class names."""
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from plumbing import files, foreign, images, masks


VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,"
    "dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
VOC_BACKGROUNDS = ("ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house mountain "
                   "ocean road rock street valley bridge sign").split()
COCO_BACKGROUNDS = [name for name in VOC_BACKGROUNDS if name not in ("keyboard", "sign")]


class Folder:
    """One data folder: JPEGImages/, ImageSets/Segmentation/<split>.txt (without any: `train` is all of labels.txt), labels.txt or cls_labels.npy
    or Annotations/*.xml, classes.txt (else VOC's twenty), backgrounds.txt (else VOC's or COCO's); SegmentationClass[Aug]/ only to score."""

    def __init__(self, root):
        self.root = Path(root)
        if not (self.root / "JPEGImages").is_dir():
            raise FileNotFoundError(f"{self.root / 'JPEGImages'} is missing: --data is a folder in VOC layout "
                                    "(make_toy.py makes one, prepare_data.py prepares VOC and COCO)")
        self.classes = self._names("classes.txt", VOC_CLASSES)
        usual = COCO_BACKGROUNDS if self.classes == COCO_CLASSES else VOC_BACKGROUNDS
        self.backgrounds = self._names("backgrounds.txt", usual)
        self._labels = None

    def _names(self, name, default):
        path = self.root / name
        if not path.exists():
            return list(default)
        names = [plain_blanks(line.strip()) for line in files.read_lines(path) if line.strip()]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{path} must hold one name a line, none twice")
        if "background" in names:
            raise ValueError(f"{path} lists 'background': remove it, it is label 0 of every mask and no class")
        if odd := [name for name in names if not printable(name)]:
            raise ValueError(f"{path} lists {odd[0]!r:.60}, which holds what cannot be printed: write plain letters and blanks")
        if long := [name for name in names if len(name) > 100]:
            raise ValueError(f"{path} lists a name of {len(long[0])} characters ({long[0][:20]}...): CLIP reads short names, at most 100")
        if len(names) > 254:
            raise ValueError(f"{path} lists {len(names)} classes, an 8-bit mask holds 254")
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
            there = sorted(p.stem for p in path.parent.glob("*.txt"))
            raise FileNotFoundError(f"{path} is missing: --split is one of {', '.join(there) or 'no list at all'}")
        else:
            ids = [parse_id(line, path) for line in files.read_lines(path) if line.strip()]
        if not ids:
            raise ValueError(f"{path} is empty: give a split that holds pictures")
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise ValueError(f"{path} lists {twice} twice: remove one line")
        return ids[:limit] if limit else ids

    def unlisted(self):
        """Somebody's own pictures need no lists: without ImageSets/, `train` is every picture of labels.txt."""
        return not (self.root / "ImageSets").exists() and (self.root / "labels.txt").exists()

    def _train_aug(self):
        """Every mask of SegmentationClassAug that is not in val: (SBD + VOC train) - VOC val, 10,582 pictures; no list needed."""
        masks = self.root / "SegmentationClassAug"
        if not masks.is_dir():
            raise FileNotFoundError(f"{self.root}: neither ImageSets/Segmentation/train_aug.txt nor SegmentationClassAug/ is there: "
                                    "run prepare_data.py voc, or give --split train")
        return sorted({p.stem for p in masks.glob("*.png")} - set(self.ids("val")))

    # -- labels

    def labels(self, ids):
        """(n, C) float32, 1 where the picture holds the class. A picture without any class is a row of zeros."""
        if self._labels is None:
            self._labels = self._read_labels()
        present = [self._present(id) for id in ids]
        rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(classes) for classes in present], dtype=torch.long))
        out = torch.zeros(len(ids), len(self.classes))
        out[rows, torch.tensor(list(chain(*present)), dtype=torch.long)] = 1
        return out

    def _read_labels(self):
        """{id: class indices} of the whole folder, and the file they came from (None: one XML a picture, read when asked for)."""
        for name, read in (("labels.txt", read_label_list), ("cls_labels.npy", read_cls_labels)):
            if (self.root / name).exists():
                return read(self.root / name, self.classes), self.root / name
        if (self.root / "Annotations").is_dir():
            return {}, None
        raise FileNotFoundError(f"{self.root} holds no labels: write labels.txt (a line a picture: id class class ...)")

    def _present(self, id):
        table, source = self._labels
        if id not in table and source is None:
            table[id] = read_xml(self.root / "Annotations" / f"{id}.xml", self.classes)
        if id not in table and source.suffix == ".npy" and id.replace("_", "").isdecimal():
            table[id] = table.get(int(id.replace("_", "")))               # IRN's integer keys: 2007_000032 is 2007000032
        if table.get(id) is None:
            raise ValueError(f"{source} has no entry for {id}: write labels.txt, a line a picture (the id alone if no class is present)")
        return table[id]

    # -- pictures and truth

    def picture(self, id):
        for suffix in images.PICTURES:
            path = self.root / "JPEGImages" / f"{id}{suffix}"
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.root / 'JPEGImages' / id}.jpg is missing: put the picture there or take {id} off the list")

    def image(self, id):
        """(3, H, W) float RGB in [0, 1]: every network owns its mean and std."""
        return images.to_float(images.load_image(self.picture(id)))

    def mask_path(self, id):
        """Native VOC masks (with 255 borders) before SBD's."""
        for path in self._mask_places(id):
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.root / 'SegmentationClass' / id}.png is missing: scoring needs true masks, training does not")

    def has_mask(self, id):
        return any(path.exists() for path in self._mask_places(id))

    def _mask_places(self, id):
        return [self.root / name / f"{id}.png" for name in ("SegmentationClass", "SegmentationClassAug")]

    def truth(self, id):
        """(H, W) uint8 label map: 0 background, 1..C, 255 ignored."""
        return masks.load_mask(self.mask_path(id), len(self.classes))


def plain_blanks(name):
    """A no-break space, which looks like a blank, is one."""
    return name.replace("\u00a0", " ")


def printable(name):
    """Joiners count as printable inside a name: emoji, Persian and Indian scripts are written with them."""
    return name.strip("\u200c\u200d") == name and re.sub("[\u200c\u200d]", "", name).isprintable()


def parse_id(line, path):
    """`2007_000032`, or a pair `/JPEGImages/x.jpg /SegmentationClassAug/x.png`. An id is a file name: it cannot leave the folder."""
    text = line.strip()
    if "/" not in text:
        return check_id(text, path)
    first = text.split(maxsplit=1)[0]
    parts = Path(first).parts
    if "JPEGImages" in parts[:-1] and ".." not in parts and parts.index("JPEGImages") == len(parts) - 2:
        return check_id(Path(first).stem, path)
    return check_id(text, path)


def check_id(id, path):
    if not id or id.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", id) or id != id.strip() or id.endswith(images.PICTURES) or len(id.encode(errors="replace")) > 200:
        raise ValueError(f"{path}: {id!r:.100} is no picture id: write the file name without folder and ending")
    return id


def read_label_list(path, classes):
    """labels.txt: `id class class ...`, split at tabs if there is one, else at blanks; names (blanks as _) or indices 0..C-1."""
    index = {name: k for k, name in enumerate(classes)}
    index.update({name.replace(" ", "_"): k for name, k in list(index.items())})
    labels = {}
    for number, line in enumerate(files.read_lines(path), 1):
        if not line.strip():
            continue
        id, *names = [t.strip() for t in line.split("\t")] if "\t" in line else line.split()
        check_id(id, path)
        if id in labels:
            raise ValueError(f"{path}:{number}: {id} has a second line: put its classes on one; fields are parted by tabs where a file name holds blanks")
        present = set()
        for name in map(plain_blanks, filter(None, names)):
            if name not in index and not (name.isdecimal() and len(name) < 4 and int(name) < len(classes)):
                raise ValueError(f"{path}:{number}: {name!r:.100} is not in classes.txt ({len(classes)} classes: {', '.join(classes[:4])}, ...); "
                                 "blanks in names are written _, or fields are parted by tabs")
            present.add(index[name] if name in index else int(name))
        labels[id] = sorted(present)
    return labels


def read_xml(path, classes):
    """Names of the objects in a VOC annotation, "difficult" ones included."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: labels come from labels.txt or from one XML a picture")
    content = Path(files.regular(path, 1 << 22)).read_bytes()
    try:
        if b"<!DOCTYPE" in content or b"\0" in content:                    # entities of a DTD unpack to gigabytes, or name other files; UTF-16 would hide them
            raise ValueError("it has a DTD, or is not ASCII or UTF-8")
        names = {plain_blanks((o.findtext("name") or "").strip()) for o in ElementTree.fromstring(content).findall("object")}
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is not readable XML ({files.why(error)}): download it again or write labels.txt") from None
    unknown = names - set(classes)
    if unknown:
        raise ValueError(f"{path}: {min(unknown)!r:.100} is not in classes.txt ({len(classes)} classes): add it there or correct the annotation")
    return sorted(classes.index(name) for name in names)


def read_cls_labels(path, classes):
    """Foreign cls_labels.npy: a pickled dict, keys int32 (IRN) or str (the rest), values multi-hot (C,). -> {id: indices}"""
    try:
        table = foreign.read_pickled(path)
        if not isinstance(table, dict):
            raise ValueError("it holds a plain array, not a dict" if table is None else f"it holds a {type(table).__name__}, not a dict")
        for key, value in table.items():
            numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf" or isinstance(value, list) and all(type(n) in (bool, int, float) for n in value)
            if not numbers:
                raise ValueError(f"the labels of {key!r:.60} are not numbers")
    except Exception as error:                                             # a foreign file raises whatever its bytes provoke
        raise ValueError(f"{path} is refused ({files.why(error)}): a dict from id to multi-hot labels is expected; labels.txt says the same in plain text") from None
    wrong = [key for key, value in table.items() if np.shape(value) != (len(classes),)]
    if wrong:
        raise ValueError(f"{path}: labels of {wrong[0]!r:.60} have shape {np.shape(table[wrong[0]])}, classes.txt has {len(classes)} classes")
    return {key: np.flatnonzero(value).tolist() for key, value in table.items()}
