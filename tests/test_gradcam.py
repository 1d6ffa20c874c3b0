"""GradCAM's closed form against autograd through OpenAI's modules; affinity, boxes, CAA against loops."""
import math

import clip as openai_clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss import clip_model, gradcam


def random_clip(gelu="quick", **sizes):
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
    for block in model.visual.transformer.resblocks if gelu == "plain" else ():
        block.mlp.gelu = torch.nn.GELU()
    frozen = clip_model.FrozenClip(model)
    frozen.gelu = gelu
    return frozen


@pytest.fixture(scope="module", params=["quick", "plain"])
def clip(request):
    """In float64, and OpenAI's LayerNorm with it: theirs rounds to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)
        yield random_clip(request.param).double()


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
                scale=8.0)


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


def by_autograd(clip, best, link, x, columns, competes, b, k, scale, **_):
    """link(t_k - best(rivals)) -> channel weights (P, width), maps (P, N) by autograd, a pair at a time"""
    weights, maps = [], []
    for i, c in zip(b.tolist(), k.tolist()):
        u = last_of(clip).ln_1(x[i:i + 1]).requires_grad_()
        t = scale * columns @ tail(clip, x[i:i + 1], u)           # (M,)
        rivals = [t[j] for j in competes[i].nonzero().flatten().tolist() if j != c]
        odds = t[c] - best(torch.stack(rivals)) if rivals else t[c]
        (gradient,) = torch.autograd.grad(link(odds), u)
        weights.append(gradient[0, 1:].mean(0))
        maps.append((u[0, 1:].detach() @ weights[-1]).relu())
    return torch.stack(weights), gradcam.min_max(torch.stack(maps)[:, None])[:, 0]


def log_sum(t):
    return t.logsumexp(0)


def test_closed_form_equals_autograd_of_the_log_odds_and_of_the_probability(clip, batch):
    want, maps = by_autograd(clip, log_sum, torch.clone, **batch)
    given = {name: value for name, value in batch.items() if name not in ("x", "grid")}
    got = gradcam.gradcam_weights(clip, gradcam.last_block(clip, batch["x"]), **given)
    assert got.dtype == torch.float64 and want.abs().amax(1).min() > 1e-6
    assert ((got - want).abs().amax(1) / want.abs().amax(1)).max() < 1e-10
    cams = gradcam.gradcam(clip, **batch)
    assert cams.shape == (4, 5, 3) and (cams.amax((1, 2)) == 1).all() and (cams.amin((1, 2)) == 0).all()
    assert_close(cams.flatten(1), maps, 1e-10)
    pairs = {**batch, "b": batch["b"][:3], "k": batch["k"][:3]}   # a class without rivals has p = 1 anywhere
    assert_close(cams[:3].flatten(1), by_autograd(clip, log_sum, torch.sigmoid, **pairs)[1], 1e-10)


def test_a_saturated_softmax_has_the_map_of_its_limit(clip, batch):
    """Scale 1e4: p is 0 or 1 and its gradient 0. The log-sum over rivals has become the nearest rival."""
    hot = {**batch, "scale": 1e4}
    assert by_autograd(clip, log_sum, torch.sigmoid, **hot)[0].abs().max() < 1e-99
    _, want = by_autograd(clip, torch.max, torch.clone, **hot)
    assert_close(gradcam.gradcam(clip, **hot).flatten(1), want, 1e-9)


def test_float32_and_autocast_are_close_to_float64(clip, batch):
    single, pairs = random_clip(clip.gelu), {**batch, "x": batch["x"].float()}
    images = torch.rand(2, 3, 32, 24)
    got, (exact, attention, _) = gradcam.gradcam(single, **pairs), gradcam.last_inputs(single, images)
    assert_close(got.double(), gradcam.gradcam(clip, **batch), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradcam.gradcam(single, **pairs), got)
        x, rough, _ = gradcam.last_inputs(single, images)
        features = [gradcam.patch_features(single, x.bfloat16(), kind) for kind in ("patch", "value")]
    assert {part.dtype for part in (x, rough, *features)} == {torch.float32}
    assert F.cosine_similarity(x, exact, dim=-1).min() > 0.99
    assert_close(rough, attention, 0.02)


def test_no_pair_and_a_map_of_nothing(clip, batch, seen):
    none, T = torch.zeros(0, dtype=torch.long), gradcam.affinity(seen[1])
    maps = gradcam.gradcam(clip, **{**batch, "b": none, "k": none})
    assert maps.shape == gradcam.refine(maps, T, none, 0.4).shape == (0, 5, 3)
    assert not gradcam.refine(torch.zeros(1, 5, 3, dtype=torch.float64), T, torch.tensor([1]), 0.4).any()
    tiny = torch.tensor([[[0.0, 1e-30], [5e-31, 0.0]]])           # the size of a gradient does not matter
    torch.testing.assert_close(gradcam.min_max(tiny), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]]))


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
    for output, entering in zip(gradcam.block_outputs(clip, images)[0], inputs[1:], strict=True):
        assert_close(output, entering[:, 1:])
    wide = gradcam.positions(clip.model.visual, 4, 8)             # columns at quarters between the old
    row = clip.model.visual.positional_embedding[1:].view(4, 4, -1)[1]
    assert_close(wide[1:].view(4, 8, -1)[1, 3], 0.75 * row[1] + 0.25 * row[2])


@pytest.mark.parametrize("size, target, grid", [
    ((375, 500), None, (24, 32)), ((333, 500), None, (21, 32)), ((366, 500), None, (23, 32)),
    ((17, 3), None, (2, 1)), ((64, 48), None, (4, 3)), ((64, 48), (100, 65), (7, 5))])
def test_any_size_is_resized_to_the_next_patches_upwards(size, target, grid):
    clip = random_clip(vision_patch_size=16)
    images = torch.rand(1, 3, *size).round()                      # bicubic overshoots hard edges
    x, _, got = gradcam.last_inputs(clip, images, layers=1, size=target)
    resized = F.interpolate(images, (16 * grid[0], 16 * grid[1]), mode="bicubic", antialias=True).clamp(0, 1)
    assert got == grid and x.shape == (1, 1 + grid[0] * grid[1], 128)
    assert_close(x, gradcam.last_inputs(clip, resized, layers=1)[0], 1e-5)


def test_features_are_clips_patches_or_each_tokens_attention_to_itself(clip, batch):
    x, visual, last = batch["x"], clip.model.visual, last_of(clip)
    want = visual.ln_post(last(x.transpose(0, 1)).transpose(0, 1)[:, 1:]) @ visual.proj
    e, patches = gradcam.readout(clip, x)
    assert_close(patches, want)
    assert_close(gradcam.patch_features(clip, x), F.normalize(want, dim=-1))
    got = gradcam.patch_features(clip, x, "value")
    for i, n in ((0, 0), (1, 7), (2, 14)):
        assert_close(e[i], tail(clip, x[i:i + 1], last.ln_1(x[i:i + 1])))
        u = last.ln_1(x[i, n + 1]).view(1, 1, -1)                 # a sequence of one token
        value = visual.ln_post(last.attn(u, u, u, need_weights=False)[0]) @ visual.proj
        assert_close(got[i, n], F.normalize(value[0, 0], dim=-1))


def naive_affinity(attention):
    A = [row[:] for row in attention.tolist()]
    n = len(A)
    for _ in range(3):
        column = [sum(A[i][j] for i in range(n)) for j in range(n)]
        A = [[A[i][j] / column[j] for j in range(n)] for i in range(n)]
        A = [[value / sum(row) for value in row] for row in A]
    return torch.tensor([[(A[i][j] + A[j][i]) / 2 for j in range(n)] for i in range(n)], dtype=torch.float64)


def naive_boxes(lit):
    """scipy's connected parts, then each part's rectangle."""
    ndimage = pytest.importorskip("scipy.ndimage")
    out = np.zeros(lit.shape, bool)
    for place in ndimage.find_objects(ndimage.label(lit, np.ones((3, 3)))[0]):
        out[place] = True
    return out


def test_boxes_equal_flood_fill():
    for share in (0.0, 0.15, 0.3, 0.45, 1.0):
        lit = torch.rand(12, 9, 14, generator=torch.Generator().manual_seed(2)) < share
        for one, box in zip(lit.numpy(), gradcam.boxes(lit).numpy()):
            assert (box == naive_boxes(one)).all()


def test_affinity_and_refine_equal_a_loop(clip, batch, seen):
    maps, T, b = gradcam.gradcam(clip, **batch), gradcam.affinity(seen[1]), batch["b"]
    for attention, got in zip(seen[1], T):
        assert_close(got, naive_affinity(attention))
    got = gradcam.refine(maps, T, b, 0.4)
    for p in range(4):
        box = naive_boxes((maps[p] > 0.4 * maps[p].max()).numpy())
        cam = (maps[p] * torch.from_numpy(box)).flatten().tolist()
        for _ in range(2):
            cam = [math.fsum(t * c for t, c in zip(row, cam)) for row in T[b[p]].tolist()]
        want = [(c - min(cam)) / (max(cam) - min(cam)) for c in cam]
        assert_close(got[p].flatten(), torch.tensor(want, dtype=torch.float64), 1e-10)
