"""GradCAM's closed form against autograd through OpenAI's modules; affinity, boxes, CAA against loops."""
import math

import clip as openai_clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss import clip_model, gradcam

SCALE = 8.0


def random_clip(**sizes):
    """A CLIP of three blocks and two heads; large weights make attention sharp and every norm matter."""
    torch.manual_seed(0)
    small = dict(embed_dim=24, context_length=8, vocab_size=9, image_resolution=32,
                 vision_layers=3, vision_width=128, vision_patch_size=8,
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
def seen(clip):
    """Three images of 5 x 3 patches: x, attention, grid."""
    images = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return gradcam.last_inputs(clip, images)


@pytest.fixture(scope="module")
def batch(seen):
    """Classes 0..3, backgrounds 4..6. Image 1 has no class, image 2 a class that is alone in its softmax."""
    columns = torch.randn(7, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    competes = torch.tensor([[1, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    b, k = competes[:, :4].nonzero(as_tuple=True)
    assert b.tolist() == [0, 0, 0, 2] and k.tolist() == [0, 2, 3, 1] and seen[2] == (5, 3)
    return dict(x=seen[0], grid=seen[2], columns=F.normalize(columns, dim=-1), competes=competes, b=b, k=k,
                scale=SCALE)


def assert_close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def last_of(clip):
    return clip.model.visual.transformer.resblocks[-1]


def tail(clip, x, u):
    """What follows ln_1 of the last block, by OpenAI's modules: (1, 1 + N, width) x2 -> e (D,)"""
    visual, last = clip.model.visual, last_of(clip)
    y = x.transpose(0, 1) + last.attention(u.transpose(0, 1))     # (1 + N, 1, width)
    z = y + last.mlp(last.ln_2(y))
    return F.normalize((visual.ln_post(z[1:, 0]) @ visual.proj).mean(0), dim=-1)


def autograd(clip, target, x, columns, competes, b, k, scale, **_):
    """-> channel weights (P, width) and maps (P, N) by autograd, a pair at a time"""
    weights, maps = [], []
    for i, c in zip(b.tolist(), k.tolist()):
        u = last_of(clip).ln_1(x[i:i + 1]).requires_grad_()
        t = scale * columns @ tail(clip, x[i:i + 1], u)           # (M,)
        (gradient,) = torch.autograd.grad(target(t, competes[i], c), u)
        weights.append(gradient[0, 1:].mean(0))
        maps.append((u[0, 1:].detach() @ weights[-1]).relu())
    return torch.stack(weights), gradcam.min_max(torch.stack(maps)[:, None])[:, 0]


def rivals(t, competes, c):
    return [t[j] for j in competes.nonzero().flatten().tolist() if j != c]


def log_odds(t, competes, c):
    others = rivals(t, competes, c)
    return t[c] - torch.stack(others).logsumexp(0) if others else t[c]


def probability(t, competes, c):
    return t.masked_fill(~competes, -torch.inf).softmax(0)[c]


def nearest_rival(t, competes, c):
    return t[c] - max(rivals(t, competes, c), default=0)


def weights_of(clip, last, x, grid, **rest):
    return gradcam.gradcam_weights(clip, last, **rest).detach()


# ---------------------------------------------------------------- GradCAM

def test_closed_form_equals_autograd(clip, batch):
    want, maps = autograd(clip, log_odds, **batch)
    got = weights_of(clip, gradcam.last_block(clip, batch["x"]), **batch)
    assert got.dtype == torch.float64 and want.abs().amax(1).min() > 1e-6
    assert ((got - want).abs().amax(1) / want.abs().amax(1)).max() < 1e-10
    cams = gradcam.gradcam(clip, **batch)
    assert_close(cams.flatten(1), maps, 1e-10)
    assert cams.shape == (4, 5, 3) and (cams.amax((1, 2)) == 1).all() and (cams.amin((1, 2)) == 0).all()


def test_each_part_of_the_gradient_counts(clip, batch, monkeypatch):
    """The test above is sharp: queries, keys, values and MLP each contribute a share that it would miss."""
    want = weights_of(clip, gradcam.last_block(clip, batch["x"]), **batch)
    attn = last_of(clip).attn
    parts = attn.in_proj_weight.clone()
    for part in range(3):
        last = gradcam.last_block(clip, batch["x"])
        attn.in_proj_weight.data[128 * part:128 * (part + 1)] = 0         # only this gradient is lost
        got = weights_of(clip, last, **batch)
        attn.in_proj_weight.data = parts.clone()
        assert (got - want).norm() > 0.02 * want.norm(), "qkv"[part]
    last = gradcam.last_block(clip, batch["x"])
    monkeypatch.setattr(gradcam, "quick_gelu_slope", torch.zeros_like)
    assert (weights_of(clip, last, **batch) - want).norm() > 0.02 * want.norm()


def test_same_map_as_the_gradient_of_the_probability(clip, batch):
    pairs = {**batch, "b": batch["b"][:3], "k": batch["k"][:3]}   # a class without rivals has p = 1 anywhere
    _, want = autograd(clip, probability, **pairs)
    assert_close(gradcam.gradcam(clip, **pairs).flatten(1), want, 1e-10)


def test_saturated_softmax_has_the_map_of_its_limit(clip, batch):
    """Scale 1e4: p is 0 or 1 and its gradient 0. The log-sum over rivals has become the nearest rival."""
    hot = {**batch, "scale": 1e4}
    t = 1e4 * gradcam.readout(clip, hot["x"])[0] @ hot["columns"].T
    p = torch.stack([probability(t[i], hot["competes"][i], c) for i, c in zip(hot["b"], hot["k"])])
    assert ((p == 0) | (p == 1)).all()
    _, want = autograd(clip, nearest_rival, **hot)
    assert_close(gradcam.gradcam(clip, **hot).flatten(1), want, 1e-9)
    single = gradcam.gradcam(random_clip(), **{**hot, "x": hot["x"].float()})
    assert single.dtype == torch.float32                          # columns follow the image's type
    assert_close(single.double().flatten(1), want, 2e-4)


def test_float32_and_autocast_are_close_to_float64(clip, batch):
    single, pairs = random_clip(), {**batch, "x": batch["x"].float()}
    got, half = gradcam.gradcam(single, **pairs), batch["x"].bfloat16()
    assert_close(got.double(), gradcam.gradcam(clip, **batch), 1e-4)
    images = torch.rand(2, 3, 32, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradcam.gradcam(single, **pairs), got)
        x, attention, _ = gradcam.last_inputs(single, images)
        features = [*gradcam.readout(single, half), gradcam.patch_features(single, half, "value")]
        maps = gradcam.gradcam(single, **{**batch, "x": half})
    assert {part.dtype for part in (x, attention, maps, *features)} == {torch.float32}
    exact, exact_attention, _ = gradcam.last_inputs(single, images)
    assert F.cosine_similarity(x, exact, dim=-1).min() > 0.99
    assert_close(attention, exact_attention, 0.02)


def test_maps_do_not_depend_on_the_batch(clip, batch):
    want, b, k = gradcam.gradcam(clip, **batch), batch["b"], batch["k"]
    for p in range(4):
        i = b[p:p + 1]
        alone = {**batch, "x": batch["x"][i], "competes": batch["competes"][i], "b": i * 0, "k": k[p:p + 1]}
        assert_close(gradcam.gradcam(clip, **alone)[0], want[p])
    order = torch.tensor([3, 1, 0, 2])
    assert_close(gradcam.gradcam(clip, **{**batch, "b": b[order], "k": k[order]}), want[order])


def test_class_maps_let_present_classes_and_backgrounds_compete(clip, batch, seen):
    b, k = batch["b"][:3], batch["k"][:3]
    want = gradcam.gradcam(clip, **{**batch, "b": b, "k": k})
    got = gradcam.class_maps(clip, *seen, batch["columns"], 4, b, k, SCALE)
    assert_close(got, want)
    refined = gradcam.class_maps(clip, *seen, batch["columns"], 4, b, k, SCALE, box=0.4)
    assert_close(refined, gradcam.refine(want, gradcam.affinity(seen[1]), b, 0.4))


def test_no_pair_one_patch_and_a_map_of_nothing(clip, batch, seen):
    none, T = torch.zeros(0, dtype=torch.long), gradcam.affinity(seen[1])
    maps = gradcam.gradcam(clip, **{**batch, "b": none, "k": none})
    assert maps.shape == gradcam.refine(maps, T, none, 0.4).shape == (0, 5, 3)
    x, attention, grid = gradcam.last_inputs(clip, torch.rand(1, 3, 3, 10, dtype=torch.float64))
    assert grid == (1, 1) and x.shape == (1, 2, 128) and attention.shape == (1, 1, 1)
    one = {**batch, "x": x, "grid": grid, "b": torch.tensor([0]), "k": torch.tensor([2])}
    assert gradcam.gradcam(clip, **one).tolist() == [[[0.0]]]     # a constant map
    assert not gradcam.refine(torch.zeros(1, 5, 3, dtype=torch.float64), T, torch.tensor([1]), 0.4).any()
    tiny = torch.tensor([[[0.0, 1e-30], [5e-31, 0.0]]])           # the size of a gradient does not matter
    torch.testing.assert_close(gradcam.min_max(tiny), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]]))


# ---------------------------------------------------------------- the forward pass

def test_native_size_is_clips_own_forward(clip):
    """Against hooks in OpenAI's forward, with the attention that its modules return."""
    images, inputs, attentions = torch.rand(2, 3, 32, 32, dtype=torch.float64), [], []
    blocks, hooks = clip.model.visual.transformer.resblocks, []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].transpose(0, 1))))
        hooks.append(block.ln_1.register_forward_hook(
            lambda _, __, u, attn=block.attn: attentions.append(attn(u, u, u)[1])))
    clip.model.encode_image(clip.normalize(images))
    for hook in hooks:
        hook.remove()
    x, attention, grid = gradcam.last_inputs(clip, images, layers=2)
    assert grid == (4, 4)
    assert_close(x, inputs[-1])
    assert_close(attention, (attentions[1] + attentions[2])[:, 1:, 1:] / 2)
    everything = gradcam.last_inputs(clip, images)[1]             # a CLIP of three blocks has no eight
    assert_close(everything, sum(attentions)[:, 1:, 1:] / 3)
    outputs, grid = gradcam.block_outputs(clip, images)
    assert grid == (4, 4) and len(outputs) == 2
    for output, entering in zip(outputs, inputs[1:]):
        assert_close(output, entering[:, 1:])


@pytest.mark.parametrize("size, target, grid", [((21, 43), None, (3, 5)), ((3, 45), None, (1, 6)),
                                                ((32, 32), (50, 35), (6, 4)), ((40, 24), None, (5, 3))])
def test_any_size_is_resized_to_the_nearest_patches(clip, size, target, grid):
    images = torch.rand(1, 3, *size, dtype=torch.float64).round()         # bicubic overshoots hard edges
    x, attention, got = gradcam.last_inputs(clip, images, size=target)
    n = grid[0] * grid[1]
    assert got == grid and x.shape == (1, 1 + n, 128) and attention.shape == (1, n, n)
    resized = F.interpolate(images, (8 * grid[0], 8 * grid[1]), mode="bicubic", antialias=True).clamp(0, 1)
    assert_close(gradcam.last_inputs(clip, resized)[0], x)


def test_a_longest_side_by_hand():
    assert gradcam.within((300, 500), 0) == gradcam.within((300, 500), 500) == (300, 500)
    assert gradcam.within((300, 500), 250) == (150, 250)


def test_positions_follow_the_grid(clip):
    visual = clip.model.visual
    embedding = visual.positional_embedding
    assert_close(gradcam.positions(visual, 4, 4), embedding)
    doubled = gradcam.positions(visual, 4, 8)                     # columns at quarters between the old
    assert_close(doubled[0], embedding[0])
    row = embedding[1:].view(4, 4, -1)[1]
    assert_close(doubled[1:].view(4, 8, -1)[1, 3], 0.75 * row[1] + 0.25 * row[2])


def test_readout_is_the_mean_of_clips_patches_in_place_of_its_class_token(clip, batch):
    x, visual, last = batch["x"], clip.model.visual, last_of(clip)
    want = visual.ln_post(last(x.transpose(0, 1)).transpose(0, 1)[:, 1:]) @ visual.proj
    e, patches = gradcam.readout(clip, x)
    assert_close(patches, want)
    for i in range(3):
        assert_close(e[i], tail(clip, x[i:i + 1], last.ln_1(x[i:i + 1])))
    assert_close(gradcam.patch_features(clip, x), F.normalize(want, dim=-1))


def test_value_features_are_attention_of_each_token_to_itself(clip, batch):
    x, visual, last = batch["x"], clip.model.visual, last_of(clip)
    got = gradcam.patch_features(clip, x, "value")
    for i, n in ((0, 0), (1, 7), (2, 14)):
        u = last.ln_1(x[i, n + 1]).view(1, 1, -1)                 # a sequence of one token
        value = visual.ln_post(last.attn(u, u, u, need_weights=False)[0]) @ visual.proj
        assert_close(got[i, n], F.normalize(value[0, 0], dim=-1))
    with pytest.raises(ValueError, match="kind is 'patch' or 'value', not 'key'"):
        gradcam.patch_features(clip, x, "key")


def test_a_resnet_is_refused_in_one_line():
    clip = random_clip(vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None)
    with pytest.raises(ValueError, match="is a ModifiedResNet: GradCAM reads a vision transformer"):
        gradcam.last_inputs(clip, torch.rand(1, 3, 32, 32))


# ---------------------------------------------------------------- class-aware attention affinity

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
    out, done = np.zeros((h, w), bool), np.zeros((h, w), bool)
    for start in zip(*np.nonzero(lit)):
        stack, part = [start], []
        while stack:
            y, x = stack.pop()
            if 0 <= y < h and 0 <= x < w and lit[y, x] and not done[y, x]:
                done[y, x] = True
                part.append((y, x))
                stack += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        if part:
            ys, xs = zip(*part)
            out[min(ys):max(ys) + 1, min(xs):max(xs) + 1] = True
    return out


def test_affinity_equals_a_loop(seen):
    for attention, got in zip(seen[1], gradcam.affinity(seen[1])):
        assert_close(got, naive_affinity(attention))
    assert gradcam.affinity(seen[1].half()).dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45, 1.0])
def test_boxes_equal_flood_fill(share):
    lit = torch.rand(12, 9, 14, generator=torch.Generator().manual_seed(2)) < share
    for one, box in zip(lit.numpy(), gradcam.boxes(lit).numpy()):
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
    assert torch.equal(gradcam.boxes(lit[None])[0], want)


def test_refine_equals_a_loop(clip, batch, seen):
    maps, T, b = gradcam.gradcam(clip, **batch), gradcam.affinity(seen[1]), batch["b"]
    got = gradcam.refine(maps, T, b, 0.4)
    for p in range(4):
        box = naive_boxes((maps[p] > 0.4 * maps[p].max()).numpy())
        cam = (maps[p] * torch.from_numpy(box)).flatten().tolist()
        for _ in range(2):
            cam = [math.fsum(t * c for t, c in zip(row, cam)) for row in T[b[p]].tolist()]
        want = [(c - min(cam)) / (max(cam) - min(cam)) for c in cam]
        assert_close(got[p].flatten(), torch.tensor(want, dtype=torch.float64), 1e-10)
    with torch.autocast("cpu", torch.bfloat16):                   # which leaves float64 alone
        single = gradcam.refine(maps.float(), T.float(), b, 0.4)
    assert_close(single.double(), got, 1e-4)
