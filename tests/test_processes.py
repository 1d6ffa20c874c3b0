"""Three and four processes against one, on a split of two pictures; what the benchmark that says so would notice; memory of many steps."""
import gc
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, call, make_folder, run

from plumbing import checkpoints, masks

sys.path.append(str(ROOT / "bench"))
import processes  # noqa: E402

STAGES = ["cls_deit", "match_clims", "prompt_views", "refine_joint", "vpl", "cam_vision", "segments", "pseudo", "seg_deeplab", "seg_decoder", "eval_decoder", "eval_cam"]


def test_three_and_four_processes_share_two_pictures_as_one():
    """Losses, weights, maps, masks and scores; most processes have no picture at all."""
    done = run("bench/processes.py", "--splits", "few", "--processes", 1, 3, 4, "--only", *STAGES)
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| "))}
    assert {"cls_deit", "vpl", "pseudo", "seg_decoder", "eval_decoder"} <= table.keys() and all(len(cells) == 3 and all(cells) for cells in table.values())
    assert table["vpl"][0] == "log, weights, maps" and table["few"] == ["compared", "3 processes", "4 processes"]


def test_what_differs_is_found(tmp_path):
    def results(name):
        (tmp_path / name / "cam").mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_text('{"args": 1}\n{"step": 1, "seconds": %f, "loss": 2.0}\n' % len(name))
        torch.save({"model": {"w": torch.ones(3)}, "stage": "x", "args": {"lr": len(name)}}, tmp_path / name / "x.pt")
        np.save(tmp_path / name / "cam/a.npy", np.zeros((1, 2, 2), np.float16))
        masks.save_mask(tmp_path / name / "a.png", np.zeros((4, 5)))
        (tmp_path / name / "eval.json").write_text(json.dumps({"miou": 0.5, "iou": {"cow": None}, "protocol": {"pictures": len(name)}}))
        return tmp_path / name

    one, other = results("one"), results("other")
    same = dict.fromkeys(("log", "weights", "maps", "masks", "scores"), 0)
    assert processes.compare(one, other) == same
    (other / "x.jsonl").write_text('{"args": 1}\n{"step": 1, "seconds": 1, "loss": 2.5}\n')
    torch.save({"model": {"w": torch.tensor([1, 1, 1.5])}}, other / "x.pt")
    masks.save_mask(other / "a.png", np.eye(4, 5))
    (other / "eval.json").write_text('{"miou": 0.75, "iou": {"cow": 1.0}}')
    np.save(other / "cam/a.npy", np.full((1, 2, 2), np.nan))
    found = processes.compare(one, other)
    assert (found["log"], found["weights"], found["masks"], found["scores"]) == (0.25, 0.5, 4, math.inf) and found["maps"] == math.inf
    (other / "cam/a.npy").unlink()
    assert processes.compare(one, other)["maps"] == math.inf


def held():
    """What this process holds: bytes of tensors, Python objects, open files, children."""
    gc.collect()
    objects = gc.get_objects()
    tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter)}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(tensors.values()), len(objects), len(os.listdir("/proc/self/fd")), len(children)


def test_nothing_stays_from_epoch_to_epoch(tmp_path, tiny_clip, monkeypatch):
    """After the sixth epoch of twelve, when all that is made once has been made, and after the last."""
    make_folder(tmp_path / "data")
    saves, seen, save_state, out = [], [], checkpoints.save_state, tmp_path / "out"

    def save_and_look(*args):
        save_state(*args)
        saves.append(1)
        if len(saves) in (4, 6, 12):                                             # the first look makes things of its own
            seen.append(held())

    monkeypatch.setattr(checkpoints, "save_state", save_and_look)
    shared = ["--data", tmp_path / "data", "--out", out, "--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--batch-size", "2"]
    train = ["--crop", "16", "--clip", tiny_clip, "--epochs", "12"]
    assert call("train_cls.py", *shared, "--generator", "cnn_toy", "--backbone", "none", "--epochs", "1", "--crop", "16").returncode == 0
    for script, *flags in (("train_match.py", *train), ("train_prompt.py", *train, "--views", "2"),
                           ("train_seg.py", "--model", "segmenter_toy", "--init", "none", "--crop", "32", "--iterations", "24", "--save-every", "2",
                            "--label-dir", tmp_path / "data/SegmentationClass")):
        saves.clear(), seen.clear()
        assert call(script, *shared, *flags).returncode == 0
        _, (tensors, objects, *others), (tensors_now, objects_now, *others_now) = seen
        assert len(saves) == 12 and others == others_now and objects_now - objects < 10, (script, seen)            # twelve steps
        assert tensors_now - tensors < 50_000, (script, seen)                                                      # some batches hold more pairs than others
