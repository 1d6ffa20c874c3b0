"""DeepLab-v2, Segmenter and VPL's decoder against loops: the grid, the heads, the losses' outputs; windows,
scales and flips; parameter groups."""
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet101

from toy import networks as toy
from wsss import generator, segmenter

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def deeplab():
    """The toy's, with statistics of random images."""
    torch.manual_seed(0)
    model = toy.deeplab_toy(3)
    model(torch.rand(8, 3, 65, 65))
    return model


def make_segmenter():
    torch.manual_seed(0)
    return toy.segmenter_toy(3).eval()


# ---------------------------------------------------------------- ResNet-101

@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return resnet101()


def test_resnet101_is_torchvisions_with_strides_turned_into_dilation(resnet):
    model = segmenter.DeepLabV2(segmenter.dilated_resnet101(), 2048, 20, stride=8, dilations=(6, 12, 18, 24))
    model.load_backbone(resnet.state_dict())                  # strict
    model.eval()
    for layer, dilation in ((model.backbone.layer3, 2), (model.backbone.layer4, 4)):
        assert {m.stride for m in layer.modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}
        assert {block.conv2.dilation for block in layer[1:]} == {(dilation, dilation)}
    with torch.no_grad():
        images = torch.rand(1, 3, 65, 41)
        assert model.logits(images).shape == (1, 21, 9, 6) and model(images).shape == (1, 21, 65, 41)
        x = resnet.maxpool(resnet.eval().relu(resnet.bn1(resnet.conv1(images))))
        assert torch.equal(model.backbone[:6](images), resnet.layer2(resnet.layer1(x)))
    backbone, weights, biases = model.groups(2.5e-4)
    assert [group["lr"] for group in (backbone, weights, biases)] == pytest.approx([2.5e-4, 2.5e-3, 5e-3])
    count = [sum(w.numel() for w in group["params"]) for group in (backbone, weights, biases)]
    assert count == [42_500_160, 4 * 2048 * 21 * 9, 4 * 21]
    for branch in model.aspp:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.02) and not branch.bias.any()


# ---------------------------------------------------------------- DeepLab-v2

def test_head_is_the_sum_of_four_dilated_convolutions():
    model, x = deeplab(), torch.randn(64, 5, 7)
    model.backbone = torch.nn.Identity()
    want = torch.zeros(4, 5, 7)
    for branch, d in zip(model.aspp, (1, 2, 4, 6)):
        branch.bias.data = torch.randn(4)
        for i in range(5):
            for j in range(7):
                want[:, i, j] += branch.bias.data
                for u in (-1, 0, 1):
                    for v in (-1, 0, 1):
                        y, z = i + u * d, j + v * d
                        if 0 <= y < 5 and 0 <= z < 7:
                            want[:, i, j] += branch.weight.data[:, :, u + 1, v + 1] @ x[:, y, z]
    torch.testing.assert_close(model.logits(x[None])[0], want, atol=1e-4, rtol=0)


def test_a_logit_sits_on_its_pixel():
    """What logit (i, j) looks at is centred on pixel (4 i, 4 j)."""
    images = torch.rand(1, 3, 161, 161, requires_grad=True)
    deeplab().eval().logits(images)[0, :, 19, 21].sum().backward()
    seen = images.grad.abs().sum((0, 1))
    for side, centre in ((seen.sum(1), 4 * 19), (seen.sum(0), 4 * 21)):
        at = side.nonzero().flatten()
        assert (at[0] + at[-1]).item() == 2 * centre and len(at) < 161


@pytest.mark.parametrize("size,padded", [((29, 41), (29, 41)), ((30, 42), (33, 45)), ((1, 3), (1, 5))])
def test_logits_at_the_images_size_keep_the_grid_in_place(size, padded):
    """On the pixels of the grid the grid's own values, between them linear."""
    model, images = deeplab().eval(), torch.rand(2, 3, *size)
    with torch.no_grad():
        found = model(images)
        x = F.pad((images - MEAN) / STD, (0, padded[1] - size[1], 0, padded[0] - size[0]))
        grid = model.logits(x)
    assert found.shape == (2, 4, *size)
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    torch.testing.assert_close(found[..., ::4, ::4], grid[..., :h, :w], atol=1e-5, rtol=0)
    between = found[..., ::4, 2::4]
    want = (grid[..., :h, :-1] + grid[..., :h, 1:]) / 2
    torch.testing.assert_close(between, want[..., :between.shape[-1]], atol=1e-5, rtol=0)


def test_training_gives_three_scales_and_their_maximum():
    model, images = deeplab(), torch.rand(2, 3, 33, 65)
    model.freeze_batchnorm()
    with torch.no_grad():
        outputs = model.train()(images)
        x, want = (images - MEAN) / STD, []
        for size in ((33, 65), (25, 49), (17, 33)):
            want.append(model.logits(F.interpolate(x, size, mode="bilinear", align_corners=True)))
    assert len(outputs) == 4
    for found, z in zip(outputs, want):
        torch.testing.assert_close(found, z, atol=1e-5, rtol=0)
    for c, i, j in ((0, 0, 0), (1, 3, 7), (3, 8, 16), (2, 5, 5)):
        values = [bilinear(z[1, c], i * (z.shape[2] - 1) / 8, j * (z.shape[3] - 1) / 16) for z in want]
        assert outputs[3][1, c, i, j].item() == pytest.approx(max(values), abs=1e-5)


def bilinear(z, y, x):
    total = 0
    for r in range(z.shape[0]):
        for s in range(z.shape[1]):
            total += max(0, 1 - abs(r - y)) * max(0, 1 - abs(s - x)) * z[r, s].item()
    return total


@pytest.mark.parametrize("frozen", [True, False])
def test_batchnorm_is_frozen_or_trains(frozen):
    model = deeplab()
    before = len(model.groups(1)[0]["params"])
    if frozen:
        model.freeze_batchnorm()
    norms = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    sum(z.sum() for z in model.train()(torch.rand(2, 3, 33, 33))).backward()
    assert len(norms) == 16 and before - len(model.groups(1)[0]["params"]) == 16 * frozen
    assert all(torch.equal(model.state_dict()[name], value) == frozen for name, value in norms.items())
    assert (model.backbone[1].weight.grad is None) == frozen
    assert model.backbone[0].weight.grad is not None


def test_an_empty_share_of_a_batch_passes():
    model = deeplab()
    model.freeze_batchnorm()
    sum(z.sum() for z in model.train()(torch.zeros(0, 3, 33, 33))).backward()
    assert not model.aspp[0].weight.grad.any()


# ---------------------------------------------------------------- Segmenter

def test_segmenter_is_the_cosine_of_patches_and_classes_normalised_over_the_classes():
    model, images, seen = make_segmenter(), torch.rand(2, 3, 16, 24), []
    model.balance.weight.data, model.balance.bias.data = torch.rand(4), torch.rand(4)
    model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    with torch.no_grad():
        found = model(images)
    for b, tokens in enumerate(seen[0]):                      # six patches, four classes
        patches = [model.patch_space.weight @ y for y in tokens[:6]]
        classes = [model.class_space.weight @ y for y in tokens[6:]]
        rows = []
        for p in patches:
            cosines = torch.stack([p @ c / (p.norm() * c.norm()) for c in classes])
            spread = (cosines.var(unbiased=False) + 1e-5) ** 0.5
            rows.append((cosines - cosines.mean()) / spread * model.balance.weight + model.balance.bias)
        grid = torch.stack(rows, 1).view(1, 4, 2, 3)
        want = F.interpolate(grid, (16, 24), mode="bilinear")[0]
        torch.testing.assert_close(found[b], want, atol=1e-5, rtol=0)


def test_segmenters_encoder_is_the_deit_of_the_generator():
    torch.manual_seed(0)
    size = dict(width=64, depth=2, heads=4, patch=6, grid=4, drop_path=0.0)
    other = generator.DeiT(1, reduction=2, **size).eval()
    torch.nn.init.normal_(other.norm.weight)
    encoder = segmenter.Encoder(**size).eval()
    own = encoder.state_dict().keys()
    encoder.load_state_dict({name: value for name, value in other.state_dict().items() if name in own})
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        tokens, grid = encoder((images - MEAN) / STD)
        want = other.norm(other.run_blocks(images)[0])[:, 1:]
    assert grid == (4, 4)
    torch.testing.assert_close(tokens, want, atol=1e-5, rtol=1e-5)


def test_segmenter_is_built_as_published():
    with torch.device("meta"):
        model = segmenter.Segmenter(20)
    blocks, layers = model.encoder.blocks, model.layers
    assert (model.patch, model.grid, model.window, len(blocks), len(layers)) == (16, 30, (480, 320), 12, 2)
    assert {block.attn.heads for block in [*blocks, *layers]} == {6}
    assert [block.drop_path for block in blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert [(layer.drop_path, layer.dropout) for layer in layers] == [(0.0, 0.1)] * 2


def test_noise_is_of_training_alone():
    x = torch.ones(400, 3, 8)
    for noise, values in ({"drop_path": 0.5}, [0, 2]), ({"dropout": 0.75}, [0, 4]):
        block = segmenter.Block(8, 2, **noise).train()
        assert block.drop(x).unique().tolist() == values and not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("size", [(30, 41), (8, 5)])
def test_segmenter_pads_any_size_with_the_mean_colour(size):
    model, images = make_segmenter(), torch.rand(2, 3, *size)
    h, w = -(-size[0] // 8) * 8, -(-size[1] // 8) * 8
    whole = MEAN.expand(2, 3, h, w).clone()
    whole[..., :size[0], :size[1]] = images
    with torch.no_grad():
        found = model(images)
        torch.testing.assert_close(found, model(whole)[..., :size[0], :size[1]], atol=1e-5, rtol=0)
        assert torch.equal(model.train()(images)[0], found)   # the toy's has no noise


def test_segmenter_groups_hold_all_weights_and_all_learn():
    model = make_segmenter().train()
    rest, encoder = model.groups(1e-4)
    assert (rest["lr"], encoder["lr"]) == pytest.approx((1e-4, 1e-5))
    assert {id(w) for w in encoder["params"]} == {id(w) for w in model.encoder.parameters()}
    assert sorted(map(id, rest["params"] + encoder["params"])) == sorted(map(id, model.parameters()))
    (model(torch.rand(1, 3, 16, 16))[0] * torch.rand(4, 16, 16)).sum().backward()
    assert all(w.grad is not None for w in model.parameters())                # DDP would wait for it


def test_segmenter_resizes_the_positions_of_a_deit():
    torch.manual_seed(0)
    state = segmenter.Encoder(64, 3, 4, 8, 4, 0.0).state_dict()                       # a grid of 4 x 4
    model = toy.segmenter_toy(3)
    model.load_backbone({**state, "head.weight": torch.zeros(2), "head.bias": torch.zeros(2)})
    own = model.encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items() if name != "pos_embed")
    assert torch.equal(own["pos_embed"][:, 0], state["pos_embed"][:, 0])              # the class token's
    small, large = state["pos_embed"][0, 1:].view(4, 4, 64), own["pos_embed"][0, 1:].view(12, 12, 64)
    torch.testing.assert_close(large[1::3, 1::3], small, atol=1e-6, rtol=0)   # three times: centres stay
    want = 2 / 3 * small[0, 0] + 1 / 3 * small[1, 0]
    torch.testing.assert_close(large[2, 1], want, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- VPL's decoder

def test_decoder_compares_pixels_with_prototypes():
    """Two classes, two background columns; logits of a grid by a loop, from V of training."""
    torch.manual_seed(0)
    W = F.normalize(torch.randn(4, 6), dim=1)
    frozen = torch.nn.Conv2d(3, 5, 4, 4)                      # for CLIP's blocks: two, of 5 channels

    def encode(images):
        x = frozen(images)
        tokens = x.flatten(2).transpose(1, 2)
        return [tokens, tokens.sin()], tuple(x.shape[2:])

    model = segmenter.ClipDecoder(encode, 5, 2, W, num_classes=2, tau=0.5, width=8, heads=2)
    images = torch.rand(2, 3, 8, 12)
    logits, coarse, v = model.train()(images)
    assert logits.shape == (2, 3, 8, 12) and coarse.shape == (2, 3, 2, 3) and v.shape == (2, 6, 2, 3)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                cosines = [(v[b, :, i, j] @ W[n] / v[b, :, i, j].norm() / 0.5) for n in range(4)]
                background = (cosines[2].exp() + cosines[3].exp()).log()
                want = torch.stack([background, *cosines[:2]])
                torch.testing.assert_close(coarse[b, :, i, j], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, F.interpolate(coarse, (8, 12), mode="bilinear"))
    torch.testing.assert_close(model.eval()(images), logits)
    (logits.sum() + v.square().sum()).backward()
    assert all(w.grad is not None for w in model.parameters()) and frozen.weight.grad is None
    assert {"prototypes", "tau"} <= model.state_dict().keys()
    assert [id(w) for w in model.groups(1)[0]["params"]] == [id(w) for w in model.parameters()]


# ---------------------------------------------------------------- prediction

def test_windows_overlap_and_average():
    model, images = make_segmenter(), torch.rand(1, 3, 90, 130)       # windows of 96 from 0 and 34
    with torch.no_grad():
        found = segmenter.windows(model, images)
        left, right = model(images[..., :96]), model(images[..., 34:])
    torch.testing.assert_close(found[..., :34], left[..., :34], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[..., 96:], right[..., 62:], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[..., 34:96], (left[..., 34:] + right[..., :62]) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length,side,stride,begins", [
    (5, 5, 2, [0]), (6, 5, 2, [0, 1]), (9, 5, 2, [0, 2, 4]), (10, 5, 2, [0, 2, 4, 5]), (3, 5, 2, [0])])
def test_windows_begin_every_stride_and_end_at_the_edge(length, side, stride, begins):
    assert segmenter.starts(length, side, stride) == begins


def test_prediction_is_the_mean_softmax_over_scales_and_flips():
    model, images = deeplab().eval(), torch.rand(2, 3, 20, 30)
    want = torch.zeros(2, 4, 20, 30)
    with torch.no_grad():
        for size in ((10, 15), (20, 30), (30, 45)):
            for flip in (False, True):
                x = F.interpolate(images, size, mode="bilinear")
                p = model(x.flip(3) if flip else x).softmax(1)
                p = F.interpolate(p, (20, 30), mode="bilinear")
                want += (p.flip(3) if flip else p) / 6
    found = segmenter.predict(model, images, scales=(0.5, 1.0, 1.5))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    single = segmenter.predict(model, images, flip=False)
    torch.testing.assert_close(single, model(images).softmax(1), atol=1e-6, rtol=0)
