"""plumbing/networks.py: from a file, ours or published, to the network it belongs to. What is not taken is
said, what is another thing is refused in one line that names it."""
import os
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, same, weights
from test_weights import save
from torchvision.models import resnet50

from plumbing import networks
from plumbing.folders import COCO_CLASSES, VOC_CLASSES
from wsss import generator

RUN = SimpleNamespace(device=torch.device("cpu"), in_turn=lambda make: make())
TRAIN = ["--device", "cpu", "--amp", "off", "--workers", "0", "--split", "train", "--limit", "2",
         "--epochs", "1", "--batch-size", "2", "--crop", "32"]


def tiny(classes=3):
    """Weights of a DeiT for tests, under WeakTr's names."""
    torch.manual_seed(0)
    state = networks.new_generator("deit_tiny_toy", classes, "none").state_dict()
    return {name: value + 0.1 * torch.randn_like(value) for name, value in state.items()}


def refusal(load, *args):
    """The line of the ValueError that load(*args) raises."""
    with pytest.raises(ValueError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def read(monkeypatch):
    """read(content) -> the path of a file that holds `content`, too large to write in a test."""
    def keep(content):
        monkeypatch.setattr(networks.weights, "read", lambda path: content)
        return "large.pth"
    return keep


# ---------------------------------------------------------------- generators

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}               # of COCO's ids 1..90, these stand for nothing


def test_of_a_coco_generators_90_ids_the_80_in_use_are_mapped(tmp_path):
    state, images = tiny(90), torch.rand(2, 3, 24, 24)
    path = save(tmp_path / "coco.pth", {"model": state, "epoch": 1})
    full = networks.load_generator(path, RUN, pool="avg").eval()
    used = networks.load_generator(path, RUN, COCO_CLASSES, "avg").eval()
    rows = [id - 1 for id in range(1, 91) if id not in GAPS]
    # person is id 1, stop sign 13, after the first gap, toothbrush 90
    named = [rows[COCO_CLASSES.index(name)] for name in ("person", "stop sign", "toothbrush")]
    assert named == [0, 12, 89]
    with torch.no_grad():
        (maps, logits), (maps80, logits80) = full(images), used(images)
    assert maps80.shape[1] == 80 and torch.equal(maps80, maps[:, rows])
    assert all(torch.equal(a, b[:, rows]) for a, b in zip(logits80, logits))
    own = save(tmp_path / "match.pt", {"model": used.state_dict(), "stage": "match", "classes": COCO_CLASSES,
                                       "args": {"pool": "avg"}})
    again = networks.load_generator(own, RUN, COCO_CLASSES).eval()            # after a training of ours
    assert torch.equal(again.maps(images), maps80)
    for file in (path, own):                                  # also by the file that copies alone
        assert torch.equal(generator.load_generator(file, "avg").maps(images), maps80)
    others = [f"my{n}" for n in range(80)]
    assert "80, not named as COCO's" in refusal(networks.load_generator, path, RUN, others, "avg")
    assert "give --pool avg" in refusal(networks.load_generator, path, RUN, COCO_CLASSES)


def irn(state):
    """A ResNet-50 as IRN and CLIMS save it: each tensor under resnet50, stage1..4 and backbone."""
    copies = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        stage = max(0, int(layer[-1]) - 1) if layer.startswith("layer") else 0
        place = {"conv1": 0, "bn1": 1, "layer1": 4}.get(layer, 0)
        for prefix in (f"resnet50.{layer}", f"stage{stage + 1}.{place}", f"backbone.{stage}.{place}"):
            copies[f"{prefix}.{rest}"] = value
    return copies


def test_a_clims_file_and_its_maps(read, capsys):
    """And torchvision's file, of which such a generator starts."""
    torch.manual_seed(0)
    resnet = resnet50().eval()
    for norm in (m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    whole = resnet.state_dict()
    started = networks.new_generator("resnet50", 20, read(whole))
    assert same({**started.backbone.state_dict(), **resnet.fc.state_dict(prefix="fc.")}, whole)
    line = "large.pth: resnet50's backbone, 320 tensors; left out: its classifier fc.weight, fc.bias\n"
    assert capsys.readouterr().out == line

    state = {name: value for name, value in whole.items() if not name.startswith("fc.")}
    last = torch.randn(20, 2048, 1, 1) * 0.05
    copies = {**irn(state), "classifier.weight": last, "newly_added.0.weight": last}
    S = networks.load_generator(read(copies), RUN, VOC_CLASSES).eval()
    line = f"large.pth: ResNet-50 as in CLIMS, 20 classes; left out: {2 * 318 + 1} copies that agree\n"
    assert capsys.readouterr().out == line
    images = torch.rand(1, 3, 36, 40)
    with torch.no_grad():
        x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        x = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        x = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))))
        first = resnet.layer4[0]
        first.conv2.stride = first.downsample[0].stride = (1, 1)
        x = resnet.layer4(resnet.layer3(x))
        torch.testing.assert_close(S.maps(images), F.conv2d(x, last).relu(), atol=1e-4, rtol=1e-4)
    message = refusal(networks.load_generator, read({**copies, "resnet50.fc.bias": last}), RUN)
    assert "does not fit" in message and "fc.bias" in message
    copies["stage3.0.5.conv1.weight"] = torch.ones(2)
    message = refusal(networks.load_generator, read(copies), RUN)
    assert "stage3.0.5.conv1.weight differs from its other copy backbone.layer3.5.conv1.weight" in message


def test_wrong_files_are_refused_by_what_they_are(tmp_path):
    state, path = tiny(), tmp_path / "wrong.pth"
    no_fusion = {name: value for name, value in state.items() if "fusion" not in name}
    cases = (
        ({**state, "blocks.1.attn.qkv.bias": torch.full((192,), float("nan"))}, "attn.qkv.bias holds NaN"),
        ({**state, "head.weight": state["head.weight"][:2]}, "head.bias"),
        ({**state, "extra.weight": torch.ones(1)}, "extra.weight"),
        (no_fusion, "weights of a classifier or backbone: they go to train_cls.py --backbone"),
        ({"other": torch.ones(1)}, "not a mask generator (no head with attention fusion and no classifier"))
    for content, words in cases:
        message = refusal(networks.load_generator, save(path, {"model": content}), RUN)
        assert message.startswith(f"{path}") and words in message, message
    prompts = {"model": {"vectors": torch.ones(3, 4, 5)}, "stage": "prompts", "classes": [], "args": {}}
    message = refusal(networks.load_generator, save(path, prompts), RUN)
    assert "of stage 'prompts': give a cls.pt, match.pt or refine.pt" in message


def test_stages_start_from_a_published_generator_and_keep_its_pooling(voc, tmp_path, tiny_clip):
    """Of WeakTr's file with all its wrappers."""
    state, wrong = tiny(), save(tmp_path / "voc20.pth", tiny(20))
    path = save(tmp_path / "weaktr.pth", {
        "model": {f"module.{name}": value.half() for name, value in state.items()}, "optimizer": {},
        "args": Namespace(lr=1e-3, pool_type="max"), "model_ema": {"x": torch.ones(1)}})
    own = ["--data", voc, "--out", tmp_path, *TRAIN]
    done = call("train_cls.py", *own, "--init", path, "--pool", "avg")
    assert done.returncode == 0 and done.stdout.startswith(f"{path}: DeiT"), done.stderr
    assert ("3 classes; left out: 'model' around it, optimizer, args, model_ema beside it, module. before "
            "every name") in done.stdout
    assert same(weights(tmp_path / "cls.pt"), {name: value.half().float() for name, value in state.items()})
    refused(call("train_cls.py", *own, "--init", path, "--pool", "max"), "--pool avg (now max)")
    clip = ["--clip", tiny_clip]
    done = call("train_match.py", *own, *clip, "--pool", "max")
    refused(done, "trained with --pool avg: leave --pool max out")
    assert call("train_match.py", *own, *clip).returncode == 0
    assert generator.load_generator(tmp_path / "match.pt").pool == "avg"      # what it trained with
    for script, more in {"train_prompt.py": [], "train_refine.py": ["--prompts", "random"]}.items():
        refused(call(script, *own, *clip, *more, "--init", wrong), "maps 20 classes, the data folder has 3")
        done = call(script, *own, *clip, *more, "--init", path)
        assert done.returncode == 0 and f"{path}: DeiT" in done.stdout, done.stderr


# ---------------------------------------------------------------- segmentation networks

# Of each layer of deeplab-pytorch's ResNet-101: blocks, width, channels, stride, dilation.
CAFFE = (3, 64, 256, 1, 1), (4, 128, 512, 2, 1), (23, 256, 1024, 1, 2), (3, 512, 2048, 1, 4)


def caffe_resnet(images):
    """That network written out, RGB in [0, 1] -> features; its random weights, under its names."""
    state = {"base.aspp.c0.weight": torch.ones(1), "base.aspp.c0.bias": torch.ones(1)}

    def layer(x, name, channels, side, **where):
        weight = torch.randn(channels, x.shape[1], side, side) * (x.shape[1] * side ** 2) ** -0.5
        norm = {"running_mean": 0, "running_var": 0.5, "weight": 0.5, "bias": 0}
        norm = {part: low + 0.5 * torch.rand(channels) for part, low in norm.items()}
        state.update({f"base.{name}.conv.weight": weight},
                     **{f"base.{name}.bn.{part}": value for part, value in norm.items()})
        return F.batch_norm(F.conv2d(x, weight, **where), *norm.values())

    x = 255 * images.flip(1) - torch.tensor([104.008, 116.669, 122.675]).view(3, 1, 1)        # BGR
    x = layer(x, "layer1.conv1", 64, 7, stride=2, padding=3).relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for n, (blocks, width, channels, stride, dilation) in enumerate(CAFFE, 2):
        for i in range(1, blocks + 1):
            block, step = f"layer{n}.block{i}", stride if i == 1 else 1
            y = layer(x, f"{block}.reduce", width, 1, stride=step).relu()
            y = layer(y, f"{block}.conv3x3", width, 3, padding=dilation, dilation=dilation).relu()
            short = layer(x, f"{block}.shortcut", channels, 1, stride=step) if i == 1 else x
            x = (layer(y, f"{block}.increase", channels, 1) + short).relu()
    return x, state


@torch.no_grad()
def test_a_deeplab_of_caffes_names_is_the_same_network(read):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56)
    want, state = caffe_resnet(images)
    model = networks.new_segmenter("deeplabv2_resnet101_caffe", 3, read(state)).eval()
    assert want.shape == (2, 2048, 6, 8) and (want > 0).float().mean() > 0.1
    found = model.backbone((images - model.mean) / model.std)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * want.max().item())
    del state["base.layer4.block7.increase.bn.bias"]
    message = refusal(networks.new_segmenter, "deeplabv2_resnet101_caffe", 3, read(state))
    assert "large.pth does not fit this network: " in message and "layer3.6.bn3.bias" in message


@pytest.mark.parametrize("name", ["deeplab_toy", "segmenter_toy"])
def test_a_segmenter_comes_back_and_starts_another(name, tmp_path):
    torch.manual_seed(0)
    model, images = networks.new_segmenter(name, 3).eval(), torch.rand(1, 3, 20, 20)
    path = save(tmp_path / "seg.pt", {"model": model.state_dict(), "stage": "seg", "classes": list("abc"),
                                      "args": {"model": name, "crop": 48}})
    again = networks.load_segmenter(path, RUN)
    assert not again.training and torch.equal(again(images), model(images))
    assert again.window == (None if name == "deeplab_toy" else (48, 32))      # the crop of its training
    assert same(networks.new_segmenter(name, 3, path).state_dict(), model.state_dict())
    assert "seg.pt does not fit this network: " in refusal(networks.new_segmenter, name, 4, path)
    message = refusal(networks.new_segmenter, name, 3, path, list("acb"))
    assert "seg.pt was trained on other classes" in message
    assert "no ImageNet weights: give the file" in refusal(networks.new_segmenter, name, 3, "imagenet")


@pytest.mark.parametrize("logits", ["raw", "cosine"])
def test_vpls_decoder_comes_back_on_its_clip_alone(tiny_clip, tmp_path, logits):
    torch.manual_seed(0)
    clip, W = networks.load_clip(tiny_clip, RUN, vit=True), F.normalize(torch.randn(5, 16), dim=1)
    prototypes = {"model": {"prototypes": W}, "classes": list("abc"), "tau_i": 0.03}
    model, images = networks.new_decoder(clip, prototypes, 16, logits).eval(), torch.rand(1, 3, 32, 24)
    path = save(tmp_path / "seg.pt", {
        "model": model.state_dict(), "stage": "seg", "classes": list("abc"), "clip": clip.fingerprint(),
        "args": {"model": "clip_decoder", "clip": str(tiny_clip), "clip_gelu": None, "width": 16,
                 "logits": logits}})
    assert torch.equal(networks.load_segmenter(path, RUN)(images), model(images))
    other = torch.load(tiny_clip, weights_only=True)
    other["text_projection"] = other["text_projection"] * 2
    other = save(tmp_path / "other.pt", other)
    message = refusal(networks.load_segmenter, path, RUN, other)
    assert "was trained on another CLIP than" in message and "--clip" in message


# ---------------------------------------------------------------- CLIP

def test_clip_files(tiny_clip, tmp_path, capsys):
    """Bare or wrapped, in half precision; others are refused by what they are."""
    state, path = torch.load(tiny_clip, weights_only=True), tmp_path / "clip.pt"
    half = {name: value.half() for name, value in state.items()}
    numbers = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(77)}
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in half.items()}}
    assumed = "a state dict, QuickGELU (assumed; else --clip-gelu plain)"
    for content, gelu, said in (({**half, **numbers}, None, assumed),
                                (wrapped, "quick", "open_clip's, QuickGELU")):
        clip = networks.load_clip(save(path, content), RUN, vit=True, gelu=gelu)
        assert same(clip.model.state_dict(), {name: value.float() for name, value in half.items()})
        assert capsys.readouterr().out.startswith(f"{path}: CLIP, {said}, ViT of 8 px patches, 16 px")
    less = {name: value for name, value in state.items() if name != "ln_final.bias"}
    for content, words in ((less, "ln_final.bias"), ({**state, "extra": torch.ones(1)}, "extra"),
                           ({**state, "visual.proj": torch.ones(64, 9)}, "visual.proj"),
                           ({**state, "logit_scale": torch.tensor(float("nan"))}, "logit_scale holds NaN"),
                           (tiny(), "does not fit")):
        message = refusal(networks.load_clip, save(path, content), RUN)
        assert message.startswith(f"{path}") and words in message


def test_a_downloaded_clip_of_another_checksum_does_not_stay(tmp_path, monkeypatch):
    """OpenAI's own package downloads a file of ours in place of theirs; and there is no connection at all."""
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    (tmp_path / digest).mkdir()
    other = tmp_path / digest / "ViT-B-32.pt"
    other.write_bytes(b"another file")
    for address, reason in ((other, "SHA256"), (tmp_path / "none", "No such file")):
        monkeypatch.setitem(networks.openais(), "ViT-B/32", address.as_uri())
        with pytest.raises(FileNotFoundError, match=rf"CLIP ViT-B/32: download failed \(.*{reason}") as error:
            networks.load_clip("ViT-B/32", RUN)
        assert re.search("; put file:.* or give --clip its path$", str(error.value))        # one line
        assert os.listdir(tmp_path / ".cache/clip") == []
