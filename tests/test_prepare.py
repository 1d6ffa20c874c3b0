"""prepare_data.py: which mask wins, what is painted over what, every finding of check, a kill, bad input.

scipy and pycocotools are optional: most tests replace what decodes by them, the others are then skipped."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, call, refused
from PIL import Image

import prepare_data
from plumbing import masks
from plumbing.folders import COCO_CLASSES, VOC_CLASSES, Folder
from plumbing.masks import load_mask


def prepare(*argv, workers=0):
    return call("prepare_data.py", *argv, "--workers", workers)


def done(*argv, workers=0):
    """The output of a command that succeeds."""
    finished = prepare(*argv, workers=workers)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def image(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)


def mask(path, values=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    masks.save_mask(path, np.full((size[1], size[0]), values) if np.isscalar(values) else values)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def values(path):
    return np.unique(load_mask(path)).tolist()


# ---------------------------------------------------------------- VOC

VOC = {"2007_000032": 1, "2007_000033": 2, "2007_000042": 3}             # native masks; the last is in val
SBD = {"2007_000033": 12, "2007_000042": 13, "2008_000002": 14}          # two of them are in VOC, too
TRAIN_AUG = ["2007_000032", "2007_000033", "2008_000002"]


@pytest.fixture
def voc(tmp_path):
    """VOC's tree and SBD's, in which a .mat holds the label as text (see `no_scipy`)."""
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    for id in {**VOC, **SBD}:
        image(tree / "JPEGImages" / f"{id}.jpg")
        write(tree / f"Annotations/{id}.xml", "<annotation><object><name>cat</name></object></annotation>")
    for id, value in VOC.items():
        mask(tree / "SegmentationClass" / f"{id}.png", [[0, value, 255]])
    write(tree / "ImageSets/Segmentation/train.txt", "2007_000032\n2007_000033\n")
    write(tree / "ImageSets/Segmentation/val.txt", "2007_000042")        # no last newline
    for id, value in SBD.items():
        write(sbd / "dataset" / "cls" / f"{id}.mat", str(value))
    return tree, sbd


@pytest.fixture
def no_scipy(monkeypatch):
    def read_text(path):
        return np.array([[0, int(path.read_text()), 0]], np.uint8)

    monkeypatch.setattr(prepare_data, "require", lambda *args: None)
    monkeypatch.setattr(prepare_data, "read_sbd", read_text)


def voc_command(voc, *more):
    return "voc", "--voc", voc[0], "--sbd", voc[1], "--allow-partial", *more


def test_voc_masks_win_over_sbd(voc, no_scipy):
    out = done(*voc_command(voc))
    assert "3 masks of VOC, 3 masks of SBD, 4 masks together, 3 train_aug images: not the whole" in out
    paths = sorted((voc[0] / "SegmentationClassAug").glob("*.png"))
    found = {path.stem: values(path) for path in paths}
    expected = [[0, 1, 255], [0, 2, 255], [0, 3, 255], [0, 14]]          # three of VOC, one of SBD
    assert found == dict(zip(["2007_000032", "2007_000033", "2007_000042", "2008_000002"], expected))
    assert all(Image.open(path).mode == "P" for path in paths)
    made = voc[0] / "ImageSets/Segmentation/train_aug.txt"
    assert made.read_text().split() == TRAIN_AUG
    made.unlink()
    assert Folder(voc[0]).ids("train_aug") == TRAIN_AUG                  # as the stages derive it


def test_counts_of_a_part_are_refused(voc, no_scipy, monkeypatch):
    command = voc_command(voc)[:-1]
    refused(prepare(*command), "3 masks of VOC, not 2,913", "4 masks together, not 12,031",
            "3 train_aug images, not 10,582", "--allow-partial")
    assert not (voc[0] / "SegmentationClassAug").exists() and 12031 - 1449 == 10582
    monkeypatch.setattr(prepare_data, "VOC_COUNTS", dict(zip(prepare_data.VOC_COUNTS, (3, 3, 4, 3))))
    assert "not the whole" not in done(*command)
    assert len(list((voc[0] / "SegmentationClassAug").glob("*.png"))) == 4


def test_voc_keeps_the_masks_and_lists_of_the_user(voc, no_scipy):
    own = voc[0] / "SegmentationClassAug" / "2008_000002.png"
    mask(own, 7)
    pairs = "".join(f"/JPEGImages/{id}.jpg /SegmentationClassAug/{id}.png\n" for id in reversed(TRAIN_AUG))
    listed = write(voc[0] / "ImageSets/Segmentation/train_aug.txt", pairs)
    assert "1 masks are in" in done(*voc_command(voc)) and values(own) == [7]
    assert listed.read_text() == pairs                                   # the same ids in another notation
    write(listed, "2007_000032\n")
    refused(prepare(*voc_command(voc)), "train_aug.txt is there with another content")
    assert listed.read_text() == "2007_000032\n"


def test_voc_with_out_leaves_the_tree_alone(voc, no_scipy, tmp_path):
    before, out = sorted(voc[0].rglob("*")), tmp_path / "prepared"
    done(*voc_command(voc, "--out", out))
    assert sorted(voc[0].rglob("*")) == before and (out / "JPEGImages").is_symlink()
    folder = Folder(out)
    assert folder.ids("train_aug") == TRAIN_AUG and folder.ids("val") == ["2007_000042"]
    assert folder.truth("2008_000002").tolist() == [[0, 14, 0]]
    assert folder.labels(["2008_000002"]).argmax().item() == VOC_CLASSES.index("cat")


def test_voc_bad_input(voc, no_scipy, tmp_path):
    tree, sbd = voc
    refused(prepare(*voc_command((tree, tmp_path / "nothing"))), "nothing/dataset/cls is missing", "--sbd is")
    refused(prepare(*voc_command((tmp_path, sbd))), "JPEGImages is missing")
    mask(tree / "SegmentationClass/2007_000032.png", 21)
    refused(prepare(*voc_command(voc)), "2007_000032.png holds label 21")
    assert not (tree / "ImageSets/Segmentation/train_aug.txt").exists()
    (tmp_path / "file").touch()
    refused(prepare(*voc_command(voc, "--out", tmp_path / "file/out")), "file/out", "Not a directory")


def test_optional_packages_are_named(voc, coco, monkeypatch, tmp_path):
    for name in ("scipy", "scipy.io", "pycocotools"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(prepare(*voc_command(voc)), "scipy is missing, it reads SBD's .mat files: pip install scipy")
    refused(prepare("coco", "--coco", coco, "--out", tmp_path / "out"), "pip install pycocotools")
    assert not (tmp_path / "out").exists()


def test_sbd_mat_files(voc):
    io = pytest.importorskip("scipy.io")
    for id, value in SBD.items():
        truth = np.zeros((4, 6), np.uint8)
        truth[1, 2] = value
        content = {"Boundaries": np.zeros((20, 1)), "Segmentation": truth, "CategoriesPresent": [[value]]}
        io.savemat(voc[1] / "dataset/cls" / f"{id}.mat", {"GTcls": content})
    done(*voc_command(voc))
    made = voc[0] / "SegmentationClassAug/2008_000002.png"
    assert load_mask(made).shape == (4, 6) and load_mask(made)[1, 2] == 14 and load_mask(made).sum() == 14
    assert values(voc[0] / "SegmentationClassAug/2007_000033.png") == [0, 2, 255]
    mat = voc[1] / "dataset/cls/2008_000002.mat"
    torn = mat.read_bytes()[:200]
    others = [{"GTinst": 1}, {"GTcls": {"Segmentation": np.full((2, 2), 21)}},
              {"GTcls": {"Segmentation": np.zeros((2, 2, 2))}}]
    for content in (torn, b"", b"MATLAB 7.3?" * 30, *others):
        made.unlink(missing_ok=True)
        mat.write_bytes(content) if isinstance(content, bytes) else io.savemat(mat, content)
        refused(prepare(*voc_command(voc)), "2008_000002.mat is not a mask of SBD", "unpack")


def many_masks(tmp_path, count, values):
    """VOC's tree with one mask under `count` names, an empty SBD, and the command."""
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    (tree / "JPEGImages").mkdir(parents=True)
    (sbd / "dataset/cls").mkdir(parents=True)
    write(tree / "ImageSets/Segmentation/val.txt", "0000\n")
    mask(tree / "SegmentationClass/0000.png", values)
    for n in range(1, count):
        os.link(tree / "SegmentationClass/0000.png", tree / f"SegmentationClass/{n:04d}.png")
    return tree, voc_command((tree, sbd))


def test_a_killed_run_leaves_whole_masks_and_goes_on(tmp_path):
    noise = np.random.default_rng(0).integers(0, 21, (300, 400))
    tree, command = many_masks(tmp_path, 150, noise)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [sys.executable, "prepare_data.py", *map(str, command), "--workers", "0"]
    process = subprocess.Popen(words, cwd=ROOT, **quiet)
    aug, end = tree / "SegmentationClassAug", time.time() + 60
    while len(list(aug.glob("*.png"))) < 5 and time.time() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in aug.glob("*.png")}
    assert 5 <= len(first) < 150 and not (tree / "ImageSets/Segmentation/train_aug.txt").exists()
    assert all((load_mask(path) == noise).all() for path in first)
    assert f"{len(first)} masks are in" in done(*command) and len(list(aug.glob("*.png"))) == 150
    assert {path: path.stat().st_mtime_ns for path in first} == first    # finished masks are not made again
    assert len(Folder(tree).ids("train_aug")) == 149


def test_worker_processes(tmp_path):
    """The same masks; an error is one line here, too."""
    tree, command = many_masks(tmp_path, 110, 3)
    for n in (100, 104):
        (tree / f"SegmentationClass/0{n}.png").unlink()
        mask(tree / f"SegmentationClass/0{n}.png", 21 if n == 100 else 5)
    refused(prepare(*command, workers=2), "0100.png holds label 21")
    mask(tree / "SegmentationClass/0100.png", 2)
    done(*command, workers=2)
    found = {path.stem: values(path) for path in (tree / "SegmentationClassAug").glob("*.png")}
    assert found == {f"{n:04d}": [{100: 2, 104: 5}.get(n, 3)] for n in range(110)}


# ---------------------------------------------------------------- COCO

def box(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def decode_simply(segmentation, shape):
    """prepare_data.decode for upright boxes and uncompressed run lengths."""
    out = np.zeros(shape, dtype=bool)
    if isinstance(segmentation, list):
        for polygon in segmentation:
            x, y = np.int64(polygon[::2]), np.int64(polygon[1::2])
            out[y.min():y.max(), x.min():x.max()] = True
        return out
    flags = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"]).astype(bool)
    return flags.reshape(shape, order="F")                               # COCO runs down the columns


@pytest.fixture
def no_pycocotools(monkeypatch):
    monkeypatch.setattr(prepare_data, "require", lambda *args: None)
    monkeypatch.setattr(prepare_data, "decode", decode_simply)


CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 13, "name": "stop sign"},
              {"id": 90, "name": "toothbrush"}]
CROWD = {"size": [4, 6], "counts": [12, 12]}                             # the right half of a 6x4 image
TRAIN = [  # image, category, segmentation, crowd
    (9, 90, box(1, 1, 3, 3), 0),                                         # small, listed first, still on top
    (9, 3, box(0, 0, 4, 4), 0),
    (9, 1, CROWD, 1),
    (25, 13, box(0, 0, 2, 2), 0),
]
PAINTED = {  # image 9 by --crowd: car 3 (16 pixels), crowd 1 (12), toothbrush 80 (4), in this order
    "include": [[3, 3, 3, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 3, 3, 1, 1, 1]],
    "ignore": [[3] * 4 + [255] * 2, [3, 80, 80, 3, 255, 255], [3, 80, 80, 3, 255, 255], [3] * 4 + [255] * 2],
    "skip": [[3, 3, 3, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 3, 3, 3, 0, 0]],
}
NINE, OTHER = "COCO_train2014_000000000009", "COCO_train2014_000000000025"
VAL = "COCO_val2014_000000000042"


def instances(root, split, ids, annotations, categories=CATEGORIES):
    images = [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": 4, "width": 6} for n in ids]
    annotations = [{"id": k, "image_id": n, "category_id": c, "segmentation": s, "iscrowd": crowd, "area": 1}
                   for k, (n, c, s, crowd) in enumerate(annotations)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    write(root / "annotations" / f"instances_{split}2014.json", json.dumps(content))
    for n in ids:
        image(root / f"{split}2014" / f"COCO_{split}2014_{n:012d}.jpg")


@pytest.fixture
def coco(tmp_path):
    instances(tmp_path / "coco", "train", [9, 25, 30], TRAIN)            # 30 has no annotation
    instances(tmp_path / "coco", "val", [42], [(42, 1, CROWD, 1)])       # nothing but a crowd
    return tmp_path / "coco"


@pytest.mark.parametrize("crowd", ["include", "ignore", "skip"])
def test_coco_by_hand(coco, no_pycocotools, tmp_path, crowd):
    out = tmp_path / "out"
    text = done("coco", "--coco", coco, "--out", out, "--crowd", crowd)
    assert "train: 2 images with an annotation, 1 without are left out; the whole of COCO" in text
    folder = Folder(out)
    assert folder.classes == COCO_CLASSES
    assert folder.ids("train") == [NINE, OTHER] and folder.ids("val") == [VAL]
    assert folder.truth(NINE).tolist() == PAINTED[crowd]
    assert folder.truth(OTHER).tolist() == [[12, 12, 0, 0, 0, 0]] * 2 + [[0] * 6] * 2      # id 13 is class 12
    expected = {"include": [0, 1], "ignore": [0, 255], "skip": [0]}[crowd]
    assert values(out / "SegmentationClass" / f"{VAL}.png") == expected
    person = [] if crowd == "skip" else [0]
    present = [row.nonzero().flatten().tolist() for row in folder.labels([NINE, OTHER, VAL])]
    assert present == [[*person, 2, 79], [11], person]
    assert (out / "JPEGImages" / f"{NINE}.jpg").is_symlink() and folder.image(NINE).shape == (3, 4, 6)
    assert prepare_data.CROWDS[crowd][0] in (out / "SegmentationClass/README.txt").read_text()
    assert "80 classes, no problems" in done("check", out)
    other = "skip" if crowd != "skip" else "include"
    refused(prepare("coco", "--coco", coco, "--out", out, "--crowd", other), "masks of another rule")
    assert folder.truth(NINE).tolist() == PAINTED[crowd]


def test_coco_goes_on_and_repairs_links(coco, no_pycocotools, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done("coco", "--coco", coco, "--out", out)
    lost = [out / name for name in (f"SegmentationClass/{NINE}.png", "labels.txt", "classes.txt")]
    for path in lost:
        path.unlink()
    coco.rename(tmp_path / "moved")
    link = out / f"JPEGImages/{OTHER}.jpg"
    assert link.is_symlink() and not link.exists()
    monkeypatch.chdir(tmp_path)
    done("coco", "--coco", "moved", "--out", "out")                      # links to relative paths hold, too
    assert link.exists() and all(path.exists() for path in lost)
    assert Folder(out).truth(NINE).tolist() == PAINTED["include"]
    lost[0].unlink()                                                     # the image is there, the mask is not
    kept = out / "SegmentationClass" / f"{VAL}.png"
    before = kept.stat().st_mtime_ns
    assert "2 masks are in" in done("coco", "--coco", "moved", "--out", "out") and lost[0].exists()
    assert kept.stat().st_mtime_ns == before


def test_decode_polygons_and_run_lengths():
    rle = pytest.importorskip("pycocotools.mask")
    truth = decode_simply(box(1, 1, 3, 3), (4, 6))
    runs = rle.encode(np.asfortranarray(truth.astype(np.uint8)))
    text = {**runs, "counts": runs["counts"].decode()}                   # as COCO's JSON has it
    two, point = box(1, 1, 2, 3) + box(2, 1, 3, 3), box(1, 1, 3, 3) + [[1, 1, 3, 3]]
    for segmentation in (box(1, 1, 3, 3), runs, text, two, point):
        assert (prepare_data.decode(segmentation, (4, 6)) == truth).all()
    assert (prepare_data.decode(CROWD, (4, 6)) == decode_simply(CROWD, (4, 6))).all()
    for empty in ([], [[0, 0, 4, 4]]):                                   # four numbers are no box
        assert not prepare_data.decode(empty, (4, 6)).any()
    with pytest.raises(ValueError, match="run lengths"):
        prepare_data.decode(runs, (6, 4))


def test_paint_order():
    paint, big, small = prepare_data.paint_objects, np.ones((2, 2), bool), np.eye(2, dtype=bool)
    assert paint((2, 2), [(5, small), (7, big)]).tolist() == [[5, 7], [7, 5]]
    assert paint((2, 2), [(7, big), (5, small)]).tolist() == [[5, 7], [7, 5]]
    assert paint((2, 2), [(5, small), (6, small)]).tolist() == [[6, 0], [0, 6]]            # the later one
    assert paint((2, 2), [(255, small), (7, big)]).tolist() == [[7, 7], [7, 7]]            # 255 lies beneath
    assert paint((1, 2), []).tolist() == [[0, 0]]


def test_category_ids_become_contiguous():
    index = prepare_data.COCO_INDEX
    named = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 31: "handbag",
             44: "bottle", 46: "wine glass", 67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator",
             84: "book", 90: "toothbrush"}
    assert {i: COCO_CLASSES[index[i]] for i in named} == named
    assert list(index.values()) == list(range(80)) and len(COCO_CLASSES) == 80


def put(path, content):
    """A change of a folder: a file with this text, or these bytes."""
    def change(root):
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def unlink(path):
    return lambda root: (root / path).unlink()


JSON = "annotations/instances_train2014.json"


@pytest.mark.parametrize("change, message", [
    (unlink("annotations/instances_val2014.json"), "instances_val2014.json is missing"),
    (put(JSON, "{"), "train2014.json is not COCO's instances file"),
    (put(JSON, "{}"), "train2014.json is not COCO's instances file"),
    (lambda r: instances(r, "train", [9], [(9, 12, CROWD, 0)]), "KeyError: 12"),
    (lambda r: instances(r, "train", [9], TRAIN, [{"id": 1, "name": "cat"}]), "other categories than COCO"),
    (unlink(f"train2014/{NINE}.jpg"), f"{NINE}.jpg and 0 more images are missing"),
    (lambda r: instances(r, "train", [9], [(9, 1, {"size": [4, 6], "counts": [7]}, 0)]), "cannot be decoded"),
    (lambda r: instances(r, "train", [9, 9], TRAIN), "an image occurs twice"),
    (lambda r: mask(r.parent / f"out/SegmentationClass/{NINE}.png", 5), "masks of another rule"),
], ids=["no-json", "torn-json", "other-json", "category", "names", "no-image", "runs", "twice", "own-mask"])
def test_coco_bad_input(coco, no_pycocotools, tmp_path, change, message):
    change(coco)
    refused(prepare("coco", "--coco", coco, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out/labels.txt").exists() and not list((tmp_path / "out").rglob(".*"))


# ---------------------------------------------------------------- check

@pytest.fixture
def mine(tmp_path):
    """Somebody's own folder without a fault: two classes, an image without any, masks for val alone."""
    root = tmp_path / "mine"
    for id in "abc":
        image(root / "JPEGImages" / f"{id}.jpg")
    mask(root / "SegmentationClass/c.png", [[0, 2, 255] * 2] * 4)
    write(root / "classes.txt", "cat\nred dog\n")
    write(root / "labels.txt", "a cat\nb\nc red_dog\n")
    write(root / "ImageSets/Segmentation/train.txt", "a\nb\n")
    write(root / "ImageSets/Segmentation/val.txt", "/JPEGImages/c.jpg /SegmentationClass/c.png\n")
    return root


def test_check_passes_a_folder_without_masks_to_train_on(mine):
    assert done("check", mine).splitlines() == [
        "train: 2 ids, 2 images, 0 with a mask, 2 with labels, 0.500 classes an image, 1 without any",
        "val: 1 ids, 1 images, 1 with a mask, 1 with labels, 1.000 classes an image, 0 without any",
        f"{mine}: 2 classes, no problems, no warnings"]


def test_check_of_own_images_without_lists(mine):
    shutil.rmtree(mine / "ImageSets")
    image(mine / "JPEGImages/forgotten.jpg")
    found = prepare("check", mine)
    assert found.returncode == 1 and f"missing mask: {mine}: a in train.txt has none" in found.stdout
    shutil.rmtree(mine / "SegmentationClass")
    text = done("check", mine)
    assert "train: 3 ids, 3 images, 0 with a mask, 3 with labels" in text and "no problems, 1 warning" in text
    assert "warning: no label: forgotten.jpg has no line in labels.txt: it is not used\n" in text
    (mine / "JPEGImages/b.jpg").unlink()
    assert f"missing image: {mine}/JPEGImages/b.jpg, listed in labels.txt\n" in prepare("check", mine).stdout


def turn(root):
    tags = Image.Exif()
    tags[0x0112] = 6                                                     # 6x4, shown as 4x6
    Image.new("RGB", (6, 4)).save(root / "JPEGImages/c.jpg", exif=tags)


def break_link(root):
    unlink(JPG)(root)
    (root / JPG).symlink_to("/nowhere")


JPG, PNG = "JPEGImages/a.jpg", "SegmentationClass/c.png"
LIST, MORE = "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/more.txt"
WRONG = {  # a change of the folder -> kind and text of the one line that check prints
    "missing image": (unlink(JPG), "missing image", f"{JPG}, listed in train.txt"),
    "dangling link": (break_link, "missing image", JPG),
    "torn image": (lambda r: put(JPG, (r / JPG).read_bytes()[:300])(r), "unreadable image", JPG),
    "missing mask": (lambda r: mask(r / "SegmentationClass/a.png", 1), "missing mask", ": b in train.txt"),
    "torn mask": (put(PNG, b"\x89PNG"), "bad mask", f"{PNG} is not a readable mask"),
    "other colours": (lambda r: Image.new("RGB", (6, 4), (1, 2, 3)).save(r / PNG), "bad mask", PNG),
    "size": (lambda r: mask(r / PNG, 2, (4, 6)), "size", f"{PNG} is 4x6, its image 6x4"),
    "turned image": (turn, "size", f"{PNG} is 6x4, its image 4x6"),
    "label value": (lambda r: mask(r / PNG, 81), "label value", f"{PNG} holds 81: masks hold 0..2 and 255"),
    "listed twice": (put(LIST, "a\nb\na\n"), "duplicate id", f"{LIST} lists a twice"),
    "absolute": (put(LIST, "a\nb\n/etc/passwd\n"), "bad id", f"{LIST}: '/etc/passwd'"),
    "empty list": (put(MORE, "\n"), "bad list", f"{MORE} is empty"),
    "foreign text": (put(MORE, b"\xff\xfe\x00a"), "bad list", f"{MORE} is not UTF-8"),
    "no list": (lambda r: [path.unlink() for path in r.rglob("ImageSets/*/*")], "bad list", "holds no list"),
    "labelled twice": (put("labels.txt", "a cat\nb\nc 1\na\n"), "duplicate id", "labels.txt:4: a has a"),
    "label leaves": (put("labels.txt", "a cat\nb\nc 1\n../a cat\n"), "bad id", "labels.txt:4: '../a'"),
    "unknown class": (put("labels.txt", "a cta\nb\nc 1\n"), "bad label", "labels.txt:1: 'cta' is not in"),
    "index too large": (put("labels.txt", "a 0\nb\nc 2\n"), "bad label", "labels.txt:3: '2' is not in"),
    "missing label": (put("labels.txt", "a cat\nc 1\n"), "missing label", ": b in train.txt has none"),
    "no labels": (unlink("labels.txt"), "bad label", "holds no labels"),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_finds(mine, name):
    change, kind, text = WRONG[name]
    change(mine)
    found = prepare("check", mine)
    *lines, last = found.stdout.splitlines()
    line, = (line for line in lines if not line.startswith(("train:", "val:", "more:", "warning")))
    assert found.returncode == 1 and ", 1 problem, " in last
    assert line.startswith(f"{kind}: {mine}") and text in line


def test_check_warns(mine):
    write(mine / "labels.txt", "a cat\nb\nc cat\n")
    write(mine / "ImageSets/Segmentation/train_aug.txt", "c\n")
    text = done("check", mine)
    assert f"warning: labels differ: {mine}/{PNG} shows red dog; its label says cat\n" in text
    assert "warning: in two splits: c is in train_aug.txt and val.txt\n" in text
    assert ", no problems, 2 warnings" in text


def test_check_does_not_stop_at_the_first_problem(mine):
    for name in ("missing image", "torn mask", "empty list"):
        WRONG[name][0](mine)
    write(mine / "labels.txt", "a cta\nb dgo\nb\n../a cat\nc 7\n")
    text = prepare("check", mine).stdout
    for line in ("missing image: ", "bad mask: ", "bad list: ", "labels.txt:1: 'cta'", "labels.txt:2: 'dgo'",
                 "labels.txt:3: b has", "labels.txt:4: '../a'", "labels.txt:5: '7'", "8 problems"):
        assert line in text


def test_check_prints_some_of_each_kind_or_all(mine):
    write(mine / "ImageSets/Segmentation/train.txt", "".join(f"x{n:02d}\n" for n in range(30)))
    write(mine / "labels.txt", "c red_dog\n")
    text = prepare("check", mine).stdout
    assert text.count("missing image: ") == 21 and "30 problems" in text
    assert "... and 10 more (--show 0: all)" in text
    for show in ("0", "30"):
        text = prepare("check", mine, "--show", show).stdout
        assert text.count("missing image: ") == 30 and "more" not in text


def test_check_reads_voc_annotations_and_test_lists(voc, no_scipy):
    tree = voc[0]
    done(*voc_command(voc))
    for id in {**VOC, **SBD}:
        image(tree / "JPEGImages" / f"{id}.jpg", (3, 1))
    image(tree / "JPEGImages/2008_000099.jpg")
    write(tree / "ImageSets/Segmentation/test.txt", "2008_000099\n")     # neither mask nor label: no fault
    text = done("check", tree)
    assert "20 classes, no problems, 4 warnings" in text and "labels differ" in text
    write(tree / "Annotations/2007_000032.xml", "<annotation>")
    (tree / "Annotations/2007_000033.xml").unlink()
    text = prepare("check", tree).stdout
    assert "bad label: " in text and "2007_000032.xml is not readable XML" in text
    assert "missing label: " in text and "2007_000033 in train.txt has none" in text


def test_check_refuses_what_is_no_folder(tmp_path, mine):
    write(mine / "classes.txt", "cat\ncat\n")                            # what a label means cannot be known
    refused(prepare("check", mine), "classes.txt must hold one name a line, none twice")
    refused(prepare("check", tmp_path / "nothing"), "nothing/JPEGImages is missing")


# ---------------------------------------------------------------- 90-id COCO

@pytest.fixture
def ninety(tmp_path):
    root = tmp_path / "coco"
    for id, row in {"a": [0, 1, 255, 90], "b": [0, 13, 84, 25], "c": [0, 11, 0, 0]}.items():
        image(root / "JPEGImages" / f"{id}.jpg", (4, 1))
        mask(root / "SegmentationClass" / f"{id}.png", [row])
    write(root / "classes.txt", "".join(f"{name}\n" for name in COCO_CLASSES))
    write(root / "labels.txt", "a person toothbrush\nb stop_sign book giraffe\nc fire_hydrant\n")
    write(root / "ImageSets/Segmentation/train.txt", "a\nb\nc\n")
    return root


REMAPPED = {"a": [0, 1, 255, 80], "b": [0, 12, 74, 24], "c": [0, 11, 0, 0]}


def test_ninety_ids_are_found_and_remapped_once(ninety):
    found = prepare("check", ninety)
    assert "run prepare_data.py remap" in found.stdout and "2 problems" in found.stdout
    assert "3 masks remapped from 90 ids to 80" in done("remap", ninety)
    folder = ninety / "SegmentationClass"
    assert {id: load_mask(folder / f"{id}.png").tolist()[0] for id in REMAPPED} == REMAPPED
    assert load_mask(ninety / "SegmentationClass.90id/b.png").tolist() == [[0, 13, 84, 25]]        # kept
    done("check", ninety)
    (folder / "a.png").unlink()                                          # as a killed run leaves it
    assert "1 masks remapped" in done("remap", ninety)
    assert {id: load_mask(folder / f"{id}.png").tolist()[0] for id in REMAPPED} == REMAPPED


def test_remap_refuses_without_proof(ninety):
    mask(ninety / "SegmentationClass/c.png", [[0, 12, 0, 0]])            # no category 12
    refused(prepare("remap", ninety), "holds label 12, which is no category id")
    assert not (ninety / "SegmentationClass.90id").exists()
    for id in "abc":
        mask(ninety / f"SegmentationClass/{id}.png", [[0, 1, 2, 3]])
    refused(prepare("remap", ninety), "holds no label 81..90")
    assert values(ninety / "SegmentationClass/a.png") == [0, 1, 2, 3]
    write(ninety / "classes.txt", "cat\n")
    refused(prepare("remap", ninety), "does not list COCO's 80 classes")
