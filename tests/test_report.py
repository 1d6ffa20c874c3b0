"""The report on a tiny world of made-up results: one file, every part that there is, a line for every part that there is not."""
import argparse
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, make_folder, refused
from PIL import Image

import report
from plumbing import checkpoints, files, folders, maps, masks
from wsss import clip_model, segmenter

GROUNDS = ["rails", "water", "grass", "sky"]
ODD = "<b>&cow"                                                             # a class whose name is HTML
SECTIONS = ["scores", "pictures", "prompts", "regions", "curves", "arguments"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def score(what, miou, classes, **protocol):
    return {"miou": miou, "pixel_accuracy": 0.9, "iou": {"background": 0.75, **dict.fromkeys(classes, miou), classes[-1]: None}, "absent": [classes[-1]], "missed_pixels": 0,
            "protocol": {"what": what, "split": "train", "pictures": 5, "limit": 0, "data": "data", "pred": None, "oracle": False, **protocol}}


def decoder(out, clip, path, classes, weight):
    """seg.pt of a small clip_decoder and its prototypes.pt, both random."""
    out.mkdir(parents=True)
    W = torch.nn.functional.normalize(torch.randn(len(classes) + len(GROUNDS), 16), dim=1)
    model = segmenter.build_decoder(None, 64, 1, {"model": {"prototypes": W}, "classes": classes, "tau_i": 0.1}, width=16)
    checkpoints.save(out / "prototypes.pt", stage="prototypes", model={"prototypes": W}, classes=classes, gap={"before": 1.25, "after": 0.5})
    checkpoints.save(out / "seg.pt", stage="seg", model=model.state_dict(), classes=classes, clip=clip.fingerprint(),
                args={"model": "clip_decoder", "clip": str(path), "lambda_rsc": weight, "inputs": {}})


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """A data folder and three output folders with something of everything."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    torch.manual_seed(0)
    make_folder(root / "data")
    classes = [*CLASSES[:2], ODD]
    for name in ("classes.txt", "labels.txt"):
        path = root / "data" / name
        path.write_text(path.read_text().replace(CLASSES[2], ODD))
    (root / "data/backgrounds.txt").write_text("\n".join(GROUNDS))
    out, clip = root / "out", clip_model.load_clip(tiny_clip)
    for where, source in ((out / "cam_cls", "cls"), (out / "cam", "refine"), (out / "vpl/cam_text", "text")):
        write(where / "recipe.json", {"args": {"source": source, "cam": where.name}, "classes": classes})
        for id, present in LABELS.items():
            maps.save_cam(where / f"{id}.npy", rng.random((len(present), 15, 20)))
    write(out / "pseudo/recipe.json", {"args": {"pseudo": "pseudo", "cam": "cam"}, "classes": classes})
    (out / "pred/val").mkdir(parents=True)
    for id in LABELS:
        truth = masks.load_mask(root / "data/SegmentationClass" / f"{id}.png")
        masks.save_mask(out / "pseudo" / f"{id}.png", truth)
        if id in ("a_1", "a_2"):
            masks.save_mask(out / "pred/val" / f"{id}.png", truth % 255)
    (out / "pred/photos").mkdir()
    Image.new("RGB", (40, 20), "red").save(out / "pred/photos/mine.jpg")
    masks.save_mask(out / "pred/photos/a_3.png", np.zeros((30, 40)))          # a photograph that has a picture's name
    lines = [json.dumps(line) for line in ({"args": {"lr": 0.125, "note": "<i>\ud800"}, "versions": {"torch": "9.9"}, "world": 1}, {"step": 5, "seconds": 60, "loss": 2.5, "mask": 0.5},
                                           {"step": 10, "seconds": 120, "loss": 1.5, "mask": 0.25, "lr": float("nan")})]
    (out / "match.jsonl").write_text("\n".join([*lines, '{"step": 15, "lo']))
    write(out / "eval_cam_train.json", score("cam", 0.61238, classes, background="constant", value=0.4, made_by={"source": "refine", "maps": 7}))
    write(out / "eval_cam_cls_train.json", score("cam", 0.5, classes, background="constant", value=0.4, made_by={"source": "cls", "maps": 7}))
    write(out / "vpl/eval_seg_val.json", score("seg", 0.44449, classes, scales=[1.0], flip=True, crf=None, made_by={"model": "clip_decoder"}))
    model = clip_model.BackgroundPrompts(clip, 3, 4)
    checkpoints.save(out / "prompts.pt", stage="prompts", model=model.state_dict(), classes=classes, args={"clip": str(tiny_clip), "template": "a photo of {}.", "inputs": {}})
    shutil.move(out / "vpl", root / "keep")
    decoder(out / "vpl", clip, tiny_clip, classes, 0.1)
    shutil.copytree(root / "keep", out / "vpl", dirs_exist_ok=True)
    decoder(root / "plain", clip, tiny_clip, classes, 0.0)
    return root


def make(world, out, *more):
    done = call("report.py", "--data", world / "data", "--out", out, "--device", "cpu", "--workers", "0", *more)
    assert done.returncode == 0, done.stderr
    return (out / "report.html").read_text()


@pytest.fixture(scope="module")
def page(world):
    return make(world, world / "out", "--without-rsc", world / "plain")


class Reader(HTMLParser):
    """Checks that tags nest, and collects attributes, texts and the section that each figure's caption stands in."""
    ALONE = {"meta", "img", "br", "!doctype", "path", "circle", "polyline"}

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.texts, self.captions, self.sections, self.cells = [], [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "data", "action") if name in attrs]
        assert tag != "script" and not any(name.startswith("on") for name in attrs)
        if tag == "section":
            self.sections.append(attrs["id"])
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.ALONE:                                               # <path ...></path> around a title
            return
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)
        if "figcaption" in self.open:
            self.captions.append((self.sections[-1], text))
        if "td" in self.open:
            self.cells.append((self.sections[-1], text))


def test_one_file_without_a_reference_outside(page):
    reader = Reader(page)
    assert reader.sections == SECTIONS
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in reader.links) and len(reader.links) > 40
    assert not re.search(r"@import|url\(|<link|<iframe", page)
    assert {link[1:] for link in reader.links if link.startswith("#")} == set(SECTIONS)


def test_every_part_that_there_is(page):
    reader = Reader(page)
    captions = {name: [text for section, text in reader.captions if section == name] for name in SECTIONS}
    shown = captions["pictures"]
    assert shown.count("picture") == 5 + 2 and shown.count("truth") == 5 + 2 and shown.count("mine") == 1          # train, and val's predictions
    assert shown.count("cam_cls: image labels alone") == 2 + 1 and f"{ODD}, cam: + L_prompt, L_refine" in shown      # a_1 and a_5, and a_1 of val; of two classes named
    assert shown.count("seg: prediction") == 4 and shown.count("pseudo: mask") == 7                                 # a_1 and a_2 are of both lists
    assert captions["prompts"].count("learned prompt") == sum(map(len, LABELS.values())) and f"“{ODD}”: the class" in captions["prompts"]
    assert "with RSC, λ 0.1" in captions["regions"] and "without RSC" in captions["regions"] and page.count("1.250 from") == 1
    assert captions["curves"] == ["loss ", "1.5", "mask ", "0.25"]
    texts = "".join(reader.texts)
    assert "9.9" in texts and "0.125" in texts and "train_match.py, 10 steps, 2.0 min" in page


def test_what_is_missing_names_its_command(page, world, tmp_path):
    absent = re.findall(r'class="missing">(No .*?) here\. <code>(.*?)</code>', page)
    assert [what.split()[3] for what, _ in absent if what.startswith("No maps")] == ["match", "vision"]
    assert [what.split()[-1] for what, _ in absent if "log" in what] == ["cls", "prompts", "refine", "prototypes", "seg"]
    (tmp_path / "out").mkdir()
    page = make(world, tmp_path / "out")
    absent = dict(re.findall(r'class="missing">No (.*?) here\. <code>(.*?)</code>', page))
    for what, script in {"scores": "eval.py", "maps of refine (+ L_prompt, L_refine)": "make_cam.py", "pseudo masks": "make_pseudo.py", "predictions": "eval.py",
                         "prompts": "train_prompt.py", "clip_decoder with RSC": "train_seg.py", "clip_decoder without RSC": "train_seg.py", "log of match": "train_match.py"}.items():
        assert absent[what].startswith(f"python {script} --data {world / 'data'} --out "), what
    assert Reader(page).sections == SECTIONS and page.count("<img") == 2 * len(LABELS)              # pictures and their truth


def test_numbers_are_those_of_the_files(page):
    cells = [text for section, text in Reader(page).cells if section == "scores"]
    assert cells[:6] == ["50.0", "90.0", "61.2", "90.0", "44.4", "90.0"]                            # in the order of the stages, VPL's after
    assert cells[6:] == ["75.0"] * 3 + ["50.0", "61.2", "44.4"] * 2 + ["–"] * 3
    assert "train of data · 5 pictures · maps of refine · background constant 0.4" in page and "clip_decoder · scales 1.0, flips · no CRF" in page


def test_masks_are_described_by_the_rule_that_made_them():
    """FMA-WSSS's vote has a background of its own; the one by pixel counts where the CRF, or a picture without segments, needs it."""
    pixels, facts = {"background": "constant", "value": 0.43}, {"split": "train", "data": "toy", "pictures": 5, "what": "pseudo"}
    words = lambda **made: report.in_words({**facts, "made_by": {"source": "refine", "maps": {"source": "refine"}, **made}}).split(" · ")[3:]
    assert words(**pixels, crf="weaktr") == ["background constant 0.43", "CRF weaktr"]
    ours, others = {"folder": "runs/voc/segments", "source": "sam", "weights": "x"}, {"folder": "/masks/amg", "source": None, "weights": None}
    sams = dict(background="power", value=0.6, pixels=pixels, vote="sams", segments=ours, without_segments=0, crf=None)
    assert words(**sams) == ["sam segments, vote sams", "background power 0.6", "no CRF"]
    seen = "background constant 0.43 for the CRF and pictures without segments"
    assert words(**{**sams, "without_segments": 2}) == ["sam segments, vote sams (2 pictures without)", seen, "background power 0.6", "no CRF"]
    assert words(**{**sams, "crf": "irn"}) == ["sam segments, vote sams", seen, "background power 0.6", "CRF irn"]
    sepl = dict(pixels, vote="sepl", segments=others, without_segments=1, crf="weaktr")
    assert words(**sepl) == ["/masks/amg segments, vote sepl (1 pictures without)", "background constant 0.43", "CRF weaktr"]


def test_names_are_text(page):
    assert ODD not in page and "&lt;b&gt;&amp;cow" in page and "&lt;i&gt;&#55296;" in page and "<i>" not in page.replace('<i style="background', "")


def test_chosen_ids(world):
    page = make(world, world / "out", "--ids", "a_4", "--vpl", world / "plain")
    assert re.findall(r"<h3>(a_\d)", page) == ["a_4"] and "cam_text (" not in page and "train_seg.py → seg.jsonl" not in page and "(plain)" not in page
    flags = ["--data", world / "data", "--device", "cpu"]
    refused(call("report.py", *flags, "--out", world / "out", "--ids", "a_9"), "a_9.jpg is missing")
    refused(call("report.py", *flags, "--out", world / "out", "--ids", "../x"), "--ids", "no picture id")
    refused(call("report.py", *flags, "--out", world / "nowhere"), "nowhere is missing")
    assert not (world / "nowhere").exists()


def test_another_clip_is_not_taken(world, tmp_path, tiny_clip):
    """Where the CLIP of the prompts is gone, or is another one, the page says so; with --clip it is found again."""
    out = tmp_path / "out"
    out.mkdir()
    content = torch.load(world / "out/prompts.pt", weights_only=True)
    content["args"] |= {"clip": str(tmp_path / "gone.pt"), "inputs": {"clip": files.fingerprint(tiny_clip)}}
    checkpoints.save(out / "prompts.pt", **content)
    assert "learned prompt<" not in make(world, out) and "gone.pt" in make(world, out)
    assert "learned prompt<" in make(world, out, "--clip", tiny_clip)
    (tmp_path / "gone.pt").write_bytes(b"another")
    assert "learned prompt<" not in make(world, out)


def test_what_does_not_fit_is_refused(world, tmp_path):
    (tmp_path / "match.jsonl").write_text('{"step": 1}\n')
    refused(call("report.py", "--data", world / "data", "--out", tmp_path, "--device", "cpu"), "match.jsonl", "train_match.py again")
    write(tmp_path / "cam/recipe.json", {"args": {"source": "cls"}, "classes": ["dog"]})
    refused(call("report.py", "--data", world / "data", "--out", tmp_path, "--device", "cpu"), "other classes (1: dog)")


@pytest.mark.parametrize("broken", [
    {"protocol": {}}, {"protocol": 5}, {"protocol": {"what": "x"}}, {"protocol": {"what": []}}, {"iou": {"cat": "x"}}, {"iou": [0.5]}, {"miou": "0.5"}, {"miou": None}, {"miou": 1e9}, {"miou": float("nan")},
    {"pixel_accuracy": 10 ** 400}, {"oracle_best": 5}, {"oracle_best": {"miou": "x", "threshold": 0.5}}, {"protocol": {"value": "x"}}, {"protocol": {"made_by": "x"}}, {"protocol": {"made_by": {"source": ["x"]}}},
    {"protocol": {"made_by": {"source": "text", "args": {"tau_t": "x"}}}}])
def test_a_broken_score_is_refused(tmp_path, broken):
    whole = score("cam", 0.5, CLASSES, background="constant", value=0.4, made_by={"source": "cls"})
    write(tmp_path / "eval_cam_train.json", whole)
    folder = argparse.Namespace(classes=CLASSES, root=tmp_path)
    assert report.Run("", tmp_path, folder).scores == [("cam_train", whole)]
    part = broken.get("protocol")
    write(tmp_path / "eval_cam_train.json", {**whole, **broken, **({"protocol": {**whole["protocol"], **part}} if isinstance(part, dict) and part else {})})
    with pytest.raises(ValueError, match=r"eval_cam_train.json is no score of eval.py's.*: remove it and run eval.py again$"):
        report.Run("", tmp_path, folder)
    write(tmp_path / "eval_cam_train.json", {"accuracy": 5})                                      # somebody else's
    assert report.Run("", tmp_path, folder).scores == []


@pytest.mark.parametrize("broken", [{"args": {"source": ["x"]}}, {"args": {"clip": 5}}, {"args": {"source": {}}}, {"classes": 5}, {"classes": [1]}, {"classes": None}, {"classes": ["a\nb"]}])
def test_a_broken_recipe_is_refused(tmp_path, broken):
    write(tmp_path / "cam/recipe.json", broken)
    with pytest.raises(ValueError, match=r"cam/recipe.json is no recipe of ours.*: remove it and run its stage again$"):
        report.Run("", tmp_path, argparse.Namespace(classes=CLASSES, root=tmp_path))


def test_a_line_without_seconds_is_left_out(tmp_path):
    lines = [{"args": {}, "versions": {}}, {"step": 1, "seconds": 6, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 3, "seconds": "x", "loss": 0.125}]
    (tmp_path / "match.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = report.Run("", tmp_path, argparse.Namespace(classes=CLASSES, root=tmp_path))
    assert "1 steps, 0.1 min" in report.curves(argparse.Namespace(data="data", out=tmp_path, split="train"), [run])


def test_classes_take_turns(world):
    folder = folders.Folder(world / "data")
    assert report.choose(folder, list(LABELS), lambda id: True, 3) == ["a_1", "a_2", "a_4"]       # train, boat and cow, then train again
    assert report.choose(folder, list(LABELS), lambda id: id != "a_1", 9) == ["a_4", "a_2", "a_5", "a_3"]


def test_colours():
    image = Image.new("RGB", (8, 4), (100, 100, 100))
    hot = np.asarray(report.heat(image, np.linspace(-3, 5, 8)[None].repeat(4, 0)))
    assert hot[0, 0].tolist() == [44, 37, 67] and hot[0, -1].tolist() == [206, 208, 144]          # .3 grey + .7 of the first and last colour
    mask = np.zeros((4, 8), np.uint8)
    mask[:, 4:6], mask[:, 6:] = 1, 255
    shown = np.asarray(report.painted(image, mask))
    assert shown[0, 0].tolist() == [205] * 3 and shown[0, 4].tolist() == [123, 15, 15] and set(shown[:, 6:].ravel().tolist()) <= {90, 255}


def test_principal_axes():
    torch.manual_seed(0)
    points = torch.randn(40, 6) * torch.tensor([5.0, 3, 1, 1, 0.5, 0.1]) + 7
    flat, other, share = report.pca(points, points[:2])
    values, axes = torch.linalg.eigh(torch.cov(points.T))
    expected = (points - points.mean(0)) @ axes[:, [5, 4]]
    torch.testing.assert_close(flat.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other, flat[:2])
    assert share == pytest.approx((values[-2:].sum() / values.sum()).item(), abs=1e-5)
    owners = torch.tensor([0, 1]).repeat(20)
    assert report.apart(points * 0 + owners[:, None], owners) == pytest.approx(1) and report.apart(points[:2].repeat(20, 1), torch.tensor([0, 0, 1, 1]).repeat(10)) == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_in_a_browser(page, tmp_path):
    """At a width of 360 the page does not scroll sideways, its rows of pictures do, and every picture is drawn."""
    measure = """<body><script>
        const frame = document.createElement("iframe"); frame.style.cssText = "width:360px;height:800px;border:0"; frame.srcdoc = PAGE;
        frame.onload = () => { const inside = frame.contentDocument, root = inside.documentElement, images = [...inside.images];
            document.body.dataset.found = [root.scrollWidth <= root.clientWidth, images.every(i => i.naturalWidth > 0), [...inside.querySelectorAll(".row")].some(r => r.scrollWidth > r.clientWidth)].join(" ") };
        document.body.append(frame)</script></body>"""
    (tmp_path / "measure.html").write_text(measure.replace("PAGE", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
                           f"file://{tmp_path / 'measure.html'}"], capture_output=True, text=True, timeout=60)
    assert re.search(r'data-found="(.*?)"', done.stdout).group(1) == "true true true", done.stdout[:300] + done.stderr[-500:]
