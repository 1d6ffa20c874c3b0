"""report.py on made-up results: one file, every part that there is, a line for every part that is not."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused
from PIL import Image

import report
from plumbing import checkpoints, files, networks
from plumbing.folders import Folder
from plumbing.maps import save_cam
from plumbing.masks import load_mask, save_mask
from wsss import clip_model

GROUNDS = ["rails", "water", "grass", "sky"]
ODD = "<b>&cow"                                                     # a class whose name is HTML
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


def save_decoder(out, clip, path, weight):
    """A small clip_decoder and its prototypes, both random."""
    out.mkdir(parents=True)
    W = F.normalize(torch.randn(len(NAMES) + len(GROUNDS), 16), dim=1)
    prototypes = {"stage": "prototypes", "model": {"prototypes": W}, "classes": NAMES, "args": {},
                  "tau_i": 0.1, "gap": {"before": 1.25, "after": 0.5}}
    checkpoints.save(out / "prototypes.pt", **prototypes)
    args = {"model": "clip_decoder", "clip": str(path), "width": 16, "lambda_rsc": weight,
            "inputs": {"clip": files.fingerprint(path)}}
    model = networks.new_decoder(clip, prototypes, 16)
    checkpoints.save(out / "seg.pt", stage="seg", model=model.state_dict(), classes=NAMES, args=args,
                     clip=clip.fingerprint())


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """A data folder and three output folders with something of everything."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    torch.manual_seed(0)
    make_folder(root / "data", classes=NAMES)
    (root / "data/backgrounds.txt").write_text("\n".join(GROUNDS))
    out, clip = root / "out", clip_model.load_clip(tiny_clip)
    save_decoder(out / "vpl", clip, tiny_clip, 0.1)
    save_decoder(root / "plain", clip, tiny_clip, 0.0)
    for where, source in ((out / "cam_cls", "cls"), (out / "cam", "refine"), (out / "vpl/cam_text", "text")):
        write(where / "recipe.json", {"args": {"source": source, "cam": where.name}, "classes": NAMES})
        for id, present in LABELS.items():
            save_cam(where / f"{id}.npy", rng.random((len(present), 15, 20)))
    write(out / "pseudo/recipe.json", {"args": {"pseudo": "pseudo", "cam": "cam"}, "classes": NAMES})
    (out / "pred/val").mkdir(parents=True)
    (out / "pred/photos").mkdir()
    for id in LABELS:
        truth = load_mask(root / f"data/SegmentationClass/{id}.png")
        save_mask(out / f"pseudo/{id}.png", truth)
        if id in ("a_1", "a_2"):
            save_mask(out / f"pred/val/{id}.png", truth % 255)
    Image.new("RGB", (40, 20), "red").save(out / "pred/photos/mine.jpg")
    save_mask(out / "pred/photos/a_3.png", np.zeros((30, 40)))       # a photograph that has an image's name
    lines = [{"args": {"lr": 0.125, "note": "<i>\ud800"}, "versions": {"torch": "9.9"}, "world": 1},
             {"step": 5, "seconds": 60, "loss": 2.5, "mask": 0.5},
             {"step": 10, "seconds": 120, "loss": 1.5, "mask": 0.25, "lr": float("nan"), "note": "text"}]
    (out / "match.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 15, "lo']))
    write(out / "eval_cam_train.json", score("cam", 0.61238, **CAM, made_by={"source": "refine"}))
    write(out / "eval_cam_cls_train.json", score("cam", 0.5, **CAM, made_by={"source": "cls"}))
    write(out / "eval_other.json", {"accuracy": 5})                  # of another program
    seg = {"scales": [1.0], "flip": True, "crf": None, "made_by": {"model": "clip_decoder"}}
    write(out / "vpl/eval_seg_val.json", score("seg", 0.44449, **seg))
    prompts = clip_model.BackgroundPrompts(clip, 3, 4)
    known = {"clip": files.fingerprint(tiny_clip)}
    checkpoints.save(out / "prompts.pt", stage="prompts", model=prompts.state_dict(), classes=NAMES,
                     args={"clip": str(tiny_clip), "inputs": known})
    for name in ("cls.pt", "match.pt"):
        (out / name).touch()
    return root


def make(world, out, *more):
    done = call("report.py", "--data", world / "data", "--out", out, "--device", "cpu", "--workers", 0, *more)
    assert done.returncode == 0, done.stderr
    return (out / "report.html").read_text()


@pytest.fixture(scope="module")
def page(world):
    return make(world, world / "out")


class Reader(HTMLParser):
    """Checks that tags nest, and collects links, texts and, by section, captions and cells."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.texts, self.sections = [], [], [], []
        self.captions, self.cells = {}, {}
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href", "data", "action") if key in attributes]
        assert name != "script" and not any(key.startswith("on") for key in attributes)
        if name == "section":
            self.sections.append(attributes["id"])
        if name not in ("meta", "img", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.texts.append(text)
        for name, found in (("figcaption", self.captions), ("td", self.cells)):
            if name in self.open:
                found.setdefault(self.sections[-1], []).append(text)


def test_one_file_without_a_reference_outside(page):
    reader = Reader(page)
    assert reader.sections == SECTIONS and len(reader.links) > 40
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in reader.links)
    assert not re.search(r"@import|url\(|<link|<iframe", page)
    assert [link[1:] for link in reader.links if link.startswith("#")] == SECTIONS


def test_every_part_that_there_is(page):
    reader = Reader(page)
    shown = reader.captions["images"]
    assert shown.count("image") == shown.count("truth") == 5 + 2                     # of train and val
    assert shown.count("cam_cls: image labels alone") == 2 + 1                       # images of one class
    assert f"{ODD}, cam: + L_prompt, L_refine" in shown and shown.count("mine") == 1
    assert shown.count("seg: prediction") == 4 and shown.count("pseudo: mask") == 7  # a_1, a_2: in both lists
    assert reader.captions["prompts"].count("learned prompt") == sum(map(len, LABELS.values()))
    assert f"“{ODD}”: the class" in reader.captions["prompts"] and "1.250 from" in page
    assert "with RSC, λ 0.1" in reader.captions["regions"] and "without RSC" not in page
    assert reader.captions["losses"] == ["loss ", "1.5", "mask ", "0.25"]
    texts = "".join(reader.texts)
    assert "9.9" in texts and "0.125" in texts and "train_match.py, 10 steps, 2.0 min" in page


def test_what_is_missing_names_its_command(page, world, tmp_path):
    line = r'class="missing">No (.*?) here\. <code>(.*?)</code>'
    absent = dict(re.findall(line, page))
    assert "--source match --cam cam_match" in absent["maps of match"] and "maps of cls" not in absent
    assert f"--out {world}/out/vpl --split train --source vision" in absent["maps of vision"]
    logs = [what.split()[-1] for what in absent if what.startswith("log of")]
    assert logs == ["cls", "prompts", "refine", "prototypes", "seg"]
    (tmp_path / "out").mkdir()
    page = make(world, tmp_path / "out")
    absent = dict(re.findall(line, page))
    scripts = {"scores": "eval.py", "maps": "make_cam.py", "pseudo masks": "make_pseudo.py",
               "predictions": "eval.py", "prompts": "train_prompt.py", "clip_decoder": "train_seg.py",
               "log of match": "train_match.py"}
    for what, script in scripts.items():
        assert absent[what].startswith(f"python {script} --data {world / 'data'} --out "), what
    assert Reader(page).sections == SECTIONS and page.count("<img") == 2 * len(LABELS)


def test_numbers_are_those_of_the_files(page):
    cells = Reader(page).cells["scores"]
    assert cells[:6] == ["50.0", "90.0", "61.2", "90.0", "44.4", "90.0"]  # in the order of the stages
    assert cells[6:] == ["75.0"] * 3 + ["50.0", "61.2", "44.4"] * 2 + ["–"] * 3
    assert "train of data · 5 images · maps of refine · background constant 0.4" in page
    assert "clip_decoder · scales 1.0, flips · no CRF" in page


def test_names_are_text(page):
    assert ODD not in page and "&lt;b&gt;&amp;cow" in page and "&lt;i&gt;&#55296;" in page
    assert "<i>" not in page


def test_chosen_ids_and_another_second_folder(world):
    page = make(world, world / "out", "--ids", "a_4", "--vpl", world / "plain")
    assert re.findall(r"<h3>(a_\d)", page) == ["a_4"] and "cam_text (" not in page
    assert "without RSC" in Reader(page).captions["regions"]
    flags = ["--data", world / "data", "--device", "cpu"]
    refused(call("report.py", *flags, "--out", world / "out", "--ids", "a_9"), "a_9.jpg is missing")
    refused(call("report.py", *flags, "--out", world / "out", "--ids", "../x"), "--ids", "no image id")
    refused(call("report.py", *flags, "--out", world / "nowhere"), "nowhere is missing")
    assert not (world / "nowhere").exists()


def test_another_clip_is_not_taken(world, tmp_path, tiny_clip):
    """The page says so where the CLIP of the prompts is gone, or is another one; --clip finds it again."""
    content = torch.load(world / "out/prompts.pt", weights_only=True)
    content["args"]["clip"] = str(tmp_path / "gone.pt")
    checkpoints.save(tmp_path / "prompts.pt", **content)
    page = make(world, tmp_path)
    assert "learned prompt<" not in page and f"No CLIP {tmp_path}/gone.pt, with which" in page
    assert "learned prompt<" in make(world, tmp_path, "--clip", tiny_clip)
    (tmp_path / "gone.pt").write_bytes(b"another")
    assert "learned prompt<" not in make(world, tmp_path)


def test_what_does_not_fit_is_refused(world, tmp_path):
    command = "report.py", "--data", world / "data", "--out", tmp_path, "--device", "cpu"
    (tmp_path / "match.jsonl").write_text('{"step": 1}\n')
    refused(call(*command), "match.jsonl", "run its stage again")
    write(tmp_path / "cam/recipe.json", {"args": {"source": "cls"}, "classes": ["dog"]})
    refused(call(*command), "cam/recipe.json", "other classes (1: dog)")


def test_scores_of_old_and_broken_files(tmp_path):
    path, whole = tmp_path / "eval_cam_train.json", score("cam", 0.5, **CAM, made_by={"source": "cls"})
    protocol = whole["protocol"]
    old = {"pictures" if name == "images" else name: value for name, value in protocol.items()}
    write(path, whole | {"protocol": old})
    assert report.read_score(path)["protocol"]["images"] == 5
    changed = [protocol | {"what": "x"}, protocol | {"value": "x"}, protocol | {"made_by": "x"}, {}, 5]
    broken = [whole | {"protocol": each} for each in changed]
    for content in [{"miou": 0.5, "protocol": protocol}, *broken]:
        write(path, content)
        with pytest.raises(ValueError, match="eval_cam_train.json is not a score of eval.py: remove it"):
            report.read_score(path)


def test_class_names_in_a_recipe(tmp_path):
    """Joiners print inside a name, as in --data; a control character would break the one line of an error."""
    names = ["\u0645\u06cc\u200c\u062e", "a b"]
    write(tmp_path / "recipe.json", {"args": {"source": "cls"}, "classes": names})
    assert report.read_recipe(tmp_path / "recipe.json", names) == {"source": "cls"}
    for name in ("a\nb", "\u200ca", 5):
        write(tmp_path / "recipe.json", {"classes": ["a b", name]})
        with pytest.raises(ValueError, match="recipe.json lists classes that do not print"):
            report.read_recipe(tmp_path / "recipe.json", names)


def test_classes_take_turns(world):
    folder, ids = Folder(world / "data"), list(LABELS)
    assert report.choose(folder, ids, 3) == ["a_1", "a_2", "a_4"]   # train, boat and cow, then train
    assert report.choose(folder, ids[1:], 9) == ["a_4", "a_2", "a_5", "a_3"]       # no class: last
    assert report.choose(folder, [], 9) == []


def test_principal_axes():
    torch.manual_seed(0)
    points = torch.randn(40, 6) * torch.tensor([5.0, 3, 1, 1, 0.5, 0.1]) + 7
    flat, other, share = report.project(points, points[:2])
    values, axes = torch.linalg.eigh(torch.cov(points.T))
    expected = (points - points.mean(0)) @ axes[:, [5, 4]]
    torch.testing.assert_close(flat.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other, flat[:2])
    assert share == pytest.approx((values[-2:].sum() / values.sum()).item(), abs=1e-5)
    owners = torch.tensor([0, 1]).repeat(20)
    assert report.share_between(0 * points + owners[:, None], owners) == pytest.approx(1)
    halves = torch.tensor([0, 0, 1, 1]).repeat(10)
    assert report.share_between(points[:2].repeat(20, 1), halves) == pytest.approx(0, abs=1e-6)


MEASURE = """<body><script>
const frame = document.createElement("iframe");
frame.style.cssText = "width:360px;height:800px;border:0";
frame.srcdoc = PAGE;
frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const rows = [...inside.querySelectorAll(".row")];
    document.body.dataset.found = [root.scrollWidth <= root.clientWidth,
        [...inside.images].every(image => image.naturalWidth > 0),
        rows.some(row => row.scrollWidth > row.clientWidth)].join(" ");
};
document.body.append(frame);
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_in_a_browser(page, tmp_path):
    """At a width of 360 the page does not scroll sideways, its rows do, and every image is drawn."""
    file = tmp_path / "measure.html"
    file.write_text(MEASURE.replace("PAGE", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
             "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", f"file://{file}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert re.search(r'data-found="(.*?)"', done.stdout)[1] == "true true true", done.stderr[-500:]
