"""Checkpoints, folders of one recipe, and a training run that is interrupted, resumed, refused, broken."""
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, make_folder, rows, same, weights

from plumbing import checkpoints, files, folders, guard, log, processes, samples
from plumbing.processes import Run

# ---------------------------------------------------------------- saving and loading


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_load_runs_no_code_and_says_what_to_run(tmp_path, monkeypatch):
    path = tmp_path / "match.pt"
    with pytest.raises(FileNotFoundError, match="match.pt is missing: run train_match.py first"):
        checkpoints.load(path)
    checkpoints.save(path, stage="match", classes=["a", "b"], args={}, model={})
    assert checkpoints.load(path, "match", ["a", "b"])["stage"] == "match"
    with pytest.raises(ValueError, match="'match', 'refine' is needed: run train_refine.py"):
        checkpoints.load(path, "refine")
    with pytest.raises(ValueError, match=r"other classes \(2: a, b\) than this data folder's \(2: a, c\)"):
        checkpoints.load(path, "match", ["a", "c"])
    for content, message in (({"model": {}}, "no stage"), ({"stage": "match", "args": {}}, "no 'classes'")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"match.pt h.*{message}"):
            checkpoints.load(path)
    monkeypatch.chdir(tmp_path)
    torch.save({"stage": "match", "classes": [], "args": {}, "x": Bomb()}, path)
    for _ in range(2):                                                 # that runs no code, then torn
        with pytest.raises(ValueError, match="not a checkpoint of this project .*run train_match.py again"):
            checkpoints.load(path)
        assert not Path("bombed").exists()
        path.write_bytes(b"PK\x03\x04 torn")


def test_weights_load_strictly(tmp_path):
    model, good = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3).state_dict()
    checkpoints.load_weights(model, good, "x.pt")
    assert same(model.state_dict(), good)
    bias = good["bias"]
    for wrong in ({"bias": bias}, {**good, "weight": torch.ones(3, 3)}, {**good, "more": bias}):
        with pytest.raises(ValueError, match="x.pt does not fit"):
            checkpoints.load_weights(model, wrong, "x.pt")
    with pytest.raises(ValueError, match="x.pt: bias holds NaN or infinity"):
        checkpoints.load_weights(model, {**good, "bias": torch.tensor([1, 2, float("inf")])}, "x.pt")


# ---------------------------------------------------------------- a training run

@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data")                              # five images: an epoch is two steps


def train(data, out, change=None, start=None, **more):
    """Eight noisy steps of a small network, in the shape of a trainer. `change` may spoil or stop a step."""
    args = arguments(out, batch_size=2, workers=0, log_every=2, **more)
    run = Run(args)
    keeper = checkpoints.Keeper(run, args, "cls.pt", start=start)
    if keeper.finished:
        return None
    folder = folders.Folder(data)
    ids = folder.ids("train")
    augment = samples.train_transform(8)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    layers = torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    parallel = keeper.begin(model, optimizer, schedule, loader, 8, texts=[["a cow"], ["a boat"]])
    for images, labels in keeper.steps():
        noise = torch.rand(()) + np.random.rand() + processes.random.random()
        loss = run.mean((parallel(images) + noise - labels).square().flatten())
        loss = change(keeper.done + 1, loss) if change else loss
        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        keeper.after(loss=loss, noise=noise)
    keeper.finish(model=model, classes=folder.classes)
    return weights(out / "cls.pt")


def test_equal_results_are_equal_files(data, tmp_path):
    """What is made of them afterwards knows them by their SHA-256."""
    for name, more in (("one", {}), ("other", {"save_every": 3})):
        train(data, tmp_path / name, **more)
    assert files.sha256(tmp_path / "one/cls.pt") == files.sha256(tmp_path / "other/cls.pt")


def log_of(out):
    """The log without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out / "cls.jsonl")]


class Killed(Exception):
    pass


def kill_at(step, how):
    def change(now, loss):
        if now == step:
            if how == "kill":
                raise Killed
            signal.raise_signal(how)
        return loss
    return change


@pytest.mark.parametrize("how,step", [("kill", 5), (signal.SIGINT, 5), (signal.SIGTERM, 6)])
def test_resumed_is_uninterrupted_bit_for_bit(data, tmp_path, capsys, how, step):
    """States are of step 3 and 6: a kill in step 5 or 6 goes back to 3. A signal saves its own step."""
    train(data, tmp_path / "a", save_every=3)
    with pytest.raises((Killed, SystemExit)):
        guard.run(lambda: train(data, tmp_path / "b", kill_at(step, how), save_every=3))
    saved = 3 if how == "kill" else step
    said = f"interrupted; step {saved} is saved in {tmp_path / 'b/cls.last.pt'}: to go on, run the same"
    assert how == "kill" or said in capsys.readouterr().err
    assert torch.load(tmp_path / "b/cls.last.pt", weights_only=True)["step"] == saved
    assert not (tmp_path / "b/cls.pt").exists()
    guard.run(lambda: train(data, tmp_path / "b", save_every=3))
    assert same(weights(tmp_path / "a/cls.pt"), weights(tmp_path / "b/cls.pt"))
    if how == "kill" or step == 6:                                     # else a line at step 5 is one more
        assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert log.read_log(tmp_path / "b/cls.jsonl")[0]["texts"] == [["a cow"], ["a boat"]]


def test_another_recipe_or_start_is_refused_by_what_differs(data, tmp_path):
    with pytest.raises(Killed):
        train(data, tmp_path / "a", kill_at(5, "kill"), save_every=2, lambda_b=2.4)
    with pytest.raises(ValueError, match=r"cls.last.pt was made with --lambda-b 2.4 \(now 0.75\)"):
        train(data, tmp_path / "a", save_every=2, lambda_b=0.75)
    whole = train(data, tmp_path / "a", lambda_b=2.4)                  # --save-every decides no number
    assert train(data, tmp_path / "a", lambda_b=2.4) is None           # it is finished
    with pytest.raises(ValueError, match=r"cls.pt was made with --seed 0 \(now 1\).*or --no-resume"):
        train(data, tmp_path / "a", lambda_b=2.4, seed=1)
    again = train(data, tmp_path / "a", lambda_b=2.4, seed=1, resume=False)
    assert not torch.equal(again["1.weight"], whole["1.weight"])
    start = tmp_path / "start.pt"
    start.write_bytes(b"one")
    train(data, tmp_path / "b", start=start)
    moved = start.rename(tmp_path / "moved.pt")
    assert train(data, tmp_path / "b", start=moved) is None            # the same file elsewhere
    moved.write_bytes(b"two")
    with pytest.raises(ValueError, match="cls.pt was made from another start file than is there now"):
        train(data, tmp_path / "b", start=moved)


def test_a_damaged_state_is_one_line(data, tmp_path):
    with pytest.raises(Killed):
        train(data, tmp_path / "a", kill_at(3, "kill"), save_every=2)
    path = tmp_path / "a/cls.last.pt"
    state = torch.load(path, weights_only=True)
    for wrong in ({**state, "random": [{"python": None}]}, 5, None):
        if wrong is None:
            path.write_bytes(path.read_bytes()[:-100])
        else:
            torch.save(wrong, path)
        with pytest.raises(ValueError, match="cls.last.pt is damaged .*: remove it, the stage then starts"):
            train(data, tmp_path / "a", save_every=2)


# ---------------------------------------------------------------- what is not finite

def test_a_loss_that_is_not_finite_leaves_the_state_from_before(data, tmp_path):
    """From step 5 on the loss is NaN; a state was due after step 6."""
    whole = train(data, tmp_path / "a", save_every=3)
    with pytest.raises(ValueError, match="the loss is nan on the batch a_., a_., ...: look at these images"):
        train(data, tmp_path / "b", lambda step, loss: loss / 0 * 0 if step >= 5 else loss, save_every=3)
    assert torch.load(tmp_path / "b/cls.last.pt", weights_only=True)["step"] == 3
    assert not (tmp_path / "b/cls.pt").exists()
    assert same(whole, train(data, tmp_path / "b", save_every=3))


def test_weights_that_a_step_breaks_are_not_saved(data, tmp_path):
    """The loss of step 2 is finite, its gradient is not: only the next loss would show it."""
    def break_gradient(step, loss):
        loss.register_hook(lambda gradient: gradient * (float("nan") if step == 2 else 1))
        return loss

    with pytest.raises(ValueError, match="1.weight holds NaN or infinity after step 2, .*: not saved; lower"):
        train(data, tmp_path / "a", break_gradient, save_every=1)
    assert torch.load(tmp_path / "a/cls.last.pt", weights_only=True)["step"] == 1


def test_fp16_leaves_out_steps_whose_gradients_overflow(data, tmp_path):
    """From step 2 on. Each halves the scale and changes neither weights nor optimizer; the schedule
    goes on."""
    def overflow(step, loss):
        loss.register_hook(lambda gradient: gradient * (1 if step == 1 else float("inf")))
        return kill_at(4, "kill")(step, loss)

    with pytest.raises(Killed):
        train(data, tmp_path / "a", overflow, amp="fp16", save_every=1)
    state = torch.load(tmp_path / "a/cls.last.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2**10 / 4 and state["schedule"]["last_epoch"] == state["step"] == 3
    assert {each["step"].item() for each in state["optimizer"]["state"].values()} == {1}


# ---------------------------------------------------------------- folders of many files

def claim(folder, monkeypatch, script="make_cam.py", keep=False, facts=None, **more):
    monkeypatch.setattr(sys, "argv", [f"/here/{script}"])
    args = arguments(folder.parent, **more)
    checkpoints.open_folder(folder, args, Run(args), ("split",), keep=keep, **(facts or {}))


def test_a_folder_belongs_to_the_script_that_made_it(tmp_path, monkeypatch):
    """Another script, and files without a recipe, are refused even with --no-resume."""
    folder = tmp_path / "cam"
    claim(folder, monkeypatch)
    (folder / "a.npy").write_bytes(b"map")
    for more in ({}, {"resume": False}, {"resume": False, "keep": True}):
        with pytest.raises(ValueError, match="cam holds what make_cam.py made: make_segments.py writes to a"):
            claim(folder, monkeypatch, "make_segments.py", **more)
    (folder / "recipe.json").unlink()
    with pytest.raises(ValueError, match="cam holds what another program made"):
        claim(folder, monkeypatch, resume=False, keep=True)
    assert (folder / "a.npy").read_bytes() == b"map"
    (folder / "a.npy").unlink()
    claim(folder, monkeypatch)                                         # empty, it is nobody's


def test_a_folder_is_of_one_recipe_and_of_the_same_facts(tmp_path, monkeypatch):
    """--no-resume sweeps it; with `keep` only what is half-written or of another recipe."""
    folder, facts = tmp_path / "cam", {"classes": ["a", "b"]}
    claim(folder, monkeypatch, facts=facts)
    mark = files.fingerprint(folder)
    for name in ("a.npy", ".b.npy.part"):
        (folder / name).write_bytes(b"map")
    (tmp_path / "cam.json").write_text("{}")
    claim(folder, monkeypatch, facts=facts, split="val", workers=0, keep=True, resume=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.npy", "cam", "recipe.json"]
    assert files.fingerprint(folder) == mark
    with pytest.raises(ValueError, match=r"cam was made with --seed 0 \(now 1\)"):
        claim(folder, monkeypatch, facts=facts, seed=1)
    with pytest.raises(ValueError, match=r"cam was made with other classes \(2: a, b, now 1: a\)"):
        claim(folder, monkeypatch, facts={"classes": ["a"]})
    claim(folder, monkeypatch, facts={"classes": ["a"]}, resume=False, keep=True)
    assert files.fingerprint(folder) != mark
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cam", "recipe.json"]
