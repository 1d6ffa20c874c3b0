"""Any number of processes gives the same numbers: the short form of tests/rigs/processes.py."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import rows

from plumbing import masks
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
    assert rig.show(split, found, [processes]) == 0
    losses = [row["loss"] for row in rows(world / split / str(processes) / "match/match.jsonl")]
    assert (len(set(losses)) > 1) == (split != "bare")                          # it trained


def test_what_differs_is_found(tmp_path):
    def results(name):
        folder = tmp_path / name
        (folder / "cam").mkdir(parents=True)
        row = {"step": 1, "seconds": len(name), "loss": 2.0}
        (folder / "x.jsonl").write_text(f'{{"args": 1}}\n{json.dumps(row)}\n')
        torch.save({"model": {"w": torch.ones(3)}, "stage": "x", "args": {"lr": len(name)}}, folder / "x.pt")
        np.save(folder / "cam/a.npy", np.zeros((1, 2, 2), np.float16))
        masks.save_mask(folder / "a.png", np.zeros((4, 5)))
        score = {"miou": 0.5, "iou": {"cow": None}, "protocol": {"images": len(name)}}
        (folder / "eval.json").write_text(json.dumps(score))
        return folder

    one, other = results("one"), results("other")
    assert rig.compare(one, other) == dict.fromkeys(("log", "weights", "maps", "masks", "scores"), 0)
    (other / "x.jsonl").write_text('{"args": 1}\n{"step": 1, "seconds": 1, "loss": 2.5}\n')
    torch.save({"model": {"w": torch.tensor([1, 1, 1.5])}}, other / "x.pt")
    masks.save_mask(other / "a.png", np.eye(4, 5))
    (other / "eval.json").write_text('{"miou": 0.75, "iou": {"cow": 1.0}}')
    np.save(other / "cam/a.npy", np.full((1, 2, 2), np.nan))
    found = rig.compare(one, other)
    assert found == {"log": 0.25, "weights": 0.5, "masks": 4, "scores": math.inf, "maps": math.inf}
    (other / "cam/a.npy").unlink()
    assert rig.compare(one, other)["maps"] == math.inf
