"""What the tests share: one thread, the root of the repo, a small data folder, and ways to run a script."""
import argparse
import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and what the tests start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")        # as processes.Run does on a CPU

from plumbing import flags, guard, log, masks  # noqa: E402
from tests.rigs import launch  # noqa: E402

CLASSES = ["train", "boat", "cow"]
LABELS = {"a_1": [0], "a_2": [1, 2], "a_3": [], "a_4": [0, 2], "a_5": [1]}


# ---------------------------------------------------------------- data

def make_folder(root, labels=LABELS, size=(30, 40), seed=0, classes=CLASSES):
    """Images of noise, masks of a rectangle a class with a 255 border, lists train and val (two)."""
    rng = np.random.default_rng(seed)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    lines = []
    for n, (id, present) in enumerate(labels.items()):
        h, w = size[0] + n % 2 * 4, size[1]
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        image.save(root / "JPEGImages" / f"{id}.jpg", quality=95)
        mask = np.zeros((h, w), np.uint8)
        for i, k in enumerate(present):
            mask[4:h - 4, 3 + 18 * i:16 + 18 * i] = 255
            mask[5:h - 5, 4 + 18 * i:15 + 18 * i] = k + 1
        masks.save_mask(root / "SegmentationClass" / f"{id}.png", mask)
        lines.append(" ".join([id, *(classes[k].replace(" ", "_") for k in present)]))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("\n".join(labels))       # without a last newline, as one published copy
    (lists / "val.txt").write_text("".join(f"{id}\n" for id in list(labels)[:2]))
    return root


@pytest.fixture
def voc(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A random CLIP of OpenAI's architecture in a few channels, with the real vocabulary. Both towers lean
    one way, so that cosines are about a half: at random they would be clamped, without gradient."""
    from clip.model import CLIP
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    model = CLIP(embed_dim=16, image_resolution=16, vision_layers=2, vision_width=64, vision_patch_size=8,
                 context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1,
                 transformer_layers=2)
    model.ln_final.bias.data.fill_(1.0)
    model.text_projection.data = torch.randn_like(model.text_projection) * 0.1 + 0.01
    model.visual.ln_post.bias.data.fill_(1.0)
    model.visual.proj.data = torch.randn_like(model.visual.proj) * 0.1 + 0.01
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """No signal and no lock of one test is there in the next."""
    yield
    guard.STOP.signal, guard.STOP.later = 0, False
    guard.release()


# ---------------------------------------------------------------- running scripts


def run_together(jobs, folder, processes=2):
    """Several stages, each (script, *flags), one after the other in the same processes -> their output."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    codes = launch.together(jobs, output, processes)
    assert not any(codes), (codes, output.read_text())
    return subprocess.CompletedProcess(jobs, 0, output.read_text(), "")


def call(script, *flags):
    """A script or module in this process, which spares its start of seconds: call("eval.py", "--out", x)"""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [module.__file__, *map(str, flags)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            guard.run(module.main)
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):                             # sys.exit(line): the interpreter would print it
            err.write(f"{code}\n")
            code = 1
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path):
    """Another process that has claimed `path` -> its name. Killed at the end, it leaves its lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = path.with_name(f".{path.name}.lock"), "process 7 on elsewhere (other.py)"
    process = subprocess.Popen([sys.executable, "-S", "-c", HOLD, lock, holder], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield holder
    finally:
        process.kill()
        process.communicate()


def refused(done, *words):
    """Exit 1 and one clear line that holds all `words`; no traceback. -> that line"""
    lines = [line for line in done.stderr.strip().splitlines() if line and not re.search(r"%\||it/s", line)]
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def arguments(out, *more, **values):
    """What a script without flags of its own would parse, and `values`."""
    p = flags.parser("")
    flags.training(p)
    given = ["--data", "nowhere", "--out", str(out), "--device", "cpu", "--amp", "off", *more]
    return argparse.Namespace(**{**vars(p.parse_args(given)), **values})


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C in the third step of the training that follows. -> a list that grows by one a step"""
    steps, add = [], log.Meter.add

    def strike(*args, **values):
        add(*args, **values)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.Meter, "add", strike)
    return steps


# ---------------------------------------------------------------- looking at results

def rows(path):
    """Lines of a stage's log, without the first, which holds the arguments."""
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b, tolerance=0.0):
    """Do two state dicts agree, bit for bit or to an absolute tolerance?"""
    assert a.keys() == b.keys()
    if tolerance == 0:
        return all(torch.equal(a[name], b[name]) for name in a)
    return all(torch.allclose(a[name].float(), b[name].float(), atol=tolerance, rtol=0) for name in a)
