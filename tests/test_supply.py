"""What is downloaded and what comes with the repository: a file that is another than its checksum says is refused, and does not stay."""
import hashlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, refused

from plumbing import weights as weight_files
from wsss import clip_model


def hub(root, content, name=None):
    """A folder as huggingface_hub keeps a download: snapshots/<commit>/<file> are links to blobs, of weights by their SHA-256."""
    blob = root / "blobs" / (name or hashlib.sha256(content).hexdigest())
    snapshot = root / "snapshots/0123abc"
    blob.parent.mkdir(parents=True), snapshot.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def test_a_download_from_the_hub_is_checked(tmp_path, monkeypatch):
    made = {"whole/swin": hub(tmp_path / "a", b"weights"), "torn/swin": hub(tmp_path / "b", b"weigh", hashlib.sha256(b"weights").hexdigest())}
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        if name not in made:
            raise OSError("no such\nmodel")
        return str(made[name])

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert weight_files.from_hub("whole/swin") == str(made["whole/swin"]) and asked == [["*.json", "*.safetensors"]]
    with pytest.raises(ValueError, match="model.safetensors: its SHA-256 is not 9a129038d9a0.*removed, run the same command again"):
        weight_files.from_hub("torn/swin")
    assert [path.name for path in made["torn/swin"].iterdir()] == ["config.json"] and not list((tmp_path / "b/blobs").iterdir())
    assert weight_files.from_hub("torn/swin") and asked[-1] == ["*.json", "pytorch_model*.bin"]                # the other kind, where there is no safetensors
    with pytest.raises(ValueError, match=r"none/swin cannot be loaded: .*\(no such model\): give a model's name, with a connection, or the folder"):
        weight_files.from_hub("none/swin")
    assert weight_files.from_hub(tmp_path) == str(tmp_path)                                                     # a folder is somebody's own
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        weight_files.from_hub("whole/swin")


def test_a_clip_of_another_checksum_does_not_stay(tmp_path, monkeypatch):
    """The real package downloads a file of our own in place of OpenAI's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert clip_model.PUBLISHED[digest] == "ViT-B/32" and all(len(digest) == 64 for digest in clip_model.PUBLISHED)
    (tmp_path / digest).mkdir()
    (tmp_path / digest / "ViT-B-32.pt").write_bytes(b"another file")
    monkeypatch.setitem(clip_model.openai_clip.clip._MODELS, "ViT-B/32", (tmp_path / digest / "ViT-B-32.pt").as_uri())
    with pytest.raises(FileNotFoundError, match=r"CLIP ViT-B/32: download failed \(.*SHA256 .*put ViT-B-32.pt into .*clip"):
        clip_model.load_clip("ViT-B/32")
    assert (tmp_path / ".cache/clip").is_dir() and not list((tmp_path / ".cache/clip").iterdir())


def test_the_weights_that_come_with_the_repository(tmp_path):
    """As in SHA256SUMS, which sha256sum reads too; a changed one is refused before it is read."""
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=ROOT / "weights").returncode == 0
    weights = tmp_path / "weights"
    weights.mkdir()
    for path in (ROOT / "weights").iterdir():
        (weights / path.name).write_bytes(path.read_bytes() + b"x" * (path.name == "toy_clip.pt"))
    refused(call("make_toy.py", "--out", tmp_path / "toy", "--weights", weights), f"{weights / 'toy_clip.pt'}: its SHA-256 is not", "SHA256SUMS", "--train-weights")
    assert not (tmp_path / "toy").exists()
