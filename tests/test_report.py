"""report.py on made-up results: one file, every part that there is, a line for every part that is not."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused

from plumbing import checkpoints, files, networks
from plumbing.maps import save_cam
from plumbing.masks import load_mask, save_mask
from wsss import clip_model

GROUNDS = ["rails", "water", "grass", "sky"]
ODD = "<b>&cow"                                               # a class whose name is HTML
NAMES = [*CLASSES[:2], ODD]
SECTIONS = ["scores", "images", "prompts", "regions", "losses", "arguments"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def score(what, miou, **protocol):
    facts = {"what": what, "split": "train", "images": 5, "limit": 0, "data": "data", "oracle": False}
    iou = {"background": 0.75, NAMES[0]: miou, NAMES[1]: miou, ODD: None}
    return {"miou": miou, "pixel_accuracy": 0.9, "iou": iou, "protocol": facts | protocol}


CAM = {"background": "constant", "value": 0.4}


def save_decoder(out, clip, path):
    """A small clip_decoder and its prototypes, both random."""
    out.mkdir(parents=True)
    W = F.normalize(torch.randn(len(NAMES) + len(GROUNDS), 16), dim=1)
    prototypes = {"stage": "prototypes", "model": {"prototypes": W}, "classes": NAMES, "args": {},
                  "tau_i": 0.1, "gap": {"before": 1.25, "after": 0.5}}
    checkpoints.save(out / "prototypes.pt", **prototypes)
    args = {"model": "clip_decoder", "clip": str(path), "width": 16, "logits": "raw", "lambda_rsc": 0.1,
            "clip_gelu": None, "inputs": {"clip": files.fingerprint(path)}}
    model = networks.new_decoder(clip, prototypes, 16, "raw")
    checkpoints.save(out / "seg.pt", stage="seg", model=model.state_dict(), classes=NAMES, args=args,
                     clip=clip.fingerprint())


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """A data folder and an output folder with something of everything."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    torch.manual_seed(0)
    make_folder(root / "data", classes=NAMES)
    (root / "data/backgrounds.txt").write_text("\n".join(GROUNDS))
    out, clip = root / "out", clip_model.load_clip(tiny_clip)
    save_decoder(out / "vpl", clip, tiny_clip)
    for where, source in ((out / "cam_cls", "cls"), (out / "cam", "refine"), (out / "vpl/cam_text", "text")):
        write(where / "recipe.json", {"args": {"source": source, "cam": where.name}, "classes": NAMES})
        for id, present in LABELS.items():
            save_cam(where / f"{id}.npy", rng.random((len(present), 15, 20)))
    write(out / "pseudo/recipe.json", {"args": {"pseudo": "pseudo", "cam": "cam"}, "classes": NAMES})
    (out / "pred/val").mkdir(parents=True)
    for id in LABELS:
        truth = load_mask(root / f"data/SegmentationClass/{id}.png")
        save_mask(out / f"pseudo/{id}.png", truth)
        if id in ("a_1", "a_2"):
            save_mask(out / f"pred/val/{id}.png", truth % 255)
    lines = [{"args": {"lr": 0.125, "note": "<i>\ud800"}, "versions": {"torch": "9.9"}, "world": 1},
             {"step": 5, "seconds": 60, "loss": 2.5, "mask": 0.5},
             {"step": 10, "seconds": 120, "loss": 1.5, "mask": 0.25, "lr": float("nan"), "note": "text"}]
    (out / "match.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 15, "lo']))
    write(out / "eval_cam_train.json", score("cam", 0.61238, **CAM, made_by={"source": "refine"}))
    write(out / "eval_cam_cls_train.json", score("cam", 0.5, **CAM, made_by={"source": "cls"}))
    write(out / "eval_other.json", {"accuracy": 5})           # of another program
    seg = {"scales": [1.0], "flip": True, "crf": None, "made_by": {"model": "clip_decoder"}}
    write(out / "vpl/eval_seg_val.json", score("seg", 0.44449, **seg))
    prompts = clip_model.BackgroundPrompts(clip, 3, 4)
    known = {"clip": files.fingerprint(tiny_clip)}
    checkpoints.save(out / "prompts.pt", stage="prompts", model=prompts.state_dict(), classes=NAMES,
                     args={"clip": str(tiny_clip), "clip_gelu": None, "raw_names": False, "inputs": known})
    return root


def make(world, out, *more):
    done = call("report.py", "--data", world / "data", "--out", out, "--device", "cpu", "--workers", 0, *more)
    assert done.returncode == 0, done.stderr
    return (out / "report.html").read_text()


class Tags(HTMLParser):
    """Checks that tags nest and that none is a program; collects links."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "data", "action")]
        assert name != "script" and not any(key.startswith("on") for key, _ in attributes)
        if name not in ("meta", "img", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def parse(page):
    """-> sections by name; what is missing, and the command that makes it"""
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.S))
    assert list(sections) == SECTIONS
    return sections, dict(re.findall(r'class="missing">No (.*?) here\. <code>(.*?)</code>', page))


def test_every_part_that_there_is_in_one_file_without_a_reference_outside(world):
    page = make(world, world / "out")
    links, (sections, absent) = Tags(page).links, parse(page)
    assert len(links) > 40 and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not re.search(r"@import|url\(|<link|<iframe", page)

    shown = re.findall(r"<figcaption>(.*?)</figcaption>", sections["images"])
    assert shown.count("image") == shown.count("truth") == 5 + 2                     # of train and val
    assert shown.count("cam_cls: image labels alone") == 2 + 1                       # images of one class
    assert shown.count("seg: prediction") == 4 and shown.count("pseudo: mask") == 7  # a_1, a_2: in both lists
    assert sections["prompts"].count("learned prompt<") == sum(map(len, LABELS.values()))
    assert "1.250 from" in page and "with RSC, λ 0.1" in sections["regions"]
    assert "train_match.py, 10 steps, 2.0 min" in sections["losses"] and "0.125" in sections["arguments"]
    assert ODD not in page and "&lt;b&gt;&amp;cow" in page and "&lt;i&gt;&#55296;" in page    # text

    cells = re.findall(r"<td[^>]*>(?:<b>)?(.*?)(?:</b>)?</td>", sections["scores"])
    assert cells[:6] == ["50.0", "90.0", "61.2", "90.0", "44.4", "90.0"]      # in the order of the stages
    assert cells[6:] == ["75.0"] * 3 + ["50.0", "61.2", "44.4"] * 2 + ["–"] * 3
    assert "train of data · 5 images · maps of refine · background constant 0.4" in page
    assert "clip_decoder · scales 1.0, flips · no CRF" in page
    assert f"--out {world}/out/vpl --split train --source vision" in absent["maps of vision"]
    assert "maps of cls" not in absent and "log of match" not in absent and "log of refine" in absent


def test_what_is_missing_names_its_command(world, tmp_path, monkeypatch):
    page = make(world, tmp_path, "--ids", "a_4")
    scripts = {"scores": "eval.py", "maps": "make_cam.py", "pseudo masks": "make_pseudo.py",
               "predictions": "eval.py", "prompts": "train_prompt.py", "prototypes": "vpl.py",
               "log of match": "train_match.py"}
    for what, script in scripts.items():
        assert parse(page)[1][what].startswith(f"python {script} --data {world / 'data'} --out "), what
    assert parse(page)[1]["prototypes"].split()[5] == f"{tmp_path}_vpl"
    assert re.findall(r"<h3>(a_\d)", page) == ["a_4"]
    line = ["report.py", "--data", world / "data", "--device", "cpu", "--out", tmp_path]
    refused(call(*line, "--ids", "a_9"), "a_9.jpg is missing")
    write(tmp_path / "eval_cam_train.json", score("x", 0.5))
    refused(call(*line), "eval_cam_train.json is not a score of eval.py: remove it")
    write(tmp_path / "cam/recipe.json", {"args": {"source": "cls"}, "classes": ["dog"]})
    refused(call(*line), "cam/recipe.json", "other classes (1: dog)")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(*line), "run report.py without torchrun")
