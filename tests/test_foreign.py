"""Other projects' pickles are programs: hostile ones run nothing, honest ones give the same values."""
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


def tensor(offset, size, stride, content=None):
    storage = Call(torch.storage._load_from_bytes, content or STORED)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


STORED = torch.tensor([1., 2., 3.]).__reduce_ex__(2)[1][0].__reduce__()[1][0]
f4, o8 = dtype("f4"), dtype("O8")
FIELDS = {"a": (o8, 0)}
HOSTILE = {
    # code
    "a call": Call(os.mkdir, "bombed"),
    "a call, in words of old": b"(S'bombed'\niposix\nmkdir\n",
    "a call inside a storage": tensor(0, (3,), (1,), pickle.dumps(Call(os.mkdir, "bombed"))),
    "numpy.ndarray, made": b"cnumpy\nndarray\n" + opcodes(((9,), "f8", BYTES)) + b"\x81",
    "an object outside the file": b"Pname\n",
    # bytes as pointers
    "a dtype with fields": array((8,), dtype("f8", 3, "|", None, ("a",), FIELDS, 8, 1, 0), BYTES),
    "an array of objects": array((8,), o8, BYTES),
    "a scalar of an object": Call(np._core.multiarray.scalar, o8, BYTES[:8]),
    # sizes that are not those of the bytes
    "an array of too many bytes": array((2,), f4, b"x" * 16),
    "a shape below 0": array((-4, -1), f4, b"x" * 16),
    "a tensor of more numbers": tensor(0, (1 << 40,), (1,)),
    "a tensor of large steps": tensor(0, (2,), (1 << 40,)),
    "a tensor that begins early": tensor(-1, (1,), (1,)),
    "a storage of more numbers": tensor(0, (3,), (1,), STORED.replace(b"K\x03N", b"K\xffN")),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = value if isinstance(value, bytes) else opcodes(value)
    with pytest.raises((ValueError, TypeError, AttributeError, OverflowError, pickle.UnpicklingError)):
        read(code)
    assert not os.path.exists("bombed")


@pytest.mark.parametrize("module,name", foreign.ALLOWED)
def test_what_a_pickle_may_call_it_cannot_change(module, name):
    """Attributes of the two empty classes are left out: numpy would follow an __array_interface__."""
    interface = {"__array_interface__": {"shape": (1 << 20,), "typestr": "|u1", "data": (0x4141414141, True)}}
    for state in (interface, (None, interface)):
        code = f"c{module}\n{name}\n".encode()
        with pytest.raises((ValueError, TypeError, AttributeError)):
            read(code + opcodes(state) + b"b")
        if name in ("SamAnns", "ADict"):
            value = foreign.Reader(io.BytesIO(code + b")\x81" + opcodes(state) + b"b.")).load()
            assert not hasattr(value, "__dict__") and not hasattr(value, "__array_interface__")


def test_refusals_name_the_file(tmp_path):
    path = tmp_path / "labels.npy"
    np.save(path, np.array({"a_1": Call(os.mkdir, "bombed")}, dtype=object))
    with pytest.raises(ValueError, match="labels.npy is refused .it asks for posix.mkdir"):
        folders.read_cls_labels(path, "abc")
    with pytest.raises(ValueError, match="labels.npy is not a plain .npy array .it asks for posix.mkdir"):
        maps.load_cam(path, [1, 0, 0])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="labels.npy is refused"):
        folders.read_cls_labels(path, "abc")


# ---------------------------------------------------------------- honest pickles

numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = [
    numbers, numbers.T, numbers.transpose(1, 0, 2), numbers[:, ::2], numbers.astype(">f8"),
    numbers.astype(np.float16), numbers > 7, np.float32(0.5), np.array(7, np.uint8), np.zeros((0, 3))]
TENSORS = [
    torch.arange(24.).view(2, 3, 4), torch.arange(24).view(2, 3, 4)[:, 1:, ::2], torch.arange(6).view(2, 3).T,
    torch.tensor(3, dtype=torch.int16), torch.zeros(0, 5), torch.tensor([True, False]), torch.rand(3).half()]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_pickles_are_read_to_the_same_values(protocol):
    """Of numpy 2 and of numpy 1."""
    values = [a for a in ARRAYS if protocol > 2 or a.size] + TENSORS        # protocol 2 has no empty bytes
    table = dict(enumerate(values)) | {np.str_("b\u00e4r"): True, np.int32(2007000032): None, "same": numbers}
    code = pickle.dumps(np.array(table, dtype=object), protocol)
    found = foreign.load(io.BytesIO(code))
    assert list(found) == [*range(len(values)), "b\u00e4r", 2007000032, "same"] and found["same"] is found[0]
    for key, value in enumerate(values):
        value = value.numpy() if torch.is_tensor(value) else value
        assert np.array_equal(found[key], value) and np.shape(found[key]) == value.shape, key
        assert not isinstance(value, np.ndarray) or found[key].dtype == value.dtype
    assert read(opcodes(array((3,), f4, bytes(12)))).tolist() == [0, 0, 0]
    assert read(opcodes(tensor(0, (3,), (1,)))).tolist() == [1, 2, 3] and b"K\x03N" in STORED
    masks = [{"segmentation": numbers > 7, "area": np.int64(3)}]
    found = foreign.load(io.BytesIO(pickle.dumps(masks, protocol)))
    assert np.array_equal(found[0]["segmentation"], numbers > 7) and found[0]["area"] == 3
    if protocol < 4:                                          # names end at a line end: no lengths to mend
        assert b"numpy._core" in code
        assert foreign.load(io.BytesIO(code.replace(b"numpy._core", b"numpy.core"))).keys() == table.keys()
