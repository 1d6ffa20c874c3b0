"""GradCAM on CLIP's vision transformer (CLIP-ES, VPL): where an image shows a text or a vision prototype.

    x, attention, grid = last_inputs(clip, images)        # images of one size: one forward pass
    maps = class_maps(clip, x, attention, grid, columns, num_classes, b, k, scale=100, box=0.4)

class_maps() is gradcam() and, with `box`, refine(), CLIP-ES's class-aware attention affinity (CAA). All
classes of all images are one call, and the gradient is a closed form, not autograd.

`clip` holds OpenAI's model as clip.model and its pixel statistics as clip.mean and clip.std. Pair p of the P
pairs is class column k[p] in image b[p]. An image is one class token, then N = h w patch tokens, of `width`
channels; d is the width of one attention head. Under autocast only the forward pass of last_inputs is in half
precision. Everything else is float32, or float64 for a float64 CLIP.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def at_least_float32(x):
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- the forward pass

@torch.no_grad()
def last_inputs(clip, images, layers=8, size=None):
    """RGB in [0, 1] (B, 3, H, W) -> last block's input x (B, 1 + N, width), attention (B, N, N), grid (h, w)

    The attention is the mean of the last `layers` blocks, the last one included, as in CLIP-ES.
    """
    inputs, attention, grid = run_blocks(clip, images, size, look=layers)
    return inputs[-1], torch.stack(attention).mean(0), grid


@torch.no_grad()
def block_outputs(clip, images):
    """-> the patch tokens that every block but the last puts out, a list of (B, N, width); grid (h, w)"""
    inputs, _, grid = run_blocks(clip, images)
    return [x[:, 1:] for x in inputs[1:]], grid


@torch.no_grad()
def run_blocks(clip, images, size=None, look=0):
    """-> each block's input, (B, 1 + N, width); attention of each of the last `look` blocks; grid (h, w)

    Attention is that between patches, (B, N, N), the mean over heads. Only blocks looked at hold one: the
    memory of the others grows with N, not N^2. Images, or `size` (H, W) if given, are resized to the next
    multiples of the patch upwards.
    """
    visual = clip.model.visual
    if not hasattr(visual, "transformer"):
        raise ValueError(f"the image encoder of this CLIP is a {type(visual).__name__}: "
                         "GradCAM reads a vision transformer, take ViT-B/16")
    patch = visual.conv1.kernel_size[0]
    # From the authors' code, not in the paper: CLIP-ES rounds upwards, 375 x 500 pixels are 24 x 32 patches.
    h, w = (-(-n // patch) for n in size or images.shape[-2:])
    if images.shape[-2:] != (h * patch, w * patch):
        images = F.interpolate(images, (h * patch, w * patch), mode="bicubic", antialias=True)
        images = images.clamp(0, 1)
    x = visual.conv1((images - clip.mean) / clip.std).flatten(2).transpose(1, 2)      # (B, N, width)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + positions(visual, h, w)
    x = layer_norm(visual.ln_pre, x)                          # (B, 1 + N, width)

    inputs, attention, blocks = [x], [], visual.transformer.resblocks
    for n, block in enumerate(blocks, 1):
        looked = n > len(blocks) - look
        u = layer_norm(block.ln_1, x)
        if looked:
            _, _, v, A = attend(block.attn, u)
            attention.append(A[:, :, 1:, 1:].mean(1))
        if n == len(blocks):
            break
        if looked:
            o = A.to(v.dtype) @ v                             # (B, heads, 1 + N, d)
        else:
            o = F.scaled_dot_product_attention(*queries_keys_values(block.attn, u))
        x = x + block.attn.out_proj(merge(o))
        x = x + block.mlp(layer_norm(block.ln_2, x))
        inputs.append(x)
    return inputs, attention, (h, w)


def positions(visual, h, w):
    """The position embedding, resized to h x w patches -> (1 + N, width)"""
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
    qkv = F.linear(u, attn.in_proj_weight, attn.in_proj_bias)
    return [split(part, attn.num_heads) for part in qkv.chunk(3, -1)]


def attend(attn, u):
    """u (B, n, width) -> q, k, v (B, heads, n, d), A = softmax(q k / sqrt d) (B, heads, n, n)"""
    q, k, v = queries_keys_values(attn, u)
    return q, k, v, at_least_float32(q * attn.head_dim ** -0.5 @ k.mT).softmax(-1)


# ---------------------------------------------------------------- the last block, forward and back

def last_block(clip, x):
    """The last block's patch tokens after each step, from its input x (B, 1 + N, width)."""
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    u = layer_norm(block.ln_1, x)                             # (B, 1 + N, width)
    q, k, v, A = attend(block.attn, u)
    q, A = q[:, :, 1:], A[:, :, 1:]  # of the patches: none reads what the class token becomes
    o = A @ v                                                 # (B, heads, N, d): the heads' outputs
    y = x[:, 1:] + block.attn.out_proj(merge(o))              # (B, N, width): after attention
    a = block.mlp.c_fc(layer_norm(block.ln_2, y))             # (B, N, 4 width): inside the MLP
    z = y + block.mlp.c_proj(block.mlp.gelu(a))               # (B, N, width): after the MLP
    patches = layer_norm(visual.ln_post, z) @ visual.proj     # (B, N, D)
    return SimpleNamespace(u=u, q=q, k=k, v=v, A=A, o=o, y=y, a=a, z=z, patches=patches)


def layer_norm_back(norm, x, c):
    """c, the gradient at the norm's output, taken to its input x.   (P, N, width)"""
    x, c = x - x.mean(-1, keepdim=True), c * norm.weight
    inverse = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    x = x * inverse
    return inverse * (c - c.mean(-1, keepdim=True) - x * (c * x).mean(-1, keepdim=True))


def gelu_slope(gelu, a):
    """The derivative of the block's GELU: OpenAI's QuickGELU, a s(1.702 a) with s the sigmoid, or the plain
    one."""
    if isinstance(gelu, torch.nn.GELU):                       # a Phi(a), of N(0, 1)
        return torch.special.ndtr(a) + a * torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    s = torch.sigmoid(1.702 * a)
    return s * (1 + 1.702 * a * (1 - s))


def attention_back(attn, q, k, v, A, o, c):
    """The gradient for one vector that is added to all patch tokens of the attention's input.   -> (P, width)

    c (P, N, width) is the gradient at the attention's output. The vector moves the queries, keys and values
    of all patches alike, so only sums over tokens are needed. The gradient at score ij is A_ij r_i (v_j -
    o_i), with r the gradient at o. It sums to 0 over all keys j. The class token's key does not move, so the
    sum over those that do, the patches', is minus the gradient at the class token's score.
    """
    r = split(c @ attn.out_proj.weight, attn.num_heads)       # (P, heads, N, d): gradient at o
    r_o = (r * o).sum(-1, keepdim=True)                       # (P, heads, N, 1)
    to_class = A[..., :1]                                     # (P, heads, N, 1)
    # Gradients at the scores: for each key, summed over queries (P, heads, 1 + N, 1); for the class token's.
    keys = (A.mT @ r * v).sum(-1, keepdim=True) - A.mT @ r_o
    first = to_class * ((r * v[:, :, :1]).sum(-1, keepdim=True) - r_o)                # (P, heads, N, 1)
    to_q = (keys * k).sum(2) * attn.head_dim ** -0.5          # (P, heads, d)
    to_k = -(first * q).sum(2) * attn.head_dim ** -0.5
    to_v = ((1 - to_class) * r).sum(2)
    return torch.cat([part.flatten(1) for part in (to_q, to_k, to_v)], 1) @ attn.in_proj_weight


# ---------------------------------------------------------------- GradCAM

def gradcam_weights(clip, last, columns, competes, b, k, scale):
    """GradCAM's channel weights, the mean over patches of dL / du, u = ln_1(x).   -> (P, width)

        L = t_k - log sum_{j != k} exp t_j,   t_j = scale e . column_j,   e = readout(clip, x)[0]

    L is the log-odds of the softmax's p_k: d p_k = p_k (1 - p_k) dL. Both give the same map, since min-max
    removes the factor, but dL does not vanish where p_k is 0 or 1. The mean over patches is 1/N of the
    gradient for one vector added to u at all patches.
    """
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    mean = last.patches.mean(1)                               # (B, D)
    e, length = F.normalize(mean, dim=-1), mean.norm(dim=-1, keepdim=True)
    rivals = competes[b] & (torch.arange(len(columns), device=k.device) != k.unsqueeze(1))  # (P, M)
    t = scale * (e @ columns.T)[b]
    q = torch.where(rivals, t.masked_fill(~rivals, -torch.inf).softmax(-1), 0)  # without a rival: L = t_k
    c = scale * (columns[k] - q @ columns)                    # (P, D): gradient at e
    c = (c - e[b] * (e[b] * c).sum(-1, keepdim=True)) / length[b]                     # (P, D): at the mean

    N = last.z.shape[1]
    c = (c @ visual.proj.T / N).unsqueeze(1)                  # (P, 1, width): at ln_post, of every patch
    c = layer_norm_back(visual.ln_post, last.z[b], c)         # (P, N, width): at z
    slope = gelu_slope(block.mlp.gelu, last.a)[b]             # (P, N, 4 width)
    inside = c @ block.mlp.c_proj.weight * slope              # (P, N, 4 width): at a
    c = c + layer_norm_back(block.ln_2, last.y[b], inside @ block.mlp.c_fc.weight)    # (P, N, width): at y
    return attention_back(block.attn, last.q[b], last.k[b], last.v[b], last.A[b], last.o[b], c) / N


@torch.no_grad()
def gradcam(clip, x, grid, columns, competes, b, k, scale):
    """CLIP-ES, GradCAM: min-max(relu(sum over channels of weight u)).   -> (P, h, w) in [0, 1]

    x (B, 1 + N, width), grid: of last_inputs. columns (M, D): texts or prototypes of unit length.
    competes (B, M) bool: the columns in an image's softmax, its present classes and all backgrounds.
    scale: 100 for texts, 1 / tau_I for prototypes.
    Memory: every pair holds its image's attention in the last block, heads x N x N.
    """
    with torch.autocast(x.device.type, enabled=False):
        last = last_block(clip, at_least_float32(x))
        weights = gradcam_weights(clip, last, columns.to(last.u), competes, b, k, scale)
        cam = (last.u[b, 1:] @ weights.unsqueeze(-1)).relu()  # (P, N, 1)
    return min_max(cam.view(len(b), *grid))


def class_maps(clip, x, attention, grid, columns, num_classes, b, k, scale, box=None):
    """CLIP-ES's maps: each present class against the other present ones and all backgrounds.   -> (P, h, w)

    columns (M, D): the classes', then the backgrounds'. `box`: refine inside the boxes around what is above
    this share of a map's maximum; None: no refinement.
    """
    competes = torch.zeros(len(x), len(columns), dtype=torch.bool, device=x.device)
    competes[:, num_classes:] = True
    competes[b, k] = True
    maps = gradcam(clip, x, grid, columns, competes, b, k, scale)
    return maps if box is None else refine(maps, affinity(attention), b, box)


def min_max(maps):
    """(P, h, w) -> each map from 0 to 1; a constant one is 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


# ---------------------------------------------------------------- the same pass read as features

@torch.no_grad()
def readout(clip, x):
    """-> e (B, D), the mean of the patches to unit length, and the patches (B, N, D). No class token."""
    with torch.autocast(x.device.type, enabled=False):
        patches = last_block(clip, at_least_float32(x)).patches
    return F.normalize(patches.mean(1), dim=-1), patches


@torch.no_grad()
def patch_features(clip, x, kind="patch"):
    """Every patch in CLIP's joint space, to unit length.   -> (B, N, D)

    kind: "patch", as in readout, or "value", the patch's own value in the last block's attention, projected.
    """
    if kind == "patch":
        return F.normalize(readout(clip, x)[1], dim=-1)
    if kind != "value":
        raise ValueError(f"kind is 'patch' or 'value', not {kind!r}")
    visual, block = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    with torch.autocast(x.device.type, enabled=False):
        v = attend(block.attn, layer_norm(block.ln_1, at_least_float32(x)))[2]
        value = layer_norm(visual.ln_post, block.attn.out_proj(merge(v[:, :, 1:]))) @ visual.proj
    return F.normalize(value, dim=-1)


# ---------------------------------------------------------------- class-aware attention affinity

def affinity(attention):
    """CLIP-ES, CAA: three times columns, then rows to sum 1 (Sinkhorn); (A + A^T) / 2.   (B, N, N) -> same"""
    A = at_least_float32(attention)
    for _ in range(3):
        A = A / A.sum(1, keepdim=True)
        A = A / A.sum(2, keepdim=True)
    return (A + A.mT) / 2


def refine(maps, T, b, threshold):
    """CLIP-ES, CAA: min-max(T T (box * map)).   maps (P, h, w), T (B, N, N) -> (P, h, w)

    box: the bounding boxes of the connected parts of the map above `threshold` of its maximum. T T is never
    formed: two products with a vector.
    """
    # Differs from CLIP-ES's code, which loses a box's last row and column at the lower and right edge.
    box = boxes(maps > threshold * maps.amax((1, 2), keepdim=True))
    with torch.autocast(maps.device.type, enabled=False):
        T, cam = T[b], (maps * box).flatten(1).unsqueeze(-1).to(T)                    # (P, N, N), (P, N, 1)
        return min_max((T @ (T @ cam)).view_as(maps))


def boxes(lit):
    """(P, h, w) bool -> bool: the union of the bounding boxes of its connected parts (eight neighbours)"""
    axes = [torch.arange(n, dtype=torch.float32, device=lit.device) for n in lit.shape[1:]]
    y, x = torch.meshgrid(*axes, indexing="ij")
    place = torch.stack([-y, -x, y, x])                       # (4, h, w)
    # (P, 4, h, w): how far a pixel's part reaches to each side; the knowledge spreads by one pixel a turn.
    far = torch.where(lit.unsqueeze(1), place, -torch.inf)
    before = None
    while before is None or not torch.equal(before, far):
        before = far
        far = torch.where(lit.unsqueeze(1), F.max_pool2d(far, 3, 1, 1), -torch.inf)
    # (P, 4, N, N): does pixel j lie within this end of pixel i's part
    inside = place.flatten(1).unsqueeze(1) <= far.flatten(2).unsqueeze(-1)
    return inside.all(1).any(1).view_as(lit)
