"""The benchmarks: what is timed side by side computes the same, and the tables say what was measured."""
import copy
import importlib
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, ROOT

from bench import crf, inputs, maps, prototypes, scale, steps, tables
from bench import eval as scores
from plumbing import checkpoints, networks
from wsss import clip_model, generator, texts

DEIT = generator.DeiT
NAMES = sorted(path.stem for path in (ROOT / "bench").glob("[a-z]*.py") if "def main()" in path.read_text())


# ---------------------------------------------------------------- equal work

def tiny_generator(classes, sharp=30):
    """A small DeiT whose maps are not even."""
    torch.manual_seed(0)
    S = DEIT(classes, drop_path=0, **networks.TINY)
    for name, value in S.state_dict().items():
        if name.endswith(("qkv.weight", "ead.weight")):
            value *= sharp
    return S


@pytest.mark.parametrize("row", ["a", "b fresh crops", "b stored", "c"])
def test_plain_and_here_have_the_same_loss_and_gradients(row, tiny_clip):
    S, vectors = tiny_generator(3), torch.rand(3, 30, 64)
    images, labels = torch.rand(3, 3, 16, 16), inputs.multi_hot([[0, 1], [], [0]], 3)     # class 2: nowhere
    found = []
    for side, step in zip(steps.SIDES, steps.ROWS[row]):
        clip = clip_model.load_clip(tiny_clip).model
        made = steps.SIDES[side](clip, copy.deepcopy(S), vectors, texts.class_texts(CLASSES))
        loss = getattr(made, step)(images, labels)
        loss.backward()
        trained = [w for group in made.optimizers[step].param_groups for w in group["params"]]
        found.append((loss.detach(), [w.grad for w in trained]))
    (plain, plain_gradients), (here, gradients) = found
    torch.testing.assert_close(plain, here)
    assert len(plain_gradients) == len(gradients) == (1 if row[0] == "b" else 8)
    for wanted, gradient in zip(plain_gradients, gradients):
        largest = wanted.abs().max().item()
        assert largest > 1e-6                                 # similarities are not clamped
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * largest)


def test_autograd_makes_our_maps():
    clip = maps.sharp_clip(embed_dim=24, image_resolution=32, vision_layers=10, vision_width=128,
                           vision_patch_size=8)
    columns = F.normalize(torch.randn(inputs.CLASSES + maps.BACKGROUNDS, 24), dim=-1)
    image, k = torch.rand(1, 3, 40, 56), torch.tensor([1, 4, 7])
    wanted = maps.here(clip, image, columns, k)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    for network in (True, False):
        found = maps.by_autograd(clip, image, columns, k, network)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    assert not any(p.requires_grad for p in clip.parameters())


@torch.no_grad()
def test_maps_one_by_one_are_those_of_a_batch():
    S = tiny_generator(5, sharp=1).eval()
    images, k = torch.rand(3, 3, 40, 56), torch.tensor([[0, 3], [1, 2], [2, 4]])
    wanted = maps.one_by_one(S, images, k, [1.0, 1.2])
    assert wanted.shape == (3, 2, 40, 56) and wanted.amax() > 0.99
    for batch in (1, 2, 3):
        found = maps.in_batches(S, images, k, [1.0, 1.2], batch)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stride", [1, 4])
def test_one_pass_over_maps_is_a_pass_a_threshold(stride, tmp_path):
    present = scores.make_inputs(tmp_path, 4, stride, (48, 64))
    found = scores.in_one_pass(tmp_path)
    assert found.shape == (20, 21, 21) and torch.equal(found, scores.pass_by_pass(tmp_path, present))
    assert (found.sum((1, 2)) == found[0].sum()).all() and found[0, 0, 0] < found[19, 0, 0]


# ---------------------------------------------------------------- measuring

def test_pairs_are_dealt_out():
    assert inputs.deal(4, 7, 5) == [[0, 1], [2, 3], [4, 0], [1]]
    assert inputs.multi_hot([[0, 2], []], 3).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("script", ["train_match.py", "train_prompt.py"])
def test_the_time_of_a_step_is_that_of_the_steps_after_the_first(script, tiny_clip, tmp_path, monkeypatch):
    """A clock that moves by 3 seconds each time it is read."""
    inputs.make_folder(tmp_path / "data", (32, 32), [[0]])
    checkpoints.save(tmp_path / "S.pt", model=tiny_generator(inputs.CLASSES).state_dict())
    readings = iter(range(0, 100, 3))
    monkeypatch.setattr(tables, "clock", lambda device: next(readings))
    ready = inputs.Ready(size=2, pairs=3, steps=2, crop=16)
    values = ["--data", tmp_path / "data", "--out", tmp_path, "--split", "train", "--device", "cpu"]
    assert ready.seconds_of(script, *values, "--clip", tiny_clip, "--init", tmp_path / "S.pt") == 3 / 2
    assert next(readings) == 6                                # read twice


def test_the_time_of_an_image_is_that_of_the_stages_loop(tmp_path, monkeypatch):
    inputs.make_folder(tmp_path / "data", (32, 24), [[0, 3], [5]])
    checkpoints.save(tmp_path / "S.pt", model=tiny_generator(inputs.CLASSES).state_dict())
    readings = iter(range(0, 100, 3))
    monkeypatch.setattr(tables, "clock", lambda device: next(readings))
    shared = ["--data", tmp_path / "data", "--out", tmp_path, "--split", "train", "--device", "cpu"]
    maps = ["--init", tmp_path / "S.pt", "--workers", 0, "--sheets", 0]
    assert scale.loop_seconds("make_cam.py", [*shared, *maps]) == 3
    assert scale.loop_seconds("make_pseudo.py", [*shared, "--workers", 0, "--no-crf"]) == 3
    assert scale.loop_seconds("eval.py", [*shared, "--what", "cam"]) == 3


def test_speed_and_growth_of_masks():
    rows = [(pid, 100.0 + n * (pid == 2), float(n), 50.0) for n in range(100) for pid in (1, 2)]
    assert crf.speed(rows) == 198 / 99                        # 99 s; the first image of a process is left out
    worker, main_process = crf.growth(rows)
    assert worker == (100 + 6.5, 100 + 94.5) and main_process == (50, 50)


# ---------------------------------------------------------------- tables

def test_the_table_of_steps(tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "random_clip", lambda: clip_model.load_clip(tiny_clip).model)
    monkeypatch.setattr(generator, "DeiT", tiny_generator)
    monkeypatch.setattr(steps, "SIZE", 16)
    monkeypatch.setattr(steps.Bench, "peak", lambda bench, side, step: {"plain": 2, "here": 1}[side])
    monkeypatch.setattr(sys, "argv", "steps --batch 1 --pairs 2 --rounds 1".split())
    steps.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == list(steps.ROWS)
    for row in rows:
        assert len(row) == 10 and float(row[1]) >= float(row[2]) and row[6:8] == ["2.00", "1.00"]


def test_views_weigh_the_encoding_by_their_share_of_the_epochs():
    found = {("here", "prompt"): (70, [16.0], 5), ("here", "stored"): (10, [1.0], 4)}
    steps.add_views(found)
    assert found["here", "views"] == (18, [3.0], 5)           # 8 of 60 epochs encode


def test_a_table_of_the_descent():
    lines = prototypes.make_table([(40, 8, 5)], 1, "cpu").splitlines()
    assert lines[2].startswith("| 40 | 8 | 5 |")


def test_a_table_goes_between_its_marks(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("A\n<!-- bench.x -->\nold\n<!-- end -->\nB\n<!-- bench.y -->\nkept\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGE", page)
    table = tables.markdown(["n", "s"], [[1, "2.0"]])
    tables.show("bench.x", False, table, "3 runs.")
    assert "old" in page.read_text()
    tables.show("bench.x", True, table, "3 runs.")
    text = page.read_text()
    assert re.fullmatch(r"A\n<!-- bench.x -->\n.*torch .*\. 3 runs\.\n\n\| n \| s \|\n\| --- \| --- \|\n"
                        r"\| 1 \| 2\.0 \|\n<!-- end -->\nB\n<!-- bench.y -->\nkept\n<!-- end -->\n", text)
    assert capsys.readouterr().out.count("| 1 | 2.0 |") == 2
    with pytest.raises(ValueError, match="has no lines <!-- bench.z -->"):
        tables.put(page, "bench.z", table)


def test_turns_and_ratios():
    calls = []
    times = tables.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b"] and [len(turns) for turns in times.values()] == [2, 2]
    assert tables.ratio([2, 9, 4], [1, 3, 1]) == 3
    assert tables.gflop(lambda: torch.rand(100, 200) @ torch.rand(200, 50)) == 2 * 100 * 200 * 50 / 1e9


# ---------------------------------------------------------------- the page and the list

@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_its_place_on_the_page(name):
    assert f"<!-- bench.{name}" in tables.PAGE.read_text()


def test_the_list_of_benchmarks(capsys):
    importlib.import_module("bench.__main__")
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [f"bench.{n}" for n in NAMES]
