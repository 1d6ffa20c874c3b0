"""Other projects' pickles are programs. Hostile ones: each is refused and the process lives; what honest ones hold is read to the same values."""
import codecs
import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import run

from plumbing import folders, foreign, maps

MEMORY = b"A" * 64                                                # as an address: nobody's


class Call:
    """Pickles as a call of `function`, then the setting of `state`."""

    def __init__(self, function, *args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


def body(*values):
    """The opcodes that leave `values` on a pickle's stack."""
    return b"".join(pickle.dumps(value, 3)[2:-1] for value in values)


def changed(what, name, value):
    """Opcodes that set an attribute of what lies on the stack."""
    return what + b"(N}" + body(name) + value + b"stb"


def dtype(name, *state):
    return Call(np.dtype, name, False, True, state=state or (3, "<", None, None, None, -1, -1, 0))


def array(shape, kind, content, version=1, fortran=False):
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(version, shape, kind, fortran, content))


def stored(*numbers, count=None):
    """The bytes of a torch storage, with the count of its numbers forged."""
    content = torch.tensor(numbers).__reduce_ex__(2)[1][0].__reduce__()[1][0]
    return content if count is None else content.replace(b"K" + bytes([len(numbers)]) + b"N", b"\x8a\x08" + count.to_bytes(8, "little") + b"N")


def tensor(offset, size, stride, content=None):
    return Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, content or stored(1., 2., 3.)), offset, size, stride, False, OrderedDict())


def attacks():
    """{name: what the pickle holds as a label, a map or a mask}"""
    frombuffer, scalar = np._core.numeric._frombuffer, np._core.multiarray.scalar
    f4, fields = dtype("f4"), {"a": (dtype("O8", 3, "|", None, None, None, -1, -1, 63), 0)}
    interface = {"__array_interface__": {"shape": (1 << 20,), "typestr": "|u1", "data": (0x414141414141, True), "version": 3}}
    return {
        "a pointer in a field of V8": Call(frombuffer, MEMORY, dtype("V8", 3, "|", None, ("a",), fields, 8, 1, 0), (8,), "C"),
        "a pointer in a field of f8": Call(frombuffer, MEMORY, dtype("f8", 3, "|", None, ("a",), fields, 8, 1, 0), (8,), "C"),
        "fields without names": Call(frombuffer, MEMORY, dtype("f8", 3, "|", None, None, fields, 8, 1, 0), (8,), "C"),
        "a subarray": Call(frombuffer, MEMORY, dtype("f8", 3, "|", (dtype("O8"), (1,)), None, None, 8, 1, 0), (8,), "C"),
        "pointers as objects": Call(frombuffer, MEMORY, dtype("O8"), (8,), "C"),
        "an array of pointers": array((8,), dtype("O8"), MEMORY),
        "one pointer": array((), dtype("O8"), MEMORY[:8]),
        "a scalar of a pointer": Call(scalar, dtype("O8"), MEMORY[:8]),
        "more objects than there are": array((1 << 40,), dtype("O8"), [1]),
        "texts longer than their bytes": Call(frombuffer, MEMORY, dtype("U1", 3, "<", None, None, None, 1 << 30, 4, 8), (1,), "C"),
        "a text that is none": Call(scalar, dtype("U2"), b"\xff" * 8),
        "a number of too few bytes": Call(scalar, dtype("f8"), b"x"),
        "a shape that overflows": array((1 << 62, 4), f4, b"x" * 16),
        "a shape of 2^64 + 4": array((1 << 32, 1 << 32, 1), f4, b""),
        "a shape below 0": array((-4, -1), f4, b"x" * 16),
        "a shape of fractions": array((2.0, 2.0), f4, b"x" * 16),
        "axes that are none": Call(frombuffer, b"x" * 16, f4, (2, 2), "K", (0, 7)),
        "an array without a state": Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),
        "an array over a number": array((4,), f4, 1 << 40),
        "strides over a buffer": b"cnumpy\nndarray\n" + body(((1 << 30,), "f8", b"x" * 16, 0, (1 << 20,))) + b"\x81",
        "strides, called": b"cnumpy\nndarray\n" + body(((1 << 30,), "f8", b"x" * 16, 0, (1 << 20,))) + b"R",
        "a tensor of more numbers": tensor(0, (1 << 40,), (1,)),
        "a tensor of steps": tensor(0, (2,), (1 << 40,)),
        "a tensor of overflowing steps": tensor(0, (2, 1), (1, 1 << 62)),
        "a tensor that begins late": tensor(3, (1,), (1,)),
        "a tensor that begins before": tensor(-1, (1,), (1,)),
        "a tensor that steps back": tensor(0, (3,), (-1,)),
        "a tensor that repeats": tensor(0, (1 << 40,), (0,)),
        "a storage of more numbers": tensor(0, (1 << 30,), (1,), stored(1., 2., 3., count=1 << 40)),
        "a storage that calls": tensor(0, (3,), (1,), pickle.dumps(Call(os.mkdir, "bombed"))),
        "an address for numpy, from a dict": Call(OrderedDict, state=interface),
        "a decoder": Call(codecs.encode, "bombed", "punycode"),
        "a call": Call(os.mkdir, "bombed"),
        "a name with dots": body("numpy", "dtype.__new__") + b"\x93",
        "what is called, changed": changed(b"ccollections\nOrderedDict\n", "make", b"cnumpy\ndtype\n"),
        "a constructor, changed": changed(b"cnumpy\ndtype\n", "__init__", b"ccollections\nOrderedDict\n"),
        "its own content": body(Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")) + b"q\x63(" + body(1, (), dtype("O8"), False) + b"]h\x63atb",
        **{f"an address for numpy, {how} {name}": f"cx\n{name}\n".encode() + code for name, end in (("SamAnns", body("x") + b"a"), ("ADict", b"")) for how, code in (
            ("in", b")\x81" + body(interface) + b"b" + end), ("set on", b")\x81" + body((None, interface)) + b"b" + end), ("under", body((None, interface)) + b"b"))},
    }


READERS = """
import os, sys
import numpy as np
from plumbing import folders, foreign, maps

def fma(path):
    with open(path, "rb") as file:
        return np.array(foreign.FmaReader(file).load()[0]["segmentation"], np.float32).sum()

readers = {"label.npy": lambda path: folders.read_cls_labels(path, "abc"), "map.npy": lambda path: maps.load_cam(path, [1, 0, 0])[1].sum(), "mask.pkl": fma}
os.chdir(sys.argv[1])
for path in (f"{n}.{reader}" for n in range(int(sys.argv[2])) for reader in readers):
    try:
        print(path, "read", readers[path.split(".", 1)[1]](path), flush=True)
    except Exception as error:
        print(path, "refused", " ".join(str(error).split()), flush=True)
"""


def write(folder, name, code):
    """The value as a label, {id: }, and as a map, {class: }, of a pickled .npy, and as the mask of a .pkl of FMA-WSSS's."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    for reader, content in (("label.npy", head.getvalue() + b"\x80\x04}" + body("a_1") + code + b"s."), ("map.npy", head.getvalue() + b"\x80\x04}" + body(0) + code + b"s."),
                            ("mask.pkl", b"\x80\x04]}" + body("segmentation") + code + b"sa.")):
        (folder / f"{name}.{reader}").write_bytes(content)


def read_all(folder, values):
    """{(name, reader): what became of it}; of what ends the process, and of all that comes after it, nothing is said."""
    (folder / "readers.py").write_text(READERS)
    for n, value in enumerate(values.values()):
        write(folder, n, value if isinstance(value, bytes) else body(value))
    lines = run(folder / "readers.py", folder, len(values), check=False).stdout.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    return {(name, reader): found.get(f"{n}.{reader}", "killed") for n, name in enumerate(values) for reader in ("label.npy", "map.npy", "mask.pkl")}


def test_hostile_pickles_are_refused_and_the_process_lives(tmp_path):
    found = read_all(tmp_path, attacks())
    assert {what: became for what, became in found.items() if not became.startswith("refused")} == {}
    assert not (tmp_path / "bombed").exists()


class Honest:
    """Arrays and numbers as numpy and torch write them."""
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = [numbers, numbers.T, numbers.transpose(1, 0, 2), numbers[:, ::2], numbers.astype(">f8"), numbers.astype(np.float16), numbers > 7, np.zeros((0, 3), np.int64),
              np.float32(0.5), np.array(7, np.uint8), np.arange(3)]
    tensors = [torch.arange(24.).view(2, 3, 4), torch.arange(24).view(2, 3, 4)[:, 1:, ::2], torch.arange(6).view(2, 3).T, torch.tensor(3, dtype=torch.int16),
               torch.zeros(0, 5), torch.tensor([True, False]), torch.nonzero(torch.tensor([0, 1, 1]))[:, 0], torch.rand(3).half()]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_pickles_are_read_to_the_same_values(protocol):
    arrays = [array for array in Honest.arrays if protocol > 2 or array.size]                    # protocol 2 calls for empty bytes
    table = dict(enumerate([*arrays, *Honest.tensors]))
    table |= {np.str_("b\u00e4r"): True, np.int32(2007000032): None, "same": table[0]}
    found = foreign.Restricted(io.BytesIO(pickle.dumps(np.array(table, dtype=object), protocol))).load()
    assert list(found) == [*range(len(arrays) + len(Honest.tensors)), "b\u00e4r", 2007000032, "same"] and found["same"] is found[0]
    for key, value in enumerate([*arrays, *Honest.tensors]):
        value = value.numpy() if torch.is_tensor(value) else value
        assert np.array_equal(found[key], value) and np.shape(found[key]) == value.shape, key
        assert not isinstance(value, np.ndarray) or value.size == 0 or found[key].dtype == value.dtype
    masks = foreign.FmaReader(io.BytesIO(pickle.dumps([{"segmentation": Honest.arrays[6], "area": np.int64(3)}], protocol))).load()
    assert np.array_equal(masks[0]["segmentation"], Honest.arrays[6]) and masks[0]["area"] == 3


def test_numbers_that_python_does_not_print_are_refused_by_the_name_of_their_file(tmp_path):
    for n, value in enumerate((1 << 63, -1 << 63, 1 << 20_000)):
        for key, label in ((value, np.zeros(7)), ("a_1", [value])):
            np.save(tmp_path / "labels.npy", np.array({key: label}, dtype=object))
            with pytest.raises(ValueError, match="labels.npy is refused .it holds a number of more than 64 bits"):
                folders.read_cls_labels(tmp_path / "labels.npy", "abc")
    for value in ((1 << 63) - 1, 1 - (1 << 63)):
        assert foreign.Restricted(io.BytesIO(pickle.dumps(value))).load() == value


def test_a_bool_of_another_byte_is_true():
    """numpy counts the bytes of bools as zeros and ones."""
    code = body(Call(np._core.numeric._frombuffer, b"\x00\x02\xff\x01", dtype("b1"), (4,), "C"))
    mask = foreign.Restricted(io.BytesIO(b"\x80\x03" + code + b".")).load()
    assert mask.view(np.uint8).tolist() == [0, 1, 1, 1] and np.count_nonzero(mask) == 3
