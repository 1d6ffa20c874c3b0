"""Other projects' pickles, read without running what they ask for.

A pickle is a program: it calls whatever `find_class` returns, with arguments from the file, and sets the
state of the result. Here `find_class` returns only our own functions and two empty classes (ALLOWED). They
make plain Python values or `Array`, and check every state that a file sets. numpy's and torch's constructors
stay out of reach: unpickling the real numpy.dtype could treat file bytes as pointers.
"""
import gc
import io
import math
import pickle
import re

import numpy as np

from plumbing import files

# No code runs. A hostile file can still use up memory, time or the stack: docs/robustness.md.


class Dtype:
    """A dtype of numbers, strings or objects by its name and byte order; no fields, no subarrays."""
    __slots__ = ("name", "order", "numpy")

    def __init__(self, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|O8?|U\d{1,4}", name):
            raise ValueError(f"it holds the dtype {name[:40]!r}")
        self.name = name
        self.__setstate__((3, "=", None, None, None))

    def __setstate__(self, state):
        _, self.order, *structure = state[:5]
        if self.order not in ("<", ">", "|", "=") or structure != [None] * 3:
            raise ValueError("it holds a dtype with fields")
        self.numpy = None if self.name[0] in "OU" else np.dtype(self.order + self.name)

    def read(self, shape, content, order="C"):
        """-> array of `shape` over the bytes `content`."""
        if self.numpy is None or type(content) not in (bytes, bytearray):
            raise ValueError("an array in it is not of numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * self.numpy.itemsize != len(content):
            raise ValueError(f"an array in it is torn: {len(content)} bytes for the shape {shape}")
        array = np.ndarray(shape, self.numpy, bytes(content), order=order)
        return array.view("u1") != 0 if self.name == "b1" else array    # a byte other than 0 and 1 is True


class Array:
    """An array, made by its state. np.save keeps a dict as an array of shape (): then the dict."""
    __slots__ = ("value",)

    def __init__(self, value=None):
        self.value = value

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        if dtype.name[0] == "O" and shape == () and type(content) is list:
            self.value, = content
        else:
            self.value = dtype.read(shape, content, "F" if fortran else "C")


def reconstruct(*_):
    """numpy's _reconstruct: an array whose state comes next."""
    return Array()


def from_buffer(content, dtype, shape, order, axes=None):
    """numpy's _frombuffer, protocol 5. Order K is C order whose axes are moved afterwards."""
    value = dtype.read(shape, content, "F" if order == "F" else "C")
    return Array(value if axes is None else value.transpose(axes))


def scalar(dtype, content):
    """A number or a string of numpy -> Python's own."""
    if dtype.name[0] == "U":
        return content.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    return dtype.read((), content).item()


def latin1(text, encoding):
    """_codecs.encode, which protocol 2 uses for bytes."""
    if encoding != "latin1":
        raise ValueError(f"it asks for the encoding {encoding[:40]!r}")
    return str.encode(text, "latin1")


def storage(content):
    """The bytes of a torch storage -> Array (n,). torch's own reader would unpickle them with all rights."""
    file = io.BytesIO(content)
    magic, version, _, (_, name, key, _, count, view), keys = (StorageReader(file).load() for _ in range(5))
    if (magic, version, view, keys) != (0x1950a86a20f9469cfc6c, 1001, None, [key]):
        raise ValueError("a tensor in it is not as torch writes them")
    return Array(Dtype(name).read((count,), file.read()[8:]))            # 8 bytes: the count again


def tensor(numbers, offset, size, stride, *_):
    """torch's _rebuild_tensor_v2: a view (offset, size, stride) of a storage's numbers -> Array."""
    flat = numbers.value
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or math.prod(size) > len(flat):
        raise ValueError("a tensor in it has no size")
    if 0 in size:
        return Array(np.zeros(size, flat.dtype))
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
        raise ValueError("a tensor in it reaches past its numbers")
    steps = [step * flat.itemsize for step in stride]
    return Array(np.lib.stride_tricks.as_strided(flat[offset:], size, steps).copy())


class Allowed:
    """A function that a pickle may call and cannot change."""
    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise ValueError("it changes what it calls")


class PlainList(list):
    """FMA-WSSS's SamAnns, its attributes left out."""
    __slots__ = ()

    def __setstate__(self, state):
        pass


class PlainDict(dict):
    """FMA-WSSS's ADict, its attributes left out."""
    __slots__ = ()

    def __setstate__(self, state):
        pass


ALLOWED = {
    ("numpy", "ndarray"): "ndarray",                                        # only an argument of _reconstruct
    ("numpy", "dtype"): Allowed(Dtype),
    ("collections", "OrderedDict"): Allowed(dict),
    ("_codecs", "encode"): Allowed(latin1),
    ("torch._utils", "_rebuild_tensor_v2"): Allowed(tensor),
    ("torch.storage", "_load_from_bytes"): Allowed(storage),
    ("libs.sam.custom_sam.sam_auto", "SamAnns"): PlainList,
    ("alchemy_cat.py_tools.adict", "ADict"): PlainDict,
}
for core in ("numpy.core", "numpy._core"):                                  # numpy 1 and 2
    ALLOWED |= {
        (f"{core}.multiarray", "_reconstruct"): Allowed(reconstruct),
        (f"{core}.multiarray", "scalar"): Allowed(scalar),
        (f"{core}.numeric", "_frombuffer"): Allowed(from_buffer),
    }
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "Long": "i8", "Int": "i4", "Short": "i2",
            "Char": "i1", "Byte": "u1", "Bool": "b1"}


class Reader(pickle.Unpickler):
    """Refuses every name that is not in `allowed`, and references to objects outside the file."""
    allowed = ALLOWED

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise ValueError(f"it asks for {module}.{name}"[:100])
        return self.allowed[module, name]


class StorageReader(Reader):
    """Of a torch storage: its reference is a tuple of a kind of number, a key and a count."""
    allowed = {("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()}

    def persistent_load(self, reference):
        return reference


def load(file):
    """The value of a pickle: plain Python, and arrays inside its lists and dicts."""
    running = gc.isenabled()
    gc.disable()                                # COCO's 80,000 labels: the collector would double the time
    try:
        return unpacked(Reader(file).load())
    finally:
        if running:
            gc.enable()


def unpacked(value, depth=3):
    """Every `Array` as its array, in dicts and lists down to `depth`: all of these formats are flatter."""
    if isinstance(value, Array):
        value = value.value
    if depth and isinstance(value, dict):
        return {key: unpacked(part, depth - 1) for key, part in value.items()}
    if depth and isinstance(value, list):
        return [unpacked(part, depth - 1) for part in value]
    return value


def read_pickled(path):
    """What another project's pickled .npy holds; None of a plain array."""
    with open(files.regular(path), "rb") as file:
        shape, _, dtype = files.read_header(file)
        if not dtype.hasobject:
            return None
        if shape:
            raise ValueError(f"it holds {shape} objects, not one dict")
        return load(file)
