"""Broken and hostile foreign files, in every format that is read: does any run code, or end in anything but
a value or one line that names the file?

A case is a valid file whose bytes are changed, inside archives too, or one that is wrong for every reader, as
a pickle that calls. A reader may return a value that passes its check, or refuse in one line of ours that
names the file.

    python -m tests.rigs.fuzz --cases 2000 --seed 7          # 200 cases a reader take minutes

What a file may cost in memory and time is not tested: docs/robustness.md.
"""
import argparse
import collections
import contextlib
import io
import os
import pickle
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP
from PIL import Image

import prepare_data
from plumbing import folders, guard, images, maps, masks, networks, segments
from wsss import generator

CLASSES = ["train", "boat", "cow"]
SIZE = 12, 16                                                    # of the image, its mask, maps and segments
LABEL = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) // 20
RUN = argparse.Namespace(device=torch.device("cpu"), main=True, world=1, in_turn=lambda make: make())

# ---------------------------------------------------------------- valid files

def bytes_of(write, *args, **options):
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def packed(content):
    return bytes_of(lambda file: torch.save(content, file))


def npy(content):
    return bytes_of(np.save, np.array(content, dtype=object if isinstance(content, dict) else None))


def encoded(image, kind, **options):
    return bytes_of(image.save, kind, **options)


def some_images():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    return [encoded(noise, "JPEG", progressive=True), encoded(noise.quantize(9), "PNG"),
            encoded(noise, "WEBP"), encoded(noise.convert("RGBA"), "PNG")]


def some_masks():
    painted = masks.paint(np.random.default_rng(0).choice([0, 1, 3, 255], SIZE))
    return [encoded(painted, "PNG"), encoded(painted.convert("RGB"), "PNG")]


def some_maps():
    found = np.random.default_rng(0).random((2, *SIZE)).astype(np.float16)
    irn = {"keys": torch.tensor([0, 2]), "cam": torch.tensor(found), "high_res": found}
    return [npy(found), npy(irn), npy({0: found[0], 2: found[1]})]


def published_generator():
    """As other projects publish theirs: their arguments, and numpy's numbers, beside the weights."""
    state = generator.DeiT(3, **networks.TINY).state_dict()
    more = {"args": argparse.Namespace(lr=0.1), "miou": np.float64(0.5), "epoch": 3}
    return packed({"model": {f"module.{name}": value for name, value in state.items()}, **more})


def clip_weights():
    return packed(CLIP(16, 16, 1, 64, 8, 77, 99, 64, 1, 1).state_dict())


def sbd():
    import scipy.io
    content = {"Segmentation": np.ones(SIZE, np.uint8), "Boundaries": np.zeros((3, 1), object)}
    return bytes_of(scipy.io.savemat, {"GTcls": content}, do_compression=True)


# ---------------------------------------------------------------- readers: a value -> does it pass its check?

def in_folder(path):
    """A data folder around a file of it."""
    root = path.parent
    (root / "JPEGImages").mkdir(exist_ok=True)
    if path.name != "classes.txt":
        (root / "classes.txt").write_text("\n".join(CLASSES))
    if path.name == "train.txt":
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        path.rename(root / "ImageSets/Segmentation/train.txt")
    return folders.Folder(root)


def read_classes(path):
    names = in_folder(path).classes
    return len(set(names)) == len(names) > 0 and all(folders.printable(name) for name in names)


def read_list(path):
    ids = in_folder(path).ids("train")
    return all((Path("/x") / id).resolve().parent == Path("/x") for id in ids)


def read_map(path):
    classes, found = maps.load_cam(path, [1, 0, 1], SIZE)
    return classes.tolist() == [0, 2] and len(found) == 2 and np.isfinite(found).all()


def read_generator(path):
    S = networks.load_generator(path, RUN, CLASSES).eval()
    return S.maps(torch.rand(1, 3, 24, 24)).shape[:2] == (1, 3)


def read_clip(path):
    state = networks.load_clip(path, RUN).model.state_dict()
    return all(value.isfinite().all() for value in state.values())


def read_segments(path):
    return all(segment.mask.any() for segment in segments.load_segments(path, SIZE))


READERS = {  # name -> the file's name, its reader, valid contents
    "classes": ("classes.txt", read_classes, lambda: [b"train\nboat\ntraffic light\n", b"cow\r\n"]),
    "list": ("train.txt", read_list, lambda: [b"a_1\na_2\n", b"/JPEGImages/a_1.jpg /masks/a_1.png"]),
    "labels": ("labels.txt", lambda path: in_folder(path).labels(["a_1"]).shape == (1, 3),
               lambda: [b"a_1 train cow\na_2\n", b"a_1\tboat\r\n", b"a_1 0 2\n"]),
    "annotation": ("a_1.xml", lambda path: set(folders.read_xml(path, CLASSES)) <= {0, 1, 2},
                   lambda: [b"<annotation><object><name>cow</name></object></annotation>"]),
    "cls_labels": ("cls_labels.npy", lambda path: folders.read_cls_labels(path, CLASSES) is not None,
                   lambda: [npy({"a_1": np.array([1, 0, 1], np.float32)})]),
    "image": ("a_1.jpg", lambda path: images.load_image(path).size[::-1] == images.image_size(path),
              some_images),
    "mask": ("a_1.png", lambda path: np.isin(masks.load_mask(path, 3), [0, 1, 2, 3, 255]).all(), some_masks),
    "map": ("a_1.npy", read_map, some_maps),
    "segments, png": ("a_1.png", read_segments, lambda: [encoded(Image.fromarray(LABEL), "PNG")]),
    "segments, pkl": ("a_1.pkl", read_segments,
                      lambda: [pickle.dumps([{"segmentation": np.eye(*SIZE) > 0}], 2)]),
    "generator": ("a_1.pth", read_generator, lambda: [published_generator()]),
    "CLIP": ("a_1.pt", read_clip, lambda: [clip_weights()]),
    "SBD": ("a_1.mat", lambda path: prepare_data.read_sbd(path).ndim == 2, lambda: [sbd()]),
}


# ---------------------------------------------------------------- what is done to them

class Call:
    """Pickled, it makes a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def hostile(valid):
    """Contents that are wrong for every reader."""
    yield from (pickle.dumps(Call(), 2), packed({"model": Call()}), npy({"a_1": Call()}), b"", b"\0" * 100)
    yield from ("caf\u00e9\n".encode("utf-16"), b"../x\n", valid[:len(valid) // 2], valid + valid)


def mutated(content, rng):
    """A few changes of bytes; mostly of a part, with a right checksum, where it is an archive."""
    if content[:4] == b"PK\3\4" and rng.random() > 0.3:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                new.writestr(name, mutated(old.read(name), rng) if name == chosen else old.read(name))
        return file.getvalue()
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place, length = rng.integers(len(content) + 1), rng.integers(1, 65)
        big = (1 << int(rng.integers(63))).to_bytes(8, ["little", "big"][rng.integers(2)])
        part = content[place:place + length]
        kinds = rng.bytes(length), b"", part * 3, big + part[8:], part[::-1]
        content[place:place + length] = kinds[rng.integers(len(kinds))]
    return bytes(content)


def cases(name, count, seed):
    """(number, content): valid ones, hostile ones, changed ones."""
    valid = READERS[name][2]()
    fixed = [*valid, *hostile(valid[0])]
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        yield number, fixed[number] if number < len(fixed) else mutated(valid[number % len(valid)], rng)


def verdict(name, content, read=None):
    """-> "accepted", "refused" or "wrong", and what was said."""
    before, read = os.getcwd(), read or READERS[name][1]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        path = Path(place) / READERS[name][0]
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                found, said = ("accepted", "") if read(path) else ("wrong", "its check failed")
        except Exception as error:
            line = guard.one_line(error)
            named = any(word in line for word in (path.name, "a_1", place)) and "\n" not in str(error)
            fine = isinstance(error, (ValueError, OSError)) and named and guard.is_refusal(error)
            found, said = ("refused", line) if fine else ("wrong", traceback.format_exc()[-1500:])
        finally:
            os.chdir(before)
        return ("wrong", "it ran code") if (Path(place) / "bombed").exists() else (found, said)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=200, help="of each reader")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    wrong = 0
    for name in READERS:
        counts = collections.Counter()
        for number, content in cases(name, args.cases, args.seed):
            kind, said = verdict(name, content)
            counts[kind] += 1
            if kind == "wrong":
                print(f"{name} {number}, seed {args.seed}: {said}", file=sys.stderr)
        print(name, dict(counts), flush=True)
        wrong += counts["wrong"]
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
