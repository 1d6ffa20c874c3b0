"""prepare_data.py: which mask wins, what is painted over what, findings of check, a kill, bad input.

scipy and pycocotools are optional: most tests replace what decodes by them, the others are then skipped."""
import json
import shutil
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


def prepare(*argv):
    return call("prepare_data.py", *argv, "--workers", 0)


def done(*argv):
    """The output of a command that succeeds."""
    finished = prepare(*argv)
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
LISTS = "ImageSets/Segmentation"


@pytest.fixture
def voc(tmp_path):
    """VOC's tree and SBD's, in which a .mat holds the label as text (see `no_scipy`)."""
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    for id in {**VOC, **SBD}:
        image(tree / "JPEGImages" / f"{id}.jpg")
        write(tree / f"Annotations/{id}.xml", "<annotation><object><name>cat</name></object></annotation>")
    for id, value in VOC.items():
        mask(tree / "SegmentationClass" / f"{id}.png", [[0, value, 255]])
    write(tree / LISTS / "train.txt", "2007_000032\n2007_000033\n")
    write(tree / LISTS / "val.txt", "2007_000042")                       # no last newline
    for id, value in SBD.items():
        write(sbd / "dataset" / "cls" / f"{id}.mat", str(value))
    return tree, sbd


@pytest.fixture
def no_scipy(monkeypatch):
    monkeypatch.setattr(prepare_data, "require", lambda *args: None)
    monkeypatch.setattr(prepare_data, "read_sbd",
                        lambda path: np.array([[0, int(path.read_text()), 0]], np.uint8))


def command(voc, *more):
    return "voc", "--voc", voc[0], "--sbd", voc[1], "--allow-partial", *more


def test_voc_masks_win_over_sbd_and_a_part_needs_leave(voc, no_scipy):
    refused(prepare(*command(voc)[:-1]), "3 masks of VOC, not 2,913", "4 masks together, not 12,031",
            "3 train_aug images, not 10,582", "--allow-partial")
    assert not (voc[0] / "SegmentationClassAug").exists() and 12031 - 1449 == 10582
    assert "3 masks of VOC, 3 masks of SBD, 4 masks together, 3 train_aug images" in done(*command(voc))
    found = {path.stem: values(path) for path in sorted((voc[0] / "SegmentationClassAug").glob("*.png"))}
    assert found == {"2007_000032": [0, 1, 255], "2007_000033": [0, 2, 255], "2007_000042": [0, 3, 255],
                     "2008_000002": [0, 14]}                             # three of VOC, one of SBD
    assert (voc[0] / LISTS / "train_aug.txt").read_text().split() == TRAIN_AUG


def test_voc_keeps_the_masks_and_lists_of_the_user(voc, no_scipy):
    own = voc[0] / "SegmentationClassAug" / "2008_000002.png"
    mask(own, 7)
    pairs = "".join(f"/JPEGImages/{id}.jpg /SegmentationClassAug/{id}.png\n" for id in reversed(TRAIN_AUG))
    listed = write(voc[0] / LISTS / "train_aug.txt", pairs)
    assert "1 masks are in" in done(*command(voc)) and values(own) == [7]
    assert listed.read_text() == pairs                                   # the same ids in another notation
    write(listed, "2007_000032\n")
    refused(prepare(*command(voc)), "train_aug.txt is there with another content")
    assert listed.read_text() == "2007_000032\n"


def test_voc_with_out_leaves_the_tree_alone(voc, no_scipy, tmp_path):
    before, out = sorted(voc[0].rglob("*")), tmp_path / "prepared"
    done(*command(voc, "--out", out))
    assert sorted(voc[0].rglob("*")) == before and (out / "JPEGImages").is_symlink()
    folder = Folder(out)
    assert folder.ids("train_aug") == TRAIN_AUG and folder.ids("val") == ["2007_000042"]
    assert folder.truth("2008_000002").tolist() == [[0, 14, 0]]
    assert folder.labels(["2008_000002"]).argmax().item() == VOC_CLASSES.index("cat")


def test_voc_bad_input(voc, coco, no_scipy, tmp_path, monkeypatch):
    refused(prepare(*command((voc[0], tmp_path / "nothing"))), "nothing/dataset/cls is missing")
    mask(voc[0] / "SegmentationClass/2007_000032.png", 21)
    refused(prepare(*command(voc)), "2007_000032.png holds label 21")
    assert not (voc[0] / LISTS / "train_aug.txt").exists()
    monkeypatch.undo()                                                   # without the optional packages
    for name in ("scipy", "scipy.io", "pycocotools"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(prepare(*command(voc)), "scipy is missing, it reads SBD's .mat files: pip install scipy")
    refused(prepare("coco", "--coco", coco, "--out", tmp_path / "out"), "pip install pycocotools")


def test_sbd_mat_files(voc):
    io, truth = pytest.importorskip("scipy.io"), np.zeros((4, 6), np.uint8)
    for id, value in SBD.items():
        truth[1, 2] = value
        content = {"Boundaries": np.zeros((20, 1)), "Segmentation": truth, "CategoriesPresent": [[value]]}
        io.savemat(voc[1] / "dataset/cls" / f"{id}.mat", {"GTcls": content})
    done(*command(voc))
    made, mat = voc[0] / "SegmentationClassAug/2008_000002.png", voc[1] / "dataset/cls/2008_000002.mat"
    assert (load_mask(made) == truth).all() and truth[1, 2] == 14
    for content in (mat.read_bytes()[:200], b"MATLAB 7.3?" * 30, {"GTinst": 1},
                    {"GTcls": {"Segmentation": np.full((2, 2), 21)}}):
        made.unlink(missing_ok=True)
        mat.write_bytes(content) if isinstance(content, bytes) else io.savemat(mat, content)
        refused(prepare(*command(voc)), "2008_000002.mat is not a mask of SBD", "unpack")


def test_a_killed_run_leaves_whole_masks_and_goes_on(tmp_path):
    tree, sbd, noise = tmp_path / "a", tmp_path / "b", np.random.default_rng(0).integers(0, 21, (300, 400))
    (tree / "JPEGImages").mkdir(parents=True)
    (sbd / "dataset/cls").mkdir(parents=True)
    write(tree / LISTS / "val.txt", "0\n")
    mask(tree / "SegmentationClass/0.png", noise)
    for n in range(1, 150):
        (tree / f"SegmentationClass/{n}.png").hardlink_to(tree / "SegmentationClass/0.png")
    words = [sys.executable, "prepare_data.py", *map(str, command((tree, sbd))), "--workers", "0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    aug, end = tree / "SegmentationClassAug", time.time() + 60
    while len(list(aug.glob("*.png"))) < 5 and time.time() < end and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in aug.glob("*.png")}
    assert 5 <= len(first) < 150 and not (tree / LISTS / "train_aug.txt").exists()
    assert all((load_mask(path) == noise).all() for path in first)
    assert f"{len(first)} masks are in" in done(*command((tree, sbd))) and len(list(aug.glob("*.png"))) == 150
    assert {path: path.stat().st_mtime_ns for path in first} == first    # finished masks are not made again
    assert len(Folder(tree).ids("train_aug")) == 149


# ---------------------------------------------------------------- COCO

def box(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def decode_simply(segmentation, shape):
    """prepare_data.read_outline for one upright box, or uncompressed run lengths, down the columns."""
    if isinstance(segmentation, list):
        (x0, y0, *_, x1, y1, _, _), out = segmentation[0], np.zeros(shape, dtype=bool)
        out[y0:y1, x0:x1] = True
        return out
    runs = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"]).astype(bool)
    return runs.reshape(shape, order="F")


@pytest.fixture
def no_pycocotools(monkeypatch):
    monkeypatch.setattr(prepare_data, "require", lambda *args: None)
    monkeypatch.setattr(prepare_data, "read_outline", decode_simply)


CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 13, "name": "stop sign"},
              {"id": 90, "name": "toothbrush"}]
CROWD = {"size": [4, 6], "counts": [12, 12]}                             # the right half of a 6x4 image
TRAIN = [  # image, category, segmentation, crowd
    (9, 90, box(1, 1, 3, 3), 0),                                         # small, listed first, still on top
    (9, 3, box(0, 0, 4, 4), 0),
    (9, 1, CROWD, 1),
    (25, 13, box(0, 0, 2, 2), 0)]
PAINTED = {  # image 9 by --crowd: car 3 (16 pixels), crowd 1 (12), toothbrush 80 (4), in this order
    "include": [[3, 3, 3, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 3, 3, 1, 1, 1]],
    "ignore": [[3] * 4 + [255] * 2, [3, 80, 80, 3, 255, 255], [3, 80, 80, 3, 255, 255], [3] * 4 + [255] * 2],
    "skip": [[3, 3, 3, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 3, 3, 3, 0, 0]]}
NINE, OTHER = "COCO_train2014_000000000009", "COCO_train2014_000000000025"
VAL = "COCO_val2014_000000000042"


def instances(root, split, ids, annotations, categories=CATEGORIES):
    images = [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": 4, "width": 6} for n in ids]
    annotations = [{"id": k, "image_id": n, "category_id": c, "segmentation": s, "iscrowd": crowd, "area": 1}
                   for k, (n, c, s, crowd) in enumerate(annotations)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    write(root / "annotations" / f"instances_{split}2014.json", json.dumps(content))
    for each in images:
        image(root / f"{split}2014" / each["file_name"])


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
    assert values(out / f"SegmentationClass/{VAL}.png") == {"include": [0, 1], "ignore": [0, 255],
                                                            "skip": [0]}[crowd]
    person = [] if crowd == "skip" else [0]
    present = [row.nonzero().flatten().tolist() for row in folder.labels([NINE, OTHER, VAL])]
    assert present == [[*person, 2, 79], [11], person]
    assert (out / "JPEGImages" / f"{NINE}.jpg").is_symlink() and folder.image(NINE).shape == (3, 4, 6)
    assert "80 classes, no problems" in done("check", out)
    other = "skip" if crowd != "skip" else "include"
    again = prepare("coco", "--coco", coco, "--out", out, "--crowd", other)
    refused(again, "that are not of these files with --crowd")


def test_coco_goes_on_and_repairs_links(coco, no_pycocotools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    done("coco", "--coco", coco, "--out", out)
    lost = [out / name for name in (f"SegmentationClass/{NINE}.png", "labels.txt", "classes.txt")]
    for path in lost:
        path.unlink()
    coco.rename(tmp_path / "moved")
    link = out / f"JPEGImages/{OTHER}.jpg"
    assert link.is_symlink() and not link.exists()
    done("coco", "--coco", "moved", "--out", "out")                      # links to relative paths hold, too
    assert link.exists() and all(path.exists() for path in lost)
    assert Folder(out).truth(NINE).tolist() == PAINTED["include"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_decode_polygons_and_run_lengths():
    rle, square = pytest.importorskip("pycocotools.mask"), box(1, 1, 3, 3)
    truth = decode_simply(square, (4, 6))
    runs = rle.encode(np.asfortranarray(truth.astype(np.uint8)))
    text = {**runs, "counts": runs["counts"].decode()}                   # as COCO's JSON has it
    two = box(1, 1, 2, 3) + box(2, 1, 3, 3)
    for segmentation in (square, runs, text, two, square + [[1, 1, 3, 3]]):         # four numbers are no box
        assert (prepare_data.read_outline(segmentation, (4, 6)) == truth).all()
    assert (prepare_data.read_outline(CROWD, (4, 6)) == decode_simply(CROWD, (4, 6))).all()
    assert not prepare_data.read_outline([], (4, 6)).any()
    with pytest.raises(ValueError, match="run lengths"):
        prepare_data.read_outline(runs, (6, 4))


def put(path, content):
    """A change of a folder: a file with this text, or these bytes; None removes it."""
    def change(root):
        (root / path).unlink(missing_ok=True)
        if content is not None:
            (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


JSON = "annotations/instances_train2014.json"


@pytest.mark.parametrize("change, message", [
    (put("annotations/instances_val2014.json", None), "instances_val2014.json is missing"),
    (put(JSON, "{}"), "train2014.json is not COCO's instances file"),
    (lambda r: instances(r, "train", [9], [(9, 12, CROWD, 0)]), "KeyError: 12"),
    (lambda r: instances(r, "train", [9], TRAIN, [{"id": 1, "name": "cat"}]), "other categories than COCO"),
    (put(f"train2014/{NINE}.jpg", None), f"{NINE}.jpg and 0 more images are missing"),
    (lambda r: instances(r, "train", [9], [(9, 1, {"size": [4, 6], "counts": [7]}, 0)]), "cannot be decoded"),
    (lambda r: mask(r.parent / f"out/SegmentationClass/{NINE}.png", 5), "that are not of these files")])
def test_coco_bad_input(coco, no_pycocotools, tmp_path, change, message):
    change(coco)
    refused(prepare("coco", "--coco", coco, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out/labels.txt").exists() and not list((tmp_path / "out").rglob(".*"))


# ---------------------------------------------------------------- one file in COCO's format

OWN = [{"id": 0, "name": "objects"}, {"id": 7, "name": "fork lift"}, {"id": 4, "name": "pallet"}]


def own(root, annotations, names=("a one.jpg", "sub\\b.png", "c.jpg"), categories=OWN, **size):
    """mine.json and its images, as Roboflow (an unused category 0) and Label Studio (paths) write it."""
    images = [{"id": 10 + n, "file_name": name, **(size or {"height": 4, "width": 6})}
              for n, name in enumerate(names)]
    annotations = [{"id": k, "image_id": n, "category_id": c, **more}
                   for k, (n, c, more) in enumerate(annotations)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    write(root / "mine.json", json.dumps(content))
    for name in names:
        image(root / "photos" / name.replace("\\", "/"))
    return "coco", "--json", root / "mine.json", "--images", root / "photos", "--out", root / "out"


SQUARE = {"segmentation": box(1, 1, 3, 3), "iscrowd": 0}


def test_one_file_of_any_ids_and_names(no_pycocotools, tmp_path):
    """Classes by id, blanks in file names, images by path or by name; every fifth image is val."""
    command = own(tmp_path, [(10, 7, SQUARE), (10, 4, {"segmentation": box(0, 0, 1, 4)}), (11, 4, SQUARE)])
    text = done(*command)
    assert "2 classes, 2 images with an annotation, 1 without are left out; 2 have segmentations" in text
    folder = Folder(tmp_path / "out")
    assert folder.classes == ["pallet", "fork lift"]
    assert (folder.ids("train"), folder.ids("val")) == (["b"], ["a one"])
    assert folder.labels(["a one", "b"]).tolist() == [[1, 1], [1, 0]]
    row = [1, 0, 0, 0, 0, 0]
    assert folder.truth("a one").tolist() == [row, *[[1, 2, 2, 0, 0, 0]] * 2, row]
    assert "no problems" in done("check", tmp_path / "out")
    assert "2 masks are in" in done(*command)                            # a second call finds them
    text = (tmp_path / "mine.json").read_text().replace('"iscrowd": 0', '"iscrowd": 1')
    (tmp_path / "mine.json").write_text(text)                            # corrected and exported again
    refused(prepare(*command), "that are not of these files with --crowd")


def test_boxes_give_labels_and_the_images_with_segmentations_are_val(no_pycocotools, tmp_path):
    bare = {"bbox": [1, 1, 2, 2], "segmentation": []}
    outlined = [(12, 4, SQUARE), (13, 4, SQUARE), (14, 7, SQUARE)]        # three of six: at most a fifth, one
    done(*own(tmp_path, [(10, 7, bare), (11, 4, SQUARE), (11, 7, bare), *outlined, (15, 7, bare)],
              names=("a one.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg", "f.jpg")))
    folder = Folder(tmp_path / "out")
    assert (folder.ids("train"), folder.ids("val")) == (["a one", "b", "d", "e", "f"], ["c"])
    assert folder.labels(["a one", "b", "c"]).tolist() == [[0, 1], [1, 1], [1, 0]]
    assert [folder.has_mask(id) for id in ("a one", "b", "c", "d")] == [False, False, True, False]
    assert "no problems" in done("check", tmp_path / "out")


def test_boxes_alone_need_no_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    done(*own(tmp_path, [(10, 7, {}), (11, 4, {})]))
    assert Folder(tmp_path / "out").ids("train") == ["a one", "b"]
    assert not list((tmp_path / "out").rglob("val.txt"))


@pytest.mark.parametrize("change, message", [
    (lambda r: (r / "mine.json").unlink(), "mine.json is missing: --json is the file"),
    (lambda r: write(r / "mine.json", "[1]"), "mine.json is not in COCO's format"),
    (lambda r: own(r, [(10, 5, SQUARE)]), "is not in COCO's format (KeyError: 5)"),
    (lambda r: own(r, []), "annotates no image"),
    (lambda r: own(r, [(10, 7, SQUARE), (10, 4, SQUARE)], categories=[{"id": 7, "name": "x"},
                                                                      {"id": 4, "name": "x "}]),
     "the name 'x' is of two categories"),
    (lambda r: own(r, [(10, 7, SQUARE)], categories=[{"id": 7, "name": "background"}]), "'background' is"),
    (lambda r: own(r, [(10, 7, SQUARE)], names=("a.jpg",)) and [(r / "photos/a.jpg").unlink()] + [
        image(r / f"photos/{day}/a.jpg") for day in "12"], "a.jpg may be "),
    (lambda r: own(r, [(10, 7, SQUARE), (11, 7, SQUARE)], names=("a.jpg", "sub/a.png")),
     "would both be image a: rename one"),
    (lambda r: own(r, [(10, 7, SQUARE)], names=("a.gif",)), "a.gif: images end in .jpg"),
    (lambda r: own(r, [(10, 7, SQUARE)], height=6, width=4), "is 6x4, "),
    (lambda r: (r / "photos/c.jpg").unlink(), "photos holds no c.jpg, 1 of 2 images that"),
    (lambda r: shutil.rmtree(r / "photos"), "photos is not a folder: --images is the folder")])
def test_one_file_bad_input(no_pycocotools, tmp_path, change, message):
    command = own(tmp_path, [(10, 7, SQUARE), (12, 4, SQUARE)])
    change(tmp_path)
    refused(prepare(*command), message)
    assert not (tmp_path / "out").exists()


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
    write(root / LISTS / "train.txt", "a\nb\n")
    write(root / LISTS / "val.txt", "/JPEGImages/c.jpg /SegmentationClass/c.png\n")
    return root


def test_check_passes_a_folder_without_masks_to_train_on(mine):
    assert done("check", mine).splitlines() == [
        "train: 2 ids, 2 images, 0 with a mask, 2 with labels, 0.500 classes an image, 1 without any",
        "val: 1 ids, 1 images, 1 with a mask, 1 with labels, 1.000 classes an image, 0 without any",
        f"{mine}: 2 classes, no problems, no warnings"]


def test_check_of_own_images_without_lists(mine):
    shutil.rmtree(mine / "ImageSets")
    image(mine / "JPEGImages/forgotten.jpg")
    image(mine / "JPEGImages/a.png")
    assert f"missing mask: {mine}: a in labels.txt has none" in prepare("check", mine).stdout
    shutil.rmtree(mine / "SegmentationClass")
    text = done("check", mine)
    assert "train: 3 ids, 3 images, 0 with a mask, 3 with labels" in text
    assert "no problems, 2 warnings" in text
    assert f"warning: two images: {mine}/JPEGImages/a.png is not used, a.jpg is\n" in text
    (mine / "classes.txt").unlink()
    assert "20 classes (no classes.txt: VOC's)" in prepare("check", mine).stdout


JPG, PNG, TXT = "JPEGImages/a.jpg", "SegmentationClass/c.png", f"{LISTS}/train.txt"
WRONG = {  # a change of the folder -> kind and text of the one line that check prints
    "missing image": (put(JPG, None), "missing image", f"{JPG}, listed in train.txt"),
    "torn image": (lambda r: put(JPG, (r / JPG).read_bytes()[:300])(r), "unreadable image", JPG),
    "missing mask": (lambda r: mask(r / "SegmentationClass/a.png", 1), "missing mask", ": b in train.txt"),
    "torn mask": (put(PNG, b"\x89PNG"), "bad mask", f"{PNG} is not a readable mask"),
    "size": (lambda r: mask(r / PNG, 2, (4, 6)), "size", f"{PNG} is 4x6, its image 6x4"),
    "label value": (lambda r: mask(r / PNG, 81), "label value", f"{PNG} holds 81: masks hold 0..2 and 255"),
    "listed twice": (put(TXT, "a\nb\na\n"), "duplicate id", f"{TXT} lists a twice"),
    "absolute": (put(TXT, "a\nb\n/etc/passwd\n"), "bad id", f"{TXT}: '/etc/passwd'"),
    "empty list": (put(f"{LISTS}/more.txt", "\n"), "bad list", "more.txt is empty"),
    "foreign text": (put(f"{LISTS}/more.txt", b"\xff\xfe\x00a"), "bad list", "more.txt is not UTF-8"),
    "no list": (lambda r: [path.unlink() for path in r.rglob("ImageSets/*/*")], "bad list", "holds no list"),
    "missing label": (put("labels.txt", "a cat\nc 1\n"), "missing label", ": b in train.txt has none"),
    "commas": (put("labels.txt", "a cat\nb\nd, cat\nc 1\n"), "bad label", "labels.txt:3: no commas"),
    "no labels": (put("labels.txt", None), "bad label", "holds no labels")}


@pytest.mark.parametrize("name", WRONG)
def test_check_finds(mine, name):
    change, kind, text = WRONG[name]
    change(mine)
    found = prepare("check", mine)
    *lines, last = found.stdout.splitlines()
    line, = (line for line in lines if not line.startswith(("train:", "val:", "more:", "warning")))
    assert found.returncode == 1 and ", 1 problem, " in last
    assert line.startswith(f"{kind}: {mine}") and text in line


def test_check_does_not_stop_at_the_first_problem(mine):
    for name in ("missing image", "torn mask", "empty list"):
        WRONG[name][0](mine)
    write(mine / "labels.txt", "a cta\nb dgo\nb\n../a cat\nc 7\n")
    text = prepare("check", mine).stdout
    for line in ("missing image: ", "bad mask: ", "bad list: ", "labels.txt:1: 'cta'", "labels.txt:2: 'dgo'",
                 "labels.txt:3: b has", "labels.txt:4: '../a'", "labels.txt:5: '7'", "8 problems"):
        assert line in text
    write(mine / TXT, "".join(f"x{n:02d}\n" for n in range(30)))
    assert "missing image: ... and 10 more (--show 0: all)" in prepare("check", mine).stdout
    assert prepare("check", mine, "--show", "0").stdout.count("missing image: ") == 30


def test_check_warns_and_reads_annotations(mine, voc, no_scipy):
    write(mine / "labels.txt", "a cat\nb\nc cat\n")
    write(mine / LISTS / "train_aug.txt", "c\n")
    text = done("check", mine)
    assert f"warning: labels differ: {mine}/{PNG} shows red dog; its label says cat\n" in text
    assert "warning: in two splits: c is in train_aug.txt and val.txt\n" in text
    done(*command(voc, "--out", mine.parent / "voc"))
    write(voc[0] / "Annotations/2007_000032.xml", "<annotation>")
    (voc[0] / "Annotations/2007_000033.xml").unlink()
    text = prepare("check", mine.parent / "voc").stdout
    assert "bad label: " in text and "2007_000032.xml is not readable XML" in text
    assert "missing label: " in text and "2007_000033 in train.txt has none" in text


# ---------------------------------------------------------------- 90-id COCO

def test_masks_of_90_ids_are_found_and_remapped_once_and_none_without_proof(tmp_path):
    root, folder = tmp_path / "coco", tmp_path / "coco/SegmentationClass"
    for id, row in {"a": [0, 1, 255, 90], "b": [0, 13, 84, 25], "c": [0, 12, 0, 0]}.items():
        image(root / "JPEGImages" / f"{id}.jpg", (4, 1))
        mask(folder / f"{id}.png", [row])
    write(root / "classes.txt", "".join(f"{name}\n" for name in COCO_CLASSES))
    write(root / "labels.txt", "a person toothbrush\nb stop_sign book giraffe\nc fire_hydrant\n")
    write(root / LISTS / "train.txt", "a\nb\nc\n")
    refused(prepare("remap", root), "holds label 12, which is no category id")
    mask(folder / "c.png", [[0, 11, 0, 0]])
    found = prepare("check", root)
    assert "run prepare_data.py remap" in found.stdout and "2 problems" in found.stdout
    for lost in ("3", "1"):                                              # then as a killed run leaves it
        assert f"{lost} masks remapped from 90 ids to 80" in done("remap", root)
        assert {id: load_mask(folder / f"{id}.png").tolist()[0] for id in "abc"} == {
            "a": [0, 1, 255, 80], "b": [0, 12, 74, 24], "c": [0, 11, 0, 0]}
        (folder / "a.png").unlink()
    assert load_mask(root / "SegmentationClass.90id/b.png").tolist() == [[0, 13, 84, 25]]          # kept
    done("remap", root)
    done("check", root)
    shutil.rmtree(root / "SegmentationClass.90id")
    mask(folder / "b.png", [[0, 11, 24, 74]])
    refused(prepare("remap", root), "holds no label 81..90")
    write(root / "classes.txt", "cat\n")
    refused(prepare("remap", root), "does not list COCO's 80 classes")
    write(root / "classes.txt", "".join(f"{name}\n" for name in COCO_CLASSES))
    write(root / "labels.txt", "a\tperson\ttraffic\u00a0light\nb stop_sign\nc fire_hydrant\n")
    assert "is not in classes.txt" not in prepare("check", root).stdout       # a no-break space is a blank
    shutil.rmtree(folder)
    refused(prepare("remap", root), "SegmentationClass is missing: remap is for a folder of masks")
