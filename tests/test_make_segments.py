"""hosts/make_segments.py: superpixels are partitions, SAM's masks are those of one point at a time."""
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, call, refused
from PIL import Image
from test_segments import H, W, packed, whole

from hosts import make_segments
from plumbing import files, folders, processes
from plumbing.segments import load_segments, segment, segments_path

SHARED = ["--split", "train", "--device", "cpu", "--workers", "0"]


def segments(voc, out, *more):
    return call("hosts.make_segments", "--data", voc, "--out", out, *SHARED, *more)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npz"))}


def test_superpixels_are_partitions_and_a_run_goes_on(voc, tmp_path):
    pytest.importorskip("skimage")
    flags = ["--source", "felzenszwalb", "--scales", "5", "40", "--min-area", "8"]
    folder, out = folders.Folder(voc), tmp_path / "out"
    assert segments(voc, out, *flags, "--limit", "2").returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in (out / "segments").glob("*.npz")}
    assert segments(voc, out, *flags).returncode == 0
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    total = 0
    for id in LABELS:
        size = folder.image(id).shape[1:]
        found = load_segments(segments_path(out / "segments", id), size)
        total += len(found)
        assert (sum(whole(s, size).astype(int) for s in found) == 2).all()    # each pixel once in each scale
    note = files.read_json(out / "segments.json")
    assert note["segments"] == total and note["levels"] == [total, 0, 0] and note["images"] == 5
    refused(segments(voc, out, *flags, "--scales", "5"), "was made with --scales")
    before = bytes_of(out / "segments")
    assert segments(voc, out, *flags, "--scales", "5", "--no-resume").returncode == 0
    assert bytes_of(out / "segments") != before
    assert segments(voc, out, "--source", "slic", "--scales", "9", "--segments", "slic").returncode == 0
    assert len(bytes_of(out / "slic")) == 5


@pytest.mark.parametrize("module,package,source", [
    ("skimage", "scikit-image", "slic"), ("transformers", "transformers scipy", "sam")])
def test_a_missing_library_is_one_line(voc, tmp_path, monkeypatch, module, package, source):
    monkeypatch.setitem(sys.modules, module, None)
    refused(segments(voc, tmp_path / "out", "--source", source), f"pip install {package}")


@pytest.mark.parametrize("flags", [["--stability", "92"], ["--pred-iou", "nan"], ["--nms", "-1"]])
def test_shares_above_1_are_refused(voc, tmp_path, flags):
    done = segments(voc, tmp_path / "out", *flags)
    assert done.returncode == 2 and flags[0] in done.stderr and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- SAM: the parts

def test_crops_cover_the_image():
    for size, layers in itertools.product(((1, 1), (2, 300), (3, 5), (60, 90), (375, 500)), (0, 2)):
        found = list(make_segments.crops(size, layers))
        assert found[0] == (0, (0, 0, *size))
        for layer in range(layers + 1):
            mine, seen = [crop for n, crop in found if n == layer], np.zeros(size, bool)
            for top, left, bottom, right in mine:
                assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
                seen[top:bottom, left:right] = True
            assert seen.all() and (min(size) < 9 or len(mine) == 4 ** layer)


def test_only_a_higher_level_hides_a_segment():
    part, same, third = np.zeros((3, H, W), bool)
    part[2:12, 2:12] = True                                   # 100 pixels
    same[2:12, 2:11] = True                                   # 90 of them
    third[2:12, 2:5] = True                                   # 30 of them

    def left(levels, share):
        return [s.level for s in make_segments.uncovered(packed([part, same, third], levels), share)]

    assert left([1, 1, 1], 0.1) == [1, 1, 1]
    assert [left([0, 0, 2], share) for share in (0.3, 0.31, 0.35)] == [[2], [2, 0], [2, 0, 0]]
    assert left([0, 1, 2], 0.31) == [2, 0]                    # what is hidden itself hides nothing


def box(mask):
    y, x = mask.nonzero()
    return y.min(), x.min(), y.max(), x.max()


def naive_nms(boxes, scores, least):
    def iou(a, b):
        sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= least for j in kept):
            kept.append(i)
    return kept


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


def test_small_islands_and_holes_go_exactly():
    rng = np.random.default_rng(1)
    for n in range(12):
        mask = rng.random((H, W)) < (0.4, 0.6)[n % 2]
        if n > 5:                                     # a strip beside the box: small, or large beyond the box
            mask[:] = False
            mask[1 + n % 3:, 2:W - n % 4] = True
            mask[8:11, 2:5] = False
        got = make_segments.clean(segment(mask, 2, 0.5, 0.25), 12, (H, W))
        assert np.array_equal(whole(got), naive_clean(mask, 12))
        assert (got.level, got.score, got.stability) == (2, 0.5, 0.25)
    square = segment(np.pad(np.ones((5, 5), bool), ((3, H - 8), (3, W - 8))))
    lower = np.repeat([False, True], [3, H - 3])[:, None].repeat(8, 1)    # 24 pixels beyond its box
    assert make_segments.clean(square, 30, (H, W)) is square              # alone it stays, though it is small
    for mask in (lower, lower.T, lower[::-1], lower.T[:, ::-1]):
        assert np.array_equal(whole(make_segments.clean(segment(mask), 12, mask.shape), mask.shape), mask)


# ---------------------------------------------------------------- SAM: the whole

@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A random SAM of the real classes, in a few channels; its masks are crisp."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    model = transformers.SamModel(transformers.SamConfig(
        vision_config=dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=64, patch_size=8, window_size=4, global_attn_indexes=[0],
                           num_pos_feats=8, mlp_dim=32),
        mask_decoder_config=dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, mlp_dim=32,
                                 iou_head_hidden_dim=16),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)))
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
        scores = [f[2] + (f[1] == 2) * args.whole_first for f in found]
        kept += [found[i] for i in naive_nms([box(f[0]) for f in found], scores, args.nms)]
    kept = [kept[i] for i in naive_nms([box(f[0]) for f in kept], [1 / f[4] for f in kept], args.nms)]
    clean = [naive_clean(f[0], args.min_area) for f in kept]
    untouched = [float((mask == f[0]).all()) for mask, f in zip(clean, kept)]
    found = [(clean[i], *kept[i][1:4]) for i in naive_nms([box(mask) for mask in clean], untouched, args.nms)]
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


def test_wholes_and_what_was_clean_are_preferred(monkeypatch):
    square, spotted = np.zeros((2, 60, 90), bool)
    square[10:30, 10:30] = True
    spotted[11:30, 10:30] = spotted[50, 80] = True            # without its spot its box is almost the other's
    segmenter = object.__new__(make_segments.Sam)

    def left(*found, **flags):
        usual = dict(crop_layers=0, points=1, nms=0.7, min_area=0, whole_first=True, covered=0)
        segmenter.args = SimpleNamespace(**{**usual, **flags})
        monkeypatch.setattr(make_segments.Sam, "in_crop", lambda *_: list(found))
        return [s.score for s in segmenter(np.zeros((60, 90, 3), np.uint8))]

    part, same, dirty = segment(square, 0, 0.75), segment(square, 2, 0.5), segment(spotted, 1, 0.875)
    assert left(part, same) == [0.5] and left(part, same, whole_first=False) == [0.75]
    assert left(dirty, part) == [0.875, 0.75] and left(dirty, part, min_area=20) == [0.75]


def test_the_command_with_sam(sam, voc, tmp_path):
    from transformers import SamModel
    out, other = tmp_path / "out", tmp_path / "other"
    assert segments(voc, out, *SAM, sam, "--limit", "2").returncode == 0
    done = segments(voc, out, *SAM, sam, "--points-per-batch", "3")                   # goes on
    assert done.returncode == 0, done.stderr
    note = json.loads((out / "segments.json").read_text())
    assert note["segments"] == sum(note["levels"]) >= 5
    assert note["weights"] == files.fingerprint(sam / "model.safetensors")
    model = SamModel.from_pretrained(sam)
    model.shared_image_embedding.positional_embedding.data += 1
    shutil.copytree(sam, other)
    model.save_pretrained(other)
    refused(segments(voc, out, *SAM, other), "was made with other weights")
    refused(segments(voc, tmp_path / "new", *SAM, voc), "cannot be loaded", "sam-vit-huge")
    model.save_pretrained(other, state_dict={name: value for name, value in model.state_dict().items()
                                             if "iou_token" not in name})
    refused(segments(voc, tmp_path / "new", *SAM, other), "is not a whole SAM", "iou_token")
