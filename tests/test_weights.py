"""plumbing/weights.py: files of weights as others publish them. No code in them is run, what is not read is
named, and a download of another SHA-256 does not stay."""
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from argparse import Namespace
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused
from torchvision.models import ResNet50_Weights, ResNet101_Weights

from plumbing import weights
from wsss.clip_model import openai_clip


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def save(path, content):
    torch.save(content, path)
    return path


# ---------------------------------------------------------------- reading

def test_what_public_trainers_keep_beside_the_weights_is_passed_over(tmp_path):
    beside = {"args": Namespace(lr=1e-3), "miou": np.float64(69.4), "best": np.float32(1), "epoch": 41}
    state = {"module.a": torch.ones(2), "module.b": torch.zeros(1)}
    new = save(tmp_path / "numpy2.pth", {"model": state, **beside})
    old = tmp_path / "numpy1.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    for path in (new, old):
        found, notes = weights.state_of(weights.read(path), path)
        assert {name: value.tolist() for name, value in found.items()} == {"a": [1, 1], "b": [0]}
        assert notes == ["'model' around it", "args, miou, best, epoch beside it",
                         "module. before every name"]
    assert weights.state_of({"state_dict": {"a": state["module.a"]}}, "")[1] == ["'state_dict' around it"]
    assert weights.state_of({"a": state["module.a"]}, "")[1] == []


@pytest.mark.parametrize("content,words", [
    ([1], "holds no state dict"), ({"model": {}}, "holds no state dict"), ({"a": 1}, "holds no state dict"),
    ({"a": torch.tensor([0, float("nan")])}, "a holds NaN or infinity")])
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
    path = save(tmp_path / "x.pth", content)
    with pytest.raises(ValueError, match=f"x.pth: {words}"):
        weights.state_of(weights.read(path), path)


def test_a_file_that_torch_did_not_write_or_that_asks_for_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = io.BytesIO()
    torch.save({"a": torch.ones(300)}, whole)
    junk = tmp_path / "junk.pth"
    for content in (b"hello, world", b"", whole.getvalue()[:700], pickle.dumps([1, 2], 2)[:-2]):
        junk.write_bytes(content)
        with pytest.raises(ValueError, match="junk.pth: .*torn, or torch did not write it"):
            weights.read(junk)
    for content, asked in ((Bomb(), "posix.mkdir"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear")):
        with pytest.raises(ValueError, match=f"junk.pth: .*it asks for {asked}") as error:
            weights.read(save(junk, {"model": {"a": torch.ones(1)}, "net": content}))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "bombed").exists()
    with pytest.raises(FileNotFoundError, match="none.pth is missing"):
        weights.read(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="match.pt is missing: run train_match.py first"):
        weights.read(tmp_path / "match.pt")


def test_the_first_name_that_does_not_fit_is_named():
    model = torch.nn.Linear(2, 2)
    good = model.state_dict()
    for state, words in (({**good, "extra": torch.ones(1)}, "extra"), ({"weight": good["weight"]}, "bias"),
                         ({**good, "bias": torch.ones(5)}, "size mismatch for bias")):
        with pytest.raises(ValueError, match=f"x.pth does not fit this network: .*{words}") as error:
            weights.fit("x.pth", model.load_state_dict, state)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="x.pth does not fit this network: it has no cls_token"):
        weights.fit("x.pth", lambda state: state["cls_token"], {})


@pytest.mark.parametrize("stem", ["resnet50", "deit_small_patch16_224"])
def test_a_file_named_by_its_checksum_must_have_it(stem, tmp_path):
    path = save(tmp_path / "x.pth", {"a": torch.ones(3)})
    right = tmp_path / f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    wrong = tmp_path / f"{stem}-0676ba61.pth"
    right.symlink_to(path)
    wrong.symlink_to(path)
    assert weights.read(right)["a"].sum() == 3
    with pytest.raises(ValueError, match=f"{wrong.name}: its SHA-256 is not the one .* 0676ba61"):
        weights.read(wrong)


# ---------------------------------------------------------------- downloads

def test_imagenet_weights_come_from_their_publisher_and_nothing_else_stays(monkeypatch, tmp_path):
    """Through torch.hub's folder; a download, and a kept file, of another SHA-256 is refused and removed."""
    file = "resnet101-63fe2227.pth"
    url, _ = weights.PUBLISHED[file]
    place, other = tmp_path / "checkpoints" / file, save(tmp_path / "x.pth", {"fc.bias": torch.ones(3)})
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen",
                        lambda request: asked.append(request.full_url) or urlopen(other.as_uri()))
    message = rf'{file} cannot be downloaded \(invalid hash value .*\): put {url}{file} at {place}, or give'
    with pytest.raises(ValueError, match=message):
        weights.download(file)
    assert asked == [url + file] and os.listdir(tmp_path / "checkpoints") == []
    place.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{place}: its SHA-256 is not .* it is removed: run the same"):
        weights.download(file)
    assert not place.exists() and len(asked) == 1
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, file, (url, digest))
    for _ in range(2):                                        # downloaded, then kept
        assert weights.download(file)["fc.bias"].sum() == 3
    assert len(asked) == 2


def test_checksums_are_those_of_the_names():
    addresses = {url + name for name, (url, _) in weights.PUBLISHED.items()}
    assert {ResNet50_Weights.IMAGENET1K_V1.url, ResNet101_Weights.IMAGENET1K_V1.url} < addresses
    for name, (_, digest) in weights.PUBLISHED.items():
        assert len(digest) == 64 and digest.startswith(re.search("-([0-9a-f]{8}).pth", name)[1])


def hub(root, content, name=None):
    """A folder as huggingface_hub keeps a download: files of weights link to blobs named by their SHA-256."""
    blob = root / "blobs" / (name or hashlib.sha256(content).hexdigest())
    snapshot = root / "snapshots/0123abc"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def test_a_download_from_the_hub_is_checked(tmp_path, monkeypatch):
    torn = hashlib.sha256(b"weights").hexdigest()
    made = {"good/swin": hub(tmp_path / "a", b"weights"), "torn/swin": hub(tmp_path / "b", b"weigh", torn)}
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        if name not in made:
            raise OSError("no such\nmodel")
        return str(made[name])

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert weights.from_hub("good/swin") == str(made["good/swin"])
    assert asked == [["*.json", "*.safetensors"]]
    with pytest.raises(ValueError, match=f"safetensors: its SHA-256 is not {torn[:16]}.*removed, run"):
        weights.from_hub("torn/swin")
    assert os.listdir(made["torn/swin"]) == ["config.json"] and not os.listdir(tmp_path / "b/blobs")
    weights.from_hub("torn/swin")
    assert asked[-1] == ["*.json", "pytorch_model*.bin"]      # the other kind, where there is no safetensors
    with pytest.raises(ValueError, match=r"none/swin cannot be loaded: .*\(no such\): give a model's name"):
        weights.from_hub("none/swin")
    assert weights.from_hub(tmp_path) == str(tmp_path)        # a folder is somebody's own


def test_the_weights_in_the_repository_are_those_of_their_list(tmp_path):
    """sha256sum reads the list too; a changed file is refused before it is read."""
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=ROOT / "weights").returncode == 0
    copy = tmp_path / "weights"
    copy.mkdir()
    for path in (ROOT / "weights").iterdir():
        (copy / path.name).write_bytes(path.read_bytes() + b"x" * (path.name == "toy_clip.pt"))
    done = call("make_toy.py", "--out", tmp_path / "toy", "--weights", copy)
    refused(done, f"{copy / 'toy_clip.pt'}: its SHA-256 is not", "SHA256SUMS", "--train-weights")
    assert not (tmp_path / "toy").exists()


# ---------------------------------------------------------------- CLIP

class Archived(openai_clip.model.CLIP):
    def forward(self, images):
        return images + 1


@pytest.mark.filterwarnings("ignore")                         # TorchScript is deprecated
def test_openais_archives_are_opened_by_their_sha256_alone(tiny_clip, tmp_path):
    """An archive is TorchScript, a program; a plain state dict beside it needs no such trust."""
    state = torch.load(tiny_clip, weights_only=True)
    model = openai_clip.model.build_model(dict(state)).float()
    model.load_state_dict(state)
    model.__class__ = Archived
    path = tmp_path / "archive.pt"
    torch.jit.trace(model, torch.rand(1)).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="archive.pt: TorchScript, which may run code, .* none of OpenAI"):
        weights.read_clip(path, {digest[::-1]: "ViT-B/32"})
    for found, kind in ((path, "OpenAI's ViT-T/8"), (tiny_clip, "a state dict, QuickGELU assumed")):
        content, what, notes = weights.read_clip(found, {digest: "ViT-T/8"})
        assert what.startswith(kind) and notes == []
        assert content.keys() == state.keys() and torch.equal(content["visual.proj"], state["visual.proj"])


# ---------------------------------------------------------------- CLIMS, IRN

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


def test_irns_three_names_of_a_tensor_become_one():
    names = ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.3.bn3.running_var",
             "layer3.5.conv1.weight", "layer4.2.conv3.weight")
    state = {name: torch.randn(2) for name in names}
    last = torch.randn(3)
    copies = {**irn(state), "classifier.weight": last, "newly_added.0.weight": last}
    assert len(copies) == 3 * len(names) + 2
    for given in (copies, {name: value for name, value in copies.items() if not name.startswith("stage")}):
        merged = weights.rename_irn(given, "x.pth")
        assert merged.keys() == {f"backbone.{name}" for name in names} | {"classifier.weight"}
        assert all(torch.equal(merged[f"backbone.{name}"], value) for name, value in state.items())
    copies["backbone.2.0.5.conv1.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match="x.pth: .* differs from its other copy .*layer3.5.conv1.weight"):
        weights.rename_irn(copies, "x.pth")
