"""What the README and the manual pages tell people to type: the toy run for real, every other command down to its flags."""
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from PIL import Image

from plumbing import folders, masks
from wsss import clip_model

STAGES = sorted(path.name for path in ROOT.glob("*.py"))


def commands(text):
    """Command lines of the fenced bash blocks of a README, or the indented ones of a docstring; continued lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S) or [text]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if re.match(r"\s*(python|torchrun|([A-Z]+=\S+ )*bash) ", line)]


TEXT = (ROOT / "README.md").read_text()
README = commands(TEXT)
MANUALS = [line for name in STAGES for line in commands(ast.get_docstring(ast.parse((ROOT / name).read_text())))]


@pytest.mark.parametrize("line", [line for line in dict.fromkeys(README + MANUALS) if ".py" in line])
def test_the_flags_of_every_command_exist(line, monkeypatch):
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", [script, *words[words.index(script) + 1:]])
    assert importlib.import_module(".".join(Path(script).with_suffix("").parts)).parse() is not None       # bench/eval.py is bench.eval


def test_every_stage_shows_how_it_is_run():
    for name in STAGES:
        assert any(name in line for line in MANUALS), name


def test_the_suite_is_what_ci_runs():
    assert "bash run_tests.sh" in README and "run_tests.sh" in (ROOT / ".ci/run").read_text()


RECORDER = """#!/usr/bin/env bash
# A python that writes down the stages it is asked to run, a line each, and does everything else.
case "$1" in *.py) printf '%q ' "$@" >> "$RECORD"; echo >> "$RECORD";; *) exec {python} "$@";; esac
"""


def test_the_toy_run(tmp_path):
    """`bash run_voc.sh` as a stranger types it, without a VOC, on few pictures: run_toy.sh's stages in its order, in this process (27 starts would take 90 seconds)."""
    assert "bash run_voc.sh" in README
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(RECORDER.format(python=sys.executable))
    (tmp_path / "bin/python3").chmod(0o755)
    env = {**os.environ, "LOOK": "1", "DATA": str(tmp_path / "toy"), "OUT": str(tmp_path / "out"), "RECORD": str(tmp_path / "stages"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    env.pop("VOC", None)
    done = subprocess.run(["bash", "run_voc.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "look at" in done.stdout and "no VOC given" in done.stdout, done.stdout + done.stderr
    stages = [shlex.split(line) for line in (tmp_path / "stages").read_text().splitlines()]
    assert len(stages) > 20 and all(done.stdout.count(f"== {script}") for script, *_ in stages)
    for script, *flags in stages:
        done = call(script, *flags)
        assert done.returncode == 0, (script, flags, done.stderr)
    out = tmp_path / "out"
    assert all((out / f"{name}.pt").exists() for name in ("cls", "match", "prompts", "refine")) and len(list((out / "cam_refine").glob("*.npy"))) == 24
    assert len(list((out / "pseudo").glob("*.png"))) == 24 and (out / "eval_pseudo_train.json").exists()
    assert (out / "report.html").exists() and (out / "seg.pt").exists() and len(list((out / "pred/val").glob("*.png"))) == 8 and (out / "eval_seg_val.json").exists()
    assert all((out / "vpl" / name).exists() for name in ("prototypes.pt", "seg.pt", "eval_cam_vision_train.json", "eval_cam_text_soft_train.json", "eval_seg_val.json"))
    assert all((out / f"eval_cam_{source}_train.json").exists() and (out / f"sheets/cam_{source}_0.png").exists() for source in ("cls", "match", "refine"))


# Appended to the commands of the README, so that each takes a second; everything else is as it stands there.
SMALL = "--device cpu --amp off --workers 0 --batch-size 4"
EPOCHS = "--epochs 1 --crop 32 --min-scale 0.5"
SMALLER = {"train_cls.py": f"{SMALL} {EPOCHS} --generator deit_tiny --backbone none", "train_match.py": f"{SMALL} {EPOCHS} --clip CLIP", "train_prompt.py": f"{SMALL} {EPOCHS} --clip CLIP",
           "train_refine.py": f"{SMALL} {EPOCHS} --clip CLIP", "vpl.py": f"{SMALL} --clip CLIP --steps 5", "make_cam.py": f"{SMALL} --clip CLIP", "make_pseudo.py": SMALL,
           "train_seg.py": f"{SMALL} --init none --iterations 2 --crop 33", "eval.py": SMALL, "report.py": SMALL, "prepare_data.py": ""}


def test_your_own_pictures_in_five_steps(tmp_path, tiny_clip, monkeypatch):
    """The README's walk-through, line by line: pictures, labels.txt, classes.txt; no list and no mask."""
    steps = TEXT.split("## Your own pictures")[1].split("\n## ")[0]
    layout = steps.split("```")[1].splitlines()
    left, right = zip(*((line[:20].strip(), line[20:].strip()) for line in layout[1:] if line.startswith("    ")))
    (tmp_path / "mine/JPEGImages").mkdir(parents=True)
    (tmp_path / "mine/classes.txt").write_text("".join(f"{name}\n" for name in left if name))
    (tmp_path / "mine/labels.txt").write_text("".join(f"{line}\n" for line in right if line))
    (tmp_path / "photos").mkdir()
    for folder, name, size in (("mine/JPEGImages", "IMG_0001.jpg", (90, 60)), ("mine/JPEGImages", "IMG_0002.png", (60, 80)), ("mine/JPEGImages", "IMG_0003.JPG", (64, 64)),
                                              ("photos", "new.jpg", (70, 50)), ("photos", "tall.png", (40, 96))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / folder / name)
    monkeypatch.chdir(tmp_path)
    lines = commands(steps)
    assert len(lines) == 15 and folders.Folder("mine").classes == ["train", "person"] and folders.Folder("mine").ids("train") == ["IMG_0001", "IMG_0002", "IMG_0003"]
    for line in lines:
        script, *flags = shlex.split(line)[1:]
        smaller = SMALLER[script].replace("CLIP", str(tiny_clip)).split()
        if script == "train_seg.py" and "clip_decoder" in line:
            smaller += ["--clip", str(tiny_clip), "--width", "16"]
        elif script == "train_seg.py":
            smaller += ["--model", "deeplab_toy"]
        done = call(script, *flags, *smaller)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if script == "prepare_data.py":
            assert "no problems, no warnings" in done.stdout
    for out in (tmp_path / "runs/mine", tmp_path / "runs/mine_vpl"):
        for name, size in (("new", (70, 50)), ("tall", (40, 96))):
            mask, overlay = (Image.open(out / "pred/photos" / f"{name}.{kind}") for kind in ("png", "jpg"))
            assert mask.size == size and overlay.width == size[0] and masks.load_mask(out / "pred/photos" / f"{name}.png").max() <= 2
    assert "mine_vpl" in (tmp_path / "runs/mine/report.html").read_text()


def test_the_piece_to_copy(tiny_clip, monkeypatch):
    """The README's snippet gives SemPLeS's first loss, with a gradient for the maps."""
    monkeypatch.setattr(clip_model, "load_clip", lambda name, device, load=clip_model.load_clip: load(tiny_clip, device))
    snippet = TEXT.split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    raw = torch.rand(3, 4, 5, requires_grad=True)
    names = {"device": "cpu", "classes": ["train", "boat"], "maps": raw, "images": torch.rand(2, 3, 16, 16), "b": torch.tensor([0, 0, 1]), "k": torch.tensor([0, 1, 1]), "torch": torch, "F": F}
    exec(snippet, names)
    names["loss"].backward()
    assert names["loss"].item() > 0 and raw.grad.abs().sum() > 0 and torch.isfinite(raw.grad).all()
