"""CLIPs from files, OpenAI's, transformers' and open_clip's -> a state dict with OpenAI's names, which GELU
it was trained with, and the mean and std of its pixels.

    path = clip_files.locate("openai/clip-vit-base-patch32")            # or a folder, or a file
    state, gelu, statistics, kind, notes = clip_files.read(path, published)
"""
import re
import zipfile
from pathlib import Path

import torch

from plumbing import files, weights

# Files of weights in a folder, first the one that is taken, each with the file that describes it.
FOLDER = {"model.safetensors": "config.json", "pytorch_model.bin": "config.json",
          "open_clip_model.safetensors": "open_clip_config.json",
          "open_clip_pytorch_model.bin": "open_clip_config.json"}
RENAMED = {  # transformers' names, in this order -> OpenAI's
    "vision_model.": "visual.", "text_model.": "", "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.": "",
    "encoder.layers.": "transformer.resblocks.", ".layer_norm": ".ln_", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn.": "attn."}


def locate(name):
    """A file, a folder, or a model's name on the Hugging Face hub -> the file of its weights"""
    place = Path(name)
    if not place.exists() and is_hub_name(name):
        place = Path(weights.from_hub(name))
    if place.is_dir():
        found = [place / file for file in FOLDER if (place / file).exists()]
        if not found:
            raise FileNotFoundError(f"CLIP {place}: the folder holds none of {', '.join(FOLDER)}")
        place = found[0]
    return place


def is_hub_name(name):
    """owner/name; a file that is missing and a misspelt name of OpenAI's are none."""
    return (re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).parent.is_dir()
            and not name.startswith(("ViT-", "RN")) and not name.endswith((".pt", ".pth", ".bin")))


def read_beside(path, name):
    """What a JSON file beside the weights says; nothing where there is none."""
    return files.read_json(path.parent / name) if (path.parent / name).exists() else {}


def read(path, published, gelu=None):
    """-> state, gelu ("quick" or "plain"), (mean, std) or None for OpenAI's, what it is, what was left out.
    `gelu`, where it is given, is believed.

    OpenAI's archives are TorchScript, a program that torch.jit.load may run: only those whose SHA-256 is a
    key of `published` are opened."""
    if is_script(path):
        digest = files.sha256(path)
        if digest not in published:
            raise ValueError(f"{path}: TorchScript, which may run code, and by SHA-256 ({digest[:16]}...) "
                             "none of OpenAI's files: download it again, or, where you trust it, "
                             "torch.save(torch.jit.load(FILE).state_dict(), 'clip.pt')")
        content, kind = torch.jit.load(path, map_location="cpu").state_dict(), f"OpenAI's {published[digest]}"
    else:
        content, kind = weights.read(path), "a state dict"
    state, notes = weights.state_of(content, path)
    described = pixels = None
    if "vision_model.embeddings.class_embedding" in state:
        kind, state = "transformers'", weights.fit(path, rename_transformers, state)
        described = describe_transformers(read_beside(path, "config.json"), path)
        pixels = read_beside(path, "preprocessor_config.json")
        pixels = pixels.get("image_mean"), pixels.get("image_std")
    elif FOLDER.get(path.name) == "open_clip_config.json" or "state_dict" in content:
        kind, config = "open_clip's", read_beside(path, "open_clip_config.json")
        described = describe_open_clip(config, path)
        pixels = config.get("preprocess_cfg", {})
        pixels = pixels.get("mean"), pixels.get("std")
    if kind in ("transformers'", "open_clip's") and not (gelu or described):
        raise ValueError(f"{path}: {kind} weights without their config do not say which GELU they were "
                         "trained with: give --clip-gelu plain (open_clip's default) or quick (OpenAI's)")
    assumed = " (assumed; else --clip-gelu plain)" if kind == "a state dict" and gelu is None else ""
    gelu = gelu or described or "quick"
    kind += f", {'QuickGELU' if gelu == 'quick' else 'plain GELU'}{assumed}"
    return state, gelu, pixels if pixels and all(pixels) else None, kind, notes


def is_script(path):
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except Exception:                                         # an old state dict is not a zip
        return False


# ---------------------------------------------------------------- transformers

def rename_transformers(state):
    """The names and shapes of CLIPModel -> OpenAI's: q, k, v in one matrix, projections from the right."""
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    renamed = {"visual.proj": state.pop("visual_projection.weight").T.contiguous(),
               "text_projection": state.pop("text_projection.weight").T.contiguous()}
    for name in list(state):
        if ".q_proj." in name:
            parts = [state.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    for name, value in state.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def describe_transformers(config, path):
    """Its GELU, of both towers; None where there is no config.json."""
    if not config:
        return None
    towers = [config.get(name) or {} for name in ("vision_config", "text_config")]
    for tower, width, heads in zip(towers, (768, 512), (12, 8)):     # what is left out of a config.json
        check_heads(tower.get("hidden_size", width), tower.get("num_attention_heads", heads), path)
    names = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    found = {"quick_gelu": "quick", "gelu": "plain"}.get(names.pop())
    if names or found is None:
        raise ValueError(f"{path}: its config.json names an activation that is neither quick_gelu nor gelu, "
                         "or one for each tower: not a CLIP that this program can run")
    return found


# ---------------------------------------------------------------- open_clip

def describe_open_clip(config, path):
    if not config:
        return None
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    if "heads" in text:
        check_heads(text["width"], text["heads"], path)
    if "layers" in vision and not isinstance(vision["layers"], list):                 # a list: a ResNet
        check_heads(vision["width"], vision["width"] // vision.get("head_width", 64), path)
    return "quick" if model.get("quick_gelu") else "plain"


def check_heads(width, heads, path):
    """OpenAI's code, which runs the network, makes attention heads of 64 channels."""
    if width != 64 * heads:
        raise ValueError(f"{path}: {heads} attention heads on {width} channels; heads of 64 channels can be "
                         "run, as those of ViT-B and ViT-L")
