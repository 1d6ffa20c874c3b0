"""GradCAM's closed form against autograd through OpenAI's own modules in float64; attention affinity, boxes and refinement against loops."""
import math

import clip as openai_clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss import clip_model, gradcam

SCALE = 8.0


def random_clip(**sizes):
    """A CLIP of three blocks and two heads, with weights large enough that attention is sharp and every norm does something."""
    torch.manual_seed(0)
    small = dict(embed_dim=24, image_resolution=32, vision_layers=3, vision_width=128, vision_patch_size=8, context_length=8, vocab_size=9,
                 transformer_width=64, transformer_heads=1, transformer_layers=1)
    model = openai_clip.model.CLIP(**{**small, **sizes})
    for name, parameter in model.visual.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "in_proj" in name:
            parameter.data *= 3
    return clip_model.FrozenClip(model)


@pytest.fixture(scope="module")
def clip():
    """In float64, and OpenAI's LayerNorm with it: theirs rounds to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)
        yield random_clip().double()


@pytest.fixture(scope="module")
def batch(clip):
    """Three pictures of 5 x 3 patches; classes 0..3, backgrounds 4..6; the second picture has no class, the third a class alone in its softmax."""
    generator = torch.Generator().manual_seed(1)
    x, attention, grid = gradcam.last_inputs(clip, torch.rand(3, 3, 40, 24, generator=generator, dtype=torch.float64))
    columns = F.normalize(torch.randn(7, 24, generator=generator, dtype=torch.float64), dim=-1)
    competes = torch.tensor([[1, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    b, k = competes[:, :4].nonzero(as_tuple=True)
    assert b.tolist() == [0, 0, 0, 2] and k.tolist() == [0, 2, 3, 1] and grid == (5, 3)
    return dict(x=x, grid=grid, columns=columns, competes=competes, b=b, k=k, scale=SCALE), attention


def tail(clip, x, u):
    """What follows ln_1 of the last block, by OpenAI's modules: (1, 1 + N, width) x2 -> e (D,)"""
    visual, last = clip.model.visual, clip.model.visual.transformer.resblocks[-1]
    y = x.transpose(0, 1) + last.attention(u.transpose(0, 1))                         # (1 + N, 1, width)
    z = y + last.mlp(last.ln_2(y))
    return F.normalize((visual.ln_post(z[1:, 0]) @ visual.proj).mean(0), dim=-1)


def autograd(clip, x, columns, competes, b, k, scale, target, **_):
    """-> channel weights (P, width) and maps (P, N) by autograd, a pair at a time"""
    weights, maps = [], []
    for i, c in zip(b.tolist(), k.tolist()):
        u = clip.model.visual.transformer.resblocks[-1].ln_1(x[i:i + 1]).requires_grad_()
        t = scale * columns @ tail(clip, x[i:i + 1], u)                               # (M,)
        gradient, = torch.autograd.grad(target(t, competes[i], c), u)
        weights.append(gradient[0, 1:].mean(0))
        maps.append((u[0, 1:].detach() @ weights[-1]).relu())
    maps = torch.stack(maps)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return torch.stack(weights), (maps - low) / (high - low)


def log_odds(t, competes, c):
    rivals = [j for j in competes.nonzero().flatten().tolist() if j != c]
    return t[c] - t[rivals].logsumexp(0) if rivals else t[c]


def probability(t, competes, c):
    return t.masked_fill(~competes, -torch.inf).softmax(0)[c]


def weights_of(clip, x, grid, **rest):
    with torch.no_grad():
        return gradcam.gradcam_weights(clip, gradcam.last_block(clip, x), **rest)


# ------------------------------------------------------------------------------------------------- GradCAM

def test_closed_form_equals_autograd(clip, batch):
    want, maps = autograd(clip, **batch[0], target=log_odds)
    got = weights_of(clip, **batch[0])
    assert got.dtype == torch.float64 and want.abs().amax(1).min() > 1e-6
    assert ((got - want).abs().amax(1) / want.abs().amax(1)).max() < 1e-10
    cams = gradcam.gradcam(clip, **batch[0])
    torch.testing.assert_close(cams.flatten(1), maps, atol=1e-10, rtol=0)
    assert cams.shape == (4, 5, 3) and (cams.flatten(1).amax(1) == 1).all() and (cams.flatten(1).amin(1) == 0).all()


def test_each_part_of_the_gradient_counts(clip, batch, monkeypatch):
    """The test above is sharp: queries, keys, values and MLP each contribute a share that it would miss."""
    want = weights_of(clip, **batch[0])
    attn = clip.model.visual.transformer.resblocks[-1].attn
    parts = attn.in_proj_weight.clone()
    for part in range(3):
        attn.in_proj_weight.data = parts.clone()
        last = gradcam.last_block(clip, batch[0]["x"])
        attn.in_proj_weight.data[128 * part:128 * (part + 1)] = 0                     # after the forward pass: only its gradient is lost
        rest = {name: value for name, value in batch[0].items() if name not in ("x", "grid")}
        got = gradcam.gradcam_weights(clip, last, **rest)
        attn.in_proj_weight.data = parts
        assert (got - want).norm() > 0.02 * want.norm(), "qkv"[part]
    monkeypatch.setattr(gradcam, "quick_gelu_slope", torch.zeros_like)
    assert (weights_of(clip, **batch[0]) - want).norm() > 0.02 * want.norm()


def test_same_map_as_the_gradient_of_the_probability(clip, batch):
    softmaxed = {**batch[0], "b": batch[0]["b"][:3], "k": batch[0]["k"][:3]}          # a class without rivals has p = 1 whatever the picture
    _, want = autograd(clip, **softmaxed, target=probability)
    torch.testing.assert_close(gradcam.gradcam(clip, **softmaxed).flatten(1), want, atol=1e-10, rtol=0)


def test_saturated_softmax_has_the_map_of_its_limit(clip, batch):
    """Scale 1e4: p is 0 or 1 and its gradient 0. The log of the sum over rivals has become the nearest rival."""
    hot = {**batch[0], "scale": 1e4}
    t = 1e4 * gradcam.readout(clip, hot["x"])[0] @ hot["columns"].T
    p = torch.stack([probability(t[i], hot["competes"][i], c) for i, c in zip(hot["b"], hot["k"])])
    assert ((p == 0) | (p == 1)).all()
    _, want = autograd(clip, **hot, target=lambda t, competes, c: t[c] - max(
        [t[j] for j in competes.nonzero().flatten().tolist() if j != c], default=0))
    torch.testing.assert_close(gradcam.gradcam(clip, **hot).flatten(1), want, atol=1e-9, rtol=0)
    single = {**hot, "x": hot["x"].float(), "columns": hot["columns"].float()}
    cams = gradcam.gradcam(random_clip(), **single)
    assert cams.dtype == torch.float32
    torch.testing.assert_close(cams.double().flatten(1), want, atol=2e-4, rtol=0)


def test_float32_and_autocast_are_close_to_float64(clip, batch):
    want = gradcam.gradcam(clip, **batch[0])
    single, half = random_clip(), batch[0]["x"].bfloat16()
    got = gradcam.gradcam(single, **{**batch[0], "x": batch[0]["x"].float()})         # columns follow the picture's type
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradcam.gradcam(single, **{**batch[0], "x": batch[0]["x"].float()}), got, atol=0, rtol=0)
        assert gradcam.gradcam(single, **{**batch[0], "x": half}).dtype == torch.float32
        e, patches = gradcam.readout(single, half)
        assert {e.dtype, patches.dtype, gradcam.patch_features(single, half, "value").dtype} == {torch.float32}
        images = torch.rand(2, 3, 32, 24)
        x, attention, _ = gradcam.last_inputs(single, images)
        assert attention.dtype == torch.float32 and x.dtype == torch.float32
    exact, exact_attention, _ = gradcam.last_inputs(single, images)
    assert F.cosine_similarity(x, exact, dim=-1).min() > 0.99
    torch.testing.assert_close(attention, exact_attention, atol=0.02, rtol=0)


def test_maps_do_not_depend_on_the_batch(clip, batch):
    want = gradcam.gradcam(clip, **batch[0])
    for p in range(4):
        i = batch[0]["b"][p:p + 1]
        alone = {**batch[0], "x": batch[0]["x"][i], "competes": batch[0]["competes"][i], "b": i * 0, "k": batch[0]["k"][p:p + 1]}
        torch.testing.assert_close(gradcam.gradcam(clip, **alone)[0], want[p], atol=1e-11, rtol=0)
    order = torch.tensor([3, 1, 0, 2])
    shuffled = gradcam.gradcam(clip, **{**batch[0], "b": batch[0]["b"][order], "k": batch[0]["k"][order]})
    torch.testing.assert_close(shuffled, want[order], atol=1e-11, rtol=0)


def test_no_pair_one_patch_and_a_map_of_nothing(clip, batch):
    none = torch.zeros(0, dtype=torch.long)
    maps = gradcam.gradcam(clip, **{**batch[0], "b": none, "k": none})
    T = gradcam.affinity(batch[1])
    assert maps.shape == gradcam.refine(maps, T, none, 0.4).shape == (0, 5, 3)
    x, attention, grid = gradcam.last_inputs(clip, torch.rand(1, 3, 3, 10, dtype=torch.float64))
    assert grid == (1, 1) and x.shape == (1, 2, 128) and attention.shape == (1, 1, 1)
    single = {**batch[0], "x": x, "grid": grid, "competes": batch[0]["competes"][:1], "b": torch.tensor([0]), "k": torch.tensor([2])}
    assert gradcam.gradcam(clip, **single).tolist() == [[[0.0]]]                      # a constant map
    nothing = gradcam.refine(torch.zeros(1, 5, 3, dtype=torch.float64), T, torch.tensor([1]), 0.4)
    assert nothing.abs().max() == 0
    tiny = torch.tensor([[[0.0, 1e-30], [5e-31, 0.0]]])                               # the size of a gradient does not matter
    torch.testing.assert_close(gradcam.min_max(tiny), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]]))


# ------------------------------------------------------------------------------------------------- the forward pass

def test_native_size_is_clips_own_forward(clip):
    """Against hooks in OpenAI's forward, with the attention that its modules return."""
    images, seen, attentions = torch.rand(2, 3, 32, 32, dtype=torch.float64), [], []
    blocks = clip.model.visual.transformer.resblocks
    hooks = [blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].transpose(0, 1)))]
    hooks += [block.ln_1.register_forward_hook(lambda _, __, u, attn=block.attn: attentions.append(attn(u, u, u)[1])) for block in blocks]
    clip.model.encode_image(clip.normalize(images))
    for hook in hooks:
        hook.remove()
    x, attention, grid = gradcam.last_inputs(clip, images, layers=2)
    assert grid == (4, 4)
    torch.testing.assert_close(x, seen[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attention, (attentions[1] + attentions[2])[:, 1:, 1:] / 2, atol=1e-12, rtol=1e-12)
    everything = gradcam.last_inputs(clip, images)[1]                                 # a CLIP of three blocks has no eight
    torch.testing.assert_close(everything, sum(attentions)[:, 1:, 1:] / 3, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size,target,grid", [((21, 43), None, (3, 5)), ((3, 45), None, (1, 6)),
                                              ((32, 32), (50, 35), (6, 4)), ((40, 24), None, (5, 3))])
def test_any_size_is_resized_to_the_nearest_patches(clip, size, target, grid):
    images = torch.rand(1, 3, *size, dtype=torch.float64).round()                     # hard edges: bicubic overshoots, and is clamped
    x, attention, got = gradcam.last_inputs(clip, images, size=target)
    n = grid[0] * grid[1]
    assert got == grid and x.shape == (1, 1 + n, 128) and attention.shape == (1, n, n)
    resized = F.interpolate(images, (8 * grid[0], 8 * grid[1]), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(gradcam.last_inputs(clip, resized)[0], x, atol=1e-12, rtol=1e-12)


def test_positions_follow_the_grid(clip):
    visual = clip.model.visual
    embedding = visual.positional_embedding
    torch.testing.assert_close(gradcam.positions(visual, 4, 4), embedding, atol=1e-14, rtol=0)
    doubled = gradcam.positions(visual, 4, 8)                                         # rows as they were; columns at quarters between
    torch.testing.assert_close(doubled[0], embedding[0])
    row = embedding[1:].view(4, 4, -1)[1]
    torch.testing.assert_close(doubled[1:].view(4, 8, -1)[1, 3], 0.75 * row[1] + 0.25 * row[2])


def test_readout_is_the_mean_of_clips_patches_in_place_of_its_class_token(clip, batch):
    x, visual = batch[0]["x"], clip.model.visual
    z = visual.transformer.resblocks[-1](x.transpose(0, 1)).transpose(0, 1)
    want = visual.ln_post(z[:, 1:]) @ visual.proj
    e, patches = gradcam.readout(clip, x)
    torch.testing.assert_close(patches, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(e, F.normalize(want.mean(1), dim=-1), atol=1e-12, rtol=1e-12)
    for i in range(3):
        torch.testing.assert_close(e[i], tail(clip, x[i:i + 1], visual.transformer.resblocks[-1].ln_1(x[i:i + 1])), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradcam.patch_features(clip, x), F.normalize(want, dim=-1), atol=1e-12, rtol=1e-12)


def test_value_features_are_attention_of_each_token_to_itself(clip, batch):
    x, visual = batch[0]["x"], clip.model.visual
    last = visual.transformer.resblocks[-1]
    got = gradcam.patch_features(clip, x, "value")
    for i, n in ((0, 0), (1, 7), (2, 14)):
        u = last.ln_1(x[i, n + 1]).view(1, 1, -1)                                     # a sequence of one token: all attention is on it
        value = visual.ln_post(last.attn(u, u, u, need_weights=False)[0]) @ visual.proj
        torch.testing.assert_close(got[i, n], F.normalize(value[0, 0], dim=-1), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="kind is 'patch' or 'value', not 'key'"):
        gradcam.patch_features(clip, x, "key")


def test_a_resnet_is_refused_in_one_line():
    clip = random_clip(vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None)
    with pytest.raises(ValueError, match="is a ModifiedResNet: GradCAM reads a vision transformer, take ViT-B/16"):
        gradcam.last_inputs(clip, torch.rand(1, 3, 32, 32))


# ------------------------------------------------------------------------------------------------- class-aware attention affinity

def naive_affinity(attention):
    A = [row[:] for row in attention.tolist()]
    n = len(A)
    for _ in range(3):
        column = [sum(A[i][j] for i in range(n)) for j in range(n)]
        A = [[A[i][j] / column[j] for j in range(n)] for i in range(n)]
        A = [[value / sum(row) for value in row] for row in A]
    return torch.tensor([[(A[i][j] + A[j][i]) / 2 for j in range(n)] for i in range(n)], dtype=torch.float64)


def naive_boxes(lit):
    """Flood fill, then each part's rectangle."""
    h, w = lit.shape
    out, seen = np.zeros((h, w), bool), np.zeros((h, w), bool)
    for start in zip(*np.nonzero(lit)):
        stack, part = [start], []
        while stack:
            y, x = stack.pop()
            if 0 <= y < h and 0 <= x < w and lit[y, x] and not seen[y, x]:
                seen[y, x] = True
                part.append((y, x))
                stack += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        if part:
            ys, xs = zip(*part)
            out[min(ys):max(ys) + 1, min(xs):max(xs) + 1] = True
    return out


def test_affinity_equals_a_loop(batch):
    T = gradcam.affinity(batch[1])
    for attention, got in zip(batch[1], T):
        torch.testing.assert_close(got, naive_affinity(attention), atol=1e-12, rtol=1e-12)
    assert gradcam.affinity(batch[1].half()).dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45, 1.0])
def test_boxes_equal_flood_fill(share):
    lit = torch.rand(12, 9, 14, generator=torch.Generator().manual_seed(2)) < share
    got = gradcam.boxes(lit)
    for one, box in zip(lit.numpy(), got.numpy()):
        assert (box == naive_boxes(one)).all()


def test_boxes_of_a_spiral_and_of_neighbours_over_a_corner():
    rows = ["#.........",
            ".#..######",
            "....#....#",
            "....#.##.#",
            "#...#..#.#",
            "....####.#",
            ".........#"]
    lit = torch.tensor([[c == "#" for c in row] for row in rows])
    want = torch.zeros(7, 10, dtype=torch.bool)
    want[:2, :2] = want[1:, 4:] = want[4, 0] = True
    assert torch.equal(gradcam.boxes(lit[None])[0], want) and (want.numpy() == naive_boxes(lit.numpy())).all()


def test_refine_equals_a_loop(clip, batch):
    maps, T, b = gradcam.gradcam(clip, **batch[0]), gradcam.affinity(batch[1]), batch[0]["b"]
    got = gradcam.refine(maps, T, b, 0.4)
    for p in range(4):
        box = naive_boxes((maps[p] > 0.4 * maps[p].max()).numpy())
        cam = [value if inside else 0.0 for value, inside in zip(maps[p].flatten().tolist(), box.flatten().tolist())]
        for _ in range(2):
            cam = [math.fsum(t * c for t, c in zip(row, cam)) for row in T[b[p]].tolist()]
        want = torch.tensor([(c - min(cam)) / (max(cam) - min(cam)) for c in cam], dtype=torch.float64)
        torch.testing.assert_close(got[p].flatten(), want, atol=1e-10, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):                   # which leaves float64 alone
        single = gradcam.refine(maps.float(), T.float(), b, 0.4)
    torch.testing.assert_close(single.double(), got, atol=1e-4, rtol=0)
