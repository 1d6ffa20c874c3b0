"""Time to score maps at 20 thresholds: eval.py --oracle reads every image once, the plain way once for each
threshold.

Maps of 1 to 3 classes an image, each true object blurred with noise around it, in the files that make_cam.py
writes; images of VOC's size and classes. The plain way is a pass over all files for each threshold, with one
confusion matrix a pass. All matrices are first compared; then the two ways take turns.

    python -m bench.eval
    python -m bench.eval --images 1449 --stride 4
"""
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import eval as stage
from bench import inputs, tables
from plumbing import flags, folders, markdown, processes
from plumbing.maps import resize_maps, save_cam, shrink_maps
from plumbing.masks import IGNORE, save_mask

COUNT = inputs.CLASSES + 1
THRESHOLDS = torch.arange(1, 21).double() / 21
ONE, MANY = "one pass", "a pass a threshold"


def make_inputs(root, images, stride, size):
    """True masks and labels in <root>/data, maps in <root>/out/cam; scoring needs no image. -> lists of
    classes"""
    rng, present = np.random.default_rng(0), []
    for name in ("data/JPEGImages", "data/SegmentationClass", "out/cam"):
        (root / name).mkdir(parents=True)
    for n in range(images):
        classes = sorted(rng.choice(inputs.CLASSES, rng.integers(1, 4), replace=False).tolist())
        truth, maps = draw(rng, classes, stride, size)
        save_mask(root / f"data/SegmentationClass/{n:05d}.png", truth)
        save_cam(root / f"out/cam/{n:05d}.npy", maps)
        present.append(classes)
    lines = [" ".join(map(str, [f"{n:05d}", *classes])) for n, classes in enumerate(present)]
    (root / "data/labels.txt").write_text("\n".join(lines))
    return present


def draw(rng, classes, stride, size):
    """An ellipse of each class with a border of 255 -> label map (H, W), maps (P, h, w)"""
    H, W = size
    y, x = np.mgrid[:H, :W]
    truth, maps = np.zeros(size, np.uint8), []
    for k in classes:
        far = np.hypot((y / H - rng.uniform(.2, .8)) / rng.uniform(.1, .4),
                       (x / W - rng.uniform(.2, .8)) / rng.uniform(.1, .4))           # 1 at the object's edge
        truth[far < 1.03] = IGNORE
        truth[far < 1] = k + 1
        coarse = F.adaptive_avg_pool2d(torch.from_numpy(np.exp(-far ** 2))[None], (H // 16, W // 16))
        noise = torch.from_numpy(rng.random((1, H // 16, W // 16)))
        cam = shrink_maps(resize_maps(coarse + 0.2 * noise, size), stride)
        maps.append((cam - cam.min()) / (cam.max() - cam.min()))
    return truth, torch.cat(maps)


def in_one_pass(root):
    """Confusion matrices (20, C, C) as eval.py makes them."""
    args = tables.arguments(stage, "--data", root / "data", "--out", root / "out", "--what", "cam",
                            "--oracle", "--device", "cpu")
    folder = folders.Folder(args.data)
    with mock.patch.object(stage, "ORACLE", THRESHOLDS):
        matrices = stage.score_maps(args, folder, folder.ids("train"), processes.Run(args))
    return matrices[1:, :, :COUNT]


def pass_by_pass(root, present):
    """The same, a pass over all files for each threshold."""
    total = np.zeros((len(THRESHOLDS), COUNT, COUNT), np.int64)
    for matrix, threshold in zip(total, THRESHOLDS.tolist()):
        for n, classes in enumerate(present):
            truth = np.array(Image.open(root / f"data/SegmentationClass/{n:05d}.png"))
            cam = torch.from_numpy(np.load(root / f"out/cam/{n:05d}.npy").astype(np.float32))
            if cam.shape[1:] != truth.shape:
                cam = F.interpolate(cam[None], truth.shape, mode="bilinear", align_corners=False)[0]
            score, row = cam.max(0)
            mask = np.where(score.double() > threshold, np.array(classes)[row] + 1, 0)
            scored = truth != IGNORE
            pairs = truth[scored].astype(np.int64) * COUNT + mask[scored]
            matrix += np.bincount(pairs, minlength=COUNT ** 2).reshape(COUNT, COUNT)
    return torch.from_numpy(total)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--images", type=flags.positive, default=50)
    p.add_argument("--size", type=flags.positive, nargs=2, default=[375, 500], help="height and width")
    p.add_argument("--stride", type=flags.positive, default=1,
                   help="as make_cam.py's: maps are stored at 1/STRIDE of the size")
    p.add_argument("--runs", type=flags.positive, default=3)
    return p.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        present = make_inputs(root, args.images, args.stride, args.size)
        ways = {MANY: lambda: pass_by_pass(root, present), ONE: lambda: in_one_pass(root)}
        assert torch.equal(ways[ONE](), ways[MANY]())
        times = tables.take_turns(ways, args.runs)
    rows = [[name, f"{1000 * statistics.median(times[name]) / args.images:.1f}",
             f"{tables.ratio(times[MANY], times[name]):.1f}"] for name in ways]
    facts = (f"{args.images} images of {args.size[0]}x{args.size[1]}, maps at 1/{args.stride}, "
             f"{len(THRESHOLDS)} thresholds; median of {args.runs} runs.")
    tables.show("bench.eval", args.write, markdown.table(["", "ms an image", "ratio"], rows), facts)


if __name__ == "__main__":
    main()
