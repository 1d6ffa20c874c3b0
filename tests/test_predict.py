"""predict.py as a command: photographs, and the VOC server's archive."""
import tarfile

import numpy as np
import pytest
from conftest import call, make_folder, refused
from PIL import Image
from test_eval import mean_probability, put_network

import predict
from plumbing import folders, images, masks

FAST = ["--device", "cpu", "--amp", "off", "--workers", "0", "--no-crf", "--scales", "1"]


def noise(path, size, **options):
    pixels = np.random.default_rng(len(path.stem)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def world(tmp_path):
    """A network, and three photographs: tall, lying on its side as EXIF says, and a PNG."""
    model, photos = put_network(tmp_path / "out"), tmp_path / "mine"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6                                          # a viewer shows it 36 wide, 60 high
    noise(photos / "tall.jpg", (30, 50))
    noise(photos / "turned.JPG", (60, 36), exif=exif)
    noise(photos / "a b.png", (44, 20))
    (photos / "notes.txt").write_text("no image")
    return model, tmp_path / "out", photos


def run(out, photos, *more):
    return call("predict.py", "--out", out, *FAST, "--images", photos, *more)


def test_a_folder_of_photographs(world):
    model, out, photos = world
    done = run(out, photos)
    where = out / "pred/mine"
    assert done.returncode == 0 and f"{where}: 3 predictions" in done.stdout, done.stderr
    names = [f"{name}.{ending}" for name in ("a b", "tall", "turned") for ending in ("jpg", "png")]
    assert sorted(path.name for path in where.iterdir()) == sorted([*names, "photos.json", "recipe.json"])
    for name, size in (("tall.jpg", (30, 50)), ("turned.JPG", (36, 60)), ("a b.png", (44, 20))):
        stem = name.rpartition(".")[0]
        image = images.to_float(images.load_image(photos / name))
        want = mean_probability(model, image, [image.shape[1:]]).argmax(0).numpy()
        mask = masks.load_mask(where / f"{stem}.png", 3)
        assert mask.shape == size[::-1] and np.array_equal(mask, want)
        legend = 16 * max(1, len(set(np.unique(want)) - {0}))             # below the overlay
        assert images.load_image(where / f"{stem}.jpg").size == (size[0], size[1] + legend)
    made = (where / "tall.png").stat().st_mtime_ns
    (where / "a b.png").unlink()
    assert run(out, photos).returncode == 0 and (where / "a b.png").exists()
    assert (where / "tall.png").stat().st_mtime_ns == made
    noise(photos / "tall.jpg", (20, 40))                      # another photograph of that name
    assert run(out, photos).returncode == 0 and masks.load_mask(where / "tall.png", 3).shape == (40, 20)
    refused(run(out, photos, "--no-flip"), "pred/mine was made with --flip True (now False)")


def test_files_patterns_and_probabilities(world):
    """Into one folder, named after the one that holds them all; what lacks probabilities is made again."""
    model, out, photos = world
    (photos / "more").mkdir()
    noise(photos / "more/b.jpg", (30, 20))
    assert run(out, photos / "tall.jpg").returncode == 0
    done = run(out, photos / "t*.jpg", photos / "more", "--save-prob")
    where = out / "pred/mine"
    assert done.returncode == 0, done.stderr
    assert f"{where}: 2 predictions, <name>.png label maps, <name>.jpg overlays, <name>.npy " in done.stdout
    assert {path.stem for path in where.glob("*.png")} == {"tall", "b"}
    image = images.load_float(photos / "tall.jpg")
    found, want = np.load(where / "tall.npy"), mean_probability(model, image, [image.shape[1:]])
    assert found.dtype == np.float16 and np.abs(found - want.numpy()).max() < 1e-3
    assert np.array_equal(found.argmax(0), masks.load_mask(where / "tall.png", 3))
    noise(photos / "more/tall.jpg", (20, 20))                 # another image of that name is not taken for it
    refused(run(out, photos / "more/tall.jpg", photos / "t*.JPG"), "tall.png is of ", "rename one")


def test_large_photographs_are_predicted_small(world, tmp_path):
    """At --max-side; the mask is written at the photograph's own size."""
    y, x = np.mgrid[:605, :803] / 803
    (tmp_path / "large").mkdir()
    waves = np.stack([np.sin(9 * x + 5 * y), np.sin(14 * y), np.cos(11 * x)], -1)
    Image.fromarray(np.uint8(127.5 + 127 * waves)).save(tmp_path / "large/photo.jpg")
    assert run(world[1], tmp_path / "large", "--max-side", "20").returncode == 0
    mask = masks.load_mask(world[1] / "pred/large/photo.png", 3).astype(int)
    assert mask.shape == (605, 803) and np.abs(np.diff(mask, axis=1)).any(0).sum() <= 19     # of 20 columns


def test_wrong_folders_are_one_line(world, tmp_path):
    _, out, photos = world
    noise(photos / "tall.png", (9, 9))
    refused(run(out, photos), "tall.png", "tall.jpg would both be written to tall.png: rename one")
    refused(run(out, tmp_path / "none"), "none: no image there (.jpg, .jpeg, .png)")
    (tmp_path / "empty").mkdir()
    refused(run(out, tmp_path / "empty"), "empty: no image there")
    (out / "pred/mine").mkdir(parents=True)
    noise(out / "pred/mine/x.jpg", (9, 9))
    refused(run(out, out / "pred/mine"), "is where predictions are written")


def test_the_server_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "VOC_TEST", 3)
    labels = {"t_1": [0], "t_2": [1], "t_3": []}
    voc, out = make_folder(tmp_path / "data", labels), tmp_path / "out"
    (voc / "classes.txt").unlink()                            # VOC's twenty
    (voc / "SegmentationClass").rename(voc / "hidden")
    (voc / "ImageSets/Segmentation/test.txt").write_text("t_1\nt_2\nt_3\n")
    put_network(out, folders.VOC_CLASSES)
    line, archive = ["predict.py", "--data", voc, "--out", out, "--voc-test", *FAST], out / "comp6_test.tgz"
    done = call(*line)
    assert done.returncode == 0 and "to be sent to the VOC server as comp6" in done.stdout, done.stderr
    with tarfile.open(archive) as tar:
        names = [f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png" for id in labels]
        assert tar.getnames() == names
        with Image.open(tar.extractfile(names[1])) as image:
            assert image.mode == "P" and image.size == (40, 34)
            assert np.array_equal(np.array(image), masks.load_mask(out / "pred/test/t_2.png"))
    archive.unlink()
    for wrong in (np.zeros((9, 9)), np.full((34, 40), 255)):
        masks.save_mask(out / "pred/test/t_2.png", wrong)
        refused(call(*line), "t_2.png is not a palette mask of 40x34 without 255")
    assert not archive.exists()
    monkeypatch.setattr(predict, "VOC_TEST", 1456)
    refused(call(*line), "20 classes and 3 images in its split test, VOC 2012 has 20 and 1,456")
