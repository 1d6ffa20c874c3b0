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


def assert_close(found, want, tolerance=1e-5):
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)


def test_resnet101_is_torchvisions_with_strides_turned_into_dilation():
    resnet = resnet101()
    model = segmenter.DeepLabV2(segmenter.dilated_resnet101(), 2048, 20, stride=8, dilations=(6, 12, 18, 24))
    model.load_backbone(resnet.state_dict())                      # strict
    model.eval()
    for layer, d in ((model.backbone.layer3, 2), (model.backbone.layer4, 4)):
        assert {(block.conv2.stride, block.conv2.dilation) for block in layer[1:]} == {((1, 1), (d, d))}
    with torch.no_grad():
        images = torch.rand(1, 3, 65, 41)
        assert model.logits(images).shape == (1, 21, 9, 6) and model(images).shape == (1, 21, 65, 41)
        x = resnet.maxpool(resnet.eval().relu(resnet.bn1(resnet.conv1(images))))
        assert torch.equal(model.backbone[:6](images), resnet.layer2(resnet.layer1(x)))
    groups = {group["lr"]: sum(w.numel() for w in group["params"]) for group in model.groups(1)}
    assert groups == {1: 42_500_160, 10: 4 * 2048 * 21 * 9, 20: 4 * 21}


def test_head_is_the_sum_of_four_dilated_convolutions():
    model, x = deeplab(), torch.randn(64, 5, 7)
    model.backbone = torch.nn.Identity()
    want = torch.zeros(4, 5, 7)
    for branch, d in zip(model.aspp, (1, 2, 4, 6)):
        branch.bias.data = torch.randn(4)
        want += branch.bias.data[:, None, None]
        for i, j, u, v in torch.cartesian_prod(*map(torch.arange, (5, 7, 3, 3))).tolist():
            y, z = i + (u - 1) * d, j + (v - 1) * d
            if 0 <= y < 5 and 0 <= z < 7:
                want[:, i, j] += branch.weight.data[:, :, u, v] @ x[:, y, z]
    assert_close(model.logits(x[None])[0], want, 1e-4)


@pytest.mark.parametrize("size,padded", [((29, 41), (29, 41)), ((30, 42), (33, 45)), ((1, 3), (1, 5))])
def test_logits_at_the_images_size_keep_the_grid_in_place(size, padded):
    """On the pixels of the grid the grid's own values, between them linear."""
    model, images = deeplab().eval(), torch.rand(2, 3, *size)
    with torch.no_grad():
        found = model(images)
        x = F.pad((images - MEAN) / STD, (0, padded[1] - size[1], 0, padded[0] - size[0]))
        grid = model.logits(x)
    assert found.shape == (2, 4, *size)
    on, between = found[..., ::4, ::4], found[..., ::4, 2::4]
    h, w = on.shape[-2:]
    assert_close(on, grid[..., :h, :w])
    assert_close(between, ((grid[..., :h, :-1] + grid[..., :h, 1:]) / 2)[..., :between.shape[-1]])


def test_training_gives_three_scales_and_their_maximum_also_of_an_empty_share():
    model, images = deeplab(), torch.rand(2, 3, 33, 65)
    model.freeze_batchnorm()

    def corners(z, size):
        return F.interpolate(z, size, mode="bilinear", align_corners=True)

    x = (images - MEAN) / STD
    want = [model.logits(corners(x, size)) for size in ((33, 65), (25, 49), (17, 33))]
    want.append(torch.maximum(want[0], torch.maximum(*(corners(z, (9, 17)) for z in want[1:]))))
    for found, z in zip(model.train()(images), want, strict=True):
        assert_close(found, z)
    sum(z.sum() for z in model(images[:0])).backward()
    assert not model.aspp[0].weight.grad.any()


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
    assert (model.backbone[1].weight.grad is None) == frozen and model.backbone[0].weight.grad is not None


def test_segmenter_is_the_cosine_of_patches_and_classes_normalised_over_the_classes():
    model, images, seen = make_segmenter(), torch.rand(2, 3, 13, 24), []      # padded with the mean colour
    model.balance.weight.data, model.balance.bias.data = torch.rand(4), torch.rand(4)
    rest, encoder = model.groups(1)
    assert (rest["lr"], encoder["lr"], len(encoder["params"])) == (1, 0.1, len([*model.encoder.parameters()]))
    assert len({*rest["params"], *encoder["params"]}) == len([*model.parameters()])
    model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    with torch.no_grad():
        found, whole = model(images), MEAN.expand(2, 3, 16, 24).clone()
        whole[..., :13, :] = images
        assert_close(found, model(whole)[..., :13, :])
    for b, tokens in enumerate(seen[0]):                          # six patches, four classes
        classes, rows = [model.class_space.weight @ y for y in tokens[6:]], []
        for p in (model.patch_space.weight @ y for y in tokens[:6]):
            cosines = torch.stack([p @ c / (p.norm() * c.norm()) for c in classes])
            spread = (cosines.var(unbiased=False) + 1e-5) ** 0.5
            rows.append((cosines - cosines.mean()) / spread * model.balance.weight + model.balance.bias)
        grid = torch.stack(rows, 1).view(1, 4, 2, 3)
        assert_close(found[b], F.interpolate(grid, (16, 24), mode="bilinear")[0, :, :13])


def test_segmenters_encoder_is_the_deit_of_the_generator_with_positions_for_any_grid():
    torch.manual_seed(0)
    size = dict(width=64, depth=2, heads=4, patch=6, grid=4, drop_path=0.0)
    other, encoder = generator.DeiT(1, reduction=2, **size).eval(), segmenter.Encoder(**size).eval()
    torch.nn.init.normal_(other.norm.weight)
    own = encoder.state_dict().keys()
    encoder.load_state_dict({name: value for name, value in other.state_dict().items() if name in own})
    images = torch.rand(2, 3, 24, 24)
    tokens, _ = encoder((images - MEAN) / STD)
    assert_close(tokens, other.norm(other.run_blocks(images)[0])[:, 1:], 1e-4)
    small = encoder.pos_embed[0, 1:].view(4, 4, 64)
    large = segmenter.resize_positions(encoder.pos_embed, (12, 12))[0, 1:].view(12, 12, 64)
    assert_close(large[1::3, 1::3], small)                        # three times: centres stay
    assert_close(large[2, 1], 2 / 3 * small[0, 0] + 1 / 3 * small[1, 0])


@pytest.mark.parametrize("kind", ["raw", "cosine"])
def test_decoder_compares_pixels_with_prototypes(kind):
    """Two classes, two background columns; logits of a grid by a loop, from V of training."""
    torch.manual_seed(0)
    W, images = F.normalize(torch.randn(4, 6), dim=1), torch.rand(2, 3, 8, 12)
    frozen = torch.nn.Conv2d(3, 5, 4, 4)                          # for CLIP's blocks: two, of 5 channels

    def encode(images):
        x = frozen(images)
        tokens = x.flatten(2).transpose(1, 2)
        return [tokens, tokens.sin()], tuple(x.shape[2:])

    model = segmenter.ClipDecoder(encode, 5, 2, W, num_classes=2, tau=0.5, width=8, logits=kind, heads=2)
    logits, coarse, v = model.train()(images)
    assert coarse.shape == (2, 3, 2, 3) and v.shape == (2, 6, 2, 3)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist():
        pixel = v[b, :, i, j]
        scale = 1 if kind == "raw" else 1 / (pixel.norm() * 0.5)  # W^T V, or cos / tau_I
        z = [sum(pixel[d] * W[n, d] for d in range(6)) * scale for n in range(4)]
        assert_close(coarse[b, :, i, j], torch.stack([(z[2].exp() + z[3].exp()).log(), *z[:2]]))
    assert_close(logits, F.interpolate(coarse, (8, 12), mode="bilinear"))
    assert_close(model.eval()(images), logits)
    (logits.sum() + v.square().sum()).backward()
    assert all(w.grad is not None for w in model.parameters()) and frozen.weight.grad is None
    assert {"prototypes", "tau"} <= model.state_dict().keys()
    assert [id(w) for w in model.groups(1)[0]["params"]] == [id(w) for w in model.parameters()]


def test_windows_overlap_and_average():
    model, images = make_segmenter(), torch.rand(1, 3, 90, 200)   # windows of 96 from 0, 64 and 104
    with torch.no_grad():
        found, total, count = segmenter.windows(model, images), torch.zeros(1, 4, 90, 200), torch.zeros(200)
        for start in (0, 64, 104):
            total[..., start:start + 96] += model(images[..., start:start + 96])
            count[start:start + 96] += 1
        assert_close(found, total / count)


def test_prediction_is_the_mean_softmax_over_scales_and_flips():
    model, images = deeplab().eval(), torch.rand(2, 3, 20, 30)
    want = torch.zeros(2, 4, 20, 30)
    with torch.no_grad():
        for size in ((10, 15), (20, 30), (30, 45)):
            for flip in (False, True):
                x = F.interpolate(images, size, mode="bilinear")
                p = F.interpolate(model(x.flip(3) if flip else x).softmax(1), (20, 30), mode="bilinear")
                want += (p.flip(3) if flip else p) / 6
    assert_close(segmenter.predict(model, images, scales=(0.5, 1.0, 1.5)), want)
    assert_close(segmenter.predict(model, images, flip=False), model(images).softmax(1))
