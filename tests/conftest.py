"""What the tests share: one thread, the repo's root, and a tiny data folder in VOC layout."""
import contextlib
import importlib
import io
import json
import os
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
signal.signal(signal.SIGINT, signal.default_int_handler)               # a shell's background job ignores Ctrl-C, and so would all that is started here
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")        # as ranks.Env does for a CPU

from plumbing import guard, masks  # noqa: E402

CLASSES = ["train", "boat", "cow"]
LABELS = {"a_1": [0], "a_2": [1, 2], "a_3": [], "a_4": [0, 2], "a_5": [1]}


def make_folder(root, labels=LABELS, size=(30, 40), seed=0, classes=CLASSES):
    """Pictures of noise, masks of one rectangle a class with a 255 border, lists `train` (all) and `val` (the first two)."""
    rng = np.random.default_rng(seed)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for n, (id, present) in enumerate(labels.items()):
        h, w = size[0] + n % 2 * 4, size[1]
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / "JPEGImages" / f"{id}.jpg", quality=95)
        mask = np.zeros((h, w), np.uint8)
        for i, k in enumerate(present):
            mask[4:h - 4, 3 + 18 * i:16 + 18 * i] = 255
            mask[5:h - 5, 4 + 18 * i:15 + 18 * i] = k + 1
        masks.save_mask(root / "SegmentationClass" / f"{id}.png", mask)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    (root / "labels.txt").write_text("".join(" ".join([id, *(classes[k].replace(" ", "_") for k in present)]) + "\n" for id, present in labels.items()))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(labels))              # no last newline, as one published copy
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"{id}\n" for id in list(labels)[:2]))
    return root


@pytest.fixture
def voc(tmp_path):
    return make_folder(tmp_path / "data")


def run(script, *flags, processes=1, check=True, timeout=120, env=None, **kwargs):
    """Runs a script as a user does; with several processes under torchrun. Returns the finished process, output as text."""
    head = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*head, str(script), *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


DRIVER = """
import sys, json, importlib
import torch.distributed as dist
dist.destroy_process_group = lambda: None                 # one start, and one process group, for all stages
for script, *flags in json.load(open(sys.argv[1])):
    sys.argv = [script, *flags]
    importlib.import_module(script[:-3]).main()
"""


def run_together(jobs, folder, processes=2):
    """Several stages, each (script, *flags), one after the other in the same processes under torchrun."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "jobs.json").write_text(json.dumps([list(map(str, job)) for job in jobs]))
    return run(folder / "driver.py", folder / "jobs.json", processes=processes)


def call(script, *flags):
    """The same in this process, for what needs no process of its own (a start costs seconds): `call("eval.py", "--out", x)`."""
    module = importlib.import_module(Path(script).stem)
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(ROOT / script), *map(str, flags)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            guard.run(module.main)
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


def refused(done, *words):
    """Exit 1 and one clear line that holds all `words`; no traceback."""
    lines = [line for line in done.stderr.strip().splitlines() if line and "it/s" not in line and "|" not in line]
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def rows(path):
    """Lines of a stage's log, without the first, which holds the arguments."""
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if tolerance == 0 else torch.allclose(a[k].float(), b[k].float(), atol=tolerance, rtol=0) for k in a)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A random CLIP of OpenAI's architecture in a few channels, as a plain state dict; the vocabulary is the real one.

    Both towers lean towards one direction, so that cosines are about a half as in a trained one: at random they are clamped, and have no gradient."""
    from clip.model import CLIP
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    model = CLIP(embed_dim=16, image_resolution=16, vision_layers=2, vision_width=64, vision_patch_size=8, context_length=77, vocab_size=49408,
                 transformer_width=64, transformer_heads=1, transformer_layers=2)
    for norm, projection in ((model.ln_final, model.text_projection), (model.visual.ln_post, model.visual.proj)):
        norm.bias.data.fill_(1.0)
        projection.data = torch.randn_like(projection) * 0.1 + 0.01
    torch.save(model.state_dict(), path)
    return path
