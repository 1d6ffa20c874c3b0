"""Data folders in VOC layout: lists, labels, class names and texts, pictures, masks, maps.

    folder = data.Folder("data/toy")              # VOC, COCO prepared, the toy world or your own pictures
    ids = folder.ids("train")                     # ImageSets/Segmentation/train.txt
    labels = folder.labels(ids)                   # (n, C) float, 1 where the class is present
    image, truth = folder.image(ids[0]), folder.truth(ids[0])

Class index 0..C-1 in every tensor; +1 only in a label map (`.png`), where 0 is background and 255 is ignored.
Nothing is read outside the folder, no file runs code, and every refusal names the file and the remedy.
"""
import contextlib
import errno
import io
import math
import os
import re
import signal
import stat
import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from itertools import chain, groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORE = 255
PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")                    # what lies under these endings; Pillow's other decoders are not asked
PIXELS = 1 << 26                                                   # of a picture, at most: 8192 x 8192, 20,000 x 3,355; a file of a few bytes can claim any number

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,"
    "dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
# From the authors' code, not in the paper: CLIP-ES writes synonyms into the class name.
SYNONYMS = {"bird": "bird avian", "chair": "chair seat", "person": "person with clothes,people,human", "tvmonitor": "tvmonitor screen"}
VOC_BACKGROUNDS = ("ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house mountain "
                   "ocean road rock street valley bridge sign").split()
COCO_BACKGROUNDS = [name for name in VOC_BACKGROUNDS if name not in ("keyboard", "sign")]
CLIMS_BACKGROUNDS = "tree river sea lake water railway railroad track stone rocks".split()


# ---------------------------------------------------------------- the folder

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
        names = [plain_blanks(line.strip()) for line in read_lines(path) if line.strip()]
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
            ids = [parse_id(line, path) for line in read_lines(path) if line.strip()]
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
        for suffix in PICTURES:
            path = self.root / "JPEGImages" / f"{id}{suffix}"
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.root / 'JPEGImages' / id}.jpg is missing: put the picture there or take {id} off the list")

    def image(self, id):
        """(3, H, W) float RGB in [0, 1]: every network owns its mean and std."""
        return to_float(load_image(self.picture(id)))

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
        return load_mask(self.mask_path(id), len(self.classes))


def read_lines(path):
    """Lines of a text file; CRLF and a byte order mark are ordinary."""
    content = Path(regular(path, 1 << 26)).read_bytes()
    if (count := content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")) > 2_000_000:       # before they are made: a short line takes 60 bytes
        raise ValueError(f"{path} has {count:,} lines: is it a list, an entry a line?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise ValueError(f"{path} holds control characters: save it as plain UTF-8 text")
    lines = text.splitlines()
    if (longest := max(map(len, lines), default=0)) > 100_000:
        raise ValueError(f"{path} has a line of {longest:,} characters: is it a list, an entry a line?")
    return lines


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
    if not id or id.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", id) or id != id.strip() or id.endswith(PICTURES) or len(id.encode(errors="replace")) > 200:
        raise ValueError(f"{path}: {id!r:.100} is no picture id: write the file name without folder and ending")
    return id


def read_label_list(path, classes):
    """labels.txt: `id class class ...`, split at tabs if there is one, else at blanks; names (blanks as _) or indices 0..C-1."""
    index = {name: k for k, name in enumerate(classes)}
    index.update({name.replace(" ", "_"): k for name, k in list(index.items())})
    labels = {}
    for number, line in enumerate(read_lines(path), 1):
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
    content = Path(regular(path, 1 << 22)).read_bytes()
    try:
        if b"<!DOCTYPE" in content or b"\0" in content:                    # entities of a DTD unpack to gigabytes, or name other files; UTF-16 would hide them
            raise ValueError("it has a DTD, or is not ASCII or UTF-8")
        names = {plain_blanks((o.findtext("name") or "").strip()) for o in ElementTree.fromstring(content).findall("object")}
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is not readable XML ({why(error)}): download it again or write labels.txt") from None
    unknown = names - set(classes)
    if unknown:
        raise ValueError(f"{path}: {min(unknown)!r:.100} is not in classes.txt ({len(classes)} classes): add it there or correct the annotation")
    return sorted(classes.index(name) for name in names)


def read_cls_labels(path, classes):
    """Foreign cls_labels.npy: a pickled dict, keys int32 (IRN) or str (the rest), values multi-hot (C,). -> {id: indices}"""
    try:
        table = read_pickled(path)
        if not isinstance(table, dict):
            raise ValueError("it holds a plain array, not a dict" if table is None else f"it holds a {type(table).__name__}, not a dict")
        for key, value in table.items():
            numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf" or isinstance(value, list) and all(type(n) in (bool, int, float) for n in value)
            if not numbers:
                raise ValueError(f"the labels of {key!r:.60} are not numbers")
    except Exception as error:                                             # a foreign file raises whatever its bytes provoke
        raise ValueError(f"{path} is refused ({why(error)}): a dict from id to multi-hot labels is expected; labels.txt says the same in plain text") from None
    wrong = [key for key, value in table.items() if np.shape(value) != (len(classes),)]
    if wrong:
        raise ValueError(f"{path}: labels of {wrong[0]!r:.60} have shape {np.shape(table[wrong[0]])}, classes.txt has {len(classes)} classes")
    return {key: np.flatnonzero(value).tolist() for key, value in table.items()}


# ---------------------------------------------------------------- other projects' pickles

# A pickle is a program, and pickle.Unpickler runs it: what it calls, how much it makes and how deep it nests is the file's choice. So it is not run.
# `Restricted` knows the words in which numbers, texts, lists, dicts and calls are written; a call makes one of the records below, which keep what
# they are given. Arrays are made of them afterwards (`settled`), of nothing but a shape, the name of a plain dtype and as many bytes as these two
# say. All of it costs no more than a few times the file.

class Kind:
    """A dtype by its name and byte order: numbers, strings, objects; no fields, no subarrays."""
    __slots__ = ("name", "order")

    def __init__(self, name, *_):
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|O8?|U\d{1,4}", name):
            raise ValueError(f"it holds the dtype {name!r:.40}")
        self.name, self.order = name, "="

    def __setstate__(self, state):
        _, order, *structure = state[:5]
        if order not in ("<", ">", "|", "=") or structure != [None] * 3:
            raise ValueError("it holds a dtype of parts")
        self.order = order

    def read(self, shape, content):
        """-> array of `shape`, C order, over `content`."""
        if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            raise ValueError("an array in it has no shape")
        if not isinstance(content, bytes) or self.name[0] in "OU":
            raise ValueError("an array in it is not of numbers")
        dtype = np.dtype(self.order + ("u1" if self.name == "b1" else self.name))
        if math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"an array in it is torn: {len(content)} bytes for the shape {shape}")
        array = np.frombuffer(content, dtype).reshape(shape) if content else np.zeros(shape, dtype)
        return array != 0 if self.name == "b1" else array                  # as numpy counts on: a byte of a bool is 0 or 1


class Array:
    """An array to be: what a pickle says of it, unread."""
    __slots__ = ("state", "axes", "value")

    def __init__(self, *state, axes=None):
        self.state, self.axes, self.value = state, axes, None

    def __setstate__(self, state):
        self.state = state

    def settled(self):
        if self.value is None:
            _, shape, kind, fortran, content = self.state
            if kind.name[0] == "O" and shape == () and type(content) is list and len(content) == 1:       # np.save's way to keep a dict
                return content[0]
            array = kind.read(shape[::-1] if fortran else shape, content)
            self.value = array.T if fortran else array if self.axes is None else array.transpose(self.axes)
        return self.value


class Maker:
    """What a pickle may call, and do nothing else with."""
    __slots__ = ("make",)

    def __init__(self, make):
        self.make = make


def of_buffer(content, kind, shape, order, axes=None):
    """Protocol 5's way to an array: order K is C order, its axes then moved."""
    return Array(1, shape, kind, order == "F", content, axes=axes)


def number(kind, content):
    """A number or a text of numpy's -> Python's own."""
    if kind.name[0] == "U":
        return content.decode("utf-32-be" if kind.order == ">" else "utf-32-le").rstrip("\0")
    return kind.read((), content).item()


def latin(text, encoding):
    """Old protocols' way to bytes."""
    if encoding != "latin1":
        raise ValueError(f"it asks for the encoding {encoding!r:.40}")
    return str.encode(text, "latin1")


def storage(content):
    """The bytes in which torch keeps a tensor's numbers inside a pickle -> (n,) array. torch's own reader of them would run what they ask for."""
    file = io.BytesIO(content)
    magic, version, _, (_, kind, key, _, count, view), keys = (StorageReader(file).load() for _ in range(5))
    if (magic, version, view, keys) != (MAGIC, 1001, None, [key]):
        raise ValueError("a tensor in it is not as torch writes them")
    return Kind(kind).read((count,), file.read()[8:])                      # 8: the count again


def tensor(numbers, offset, size, stride, *_):
    """A view (offset, size, stride) of a storage's numbers -> Array."""
    if (type(size), type(stride)) != (tuple, tuple) or len(size) != len(stride) or len(size) > 8 or not all(
            type(n) is int and n >= 0 for n in (offset, *size, *stride)) or math.prod(size) > len(numbers):
        raise ValueError("a tensor in it is not of its numbers")
    if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(numbers):
        raise ValueError("a tensor in it reaches past its numbers")
    shown = Array()
    shown.value = np.zeros(size, numbers.dtype) if 0 in size else np.lib.stride_tricks.as_strided(
        numbers[offset:], size, [step * numbers.itemsize for step in stride]).copy()
    return shown


MAGIC = 0x1950a86a20f9469cfc6c                                             # with which torch's storages begin


def little(content):
    """A whole number. Of a longer one Python refuses to print the digits, and what comes of it then says nothing of the file."""
    value = int.from_bytes(content, "little", signed=True)
    if abs(value) >= 1 << 63 and value != MAGIC:
        raise ValueError("it holds a number of more than 64 bits")
    return value


COUNTED = {  # words of a pickle that are followed by a length, of so many bytes, and as many bytes of content
    b"U": (1, bytes.decode), b"T": (4, bytes.decode), b"\x8c": (1, bytes.decode), b"X": (4, bytes.decode), b"\x8d": (8, bytes.decode),
    b"C": (1, bytes), b"B": (4, bytes), b"\x8e": (8, bytes), b"\x96": (8, bytes), b"\x8a": (1, little), b"\x8b": (4, little)}
FIXED = {b"K": (1, lambda b: b[0]), b"M": (2, lambda b: int.from_bytes(b, "little")), b"J": (4, little), b"G": (8, lambda b: struct.unpack(">d", b)[0])}
PLAIN = {b"N": lambda: None, b"\x88": lambda: True, b"\x89": lambda: False, b"]": list, b"}": dict, b")": tuple}
TUPLES, MEMO = {b"\x85": 1, b"\x86": 2, b"\x87": 3}, {b"q": 1, b"r": 4, b"h": 1, b"j": 4}


class Restricted:
    """Reads other projects' pickles: arrays of numbers, IRN's tensors (as arrays) and plain values; whatever else is asked for is refused."""
    makes = {("numpy", "dtype"): Maker(Kind), ("numpy", "ndarray"): "ndarray", ("_codecs", "encode"): Maker(latin), ("collections", "OrderedDict"): Maker(lambda: {}),
             ("torch._utils", "_rebuild_tensor_v2"): Maker(tensor), ("torch.storage", "_load_from_bytes"): Maker(storage)}
    for core in ("numpy.core", "numpy._core"):
        makes |= {(f"{core}.multiarray", "_reconstruct"): Maker(Array), (f"{core}.multiarray", "scalar"): Maker(number),
                  (f"{core}.numeric", "_frombuffer"): Maker(of_buffer)}
    words = 4_000_000                                                      # of COCO's labels it takes 3 million
    unchanged = ()                                                         # what is made plain, its attributes left out

    def __init__(self, file):
        here = file.tell()
        self.file, self.size = file, file.seek(0, os.SEEK_END) - here
        self.spare = 8 * self.size + (1 << 20)                             # bytes that calls and arrays may take together: one content can be named many times
        file.seek(here)

    def find(self, module, name):
        if (module, name) not in self.makes:
            raise ValueError(f"it asks for {module}.{name}"[:100])
        return self.makes[module, name]

    def read(self, n):
        content = self.file.read(n) if n <= self.size else b""
        if len(content) < n:
            raise ValueError("it is torn")
        return content

    def line(self):
        return self.file.readline().decode().strip()

    def load(self):
        read, stack, marks, memo = self.read, [], [], {}
        next_word = self.file.read
        for _ in range(self.words):
            word = next_word(1)
            if not word:
                raise ValueError("it is torn")
            if word in COUNTED:
                width, value = COUNTED[word]
                stack.append(value(read(int.from_bytes(read(width), "little"))))
            elif word in FIXED:
                width, value = FIXED[word]
                stack.append(value(read(width)))
            elif word in PLAIN:
                stack.append(PLAIN[word]())
            elif word in TUPLES:
                stack[-TUPLES[word]:] = [tuple(stack[-TUPLES[word]:])]
            elif word == b"\x94":
                memo[len(memo)] = stack[-1]
            elif word in MEMO:
                place = int.from_bytes(read(MEMO[word]), "little")
                if word in b"hj":
                    stack.append(memo[place])
                else:
                    memo[place] = stack[-1]
            elif word == b"(":
                marks.append(len(stack))
            elif word in b"teua":                                          # a tuple, or what goes into a list or a dict
                start = len(stack) - 1 if word == b"a" else marks.pop()
                items = stack[start:]
                del stack[start:]
                stack.append(tuple(items)) if word == b"t" else self.fill(stack[-1], items, dict if word == b"u" else list)
            elif word == b"s":
                self.fill(stack[-3], [stack[-2], stack.pop()], dict), stack.pop()
            elif word in b"R\x81":
                args, what = stack.pop(), stack.pop()
                stack.append(self.call(what, args))
            elif word == b"b":
                self.change(stack[-2], stack.pop())
            elif word == b"c":
                stack.append(self.find(self.line(), self.line()))
            elif word == b"\x93":
                name, module = stack.pop(), stack.pop()
                stack.append(self.find(module, name))
            elif word in b"\x80\x95":                                      # the protocol, and a hint how much to read at once
                read(1 if word == b"\x80" else 8)
            elif word == b".":
                return self.settled(stack.pop(), 3, {})
            elif word != b"Q" or not isinstance(self, StorageReader):      # Q: what stands for a storage is its name
                raise ValueError(f"it holds the word {word!r}, which no array needs")
        raise ValueError(f"it is longer than {self.words:,} words")

    def fill(self, container, items, kind):
        if type(container) is not kind:
            raise ValueError("it fills what is no list or dict")
        if kind is list:
            return container.extend(items)
        if not all(type(key) in (str, int) for key in items[::2]):         # others' hashes can take forever, or all of the stack
            raise ValueError("a key in it is no text or number")
        container.update(zip(items[::2], items[1::2], strict=True))

    def call(self, what, args):
        if type(what) is not Maker or type(args) is not tuple:
            raise ValueError("it calls what is no function")
        self.take(sum(part.nbytes if isinstance(part, np.ndarray) else len(part) for part in args if isinstance(part, (bytes, str, tuple, list, np.ndarray))))
        return what.make(*args)

    def change(self, what, state):
        if type(what) in self.unchanged:
            return
        if type(what) not in (Kind, Array) or type(state) is not tuple:
            raise ValueError("it changes what it calls")
        what.__setstate__(state)

    def take(self, size):
        self.spare -= size
        if self.spare < 0:
            raise ValueError("it unpacks to many times its size")

    def settled(self, value, depth, seen):
        """Arrays in place of the records, down to the values of dicts in a list; what is named twice is made once."""
        if (id(value), depth) in seen or not depth:
            return seen.get((id(value), depth), value)
        made = value
        if isinstance(value, Array):
            made = value.settled()
            if isinstance(made, np.ndarray):
                self.take(made.nbytes)
            else:
                made = self.settled(made, depth - 1, seen)
        elif isinstance(value, dict):
            made = {key: self.settled(part, depth - 1, seen) for key, part in value.items()}
        elif isinstance(value, list):
            made = [self.settled(part, depth - 1, seen) for part in value]
        seen[id(value), depth] = made
        return made


class StorageReader(Restricted):
    """Numbers, texts, and of torch's storages the kind of number."""
    words = 200
    makes = {("torch", f"{name}Storage"): kind for name, kind in dict(
        Float="f4", Double="f8", Half="f2", Long="i8", Int="i4", Short="i2", Char="i1", Byte="u1", Bool="b1").items()}


class FmaReader(Restricted):
    """FMA-WSSS pickles a list and a dict of its own classes: they become plain ones without attributes, its code is not looked for."""
    own, unchanged = {"SamAnns": Maker(lambda: []), "ADict": Maker(lambda: {})}, (list, dict)

    def find(self, module, name):
        return self.own[name] if name in self.own else super().find(module, name)


def read_pickled(path):
    """What another project's pickled .npy holds; None of a plain array."""
    with open(regular(path), "rb") as file:
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            return None
        if shape:
            raise ValueError(f"it holds {shape!r:.40} objects, not one dict")
        return Restricted(file).load()


# ---------------------------------------------------------------- plain arrays

def read_header(file):
    """-> (shape, fortran, dtype) of a .npy, `file` then at its numbers. Python's parser reads the header: it is short, or refused."""
    version = np.lib.format.read_magic(file)
    width = 2 if version == (1, 0) else 4
    if int.from_bytes(file.read(width), "little") > 10_000:
        raise ValueError("its header is no array's")
    file.seek(-width, os.SEEK_CUR)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def read_npy(path):
    """A plain array; its file must be as long as its header says, before there is room for it."""
    with open(regular(path), "rb") as file:
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds objects")
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != os.fstat(file.fileno()).st_size - file.tell():
            raise ValueError("it is torn, or longer than it says")
    return np.load(path, allow_pickle=False)


def regular(path, most=1 << 34):
    """`path`, of a file with an end: a pipe or a device would be read forever."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is no file but a folder, a pipe or a device: put the file there")
    if facts.st_size > most:
        raise ValueError(f"{path} has {facts.st_size:,} bytes, at most {most:,} are read: is it another file?")
    return path


def why(error):
    """The first line of what a library says of a foreign file, for a message of one line."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", f"{error}".strip().partition("\n")[0])[:200].strip() or type(error).__name__


# ---------------------------------------------------------------- texts

def class_texts(classes, template="a photo of {}.", synonyms=False):
    """Texts for CLIP: `template` over class names; CLIP-ES's synonyms in the name if asked."""
    if template.count("{}") != 1 or set(template.replace("{}", "")) & {"{", "}"}:
        raise ValueError(f"--template {template!r}: a text with one {{}} in it, where the class's name goes")
    return [template.format(SYNONYMS.get(name, name) if synonyms else name) for name in classes]


def manual_texts(source="clims", template="a photo of {}."):
    """Texts of what occurs beside objects, named by hand: of CLIMS's ten backgrounds, or of the names in a file, one a line."""
    names = CLIMS_BACKGROUNDS if source == "clims" else [line.strip() for line in read_lines(source) if line.strip()]
    if not names:
        raise ValueError(f"{source} is empty: write one name a line")
    return class_texts(names, template)


# Differs from the paper: VPL compares a single prompt with an ensemble and names one text of it. CLIP-ES's is that one; the ensemble is its synonyms.
PROMPTS = {"single": ("a photo of a {}.", False), "ensemble": ("a clean origami {}.", True)}       # template, synonyms in the name


def prompt_texts(folder, prompt="ensemble", template=None):
    """Texts of a folder's classes, then of its backgrounds, for CLIP's GradCAM; `template` in place of the prompt's."""
    usual, synonyms = PROMPTS[prompt]
    return class_texts(folder.classes, template or usual, synonyms) + class_texts(folder.backgrounds, template or usual)


# ---------------------------------------------------------------- pictures

SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")           # a JPEG's: marker, length 2 n + 6, n components; a phone appends films, which hold the marker by chance


def header(path, formats=FORMATS):
    """A picture of which the header is read, and its pixels are not yet."""
    image = Image.open(regular(path, 1 << 28), formats=formats)
    if image.width * image.height > PIXELS or max(image.size) > 65_535:    # a row costs memory, too
        image.close()
        raise ValueError(f"{image.width}x{image.height} are more than {PIXELS:,} pixels, or a side of more than 65,535: make it smaller")
    return image


@contextlib.contextmanager
def opened(path):
    """A picture's file with its header read. Whatever is wrong with it, here or while its pixels are read, is one line."""
    try:
        with header(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:                                             # PIL raises whatever a foreign file's bytes provoke
        raise ValueError(f"{path} is not a readable picture ({why(error)}): replace it or take it off the list") from None


TURNS = dict(zip(range(2, 9), (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                               Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


def orientation(file):
    """The EXIF flag of an opened picture, 1 to 8; 1 turns nothing, as does a flag or an EXIF block that cannot be read: its pixels can be."""
    if file.format == "PNG" and "exif" not in file.info:
        file.load()                                                        # EXIF may follow the pixels; what is wrong with these is told
    with contextlib.suppress(Exception):
        flag = file.getexif().get(0x0112, 1)
        return flag if flag in TURNS else 1
    return 1


def shown_size(file):
    """(height, width) of an opened picture as a viewer shows it."""
    return file.size if orientation(file) in (5, 6, 7, 8) else file.size[::-1]             # these swap the sides


def decode(file, least=None):
    """An opened picture -> PIL RGB as a viewer shows it: turned by its EXIF flag, 16 bits scaled, transparency on white.

    With `least` (height, width) a JPEG comes at 1/2, 1/4 or 1/8 of its sides, if both are then still that long: most of its pixels are never made."""
    if file.format in ("JPEG", "MPO") and len(SCAN.findall(Path(file.filename).read_bytes())) > 100:
        raise ValueError("it has more than 100 scans")                     # each of a few bytes can cost as much as the picture
    if least:
        file.draft(None, least if shown_size(file) == file.size else least[::-1])          # draft counts (width, height) of the stored, unturned picture
    file.load()                                                            # reads the pixels: a truncated file ends here
    if (flag := orientation(file)) != 1:
        file = file.transpose(TURNS[flag])                                 # ImageOps.exif_transpose would write the other tags anew, and fails at odd ones
    if file.mode.startswith("I"):
        values = np.asarray(file)
        top = 65535 if file.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
        table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)
        return Image.fromarray(table[values.clip(0, top)]).convert("RGB")
    if "A" in file.getbands() or "transparency" in file.info:
        shown = Image.new("RGB", file.size)
        for top in range(0, file.height, 512):                             # by strips: several copies of a large picture would be gigabytes
            strip = file.crop((0, top, file.width, min(top + 512, file.height))).convert("RGBA")
            shown.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
        return shown
    return file if file.mode == "RGB" else file.convert("RGB")             # convert would copy it


def load_image(path, least=None):
    """Any picture -> PIL RGB, by `decode`."""
    with opened(path) as file:
        return decode(file, least)


def picture_size(path):
    """(height, width) as load_image returns it, from the header alone."""
    with opened(path) as file:
        return shown_size(file)


def to_tensor(image):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(image):
    return to_tensor(image).float() / 255


# ---------------------------------------------------------------- masks

def palette():
    """The 256 colours of VOC, (256, 3) uint8: bits of the index spread over the channels, highest colour bit first."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def load_mask(path, num_classes=None):
    """Label map (H, W) uint8 from a palette, grey or exact-palette-colour PNG. With `num_classes`, values outside 0..C and 255 are refused."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that makes it")
    try:
        with header(path, ("PNG",)) as image:
            values, mode = np.array(image), image.mode
    except Exception as error:                                             # PIL raises whatever a foreign file's bytes provoke
        raise ValueError(f"{path} is not a readable mask ({why(error)}): replace it") from None
    if mode in ("RGB", "RGBA"):
        values = from_colours(values[..., :3], path)
    elif values.ndim != 2 or mode not in ("P", "L", "I", "I;16", "1"):
        raise ValueError(f"{path} has mode {mode}: a mask is a palette or grey PNG of class indices")
    if values.size and values.max() > 255 or values.min(initial=0) < 0:
        raise ValueError(f"{path} holds label {values.max()}: masks hold 0..C and 255")
    values = values.astype(np.uint8)
    if num_classes is not None:
        outside = values[(values > num_classes) & (values != IGNORE)]
        if outside.size:
            raise ValueError(f"{path} holds label {outside.max()}, classes.txt has {num_classes} classes: "
                             "is it of another data set, or 90-id COCO? (prepare_data.py check)")
    return values


def from_colours(values, path):
    """Three channels: exact palette colours become indices, anything else is refused."""
    table = palette().astype(np.int64) @ [65536, 256, 1]
    order = np.argsort(table)
    place = np.zeros(values.shape[:2], np.uint8)
    for rows, out in zip(np.array_split(values, 1 + len(values) // 256), np.array_split(place, 1 + len(values) // 256)):       # 64-bit numbers of all would be large
        code = rows.astype(np.int64) @ [65536, 256, 1]
        out[:] = order[np.searchsorted(table[order], code).clip(0, 255)]
        if (table[out] != code).any():
            raise ValueError(f"{path} is a colour picture whose colours are not VOC's palette: write class indices (data.save_mask does)")
    return place


@contextlib.contextmanager
def atomic(path):
    """Write beside, then rename (as common.atomic: a shared module imports no other)."""
    beside = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):                                  # what went wrong before is what is told
            beside.unlink(missing_ok=True)


def save_mask(path, mask):
    """Label map (H, W) -> 8-bit palette PNG in VOC's colours, whole or not at all."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size and (mask.min() < 0 or mask.max() > 255):
        raise ValueError(f"{path}: a mask is (H, W) with values 0..255, not {mask.shape}")
    with atomic(path) as beside:
        paint(mask).save(beside, format="PNG")


def paint(mask):
    """Label map (H, W) -> PIL picture of mode P in VOC's colours."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8), mode="L")
    image.putpalette(palette().ravel().tolist())                           # turns L into P, the indices stay
    return image


# ---------------------------------------------------------------- maps

def heat(image, cam):
    """A PIL picture in grey under a map (h, w) in [0, 1]: dark violet, red, orange, light yellow."""
    value = np.asarray(Image.fromarray(np.float32(cam)).resize(image.size, Image.BILINEAR)).clip(0, 1)
    anchors = np.array([[20, 11, 53], [101, 21, 110], [186, 54, 85], [249, 140, 10], [252, 255, 164]])
    colour = np.stack([np.interp(value, np.linspace(0, 1, 5), channel) for channel in anchors.T], -1)      # (H, W, 3)
    return Image.fromarray(np.uint8(0.3 * np.asarray(image.convert("L"))[..., None] + 0.7 * colour))


def present(labels):
    """Ascending indices of the present classes of one picture's multi-hot labels (C,)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels are multi-hot (C,), not {labels.tolist()}")
    return np.flatnonzero(labels)


def save_cam(path, cam):
    """Maps (P, h, w), one row per present class, ascending -> plain float16 .npy."""
    cam = np.asarray(cam, dtype=np.float16)
    if not np.isfinite(cam).all():
        raise ValueError(f"{path}: its maps are not finite: look at the picture, take --amp bf16 or off, or other weights")
    with atomic(path) as beside, open(beside, "wb") as file:
        np.save(file, cam, allow_pickle=False)


def load_cam(path, labels, size=None):
    """-> (indices of the classes present (P,), maps (P, h, w) float32). `labels` multi-hot (C,) says which rows these are.

    With `size` (H, W) of the picture, maps of other proportions are refused; they may be coarser. Maps in IRN's, PSA's, CLIP-ES's or
    FMA-WSSS's format are read too: a folder of them beside ours goes by its name, --cam."""
    path, classes = cam_path(path), present(labels)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make_cam.py first (README.md has the order)")
    try:
        keys, cam = read_maps(path)
    except Exception as error:                                             # numpy's header parser, zip and memory each raise their own
        raise ValueError(f"{path} is not a plain .npy array ({why(error)}): remove it and run make_cam.py again") from None
    if not isinstance(cam, np.ndarray) or cam.dtype.kind != "f" or cam.ndim != 3 or 0 in cam.shape[1:]:
        raise ValueError(f"{path} holds {getattr(cam, 'dtype', type(cam).__name__)} {np.shape(cam)}, maps are float (P, h, w): run make_cam.py again")
    if keys is not None and (sorted(keys) != classes.tolist() or len(cam) != len(keys)):
        raise ValueError(f"{path} holds {len(cam)} maps of the classes {sorted(keys)}, the picture's label has {classes.tolist()}: is it of another data set, or counted from 1?")
    if len(cam) != len(classes):
        raise ValueError(f"{path} has {len(cam)} maps, the picture's label has {len(classes)} classes: was it made with other labels? run make_cam.py again")
    with np.errstate(over="ignore"):                                       # 1e300 is infinity from here on
        cam = cam.astype(np.float32)                                       # first: numpy is slow in half precision
    if not np.isfinite(cam).all():
        raise ValueError(f"{path} holds NaN or infinity: remove it and run make_cam.py again")
    if keys is not None:
        if cam.size and (cam.min() < -1e-3 or cam.max() > 1.001):
            raise ValueError(f"{path} holds maps from {cam.min():.3g} to {cam.max():.3g}: scale them to [0, 1], each class by itself")
        cam = cam[np.argsort(keys)]
    h, w = cam.shape[1:]
    if size is not None and (h > size[0] or w > size[1] or abs(h * size[1] - w * size[0]) >= max(size)):      # both sides rounded alike, by less than a cell
        raise ValueError(f"{path}: maps of {w}x{h} do not fit their picture of {size[1]}x{size[0]}: run make_cam.py again")
    return classes, cam


def cam_path(path):
    """<id>.npy, or FMA-WSSS's <id>.npz where there is only that."""
    path = Path(path)
    return path if path.exists() or not path.with_suffix(".npz").exists() else path.with_suffix(".npz")


def read_maps(path):
    """-> (classes of the rows, maps (P, h, w)). Ours are a plain array, whose rows are the present classes: None.

    Others': IRN's and CLIP-ES's dict of `keys` and maps, PSA's (and WeakTr's, SemPLeS's) {class: map}, FMA-WSSS's .npz of `fg_cls` and `cam`."""
    if path.suffix == ".npz":
        with np.load(regular(path), allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.infolist()) > ROOM:
                raise ValueError("it unpacks to more than any maps")
            return classes_of(file["fg_cls"]), floats(file["cam"])
    table = read_pickled(path)
    if table is None:
        return None, read_npy(path)
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    if "keys" in table:
        return classes_of(table["keys"]), floats(next((table[name] for name in ("high_res", "attn_highres", "highres") if name in table), None))
    if len(table) > 254:
        raise ValueError(f"it holds {len(table):,} maps")
    keys, maps = [int(key) for key in table], [floats(value) for value in table.values()]
    if sum(value.nbytes for value in maps) > ROOM:                                        # before the stack: one map can be named many times
        raise ValueError("its maps are larger than any")
    return keys, np.stack(maps) if maps else np.zeros((0, 1, 1), np.float32)              # no class: no map that would say the size


ROOM = 1 << 29                                                             # bytes of one picture's maps


def classes_of(keys):
    keys = np.asarray(keys if isinstance(keys, np.ndarray) or isinstance(keys, list) and all(type(key) is int for key in keys) else None)
    if keys.dtype.kind not in "iuf" or keys.ndim != 1 or len(keys) > 254:
        raise ValueError("its classes are not a list of numbers")
    return keys.astype(int).tolist()


def floats(maps):
    if not isinstance(maps, np.ndarray) or maps.dtype.kind not in "biuf" or maps.nbytes > ROOM:
        raise ValueError("its maps are no array of numbers")
    with np.errstate(over="ignore"):
        return maps.astype(np.float32)


def resize_maps(cam, size):
    """(P, h, w) -> (P, H, W) bilinear torch tensor; P = 0 is ordinary."""
    cam = torch.as_tensor(cam)
    if cam.shape[0] == 0 or tuple(cam.shape[1:]) == tuple(size):
        return cam.new_zeros((0, *size)) if cam.shape[0] == 0 else cam
    return torch.nn.functional.interpolate(cam[None].float(), tuple(size), mode="bilinear", align_corners=False)[0]


def shrink_maps(maps, stride):
    """(P, H, W) -> (P, ceil(H / stride), ceil(W / stride)), the mean of each cell."""
    if stride == 1 or maps.shape[0] == 0:
        return maps[:, ::stride, ::stride]
    return torch.nn.functional.avg_pool2d(maps[None], stride, ceil_mode=True, count_include_pad=False)[0]


def add_background(cam, rule="constant", value=0.43):
    """(P, H, W) maps in [0, 1] -> (1 + P, H, W) with the background first: `constant` t, or `power` a: (1 - max)^a (CLIP-ES)."""
    if rule == "constant" or cam.shape[0] == 0:
        background = torch.full_like(cam.new_empty((1, *cam.shape[1:])), value if rule == "constant" else 1.0)
    else:
        background = (1 - cam.amax(dim=0, keepdim=True)).clamp(min=0) ** value
    return torch.cat([background, cam])


# ---------------------------------------------------------------- whole pictures

class Pictures(Dataset):
    """Whole pictures by number; a batch is (numbers, images)."""

    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return i, self.folder.image(self.ids[i])

    def collate(self, batch):
        return [i for i, _ in batch], torch.stack([image for _, image in batch])

    def equal_sizes(self, batch_size):
        """Numbers of the pictures in batches that stack: as many of one size as `batch_size` allows."""
        with ThreadPool(16) as threads:                                        # headers of a million files far away: threads wait for them together
            sizes = threads.map(lambda id: picture_size(self.folder.picture(id)), self.ids)
        for _, group in groupby(sorted(range(len(sizes)), key=lambda i: (sizes[i], i)), key=lambda i: sizes[i]):
            group = list(group)
            yield from (group[n:n + batch_size] for n in range(0, len(group), batch_size))


def by_size(folder, ids, batch_size, env, workers=0):
    """DataLoader over all pictures, each once, in batches of one size: (numbers (b,) list, images (b, 3, H, W) in [0, 1])."""
    pictures = Pictures(folder, ids)
    return DataLoader(pictures, batch_sampler=list(pictures.equal_sizes(batch_size)), num_workers=workers, collate_fn=pictures.collate,
                      pin_memory=env.device.type == "cuda", worker_init_fn=serve)


def serve(worker):
    """A loader's process leaves Ctrl-C, and one SIGTERM, to the one that it works for: both may be sent to all processes of a run, which is to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


# ---------------------------------------------------------------- training samples

class Erase(v2.RandomErasing):
    """Random erasing by noise: the mean colour +- its spread, cut to [0, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def make_params(self, flat_inputs):
        drawn = super().make_params(flat_inputs)
        if drawn["v"] is not None:
            drawn["v"] = (drawn["v"] * self.std + self.mean).clamp(0, 1)
        return drawn


def train_transform(size, scale=(0.08, 1.0), randaugment=False, erase=0.0):
    """-> function of a picture's path: RandomResizedCrop and flip; RandAugment m9 and random erasing if asked (SemPLeS (a), (c))."""
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    steps = [v2.RandomHorizontalFlip()]
    if randaugment:
        steps.append(v2.RandAugment(magnitude=9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR))     # 9 of 10, as timm counts
    steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
    if erase:
        steps.append(Erase(erase, value="random", inplace=True))
    return partial(crop_and_augment, crop, v2.Compose(steps))


def crop_and_augment(crop, augment, path):
    """-> (3, h, w) in [0, 1]. The crop is drawn from the size that the header tells, so that of a large JPEG only the pixels it needs are decoded."""
    with opened(path) as file:
        height, width = shown_size(file)
        box = crop.make_params([torch.empty(()).expand(3, height, width)])                 # looks at the shape alone
        image = decode(file, [math.ceil(n * m / box[side]) for n, m, side in zip((height, width), crop.size, ("height", "width"))])
    reduced = max(round(width / image.width), round(height / image.height))                # 1, 2, 4 or 8: its last row and column may be partial ones
    left, top, right, bottom = box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]
    image = image.crop([round(n / reduced) for n in (left, top, right, bottom)])
    image = v2.functional.resize(tv_tensors.Image(to_tensor(image)), crop.size, crop.interpolation, antialias=crop.antialias)
    return augment(image).as_subclass(torch.Tensor)


class Samples(Dataset):
    """Augmented training samples. Each draws its noise from (seed, epoch, picture) alone: not from the process, the
    worker or the batch it happens to be in. So any number of processes sees the same crops, and a resumed run too.

    The hash of whole numbers is the same in every 64-bit CPython from 3.8 on, whatever PYTHONHASHSEED; what is drawn from it is torch's."""

    def __init__(self, folder, ids, transform, seed=0, masks=None):
        """`transform` takes the path of a picture. With `masks`, id -> path of a label map, for segmentation, it takes picture and mask together."""
        self.folder, self.ids, self.labels = folder, ids, folder.labels(ids) if masks is None else None
        self.transform, self.seed, self.masks = transform, seed, masks

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        """(epoch, i) -> picture (3, h, w) in [0, 1], labels (C,) or mask (h, w) int64, i."""
        epoch, i = key
        path = self.folder.picture(self.ids[i])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, i)) & 0x7FFFFFFFFFFFFFFF)
            if self.masks is None:
                return self.transform(path), self.labels[i], i
            image = tv_tensors.Image(to_tensor(load_image(path)))
            image, mask = self.transform(image, tv_tensors.Mask(self.mask(i, image)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long(), i

    def collate(self, samples):
        """A batch. Where a rank's share of a small batch is empty: an empty one, or for segmentation, whose networks take none, a picture without a label."""
        if samples:
            return default_collate(samples)
        image, target, _ = self[0, 0]
        count = 0 if self.masks is None else 1
        return image.new_zeros(count, *image.shape), target.new_full((count, *target.shape), IGNORE), torch.zeros(0, dtype=torch.long)

    def mask(self, i, image):
        path = self.masks(self.ids[i])
        mask = load_mask(path, len(self.folder.classes))
        if mask.shape != tuple(image.shape[1:]):
            raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its picture {image.shape[2]}x{image.shape[1]}: make the mask again")
        return torch.from_numpy(mask)


class Batches(Sampler):
    """Batches of one epoch as lists of (epoch, i) keys, this rank's share of each: `batch_size` counts all processes.

    A last batch that is not full is left out while training, unless it is the only one. `skip` batches are passed over (resume)."""

    def __init__(self, length, batch_size, env, seed=0):
        self.length, self.batch_size, self.env, self.seed = length, min(batch_size, length), env, seed
        self.epoch, self.skip = 0, 0

    def __len__(self):
        return self.length // self.batch_size

    def start(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(hash((self.seed, self.epoch)) & 0x7FFFFFFFFFFFFFFF))
        for step in range(self.skip, len(self)):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size].tolist()
            yield [(self.epoch, i) for i in self.env.shard(batch)]


def loader(samples, batch_size, env, workers=0):
    """-> DataLoader over (images, targets, picture numbers) and its Batches: `batches.start(epoch, skip)` before each epoch."""
    batches = Batches(len(samples), batch_size, env, samples.seed)
    # A generator of its own: an iterator draws a number when it starts, which would move the networks' noise in a resumed epoch.
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=samples.collate, generator=torch.Generator(),
                      pin_memory=env.device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=serve), batches
