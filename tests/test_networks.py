"""plumbing/networks.py: from a file, ours or published, to the network it belongs to. What is not taken is
said, what is another thing is refused in one line that names it."""
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, same, weights
from test_generator import published
from test_weights import Bomb, irn, save
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
    state = networks.new_generator("deit_tiny", classes, "none").state_dict()
    return {name: value + 0.1 * torch.randn_like(value) for name, value in state.items()}


def refusal(load, *args):
    """The line of the ValueError that load(*args) raises."""
    with pytest.raises(ValueError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- published generators

def test_a_weaktr_file_with_all_its_wrappers(tmp_path, capsys):
    state = tiny()
    path = save(tmp_path / "weaktr.pth", {
        "model": {f"module.{name}": value.half() for name, value in state.items()}, "optimizer": {},
        "epoch": 3, "args": Namespace(lr=1e-3, pool_type="max"), "model_ema": {"x": torch.ones(1)}})
    S = networks.load_generator(path, RUN, ["a", "b", "c"])
    assert same(S.state_dict(), {name: value.half().float() for name, value in state.items()})
    assert S.pool == "max" and networks.load_generator(path, RUN, pool="avg").pool == "avg"
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{path}: DeiT") and line.endswith(
        "3 classes; left out: 'model' around it, optimizer, epoch, args, model_ema beside it, "
        "module. before every name")
    message = refusal(networks.load_generator, path, RUN, VOC_CLASSES)
    assert message.startswith(f"{path}: maps 3 classes, the data folder has 20")


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
    others = [f"my{n}" for n in range(80)]
    assert "80, not named as COCO's" in refusal(networks.load_generator, path, RUN, others, "avg")
    assert "give --pool avg" in refusal(networks.load_generator, path, RUN, COCO_CLASSES)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = resnet50()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def read(monkeypatch):
    """read(content) -> the path of a file that holds `content`, too large to write in a test."""
    def keep(content):
        monkeypatch.setattr(networks.weights, "read", lambda path: content)
        return "large.pth"
    return keep


def test_a_clims_file_and_its_maps(resnet, read, capsys):
    state = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    last = torch.randn(20, 2048, 1, 1) * 0.05
    copies = {**irn(state), "classifier.weight": last, "newly_added.0.weight": last}
    S = networks.load_generator(read(copies), RUN, VOC_CLASSES).eval()
    images = torch.rand(1, 3, 36, 40)
    line = f"large.pth: ResNet-50 as in CLIMS, 20 classes; left out: {2 * 318 + 1} copies that agree\n"
    assert capsys.readouterr().out == line
    with torch.no_grad():
        x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        x = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        x = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))))
        first = resnet.layer4[0]
        first.conv2.stride = first.downsample[0].stride = (1, 1)
        x = resnet.layer4(resnet.layer3(x))
        first.conv2.stride = first.downsample[0].stride = (2, 2)
        torch.testing.assert_close(S.maps(images), F.conv2d(x, last).relu(), atol=1e-4, rtol=1e-4)

    message = refusal(networks.load_generator, read({**copies, "resnet50.fc.bias": last}), RUN)
    assert "does not fit" in message and "fc.bias" in message


def test_wrong_files_are_refused_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = tiny(), tmp_path / "wrong.pth"

    def without(*names):
        return {name: value for name, value in state.items() if name not in names}

    fusion = [name for name in state if "fusion" in name]
    cases = (
        ({**state, "blocks.1.attn.qkv.bias": torch.full((192,), float("nan"))}, "attn.qkv.bias holds NaN"),
        ({**state, "head.weight": state["head.weight"][:2]}, "head.bias"),
        ({**state, "extra.weight": torch.ones(1)}, "extra.weight"),
        (without("patch_embed.proj.weight"), "it has no patch_embed.proj.weight"),
        (without("norm.bias"), "norm.bias"),
        ({"head.weight": torch.ones(1), "adaptive_attention_fusion.fc.0.weight": torch.ones(1)},
         "WeakTr's first release"),
        (without(*fusion), "weights of a classifier or backbone: they go to train_cls.py --backbone"),
        ({"fc.weight": torch.ones(1), "layer4.0.conv1.weight": torch.ones(1)}, "train_cls.py --backbone"),
        ({"other": torch.ones(1)}, "not a mask generator (no head with attention fusion and no classifier"))
    for content, words in cases:
        message = refusal(networks.load_generator, save(path, {"model": content}), RUN)
        assert message.startswith(f"{path}") and words in message, message
    prompts = {"model": {"vectors": torch.ones(3, 4, 5)}, "stage": "prompts", "classes": [], "args": {}}
    message = refusal(networks.load_generator, save(path, prompts), RUN)
    assert "of stage 'prompts': give a cls.pt, match.pt or refine.pt" in message
    assert "asks for posix.mkdir" in refusal(networks.load_generator, save(path, {"model": Bomb()}), RUN)
    assert not (tmp_path / "bombed").exists()


# ---------------------------------------------------------------- ours

@pytest.mark.parametrize("name", ["cnn_toy", "clims_toy", "deit_tiny"])
def test_our_generators_come_back_for_the_same_classes(name, tmp_path, capsys):
    torch.manual_seed(0)
    S, images = networks.new_generator(name, 3, "none", pool="avg").eval(), torch.rand(1, 3, 48, 48)
    content = {"model": S.state_dict(), "stage": "cls", "classes": list("abc"), "args": {"pool": S.pool}}
    path = save(tmp_path / "cls.pt", content)
    again = networks.load_generator(path, RUN, list("abc")).eval()
    assert torch.equal(again.maps(images), S.maps(images)) and again.pool == S.pool
    assert capsys.readouterr().out == ""                      # of ours there is nothing to announce
    assert "the data folder has 2" in refusal(networks.load_generator, path, RUN, list("ab"))
    assert "trained on other classes (3: a, b, c)" in refusal(networks.load_generator, path, RUN, list("acb"))
    if name == "deit_tiny":
        message = refusal(networks.load_generator, path, RUN, list("abc"), "max")
        assert "trained with --pool avg: leave --pool max out" in message


# ---------------------------------------------------------------- backbones

def test_imagenet_weights_of_resnets(resnet, read, capsys):
    path = read(resnet.state_dict())
    S = networks.new_generator("resnet50", 20, path)
    assert same({**S.backbone.state_dict(), **resnet.fc.state_dict(prefix="fc.")}, resnet.state_dict())
    line = f"{path}: resnet50's backbone, 320 tensors; left out: its classifier fc.weight, fc.bias\n"
    assert capsys.readouterr().out == line
    message = refusal(networks.new_generator, "deit_small", 20, path)
    assert message == f"{path} does not fit this network: it has no cls_token"


def test_imagenet_weights_of_deits(tmp_path, monkeypatch):
    """A generator and a Segmenter start from one published file, through the place of downloads."""
    state = {name: value for name, value in published(1).items()
             if not name.startswith(("head.", "adaptive"))}
    state["pos_embed"] = state["pos_embed"] * torch.linspace(1, 2, 384)
    asked = []
    monkeypatch.setattr(networks.weights, "download", lambda name: asked.append(name) or dict(state))
    S = networks.new_generator("deit_small", 20, "imagenet", reduction=4)
    assert torch.equal(S.pos_embed[0, 3], state["pos_embed"][0, 0])
    assert len(S.adaptive_attention_fusion.attn_head_ffn[0].weight) == 18
    model = networks.new_segmenter("segmenter_deit_small", 20, "imagenet")
    assert model.window == (480, 320) and len(model.classes[0]) == 21
    assert model.encoder.pos_embed.shape == (1, 901, 384)
    torch.testing.assert_close(model.encoder.pos_embed[0, 500], state["pos_embed"][0, 0])
    assert asked == ["deit_small_patch16_224-cd65a155.pth"] * 2
    assert {name for name in networks.IMAGENET.values()} == networks.weights.PUBLISHED.keys()
    trained = save(tmp_path / "generator.pth", {"model": tiny()})
    message = refusal(networks.new_generator, "deit_tiny", 3, trained)
    assert "it has 3 class tokens: it is a generator, not ImageNet weights; give it to --init" in message
    for new, name in ((networks.new_generator, "cnn_toy"), (networks.new_segmenter, "deeplab_toy")):
        assert f"{name} has no ImageNet weights: give the file" in refusal(new, name, 3, "imagenet")


# ---------------------------------------------------------------- segmentation networks

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
    (tmp_path / "cls.pt").symlink_to(path)
    assert "not a mask generator (it is of stage 'seg'" in refusal(networks.load_generator, path, RUN)


def test_vpls_decoder_comes_back_on_its_clip_alone(tiny_clip, tmp_path):
    torch.manual_seed(0)
    clip, W = networks.load_clip(tiny_clip, RUN, vit=True), F.normalize(torch.randn(5, 16), dim=1)
    prototypes = {"model": {"prototypes": W}, "classes": list("abc"), "tau_i": 0.03}
    model, images = networks.new_decoder(clip, prototypes, width=16).eval(), torch.rand(1, 3, 32, 24)
    path = save(tmp_path / "seg.pt", {
        "model": model.state_dict(), "stage": "seg", "classes": list("abc"), "clip": clip.fingerprint(),
        "args": {"model": "clip_decoder", "clip": str(tiny_clip), "width": 16}})
    assert torch.equal(networks.load_segmenter(path, RUN)(images), model(images))
    other = torch.load(tiny_clip, weights_only=True)
    other["text_projection"] = other["text_projection"] * 2
    other = save(tmp_path / "other.pt", other)
    message = refusal(networks.load_segmenter, path, RUN, other)
    assert "was trained on another CLIP than" in message and "--clip" in message


# ---------------------------------------------------------------- CLIP

def test_clip_files(tiny_clip, tmp_path, capsys):
    state = torch.load(tiny_clip, weights_only=True)
    half = {name: value.half() for name, value in state.items()}
    numbers = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(77)}
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in half.items()}}
    for content, said in (({**half, **numbers}, ""), (wrapped, "; left out: 'state_dict' around it, ")):
        path = save(tmp_path / "clip.pt", content)
        clip = networks.load_clip(path, RUN, vit=True)
        assert same(clip.model.state_dict(), {name: value.float() for name, value in half.items()})
        kind = "CLIP, a state dict, QuickGELU assumed, as OpenAI's, ViT of 8 px patches, 16 px"
        assert capsys.readouterr().out.startswith(f"{path}: {kind}{said}")


def test_wrong_clips_are_refused_by_what_they_are(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = torch.load(tiny_clip, weights_only=True), tmp_path / "wrong.pt"
    less = {name: value for name, value in state.items() if name != "ln_final.bias"}
    nan = {**state, "logit_scale": torch.tensor(float("nan"))}
    for content, words in ((less, "ln_final.bias"), ({**state, "extra": torch.ones(1)}, "extra"),
                           ({**state, "visual.proj": torch.ones(64, 9)}, "visual.proj"),
                           (nan, "logit_scale holds NaN"), ({"state_dict": {}}, "holds no state dict"),
                           ({**state, "x": Bomb()}, "asks for posix.mkdir"), (tiny(), "does not fit")):
        message = refusal(networks.load_clip, save(path, content), RUN)
        assert message.startswith(f"{path}") and words in message
    assert not (tmp_path / "bombed").exists()
    with pytest.raises(FileNotFoundError, match="CLIP ViT-Z: no such file, and not one of RN50"):
        networks.load_clip("ViT-Z", RUN)


def resnet_clip(path):
    from clip.model import CLIP
    model = CLIP(embed_dim=16, image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=2,
                 vision_patch_size=None, context_length=77, vocab_size=49408, transformer_width=64,
                 transformer_heads=1, transformer_layers=1)
    return save(path, model.state_dict())


def test_a_clip_without_patches_is_refused_where_they_are_read(tmp_path):
    path = resnet_clip(tmp_path / "rn.pt")
    assert networks.load_clip(path, RUN).encode_image(torch.rand(2, 3, 40, 40)).shape == (2, 16)
    with pytest.raises(ValueError, match="rn.pt: the image encoder .* is a ModifiedResNet: .*ViT-B/16"):
        networks.load_clip(path, RUN, vit=True)


def test_a_downloaded_clip_of_another_checksum_does_not_stay(tmp_path, monkeypatch):
    """OpenAI's own package downloads a file of ours in place of theirs; and there is no connection at all."""
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert f"/{digest}/ViT-B-32.pt" in networks.OPENAI["ViT-B/32"]
    assert all(len(address.split("/")[-2]) == 64 for address in networks.OPENAI.values())
    (tmp_path / digest).mkdir()
    other = tmp_path / digest / "ViT-B-32.pt"
    other.write_bytes(b"another file")
    for address, reason in ((other, "SHA256"), (tmp_path / "none", "No such file")):
        monkeypatch.setitem(networks.OPENAI, "ViT-B/32", address.as_uri())
        with pytest.raises(FileNotFoundError, match=rf"CLIP ViT-B/32: download failed \(.*{reason}") as error:
            networks.load_clip("ViT-B/32", RUN)
        assert "put ViT-B-32.pt into" in str(error.value) and "\n" not in str(error.value)
        assert os.listdir(tmp_path / ".cache/clip") == []


# ---------------------------------------------------------------- through the stages

def test_stages_start_from_a_published_generator(voc, tmp_path, tiny_clip):
    state = tiny()
    path = save(tmp_path / "weaktr.pth", {"model": state})
    line = ["train_cls.py", "--data", voc, "--out", tmp_path, *TRAIN, "--init", path]
    assert call(*line, "--pool", "avg").returncode == 0
    assert same(weights(tmp_path / "cls.pt"), state)
    refused(call(*line, "--pool", "max"), "--pool avg (now max)")
    assert generator.load_generator(tmp_path / "cls.pt").pool == "avg"
    scripts = {"train_match.py": [], "train_prompt.py": ["--prompt-length", "4"],
               "train_refine.py": ["--prompts", "random"]}
    wrong = save(tmp_path / "voc20.pth", {"model": tiny(20)})
    for script, more in scripts.items():
        line = [script, "--data", voc, *TRAIN, "--clip", tiny_clip, *more]
        done = call(*line, "--out", tmp_path, "--init", path)
        assert done.returncode == 0 and f"{path}: DeiT" in done.stdout, done.stderr
        done = call(*line, "--out", tmp_path / "none", "--init", wrong)
        refused(done, "voc20.pth: maps 20 classes, the data folder has 3")
    assert os.listdir(tmp_path / "none") == []
    trained = weights(tmp_path / "match.pt")
    moved = {name for name, value in state.items() if not torch.equal(trained[name], value)}
    assert moved and all(name.startswith(("head.", "adaptive_attention_fusion.")) for name in moved)
