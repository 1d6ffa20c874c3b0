"""The way out of a script, Ctrl-C and SIGTERM, and the lock of what is being written."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import held

from plumbing import checkpoints, guard

# ---------------------------------------------------------------- the way out

def raise_in_loader():
    """As a DataLoader hands over what its worker raised: the traceback as text."""
    try:
        raise ValueError("pic.jpg is torn: replace it")
    except ValueError:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()


def leave(main, monkeypatch, capsys):
    """Runs `main` as x.py. -> (exit code, what it says)"""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as leaving:
        guard.run(main)
    code, said = leaving.value.code, capsys.readouterr().err
    return (1, f"{code}\n") if isinstance(code, str) else (code, said)


@pytest.mark.parametrize("main,code,line", [
    (raise_in_loader, 1, "x.py: pic.jpg is torn: replace it\n"),
    (lambda: checkpoints.load("gone/cls.pt"), 1,
     "x.py: gone/cls.pt is missing: run train_cls.py first (README.md has the order)\n"),
    (lambda: open("/proc/no/such", "w"), 1, "x.py: /proc/no/such: No such file or directory; "
                                            "check that the folder exists, is writable and has room\n")])
def test_the_way_out_is_one_line(main, code, line, monkeypatch, capsys):
    assert leave(main, monkeypatch, capsys) == (code, line)


@pytest.mark.parametrize("bug,kind", [
    (lambda: json.loads("{"), json.JSONDecodeError), (lambda: torch.ones(2) @ torch.ones(3), RuntimeError)])
def test_a_bug_keeps_its_traceback(bug, kind):
    with pytest.raises(kind):
        guard.run(bug)


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_unless_it_finishes_something_first(number, monkeypatch, capsys):
    done = []

    def at_once():
        signal.raise_signal(number)
        done.append("went on")

    def held_back():
        with guard.STOP.hold():
            signal.raise_signal(number)
            done.append("whole")
        done.append("went on")

    def after_the_last_step():
        guard.STOP.later = True
        signal.raise_signal(number)

    for main in (at_once, held_back, after_the_last_step):
        code, line = leave(main, monkeypatch, capsys)
        assert code == 128 + number and "x.py: interrupted" in line
    assert done == ["whole"]


# ---------------------------------------------------------------- one run at a time

TRY = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

def test_a_claim_is_a_lock_that_names_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/here/train_cls.py"])
    lock = tmp_path / "out/.cls.pt.lock"
    guard.claim(tmp_path / "out/cls.pt")
    guard.claim(tmp_path / "out/cls.pt")
    assert subprocess.run([sys.executable, "-c", TRY, lock], capture_output=True).returncode == 1
    assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename} (train_cls.py)"
    guard.release()
    assert not lock.exists() and not guard.HELD


def test_what_another_process_holds_is_refused_until_it_ends(tmp_path):
    with held(tmp_path / "cls.pt") as holder:
        with pytest.raises(ValueError, match=re.escape(f"cls.pt is being written by {holder}: wait for")):
            guard.claim(tmp_path / "cls.pt")
    assert (tmp_path / ".cls.pt.lock").exists()                    # it was killed, and left its lock behind
    guard.claim(tmp_path / "cls.pt")
    guard.release()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(guard.fcntl, "lockf", no_locks)
    guard.claim(tmp_path / "cls.pt")
    assert ".cls.pt.lock: No locks available" in capsys.readouterr().err and not guard.HELD
