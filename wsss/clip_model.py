"""The frozen CLIP: load it, encode images and class names, learn background prompts.

    clip = load_clip("ViT-B/32", device)              # or a file: OpenAI's archive, or a plain state dict
    clip.encode_image(images), clip.encode_text(["a photo of dog."])                  # unit length, float32
    u_b = BackgroundPrompts(clip, num_classes=20)()                                   # (C, D), SemPLeS 3.2.2
"""

import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():                                   # it imports pkg_resources, which warns at every start
    warnings.simplefilter("ignore")
    import clip as openai_clip


def load_clip(name_or_path, device="cpu", vit=False):
    """An OpenAI name (downloaded once, SHA-checked), an OpenAI archive, or a plain state dict with OpenAI's names -> FrozenClip.

    With `vit`, a CLIP whose image encoder is a ResNet is refused: GradCAM and the decoder read the patches of a vision transformer."""
    name = str(name_or_path)
    if Path(name).is_file():
        model = read_clip(name)
        if vit and not hasattr(model.visual, "transformer"):
            raise ValueError(f"{name}: the image encoder of this CLIP is a {type(model.visual).__name__}: a vision transformer is needed, take ViT-B/16")
    elif vit and name in openai_clip.available_models() and name.startswith("RN"):
        raise ValueError(f"--clip {name}: the image encoder of this CLIP is a ResNet: a vision transformer is needed, take ViT-B/16")
    elif name in openai_clip.available_models():
        place = Path.home() / ".cache" / "clip" / f"{name.replace('/', '-').replace('@', '-')}.pt"
        try:
            model, _ = openai_clip.load(name, device="cpu")
        except (OSError, RuntimeError) as error:
            if "SHA256" in str(error):                            # what it has downloaded is another file, and lies there
                place.unlink(missing_ok=True)
            raise FileNotFoundError(f"CLIP {name}: download failed ({error}); put {place.name} into {place.parent}, or pass the path of the file") from None
    else:
        raise FileNotFoundError(f"CLIP {name}: no such file, and not one of {', '.join(openai_clip.available_models())}")
    return FrozenClip(model).to(device)


# OpenAI's archives are TorchScript, a program that torch.jit.load may run: only those of a SHA-256 that OpenAI publishes are opened.
PUBLISHED = {url.split("/")[-2]: name for name, url in openai_clip.clip._MODELS.items()}


def read_clip(path):
    """A file with CLIP's weights -> the CLIP model, float32."""
    content, kind = open_file(path)
    state, around = plain_state(content, path)
    try:
        if len(state["positional_embedding"]) > 1024 or "visual.positional_embedding" in state and len(state["visual.positional_embedding"]) > 1 << 14:
            raise ValueError("it reads more than 1024 tokens, or 16,384 patches")
        with torch.device("meta"), warnings.catch_warnings():     # first without memory: the file may say any size
            warnings.simplefilter("ignore")                       # that nothing is copied there
            openai_clip.model.build_model(dict(state))
        model = openai_clip.model.build_model(dict(state)).float()
        model.load_state_dict(state)                              # again: build_model has rounded the weights to half precision
    except (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError) as error:
        problem = f"it has no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:400]
        raise ValueError(f"{path}: not the weights of a CLIP with OpenAI's names ({problem})") from None
    visual = model.visual
    shape = f"ViT of {visual.conv1.kernel_size[0]} px patches" if hasattr(visual, "transformer") else type(visual).__name__
    if os.environ.get("RANK", "0") == "0":                        # one line, whatever the number of processes
        precision = str(state["visual.conv1.weight"].dtype).removeprefix("torch.")
        print(f"{path}: CLIP, {kind}, {shape}, {visual.input_resolution} px, {precision}{'; left out: ' if around else ''}{', '.join(around)}")
    return model


def open_file(path):
    """-> what a file holds, and a word on where it is from."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception:                                             # an old state dict is no zip; a torn zip raises its own
        names = []
    if any(name.endswith("/constants.pkl") for name in names):    # TorchScript
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if digest not in PUBLISHED:
            raise ValueError(f"{path}: TorchScript, which may run code, and by SHA-256 ({digest[:16]}...) none of OpenAI's files: download it again, "
                             "or, where you trust it, torch.save(torch.jit.load(FILE).state_dict(), 'clip.pt')")
        return torch.jit.load(path, map_location="cpu").state_dict(), f"OpenAI's {PUBLISHED[digest]} by SHA-256"
    try:
        # open_clip's files have the same names, also of its models with plain GELU: which it is no file says.
        return torch.load(path, map_location="cpu", weights_only=True), "a state dict, QuickGELU assumed, as OpenAI's"
    except Exception as error:                                    # zip, pickle and torch each raise their own for a foreign file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else str(error) if isinstance(error, OSError) else "it is torn, or torch did not write it"
        raise ValueError(f"{path}: neither a state dict nor one of OpenAI's archives ({reason})") from None


def plain_state(content, path):
    """-> the state dict under OpenAI's names, and what was taken off or left out."""
    wrapper = next((name for name in ("state_dict", "model") if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    state = content[wrapper] if wrapper else content
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise ValueError(f"{path}: not the weights of a CLIP: no state dict at the top, under 'state_dict' or under 'model'")
    around = [f"{wrapper!r} around it and what is beside it"] if wrapper else []
    if all(name.startswith("module.") for name in state):
        state, around = {name.removeprefix("module."): value for name, value in state.items()}, around + ["module. before every name"]
    sizes = ("input_resolution", "context_length", "vocab_size")  # numbers kept in OpenAI's archives
    state = {name: value for name, value in state.items() if name not in sizes}
    for name, value in state.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ValueError(f"{path}: {name} is no plain tensor of real numbers: take another file")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes() or value.numel() == 0:
            raise ValueError(f"{path}: {name} says {tuple(value.shape)}, its file holds other numbers: it is damaged, or made to unpack without end"[:400])
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged, download it again")
    return state, around


class FrozenClip(nn.Module):
    """CLIP as a fixed measuring device: no weight gradients, never in training mode, features float32 and of unit length."""

    def __init__(self, model):
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        self.size = model.visual.input_resolution
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1), persistent=False)
        self.register_buffer("imagenet_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("imagenet_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self):
        """Says which CLIP this is, whether it came by name or from a file."""
        digest = hashlib.sha256()
        for weight in (self.model.visual.conv1.weight, self.model.text_projection):
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def normalize(self, images, fill="mean"):
        """(B, 3, H, W) RGB in [0, 1] -> (B, 3, size, size), what CLIP's image encoder expects.

        SemPLeS multiplies it by a mask, so that `fill` says what a removed pixel becomes. "mean": the mean colour. "black": the pixels
        stay in [0, 1] here, and encode_normalized normalises them. "imagenet": the mean colour, by the statistics of the authors' code."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1)                           # bicubic overshoots at edges; PIL, and so CLIP's own transform, clips
        if fill == "black":
            return images
        if fill == "imagenet":
            # From the authors' code, not in the paper: CLIP is fed with pixels normalised for the DeiT.
            return (images - self.imagenet_mean) / self.imagenet_std
        return (images - self.mean) / self.std

    def encode_image(self, images, micro_batch=0):
        """(B, 3, H, W) RGB in [0, 1] -> (B, D), unit length."""
        return self.encode_normalized(self.normalize(images), micro_batch)

    def encode_normalized(self, regions, micro_batch=0, fill="mean"):
        """(B, 3, size, size) from `normalize` -> (B, D), unit length. With `micro_batch`, that many at a time, recomputed in the backward pass."""
        if fill == "black":
            regions = (regions - self.mean) / self.std
        if not micro_batch or len(regions) <= micro_batch:
            return self._encode(regions)
        return torch.cat([checkpoint(self._encode, part, use_reentrant=False) if part.requires_grad else self._encode(part)
                          for part in regions.split(micro_batch)])

    def _encode(self, regions):
        if len(regions) == 0:                                     # a rank without a pair: nothing to encode, and still a graph for DDP
            return self.model.text_projection.new_zeros(0, self.model.text_projection.shape[1]) + regions.flatten(1).sum(1, keepdim=True)
        return F.normalize(self.model.encode_image(regions).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts):
        """list of str -> (len(texts), D), unit length."""
        try:
            tokens = openai_clip.tokenize(texts).to(self.mean.device)                 # (n, 77)
        except RuntimeError as error:
            raise ValueError(f"{' '.join(str(error).split())[:200]}: shorten the name, or the template") from None
        eos = tokens.argmax(-1)                                                       # EOS is the largest token number
        return run_text_tower(self.model, self.model.token_embedding(tokens[:, :eos.max() + 1]), eos)


def run_text_tower(model, x, eos):
    """Embedded tokens (n, T, width), T <= 77, and the position of EOS (n,) -> (n, D), unit length.

    Attention is causal: no token after EOS can change a feature, so callers leave them out.
    """
    length = x.shape[1]
    x = (x + model.positional_embedding[:length]).permute(1, 0, 2)                    # (T, n, width)
    mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask.to(y.dtype))[0]
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x)[eos, torch.arange(len(eos), device=x.device)]               # (n, width)
    return F.normalize((x @ model.text_projection).float(), dim=-1)


class BackgroundPrompts(nn.Module):
    """SemPLeS 3.2.2, u_k^b = E_T(p_k): per class one sequence of L learned vectors in "SOS a photo of [p_1 .. p_L] . EOS".

    `vectors` (C, L, width) is all that trains and all that is saved. CLIP must already be on its device.
    """

    def __init__(self, clip, num_classes, length=30, init="uniform"):
        super().__init__()
        self.hidden = (clip.model,)                               # in a tuple, so that CLIP is in no state dict, optimizer or DDP bucket
        embedding = clip.model.token_embedding
        if length + 6 > clip.model.context_length:
            raise ValueError(f"prompt length {length}: CLIP reads {clip.model.context_length} tokens, so at most {clip.model.context_length - 6}")
        vectors = torch.empty(num_classes, length, embedding.embedding_dim, device=embedding.weight.device)
        if init == "uniform":
            # From the authors' code, not in the paper: [0, 1), while CLIP's own token embeddings are about 1e-2.
            vectors.uniform_()
        elif init == "normal":
            vectors.normal_(std=0.02)
        else:
            raise ValueError(f"init is 'uniform' or 'normal', not {init!r}")
        self.vectors = nn.Parameter(vectors)
        tokens = openai_clip.tokenize("a photo of .")[0].to(embedding.weight.device)  # SOS a photo of . EOS 0 0 ...
        with torch.no_grad():
            self.register_buffer("start", embedding(tokens[:4]), persistent=False)    # SOS a photo of
            self.register_buffer("end", embedding(tokens[4:6]), persistent=False)     # . EOS

    def forward(self, classes=None):
        """-> u_b (C, D), unit length; with `classes` (n,) only theirs, (n, D): a step costs the classes of its batch, the others' gradient is zero."""
        vectors = self.vectors if classes is None else self.vectors.index_select(0, classes)
        n, length, _ = vectors.shape
        if n == 0:                                                # a rank without a pair: nothing to encode, and still a graph for DDP
            return vectors.new_zeros(0, self.hidden[0].text_projection.shape[1]) + vectors.flatten(1).sum(1, keepdim=True)
        x = torch.cat([self.start.expand(n, -1, -1), vectors, self.end.expand(n, -1, -1)], dim=1)    # (n, 6 + L, width)
        return run_text_tower(self.hidden[0], x, torch.full((n,), 5 + length, device=x.device))
