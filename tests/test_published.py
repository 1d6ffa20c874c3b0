"""Files as others publish them, with their names, shapes and wrappers: generators, CLIPs, backbones, maps. What is taken, and what is refused."""
import hashlib
import io
import json
import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LABELS, call, make_folder, refused, same, weights
from test_generator import published
from torchvision.models import resnet50, resnet101

from plumbing import checkpoints, folders, images as image_files, maps as map_files, masks as mask_files
from wsss import clip_model, generator, segmenter

SHARED = ["--device", "cpu", "--amp", "off", "--workers", "0"]
TRAIN = [*SHARED, "--split", "train", "--limit", "2", "--epochs", "1", "--batch-size", "2", "--crop", "32"]
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}                  # COCO's category ids go to 90, these stand for nothing


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


@pytest.fixture(autouse=True)
def large_files_go(tmp_path):
    """pytest keeps the folders of three runs: without the networks of full size."""
    yield
    for path in tmp_path.rglob("*.pt*"):
        if path.stat().st_size > 1e7:
            path.unlink()


@pytest.fixture(scope="module")
def voc20(tmp_path_factory):
    """The tiny folder under VOC's twenty classes."""
    root = make_folder(tmp_path_factory.mktemp("voc") / "data", {id: LABELS[id] for id in ("a_1", "a_2")}, size=(32, 40))
    (root / "classes.txt").unlink()
    return root


@pytest.fixture(scope="module")
def weaktr(tmp_path_factory):
    """checkpoint_best_mIoU.pth as WeakTr's and SemPLeS's trainers write it: DeiT-S, 20 classes, the epoch and numpy's mIoU beside the weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weaktr") / "checkpoint_best_mIoU.pth"
    state = {name: torch.randn_like(value) * (0.05 if value.dim() > 1 else 0.3) for name, value in published(20, 8).items()}
    torch.save({"model": state, "epoch": 41, "miou": np.float64(69.4)}, path)
    yield path, state
    path.unlink()


@pytest.fixture(scope="module")
def imagenet50():
    torch.manual_seed(0)
    model = resnet50()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def clims(tmp_path_factory, imagenet50):
    """res50_clims.pth: each tensor under resnet50, under its stage and under backbone, the classifier twice."""
    state = {}
    for name, value in imagenet50.state_dict().items():
        layer, _, rest = name.partition(".")
        if layer != "fc":
            stage = max(0, int(layer[-1]) - 1) if layer.startswith("layer") else 0
            place = {"conv1": 0, "bn1": 1, "layer1": 4}.get(layer, 0)
            for prefix in (f"resnet50.{layer}", f"stage{stage + 1}.{place}", f"backbone.{stage}.{place}"):
                state[f"{prefix}.{rest}"] = value
    state["classifier.weight"] = state["newly_added.0.weight"] = torch.randn(20, 2048, 1, 1) * 0.05
    path = tmp_path_factory.mktemp("clims") / "res50_clims.pth"
    torch.save(state, path)
    yield path, state
    path.unlink()


def save(path, content):
    torch.save(content, path)
    return path


def tiny(classes=3):
    torch.manual_seed(0)
    model = generator.build_generator("deit_tiny", classes)
    return {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}


# ---------------------------------------------------------------- WeakTr, SemPLeS

def test_maps_of_a_published_deit(weaktr, voc20, tmp_path):
    path, state = weaktr
    done = call("make_cam.py", "--data", voc20, "--out", tmp_path, *SHARED, "--split", "train", "--init", path, "--scales", "1", "--no-flip", "--sheets", "0")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith(str(path)))
    for words in ("DeiT", "20 classes", "pooling max", "'model' around it", "epoch, miou beside it"):
        assert words in line
    model = generator.DeiT(20).eval()
    assert model.load_state_dict(state).missing_keys == []
    folder = folders.Folder(voc20)
    with torch.no_grad():
        maps = model.maps(folder.image("a_2")[None])[0, [3, 9]]                   # boat and cow among VOC's twenty
    maps = F.interpolate(maps[:, None], (36, 40), mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    assert np.abs(np.load(tmp_path / "cam/a_2.npy") - ((maps - low) / (high - low + 1e-8)).numpy()).max() < 2e-3


def test_stages_start_from_a_published_deit(weaktr, voc20, tmp_path, tiny_clip):
    path, state = weaktr
    done = call("train_cls.py", "--data", voc20, "--out", tmp_path, *TRAIN, "--init", path)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(value, state[name]) for name, value in weights(tmp_path / "cls.pt").items())
    done = call("train_match.py", "--data", voc20, "--out", tmp_path, *TRAIN, "--init", path, "--clip", tiny_clip)
    assert done.returncode == 0 and f"{path}: DeiT" in done.stdout, done.stderr
    moved = {name for name, value in weights(tmp_path / "match.pt").items() if not torch.equal(value, state[name])}
    assert moved and all(name.startswith(("head.", "adaptive_attention_fusion.")) for name in moved)


@pytest.mark.parametrize("script,more", [("train_match.py", []), ("train_prompt.py", []), ("train_refine.py", ["--prompts", "random"])])
def test_wrappers_and_prefixes(tmp_path, tiny_clip, voc, script, more):
    state = tiny()
    path = save(tmp_path / "ddp.pth", {"model": {f"module.{name}": value.half() for name, value in state.items()}, "optimizer": {"state": {}}, "lr_scheduler": {},
                                       "epoch": 3, "scaler": {}, "args": Namespace(lr=1e-3, pool_type="max"), "model_ema": {"x": torch.ones(1)}})
    done = call(script, "--data", voc, "--out", tmp_path / "out", *TRAIN, "--init", path, "--clip", tiny_clip, "--prompt-length" if more else "--lr", "4" if more else "0", *more)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith(str(path)))
    assert "module. before every name" in line and "3 classes" in line and "optimizer, lr_scheduler, epoch, scaler, args, model_ema beside it" in line
    loaded = generator.load_generator(path).state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in state.items())


def test_a_coco_generator_of_90_ids_maps_the_80_in_use(tmp_path):
    state, images = tiny(90), torch.rand(2, 3, 24, 24)
    path = save(tmp_path / "coco.pth", {"model": state, "epoch": 1})
    every, used = generator.load_generator(path).eval(), generator.load_generator(path, "avg", folders.COCO_CLASSES).eval()
    every.adaptive_attention_fusion.pool = "avg"
    rows = [id - 1 for id in range(1, 91) if id not in GAPS]
    with torch.no_grad():
        (maps, logits), (maps80, logits80) = every(images), used(images)
    assert maps80.shape[1] == 80 and torch.equal(maps80, maps[:, rows]) and all(torch.equal(a, b[:, rows]) for a, b in zip(logits80, logits))
    assert torch.equal(used.maps(images), maps80)
    # person is id 1, stop sign 13 after the first gap, toothbrush 90
    assert [rows[folders.COCO_CLASSES.index(name)] for name in ("person", "stop sign", "toothbrush")] == [0, 12, 89]
    own = save(tmp_path / "match.pt", {"model": used.state_dict(), "stage": "match", "classes": folders.COCO_CLASSES, "args": {"pool": "avg"}})
    assert torch.equal(generator.load_generator(own, classes=folders.COCO_CLASSES).eval().maps(images), maps80)         # and of our own file after training it
    with pytest.raises(ValueError, match="coco.pth: maps 90 classes, the data folder has 20"):
        generator.load_generator(path, classes=folders.VOC_CLASSES)
    with pytest.raises(ValueError, match="coco.pth: maps 90 classes, the data folder has 80, not named as COCO's"):
        generator.load_generator(path, "avg", [f"my{n}" for n in range(80)])
    with pytest.raises(ValueError, match="coco.pth: of COCO's 90 ids, .*give --pool avg"):
        generator.load_generator(path, classes=folders.COCO_CLASSES)


def coco(root):
    """A tiny folder under COCO's names in root/data, a generator of 90 ids in root/coco.pth."""
    make_folder(root / "data", {"a_1": [0], "a_2": [11, 79], "a_3": [], "a_4": [0, 12]}, size=(24, 24), classes=folders.COCO_CLASSES)
    return save(root / "coco.pth", {"model": tiny(90), "epoch": 1})


def coco_match(root, out, clip, *more):
    return ["train_match.py", "--data", root / "data", *SHARED, "--split", "train", "--out", root / out, "--clip", clip, "--epochs", "2", "--batch-size", "2",
            "--crop", "24", "--lr", "1e-2", "--drop-path", "0", *more]


def test_a_coco_generator_through_the_stages(tmp_path, tiny_clip):
    """90 rows travel; 80 are trained, resumed and mapped: rows of the gaps stay as they were published. (Two processes: test_semples.py.)"""
    init, state = coco(tmp_path), tiny(90)
    base = ["--data", tmp_path / "data", *SHARED, "--split", "train"]
    refused(call("train_cls.py", *base, "--out", tmp_path / "one", "--init", init), "give --pool avg")
    assert call("train_cls.py", *base, "--out", tmp_path / "one", "--init", init, "--pool", "avg").returncode == 0
    assert all(torch.equal(value, state[name]) for name, value in weights(tmp_path / "one/cls.pt").items())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/cls.pt").symlink_to(tmp_path / "one/cls.pt")
    assert call(*coco_match(tmp_path, "one", tiny_clip)).returncode == 0
    trained = weights(tmp_path / "one/match.pt")
    assert len(trained["head.weight"]) == 90 and torch.load(tmp_path / "one/match.pt", weights_only=True)["args"]["pool"] == "avg"
    gaps, used = sorted(id - 1 for id in GAPS), sorted(id - 1 for id in set(range(1, 91)) - GAPS)
    moved = (trained["head.bias"] - state["head.bias"]).abs()
    assert moved[[0, 12, 89]].min() > 1e-4 and moved[used].max() > 10 * moved[gaps].max()       # a gap's weights decay, no more

    saves, save_state = [], checkpoints.save_state

    def killed(*args):
        save_state(*args)
        saves.append(args)
        if len(saves) == 1:
            raise KeyboardInterrupt
    checkpoints.save_state = killed
    try:
        assert call(*coco_match(tmp_path, "torn", tiny_clip)).returncode == 130
        assert call(*coco_match(tmp_path, "torn", tiny_clip)).returncode == 0
    finally:
        checkpoints.save_state = save_state
    assert len(saves) == 2 and same(weights(tmp_path / "torn/match.pt"), trained)
    assert call("make_cam.py", *base, "--out", tmp_path / "one", "--source", "match", "--scales", "1", "--no-flip", "--sheets", "0").returncode == 0
    model = generator.DeiT(90, pool="avg", **generator.TINY).eval()
    model.load_state_dict(trained)
    with torch.no_grad():
        maps = model.maps(folders.Folder(tmp_path / "data").image("a_2")[None])[:, [12, 89]]                     # stop sign and toothbrush by id
    maps = F.interpolate(maps, (28, 24), mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    assert np.abs(np.load(tmp_path / "one/cam/a_2.npy") - ((maps - low) / (high - low + 1e-8)).numpy()).max() < 2e-3


# ---------------------------------------------------------------- pooling

def test_pooling_goes_with_the_file(voc, tmp_path, tiny_clip):
    """avg, said once, is what later stages train and map with, and what they save; another one is refused."""
    out = tmp_path / "out"
    done = call("train_cls.py", "--data", voc, "--out", out, *TRAIN, "--generator", "deit_tiny", "--backbone", "none", "--pool", "avg")
    assert done.returncode == 0, done.stderr
    stages = (("train_match.py", "match", []), ("train_prompt.py", "prompts", ["--prompt-length", "4"]), ("train_refine.py", "refine", []))
    for script, stage, more in stages:
        line = [script, "--data", voc, "--out", out, *TRAIN, "--clip", tiny_clip, *more]
        refused(call(*line, "--pool", "max"), "trained with --pool avg: leave --pool max out")
        assert call(*line).returncode == 0
        assert torch.load(out / f"{stage}.pt", weights_only=True)["args"]["pool"] == "avg"
        for pool in ([], ["--pool", "avg"]):
            assert "is finished" in call(*line, *pool).stdout
        refused(call(*line, "--pool", "max"), "--pool avg (now max)")
    assert generator.load_generator(out / "refine.pt").pool == "avg"
    cam = ["make_cam.py", "--data", voc, "--out", out, *SHARED, "--split", "train", "--sheets", "0"]
    refused(call(*cam, "--pool", "max"), "refine.pt: trained with --pool avg")
    assert call(*cam).returncode == 0 and json.loads((out / "cam/recipe.json").read_text())["args"]["pool"] == "avg"
    note = (out / "cam/recipe.json").read_text()
    assert call(*cam, "--pool", "avg").returncode == 0 and json.loads((out / "cam/recipe.json").read_text())["fingerprint"] == json.loads(note)["fingerprint"]


def test_pooling_of_a_published_file_is_asked_for(voc, tmp_path):
    path = save(tmp_path / "weaktr.pth", {"model": tiny()})
    assert generator.load_generator(path).pool == "max" and generator.load_generator(path, "avg").pool == "avg"
    line = ["train_cls.py", "--data", voc, "--out", tmp_path / "out", *TRAIN, "--init", path]
    assert call(*line, "--pool", "avg").returncode == 0 and generator.load_generator(tmp_path / "out/cls.pt").pool == "avg"
    refused(call(*line, "--pool", "max"), "--pool avg (now max)")
    line = ["train_cls.py", "--data", voc, "--out", tmp_path / "cnn", *TRAIN, "--generator", "cnn_toy", "--backbone", "none"]       # it fuses nothing
    assert call(*line).returncode == 0 and "is finished" in call(*line, "--pool", "max").stdout
    assert generator.load_generator(tmp_path / "cnn/cls.pt", "max").pool is None


# ---------------------------------------------------------------- CLIMS, IRN

def test_maps_of_a_published_clims(clims, imagenet50, voc20, tmp_path):
    path, state = clims
    done = call("make_cam.py", "--data", voc20, "--out", tmp_path, *SHARED, "--split", "train", "--init", path, "--scales", "1", "--no-flip", "--sheets", "0")
    assert done.returncode == 0, done.stderr
    assert f"{path}: ResNet-50 as in CLIMS, 20 classes; left out: {2 * 318 + 1} copies that agree" in done.stdout
    image = (folders.Folder(voc20).image("a_2") - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    net = imagenet50
    with torch.no_grad():
        x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image[None]))))))
        last = net.layer4[0]
        last.conv2.stride = last.downsample[0].stride = (1, 1)
        maps = F.conv2d(net.layer4(net.layer3(x)), state["classifier.weight"]).relu()[0, [3, 9]]
        last.conv2.stride = last.downsample[0].stride = (2, 2)
    maps = F.interpolate(maps[:, None], (36, 40), mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    assert np.abs(np.load(tmp_path / "cam/a_2.npy") - ((maps - low) / (high - low + 1e-8)).numpy()).max() < 2e-3


def test_clims_copies_must_agree_and_nothing_may_be_left_over(clims, tmp_path):
    _, state = clims
    plain = {name: value for name, value in state.items() if name.startswith(("resnet50.", "classifier.")) and "num_batches" not in name}
    model = generator.load_generator(save(tmp_path / "old.pth", plain))                 # of an old torch, and without copies
    assert torch.equal(model.backbone.layer4[2].bn3.running_var, state["stage4.0.2.bn3.running_var"])
    torn = "backbone.2.0.5.conv1.weight"
    with pytest.raises(ValueError, match=f"mixed.pth: {torn} differs from its other copy backbone.layer3.5.conv1.weight"):
        generator.irn_names({**state, torn: state[torn] + 1}, "mixed.pth")
    del plain["resnet50.layer3.0.bn2.bias"]
    with pytest.raises(ValueError, match="odd.pth does not fit .*backbone.layer3.0.bn2.bias.*backbone.fc.bias") as error:
        generator.load_generator(save(tmp_path / "odd.pth", {**plain, "resnet50.fc.bias": torch.zeros(3)}))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- backbones

def test_imagenet_resnets(imagenet50, tmp_path, capsys):
    state = imagenet50.state_dict()
    path = save(tmp_path / "torchvision50.pth", state)
    model = generator.build_generator("resnet50", 20, start=path)
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())
    assert f"{path}: resnet50's backbone, 320 tensors; left out: its classifier fc.weight, fc.bias" in capsys.readouterr().out
    with pytest.raises(ValueError, match="torchvision50.pth: not a mask generator .*--backbone"):
        generator.load_generator(path)
    with pytest.raises(ValueError, match="torchvision50.pth does not fit this network: it has no cls_token"):
        generator.build_generator("deit_small", 20, start=path)


def test_imagenet_resnet101_for_deeplab(tmp_path, capsys):
    with torch.device("meta"):                                    # names and shapes; drawing 44 million numbers as a fresh network does takes seconds
        shapes = {name: value.shape for name, value in resnet101().state_dict().items()}
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()} | {"layer3.22.conv2.weight": torch.randn(256, 256, 3, 3)}
    path = save(tmp_path / "torchvision101.pth", {"state_dict": {f"module.{name}": value for name, value in state.items() if "num_batches" not in name}})
    model = segmenter.build_segmenter("deeplabv2_resnet101", 20, path)
    assert torch.equal(model.backbone.layer3[22].conv2.weight, state["layer3.22.conv2.weight"])
    assert "left out: its classifier fc.weight, fc.bias" in capsys.readouterr().out
    with pytest.raises(ValueError, match="torchvision101.pth does not fit this network: .*Missing key.*0.weight"):
        segmenter.build_segmenter("deeplab_toy", 20, path)


@pytest.mark.parametrize("read,stem", [(generator.read, "resnet50"), (generator.read, "deit_small_patch16_224"), (segmenter.read, "resnet101"), (segmenter.read, "deit_small_patch16_224")])
def test_a_file_named_by_its_checksum_is_checked(read, stem, tmp_path):
    path = save(tmp_path / "x.pth", {"a": torch.ones(3)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    whole, torn = tmp_path / f"{stem}-{digest[:8]}.pth", tmp_path / f"{stem}-0676ba61.pth"
    whole.symlink_to(path), torn.symlink_to(path)
    assert read(whole)["a"].sum() == 3
    with pytest.raises(ValueError, match=f"{torn.name}: its SHA-256 is not the one that begins with 0676ba61, as published: download it again"):
        read(torn)


# ---------------------------------------------------------------- CLIP

def small_clip(patch):
    """OpenAI's names, patch, 224 px and vocabulary; few channels."""
    from clip.model import CLIP
    torch.manual_seed(0)
    return CLIP(embed_dim=16, image_resolution=224, vision_layers=1, vision_width=64, vision_patch_size=patch, context_length=77, vocab_size=49408,
                transformer_width=64, transformer_heads=1, transformer_layers=1).eval()


@pytest.mark.parametrize("patch,grid", [(32, 7), (16, 14)])
def test_clip_files(patch, grid, tmp_path, capsys):
    model = small_clip(patch)
    half = {name: value.half() for name, value in model.state_dict().items()}
    sizes = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    path = save(tmp_path / "half.pt", {**half, **sizes})
    loaded = clip_model.load_clip(path, vit=True)
    assert loaded.size == 224 and loaded.model.visual.positional_embedding.shape[0] == 1 + grid ** 2
    assert all(value.dtype == torch.float32 and torch.equal(value, half[name].float()) for name, value in loaded.model.state_dict().items())
    assert f"{path}: CLIP, a state dict, QuickGELU assumed, as OpenAI's, ViT of {patch} px patches, 224 px, float16\n" == capsys.readouterr().out
    path = save(tmp_path / "epoch_3.pt", {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}})
    assert torch.equal(clip_model.load_clip(path).model.visual.proj, model.visual.proj)
    assert "left out: 'state_dict' around it" in capsys.readouterr().out


def test_wrong_clips_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = small_clip(32).state_dict()
    less = {name: value for name, value in state.items() if name != "ln_final.bias"}
    for content, words in ((less, "ln_final.bias"), ({**state, "extra.weight": torch.ones(1)}, "extra.weight"),
                           ({**state, "visual.proj": torch.ones(64, 9)}, "visual.proj"), ({**state, "logit_scale": torch.tensor(float("nan"))}, "logit_scale holds NaN"),
                           ({"state_dict": {}}, "not the weights of a CLIP"), ({**state, "x": Bomb()}, "asks for posix.mkdir"), (tiny(), "not the weights of a CLIP")):
        with pytest.raises(ValueError, match=words) as error:
            clip_model.load_clip(save(tmp_path / "wrong.pt", content))
        assert "wrong.pt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bombed").exists()
    assert set(clip_model.PUBLISHED.values()) >= {"ViT-B/32", "ViT-B/16", "RN50"} and all(len(digest) == 64 for digest in clip_model.PUBLISHED)


@pytest.mark.parametrize("script,more", [("make_cam.py", ["--source", "text"]), ("vpl.py", [])])
def test_a_resnet_clip_is_refused_where_patches_are_read(script, more, voc, tmp_path):
    line = refused(call(script, "--data", voc, "--out", tmp_path / "out", *SHARED, "--split", "train", "--clip", "RN50", *more), "RN50", "ViT-B/16")
    assert "download" not in line and not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------- what is no generator

def test_wrong_generators_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tiny()
    first = {name: value for name, value in state.items() if "fusion" not in name} | {"adaptive_attention_fusion.fc.0.weight": torch.ones(4, 8)}
    other = {name: value for name, value in state.items() if name != "patch_embed.proj.weight"}
    for content, words in (
            ({"model": {**state, "blocks.1.attn.qkv.bias": torch.full((192,), float("nan"))}}, "blocks.1.attn.qkv.bias holds NaN"),
            ({"model": {**state, "head.weight": state["head.weight"][:2]}}, "head.bias|size mismatch"), ({"model": other}, "patch_embed.proj.weight"),
            ({"model": {k: v for k, v in state.items() if k != "norm.bias"}}, "norm.bias"), ({"model": {**state, "dist_token": torch.ones(1)}}, "dist_token"),
            ({"model": first}, "WeakTr's first release"), ({"model": {"vectors": torch.ones(3, 4, 5)}, "stage": "prompts", "classes": []}, "of stage 'prompts'"),
            ({"model": state, "net": Bomb()}, "asks for posix.mkdir"), ({"model": state, "net": torch.nn.Linear(1, 1)}, "asks for torch.nn.modules.linear.Linear")):
        with pytest.raises(ValueError, match=words) as error:
            generator.load_generator(save(tmp_path / "wrong.pth", content))
        assert "wrong.pth" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bombed").exists()
    with pytest.raises(ValueError, match="gen.pth does not fit this network: it has 3 class tokens: a generator"):
        generator.build_generator("deit_tiny", 3, start=save(tmp_path / "gen.pth", {"model": state}))


@pytest.mark.parametrize("name", ["head.weight", "pos_embed", "cls_token", "patch_embed.proj.weight", "adaptive_attention_fusion.attn_head_ffn.0.weight", "blocks.0.norm1.weight"])
def test_tensors_of_no_or_one_side_are_refused(tmp_path, name):
    for value in (torch.tensor(1.0), torch.ones(5)):
        with pytest.raises(ValueError, match="odd.pth: its tensors make no|odd.pth does not fit") as error:
            generator.load_generator(save(tmp_path / "odd.pth", {**tiny(), name: value}))
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="odd.pth does not fit"):
            generator.build_generator("deit_tiny", 3, start=save(tmp_path / "odd.pth", {"cls_token": torch.ones(1, 1, 64), name: value}))
    with pytest.raises(ValueError, match="odd.pth: its tensors make no"):
        generator.load_generator(save(tmp_path / "odd.pth", {"classifier.weight": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match="odd.pth does not fit"):
        generator.load_generator(save(tmp_path / "odd.pth", {**tiny(), "blocks.999999999.norm1.weight": torch.ones(5)}))


@pytest.mark.parametrize("read", [generator.read, segmenter.read, clip_model.open_file], ids=["generator", "segmenter", "clip"])
def test_what_torch_did_not_write_is_said_in_our_words(read, tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(300)}, whole)
    for content in (b"hello, world", b"", b"<!DOCTYPE html>", whole.getvalue()[:700], b"PK\x03\x04" + bytes(50), pickle.dumps([1, 2])[:-2]):
        (tmp_path / "junk.pth").write_bytes(content)
        with pytest.raises(ValueError, match="junk.pth: .*torn, or torch did not write it") as error:
            read(tmp_path / "junk.pth")
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="asks for posix.mkdir"):
        read(save(tmp_path / "junk.pth", {"a": Bomb()}))


def test_a_refused_file_leaves_nothing_behind(voc, tmp_path, tiny_clip):
    wrong = save(tmp_path / "voc20.pth", {"model": tiny(20)})
    for script, more in (("train_cls.py", []), ("train_match.py", ["--clip", tiny_clip]), ("train_refine.py", ["--clip", tiny_clip, "--prompts", "random"])):
        refused(call(script, "--data", voc, "--out", tmp_path / "out", *TRAIN, "--init", wrong, *more), "voc20.pth: maps 20 classes, the data folder has 3")
    refused(call("make_cam.py", "--data", voc, "--out", tmp_path / "out", *SHARED, "--split", "train", "--init", wrong), "voc20.pth: maps 20 classes")
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------- maps for others

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Maps of the tiny folder, whose a_3 holds no class, at a quarter of the size, and in all formats."""
    root = tmp_path_factory.mktemp("exported")
    make_folder(root / "data")
    init = save(root / "s.pth", tiny())
    for name in ("irn", "psa", "clip_es", "fma"):
        done = call("make_cam.py", "--data", root / "data", "--out", root / "out", *SHARED, "--split", "train", "--init", init, "--stride", "4", "--format", name, "--sheets", "0")
        assert done.returncode == 0, done.stderr
    return root


def ours(root, id):
    """-> classes, maps at full size, by the naive road."""
    cam = torch.from_numpy(np.load(root / f"out/cam/{id}.npy").astype(np.float32))
    size = image_files.picture_size(root / f"data/JPEGImages/{id}.jpg")
    return LABELS[id], F.interpolate(cam[None], size, mode="bilinear")[0].numpy() if len(cam) else np.zeros((0, *size), np.float32)


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_irn_does_next_with_our_maps(exported, id):
    table = np.load(exported / f"out/cam_irn/{id}.npy", allow_pickle=True).item()
    classes, maps = ours(exported, id)
    P, H, W = maps.shape
    assert set(table) == {"keys", "cam", "high_res"}
    keys = np.pad(table["keys"] + 1, (1, 0), mode="constant")
    assert keys.tolist() == [0, *(k + 1 for k in classes)]
    high = table["high_res"]
    assert isinstance(high, np.ndarray) and high.dtype == np.float32 and high.shape == (P, H, W) and np.abs(high - maps).max(initial=0) < 1e-3
    seeds = keys[np.argmax(np.pad(high, ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.3), axis=0)]         # cam_to_ir_label
    best = maps.max(0, initial=0)
    sure = np.abs(best - 0.3) > 2e-3
    want = np.where(best > 0.3, np.array([0, *classes])[1:][maps.argmax(0)] + 1 if P else 0, 0)
    clear = sure & (np.diff(np.sort(maps, 0)[-2:], axis=0)[0] > 2e-3 if P > 1 else True)
    assert (seeds == want)[clear].all() and clear.mean() > 0.9
    cam = table["cam"].to("cpu")                                                        # make_sem_seg_labels: .cuda(), then a random walk at this grid
    assert cam.dtype == torch.float32 and cam.shape == (P, (H - 1) // 4 + 1, (W - 1) // 4 + 1)
    if P:
        assert F.interpolate(cam[:, None], scale_factor=4, mode="bilinear")[..., 0, :H, :W].shape == (P, H, W) and cam.max() > 0.8


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_weaktr_and_psa_do_next(exported, id):
    table = np.load(exported / f"out/cam_psa/{id}.npy", allow_pickle=True).item()
    classes, maps = ours(exported, id)
    assert list(table) == classes and all(type(key) is int and value.dtype == np.float32 and value.shape == maps.shape[1:] for key, value in table.items())
    if classes:
        cam = np.pad(np.array([table[key] for key in table]), ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.43)
        assert np.abs(cam[1:] - maps).max() < 1e-3 and cam.shape == (3, *maps.shape[1:])


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_clip_es_does_next(exported, id):
    table = np.load(exported / f"out/cam_clip_es/{id}.npy", allow_pickle=True).item()
    classes, maps = ours(exported, id)
    assert np.pad(table["keys"] + 1, (1, 0), mode="constant").tolist() == [0, *(k + 1 for k in classes)]
    cams = table["attn_highres"]
    assert cams.dtype == np.float32 and cams.shape == maps.shape and np.abs(cams - maps).max(initial=0) < 1e-3
    if classes:                                                                         # it has no picture without a class
        background = np.power(1 - np.max(cams, axis=0, keepdims=True), 1)
        assert np.concatenate((background, cams)).shape == (1 + len(classes), *maps.shape[1:])


@pytest.mark.parametrize("id", ["a_2", "a_3"])
def test_what_fma_does_next(exported, id):
    load = np.load(exported / f"out/cam_fma/{id}.npz")                                 # no pickle
    assert set(load.files) == {"cam", "fg_cls"} and load["fg_cls"].tolist() == LABELS[id]
    assert load["cam"].dtype == np.float32 and np.abs(load["cam"] - np.load(exported / f"out/cam/{id}.npy").astype(np.float32)).max(initial=0) < 1e-3


# ---------------------------------------------------------------- maps of others

def write(path, name, keys, cam):
    """A file as the other project writes it; IRN's keys and small maps are tensors."""
    if name == "fma":
        return np.savez(path.with_suffix(".npz"), cam=cam, fg_cls=np.array(keys))
    small = torch.from_numpy(cam[:, ::4, ::4].copy())
    tables = {"irn": {"keys": torch.tensor(keys), "cam": small, "high_res": cam}, "psa": dict(zip(keys, cam)), "clip_es": {"keys": np.array(keys), "attn_highres": cam}}
    np.save(path, tables[name], allow_pickle=True)


@pytest.mark.parametrize("name", ["irn", "psa", "clip_es", "fma"])
def test_maps_of_others_are_read(name, tmp_path):
    cam = np.random.default_rng(0).random((2, 20, 24), dtype=np.float32)
    write(tmp_path / "x.npy", name, [2, 0], cam)                                        # any order
    classes, found = map_files.load_cam(tmp_path / "x.npy", [1, 0, 1], (20, 24))
    assert classes.tolist() == [0, 2] and found.dtype == np.float32 and np.array_equal(found, cam[::-1])
    for labels, words in (([1, 1, 0], r"maps of the classes \[0, 2\], the picture's label has \[0, 1\]"), ([0, 1, 0], "counted from 1")):
        with pytest.raises(ValueError, match=words):
            map_files.load_cam(tmp_path / "x.npy", labels, (20, 24))
    write(tmp_path / "y.npy", name, [0], 7 * cam[:1])
    with pytest.raises(ValueError, match=r"y.npy?z? holds maps from 0\.\d+ to 6\.9\d*: scale them"):
        map_files.load_cam(tmp_path / "y.npy", [1, 0, 0], (20, 24))
    write(tmp_path / "none.npy", name, [], cam[:0])
    assert map_files.load_cam(tmp_path / "none.npy", [0, 0, 0], (20, 24))[1].shape[0] == 0


def test_maps_of_others_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Storage:                                                                      # torch's own reader of tensors inside a pickle would unpickle these bytes
        def __reduce__(self):
            return torch.storage._load_from_bytes, (bomb.getvalue(),)

    bomb = io.BytesIO()
    torch.save(Bomb(), bomb)
    for content in ({0: Bomb()}, {"keys": [0], "high_res": Storage()}):
        np.save("x.npy", np.array(content, dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="x.npy is not a plain .npy array"):
            map_files.load_cam("x.npy", [1, 0, 0])
    with open("x.npz", "wb") as file:
        np.savez(file, cam=np.array([Bomb()], dtype=object), fg_cls=np.array([0]))
    os.remove("x.npy")
    with pytest.raises(ValueError, match="x.npz is not a plain .npy array"):
        map_files.load_cam("x.npy", [1, 0, 0])
    assert not os.path.exists("bombed") and pickle.dumps(Bomb())


def test_maps_of_others_are_scored_and_made_into_masks(exported):
    """The exported folders, read back by their names: the score and the masks of our own maps."""
    root = exported
    base = ["--data", root / "data", "--out", root / "out", *SHARED, "--split", "train"]
    scores, masks = {}, {}
    for cam in ("cam", "cam_irn", "cam_psa", "cam_clip_es", "cam_fma"):
        done = call("eval.py", *base, "--what", "cam", "--cam", cam, "--threshold", "0.5")
        assert done.returncode == 0, done.stderr
        scores[cam] = json.loads((root / f"out/eval_{cam}_train.json").read_text())["miou"]
        done = call("make_pseudo.py", *base, "--cam", cam, "--pseudo", f"p_{cam}", "--no-crf", "--threshold", "0.5")
        assert done.returncode == 0, done.stderr
        masks[cam] = np.concatenate([mask_files.load_mask(root / f"out/p_{cam}/{id}.png").ravel() for id in LABELS])
    assert len(np.unique(masks["cam"])) > 2
    for cam in scores:
        assert scores[cam] == pytest.approx(scores["cam"], abs=0.01) and (masks[cam] == masks["cam"]).mean() > 0.99, cam
