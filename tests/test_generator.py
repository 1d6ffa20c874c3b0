"""S against a naive loop, published names and shapes, what is frozen."""
import copy
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wsss import generator as g

SMALL = dict(width=24, depth=3, heads=2, patch=4, grid=4, reduction=2)


def small(classes=3, **other):
    torch.manual_seed(0)
    model = g.DeiT(classes, **{**SMALL, **other})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)       # away from the uniform attention of a fresh network
    return model.eval()


def naive(model, images, pool):
    """Method step by step for one image, each attention map on its own -> fine map (C, h, w), logits"""
    C, heads, depth, width = 3, 2, 3, 24
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = model.patch_embed.proj(x[None])[0]
    h, w = x.shape[1:]
    place = model.pos_embed[0]
    patch_place = place[C:].T.reshape(1, width, 4, 4)
    if (h, w) != (4, 4):
        patch_place = F.interpolate(patch_place, scale_factor=((h + 0.1) / 4, (w + 0.1) / 4), mode="bicubic")
    x = torch.cat([model.cls_token[0] + place[:C], x.flatten(1).T + patch_place[0].flatten(1).T])
    N, attention, outputs = len(x), {}, {}
    for layer, block in enumerate(model.blocks):
        y = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
        qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
        o = []
        for head in range(heads):
            q, k, v = (qkv[:, part * width + head * 12:part * width + head * 12 + 12] for part in range(3))
            attention[head, layer] = torch.softmax(q @ k.T / 12 ** 0.5, dim=1)
            o.append(attention[head, layer] @ v)
        outputs[layer] = F.linear(torch.cat(o, 1), block.attn.proj.weight, block.attn.proj.bias)
        x = x + outputs[layer]
        y = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + F.linear(F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight, block.mlp.fc2.bias)
    coarse = F.conv2d(x[C:].T.reshape(1, width, h, w), model.head.weight, model.head.bias, padding=1)[0]
    ffn, squeeze = model.adaptive_attention_fusion.attn_feat_ffn, model.adaptive_attention_fusion.attn_head_ffn
    order = [(head, layer) for head in range(heads) for layer in range(depth)]        # index = head * depth + layer
    scores = []
    for head, layer in order:
        part = outputs[layer][:, head::heads]                     # channels head, head + heads, ...
        part = part.max(0).values if pool == "max" else part.mean(0)
        scores.append(F.linear(F.linear(part, ffn[0].weight, ffn[0].bias), ffn[1].weight, ffn[1].bias)[0])
    weights = torch.sigmoid(squeeze[2].weight @ torch.relu(squeeze[0].weight @ torch.stack(scores)))
    fused = sum(weights[i] * attention[key] for i, key in enumerate(order)) / 6
    fine = torch.zeros(C, h * w)
    for c in range(C):
        cam = fused[c, C:] * coarse[c].flatten().clamp(min=0)
        for i in range(h * w):
            fine[c, i] = sum(fused[C + i, C + j] * cam[j] for j in range(h * w))
    logits = x[:C].mean(1), coarse.mean((1, 2)), fine.mean(1)
    return fine.view(C, h, w), logits


@pytest.mark.parametrize("pool,size", [("max", (16, 16)), ("max", (12, 24)), ("avg", (24, 8))])
def test_maps_and_logits_equal_a_naive_loop(pool, size):
    model, images = small(pool=pool), torch.rand(2, 3, *size)
    with torch.no_grad():
        maps, logits = model(images)
        for i in range(2):
            want, want_logits = naive(model, images[i], pool)
            torch.testing.assert_close(maps[i], want, atol=1e-6, rtol=1e-4)
            for got, wanted in zip(logits, want_logits):
                torch.testing.assert_close(got[i], wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(model.maps(images), maps) and maps.min() >= 0 and maps.max() > 0


def test_any_image_size():
    assert small().maps(torch.rand(1, 3, 17, 30)).shape == (1, 3, 4, 8)               # rounded to the nearest patch
    assert small().maps(torch.rand(1, 3, 3, 3)).shape == (1, 3, 1, 1)


def published(classes, r, width=384, depth=12, maps=72):
    """Names and shapes of WeakTr's and SemPLeS's checkpoints."""
    shapes = {"cls_token": (1, classes, width), "pos_embed": (1, classes + 196, width), "patch_embed.proj.weight": (width, 3, 16, 16),
              "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
              "head.weight": (classes, width, 3, 3), "head.bias": (classes,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}.{kind}": shape for name, out, into in
                   (("norm1", width, 0), ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("norm2", width, 0),
                    ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width))
                   for kind, shape in (("weight", (out, into) if into else (out,)), ("bias", (out,)))}
    fusion = "adaptive_attention_fusion."
    shapes |= {fusion + "attn_feat_ffn.0.weight": (8, 64), fusion + "attn_feat_ffn.0.bias": (8,), fusion + "attn_feat_ffn.1.weight": (1, 8),
               fusion + "attn_feat_ffn.1.bias": (1,), fusion + "attn_head_ffn.0.weight": (maps // r, maps),
               fusion + "attn_head_ffn.2.weight": (maps, maps // r)}
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


@pytest.mark.parametrize("classes,r", [(20, 8), (80, 4)])
def test_published_checkpoints_load_strictly(tmp_path, classes, r):
    state, path = published(classes, r), tmp_path / "weaktr.pth"
    torch.save({"model": state, "epoch": 59, "args": Namespace(lr=1e-3)}, path)
    model = g.load_generator(path)
    assert model.state_dict().keys() == state.keys() and model.adaptive_attention_fusion.attn_head_ffn[0].out_features == 72 // r
    assert model.blocks[0].drop_path == 0 and model.blocks[11].drop_path == pytest.approx(0.1)
    assert all((value == 0.01).all() for value in model.state_dict().values())
    torch.save(state, path)                                       # without the wrapper
    assert g.load_generator(path, pool="avg").adaptive_attention_fusion.pool == "avg"


def test_a_wrong_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    state = published(20, 8)
    for broken, words in (({**state, "blocks.3.extra.weight": torch.ones(1)}, "blocks.3.extra.weight"),
                          ({k: v for k, v in state.items() if k != "blocks.7.norm2.bias"}, "blocks.7.norm2.bias"),
                          ({**state, "blocks.2.attn.proj.bias": torch.ones(5)}, "blocks.2.attn.proj.bias"),
                          ({"vectors": torch.ones(2)}, "not a mask generator"), ({"model": {}}, "no state dict"), ([1], "no state dict")):
        torch.save(broken, path)
        with pytest.raises(ValueError, match=words) as error:
            g.load_generator(path)
        assert "x.pth" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        g.load_generator(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="deit_huge"):
        g.build_generator("deit_huge", 20)


def test_imagenet_start_repeats_the_class_token(tmp_path):
    plain = published(1, 8)
    for name in ("cls_token", "pos_embed"):
        plain[name] = torch.randn_like(plain[name])
    plain = {k: v for k, v in plain.items() if not k.startswith(("head", "adaptive"))} | {"head.weight": torch.ones(1000, 384), "head.bias": torch.ones(1000)}
    torch.save({"model": plain}, tmp_path / "deit.pth")
    model = g.build_generator("deit_small", 20, start=tmp_path / "deit.pth")
    for name in ("cls_token", "pos_embed"):
        for c in range(20):
            assert torch.equal(getattr(model, name)[0, c], plain[name][0, 0])
    assert torch.equal(model.pos_embed[0, 20:], plain["pos_embed"][0, 1:]) and torch.equal(model.blocks[5].attn.qkv.weight, plain["blocks.5.attn.qkv.weight"])
    del plain["blocks.0.norm1.bias"]
    torch.save({"model": plain}, tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="blocks.0.norm1.bias"):
        g.build_generator("deit_small", 20, start=tmp_path / "deit.pth")


def test_what_trains_when_the_backbone_is_frozen():
    model = g.build_generator("deit_small", 20)
    trained = g.parameters_to_train(model)
    assert len(trained) == 8 and sum(p.numel() for _, p in trained) == 70_965
    everything = g.parameters_to_train(model, train_backbone=True)
    assert {n for n, _ in model.named_parameters()} - {n for n, _ in everything} == {"norm.weight", "norm.bias"}


def test_frozen_parts_have_no_gradient_and_do_not_change():
    model = small(drop_path=0.1).train()
    trained = g.parameters_to_train(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.1, weight_decay=0.03)
    for _ in range(2):
        model.maps(torch.rand(2, 3, 16, 16)).mean().backward()
        assert not model.run_blocks(torch.rand(1, 3, 16, 16))[0].requires_grad        # no graph through the ViT
        optimizer.step()
    names = {name for name, _ in trained}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in names), name


def test_every_training_weight_gets_a_gradient_from_the_maps():
    model = small(drop_path=0.1).train()
    trained = g.parameters_to_train(model, train_backbone=True)   # else DistributedDataParallel would wait for it
    model.maps(torch.rand(4, 3, 16, 16)).mean().backward()
    assert [name for name, p in trained if p.grad is None] == []


def test_drop_path_only_in_training():
    model, images = small(drop_path=0.5), torch.rand(4, 3, 16, 16)
    assert torch.equal(model.maps(images), model.maps(images))
    model.train()
    assert not torch.equal(model.maps(images), model.maps(images))
    block = g.Block(8, 1, 0.5).train()
    dropped = block.drop(torch.ones(2000, 3, 8))
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.1 and (dropped.amax((1, 2)) == dropped.amin((1, 2))).all()


def test_autocast_keeps_maps_float32_and_close():
    model, images = small(), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps, logits = model(images)
    assert maps.dtype == torch.float32 and all(x.dtype == torch.float32 for x in logits)
    assert F.cosine_similarity(maps.flatten(), model.maps(images).flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name,size", [("cnn_toy", 24), ("deit_tiny", 16)])
def test_own_checkpoints_round_trip(tmp_path, name, size):
    torch.manual_seed(0)
    model, images = g.build_generator(name, 8).eval(), torch.rand(1, 3, 96, 96)
    torch.save({"model": model.state_dict(), "stage": "cls", "classes": list("abcdefgh"), "args": {}}, tmp_path / "cls.pt")
    loaded = g.load_generator(tmp_path / "cls.pt").eval()
    assert model.maps(images).shape == (1, 8, size, size) and torch.equal(model.maps(images), loaded.maps(images))
    with pytest.raises(ValueError, match="maps 8 classes, the data folder has 3"):
        g.load_generator(tmp_path / "cls.pt", classes=list("abc"))
    with pytest.raises(ValueError, match="cls.pt: trained on other classes, its class 1 is 'b', the data folder's 'c'"):
        g.load_generator(tmp_path / "cls.pt", classes=list("acbdefgh"))


def test_toy_cnn_is_a_plain_cam_with_a_frozen_trunk():
    torch.manual_seed(0)
    model, images = g.build_generator("cnn_toy", 4).train(), torch.rand(2, 3, 96, 96)
    before = copy.deepcopy(model.state_dict())
    assert [n for n, _ in g.parameters_to_train(model)] == ["head.weight", "head.bias"]
    maps, (logits,) = model(images)
    coarse = F.conv2d(model.trunk((images - model.mean) / model.std), model.head.weight, model.head.bias, padding=1)
    assert torch.equal(maps, coarse.relu()) and torch.allclose(logits, coarse.mean((2, 3)))
    maps.mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())     # running statistics too
    assert model.trunk[0].weight.grad is None and model.head.weight.grad is not None


def test_the_shipped_backbone_starts_a_toy_generator():
    path = Path(__file__).resolve().parent.parent / "weights" / "toy_backbone.pt"
    assert path.stat().st_size < 2e6
    state = torch.load(path, weights_only=True)["model"]
    model = g.build_generator("cnn_toy", 8, start=path)
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in state.items())


def test_resnet50_trains_masks_and_infers_maps():
    """The stages see sigmoid(logits), in training and with S at rest; inference sees relu(logits); strides 2, 2, 2, 1."""
    torch.manual_seed(0)
    model, images = g.build_generator("resnet50", 3), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for mode in (True, False):
            masks, (logits,) = model.train(mode)(images)
            assert masks.shape == (1, 3, 4, 6) and 0 <= masks.min() and masks.max() <= 1
            assert torch.equal(model.maps(images), model.class_logits(images).relu()) and torch.equal(masks, model.class_logits(images).sigmoid())
            assert (model.maps(images) == 0).any()
            assert torch.allclose(logits, model.class_logits(images).mean((2, 3)))
    assert [n for n, _ in g.parameters_to_train(model)] == ["classifier.weight"]


def test_our_checkpoints_carry_their_pooling(tmp_path):
    model = g.build_generator("deit_tiny", 2, pool="avg")
    torch.save({"model": model.state_dict(), "stage": "cls", "classes": ["a", "b"], "args": {"pool": "avg"}}, tmp_path / "cls.pt")
    assert g.load_generator(tmp_path / "cls.pt").adaptive_attention_fusion.pool == "avg"
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    assert g.load_generator(tmp_path / "published.pth", pool="avg").adaptive_attention_fusion.pool == "avg"
