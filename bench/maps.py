"""Time of localisation maps at the real shapes: CLIP's GradCAM against autograd for each class, S's maps in batches against one picture at a time.

Random weights and pictures. Each other way is written here as plainly as it is usually done, its maps are first compared with ours; then the ways
take turns, and a ratio is the median over the runs.

CLIP (ViT-B/16), one picture, maps of P classes refined by attention; here: gradcam.last_inputs and class_maps.
    network    the whole network forward, and back through all of its weights, once for each class
    block      the network once forward; for each class the last block forward and back
    forward    no other way: the blocks before the last alone, which every way runs at least once
Both other ways make CLIP-ES's affinity for each class, with the product of two N x N matrices.

S (DeiT-S, 20 classes), scales 1 and 1.2 and flips, two classes a picture; here: make_cam.maps_of.
    one by one    one picture, one scale, one flip at a time; the maps of all classes resized to the picture

    python bench/maps.py
    python bench/maps.py --device cuda --pictures 16 --runs 10
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clip.model import CLIP

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import write  # noqa: E402
from make_cam import maps_of  # noqa: E402
from wsss import clip_model, generator, gradcam  # noqa: E402

CLASSES, BACKGROUNDS, SCALE, BOX = 20, 25, 100, 0.4


def alternate(ways, runs, device="cpu"):
    """{name: function} -> {name: seconds of each run}; all take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(runs):
        for name, function in ways.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def ratio(other, ours):
    """Median over the runs, of each with its neighbour in time."""
    return statistics.median(a / b for a, b in zip(other, ours))


# ---------------------------------------------------------------- CLIP's GradCAM

def random_clip(**sizes):
    """ViT-B/16 with random weights, and a text tower that is as good as none."""
    torch.manual_seed(0)
    shape = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16)
    model = CLIP(**{**shape, **sizes}, context_length=8, vocab_size=9, transformer_width=64, transformer_heads=1, transformer_layers=1)
    for block in model.visual.transformer.resblocks:
        block.attn.in_proj_weight.data *= 3                                           # sharp attention: an even one makes even maps, whose min-max is all rounding
    return clip_model.FrozenClip(model)


def run_block(block, x, u):
    """One block by OpenAI's modules, x and u = ln_1(x) (1 + N, 1, width) -> what it puts out, its attention (1, 1 + N, 1 + N)"""
    o, attention = block.attn(u, u, u, need_weights=True)
    x = x + o
    return x + block.mlp(block.ln_2(x)), attention


def run_tower(clip, image, grid):
    """Image (1, 3, H, W) of whole patches -> what enters the last block (1 + N, 1, width), the attention of all blocks before."""
    visual = clip.model.visual
    x = visual.conv1((image - clip.mean) / clip.std).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(1, 1, -1), x], 1) + gradcam.positions(visual, *grid)
    x, attention = visual.ln_pre(x).transpose(0, 1), []
    for block in visual.transformer.resblocks[:-1]:
        x, A = run_block(block, x, block.ln_1(x))
        attention.append(A)
    return x, attention


def by_autograd(clip, image, columns, k, whole):
    """Maps (P, h, w) of the classes k (P,), one after the other. whole: everything anew for each of them, and back through the whole network."""
    visual = clip.model.visual
    grid, last = [n // visual.conv1.kernel_size[0] for n in image.shape[-2:]], visual.transformer.resblocks[-1]
    competing = torch.cat([columns[k], columns[CLASSES:]])                            # the present classes, then the backgrounds
    visual.requires_grad_(whole)
    maps = []
    for c in range(len(k)):
        if whole or c == 0:
            with torch.set_grad_enabled(whole):
                x, attention = run_tower(clip, image, grid)
        u = last.ln_1(x)
        u = u if whole else u.requires_grad_()
        u.retain_grad()
        z, A = run_block(last, x, u)
        e = F.normalize((visual.ln_post(z[1:, 0]) @ visual.proj).mean(0), dim=-1)     # (D,)
        (SCALE * competing @ e).softmax(0)[c].backward()
        with torch.no_grad():
            cam = (u[1:, 0] @ u.grad[1:, 0].mean(0)).relu().view(1, *grid)            # (1, h, w)
            maps.append(refine(gradcam.min_max(cam), torch.stack([*attention, A])[-8:, 0, 1:, 1:].mean(0)))
        visual.zero_grad()
    visual.requires_grad_(False)
    return torch.cat(maps)


def refine(cam, attention):
    """CLIP-ES's affinity for one map (1, h, w), by the product of two N x N matrices."""
    T = gradcam.affinity(attention[None])[0]
    box = gradcam.boxes(cam > BOX * cam.amax())
    return gradcam.min_max((T @ T @ (cam * box).flatten()).view_as(cam))


def here(clip, image, columns, k):
    return gradcam.class_maps(clip, *gradcam.last_inputs(clip, image), columns, CLASSES, 0 * k, k, SCALE, BOX)


def clip_rows(args):
    clip = random_clip().to(args.device)
    image = torch.rand(1, 3, *args.size, device=args.device)
    columns = F.normalize(torch.randn(CLASSES + BACKGROUNDS, 512, device=args.device), dim=-1)
    rows = ["| classes | network, s | block, s | here, s | network / here | block / here | here / forward |", "|---|---|---|---|---|---|---|"]
    for P in args.classes:
        k = torch.arange(P, device=args.device)
        ways = {"network": lambda: by_autograd(clip, image, columns, k, whole=True), "block": lambda: by_autograd(clip, image, columns, k, whole=False),
                "here": lambda: here(clip, image, columns, k), "forward": lambda: gradcam.block_outputs(clip, image)}
        ours = ways["here"]()
        for name in ("network", "block"):
            torch.testing.assert_close(ours, ways[name](), atol=1e-3, rtol=0)
        took = alternate(ways, args.runs, args.device)
        seconds = [f"{statistics.median(took[name]):.3g}" for name in ("network", "block", "here")]
        ratios = [f"{ratio(took[a], took[b]):.2f}" for a, b in (("network", "here"), ("block", "here"), ("here", "forward"))]
        rows.append(f"| {' | '.join([str(P), *seconds, *ratios])} |")
    return rows


# ---------------------------------------------------------------- the maps of S

def one_by_one(S, images, k, scales, flip):
    """Maps (B, P, H, W) of the classes k (B, P)."""
    size, found = images.shape[-2:], []
    for image, present in zip(images, k):
        total = 0
        for scale in scales:
            scaled = F.interpolate(image[None], [round(n * scale) for n in size], mode="bilinear", align_corners=False)
            for mirrored in [False, True][:1 + flip]:
                maps = F.interpolate(S.maps(scaled.flip(-1) if mirrored else scaled), size, mode="bilinear", align_corners=False)[0]      # (C, H, W)
                total = total + (maps.flip(-1) if mirrored else maps)
        total = total[present]
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        found.append((total - low) / (high - low + 1e-8))
    return torch.stack(found)


def in_batches(S, images, k, scales, flip, batch):
    """The same by make_cam.py's own function."""
    maps, args, found = lambda images, b, k, ids: S.maps(images)[b, k], argparse.Namespace(scales=scales, flip=flip), []
    for part, present in zip(images.split(batch), k.split(batch)):
        b = torch.arange(len(part), device=k.device).repeat_interleave(k.shape[1])
        found.append(maps_of(maps, part, b, present.flatten(), None, args).unflatten(0, present.shape))
    return torch.cat(found)


@torch.no_grad()
def generator_rows(args):
    torch.manual_seed(0)
    S = generator.build_generator("deit_small", CLASSES).to(args.device).eval()
    images = torch.rand(args.pictures, 3, *args.picture_size, device=args.device)
    shared = S, images, torch.arange(2 * args.pictures, device=args.device).view(-1, 2) % CLASSES, [1.0, 1.2], True
    ways = {"one by one": lambda: one_by_one(*shared)} | {f"here, {n} a batch": lambda n=n: in_batches(*shared, n) for n in sorted({1, args.pictures})}
    want = ways["one by one"]()
    for name in list(ways)[1:]:
        torch.testing.assert_close(ways[name](), want, atol=1e-3, rtol=0)
    took = alternate(ways, args.runs, args.device)
    return ["| maps of S | s a picture | one by one / here |", "|---|---|---|",
            *(f"| {name} | {statistics.median(times) / args.pictures:.3g} | {ratio(took['one by one'], times):.2f} |" for name, times in took.items())]


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--size", type=int, nargs=2, default=[384, 512], help="height and width of the picture that CLIP sees; multiples of 16")
    p.add_argument("--classes", type=int, nargs="+", default=[1, 2, 3, 6], help="numbers of classes in the picture")
    p.add_argument("--picture-size", type=int, nargs=2, default=[375, 500], help="height and width of the pictures that S sees")
    p.add_argument("--pictures", type=int, default=4, help="pictures in a batch of S")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--write", action="store_true", help="put the tables between their marks in docs/results.md")
    return p.parse_args()


def main():
    args = parse()
    where = torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    sizes = f"CLIP at {args.size[0]}x{args.size[1]}, S at {args.picture_size[0]}x{args.picture_size[1]}"
    text = "\n".join([f"{where}, torch {torch.__version__}; {sizes}; median of {args.runs} runs.", "", *clip_rows(args), "", *generator_rows(args)])
    print(text)
    if args.write:
        write("bench/maps.py", text)


if __name__ == "__main__":
    main()
