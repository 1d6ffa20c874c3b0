"""Ctrl-C and SIGTERM, one run at a time, and the way out of a script.

    if __name__ == "__main__":
        guard.run(main)               # bad input: one line and exit 1; Ctrl-C: the step is finished and saved

Nothing here computes; a reader of the method can pass it by.
"""
import contextlib
import errno
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from plumbing import files

try:
    import fcntl
except ImportError:
    sys.exit("this system has no fcntl: the scripts run on Linux and macOS, on Windows under WSL")


# ---------------------------------------------------------------- the way out

def run(main):
    """Runs a script's main. Bad input ends in a line and exit 1, Ctrl-C in 130; a bug keeps its traceback."""
    STOP.listen()
    try:
        main()
        if STOP.signal:                                       # it came after the last step
            raise KeyboardInterrupt
    except KeyboardInterrupt as saved:
        end_interrupted(str(saved))
    except RuntimeError as error:
        if STOP.signal:                                       # a loader process or another rank left first
            end_interrupted()
        if "DataLoader worker" in str(error):             # killed; what a worker raises itself keeps its type
            sys.exit(report("a loader process died, most likely out of memory: "
                            "run the same command again with fewer --workers"))
        if not dist.is_initialized() or not re.search("peer|closed|aborted", str(error), re.I):
            report(f"{type(error).__name__}: {error}")
            raise
        report("another process left first", later=60)
        sys.exit(1)
    except (OSError, ValueError) as error:
        if not is_refusal(error):
            raise
        sys.stderr.write(f"{report(one_line(error))}\n")      # in one piece: ranks write into one terminal
        sys.exit(1)
    finally:
        release()
        STOP.rest()


def end_interrupted(saved=""):
    """The end of a run that was asked to end: says how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):  # torch's SIGCHLD handler would raise here
        STOP.before.setdefault(number, signal.signal(number, lambda *_: None))
    for child in multiprocessing.active_children():
        if child.daemon:                                     # a loader process, which ignores a first SIGTERM
            child.kill()
            child.join()
    state = f"{saved}: to go on, run" if saved else "finished files are kept: run"
    again = ", without --no-resume" if "--no-resume" in sys.argv else ""
    line = report(f"interrupted; {state} the same command again{again}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n{line}", file=sys.stderr, flush=True)
    code = 128 + (STOP.signal or signal.SIGINT)
    if STOP.count > 1:                                        # at once, without waiting for pool processes
        release()
        os._exit(code)
    sys.exit(code)


def report(line, later=0):
    """`line` after the script's name; also where torchrun looks for the first failure of its processes."""
    line = f"{Path(sys.argv[0]).name}: {line}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()) + later)}
        content = json.dumps({"message": {"message": line, "extraInfo": extra}})
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content)
    return line


def is_refusal(error):
    """True for what this repo or the system refuses, here or in a loader process; else it is a bug."""
    if isinstance(error, OSError):
        return True
    frames = re.findall(r'File "([^"]+)", line', f"{error} {error.__cause__}")  # a worker's traceback is text
    if not frames:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    raised_in = Path(frames[-1]).resolve()
    return files.ROOT in raised_in.parents and ".venv" not in raised_in.parts


def one_line(error):
    # a worker's traceback goes before it
    line = re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1])
    system = re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", line)
    if not system:
        return line
    return f"{system[2]}: {system[1]}; check that the folder exists, is writable and has room"


# ---------------------------------------------------------------- Ctrl-C and SIGTERM

class Stop:
    """What Ctrl-C and SIGTERM do: they end the run at once, or, while `later`, the first is only noted.

    A training loop sets `later`: its step is then finished and saved first. A second signal ends it."""

    def __init__(self):
        self.signal = self.agreed = self.count = self.time = 0
        self.later, self.before = False, {}                   # signal -> its handler before us

    def listen(self):
        """From here to `rest`. A signal that was ignored before stays ignored, as in a background job."""
        self.__init__()
        self.pid, self.hook = os.getpid(), sys.unraisablehook
        sys.unraisablehook = self.miss
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.hear)

    def rest(self):
        self.later = True                                     # all is done: a Ctrl-C ends nothing here
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def hear(self, number, frame):
        if os.getpid() != self.pid:                           # a loader process, which its parent ends
            return
        if "WORLD_SIZE" in os.environ and time.time() < self.time + 1:
            return                                            # torchrun forwards a Ctrl-C we already received
        self.signal, self.time, self.count = number, time.time(), self.count + 1
        if not self.later or self.count > 1:
            raise KeyboardInterrupt

    def miss(self, error):
        """Where Python lets no exception through, as around a fork: the signal is sent again a bit later."""
        if error.exc_type is not KeyboardInterrupt:
            return self.hook(error)
        self.count, self.time = self.count - 1, 0
        threading.Timer(0.1, os.kill, (os.getpid(), self.signal)).start()

    @contextlib.contextmanager
    def hold(self):
        """What is within is done whole."""
        before, self.later = self.later, True
        try:
            yield
        finally:
            self.later = before
        if self.signal and not before:
            raise KeyboardInterrupt


STOP = Stop()


def leave(path, step):
    """Called on all ranks after a state was saved: where Run.stopping has said so, the run ends here."""
    if STOP.agreed:
        if dist.is_initialized():                             # torchrun ends the others once one has left
            dist.barrier()
        raise KeyboardInterrupt(f"step {step} is saved in {path}")


def ignore_signals(worker):
    """For a loader process: Ctrl-C, and one SIGTERM, are its parent's, which finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


# ---------------------------------------------------------------- one run at a time

HELD = {}                                                     # path of a lock -> its open file


def claim(path):
    """Until the run ends, this process alone writes `path`, a file or a folder. Of several ranks the first
    asks.

    .<name>.lock beside it says who holds it: a record lock, which ends with its process, however that
    ends."""
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    if int(os.environ.get("RANK", 0)) or lock in HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while lock not in HELD:
        file = open(lock, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{lock}: {error.strerror}: a second run would not be noticed", file=sys.stderr)
                file.close()
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{path} is being written by {holder}: "
                             "wait for it, stop it, or take another --out") from None
        with contextlib.suppress(FileNotFoundError):          # its last holder has just removed it: try again
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                HELD[lock] = file
    with contextlib.suppress(OSError):                    # on a full disk the lock holds without a name in it
        os.ftruncate(file.fileno(), 0)
        holder = f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name})"
        os.write(file.fileno(), holder.encode())


def release():
    while HELD:
        lock, file = HELD.popitem()
        with contextlib.suppress(OSError):                    # the folder may be gone
            lock.unlink()
        file.close()
