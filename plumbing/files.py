"""Whole files, JSON, hashes, lists of lines, plain arrays. Everything here raises errors that name the file.

    with files.atomic(path) as beside:          # a file that exists is whole
        beside.write_text("...")
"""
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
    "cls.pt": "train_cls.py", "match.pt": "train_match.py", "prompts.pt": "train_prompt.py",
    "refine.pt": "train_refine.py", "prototypes.pt": "vpl.py", "seg.pt": "train_seg.py",
}


def maker(path):
    """The script that makes a file of the output folder."""
    return MADE_BY.get(Path(path).name, "the stage that makes it")


# ---------------------------------------------------------------- writing

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
        with contextlib.suppress(OSError):                    # the first error is the one to report
            beside.unlink(missing_ok=True)


def save_json(path, content):
    with atomic(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------- hashes

def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path):
    """Says which file or folder made a result; None where there is none (a name to download).

    Of a file, the start of its SHA-256. Of a folder of ours, what its recipe.json says; of another folder,
    the names, sizes and times of its files, since their contents may be many gigabytes."""
    path = Path(path)
    if path.is_file():
        return sha256(path)[:16]
    if (path / "recipe.json").exists():
        return read_json(path / "recipe.json").get("fingerprint")
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("[!.]*")):
        if file.is_file():
            facts = file.stat()
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- reading

def read_json(path):
    """The object in a JSON file of ours."""
    try:
        content = json.loads(regular(path, 1 << 26).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object with names")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON of this project ({first_line(error)}): "
                         "remove it and run its stage again") from None
    return content


def read_lines(path):
    """Lines of a text file; CRLF and a byte order mark are ordinary."""
    try:
        return regular(path, 1 << 28).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def read_header(file):
    """-> (shape, fortran, dtype) of a .npy; `file` is then at its numbers."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def read_npy(path):
    """A plain array, whose file must be as long as its header says."""
    with open(regular(path), "rb") as file:
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds objects")
        if math.prod(shape) * dtype.itemsize != os.fstat(file.fileno()).st_size - file.tell():
            raise ValueError("it is torn")
    return np.load(path, allow_pickle=False)


def regular(path, most=1 << 34):
    """`path`, if it is a file of at most `most` bytes: a pipe or a device would be read forever."""
    path = Path(path)
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is not a file but a folder, a pipe or a device: put the file there")
    if facts.st_size > most:
        raise ValueError(f"{path} has {facts.st_size:,} bytes, at most {most:,} are read: "
                         "is it another file?")
    return path


def first_line(error):
    """The first line of what a library says of a foreign file."""
    line = re.sub(r"[\x00-\x1f\x7f]", " ", str(error).strip().partition("\n")[0])
    return line[:200].strip() or type(error).__name__
