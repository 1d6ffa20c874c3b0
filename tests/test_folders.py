"""Data folders: lists, labels and names in every layout give the same values, bad ones are refused."""
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

@pytest.mark.parametrize("text,ids", [
    ("2007_000032\r\n2007_000039", ["2007_000032", "2007_000039"]),          # CRLF, no last newline
    ("\ufeff000123\n\nIMG 7 \n", ["000123", "IMG 7"]),                       # byte order mark, empty line
    ("/JPEGImages/a_1.jpg /SegmentationClass/a_1.png\nJPEGImages/b.jpg", ["a_1", "b"])])
def test_lists_hold_ids_or_pairs_of_paths(voc, text, ids):
    write_list(voc, text)
    assert folders.Folder(voc).ids("x") == ids and folders.Folder(voc).ids("x", limit=1) == ids[:1]


@pytest.mark.parametrize("line", [                                           # an id never leaves the folder
    "../../etc/passwd", "/etc/passwd", "..", "a\\b", ".hidden", "a_1.jpg", "a\tb", "JPEGImages/sub/x.jpg",
    "/JPEGImages/../JPEGImages/x.jpg"])
def test_a_line_that_is_no_id_is_refused(voc, line):
    write_list(voc, f"a_2\n{line}\n")
    with pytest.raises(ValueError, match="x.txt: .* is no image id"):
        folders.Folder(voc).ids("x")


def test_bad_lists(voc):
    for text, word in ((None, "--split is one of train"), ("", "is empty"), ("a\nb\na", "lists a twice")):
        if text is not None:
            write_list(voc, text)
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            folders.Folder(voc).ids("x")


def test_own_images_need_no_lists(voc):
    """Without ImageSets/ `train` is labels.txt, and there is no other split."""
    for path in (voc / "ImageSets/Segmentation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="write it, or labels.txt"):    # empty: a mistake
        folders.Folder(voc).ids("train")
    (voc / "ImageSets/Segmentation").rmdir()
    (voc / "ImageSets").rmdir()
    assert folders.Folder(voc).ids("train", 2) == list(LABELS)[:2]
    with pytest.raises(FileNotFoundError, match="val.txt is missing"):
        folders.Folder(voc).ids("val")
    (voc / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train.txt is missing"):
        folders.Folder(voc).ids("train")


def test_train_aug_is_derived_from_its_masks_and_native_masks_count_before_sbds(voc):
    with pytest.raises(FileNotFoundError, match="prepare_data.py voc"):
        folders.Folder(voc).ids("train_aug")
    (voc / "SegmentationClassAug").mkdir()
    for id in ("a_1", "a_5", "sbd_9", "sbd_10"):
        masks.save_mask(voc / "SegmentationClassAug" / f"{id}.png", np.full((2, 2), 2))
    folder = folders.Folder(voc)
    with pytest.raises(FileNotFoundError, match="scoring needs true masks"):
        folder.truth("a_9")
    assert folder.ids("train_aug") == ["a_5", "sbd_10", "sbd_9"]                # a_1 is in val
    assert 255 in folder.truth("a_1") and (folder.truth("sbd_9") == 2).all()
    write_list(voc, "a_3\n", "train_aug")
    assert folder.ids("train_aug") == ["a_3"]                                   # a list that is there counts


# ---------------------------------------------------------------- labels

def xml(names):
    """Objects that are all difficult, with a part that is no object."""
    rest = "<difficult>1</difficult><part><name>head</name></part>"
    objects = "".join(f"<object><name>{name}</name>{rest}</object>" for name in names)
    return f"<annotation>{objects}</annotation>"


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


@pytest.mark.parametrize("write", [print, indices, tabs, annotations, cls_labels])
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


@pytest.mark.parametrize("name,content,word", [
    ("cls_labels.npy", {"a_1": np.zeros(20)}, r"cls_labels.npy is refused.*shape \(20,\).*3 classes"),
    ("cls_labels.npy", {"a_1": ["x", "y", "z"]}, "cls_labels.npy is refused.*not numbers"),
    ("cls_labels.npy", np.zeros((5, 3)), "cls_labels.npy is refused.*no dict"),
    ("cls_labels.npy", {np.int32(1): multi_hot()}, "no entry for a_1: write labels.txt"),
    ("labels.txt", "a_1 zebra\n", "labels.txt:1: 'zebra' is not in classes.txt"),
    ("labels.txt", "../a_1 cow\n", "no image id"),
    ("labels.txt", "a_1 train\na_1 cow\n", "labels.txt:2: a_1 has a second line"),
    ("labels.txt", "a_1 3\n", "'3' is not in classes.txt"),
    ("labels.txt", "a_1 -1\n", "'-1' is not in classes.txt"),
    ("labels.txt", "a_2 cow\n", "labels.txt has no entry for a_1"),
    ("Annotations/a_1.xml", "<annotation><object>", "a_1.xml is not readable XML"),
    ("Annotations/a_1.xml", xml(["zebra"]), "'zebra' is not in classes.txt"),
    ("Annotations/a_2.xml", xml([]), "a_1.xml is missing"),
    ("x", "", "write labels.txt")])
def test_bad_labels(voc, name, content, word):
    (voc / "labels.txt").unlink()
    (voc / name).parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        (voc / name).write_text(content)
    else:
        np.save(voc / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        folders.Folder(voc).labels(["a_1"])


# ---------------------------------------------------------------- names

def test_classes_default_to_voc(voc):
    (voc / "classes.txt").unlink()
    (voc / "backgrounds.txt").write_text("sky\nrails\n")
    folder = folders.Folder(voc)
    assert len(folder.classes) == 20 and folder.classes[::19] == ["aeroplane", "tvmonitor"]
    assert folder.backgrounds == ["sky", "rails"]
    (voc / "backgrounds.txt").write_text("sky\nsheep\n")
    with pytest.raises(ValueError, match="backgrounds.txt: sheep is a class here, take it out"):
        folders.Folder(voc).backgrounds  # noqa: B018


@pytest.mark.parametrize("text,word", [
    ("", "one name a line"), ("cow\ncow\n", "none twice"), ("background\ncow\n", "lists 'background'"),
    ("".join(f"c{i}\n" for i in range(255)), "holds 254"),
    *((f"{name}\nboat\n", "lists .* characters that do not print") for name in (
        "\u200dcow", "cow\u200c", "c\u200bow", "c\u202eow", "c\ufeffow", "c\x1bow"))])
def test_bad_classes(voc, text, word):
    (voc / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"classes.txt.*{word}"):
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
