"""The log of a stage, the means in its lines, and losses that are not finite."""
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, rows

from plumbing import log
from plumbing.processes import Run


def test_resumed_it_reads_as_if_never_interrupted(tmp_path):
    args, path = arguments(tmp_path), tmp_path / "x.jsonl"
    run = Run(args)
    write = log.Log(path, args, run, texts=[["a photo of a cow."]])
    for step in (1, 2, 3):
        write(step, loss=torch.tensor(step / 3), note="fine", epoch=0)
    lines = path.read_text().splitlines()
    lines[2] = re.sub(r'"seconds": [\d.]+', '"seconds": 90', lines[2])
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))                     # killed while writing
    write = log.Log(path, args, run, step=2, texts=[["a photo of a cow."]])
    write(3, loss=7.123456789)
    head, found = log.read_log(path)
    assert head["args"]["out"] == str(tmp_path) and head["world"] == 1
    assert head["texts"] == [["a photo of a cow."]]
    assert head["versions"]["torch"] == torch.__version__ and "commit" in head["versions"]
    assert [(row["step"], row["loss"]) for row in found] == [(1, 0.333333), (2, 0.666667), (3, 7.12346)]
    assert found[0]["seconds"] < 90 <= found[2]["seconds"]                      # the clock goes on too
    assert found == rows(path)
    log.Log(path, args, run)                                                    # from the start: a new log
    assert rows(path) == []


def test_tensorboard_holds_what_the_log_holds(tmp_path, monkeypatch):
    """Of a resumed run, too: what was written after its state is hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    args, path = arguments(tmp_path, tensorboard=True), tmp_path / "x.jsonl"
    for first, last in ((0, 3), (2, 4)):
        write = log.Log(path, args, Run(args), first)
        for step in range(first + 1, last + 1):
            write(step, loss=torch.tensor(step / 4 + first), note="fine", epoch=0)
        write.board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard/x")).Reload()
    found = [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]
    assert found == [(row["step"], row["loss"]) for row in rows(path)]
    assert found == [(1, 0.25), (2, 0.5), (3, 2.75), (4, 3)]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match="TensorBoard is not installed: pip install tensorboard"):
        log.Log(path, args, Run(args))


@pytest.mark.parametrize("content", ["", '{"step": 1, "seconds": 2}\n', "\xff\n"])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match="x.jsonl does not begin with a line of arguments: remove it"):
        log.read_log(tmp_path / "x.jsonl")


# ---------------------------------------------------------------- means

def test_means_over_the_steps_since_the_last_line(tmp_path):
    meter = log.Meter(Run(arguments(tmp_path)))
    for loss, area in ((1., 0.25), (2., 0.5), (6., 0.75)):
        meter.add(torch.tensor([0]), loss=torch.tensor(loss), area=torch.tensor(area, requires_grad=True))
    assert meter.read(["a"]) == {"loss": 3, "area": 0.5}
    meter.add(torch.tensor([0]), loss=torch.tensor(5.), area=torch.tensor(float("nan")))
    found = meter.read(["a"])                                                   # only the loss must be finite
    assert found["loss"] == 5 and found["area"].isnan()


def test_a_loss_that_is_not_finite_names_its_batch(tmp_path):
    bad = float("inf")
    meter, ids = log.Meter(Run(arguments(tmp_path))), [f"id{n}" for n in range(20)]
    for step, loss in enumerate([1., bad, bad]):
        meter.add(torch.arange(3) + 3 * step, loss=torch.tensor(loss))
    message = f"the loss is {bad} on the batch id3, id4, id5, ...: .* lower --lr, or take --amp bf16 or off"
    with pytest.raises(ValueError, match=message):
        meter.read(ids)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_one_rank_sees_stops_both(monkeypatch, rank):
    """Of two ranks the second has a NaN in its second step. Both stop and name its batch: one that went on
    alone would wait for the other for ever."""
    seen = [torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])]
    run = SimpleNamespace(world=2, sum=lambda bad: bad + seen[1 - rank])

    def all_gather_object(found, mine):
        assert json.dumps(mine) == ('[1.0, ["id1"]]' if rank == 0 else '[NaN, ["id11"]]')
        found[:] = [(1.0, ["id1"]), (float("nan"), ["id11"])]

    monkeypatch.setattr(log.dist, "all_gather_object", all_gather_object)
    meter = log.Meter(run)
    for step in range(3):
        loss = float("nan") if seen[rank][step] else 1.0
        meter.add(torch.tensor([10 * rank + step]), loss=torch.tensor(loss))
    with pytest.raises(ValueError, match="the loss is nan on the batch id11, ..."):
        meter.read([f"id{n}" for n in range(20)])
