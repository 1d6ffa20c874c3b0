"""Any number of processes gives the same numbers: the short form of tests/rigs/processes.py."""
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, call, make_folder, rows
from PIL import Image

from plumbing.networks import new_generator
from tests.rigs import launch
from tests.rigs import processes as rig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rig.make_world(root / "world", root / "world.txt")
    return root


@pytest.mark.parametrize("split,processes,names", [
    ("train", 2, ["cls_deit", "match", "prompts_views", "refine", "vpl"]),      # batches of 2 + 1 images
    ("few", 4, ["match", "cam_vision", "pseudo", "seg_decoder", "eval_decoder", "eval_cam"]),
    ("bare", 2, ["match", "prompts"])])                                         # no pair at all
def test_processes_compute_what_one_does(world, split, processes, names):
    found = rig.agreement(world, split, [processes], names)
    assert set(names) <= found.keys()
    assert rig.show(split, found) == 0
    losses = [row["loss"] for row in rows(world / split / str(processes) / "match/match.jsonl")]
    assert (len(set(losses)) > 1) == (split != "bare")                          # it trained


AGENT = """
source ./setup.sh
spread=1
stage train_match.py --data "$DATA" --out "$OUT" "$@"
"""

AT_THE_END = """
import atexit
from pathlib import Path
def show():
    print("left at the end:", *(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
atexit.register(show)
"""


def test_two_machines_are_one(world, tmp_path, tiny_clip):
    """Two torchrun agents find each other and give the numbers of one process; gloo's threads end with it."""
    flags = ["--clip", str(tiny_clip), *("--split train --device cpu --workers 0 --epochs 2 --batch-size 2 "
                                         "--crop 32 --drop-path 0 --log-every 1").split()]
    make_folder(tmp_path / "data")
    cls = new_generator("deit_tiny_toy", len(CLASSES), "none").state_dict()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save({"stage": "cls", "model": cls, "classes": CLASSES, "args": {"pool": "max", "inputs": {}}},
                   tmp_path / name / "cls.pt")
    head = f"127.0.0.1:{launch.free_port() - 1}"              # the first stage meets at the port after it
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "sitecustomize.py").write_text(AT_THE_END)
    shared = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "NODES": "2", "HEAD": head,
              "OMP_NUM_THREADS": "1", "DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "two")}
    command = ["bash", "-c", AGENT, "setup.sh", *flags]
    agents = [subprocess.Popen(command, env={**shared, "NODE": node}, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
              for node in "01"]
    try:
        for agent in agents:
            text = agent.communicate(timeout=120)[0]
            assert agent.returncode == 0, text
            assert "gloo" not in text and ("left at the end: " in text or not os.path.exists("/proc"))
    finally:
        for agent in agents:                                  # bash and what it has started
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    one = ["--data", tmp_path / "data", "--out", tmp_path / "one"]
    assert call("train_match.py", *one, *flags).returncode == 0
    found = rig.compare(tmp_path / "one", tmp_path / "two")
    assert found["weights"] < 1e-5 and found["log"] < 1e-5 and len(rows(tmp_path / "two/match.jsonl")) == 4


def test_what_differs_is_found(tmp_path):
    for name, value in (("one", 0.5), ("other", 0.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(f'{{"args": 1}}\n{{"seconds": {value}, "loss": {value}}}\n')
        torch.save({"model": torch.tensor(4 * value), "args": {"lr": value}}, tmp_path / name / "x.pt")
        np.save(tmp_path / name / "a.npy", np.full((1, 2, 2), value if name == "one" else np.nan))
        Image.fromarray(np.eye(4, 5) > value).save(tmp_path / name / "a.png")
    (tmp_path / "one/eval.json").write_text('{"miou": 0.5}')
    found = rig.compare(tmp_path / "one", tmp_path / "other")
    assert found == {"log": 0.25, "weights": 0.5, "masks": 0, "scores": math.inf, "maps": math.inf}
    assert not any(rig.compare(tmp_path / "one", tmp_path / "one").values())
