"""prepare_data.py: which mask wins, what is painted over what, every finding of check, a kill, bad input.

scipy and pycocotools are optional: what needs them is skipped without; all else runs on stand-ins for the two decoders."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from plumbing import folders, guard, masks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process -> exit status, its output, the last line on stderr."""
    def call(*argv, workers=0):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, argv), "--workers", str(workers)])
        code = 0
        try:
            guard.run(prepare_data.main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, (said.err.strip().splitlines() or [""])[-1]
    return call


def picture(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)


def mask(path, values=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((size[1], size[0]), values, np.uint8) if np.isscalar(values) else np.asarray(values, np.uint8)
    masks.save_mask(path, array)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def values(path):
    return sorted(np.unique(masks.load_mask(path)).tolist())


# ---------------------------------------------------------------- VOC

VOC = {"2007_000032": 1, "2007_000033": 2, "2007_000042": 3}                 # native masks; the last is val
SBD = {"2007_000033": 12, "2007_000042": 13, "2008_000002": 14}              # two of them twice


@pytest.fixture
def voc(tmp_path):
    """VOC's tree and SBD's, where a .mat holds the label as text (read_sbd is replaced unless scipy is tested)."""
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    for id in {**VOC, **SBD}:
        picture(tree / "JPEGImages" / f"{id}.jpg")
        write(tree / "Annotations" / f"{id}.xml", "<annotation><object><name>cat</name></object></annotation>")
    for id, value in VOC.items():
        mask(tree / "SegmentationClass" / f"{id}.png", [[0, value, 255]])
    write(tree / "ImageSets/Segmentation/train.txt", "2007_000032\n2007_000033\n")
    write(tree / "ImageSets/Segmentation/val.txt", "2007_000042")            # no last newline
    for id, value in SBD.items():
        write(sbd / "dataset" / "cls" / f"{id}.mat", str(value))
    return tree, sbd


@pytest.fixture
def no_scipy(monkeypatch):
    monkeypatch.setattr(prepare_data, "require", lambda *a: None)
    monkeypatch.setattr(prepare_data, "read_sbd", lambda path: np.array([[0, int(path.read_text()), 0]], np.uint8))


def test_sources_prefer_what_is_there_then_voc_then_sbd():
    found = prepare_data.sources({"b": "voc b", "c": "voc c"}, {"a": "sbd a", "b": "sbd b"}, {"c": "own c", "d": "own d"})
    assert found == {"a": "sbd a", "b": "voc b", "c": "own c", "d": "own d"} and list(found) == sorted(found)


def test_voc_masks_and_list(voc, no_scipy, run):
    tree, sbd = voc
    code, out, _ = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
    assert code == 0 and "3 masks of VOC, 3 masks of SBD, 4 masks together, 3 pictures of train_aug: not the whole" in out
    aug = tree / "SegmentationClassAug"
    assert {p.stem: values(p) for p in aug.glob("*.png")} == {
        "2007_000032": [0, 1, 255], "2007_000033": [0, 2, 255], "2007_000042": [0, 3, 255], "2008_000002": [0, 14]}
    assert all(Image.open(p).mode == "P" for p in aug.glob("*.png"))
    assert (tree / "ImageSets/Segmentation/train_aug.txt").read_text() == "2007_000032\n2007_000033\n2008_000002\n"
    (tree / "ImageSets/Segmentation/train_aug.txt").rename(tree / "moved.txt")
    assert folders.Folder(tree).ids("train_aug") == ["2007_000032", "2007_000033", "2008_000002"]            # as data derives it


def test_voc_counts_are_refused_unless_whole_or_told(voc, no_scipy, run, monkeypatch):
    tree, sbd = voc
    code, _, err = run("voc", "--voc", tree, "--sbd", sbd)
    assert code == 1 and "3 masks of VOC where 2,913 belong" in err and "4 masks together where 12,031" in err
    assert "3 pictures of train_aug where 10,582" in err and "--allow-partial" in err and not (tree / "SegmentationClassAug").exists()
    monkeypatch.setattr(prepare_data, "VOC_COUNTS", dict(zip(prepare_data.VOC_COUNTS, (3, 3, 4, 3))))
    code, out, _ = run("voc", "--voc", tree, "--sbd", sbd)
    assert code == 0 and "not the whole" not in out and len(list((tree / "SegmentationClassAug").glob("*.png"))) == 4
    assert 12031 - 1449 == 10582


def test_voc_keeps_the_users_masks_and_lists(voc, no_scipy, run):
    tree, sbd = voc
    mask(tree / "SegmentationClassAug" / "2008_000002.png", 7)
    mine = write(tree / "ImageSets/Segmentation/train_aug.txt",
                 "".join(f"/JPEGImages/{id}.jpg /SegmentationClassAug/{id}.png\n" for id in ("2008_000002", "2007_000033", "2007_000032")))
    before = mine.read_text()
    code, out, _ = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
    assert code == 0 and "1 masks are in" in out and values(tree / "SegmentationClassAug/2008_000002.png") == [7]
    assert mine.read_text() == before                                        # the same ids in the pair notation
    write(mine, "2007_000032\n")
    code, _, err = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
    assert code == 1 and "train_aug.txt is there with another content" in err and mine.read_text() == "2007_000032\n"


def test_voc_out_elsewhere_leaves_the_tree_alone(voc, no_scipy, run, tmp_path):
    tree, sbd = voc
    before = sorted(tree.rglob("*"))
    out = tmp_path / "prepared"
    assert run("voc", "--voc", tree, "--sbd", sbd, "--out", out, "--allow-partial")[0] == 0
    assert sorted(tree.rglob("*")) == before
    folder = folders.Folder(out)
    assert folder.ids("train_aug") == ["2007_000032", "2007_000033", "2008_000002"] and folder.ids("val") == ["2007_000042"]
    assert (out / "JPEGImages").is_symlink() and folder.truth("2008_000002").tolist() == [[0, 14, 0]]
    assert folder.labels(["2008_000002"]).argmax().item() == folders.VOC_CLASSES.index("cat")


def test_voc_bad_input(voc, no_scipy, run, tmp_path):
    tree, sbd = voc
    code, _, err = run("voc", "--voc", tree, "--sbd", tmp_path / "nothing")
    assert code == 1 and "nothing/dataset/cls is missing" in err and "benchmark_RELEASE" in err
    code, _, err = run("voc", "--voc", tmp_path, "--sbd", sbd)
    assert code == 1 and "JPEGImages is missing" in err
    mask(tree / "SegmentationClass/2007_000032.png", 21)
    code, _, err = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
    assert code == 1 and "2007_000032.png holds label 21" in err and not (tree / "ImageSets/Segmentation/train_aug.txt").exists()
    assert not list((tree / "SegmentationClassAug").glob(".*"))               # nothing half-written
    (tmp_path / "file").touch()
    code, _, err = run("voc", "--voc", tree, "--sbd", sbd, "--out", tmp_path / "file" / "out", "--allow-partial")
    assert code == 1 and "file/out" in err and "Not a directory" in err


def test_voc_without_scipy_says_how_to_get_it(voc, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    code, _, err = run("voc", "--voc", voc[0], "--sbd", voc[1], "--allow-partial")
    assert code == 1 and err == "prepare_data.py: scipy is missing, it reads SBD's .mat files: pip install scipy"


def test_sbd_mat_files(voc, run):
    io = pytest.importorskip("scipy.io")
    tree, sbd = voc
    for id, value in SBD.items():
        truth = np.zeros((4, 6), np.uint8)
        truth[1, 2] = value
        io.savemat(sbd / "dataset/cls" / f"{id}.mat",
                   {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": truth, "CategoriesPresent": np.array([[value]])}})
    assert run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")[0] == 0
    truth = masks.load_mask(tree / "SegmentationClassAug/2008_000002.png", 20)
    assert truth.shape == (4, 6) and truth[1, 2] == 14 and truth.sum() == 14
    assert values(tree / "SegmentationClassAug/2007_000033.png") == [0, 2, 255]
    (tree / "SegmentationClassAug/2008_000002.png").unlink()
    mat = sbd / "dataset/cls/2008_000002.mat"
    for broken in (mat.read_bytes()[:200], b"", b"MATLAB 7.3?" * 30):
        mat.write_bytes(broken)
        code, _, err = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
        assert code == 1 and "2008_000002.mat is not a class mask of SBD" in err and "unpack" in err
    for content in ({"GTinst": 1}, {"GTcls": {"Segmentation": np.full((2, 2), 21)}}, {"GTcls": {"Segmentation": np.zeros((2, 2, 2))}}):
        io.savemat(mat, content)
        code, _, err = run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
        assert code == 1 and "2008_000002.mat is not a class mask of SBD" in err


def test_of_a_mat_no_more_is_unpacked_than_a_mask_needs(tmp_path, monkeypatch):
    """A file of 70 KiB that holds 80 MB of zeros, in small variables; other variables beside the mask's are not read."""
    io = pytest.importorskip("scipy.io")
    truth = {"GTcls": {"Segmentation": np.eye(3, dtype=np.uint8)}}
    io.savemat(tmp_path / "a.mat", {**truth, "other": np.zeros(9)}, do_compression=True)
    read, loadmat = [], io.loadmat
    monkeypatch.setattr(io, "loadmat", lambda *args, **options: read.append(loadmat(*args, **options)) or read[-1])
    assert (prepare_data.read_sbd(tmp_path / "a.mat") == np.eye(3)).all() and "other" not in read[0]
    io.savemat(tmp_path / "b.mat", {"v": np.zeros(10_000_000, np.uint8)}, do_compression=True)
    head, part = (tmp_path / "a.mat").read_bytes(), (tmp_path / "b.mat").read_bytes()[128:]
    (tmp_path / "b.mat").write_bytes(head + part * 8)
    with pytest.raises(ValueError, match="b.mat is not a class mask of SBD .*unpacks to more than a mask"):
        prepare_data.read_sbd(tmp_path / "b.mat")
    (tmp_path / "b.mat").write_bytes(head + part)
    assert (prepare_data.read_sbd(tmp_path / "b.mat") == np.eye(3)).all()


def test_a_killed_run_leaves_whole_masks_and_goes_on(tmp_path, run):
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    (tree / "JPEGImages").mkdir(parents=True)
    (sbd / "dataset/cls").mkdir(parents=True)
    write(tree / "ImageSets/Segmentation/val.txt", "0000\n")
    noise = np.random.default_rng(0).integers(0, 21, (300, 400))
    mask(tree / "SegmentationClass/0000.png", noise)
    for n in range(1, 150):
        os.link(tree / "SegmentationClass/0000.png", tree / f"SegmentationClass/{n:04d}.png")
    command = ["voc", "--voc", str(tree), "--sbd", str(sbd), "--allow-partial"]
    process = subprocess.Popen([sys.executable, "prepare_data.py", *command, "--workers", "0"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    aug = tree / "SegmentationClassAug"
    end = time.time() + 60
    while len(list(aug.glob("*.png"))) < 5 and time.time() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {p: p.stat().st_mtime_ns for p in aug.glob("*.png")}
    assert 5 <= len(first) < 150 and not (tree / "ImageSets/Segmentation/train_aug.txt").exists()
    assert all((masks.load_mask(p) == noise).all() for p in first)
    code, out, _ = run(*command)
    assert code == 0 and f"{len(first)} masks are in" in out and len(list(aug.glob("*.png"))) == 150
    assert {p: p.stat().st_mtime_ns for p in first} == first                 # what was finished was not made again
    assert len(folders.Folder(tree).ids("train_aug")) == 149


# ---------------------------------------------------------------- COCO

def box(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def stand_in(segmentation, shape):
    """prepare_data.decode for upright boxes and uncompressed run lengths."""
    out = np.zeros(shape, dtype=bool)
    if isinstance(segmentation, list):
        for polygon in segmentation:
            out[int(min(polygon[1::2])):int(max(polygon[1::2])), int(min(polygon[::2])):int(max(polygon[::2]))] = True
        return out
    flags = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"]).astype(bool)
    return flags.reshape(shape, order="F")                                   # COCO runs down the columns


@pytest.fixture(params=["stand-in", "pycocotools"])
def decoder(request, monkeypatch):
    if request.param == "pycocotools":
        pytest.importorskip("pycocotools")
    else:
        monkeypatch.setattr(prepare_data, "require", lambda *a: None)
        monkeypatch.setattr(prepare_data, "decode", stand_in)


CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 13, "name": "stop sign"}, {"id": 90, "name": "toothbrush"}]
CROWD = {"size": [4, 6], "counts": [12, 12]}                                 # the right half of a 6x4 picture
TRAIN = [  # image, category, segmentation, crowd
    (9, 90, box(1, 1, 3, 3), 0),                                             # small, listed first, still on top
    (9, 3, box(0, 0, 4, 4), 0),
    (9, 1, CROWD, 1),
    (25, 13, box(0, 0, 2, 2), 0),
]
PAINTED = {  # picture 9 by --crowd. 3 car, 80 toothbrush, 1 the crowd: car (16 pixels) before the crowd (12) before the toothbrush (4)
    "include": [[3, 3, 3, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 80, 80, 1, 1, 1], [3, 3, 3, 1, 1, 1]],
    "ignore": [[3, 3, 3, 3, 255, 255], [3, 80, 80, 3, 255, 255], [3, 80, 80, 3, 255, 255], [3, 3, 3, 3, 255, 255]],
    "skip": [[3, 3, 3, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 80, 80, 3, 0, 0], [3, 3, 3, 3, 0, 0]],
}


def instances(root, split, ids, annotations, categories=CATEGORIES):
    content = {"categories": categories,
               "images": [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": 4, "width": 6} for n in ids],
               "annotations": [{"id": k, "image_id": n, "category_id": c, "segmentation": s, "iscrowd": crowd, "area": 1}
                               for k, (n, c, s, crowd) in enumerate(annotations)]}
    write(root / "annotations" / f"instances_{split}2014.json", json.dumps(content))
    for n in ids:
        picture(root / f"{split}2014" / f"COCO_{split}2014_{n:012d}.jpg")


@pytest.fixture
def coco(tmp_path):
    instances(tmp_path / "coco", "train", [9, 25, 30], TRAIN)                # 30 has no annotation
    instances(tmp_path / "coco", "val", [42], [(42, 1, CROWD, 1)])           # nothing but a crowd
    return tmp_path / "coco"


NINE, VAL = "COCO_train2014_000000000009", "COCO_val2014_000000000042"


@pytest.mark.parametrize("crowd", ["include", "ignore", "skip"])
def test_coco_by_hand(coco, decoder, run, tmp_path, crowd):
    out = tmp_path / "out"
    code, said, _ = run("coco", "--coco", coco, "--out", out, "--crowd", crowd)
    assert code == 0 and "train: 2 pictures with at least one annotation, 1 without are left out; the whole of COCO 2014 has 82,081" in said
    folder = folders.Folder(out)
    assert folder.classes == folders.COCO_CLASSES and folder.ids("train") == [NINE, "COCO_train2014_000000000025"] and folder.ids("val") == [VAL]
    assert folder.truth(NINE).tolist() == PAINTED[crowd]
    assert folder.truth("COCO_train2014_000000000025").tolist() == [[12, 12, 0, 0, 0, 0]] * 2 + [[0] * 6] * 2   # id 13 is the 12th class
    assert values(out / "SegmentationClass" / f"{VAL}.png") == {"include": [0, 1], "ignore": [0, 255], "skip": [0]}[crowd]
    present = [[folder.classes[k] for k in row.nonzero().flatten()] for row in folder.labels([NINE, "COCO_train2014_000000000025", VAL])]
    person = [] if crowd == "skip" else ["person"]
    assert present == [[*person, "car", "toothbrush"], ["stop sign"], person]
    assert (out / "JPEGImages" / f"{NINE}.jpg").is_symlink() and folder.image(NINE).shape == (3, 4, 6)
    rule = (out / "SegmentationClass/README.txt").read_text()
    assert "small objects lie on top" in rule and prepare_data.CROWDS[crowd][0] in rule
    code, said, _ = run("check", out)
    assert code == 0 and "80 classes, no problems" in said
    code, _, err = run("coco", "--coco", coco, "--out", out, "--crowd", "skip" if crowd != "skip" else "include")
    assert code == 1 and "painted by another rule" in err and folder.truth(NINE).tolist() == PAINTED[crowd]


def test_coco_goes_on_and_repairs_links(coco, decoder, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("coco", "--coco", coco, "--out", out)[0] == 0
    (out / "SegmentationClass" / f"{NINE}.png").unlink()
    (out / "labels.txt").unlink()
    (out / "ImageSets/Segmentation/train.txt").unlink()
    coco.rename(tmp_path / "moved")
    picture_25 = out / "JPEGImages/COCO_train2014_000000000025.jpg"
    assert picture_25.is_symlink() and not picture_25.exists()
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("coco", "--coco", "moved", "--out", "out")           # relative paths; the links hold all the same
    assert code == 0 and picture_25.exists() and folders.Folder(out).truth(NINE).tolist() == PAINTED["include"]
    assert folders.Folder(out).ids("train") == [NINE, "COCO_train2014_000000000025"] and (out / "labels.txt").exists()
    kept = (out / "SegmentationClass" / f"{VAL}.png").stat().st_mtime_ns
    (out / "SegmentationClass" / f"{NINE}.png").unlink()                     # the picture is there, the mask is not
    code, said, _ = run("coco", "--coco", "moved", "--out", "out")
    assert code == 0 and "2 masks are in" in said and folders.Folder(out).truth(NINE).tolist() == PAINTED["include"]
    assert kept == (out / "SegmentationClass" / f"{VAL}.png").stat().st_mtime_ns


def test_coco_copy_survives_without_the_originals(coco, decoder, run, tmp_path):
    assert run("coco", "--coco", coco, "--out", tmp_path / "out", "--copy")[0] == 0
    coco.rename(tmp_path / "gone")
    assert not (tmp_path / "out/JPEGImages" / f"{NINE}.jpg").is_symlink() and folders.Folder(tmp_path / "out").image(NINE).shape == (3, 4, 6)


def test_decode_polygons_and_run_lengths():
    rle = pytest.importorskip("pycocotools.mask")
    truth = stand_in(box(1, 1, 3, 3), (4, 6))
    compressed = rle.encode(np.asfortranarray(truth.astype(np.uint8)))
    for segmentation in (box(1, 1, 3, 3), compressed, {**compressed, "counts": compressed["counts"].decode()},
                         box(1, 1, 3, 3) + [[1, 1, 3, 3]], box(1, 1, 2, 3) + box(2, 1, 3, 3)):
        assert (prepare_data.decode(segmentation, (4, 6)) == truth).all()
    assert (prepare_data.decode(CROWD, (4, 6)) == stand_in(CROWD, (4, 6))).all()
    assert not prepare_data.decode([], (4, 6)).any() and not prepare_data.decode([[0, 0, 4, 4]], (4, 6)).any()   # no box
    with pytest.raises(ValueError, match="run lengths"):
        prepare_data.decode(compressed, (6, 4))


@pytest.mark.parametrize("counts", ["o", "0P", "00ooooooo0", "0oooooooooo0", "0p", "0 ", "0\n", "0\xe9", 5, None])
def test_run_lengths_that_are_torn_are_not_decoded(monkeypatch, counts):
    """pycocotools reads a last number that goes on past the end of the text, and writes past the end of its room."""
    rle = pytest.importorskip("pycocotools.mask")
    monkeypatch.setattr(rle, "decode", None)
    for counts in (counts, counts.encode("latin1")) if isinstance(counts, str) else (counts,):
        with pytest.raises(ValueError, match="its run lengths are torn"):
            prepare_data.decode({"size": [4, 6], "counts": counts}, (4, 6))


def test_run_lengths_of_all_kinds_of_masks_are_decoded():
    rle, rng = pytest.importorskip("pycocotools.mask"), np.random.default_rng(0)
    for share in (0, 0.0001, 0.01, 0.5, 0.999, 1):
        mask = rng.random((700, 900)) < share
        counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert np.array_equal(prepare_data.decode({"size": [700, 900], "counts": counts}, (700, 900)), mask)


def test_paint_order():
    big, small, equal = np.ones((2, 2), bool), np.eye(2, dtype=bool), np.eye(2, dtype=bool)
    assert prepare_data.paint((2, 2), [(5, small), (7, big)]).tolist() == [[5, 7], [7, 5]]
    assert prepare_data.paint((2, 2), [(7, big), (5, small)]).tolist() == [[5, 7], [7, 5]]
    assert prepare_data.paint((2, 2), [(5, small), (6, equal)]).tolist() == [[6, 0], [0, 6]]              # the later one
    assert prepare_data.paint((2, 2), [(255, small), (7, big)]).tolist() == [[7, 7], [7, 7]]              # 255 lies beneath
    assert prepare_data.paint((1, 2), []).tolist() == [[0, 0]]


def test_category_ids_become_contiguous():
    index = prepare_data.COCO_INDEX
    named = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 31: "handbag", 44: "bottle", 46: "wine glass",
             67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"}
    assert {i: folders.COCO_CLASSES[index[i]] for i in named} == named
    assert list(index.values()) == list(range(80)) and len(folders.COCO_CLASSES) == 80


@pytest.mark.parametrize("change, message", [
    (lambda r: (r / "annotations/instances_val2014.json").unlink(), "instances_val2014.json is missing"),
    (lambda r: write(r / "annotations/instances_train2014.json", "{"), "instances_train2014.json is not COCO's instances file"),
    (lambda r: write(r / "annotations/instances_train2014.json", '{"images": []}'), "instances_train2014.json is not COCO's instances file"),
    (lambda r: instances(r, "train", [9], [(9, 12, CROWD, 0)]), "KeyError: 12"),
    (lambda r: instances(r, "train", [9], TRAIN, [{"id": 1, "name": "cat"}]), "other categories than COCO 2014: cat (here person)"),
    (lambda r: (r / "train2014" / f"{NINE}.jpg").unlink(), f"{NINE}.jpg is missing, and 0 more"),
    (lambda r: instances(r, "train", [9], [(9, 1, {"size": [4, 6], "counts": [7]}, 0)]), f"{NINE}.jpg: its segmentation cannot be decoded"),
    (lambda r: instances(r, "train", [9, 9], TRAIN), "a picture occurs twice"),
], ids=["no-json", "torn-json", "other-json", "unknown-category", "other-names", "no-picture", "bad-runs", "twice"])
def test_coco_bad_input(coco, run, monkeypatch, tmp_path, change, message):
    monkeypatch.setattr(prepare_data, "require", lambda *a: None)
    monkeypatch.setattr(prepare_data, "decode", stand_in)
    change(coco)
    code, _, err = run("coco", "--coco", coco, "--out", tmp_path / "out")
    assert code == 1 and message in err and not (tmp_path / "out/labels.txt").exists()
    assert not list((tmp_path / "out").rglob(".*"))


def test_coco_without_pycocotools_says_how_to_get_it(coco, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, err = run("coco", "--coco", coco, "--out", tmp_path / "out")
    assert code == 1 and err.endswith("pip install pycocotools") and not (tmp_path / "out").exists()


def test_coco_never_mixes_with_masks_of_another_origin(coco, decoder, run, tmp_path):
    mask(tmp_path / "out/SegmentationClass" / f"{NINE}.png", 5)
    code, _, err = run("coco", "--coco", coco, "--out", tmp_path / "out")
    assert code == 1 and "painted by another rule" in err and values(tmp_path / "out/SegmentationClass" / f"{NINE}.png") == [5]


# ---------------------------------------------------------------- check

@pytest.fixture
def mine(tmp_path):
    """A folder of one's own, without a fault: two classes, a picture without any, masks for val alone."""
    root = tmp_path / "mine"
    for id in "abc":
        picture(root / "JPEGImages" / f"{id}.jpg")
    mask(root / "SegmentationClass/c.png", [[0, 2, 255] * 2] * 4)
    write(root / "classes.txt", "cat\nred dog\n")
    write(root / "labels.txt", "a cat\nb\nc red_dog\n")
    write(root / "ImageSets/Segmentation/train.txt", "a\nb\n")
    write(root / "ImageSets/Segmentation/val.txt", "/JPEGImages/c.jpg /SegmentationClass/c.png\n")
    return root


def test_check_passes_a_folder_without_masks_to_train_on(mine, run):
    code, out, _ = run("check", mine)
    assert code == 0 and "train: 2 ids, 2 pictures, 0 with a mask, 2 with labels, 0.500 classes a picture, 1 without any" in out
    assert "val: 1 ids, 1 pictures, 1 with a mask" in out and out.endswith(f"{mine}: 2 classes, no problems, no warnings\n")
    assert len(out.splitlines()) == 3


def test_check_of_own_pictures_without_lists(mine, run):
    shutil.rmtree(mine / "ImageSets")
    picture(mine / "JPEGImages/forgotten.jpg")
    code, out, _ = run("check", mine)
    assert code == 1 and f"missing mask: {mine}: a in train.txt has none" in out           # some pictures with a mask, some without
    shutil.rmtree(mine / "SegmentationClass")
    code, out, _ = run("check", mine)
    assert code == 0 and "train: 3 ids, 3 pictures, 0 with a mask, 3 with labels" in out
    assert "warning: no label: forgotten.jpg has no line in labels.txt, so it is not used\n" in out and ", no problems, 1 warning" in out
    (mine / "JPEGImages/b.jpg").unlink()
    code, out, _ = run("check", mine)
    assert code == 1 and f"missing picture: {mine}/JPEGImages/b.jpg, listed in labels.txt\n" in out


def exif(path):
    image, turned = Image.new("RGB", (6, 4)), Image.Exif()
    turned[0x0112] = 6                                                       # shown as 4x6
    image.save(path, exif=turned)


def colours(path, rgb):
    Image.new("RGB", (6, 4), rgb).save(path)


WRONG = {  # what is done to the folder -> the one line that check prints
    "missing picture": (lambda r: (r / "JPEGImages/a.jpg").unlink(), "missing picture: {}/JPEGImages/a.jpg, listed in train.txt"),
    "dangling link": (lambda r: ((r / "JPEGImages/a.jpg").unlink(), (r / "JPEGImages/a.jpg").symlink_to("/nowhere")), "missing picture: {}/JPEGImages/a.jpg"),
    "truncated picture": (lambda r: (r / "JPEGImages/a.jpg").write_bytes((r / "JPEGImages/a.jpg").read_bytes()[:300]), "unreadable picture: {}/JPEGImages/a.jpg"),
    "missing mask": (lambda r: mask(r / "SegmentationClass/a.png", 1), "missing mask: {}: b in train.txt has none, 1 others there have one"),
    "torn mask": (lambda r: (r / "SegmentationClass/c.png").write_bytes(b"\x89PNG"), "bad mask: {}/SegmentationClass/c.png is not a readable mask"),
    "other colours": (lambda r: colours(r / "SegmentationClass/c.png", (1, 2, 3)), "bad mask: {}/SegmentationClass/c.png is a colour picture"),
    "size": (lambda r: mask(r / "SegmentationClass/c.png", 2, (4, 6)), "size: {}/SegmentationClass/c.png is 4x6, its picture 6x4"),
    "turned picture": (lambda r: exif(r / "JPEGImages/c.jpg"), "size: {}/SegmentationClass/c.png is 6x4, its picture 4x6"),
    "size of aug": (lambda r: mask(r / "SegmentationClassAug/c.png", 2, (3, 3)), "size: {}/SegmentationClassAug/c.png is 3x3"),
    "label value": (lambda r: mask(r / "SegmentationClass/c.png", 3), "label value: {}/SegmentationClass/c.png holds 3: masks hold 0..2 and 255"),
    "81 of two": (lambda r: mask(r / "SegmentationClass/c.png", 81), "label value: {}/SegmentationClass/c.png holds 81"),
    "listed twice": (lambda r: write(r / "ImageSets/Segmentation/train.txt", "a\nb\na\n"), "duplicate id: {}/ImageSets/Segmentation/train.txt lists a twice"),
    "labelled twice": (lambda r: write(r / "labels.txt", "a cat\nb\nc red_dog\na\n"), "duplicate id: {}/labels.txt:4: a has a second line"),
    "leaves the folder": (lambda r: write(r / "ImageSets/Segmentation/train.txt", "a\nb\n../a\n"), "bad id: {}/ImageSets/Segmentation/train.txt: '../a'"),
    "absolute": (lambda r: write(r / "ImageSets/Segmentation/train.txt", "a\nb\n/etc/passwd\n"), "bad id: {}/ImageSets/Segmentation/train.txt: '/etc/passwd'"),
    "label leaves": (lambda r: write(r / "labels.txt", "a cat\nb\nc red_dog\n../a cat\n"), "bad id: {}/labels.txt:4: '../a'"),
    "unknown class": (lambda r: write(r / "labels.txt", "a cta\nb\nc red_dog\n"), "bad label: {}/labels.txt:1: 'cta' is not in classes.txt"),
    "index too large": (lambda r: write(r / "labels.txt", "a 0\nb\nc 2\n"), "bad label: {}/labels.txt:3: '2' is not in classes.txt"),
    "missing label": (lambda r: write(r / "labels.txt", "a cat\nc red_dog\n"), "missing label: {}: b in train.txt has none"),
    "no labels": (lambda r: (r / "labels.txt").unlink(), "bad label: {} holds no labels"),
    "empty list": (lambda r: write(r / "ImageSets/Segmentation/more.txt", "\n"), "bad list: {}/ImageSets/Segmentation/more.txt is empty"),
    "foreign text": (lambda r: (r / "ImageSets/Segmentation/more.txt").write_bytes(b"\xff\xfe\x00a"), "bad list: {}/ImageSets/Segmentation/more.txt is not UTF-8"),
    "no list": (lambda r: [p.unlink() for p in (r / "ImageSets/Segmentation").glob("*.txt")], "bad list: {}/ImageSets/Segmentation holds no list"),
}
DOUBTS = {
    "labels differ": (lambda r: write(r / "labels.txt", "a cat\nb\nc cat\n"), "labels differ: {}/SegmentationClass/c.png shows red dog; its label says cat"),
    "colour mask": (lambda r: (colours(r / "SegmentationClass/c.png", (0, 128, 0))), "colour mask: {}/SegmentationClass/c.png holds VOC's colours"),
    "two splits": (lambda r: (write(r / "ImageSets/Segmentation/train_aug.txt", "c\n")), "in two splits: c is in train_aug.txt and val.txt"),
    "two pictures": (lambda r: picture(r / "JPEGImages/a.png"), "two pictures: a: a.jpg is taken, a.png is not"),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_finds(mine, run, name):
    change, line = WRONG[name]
    change(mine)
    code, out, _ = run("check", mine)
    found = [text for text in out.splitlines()[:-1] if ": " in text and not text.startswith(("train:", "val:", "more:", "warning"))]
    assert code == 1 and len(found) == 1 and found[0].startswith(line.format(mine)), out
    assert ", 1 problem, " in out.splitlines()[-1]


@pytest.mark.parametrize("name", DOUBTS)
def test_check_warns(mine, run, name):
    change, line = DOUBTS[name]
    change(mine)
    code, out, _ = run("check", mine)
    assert code == 0 and f"\nwarning: {line.format(mine)}" in out and ", no problems, 1 warning" in out


def test_check_does_not_stop_at_the_first_problem(mine, run):
    together = ("missing picture", "torn mask", "label leaves", "empty list", "size of aug")
    for name in together:
        WRONG[name][0](mine)
    write(mine / "labels.txt", "a cta\nb dgo\nb\n../a cat\nc 7\n")
    code, out, _ = run("check", mine)
    assert code == 1 and all(WRONG[n][1].format(mine).split(":")[0] in out for n in together) and "9 problems" in out, out
    for text in ("labels.txt:1: 'cta'", "labels.txt:2: 'dgo'", "labels.txt:3: b has", "labels.txt:4: '../a'", "labels.txt:5: '7'"):
        assert text in out


def test_check_prints_some_of_each_kind_or_all(mine, run):
    write(mine / "ImageSets/Segmentation/train.txt", "".join(f"x{n:02d}\n" for n in range(30)))
    write(mine / "labels.txt", "c red_dog\n")
    code, out, _ = run("check", mine)
    assert code == 1 and out.count("missing picture: ") == 21 and "... and 10 more (--show 0: all)" in out and "30 problems" in out
    assert run("check", mine, "--show", "0")[1].count("missing picture: ") == 30
    assert "more" not in run("check", mine, "--show", "30")[1]


def test_check_reads_voc_annotations_and_test_lists(voc, no_scipy, run):
    tree, sbd = voc
    run("voc", "--voc", tree, "--sbd", sbd, "--allow-partial")
    for id in {**VOC, **SBD}:
        picture(tree / "JPEGImages" / f"{id}.jpg", (3, 1))
    picture(tree / "JPEGImages/2008_000099.jpg")
    write(tree / "ImageSets/Segmentation/test.txt", "2008_000099\n")         # neither mask nor label: no fault
    code, out, _ = run("check", tree)
    assert code == 0 and "20 classes, no problems, 4 warnings" in out and "labels differ" in out
    write(tree / "Annotations/2007_000032.xml", "<annotation>")
    (tree / "Annotations/2007_000033.xml").unlink()
    code, out, _ = run("check", tree)
    assert code == 1 and "bad label: " in out and "2007_000032.xml is not readable XML" in out
    assert "missing label: " in out and "2007_000033 in train.txt has none" in out


def test_check_refuses_what_is_no_folder(tmp_path, mine, run):
    write(mine / "classes.txt", "cat\ncat\n")                               # what a label value means cannot be known
    code, _, err = run("check", mine)
    assert code == 1 and "classes.txt must hold one name a line, none twice" in err
    code, _, err = run("check", tmp_path / "nothing")
    assert code == 1 and "nothing/JPEGImages is missing" in err


def test_worker_processes(tmp_path, run, monkeypatch):
    """The same masks in the same order; an error is one line here too."""
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)     # else they take 5 s to leave
    tree, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    (tree / "JPEGImages").mkdir(parents=True)
    (sbd / "dataset/cls").mkdir(parents=True)
    write(tree / "ImageSets/Segmentation/val.txt", "000\n")
    for n in range(110):
        mask(tree / f"SegmentationClass/{n:03d}.png", 21 if n == 100 else n % 20)
    command = ["voc", "--voc", tree, "--sbd", sbd, "--allow-partial"]
    code, _, err = run(*command, workers=2)
    assert code == 1 and err.startswith("prepare_data.py: ") and "100.png holds label 21" in err
    mask(tree / "SegmentationClass/100.png", 2)
    assert run(*command, workers=2)[0] == 0
    aug = {p.stem: values(p) for p in (tree / "SegmentationClassAug").glob("*.png")}
    assert aug == {f"{n:03d}": [2 if n == 100 else n % 20] for n in range(110)}
    assert list(prepare_data.each(str, range(110), "", 2)) == [str(n) for n in range(110)]
    assert list(prepare_data.each(str, [], "", 2)) == []


# ---------------------------------------------------------------- 90-id COCO

@pytest.fixture
def ninety(tmp_path):
    root = tmp_path / "coco"
    rows = {"a": [0, 1, 255, 90], "b": [0, 13, 84, 25], "c": [0, 11, 0, 0]}
    for id, row in rows.items():
        picture(root / "JPEGImages" / f"{id}.jpg", (4, 1))
        mask(root / "SegmentationClass" / f"{id}.png", [row])
    write(root / "classes.txt", "".join(f"{name}\n" for name in folders.COCO_CLASSES))
    write(root / "labels.txt", "a person toothbrush\nb stop_sign book giraffe\nc fire_hydrant\n")
    write(root / "ImageSets/Segmentation/train.txt", "a\nb\nc\n")
    return root


def test_ninety_ids_are_found_and_remapped_once(ninety, run):
    code, out, _ = run("check", ninety)
    assert code == 1 and "90-id COCO masks: 2 masks, " in out and f"run prepare_data.py remap {ninety}" in out and "1 problem," in out
    code, out, _ = run("remap", ninety)
    assert code == 0 and "3 masks remapped from 90 ids to 80" in out
    want = {"a": [0, 1, 255, 80], "b": [0, 12, 74, 24], "c": [0, 11, 0, 0]}
    assert {id: masks.load_mask(ninety / f"SegmentationClass/{id}.png", 80).tolist() for id in want} == {id: [row] for id, row in want.items()}
    assert masks.load_mask(ninety / "SegmentationClass.90id/b.png").tolist() == [[0, 13, 84, 25]]            # the originals are kept
    assert run("check", ninety)[0] == 0
    code, out, _ = run("remap", ninety)                                      # again: nothing is mapped twice
    assert code == 0 and "0 masks remapped" in out and masks.load_mask(ninety / "SegmentationClass/b.png").tolist() == [[0, 12, 74, 24]]


def test_remap_goes_on_after_a_kill(ninety, run):
    (ninety / "SegmentationClass").rename(ninety / "SegmentationClass.90id")
    mask(ninety / "SegmentationClass/a.png", [[0, 1, 255, 80]])
    code, out, _ = run("remap", ninety)
    assert code == 0 and "2 masks remapped" in out and masks.load_mask(ninety / "SegmentationClass/b.png").tolist() == [[0, 12, 74, 24]]


def test_remap_refuses_without_proof(ninety, run):
    mask(ninety / "SegmentationClass/c.png", [[0, 12, 0, 0]])                # no category 12
    code, _, err = run("remap", ninety)
    assert code == 1 and "holds label 12, which is no category id" in err and not (ninety / "SegmentationClass.90id").exists()
    for id in "abc":
        mask(ninety / f"SegmentationClass/{id}.png", [[0, 1, 2, 3]])
    code, _, err = run("remap", ninety)
    assert code == 1 and "no label 81..90" in err and values(ninety / "SegmentationClass/a.png") == [0, 1, 2, 3]
    write(ninety / "classes.txt", "cat\n")
    code, _, err = run("remap", ninety)
    assert code == 1 and "does not list COCO's 80 classes" in err
