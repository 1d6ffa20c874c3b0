"""S against the method written out for one image; names and shapes of published weights; what trains."""
import copy
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toy import networks as toy
from wsss import generator

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def small(**other):
    torch.manual_seed(0)
    model = generator.DeiT(3, width=24, depth=3, heads=2, patch=4, grid=4, reduction=2, **other)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)       # fresh, its attention would be uniform
    model.adaptive_attention_fusion.attn_feat_ffn[1].bias.data += 2
    model.adaptive_attention_fusion.attn_head_ffn[0].weight.data.abs_()               # its ReLU is then alive
    return model.eval()


def naive(model, image, pool, from_labels):
    """The method step by step, each head and layer on its own: fine map (C, h, w), three logits (C,)"""
    C, heads, depth, width = 3, 2, 3, 24
    d = width // heads
    x = model.patch_embed.proj(((image - MEAN) / STD)[None])[0]
    h, w = x.shape[1:]
    place = model.pos_embed[0]
    grid = place[C:].T.reshape(1, width, 4, 4)
    if (h, w) != (4, 4):
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / 4, (w + 0.1) / 4), mode="bicubic")
    x = torch.cat([model.cls_token[0] + place[:C], x.flatten(1).T + grid[0].flatten(1).T])  # (N, width)
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
        part = branch[layer].detach()[:, head::heads]             # channels head, head + heads, ...
        part = part.max(0).values if pool == "max" else part.mean(0)
        for linear in fusion.attn_feat_ffn:
            part = F.linear(part, linear.weight, linear.bias)
        scores.append(part[0])
    narrow, wide = fusion.attn_head_ffn[0].weight, fusion.attn_head_ffn[2].weight
    weights = torch.sigmoid(wide @ torch.relu(narrow @ torch.stack(scores)))
    fused = sum(weights[i] * attention[key].detach() for i, key in enumerate(order)) / len(order)
    fine, given = torch.zeros(C, h * w), coarse.detach() if from_labels else coarse
    for c in range(C):
        cam = fused[c, C:] * given[c].flatten().clamp(min=0)
        for i in range(h * w):
            fine[c, i] = sum(fused[C + i, C + j] * cam[j] for j in range(h * w))
    return fine.view(C, h, w), (x[:C].mean(1), coarse.mean((1, 2)), fine.mean(1))


@pytest.mark.parametrize("pool,size,from_labels", [
    ("max", (16, 16), False), ("max", (12, 24), True), ("avg", (24, 8), False)])
def test_maps_and_logits_are_the_methods(pool, size, from_labels):
    """And their gradients, of all weights: attention and branches are detached before they are fused."""
    model, images = small(pool=pool), torch.rand(2, 3, *size)
    maps, logits = model(images, from_labels)
    assert torch.equal(model.maps(images), maps) and maps.min() >= 0 and maps.max() > 0
    naive_maps, naive_logits = zip(*(naive(model, image, pool, from_labels) for image in images))
    pairs = [(maps, torch.stack(naive_maps)), *zip(logits, map(torch.stack, zip(*naive_logits)))]
    for found, want in pairs:
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
    trained = generator.parameters_to_train(model, train_backbone=True)
    factors = [torch.randn_like(found) for found, _ in pairs]
    sides = [sum((f * side).sum() for f, side in zip(factors, values)) for values in zip(*pairs)]
    for found, want in zip(*(torch.autograd.grad(side, trained, retain_graph=True) for side in sides)):
        assert want.any()
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    # Learning from labels, the fine maps move the fusion only; in (a) and (c) they move the head as well.
    head, fusion = model.head.weight, model.adaptive_attention_fusion.attn_head_ffn[0].weight
    of_head, of_fusion = torch.autograd.grad(maps.sum() + logits[2].sum(), (head, fusion), allow_unused=True)
    assert (of_head is None) == from_labels and of_fusion.any()


def test_pixels_beyond_the_last_whole_patch_are_dropped():
    model, images = small(), torch.rand(1, 3, 19, 30)
    assert torch.equal(model.maps(images), model.maps(images[..., :16, :28]))
    enlarged = F.interpolate(images[..., :3, :9], (4, 8), mode="bilinear")    # where not one would be left
    assert torch.equal(model.maps(images[..., :3, :9]), model.maps(enlarged))


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
    assert tokens.requires_grad == train_backbone                 # no graph through a frozen ViT
    for name, parameter in model.named_parameters():
        trains = any(parameter is p for p in trained)
        assert (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, before[name]) != trains, name


def test_stochastic_depth_drops_a_whole_sample_or_none_in_training_alone():
    block, x = small(drop_path=0.5).blocks[2], torch.ones(2000, 3, 8)
    dropped = block.train().drop(x)
    assert dropped.unique().tolist() == [0, 2] and torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    assert torch.equal(block.eval().drop(x), x)


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


@pytest.mark.parametrize("classes,reduction,depth", [(20, 8, 12), (90, 4, 2)])        # VOC; COCO's ids
def test_load_generator_reads_published_checkpoints_strictly(tmp_path, classes, reduction, depth):
    state, path = published(classes, reduction, depth), tmp_path / "weaktr.pth"
    torch.save({"model": state, "args": Namespace(lr=1e-3), "miou": np.float64(69.4)}, path)
    model = generator.load_generator(path)
    assert not model.training and model.pool == "max"
    assert model.state_dict().keys() == state.keys()
    assert all((value == 0.01).all() for value in model.state_dict().values())
    if classes == 20:
        trained = generator.parameters_to_train(model)
        assert len(trained) == 8 and sum(p.numel() for p in trained) == 70_965
    del state["blocks.1.norm2.bias"]
    torch.save(state, path)                                       # without the wrapper
    with pytest.raises(RuntimeError, match="blocks.1.norm2.bias"):
        generator.load_generator(path)


def test_load_generator_reads_ours_with_the_pooling_they_were_trained_with(tmp_path, monkeypatch):
    model, images, path = small(pool="avg"), torch.rand(1, 3, 16, 16), tmp_path / "match.pt"

    def save(model):
        torch.save({"stage": "match", "classes": list("abc"), "args": {"pool": model.pool},
                    "model": model.state_dict()}, path)
    save(model)
    assert torch.equal(generator.load_generator(path).maps(images), model.maps(images))
    for other in (toy.ToyCNN(3), toy.ToyClims(3)):
        save(other)
        assert torch.equal(generator.load_generator(path).maps(images), other.eval().maps(images))
        with monkeypatch.context() as alone:                      # copied without plumbing/
            alone.setitem(sys.modules, "plumbing", None)
            with pytest.raises(ValueError, match=f"{path} is no DeiT of WeakTr's kind"):
                generator.load_generator(path)
    torch.save({name: value for name, value in model.state_dict().items() if name != "pos_embed"}, path)
    with pytest.raises(ValueError, match=f"{path} is no DeiT of WeakTr's kind, it has no pos_embed"):
        generator.load_generator(path)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    assert torch.equal(generator.load_generator(path, "avg").maps(images), model.maps(images))
