"""DeepLab-v2 against naive loops: stride, summed branches, three scales; parameter groups; what a file of weights may be."""
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torchvision.models import resnet101

from wsss import segmenter

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


def test_imagenet_comes_from_torchvision(monkeypatch, published):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, check_hash: {"asked": url, "hash": check_hash, **published.state_dict()})
    state = segmenter.download_imagenet("deeplabv2_resnet101")
    assert state.pop("asked") == "https://download.pytorch.org/models/resnet101-63fe2227.pth" and state.pop("hash") is True
    with pytest.raises(ValueError, match="deeplab_toy has no ImageNet weights"):
        toy(init="imagenet")

    def offline(url, check_hash):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"not known.*put https://\S+63fe2227.pth at /\S+/checkpoints/resnet101-63fe2227.pth, or give --init FILE or --init none"):
        segmenter.download_imagenet("deeplabv2_resnet101")
