"""Segments: files in every layout give the same masks, bad ones are refused; superpixels are partitions;
SAM's masks are those of one point at a time."""
import itertools
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, call, refused
from PIL import Image
from torchvision.ops import nms

from hosts import make_segments
from plumbing import files, folders, processes
from plumbing.segments import load_levels, load_segments, save_segments, segment, segments_path

H, W = 26, 34


def blobs(n):
    """n overlapping boolean masks (n, H, W), some with holes, some tiny, one of the whole image."""
    rng, found = np.random.default_rng(0), np.zeros((n, H, W), bool)
    for mask in found:
        (y, x), (h, w) = rng.integers(0, (H - 3, W - 3)), rng.integers(2, 14, 2)
        mask[y:y + h, x:x + w] = rng.random(mask[y:y + h, x:x + w].shape) < 0.8
        mask[y, x] = True
    found[-1] = True
    return found


def whole(segment, size=(H, W)):
    mask = np.zeros(size, bool)
    mask[segment.where] = segment.mask
    return mask


def same_masks(segments, masks):
    return all(np.array_equal(whole(s), mask) for s, mask in zip(segments, masks, strict=True))


# ---------------------------------------------------------------- our file

def test_the_file_gives_back_what_was_written(tmp_path):
    masks, path = blobs(9), tmp_path / "a.npz"
    for found in ([], [segment(mask, n % 3, n / 8, n / 16) for n, mask in enumerate(masks)]):
        save_segments(path, (H, W), found)
        back = load_segments(segments_path(tmp_path, "a"), (H, W))
        assert same_masks(back, masks[:len(found)])
        assert [s._replace(bits=None) for s in back] == [s._replace(bits=None) for s in found]
        assert load_levels(path).tolist() == [s.level for s in found]
    for mask, (top, left, bottom, right) in zip(masks, (s.box for s in back)):
        y, x = mask.nonzero()                                               # as tight as can be
        assert (top, left, bottom, right) == (y.min(), x.min(), y.max() + 1, x.max() + 1)


@pytest.mark.parametrize("other,word", [
    ({"bits": np.array([{}], dtype=object)}, "allow_pickle"), ({"level": None}, "level"),
    ({"size": np.array([9, 9], np.int32)}, "9x9"), ({"level": np.full(3, 3, np.uint8)}, "level"),
    ({"level": np.zeros(2, np.uint8)}, "shorter"), ({"bits": np.zeros(5, np.uint8)}, "boxes"),
    ({"boxes": np.array([[-1, 0, 1, 4]] * 3, np.int32), "bits": np.zeros(3, np.uint8)}, "boxes"), (None, "")])
def test_files_that_do_not_fit_are_refused(tmp_path, other, word):
    path = tmp_path / "a.npz"
    save_segments(path, (H, W), [segment(mask) for mask in blobs(3)])
    if other:
        with np.load(path) as file:
            content = {**file, **other}
        np.savez(path, **{name: value for name, value in content.items() if value is not None})
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"a.npz holds no segments.*{word}"):
        load_segments(path, (H, W))


# ---------------------------------------------------------------- other projects' layouts

def run_lengths(mask):
    """Down the columns, first the pixels outside."""
    counts = [len(list(run)) for _, run in itertools.groupby(mask.T.ravel())]
    return {"size": list(mask.shape), "counts": counts if not mask[0, 0] else [0, *counts]}


class SamAnns(list):
    """FMA-WSSS pickles a list and an empty dict of its own classes, which are not there later."""


class ADict(dict):
    pass


def test_pickles_of_fma_and_of_sam(tmp_path):
    found = blobs(6)
    anns = SamAnns({"segmentation": run_lengths(mask), "level": n % 3, "predicted_iou": 0.5,
                    "stability_score": 0.25} for n, mask in enumerate(found))
    anns.data, content = ADict(), pickle.dumps(anns, protocol=2)
    theirs = {"SamAnns": "libs.sam.custom_sam.sam_auto", "ADict": "alchemy_cat.py_tools.adict"}
    for name, module in theirs.items():
        content = content.replace(f"c{__name__}\n{name}".encode(), f"c{module}\n{name}".encode())
    (tmp_path / "a.pkl").write_bytes(content)
    back = load_segments(segments_path(tmp_path, "a"), (H, W))
    assert same_masks(back, found) and [s.level for s in back] == [0, 1, 2, 0, 1, 2]
    assert back[0].score == 0.5 and back[0].stability == 0.25
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([{"segmentation": mask} for mask in found]))
    assert same_masks(load_segments(segments_path(tmp_path, "b"), (H, W)), found)


def test_folders_of_masks_and_label_maps(tmp_path):
    found = blobs(6)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metadata.csv").write_text("id,area\n")
    for n, mask in enumerate([*found, np.zeros((H, W), bool)]):                # an empty one is no segment
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "a" / f"{n}.png")
    assert same_masks(load_segments(segments_path(tmp_path, "a"), (H, W)), found)
    labels = np.arange(H * W).reshape(H, W) // 300 * 1000
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "b.png")
    back = load_segments(segments_path(tmp_path, "b"), (H, W))
    assert same_masks(back, [labels == value for value in (0, 1000, 2000)])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


@pytest.mark.parametrize("content,word", [
    (5, "no list but int"), ([{"segmentation": np.ones((H, W + 1), bool)}], f"{W + 1}x{H}"),
    ([{"segmentation": {"size": [H, W], "counts": [5, 5]}}], "do not fill"),
    ([{"segmentation": {"size": [H, W], "counts": "Ud0j0"}}], "coco_rle.*uncompressed_rle"),
    ([{"segmentation": np.ones((H, W), bool), "level": 3}], "level"), ([{"segmentation": Evil()}], "mkdir")])
def test_bad_pickles_are_refused_and_run_no_code(tmp_path, monkeypatch, content, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"a.pkl holds no segments.*{word}"):
        load_segments(segments_path(tmp_path, "a"), (H, W))
    assert not (tmp_path / "bombed").exists()


def test_bad_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(tmp_path / "a" / "grey.png")
    Image.new("RGB", (W, H)).save(tmp_path / "b.png")
    Image.new("L", (W, H + 1)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"\x89PNG torn")
    for id, word in {"a": "is not black and white", "b": "RGB", "c": f"{W}x{H + 1}", "d": ""}.items():
        with pytest.raises(ValueError, match=f"{id}(.png)? holds no segments of its image.*{word}"):
            load_segments(segments_path(tmp_path, id), (H, W))


# ---------------------------------------------------------------- superpixels

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


def segments(voc, out, *more):
    return call("hosts.make_segments", "--data", voc, "--out", out, *SHARED, *more)


def test_superpixels_are_partitions_and_a_run_goes_on(voc, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    flags = ["--source", "felzenszwalb", "--scales", "5", "40", "--min-area", "8"]
    folder, out, total = folders.Folder(voc), tmp_path / "out", 0
    assert segments(voc, out, *flags, "--limit", "2").returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in (out / "segments").glob("*.npz")}
    assert segments(voc, out, *flags).returncode == 0
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for id in LABELS:
        size = folder.image(id).shape[1:]
        found = load_segments(segments_path(out / "segments", id), size)
        total += len(found)
        assert (sum(whole(s, size).astype(int) for s in found) == 2).all()    # each pixel once in each scale
    note = files.read_json(out / "segments.json")
    assert note["segments"] == total and note["levels"] == [total, 0, 0] and note["images"] == 5
    refused(segments(voc, out, *flags, "--scales", "5"), "was made with --scales")
    assert segments(voc, out, "--source", "slic", "--scales", "9", "--segments", "slic").returncode == 0
    assert len(list((out / "slic").glob("*.npz"))) == 5
    for module, package, source in (("skimage", "scikit-image", "slic"), ("transformers", "scipy", "sam")):
        monkeypatch.setitem(sys.modules, module, None)
        refused(segments(voc, tmp_path / "new", "--source", source), "pip install", package)


# ---------------------------------------------------------------- SAM

def box(mask):
    y, x = mask.nonzero()
    return y.min(), x.min(), y.max(), x.max()


def best_of(found, scores, least):
    """Of [(mask, ...)] those that stay, best first: boxes overlap by `least` at most."""
    boxes = torch.tensor([box(f[0]) for f in found]).float().reshape(-1, 4)
    return [found[i] for i in nms(boxes, torch.tensor(scores), least)]


def components(of):
    """Index arrays of the connected parts of a whole image's mask, diagonals too."""
    labels, count = pytest.importorskip("scipy.ndimage").label(of, np.ones((3, 3)))
    return [np.nonzero(labels == n + 1) for n in range(count)]


def naive_clean(mask, area):
    mask = mask.copy()
    for hole in components(~mask):
        mask[hole] |= len(hole[0]) < area
    islands = components(mask)
    most = max(len(island[0]) for island in islands)
    for island in islands:
        mask[island] = len(island[0]) >= min(area, most)
    return mask


def rectangle(bottom, right):
    mask = np.zeros((60, 90), bool)
    mask[2:bottom, 2:right] = True
    return mask


def test_only_a_higher_level_hides_and_wholes_and_what_was_clean_are_preferred(monkeypatch):
    part, same, third = rectangle(12, 12), rectangle(12, 11), rectangle(12, 5)        # 100, 90, 30 pixels
    for levels, share, want in (([1, 1, 1], 0.1, [1, 1, 1]), ([0, 0, 2], 0.3, [2]), ([0, 0, 2], 0.31, [2, 0]),
                                ([0, 1, 2], 0.31, [2, 0])):   # what is hidden itself hides nothing
        found = [segment(mask, level) for mask, level in zip((part, same, third), levels)]
        assert [s.level for s in make_segments.uncovered(found, share)] == want

    def left(*found, **flags):
        usual = dict(crop_layers=0, points=1, nms=0.7, min_area=0, whole_first=True, covered=0)
        segmenter.args = SimpleNamespace(**{**usual, **flags})
        monkeypatch.setattr(make_segments.Sam, "in_crop", lambda *_: list(found))
        return [s.score for s in segmenter(np.zeros((60, 90, 3), np.uint8))]

    segmenter, spotted = object.__new__(make_segments.Sam), rectangle(30, 29)
    spotted[50, 80] = True                                    # without its spot its box is almost the other's
    part, same = (segment(rectangle(30, 30), *facts) for facts in ((0, 0.75), (2, 0.5)))
    dirty = segment(spotted, 1, 0.875)
    assert left(part, same) == [0.5] and left(part, same, whole_first=False) == [0.75]
    assert left(dirty, part) == [0.875, 0.75] and left(dirty, part, min_area=20) == [0.75]
    assert left(part, min_area=3000) == [0.75]                # alone it stays, though it is small


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A random SAM of the real classes, in a few channels; its masks are crisp."""
    transformers, path = pytest.importorskip("transformers"), tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2,
                  patch_size=8, image_size=64, window_size=4, global_attn_indexes=[0], num_pos_feats=8,
                  mlp_dim=32)
    decoder = {**{name: vision[name] for name in ("hidden_size", "num_attention_heads", "mlp_dim")},
               "num_hidden_layers": 2, "iou_head_hidden_dim": 16}
    prompts = dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    model = transformers.SamModel(transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    for mlp in model.mask_decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.data *= 100
    model.save_pretrained(path)
    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(images).save_pretrained(path)
    return path


SAM = ["--points", "4", "--pred-iou", "-0.5", "--stability", "0.5", "--min-area", "6", "--nms", "0.9",
       "--amp", "off", "--sam"]


def near(model, sigmas):
    """Makes the masks end at some distance from their point, so that there are boxes of many sizes."""
    def hook(module, args, kwargs, out):
        n = out.pred_masks.shape[-1]
        ticks = (torch.arange(n) + 0.5) * 64 / n
        x, y = kwargs["input_points"][0, :, 0].T[:, :, None, None]
        far = (ticks - x) ** 2 + (ticks[:, None] - y) ** 2                            # (points, n, n)
        out.iou_scores = out.iou_scores - torch.tensor([0, 0, 0.6])   # wholes are no longer the best anyway
        out.pred_masks = 0.3 * out.pred_masks + 8 - far[:, None] / torch.tensor(sigmas)[:, None, None] ** 2
        return out
    model.register_forward_hook(hook, with_kwargs=True)


def one_point_at_a_time(sam, image, args):
    """Full-size masks, the whole model for each single point, the processor's own way back to the image."""
    def masks_of(crop, n):
        top, left, bottom, right = crop
        for i, j, level in itertools.product(range(n), range(n), range(3)):
            point = [(j + 0.5) / n * (right - left), (i + 0.5) / n * (bottom - top)]
            inputs = sam.processor(image[top:bottom, left:right], input_points=[[point]], return_tensors="pt")
            with torch.no_grad():
                out = sam.model(pixel_values=inputs["pixel_values"],
                                input_points=inputs["input_points"].float(), multimask_output=True)
            logits = sam.processor.post_process_masks(
                out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False,
                pad_size={"height": 64, "width": 64})[0][0, level].numpy()
            score = out.iou_scores[0, 0, level].item()
            stability = (logits > 1).sum() / (logits > -1).sum()
            mask = np.zeros(size, bool)
            mask[top:bottom, left:right] = logits > 0
            if score + args.whole_bonus * (level == 2) > args.pred_iou and stability >= args.stability:
                ends = zip(box(mask), crop, (0, 0, *size)) if mask.any() else [(0, 0, 99)]
                if not any(abs(end - edge) <= 20 and abs(end - last) > 20 for end, edge, last in ends):
                    yield mask, level, score, stability, (bottom - top) * (right - left)

    size, kept = image.shape[:2], []
    crops = [((0, 0, 60, 90), 4)]                             # crops overlap by 20 of 60: 512 / 1500
    crops += [((top, left, top + 40, left + 55), 2) for left in (0, 35) for top in (0, 20)]
    for crop, n in crops:
        found = list(masks_of(crop, n))
        kept += best_of(found, [f[2] + (f[1] == 2) * args.whole_first for f in found], args.nms)
    found = []
    for mask, *facts in best_of(kept, [1 / f[4] for f in kept], args.nms):
        clean = naive_clean(mask, args.min_area)
        found.append((clean, *facts[:3], float((clean == mask).all())))
    found = [f[:4] for f in best_of(found, [f[4] for f in found], args.nms)]
    stay = []
    for level in (2, 1, 0):
        higher = list(stay)
        stay += [f for f in found if f[1] == level and all(
            (f[0] & other[0]).sum() / f[0].sum() < args.covered for other in higher)]
    return stay


@pytest.mark.parametrize("flags", [
    ["--nms", "0.7"], ["--nms", "0.45", "--pred-iou", "-0.4", "--whole-bonus", "0.3", "--min-area", "30"]])
def test_sams_masks_are_those_of_one_point_at_a_time(sam, tmp_path, monkeypatch, flags):
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(noise).resize((90, 60), Image.BICUBIC))
    monkeypatch.setattr(sys, "argv", ["", "--data", "x", "--out", str(tmp_path), "--device", "cpu", *SAM,
                                      str(sam), "--covered", "0.8", *flags, "--points-per-batch", "5"])
    args = make_segments.parse()
    segmenter = make_segments.Sam(args, processes.Run(args))
    near(segmenter.model, [3.0, 5.0, 7.0])
    monkeypatch.setattr(make_segments, "AT_ONCE", 3 * 64 * 64)        # three masks at full size at a time
    want, found = one_point_at_a_time(segmenter, image, args), segmenter(image)
    got = sorted((s.level, whole(s, (60, 90)).tobytes(), s.score, s.stability) for s in found)
    want = sorted((level, mask.tobytes(), *scores) for mask, level, *scores in want)
    assert len(want) > 8 and len({w[0] for w in want}) > 1
    assert [g[:2] for g in got] == [w[:2] for w in want]
    assert np.allclose([g[2:] for g in got], [w[2:] for w in want], atol=1e-5)


def test_the_command_with_sam(sam, voc, tmp_path):
    from transformers import SamModel
    out, other, new = tmp_path / "out", tmp_path / "other", tmp_path / "new"
    assert segments(voc, out, *SAM, sam, "--limit", "2").returncode == 0
    assert segments(voc, out, *SAM, sam, "--points-per-batch", "3").returncode == 0   # goes on
    note = files.read_json(out / "segments.json")
    assert note["segments"] == sum(note["levels"]) >= 5
    assert note["weights"] == files.fingerprint(sam / "model.safetensors")
    model = SamModel.from_pretrained(sam)
    shutil.copytree(sam, other)
    model.save_pretrained(other, state_dict={name: value + 1 for name, value in model.state_dict().items()})
    refused(segments(voc, out, *SAM, other), "was made with other weights")
    refused(segments(voc, new, *SAM, voc), "cannot be loaded", "sam-vit-huge")
    kept = {name: value for name, value in model.state_dict().items() if "iou_token" not in name}
    model.save_pretrained(other, state_dict=kept)
    refused(segments(voc, new, *SAM, other), "is not a whole SAM", "iou_token")
