"""Several processes against one: every stage on a few images of the toy world, run by 1 to 4 processes.

By stage and number of processes: the largest difference to what one process makes of the same inputs.
Numbers of the log, weights and scores are float32 sums in another order; maps are stored as float16; masks
are equal. Batches of 3 leave some of four processes without an image; the split `few` holds two images,
`bare` only images without a class. Stochastic depth of a frozen DeiT is off, as every process draws it for
itself; so is AdamW for the decoder, whose key biases have rounding for gradients. In `alternate` the
prompts learn slowly: AdamW makes a full step where only rounding says the sign of a gradient, as once among
their 30,720 numbers. Exit 1 above a bound.

    python -m tests.rigs.processes
"""
import argparse
import json
import math
import shlex
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.rigs import launch

LIMITS = {"log": 1e-4, "weights": 1e-4, "maps": 2e-3, "masks": 0, "scores": 1e-5}
KINDS = {".jsonl": "log", ".pt": "weights", ".npy": "maps", ".npz": "masks", ".png": "masks",
         ".json": "scores"}
NO_RESULTS = "args versions seconds world protocol inputs fingerprint maps segments".split()
TRAIN = "--epochs 2 --batch-size 3 --log-every 1 --crop 64 --min-scale 0.5"
SMALL = f"{TRAIN} --lr 1e-3 --drop-path 0"
CLIMS = f"hosts.train_clims --clip CLIP {TRAIN} --lr 0.01 --tau-cbs 0.1"
SEG = "--batch-size 3 --iterations 4 --log-every 1 --crop 64"
VPL = ("vpl.py --clip CLIP --batch-size 2 --tau-t 0.0665 --tau-i 0.1995 --phi 0.5 --features value "
       "--max-pixels 600 --steps 20 --lr 1 --log-every 5")
PREDICT = "eval.py --what seg --save --no-crf --scales 1 0.75 --batch-size 2"
JOBS = {  # name -> the files of earlier jobs that it reads, its command
    "cls": ("", f"train_cls.py --generator cnn_toy --backbone BACKBONE {SMALL}"),
    "cls_deit": ("", f"train_cls.py --generator deit_tiny_toy --backbone none --pool avg {SMALL}"),
    "cls_clims": ("", f"hosts.train_cam --generator clims_toy --backbone BACKBONE {TRAIN} --lr 1e-3"),
    "match": ("cls/cls.pt", f"train_match.py --clip CLIP {SMALL}"),
    "match_deit": ("cls_deit/cls.pt", f"train_match.py --clip CLIP {SMALL}"),
    "match_clims": ("cls_clims/cls.pt", f"{CLIMS} --stage match"),
    "prompts": ("match/match.pt", f"train_prompt.py --clip CLIP {TRAIN} --lr 0.01"),
    "prompts_views": ("match/match.pt", f"train_prompt.py --clip CLIP {TRAIN} --lr 0.01 --views 2"),
    "refine": ("cls/cls.pt prompts/prompts.pt", f"train_refine.py --clip CLIP {SMALL}"),
    "refine_clims": ("match_clims/match.pt prompts/prompts.pt", f"{CLIMS} --stage refine"),
    "joint": ("cls/cls.pt", f"ablations.schemes --scheme joint --clip CLIP {SMALL}"),
    "alternate": ("cls/cls.pt prompts/prompts.pt",
                  f"ablations.schemes --scheme alternate --rounds 2 --clip CLIP {SMALL} "
                  "--lr-prompts 1e-3"),
    "vpl": ("", VPL),
    "cam_cls": ("cls/cls.pt", "make_cam.py --source cls --batch-size 2 --sheets 2"),
    "cam_match": ("match_deit/match.pt", "make_cam.py --source match --batch-size 2 --stride 4 --sheets 0"),
    "cam_text": ("", "make_cam.py --source text --clip CLIP --batch-size 2 --tau-t 0.0665 --sheets 0"),
    "cam_vision": ("vpl/prototypes.pt", "make_cam.py --source vision --clip CLIP --batch-size 2 --sheets 0"),
    "segments": ("", "hosts.make_segments --source felzenszwalb --min-area 10"),
    "pseudo": ("cam_cls/cam", "make_pseudo.py --preset deeplab --threshold 0.4"),
    "pseudo_segments": ("cam_cls/cam segments/segments", "make_pseudo.py --segments OUT/segments"),
    "seg_deeplab": ("pseudo/pseudo", f"train_seg.py --model deeplab_toy --init BACKBONE {SEG} --lr 1e-4"),
    "seg_segmenter": ("pseudo/pseudo", f"train_seg.py --model segmenter_toy --init none {SEG} --lr 1e-2"),
    "seg_decoder": ("pseudo/pseudo vpl/prototypes.pt",
                    f"train_seg.py --model clip_decoder --clip CLIP {SEG} "
                    "--optimizer sgd --lr 0.05 --width 16"),
    "seg_mask2former": ("pseudo/pseudo", f"hosts.train_mask2former --model mask2former_toy --init none {SEG} "
                                         "--optimizer sgd --lr 10"),
    "eval_cam": ("cam_cls/cam", "eval.py --what cam --oracle"),
    "eval_pseudo": ("pseudo/pseudo", "eval.py --what pseudo"),
    "eval_deeplab": ("seg_deeplab/seg.pt", PREDICT), "eval_segmenter": ("seg_segmenter/seg.pt", PREDICT),
    "eval_decoder": ("seg_decoder/seg.pt", f"{PREDICT} --clip CLIP"),
    "eval_mask2former": ("seg_mask2former/seg.pt", PREDICT),
}
OPTIONAL = {"segments": "skimage", "mask2former": "transformers"}     # part of a job's name -> what it needs
BARE = ("cls", "cls_clims", "match", "match_clims", "prompts", "refine", "cam_cls", "cam_text", "pseudo",
        "seg_deeplab")


def make_world(root, output):
    """Six images of the toy world and two lists of two: `few`, one of them smaller, and `bare`, two without
    a class."""
    process = launch.start([("make_toy.py", "--out", root, "--train", "6", "--val", "2")], output)
    process.join()
    assert process.exitcode == 0, output.read_text()
    ids = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    for path in (root / f"JPEGImages/{ids[1]}.jpg", root / f"SegmentationClass/{ids[1]}.png"):
        Image.open(path).crop((0, 0, 80, 64)).save(path)
    lines = (root / "labels.txt").read_text().splitlines()
    for n in (2, 5):
        lines[n] = lines[n].split()[0]
        path = root / f"SegmentationClass/{ids[n]}.png"
        Image.open(path).point(lambda label: 0).save(path)
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    for split, some in (("few", ids[:2]), ("bare", [ids[2], ids[5]])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(some) + "\n")


def command(root, name, processes, split):
    """The words of a job. It reads what one process made, and writes to a folder of its own."""
    needs, line = JOBS[name]
    out = root / split / str(processes) / name
    out.mkdir(parents=True)
    for need in needs.split():
        (out / Path(need).name).symlink_to(root / split / "1" / need)
    world = root / "world"
    for word, path in (("CLIP", world / "clip.pt"), ("BACKBONE", world / "backbone.pt"), ("OUT", out)):
        line = line.replace(word, str(path))
    script, *flags = shlex.split(line)
    shared = ["--data", world, "--out", out, "--split", split, "--device", "cpu", "--workers", "0"]
    return [script, *shared, *flags]


# ---------------------------------------------------------------- the same as one process?

def results(folder):
    """{name: path} of what a job made: not what it was given, its recipes and its states to resume from."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in KINDS}
    return {name: path for name, path in found.items() if path.name != "recipe.json" and ".last." not in name
            and not (folder / name.split("/")[0]).is_symlink()}


def numbers(value):
    """All numbers of a JSON or a checkpoint, in order. Of arguments, times and hashes there are none."""
    if isinstance(value, dict):
        return [x for key, part in value.items() if key not in NO_RESULTS for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    if torch.is_tensor(value):
        return value.double().flatten().tolist()
    return [float(value)] if isinstance(value, (int, float)) else []


def read(path):
    """What a file holds, as one array of numbers."""
    if path.suffix in (".npy", ".npz"):
        found = np.load(path)
        parts = [found] if path.suffix == ".npy" else found.values()
        return np.concatenate([part.ravel().astype(float) for part in parts])
    if path.suffix == ".png":
        return np.array(Image.open(path)).astype(float)
    if path.suffix == ".pt":
        return np.array(numbers(torch.load(path, weights_only=True)))
    lines = path.read_text().splitlines()[1:] if path.suffix == ".jsonl" else [path.read_text()]
    return np.array(numbers([json.loads(line) for line in lines]))


def compare(one, several):
    """{kind: largest difference} of two folders, relative above 1. Of masks: how many values differ. NaN is
    equal to NaN; infinite where a file or a number is missing."""
    ours, theirs = results(one), results(several)
    found = {}
    for name in sorted(ours.keys() | theirs.keys()):
        kind, difference = KINDS[Path(name).suffix], math.inf
        if name in ours and name in theirs:
            a, b = read(ours[name]), read(theirs[name])
            if a.shape == b.shape:
                apart = np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
                apart[np.isnan(apart)] = math.inf                          # NaN on one side
                relative = (apart / np.maximum(1, np.abs(a))).max(initial=0)
                difference = float((apart != 0).sum() if kind == "masks" else relative)
        found[kind] = max(found.get(kind, 0), difference)
    return found


def agreement(root, split, counts, only=None):
    """Runs all jobs, or those in `only` -> {job: {processes: what `compare` finds}}."""
    wanted = [name for name in (BARE if split == "bare" else JOBS)
              if all(find_spec(module) for part, module in OPTIONAL.items() if part in name)
              and (not only or name in only)]
    first = set(wanted)                                       # and what they read, in one process
    for name in reversed(JOBS):
        if name in first:
            first |= {need.split("/")[0] for need in JOBS[name][0].split()}
    for n in [1, *counts]:
        output = root / f"{split}_{n}.txt"
        jobs = [command(root, name, n, split) for name in JOBS if name in (first if n == 1 else wanted)]
        if any(launch.together(jobs, output, n)):
            sys.exit(f"{split}, {n} processes:\n{output.read_text()[-3000:]}")
    made = root / split
    return {name: {n: compare(made / "1" / name, made / str(n) / name) for n in counts} for name in wanted}


def show(split, found):
    """Prints the differences -> how many are above their bounds."""
    bad = 0
    for name, by_count in found.items():
        for n, differences in by_count.items():
            print(split, name, f"{n} processes:", *(f"{kind} {d:.0g}" for kind, d in differences.items()))
            bad += sum(d > LIMITS[kind] for kind, d in differences.items()) if differences else 1
    return bad


def main():
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root / "world", root / "world.txt")
        bad = [show(split, agreement(root, split, [2, 3, 4])) for split in ("train", "few", "bare")]
    sys.exit(any(bad))


if __name__ == "__main__":
    main()
