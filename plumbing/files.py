"""Whole files, JSON, hashes, and plain files that are checked before they are read."""
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path

import numpy as np


ROOT = Path(__file__).resolve().parent.parent
MADE_BY = {  # finished weights -> the script to run when they are missing
    "cls.pt": "train_cls.py", "match.pt": "train_match.py", "prompts.pt": "train_prompt.py", "refine.pt": "train_refine.py",
    "prototypes.pt": "vpl.py", "seg.pt": "train_seg.py",
}


@contextlib.contextmanager
def atomic(path):
    """Write beside, then rename: a file that exists is whole."""
    beside = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:                                  # PIL, numpy and torch do not say which file
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):                    # what went wrong before is what is told
            beside.unlink(missing_ok=True)


def save_json(path, content):
    with atomic(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path):
    """The first 16 digits of a file's SHA-256: says which weights made a result."""
    return sha256(path)[:16]


class Found(dict):
    """What a file holds: a name it lacks is the file's fault, not a bug."""

    def __init__(self, path, content):
        super().__init__(content)
        self.path = path

    def __missing__(self, name):
        raise ValueError(f"{self.path} has no {name!r}: remove it and run {MADE_BY.get(Path(self.path).name, 'its stage')} again")


def read_json(path):
    """The object in a JSON file."""
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > 1 << 24:
            raise ValueError("no file, or a large one")
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("args", {}), dict):
            raise ValueError("no object with names")
    except (ValueError, RecursionError) as error:             # RecursionError: nested without end
        raise ValueError(f"{path} is not JSON of ours ({str(error)[:200]}): remove it and run its stage again") from None
    return Found(path, content)


def folder_fingerprint(folder):
    """The same of a folder's files below it, by name, size and time of the last change: their contents may be many gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


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
