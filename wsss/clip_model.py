"""The frozen CLIP: load it, encode images and class names, learn background prompts.

    clip = load_clip("ViT-B/32", device)                      # or a file
    clip.encode_image(images)                                 # RGB in [0, 1] -> (B, D), unit length, float32
    clip.encode_text(["a photo of dog."])
    u_b = BackgroundPrompts(clip, num_classes=20)()           # (C, D), SemPLeS 3.2.2
"""
import hashlib
import importlib.util
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F


def openai():
    """OpenAI's package, imported where it is used: it brings torchvision, which takes as long as torch."""
    with warnings.catch_warnings():  # it imports pkg_resources, which warns at every start
        warnings.simplefilter("ignore")
        import clip
    return clip


def load_clip(name_or_path, device="cpu"):
    """An OpenAI name (downloaded once), or a file -> FrozenClip.

    Where plumbing/ is beside this folder, any file that --clip takes; else a plain state dict with OpenAI's
    names."""
    if str(name_or_path) in openai().available_models():
        return FrozenClip(openai().load(str(name_or_path), device="cpu")[0]).to(device)
    if importlib.util.find_spec("plumbing"):                  # not where this file was copied alone
        networks = importlib.import_module("plumbing.networks")
        return networks.open_clip_file(str(name_or_path)).to(device)
    return clip_from_state(torch.load(name_or_path, map_location="cpu", weights_only=True)).to(device)


def clip_from_state(state, gelu="quick", pixels=None):
    """A state dict with OpenAI's names, in any precision -> FrozenClip.

    What others' CLIPs may have besides: a "plain" GELU, and `pixels`, mean and std of three channels each."""
    state = dict(state)
    model = openai().model.build_model(state).float()  # removes an archive's three metadata keys from state
    model.load_state_dict(state)  # again: build_model has rounded the weights to half
    for mlp in [module for module in model.modules() if gelu == "plain" and hasattr(module, "gelu")]:
        mlp.gelu = nn.GELU()
    clip = FrozenClip(model)
    for buffer, values in zip((clip.mean, clip.std), pixels or ()):
        buffer.copy_(torch.tensor(values).view(3, 1, 1))
    return clip


class FrozenClip(nn.Module):
    """CLIP as a fixed measuring device: no weight gradients, never in training mode, features float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        self.size = model.visual.input_resolution
        self.tau = 1 / model.logit_scale.exp().item()         # its own temperature, .01 for OpenAI's
        statistics = {"mean": [0.48145466, 0.4578275, 0.40821073],
                      "std": [0.26862954, 0.26130258, 0.27577711],
                      "imagenet_mean": [0.485, 0.456, 0.406], "imagenet_std": [0.229, 0.224, 0.225]}
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self):
        """Says which CLIP this is, whether it came by name or from a file."""
        digest = hashlib.sha256()
        for weight in (self.model.visual.conv1.weight, self.model.text_projection, self.mean, self.std):
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        digest.update(b"plain GELU" if any(isinstance(m, nn.GELU) for m in self.model.modules()) else b"")
        return digest.hexdigest()[:16]

    def normalize(self, images, fill="mean"):
        """(B, 3, H, W) RGB in [0, 1] -> (B, 3, size, size), what CLIP's image encoder expects.

        SemPLeS multiplies it by a mask: a removed pixel is 0, the mean colour."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True,
                                   align_corners=False)
            images = images.clamp(0, 1)  # bicubic overshoots at edges; CLIP's transform clips
        if fill == "imagenet":
            # From the authors' code, not in the paper: CLIP is fed with pixels normalised for the DeiT.
            return (images - self.imagenet_mean) / self.imagenet_std
        return (images - self.mean) / self.std

    def encode_image(self, images):
        """(B, 3, H, W) RGB in [0, 1] -> (B, D), unit length."""
        return self.encode_normalized(self.normalize(images))

    def encode_normalized(self, regions):
        """(B, 3, size, size) from `normalize` -> (B, D), unit length."""
        if len(regions) == 0:                                 # a rank without a pair: still a graph for DDP
            width = self.model.text_projection.shape[1]
            return self.model.text_projection.new_zeros(0, width) + regions.flatten(1).sum(1, keepdim=True)
        visual = self.model.visual
        features = run_image_tower(visual, regions) if hasattr(visual, "transformer") else visual(regions)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts):
        """list of str -> (len(texts), D), unit length."""
        try:
            tokens = openai().tokenize(texts).to(self.mean.device)                 # (n, 77)
        except RuntimeError as error:
            text = " ".join(str(error).split()).removeprefix("Input ")[:60]
            raise ValueError(f"the text {text!r}... has more tokens than CLIP reads: "
                             "shorten the name, or the template") from None
        eos = tokens.argmax(-1)                               # EOS is the largest token number
        return run_text_tower(self.model, self.model.token_embedding(tokens[:, :eos.max() + 1]), eos)

    def encode_ensemble(self, texts):
        """Per template a list of n str -> the mean of their features (n, D), unit length."""
        return F.normalize(torch.stack([self.encode_text(each) for each in texts]).mean(0), dim=-1)


def run_text_tower(model, x, eos):
    """Embedded tokens (n, T, width), T <= 77, and the position of EOS (n,) -> (n, D), unit length.

    Attention is causal: no token after EOS can change a feature, so callers leave them out."""
    length = x.shape[1]
    x = (x + model.positional_embedding[:length]).permute(1, 0, 2)                    # (T, n, width)
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)    # what comes after it
    x = model.ln_final(read_token(model.transformer.resblocks, x, eos, hidden))       # (n, width)
    return F.normalize((x @ model.text_projection).float(), dim=-1)


def run_image_tower(visual, images):
    """Normalised images (n, 3, size, size) -> (n, D); of a ViT."""
    x = visual.conv1(images.to(visual.conv1.weight.dtype))
    x = x.flatten(2).permute(2, 0, 1)                                                 # (N, n, width)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(1, len(images), -1), x])
    x = visual.ln_pre(x + visual.positional_embedding[:, None].to(x.dtype))           # (1 + N, n, width)
    first = torch.zeros(len(images), dtype=torch.long, device=x.device)
    return visual.ln_post(read_token(visual.transformer.resblocks, x, first)) @ visual.proj


def read_token(blocks, x, at, hidden=None):
    """Tokens (T, n, width) -> those at position `at` (n,) as the last block leaves them, (n, width).

    A feature is read from one token, so the last block computes no other. `hidden` (T, T): True where a token
    (row) does not see another (column)."""
    for block in blocks[:-1]:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        x = x + block.mlp(block.ln_2(x))
    last, each = blocks[-1], torch.arange(len(at), device=x.device)
    if hidden is not None:
        hidden = hidden[at].repeat_interleave(last.attn.num_heads, 0)[:, None]        # (n heads, 1, T)
    y = last.ln_1(x)
    z = last.attn(y[at, each][None], y, y, need_weights=False, attn_mask=hidden)[0]   # (1, n, width)
    x = x[at, each] + z[0]
    return x + last.mlp(last.ln_2(x))


class BackgroundPrompts(nn.Module):
    """SemPLeS 3.2.2, u_k^b = E_T(p_k): per class L learned vectors in "SOS a photo of [v_1 .. v_L] . EOS".

    `vectors` (C, L, width) is all that trains and all that is saved. CLIP must already be on its device."""

    def __init__(self, clip, num_classes, length=30, init="uniform"):
        super().__init__()
        self.frozen = (clip.model,)  # in a tuple: CLIP is in no state dict or DDP bucket
        embedding = clip.model.token_embedding
        most = clip.model.context_length - 6
        if length > most:
            raise ValueError(f"prompt length {length}: CLIP reads {most + 6} tokens, so at most {most}")
        vectors = torch.empty(num_classes, length, embedding.embedding_dim, device=embedding.weight.device)
        if init == "uniform":
            # From the authors' code, not in the paper: [0, 1); CLIP's own token embeddings are about 1e-2.
            vectors.uniform_()
        elif init == "normal":
            vectors.normal_(std=0.02)
        else:
            raise ValueError(f"init is 'uniform' or 'normal', not {init!r}")
        self.vectors = nn.Parameter(vectors)
        # From the authors' code, not in the paper: "a photo of" before the vectors, a full stop after them.
        # It is token 13 there, "." within a word; here 269, as the tokenizer reads it in the class texts.
        tokens = openai().tokenize("a photo of .")[0].to(embedding.weight.device)  # SOS a photo of . EOS 0
        with torch.no_grad():
            self.register_buffer("start", embedding(tokens[:4]), persistent=False)    # SOS a photo of
            self.register_buffer("end", embedding(tokens[4:6]), persistent=False)     # . EOS

    def forward(self, classes=None):
        """-> u_b (C, D), unit length; with `classes` (n,), those of a batch, only theirs (n, D)."""
        vectors = self.vectors if classes is None else self.vectors.index_select(0, classes)
        n, length, _ = vectors.shape
        if n == 0:                                            # a rank without a pair: still a graph for DDP
            width = self.frozen[0].text_projection.shape[1]
            return vectors.new_zeros(0, width) + vectors.flatten(1).sum(1, keepdim=True)
        x = torch.cat([self.start.expand(n, -1, -1), vectors, self.end.expand(n, -1, -1)], dim=1)
        return run_text_tower(self.frozen[0], x, torch.full((n,), 5 + length, device=x.device))
