"""From maps to a network on the toy world: what the CRF adds, and what a network makes of it.

Pairs of a data draw and a seed of everything trained, with the recipe of run_toy.sh:

    maps           refined maps of SemPLeS at the fixed threshold        train
    masks          the same after the dense CRF                          train    weaktr, irn: other presets
    net on maps    network trained on the thresholded maps               val
    net on masks   network trained on the CRF's masks                    val
    net on truth   network trained on the true masks, the upper bound    val

The truth only scores, but for the last row. Draws 100 and 101 chose the preset and the network's schedule.

    python -m ablations.masks --pairs 8 --jobs 2 --write
"""
import numpy as np

from ablations import pairs
from plumbing import guard, markdown

SPLIT = {"maps": "train", "masks": "train", "masks, weaktr": "train", "masks, irn": "train",
         "net on maps": "val", "net on masks": "val", "net on truth": "val"}
USES = "IMAGES SHARED CLS MATCH PROMPT REFINE THRESHOLD MASKS SEG PREDICT"             # lines of run_toy.sh
AGAINST = {"masks": "maps", "masks, weaktr": "maps", "masks, irn": "maps",
           "net on masks": "net on maps", "net on truth": "net on masks"}


def parse():
    return pairs.parser(__doc__, "runs/masks", pairs=8, first_draw=321).parse_args()


def fill(pair):
    base, threshold = pair.root / "base", pair.recipe["THRESHOLD"]
    pair.run("train_cls.py", base, *pair.recipe["CLS"], "--backbone", pair.data / "backbone.pt")
    pair.train_semples(base)
    pair.maps(base, "refine", "cam")
    pair.rows["maps"] = pair.miou(base, "cam", "cam", *threshold)
    for name, folder, more in (("", "plain", ["--no-crf"]), ("masks", "pseudo", []),
                               ("masks, weaktr", "weaktr", ["--preset", "weaktr"]),
                               ("masks, irn", "irn", ["--preset", "irn"])):
        pair.run("make_pseudo.py", base, "--pseudo", folder, *threshold, *pair.recipe["MASKS"], *more)
        if name:
            pair.rows[name] = pair.miou(base, "pseudo", folder)
    for name, folder in (("net on maps", base / "plain"), ("net on masks", base / "pseudo"),
                         ("net on truth", pair.data / "SegmentationClass")):
        pair.rows[name] = pair.network(pair.root / name.replace(" ", "_"), folder)


def table(done):
    """A line a row: by pair, and the paired difference to what it is made from."""
    of = {name: np.array([pair.rows[name] for pair in done]) for name in SPLIT}
    less = {name: f"{pairs.interval(of[name] - of[other])} to {other}" for name, other in AGAINST.items()}
    lines = [[name, split, f"{of[name].mean():.1f}", pairs.each(of[name]), less.get(name, "")]
             for name, split in SPLIT.items()]
    return markdown.table(["", "split", "mIoU", "by pair", "paired difference"], lines)


def main():
    args = parse()
    drawn = pairs.by_draw(args, pairs.recipe(USES))
    pairs.study(args, "ablations.masks", drawn, lambda pair: set(SPLIT) <= set(pair.rows), fill, table)


if __name__ == "__main__":
    guard.run(main)
