"""Other projects' pickles are programs: hostile ones run nothing, honest ones give the same values."""
import codecs
import copyreg
import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from plumbing import folders, foreign, maps

BYTES = b"A" * 64                                     # as a pointer: to nobody's memory


class Call:
    """Pickles as a call of `function`, then the setting of `state`."""

    def __init__(self, function, *args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


def opcodes(*values):
    """What leaves `values` on a pickle's stack."""
    return b"".join(pickle.dumps(value, 3)[2:-1] for value in values)


def read(code):
    return foreign.load(io.BytesIO(b"\x80\x04" + code + b"."))


def dtype(name, *state):
    return Call(np.dtype, name, False, True, state=state or (3, "<", None, None, None, -1, -1, 0))


def array(shape, kind, content):
    state = (1, shape, kind, False, content)
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=state)


def stored(*numbers, count=None):
    """The bytes of a torch storage; `count`: a forged count of its numbers."""
    content = torch.tensor(numbers).__reduce_ex__(2)[1][0].__reduce__()[1][0]
    if count is None:
        return content
    forged = b"\x8a\x08" + count.to_bytes(8, "little") + b"N"
    return content.replace(b"K" + bytes([len(numbers)]) + b"N", forged)


def tensor(offset, size, stride, content=None):
    storage = Call(torch.storage._load_from_bytes, content or stored(1., 2., 3.))
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


f4, o8 = dtype("f4"), dtype("O8")
frombuffer, scalar = np._core.numeric._frombuffer, np._core.multiarray.scalar
fields = {"a": (dtype("O8", 3, "|", None, None, None, -1, -1, 63), 0)}
interface = {"__array_interface__": {"shape": (1 << 20,), "typestr": "|u1", "data": (0x414141414141, True)}}


def buffer(kind):
    return Call(frombuffer, BYTES, kind, (8,), "C")


HOSTILE = {
    # code
    "a call": Call(os.mkdir, "bombed"),
    "a call, in words of old": b"(S'bombed'\niposix\nmkdir\n",
    "a call of what lies on the stack": b"(cposix\nmkdir\nS'bombed'\no",
    "a call inside a storage": tensor(0, (3,), (1,), pickle.dumps(Call(os.mkdir, "bombed"))),
    "a name with dots": opcodes("numpy", "dtype.__new__") + b"\x93",
    "numpy.ndarray, made": b"cnumpy\nndarray\n" + opcodes(((9,), "f8", BYTES)) + b"\x81",
    "numpy.ndarray, called": b"cnumpy\nndarray\n" + opcodes(((9,), "f8", BYTES)) + b"R",
    "an object outside the file": b"Pname\n",
    "an object outside the file, named by another": opcodes("name") + b"Q",
    "a buffer outside the file": b"\x97",
    "another codec": Call(codecs.encode, "bombed", "punycode"),
    # bytes as pointers
    "a dtype of void": buffer(dtype("V8", 3, "|", None, ("a",), fields, 8, 1, 0)),
    "a dtype with fields": buffer(dtype("f8", 3, "|", None, ("a",), fields, 8, 1, 0)),
    "fields without names": buffer(dtype("f8", 3, "|", None, None, fields, 8, 1, 0)),
    "a dtype of arrays": buffer(dtype("f8", 3, "|", (o8, (1,)), None, None, 8, 1, 0)),
    "a buffer of objects": buffer(o8),
    "an array of objects": array((8,), o8, BYTES),
    "one object": array((), o8, BYTES[:8]),
    "a scalar of an object": Call(scalar, o8, BYTES[:8]),
    "more objects than there are": array((1 << 40,), o8, [1]),
    # sizes that are not those of the bytes
    "strings": buffer(dtype("U1", 3, "<", None, None, None, 1 << 30, 4, 8)),
    "a string that is none": Call(scalar, dtype("U2"), b"\xff" * 8),
    "a number of too few bytes": Call(scalar, dtype("f8"), b"x"),
    "an array of too many bytes": array((2,), f4, b"x" * 16),
    "a shape that overflows": array((1 << 62, 4), f4, b"x" * 16),
    "a shape of 2^64": array((1 << 32, 1 << 32, 1), f4, b""),
    "a shape below 0": array((-4, -1), f4, b"x" * 16),
    "a shape of fractions": array((2.0, 2.0), f4, b"x" * 16),
    "a number for bytes": array((4,), f4, 16),
    "axes that are none": Call(frombuffer, b"x" * 16, f4, (2, 2), "K", (0, 7)),
    "a tensor of more numbers": tensor(0, (1 << 40,), (1,)),
    "a tensor of large steps": tensor(0, (2,), (1 << 40,)),
    "a tensor of steps that overflow": tensor(0, (2, 1), (1, 1 << 62)),
    "a tensor that begins late": tensor(3, (1,), (1,)),
    "a tensor that begins early": tensor(-1, (1,), (1,)),
    "a tensor that steps back": tensor(0, (3,), (-1,)),
    "a tensor that repeats": tensor(0, (1 << 40,), (0,)),
    "a tensor of strings": Call(torch._utils._rebuild_tensor_v2, "abc", 0, (3,), (1,)),
    "a storage of more numbers": tensor(0, (1 << 30,), (1,), stored(1., 2., 3., count=1 << 40)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = HOSTILE[name]
    code = value if isinstance(value, bytes) else opcodes(value)
    with pytest.raises((ValueError, TypeError, AttributeError, OverflowError, pickle.UnpicklingError)):
        read(code)
    assert not os.path.exists("bombed")


def test_names_by_number_are_refused():
    copyreg.add_extension("posix", "mkdir", 240)
    try:
        with pytest.raises(ValueError, match="it asks for posix.mkdir"):
            read(b"\x82\xf0")
    finally:
        copyreg.remove_extension("posix", "mkdir", 240)


@pytest.mark.parametrize("module,name", [key for key in foreign.ALLOWED if key[1] in ("SamAnns", "ADict")])
def test_attributes_of_others_classes_are_left_out(module, name):
    """numpy would follow an __array_interface__ to any address."""
    for state in (interface, (None, interface)):
        code = f"c{module}\n{name}\n".encode() + b")\x81" + opcodes(state) + b"b."
        value = foreign.Reader(io.BytesIO(code)).load()
        assert not hasattr(value, "__dict__") and not hasattr(value, "__array_interface__")


@pytest.mark.parametrize("module,name", foreign.ALLOWED)
def test_what_a_pickle_may_call_it_cannot_change(module, name):
    for state in ({"function": 1}, (None, {"function": 1})):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            read(f"c{module}\n{name}\n".encode() + opcodes(state) + b"b")


def test_refusals_name_the_file(tmp_path):
    np.save(tmp_path / "labels.npy", np.array({"a_1": Call(os.mkdir, "bombed")}, dtype=object))
    with pytest.raises(ValueError, match="labels.npy is refused .it asks for posix.mkdir"):
        folders.read_cls_labels(tmp_path / "labels.npy", "abc")
    with pytest.raises(ValueError, match="labels.npy is not a plain .npy array .it asks for posix.mkdir"):
        maps.load_cam(tmp_path / "labels.npy", [1, 0, 0])
    (tmp_path / "labels.npy").write_bytes((tmp_path / "labels.npy").read_bytes()[:-10])
    with pytest.raises(ValueError, match="labels.npy is refused"):
        folders.read_cls_labels(tmp_path / "labels.npy", "abc")


# ---------------------------------------------------------------- honest pickles

numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = [
    numbers, numbers.T, numbers.transpose(1, 0, 2), numbers[:, ::2], numbers.astype(">f8"),
    numbers.astype(np.float16), numbers > 7, np.float32(0.5), np.array(7, np.uint8), np.arange(3),
    np.zeros((0, 3), np.int64)]
TENSORS = [
    torch.arange(24.).view(2, 3, 4), torch.arange(24).view(2, 3, 4)[:, 1:, ::2], torch.arange(6).view(2, 3).T,
    torch.tensor(3, dtype=torch.int16), torch.zeros(0, 5), torch.tensor([True, False]),
    torch.nonzero(torch.tensor([0, 1, 1]))[:, 0], torch.rand(3).half()]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_pickles_are_read_to_the_same_values(protocol):
    values = [a for a in ARRAYS if protocol > 2 or a.size] + TENSORS        # protocol 2 has no empty bytes
    table = dict(enumerate(values)) | {np.str_("b\u00e4r"): True, np.int32(2007000032): None, "same": numbers}
    found = foreign.load(io.BytesIO(pickle.dumps(np.array(table, dtype=object), protocol)))
    assert list(found) == [*range(len(values)), "b\u00e4r", 2007000032, "same"] and found["same"] is found[0]
    for key, value in enumerate(values):
        value = value.numpy() if torch.is_tensor(value) else value
        assert np.array_equal(found[key], value) and np.shape(found[key]) == value.shape, key
        assert not isinstance(value, np.ndarray) or found[key].dtype == value.dtype
    masks = [{"segmentation": numbers > 7, "area": np.int64(3)}]
    found = foreign.load(io.BytesIO(pickle.dumps(masks, protocol)))
    assert np.array_equal(found[0]["segmentation"], numbers > 7) and found[0]["area"] == 3


def test_arrays_of_numpy_1():
    code = pickle.dumps({"a": numbers}, 3)
    assert b"numpy._core" in code
    assert np.array_equal(foreign.load(io.BytesIO(code.replace(b"numpy._core", b"numpy.core")))["a"], numbers)


def test_a_bool_of_another_byte_is_true():
    """numpy expects the bytes of bools to be 0 or 1."""
    mask = read(opcodes(Call(frombuffer, b"\x00\x02\xff\x01", dtype("b1"), (4,), "C")))
    assert mask.view(np.uint8).tolist() == [0, 1, 1, 1]
