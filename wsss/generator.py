"""The mask generator S (SemPLeS 3.2.1; WeakTr's DeiT-S): an image -> one raw map per class, never negative.

    S = DeiT(num_classes=20)                                  # or load_generator("weaktr.pth")
    maps = S.maps(images)                                     # RGB in [0, 1], (B, 3, H, W) -> (B, C, h, w)

forward(images) -> (maps, logits), logits a tuple of (B, C) that train_cls.py trains on image labels.
"""
import importlib.util
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """(B, N, width) -> output (B, N, width), softmax attention (B, heads, N, N)"""
        B, N, width = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)       # (B, heads, N, N)
        return self.proj((attention.to(v.dtype) @ v).transpose(1, 2).reshape(B, N, width)), attention


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.drop_path = drop_path

    def forward(self, x):
        """-> tokens, attention, and the attention branch's output before it is added to the tokens"""
        o, attention = self.attn(self.norm1(x))
        x = x + self.drop(o)
        return x + self.drop(self.mlp(self.norm2(x))), attention, o

    def drop(self, branch):
        """Stochastic depth: in training a sample loses the branch with probability drop_path."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        return self.proj(images)                                                      # (B, width, h, w)


class AttentionFusion(nn.Module):
    """WeakTr: how much each of the heads x layers attention maps counts, from what the branches put out."""

    def __init__(self, maps, channels, reduction, pool):
        super().__init__()
        self.pool = pool
        self.attn_feat_ffn = nn.Sequential(nn.Linear(channels, 8), nn.Linear(8, 1))
        self.attn_head_ffn = nn.Sequential(nn.Linear(maps, maps // reduction, bias=False), nn.ReLU(),
                                           nn.Linear(maps // reduction, maps, bias=False), nn.Sigmoid())

    def forward(self, attentions, outputs):
        """Per layer (B, heads, N, N), (B, N, width) -> mean over all of weight * attention, (B, N, N)"""
        layers, (B, heads, N, _) = len(attentions), attentions[0].shape
        pooled = [o.amax(1) if self.pool == "max" else o.mean(1) for o in outputs]
        pooled = torch.stack(pooled, dim=1)                                           # (B, layers, width)
        # From the authors' code, not in the paper: head i owns the channels i, i + heads, ... here, though
        # attention itself gives it a contiguous block. Published fusion weights need it so.
        pooled = pooled.view(B, layers, pooled.shape[2] // heads, heads).permute(0, 3, 1, 2)
        scores = self.attn_feat_ffn(pooled).flatten(1)  # (B, heads * layers), index head * layers + layer
        weights = self.attn_head_ffn(scores).view(B, 1, heads, layers)
        # Layer by layer: the stack of all attentions, hundreds of MB at test size, is never made.
        fused = sum(weights[..., i] @ attention.flatten(2) for i, attention in enumerate(attentions))
        return fused.view(B, N, N) / (heads * layers)


class DeiT(nn.Module):
    """DeiT with a class token per class: patch attention @ (class-to-patch attention * relu(coarse map)).

    Parameter names are WeakTr's, so its and SemPLeS's checkpoints load unchanged."""

    last_layers = ("head.", "adaptive_attention_fusion.")     # what trains in (a), (c)
    never_train = ("norm.",)                                  # on no path to a map
    maps_are_masks = False                                    # raw maps: losses.mask_from_map scales them

    def __init__(self, num_classes, width=384, depth=12, heads=6, patch=16, grid=14, reduction=8, pool="max",
                 drop_path=0.1):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, num_classes, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_classes + grid ** 2, width))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6).requires_grad_(False)               # checkpoints hold it
        self.head = nn.Conv2d(width, num_classes, 3, padding=1)
        self.kept = slice(None)  # the classes it maps; fewer for a COCO S of 90 ids
        self.adaptive_attention_fusion = AttentionFusion(heads * depth, width // heads, reduction, pool)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @property
    def pool(self):
        return self.adaptive_attention_fusion.pool

    def maps(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> fine maps (B, C, h, w), raw, >= 0"""
        return self(images)[0]

    def forward(self, images, from_labels=False):
        """RGB in [0, 1] (B, 3, H, W) -> fine maps (B, C, h, w); logits (B, C) of tokens, coarse, fine maps

        `from_labels`: S learns from image labels (train_cls.py)."""
        C = self.cls_token.shape[1]
        tokens, attentions, outputs, (h, w) = self.run_blocks(images)
        patches = tokens[:, C:].transpose(1, 2).unflatten(2, (h, w))                  # (B, width, h, w)
        coarse = self.head(patches)                                                   # (B, C, h, w)
        with torch.autocast(images.device.type, enabled=False):                       # small numbers: float32
            coarse, tokens = coarse.float(), tokens.float()
            fused = self.adaptive_attention_fusion(attentions, outputs)               # (B, N, N)
            # From the authors' code, not in the paper: WeakTr detaches the coarse map there, so that the loss
            # of the fine maps moves the fusion only; in (a) and (c) the head gets their gradient.
            given = coarse.detach() if from_labels else coarse
            cams = fused[:, :C, C:] * given.flatten(2).relu()                         # (B, C, h * w)
            fine = torch.einsum("bnm,bcm->bcn", fused[:, C:, C:], cams).unflatten(2, (h, w))
            logits = tokens[:, :C].mean(-1), coarse.mean((-2, -1)), fine.mean((-2, -1))
            return fine[:, self.kept], tuple(z[:, self.kept] for z in logits)

    def run_blocks(self, images):
        """-> tokens (B, C + h * w, width); per layer attention and branch output, detached; grid (h, w)

        With a frozen backbone nothing here records a graph, since no weight asks for a gradient."""
        # From the authors' code, not in the paper: the patch convolution drops what is beyond a multiple of
        # the patch on the right and below; the map of the rest is stretched over the whole image.
        h, w = (n // self.patch for n in images.shape[-2:])
        if min(h, w) == 0:
            h, w = max(h, 1), max(w, 1)
            images = F.interpolate(images, (h * self.patch, w * self.patch), mode="bilinear")
        x = self.patch_embed((images - self.mean) / self.std).flatten(2).transpose(1, 2)  # (B, h * w, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position(h, w)
        attentions, outputs = [], []
        for block in self.blocks:
            x, attention, o = block(x)
            attentions.append(attention.detach().float())
            outputs.append(o.detach().float())
        return x, attentions, outputs, (h, w)

    def position(self, h, w):
        """-> (1, C + h * w, width)"""
        if h == w == self.grid:
            return self.pos_embed
        C, grid = self.cls_token.shape[1], self.grid
        patches = self.pos_embed[:, C:].transpose(1, 2).unflatten(2, (grid, grid))
        # From the authors' code, not in the paper: by scale factor, with DINO's 0.1, not by size.
        factor = (h + 0.1) / grid, (w + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=factor, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :C], patches.flatten(2).transpose(1, 2)], dim=1)

    def load_imagenet(self, state):
        """A plain DeiT's ImageNet weights: its class token and that token's position are repeated C times."""
        C = self.cls_token.shape[1]
        if state["cls_token"].shape[1] != 1:
            raise RuntimeError(f"it has {state['cls_token'].shape[1]} class tokens: it is a generator, "
                               "not ImageNet weights; give it to --init")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state["cls_token"] = state["cls_token"].expand(-1, C, -1)
        position = state["pos_embed"]
        state["pos_embed"] = torch.cat([position[:, :1].expand(-1, C, -1), position[:, 1:]], dim=1)
        own = self.state_dict()
        fresh = {name: value for name, value in own.items() if name.startswith(self.last_layers)}
        self.load_state_dict({**state, **fresh})


# ---------------------------------------------------------------- from weights, and what of it trains

# From the authors' code, not in the paper: WeakTr's and SemPLeS's COCO generators map COCO's category ids
# 1..90, row id - 1, also these ten that were never used.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_KEPT = [id - 1 for id in range(1, 91) if id not in COCO_GAPS]


def deit_from_state(state, pool="max", drop_path=0.1):
    """The DeiT whose sizes are those of a state dict with WeakTr's names, and its weights."""
    classes = len(state["head.weight"])
    squeezed, maps = state["adaptive_attention_fusion.attn_head_ffn.0.weight"].shape  # (72 / r, 72)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    grid = round((state["pos_embed"].shape[1] - classes) ** 0.5)
    patch = state["patch_embed.proj.weight"].shape[-1]
    model = DeiT(classes, width=state["pos_embed"].shape[2], depth=depth, heads=maps // depth, patch=patch,
                 grid=grid, reduction=maps // squeezed, pool=pool, drop_path=drop_path)
    model.load_state_dict(state)
    return model


class Ignored:
    """Stands for what public trainers keep beside the weights, arguments and numbers of numpy: nothing of it
    is rebuilt."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


ALLOWED = [(Ignored, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar",
                                      "numpy._core.multiarray.scalar")]


def load_generator(path, pool="max"):
    """A checkpoint of ours, of WeakTr or of SemPLeS -> S.

    Ours hold their pooling; of others `pool` says it (max: VOC, avg: COCO), and of COCO's 90 ids the 80 in
    use are mapped. What is no DeiT, as CLIMS's ResNet-50 and the toy world's CNN, is read by
    plumbing/networks.py, where that is there."""
    with torch.serialization.safe_globals(ALLOWED):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if "stage" in content:
        pool = content["args"].get("pool") or pool
    state = content.get("model", content)
    if "adaptive_attention_fusion.attn_head_ffn.0.weight" in state:
        try:
            model = deit_from_state(state, pool).eval()
        except KeyError as error:
            raise ValueError(f"{path} is no DeiT of WeakTr's kind, it has no {error.args[0]}") from None
        if len(state["head.weight"]) == 90 and len(content.get("classes", COCO_KEPT)) == 80:
            model.kept = COCO_KEPT
        return model
    if not importlib.util.find_spec("plumbing"):              # this file was copied alone
        raise ValueError(f"{path} is no DeiT of WeakTr's kind, which is all that this file reads")
    networks = importlib.import_module("plumbing.networks")
    return networks.load_generator(path, SimpleNamespace(device="cpu"), pool=pool).eval()


def parameters_to_train(S, train_backbone=False):
    """Freezes S but for its last layers (SemPLeS (a), (c)), or nothing of it -> the parameters that train.

    From the authors' code, not in the paper: the ViT is frozen; head and fusion train, 8 tensors, 70,965
    numbers for VOC's 20 classes."""
    for name, parameter in S.named_parameters():
        last = name.startswith(S.last_layers)
        parameter.requires_grad_(last or train_backbone and not name.startswith(S.never_train))
    return [parameter for parameter in S.parameters() if parameter.requires_grad]
