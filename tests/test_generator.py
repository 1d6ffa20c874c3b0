"""S against the method written out for one image; names and shapes of published weights; what trains."""
import copy
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss import generator

SMALL = dict(width=24, depth=3, heads=2, patch=4, grid=4, reduction=2)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def small(classes=3, **other):
    torch.manual_seed(0)
    model = generator.DeiT(classes, **{**SMALL, **other})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)   # fresh, its attention would be uniform
    model.adaptive_attention_fusion.attn_feat_ffn[1].bias.data += 2
    model.adaptive_attention_fusion.attn_head_ffn[0].weight.data.abs_()               # its ReLU is then alive
    return model.eval()


# ---------------------------------------------------------------- maps

def naive(model, image, pool):
    """The method step by step, each head and layer on its own: fine map (C, h, w), three logits (C,)"""
    C, heads, depth, width = 3, 2, 3, 24
    d = width // heads
    x = model.patch_embed.proj(((image - MEAN) / STD)[None])[0]
    h, w = x.shape[1:]
    place = model.pos_embed[0]
    grid = place[C:].T.reshape(1, width, 4, 4)
    if (h, w) != (4, 4):
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / 4, (w + 0.1) / 4), mode="bicubic")
    x = torch.cat([model.cls_token[0] + place[:C], x.flatten(1).T + grid[0].flatten(1).T])       # (N, width)
    attention, branch = {}, {}
    for layer, block in enumerate(model.blocks):
        y = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
        qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
        o = []
        for head in range(heads):
            q, k, v = (qkv[:, part * width + head * d:part * width + (head + 1) * d] for part in range(3))
            attention[head, layer] = torch.softmax(q @ k.T / d ** 0.5, dim=1)
            o.append(attention[head, layer] @ v)
        branch[layer] = F.linear(torch.cat(o, 1), block.attn.proj.weight, block.attn.proj.bias)
        x = x + branch[layer]
        y = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)

    patches = x[C:].T.reshape(1, width, h, w)
    coarse = F.conv2d(patches, model.head.weight, model.head.bias, padding=1)[0]
    fusion = model.adaptive_attention_fusion
    order = [(head, layer) for head in range(heads) for layer in range(depth)]        # head * depth + layer
    scores = []
    for head, layer in order:
        part = branch[layer].detach()[:, head::heads]         # channels head, head + heads, ...
        part = part.max(0).values if pool == "max" else part.mean(0)
        for linear in fusion.attn_feat_ffn:
            part = F.linear(part, linear.weight, linear.bias)
        scores.append(part[0])
    narrow, wide = fusion.attn_head_ffn[0].weight, fusion.attn_head_ffn[2].weight
    weights = torch.sigmoid(wide @ torch.relu(narrow @ torch.stack(scores)))
    fused = sum(weights[i] * attention[key].detach() for i, key in enumerate(order)) / len(order)
    fine = torch.zeros(C, h * w)
    for c in range(C):
        cam = fused[c, C:] * coarse[c].flatten().clamp(min=0)
        for i in range(h * w):
            fine[c, i] = sum(fused[C + i, C + j] * cam[j] for j in range(h * w))
    return fine.view(C, h, w), (x[:C].mean(1), coarse.mean((1, 2)), fine.mean(1))


@pytest.mark.parametrize("pool,size", [("max", (16, 16)), ("max", (12, 24)), ("avg", (24, 8))])
def test_maps_and_logits_are_the_methods(pool, size):
    """And their gradients, of all weights: attention and branches are detached before they are fused."""
    model, images = small(pool=pool), torch.rand(2, 3, *size)
    maps, logits = model(images)
    assert torch.equal(model.maps(images), maps) and maps.min() >= 0 and maps.max() > 0
    naive_maps, naive_logits = zip(*(naive(model, image, pool) for image in images))
    pairs = [(maps, torch.stack(naive_maps)), *zip(logits, map(torch.stack, zip(*naive_logits)))]
    for found, want in pairs:
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
    trained = generator.parameters_to_train(model, train_backbone=True)
    factors = [torch.randn_like(found) for found, _ in pairs]
    sides = [sum((f * side).sum() for f, side in zip(factors, values)) for values in zip(*pairs)]
    for found, want in zip(*(torch.autograd.grad(side, trained) for side in sides)):
        assert want.any()
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_any_size_goes_to_the_nearest_multiple_of_the_patch():
    model, images = small(), torch.rand(1, 3, 17, 30)
    nearest = F.interpolate(images, (16, 32), mode="bilinear")
    assert torch.equal(model.maps(images), model.maps(nearest))
    assert model.maps(torch.rand(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_autocast_keeps_maps_float32_and_close():
    model, images = small(), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps, logits = model(images)
    assert maps.dtype == torch.float32 and {z.dtype for z in logits} == {torch.float32}
    assert F.cosine_similarity(maps.flatten(), model.maps(images).flatten(), dim=0) > 0.99


# ---------------------------------------------------------------- training

def test_eight_tensors_train_when_the_backbone_is_frozen():
    with torch.device("meta"):
        model = generator.DeiT(20)
    trained = generator.parameters_to_train(model)
    assert len(trained) == 8 and sum(p.numel() for p in trained) == 70_965
    everything = generator.parameters_to_train(model, train_backbone=True)
    names = {name for name, p in model.named_parameters() if not any(p is q for q in everything)}
    assert names == {"norm.weight", "norm.bias"}              # on no path to a map


@pytest.mark.parametrize("train_backbone", [False, True])
def test_what_trains_gets_a_gradient_from_the_maps_and_the_rest_rests(train_backbone):
    """A weight that trains and gets no gradient would leave DistributedDataParallel waiting."""
    model = small(drop_path=0.1).train()
    trained = generator.parameters_to_train(model, train_backbone)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.03)
    for _ in range(2):
        model.maps(torch.rand(4, 3, 16, 16)).mean().backward()
        optimizer.step()
    tokens = model.run_blocks(torch.rand(1, 3, 16, 16))[0]
    assert tokens.requires_grad == train_backbone             # no graph through a frozen ViT
    for name, parameter in model.named_parameters():
        trains = any(parameter is p for p in trained)
        assert (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, before[name]) != trains, name


def test_stochastic_depth_only_in_training():
    model, images = small(drop_path=0.5), torch.rand(4, 3, 16, 16)
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    assert torch.equal(model.maps(images), model.maps(images))
    model.train()
    assert not torch.equal(model.maps(images), model.maps(images))
    dropped = generator.Block(8, 1, 0.5).train().drop(torch.ones(2000, 3, 8))
    assert dropped.unique().tolist() == [0, 2] and abs(dropped.mean() - 1) < 0.1
    assert (dropped.amax((1, 2)) == dropped.amin((1, 2))).all()                       # a whole sample or none


# ---------------------------------------------------------------- weights

def published(classes, reduction=8, depth=12):
    """Names and shapes of WeakTr's and SemPLeS's checkpoints."""
    width, maps, fusion = 384, 6 * depth, "adaptive_attention_fusion."
    shapes = {
        "cls_token": (1, classes, width), "pos_embed": (1, classes + 196, width),
        "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "head.weight": (classes, width, 3, 3), "head.bias": (classes,),
        fusion + "attn_feat_ffn.0.weight": (8, 64), fusion + "attn_feat_ffn.0.bias": (8,),
        fusion + "attn_feat_ffn.1.weight": (1, 8), fusion + "attn_feat_ffn.1.bias": (1,),
        fusion + "attn_head_ffn.0.weight": (maps // reduction, maps),
        fusion + "attn_head_ffn.2.weight": (maps, maps // reduction)}
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width),
              "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


@pytest.mark.parametrize("classes,reduction", [(20, 8), (80, 4)])
def test_load_generator_reads_published_checkpoints_strictly(tmp_path, classes, reduction):
    state, path = published(classes, reduction), tmp_path / "weaktr.pth"
    torch.save({"model": state, "args": Namespace(lr=1e-3), "miou": np.float64(69.4)}, path)
    model = generator.load_generator(path)
    assert not model.training and model.pool == "max"
    assert model.state_dict().keys() == state.keys()
    assert all((value == 0.01).all() for value in model.state_dict().values())
    assert len(model.adaptive_attention_fusion.attn_head_ffn[0].weight) == 72 // reduction
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.save(state, path)                                   # without the wrapper
    assert generator.load_generator(path, pool="avg").pool == "avg"
    del state["blocks.7.norm2.bias"]
    torch.save(state, path)
    with pytest.raises(RuntimeError, match="blocks.7.norm2.bias"):
        generator.load_generator(path)


def test_load_generator_reads_ours_with_the_pooling_they_were_trained_with(tmp_path):
    model, images = small(pool="avg"), torch.rand(1, 3, 16, 16)
    content = {"stage": "match", "classes": list("abc"), "args": {"pool": "avg"}, "model": model.state_dict()}
    torch.save(content, tmp_path / "match.pt")
    assert torch.equal(generator.load_generator(tmp_path / "match.pt").maps(images), model.maps(images))


def test_imagenet_weights_repeat_the_class_token():
    state = {name: torch.randn_like(value) for name, value in published(1).items()
             if not name.startswith(("head.", "adaptive"))}
    with torch.device("meta"):
        model = generator.DeiT(20)
    model = model.to_empty(device="cpu")
    model.load_imagenet({**state, "head.weight": torch.ones(1000, 384), "head.bias": torch.ones(1000)})
    for c in range(20):
        assert torch.equal(model.cls_token[0, c], state["cls_token"][0, 0])
        assert torch.equal(model.pos_embed[0, c], state["pos_embed"][0, 0])
    assert torch.equal(model.pos_embed[0, 20:], state["pos_embed"][0, 1:])
    assert torch.equal(model.blocks[5].attn.qkv.weight, state["blocks.5.attn.qkv.weight"])
    with pytest.raises(RuntimeError, match="blocks.0.norm1.bias"):
        model.load_imagenet({name: value for name, value in state.items() if name != "blocks.0.norm1.bias"})
    with pytest.raises(RuntimeError, match="20 class tokens: it is a generator"):
        model.load_imagenet({**state, "cls_token": torch.ones(1, 20, 384)})
