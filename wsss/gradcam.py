"""GradCAM on the frozen CLIP's vision transformer, as in CLIP-ES, which VPL builds on: where in a picture a text or a vision prototype is seen.

    seen = last_inputs(clip, images)                                                  # images of one size: one forward pass
    maps = class_maps(clip, *seen, columns, num_classes, b, k, scale=100, box=0.4)    # (P, h, w): every class of every picture, no autograd

which is gradcam(), and with `box` refine(), CLIP-ES's class-aware attention affinity (CAA).

`clip` holds OpenAI's model as clip.model and its pixel statistics as clip.mean and clip.std. P counts pairs (picture, class): pair p is class
column k[p] in picture b[p]. A picture is N = h w patch tokens after one class token. Whatever autocast says, only the forward pass of
`last_inputs` is in half precision; all else is float32, or float64 for a float64 CLIP.
"""

import io
import os
import uuid
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------- the forward pass

@torch.no_grad()
def run_blocks(clip, images, size=None, look=0):
    """(B, 3, H, W) RGB in [0, 1] -> what enters each block (B, 1 + N, width); of the last `look` blocks the attention between patches (B, N, N),
    mean over heads; grid (h, w)

    No attention is made where none is wanted: memory there grows with N, not N^2. The picture, or `size` (H, W) if given, is resized to the
    nearest multiples of the patch, and the position embedding to that grid."""
    visual = clip.model.visual
    if not hasattr(visual, "transformer"):
        raise ValueError(f"the image encoder of this CLIP is a {type(visual).__name__}: GradCAM reads a vision transformer, take ViT-B/16")
    patch = visual.conv1.kernel_size[0]
    h, w = (max(1, round(n / patch)) for n in size or images.shape[-2:])
    if images.shape[-2:] != (h * patch, w * patch):
        images = F.interpolate(images, (h * patch, w * patch), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    x = visual.conv1((images - clip.mean) / clip.std).flatten(2).transpose(1, 2)                          # (B, N, width)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + positions(visual, h, w)
    x = layer_norm(visual.ln_pre, x)                                                  # (B, 1 + N, width)

    inputs, attention, blocks = [x], [], visual.transformer.resblocks
    for n, block in enumerate(blocks, 1):
        last, looked, x = n == len(blocks), n > len(blocks) - look, inputs[-1]
        if looked:
            _, _, v, A = attend(block.attn, layer_norm(block.ln_1, x))
            attention.append(A[:, :, 1:, 1:].mean(1))
        if not last:
            o = A.to(v.dtype) @ v if looked else F.scaled_dot_product_attention(*queries_keys_values(block.attn, layer_norm(block.ln_1, x)))
            x = x + block.attn.out_proj(merge(o))
            inputs.append(x + block.mlp(layer_norm(block.ln_2, x)))
    return inputs, attention, (h, w)


def within(size, longest):
    """(H, W), made smaller if its longer side is over `longest`; 0: never"""
    factor = min(1, longest / max(size)) if longest else 1
    return tuple(round(n * factor) for n in size)


def last_inputs(clip, images, layers=8, size=None):
    """-> what enters the last block x (B, 1 + N, width), attention (B, N, N): the mean of the last `layers` blocks, the last one included; grid (h, w)"""
    inputs, attention, grid = run_blocks(clip, images, size, look=layers)
    return inputs[-1], torch.stack(attention).mean(0), grid


def block_outputs(clip, images):
    """-> the patch tokens that every block but the last puts out, a list of (B, N, width); grid (h, w)"""
    inputs, _, grid = run_blocks(clip, images)
    return [x[:, 1:] for x in inputs[1:]], grid


def stored_inputs(folder, ids, make, sound=lambda path: path):
    """What make() -> x, attention, grid gives for the pictures `ids`, by way of half precision in folder/<id>.pt; read from there if all are there.

    `sound`: is asked about a file before torch reads it (common.sound)."""
    paths = [Path(folder) / f"{id}.pt" for id in ids]
    if not all(path.exists() for path in paths):
        x, attention, grid = make()
        for path, *tensors in zip(paths, x.half().cpu(), attention.half().cpu()):
            content = io.BytesIO()
            torch.save([*(tensor.clone() for tensor in tensors), list(grid)], content)
            beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")          # another stage may be writing the same
            try:
                beside.write_bytes(content.getvalue())
                os.replace(beside, path)                                              # a file that exists is whole
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            finally:
                beside.unlink(missing_ok=True)
        return x.half().float(), attention.half().float(), grid
    stored = []
    for path in paths:
        try:
            x, attention, (h, w) = torch.load(sound(path), weights_only=True)
            if x.dtype != torch.half or attention.dtype != torch.half or x.dim() != 2 or attention.shape != (h * w, h * w) or len(x) != 1 + h * w:
                raise ValueError("other tensors")
            if not (x.isfinite().all() and attention.isfinite().all()) or stored and (h, w) != tuple(stored[0][2]):
                raise ValueError("NaN, or another size")
            stored.append((x, attention, (h, w)))
        except Exception as error:                                                    # zip, pickle and torch each raise their own for a torn file
            raise ValueError(f"{path} is damaged ({type(error).__name__}): remove it and run again") from None
    x, attention = (torch.stack([row[i] for row in stored]).float() for i in (0, 1))
    return x, attention, tuple(stored[0][2])


def positions(visual, h, w):
    """The position embedding for h x w patches -> (1 + N, width)"""
    first, grid = visual.positional_embedding[:1], visual.positional_embedding[1:]
    side = round(len(grid) ** 0.5)
    grid = grid.T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (h, w), mode="bilinear", align_corners=False)          # (1, width, h, w)
    return torch.cat([first, grid[0].flatten(1).T])


def layer_norm(norm, x):
    """OpenAI's LayerNorm without its rounding of float64 to float32."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def split(x, heads):
    """(B, n, width) -> (B, heads, n, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x):
    """(B, heads, n, d) -> (B, n, width)"""
    return x.transpose(1, 2).flatten(2)


def queries_keys_values(attn, u):
    """u (B, n, width) -> q, k, v (B, heads, n, d)"""
    return [split(part, attn.num_heads) for part in F.linear(u, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)]


def attend(attn, u):
    """u (B, n, width) -> q, k, v (B, heads, n, d), softmax(q k / sqrt d) (B, heads, n, n)"""
    q, k, v = queries_keys_values(attn, u)
    return q, k, v, at_least_float32(q * attn.head_dim ** -0.5 @ k.mT).softmax(-1)


# ------------------------------------------------------------------------------------------------- the last block, forward and back

def last_block(clip, x):
    """The last block's patch tokens, each step kept under its name: o the heads' outputs, y after attention, a inside the MLP, z after it."""
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    u = layer_norm(block.ln_1, x)                                                     # (B, 1 + N, width)
    q, k, v, A = attend(block.attn, u)                                                # as in attend, n = 1 + N
    q, A = q[:, :, 1:], A[:, :, 1:]                                                   # no patch looks back at what the class token becomes
    o = A @ v                                                                         # (B, heads, N, d)
    y = x[:, 1:] + block.attn.out_proj(merge(o))                                      # (B, N, width)
    a = block.mlp.c_fc(layer_norm(block.ln_2, y))                                     # (B, N, 4 width)
    z = y + block.mlp.c_proj(block.mlp.gelu(a))                                       # (B, N, width)
    patches = layer_norm(visual.ln_post, z) @ visual.proj                             # (B, N, D)
    return SimpleNamespace(u=u, q=q, k=k, v=v, A=A, o=o, y=y, a=a, z=z, patches=patches)


def layer_norm_back(norm, x, c):
    """c, the gradient at the norm's output, taken to its input x. (P, N, width)"""
    x, c = x - x.mean(-1, keepdim=True), c * norm.weight
    inverse = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    x = x * inverse
    return inverse * (c - c.mean(-1, keepdim=True) - x * (c * x).mean(-1, keepdim=True))


def quick_gelu_slope(a):
    """The derivative of OpenAI's QuickGELU, a s(1.702 a) with s the sigmoid."""
    s = torch.sigmoid(1.702 * a)
    return s * (1 + 1.702 * a * (1 - s))


def attention_back(attn, q, k, v, A, o, c):
    """c (P, N, width), the gradient at the attention's output, taken to one vector added to all patch tokens of its input -> (P, width)

    That vector moves the queries, keys and values of all patches alike, so only sums over tokens are needed. The gradient at a score is
    A_ij r_i (v_j - o_i). Over the keys j it adds up to 0, so over the patches' keys, which move, to minus the class token's, which does not."""
    r = split(c @ attn.out_proj.weight, attn.num_heads)                               # (P, heads, N, d): gradient at o
    r_o = (r * o).sum(-1, keepdim=True)                                               # (P, heads, N, 1)
    to_class = A[..., :1]                                                             # (P, heads, N, 1): attention to the class token
    keys = (A.mT @ r * v).sum(-1, keepdim=True) - A.mT @ r_o                          # (P, heads, 1 + N, 1): at a key's scores, over all queries
    first = to_class * ((r * v[:, :, :1]).sum(-1, keepdim=True) - r_o)                # (P, heads, N, 1): at a query's score of the class token
    to_q = (keys * k).sum(2) * attn.head_dim ** -0.5                                  # (P, heads, d)
    to_k = -(first * q).sum(2) * attn.head_dim ** -0.5
    to_v = ((1 - to_class) * r).sum(2)
    return torch.cat([part.flatten(1) for part in (to_q, to_k, to_v)], 1) @ attn.in_proj_weight


def gradcam_weights(clip, last, columns, competes, b, k, scale):
    """GradCAM's channel weights, the mean over patches of d L / d u -> (P, width), for L = t_k - log sum_{j != k} exp t_j, t = scale e . column.

    L is the log-odds of the softmax's p_k. d p_k = p_k (1 - p_k) d L, and a map's scale is lost in its min-max: same map, but dL does not vanish
    where p_k is 0 or 1. The mean over patches is 1/N of the gradient for one vector added to all patches of u = ln_1(x)."""
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    mean = last.patches.mean(1)                                                       # (B, D)
    e, length = F.normalize(mean, dim=-1), mean.norm(dim=-1, keepdim=True)
    rivals = competes[b] & (torch.arange(len(columns), device=k.device) != k.unsqueeze(1))                # (P, M)
    t = scale * (e @ columns.T)[b]
    q = torch.where(rivals, t.masked_fill(~rivals, -torch.inf).softmax(-1), 0)        # a class without a rival: L = t_k
    c = scale * (columns[k] - q @ columns)                                            # (P, D): gradient at e
    c = (c - e[b] * (e[b] * c).sum(-1, keepdim=True)) / length[b]                     # (P, D): at the mean

    patches = last.z.shape[1]                                                         # N
    c = (c @ visual.proj.T / patches).unsqueeze(1)                                    # (P, 1, width): at ln_post's output, the same for every patch
    c = layer_norm_back(visual.ln_post, last.z[b], c)                                 # (P, N, width): at z
    inside = c @ block.mlp.c_proj.weight * quick_gelu_slope(last.a)[b]                # (P, N, 4 width): at a
    c = c + layer_norm_back(block.ln_2, last.y[b], inside @ block.mlp.c_fc.weight)    # (P, N, width): at y
    return attention_back(block.attn, last.q[b], last.k[b], last.v[b], last.A[b], last.o[b], c) / patches


@torch.no_grad()
def gradcam(clip, x, grid, columns, competes, b, k, scale):
    """x (B, 1 + N, width) and grid from `last_inputs` -> maps (P, h, w) in [0, 1]: relu(sum over channels of weight u), min-max.

    columns (M, D): texts or prototypes of unit length. competes (B, M) bool: those in a picture's softmax, its present classes and all backgrounds.
    scale: 100 for texts, 1 / tau_I for vision prototypes. Memory: each pair holds its picture's heads x N x N attention of the last block."""
    with torch.autocast(x.device.type, enabled=False):
        last = last_block(clip, at_least_float32(x))
        weights = gradcam_weights(clip, last, columns.to(last.u), competes, b, k, scale)
        cam = (last.u[b, 1:] @ weights.unsqueeze(-1)).relu()                          # (P, N, 1)
    return min_max(cam.view(len(b), *grid))


def class_maps(clip, x, attention, grid, columns, num_classes, b, k, scale, box=None):
    """CLIP-ES's maps of the pairs (b, k), every present class against the other present ones and all backgrounds -> (P, h, w) in [0, 1]

    columns (M, D): the classes', then the backgrounds'. `box`: refined by CAA inside the boxes above this share of a map's maximum."""
    competes = torch.zeros(len(x), len(columns), dtype=torch.bool, device=x.device)
    competes[:, num_classes:] = True
    competes[b, k] = True
    maps = gradcam(clip, x, grid, columns, competes, b, k, scale)
    return maps if box is None else refine(maps, affinity(attention), b, box)


def min_max(maps):
    """(P, h, w) -> each map from 0 to 1; a constant one is 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


# ------------------------------------------------------------------------------------------------- the same pass read as features

@torch.no_grad()
def readout(clip, x):
    """-> the picture e (B, D), unit length, and its patches (B, N, D), not normalised: e is the direction of their mean, without the class token."""
    with torch.autocast(x.device.type, enabled=False):
        patches = last_block(clip, at_least_float32(x)).patches
    return F.normalize(patches.mean(1), dim=-1), patches


@torch.no_grad()
def patch_features(clip, x, kind="patch"):
    """-> every patch in CLIP's joint space (B, N, D), unit length: the readout's ("patch"), or its own value in the last block ("value")."""
    if kind == "patch":
        return F.normalize(readout(clip, x)[1], dim=-1)
    if kind != "value":
        raise ValueError(f"kind is 'patch' or 'value', not {kind!r}")
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    with torch.autocast(x.device.type, enabled=False):
        v = attend(block.attn, layer_norm(block.ln_1, at_least_float32(x)))[2]
        value = layer_norm(visual.ln_post, block.attn.out_proj(merge(v[:, :, 1:]))) @ visual.proj
    return F.normalize(value, dim=-1)


# ------------------------------------------------------------------------------------------------- class-aware attention affinity

def affinity(attention):
    """CLIP-ES, CAA: three times columns, then rows, to sum 1 (Sinkhorn); then (A + A^T) / 2.   (B, N, N) -> same, once per picture"""
    A = at_least_float32(attention)
    for _ in range(3):
        A = A / A.sum(1, keepdim=True)
        A = A / A.sum(2, keepdim=True)
    return (A + A.mT) / 2


def refine(maps, T, b, threshold):
    """CLIP-ES, CAA: T (T (box * map)), min-max.   maps (P, h, w), T (B, N, N) -> (P, h, w)

    box: the bounding boxes of all connected parts of the map above `threshold` of its maximum. T T is never formed: two products with a vector."""
    box = boxes(maps > threshold * maps.amax((1, 2), keepdim=True))
    with torch.autocast(maps.device.type, enabled=False):
        T, cam = T[b], (maps * box).flatten(1).unsqueeze(-1).to(T)                    # (P, N, N), (P, N, 1)
        return min_max((T @ (T @ cam)).view_as(maps))


def boxes(lit):
    """(P, h, w) bool -> bool: the union of the bounding boxes of its connected parts (eight neighbours)"""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=lit.device) for n in lit.shape[1:]), indexing="ij")
    place = torch.stack([-y, -x, y, x])                                               # (4, h, w)
    far = torch.where(lit.unsqueeze(1), place, -torch.inf)                            # (P, 4, h, w): ends of a pixel's part, as far as it is known
    before = None
    while before is None or not torch.equal(before, far):
        before, far = far, torch.where(lit.unsqueeze(1), F.max_pool2d(far, 3, 1, 1), -torch.inf)
    inside = place.flatten(1).unsqueeze(1) <= far.flatten(2).unsqueeze(-1)            # (P, 4, N, N): is pixel j within this end of pixel i's part
    return inside.all(1).any(1).view_as(lit)
