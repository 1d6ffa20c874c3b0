"""The mask generator S: image -> one raw map per class, never negative.

    generator = build_generator("deit_small", num_classes=20, start="imagenet")       # WeakTr's, the one of SemPLeS
    generator = load_generator("match.pt")                                            # or a published one of WeakTr, SemPLeS, CLIMS, IRN
    maps = generator.maps(images)                                                     # RGB in [0, 1] -> (B, C, h, w)

forward(images) -> (maps, logits), logits a tuple of (B, C) that train_cls.py trains on image labels.
"""

import hashlib
import os
import re
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights, resnet50

DEIT_IMAGENET = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"
SHA256 = {                                                        # the publishers give the first eight digits, in the name
    "deit_small_patch16_224-cd65a155.pth": "cd65a15597004d0ce19d7a9daef969903972db5b398e3a5febcd3c4df1d8f59f",
    "resnet50-0676ba61.pth": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
}


# ----------------------------------------------------------------------------- DeiT with attention fusion (WeakTr)

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """(B, N, width) -> output (B, N, width), softmax attention (B, heads, N, N)"""
        B, N, width = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)   # (B, heads, N, width / heads)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
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
        """Stochastic depth: in training a sample loses the branch with probability drop_path; the others are scaled up."""
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
    """WeakTr: how much each of the heads x layers attention maps counts, from what the attention branches put out."""

    def __init__(self, maps, channels, reduction, pool):
        super().__init__()
        self.pool = pool
        self.attn_feat_ffn = nn.Sequential(nn.Linear(channels, 8), nn.Linear(8, 1))
        self.attn_head_ffn = nn.Sequential(nn.Linear(maps, maps // reduction, bias=False), nn.ReLU(),
                                           nn.Linear(maps // reduction, maps, bias=False), nn.Sigmoid())

    def forward(self, attentions, outputs):
        """Per layer (B, heads, N, N) and (B, N, width) -> mean over all maps of weight * attention, (B, N, N)"""
        layers, (B, heads, N, _) = len(attentions), attentions[0].shape
        pooled = torch.stack([o.amax(1) if self.pool == "max" else o.mean(1) for o in outputs], dim=1)    # (B, layers, width)
        # From the authors' code, not in the paper: head i owns the channels i, i + heads, ... here, though attention itself
        # gives it a contiguous block. Published fusion weights need it so.
        pooled = pooled.view(B, layers, pooled.shape[2] // heads, heads).permute(0, 3, 1, 2)                # (B, heads, layers, width / heads)
        scores = self.attn_feat_ffn(pooled).flatten(1)                                # (B, heads * layers), index head * layers + layer
        weights = self.attn_head_ffn(scores).view(B, 1, heads, layers)
        # Layer by layer: the stack of all attentions, hundreds of MB at test size, is never made.
        fused = sum(weights[..., i] @ attention.flatten(2) for i, attention in enumerate(attentions))     # (B, 1, N * N)
        return fused.view(B, N, N) / (heads * layers)


class DeiT(nn.Module):
    """DeiT with one class token per class; map = patch attention @ (class-to-patch attention * relu(coarse map)).

    Parameter names are WeakTr's, so its and SemPLeS's checkpoints load unchanged.
    """

    trains_when_frozen = ("head.", "adaptive_attention_fusion.")
    rests = ("norm.",)                                            # never trains: on no path to a map
    maps_are_masks = False                                        # raw maps: the stages min-max them (losses.mask_from_map)

    def __init__(self, num_classes, width=384, depth=12, heads=6, patch=16, grid=14, reduction=8, pool="max", drop_path=0.1):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, num_classes, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_classes + grid ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6).requires_grad_(False)               # in every checkpoint, on no path to a map
        self.head = nn.Conv2d(width, num_classes, 3, padding=1)
        self.kept = slice(None)                                   # the classes it maps: all, but for a COCO generator of 90 (load_generator)
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

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> fine maps (B, C, h, w); logits of class tokens, coarse maps, fine maps, each (B, C)"""
        C = self.cls_token.shape[1]
        tokens, attentions, outputs, (h, w) = self.run_blocks(images)
        patches = tokens[:, C:].transpose(1, 2).unflatten(2, (h, w))                  # (B, width, h, w)
        coarse = self.head(patches)                                                   # (B, C, h, w)
        with torch.autocast(images.device.type, enabled=False):                       # maps are small numbers: float32
            coarse, tokens = coarse.float(), tokens.float()
            fused = self.adaptive_attention_fusion(attentions, outputs)               # (B, N, N)
            cams = fused[:, :C, C:] * coarse.flatten(2).relu()                        # (B, C, h * w)
            fine = torch.einsum("bnm,bcm->bcn", fused[:, C:, C:], cams).unflatten(2, (h, w))
            logits = tokens[:, :C].mean(-1), coarse.mean((-2, -1)), fine.mean((-2, -1))
            return fine[:, self.kept], tuple(z[:, self.kept] for z in logits)

    def run_blocks(self, images):
        """-> tokens (B, C + h * w, width); per layer the attention and its branch's output, detached; the grid (h, w)

        With the backbone frozen (parameters_to_train) nothing here records a graph, since no weight asks for a gradient.
        """
        h, w = (max(1, round(n / self.patch)) for n in images.shape[-2:])
        if (h * self.patch, w * self.patch) != tuple(images.shape[-2:]):
            # Differs from the paper: to the nearest multiple of the patch; the public code drops up to 15 pixels at the edge.
            images = F.interpolate(images, (h * self.patch, w * self.patch), mode="bilinear", align_corners=False)
        x = self.patch_embed((images - self.mean) / self.std).flatten(2).transpose(1, 2)              # (B, h * w, width)
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
        # From the authors' code, not in the paper: by scale factor, with DINO's 0.1; resizing by size gives slightly other values.
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / grid, (w + 0.1) / grid), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :C], patches.flatten(2).transpose(1, 2)], dim=1)

    def load_imagenet(self, state):
        """A plain DeiT's ImageNet weights: its class token and that token's position are repeated C times; its classifier is left out."""
        C = self.cls_token.shape[1]
        if state["cls_token"].shape[1] != 1:
            raise RuntimeError(f"it has {state['cls_token'].shape[1]} class tokens: a generator, no ImageNet weights; give it to --init")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state["cls_token"] = state["cls_token"].expand(-1, C, -1)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1].expand(-1, C, -1), state["pos_embed"][:, 1:]], dim=1)
        fresh = {name: value for name, value in self.state_dict().items() if name.startswith(self.trains_when_frozen)}
        self.load_state_dict({**state, **fresh})


# ------------------------------------------------------------------------------------------------ ResNet-50 (CLIMS)

class Clims(nn.Module):
    """A 1x1 classifier without bias on a CNN. The stages train and use sigmoid(logits), a mask already; the maps for inference are relu(logits)."""

    trains_when_frozen = ("classifier.",)
    rests = ()
    maps_are_masks = True
    pool = None                                                   # no attention is fused

    def __init__(self, width, num_classes):
        super().__init__()
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return keep_statistics(super().train(mode))               # Differs from the paper: CLIMS's code lets them follow; a mean over processes would change them

    def maps(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w), >= 0"""
        return self.class_logits(images).relu()

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> masks (B, C, h, w) in (0, 1); a tuple of one: the logits (B, C) of the plain CAM classifier"""
        logits = self.class_logits(images)
        return logits.sigmoid(), (logits.mean((-2, -1)),)

    def class_logits(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w)"""
        return self.classifier(self.features((images - self.mean) / self.std)).float()


class ResNet50(Clims):
    """CLIMS's generator, at stride 16."""

    # From the authors' code, not in the paper: where the backbone trains, its first convolution and that one's BatchNorm do not.
    rests = ("backbone.conv1.", "backbone.bn1.")

    def __init__(self, num_classes):
        super().__init__(2048, num_classes)
        self.backbone = resnet50()
        del self.backbone.fc
        last = self.backbone.layer4[0]                            # strides 2, 2, 2, 1 and no dilation
        last.conv2.stride = last.downsample[0].stride = (1, 1)

    def features(self, x):
        """(B, 3, H, W) normalised -> (B, 2048, h, w)"""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))

    def load_imagenet(self, state):
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        self.backbone.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- the toy's CNN

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def toy_trunk(width, blocks):
    """Stride 4: (B, 3, H, W) -> (B, width, h, w)"""
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *(Residual(width) for _ in range(blocks)))


def load_trunk(trunk, state):
    trunk.load_state_dict({name.removeprefix("trunk."): value for name, value in state.items()})


class ToyCNN(nn.Module):
    """The toy world's S: a small residual CNN at stride 4 and a 3x3 head; map = relu(head), a plain CAM.

    Differs from the paper: a DeiT of this size does not learn to localise. Interface and training are those of the DeiT.
    """

    trains_when_frozen = ("head.",)
    rests = ()
    maps_are_masks = False
    pool = None

    def __init__(self, num_classes, width=64, blocks=3):
        super().__init__()
        self.trunk = toy_trunk(width, blocks)
        self.head = nn.Conv2d(width, num_classes, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return keep_statistics(super().train(mode))

    def maps(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w), >= 0"""
        return self(images)[0]

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> maps (B, C, h, w); a tuple of one: the logits (B, C) of the plain CAM classifier"""
        coarse = self.head(self.trunk((images - self.mean) / self.std)).float()       # (B, C, h, w)
        return coarse.relu(), (coarse.mean((-2, -1)),)

    def load_imagenet(self, state):
        load_trunk(self.trunk, state)


class ToyClims(Clims):
    """The toy world's S of CLIMS's kind, on the trunk of ToyCNN."""

    def __init__(self, num_classes, width=64, blocks=3):
        super().__init__(width, num_classes)
        self.trunk = toy_trunk(width, blocks)

    def features(self, x):
        return self.trunk(x)

    def load_imagenet(self, state):
        load_trunk(self.trunk, state)


def keep_statistics(model):
    """BatchNorm uses the statistics of pre-training and never updates them: frozen means frozen, for any number of processes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


# ------------------------------------------------------------------------------------------------- making and loading

TINY = dict(width=64, depth=2, heads=4, patch=6, grid=4, reduction=2)                 # DeiT for tests: every part, few numbers


def build_generator(name, num_classes, pool="max", reduction=8, start=None, drop_path=0.1):
    """A fresh S. `start`: None, "imagenet" (downloaded once), or a file with ImageNet / toy backbone weights."""
    if name == "deit_small":
        model = DeiT(num_classes, pool=pool, reduction=reduction, drop_path=drop_path)
    elif name == "deit_tiny":
        model = DeiT(num_classes, pool=pool, drop_path=drop_path, **TINY)
    elif name == "resnet50":
        model = ResNet50(num_classes)
    elif name == "cnn_toy":
        model = ToyCNN(num_classes)
    elif name == "clims_toy":
        model = ToyClims(num_classes)
    else:
        raise ValueError(f"generator {name}: not one of {', '.join(NAMES)}")
    if start == "imagenet":
        model.load_imagenet(download_imagenet(name))
    elif start is not None:
        state, around = state_of(read(start), start)
        load_strictly(start, model.load_imagenet, state)
        said(start, f"{name}'s backbone, {len(state)} tensors", around, [name for name in state if name.startswith(("head.", "fc."))])
    return model


NAMES = ("deit_small", "resnet50", "cnn_toy", "clims_toy", "deit_tiny")


def download_imagenet(name):
    """DeiT-S's or ResNet-50's ImageNet weights, where torch.hub keeps them, their SHA-256 checked at each reading; another file is removed."""
    if name not in ("deit_small", "resnet50"):
        raise ValueError(f"generator {name} has no ImageNet weights: pass the file of its backbone")
    url = DEIT_IMAGENET if name == "deit_small" else ResNet50_Weights.IMAGENET1K_V1.url
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), SHA256[place.name])       # beside, then renamed
    except Exception as error:                                    # no connection, another hash, a full disk: each raises its own
        raise ValueError(f"no ImageNet weights ({error}): put {url} at {place}, or give --backbone FILE or --backbone none") from None
    try:
        content = read(place)
    except ValueError as error:
        place.unlink()
        raise ValueError(f"{error}; it is removed: run the same command again") from None
    return content.get("model", content)


# From the authors' code, not in the paper: WeakTr's and SemPLeS's COCO generators have a class token and a map for each of COCO's category
# ids 1..90, row id - 1, also for these ten that were never used.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_NAMES = "d7654b2610157284"                                   # SHA-256 of the names of the 80 in use, a line each


def load_generator(path, pool=None, classes=None, drop_path=0.1):
    """A checkpoint of ours, of WeakTr, SemPLeS, CLIMS or IRN -> S. Sizes come from the weights.

    `pool` (max: VOC, avg: COCO) is in files of ours alone, and must be theirs; of others it is max where it is None, and COCO's 90 ids ask for it.
    With `classes`, the names of the data folder, a generator for another number of classes is refused, and one of ours for other names."""
    content = read(path)
    state, around = state_of(content, path)
    if "resnet50.conv1.weight" in state:
        copies, state = len(state), irn_names(state, path)
        around.append(f"{copies - len(state)} copies that agree")
    own = content.get("args")
    known = own.get("pool") if isinstance(own, dict) and own.get("pool") in ("max", "avg") else None            # of others it is no dict
    try:
        with torch.device("meta"):                                # first without memory: the file may say any size
            empty, kind = shaped_like(state, known or pool or "max", drop_path)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its tensors make no mask generator ({' '.join(str(error).split())[:200]})") from None
    if empty is None:
        raise ValueError(f"{path}: not a mask generator ({what_else(state, content)})")
    load_strictly(path, lambda state: empty.load_state_dict(state, assign=True), state)
    model, _ = shaped_like(state, known or pool or "max", drop_path)
    load_strictly(path, model.load_state_dict, state)
    if model.pool and known and pool not in (None, known):
        raise ValueError(f"{path}: trained with --pool {known}: leave --pool {pool} out, or train it again with that")
    found, names = len(state["classifier.weight" if "classifier.weight" in state else "head.weight"]), content.get("classes")
    if isinstance(model, DeiT) and classes is not None and (found, len(classes)) == (90, 80):
        if hashlib.sha256("\n".join(classes).encode()).hexdigest()[:16] != COCO_NAMES:
            raise ValueError(f"{path}: maps 90 classes, the data folder has 80, not named as COCO's: which 80 of the 90 they are is known of COCO's only")
        if not known and not pool:
            raise ValueError(f"{path}: of COCO's 90 ids, and its pooling is in no such file: give --pool avg, as the published ones were trained, or --pool max")
        model.kept = [id - 1 for id in range(1, 91) if id not in COCO_GAPS]
        kind += ", of COCO's 90 ids the 80 in use"
    elif classes is not None and found != len(classes):
        raise ValueError(f"{path}: maps {found} classes, the data folder has {len(classes)}: give the --data it was trained on, or another generator")
    if not (names is None or isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: its classes are no list of names: take another file")
    if classes is not None and names not in (None, list(classes)):
        other = next((n for n, pair in enumerate(zip(names, classes)) if pair[0] != pair[1]), 0)
        raise ValueError(f"{path}: trained on other classes, its class {other} is {names[other]!r:.60}, the data folder's {classes[other]!r:.60}: give the --data it was trained on")
    if "stage" not in content:
        said(path, f"{kind}, {found} classes", around)
    return model


def shaped_like(state, pool, drop_path):
    """-> the network whose names and sizes are those of a state dict, and what it is; None: no generator."""
    if {"trunk.0.weight", "trunk.3.weight"} <= state.keys() and not state.keys().isdisjoint(("head.weight", "classifier.weight")):
        toy, last, kind = (ToyCNN, "head.weight", "toy CNN") if "head.weight" in state else (ToyClims, "classifier.weight", "toy CNN as in CLIMS")
        return toy(len(state[last]), width=len(state["trunk.3.weight"]), blocks=sum(name.endswith("conv1.weight") for name in state)), kind
    if "classifier.weight" in state:
        return ResNet50(num_classes=len(state["classifier.weight"])), "ResNet-50 as in CLIMS"
    if {"head.weight", "pos_embed", "adaptive_attention_fusion.attn_head_ffn.0.weight"} <= state.keys():
        return deit_like(state, pool, drop_path), f"DeiT with attention fusion as in WeakTr, pooling {pool} (not in the file: --pool)"
    return None, None


def what_else(state, content):
    """What a file that is no generator is, as far as its names tell."""
    if "stage" in content:
        return f"it is of stage {content['stage']!r:.40}: give a cls.pt, match.pt or refine.pt"
    if "adaptive_attention_fusion.fc.0.weight" in state:
        return "WeakTr's first release, whose fusion had other weights: take the present one"
    if {"cls_token", "head.weight"} <= state.keys() or {"fc.weight", "layer4.0.conv1.weight"} <= state.keys() or "trunk.0.weight" in state:
        return "weights of a classifier or backbone: they go to train_cls.py --backbone"
    return f"no head with attention fusion and no classifier among its {len(state)} weights, the first {next(iter(state))}"


def irn_names(state, path):
    """IRN's and CLIMS's ResNet-50 holds each tensor three times, under resnet50, stage1..4 and backbone -> once, under our names. Copies must agree."""
    ours = {"resnet50.": "backbone.", "newly_added.0.": "classifier."}
    for place, name in (("0.0", "conv1"), ("0.1", "bn1"), ("0.4", "layer1"), ("1.0", "layer2"), ("2.0", "layer3"), ("3.0", "layer4")):
        ours[f"backbone.{place}."] = ours[f"stage{int(place[0]) + 1}.{place[2]}."] = f"backbone.{name}."
    merged = {}
    for name, value in state.items():
        prefix = next((prefix for prefix in ours if name.startswith(prefix)), "")
        new = ours.get(prefix, "") + name[len(prefix):]
        if not torch.equal(merged.setdefault(new, value), value):
            raise ValueError(f"{path}: {name} differs from its other copy {new}: the file is damaged or was put together from two networks")
    return merged


def deit_like(state, pool, drop_path):
    """The DeiT whose sizes are those of a checkpoint."""
    classes = len(state["head.weight"])
    squeezed, maps = state["adaptive_attention_fusion.attn_head_ffn.0.weight"].shape              # (heads * depth / r, heads * depth)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    grid = round((state["pos_embed"].shape[1] - classes) ** 0.5)
    return DeiT(classes, width=state["pos_embed"].shape[2], depth=depth, heads=maps // depth, patch=state["patch_embed.proj.weight"].shape[-1],
                grid=grid, reduction=maps // squeezed, pool=pool, drop_path=drop_path)


def state_of(content, path):
    """-> the state dict of a checkpoint, and what was taken off or left out: {"model": ...} or {"state_dict": ...}, the prefix module. of DataParallel."""
    wrapper = next((name for name in ("model", "state_dict") if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    state = content[wrapper] if wrapper else content
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise ValueError(f"{path}: holds no state dict, neither at the top nor under 'model' or 'state_dict'")
    state = dict(state)                                           # without its metadata, which can tell load_state_dict to take tensors as they are
    around = [f"{wrapper!r} around it"] if wrapper else []
    if wrapper and len(content) > 1:
        around.append(f"{', '.join(str(name) for name in content if name != wrapper)} beside it")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        around.append("module. before every name")
    for name, value in state.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ValueError(f"{path}: {name} is no plain tensor of real numbers: take another file")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes() or value.numel() == 0:
            raise ValueError(f"{path}: {name} says {tuple(value.shape)}, its file holds other numbers: it is damaged, or made to unpack without end"[:400])
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training broke down or the file is damaged; take another one")
    return state, around


def said(path, what, around, left=()):
    """One line on rank 0: what was read from a file that is not ours, and what was not taken."""
    around = [*around, *([f"its classifier {', '.join(left)}"] if left else [])]
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: {what}{'; left out: ' if around else ''}{', '.join(around)}")


def read(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    digits = re.fullmatch(r"(?:deit_small_patch16_224|resnet50)-([0-9a-f]{8})\.pth", Path(path).name)     # of its SHA-256: torch.hub's convention
    if digits and not hashlib.sha256(Path(path).read_bytes()).hexdigest().startswith(SHA256.get(Path(path).name, digits[1])):
        raise ValueError(f"{path}: its SHA-256 is not the one that begins with {digits[1]}, as published: download it again")
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                    # zip, pickle and torch each raise their own for a foreign file
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({reason(error)})") from None


class Left:
    """Stands for numpy's numbers, which are left out: its own dtype and scalar would take bytes for addresses."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


# The public trainers keep their arguments, a Namespace, and their mIoU, a number of numpy's, beside the weights.
PLAIN = [Namespace, *((Left, name) for name in ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"))]


def reason(error):
    """What a refused file asks for, or that it is no archive of torch's: torch's own text is advice to trust it."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {asked[1]}" if asked else str(error) if isinstance(error, OSError) else "it is torn, or torch did not write it"


def load_strictly(path, load, state):
    """Every key must fit, and the first that does not is named."""
    try:
        load(state)
    except KeyError as error:
        raise ValueError(f"{path} does not fit this network: it has no {error.args[0]}") from None
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this network: {' '.join(str(error).split())[:400]}") from None


def parameters_to_train(generator, train_backbone=False):
    """Freeze S but for its last layers (SemPLeS (a), (c)), or nothing of it -> [(name, parameter)] that train.

    From the authors' code, not in the paper: the ViT is frozen; head and fusion train, 8 tensors, 70,965 numbers for VOC's 20 classes.
    """
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_((train_backbone and not name.startswith(generator.rests)) or name.startswith(generator.trains_when_frozen))
    return [(name, parameter) for name, parameter in generator.named_parameters() if parameter.requires_grad]


def parameter_groups(generator, train_backbone, lr, head_rate):
    """What trains, for an optimizer: the backbone, often nothing of it, at `lr`, the last layers at head_rate * lr."""
    trained = parameters_to_train(generator, train_backbone)
    last = [w for name, w in trained if name.startswith(generator.trains_when_frozen)]
    backbone = [w for name, w in trained if not name.startswith(generator.trains_when_frozen)]
    return [{"params": backbone, "lr": lr}, {"params": last, "lr": head_rate * lr}]
