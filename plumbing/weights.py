"""The reader of files of weights that may be others': no code in them is run, and what comes out is a clean
state dict, from which a network is made (plumbing/networks.py).

    content = weights.read("weaktr.pth")
    state, notes = weights.state_of(content, "weaktr.pth")    # notes: what was taken off or left out
    state = weights.download("resnet101-63fe2227.pth")        # ImageNet weights, once, SHA-256 checked
"""
import argparse
import os
import re
from pathlib import Path

import torch

from plumbing import files

PUBLISHED = {  # name -> where it is, its SHA-256
    "deit_small_patch16_224-cd65a155.pth": (
        "https://dl.fbaipublicfiles.com/deit/",
        "cd65a15597004d0ce19d7a9daef969903972db5b398e3a5febcd3c4df1d8f59f"),
    "resnet50-0676ba61.pth": (
        "https://download.pytorch.org/models/",
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"),
    "resnet101-63fe2227.pth": (
        "https://download.pytorch.org/models/",
        "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a"),
}


class LeftOut:
    """Stands for numpy's numbers beside the weights: unpickling the real numpy.dtype could treat file bytes
    as pointers."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


# Public trainers keep their arguments, a Namespace, and their mIoU, a number of numpy's, beside the weights.
ALLOWED = [argparse.Namespace, *((LeftOut, name) for name in (
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"))]


def read(path):
    """What a file of weights holds. weights_only: nothing in it is run."""
    path = Path(path)
    if not path.exists():
        why = f"run {files.maker(path)} first" if path.name in files.MADE_BY else "no such file of weights"
        raise FileNotFoundError(f"{path} is missing: {why}")
    check_name(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with transformers

            return load_file(files.regular(path))
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(files.regular(path), map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    except Exception as error:                                # zip, pickle and torch each raise their own
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is torn, or torch did not write it"
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({reason}): "
                         "take another file, or download it again") from None


def check_name(path):
    """A file under the name of a published one, of which the name gives eight digits, must be that file."""
    digits = re.fullmatch(r"(?:deit_small_patch16_224|resnet\d+)-([0-9a-f]{8})\.pth", path.name)
    if digits is None:
        return
    expected = PUBLISHED[path.name][1] if path.name in PUBLISHED else digits[1]
    if not files.sha256(path).startswith(expected):
        raise ValueError(f"{path}: its SHA-256 is not the one that begins with {digits[1]}, as published: "
                         "download it again")


def state_of(content, path):
    """-> the state dict of a checkpoint, and notes of what was taken off: {"model": ...} or {"state_dict":
    ...} around it, the prefix module. of DataParallel before every name."""
    around = content if isinstance(content, dict) else {}
    wrapper = next((name for name in ("model", "state_dict") if isinstance(around.get(name), dict)), None)
    state = content[wrapper] if wrapper else around
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict, neither at the top nor under 'model' or 'state_dict'")
    notes = [f"{wrapper!r} around it"] if wrapper else []
    if wrapper and len(content) > 1:
        notes.append(f"{', '.join(str(name) for name in content if name != wrapper)} beside it")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        notes.append("module. before every name")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training broke down or the file is "
                             "damaged; take another one")
    return dict(state), notes


def fit(path, load, state):
    """load(state), which is strict: the first name or shape that does not fit is named."""
    try:
        return load(state)
    except KeyError as error:
        raise ValueError(f"{path} does not fit this network: it has no {error.args[0]}") from None
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not fit this network: {' '.join(str(error).split())[:400]}") from None


def announce(path, what, notes=()):
    """One line on rank 0: what was read from a file that is not ours, and what was not taken."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: {what}" + (f"; left out: {', '.join(notes)}" if notes else ""))


def download(name):
    """A published file of PUBLISHED, where torch.hub keeps them; its state dict."""
    url, digest = PUBLISHED[name]
    place = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url + name, str(place), digest)            # beside, then renamed
    except Exception as error:                                # no connection, another hash, a full disk
        raise ValueError(f"{name} cannot be downloaded ({files.first_line(error)}): put {url + name} at "
                         f"{place}, or give another file, or none") from None
    try:
        content = read(place)
    except ValueError as error:
        place.unlink()
        raise ValueError(f"{error}; it is removed: run the same command again") from None
    return content.get("model", content)


# ---------------------------------------------------------------- the generators of others

def rename_irn(state, path):
    """IRN's and CLIMS's ResNet-50 holds each tensor three times, under resnet50, stage1..4 and backbone ->
    once, under our names. Copies must agree."""
    renamed = {"resnet50.": "backbone.", "newly_added.0.": "classifier."}
    places = {"0.0": "conv1", "0.1": "bn1", "0.4": "layer1", "1.0": "layer2", "2.0": "layer3",
              "3.0": "layer4"}
    for place, name in places.items():
        renamed[f"backbone.{place}."] = f"backbone.{name}."
        renamed[f"stage{int(place[0]) + 1}.{place[2]}."] = f"backbone.{name}."
    merged = {}
    for name, value in state.items():
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        new = renamed.get(prefix, "") + name[len(prefix):]
        if not torch.equal(merged.setdefault(new, value), value):
            raise ValueError(f"{path}: {name} differs from its other copy {new}: the file is damaged or was "
                             "put together from two networks")
    return merged


DEEPLAB_PARTS = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3"),
                 "shortcut": ("downsample.0", "downsample.1")}


def rename_deeplab(state):
    """The backbone of deeplab-pytorch's weights under torchvision's names, for RGB; its last layers are left
    out."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("base.")
        if name.startswith(("aspp.", "fc.")):
            continue
        layer, block, *rest = name.split(".")
        if layer == "layer1":                                 # layer1.conv1.conv.weight
            part = {"conv": "conv1", "bn": "bn1"}[rest[0]]
            renamed[f"{part}.{rest[1]}"] = value.flip(1) if rest[0] == "conv" else value       # from BGR
        else:                                                 # layer2.block1.reduce.conv.weight
            conv, bn = DEEPLAB_PARTS[rest[0]]
            number = int(block.removeprefix("block")) - 1
            part = conv if rest[1] == "conv" else bn
            renamed[f"layer{int(layer[-1]) - 1}.{number}.{part}.{rest[2]}"] = value
    counts = {name.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.long)
              for name in renamed if name.endswith("running_mean")}
    return {**counts, **renamed}                              # older files have no counts


# ---------------------------------------------------------------- the Hugging Face hub

def from_hub(name):
    """A model's name on the Hugging Face hub -> the folder of its files, downloaded once; a folder is itself.

    The hub names a file of weights by its SHA-256: one that is torn or was changed is removed."""
    if Path(name).is_dir():
        return str(name)
    try:
        from huggingface_hub import snapshot_download  # comes with transformers
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*pytorch_model*.bin"]))
    except ImportError:
        raise ValueError(f"{name} is not a folder, and to download it huggingface_hub is missing: "
                         "pip install transformers") from None
    except Exception as error:                                # no connection, no such model, no permission
        raise ValueError(f"{name} cannot be loaded: no such folder, and the Hugging Face hub does not give "
                         f"it ({files.first_line(error)}): give a model's name, with a connection, or the "
                         "folder of a downloaded one") from None
    for path in folder.iterdir():
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and files.sha256(blob) != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise ValueError(f"{path}: its SHA-256 is not {blob.name[:16]}..., the hub's: removed, run the "
                             "same command again to download it")
    return str(folder)
