"""The flags of the machine, which all scripts share, their types, and which flags decide the numbers.

A stage lists the flags of its paper itself.
"""
import argparse
import sys
from pathlib import Path

PRECISIONS = ("auto", "bf16", "fp16", "off")
# Two runs that differ only in these give the same numbers: where and how fast, not what.
NOT_THE_RECIPE = ("data", "out", "workers", "device", "deterministic", "resume", "save_every", "log_every",
                  "tensorboard")


def has_default(action):
    return action.default is not None and action.default is not False                 # 0 is one


class Manual(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def add_argument(self, action):
        if action.help is None and has_default(action):
            action.help = "default: %(default)s"
        super().add_argument(action)

    def _get_help_string(self, action):
        return super()._get_help_string(action) if has_default(action) else action.help


def program():
    """How a module of a folder was called, for its usage line; None of a script: argparse knows."""
    spec = sys.modules["__main__"].__spec__
    room = spec and spec.name.split(".")[0]
    return f"python -m {spec.name}" if room in ("hosts", "ablations", "bench") else None


def parser(doc, split="train_aug", batch_size=1, data=True):
    """The flags that all scripts share; the docstring of the script is its manual page.

    data=False: --data may be left out."""
    p = argparse.ArgumentParser(program(), description=doc, formatter_class=Manual)
    g = p.add_argument_group("machine, shared by all scripts")
    g.add_argument("--data", type=Path, required=data,
                   help="data folder in VOC layout (prepare_data.py check DIR says what is wrong with one)")
    g.add_argument("--out", type=Path, required=True, help="folder that all stages of a run share")
    g.add_argument("--split", default=split, help="list in ImageSets/Segmentation to work on")
    g.add_argument("--batch-size", type=positive, default=batch_size,
                   help="images a step, over all processes together")
    g.add_argument("--workers", type=natural, default=4,
                   help="loader or CRF processes for each process; 0: none")
    g.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda; auto takes a GPU if there is one")
    g.add_argument("--amp", choices=PRECISIONS, default="auto",
                   help="precision of the networks; losses are always float32. auto: bf16 on a GPU that has "
                        "it in hardware, fp16 on another GPU, off on a CPU")
    g.add_argument("--deterministic", action="store_true",
                   help="on a GPU the same bits in each run, where PyTorch can, but slower")
    g.add_argument("--limit", type=natural, default=0, help="only the first N images, for a look; 0: all")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on from what --out holds; --no-resume starts this stage again")
    return p


def training(p, log_every=20):
    """The machine's flags of a training loop."""
    p.add_argument("--log-every", type=positive, default=log_every, help="steps between two lines of the log")
    p.add_argument("--tensorboard", action="store_true",
                   help="what the log holds also for TensorBoard, in <out>/tensorboard, if it is installed")
    p.add_argument("--save-every", type=positive, default=500, help="steps between two states to resume from")


def max_side(p):
    p.add_argument("--max-side", type=natural, default=800,
                   help="a larger image is seen by the network at this longer side, and what comes out is "
                        "enlarged to the image's size; 0: as it is, at 12 megapixels hundreds of GB")


def clip(p, default):
    p.add_argument("--clip", default=default,
                   help="OpenAI name; or a file, a folder or a name on the Hugging Face hub, with OpenAI's, "
                        "transformers' or open_clip's weights; VPL and CLIP-ES: a ViT")
    p.add_argument("--clip-gelu", choices=["quick", "plain"],
                   help="its GELU, where no config says it: quick, as OpenAI's, or plain, as most of "
                        "open_clip's")


# ---------------------------------------------------------------- types

def natural(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text):
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def name(text):
    if not text or text.startswith(".") or set(text) & set("/\\"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder in --out")
    return text


def above_zero(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def number(text):
    value = float(text)
    if not 0 <= value < 1e30:                                 # a rate or a weight; beyond, float32 overflows
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def share(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


# ---------------------------------------------------------------- what is kept of them

def plain(args):
    """Arguments as JSON and weights_only checkpoints hold them: no Path, no tuple."""
    def value(v):
        return str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
    return {k: value(v) for k, v in vars(args).items()}


def recipe(args):
    """The part of the arguments that decides the numbers."""
    known = args if isinstance(args, dict) else plain(args)
    return {k: v for k, v in known.items() if k not in NOT_THE_RECIPE}
