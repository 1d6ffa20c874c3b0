"""eval.py as a command: hand-worked scores, one process against two, every bad input in one line."""
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, make_folder, refused, run
from PIL import Image

from plumbing import checkpoints, folders, images as image_files, maps, masks
from wsss import crf, segmenter


def perfect_maps(folder, out, noise=0.0):
    """Maps at a quarter of the size that are 1 inside the object's mask, plus noise."""
    rng = np.random.default_rng(0)
    (out / "cam").mkdir(parents=True)
    for id, present in LABELS.items():
        truth = folder.truth(id)
        cam = np.stack([truth == k + 1 for k in present]).astype(float) if present else np.zeros((0, *truth.shape))
        maps.save_cam(out / "cam" / f"{id}.npy", (cam + noise * rng.random(cam.shape)) / (1 + noise))


def scores(out, what="cam", split="train"):
    return json.loads((out / f"eval_{what}_{split}.json").read_text())


def loop(folder, ids, predict):
    """IoU by counting pixels one class at a time."""
    hit, union = np.zeros(4), np.zeros(4)
    for id in ids:
        truth, guess = folder.truth(id).ravel(), predict(id).ravel()
        for k in range(4):
            t, g = (truth == k) & (truth != 255), (guess == k) & (truth != 255)
            hit[k], union[k] = hit[k] + (t & g).sum(), union[k] + (t | g).sum()
    return hit / union


def test_maps_by_the_fixed_threshold(voc, tmp_path):
    folder, out = folders.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    done = call("eval.py", "--data", voc, "--out", out, "--split", "train", "--what", "cam", "--threshold", "0.3")

    def predict(id):
        classes, cam = maps.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        guess = np.zeros(folder.truth(id).shape, int)
        for y, x in np.ndindex(*guess.shape):
            column = [0.3, *cam[:, y, x]]
            best = int(np.argmax(column))
            guess[y, x] = 0 if best == 0 else classes[best - 1] + 1
        return guess

    want = loop(folder, folder.ids("train"), predict)
    found = scores(out)
    assert done.returncode == 0 and 0.1 < found["miou"] < 0.95
    assert [found["iou"][name] for name in ["background", *CLASSES]] == pytest.approx(want.tolist())
    assert found["miou"] == pytest.approx(want.mean()) and f"{100 * want.mean():.1f}" in done.stdout
    assert found["protocol"] | {"data": "", "made_by": None} == {
        "what": "cam", "split": "train", "pictures": 5, "limit": 0, "data": "", "pred": None, "oracle": False, "background": "constant",
        "value": 0.3, "mean_over": "classes in truth or prediction, background included", "made_by": None}


def test_small_maps_are_resized_to_the_truth(voc, tmp_path):
    folder, out = folders.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out)
    for id in LABELS:
        classes, cam = maps.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        maps.save_cam(out / "cam" / f"{id}.npy", cam[:, ::2, ::2])
    call("eval.py", "--data", voc, "--out", out, "--split", "val", "--what", "cam", "--threshold", "0.5")
    found = scores(out, split="val")
    assert 0.6 < found["miou"] < 1 and found["protocol"]["pictures"] == 2


def test_oracle_is_one_pass_and_stamped(voc, tmp_path):
    folder, out = folders.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    flags = ("--data", voc, "--out", out, "--split", "train", "--what", "cam")
    call("eval.py", *flags, "--threshold", "0.3", "--oracle")
    swept = scores(out)
    assert "chosen on the truth" in swept["protocol"]["oracle"] and len(swept["oracle_sweep"]) == 99
    for t in ("0.30", "0.55", f"{swept['oracle_best']['threshold']:.2f}"):
        call("eval.py", *flags, "--threshold", t)
        alone = scores(out)
        assert alone["protocol"]["oracle"] is False
        assert alone["miou"] == pytest.approx(swept["oracle_sweep"][t], abs=1e-12)
    assert swept["miou"] == pytest.approx(swept["oracle_sweep"]["0.30"], abs=1e-12)      # the headline stays the fixed one
    assert swept["oracle_best"]["miou"] == max(swept["oracle_sweep"].values())


def test_power_rule_is_the_argmax_with_its_background(voc, tmp_path):
    folder, out = folders.Folder(voc), tmp_path / "out"
    perfect_maps(folder, out, noise=1.0)
    call("eval.py", "--data", voc, "--out", out, "--split", "train", "--what", "cam", "--background", "power", "--alpha", "2")

    def predict(id):
        classes, cam = maps.load_cam(out / "cam" / f"{id}.npy", folder.labels([id])[0])
        return np.array([0, *(classes + 1)])[maps.add_background(torch.from_numpy(cam), "power", 2.).argmax(0).numpy()]

    assert list(scores(out)["iou"].values()) == pytest.approx(loop(folder, folder.ids("train"), predict).tolist())


def test_masks_and_the_misses(voc, tmp_path):
    folder, pred = folders.Folder(voc), tmp_path / "pred"
    pred.mkdir()
    for id in LABELS:
        guess = folder.truth(id).copy()
        guess[guess == 2] = 255                                                # boats are never predicted
        masks.save_mask(pred / f"{id}.png", guess)
    call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "masks", "--pred", pred)
    found = scores(tmp_path / "out", "masks")
    assert found["iou"] == {"background": 1, "train": 1, "boat": 0, "cow": 1} and found["miou"] == 0.75
    assert found["missed_pixels"] == sum((folder.truth(id) == 2).sum() for id in LABELS)
    (voc / "ImageSets/Segmentation/one.txt").write_text("a_1\n")
    done = call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "one", "--what", "masks", "--pred", pred)
    found = scores(tmp_path / "out", "masks", "one")
    assert found["iou"]["cow"] is None and found["absent"] == ["boat", "cow"] and found["miou"] == 1.0
    assert "not scored" in done.stdout


def test_a_large_photograph_is_decoded_small(tmp_path):
    import eval as script
    y, x = np.mgrid[:605, :803] / 803
    Image.fromarray(np.uint8(127.5 + 127 * np.stack([np.sin(9 * x + 5 * y), np.sin(14 * y), np.cos(11 * x)], -1))).save(tmp_path / "photo.jpg")
    small, whole = (script.Photos(tmp_path, side).image("photo") for side in (100, 0))
    assert image_files.load_image(tmp_path / "photo.jpg", (200, 200)).size == (402, 303) and whole.shape == (3, 605, 803)
    assert small.shape == (3, 75, 100) and (small - torch.nn.functional.interpolate(whole[None], (75, 100), mode="area")[0]).abs().mean() < 0.01


def test_pseudo_masks_are_read_from_out(voc, tmp_path):
    (tmp_path / "out/pseudo").mkdir(parents=True)
    for id in LABELS:
        masks.save_mask(tmp_path / "out/pseudo" / f"{id}.png", folders.Folder(voc).truth(id))
    (tmp_path / "out/pseudo.json").write_text('{"crf": "weaktr"}')
    call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "pseudo")
    found = scores(tmp_path / "out", "pseudo")
    assert found["miou"] == 1 and found["protocol"]["made_by"] == {"crf": "weaktr"}


def test_two_processes_score_as_one(voc, tmp_path):
    perfect_maps(folders.Folder(voc), tmp_path / "out", noise=1.0)
    flags = ("--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "cam", "--oracle", "--device", "cpu")
    call("eval.py", *flags)
    one = scores(tmp_path / "out")
    run("eval.py", *flags, processes=2)
    assert scores(tmp_path / "out") == one


@pytest.mark.parametrize("spoil,flags,words", [
    (lambda v, o: None, ["--split", "none"], ["none.txt is missing", "train, val"]),
    (lambda v, o: (o / "cam/a_2.npy").unlink(), [], ["a_2.npy is missing", "make_cam.py"]),
    (lambda v, o: np.save(o / "cam/a_2.npy", np.array([{}])), [], ["a_2.npy is not a plain .npy"]),
    (lambda v, o: maps.save_cam(o / "cam/a_2.npy", np.zeros((1, 3, 3))), [], ["a_2.npy has 1 maps", "2 classes"]),
    (lambda v, o: np.save(o / "cam/a_2.npy", np.full((2, 3, 3), np.nan, np.float16)), [], ["a_2.npy holds NaN"]),
    (lambda v, o: (v / "SegmentationClass/a_2.png").unlink(), [], ["a_2.png is missing", "scoring needs true masks"]),
    (lambda v, o: masks.save_mask(v / "SegmentationClass/a_2.png", np.full((34, 40), 9)), [], ["a_2.png holds label 9"]),
    (lambda v, o: (v / "labels.txt").write_text("a_1 zebra\n"), [], ["'zebra' is not in classes.txt"]),
    (lambda v, o: (v / "ImageSets/Segmentation/train.txt").write_text("../a_1"), [], ["is no image id"]),
    (lambda v, o: (v / "ImageSets/Segmentation/train.txt").write_text(""), [], ["train.txt is empty"]),
    (lambda v, o: None, ["--split", "../x"], ["--split", "'../x' is no image id"]),
    (lambda v, o: (o / "cam.json").write_text("{"), [], ["cam.json is not JSON"]),
    (lambda v, o: (o / "cam.json").write_text('{"classes": ["boat", "train", "cow"]}'), [], ["cam.json", "other classes"]),
    (lambda v, o: [masks.save_mask(p, np.full((30 + 4 * (int(p.stem[2:]) % 2 == 0), 40), 255)) for p in (v / "SegmentationClass").iterdir()], [], ["no scored pixel"]),
])
def test_bad_input_is_one_line(voc, tmp_path, spoil, flags, words):
    perfect_maps(folders.Folder(voc), tmp_path / "out")
    spoil(voc, tmp_path / "out")
    refused(call("eval.py", "--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "cam", *flags), *words)
    assert not list((tmp_path / "out").glob("eval*"))


def test_bad_masks_are_one_line(voc, tmp_path):
    pred, flags = tmp_path / "pred", ["--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "masks", "--pred", tmp_path / "pred"]
    pred.mkdir()
    masks.save_mask(pred / "a_1.png", np.zeros((30, 40)))
    refused(call("eval.py", *flags), "a_2.png is missing, and 3 more of 5")
    for id in LABELS:
        masks.save_mask(pred / f"{id}.png", np.zeros((7, 8)))
    refused(call("eval.py", *flags), "a_1.png is 8x7, the truth 40x30")
    masks.save_mask(pred / "a_1.png", np.full((30, 40), 90))
    refused(call("eval.py", *flags), "a_1.png holds label 90", "90-id COCO")
    (tmp_path / "file").write_text("")
    refused(call("eval.py", *flags[:3], tmp_path / "file", *flags[4:]), "file: File exists")
    assert call("eval.py", *flags[:-4], "--what", "cam", "--threshold", "43").returncode == 2
    assert call("eval.py", *flags[:-2]).returncode == 2                          # --pred is missing: argparse says so


# ---------------------------------------------------------------- a network

def put_network(out, classes=CLASSES, sharp=30.0):
    """A random deeplab_toy as seg.pt, sharpened so that its predictions differ from place to place."""
    torch.manual_seed(0)
    model = segmenter.build_segmenter("deeplab_toy", len(classes))
    for branch in model.aspp:
        branch.weight.data *= sharp
    out.mkdir(exist_ok=True)
    checkpoints.save(out / "seg.pt", model=model.state_dict(), stage="seg", classes=list(classes), args={"model": "deeplab_toy", "init": "none", "label_dir": "x"})
    return model.eval()


def test_network_is_scored_on_its_mean_probability(voc, tmp_path):
    """Two scales and flips, written out; --save keeps palette predictions, and a second call takes them."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    model = put_network(out)
    flags = ("--data", voc, "--out", out, "--split", "train", "--what", "seg", "--scales", "1", "0.75", "--no-crf", "--device", "cpu", "--amp", "off", "--workers", "0")
    done = call("eval.py", *flags, "--save", "--batch-size", "2")
    assert done.returncode == 0, done.stderr

    @torch.no_grad()
    def predict(id):
        x, total = folder.image(id)[None], 0
        for scale in (1, 0.75):
            size = [round(n * scale) for n in x.shape[-2:]]
            scaled = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
            for flip in (False, True):
                p = model(scaled.flip(-1) if flip else scaled).softmax(1)
                p = torch.nn.functional.interpolate(p, x.shape[-2:], mode="bilinear", align_corners=False)
                total = total + (p.flip(-1) if flip else p)
        return total[0].argmax(0).numpy()

    found = scores(out, "seg")
    saved = {path.stem: masks.load_mask(path) for path in (out / "pred/train").glob("*.png")}
    assert len(saved) == 5 and all(np.array_equal(saved[id], predict(id)) for id in LABELS) and len(np.unique(np.concatenate([m.ravel() for m in saved.values()]))) > 2
    assert list(found["iou"].values()) == pytest.approx(loop(folder, folder.ids("train"), predict).tolist())
    assert found["protocol"]["scales"] == [1, 0.75] and found["protocol"]["flip"] and found["protocol"]["crf"] is None and found["protocol"]["made_by"]["model"] == "deeplab_toy"
    kept = (out / "pred/train/a_1.png").stat().st_mtime_ns
    masks.save_mask(out / "pred/train/a_2.png", folder.truth("a_2"))
    call("eval.py", *flags, "--save")
    assert (out / "pred/train/a_1.png").stat().st_mtime_ns == kept and scores(out, "seg")["miou"] != found["miou"]
    refused(call("eval.py", *flags, "--save", "--no-flip"), "pred/train was made with --flip True (now False)")
    put_network(out, sharp=29.0)
    refused(call("eval.py", *flags, "--save"), "made from another network file")


def test_network_with_crf_in_any_number_of_processes(voc, tmp_path):
    folder, out = folders.Folder(voc), tmp_path / "out"
    model = put_network(out)
    flags = ("--data", voc, "--out", out, "--split", "train", "--what", "seg", "--scales", "1", "--no-flip", "--device", "cpu", "--amp", "off")
    call("eval.py", *flags, "--workers", "0")
    one = scores(out, "seg")
    want = {}
    for id in LABELS:
        with torch.no_grad():
            p = model(folder.image(id)[None]).softmax(1)[0]
        want[id] = crf.dense_crf(np.array(image_files.load_image(folder.image_path(id))), p, "deeplab").argmax(0)
    assert list(one["iou"].values()) == pytest.approx(loop(folder, folder.ids("train"), want.get).tolist()) and one["protocol"]["crf"] == "deeplab"
    run("eval.py", *flags, "--workers", "1", processes=2)
    assert scores(out, "seg") == one


def test_windows_are_the_whole_picture_when_it_fits(voc, tmp_path):
    model, images = put_network(tmp_path / "out"), torch.rand(2, 3, 30, 40)
    with torch.no_grad():
        whole = segmenter.predict(model, images, [1.0], flip=False)
        model.window = (40, 20)
        assert torch.equal(segmenter.predict(model, images, [1.0], flip=False), whole)
        model.window = (24, 10)
        logits, count = torch.zeros(2, 4, 30, 40), torch.zeros(30, 40)
        for y in (0, 6):                                                        # steps of at most 10; the last window ends at the edge
            for x in (0, 10, 16):
                logits[..., y:y + 24, x:x + 24] += model(images[..., y:y + 24, x:x + 24])
                count[y:y + 24, x:x + 24] += 1
        assert torch.allclose(segmenter.predict(model, images, [1.0], flip=False), (logits / count).softmax(1), atol=1e-6)


def test_a_folder_of_photographs(voc, tmp_path):
    out, photos = tmp_path / "out", tmp_path / "mine"
    put_network(out)
    photos.mkdir()
    for n, size in enumerate([(50, 30), (30, 50)]):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8)).save(photos / f"p{n}.jpg")
    (photos / "notes.txt").write_text("no picture")
    flags = ("--out", out, "--what", "seg", "--images", photos, "--device", "cpu", "--amp", "off", "--workers", "0")
    done = call("eval.py", *flags)
    assert done.returncode == 0 and "2 predictions in" in done.stdout and "foreground" in done.stdout, done.stderr
    assert sorted(path.name for path in (out / "pred/mine").iterdir()) == ["p0.jpg", "p0.png", "p1.jpg", "p1.png", "recipe.json"]
    assert masks.load_mask(out / "pred/mine/p1.png", 3).shape == (30, 50)
    with Image.open(out / "pred/mine/p1.jpg") as overlay:
        assert overlay.size[0] == 50 and overlay.size[1] > 30                   # the legend is below
    done = call("eval.py", *flags, "--max-side", "20", "--no-resume")             # predicted small, written at the picture's size
    assert done.returncode == 0 and masks.load_mask(out / "pred/mine/p1.png", 3).shape == (30, 50)
    mask = masks.load_mask(out / "pred/mine/p1.png", 3).astype(int)
    assert np.abs(np.diff(mask, axis=1)).any(0).sum() <= 19                     # of 20 columns
    refused(call("eval.py", *flags[:5], out / "pred/mine", *flags[6:]), "is where predictions are written")
    Image.new("RGB", (9, 9)).save(photos / "p1.png")
    refused(call("eval.py", *flags), "p1.png", "p1.jpg", "rename one")
    refused(call("eval.py", *flags[:5], tmp_path / "none", *flags[6:]), "none is no folder")
    assert call("eval.py", "--out", out, "--what", "seg").returncode == 2       # --data is missing


def test_the_server_archive(tmp_path, monkeypatch):
    import eval as script
    monkeypatch.setattr(script, "VOC_TEST", 3)
    labels = {"t_1": [0], "t_2": [1], "t_3": []}
    voc, out = make_folder(tmp_path / "data", labels), tmp_path / "out"
    (voc / "classes.txt").unlink()                                              # VOC's twenty
    (voc / "ImageSets/Segmentation/test.txt").write_text("t_1\nt_2\nt_3\n")
    put_network(out, folders.VOC_CLASSES)
    flags = ("--data", voc, "--out", out, "--what", "seg", "--voc-test", "--scales", "1", "--no-crf", "--device", "cpu", "--amp", "off", "--workers", "0")
    done = call("eval.py", *flags)
    assert done.returncode == 0 and "comp6_test.tgz" in done.stdout, done.stderr
    with tarfile.open(out / "comp6_test.tgz") as tar:
        assert tar.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png" for id in labels]
        with Image.open(tar.extractfile(tar.getnames()[1])) as image:
            assert image.mode == "P" and image.size == (40, 34) and np.array_equal(np.array(image), masks.load_mask(out / "pred/test/t_2.png"))
    (out / "comp6_test.tgz").unlink()
    for wrong in (np.zeros((9, 9)), np.full((34, 40), 255)):
        masks.save_mask(out / "pred/test/t_2.png", wrong)
        refused(call("eval.py", *flags), "t_2.png is no palette mask of 40x34 without 255")
    assert not (out / "comp6_test.tgz").exists()
    monkeypatch.setattr(script, "VOC_TEST", 1456)
    refused(call("eval.py", *flags), "3 pictures in its split test", "1,456")


def test_a_prediction_of_another_size_than_the_truth_is_named(voc, tmp_path):
    """A transposed mask has as many pixels: it must not be scored."""
    put_network(tmp_path / "out")
    masks.save_mask(voc / "SegmentationClass/a_2.png", folders.Folder(voc).truth("a_2").T)
    flags = ("--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "seg", "--device", "cpu", "--no-crf", "--workers", "0", "--scales", "1")
    refused(call("eval.py", *flags), "a_2.png is 34x40, the prediction 40x34")


def test_a_network_of_other_classes_is_refused(voc, tmp_path):
    put_network(tmp_path / "out", ["cow", "boat", "train"])
    flags = ("--data", voc, "--out", tmp_path / "out", "--split", "train", "--what", "seg", "--device", "cpu")
    refused(call("eval.py", *flags), "seg.pt was trained on other classes")
    (tmp_path / "out/seg.pt").unlink()
    refused(call("eval.py", *flags), "seg.pt is missing: run train_seg.py")
