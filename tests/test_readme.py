"""What the README and the manual pages tell people to type: the toy run for real, every other command down to its flags."""
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, call

STAGES = sorted(path.name for path in ROOT.glob("*.py"))


def commands(text):
    """Command lines of the fenced bash blocks of a README, or the indented ones of a docstring; continued lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S) or [text]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if re.match(r"\s*(python|torchrun|([A-Z]+=\S+ )*bash) ", line)]


README = commands((ROOT / "README.md").read_text())
MANUALS = [line for name in STAGES for line in commands(ast.get_docstring(ast.parse((ROOT / name).read_text())))]


@pytest.mark.parametrize("line", [line for line in dict.fromkeys(README + MANUALS) if ".py" in line and not line.startswith("python bench")])
def test_the_flags_of_every_command_exist(line, monkeypatch):
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", [script, *words[words.index(script) + 1:]])
    module = importlib.import_module(script.removesuffix(".py"))
    assert module.parse() is not None


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
