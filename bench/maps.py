"""Time of localisation maps at the real shapes: CLIP's GradCAM against autograd for each class, and S's maps
in batches against one image at a time.

Random weights and images. Every way's maps are first compared with ours; then the ways take turns, and a
ratio is the median over --runs.

CLIP (ViT-B/16), one image, maps of P classes refined by attention; here: gradcam.last_inputs and class_maps.
    network    for each class the whole network forward, and back through all of its weights
    block      the network once forward; for each class the last block forward and back
    forward    the blocks before the last alone, which every way runs at least once
`network` and `block` make CLIP-ES's affinity for each class, with the product of two N x N matrices.

S (DeiT-S, 20 classes), scales 1 and 1.2 and flips, two classes an image; here: make_cam.make_maps.
    one by one    one image, one scale, one flip at a time; the maps of all classes resized to the image

    python -m bench.maps
    python -m bench.maps --device cuda --images 16 --runs 10
"""
import argparse
import statistics

import torch
import torch.nn.functional as F

from bench import inputs, tables
from make_cam import make_maps
from plumbing import flags, markdown
from wsss import clip_model, generator, gradcam

BACKGROUNDS, SCALE, BOX, SCALES = 25, 100, 0.4, [1.0, 1.2]
NO_TEXT = {"context_length": 8, "vocab_size": 9, "transformer_width": 64, "transformer_heads": 1,
           "transformer_layers": 1}


# ---------------------------------------------------------------- CLIP's GradCAM

def sharp_clip(**sizes):
    """A random CLIP whose attention is sharp: an even one makes even maps, whose min-max is all rounding."""
    model = inputs.random_clip(16, **NO_TEXT, **sizes)
    for block in model.visual.transformer.resblocks:
        block.attn.in_proj_weight.data *= 3
    return clip_model.FrozenClip(model)


def run_block(block, x, u):
    """x and u = ln_1(x) (1 + N, 1, width) -> the block's output, its attention (1, 1 + N, 1 + N)"""
    o, attention = block.attn(u, u, u, need_weights=True)
    x = x + o
    return x + block.mlp(block.ln_2(x)), attention


def run_tower(clip, image, grid):
    """Image (1, 3, H, W) of whole patches -> the last block's input (1 + N, 1, width), the attention of all
    blocks before it"""
    visual, attention = clip.model.visual, []
    x = visual.conv1((image - clip.mean) / clip.std).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(1, 1, -1), x], 1) + gradcam.positions(visual, *grid)
    x = visual.ln_pre(x).transpose(0, 1)
    for block in visual.transformer.resblocks[:-1]:
        x, A = run_block(block, x, block.ln_1(x))
        attention.append(A)
    return x, attention


def by_autograd(clip, image, columns, k, network):
    """Maps (P, h, w) of the classes k (P,), one after the other.

    network: the whole network for each class, forward and back through all weights; else the last block."""
    visual, maps = clip.model.visual, []
    last = visual.transformer.resblocks[-1]
    grid = [n // visual.conv1.kernel_size[0] for n in image.shape[-2:]]
    competing = torch.cat([columns[k], columns[inputs.CLASSES:]])     # the present classes, the backgrounds
    visual.requires_grad_(network)
    for c in range(len(k)):
        if network or c == 0:
            with torch.set_grad_enabled(network):
                x, attention = run_tower(clip, image, grid)
        u = last.ln_1(x) if network else last.ln_1(x).requires_grad_()
        u.retain_grad()
        z, A = run_block(last, x, u)
        e = F.normalize((visual.ln_post(z[1:, 0]) @ visual.proj).mean(0), dim=-1)     # (D,)
        (SCALE * competing @ e).softmax(0)[c].backward()
        with torch.no_grad():
            cam = (u[1:, 0] @ u.grad[1:, 0].mean(0)).relu().view(1, *grid)            # (1, h, w)
            mean = torch.stack([*attention, A])[-8:, 0, 1:, 1:].mean(0)               # (N, N)
            maps.append(refine(gradcam.min_max(cam), mean))
        visual.zero_grad()
    visual.requires_grad_(False)
    return torch.cat(maps)


def refine(cam, attention):
    """CLIP-ES's affinity for one map (1, h, w), by the product of two N x N matrices."""
    T = gradcam.affinity(attention[None])[0]
    box = gradcam.boxes(cam > BOX * cam.amax())
    return gradcam.min_max((T @ T @ (cam * box).flatten()).view_as(cam))


def here(clip, image, columns, k):
    x, attention, grid = gradcam.last_inputs(clip, image)
    return gradcam.class_maps(clip, x, attention, grid, columns, inputs.CLASSES, 0 * k, k, SCALE, BOX)


def clip_table(args):
    clip = sharp_clip().to(args.device)
    image = torch.rand(1, 3, *args.clip_size, device=args.device)
    columns = F.normalize(torch.randn(inputs.CLASSES + BACKGROUNDS, 512, device=args.device), dim=-1)
    rows = []
    for P in args.classes:
        shared = clip, image, columns, torch.arange(P, device=args.device)
        ways = {"network": lambda shared=shared: by_autograd(*shared, network=True),
                "block": lambda shared=shared: by_autograd(*shared, network=False),
                "here": lambda shared=shared: here(*shared),
                "forward": lambda: gradcam.block_outputs(clip, image)}
        check_equal(ways, ["network", "block"], ways["here"]())
        times = tables.take_turns(ways, args.runs, args.device)
        ratios = [("network", "here"), ("block", "here"), ("here", "forward")]
        count = {name: tables.gflop(way) for name, way in ways.items()}
        rows.append([P, *(f"{count[name]:,.0f}" for name in ways),
                     *(f"{statistics.median(times[name]):.3g}" for name in ("network", "block", "here")),
                     *(f"{tables.ratio(times[a], times[b]):.2f}" for a, b in ratios)])
    return markdown.table(["classes", "network, GFLOP", "block", "here", "forward", "network, s", "block, s",
                            "here, s", "network / here", "block / here",
                            "here / forward"], rows)


def check_equal(ways, names, wanted):
    for name in names:
        torch.testing.assert_close(ways[name](), wanted, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- the maps of S

def one_by_one(S, images, k, scales):
    """Maps (B, P, H, W) of the classes k (B, P)."""
    size, found = images.shape[-2:], []
    for image, present in zip(images, k):
        total = 0
        for scale in scales:
            scaled = image[None]
            if scale != 1:                                    # as PIL's bicubic of 8-bit pixels
                at = [round(n * scale) for n in size]
                scaled = (255 * scaled).round().byte().cpu()
                scaled = F.interpolate(scaled, at, mode="bicubic", antialias=True).to(images.device) / 255
            for flip in (False, True):
                maps = S.maps(scaled.flip(-1) if flip else scaled)
                maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]     # (C, H, W)
                total = total + (maps.flip(-1) if flip else maps)
        total = total[present]
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        found.append((total - low) / (high - low + 1e-8))
    return torch.stack(found)


def in_batches(S, images, k, scales, batch):
    """The same by make_cam.py's own function."""
    def raw(images, b, k):
        return S.maps(images)[b, k]

    found, args = [], argparse.Namespace(scales=scales, flip=True, source="refine")
    for part, present in zip(images.split(batch), k.split(batch)):
        b = torch.arange(len(part), device=k.device).repeat_interleave(k.shape[1])
        maps = make_maps(raw, part, b, present.flatten(), args)
        found.append(maps.unflatten(0, present.shape))
    return torch.cat(found)


@torch.no_grad()
def generator_table(args):
    torch.manual_seed(0)
    S = generator.DeiT(inputs.CLASSES).to(args.device).eval()
    images = torch.rand(args.images, 3, *args.size, device=args.device)
    k = torch.arange(2 * args.images, device=args.device).view(-1, 2) % inputs.CLASSES
    ways = {"one by one": lambda: one_by_one(S, images, k, SCALES)}
    for n in sorted({1, args.images}):
        ways[f"here, {n} a batch"] = lambda n=n: in_batches(S, images, k, SCALES, n)
    check_equal(ways, list(ways)[1:], ways["one by one"]())
    times = tables.take_turns(ways, args.runs, args.device)
    rows = [[name, f"{statistics.median(times[name]) / args.images:.3g}",
             f"{tables.ratio(times['one by one'], times[name]):.2f}"] for name in ways]
    return markdown.table(["maps of S", "s an image", "one by one / here"], rows)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--device", default="cpu")
    p.add_argument("--clip-size", type=flags.positive, nargs=2, default=[384, 512],
                   help="height and width of the image that CLIP sees; multiples of 16")
    p.add_argument("--classes", type=flags.positive, nargs="+", default=[1, 2, 3, 6],
                   help="numbers of classes in the image")
    p.add_argument("--size", type=flags.positive, nargs=2, default=[375, 500],
                   help="height and width of the images that S sees")
    p.add_argument("--images", type=flags.positive, default=4, help="images in a batch of S")
    p.add_argument("--runs", type=flags.positive, default=3)
    return p.parse_args()


def main():
    args = parse()
    facts = (f"CLIP at {args.clip_size[0]}x{args.clip_size[1]}, S at {args.size[0]}x{args.size[1]}; "
             f"median of {args.runs} runs.")
    table = f"{clip_table(args)}\n\n{generator_table(args)}"
    tables.show("bench.maps", args.write, table, facts, args.device)


if __name__ == "__main__":
    main()
