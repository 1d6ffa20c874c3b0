"""Kills, locks and disks: nothing finished is lost, nothing half-written is left, one run at a time writes,
and every failure is one line that names the file."""
import os
import signal

import pytest
import torch
from conftest import call, held, make_folder, refused, rows

from plumbing import checkpoints, files, log
from tests.rigs import faults, launch

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]
TRAIN = ["--generator", "cnn_toy", "--backbone", "none", "--crop", "24", "--batch-size", "2", "--epochs", "2",
         "--log-every", "1", "--save-every", "1"]
OWN = {"train_cls.py": TRAIN, "make_cam.py": ["--source", "cls", "--sheets", "2"],
       "make_pseudo.py": ["--no-crf"]}


def words(world, script, out, *more):
    return ["--data", world / "data", "--out", out, *SHARED, *OWN.get(script, []), *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and the maps and masks of a generator that was hardly trained."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    for script in OWN:
        done = call(script, *words(root, script, root / "out"))
        assert done.returncode == 0, done.stderr
    return root


def outputs(world, out, *names):
    """An output folder with some of what the world's has."""
    out.mkdir()
    for name in names:
        (out / name).symlink_to(world / "out" / name)
    return out


# ---------------------------------------------------------------- kills

def test_killed_stages_end_as_undisturbed_ones(tmp_path):
    """The short form of tests/rigs/faults.py: twice SIGKILL, SIGTERM and Ctrl-C at random moments."""
    toy, check, cls, *rest = faults.stages(tmp_path)
    cam = next(line for line in rest if line[0] == "make_cam.py")
    found = faults.attack([toy, [*cls, "--epochs", "10"], cam], tmp_path, 6, ["train_cls.py", "make_cam.py"])
    assert [row["script"] for row in found] == ["make_toy.py", "train_cls.py", "make_cam.py"]
    assert all(sum(row[name] for row in found) == 2 for name in faults.SIGNALS)
    assert not [(row["script"], name) for row in found for name in faults.COUNTS if row[name]]
    steps = [row["step"] for row in rows(tmp_path / "killed/out/cls.jsonl")]
    assert steps == list(range(1, 61))


def main():
    """Training in which the second rank, and no other, hears SIGTERM in step 3."""
    import train_cls
    add, steps = log.Meter.add, []

    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    log.Meter.add = strike
    train_cls.main()


def test_a_signal_to_one_rank_stops_all_at_one_step(world, tmp_path):
    output, out = tmp_path / "output.txt", tmp_path / "out"
    long = words(world, "train_cls.py", out, "--epochs", "50", "--save-every", "1000")
    assert launch.together([("test_faults", *long)], output, 2) == [143, 143]
    assert output.read_text().count("interrupted; step 3 is saved in") == 1, output.read_text()
    state = torch.load(out / "cls.last.pt", weights_only=True)
    assert (state["step"], len(state["random"])) == (3, 2)
    assert len(rows(out / "cls.jsonl")) == 3 and not list(out.rglob(".*"))
    output.unlink()
    with held(out / "cls.pt") as holder:
        assert all(launch.together([("train_cls.py", *long)], output, 2))
    assert f"cls.pt is being written by {holder}" in output.read_text()


# ---------------------------------------------------------------- one run at a time

@pytest.mark.parametrize("script,claimed,more", [
    ("train_cls.py", "cls.pt", []), ("vpl.py", "prototypes.pt", []), ("make_cam.py", "cam", []),
    ("make_pseudo.py", "pseudo", []), ("eval.py", "eval_cam_train.json", ["--what", "cam"])])
def test_a_second_run_into_one_place_is_refused_and_touches_nothing(world, tmp_path, script, claimed, more):
    out = tmp_path / "out"
    with held(out / claimed) as holder:
        done = call(script, *words(world, script, out, *more, "--no-resume"))
        refused(done, f"{out / claimed} is being written by {holder}: wait for it", "another --out")
        assert os.listdir(out) == [f".{claimed}.lock"]


# ---------------------------------------------------------------- disks


def full(path):
    """A disk on which `path` has no room: what is written beside it first goes to /dev/full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.part").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
@pytest.mark.parametrize("script,needs,name", [
    ("train_cls.py", [], "cls.jsonl"), ("train_cls.py", [], "cls.last.pt"), ("train_cls.py", [], "cls.pt"),
    ("make_cam.py", ["cls.pt"], "cam/a_4.npy"), ("make_cam.py", ["cls.pt"], "cam.json")])
def test_a_full_disk_names_the_file_and_keeps_others(world, tmp_path, monkeypatch, script, needs, name):
    out = outputs(world, tmp_path / "out", *needs)
    path, opened, save_json = out / name, checkpoints.open_folder, files.save_json

    def open_folder(*args, **facts):                                   # sweeps what is left of killed runs
        opened(*args, **facts)
        if path.suffix == ".npy":
            full(path)

    def save_summary(written, content):
        if written == path:
            full(path)
        save_json(written, content)

    monkeypatch.setattr(checkpoints, "open_folder", open_folder)
    monkeypatch.setattr(files, "save_json", save_summary)
    if path.suffix in (".pt", ".jsonl"):
        full(path)
    refused(call(script, *words(world, script, out)), f"{path}: No space left on device", "has room")
    assert not path.exists() and not list(out.rglob(".*"))
    monkeypatch.undo()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("a_*")}
    assert bool(kept) == (script == "make_cam.py")
    assert call(script, *words(world, script, out)).returncode == 0 and path.exists()
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
