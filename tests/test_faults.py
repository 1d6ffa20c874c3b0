"""Kills, locks and disks: nothing finished is lost, nothing half-written is left, one run at a time writes,
and every failure is one line that names the file."""
import json
import os
import signal

import pytest
import torch
from conftest import LABELS, call, held, make_folder, refused, rows, run

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


def test_torchrun_shows_the_refusal_as_the_root_cause(world, tmp_path):
    with held(tmp_path / "cls.pt") as holder:
        done = run("train_cls.py", *words(world, "train_cls.py", tmp_path), processes=2, check=False)
    assert done.returncode != 0
    assert f"cls.pt is being written by {holder}" in done.stderr.split("Root Cause")[1]


# ---------------------------------------------------------------- one run at a time

@pytest.mark.parametrize("script,claimed,more", [
    ("train_cls.py", "cls.pt", []), ("train_match.py", "match.pt", []), ("train_prompt.py", "prompts.pt", []),
    ("train_refine.py", "refine.pt", []), ("vpl.py", "prototypes.pt", []), ("train_seg.py", "seg.pt", []),
    ("make_cam.py", "maps", ["--cam", "maps"]), ("make_pseudo.py", "masks", ["--pseudo", "masks"]),
    ("eval.py", "eval_cam_train.json", ["--what", "cam"])])
def test_a_second_run_into_one_place_is_refused_and_touches_nothing(world, tmp_path, script, claimed, more):
    out = tmp_path / "out"
    with held(out / claimed) as holder:
        done = call(script, *words(world, script, out, *more, "--no-resume"))
        refused(done, f"{out / claimed} is being written by {holder}: wait for it", "another --out")
        assert os.listdir(out) == [f".{claimed}.lock"]


def test_other_maps_are_made_beside(world, tmp_path):
    out = outputs(world, tmp_path / "out", "cls.pt")
    with held(out / "cam"):
        done = call("make_cam.py", *words(world, "make_cam.py", out, "--cam", "second", "--limit", "1"))
    assert done.returncode == 0 and sorted(os.listdir(out / "second")) == ["a_1.npy", "recipe.json"]


# ---------------------------------------------------------------- disks

def test_a_folder_where_nothing_can_be_written_is_one_line(world):
    for out in ("/proc/out", "/sys/out"):                              # read-only even for root
        for script in OWN:
            refused(call(script, *words(world, script, out)), f": {out}", "is writable")


def full(path):
    """A disk on which `path` has no room: what is written beside it first goes to /dev/full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.part").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
@pytest.mark.parametrize("script,needs,name,more", [
    ("train_cls.py", [], "cls.jsonl", []), ("train_cls.py", [], "cls.last.pt", []),
    ("train_cls.py", [], "cls.pt", []), ("make_cam.py", ["cls.pt"], "cam/recipe.json", []),
    ("make_cam.py", ["cls.pt"], "cam/a_4.npy", []),
    ("make_cam.py", ["cls.pt"], "cam.json", []), ("make_pseudo.py", ["cam"], "pseudo/a_4.png", []),
    ("eval.py", ["pseudo"], "eval_pseudo_train.json", ["--what", "pseudo"])])
def test_a_full_disk_names_the_file_and_keeps_others(world, tmp_path, monkeypatch, script, needs, name, more):
    out = outputs(world, tmp_path / "out", *needs)
    path, opened, save_json = out / name, checkpoints.open_folder, files.save_json

    def open_folder(*args, **facts):                                   # sweeps what is left of killed runs
        opened(*args, **facts)
        if path.stem == "a_4":
            full(path)

    def save_recipe(written, content):
        if written == path:
            full(path)
        save_json(written, content)

    monkeypatch.setattr(checkpoints, "open_folder", open_folder)
    monkeypatch.setattr(files, "save_json", save_recipe)
    if path.suffix in (".pt", ".jsonl"):
        full(path)
    refused(call(script, *words(world, script, out, *more)), f"{path}: No space left on device", "has room")
    assert not path.exists() and not list(out.rglob(".*"))
    monkeypatch.undo()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("a_*")}
    assert bool(kept) == (path.stem == "a_4" or name == "cam.json")
    assert call(script, *words(world, script, out, *more)).returncode == 0 and path.exists()
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


# ---------------------------------------------------------------- what decides whether a stage runs again

def test_recipes_and_files_before_a_stage_decide_whether_it_runs_again(world, tmp_path):
    out, script = outputs(world, tmp_path / "out", "cls.pt"), "make_cam.py"
    assert call(script, *words(world, script, out)).returncode == 0
    refused(call(script, *words(world, script, out, "--stride", "4")), "made with --stride 1 (now 4)")
    (out / "cls.pt").unlink()
    content = torch.load(world / "out/cls.pt", weights_only=True)
    content["model"]["head.weight"] += 1
    torch.save(content, out / "cls.pt")
    refused(call(script, *words(world, script, out)), "cam was made with other weights")
    assert call(script, *words(world, script, out, "--no-resume")).returncode == 0
    summary = json.loads((out / "cam.json").read_text())
    assert summary["args"]["amp"] == "off" and len(list((out / "cam").glob("*.npy"))) == len(LABELS)
