"""The processes of a run: device, precision, means and sums over ranks; the pool. Ranks run `main`."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, run_together

from plumbing import files, flags, guard, processes
from plumbing.processes import Run

# ---------------------------------------------------------------- several processes

PAIRS = torch.arange(18.).view(9, 2) / 10
SHARES = {1: [PAIRS], 3: [PAIRS[:2], PAIRS[2:], PAIRS[9:]]}      # of three ranks the last has none


def main():
    """In each rank: a DDP model on its share of nine pairs; rank 0 writes what all of them found."""
    out = Path(sys.argv[1])
    run = Run(arguments(out))
    drawn = run.gather(torch.rand(1), run.world)
    share = SHARES[run.world][run.rank]
    model = torch.nn.Linear(2, 1)                                # DDP gives all of them rank 0's weights
    if run.main:
        torch.nn.init.constant_(model.weight, .5)
        torch.nn.init.constant_(model.bias, .1)
    parallel = run.parallel(model)
    loss = run.mean(parallel(share)[:, 0] ** 2)
    loss.backward()
    total, = torch.autograd.grad(run.total(model(share)), model.bias)
    rows = torch.tensor(run.shard([1., 2., 3., 4., 5.]), requires_grad=True)
    together = run.gather(rows, 5)
    (together ** 2).sum().backward()                             # the same loss in every rank
    gradients = run.sum(torch.zeros(5).index_add(0, torch.tensor(run.shard(range(5))), rows.grad))
    first = run.in_turn(lambda: (out / "made").exists() or (out / "made").touch())
    found = {
        "loss": run.sum(loss.detach()).item() / run.world,
        "weight": model.weight.grad[0].tolist(),
        "total": run.sum(total.clone()).item() / run.world,
        "gathered": together.tolist(), "gathered_gradients": (gradients / run.world).tolist(),
        "counts": run.sum(torch.full((2,), 2**53 + 1 + run.rank, dtype=torch.int64)).tolist(),
        "shards": sorted(run.gather(torch.tensor(run.shard(range(10))).float(), 10).tolist()),
        "seeds": len(drawn.unique()), "found_made": run.sum(torch.tensor(first is True).int()).item()}
    if run.main:
        files.save_json(out / "found.json", found)
    run.close()


def test_three_uneven_processes_compute_what_one_does(tmp_path):
    found = {}
    for world in (1, 3):
        (tmp_path / str(world)).mkdir()
        run_together([("test_processes", tmp_path / str(world))], tmp_path, world)
        found[world] = json.loads((tmp_path / str(world) / "found.json").read_text())
    x = PAIRS.double().numpy()
    predicted = x @ [.5, .5] + .1
    for result in found.values():
        assert result["loss"] == pytest.approx((predicted ** 2).mean(), abs=1e-6)
        assert np.allclose(result["weight"], (2 * predicted[:, None] * x).mean(0), atol=1e-6)
        assert result["total"] == 9                                             # of the sum, by the bias
        assert result["gathered"] == [1, 2, 3, 4, 5]
        assert result["gathered_gradients"] == [2, 4, 6, 8, 10]
        assert result["shards"] == list(range(10))                              # disjoint, exhaustive
    assert found[1]["counts"] == [2**53 + 1] * 2
    assert found[3]["counts"] == [3 * 2**53 + 6] * 2                            # exact beyond float64
    assert found[3]["seeds"] == 3 and found[3]["found_made"] == 2               # rank 0 came first


def test_mean_of_some_values_and_of_none(tmp_path):
    run = Run(arguments(tmp_path))
    values = torch.tensor([[1., 2.], [3., float("nan")]])
    assert run.mean(values, torch.tensor([[True, False], [True, False]])) == 2
    assert run.mean(values, torch.zeros(2, 2, dtype=torch.bool)) == 0
    w = torch.ones(2, requires_grad=True)
    loss = run.mean(torch.zeros(0, 2) @ w)
    loss.backward()
    assert loss == 0 and w.grad.tolist() == [0, 0]


def test_a_signal_that_comes_while_ranks_agree_is_for_the_next_step(tmp_path, monkeypatch):
    """The handler runs when the call returns, before its result is read."""
    run, stop = Run(arguments(tmp_path)), guard.Stop()
    monkeypatch.setattr(guard, "STOP", stop)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda *_: setattr(stop, "signal", 15))
    run.world, run.cpu_group = 2, "gloo"
    assert not run.stopping() and stop.signal == 15
    monkeypatch.setattr(processes.dist, "all_reduce", lambda *_: None)
    assert run.stopping() and stop.agreed == 15


# ---------------------------------------------------------------- device, precision, seed

def test_the_precision_of_a_device(tmp_path, monkeypatch, capsys):
    args = arguments(tmp_path, amp="auto")
    assert Run(args).amp == "off" and flags.recipe(args)["amp"] == "off" and not capsys.readouterr().out
    if not torch.cuda.is_available():                         # what auto found is said
        Run(arguments(tmp_path, device="auto"))
        assert capsys.readouterr().out == "on cpu, --amp off\n"
    for capability, precision in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert processes.best_precision(torch.device("cuda")) == precision
    with pytest.raises(ValueError, match="--device abacus: no such device"):
        Run(arguments(tmp_path, device="abacus"))


# ---------------------------------------------------------------- the pool

def square(x):
    return x * x


def fail(x):
    raise ValueError(f"{x}.png is torn")


def die(x):
    if x == 2:
        os._exit(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pool_draws_tasks_when_there_is_room(workers):
    drawn, given = [], []
    tasks = (drawn.append(x) or (x,) for x in range(12))
    for result in processes.pooled(square, tasks, workers, "there"):
        given.append(result)
        assert len(drawn) - len(given) <= 2 * workers
    assert sorted(given) == [x * x for x in range(12)] and (workers or given == sorted(given))


@pytest.mark.parametrize("function,message", [
    (fail, r"^\d.png is torn"), (die, "^there: a worker process died, .* fewer --workers; finished files")])
def test_what_goes_wrong_in_the_pool_is_one_line(function, message):
    with pytest.raises(ValueError, match=message):
        list(processes.pooled(function, [(x,) for x in range(5)], 1, "there"))
