"""run_voc.sh and run_coco.sh. The shell runs them with a python on the PATH that writes down what it is told to do; each line is then
done in this process (a start costs seconds), on a stand-in in VOC's and in COCO's own layout, with CLIPs that only lack depth."""
import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused
from PIL import Image
from test_readme import README
from torch.distributed.run import parse_args as parse_torchrun

import prepare_data
from plumbing import folders as data_folders, masks as mask_files

METHODS = {"semples": "train_cls train_match train_prompt train_refine make_cam eval make_pseudo eval train_seg eval report".split(),
           "vpl": "vpl make_cam eval make_pseudo eval train_seg eval report".split(),
           "clip_es": "make_cam eval make_pseudo eval train_seg eval report".split()}
STUB = """#!/bin/sh
case $1 in -c | -W) exit 0 ;; esac                   # setup.sh asks whether all is installed
printf '%s\\037' "$@" >>"$RECORD"; echo >>"$RECORD"
exit "${STATUS:-0}"
"""


@pytest.fixture
def shell(tmp_path):
    """shell("run_voc.sh", *flags, VOC=...) -> the finished bash, the lines python was given as lists of words."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(STUB)
    (tmp_path / "bin/python3").chmod(0o755)
    for path in ROOT.glob("*.sh"):                                           # they work in their own folder
        shutil.copy(path, tmp_path)

    def bash(script, *flags, where=tmp_path, **variables):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        known = ("VOC", "SBD", "COCO", "DATA", "OUT", "METHOD", "HOST", "INIT", "START", "LOOK", "GPUS", "SEED", "CLIP32", "CLIP16", "NET", "SAM", "SWIN")
        env = {**{k: v for k, v in os.environ.items() if k not in known}, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(record)}
        done = subprocess.run(["bash", tmp_path / script, *flags], env={**env, **{k: str(v) for k, v in variables.items()}},
                              cwd=where, capture_output=True, text=True, timeout=60)
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [line.split("\037")[:-1] for line in lines]
    return bash


def parse(words, monkeypatch):
    """What a stage reads from its line; a flag that it does not have ends the test."""
    monkeypatch.setattr(sys, "argv", words)
    return vars(importlib.import_module(words[0].removesuffix(".py")).parse())


def differences(words, monkeypatch):
    """{flag: value} of a line where it is not the script's own default; what tells eval.py, make_cam.py and train_seg.py their job is kept."""
    job = [word for flag in ("--what", "--source", "--model") if flag in words for word in (flag, words[words.index(flag) + 1])]
    given, own = parse(words, monkeypatch), parse([words[0], "--data", "x", "--out", "x", *job], monkeypatch)
    for values in (given, own):
        values |= {"pool": values["pool"] or "max"} if "pool" in values else {}          # left out, it is the file's, else max
    return {flag: value for flag, value in given.items() if value != own[flag] and flag not in ("data", "out", "split")}


# ---------------------------------------------------------------- the lines

def test_without_voc_one_line_says_so_and_the_toy_world_runs(shell):
    done, lines = shell("run_voc.sh")
    first = done.stdout.splitlines()[0]
    assert done.returncode == 0 and all(word in first for word in ("no VOC given", "toy world", "VOCtrainval", "benchmark.tgz", "VOC=")), done.stderr
    assert lines == shell("run_toy.sh")[1] and lines[0][0] == "make_toy.py"


@pytest.mark.parametrize("script,variables,words", [
    ("run_coco.sh", {}, ["no COCO given", "train2014.zip", "COCO="]),
    ("run_voc.sh", {"VOC": "x", "METHOD": "clipes"}, ["METHOD=clipes", "semples, vpl or clip_es"]),
    ("run_coco.sh", {"COCO": "x", "METHOD": "clipes"}, ["METHOD=clipes", "semples, vpl or clip_es"]),
    ("run_voc.sh", {"VOC": "x", "HOST": "resnet"}, ["HOST=resnet", "weaktr, clims or fma"]),
    ("run_voc.sh", {"VOC": "x", "NET": "unet"}, ["NET=unet", "deeplab, segmenter or mask2former"]),
    ("run_voc.sh", {"VOC": "x", "HOST": "clims", "METHOD": "vpl"}, ["HOST=clims", "METHOD=semples"]),
    ("run_coco.sh", {"COCO": "x", "HOST": "resnet"}, ["HOST=resnet", "weaktr"])])
def test_what_is_refused(shell, script, variables, words):
    done, lines = shell(script, **variables)
    refused(done, script, *words)
    assert not lines


def test_a_stage_that_fails_ends_the_run(shell, tmp_path):
    """Its own line and its exit status are what is left."""
    done, lines = shell("run_voc.sh", "--limit", "4", "--device", "cpu", VOC="/nowhere", OUT=tmp_path / "out", STATUS=1)
    assert done.returncode == 1 and len(lines) == 1
    refused(call(*lines[0]), "/nowhere/JPEGImages is missing")
    done, lines = shell("run_coco.sh", COCO="/nowhere", STATUS=1)
    assert done.returncode == 1 and len(lines) == 1
    refused(call(*lines[0]), "/nowhere/annotations/instances_train2014.json is missing")


@pytest.mark.parametrize("method", METHODS)
def test_voc_writes_out_the_defaults(shell, monkeypatch, method):
    """The defaults of the scripts are the recipe of SemPLeS, and of VPL where a stage is its own; CLIP-ES's masks are not the default."""
    done, lines = shell("run_voc.sh", VOC="/data/my voc", METHOD=method)
    assert done.returncode == 0 and [words[0] for words in lines] == [f"{name}.py" for name in METHODS[method]], done.stderr
    clip_es = {("eval.py", "cam"): {"background": "power"}, ("make_pseudo.py", None): {"background": "power", "preset": "deeplab", "ignore_below": 0.95}}
    for words in lines:
        given = parse(words, monkeypatch)
        assert str(given["data"]) == "/data/my voc" and str(given["out"]) == ("runs/voc" if method == "semples" else f"runs/voc_{method}")
        scored = {"eval.py": {"seg": "val"}.get(given.get("what"), "train"), "report.py": "train"}
        assert given["split"] == scored.get(words[0], "train_aug")
        want = {} if method == "semples" else clip_es.get((words[0], given.get("what")), {})
        assert differences(words, monkeypatch) == want | ({"save": True} if given.get("what") == "seg" else {}), words


def test_coco_is_voc_but_for_the_papers_numbers(shell, monkeypatch):
    classifier = {"pool": "avg", "reduction": 4, "lr": 2.5e-5}
    match = {"pool": "avg", "batch_size": 32, "lr": 3.2e-7, "lambda_b": 0.75}
    prompt = {"pool": "avg", "lr": 2.5e-3, "lambda_t": 0.01}
    refine = {"pool": "avg", "batch_size": 24, "lr": 2.4e-7, "lambda_b": 0.75, "lambda_refine": 0.2}
    masks = {"threshold": 0.42, "preset": "irn"}
    clip_es = [{"box": 0.7}, {"background": "power"}, {"background": "power", "preset": "deeplab", "ignore_below": 0.95}, {}]
    want = {"semples": [classifier, match, prompt, refine, {"pool": "avg", "scales": [1.0, 0.8, 1.2]}, {"threshold": 0.42}, masks, {}, {"iterations": 100_000}],
            "vpl": [{"box": 0.7}, *clip_es, {}], "clip_es": [*clip_es, {"iterations": 100_000}]}
    for method in METHODS:
        done, ((script, command, *_), *lines) = shell("run_coco.sh", COCO="/data/coco", METHOD=method)
        assert done.returncode == 0 and (script, command) == ("prepare_data.py", "coco") and [words[0][:-3] for words in lines] == METHODS[method]
        assert [differences(words, monkeypatch) for words in lines] == [*want[method], {"save": True}, {}]
        for words in lines:
            given = parse(words, monkeypatch)
            assert str(given["data"]) == "data/coco" and given["split"] == ("val" if given.get("what") == "seg" else "train")


@pytest.mark.parametrize("script,variable,power", [("run_voc.sh", "VOC", 0.6), ("run_coco.sh", "COCO", 1.0)])
def test_the_other_hosts_and_networks(shell, monkeypatch, tmp_path, script, variable, power):
    """Table 4: CLIMS's losses and optimiser; SAM's segments and Mask2Former. What a host and a network do not name is a default."""
    (tmp_path / "JPEGImages").mkdir()
    stages = lambda **more: {tuple(words[:1] + [w for w in words if w in ("cam", "pseudo", "seg")]): parse(words, monkeypatch)
                             for words in shell(script, **{variable: tmp_path, **more})[1]}
    plain, clims, fma = stages(), stages(HOST="clims"), stages(HOST="fma", SAM="sam-folder", SWIN="swin-folder")
    assert list(clims) == list(plain) and [key for key in fma if key not in plain] == [("make_segments.py",)]
    voc = script == "run_voc.sh"
    for name in ("train_match.py", "train_refine.py"):
        given = clims[(name,)]
        assert [given[k] for k in ("lambda_match", "lambda_b", "lambda_cbs", "lambda_reg", "tau_cbs")] == ([10, 2.4, 1, 0.2, 0.26] if voc else [2, 7, 1.25, 0.2, 0.285])
        assert (given["optimizer"], given["lr"], given["head_rate"], given["epochs"], given["batch_size"], given["crop"], given["train_backbone"]) == ("sgd", 2.5e-4, 10, 15, 16, 512, True)
    assert clims[("train_cls.py",)]["generator"] == "resnet50" and clims[("train_refine.py",)]["lambda_refine"] == pytest.approx(0.05 * 10 if voc else 0.2 * 2)
    segments, masks, network = fma[("make_segments.py",)], fma[("make_pseudo.py",)], fma[("train_seg.py",)]
    assert (segments["sam"], segments["points"], segments["pred_iou"], segments["stability"], segments["crop_layers"], segments["nms"]) == ("sam-folder", 32, 0.86, 0.92, 1, 0.7)
    assert (masks["vote"], masks["power"], masks["crf"], masks["segments"].name) == ("sams", power, False, "segments")
    assert (network["model"], network["init"], network["batch_size"], network["iterations"], network["crop"]) == ("mask2former_swin_large", "swin-folder", 4, 80_000, 512)
    network = stages(NET="segmenter")[("train_seg.py",)]
    assert (network["model"], network["crop"], network["lr"], network["batch_size"], network["iterations"]) == (
        ("segmenter_deit_small", 480, 1e-4, 4, 10_582 // 4 * 100) if voc else ("segmenter_deit_small", 480, 1e-3, 16, 1_313_000))


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if "common.parser(" in path.read_text()))
def test_torchrun_takes_no_flag_of_ours_for_its_own(monkeypatch, script):
    """It refuses a line in which any word begins several of its own options: --start, say, with --start-method and --start_method."""
    flags = []

    def give(parser):
        flags.extend(flag for action in parser._actions for flag in action.option_strings)
        raise EOFError                                                      # what parse() asks of its arguments is not the question here

    with monkeypatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(argparse.ArgumentParser, "parse_args", give)
        importlib.import_module(script[:-3]).parse()
    assert "--data" in flags
    for flag in flags:
        read = parse_torchrun(["--standalone", "--nproc_per_node", "4", script, flag, "1"])
        assert read.training_script_args == [flag, "1"]


@pytest.mark.parametrize("script,variable", [("run_voc.sh", "VOC"), ("run_coco.sh", "COCO")])
def test_gpus_start_and_the_rest_of_the_command_reach_every_stage(shell, monkeypatch, tmp_path, script, variable):
    (tmp_path / "JPEGImages").mkdir()                                       # a prepared folder is not prepared again
    flags = ["--limit", "64", "--device", "cpu", "--workers", "16", "--amp", "fp16"]
    more = {variable: tmp_path, "SEED": 3, "INIT": "weaktr.pth", "START": "none", "CLIP32": "b32.pt", "CLIP16": "b16.pt"}
    for method in METHODS:
        lines = shell(script, *flags, METHOD=method, GPUS=4, **more)[1]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
        alone = shell(script, *flags, METHOD=method, **more)[1]
        assert len(lines) == len(METHODS[method]) and lines == [torchrun + words for words in alone[:-1]] + alone[-1:]
        for words in lines[:-1]:                                            # torchrun reads them as they are meant
            read = parse_torchrun(words[2:])
            assert [read.training_script, *read.training_script_args] == words[len(torchrun):]
        for words in alone:
            given = parse(words, monkeypatch)
            assert [given[k] for k in ("limit", "device", "workers", "amp", "seed")] == [64, "cpu", 16, "fp16", 3]
            assert given.get("clip") in (None, "b32.pt" if method == "semples" else "b16.pt", "ViT-B/16")
            assert "backbone" not in given or (given["backbone"], given["init"]) == ("none", "weaktr.pth")
            assert "model" not in given or given["init"] == "none"
        lines = shell(script, "--batch-size", "3", METHOD=method, **more)[1]
        assert all(parse(words, monkeypatch)["batch_size"] == 3 for words in lines)         # what is given wins over the recipe


def test_the_lines_of_the_readme(shell, monkeypatch):
    found = [line for line in README if re.search(r"bash run_(voc|coco)\.sh", line)]
    assert len(found) >= 5
    for line in found:
        words = shlex.split(line)
        at = words.index("bash")
        done, lines = shell(*words[at + 1:], **dict(word.split("=", 1) for word in words[:at]))
        assert done.returncode == 0 and len(lines) > 5, (line, done.stderr)
        for stage in lines:
            while not stage[0].endswith(".py"):                             # torchrun and its flags
                stage = stage[1:]
            assert parse(stage, monkeypatch), stage


def test_what_is_finished_is_passed_over_without_python(shell, tmp_path):
    """The lines that ended well, as long as data and results are as they were; else every script looks for itself."""
    world, out = tmp_path / "my world", tmp_path / "out"
    world.mkdir()
    (world / "labels.txt").write_text("a cat\n")
    toy_run = lambda *flags, **more: shell("run_toy.sh", *flags, DATA=world, OUT=out, **more)
    lines = toy_run()[1]
    assert lines[0] == ["make_toy.py", "--out", str(world), "--train", "384", "--val", "128"]          # the blank in the name
    done, rest = toy_run()
    assert not rest and done.stdout.count("== finished: ") == len(lines) and "look at" in done.stdout
    (world / "labels.txt").write_text("a dog\n")
    assert toy_run()[1] == lines and toy_run()[1] == []                     # another label of the same length
    (out / "cls.pt").touch()
    assert toy_run()[1] == lines and toy_run()[1] == []
    (out / "cls.pt").unlink()
    assert toy_run()[1] == lines and toy_run()[1] == []
    assert toy_run(SEED=1)[1] == [["1" if before == "--seed" else word for before, word in zip(["", *words], words)] for words in lines[2:]]
    assert toy_run("--workers", "2")[1] == [words + ["--workers", "2"] for words in lines[2:]]
    for _ in range(2):
        assert len(toy_run("--no-resume")[1]) == len(lines)                 # is never passed over
    done, rest = toy_run(STATUS=3, SEED=2)
    assert done.returncode == 3 and rest[0][0] == "train_cls.py" and len(rest) == 1
    assert toy_run(SEED=2)[1][0] == rest[0]                                 # what did not end well is no line that did


def test_look_and_seeds_have_folders_of_their_own_and_paths_are_the_callers(shell, tmp_path):
    folders = lambda words: (words[words.index("--data") + 1], words[words.index("--out") + 1])
    assert folders(shell("run_toy.sh")[1][2]) == ("data/toy", "runs/toy")
    assert folders(shell("run_toy.sh", LOOK=1)[1][2]) == ("data/toy_look", "runs/toy_look")
    assert folders(shell("run_toy.sh", SEED=3)[1][2]) == ("data/toy", "runs/toy_seed3")
    assert folders(shell("run_voc.sh", VOC="/v", LOOK=1, METHOD="vpl")[1][0]) == ("/v", "runs/voc_vpl_look")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b32.pt").touch()
    lines = shell("run_voc.sh", VOC="v o c", OUT="o", CLIP32="b32.pt", where=tmp_path / "elsewhere")[1]
    assert folders(lines[0]) == (str(tmp_path / "elsewhere/v o c"), str(tmp_path / "elsewhere/o"))
    assert lines[1][lines[1].index("--clip") + 1] == str(tmp_path / "elsewhere/b32.pt")
    assert "ViT-B/16" in shell("run_voc.sh", VOC="v", METHOD="vpl", where=tmp_path / "elsewhere")[1][0]


# ---------------------------------------------------------------- the stand-ins

TRAIN = {"2007_000032": [0, 14], "2007_000063": [11, 8], "2007_000121": [19]}       # id -> classes
VAL = {"2007_000033": [0], "2007_000042": [18]}
SBD = {"2008_000008": [12, 14]}


def draw(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.stem)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """ViT-B/32 and ViT-B/16 with OpenAI's names, widths and sizes, two blocks deep, in half precision as OpenAI's files are."""
    from clip.model import CLIP
    folder = tmp_path_factory.mktemp("clips")
    for patch in (32, 16):
        torch.manual_seed(patch)
        model = CLIP(embed_dim=512, image_resolution=224, vision_layers=2, vision_width=768, vision_patch_size=patch, context_length=77,
                     vocab_size=49408, transformer_width=512, transformer_heads=8, transformer_layers=2)
        torch.save(model.half().state_dict(), folder / f"{patch}.pt")
    return {f"CLIP{patch}": folder / f"{patch}.pt" for patch in (32, 16)}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """VOC 2012's tree and SBD's as they are unpacked, train_aug not there yet."""
    root = tmp_path_factory.mktemp("voc")
    for id, classes in {**TRAIN, **VAL, **SBD}.items():
        draw(root / "VOC2012/JPEGImages" / f"{id}.jpg")
        (root / "VOC2012/Annotations").mkdir(exist_ok=True)
        objects = "".join(f"<object><name>{data_folders.VOC_CLASSES[k].replace(' ', '')}</name><difficult>0</difficult></object>" for k in classes)
        (root / "VOC2012/Annotations" / f"{id}.xml").write_text(f"<annotation><filename>{id}.jpg</filename>{objects}</annotation>")
        mask = np.zeros((48, 64), np.uint8)
        for n, k in enumerate(classes):
            mask[10:40, 5 + 30 * n:30 + 30 * n] = k + 1
        if id not in SBD:
            (root / "VOC2012/SegmentationClass").mkdir(exist_ok=True)
            mask[9] = 255
            mask_files.save_mask(root / "VOC2012/SegmentationClass" / f"{id}.png", mask)
        (root / "benchmark_RELEASE/dataset/cls").mkdir(parents=True, exist_ok=True)
        if importlib.util.find_spec("scipy"):
            from scipy import io
            io.savemat(root / "benchmark_RELEASE/dataset/cls" / f"{id}.mat", {"GTcls": {"Segmentation": np.where(mask == 255, 0, mask)}})
    lists = root / "VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(TRAIN))                      # no last newline
    (lists / "val.txt").write_text("".join(f"{id}\n" for id in VAL))
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO 2014 as it is unpacked: three pictures of train, the last without an annotation, one of val."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, ids in (("train", (9, 25, 30)), ("val", (42,))):
        for n in ids:
            draw(root / f"{split}2014" / f"COCO_{split}2014_{n:012d}.jpg")
        square = [[8, 8, 40, 8, 40, 40, 8, 40]]
        annotations = [{"id": k, "image_id": n, "category_id": c, "segmentation": square, "iscrowd": 0, "area": 1024}
                       for k, (n, c) in enumerate([(9, 1), (9, 90), (25, 13)] if split == "train" else [(42, 90)])]
        categories = [{"id": i, "name": data_folders.COCO_CLASSES[k]} for i, k in prepare_data.COCO_INDEX.items()]
        images = [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": 48, "width": 64} for n in ids]
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


FLAGS = ("--limit", "4", "--device", "cpu", "--amp", "off", "--workers", "0")


def do(lines):
    for words in lines:
        done = call(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("method", METHODS)
def test_voc_runs(shell, voc, clips, tmp_path, monkeypatch, method):
    sbd = {"SBD": voc / "benchmark_RELEASE"} if importlib.util.find_spec("scipy") else {}
    if not sbd:
        (voc / "VOC2012/ImageSets/Segmentation/train_aug.txt").write_text("".join(f"{id}\n" for id in TRAIN | SBD))
    monkeypatch.setattr(prepare_data, "VOC_COUNTS", dict(zip(prepare_data.VOC_COUNTS, (5, 6, 6, 4))))
    done, lines = shell("run_voc.sh", *FLAGS, VOC=voc / "VOC2012", OUT=tmp_path / "out", METHOD=method, LOOK=1, START="none", **sbd, **clips)
    assert done.returncode == 0, done.stderr
    out, network = tmp_path / "out", method != "clip_es"
    lines = lines if network else lines[:-3]                                # CLIP-ES's is SemPLeS's by its flags, and takes long
    do(lines)
    found = {path.stem for path in out.glob("*.pt")} - {path.stem for path in out.glob("*.last.pt")}
    assert found == {"semples": {"cls", "match", "prompts", "refine", "seg"}, "vpl": {"prototypes", "seg"}, "clip_es": set()}[method]
    if method == "semples":
        assert weights(out / "refine.pt")["head.weight"].shape == (20, 384, 3, 3) and weights(out / "prompts.pt")["vectors"].shape == (20, 30, 512)
    if method == "vpl":
        assert weights(out / "prototypes.pt")["prototypes"].shape == (45, 512)
    for folder, suffix, ids in (("cam", "npy", TRAIN | SBD), ("pseudo", "png", TRAIN | SBD), ("pred/val", "png", VAL if network else {})):
        assert {path.stem for path in (out / folder).glob(f"*.{suffix}")} == set(ids), folder
    assert np.load(out / "cam/2007_000063.npy").shape == (2, 48, 64)
    for what, pictures in (("cam_train", 3), ("pseudo_train", 3), ("seg_val", 2))[:2 + network]:
        assert json.loads((out / f"eval_{what}.json").read_text())["protocol"]["pictures"] == pictures
    made = {path: path.stat().st_mtime_ns for folder in (out, out / "cam", out / "pseudo") for path in folder.iterdir() if path.suffix in (".pt", ".npy", ".png")}
    do([words for words in lines if words[0] not in ("eval.py", "report.py")])                 # a second call skips what is finished
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


@pytest.mark.parametrize("method", ["semples", "vpl"])
def test_coco_runs(shell, coco, clips, tmp_path, method):
    pytest.importorskip("pycocotools")
    out = tmp_path / "out"
    done, lines = shell("run_coco.sh", *FLAGS, COCO=coco, DATA=tmp_path / "data", OUT=out, METHOD=method, LOOK=1, START="none", **clips)
    assert done.returncode == 0, done.stderr
    do(lines[:-3] if method == "semples" else lines)                        # DeepLab takes long, and is that of VOC but for its length
    ids = {"COCO_train2014_000000000009", "COCO_train2014_000000000025"}
    assert {path.stem for path in (out / "pseudo").glob("*.png")} == ids
    if method == "semples":
        assert weights(out / "refine.pt")["head.weight"].shape[0] == 80 and weights(out / "prompts.pt")["vectors"].shape[0] == 80
        assert weights(out / "refine.pt")["adaptive_attention_fusion.attn_head_ffn.0.weight"].shape == (18, 72)
    else:
        assert weights(out / "prototypes.pt")["prototypes"].shape == (103, 512) and (out / "eval_seg_val.json").exists()
