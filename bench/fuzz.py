"""Hostile and broken files for every reader of this project: does any run code, hang, eat memory, or leave its folder?

A case is a valid file whose bytes are changed (flipped, cut, doubled, numbers made large; inside archives too, with right checksums), or one that
is built to hurt: pickles that call, nest or name one thing without end, archives that unpack to gigabytes, headers that claim 10^12 numbers, ids
that leave the folder, entities, pipes. Every reader meets its cases in a process of its own with a bound on memory, an audit hook that sees every
write, call of the system and connection, and a file outside that nobody may read. A reader may give a value that passes its own checks, or a
ValueError or OSError of one line that names the file. Anything else is a failure, and so are more than 5 seconds or 1 GB.

    python bench/fuzz.py --write                                 # 3,600 cases, all readers: 3 minutes
    python bench/fuzz.py --cases 20000 --seed 7 --readers picture "map"

A failure is shown with its seed and number; `--readers NAME --only NUMBER` repeats it and leaves the file in --out.
"""
import argparse
import collections
import ctypes
import functools
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                            # before bench/, whose eval.py is not the stage
import prepare_data  # noqa: E402
import report  # noqa: E402
import vpl  # noqa: E402
from plumbing import segments  # noqa: E402
from plumbing import checkpoints as stored, files, folders, foreign, guard, images as image_files, log as logs, maps as map_files, masks  # noqa: E402
from wsss import clip_model, generator, gradcam, segmenter, texts  # noqa: E402

CLASSES = ["train", "boat", "cow"]
SIZE = 12, 16                                                     # of the picture, its mask, maps and segments
SECONDS, MEMORY = 5, 1 << 30
VERDICTS = ["accepted", "refused", "wrong error", "crashed", "hung", "memory", "escaped"]


# ---------------------------------------------------------------- bytes that hurt

class Call:
    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


def doubled(kind, depth=60):
    """A list, tuple or dict that names its part twice, `depth` times over."""
    value = kind((1, 2))
    for _ in range(depth):
        value = kind((value, value))
    return value


def nested(depth=300_000, key=True):
    """The words of a tuple in a tuple in a tuple, as a key of a dict."""
    return b"\x80\x04}N" + b"\x85" * depth + (b"K\x01s." if key else b".")


def keyed(protocol):
    """The words of a dict whose key takes 2^60 steps to hash."""
    return bytes([0x80, protocol]) + b"}" + pickle.dumps(doubled(tuple), 2)[2:-1] + b"K\x01s."


def pickles():
    """Programs for a pickle's reader."""
    yield from (nested(), nested(200_000, False), b"\x80\x04" + b"]" * 3_000_000 + b".", b"\x80\x04N" + b"r\xf0\xff\xff\x7f" + b".", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.")
    yield keyed(4)
    for value in (doubled(tuple), doubled(list), {"keys": doubled(list), "a_1": doubled(list)}, [doubled(list)], {0: doubled(list)},
                  Call(os.mkdir, ("bombed",)), {"a_1": Call(os.system, ("touch bombed",))}, {"a_1": Call(eval, ("open('bombed', 'w')",))},
                  {0: Call(open, ("../outside/canary",))}, {"a_1": Call(bytearray, (10 ** 12,))}, {0: np.zeros(3)}, {"a_1": "x" * 1000}, {"a_1\n": np.zeros(3)},
                  {n: np.zeros(3) for n in range(300)}, {"a_1": np.array([None, 1, 2])}, {1 << 20_000: np.zeros(3)}, [{"segmentation": np.ones(SIZE, bool)}] * 5000,
                  [{"segmentation": {"size": list(SIZE), "counts": [1 << 40, -1]}}], [{"segmentation": {"size": doubled(list), "counts": doubled(list)}}], "x", None, 7):
        yield pickle.dumps(value, 4)
    shape = np.zeros(3).__reduce__()
    for claim in ((10 ** 12,), (1 << 62, 4), (-1,), (3.0,), (10 ** 9,) * 100_000, doubled(tuple, 20)):
        yield pickle.dumps({"a_1": Call(shape[0], shape[1], (1, claim, np.dtype("f8"), False, b"x" * 24))}, 4)
    kind = Call(np.dtype, ("b1", False, True), (3, "|", None, None, None, -1, -1, 0))
    one = b"\2" * 100_000                                         # one content for many arrays
    yield pickle.dumps({n: Call(shape[0], shape[1], (1, (100_000,), kind, False, one)) for n in range(20_000)}, 4)


def objects(program):
    """A pickle inside a .npy."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue() + program


def headers(content=b"x" * 64):
    """.npy whose header claims what is not there."""
    for text in ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", "{'descr': '<f4', 'fortran_order': True, 'shape': (-4, -4), }",
                 "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 16), }", "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000, 3), }",
                 "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 0, 5), }", "{'descr': '<f2', 'fortran_order': False, 'shape': (0, 1000000000, 1000000000), }",
                 "{'descr': '|O', 'fortran_order': False, 'shape': (), }", "{'descr': [('a', '|O'), ('b', '<f4')], 'fortran_order': False, 'shape': (3,), }",
                 "{'descr': '<c8', 'fortran_order': False, 'shape': (2, 4), }", "{'descr': '|S64', 'fortran_order': False, 'shape': (1,), }", "{'descr': '<U16', 'fortran_order': False, 'shape': (), }",
                 "(" * 5000, "-" * 9000 + "1", "[" * 9000, "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 9000 + ",), }", "__import__('os').mkdir('bombed')", "{}", ""):
        for version in (1, 2, 3):
            body = text.encode() + b"\n"
            yield b"\x93NUMPY" + bytes([version, 0]) + len(body).to_bytes(2 if version == 1 else 4, "little") + body + content
    yield b"\x93NUMPY\x02\x00" + (1 << 30).to_bytes(4, "little") + b" " * 1000
    yield b"\x93NUMPY\x02\x00" + (20 << 20).to_bytes(4, "little") + b" " * (20 << 20)


def zipped(parts, deflate=False):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return file.getvalue()


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(part.filename, archive.read(part)) for part in archive.infolist()]


def npz_bombs(names):
    """.npz of small arrays but for one, whose few kilobytes unpack to 700 MB of numbers."""
    size = 700 << 20
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = squeeze.compress(head.getvalue()) + squeeze.flush(zlib.Z_FULL_FLUSH)
    packed += (squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)) * 700 + squeeze.flush()
    for bomb in names:
        file, entries = io.BytesIO(), b""
        for name in names:
            content = packed if name == bomb else np_bytes(np.zeros(3, np.int64))
            facts = struct.pack("<HHHHHIIIHH", 20, 0, 8 * (name == bomb), 0, 0x21, zlib.crc32(content), len(content), size + 128 if name == bomb else len(content), len(name) + 4, 0)
            entries += b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<HHHII", 0, 0, 0, 0, file.tell()) + f"{name}.npy".encode()
            file.write(b"PK\3\4" + facts + f"{name}.npy".encode() + content)
        file.write(entries + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(entries), file.tell(), 0))
        yield file.getvalue()


def np_bytes(array, **kind):
    file = io.BytesIO()
    np.save(file, array, **kind)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth=8, colour=0, content=None, more=b"", after=b""):
    content = zlib.compress(b"\0" * 1000) if content is None else content
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + more + chunk(b"IDAT", content) + after + chunk(b"IEND", b""))


def pictures():
    for side in ((60_000, 60_000), (20_000, 3_000), (20_000, 20_000), (1, 1), (0, 5), (2 ** 31 - 1, 1), (1, 67_000_000), (2 ** 31 - 1, 2 ** 31 - 1)):
        yield from (png(*side), png(*side, 16, 6), png(*side, 1, 3, more=chunk(b"PLTE", b"\0" * 6)))
    flat = zlib.compress(bytes(30 << 20))
    for more in (chunk(b"iCCP", b"x\0\0" + flat), chunk(b"zTXt", b"x\0\0" + flat), chunk(b"iTXt", b"x\0\1\0\0\0" + flat), chunk(b"zTXt", b"x\0\0" + flat) * 100, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
                 chunk(b"acTL", struct.pack(">II", 2 ** 31, 0)), chunk(b"tRNS", b""), chunk(b"PLTE", b"\0" * 5000), chunk(b"gAMA", b""), chunk(b"pHYs", b""), chunk(b"IHDR", b"")):
        yield from (png(4, 4, more=more), png(4, 4, after=more))
    yield png(8000, 8000, 8, 2, zlib.compress(bytes(8000 * 24001), 9))                    # as large as it says
    for name in ("GIF", "TIFF", "BMP", "WEBP", "PPM", "ICO", "TGA", "PDF", "EPS", "JPEG2000", "DDS", "PCX", "SGI"):
        file = io.BytesIO()
        try:
            Image.new("RGB", SIZE[::-1], "red").save(file, name)
        except (OSError, KeyError, ValueError):
            continue
        yield file.getvalue()
    yield from (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(bombed) (w) file\n", b"", b"\0" * 1000)
    for mode in ("CMYK", "L", "YCbCr", "RGB"):
        yield saved(Image.new(mode, SIZE[::-1]), "JPEG")
    for mode in ("I;16", "1", "LA", "RGBA", "P"):
        yield saved(Image.new(mode, SIZE[::-1]), "PNG")
    frames = [Image.new("RGB", (9, 9), (n, 0, 0)) for n in range(20)]
    yield from (saved(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "GIF", "WEBP", "MPO"))
    scans = saved(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True)
    start = scans.rindex(b"\xff\xda")
    yield scans[:start] + scans[start:-2] * 3000 + b"\xff\xd9"
    for turn in (0, 3, 6, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield saved(Image.new("RGB", SIZE[::-1]), "JPEG", exif=exif)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tensor_words(storage=b"FloatStorage", key=b"0", count=3, offset=0, size=(3,), stride=(1,)):
    """The words of one tensor, as torch.save writes them, with its claims as given."""
    number = lambda n: b"\x8a\x08" + int(n).to_bytes(8, "little", signed=True)
    row = lambda numbers: b"(" + b"".join(map(number, numbers)) + b"t"
    text = lambda t: b"X" + len(t).to_bytes(4, "little") + t
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage") + b"ctorch\n" + storage + b"\n" + text(key) + text(b"cpu") + number(count) + b"tQ"
            + number(offset) + row(size) + row(stride) + b"\x89ccollections\nOrderedDict\n)RtR")


def archives(valid):
    """Checkpoints that claim or call, from the parts of a valid one."""
    parts = unzipped(valid)
    root = parts[0][0].split("/")[0]
    program = next(n for n, (name, _) in enumerate(parts) if name.endswith("data.pkl"))

    def with_program(words, deflate=False, more=()):
        return zipped([*parts[:program], (parts[program][0], words), *parts[program + 1:], *more], deflate)

    word = b"X\x06\0\0\0weight"
    for words in (nested(), nested(200_000, False), b"\x80\x02}(" + b"K\x01" * 2_000_000 + b"u.", pickle.dumps(doubled(tuple), 2), keyed(2),
                  pickle.dumps({"stage": "match", "args": {"lr": doubled(list)}, "classes": doubled(list)}, 2), pickle.dumps(Call(os.mkdir, ("bombed",)), 2),
                  pickle.dumps(Call(bytearray, (10 ** 12,)), 2), pickle.dumps(Call(set, (Call(bytearray, (10 ** 10,)),)), 2), b"\x80\x02ctorch\nTensor\nJ\0\0\1\0J\0\0\1\0\x86R.",
                  pickle.dumps([1, 2], 2), pickle.dumps({"stage": ["x"], "classes": 5, "args": []}, 2), b"", b"\x80\x02.", b"\x80\x02]r\xff\xff\xff\xff.",
                  b"\x80\x02ccollections\nCounter\n}X\1\0\0\0aJ\xff\xff\xff\x7fs\x85R.", b"\x80\x02c_codecs\nencode\nX\xe8\x03\0\0" + b"x" * 1000 + b"X\x08\0\0\0punycode\x86R."):
        yield with_program(words)
    scalar = pickle.dumps({"model": {}, "miou": Call(np.float64(0).__reduce__()[0], (Call(np.dtype, ("O8",), (3, "|", None, None, None, -1, -1, 63)), b"A" * 8))}, 2)
    yield with_program(scalar)
    for claim in (dict(count=10 ** 12), dict(size=(10 ** 12,), stride=(0,)), dict(size=(10 ** 6, 10 ** 6), stride=(0, 0)), dict(size=(10 ** 9, 0), stride=(1, 1)), dict(size=(3,), stride=(10 ** 12,)),
                  dict(offset=10 ** 12), dict(offset=-1), dict(size=(-3,)), dict(storage=b"ComplexFloatStorage"), dict(storage=b"QInt8Storage"), dict(key=b"../../x"), dict(count=30)):
        words = b"\x80\x02}(X\x05\0\0\0model}" + word + tensor_words(**claim) + b"sX\x05\0\0\0stageX\x05\0\0\0matchu."
        yield with_program(words, more=[(f"{root}/data/0", bytes(12))] if f"{root}/data/0" not in dict(parts) else ())
    yield zipped(parts, True)
    yield zipped([*parts, (f"{root}/data/99", bytes(20 << 20))], True)
    yield zipped([*parts, parts[program]])                        # one name twice
    yield zipped([(f"{root}/{name}", b"") for name in ("constants.pkl", "data.pkl", "code/x.py", "version")])
    words = b"\x80\x02}(X\x05\0\0\0model}" + word + tensor_words(size=(10 ** 6, 10 ** 6), stride=(0, 0)) + b"sX\x05\0\0\0stageX\x05\0\0\0matchu."
    for name in ("x/constants.pkl", "CONSTANTS.PKL"):             # looks like TorchScript, which torch does not take it for
        yield with_program(words, more=[(f"{root}/data/0", bytes(12))] * (f"{root}/data/0" not in dict(parts)) + [(f"{root}/{name}", b"")])
        yield zipped([*parts, (f"{root}/{name}", b"")])


def checkpoints(valid):
    """... and broken values in valid ones."""
    yield from archives(valid)
    for change in (lambda v: v * float("nan"), lambda v: v.to(torch.complex64), lambda v: v.to_sparse(), lambda v: v.flatten(), lambda v: v[:0], lambda v: v.double(), lambda v: v.to("meta"),
                   lambda v: v[:1].expand(10 ** 7, *v.shape[1:]), lambda v: v.to(torch.int8), lambda v: 5, lambda v: None, lambda v: torch.cat([v] * 3), lambda v: v[None],
                   lambda v: torch.zeros(1).expand(40_000, *v.shape[1:])):
        for every in (True, False):
            content = torch.load(io.BytesIO(valid), weights_only=True)
            state = content["model"] if isinstance(content.get("model"), dict) else content
            names = [name for name, value in state.items() if torch.is_tensor(value) and value.is_floating_point() and value.dim()]
            for name in names if every else names[-1:]:
                state[name] = change(state[name])
            yield packed(content)
    for name, value in (("classes", [1, 2, 3]), ("classes", "abc"), ("classes", ["x" * 10 ** 6] * 3), ("args", None), ("args", {"model": ["x"], "pool": {}, "crop": 10 ** 12}), ("args", {}), ("stage", 5),
                        ("stage", "seg\nx"), ("model", None), ("model", {}), ("model", {5: 5}), ("epoch", "x"), ("rng", []), ("rng", [{"python": (3, [], None), "numpy": ["MT19937", torch.zeros(624), 10 ** 6, 0, 0.0]}]),
                        ("optimizer", {}), ("optimizer", {"state": {}, "param_groups": [{}]}), ("W", torch.zeros(2)), ("backgrounds", {}), ("clip", ["x"]), ("tau_i", "x"), ("config", {"x": 10 ** 9})):
        content = torch.load(io.BytesIO(valid), weights_only=True)
        if name in content:
            yield packed({**content, name: value})
            yield packed({key: part for key, part in content.items() if key != name})
    for content in (torch.load(io.BytesIO(valid), weights_only=True),):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=False)
        yield file.getvalue()
        yield file.getvalue()[:len(file.getvalue()) // 2]


def packed(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def texts():
    yield from (b"", b"\n", b"\xef\xbb\xbf", b"\xff\xfe" + "train\n".encode("utf-16-le"), "train\nboat\ncow\n".encode("utf-16"), "a_1 train\n".encode("utf-16-le"), "caf\u00e9\n".encode("latin-1"), b"\0" * 100, b"a\0b\n",
                b"train\r\nboat\r\ncow\r\n", b"../x\n", b"/etc/passwd\n", b"..\n", b"a_1/../../x train\n", b"JPEGImages/../../x.jpg\n", b"~/x\n", b"\\\\host\\x\n", b"x" * (20 << 20), b"a " * (10 << 20), b"a_1\n" * (1 << 19),
                b"\n" * (6 << 20), b"a_1\na_1\n", b"a_1 train train\n", b"a_1 boat 0 1 99999999999999999999\n", b"a_1\t<script>alert(1)</script>\n", b"{}\n{0.__class__}\n{", b"<script>\n%s%n\n", b"x" * 5000 + b"\n", b"a\x1b[2Jb\n",
                "\u202egpj\n".encode(), "a\u2028b\n".encode(), "\ud800".encode(errors="surrogatepass"), b"".join(b"c%d\n" % n for n in range(300)), b"".join(b"%d\n" % n for n in range(200_000)) + b"5\n",
                "\u0661\n".encode(), "a_1 \u00b2\n".encode(), b"background\n", b"con\nnul\n", b"a_1 " + b"9" * 5000 + b"\n")


def xmls():
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    for text in (f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "lol">{laughs}]><annotation><object><name>&l11;</name></object></annotation>',
                 '<!DOCTYPE x [<!ENTITY e SYSTEM "../outside/canary">]><annotation><object><name>&e;</name></object></annotation>',
                 '<!DOCTYPE x SYSTEM "http://localhost:9/x.dtd"><annotation/>', '<!DOCTYPE x [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><annotation/>',
                 "<a>" * 300_000, "<a>" * 300_000 + "</a>" * 300_000, "<annotation>" + "<object><name>cow</name></object>" * 30_000 + "</annotation>", "<annotation><object/></annotation>", "<annotation/>", "",
                 "<annotation><object><name>" + "x" * 1_000_000 + "</name></object></annotation>", "<annotation><object><name>a\nb</name></object></annotation>", '<?xml version="1.0" encoding="utf-7"?><annotation/>',
                 '<?xml version="1.0" encoding="nonsense"?><annotation/>', '<annotation xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="/etc/passwd"/></annotation>', "<annotation " + 'a="b" ' * 10_000 + "/>",
                 "<a " + " ".join(f'a{n}="x"' for n in range(100_000)) + "/>"):
        yield text.encode()
    yield '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x [<!ENTITY a "b">]><annotation>&a;</annotation>'.encode("utf-16")
    yield '<?xml version="1.0" encoding="iso-8859-1"?><annotation><object><name>caf\u00e9</name></object></annotation>'.encode("latin-1")


def jsons():
    yield from (b"", b"[]", b"5", b"null", b"[" * 1_000_000, b'{"a":' * 500_000, b'{"args": []}', b'{"args": {"lr": ' + b"[" * 100_000 + b"}}", b'{"args": {"lr": ' + b"9" * 10_000 + b"}}", b'{"step": NaN}', b"\xff\xfe\0",
                b'{"args": {}, "versions": {}}\n{"step": "x"}\n{"step": 1, "loss": "x"}\n5\n[]\n{"step": 2, "loss": ' + b"9" * 400 + b'}\n{"step": 3', b'{"args": 5, "script": 7}', b'{"script": ["x"], "args": {"cam": {}}}',
                b'{"fingerprint": {"a": 1}, "args": {}}', b'{"a": "' + b"x" * (5 << 20) + b'"}', b'{"categories": {}, "annotations": 5, "images": []}', b'{"categories": [], "annotations": [], "images": [5]}')
    for image, thing in (({"height": 10 ** 9, "width": 10 ** 9}, {}), ({"file_name": "../../x.jpg"}, {}), ({"file_name": ".."}, {}), ({"file_name": "x.sh"}, {}), ({"file_name": 5}, {}), ({"height": -5}, {}), ({"height": "12"}, {}),
                         ({}, {"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}), ({}, {"segmentation": [[0, 0, float("nan"), 0, 5, 5]]}), ({}, {"segmentation": {"size": [10 ** 6, 10 ** 6], "counts": "05"}}), ({}, {"category_id": 12}),
                         ({}, {"segmentation": {"size": list(SIZE), "counts": [5, 10 ** 9]}}), ({}, {"segmentation": {"size": list(SIZE), "counts": [-5, 10]}}), ({}, {"segmentation": {"size": list(SIZE), "counts": "\x7f" * 40}}),
                         ({}, {"segmentation": 5}), ({}, {"segmentation": [["a"] * 6]}), ({}, {"segmentation": [[]]}), ({}, {"image_id": []}), ({}, {"segmentation": {}}), ({}, {"category_id": {}}),
                         *(({}, {"segmentation": {"size": list(SIZE), "counts": counts}}) for counts in ("0123456o", "o", "0" * 50 + "o" * 50))):        # the last goes on
        yield json.dumps(instances(image, thing)).encode()


def instances(image=(), thing=()):
    return {"categories": [{"id": 1, "name": "person"}], "images": [{"id": 1, "file_name": "a_1.jpg", "height": SIZE[0], "width": SIZE[1], **dict(image)}],
            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0, **dict(thing)}]}


def protocol(**changed):
    """A score of eval.py's, with other parts in its protocol."""
    return {"miou": 0.5, "pixel_accuracy": 0.9, "iou": {"background": 0.75, "train": 0.25, "cow": None}, "absent": ["cow"], "missed_pixels": 0,
            "protocol": {"what": "cam", "split": "train", "pictures": 1, "limit": 0, "data": "toy", "pred": None, "oracle": False, "background": "constant", "value": 0.4,
                         "made_by": {"source": "text", "args": {"tau_t": 0.01}}, **changed}}


def scores():
    """What is no score, by one part of another type."""
    odd = (None, 5, -1, 1e308, float("nan"), 10 ** 400, "x", "\ud800", [], ["x"], {}, {"x": "y"}, json.loads("[" * 900 + "]" * 900))
    yield from jsons()
    for value in odd:
        yield from (json.dumps({**protocol(), name: value}).encode() for name in ("miou", "pixel_accuracy", "iou", "protocol", "oracle_best"))
        yield from (json.dumps({**protocol(), **part}).encode() for part in ({"iou": {"train": value}}, {"oracle_best": {"miou": value, "threshold": 0.5}}, {"oracle_best": {"miou": 0.5, "threshold": value}}))
        yield from (json.dumps(protocol(**{name: value})).encode() for name in ("what", "split", "data", "pictures", "value", "background", "made_by", "oracle"))
        yield from (json.dumps(protocol(made_by={"source": "text", **part})).encode() for part in ({"source": value}, {"args": value}, {"args": {"tau_t": value}}))
        made = {"maps": {"source": "refine"}, "pixels": {"background": "constant", "value": 0.4}, "vote": "sams", "segments": {"folder": "x", "source": None}, "without_segments": 1, "background": "constant", "value": 0.4, "crf": None}
        yield from (json.dumps(protocol(what="pseudo", made_by={**made, name: value})).encode() for name in made)
        yield from (json.dumps(protocol(**{"what": "seg", "scales": [1.0], "flip": True, "crf": None, "made_by": {"model": "x"}, **part})).encode() for part in ({"scales": value}, {"crf": value}, {"made_by": {"model": value}}))


def notes():
    yield from jsons()
    for value in (None, 5, "x", "\ud800", [], ["x"], [5], ["a\nb"], CLASSES, {}, {"x": "y"}, 10 ** 400, json.loads("[" * 900 + "]" * 900)):
        yield from (json.dumps(part).encode() for part in ({"classes": value}, {"args": value}, *({"args": {"pseudo": "x", "source": "text", name: value}} for name in ("source", "clip", "pseudo", "x"))))


def mats():
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
    cell = struct.pack("<IIIIIIiiII", 6, 8, 1, 0, 5, 8, 1, 1, 1, 0)
    for depth in (5, 5_000, 80_000):
        content, size = b"", 0
        for _ in range(depth):
            size += 48
        content = b"".join(struct.pack("<II", 14, size - 48 * n - 8) + cell for n in range(depth))
        for body in (content, struct.pack("<II", 15, len(zlib.compress(content))) + zlib.compress(content)):
            yield head + body
    bomb = zlib.compress(struct.pack("<II", 14, 1 << 30) + bytes(64 << 20))
    yield from (head + struct.pack("<II", 15, len(bomb)) + bomb, b"", head, head[:126] + b"MI" + bytes(100), b"\x89HDF\r\n\x1a\n" + bytes(1000), head + struct.pack("<II", 15, 10 ** 9) + b"x")


# ---------------------------------------------------------------- valid files, changed

def mutated(content, rng, others=()):
    """A few changes of bytes."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        n = max(1, len(content))
        place, length = int(rng.integers(n)), int(rng.integers(1, 1 + min(n, 64)))
        match int(rng.integers(9)):
            case 0:
                content[place:place + 1] = bytes([content[place] ^ 1 << int(rng.integers(8))]) if content else b"\0"
            case 1:
                content[place:place + length] = rng.bytes(length)
            case 2:
                del content[place:]
            case 3:
                del content[place:place + length]
            case 4:
                content[place:place] = content[place:place + length] * int(rng.integers(1, 50))
            case 5:
                content[place:place + 4] = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x40", b"\x80\0\0\0"][int(rng.integers(5))]
            case 6:
                content[place:place + 8] = (1 << int(rng.integers(63))).to_bytes(8, ["little", "big"][int(rng.integers(2))])
            case 7 if others:
                other = others[int(rng.integers(len(others)))]
                content[place:] = other[min(place, len(other)):]
            case _:
                content[place:place] = bytes([int(rng.integers(256))]) * length
    return bytes(content)


def changed(content, rng, others):
    """... inside an archive or a PNG as well, with right checksums."""
    if content[:4] == b"PK\3\4" and rng.random() < 0.7:
        parts = unzipped(content)
        chosen = next((n for n, (name, _) in enumerate(parts) if name.endswith("data.pkl")), 0) if rng.random() < 0.6 else int(rng.integers(len(parts)))
        parts[chosen] = parts[chosen][0], mutated(parts[chosen][1], rng)
        return zipped(parts, rng.random() < 0.2)
    if content[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.7:
        chunks, at = [], 8
        while at < len(content):
            length, = struct.unpack_from(">I", content, at)
            chunks.append((content[at + 4:at + 8], content[at + 8:at + 8 + length]))
            at += 12 + length
        n = int(rng.integers(len(chunks)))
        chunks[n] = chunks[n][0], zlib.compress(mutated(zlib.decompress(chunks[n][1]), rng)) if chunks[n][0] == b"IDAT" and rng.random() < 0.5 else mutated(chunks[n][1], rng)
        return content[:8] + b"".join(chunk(*c) for c in chunks)
    return mutated(content, rng, others)


def valid_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return [saved(Image.fromarray(noise), "JPEG"), saved(Image.fromarray(noise), "PNG"), saved(Image.fromarray(noise), "JPEG", progressive=True), saved(Image.fromarray(noise).quantize(9), "PNG"),
            saved(Image.fromarray(noise), "WEBP"), saved(Image.fromarray(noise).quantize(9), "GIF"), saved(Image.fromarray(noise), "BMP"), saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 200), "PNG")]


def valid_masks():
    mask = np.random.default_rng(0).choice([0, 1, 3, 255], SIZE).astype(np.uint8)
    return [saved(masks.paint(mask), "PNG"), saved(Image.fromarray(mask), "PNG"), saved(masks.paint(mask).convert("RGB"), "PNG"), saved(Image.fromarray(mask.astype(np.uint16)), "PNG")]


def valid_maps():
    maps = np.random.default_rng(0).random((2, *SIZE)).astype(np.float16)
    return [np_bytes(maps), np_bytes(np.asfortranarray(maps.astype(np.float64))), np_bytes({"keys": torch.tensor([0, 2]), "cam": torch.tensor(maps), "high_res": maps}, allow_pickle=True),
            np_bytes({0: maps[0].astype(np.float32), 2: maps[1].astype(np.float32)}, allow_pickle=True), np_bytes({"keys": np.array([0, 2]), "attn_highres": maps}, allow_pickle=True)]


def valid_segments():
    file = io.BytesIO()
    segments.save_segments(file, SIZE, segments.label_segments(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) // 50))
    return file.getvalue()


def valid_npz():
    file = io.BytesIO()
    np.savez_compressed(file, fg_cls=np.array([0, 2]), cam=np.random.default_rng(0).random((2, *SIZE)).astype(np.float32))
    return file.getvalue()


def network(kind):
    torch.manual_seed(0)
    args = {"model": "segmenter_toy", "crop": 96, "pool": "max", "lr": 0.1, "clip": "x"}
    if kind == "generator":
        return packed({"stage": "match", "model": generator.build_generator("deit_tiny", 3).state_dict(), "classes": CLASSES, "args": args})
    if kind == "segmenter":
        return packed({"stage": "seg", "model": segmenter.build_segmenter("segmenter_toy", 3).state_dict(), "classes": CLASSES, "args": args, "config": None})
    if kind == "clip":
        model = clip_model.openai_clip.model.CLIP(16, 16, 1, 64, 8, 77, 99, 64, 1, 1)
        return packed(model.state_dict())
    if kind == "prototypes":
        return packed({"stage": "prototypes", "model": {"prototypes": torch.rand(5, 8), "text": torch.rand(5, 8)}, "classes": CLASSES, "backgrounds": ["sky", "sea"], "clip": "f", "tau_i": 0.03, "args": args})
    if kind == "cache":
        return packed([torch.rand(7, 8).half(), torch.rand(6, 6).half(), [2, 3]])
    model, optimizer, schedule, scaler = parts_of_a_run()
    model(torch.rand(2, 3)).sum().backward(), optimizer.step()
    rng = {"python": __import__("random").getstate(), "numpy": stored.numpy_state(), "torch": torch.get_rng_state(), "cuda": None}
    return packed({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "scaler": scaler.state_dict(), "rng": [rng], "epoch": 1, "step": 2, "args": args})


def parts_of_a_run():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, 10), torch.amp.GradScaler("cpu", enabled=False)


# ---------------------------------------------------------------- readers

def finite(tensors):
    return all(bool(torch.as_tensor(t).isfinite().all()) for t in tensors)


def read_folder(path):
    """A folder of one picture with this file in it, read as a stage does."""
    root = path.parent
    (root / "JPEGImages").mkdir(exist_ok=True), (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    if path.name != "classes.txt":
        (root / "classes.txt").write_text("\n".join(CLASSES))
    if path.name == "train.txt":
        path.replace(root / "ImageSets" / "Segmentation" / "train.txt")
    folder = folders.Folder(root)
    names = folder.classes + (folder.backgrounds or []) + texts.class_texts(folder.classes)
    ids = folder.ids("train") if path.name == "train.txt" else []
    labels = folder.labels(["a_1"]) if path.name == "labels.txt" else None
    return (all(name and len(name) < 200 and folders.printable(name) for name in names) and all((root / "x" / id).resolve().parent == (root / "x").resolve() for id in ids)
            and (labels is None or labels.shape == (1, 3)))


def read_picture(path):
    image = image_files.load_image(path)
    return image.mode == "RGB" and image.size[::-1] == image_files.image_size(path)


def read_mask(path):
    mask = masks.load_mask(path, 3)
    return mask.dtype == np.uint8 and mask.ndim == 2 and set(np.unique(mask)) <= {0, 1, 2, 3, 255}


def read_map(path):
    classes, maps = map_files.load_cam(path, [1, 0, 1], SIZE)
    return classes.tolist() == [0, 2] and maps.dtype == np.float32 and len(maps) == 2 and np.isfinite(maps).all()


def read_segments(path):
    return all(s.mask.any() and 0 <= s.level <= 2 for s in segments.load_segments(path, SIZE))


def read_generator(path):
    S = generator.load_generator(stored.sound(path), None, CLASSES).eval()
    with torch.no_grad():
        return S.maps(torch.rand(1, 3, 24, 24)).shape[:2] == (1, 3) and finite(S.state_dict().values())


def read_segmenter(path):
    content = stored.load(path, "seg", CLASSES)
    if content["args"]["model"] == "clip_decoder":
        return True
    return finite(segmenter.load_segmenter(path).state_dict().values())


def read_clip(path):
    stored.inputs(clip=path)
    clip = clip_model.load_clip(path)
    with torch.no_grad():
        return finite(clip.model.state_dict().values()) and clip.size <= 1 << 16


def read_prototypes(path):
    clip, folder = Namespace(fingerprint=lambda: "f"), Namespace(classes=CLASSES, backgrounds=["sky", "sea"])
    return finite([stored.load_prototypes(Namespace(out=path.parent), folder, clip)["model"]["prototypes"]])


def read_state(path):
    before = torch.get_rng_state()
    model, *parts = parts_of_a_run()
    args = Namespace(resume=True, model="segmenter_toy", crop=96, pool="max", lr=0.1, clip="x")
    epoch, step = stored.load_state(path, model, *parts, args)
    torch.set_rng_state(before)
    np.random.rand(700)
    return epoch >= 0 and step >= 0 and finite(model.state_dict().values())


def read_cache(path):
    x, attention, grid = gradcam.stored_inputs(path.parent, ["a_1"], lambda: files.regular(path), stored.sound)
    return finite([x, attention]) and x.shape[1] == 1 + grid[0] * grid[1]


def read_features(path):
    folder = path.parent / "features"
    folder.mkdir(exist_ok=True)
    path.replace(folder / path.name)
    args = Namespace(out=path.parent, target="soft", label_mask=True, tau_t=0.01)
    env = Namespace(shard=list)
    x, p, pixels = vpl.read_features(torch.nn.functional.normalize(torch.rand(5, 8), dim=1), ["a_1"], torch.tensor([[1., 0, 1]]), args, env)
    return finite([x, p]) and len(pixels) == 4 and pixels.sum() == len(x)


def read_recipe(path):
    stored.inputs(cam=path.parent)
    args = Namespace(out=path.parent.parent, resume=True, lr=0.1)
    sys.argv[0] = "make_cam.py"
    stored.open_folder(path.parent, args, Namespace(main=False, barrier=lambda: None), ())
    return True


def read_log(path):
    env, logs.versions = Namespace(main=True, world=1), dict    # which would ask git
    log = report.Log(path, "match")
    log.curves()
    logs.Log(path, Namespace(lr=1), env, step=5)
    return True


def read_report(path):
    """A folder of results with this file in it: what the page says of it, pictures aside."""
    out = path.parent.parent if path.name == "recipe.json" else path.parent
    logs.versions = dict                                        # which would ask git
    args, run = Namespace(data="data", out=out, split="train"), report.Run("", out, Namespace(classes=CLASSES, root=path.parent))
    parts = [report.scores(args, Namespace(classes=CLASSES), [run]), report.curves(args, [run]), report.arguments([run])]
    return all(part.encode(errors="xmlcharrefreplace") for part in parts) and report.lacking([run]) is not None


def read_instances(path):
    images, _ = prepare_data.read_instances(path)
    for name, shape, things in images:
        folders.check_id(Path(name).stem, path)
        for label, segmentation, _ in things:
            prepare_data.write_coco((Path("x") / name, path.parent / "link.jpg", path.parent / "mask.png", shape, [(1, segmentation)], False))
    return True


def read_sbd(path):
    return prepare_data.read_sbd(path).ndim == 2


def mat():
    import scipy.io
    file = io.BytesIO()
    scipy.io.savemat(file, {"GTcls": {"Segmentation": np.ones(SIZE, np.uint8), "Boundaries": np.zeros((3, 1), object)}}, do_compression=True)
    return file.getvalue()


def readers():
    """{name: (file name, reader, valid files, files that hurt)}; all are made when asked for."""
    labels = lambda: np_bytes({"a_1": np.array([1, 0, 1], np.float32), np.int32(2007000032): np.zeros(3)}, allow_pickle=True)
    annotation = b"<annotation><object><name>cow</name><difficult>1</difficult></object><object><name>boat</name></object></annotation>"
    fma = lambda: pickle.dumps([{"segmentation": np.eye(*SIZE) > 0, "level": 1}, {"segmentation": {"size": list(SIZE), "counts": [50, SIZE[0] * SIZE[1] - 50]}}])
    log = b'{"args": {"lr": 1}, "versions": {"torch": "2"}}\n{"step": 1, "seconds": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n'
    note = json.dumps({"script": "make_cam.py", "args": {"lr": 0.1}, "fingerprint": "f"}).encode()
    features = lambda: np_bytes(np.concatenate([np.eye(3, 8), [[0], [2], [3]]], 1).astype(np.float16))
    label = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) // 20
    networks = {kind: (name, reader) for kind, name, reader in (
        ("generator", "a_1.pt", read_generator), ("segmenter", "seg.pt", read_segmenter), ("clip", "a_1.pt", read_clip), ("prototypes", "prototypes.pt", read_prototypes),
        ("state", "match.last.pt", read_state), ("cache", "a_1.pt", read_cache))}
    return {
        "classes": ("classes.txt", read_folder, lambda: [b"train\nboat\ntraffic light\n"], texts),
        "backgrounds": ("backgrounds.txt", read_folder, lambda: [b"sky\nrailway track\n"], texts),
        "labels": ("labels.txt", read_folder, lambda: [b"a_1 train cow\na_2\n", b"a_1\tboat\r\n", b"\xef\xbb\xbfa_1 0 2\n"], texts),
        "list": ("train.txt", read_folder, lambda: [b"a_1\na_2\n", b"/JPEGImages/a_1.jpg /SegmentationClassAug/a_1.png\n"], texts),
        "annotation": ("a_1.xml", lambda path: set(folders.read_xml(path, CLASSES)) <= {0, 1, 2}, lambda: [annotation], xmls),
        "cls_labels": ("cls_labels.npy", lambda path: all(set(v) <= {0, 1, 2} for v in folders.read_cls_labels(path, CLASSES).values()), lambda: [labels()],
                       lambda: [*map(objects, pickles()), *headers()]),
        "picture": ("a_1.jpg", read_picture, valid_pictures, pictures),
        "mask": ("a_1.png", read_mask, valid_masks, pictures),
        "map": ("a_1.npy", read_map, valid_maps, lambda: [*map(objects, pickles()), *headers()]),
        "map, npz": ("a_1.npz", read_map, lambda: [valid_npz()], lambda: [*npz_bombs(["fg_cls", "cam"]), *(zipped([("fg_cls.npy", np_bytes(np.array([0, 2]))), ("cam.npy", h)]) for h in headers())]),
        "segments, npz": ("a_1.npz", read_segments, lambda: [valid_segments()], lambda: [
            *npz_bombs(["bits", "boxes", "size", "level", "score", "stability"]), *(zipped([(name, h if name[:-4] == part else c) for name, c in unzipped(valid_segments())]) for h in headers() for part in ("size", "bits", "boxes"))]),
        "segments, pkl": ("a_1.pkl", read_segments, lambda: [fma()], pickles),
        "segments, png": ("a_1.png", read_segments, lambda: [saved(Image.fromarray(label), "PNG")], pictures),
        **{kind: (name, reader, lambda kind=kind: [network(kind)], lambda kind=kind: archives(network(kind)) if kind == "cache" else checkpoints(network(kind))) for kind, (name, reader) in networks.items()},
        "features": ("a_1.npy", read_features, lambda: [features()], lambda: [*headers(), *map(objects, pickles()), np_bytes(np.full((3, 9), np.nan, np.float16)), np_bytes(np.full((3, 9), 99, np.float16))]),
        "recipe": ("recipe.json", read_recipe, lambda: [note], jsons),
        "log": ("match.jsonl", read_log, lambda: [log], jsons),
        "report, log": ("match.jsonl", read_report, lambda: [log], jsons),
        "report, recipe": ("recipe.json", read_report, lambda: [json.dumps({"args": {"source": "text", "clip": "x"}, "classes": CLASSES}).encode(), note], notes),
        "report, score": ("eval_cam_train.json", read_report, lambda: [json.dumps(protocol()).encode()], scores),
        "instances": ("instances.json", read_instances, lambda: [json.dumps(instances()).encode()], jsons),
        "SBD": ("a_1.mat", read_sbd, lambda: [mat()], mats),
    }


@functools.cache
def listed(hurting):
    """One list for the readers that meet the same files."""
    return list(hurting())


class Cases:
    """Case `number` of a reader: 0 a valid file, 1 to 4 no file at all, then those that hurt, then changed ones."""

    def __init__(self, name, seed):
        self.file, self.reader, valid, hurting = readers()[name]
        self.valid, self.hurting, self.seed = valid(), hurting, seed

    def built(self):
        return listed(self.hurting)

    def write(self, number, folder):
        path = folder / self.file
        if number == 1:
            os.mkfifo(path)
        elif number == 2:
            path.mkdir()
        elif number == 3:
            path.symlink_to("/dev/zero")
        elif number == 4:
            path.symlink_to(path)
        else:
            path.write_bytes(self.content(number))
        return path

    def content(self, number):
        if number == 0:
            return self.valid[0]
        if number - 5 < len(self.built()):
            return self.built()[number - 5]
        rng = np.random.default_rng([self.seed, number])
        return changed(self.valid[number % len(self.valid)], rng, self.valid)


# ---------------------------------------------------------------- one process of cases

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HANDS_OFF = ("os.system", "os.exec", "os.fork", "os.spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "os.kill", "pty.spawn", "webbrowser.open", "urllib.Request")
PLACES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")


class Watch:
    """Sees what a case does to the world: writes outside its folder, reads of the canary, processes, connections."""

    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.folder is None:
            return
        where = os.path.abspath(os.fsdecode(args[0])) if args and isinstance(args[0], (str, bytes, os.PathLike)) else ""
        inside = where.startswith(str(self.folder))
        if event in HANDS_OFF or event in PLACES and not inside:
            self.seen.append(f"{event} {where}")
        if event == "open" and where and ("canary" in where or not inside and isinstance(args[2], int) and args[2] & WRITES):
            self.seen.append(f"open {where}")


def peak():
    """Bytes of memory this process held at most, since the last `peak`."""
    text = Path("/proc/self/status").read_text()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:                                               # then it is the peak since the start
        pass
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


def verdict(reader, path, watch):
    """-> (verdict, what was said, seconds of the processor, bytes that memory grew by)."""
    peak()
    begin, before = time.process_time(), int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    watch.folder, watch.seen = path.parent, []
    try:
        found, said = ("accepted", "") if reader(path) else ("wrong error", "a value that passes no check")
    except (ValueError, OSError) as error:
        said = guard.one_line(error)
        ours = guard.ours(error)
        found = "refused" if "\n" not in str(said) and len(said) < 1000 and any(word in said for word in (path.name, "a_1", str(path.parent))) and ours else "wrong error"
        said = said if found == "refused" else "".join(traceback.format_exception(error))[-1500:]
    except BaseException as error:                                # whatever a bug raises
        found, said = "wrong error", "".join(traceback.format_exception(error))[-1500:]
    watch.folder, seconds = None, time.process_time() - begin
    grown = peak() - before
    if watch.seen:
        found, said = "escaped", "; ".join(watch.seen)
    elif seconds > SECONDS or grown > MEMORY:
        found, said = "hung" if seconds > SECONDS else "memory", f"{seconds:.1f} s, {grown >> 20} MB; {said}"
    return found, said, seconds, grown


def end_with_parent():
    """The system kills this process when its parent is gone, whatever a case is doing."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)    # PR_SET_PDEATHSIG; of Linux, as /proc is


def serve(jobs, seed, folder):
    """Cases in this process: [(reader, first, last)] -> a line of JSON as each begins, and one as it ends."""
    end_with_parent()                                             # gone before this: the first line meets a closed pipe
    room = (int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()) + 2 * MEMORY       # torch alone maps gigabytes that it never touches
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    torch.set_num_threads(1)
    watch, out = Watch(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                 # what readers print goes elsewhere
    kept = {}
    for name, first, last in jobs:
        cases = kept[name] = kept.get(name) or Cases(name, seed)
        for number in range(first, last):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                inner = Path(place) / "in"
                inner.mkdir()
                os.chdir(inner)
                path = cases.write(number, inner)
                print(json.dumps([name, number]), file=out, flush=True)
                print(json.dumps([name, number, *verdict(cases.reader, path, watch)]), file=out, flush=True)
                os.chdir(folder)


def judge(jobs, seed, folder):
    """[(reader, first, last)] -> [(reader, number, verdict, text, seconds, bytes)]; a process that dies or stalls is started again after the case that did it."""
    found, canary = [], folder / "outside" / "canary"
    canary.parent.mkdir(exist_ok=True), canary.write_text("nobody reads this")
    while jobs:
        child = subprocess.Popen([sys.executable, __file__, "--serve", json.dumps(jobs), "--seed", str(seed), "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder)}, text=True, start_new_session=True)
        begun, stalled, row = [time.time() + 300], [], None                               # the first may wait for imports
        threading.Thread(target=end_stalled, args=(child, begun, stalled), daemon=True).start()
        for line in child.stdout:
            row, begun[0] = json.loads(line), time.time()
            if len(row) > 2:
                found.append(tuple(row))
        if canary.read_text() != "nobody reads this" or len(list(canary.parent.iterdir())) != 1:
            found.append((*row[:2], "escaped", "the folder outside was changed", 0, 0))
        if child.wait() == 0:
            break
        if row is None:
            raise RuntimeError(f"the process of {jobs[0]} did not start")
        if len(row) == 2:
            found.append((*row, "hung" if stalled else "crashed", f"exit status {child.returncode}", 0, 0))
        place = next(n for n, (name, first, last) in enumerate(jobs) if name == row[0] and first <= row[1] < last)
        jobs = [job for job in ((row[0], row[1] + 1, jobs[place][2]), *jobs[place + 1:]) if job[1] < job[2]]
    return found


def end_stalled(child, begun, stalled):
    while child.poll() is None:
        if time.time() > begun[0] + 24 * SECONDS:                 # of the clock: others may be at work here; a case's own time is of the processor
            stalled.append(True), os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.2)


def table(found):
    lines = ["| reader | cases | " + " | ".join(VERDICTS) + " | at most, s | at most, MB |", "|" + "---|" * (4 + len(VERDICTS))]
    for name in [*dict.fromkeys(row[0] for row in found), "all"]:
        rows = [row for row in found if name in (row[0], "all")]
        counts = collections.Counter(row[2] for row in rows)
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(str(counts[v]) for v in VERDICTS) + f" | {max(row[4] for row in rows):.1f} | {max(row[5] for row in rows) >> 20} |")
    return "\n".join(lines)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=3600, help="over all readers together; those that are built to hurt come first")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--readers", nargs="+", help="some of them")
    p.add_argument("--only", type=int, help="this case alone")
    p.add_argument("--out", type=Path, help="keep the files of failures here")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    p.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main():
    args = parse()
    if args.serve:
        return serve(args.serve, args.seed, args.out)
    names = args.readers or list(readers())
    shares = [args.cases // len(names) + (n < args.cases % len(names)) for n in range(len(names))]
    jobs = [(name, 0, count) if args.only is None else (name, args.only, args.only + 1) for name, count in zip(names, shares)]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        found = judge(jobs, args.seed, Path(folder))
    for name, number, what, text, *_ in found:
        if what not in ("accepted", "refused") or args.only is not None:
            failures += what not in ("accepted", "refused")
            print(f"{name} {number} (seed {args.seed}): {what}: {text}", flush=True)
            if args.out and (number == 0 or number > 4):
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{name.replace(', ', '_')}_{number}").write_bytes(Cases(name, args.seed).content(number))
    print(table(found))
    if args.write:
        from ablations.pairs import write
        write("bench/fuzz.py", table(found))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
