"""DeepLab-v2 against naive loops: stride, summed branches, three scales; Segmenter's head and encoder; Mask2Former against its library;
parameter groups; what a file of weights may be."""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same
from torchvision.models import ResNet50_Weights, ResNet101_Weights, resnet101

from wsss import generator, segmenter
from hosts import mask2former as m2f

TRUNK = ROOT / "weights/toy_backbone.pt"


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return resnet101()


@pytest.fixture(scope="module")
def deeplab(published):
    model = segmenter.build_segmenter("deeplabv2_resnet101", 20)
    model.load_backbone(published.state_dict())
    return model.eval()


def toy(classes=3, init=TRUNK):
    torch.manual_seed(0)
    return segmenter.build_segmenter("deeplab_toy", classes, init)


def normalised(model, images):
    return (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# ---------------------------------------------------------------- ResNet-101

def test_resnet101_is_torchvisions_with_strides_turned_into_dilation(published, deeplab):
    want = {f"backbone.{k}" for k in published.state_dict() if not k.startswith("fc.")}
    assert {k for k in deeplab.state_dict() if k.startswith("backbone.")} == want
    layer3, layer4 = deeplab.backbone.layer3, deeplab.backbone.layer4
    for layer, dilation in ((layer3, 2), (layer4, 4)):
        assert {m.stride for m in layer.modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}
        assert {block.conv2.dilation for block in layer[1:]} == {(dilation, dilation)}
    assert [branch.dilation for branch in deeplab.aspp] == [(d, d) for d in (6, 12, 18, 24)]
    with torch.no_grad():
        images = torch.rand(1, 3, 65, 41)
        assert deeplab.logits(images).shape == (1, 21, 9, 6) and deeplab(images).shape == (1, 21, 65, 41)
        x = published.maxpool(published.eval().relu(published.bn1(published.conv1(images))))
        assert torch.equal(deeplab.backbone[:6](images), published.layer2(published.layer1(x)))
    assert deeplab.window is None


def test_parameter_groups(deeplab, published):
    backbone, weights, biases = deeplab.groups(2.5e-4)
    assert [g["lr"] for g in (backbone, weights, biases)] == pytest.approx([2.5e-4, 2.5e-3, 5e-3])
    count = [sum(w.numel() for w in g["params"]) for g in (backbone, weights, biases)]
    assert count == [42_500_160, 4 * 2048 * 21 * 9, 4 * 21]
    assert sum(count) == sum(w.numel() for w in deeplab.parameters())
    for branch in deeplab.aspp:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.02) and not branch.bias.any()


def test_resting_batchnorm_leaves_the_groups():
    model = toy()
    before = len(model.groups(1)[0]["params"])
    model.rest_batchnorm()
    assert before - len(model.groups(1)[0]["params"]) == 2 * sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 16


# ---------------------------------------------------------------- the grid

def test_head_is_the_sum_of_four_dilated_convolutions():
    model, C = toy(), 3
    x = torch.randn(64, 5, 7)
    model.backbone = torch.nn.Identity()
    want = torch.zeros(1 + C, 5, 7)
    for branch, d in zip(model.aspp, (1, 2, 4, 6)):
        branch.bias.data = torch.randn(1 + C)
        for i in range(5):
            for j in range(7):
                want[:, i, j] += branch.bias.data
                for u in (-1, 0, 1):
                    for v in (-1, 0, 1):
                        if 0 <= i + u * d < 5 and 0 <= j + v * d < 7:
                            want[:, i, j] += branch.weight.data[:, :, u + 1, v + 1] @ x[:, i + u * d, j + v * d]
    assert torch.allclose(model.logits(x[None])[0], want, atol=1e-4)


def test_a_logit_sits_on_its_pixel():
    """What logit (i, j) looks at is centred on pixel (4 i, 4 j)."""
    model = toy().eval()
    images = torch.rand(1, 3, 161, 161, requires_grad=True)
    model.logits(images)[0, :, 19, 21].sum().backward()
    for seen, centre in ((images.grad.abs().sum((0, 1, 3)), 4 * 19), (images.grad.abs().sum((0, 1, 2)), 4 * 21)):
        seen = seen.nonzero().flatten()
        assert (seen[0] + seen[-1]).item() == 2 * centre and len(seen) < 161


@pytest.mark.parametrize("size", [(29, 41), (30, 41), (32, 42), (1, 3)])
def test_eval_logits_keep_the_grid_in_place(size):
    """At the picture's size, and on the pixels of the grid the grid's own values; between them linear."""
    model = toy().eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        found, x = model(images), normalised(model, images)
        x = F.pad(x, (0, {41: 0, 42: 3, 3: 2}[size[1]], 0, {29: 0, 30: 3, 32: 1, 1: 0}[size[0]]))
        grid = model.logits(x)
    assert found.shape == (2, 4, *size)
    assert torch.allclose(found[..., ::4, ::4], grid[..., :-(-size[0] // 4), :-(-size[1] // 4)], atol=1e-5)
    if size[1] > 40:
        assert torch.allclose(found[..., ::4, 6], (grid[..., 1] + grid[..., 2])[..., :found[..., ::4, 6].shape[-1]] / 2, atol=1e-5)


def test_training_gives_three_scales_and_their_maximum():
    model = toy()
    model.rest_batchnorm()
    images = torch.rand(2, 3, 33, 65)
    outputs = model.train()(images)
    assert [tuple(z.shape[2:]) for z in outputs] == [(9, 17), (7, 13), (5, 9), (9, 17)]
    with torch.no_grad():
        x = normalised(model, images)
        sizes = [(33, 65), (25, 49), (17, 33)]
        want = [model.logits(F.interpolate(x, size, mode="bilinear", align_corners=True)) for size in sizes]
    for found, z in zip(outputs, want):
        assert torch.allclose(found, z, atol=1e-4)
    for c, i, j in ((0, 0, 0), (1, 3, 7), (3, 8, 16), (2, 5, 5)):
        values = []
        for z in want:                                                          # bilinear, corner to corner, by hand
            y, x = i * (z.shape[2] - 1) / 8, j * (z.shape[3] - 1) / 16
            rows, columns = [(int(y), 1 - y % 1), (min(int(y) + 1, z.shape[2] - 1), y % 1)], [(int(x), 1 - x % 1), (min(int(x) + 1, z.shape[3] - 1), x % 1)]
            values.append(sum(a * b * z[1, c, r, s].item() for r, a in rows for s, b in columns))
        assert outputs[3][1, c, i, j].item() == pytest.approx(max(values), abs=1e-4)


def test_an_empty_share_of_a_batch_passes():
    model = toy()
    model.rest_batchnorm()
    sum(z.sum() for z in model.train()(torch.zeros(0, 3, 33, 33))).backward()
    assert not model.aspp[0].weight.grad.any()


# ---------------------------------------------------------------- BatchNorm

@pytest.mark.parametrize("rests", [True, False])
def test_batchnorm_rests_or_trains(rests):
    model = toy()
    if rests:
        model.rest_batchnorm()
    norms = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    outputs = model.train()(torch.rand(2, 3, 33, 33))
    assert all(torch.equal(model.state_dict()[name], value) == rests for name, value in norms.items())
    sum(z.sum() for z in outputs).backward()
    assert (model.backbone[1].weight.grad is None) == rests and model.backbone[0].weight.grad is not None


def test_synchronised_batchnorm_keeps_the_names():
    model = toy()
    shared = torch.nn.SyncBatchNorm.convert_sync_batchnorm(toy())
    assert shared.state_dict().keys() == model.state_dict().keys()
    norms = [m for m in shared.train().modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) == 8 and all(m.training for m in norms) and not any(m.training for m in shared.eval().modules())


# ---------------------------------------------------------------- weights

def save(path, **content):
    torch.save(content, path)
    return path


def test_the_toy_starts_from_the_stored_trunk(tmp_path):
    trunk = torch.load(TRUNK, weights_only=True)["model"]
    model = toy()
    for name, value in trunk.items():
        assert torch.equal(model.state_dict()[name.replace("trunk", "backbone")], value)
    assert sum(k.startswith("backbone.") for k in model.state_dict()) == len(trunk)
    torch.save({**trunk, "fc.weight": torch.zeros(3, 64)}, tmp_path / "plain.pth")                   # no wrapper, and a classifier
    assert torch.equal(toy(init=tmp_path / "plain.pth").backbone[0].weight, model.backbone[0].weight)


def test_a_whole_network_starts_another_and_comes_back(tmp_path):
    model = toy()
    path = save(tmp_path / "seg.pt", stage="seg", model=model.state_dict(), classes=["a", "b", "c"], args={"model": "deeplab_toy"})
    found = segmenter.load_segmenter(path)
    assert not found.training and all(torch.equal(found.state_dict()[k], v) for k, v in model.state_dict().items())
    torch.manual_seed(1)
    again = segmenter.build_segmenter("deeplab_toy", 3, path)
    assert torch.equal(again.aspp[0].weight, model.aspp[0].weight)
    with pytest.raises(ValueError, match=r"seg.pt does not fit this network.*aspp.0.weight"):
        toy(classes=4, init=path)


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = toy().state_dict()
    with pytest.raises(FileNotFoundError, match="nothing.pt: no such file"):
        toy(init=tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: not a checkpoint"):
        toy(init=tmp_path / "text.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        toy(init=save(tmp_path / "empty.pt", model={}))
    state["backbone.9.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="other.pt does not fit.*backbone.9.weight"):
        toy(init=save(tmp_path / "other.pt", model=state))
    with pytest.raises(ValueError, match="not a segmentation network of ours"):
        segmenter.load_segmenter(save(tmp_path / "cls.pt", stage="cls", model=state))
    with pytest.raises(ValueError, match="segmenter deeplab: not one of deeplabv2_resnet101"):
        segmenter.build_segmenter("deeplab", 3)


@pytest.mark.parametrize("module,name,file,flag", [(segmenter, "deeplabv2_resnet101", "resnet101-63fe2227.pth", "--init"), (generator, "resnet50", "resnet50-0676ba61.pth", "--backbone")])
def test_imagenet_comes_from_its_publisher_and_nothing_else_stays(monkeypatch, tmp_path, module, name, file, flag):
    """Through torch.hub's folder; a download, and a kept file, of another SHA-256 is refused and removed."""
    url, place, other = f"https://download.pytorch.org/models/{file}", tmp_path / "checkpoints" / file, tmp_path / "x.pth"
    torch.save({"fc.bias": torch.ones(3)}, other)
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda request: asked.append(request.full_url) or urlopen(other.as_uri()))
    digits = file[-12:-4]
    with pytest.raises(ValueError, match=rf'no ImageNet weights \(invalid hash value \(expected "{digits}.*put {url} at {place}, or give {flag} FILE or {flag} none'):
        module.download_imagenet(name)
    assert asked == [url] and os.listdir(tmp_path / "checkpoints") == []
    place.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{place}: its SHA-256 is not the one that begins with {digits}, as published.*it is removed: run the same command again"):
        module.download_imagenet(name)
    assert not place.exists() and asked == [url]
    monkeypatch.setitem(module.SHA256, file, hashlib.sha256(other.read_bytes()).hexdigest())
    for _ in range(2):                                                                       # downloaded, then kept
        assert module.download_imagenet(name)["fc.bias"].sum() == 3 and len(asked) == 2


def test_toys_have_no_imagenet_weights():
    with pytest.raises(ValueError, match="deeplab_toy has no ImageNet weights"):
        toy(init="imagenet")


def test_digests_are_those_of_the_names():
    for name, digest in {**segmenter.SHA256, **generator.SHA256}.items():
        assert len(digest) == 64 and digest.startswith(re.fullmatch(r".*-([0-9a-f]{8})\.pth", name)[1])
    assert {Path(url).name for url in (segmenter.DEIT_IMAGENET, generator.DEIT_IMAGENET, ResNet101_Weights.IMAGENET1K_V1.url, ResNet50_Weights.IMAGENET1K_V1.url)} == {
        *segmenter.SHA256, *generator.SHA256}


# ---------------------------------------------------------------- Segmenter

def naive_logits(model, tokens, N):
    """LayerNorm over the classes of the cosines of patches and classes, a number at a time."""
    patches = [model.patch_space.weight @ y for y in tokens[:N]]
    classes = [model.class_space.weight @ y for y in tokens[N:]]
    rows = []
    for p in patches:
        cosines = [(p @ c / (p.norm() * c.norm())).item() for c in classes]
        mean = sum(cosines) / len(cosines)
        spread = (sum((v - mean) ** 2 for v in cosines) / len(cosines) + 1e-5) ** 0.5
        rows.append([(v - mean) / spread * w.item() + b.item() for v, w, b in zip(cosines, model.balance.weight, model.balance.bias)])
    return torch.tensor(rows)


def test_segmenter_compares_patches_with_classes(monkeypatch):
    torch.manual_seed(0)
    model = segmenter.build_segmenter("segmenter_toy", 3).eval()
    model.balance.weight.data, model.balance.bias.data = torch.rand(4), torch.rand(4)
    seen = []
    model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    images = torch.rand(2, 3, 16, 24)
    enlarge, asked = F.interpolate, []
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(F, "interpolate", lambda x, size=None, **how: asked.append((tuple(size), how)) or (x if x.shape[1] == 4 else enlarge(x, size, **how)))
        grid = model(images)
        monkeypatch.undo()
        assert asked[-1] == ((16, 24), {"mode": "bilinear", "align_corners": False}) and grid.shape == (2, 4, 2, 3)
        assert torch.equal(enlarge(grid, (16, 24), mode="bilinear", align_corners=False), whole)
        for b in range(2):
            assert torch.allclose(grid[b].flatten(1).T, naive_logits(model, seen[1][b], 6), atol=1e-5)


def test_segmenters_encoder_is_the_deit_of_the_generator():
    torch.manual_seed(0)
    other = generator.DeiT(1, drop_path=0.0, **generator.TINY).eval()
    torch.nn.init.normal_(other.norm.weight)
    encoder = segmenter.Encoder(64, 2, 4, patch=6, grid=4, drop_path=0.0).eval()
    encoder.load_state_dict({k: v for k, v in other.state_dict().items() if k in encoder.state_dict()})
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        tokens, size = encoder(normalised(other, images))
        assert size == (4, 4) and torch.allclose(tokens, other.norm(other.run_blocks(images)[0])[:, 1:], atol=1e-5)


def test_noise_of_segmenter_is_of_training_alone():
    torch.manual_seed(0)
    block, x = segmenter.Block(8, 2, drop_path=0.5), torch.rand(400, 3, 8)
    kept = block.train()(x) != x
    scaled = segmenter.Block.drop(block, torch.ones(400, 1, 1)).unique()
    assert scaled.tolist() == [0, 2] and 0.6 < kept.flatten(1).any(1).float().mean() < 0.9                # two branches, each half the time
    assert torch.equal(block.eval()(x), block(x)) and not (block(x) == x).all()
    block = segmenter.Block(8, 2, dropout=0.75)
    assert segmenter.Block.drop(block.train(), torch.ones(4, 3, 8)).unique().tolist() == [0, 4] and torch.equal(block.eval()(x), block(x))


def test_deit_small_is_built_as_published():
    with torch.device("meta"):
        model = segmenter.build_segmenter("segmenter_deit_small", 20)
    blocks, layers = model.encoder.blocks, model.layers
    assert (model.patch, model.grid, len(blocks), len(layers), model.norm.normalized_shape) == (16, 30, 12, 2, (384,))
    assert {block.attn.heads for block in [*blocks, *layers]} == {6} and {block.mlp.fc1.out_features for block in [*blocks, *layers]} == {1536}
    assert [block.drop_path for block in blocks] == pytest.approx([0.1 * i / 11 for i in range(12)]) and {block.dropout for block in blocks} == {0.0}
    assert [(layer.drop_path, layer.dropout) for layer in layers] == [(0.0, 0.1)] * 2


@pytest.mark.parametrize("size", [(30, 41), (96, 96), (8, 5)])
def test_segmenter_takes_any_size(size):
    torch.manual_seed(0)
    model = segmenter.build_segmenter("segmenter_toy", 3).eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        found = model(images)
        fill = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(2, 3, 96, 96).clone()
        h, w = -(-size[0] // 8) * 8, -(-size[1] // 8) * 8
        fill[..., :size[0], :size[1]] = images
        assert found.shape == (2, 4, *size) and torch.allclose(found, model(fill[..., :h, :w])[..., :size[0], :size[1]], atol=1e-5)
        assert torch.equal(model.train()(images)[0], found)                                             # the toy has no noise


def test_windows_overlap_and_average():
    torch.manual_seed(0)
    model = segmenter.build_segmenter("segmenter_toy", 3).eval()
    images = torch.rand(1, 3, 90, 130)
    with torch.no_grad():
        found, left, right = segmenter.windows(model, images), model(images[..., :96]), model(images[..., 34:])
        assert torch.allclose(found[..., :34], left[..., :34]) and torch.allclose(found[..., 96:], right[..., 62:], atol=1e-6)
        assert torch.allclose(found[..., 34:96], (left[..., 34:] + right[..., :62]) / 2, atol=1e-6)


def test_segmenter_groups_and_bounds():
    model = segmenter.build_segmenter("segmenter_toy", 3)
    rest, encoder = model.groups(1e-4)
    assert (rest["lr"], encoder["lr"]) == pytest.approx((1e-4, 1e-5))
    assert {id(w) for w in encoder["params"]} == {id(w) for w in model.encoder.parameters()}
    assert sorted(map(id, rest["params"] + encoder["params"])) == sorted(map(id, model.parameters()))
    (model.train()(torch.rand(1, 3, 16, 16))[0] * torch.rand(4, 16, 16)).sum().backward()
    assert all(w.grad is not None for w in model.parameters())                                          # or DDP would wait for it


def test_segmenter_starts_from_deits_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    with torch.device("meta"):                                                                          # the generator's DeiT, for names and shapes
        shapes = {k: v.shape for k, v in generator.DeiT(1).state_dict().items() if not k.startswith(("head.", "adaptive"))}
    deit = {k: torch.full(shape, n / 100) for n, (k, shape) in enumerate(shapes.items())}
    published = {"model": {**deit, "head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)}}
    place = tmp_path / "checkpoints/deit_small_patch16_224-cd65a155.pth"
    place.parent.mkdir()
    torch.save(published, place)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(segmenter.SHA256, place.name, hashlib.sha256(place.read_bytes()).hexdigest())
    model = segmenter.build_segmenter("segmenter_deit_small", 20, "imagenet")
    assert model.window == (480, 320)
    state = model.encoder.state_dict()
    assert state.keys() == deit.keys() and state["pos_embed"].shape == (1, 901, 384)
    assert all(torch.equal(state[k], deit[k]) for k in state if k != "pos_embed") and torch.allclose(state["pos_embed"], deit["pos_embed"].mean())


def test_segmenter_starts_from_a_file(tmp_path):
    torch.manual_seed(0)
    deit = segmenter.Encoder(64, 3, 4, 8, 4, 0.0).state_dict()                                           # a grid of 4 x 4
    model = segmenter.build_segmenter("segmenter_toy", 3, save(tmp_path / "deit.pth", model={**deit, "head.weight": torch.zeros(2)}))
    state = model.encoder.state_dict()
    assert all(torch.equal(state[k], deit[k]) for k in deit if k != "pos_embed") and torch.equal(state["pos_embed"][:, 0], deit["pos_embed"][:, 0])
    small, large = deit["pos_embed"][0, 1:].view(4, 4, 64), state["pos_embed"][0, 1:].view(12, 12, 64)   # three times: the centres stay
    assert torch.allclose(large[1::3, 1::3], small, atol=1e-6) and torch.allclose(large[2, 1], 2 / 3 * small[0, 0] + 1 / 3 * small[1, 0], atol=1e-6)
    del deit["blocks.1.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"other.pth does not fit.*blocks.1.attn.qkv.weight"):
        segmenter.build_segmenter("segmenter_toy", 3, save(tmp_path / "other.pth", model=deit))
    with pytest.raises(ValueError, match="segmenter_toy has no ImageNet weights"):
        segmenter.build_segmenter("segmenter_toy", 3, "imagenet")


def test_a_segmenter_comes_back(tmp_path):
    torch.manual_seed(0)
    model = segmenter.build_segmenter("segmenter_toy", 3).eval()
    path = save(tmp_path / "seg.pt", stage="seg", model=model.state_dict(), classes=["a", "b", "c"], args={"model": "segmenter_toy", "crop": 48})
    images = torch.rand(1, 3, 20, 20)
    assert torch.equal(segmenter.load_segmenter(path)(images), model(images))
    assert segmenter.load_segmenter(path).window == (48, 32)                                             # the crop of its training
    assert same(segmenter.build_segmenter("segmenter_toy", 3, path).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="does not fit this network.*classes"):
        segmenter.build_segmenter("segmenter_toy", 4, path)


# ---------------------------------------------------------------- Mask2Former

@pytest.fixture(scope="module")
def library():
    pytest.importorskip("scipy")
    return pytest.importorskip("transformers")


@pytest.fixture
def mask2former(library):
    torch.manual_seed(0)
    return m2f.build_mask2former("mask2former_toy", 3)


def test_without_transformers_one_line(monkeypatch):
    for name in ("transformers", "scipy"):
        monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))                                   # there, or not here either
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"Mask2Former needs the library {name}: pip install"):
            m2f.build_mask2former("mask2former_toy", 3)
        monkeypatch.undo()


def test_swin_large_is_built_as_published(library):
    with torch.device("meta"):
        model = m2f.build_mask2former("mask2former_swin_large", 20)
    config, swin = model.network.config, model.network.config.backbone_config
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads), swin.window_size, swin.image_size) == (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 384)
    drops = [getattr(module, "drop_prob", 0) for name, module in model.named_modules() if name.endswith(".drop_path")]
    assert drops == pytest.approx([0.3 * i / 23 for i in range(24)])                                     # Swin-L of Mask2Former's own paper
    assert (config.num_labels, config.num_queries, config.decoder_layers, config.encoder_layers, config.hidden_dim, config.train_num_points) == (21, 100, 10, 6, 256, 12544)
    assert (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight) == (2, 5, 5, 0.1)


def test_scores_are_classes_times_masks():
    torch.manual_seed(0)
    classes, masks = torch.randn(1, 5, 4), torch.randn(1, 5, 2, 3)                                       # background, two classes, null
    found = m2f.semantic_logits(classes, masks).softmax(1)
    for i, j in ((0, 0), (1, 2)):
        scores = [sum((classes[0, q].exp()[c] / classes[0, q].exp().sum() / (1 + (-masks[0, q, i, j]).exp())).item() for q in range(5)) for c in range(3)]
        assert found[0, :, i, j].tolist() == pytest.approx([s / sum(scores) for s in scores], abs=1e-6)
    faint = m2f.semantic_logits(classes, masks - 9).exp()                                                # no query is sure of anything here
    want = torch.einsum("bqc,bqhw->bchw", classes.softmax(2)[..., :3], (masks - 9).sigmoid())
    assert want.max() < 0.01 and want.min() > 1e-6 and torch.allclose(faint, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(30, 41), (96, 64)])
def test_mask2former_takes_any_size(mask2former, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = mask2former.eval()(images)
        found = mask2former.eval()(images)
        assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < 0.1
        whole = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(2, 3, 96, 64).clone()
        whole[..., :size[0], :size[1]] = images
        h, w = -(-size[0] // 32) * 32, 64
        out = mask2former.network(pixel_values=normalised(mask2former, whole[..., :h, :w]))
        masks = F.interpolate(out.masks_queries_logits, (h, w), mode="bilinear", align_corners=False)
        want = torch.einsum("bqc,bqhw->bchw", out.class_queries_logits.softmax(2)[:, :, :-1], masks.sigmoid())[..., :size[0], :size[1]]
    assert found.shape == (2, 4, *size) and torch.allclose(found.exp(), want, atol=1e-5)


def test_mask2former_trains_all_its_layers(mask2former):
    images = torch.rand(2, 3, 64, 96)
    logits, classes, masks = mask2former.train()(images)
    assert logits.shape == (2, 4, 16, 24) and classes.shape == (3, 2, 10, 5) and masks.shape == (3, 2, 10, 16, 24)
    out = mask2former.network(pixel_values=normalised(mask2former, images), output_auxiliary_logits=True)
    assert torch.equal(classes[-1], out.class_queries_logits) and torch.equal(masks[0], out.auxiliary_logits[0]["masks_queries_logits"])
    (classes.square().sum() + masks.square().sum()).backward()
    resting = {name for name, w in mask2former.named_parameters() if w.grad is None}
    assert resting == {name for name, w in mask2former.named_parameters() if not w.requires_grad} and all(".swin.layernorm." in name for name in resting)
    groups = mask2former.groups(1e-4)
    assert [(g["lr"], g.get("weight_decay")) for g in groups] == [(1e-4, None), (1e-4, 0), (1e-5, None), (1e-5, 0)]
    assert sum(w.numel() for g in groups for w in g["params"]) == sum(w.numel() for w in mask2former.parameters() if w.requires_grad)
    weights = {name: w for name, w in mask2former.network.named_parameters() if w.requires_grad}
    norms = {name.removesuffix(".weight") for name, w in weights.items() if name.endswith(".weight") and w.ndim == 1}
    tables = {f"model.transformer_module.{name}.weight" for name in ("queries_embedder", "queries_features", "level_embed")}
    want = {name for name in weights if name.rpartition(".")[0] in norms or name in tables or name.endswith("relative_position_bias_table")}
    assert {id(w) for g in (groups[1], groups[3]) for w in g["params"]} == {id(weights[name]) for name in want} and tables < want
    assert {id(w) for g in groups[2:] for w in g["params"]} == {id(w) for name, w in weights.items() if ".encoder.swin." in name or ".hidden_states_norms." in name}


def test_mask2former_comes_back_without_a_network(mask2former, library, tmp_path, monkeypatch):
    path = save(tmp_path / "seg.pt", stage="seg", model=mask2former.state_dict(), classes=["a", "b", "c"], args={"model": "mask2former_toy"}, config=mask2former.config)
    assert json.loads(json.dumps(mask2former.config)) == mask2former.config
    for kind in (library.AutoConfig, library.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", None)
    images = torch.rand(1, 3, 40, 30)
    with torch.no_grad():
        content = torch.load(path, weights_only=True)
        assert torch.equal(m2f.rebuild_mask2former(content, path).eval()(images), mask2former.eval()(images))
    with pytest.raises(ValueError, match=r"seg.pt has a backbone of width 16 and depths \[1, 1, 1, 1\], mask2former_swin_large a Swin of 192"):
        m2f.rebuild_mask2former(content, path, "mask2former_swin_large")
    with pytest.raises(ValueError, match="its network has 3 classes, its list of classes 4"):
        m2f.rebuild_mask2former({**content, "classes": ["a", "b", "c", "d"]}, path)
    for asks, word in (({"_attn_implementation": "some/kernel"}, "configuration"), ({"backbone": "resnet50"}, "configuration"), ({"hidden_dim": "x"}, "configuration"),
                       ({"hidden_dim": 16384}, "more weights than the file holds")):
        with pytest.raises(ValueError, match=f"seg.pt: its .*{word}.*: train it again"):
            m2f.rebuild_mask2former({**content, "config": {**content["config"], **asks}}, path)
    del content["model"]["network.class_predictor.bias"]
    with pytest.raises(ValueError, match="seg.pt does not fit this network.*class_predictor.bias"):
        m2f.rebuild_mask2former(content, path)
    with pytest.raises(ValueError, match="toy_backbone.pt: not a Mask2Former of ours"):
        m2f.rebuild_mask2former({}, TRUNK)


def test_mask2former_starts_from_a_swin_or_from_another(library, tmp_path, monkeypatch):
    import safetensors.torch as safetensors
    torch.manual_seed(1)
    swin, rest = m2f.MASK2FORMER["mask2former_toy"]
    monkeypatch.setitem(m2f.MASK2FORMER, "mask2former_toy", ({**swin, "drop_path_rate": 0.25}, rest))     # of ours, the file's is 0
    classifier = library.SwinForImageClassification(library.SwinConfig(**swin, num_labels=7))
    classifier.save_pretrained(tmp_path / "swin")
    model = m2f.build_mask2former("mask2former_toy", 3, str(tmp_path / "swin"))
    prefix = "network.model.pixel_level_module.encoder."
    read = classifier.swin.state_dict()
    assert model.network.config.backbone_config.window_size == 6 and model.network.config.num_queries == 10
    assert model.network.config.backbone_config.drop_path_rate == 0.25
    assert all(torch.equal(model.state_dict()[f"{prefix}swin.{name}"], value) for name, value in read.items())
    assert model.origin.startswith(f"{tmp_path / 'swin'}: {len(read)} tensors read") and "class_predictor (2)" in model.origin and "left out: classifier.bias, classifier.weight" in model.origin
    assert "model.pixel_level_module.encoder (8)" in model.origin                                        # the norms of the four stages

    other = m2f.build_mask2former("mask2former_toy", 5)
    other.network.save_pretrained(tmp_path / "whole")
    model = m2f.build_mask2former("mask2former_toy", 3, str(tmp_path / "whole"))
    fresh = {"network.class_predictor.weight", "network.class_predictor.bias", "network.criterion.empty_weight"}
    assert {k for k, v in model.state_dict().items() if not torch.equal(v.flatten()[:9], other.state_dict()[k].flatten()[:9])} == fresh
    assert model.network.class_predictor.weight.shape == (5, 64) and "fresh are class_predictor (2), criterion (1); left out: nothing" in model.origin

    wide = library.SwinForImageClassification(library.SwinConfig(**{**swin, "embed_dim": 32}))
    wide.save_pretrained(tmp_path / "wide")
    content = safetensors.load_file(tmp_path / "swin/model.safetensors")
    content.pop("swin.embeddings.norm.bias")
    safetensors.save_file(content, tmp_path / "swin/model.safetensors", {"format": "pt"})
    library.SwinForImageClassification(library.SwinConfig(**{**swin, "window_size": 3})).save_pretrained(tmp_path / "shapes")
    shutil.copy(tmp_path / "wide/config.json", tmp_path / "shapes")
    edit(tmp_path / "shapes/config.json", embed_dim=16, hidden_size=128)                                 # and windows of 6
    shutil.copytree(tmp_path / "swin", tmp_path / "torn")
    (tmp_path / "torn/model.safetensors").write_bytes((tmp_path / "swin/model.safetensors").read_bytes()[:5000])
    library.Mask2FormerConfig(backbone_config=library.ResNetConfig(), **rest).save_pretrained(tmp_path / "resnet")
    reads = "transformers reads no network there"
    for init, words in (("wide", "has a backbone of width 32 .* a Swin of 16"), ("nothing", reads), ("swin", "swin lacks 1 weights.*embeddings.norm.bias"),
                        ("resnet", "has a backbone of width None"), ("torn", reads), ("shapes", reads)):
        with pytest.raises(ValueError, match=words):
            m2f.build_mask2former("mask2former_toy", 3, str(tmp_path / init))
    with pytest.raises(ValueError, match="mask2former_toy has no ImageNet weights"):
        m2f.build_mask2former("mask2former_toy", 3, "imagenet")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_download_is_named_with_its_commit(library, tmp_path):
    swin, _ = m2f.MASK2FORMER["mask2former_toy"]
    library.SwinForImageClassification(library.SwinConfig(**swin)).save_pretrained(tmp_path / "0123abc")
    model = m2f.build_mask2former("mask2former_toy", 3, "somebody/swin", find={"somebody/swin": str(tmp_path / "0123abc")}.get)
    assert model.origin.startswith("somebody/swin (0123abc): ")
