"""What the README, docs/ and the manual pages tell people to type: the toy run and the walk-through for real,
every other command down to its flags."""
import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from PIL import Image
from test_run import module_of, parse, shell  # noqa: F401 (a fixture)

from plumbing import folders, masks
from tests.rigs import notebook
from wsss import clip_model

COMMAND = re.compile(r"([A-Z0-9]+=\S+ )*(python|torchrun|bash) ")
OTHERS = ("pip install ", "git clone ", "cd ")                # what a block may hold besides
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text()
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
TEXT = DOCS["README.md"]
HISTORY = ("docs/results.md", "docs/benchmarks.md")           # their text names what older versions had, too
SCRIPTS = {}                                                  # module -> its manual page
for folder in (".", "hosts", "ablations", "bench", "tests/rigs"):
    for path in ROOT.glob(f"{folder}/[a-z]*.py"):
        if "def main()" in path.read_text():
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            SCRIPTS[name] = ast.get_docstring(ast.parse(path.read_text())) or ""


def blocks(text):
    """Lines of the fenced bash blocks, continued ones joined, comments cut."""
    found = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in found.splitlines()) if line]


def commands(text):
    """Command lines of a docstring."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if COMMAND.match(line)]


def in_text(text):
    """Commands in backticks."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [span for span in spans if COMMAND.match(span) and "<" not in span and "*" not in span]


NAMED = [line for name, text in DOCS.items() if name not in HISTORY for line in in_text(text)]
LINES = [line for text in DOCS.values() for line in blocks(text) if not line.startswith(OTHERS)]
LINES = list(dict.fromkeys([*LINES, *NAMED, *(line for text in SCRIPTS.values() for line in commands(text))]))


def stage(line):
    """A command -> what python is to run and its flags, without torchrun's."""
    words = shlex.split(line)
    return words[1:] if words[0] == "python" else words[3:]   # torchrun --nproc_per_node N


@pytest.mark.parametrize("line", [line for line in LINES if " run_" not in line])
def test_the_flags_of_every_command_exist(line, monkeypatch):
    assert COMMAND.match(line), f"{line}: neither python nor torchrun nor bash"
    words = stage(line)
    name, flags = module_of(words)
    if name in ("ablations", "bench") and not flags:          # they list what is there
        return
    known = name in SCRIPTS and "/" not in words[0]
    assert known, f"{line}: not a script, or not run as a module"
    if line in NAMED and not flags:                           # a script's name, in the text
        return
    module, read = importlib.import_module(name), argparse.ArgumentParser.parse_args

    def end(parser):
        read(parser)
        sys.exit(0)

    monkeypatch.setattr(sys, "argv", [name, *flags])
    if not hasattr(module, "parse"):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", end)
    try:
        getattr(module, "parse", module.main)()
    except SystemExit as leaving:                             # --help leaves with 0, what is wrong with 2
        assert leaving.code == 0, line


def test_every_script_shows_how_it_is_run():
    for name, text in SCRIPTS.items():
        assert name in [module_of(stage(line))[0] for line in commands(text)], name


def test_run_scripts_in_the_docs_run(shell, tmp_path, monkeypatch):  # noqa: F811
    lines = [line for line in LINES if " run_" in line]
    assert {"bash run_toy.sh", "bash run_tests.sh"} <= set(lines) and len(lines) > 5
    for n, line in enumerate(line for line in lines if "run_tests.sh" not in line):
        words = shlex.split(line)
        at = words.index("bash")
        more = dict(word.split("=", 1) for word in words[:at])
        done, found = shell(*words[at + 1:], **{**more, "OUT": tmp_path / str(n)})
        assert done.returncode == 0 and len(found) > 5, (line, done.stderr)
        for words in found:
            first = next(n for n, word in enumerate(words) if re.search(r"^hosts\.|\.py$", word))
            parse(words[first - (not words[first].endswith(".py")):], monkeypatch)


# ---------------------------------------------------------------- for real

def test_the_toy_run(shell, tmp_path, monkeypatch):  # noqa: F811
    """`bash run_voc.sh` without a VOC, on few images: run_toy.sh's lines in their order, in this process."""
    world, out = tmp_path / "toy", tmp_path / "out"
    done, lines = shell("run_voc.sh", LOOK=1, DATA=world, OUT=out)
    assert done.returncode == 0 and "look at" in done.stdout and "no VOC given" in done.stdout
    assert len(lines) > 25
    for words in lines:
        if "segments" not in " ".join(words) or find_spec("skimage"):
            done = call(*words[words[0] == "-m":])
            assert done.returncode == 0, (words, done.stderr)
    made = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert made >= {"refine.pt", "seg.pt", "report.html", "eval_pseudo_train.json", "sheets/cam_refine_0.png",
                    "vpl/prototypes.pt", "vpl/eval_cam_vision_train.json", "vpl/eval_seg_val.json"}
    monkeypatch.setenv("DATA", str(world))
    monkeypatch.setenv("OUT", str(out))
    cells = json.loads((ROOT / "docs/walkthrough.ipynb").read_text())["cells"]
    stored = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    notebook.run_cells(cells)
    made = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    kinds = [[list(each.get("data", ["text"])) for each in outputs] for outputs in made]
    assert kinds == [[list(each.get("data", ["text"])) for each in outputs] for outputs in stored]
    assert sum("image/png" in data for outputs in kinds for data in outputs) == 6
    for folder, ending, count in (("cam_refine", "npy", 24), ("pseudo", "png", 24), ("pred/val", "png", 8)):
        assert len(list((out / folder).glob(f"*.{ending}"))) == count


# Appended to the README's commands, so that each takes a second; everything else is as it stands there.
SMALL = "--device cpu --amp off --workers 0 --batch-size 4"
EPOCHS = f"{SMALL} --epochs 1 --crop 32 --min-scale 0.5"
SMALLER = {
    "prepare_data.py": "", "train_cls.py": f"{EPOCHS} --generator deit_tiny_toy --backbone none",
    "train_match.py": f"{EPOCHS} --clip CLIP", "train_prompt.py": f"{EPOCHS} --clip CLIP",
    "train_refine.py": f"{EPOCHS} --clip CLIP", "vpl.py": f"{SMALL} --clip CLIP --steps 5",
    "make_cam.py": f"{SMALL} --clip CLIP", "make_pseudo.py": SMALL, "predict.py": SMALL, "report.py": SMALL,
    "train_seg.py": f"{SMALL} --init none --iterations 2 --crop 33 --width 16 --clip CLIP"}


def test_your_own_images(tmp_path, tiny_clip, monkeypatch):
    """README's walk-through and docs/own-images.md line by line: images, labels.txt, classes.txt; no list, no
    mask. The layout block holds two columns, a file each."""
    section = TEXT.split("## Your own images")[1].split("\n## ")[0]
    head, *layout = re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()
    at = head.index("mine/labels.txt")
    (tmp_path / "mine/JPEGImages").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for name, column in (("classes", slice(at)), ("labels", slice(at, None))):
        content = [line[column].strip() for line in layout if line[column].strip()]
        (tmp_path / f"mine/{name}.txt").write_text("\n".join(content))
    for name, size in (("mine/JPEGImages/IMG_0001.jpg", (90, 60)), ("mine/JPEGImages/IMG_0002.png", (60, 80)),
                       ("mine/JPEGImages/IMG_0003.JPG", (64, 64)), ("photos/new.jpg", (70, 50)),
                       ("photos/tall.png", (40, 96))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / name)
    objects = {"categories": [{"id": 3, "name": "person"}],
               "annotations": [{"image_id": 1, "category_id": 3}],
               "images": [{"id": 1, "file_name": "new.jpg"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(objects))
    monkeypatch.chdir(tmp_path)
    assert folders.Folder("mine").classes == ["train", "person"]
    assert folders.Folder("mine").ids("train") == ["IMG_0001", "IMG_0002", "IMG_0003"]
    more = [line for line in blocks(DOCS["docs/own-images.md"]) if " mine" in line or " photos" in line]
    lines = blocks(section)
    assert len(lines) >= 10 and "python prepare_data.py check mine" in lines
    lines += more
    for line in lines:
        script, *flags = stage(line)
        flags += SMALLER[script].replace("CLIP", str(tiny_clip)).split()
        if script == "train_seg.py" and "--model" not in flags:
            flags += ["--model", "deeplab_toy"]
        done = call(script, *flags)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if flags[:1] == ["check"]:
            assert "no problems, no warnings" in done.stdout
    for out in ("runs/mine", "runs/mine_vpl"):
        for name, size in (("new", (70, 50)), ("tall", (40, 96))):
            place = Path(out, "pred/photos", name)
            assert masks.load_mask(place.with_suffix(".png"), 2).shape == size[::-1]
            assert Image.open(place.with_suffix(".jpg")).width == size[0]
    assert Path("runs/mine/report.html").exists() and folders.Folder("data/photos").ids("train") == ["new"]


def test_the_piece_to_copy(tiny_clip, monkeypatch):
    """The README's snippet gives SemPLeS's first loss, with a gradient for the maps."""
    load = clip_model.load_clip
    monkeypatch.setattr(clip_model, "load_clip", lambda name, device: load(tiny_clip, device))
    torch.manual_seed(0)
    raw = torch.rand(3, 4, 5, requires_grad=True)
    b, k = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    names = {"device": "cpu", "classes": ["train", "boat"], "maps": raw, "b": b, "k": k, "torch": torch,
             "F": F, "images": torch.rand(2, 3, 16, 16)}
    exec(TEXT.split("```python\n")[1].split("```")[0], names)
    names["loss"].backward()
    assert names["loss"].item() > 0 and raw.grad.abs().sum() > 0 and raw.grad.isfinite().all()
