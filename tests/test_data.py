"""Data folders, pictures, masks and maps: every layout read to the same values, every bad input refused by name."""
import io
import pickle
import re
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

import train_seg
from plumbing import files, folders, images, maps as map_files, masks, samples as sampling
from wsss import texts
from plumbing.processes import Env

PNG = dict(format="PNG")


def multi_hot(*present, count=3):
    out = np.zeros(count, np.float32)
    out[list(present)] = 1
    return out


# ---------------------------------------------------------------- lists

@pytest.mark.parametrize("text", [
    "2007_000032\n2007_000039\n",
    "2007_000032\r\n2007_000039",                                            # CRLF, no last newline
    "\ufeff2007_000032\n\n2007_000039 \n",                                   # byte order mark, empty line, trailing blank
    "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n/JPEGImages/2007_000039.jpg /SegmentationClassAug/2007_000039.png",
    "JPEGImages/2007_000032.jpg\nJPEGImages/2007_000039.jpg\n",
])
def test_lists_bare_or_pairs(voc, text):
    (voc / "ImageSets/Segmentation/x.txt").write_text(text, encoding="utf-8", newline="")
    assert folders.Folder(voc).ids("x") == ["2007_000032", "2007_000039"]
    assert folders.Folder(voc).ids("x", limit=1) == ["2007_000032"]


def test_a_long_list_is_no_square(voc):
    """40,000 ids, the last one twice: named in a moment. Looking through all before it, for each, would take minutes."""
    (voc / "ImageSets/Segmentation/x.txt").write_text("\n".join([*map(str, range(40_000)), "39999"]))
    start = time.process_time()
    with pytest.raises(ValueError, match="lists 39999 twice"):
        folders.Folder(voc).ids("x")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_lines_of_a_text_are_counted_before_they_are_made(tmp_path, end):
    path = tmp_path / "x.txt"
    path.write_bytes((f"a{end}" * 2_000_000).encode())
    assert len(files.read_lines(path)) == 2_000_000
    path.write_bytes((f"a{end}" * 10_000_000).encode())
    tracemalloc.start()
    with pytest.raises(ValueError, match="x.txt has 10,000,000 lines"):
        files.read_lines(path)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    path.write_bytes(f"a{end}{'b' * 100_001}{end}".encode())
    with pytest.raises(ValueError, match="x.txt has a line of 100,001 characters"):
        files.read_lines(path)


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "a/b", "/JPEGImages/../../x.jpg", "..", "a\\b", "/JPEGImages/sub/x.jpg", ".hidden"])
def test_an_id_never_leaves_the_folder(voc, line):
    (voc / "ImageSets/Segmentation/x.txt").write_text(f"a_1\n{line}\n")
    with pytest.raises(ValueError, match="x.txt: .* is no picture id"):
        folders.Folder(voc).ids("x")


def test_ids_are_strings_and_may_hold_blanks(voc):
    (voc / "ImageSets/Segmentation/x.txt").write_text("000123\nIMG 7\n")
    assert folders.Folder(voc).ids("x") == ["000123", "IMG 7"]


@pytest.mark.parametrize("text,word", [("", "is empty"), ("a_1\na_2\na_1\n", "lists a_1 twice"), (None, "--split is one of train, val")])
def test_bad_lists(voc, text, word):
    if text is not None:
        (voc / "ImageSets/Segmentation/x.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        folders.Folder(voc).ids("x")


def test_own_pictures_need_no_lists(voc):
    """Without ImageSets/ `train` is labels.txt, and there is no other split."""
    for path in (voc / "ImageSets/Segmentation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no list at all"):          # an empty folder for lists is somebody's mistake
        folders.Folder(voc).ids("train")
    (voc / "ImageSets/Segmentation").rmdir(), (voc / "ImageSets").rmdir()
    assert folders.Folder(voc).ids("train") == list(LABELS) and folders.Folder(voc).ids("train", 2) == list(LABELS)[:2]
    with pytest.raises(FileNotFoundError, match="val.txt is missing"):
        folders.Folder(voc).ids("val")
    (voc / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train.txt is missing"):
        folders.Folder(voc).ids("train")


def test_train_aug_is_derived(voc):
    with pytest.raises(FileNotFoundError, match="prepare_data.py voc"):
        folders.Folder(voc).ids("train_aug")
    (voc / "SegmentationClassAug").mkdir()
    for id in ("a_1", "a_5", "sbd_9", "sbd_10"):
        masks.save_mask(voc / "SegmentationClassAug" / f"{id}.png", np.zeros((2, 2)))
    assert folders.Folder(voc).ids("train_aug") == ["a_5", "sbd_10", "sbd_9"]   # a_1 is in val
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("a_3\n")
    assert folders.Folder(voc).ids("train_aug") == ["a_3"]                      # a list that is there counts


def test_no_folder():
    with pytest.raises(FileNotFoundError, match="JPEGImages is missing"):
        folders.Folder("nowhere")


# ---------------------------------------------------------------- labels

EXPECTED = torch.from_numpy(np.stack([multi_hot(*k) for k in LABELS.values()]))


def xml(names, parts=()):
    inside = "".join(f"<part><name>{p}</name></part>" for p in parts)
    return "<annotation>" + "".join(f"<object><name>{n}</name><difficult>1</difficult>{inside}</object>" for n in names) + "</annotation>"


def as_names(root):
    pass


def as_indices(root):
    (root / "labels.txt").write_text("".join(" ".join([id, *map(str, k)]) + "\n" for id, k in LABELS.items()))


def as_tabs(root):
    (root / "labels.txt").write_text("\ufeff" + "".join("\t".join([id, *(CLASSES[i] for i in k)]) + "\r\n" for id, k in LABELS.items()))


def as_xml(root):
    (root / "labels.txt").unlink()
    (root / "Annotations").mkdir()
    for id, k in LABELS.items():
        (root / "Annotations" / f"{id}.xml").write_text(xml([CLASSES[i] for i in k for _ in range(2)], parts=["head"]))


def as_npy(root):
    (root / "labels.txt").unlink()
    np.save(root / "cls_labels.npy", {id: multi_hot(*k) for id, k in LABELS.items()})


@pytest.mark.parametrize("write", [as_names, as_indices, as_tabs, as_xml, as_npy], ids=lambda f: f.__name__)
def test_labels_in_every_layout(voc, write):
    write(voc)
    folder = folders.Folder(voc)
    assert torch.equal(folder.labels(folder.ids("train")), EXPECTED)         # a_3 holds no class: a row of zeros


def test_integer_keys_of_irn(voc):
    (voc / "labels.txt").unlink()
    np.save(voc / "cls_labels.npy", {np.int32(2007000032): multi_hot(1), np.int32(2007000033): multi_hot()})
    folder = folders.Folder(voc)
    assert folder.labels(["2007_000032", "2007_000033"]).tolist() == [[0, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="no entry for 2007_000039: write labels.txt"):
        folder.labels(["2007_000039"])
    with pytest.raises(ValueError, match="no entry for a_2007000032"):             # digits alone are not the id
        folder.labels(["a_2007000032"])


def test_names_with_blanks(voc):
    (voc / "classes.txt").write_text("traffic light\nhot dog\ncow\n")
    (voc / "labels.txt").write_text("a_1 traffic_light cow\na_2\thot dog\n")
    assert folders.Folder(voc).labels(["a_1", "a_2"]).tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("text,word", [
    ("a_1 zebra\n", "labels.txt:1: 'zebra' is not in classes.txt"),
    ("a_1 train\na_1 cow\n", "labels.txt:2: a_1 has a second line"),
    ("a_1 3\n", "'3' is not in classes.txt"),
    ("a_1 \u00b2\n", "labels.txt:1: '\u00b2' is not in classes.txt"),
    ("../a_1 cow\n", "no picture id"),
    ("a_2 cow\n", "labels.txt has no entry for a_1"),
])
def test_bad_label_lists(voc, text, word):
    (voc / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=word):
        folders.Folder(voc).labels(["a_1"])


def test_bad_xml(voc):
    as_xml(voc)
    (voc / "Annotations/a_1.xml").write_text("<annotation><object>")
    (voc / "Annotations/a_2.xml").write_text(xml(["zebra"]))
    (voc / "Annotations/a_3.xml").unlink()
    for id, word in (("a_1", "a_1.xml is not readable XML"), ("a_2", "'zebra' is not in classes.txt"), ("a_3", "a_3.xml is missing")):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            folders.Folder(voc).labels([id])


class Bomb:
    def __reduce__(self):
        return open, ("bombed", "w")


@pytest.mark.parametrize("table,word", [
    ({"a_1": Bomb()}, "refused"), ({"a_1": np.zeros(20)}, r"shape \(20,\).*3 classes"), (np.zeros((5, 3)), "plain array"), ([1, 2], "refused")])
def test_foreign_labels_run_no_code(voc, monkeypatch, table, word):
    monkeypatch.chdir(voc)
    (voc / "labels.txt").unlink()
    np.save(voc / "cls_labels.npy", table, allow_pickle=True)
    with pytest.raises(ValueError, match=f"cls_labels.npy.*{word}"):
        folders.Folder(voc).labels(["a_1"])
    assert not (voc / "bombed").exists()


def test_foreign_labels_of_old_numpy_and_protocols(voc):
    (voc / "labels.txt").unlink()
    table = np.array({"a_1": multi_hot(1)}, dtype=object)
    for protocol in (2, 3, 4, 5):                                            # np.save of other years
        body = pickle.dumps(table, protocol=protocol).replace(b"numpy._core", b"numpy.core") if protocol < 4 else pickle.dumps(table, protocol=protocol)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
        (voc / "cls_labels.npy").write_bytes(head.getvalue() + body)
        assert folders.Folder(voc).labels(["a_1"]).tolist() == [[0, 1, 0]]


def test_no_labels_at_all(voc):
    (voc / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="write labels.txt"):
        folders.Folder(voc).labels(["a_1"])


# ---------------------------------------------------------------- classes and texts

def test_classes_default_to_voc(voc):
    (voc / "classes.txt").unlink()
    folder = folders.Folder(voc)
    assert len(folder.classes) == 20 and folder.classes[0] == "aeroplane" and folder.classes[-1] == "tvmonitor"
    assert len(folder.backgrounds) == 25 and len(folders.COCO_BACKGROUNDS) == 23
    (voc / "backgrounds.txt").write_text("sky\nrails\n")
    assert folders.Folder(voc).backgrounds == ["sky", "rails"]
    assert len(folders.COCO_CLASSES) == len(set(folders.COCO_CLASSES)) == 80 and folders.COCO_CLASSES[79] == "toothbrush"


@pytest.mark.parametrize("text,word", [("", "one name a line"), ("cow\ncow\n", "none twice"), ("background\ncow\n", "lists 'background'"),
                                       ("".join(f"c{i}\n" for i in range(255)), "holds 254")])
def test_bad_classes(voc, text, word):
    (voc / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=word):
        folders.Folder(voc)


def test_class_names_of_all_scripts(voc):
    """Joined emoji and Persian are names; a no-break space is a blank, wherever a class is named."""
    firefighter, book = "\U0001f469\u200d\U0001f692", "\u06a9\u062a\u0627\u0628\u200c\u062e\u0627\u0646\u0647"
    (voc / "classes.txt").write_text(f"{firefighter}\n{book}\n\u00a0potted\u00a0plant\u00a0\n", encoding="utf-8")
    (voc / "labels.txt").write_text(f"a_1 {firefighter} potted_plant\na_2\t{book}\tpotted\u00a0plant\na_3\tpotted plant\n", encoding="utf-8")
    folder = folders.Folder(voc)
    assert folder.classes == [firefighter, book, "potted plant"]
    assert folder.labels(["a_1", "a_2", "a_3"]).tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    (voc / "a.xml").write_text(xml(["potted\u00a0plant"]), encoding="utf-8")
    assert folders.read_xml(voc / "a.xml", folder.classes) == [2]


@pytest.mark.parametrize("name", ["\u200dcow", "cow\u200c", "\u200d", "c\u200bow", "c\u202eow", "c\u2066ow", "c\ufeffow", "c\u2003ow", "c\x1bow", "c\x07\u200dow", "c\u0085ow"])
def test_class_names_that_cannot_be_seen_are_refused(voc, name):
    (voc / "classes.txt").write_text(f"{name}\nboat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="classes.txt (holds control characters|lists .* which holds what cannot be printed)"):
        folders.Folder(voc)


def test_class_texts():
    assert texts.class_texts(["train", "bird"]) == ["a photo of train.", "a photo of bird."]
    assert texts.class_texts(["train", "bird"], "a clean origami {}.", synonyms=True) == ["a clean origami train.", "a clean origami bird avian."]


# ---------------------------------------------------------------- pictures

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def written(path, image, **options):
    image.save(path, **options)
    return np.asarray(images.load_image(path))


def test_ordinary_modes(tmp_path):
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
    assert np.array_equal(written(tmp_path / "a.png", Image.fromarray(rgb)), rgb)
    grey = np.stack([RAMP] * 3, -1)
    assert np.array_equal(written(tmp_path / "b.png", Image.fromarray(RAMP)), grey)
    assert np.array_equal(written(tmp_path / "c.png", Image.fromarray((RAMP.astype(np.uint16) * 257))), grey)       # 16 bits
    assert np.array_equal(written(tmp_path / "d.png", Image.fromarray(RAMP > 127)), 255 * (grey > 127))            # 1 bit
    dark = Image.fromarray(RAMP.astype(np.uint16))
    assert written(tmp_path / "k.png", dark).max() == 1                                                            # 16 bits, though small
    indexed = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(written(tmp_path / "e.png", indexed), np.asarray(indexed.convert("RGB")))
    cmyk = written(tmp_path / "f.jpg", Image.fromarray(rgb).convert("CMYK"), quality=95)
    assert cmyk.shape == (16, 16, 3) and abs(cmyk.astype(int) - rgb).mean() < 12                                  # JPEG of a steep ramp


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    assert written(tmp_path / "a.png", Image.fromarray(pixels)).tolist() == [[[255] * 3, [127] * 3, [0] * 3]]
    la = written(tmp_path / "b.png", Image.fromarray(pixels[..., 2:]))
    assert la.tolist() == [[[255] * 3, [127] * 3, [0] * 3]]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6                                                         # turned by 90 degrees
    assert written(tmp_path / "a.jpg", image, exif=exif).shape == (20, 10, 3)


@pytest.mark.parametrize("mode,ending,options", [("RGB", "jpg", {}), ("L", "jpg", {}), ("CMYK", "jpg", {}), ("RGBA", "png", {}), ("RGB", "webp", {"lossless": True}),
                                                 ("P", "png", {"transparency": bytes(range(0, 240, 30))}), ("P", "png", {"transparency": 3}), ("I;16", "png", {}), ("1", "png", {})])
def test_pictures_are_turned_as_pillow_turns_them(tmp_path, mode, ending, options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    image = Image.fromarray(rng.integers(0, 65536, (9, 14)).astype(np.uint16)) if mode == "I;16" else image.quantize(8) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (9, 14), dtype=np.uint8)))
    path, upright = tmp_path / f"a.{ending}", tmp_path / "b.png"
    for flag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = flag
        image.save(path, exif=exif, **options)
        with Image.open(path) as file:
            turned = ImageOps.exif_transpose(file)
        turned.info.pop("exif", None)
        turned.convert("RGB" if mode == "CMYK" else turned.mode).save(upright, **options)
        found = images.load_image(path)
        assert found.mode == "RGB" and np.array_equal(found, images.load_image(upright)), flag
        assert images.picture_size(path) == found.size[::-1] == ((9, 14) if flag < 5 else (14, 9))


@pytest.mark.parametrize("tag", [struct.pack("<HHIf", 0x0100, 11, 1, 1.5), struct.pack("<HHIf", 0x010e, 11, 1, 1.5)])
def test_the_other_tags_of_a_turned_picture_do_not_matter(tmp_path, tag):
    """A width, or a description, that is a fraction: EXIF that can be read and not be written."""
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tag + struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0))
    with Image.open(tmp_path / "a.jpg") as file, pytest.raises((struct.error, AttributeError)):
        ImageOps.exif_transpose(file)
    assert images.picture_size(tmp_path / "a.jpg") == images.load_image(tmp_path / "a.jpg").size[::-1] == (20, 10)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    for block in (b"no header of TIFF's", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM"):
        image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
        assert images.picture_size(tmp_path / "a.jpg") == images.load_image(tmp_path / "a.jpg").size[::-1] == (10, 20), block


def test_float_picture(voc):
    image = folders.Folder(voc).image("a_1")
    pixels = np.asarray(Image.open(voc / "JPEGImages/a_1.jpg"))
    assert image.dtype == torch.float32 and image.shape == (3, 30, 40) and torch.equal(image[:, 3, 5] * 255, torch.tensor(pixels[3, 5]).float())


def test_unreadable_pictures(voc):
    whole = (voc / "JPEGImages/a_1.jpg").read_bytes()
    folder = folders.Folder(voc)
    for torn in (whole[:len(whole) // 2], b"", b"GIF89a nonsense"):
        (voc / "JPEGImages/a_1.jpg").write_bytes(torn)
        with pytest.raises(ValueError, match="a_1.jpg is not a readable picture"):
            folder.image("a_1")
    (voc / "JPEGImages/a_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="a_1.jpg is missing"):
        folder.image("a_1")


# ---------------------------------------------------------------- masks

def test_masks_round_trip_in_voc_colours(tmp_path):
    mask = np.random.default_rng(0).choice([0, 1, 20, 255], (13, 17)).astype(np.uint8)
    masks.save_mask(tmp_path / "m.png", mask)
    image = Image.open(tmp_path / "m.png")
    assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert image.getpalette()[60:63] == [0, 64, 128] and image.getpalette()[765:] == [224, 224, 192]     # tvmonitor, void
    assert np.array_equal(masks.load_mask(tmp_path / "m.png", 20), mask)
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]                  # nothing beside it
    image.convert("RGB").save(tmp_path / "c.png")                            # what OpenCV users store: exact colours are mapped
    assert np.array_equal(masks.load_mask(tmp_path / "c.png", 20), mask)
    Image.fromarray(mask).save(tmp_path / "g.png")
    assert np.array_equal(masks.load_mask(tmp_path / "g.png", 20), mask)
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "i.png")
    assert np.array_equal(masks.load_mask(tmp_path / "i.png", 20), mask)


def test_bad_masks(tmp_path):
    path = tmp_path / "m.png"
    masks.save_mask(path, np.full((2, 2), 21))
    with pytest.raises(ValueError, match="label 21, classes.txt has 20"):
        masks.load_mask(path, 20)
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(path)
    with pytest.raises(ValueError, match="not VOC's palette"):
        masks.load_mask(path)
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(path)
    with pytest.raises(ValueError, match="label 300"):
        masks.load_mask(path)
    path.write_bytes(b"\x89PNG torn")
    with pytest.raises(ValueError, match="not a readable mask"):
        masks.load_mask(path)
    with pytest.raises(FileNotFoundError, match="gone.png is missing"):
        masks.load_mask(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="values 0..255"):
        masks.save_mask(path, np.full((2, 2), 256))


def test_native_masks_before_sbd(voc):
    (voc / "SegmentationClassAug").mkdir()
    for id in ("a_1", "x_9"):
        masks.save_mask(voc / "SegmentationClassAug" / f"{id}.png", np.full((30, 40), 2))
    folder = folders.Folder(voc)
    assert 255 in folder.truth("a_1") and (folder.truth("x_9") == 2).all()
    with pytest.raises(FileNotFoundError, match="scoring needs true masks"):
        folder.truth("none")


# ---------------------------------------------------------------- maps

def test_maps_round_trip(tmp_path):
    cam = np.random.default_rng(0).random((2, 3, 4))
    map_files.save_cam(tmp_path / "a.npy", torch.from_numpy(cam))
    raw = np.load(tmp_path / "a.npy")                                        # no pickle, no torch needed
    assert raw.dtype == np.float16 and raw.shape == (2, 3, 4)
    for labels in ([1, 0, 1], np.array([1., 0, 1]), torch.tensor([True, False, True])):
        classes, maps = map_files.load_cam(tmp_path / "a.npy", labels)
        assert classes.tolist() == [0, 2] and maps.dtype == np.float32 and np.abs(maps - cam).max() < 5e-4
    map_files.save_cam(tmp_path / "none.npy", np.zeros((0, 3, 4)))
    classes, maps = map_files.load_cam(tmp_path / "none.npy", [0, 0, 0])
    assert len(classes) == 0 and maps.shape == (0, 3, 4)


@pytest.mark.parametrize("content,word", [
    (np.array([{"keys": 1}], dtype=object), "not a plain .npy"), (np.zeros((1, 3, 4), np.float16), "1 maps, the picture's label has 2"),
    (np.full((2, 3, 4), np.nan, np.float16), "NaN"), (np.full((2, 3, 4), np.inf, np.float32), "NaN or infinity"),
    (np.zeros((2, 0, 4), np.float16), "maps are float"), (b"PK\x03\x04torn", "not a plain .npy"),
    (b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': False, 'shape': (2, 99999999, 99999999), }" + b" " * 30, "not a plain .npy"),
    (np.zeros((2, 3, 4), np.int64), "maps are float"), (np.zeros((2, 12), np.float16), "maps are float"), (b"torn", "not a plain .npy"), (None, "run make_cam.py first")])
def test_bad_maps(tmp_path, content, word):
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(word)) as error:
        map_files.load_cam(path, [1, 1, 0])
    assert "a.npy" in str(error.value)


def test_labels_of_maps_are_multi_hot(tmp_path):
    map_files.save_cam(tmp_path / "a.npy", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="multi-hot"):
        map_files.load_cam(tmp_path / "a.npy", [0, 2])


def test_background_rules():
    cam = torch.tensor([[[.2, .9]], [[.5, .1]]])                              # (2, 1, 2)
    assert torch.equal(map_files.add_background(cam, "constant", .4), torch.cat([torch.full((1, 1, 2), .4), cam]))
    assert torch.allclose(map_files.add_background(cam, "power", 2.)[0], torch.tensor([[.25, .01]]))
    empty = map_files.add_background(torch.zeros(0, 2, 3), "power", 1.)
    assert empty.shape == (1, 2, 3) and (empty == 1).all()
    assert map_files.resize_maps(np.zeros((0, 2, 2), np.float32), (5, 6)).shape == (0, 5, 6)


# ---------------------------------------------------------------- training samples

class One:
    rank, world = 0, 1
    shard = Env.shard


class Two(One):
    world = 2

    def __init__(self, rank):
        self.rank = rank


def test_noise_depends_on_picture_and_epoch_alone(voc):
    folder = folders.Folder(voc)
    ids = folder.ids("train")
    samples = sampling.Samples(folder, ids, sampling.train_transform(16, randaugment=True), seed=3)
    image, labels, number = samples[0, 1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert type(image) is torch.Tensor and labels.tolist() == [0, 1, 1] and number == 1
    before = torch.get_rng_state()
    torch.rand(3)
    again, *_ = samples[0, 1]
    assert torch.equal(image, again) and not torch.equal(image, samples[1, 1][0])
    torch.set_rng_state(before)
    samples[0, 2]
    assert torch.equal(before, torch.get_rng_state())                          # the caller's noise is untouched


def test_picture_and_mask_move_together(voc):
    """A picture that shows its own mask: after any crop and flip the two still agree."""
    folder = folders.Folder(voc)
    for id in folder.ids("train"):
        mask = folder.truth(id)
        Image.fromarray(np.repeat((mask > 0)[..., None] * np.uint8(255), 3, 2)).save(voc / "JPEGImages" / f"{id}.png")
        (voc / "JPEGImages" / f"{id}.jpg").unlink()
    samples = sampling.Samples(folder, folder.ids("train"), train_seg.transform(60, 2, 3), masks=folder.mask_path)
    image, mask, _ = samples[0, 1]
    assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 2, 3, 255}
    assert .2 < (mask > 0).float().mean() < .8
    assert ((image[0] > .5) == (mask > 0)).float().mean() > .95                 # bilinear against nearest at the border
    masks.save_mask(voc / "SegmentationClass/a_2.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="a_2.png is 5x5, its picture 40x34"):
        samples[0, 1]


def plainly(path, key, size, scale=(0.08, 1.0), randaugment=False, erase=0.0, seed=0):
    """A training sample as torchvision's own transforms make it of the whole decoded picture."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    steps = [v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.RandAugment(magnitude=9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR)] if randaugment else []
    steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    if erase:                                                                  # noise about 0 where the picture is normalised
        steps += [v2.Normalize(mean.tolist(), std.tolist()), v2.RandomErasing(erase, value="random"), v2.Normalize((-mean / std).tolist(), (1 / std).tolist())]
    with torch.random.fork_rng():
        torch.manual_seed(hash((seed, *key)) & 0x7FFFFFFFFFFFFFFF)
        image = v2.Compose(steps)(tv_tensors.Image(np.array(images.load_image(path)).transpose(2, 0, 1)))
    return image.as_subclass(torch.Tensor).clamp(0, 1)


def smooth(path, width, height, **options):
    """A large picture of three waves, as a photograph is smooth at the scale of its pixels."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 5 * y), np.sin(14 * y), np.cos(11 * x - 7 * y)], -1)
    Image.fromarray(np.uint8(127.5 + 127 * waves)).save(path, **options)


@pytest.mark.parametrize("options", [{}, dict(scale=(0.5, 0.6)), dict(randaugment=True), dict(randaugment=True, erase=0.5)], ids=str)
def test_samples_are_those_of_the_plain_form(voc, options):
    """Bit for bit wherever nothing is reduced; erasing skips a way there and back, so the last bit may differ."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(voc / "JPEGImages/a_1.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (60, 110, 3), dtype=np.uint8)).save(voc / "JPEGImages/a_2.jpg", exif=exif)     # shown 60 wide
    (voc / "JPEGImages/a_3.jpg").unlink()
    Image.fromarray(rng.integers(0, 256, (190, 380, 4), dtype=np.uint8)).save(voc / "JPEGImages/a_3.png")               # large, but no JPEG
    smooth(voc / "JPEGImages/a_4.jpg", 91, 400)
    folder = folders.Folder(voc)
    samples = sampling.Samples(folder, folder.ids("train"), sampling.train_transform(48, **options))
    for epoch in range(3):
        for i, id in enumerate(samples.ids):
            mine, plain = samples[epoch, i][0], plainly(folder.picture(id), (epoch, i), 48, **options)
            assert torch.equal(mine, plain) if not options.get("erase") else torch.allclose(mine, plain, rtol=0, atol=1e-6), (epoch, id)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_only_as_far_as_its_crop_needs(voc, monkeypatch, orientation):
    """A sixteenth of the pixels, a sixty-fourth, or all; close to the crop of the whole picture, in place to half a pixel of the sample."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(voc / "JPEGImages/a_1.jpg", 803, 605, quality=95, exif=exif)
    folder, decoded, decode = folders.Folder(voc), [], images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    for size, scale, by in ((100, (0.6, 0.8), 4), (50, (0.6, 0.8), 8), (100, (0.05, 0.06), 1)):
        samples = sampling.Samples(folder, ["a_1"], sampling.train_transform(size, scale))
        for epoch in range(3):
            mine = samples[epoch, 0][0]
            assert decoded[-1].size == (-(-803 // by), -(-605 // by))[::1 if orientation == 1 else -1]
            plain = plainly(folder.picture("a_1"), (epoch, 0), size, scale)
            assert (mine - plain).abs().mean() < 0.02 < 0.05 < (mine - plain.flip(-1)).abs().mean()


def test_batches_are_shared_out_the_same_for_any_process_count():
    one = sampling.Batches(11, 4, One(), seed=5)
    ranks = [sampling.Batches(11, 4, Two(r), seed=5) for r in (0, 1)]
    for batches in (one, *ranks):
        batches.start(epoch=2)
    whole = list(one)
    assert len(one) == len(whole) == 2 and all(epoch == 2 for batch in whole for epoch, _ in batch)
    assert len({i for batch in whole for _, i in batch}) == 8
    for batch, a, b in zip(whole, *ranks):
        assert a == batch[::2] and b == batch[1::2]
    one.start(epoch=2, skip=1)
    assert list(one) == whole[1:]                                              # resumed inside an epoch
    one.start(epoch=3)
    assert list(one) != whole
    assert len(sampling.Batches(3, 64, One())) == 1 and len(list(sampling.Batches(3, 64, One()))[0]) == 3


def test_maps_must_fit_their_picture(tmp_path):
    fits, wrong = [(375, 500), (188, 250), (94, 125), (24, 32), (23, 31)], [(374, 500), (376, 500), (500, 375), (750, 1000), (188, 188)]
    for h, w in fits + wrong:
        map_files.save_cam(tmp_path / "x.npy", np.zeros((1, h, w)))
        if (h, w) in fits:
            map_files.load_cam(tmp_path / "x.npy", [1, 0], (375, 500))
        else:
            with pytest.raises(ValueError, match=f"maps of {w}x{h} do not fit"):
                map_files.load_cam(tmp_path / "x.npy", [1, 0], (375, 500))


def test_an_unknown_orientation_turns_nothing(tmp_path):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 9
    image.save(tmp_path / "x.jpg", exif=exif)
    assert images.picture_size(tmp_path / "x.jpg") == images.load_image(tmp_path / "x.jpg").size[::-1] == (20, 30)
