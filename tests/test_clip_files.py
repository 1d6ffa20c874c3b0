"""plumbing/clip_files.py: CLIPs as transformers and open_clip save them give those programs' own features."""
import hashlib
import json
from types import SimpleNamespace

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused
from test_networks import refusal
from test_weights import save

from plumbing import clip_files, networks, weights
from wsss import clip_model

RUN = SimpleNamespace(device=torch.device("cpu"), in_turn=lambda make: make())
TEXTS = ["a photo of dog.", "a clean origami bird avian."]
VISION = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512,
              image_size=32, patch_size=8)
TEXT = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256)


def features(name, **more):
    """What our program sees of two images and two texts."""
    clip = networks.load_clip(str(name), RUN, vit=True, **more)
    return clip.encode_image(images()), clip.encode_text(TEXTS)


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pixels():
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    return (images() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def spread(model):
    """Large random weights, so that the two GELUs differ and every bias counts."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.dim() else 0
    return model.eval()


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, F.normalize(other, dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gelu", ["quick_gelu", "gelu"])
def test_transformers_clips(tmp_path, monkeypatch, capsys, gelu):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config={**VISION, "hidden_act": gelu}, projection_dim=24,
                                     text_config={**TEXT, "hidden_act": gelu})
    model = spread(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        tokens = openai_clip.tokenize(TEXTS)
        wanted = model(input_ids=tokens, pixel_values=pixels())
    wanted = wanted.image_embeds, wanted.text_embeds
    assert_close(features(tmp_path), wanted)
    said = capsys.readouterr().out
    assert f"transformers', {'QuickGELU' if gelu == 'quick_gelu' else 'plain GELU'}, ViT of 8 px" in said
    monkeypatch.setattr(weights, "from_hub", {"openai/clip-vit-base-patch32": tmp_path}.get)
    assert_close(features("openai/clip-vit-base-patch32"), wanted)
    assert_close(features(tmp_path / "model.safetensors"), wanted)
    # Alone under another name, as older files are: the GELU must be said.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3],
                                                                   "image_std": [0.2, 0.3, 0.4]}))
    clip = networks.load_clip(tmp_path, RUN)
    assert clip.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    torch.testing.assert_close(clip.normalize(images())[0, 2], (images()[0, 2] - 0.3) / 0.4)
    (tmp_path / "alone").mkdir()
    alone = save(tmp_path / "alone/clip.bin", model.state_dict())
    assert "--clip-gelu plain" in refusal(networks.load_clip, alone, RUN)
    assert_close(features(alone, gelu="quick" if gelu == "quick_gelu" else "plain"), wanted)
    wrong = features(alone, gelu="plain" if gelu == "quick_gelu" else "quick")
    assert (wrong[0] - wanted[0]).abs().max() > 1e-3                # the test can tell them apart
    content = json.loads((tmp_path / "config.json").read_text())
    for change, words in (({"hidden_act": "relu"}, "neither quick_gelu nor gelu"),
                          ({"num_attention_heads": 1}, "1 attention heads on 128 channels")):
        content["vision_config"] = {**content["vision_config"], **change}
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert words in refusal(networks.load_clip, tmp_path, RUN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quick", [True, False])
def test_open_clips(tmp_path, quick):
    open_clip = pytest.importorskip("open_clip")
    sizes = dict(embed_dim=24, vision_cfg=dict(image_size=32, layers=3, width=128, patch_size=8),
                 text_cfg=dict(width=64, heads=1, layers=2))
    model = spread(open_clip.CLIP(**sizes, quick_gelu=quick))
    with torch.no_grad():
        wanted = model.encode_image(pixels()), model.encode_text(openai_clip.tokenize(TEXTS))
    save(tmp_path / "open_clip_pytorch_model.bin", model.state_dict())
    described = {"model_cfg": {**sizes, **({"quick_gelu": True} if quick else {})}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    assert_close(features(tmp_path), wanted)
    trained = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in
                                                         model.state_dict().items()}}
    described["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    clip = networks.load_clip(tmp_path, RUN)
    torch.testing.assert_close(clip.normalize(images()), 2 * images() - 1)
    (tmp_path / "alone").mkdir()
    path = save(tmp_path / "alone/epoch_3.pt", trained)
    assert "--clip-gelu plain" in refusal(networks.load_clip, path, RUN)
    assert_close(features(path, gelu="quick" if quick else "plain"), wanted)
    for part, change, words in (("text_cfg", {"heads": 2}, "2 attention heads on 64 channels"),
                                ("vision_cfg", {"head_width": 32}, "4 attention heads on 128 channels")):
        wrong = {**described["model_cfg"], part: {**described["model_cfg"][part], **change}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": wrong}))
        assert words in refusal(networks.load_clip, tmp_path, RUN)
    (tmp_path / "open_clip_config.json").unlink()
    assert "--clip-gelu plain" in refusal(networks.load_clip, tmp_path, RUN)


def test_a_folder_without_weights_and_a_name_nobody_has(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="the folder holds none of model.safetensors"):
        networks.load_clip(tmp_path, RUN)
    monkeypatch.setattr(weights, "from_hub", None)            # is not asked
    for name in ("ViT-B/33", "clips/none.pt", f"{tmp_path}/none"):
        with pytest.raises(FileNotFoundError, match=f"CLIP {name}: no such file, and not one of RN50"):
            networks.load_clip(name, RUN)
    assert "leave --clip-gelu out" in refusal(lambda: networks.load_clip("ViT-B/32", RUN, gelu="plain"))
    save(tmp_path / "model.safetensors", {})
    assert "not a checkpoint of plain tensors" in refusal(networks.load_clip, tmp_path, RUN)


def test_the_gelu_is_part_of_the_recipe_and_of_the_clip(voc, tmp_path, tiny_clip):
    """A stage refuses what was learned with the other GELU."""
    quick, plain = (clip_model.clip_from_state(torch.load(tiny_clip, weights_only=True), gelu)
                    for gelu in ("quick", "plain"))
    assert quick.fingerprint() != plain.fingerprint()
    flags = ["--data", voc, "--out", tmp_path, "--split", "train", "--device", "cpu", "--workers", "0",
             "--clip", tiny_clip]
    maps = [*flags, "--source", "text", "--sheets", "0"]
    assert call("make_cam.py", *maps, "--clip-gelu", "plain").returncode == 0
    refused(call("make_cam.py", *maps), "--clip-gelu")


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
        clip_files.read(path, {digest[::-1]: "ViT-B/32"})
    assumed = "a state dict, QuickGELU (assumed; else --clip-gelu plain)"
    for found, kind in ((path, "OpenAI's ViT-T/8, QuickGELU"), (tiny_clip, assumed)):
        content, gelu, pixels, what, notes = clip_files.read(found, {digest: "ViT-T/8"})
        assert what.startswith(kind) and notes == [] and gelu == "quick" and pixels is None
        assert content.keys() == state.keys() and torch.equal(content["visual.proj"], state["visual.proj"])


class Archived(openai_clip.model.CLIP):
    def forward(self, images):
        return images + 1
