"""Processes, whole files, checkpoints, resume, log: values against one process, against an uninterrupted run, under a kill."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run

from plumbing import checkpoints, files, flags, guard, log as logs, processes


def arguments(out, **more):
    args = flags.parser("doc").parse_args(["--data", "nowhere", "--out", str(out), "--device", "cpu", "--amp", "off"])
    return argparse.Namespace(**{**vars(args), **more})


# ---------------------------------------------------------------- flags

def test_flags_are_typed_and_help_needs_nothing():
    p = flags.parser("what it does", batch_size=64)
    args = p.parse_args(["--data", "a", "--out", "b", "--no-resume"])
    assert args.batch_size == 64 and args.out == Path("b") and args.resume is False and args.split == "train_aug"
    assert "what it does" in p.format_help() and "(default: None)" not in p.format_help()
    for wrong in (["--batch-size", "0"], ["--workers", "-1"], ["--amp", "half"], ["--seed", "1.5"]):
        with pytest.raises(SystemExit):
            p.parse_args(["--data", "a", "--out", "b", *wrong])


def test_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--device"):
        processes.Env(arguments(tmp_path, device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            processes.Env(arguments(tmp_path, device="cuda"))


@pytest.mark.parametrize("amp,dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_and_inert_scaler(tmp_path, amp, dtype):
    env = processes.Env(arguments(tmp_path, amp=amp))
    with env.autocast():
        assert (torch.ones(256, 256) @ torch.ones(256, 256)).dtype == dtype
    assert env.scaler().is_enabled() is False and env.scaler().scale(torch.tensor(3.0)) == 3


# ---------------------------------------------------------------- processes

DDP = """
    import argparse, sys, torch
    from pathlib import Path
    from plumbing import checkpoints, files, flags, guard, log as logs, processes
    args = flags.parser("").parse_args(["--data", "x", "--out", sys.argv[1], "--device", "cpu", "--amp", "off"])
    env = processes.Env(args)
    x = torch.arange(18.).view(9, 2) / 10
    share = [x[:2], x[2:], x[9:]][env.rank]                   # nine pairs, unevenly; the third rank has none
    torch.manual_seed(env.rank)                               # DDP must broadcast rank 0's weights
    model = torch.nn.Linear(2, 1)
    if env.rank == 0:
        torch.nn.init.constant_(model.weight, .5), torch.nn.init.constant_(model.bias, .1)
    model = env.parallel(model)
    loss = processes.mean(model(share)[:, 0] ** 2)
    loss.backward()
    shown = env.sum(loss.detach() / env.world)
    counts = env.sum(torch.full((2, 2), 2**53 + env.rank, dtype=torch.int64))
    shards = env.shard(range(10))
    seen = env.sum(torch.tensor([len(shards), sum(shards)]))
    torch.manual_seed(100 + env.rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    checkpoints.save_state(args.out / "state.pt", model, optimizer, schedule, env.scaler(), 1, 2, args)
    env.barrier()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    where = checkpoints.load_state(args.out / "state.pt", model, optimizer, schedule, env.scaler(), args)
    assert where == (1, 2) and torch.equal(torch.rand(1), drawn)      # every rank has its own noise back
    if env.main:
        grads = [p.grad.flatten().tolist() for p in model.parameters()]
        files.save_json(args.out / "found.json", {"loss": shown.item(), "grads": grads, "counts": counts.tolist(), "seen": seen.tolist()})
    env.close()
"""


def test_three_uneven_processes_give_the_mean_and_gradient_of_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    run(script, tmp_path, processes=3)
    found = json.loads((tmp_path / "found.json").read_text())
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, .5), torch.nn.init.constant_(model.bias, .1)
    loss = processes.mean(model(torch.arange(18.).view(9, 2) / 10)[:, 0] ** 2)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert np.allclose(sum(found["grads"], []), [*model.weight.grad[0].tolist(), model.bias.grad.item()], atol=1e-6)
    assert found["counts"] == [[3 * 2**53 + 3] * 2] * 2        # exact beyond float64
    assert found["seen"] == [10, 45]                           # shards: disjoint, exhaustive


def test_mean_of_no_pairs_has_a_gradient():
    w = torch.ones(2, requires_grad=True)
    loss = processes.mean((torch.zeros(0, 2) @ w))
    loss.backward()
    assert loss.item() == 0 and w.grad.tolist() == [0, 0]


# ---------------------------------------------------------------- whole files

def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.save_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.save_json(path, {"a": object()})
    with pytest.raises(RuntimeError), files.atomic(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_save_is_whole_under_a_kill(tmp_path):
    """A process that does nothing but save is killed at 8 moments: what lies there always loads and is one of the versions saved."""
    path = tmp_path / "match.pt"
    code = f"""
import sys, torch; sys.path.insert(0, {str(ROOT)!r})
from plumbing import checkpoints, files, flags, guard, log as logs, processes
n = 0
while True:
    n += 1
    checkpoints.save({str(path)!r}, stage="match", model={{"w": torch.full((400_000,), float(n))}}, n=n)
    print(n, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    for wait in range(8):                                      # read while it writes
        time.sleep(0.013 * (wait + 1))
        state = torch.load(path, weights_only=True)
        assert (state["model"]["w"] == state["n"]).all()
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(path, weights_only=True)
    assert (state["model"]["w"] == state["n"]).all() and state["n"] > 1


def test_a_full_disk_is_one_line(tmp_path):
    """The file size limit of the process stands in for the full disk: the write fails half-way with an OSError."""
    script = tmp_path / "big.py"
    script.write_text(textwrap.dedent(f"""
        import resource, signal, sys, torch
        from plumbing import checkpoints, files, flags, guard, log as logs, processes
        def main():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            checkpoints.save({str(tmp_path / "cls.pt")!r}, stage="cls", model=torch.zeros(1_000_000))
        guard.run(main)
    """))
    refused(run(script, check=False), "cls.pt", "has room")
    assert sorted(os.listdir(tmp_path)) == ["big.py"]


# ---------------------------------------------------------------- checkpoints

def test_load_says_what_to_run(tmp_path):
    path = tmp_path / "match.pt"
    with pytest.raises(FileNotFoundError, match="run train_match.py first"):
        checkpoints.load(path)
    checkpoints.save(path, stage="match", classes=["a", "b"], args={}, model={})
    assert checkpoints.load(path, "match", ["a", "b"])["stage"] == "match"
    with pytest.raises(ValueError, match="'match', 'refine' is needed: run train_refine.py"):
        checkpoints.load(path, "refine")
    with pytest.raises(ValueError, match="other classes"):
        checkpoints.load(path, "match", ["a", "c"])
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="no stage"):
        checkpoints.load(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoints.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"stage": "match", "x": Bomb()}, tmp_path / "match.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoints.load(tmp_path / "match.pt")
    assert not Path("bombed").exists()


def test_weights_load_strictly(tmp_path):
    model = torch.nn.Linear(2, 3)
    checkpoints.load_weights(model, torch.nn.Linear(2, 3).state_dict(), "x.pt")
    for wrong in ({"weight": torch.zeros(3, 2)}, torch.nn.Linear(3, 3).state_dict(), {**model.state_dict(), "extra": torch.zeros(1)}):
        with pytest.raises(ValueError, match="x.pt does not fit"):
            checkpoints.load_weights(model, wrong, "x.pt")


def test_finished_is_only_for_the_same_recipe(tmp_path):
    args = arguments(tmp_path, lambda_b=2.4)
    path = tmp_path / "match.pt"
    assert not checkpoints.finished(path, args)
    checkpoints.save(path, stage="match", classes=[], model={}, args=flags.plain(args))
    assert checkpoints.finished(path, args)
    assert checkpoints.finished(path, arguments(tmp_path, lambda_b=2.4, workers=0, data=Path("moved")))
    with pytest.raises(ValueError, match=r"--lambda-b 2.4 \(now 0.75\)"):
        checkpoints.finished(path, arguments(tmp_path, lambda_b=0.75))
    assert not checkpoints.finished(path, arguments(tmp_path, lambda_b=0.75, resume=False))


# ---------------------------------------------------------------- resume

def train(out, steps, stop=None, **more):
    """Eight noisy steps; `stop`: leaves after that many, as a kill would, having saved at every step."""
    args = arguments(out, **more)
    env = processes.Env(args)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = env.scaler()
    _, done = checkpoints.load_state(out / "x.last.pt", model, optimizer, schedule, scaler, args)
    for step in range(done, steps):
        if step == stop:
            return None
        noise = torch.rand(3, 4) + random.random() + np.random.rand()
        scaler.scale(model(noise).square().mean()).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad(), schedule.step()
        checkpoints.save_state(out / "x.last.pt", model, optimizer, schedule, scaler, 0, step + 1, args)
    return model.state_dict()


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = train(tmp_path / "a", 8)
    assert train(tmp_path / "b", 8, stop=3) is None
    torch.rand(5), random.random()
    resumed = train(tmp_path / "b", 8)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    with pytest.raises(ValueError, match="--seed 0"):
        train(tmp_path / "b", 8, seed=1)
    again = train(tmp_path / "b", 8, seed=1, resume=False)
    assert not torch.equal(again["0.weight"], whole["0.weight"])


def test_log_reads_as_if_never_interrupted(tmp_path):
    args = arguments(tmp_path)
    env = processes.Env(args)
    log = logs.Log(tmp_path / "x.jsonl", args, env)
    for step in (1, 2, 3):
        log(step, loss=torch.tensor(step / 3), note="fine")
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                          # killed while writing
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text().replace('"step": 2, "seconds": 0.0', '"step": 2, "seconds": 90'))
    log = logs.Log(tmp_path / "x.jsonl", args, env, step=2)
    log(3, loss=7)                                             # the clock goes on too
    head, *rows = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert head["args"]["out"] == str(tmp_path) and head["versions"]["torch"] == torch.__version__ and "commit" in head["versions"]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 0.333333), (2, 0.666667), (3, 7)] and [r["seconds"] for r in rows] == [0, 90, 90]


# ---------------------------------------------------------------- the way out

def own_words():
    raise ValueError("numbers are off:\ngive others")


def worker():
    """As a DataLoader hands over what its worker raised: the traceback as text."""
    try:
        raise ValueError("pic.jpg is torn: replace it")
    except ValueError:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("main,code,line", [
    (own_words, 1, "x.py: give others\n"),
    (worker, 1, "x.py: pic.jpg is torn: replace it\n"),
    (lambda: checkpoints.load("gone/cls.pt"), 1, "x.py: gone/cls.pt is missing: run train_cls.py first (README.md has the order)\n"),
    (lambda: open("/proc/no/such", "w"), 1, "x.py: /proc/no/such: No such file or directory; check that the folder exists, is writable and has room\n"),
    (interrupted, 130, "\nx.py: interrupted; nothing finished is lost: run the same command again\n"),
])
def test_the_way_out_is_one_line(main, code, line, monkeypatch, capsys):
    monkeypatch.setattr(files, "ROOT", Path(__file__).parent)                # this file plays the script
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as leaving:
        guard.run(main)
    assert leaving.value.code == code and capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(json.JSONDecodeError):
        guard.run(lambda: json.loads("{"))


# ---------------------------------------------------------------- a pool of processes

def square(x):
    return x * x


def leave(x):
    os._exit(3) if x == 2 else None


@pytest.mark.parametrize("workers", [0, 2])
def test_pool_draws_tasks_when_there_is_room(workers):
    drawn, given = [], []
    tasks = ((drawn.append(x) or x,) for x in range(12))
    for result in processes.pooled(square, tasks, workers, "there"):
        given.append(result)
        assert len(drawn) - len(given) <= 2 * workers
    assert sorted(given) == [x * x for x in range(12)]


def test_a_dead_process_of_the_pool_is_one_line():
    with pytest.raises(ValueError, match="^there: a worker process died.*fewer --workers"):
        list(processes.pooled(leave, ((x,) for x in range(5)), 2, "there"))


def test_a_dead_loader_process_is_one_line(capsys):
    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(SystemExit) as leaving:
        guard.run(main)
    assert "a loader process died" in str(leaving.value) and "fewer --workers" in str(leaving.value)


def test_a_folder_in_out_is_a_name():
    assert flags.name("cam_2") == "cam_2"
    for wrong in ("", "a/b", "..", ".hidden", "a\\b"):
        with pytest.raises(argparse.ArgumentTypeError, match="no name"):
            flags.name(wrong)


def test_mean_over_some_of_the_values():
    values, where = torch.tensor([[1., 2.], [3., float("nan")]]), torch.tensor([[True, False], [True, False]])
    assert processes.mean(values, where).item() == 2 and processes.mean(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0


def test_a_folder_that_is_not_ours_is_known_by_its_files_and_a_name_by_nothing(tmp_path, monkeypatch):
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet/a.png").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)                                                     # where a folder has the name of weights to download
    assert checkpoints.inputs(start="imagenet", masks=Path("imagenet"), cam=Path("none")) == {"start": None, "masks": files.folder_fingerprint(tmp_path / "imagenet"), "cam": None}
    (tmp_path / "imagenet/recipe.json").write_text('{"fingerprint": "ours"}')
    assert checkpoints.inputs(masks=Path("imagenet")) == {"masks": "ours"}


def test_a_folder_belongs_to_the_script_that_made_it(tmp_path, monkeypatch):
    """Another script, and files without a recipe or with a foreign one, are refused even with --no-resume; nothing of theirs goes."""
    folder, env = tmp_path / "cam", processes.Env(arguments(tmp_path))
    claim = lambda script, **more: (monkeypatch.setattr(sys, "argv", [f"/here/{script}"]), checkpoints.open_folder(folder, arguments(tmp_path, **more), env, ()))
    claim("make_cam.py")
    (folder / "a.npy").write_bytes(b"map")
    claim("make_cam.py")
    for resume in (True, False):
        with pytest.raises(ValueError, match="cam holds what make_cam.py made: make_segments.py writes to a folder of its own"):
            claim("make_segments.py", resume=resume)
    for foreign in ("{}", None):
        (folder / "recipe.json").write_text(foreign) if foreign else (folder / "recipe.json").unlink()
        with pytest.raises(ValueError, match="cam holds what another program made"):
            claim("make_cam.py", resume=False)
    assert (folder / "a.npy").read_bytes() == b"map"
    (folder / "a.npy").unlink()
    claim("make_cam.py")                                                            # empty, it is nobody's
    (folder / "a.npy").write_bytes(b"map")
    claim("make_cam.py", resume=False)
    assert not (folder / "a.npy").exists()


@pytest.mark.parametrize("extra", ["x/constants.pkl", "CONSTANTS.PKL"])
def test_only_the_file_that_makes_torchscript_passes_for_it(tmp_path, extra):
    """torch goes by the exact name at the top; under another one the tensors are read, and must be asked for their sizes."""
    checkpoints.save(tmp_path / "good.pt", stage="cls", model={"w": torch.ones(3)})
    assert checkpoints.sound(tmp_path / "good.pt") == tmp_path / "good.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for part in good.infolist():
            content = good.read(part)
            bad.writestr(part.filename, content[:4] if part.filename.endswith("data/0") else content)
        bad.writestr(f"{good.namelist()[0].split('/')[0]}/{extra}", b"")
    with pytest.raises(ValueError, match="bad.pt: not a checkpoint of plain tensors .a tensor in it is larger"):
        checkpoints.sound(tmp_path / "bad.pt")
