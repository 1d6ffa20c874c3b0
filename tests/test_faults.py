"""Kills, locks and disks: nothing finished is lost, nothing half-written is left, one run at a time writes, and every failure is one line that names the file."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import LABELS, ROOT, call, make_folder, refused, run

from plumbing import checkpoints, files, flags as flag_types, guard, log as logs, maps as map_files, masks, processes
from wsss import gradcam

SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0"]
TRAIN = ["--generator", "cnn_toy", "--backbone", "none", "--crop", "24", "--batch-size", "2", "--epochs", "2", "--log-every", "1", "--save-every", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and the maps and masks of a generator that was hardly trained."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    for script in ("train_cls.py", "make_cam.py", "make_pseudo.py"):
        done = call(script, *flags(root, script, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def flags(world, script, out, *more):
    own = {"train_cls.py": TRAIN, "make_cam.py": ["--source", "cls", "--sheets", "2"], "make_pseudo.py": ["--no-crf"]}.get(script, [])
    return ["--data", world / "data", "--out", out, *SHARED, *own, *more]


def outputs(world, out, *names):
    """An output folder with some of what the world's has."""
    out.mkdir()
    for name in names:
        (out / name).symlink_to(world / "out" / name)
    return out


def hidden(folder):
    return list(folder.rglob(".*"))


# ---------------------------------------------------------------- kills

SHORT = """
    import sys
    sys.path.insert(0, "bench")
    import faults
    all_stages = faults.stages
    faults.stages = lambda out: [line for line in all_stages(out) if line[0] in ("make_toy.py", "train_cls.py") or line[0] == "make_cam.py" and "cam_cls" in line]
    sys.argv = ["faults.py", "--kills", "6", "--out", sys.argv[1]]
    faults.main()
"""


def test_killed_stages_end_as_undisturbed_ones(tmp_path):
    """bench/faults.py on three stages: twice SIGKILL, SIGTERM and Ctrl-C at random moments, then the same files bit for bit, nothing done twice."""
    script = tmp_path / "short.py"
    script.write_text(textwrap.dedent(SHORT))
    done = run(script, tmp_path / "faults", check=False)
    assert done.returncode == 0 and "| all | 3 |" in done.stdout, done.stdout + done.stderr
    rows = json.loads((tmp_path / "faults/faults.json").read_text())
    assert all(sum(row[name] for row in rows.values()) == 2 for name in ("SIGKILL", "SIGTERM", "Ctrl-C"))
    log = (tmp_path / "faults/killed/out/cls.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log[1:]] == list(range(1, len(log))) and len(log) > 100


PAIR = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import train_cls
    from plumbing import checkpoints, files, flags as flag_types, guard, log as logs, masks, processes
    add, steps = logs.Meter.add, []
    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
    logs.Meter.add = strike
    sys.argv += ["--backbone", "none"]                          # which torchrun would take for a flag of its own
    guard.run(train_cls.main)
"""


def test_a_signal_to_one_rank_stops_all_at_one_step_and_a_refusal_is_the_root_cause(world, tmp_path):
    script, out = tmp_path / "train_cls.py", tmp_path / "out"
    script.write_text(textwrap.dedent(PAIR.format(root=str(ROOT))))
    long = [flag for flag in flags(world, "train_cls.py", out, "--epochs", "50", "--save-every", "1000") if flag not in ("--backbone", "none")]
    done = run(script, *long, processes=2, check=False, timeout=60)
    assert done.returncode != 0 and done.stderr.count("\ntrain_cls.py: interrupted; step 1 of epoch 2 is saved in") == 1, done.stderr
    state = torch.load(out / "cls.last.pt", weights_only=True)
    assert (state["epoch"], state["step"], len(state["rng"])) == (1, 1, 2) and len((out / "cls.jsonl").read_text().splitlines()) == 4 and not hidden(out)
    with held(out / "cls.pt"):
        done = run(script, *long, processes=2, check=False, timeout=60)
    assert done.returncode != 0 and "cls.pt is being written by process" in done.stderr.split("Root Cause")[1], done.stderr
    assert torch.load(out / "cls.last.pt", weights_only=True)["step"] == 1


def test_ctrl_c_while_libraries_load_is_one_line(tmp_path):
    """As soon as the package is there, which is before torch is."""
    code = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['__main__'].__file__ = {str(ROOT / 'make_cam.py')!r}; sys.argv = ['make_cam.py']\n" \
           "import wsss\nassert 'torch' not in sys.modules\nos.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "\nmake_cam.py: interrupted before it began: nothing was changed\n", done.stderr
    for script in ROOT.glob("*.py"):
        lines = [line for line in script.read_text().splitlines() if line.startswith(("import ", "from "))]
        heavy = next(n for n, line in enumerate(lines) if line.split()[1].split(".")[0] in ("numpy", "torch", "PIL", "torchvision", "tqdm"))
        assert any(line.startswith("import wsss") for line in lines[:heavy]), script


def test_a_signal_is_heard_where_no_exception_passes(capsys):
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def main():
        Last()
        time.sleep(5)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as leaving:
        guard.run(main)
    assert leaving.value.code == 143 and "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------- one run at a time

def hold(path, ready):
    """What a second run does, until it is killed."""
    guard.HELD.clear()
    guard.claim(path)
    ready.set()
    signal.pause()


class held:
    """Another process that has claimed `path`. Killed at the end, it leaves its lock behind."""

    def __init__(self, path):
        self.ready = multiprocessing.get_context("fork").Event()
        self.process = multiprocessing.get_context("fork").Process(target=hold, args=(path, self.ready))

    def __enter__(self):
        self.process.start()
        assert self.ready.wait(10)
        return self.process.pid

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


@pytest.mark.parametrize("script,claimed,more", [
    ("train_cls.py", "cls.pt", TRAIN), ("train_match.py", "match.pt", []), ("train_prompt.py", "prompts.pt", []), ("train_refine.py", "refine.pt", []),
    ("vpl.py", "prototypes.pt", []), ("train_seg.py", "seg.pt", []), ("make_cam.py", "maps", ["--cam", "maps"]), ("make_pseudo.py", "masks", ["--pseudo", "masks"]),
    ("make_segments.py", "parts", ["--segments", "parts", "--source", "slic"]), ("eval.py", "eval_cam_train.json", ["--what", "cam"]),
    ("report.py", "report.html", []), ("make_toy.py", "toy.json", None)])
def test_a_second_run_into_the_same_place_is_refused_and_touches_nothing(world, tmp_path, script, claimed, more):
    out = tmp_path / "out"
    out.mkdir()
    words = [script, "--out", out, "--train", "1", "--val", "1"] if more is None else [script, "--data", world / "data", "--out", out, *SHARED, *more, "--no-resume"]
    if script == "report.py":
        words.remove("--no-resume")
    with held(out / claimed) as pid:
        line = refused(call(*words), f"{out / claimed} is being written by process {pid} on {os.uname().nodename}", "another --out")
        assert "wait for it" in line and os.listdir(out) == [f".{claimed}.lock"]
    guard.claim(out / claimed)                                                 # of a dead process: taken over in silence
    guard.release()
    assert os.listdir(out) == []


def test_preparing_one_folder_twice_at_once_is_refused(tmp_path):
    root = make_folder(tmp_path / "VOC2012")
    (root / "classes.txt").unlink(), (root / "labels.txt").unlink()
    (tmp_path / "sbd/dataset/cls").mkdir(parents=True)
    for path in (root / "SegmentationClass").glob("*.png"):
        masks.save_mask(path, np.zeros((30, 40)))
    with held(root / "SegmentationClassAug"):
        refused(call("prepare_data.py", "voc", "--voc", root, "--sbd", tmp_path / "sbd", "--allow-partial"), "SegmentationClassAug is being written by process")
    assert not (root / "SegmentationClassAug").exists()


def test_other_maps_are_made_beside(world, tmp_path):
    out = outputs(world, tmp_path / "out", "cls.pt")
    with held(out / "cam"):
        assert call("make_cam.py", *flags(world, "make_cam.py", out, "--cam", "second", "--limit", "1")).returncode == 0
    assert len(list((out / "second").glob("*.npy"))) == 1 and os.listdir(out / "second").count("recipe.json") == 1


def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(guard.fcntl, "lockf", no_locks)
    guard.claim(tmp_path / "cls.pt")
    assert ".cls.pt.lock: No locks available" in capsys.readouterr().err and not guard.HELD


# ---------------------------------------------------------------- disks

def full(path):
    """A disk on which `path` has no room: what is written beside it first goes to /dev/full, where no byte fits."""
    path.with_name(f".{path.name}.part").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
@pytest.mark.parametrize("script,needs,name,more", [
    ("train_cls.py", [], "cls.jsonl", []), ("train_cls.py", [], "cls.last.pt", []), ("train_cls.py", [], "cls.pt", []),
    ("make_cam.py", ["cls.pt"], "cam/recipe.json", []), ("make_cam.py", ["cls.pt"], "cam/a_4.npy", []), ("make_cam.py", ["cls.pt"], "cam_psa/a_4.npy", ["--format", "psa"]),
    ("make_cam.py", ["cls.pt"], "sheets/cam_0.png", []), ("make_cam.py", ["cls.pt"], "cam.json", []), ("make_pseudo.py", ["cam"], "pseudo/a_4.png", []),
    ("make_segments.py", [], "segments/a_4.npz", ["--source", "slic"]), ("eval.py", ["pseudo"], "eval_pseudo_train.json", ["--what", "pseudo"]), ("report.py", [], "report.html", [])])
def test_a_full_disk_names_the_file_and_keeps_the_others(world, tmp_path, monkeypatch, script, needs, name, more):
    if script == "make_segments.py":
        pytest.importorskip("skimage")
    out = outputs(world, tmp_path / "out", *needs)
    path, opened = out / name, checkpoints.open_folder
    path.parent.mkdir(exist_ok=True)

    def open_folder(*args, **facts):                                            # which sweeps what is left of killed runs
        if name.endswith("recipe.json"):
            monkeypatch.setattr(files, "save_json", lambda *a, save=files.save_json: (full(path), save(*a)))
        opened(*args, **facts)
        if "/a_4" in name:
            full(path)

    monkeypatch.setattr(checkpoints, "open_folder", open_folder)
    if "/a_4" not in name and not name.endswith("recipe.json"):
        full(path)
    refused(call(script, *flags(world, script, out, *more)), f"{path}: No space left on device", "has room")
    assert not path.exists() and not hidden(out)
    monkeypatch.undo()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("a_*")}
    assert bool(kept) == ("/a_4" in name or name in ("sheets/cam_0.png", "cam.json"))
    assert call(script, *flags(world, script, out, *more)).returncode == 0 and path.exists()
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items() if file.parent.name != "cam_psa")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
def test_a_full_disk_under_a_log_and_under_the_cache_is_named(tmp_path, monkeypatch):
    args = flag_types.parser("").parse_args(["--data", "x", "--out", str(tmp_path), "--device", "cpu", "--amp", "off"])
    log = logs.Log(tmp_path / "x.jsonl", args, processes.Env(args))
    (tmp_path / "x.jsonl").unlink(), (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '.*x.jsonl'"):
        log(1, loss=2.0)
    monkeypatch.setattr(gradcam.uuid, "uuid4", lambda: type("", (), {"hex": "0"}))
    (tmp_path / ".a_2.pt.0.part").symlink_to("/dev/full")
    look = lambda: (torch.zeros(2, 3, 4), torch.zeros(2, 3, 3), (1, 2))
    with pytest.raises(OSError, match="No space left on device: '.*/a_2.pt'"):
        gradcam.stored_inputs(tmp_path, ["a_1", "a_2"], look)
    assert sorted(os.listdir(tmp_path)) == ["a_1.pt", "x.jsonl"]


@pytest.mark.parametrize("script,needs,where,after", [("train_cls.py", [], (checkpoints, "save_state"), 2), ("make_cam.py", ["cls.pt"], (map_files, "save_cam"), 2)])
def test_a_folder_that_vanishes_is_one_line(world, tmp_path, monkeypatch, script, needs, where, after):
    out, calls, save = outputs(world, tmp_path / "out", *needs), [], getattr(*where)

    def vanish(*args):
        save(*args)
        calls.append(args[0])
        if len(calls) == after:
            out.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(*where, vanish)
    line = refused(call(script, *flags(world, script, out)), "No such file or directory", "check that the folder exists")
    assert str(out) in line and not out.exists() and not list((tmp_path / "elsewhere").rglob(".*.part"))
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(out)                                        # it is back
    assert call(script, *flags(world, script, out)).returncode == 0 and not hidden(out)


def test_parts_of_killed_runs_are_swept_and_those_in_use_are_not(world, tmp_path):
    out = outputs(world, tmp_path / "out", "cam")
    (out / "pseudo").mkdir()
    (out / "pseudo/.a_1.png.part").write_bytes(b"half")
    (out / "pseudo/.gone.png.part").write_bytes(b"half")
    assert call("make_pseudo.py", *flags(world, "make_pseudo.py", out)).returncode == 0
    assert not hidden(out) and len(list((out / "pseudo").glob("*.png"))) == len(LABELS)
    args = flag_types.parser("").parse_args(["--data", "x", "--out", str(out), "--device", "cpu", "--amp", "off"])
    checkpoints.open_folder(out / "cache", args, processes.Env(args), (), keep=True)
    (out / "cache/.a_1.pt.1.part").write_bytes(b"being written"), (out / "cache/.a_2.pt.1.part").write_bytes(b"of yesterday")
    os.utime(out / "cache/.a_2.pt.1.part", (1e9, 1e9))
    checkpoints.open_folder(out / "cache", args, processes.Env(args), (), keep=True)
    assert [path.name for path in hidden(out)] == [".a_1.pt.1.part"]
