"""Scripts in processes of their own, started from a server that has imported torch: a start takes a tenth of
a second instead of four."""
import contextlib
import importlib
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ["torch", "torchvision.transforms.v2", "plumbing.networks", "plumbing.samples", "toy.networks"]


def live(jobs, output, environment, folder):
    """The life of a process: scripts (script, *flags), one after the other. Its output goes to a file."""
    os.setsid()                                               # as on a terminal: Ctrl-C is for all it starts
    multiprocessing.set_start_method(None, force=True)        # of loaders: this python's default, not ours
    ignore_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})          # the server blocks it
    os.environ.update(environment, OMP_NUM_THREADS="1")
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    from plumbing import guard, processes
    processes.start_worker()                                  # one thread; it ends when its parent is gone
    for script, *flags in jobs:
        module = importlib.import_module(script.removesuffix(".py"))
        sys.argv = [module.__file__, *flags]
        guard.run(partial(announce_and_run, module.main))


def announce_and_run(main):
    print(f"== {os.environ.get('WORLD_SIZE', 1)} processes: {shlex.join(sys.argv)}", flush=True)
    main()
    ignore_signals()


def ignore_signals():
    """Before and after a main function, where python would answer with a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)                # SIG_IGN would be inherited and kept


def start(jobs, output, environment=(), folder=ROOT):
    """-> the process that runs `jobs`: [(script or module, *flags), ...]."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    jobs = [[str(word) for word in job] for job in jobs]
    process = CONTEXT.Process(target=live, args=(jobs, str(output), dict(environment), str(folder)))
    process.start()
    return process


def free_port():
    """Below those that the system deals out: the processes of other tests may be given one of them."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def together(jobs, output, processes, limit=300):
    """Runs `jobs` in `processes` ranks -> their exit codes. Once one has failed, the others have 5 seconds to
    end by themselves."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(jobs, output, {**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(processes)]
    end = time.time() + limit
    while any(rank.is_alive() for rank in ranks) and time.time() < end:
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.time() + 5)
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]
