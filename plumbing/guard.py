"""Ctrl-C and SIGTERM, one run at a time, and the way out: one line for what we or the system refuse."""
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
    sys.exit("this system has no fcntl: the scripts run on Linux, on Windows under WSL")


class Stop:
    """What Ctrl-C and SIGTERM do. At most times they end the run at once; while `later`, the first one only leaves word, and a second ends it."""

    def __init__(self):
        self.signal = self.agreed = self.count = self.time = 0
        self.later, self.before = False, {}                   # signal -> what it did before us

    def listen(self):
        """From here to `rest`. A signal that was ignored before stays so: that of a background job, say."""
        self.__init__()
        self.pid, self.hook = os.getpid(), sys.unraisablehook
        sys.unraisablehook = self.miss
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.hear)

    def rest(self):
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():           # in a script of ours there is nothing left to interrupt but python's own end
            signal.signal(number, signal.SIG_IGN if False else handler or signal.SIG_DFL)

    def hear(self, number, frame):
        if os.getpid() != self.pid or "WORLD_SIZE" in os.environ and time.time() < self.time + 1:
            return                                            # a loader's process, which its parent ends; torchrun hands on the Ctrl-C that we got too
        self.signal, self.time, self.count = number, time.time(), self.count + 1
        if not self.later or self.count > 1:
            raise KeyboardInterrupt

    def miss(self, error):
        """Where Python lets no exception through, as around a fork, what `hear` raised is lost: a moment later it is heard again."""
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
    """Called on all ranks after a state was saved: where `stopping` has said so, the run ends here."""
    if STOP.agreed:
        if dist.is_initialized():                             # torchrun ends the others once one has left
            dist.barrier()
        raise KeyboardInterrupt(f"step {step} is saved in {path}")


HELD = {}                                                     # path of a lock -> its open file


def claim(path):
    """Until the run ends, this process alone writes `path`, a file or a folder: .<name>.lock beside it says who. Of several ranks the first asks.

    A record lock: gone with its process, however that ends, not inherited by a forked one, and known to NFS."""
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
                print(f"{lock}: {error.strerror}: a second run into the same folder would not be noticed", file=sys.stderr)
                return file.close()
            file.seek(0)
            raise ValueError(f"{path} is being written by {file.read().strip() or 'another process'}: wait for it, stop it, or take another --out") from None
        with contextlib.suppress(FileNotFoundError):          # its last holder has just removed it: once more
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                HELD[lock] = file
    with contextlib.suppress(OSError):                        # a full disk has no room for a name: the lock holds all the same
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name})".encode())


def release():
    while HELD:
        lock, file = HELD.popitem()
        with contextlib.suppress(OSError):                    # the folder may be gone
            lock.unlink()
        file.close()


def run(main):
    """Runs a script's main. What we or the system refuse ends in one line and exit 1, Ctrl-C in one and 130, SIGTERM 143; a bug keeps its traceback."""
    STOP.listen()
    try:
        main()
        if STOP.signal:                                       # it came after the last step
            raise KeyboardInterrupt
    except KeyboardInterrupt as saved:
        interrupted(str(saved))
    except RuntimeError as error:
        if STOP.signal:                                       # a loader's process or another rank was quicker to leave
            interrupted()
        if "DataLoader worker" in str(error):                 # killed; what it raises itself keeps its type
            sys.exit(told("a loader process died, most likely out of memory: run the same command again with fewer --workers"))
        if not dist.is_initialized() or not re.search("peer|closed|aborted", str(error), re.I):      # gloo and nccl, when another rank has left
            told(f"{type(error).__name__}: {error}")
            raise
        told("another process left first", later=60)
        sys.exit(1)
    except (OSError, ValueError) as error:
        if not ours(error):
            raise
        print(told(one_line(error)), file=sys.stderr)
        sys.exit(1)
    finally:
        release()
        STOP.rest()


def interrupted(saved=""):
    """The end of a run that was asked to end: says how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):        # what comes now is no news; torch's SIGCHLD raises when a loader's process was killed
        STOP.before.setdefault(number, signal.signal(number, lambda *_: None))
    for child in multiprocessing.active_children():
        if child.daemon:                                      # a loader's, which would pass over a first SIGTERM
            child.kill(), child.join()
    again = f"run the same command again{', without --no-resume' if '--no-resume' in sys.argv else ''}"
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n{told(f'interrupted; {saved}: to go on, {again}' if saved else f'interrupted; nothing finished is lost: {again}')}", file=sys.stderr, flush=True)
    code = 128 + (STOP.signal or signal.SIGINT)
    if STOP.count > 1:                                        # at once: without waiting for the processes of a pool, which then see that we are gone
        release()
        os._exit(code)
    sys.exit(code)


def told(line, later=0):
    """The line that ends a run, after the name of its script. torchrun, which looks for the first failure among its processes, gets it too."""
    line = f"{Path(sys.argv[0]).name}: {line}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(
                {"message": {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()) + later)}}}))
    return line


def ours(error):
    """Refused by a line of this repo or by the operating system, here or in a loader's worker; else it is a bug."""
    if isinstance(error, OSError):
        return True
    frames = re.findall(r'File "([^"]+)", line', f"{error} {error.__cause__}")        # a worker's traceback travels as text
    if not frames:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return Path(frames[-1]).resolve().parent in (files.ROOT, *(files.ROOT / room for room in ("wsss", "plumbing", "hosts", "ablations")))


def one_line(error):
    line = re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1])           # a worker's error comes with a traceback before it
    system = re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", line)
    return f"{system[2]}: {system[1]}; check that the folder exists, is writable and has room" if system else line
