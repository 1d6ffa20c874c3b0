"""Flags that several scripts share, their types, and what of them is the recipe."""
import argparse
from pathlib import Path




AMP = ("bf16", "fp16", "off")
# Flags that say where and how fast, not what: two runs that differ only in these give the same numbers.
NOT_THE_RECIPE = ("data", "out", "workers", "device", "deterministic", "resume", "save_every", "log_every")


def parser(doc, split="train_aug", batch_size=1, data=True):
    """The flags that all scripts share; the docstring of the script is its manual page. data=False: --data may be left out."""
    class Manual(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    p = argparse.ArgumentParser(description=doc, formatter_class=Manual)
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", type=Path, required=data, help="data folder in VOC layout (prepare_data.py check DIR says what is wrong with one)")
    g.add_argument("--out", type=Path, required=True, help="folder that all stages of a run share")
    g.add_argument("--split", default=split, help="list in ImageSets/Segmentation to work on")
    g.add_argument("--batch-size", type=positive, default=batch_size, help="pictures a step, over all processes together")
    g.add_argument("--workers", type=natural, default=4, help="loader or CRF processes for each process; 0: none")
    g.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda; auto takes a GPU if there is one")
    g.add_argument("--amp", choices=AMP, default="bf16", help="precision of the networks; losses are always float32")
    g.add_argument("--deterministic", action="store_true", help="on a GPU the same bits in each run, where PyTorch can, at the price of time; a CPU gives them anyway")
    g.add_argument("--limit", type=natural, default=0, help="only the first N pictures, for a look; 0: all")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on from what --out holds; --no-resume starts this stage again")
    return p


def matching(p, mask_eps=0.1):
    """The flags of the stages that show CLIP the regions of a mask."""
    g = p.add_argument_group("CLIP and masks")
    g.add_argument("--clip", default="ViT-B/32", help="OpenAI name, or a file with CLIP's weights")
    g.add_argument("--template", default="a photo of {}.", help="text of a class")
    g.add_argument("--pool", choices=["max", "avg"], help="pooling of S's attention fusion; left out: what the file of S says, else max (max: VOC, avg: COCO)")
    g.add_argument("--mask-eps", type=above_zero, default=mask_eps, help="m = (c - min) / (max - min + eps): a small map stays a weak mask")
    g.add_argument("--mask-fill", choices=["mean", "black", "imagenet"], default="mean",
                   help="what a removed pixel becomes: mean colour, black, or the mean colour under ImageNet's statistics (authors' code)")
    g.add_argument("--micro-batch", type=natural, default=0, help="regions CLIP encodes at a time, to save memory; 0: all of a step")
    return g


def clims(p):
    """The flags of the stages that train S on CLIP's regions, for CLIMS's losses; the defaults are SemPLeS's on WeakTr's generator, without them."""
    g = p.add_argument_group("CLIMS (SemPLeS Table 4): lambda_match L_match + lambda_cbs CBS + lambda_reg REG")
    g.add_argument("--lambda-match", type=number, default=1.0, help="weight of L_match (CLIMS: 10 with --lambda-b 2.4 on VOC, 2 with 7 on COCO)")
    g.add_argument("--lambda-cbs", type=number, default=0.0, help="weight of co-occurring background suppression (CLIMS: 1, COCO 1.25); CBS is a sum over pairs "
                   "and texts, so that a larger batch makes it count more: CLIMS's weight is one for --batch-size 16")
    g.add_argument("--lambda-reg", type=number, default=0.0, help="weight of the mean of all maps (CLIMS: 0.2); raise it if masks swallow the picture")
    g.add_argument("--tau-cbs", type=float, default=0.26, help="CBS counts a text from this cosine on (COCO: 0.285)")
    g.add_argument("--background-texts", default="clims", help="backgrounds of CBS: clims for CLIMS's ten, or a file of names, one a line")
    return g


def localising(p):
    """The flags of the stages that ask CLIP's GradCAM where a class is (CLIP-ES)."""
    g = p.add_argument_group("CLIP's GradCAM")
    g.add_argument("--clip", default="ViT-B/16", help="OpenAI name, or a file with CLIP's weights; a vision transformer")
    g.add_argument("--prompt", choices=["single", "ensemble"], default="ensemble", help="texts of classes and backgrounds (VPL Table 4)")
    g.add_argument("--template", help="another template than --prompt's")
    g.add_argument("--tau-t", type=above_zero, default=0.01, help="temperature of CLIP's own softmax over texts: 1 / its logit scale")
    g.add_argument("--affinity", action=argparse.BooleanOptionalAction, default=True, help="refine the maps by attention (CLIP-ES's CAA)")
    g.add_argument("--box", type=share, default=0.4, help="refined inside the boxes of a map's parts above this share of its maximum (0.7: COCO)")
    g.add_argument("--max-side", type=natural, default=640, help="CLIP sees larger pictures at this longer side (VOC's and COCO's are not); 0: as they are")
    g.add_argument("--cache", action="store_true", help="keep what enters CLIP's last block in <out>/cache, half precision: a later pass starts from there")
    return g


def training(p, epochs=60, lr=6.4e-5, weight_decay=0.03, crop=224, randaugment=True, erase=0.25):
    """The flags of the stages that train on random crops; the defaults are those of the paper's VOC recipe for the stage."""
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive, default=epochs)
    g.add_argument("--lr", type=number, default=lr, help="first rate, as it is used (for AdamW: the paper's number times batch / 512); falls to 0")
    g.add_argument("--weight-decay", type=number, default=weight_decay)
    g.add_argument("--crop", type=positive, default=crop, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=float, default=0.08, help="least share of the picture in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=randaugment, help="RandAugment of magnitude 9")
    g.add_argument("--erase", type=float, default=erase, help="probability of random erasing")
    g.add_argument("--log-every", type=positive, default=20, help="steps between two lines of the log")
    g.add_argument("--save-every", type=positive, default=500, help="steps between two states to resume from; one more after each epoch")
    return g


def optimizing(g):
    """The flags of the stages that train S, in the group of `training`."""
    g.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="adamw with a cosine (WeakTr, SemPLeS), or sgd with poly 0.9 (CLIMS)")
    g.add_argument("--head-rate", type=above_zero, default=1.0, help="rate of S's last layers, times --lr (CLIMS: 10)")
    # From the authors' code, not in the paper: IRN's, and so CLIMS's, optimiser hands the weight decay to SGD as its momentum.
    g.add_argument("--momentum", type=number, default=0.9, help="SGD's momentum; CLIMS was trained with 1e-4, which makes its rates ten times smaller than with 0.9")
    return g


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
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder in --out")
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


def plain(args):
    """Arguments as JSON and weights_only checkpoints hold them: no Path, no tuple."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def recipe(args):
    """The part of the arguments that decides the numbers."""
    return {k: v for k, v in (args if isinstance(args, dict) else plain(args)).items() if k not in NOT_THE_RECIPE}
