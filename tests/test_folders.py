"""Data folders: lists, labels and names in every layout give the same values, bad ones are refused."""
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS

from plumbing import folders, masks


def multi_hot(*present):
    return np.isin(np.arange(3), present).astype(np.float32)


def write_list(root, text, name="x"):
    (root / "ImageSets/Segmentation" / f"{name}.txt").write_text(text, encoding="utf-8", newline="")


# ---------------------------------------------------------------- lists

@pytest.mark.parametrize("text", [
    "2007_000032\n2007_000039\n",
    "2007_000032\r\n2007_000039",                                            # CRLF, no last newline
    "\ufeff2007_000032\n\n2007_000039 \n",                                   # byte order mark, empty line
    "/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png\nJPEGImages/2007_000039.jpg x",
    "JPEGImages/2007_000032.jpg\nJPEGImages/2007_000039.jpg\n",
])
def test_lists_of_ids_or_pairs_of_paths(voc, text):
    write_list(voc, text)
    assert folders.Folder(voc).ids("x") == ["2007_000032", "2007_000039"]
    assert folders.Folder(voc).ids("x", limit=1) == ["2007_000032"]


def test_ids_are_strings_and_may_hold_blanks(voc):
    write_list(voc, "000123\nIMG 7\n")
    assert folders.Folder(voc).ids("x") == ["000123", "IMG 7"]


@pytest.mark.parametrize("line", [
    "../../etc/passwd", "/etc/passwd", "a/b", "..", "a\\b", ".hidden", "a_1.jpg", "a\tb",
    "/JPEGImages/../../x.jpg", "/JPEGImages/../JPEGImages/x.jpg", "/JPEGImages/sub/x.jpg"])
def test_an_id_never_leaves_the_folder(voc, line):
    write_list(voc, f"a_1\n{line}\n")
    with pytest.raises(ValueError, match="x.txt: .* is no image id"):
        folders.Folder(voc).ids("x")


@pytest.mark.parametrize("text,word", [
    ("", "is empty"), ("a_1\na_2\na_1\n", "lists a_1 twice"), (None, "--split is one of train, val")])
def test_bad_lists(voc, text, word):
    if text is not None:
        write_list(voc, text)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        folders.Folder(voc).ids("x")


def test_own_images_need_no_lists(voc):
    """Without ImageSets/ `train` is labels.txt, and there is no other split."""
    for path in (voc / "ImageSets/Segmentation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no list at all"):        # an empty folder is a mistake
        folders.Folder(voc).ids("train")
    (voc / "ImageSets/Segmentation").rmdir()
    (voc / "ImageSets").rmdir()
    assert folders.Folder(voc).ids("train") == list(LABELS)
    assert folders.Folder(voc).ids("train", 2) == list(LABELS)[:2]
    with pytest.raises(FileNotFoundError, match="val.txt is missing"):
        folders.Folder(voc).ids("val")
    (voc / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train.txt is missing"):
        folders.Folder(voc).ids("train")


def test_train_aug_is_derived_from_its_masks(voc):
    with pytest.raises(FileNotFoundError, match="prepare_data.py voc"):
        folders.Folder(voc).ids("train_aug")
    (voc / "SegmentationClassAug").mkdir()
    for id in ("a_1", "a_5", "sbd_9", "sbd_10"):
        masks.save_mask(voc / "SegmentationClassAug" / f"{id}.png", np.zeros((2, 2)))
    assert folders.Folder(voc).ids("train_aug") == ["a_5", "sbd_10", "sbd_9"]   # a_1 is in val
    write_list(voc, "a_3\n", "train_aug")
    assert folders.Folder(voc).ids("train_aug") == ["a_3"]                      # a list that is there counts


def test_no_folder():
    with pytest.raises(FileNotFoundError, match="JPEGImages is missing"):
        folders.Folder("nowhere")


# ---------------------------------------------------------------- labels

def xml(names):
    """Objects that are all difficult, with a part that is no object."""
    rest = "<difficult>1</difficult><part><name>head</name></part>"
    objects = "".join(f"<object><name>{name}</name>{rest}</object>" for name in names)
    return f"<annotation>{objects}</annotation>"


def names(root):
    pass


def indices(root):
    lines = [" ".join([id, *map(str, present)]) for id, present in LABELS.items()]
    (root / "labels.txt").write_text("\n".join(lines))


def tabs(root):
    lines = ["\t".join([id, *(CLASSES[k] for k in present)]) for id, present in LABELS.items()]
    (root / "labels.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")


def annotations(root):
    (root / "labels.txt").unlink()
    (root / "Annotations").mkdir()
    for id, present in LABELS.items():
        (root / "Annotations" / f"{id}.xml").write_text(xml([CLASSES[k] for k in present for _ in range(2)]))


def cls_labels(root):
    (root / "labels.txt").unlink()
    np.save(root / "cls_labels.npy", {id: multi_hot(*present) for id, present in LABELS.items()})


@pytest.mark.parametrize("write", [names, indices, tabs, annotations, cls_labels], ids=lambda f: f.__name__)
def test_labels_in_every_layout(voc, write):
    write(voc)
    folder = folders.Folder(voc)
    expected = np.stack([multi_hot(*present) for present in LABELS.values()])   # a_3 holds no class: zeros
    assert torch.equal(folder.labels(folder.ids("train")), torch.from_numpy(expected))


def test_integer_keys_of_irn(voc):
    (voc / "labels.txt").unlink()
    np.save(voc / "cls_labels.npy", {np.int32(2007000032): multi_hot(1), np.int32(2007000033): multi_hot()})
    folder = folders.Folder(voc)
    assert folder.labels(["2007_000032", "2007_000033"]).tolist() == [[0, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="no entry for 2007_000039: write labels.txt"):
        folder.labels(["2007_000039"])
    with pytest.raises(ValueError, match="no entry for a_2007000032"):          # digits alone are not the id
        folder.labels(["a_2007000032"])


def test_cls_labels_of_old_numpy_and_protocols(voc):
    (voc / "labels.txt").unlink()
    table = np.array({"a_1": multi_hot(1), "a_2": [0, 0, 1]}, dtype=object)
    for protocol in (2, 3, 4, 5):
        body = pickle.dumps(table, protocol=protocol)
        if protocol < 4:                                                        # no lengths before names
            body = body.replace(b"numpy._core", b"numpy.core")
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
        (voc / "cls_labels.npy").write_bytes(head.getvalue() + body)
        assert folders.Folder(voc).labels(["a_1", "a_2"]).tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("table,word", [
    ({"a_1": np.zeros(20)}, r"shape \(20,\).*3 classes"), ({"a_1": ["x", "y", "z"]}, "not numbers"),
    (np.zeros((5, 3)), "no dict"), ([1, 2], "not one dict")])
def test_bad_cls_labels(voc, table, word):
    (voc / "labels.txt").unlink()
    np.save(voc / "cls_labels.npy", np.array(table, dtype=None if type(table) is np.ndarray else object))
    with pytest.raises(ValueError, match=f"cls_labels.npy is refused.*{word}"):
        folders.Folder(voc).labels(["a_1"])


@pytest.mark.parametrize("text,word", [
    ("a_1 zebra\n", "labels.txt:1: 'zebra' is not in classes.txt"),
    ("a_1 train\na_1 cow\n", "labels.txt:2: a_1 has a second line"),
    ("a_1 3\n", "'3' is not in classes.txt"),
    ("a_1 -1\n", "'-1' is not in classes.txt"),
    ("../a_1 cow\n", "no image id"),
    ("a_2 cow\n", "labels.txt has no entry for a_1"),
])
def test_bad_label_lists(voc, text, word):
    (voc / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=word):
        folders.Folder(voc).labels(["a_1"])


def test_bad_annotations(voc):
    annotations(voc)
    (voc / "Annotations/a_1.xml").write_text("<annotation><object>")
    (voc / "Annotations/a_2.xml").write_text(xml(["zebra"]))
    (voc / "Annotations/a_3.xml").unlink()
    for id, word in (("a_1", "a_1.xml is not readable XML"), ("a_2", "'zebra' is not in classes.txt"),
                     ("a_3", "a_3.xml is missing")):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            folders.Folder(voc).labels([id])


def test_no_labels_at_all(voc):
    (voc / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="write labels.txt"):
        folders.Folder(voc).labels(["a_1"])


# ---------------------------------------------------------------- names

def test_classes_default_to_voc_and_backgrounds_to_none(voc):
    (voc / "classes.txt").unlink()
    folder = folders.Folder(voc)
    assert len(folder.classes) == 20 and folder.classes[0] == "aeroplane"
    assert folder.classes[-1] == "tvmonitor" and folder.backgrounds is None
    (voc / "backgrounds.txt").write_text("sky\nrails\n")
    assert folders.Folder(voc).backgrounds == ["sky", "rails"]
    assert len(set(folders.COCO_CLASSES)) == len(folders.COCO_CLASSES) == 80
    assert folders.COCO_CLASSES[79] == "toothbrush"


@pytest.mark.parametrize("text,word", [
    ("", "one name a line"), ("cow\ncow\n", "none twice"), ("background\ncow\n", "lists 'background'"),
    ("".join(f"c{i}\n" for i in range(255)), "holds 254")])
def test_bad_classes(voc, text, word):
    (voc / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=word):
        folders.Folder(voc)


def test_class_names_of_all_scripts(voc):
    """Joined emoji and Persian are names; a no-break space is a blank, wherever a class is named."""
    emoji, persian = "\U0001f469\u200d\U0001f692", "\u06a9\u062a\u0627\u0628\u200c\u062e\u0627\u0646\u0647"
    (voc / "classes.txt").write_text(f"{emoji}\n{persian}\n\u00a0hot\u00a0dog\u00a0\n", encoding="utf-8")
    lines = [f"a_1 {emoji} hot_dog", f"a_2\t{persian}\thot\u00a0dog", "a_3\thot dog"]
    (voc / "labels.txt").write_text("\n".join(lines), encoding="utf-8")
    folder = folders.Folder(voc)
    assert folder.classes == [emoji, persian, "hot dog"]
    assert folder.labels(["a_1", "a_2", "a_3"]).tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    (voc / "a.xml").write_text(xml(["hot\u00a0dog"]), encoding="utf-8")
    assert folders.read_xml(voc / "a.xml", folder.classes) == [2]


@pytest.mark.parametrize("name", [
    "\u200dcow", "cow\u200c", "c\u200bow", "c\u202eow", "c\ufeffow", "c\u2003ow", "c\x1bow", "c\x07\u200dow"])
def test_class_names_that_cannot_be_seen_are_refused(voc, name):
    assert not folders.printable(name)
    (voc / "classes.txt").write_text(f"{name}\nboat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="classes.txt lists .* characters that do not print"):
        folders.Folder(voc)


# ---------------------------------------------------------------- images and truth

def test_native_masks_before_sbd(voc):
    (voc / "SegmentationClassAug").mkdir()
    for id in ("a_1", "x_9"):
        masks.save_mask(voc / "SegmentationClassAug" / f"{id}.png", np.full((30, 40), 2))
    folder = folders.Folder(voc)
    assert 255 in folder.truth("a_1") and (folder.truth("x_9") == 2).all()
    assert folder.has_mask("x_9") and not folder.has_mask("none")
    with pytest.raises(FileNotFoundError, match="scoring needs true masks"):
        folder.truth("none")


def test_a_missing_image_is_named(voc):
    with pytest.raises(FileNotFoundError, match="x_1.jpg is missing: put the image there, or take x_1 off"):
        folders.Folder(voc).image("x_1")
