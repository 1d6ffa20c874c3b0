"""The shared modules. A script imports the package first: while torch and the others are loaded, Ctrl-C and SIGTERM end it in one line."""
import os
import signal
import sys
from pathlib import Path


def leave(number, frame):
    os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted before it began: nothing was changed\n".encode())
    os._exit(128 + number)


SCRIPTS = {f"{name}.py" for name in ("train_cls", "train_match", "train_prompt", "train_refine", "train_seg", "vpl", "make_toy", "make_cam", "make_segments",
                                     "make_pseudo", "prepare_data", "eval", "report")}
started = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if started.name in SCRIPTS and started.resolve().parent == Path(__file__).resolve().parent.parent:        # one of ours; common.run takes over from here
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)
