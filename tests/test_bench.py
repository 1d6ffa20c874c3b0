"""The benchmarks: what is timed side by side computes the same, and what is timed are the stages' own loops.
"""
import copy
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, ROOT, call, refused

from bench import gpu, inputs, maps, scale, steps, tables
from plumbing import checkpoints, networks
from wsss import clip_model, generator, texts


def tiny_generator(classes, sharp=30):
    """A small DeiT whose maps are not even."""
    torch.manual_seed(0)
    S = generator.DeiT(classes, drop_path=0, **networks.TINY)
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


def test_maps_by_autograd_and_one_by_one_are_ours():
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

    S = tiny_generator(5, sharp=1).eval().requires_grad_(False)
    images, k = torch.rand(3, 3, 40, 56), torch.tensor([[0, 3], [1, 2], [2, 4]])
    wanted = maps.one_by_one(S, images, k, [1.0, 1.2])
    assert wanted.shape == (3, 2, 40, 56) and wanted.amax() > 0.99
    for batch in (1, 2):
        found = maps.in_batches(S, images, k, [1.0, 1.2], batch)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_all_of_a_device_in_one_table(tmp_path, monkeypatch, capsys):
    """On tiny networks; interrupted, it goes on with what is left, and every part is in the table."""
    out = ["--device", "cpu", "--out", tmp_path, "--parts-only"]
    assert call("bench.gpu", *out, "--minutes", "1e-9").returncode == 0
    parts = gpu.parts(gpu.Bench("cpu"))
    assert not (tmp_path / "gpu.json").exists() and len(parts) > 10
    monkeypatch.setattr(gpu, "matrix_peak", lambda bench: {"tflops": 0.5})
    assert call("bench.gpu", *out).returncode == 0
    first = (tmp_path / "gpu.json").read_text()
    text = call("bench.gpu", *out).stdout                     # nothing is measured again
    assert (tmp_path / "gpu.json").read_text() == first
    part = json.loads(first)
    del part["CRF"]
    part["(c) off"] = {"error": "no memory"}                  # only these two are measured, and then told
    (tmp_path / "gpu.json").write_text(json.dumps(part))
    assert call("bench.gpu", *out).returncode == 0
    again = json.loads((tmp_path / "gpu.json").read_text())
    assert again.keys() == json.loads(first).keys() and "seconds" in again["(c) off"]
    assert again["(a) off"] == json.loads(first)["(a) off"]
    (tmp_path / "gpu.json").write_text(json.dumps({**part, "machine": {"name": "another GPU"}}))
    assert call("bench.gpu", *out).returncode == 1
    assert all(f"| {name} |" in text for name in parts)
    row = next(line for line in text.splitlines() if line.startswith("| (a) off |")).split(" | ")
    found = json.loads(first)["(a) off"]
    rate = found["gflop"] / 1e3 / found["seconds"]
    assert float(row[1]) == pytest.approx(1e3 * found["seconds"], rel=0.01)
    assert float(row[4]) == pytest.approx(rate, rel=0.01)
    assert float(row[5].split()[0]) == pytest.approx(200 * rate, abs=0.06)
    hours = next(line for line in text.splitlines() if line.startswith("| (a), 60 epochs |")).split(" | ")
    assert float(hours[1]) == pytest.approx(60 * 10582 * found["seconds"] / 4 / 3600
                                            * (0.15 + 0.85 * 1.55 / 1.5), rel=0.01)


def test_the_gpu_script_says_what_it_lacks(tmp_path):
    """A bare python; --pack is for where there is a connection."""
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench/gpu.sh", tmp_path / "bench")
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "bench/gpu.sh"], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(tmp_path / "python3")})
    refused(done, "gpu.sh: this python lacks clip", "bash bench/gpu.sh --pack")


@pytest.mark.parametrize("name,flags,columns", [
    ("crf", "--backends torch --workers 1 --images 3 --size 24 32 --many 40 --small 12 16", [1]),
    ("eval", "--images 2 --size 24 32 --runs 1", [1, 2]),
    ("prototypes", "--pixels 100 200 --runs 1", [3, 4]),
    ("input", "--workers 0 --samples 8 --step-rate 4", [2])])
def test_a_bench_measures_something(name, flags, columns, monkeypatch, capsys):
    bench = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    bench.main()
    table = capsys.readouterr().out.split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert rows and all(float(row[n].replace(",", "")) > 0 for row in rows for n in columns)


def test_what_is_timed_are_the_steps_and_images_of_the_stages(tiny_clip, tmp_path, monkeypatch):
    """A clock that moves by 3 seconds each time it is read: twice."""
    inputs.make_folder(tmp_path / "data", (32, 32), [[0, 3], [5]])
    checkpoints.save(tmp_path / "S.pt", model=tiny_generator(inputs.CLASSES).state_dict())
    readings = iter(range(0, 100, 3))
    monkeypatch.setattr(tables, "clock", lambda device: next(readings))
    shared = ["--data", tmp_path / "data", "--out", tmp_path, "--split", "train", "--device", "cpu"]
    start = ["--init", tmp_path / "S.pt"]
    for script in ("train_match.py", "train_prompt.py"):
        ready = inputs.Ready(size=2, pairs=3, steps=2, crop=16)
        assert ready.seconds_of(script, *shared, *start, "--clip", tiny_clip) == 3 / 2
    stages = {"make_cam.py": [*start, "--workers", 0, "--sheets", 0],
              "make_pseudo.py": ["--workers", 0, "--no-crf"], "eval.py": ["--what", "cam"]}
    for script, more in stages.items():
        assert scale.loop_seconds(script, [*shared, *more]) == 3
