"""Time to score maps at 20 thresholds: eval.py --oracle reads every picture once, the plain way once for each threshold.

Maps of 1 to 3 classes a picture, each true object blurred with noise around it, in the files that make_cam.py writes; pictures of VOC's size and
classes. The other way is written here as plainly as it is usually done: a pass over all files for each threshold, one confusion matrix a pass.
All matrices are first compared; then the two ways take turns, and the ratio is the median over the runs.

    python bench/eval.py
    python bench/eval.py --pictures 1449 --stride 4
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import write  # noqa: E402
from maps import alternate, ratio  # noqa: E402
import eval as stage  # noqa: E402
from plumbing import folders, maps as map_files, masks, processes  # noqa: E402

SIZE, COUNT = (375, 500), 21
THRESHOLDS = torch.arange(1, 21).double() / 21


def make_inputs(root, pictures, stride=1, size=SIZE):
    """A data folder of true masks and labels, and maps in <root>/out/cam; no picture itself is needed to score."""
    rng, lines, (H, W) = np.random.default_rng(0), [], size
    for name in ("data/JPEGImages", "data/SegmentationClass", "data/ImageSets/Segmentation", "out/cam"):
        (root / name).mkdir(parents=True)
    y, x = np.mgrid[:H, :W]
    for n in range(pictures):
        classes, truth, cam = sorted(rng.choice(20, rng.integers(1, 4), replace=False)), np.zeros(size, np.uint8), []
        for k in classes:
            far = np.hypot((y / H - rng.uniform(.2, .8)) / rng.uniform(.1, .4), (x / W - rng.uniform(.2, .8)) / rng.uniform(.1, .4))     # 1 at the object's edge
            truth[far < 1.03], truth[far < 1] = masks.IGNORE, k + 1
            coarse = F.adaptive_avg_pool2d(torch.from_numpy(np.exp(-far ** 2))[None], (H // 16, W // 16)) + .2 * torch.rand(1, H // 16, W // 16)
            m = map_files.shrink_maps(map_files.resize_maps(coarse, size), stride)
            cam.append((m - m.min()) / (m.max() - m.min()))
        masks.save_mask(root / f"data/SegmentationClass/{n:05d}.png", truth)
        map_files.save_cam(root / f"out/cam/{n:05d}.npy", torch.cat(cam))
        lines.append(" ".join([f"{n:05d}", *(folders.VOC_CLASSES[k] for k in classes)]))
    (root / "data/labels.txt").write_text("\n".join(lines))
    (root / "data/ImageSets/Segmentation/train.txt").write_text("\n".join(line.split()[0] for line in lines))


def in_one_pass(root):
    """Confusion matrices (20, C, C) as eval.py makes them."""
    args = argparse.Namespace(out=root / "out", cam="cam", what="cam", background="constant", threshold=0.43, oracle=True, amp="off", seed=0,
                              device="cpu", deterministic=False)
    folder, stage.ORACLE = folders.Folder(root / "data"), THRESHOLDS
    ids = folder.ids("train")
    return stage.score_maps(args, folder, ids, folder.labels(ids), processes.Env(args))[1:, :, :COUNT]


def pass_by_pass(root):
    """The same, a pass over all files for each threshold."""
    labels = {line.split()[0]: [folders.VOC_CLASSES.index(name) for name in line.split()[1:]] for line in (root / "data/labels.txt").read_text().splitlines()}
    total = np.zeros((len(THRESHOLDS), COUNT, COUNT), np.int64)
    for matrix, threshold in zip(total, THRESHOLDS.tolist()):
        for id, classes in labels.items():
            truth = np.array(Image.open(root / f"data/SegmentationClass/{id}.png"))
            cam = torch.from_numpy(np.load(root / f"out/cam/{id}.npy").astype(np.float32))
            if cam.shape[1:] != truth.shape:
                cam = F.interpolate(cam[None], truth.shape, mode="bilinear", align_corners=False)[0]
            score, row = cam.max(0)
            mask = np.where(score.double().numpy() > threshold, np.array(sorted(classes))[row.numpy()] + 1, 0)
            scored = truth != masks.IGNORE
            matrix += np.bincount(truth[scored].astype(np.int64) * COUNT + mask[scored], minlength=COUNT ** 2).reshape(COUNT, COUNT)
    return torch.from_numpy(total)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", type=int, default=50)
    p.add_argument("--stride", type=int, default=1, help="as make_cam.py's: maps are stored at 1/STRIDE of the size")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    return p.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, args.pictures, args.stride)
        assert torch.equal(in_one_pass(root), pass_by_pass(root))
        took = alternate({"a pass a threshold": lambda: pass_by_pass(root), "one pass": lambda: in_one_pass(root)}, args.runs)
    work = f"{args.pictures} pictures of {SIZE[0]}x{SIZE[1]}, maps at 1/{args.stride}, {len(THRESHOLDS)} thresholds"
    lines = [f"{work}; {torch.get_num_threads()} CPU threads, torch {torch.__version__}; median of {args.runs} runs.", "", "| | ms a picture | ratio |", "|---|---|---|"]
    for name, seconds in took.items():
        lines.append(f"| {name} | {1000 * statistics.median(seconds) / args.pictures:.1f} | {ratio(took['a pass a threshold'], seconds):.1f} |")
    text = "\n".join(lines)
    print(text)
    if args.write:
        write("bench/eval.py", text)


if __name__ == "__main__":
    main()
