"""The way out of a script, Ctrl-C and SIGTERM, and the lock of what is being written."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import held

from plumbing import checkpoints, guard

# ---------------------------------------------------------------- the way out


def raise_own():
    raise ValueError("numbers are off:\ngive others")


def raise_in_loader():
    """As a DataLoader hands over what its worker raised: the traceback as text."""
    try:
        raise ValueError("pic.jpg is torn: replace it")
    except ValueError:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()


def raise_dead_loader():
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def interrupt():
    raise KeyboardInterrupt


def leave(main, monkeypatch, capsys):
    """Runs `main` as x.py. -> (exit code, what it says)"""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as leaving:
        guard.run(main)
    code, said = leaving.value.code, capsys.readouterr().err
    return (1, f"{code}\n") if isinstance(code, str) else (code, said)


@pytest.mark.parametrize("main,code,line", [
    (raise_own, 1, "x.py: give others\n"),
    (raise_in_loader, 1, "x.py: pic.jpg is torn: replace it\n"),
    (raise_dead_loader, 1, "x.py: a loader process died, most likely out of memory: "
                           "run the same command again with fewer --workers\n"),
    (lambda: checkpoints.load("gone/cls.pt"), 1,
     "x.py: gone/cls.pt is missing: run train_cls.py first (README.md has the order)\n"),
    (lambda: open("/proc/no/such", "w"), 1, "x.py: /proc/no/such: No such file or directory; "
                                            "check that the folder exists, is writable and has room\n"),
    (interrupt, 130, "\nx.py: interrupted; finished files are kept: run the same command again\n")])
def test_the_way_out_is_one_line(main, code, line, monkeypatch, capsys):
    assert leave(main, monkeypatch, capsys) == (code, line)


@pytest.mark.parametrize("bug,kind", [
    (lambda: json.loads("{"), json.JSONDecodeError), (lambda: {}["x"], KeyError),
    (lambda: torch.ones(2) @ torch.ones(3), RuntimeError)])
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


def test_a_second_signal_ends_it_at_once(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"at once, {code}"))

    def main():
        guard.STOP.later = True
        signal.raise_signal(signal.SIGINT)
        assert guard.STOP.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)

    assert leave(main, monkeypatch, capsys) == (1, "at once, 130\n")


def test_a_background_job_ignores_ctrl_c_as_before():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        guard.run(lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_heard_where_no_exception_passes(monkeypatch, capsys):
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def main():
        Last()
        time.sleep(5)
        raise AssertionError("it went on")

    code, line = leave(main, monkeypatch, capsys)
    assert code == 143 and "Traceback" not in line


def test_loader_processes_leave_ctrl_c_and_one_sigterm_to_their_parent():
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    try:
        guard.ignore_signals(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# ---------------------------------------------------------------- one run at a time

TRY = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def is_locked(path):
    """Can another process not lock it?"""
    return subprocess.run([sys.executable, "-c", TRY, path], capture_output=True).returncode == 1


def test_a_claim_is_a_lock_that_names_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/here/train_cls.py"])
    lock = tmp_path / "out/.cls.pt.lock"
    guard.claim(tmp_path / "out/cls.pt")
    guard.claim(tmp_path / "out/cls.pt")
    assert is_locked(lock)                                         # before this process opens and closes it
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


def test_only_the_first_rank_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with held(tmp_path / "cls.pt"):
        guard.claim(tmp_path / "cls.pt")
    assert not guard.HELD


def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(guard.fcntl, "lockf", no_locks)
    guard.claim(tmp_path / "cls.pt")
    assert ".cls.pt.lock: No locks available" in capsys.readouterr().err and not guard.HELD
