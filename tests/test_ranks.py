"""Any number of processes gives the same numbers: the short form of tests/rigs/processes.py."""
import math

import numpy as np
import pytest
import torch
from conftest import rows
from PIL import Image

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
