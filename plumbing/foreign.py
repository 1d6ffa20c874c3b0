"""Other projects' pickles, read without running anything in them."""
import io
import math
import os
import re
import struct

import numpy as np

from plumbing import files



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
    with open(files.regular(path), "rb") as file:
        shape, _, dtype = files.read_header(file)
        if not dtype.hasobject:
            return None
        if shape:
            raise ValueError(f"it holds {shape!r:.40} objects, not one dict")
        return Restricted(file).load()
