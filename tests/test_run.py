"""run_voc.sh, run_coco.sh and run_toy.sh. The shell runs them with a python that only writes down what it is
told to do; each line is then parsed by its script, or done in this process on a stand-in of VOC."""
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from clip.model import CLIP
from conftest import ROOT, call, make_folder, refused

from plumbing import folders

OURS = ("VOC SBD COCO DATA OUT METHOD HOST NET INIT START LOOK GPUS NODES NODE HEAD SEED CLIP32 CLIP16 "
        "SAM SWIN DEEPLAB").split()
LAST = "make_cam eval make_pseudo eval train_seg eval report"
STAGES = {  # METHOD or HOST -> its lines
    "semples": f"train_cls train_match train_prompt train_refine {LAST}",
    "vpl": f"vpl {LAST}",
    "clip_es": LAST,
    "clims": f"hosts.train_cam hosts.train_clims train_prompt hosts.train_clims {LAST}",
    "fma": "train_cls train_match train_prompt train_refine make_cam eval hosts.make_segments make_pseudo "
           "eval hosts.train_mask2former eval report",
}
STUB = """#!/bin/sh
case $2 in *cuda*) [ "${GPU:-}" ]; exit ;; esac
case $1 in -c | -W) exit 0 ;; esac                   # setup.sh asks whether all is installed
printf '%s\\037' "$@" >>"$RECORD"
echo >>"$RECORD"
case $* in *"${FAIL:-no such word}"*) exit 3 ;; esac
"""


@pytest.fixture
def shell(tmp_path):
    """shell("run_voc.sh", *flags, VOC=...) -> the finished bash, python's lines as lists of words."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(STUB)
    (tmp_path / "bin/python3").chmod(0o755)
    for path in ROOT.glob("*.sh"):                            # they work in their own folder
        shutil.copy(path, tmp_path)

    def bash(script, *flags, where=tmp_path, **variables):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if name not in OURS}
        env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "RECORD": str(record)}
        env |= {name: str(value) for name, value in variables.items()}
        done = subprocess.run(["bash", tmp_path / script, *flags], env=env, cwd=where, capture_output=True,
                              text=True, timeout=60)
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [line.split("\037")[:-1] for line in lines]
    return bash


def module_of(words):
    """-> the module that a line of words runs, its flags."""
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def parse(words, monkeypatch):
    """What a stage reads from its line; a flag that it does not have ends the test."""
    name, flags = module_of(words)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    return vars(importlib.import_module(name).parse())


# ---------------------------------------------------------------- the lines

def test_without_voc_one_line_says_so_and_the_toy_world_runs(shell):
    done, lines = shell("run_voc.sh")
    first = done.stdout.splitlines()[0]
    words = "no VOC given", "toy world", "VOCtrainval", "benchmark.tgz", "VOC="
    assert done.returncode == 0 and all(word in first for word in words), done.stderr
    assert lines == shell("run_toy.sh")[1] and lines[0][0] == "make_toy.py"


@pytest.mark.parametrize("script", ["run_toy.sh", "run_voc.sh", "run_coco.sh"])
def test_help_is_the_head_of_the_script_and_runs_nothing(shell, script):
    done, lines = shell(script, "--help")
    head = (ROOT / script).read_text().splitlines()[1:3]
    assert done.returncode == 0 and not lines and done.stdout.splitlines()[:2] == [line[2:] for line in head]
    assert f"bash {script}" in done.stdout and "source" not in done.stdout


def test_what_is_refused(shell):
    for variables, words in (
            ({}, ["no COCO given", "train2014.zip"]), ({"METHOD": "clipes"}, ["METHOD=clipes", "clip_es"]),
            ({"HOST": "resnet"}, ["HOST=resnet", "weaktr, clims or fma"]), ({"NET": "unet"}, ["NET=unet"]),
            ({"NET": "deeplab_coco"}, ["NET=deeplab_coco", "no DEEPLAB"]),
            ({"HOST": "clims", "METHOD": "vpl"}, ["HOST=clims", "METHOD=semples"]),
            ({"NET": "segmenter", "METHOD": "vpl"}, ["NET=segmenter", "VPL has its own"])):
        for script in ("run_coco.sh", "run_voc.sh") if variables else ("run_coco.sh",):
            done, lines = shell(script, **variables, **({"COCO": "x", "VOC": "x"} if variables else {}))
            refused(done, script, *words)
            assert not lines


def test_a_stage_that_fails_ends_the_run(shell):
    done, lines = shell("run_coco.sh", COCO="/nowhere", FAIL="prepare_data.py")
    assert done.returncode == 3 and len(lines) == 1
    refused(call(*lines[0]), "/nowhere/annotations/instances_train2014.json is missing")


CHOICES = [{}, {"METHOD": "vpl"}, {"METHOD": "clip_es"}, {"HOST": "clims"}, {"HOST": "fma"},
           {"NET": "segmenter"}, {"HOST": "clims", "NET": "mask2former"},
           {"METHOD": "clip_es", "NET": "segmenter"}, {"NET": "deeplab_coco", "DEEPLAB": "coco.pth"}]


def of_line(script, root, look):
    """-> flags and variables of a run on a prepared folder, which is not prepared again."""
    (root / "JPEGImages").mkdir()
    variables = {script[4:-3].upper(): root, "SEED": 3, "INIT": "init.pth", "START": "none",
                 "CLIP32": "32.pt", "CLIP16": "16.pt", "OUT": root / "out", **look}
    return ["--limit", "64", "--device", "cpu", "--workers", "16", "--batch-size", "3"], variables


@pytest.mark.parametrize("script,look", [("run_voc.sh", {}), ("run_coco.sh", {"LOOK": 1})])
def test_every_line_parses_whatever_is_chosen(shell, monkeypatch, tmp_path, script, look):
    """Every method, host and network; START, INIT, SEED, CLIP32 and the rest of the line reach the stages."""
    flags, more = of_line(script, tmp_path, look)
    for choice in CHOICES:
        done, lines = shell(script, *flags, **more, **choice)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / "out")                       # what is finished is passed over
        want = STAGES[choice.get("METHOD", choice.get("HOST", "semples"))]
        if choice.get("NET") == "mask2former":
            want = want.replace("train_seg", "hosts.train_mask2former")
        if "METHOD" in choice and script == "run_voc.sh":     # masks that are scored, masks that train
            want = want.replace("make_pseudo", "make_pseudo make_pseudo")
        assert [module_of(words)[0] for words in lines] == want.split()
        for words in lines:
            given, name = parse(words, monkeypatch), module_of(words)[0]
            machine = ("limit", "device", "workers", "batch_size", "seed")
            assert [given[flag] for flag in machine] == [64, "cpu", 16, 3, 3]
            if name in ("train_match", "train_prompt", "train_refine", "hosts.train_clims", "vpl"):
                assert given["clip"] == ("16.pt" if name == "vpl" else "32.pt")
                assert given.get("mask_fill", "imagenet") == "imagenet" or choice.get("HOST") == "clims"
            if "backbone" in given:
                assert (given["backbone"], given["init"]) == ("none", "init.pth")
            if name in ("train_seg", "hosts.train_mask2former"):
                start = choice.get("DEEPLAB", "none")
                assert given["init"] == start and (given["iterations"] == 2) == bool(look)
                assert given["model"].endswith("_caffe") == ("DEEPLAB" in choice)
            assert given.get("epochs", 1) == 1 or not look
            scored = {"eval": "val" if "seg" in words else "train", "report": "train"}
            if given.get("pseudo") == "pseudo_whole" and not given.get("ignore_below"):      # scored alone
                scored["make_pseudo"] = "train"
            if given.get("what") == "pseudo":
                whole = "METHOD" in choice and script == "run_voc.sh"
                assert given["pseudo"] == ("pseudo_whole" if whole else "pseudo")
            assert given["split"] == scored.get(name, "train_aug" if script == "run_voc.sh" else "train")
            if "seg" in words:
                assert (given["preset"] == "segmenter") == (choice.get("NET") == "segmenter")


@pytest.mark.parametrize("script,look", [("run_voc.sh", {}), ("run_coco.sh", {"LOOK": 1})])
def test_the_same_lines_on_gpus_and_machines(shell, monkeypatch, tmp_path, script, look):
    flags, more = of_line(script, tmp_path, look)
    alone = shell(script, *flags, **more)[1]
    assert {parse(words, monkeypatch)["amp"] for words in alone} == {"auto"}
    shutil.rmtree(tmp_path / "out")
    more["GPU"] = 1
    assert shell(script, *flags, **more)[1] == alone          # --device cpu
    shutil.rmtree(tmp_path / "out")
    joined = shell(script, *flags[:2], "--device=cpu", *flags[4:], **more)[1]
    assert {parse(words, monkeypatch)["amp"] for words in joined} == {"auto"}
    shutil.rmtree(tmp_path / "out")
    flags = flags[:2] + flags[4:]
    at = [words.index("--device") for words in alone]         # without: fp16, as the authors
    alone = [words[:n] + words[n + 2:] for words, n in zip(alone, at)]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    alone = [["fp16" if word == "auto" else word for word in words] for words in alone]
    want = [torchrun + words for words in alone[:-1]] + alone[-1:]        # the report is one process's
    assert shell(script, *flags, GPUS=2, **more)[1] == want
    shutil.rmtree(tmp_path / "out")
    for node in (0, 1):                                       # a stage a port; one machine makes the report
        lines = shell(script, *flags, GPUS=2, NODES=2, NODE=node, HEAD="h:29500", **more)[1]
        assert [words[-len(end):] for words, end in zip(lines, alone)] == alone[:len(alone) - node]
        for n, words in enumerate(lines[:len(alone) - 1], 1):
            begin = words[:len(words) - len(alone[n - 1])]
            assert begin == torchrun[:4] + [
                "--nnodes", "2", "--node_rank", str(node), "--rdzv_backend", "c10d", "--rdzv_id", str(n),
                "--rdzv_endpoint", f"h:{29500 + n}", "--rdzv_conf",
                f"is_host={1 - node},join_timeout=3600,read_timeout=3600"]
    for lost in ({"NODE": 1}, {"HEAD": "h:29500"}, {"NODE": 0, "HEAD": "h"}):
        done, lines = shell(script, NODES=2, **more, **lost)
        assert done.returncode == 1 and not lines and "NODES=2 needs NODE" in done.stderr.splitlines()[-1]
    done, lines = shell(script, NODE=1, **more)
    assert done.returncode == 1 and not lines and "NODE=1 needs NODES" in done.stderr


# ---------------------------------------------------------------- a second call, folders, paths

def test_what_is_finished_is_passed_over_without_python(shell, tmp_path):
    """The lines that ended well, as long as data and results are as they were; else every script looks."""
    world, out = tmp_path / "my world", tmp_path / "out"
    world.mkdir()
    (world / "labels.txt").write_text("a cat\n")

    def toy_run(*flags, **more):
        time.sleep(0.02)                                      # file times are that coarse
        done, lines = shell("run_toy.sh", *flags, DATA=world, OUT=out, LOOK=1, **more)
        time.sleep(0.02)
        return done, lines

    _, lines = toy_run()
    assert lines[0] == ["make_toy.py", "--out", str(world), "--train", "24", "--val", "8"]
    done, rest = toy_run()
    assert not rest and done.stdout.count("== finished: ") == len(lines) and "look at" in done.stdout
    for change in (lambda: (world / "labels.txt").write_text("a dog\n"), lambda: (out / "cls.pt").touch(),
                   lambda: shutil.rmtree(world)):
        change()
        assert toy_run()[1] == lines
        world.mkdir(exist_ok=True)
    for _ in range(2):                                        # is never passed over
        assert len(toy_run("--no-resume")[1]) == len(lines)
    toy_run()
    world.rename(tmp_path / "elsewhere")                      # a link to the data, as is usual
    world.symlink_to(tmp_path / "elsewhere")
    assert toy_run()[1] == lines and not toy_run()[1]
    (world / "labels.txt").write_text("a cow\n")
    done, rest = toy_run(FAIL="train_cls.py")
    assert done.returncode == 3 and rest == lines[:3]
    assert toy_run()[1] == lines[2:] and not toy_run()[1]     # the first two ended well after the change


def test_another_start_of_the_same_name_is_noticed(shell, tmp_path):
    """Also one that is older than the results: moved here, it keeps the time at which it was made."""
    here = {name: tmp_path / name for name in ("voc", "out", "other.pt", "init.pt")}
    here["voc"].mkdir()
    for name in ("other.pt", "init.pt"):
        here[name].touch()

    def voc_run():
        time.sleep(0.02)
        lines = shell("run_voc.sh", VOC=here["voc"], OUT=here["out"], INIT=here["init.pt"])[1]
        time.sleep(0.02)
        return lines

    lines = voc_run()
    assert lines and not voc_run()
    here["other.pt"].rename(here["init.pt"])
    assert voc_run() == lines


def test_look_and_seeds_have_folders_of_their_own_and_paths_are_the_callers(shell, tmp_path):
    def where(words):
        return words[words.index("--data") + 1], words[words.index("--out") + 1]

    assert where(shell("run_toy.sh")[1][2]) == ("data/toy", "runs/toy")
    assert where(shell("run_toy.sh", SEED=3)[1][2]) == ("data/toy", "runs/toy_seed3")
    assert where(shell("run_voc.sh", VOC="/v", LOOK=1, METHOD="vpl")[1][0]) == ("/v", "runs/voc_vpl_look")
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "b32.pt").touch()
    (here / "deeplab.pth").touch()
    net = {"NET": "deeplab_coco", "DEEPLAB": "deeplab.pth"}
    lines = shell("run_voc.sh", VOC="v o c", OUT="o", CLIP32="b32.pt", where=here, **net)[1]
    assert where(lines[0]) == (str(here / "v o c"), str(here / "o"))
    assert lines[1][lines[1].index("--clip") + 1] == str(here / "b32.pt")
    assert str(here / "deeplab.pth") in lines[-3]
    assert "ViT-B/16" in shell("run_voc.sh", VOC="v", METHOD="vpl", where=here)[1][0]


def test_at_a_time_limit_the_script_waits_for_its_stage(tmp_path):
    """Slurm ends what bash has started once bash is gone."""
    (tmp_path / "stage.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(143)))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n")
    line = f"source {ROOT}/setup.sh; OUT=$0 DATA=$0 stage $0/stage.py; echo after"
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    bash = subprocess.Popen(["bash", "-c", line, tmp_path], env={**os.environ, "PATH": path}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    while bash.stdout.readline() != "begun\n":
        assert bash.poll() is None
    os.killpg(bash.pid, signal.SIGTERM)
    assert bash.communicate(timeout=60)[0] == "saved\n" and bash.returncode == 143


# ---------------------------------------------------------------- the lines, done on a stand-in of VOC

TRAIN = {"2007_000032": [0, 14], "2007_000063": [11, 8], "2008_000008": [19]}     # id -> its classes
VAL = {"2007_000033": [0]}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """VOC's tree with four images, and CLIPs with OpenAI's names, widths and sizes, two blocks deep."""
    labels = {**TRAIN, **VAL}
    root = make_folder(tmp_path_factory.mktemp("voc") / "VOC2012", labels, classes=folders.VOC_CLASSES)
    (root / "Annotations").mkdir()
    for id, classes in labels.items():
        names = "".join(f"<object><name>{folders.VOC_CLASSES[k]}</name></object>" for k in classes)
        (root / "Annotations" / f"{id}.xml").write_text(f"<annotation>{names}</annotation>")
    for name in ("labels.txt", "classes.txt"):
        (root / name).unlink()
    for split, ids in (("train", TRAIN), ("train_aug", TRAIN), ("val", VAL)):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(ids))
    for patch in (32, 16):
        model = CLIP(512, 224, 2, 768, patch, 77, 49408, 512, 8, 2)
        torch.save(model.half().state_dict(), root / f"{patch}.pt")
    return root


@pytest.mark.parametrize("method", ["semples", "vpl"])
def test_voc_runs(shell, stand_in, tmp_path, method):
    """With networks of full size, for a few steps."""
    more = {"CLIP32": stand_in / "32.pt", "CLIP16": stand_in / "16.pt", "START": "none", "LOOK": 1}
    flags, out = ["--device", "cpu", "--amp", "off", "--workers", "0"], tmp_path / "out"
    _, lines = shell("run_voc.sh", *flags, VOC=stand_in, OUT=out, METHOD=method, **more)
    for words in lines:
        done = call(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert len(np.load(out / "cam/2007_000063.npy")) == 2 and (out / "report.html").exists()
