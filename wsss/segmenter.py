"""Segmentation networks: image -> logits of background and classes.

    model = build_segmenter("deeplabv2_resnet101", num_classes=20, init="imagenet")
    model = load_segmenter("seg.pt")
    logits = model.eval()(images)                                  # RGB in [0, 1] (B, 3, H, W) -> (B, 1 + C, H, W), background first

A model owns its mean and std, its parameter groups, and `window`: side and stride of the windows it wants at test time, None for
the whole picture. `mark` is a weight that only a whole network has, and no file of its backbone.
"""
import hashlib
import os
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import ResNet101_Weights, resnet101

DEIT_IMAGENET = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"
SHA256 = {                                                        # the publishers give the first eight digits, in the name
    "deit_small_patch16_224-cd65a155.pth": "cd65a15597004d0ce19d7a9daef969903972db5b398e3a5febcd3c4df1d8f59f",
    "resnet101-63fe2227.pth": "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a",
}
NAMES = ("deeplabv2_resnet101", "segmenter_deit_small", "clip_decoder", "deeplab_toy", "segmenter_toy")
SEGMENTER = {
    "segmenter_deit_small": dict(width=384, depth=12, heads=6, patch=16, grid=30, window=(480, 320), drop_path=0.1, dropout=0.1),
    "segmenter_toy": dict(width=64, depth=3, heads=4, patch=8, grid=12, window=(96, 64), drop_path=0.0, dropout=0.0),
}


# ------------------------------------------------------------------------------------------------------- DeepLab-v2

class DeepLabV2(nn.Module):
    """A dilated backbone and four 3x3 convolutions of growing dilation, summed.

    Every convolution is centred, so logit (i, j) sits on pixel (stride i, stride j): picture and grid meet corner to corner if the
    side is a multiple of the stride plus 1, as the 321 of the training crop is at all three scales. Hence align_corners everywhere."""

    mark, window = "aspp.0.weight", None
    scales = (0.75, 0.5)                                          # of the multi-scale loss, besides 1

    def __init__(self, backbone, channels, num_classes, stride, dilations):
        super().__init__()
        self.backbone, self.stride = backbone, stride
        self.aspp = nn.ModuleList(nn.Conv2d(channels, 1 + num_classes, 3, padding=d, dilation=d) for d in dilations)
        for branch in self.aspp:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.batchnorm_trains = True

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W); in training a tuple, (B, 1 + C, h, w) each: of the picture at scales
        1, .75 and .5, and their elementwise maximum."""
        x = (images - self.mean) / self.std
        if not self.training:
            H, W = x.shape[-2:]
            x = F.pad(x, (0, (1 - W) % self.stride, 0, (1 - H) % self.stride))        # by mean colour, until the corners meet
            return resize(self.logits(x), x.shape[-2:])[..., :H, :W]
        whole = self.logits(x)
        others = [self.logits(resize(x, [round((n - 1) * scale) + 1 for n in x.shape[-2:]])) for scale in self.scales]
        highest = torch.stack([whole, *(resize(z, whole.shape[-2:]) for z in others)]).max(0).values
        return whole, *others, highest

    def logits(self, x):
        x = self.backbone(x)                                      # (B, channels, h, w)
        return sum(branch(x).float() for branch in self.aspp)     # (B, 1 + C, h, w)

    def groups(self, lr):
        """For the optimizer: the four convolutions learn 10 times as fast as the backbone, their biases 20 times."""
        return [{"params": [w for w in self.backbone.parameters() if w.requires_grad], "lr": lr},
                {"params": [branch.weight for branch in self.aspp], "lr": 10 * lr},
                {"params": [branch.bias for branch in self.aspp], "lr": 20 * lr}]

    def rest_batchnorm(self):
        """For a pre-trained start: BatchNorm keeps what it has, for any number of processes."""
        # From the authors' code, not in the paper: (DeepLab-v2's) scales and shifts rest too, not only the statistics.
        self.batchnorm_trains = False
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and self.batchnorm_trains)
        return self

    def load_backbone(self, state):
        """Weights of a classifier: torchvision's ResNet-101, or the toy's trunk. Its last layer is left out."""
        self.backbone.load_state_dict({name.removeprefix("trunk."): value for name, value in state.items() if not name.startswith("fc.")})


def resize(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def dilated_resnet101():
    """torchvision's at stride 8, with its names, without pooling and classifier."""
    layers = resnet101(replace_stride_with_dilation=[False, True, True]).named_children()
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers if name not in ("avgpool", "fc")))


# ---------------------------------------------------------------------------------------------------- the toy's CNN

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def toy_trunk(width=64, blocks=3):
    """The small residual CNN at stride 4 of the toy world's mask generator, whose weights it takes."""
    return nn.Sequential(nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
                         nn.Conv2d(width // 2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         *(Residual(width) for _ in range(blocks)))


# ---------------------------------------------------------------------------------------- Segmenter (WeakTr's network)

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)                # (B, heads, N, width / heads) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """DeiT's transformer block under its names. `drop_path`: how often a picture goes without a branch in training; `dropout`: of a branch's numbers."""

    def __init__(self, width, heads, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))
        self.drop_path, self.dropout = drop_path, dropout

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            branch = branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class Encoder(nn.Module):
    """DeiT under its names, so that its published weights load; its class token is there and is dropped at the end."""

    def __init__(self, width, depth, heads, patch, grid, drop_path):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        """Normalised pictures (B, 3, H, W), whole patches -> patch tokens (B, h w, width), (h, w)"""
        x = self.patch_embed["proj"](x)                           # (B, width, h, w)
        size = tuple(x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + resize_positions(self.pos_embed, size)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:], size


def resize_positions(embedding, size):
    """A position embedding (1, 1 + g g, width), the class token's first -> (1, 1 + h w, width)"""
    grid = round((embedding.shape[1] - 1) ** 0.5)
    if size == (grid, grid):
        return embedding
    patches = embedding[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    patches = F.interpolate(patches, size, mode="bilinear", align_corners=False)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2)], 1)


class Segmenter(nn.Module):
    """Segmenter (Strudel et al. 2021): a DeiT, then a mask transformer, where a token for each class travels with the patches.

    logit = cosine of a patch and a class after the last layer, normalised over the classes, enlarged to the picture."""

    mark = "classes"

    def __init__(self, num_classes, width, depth, heads, patch, grid, window, drop_path, dropout, layers=2):
        # From the authors' code, not in the paper: (WeakTr's) DropPath 0.1 in the encoder, dropout 0.1 in the decoder.
        # Differs from the paper: in that code the decoder's dropout is also inside a branch, of attention weights and of the MLP's hidden layer.
        super().__init__()
        self.patch, self.grid, self.window = patch, grid, window
        self.encoder = Encoder(width, depth, heads, patch, grid, drop_path)
        self.enter = nn.Linear(width, width)
        self.classes = nn.Parameter(0.02 * torch.randn(1, 1 + num_classes, width))
        self.layers = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.patch_space, self.class_space = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.balance = nn.LayerNorm(1 + num_classes)              # over the classes of a pixel
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=width ** -0.5 if layer in (self.patch_space, self.class_space) else 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W); in training a tuple of one"""
        H, W = images.shape[-2:]
        x = F.pad((images - self.mean) / self.std, (0, -W % self.patch, 0, -H % self.patch))          # by mean colour, to whole patches
        tokens, size = self.encoder(x)
        y = torch.cat([self.enter(tokens), self.classes.expand(len(x), -1, -1)], 1)                   # (B, h w + 1 + C, width)
        for layer in self.layers:
            y = layer(y)
        with torch.autocast(images.device.type, enabled=False):                       # small differences of cosines: float32
            patches, classes = self.norm(y.float()).split([tokens.shape[1], self.classes.shape[1]], 1)
            cosines = F.normalize(self.patch_space(patches), dim=-1) @ F.normalize(self.class_space(classes), dim=-1).transpose(1, 2)
            logits = self.balance(cosines).transpose(1, 2).unflatten(2, size)         # (B, 1 + C, h, w)
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)[..., :H, :W]
        return (logits,) if self.training else logits

    def groups(self, lr):
        """For the optimizer: the encoder learns a tenth as fast as the rest."""
        encoder = list(self.encoder.parameters())
        rest = [w for name, w in self.named_parameters() if not name.startswith("encoder.")]
        return [{"params": rest, "lr": lr}, {"params": encoder, "lr": 0.1 * lr}]

    def load_backbone(self, state):
        """A DeiT's ImageNet weights: the position embedding is resized to the crop's grid, the classifier is left out."""
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        if "pos_embed" in state:
            state["pos_embed"] = resize_positions(state["pos_embed"], (self.grid, self.grid))
        self.encoder.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ VPL, phase 2

class Layer(nn.Module):
    """A transformer block: self-attention and MLP, each after a LayerNorm and added."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ClipDecoder(nn.Module):
    """VPL's second phase: a decoder over the frozen CLIP, whose pixels V are compared with the vision prototypes W.

    The patches of every block but the last, each through an MLP of two layers, are concatenated and mixed; three transformer blocks; V in CLIP's joint
    space. logit = cos(V, W) / tau_I, the background's the logsumexp over its columns. `encode`: images -> list of (B, N, channels), grid (h, w)."""

    # Differs from the paper: it says "decoder" and no more; this one is of WeCLIP's kind, the frozen CLIP's decoder it compares itself with.

    mark, window = "prototypes", None

    def __init__(self, encode, channels, blocks, prototypes, num_classes, tau, width=256, heads=8, layers=3):
        super().__init__()
        self.encode, self.num_classes = encode, num_classes
        self.steps = nn.ModuleList(nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
                                   for _ in range(blocks))
        self.mix = nn.Linear(blocks * width, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, prototypes.shape[1]))
        self.register_buffer("prototypes", prototypes.clone())    # W (M, D): classes, then backgrounds; saved with the weights
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W); in training also those of the grid (B, 1 + C, h, w) and V (B, D, h, w)"""
        with torch.no_grad():
            tokens, (h, w) = self.encode(images)
        x = self.mix(torch.cat([step(x) for step, x in zip(self.steps, tokens)], -1))                 # (B, N, width)
        for layer in self.layers:
            x = layer(x)
        v = self.project(x).float()                                                   # (B, N, D)
        with torch.autocast(images.device.type, enabled=False):                       # 1 / tau makes much of small differences: float32
            logits = F.normalize(v, dim=-1) @ self.prototypes.T / self.tau            # (B, N, M)
        background = logits[..., self.num_classes:].logsumexp(-1, keepdim=True)
        coarse = torch.cat([background, logits[..., :self.num_classes]], -1).transpose(1, 2).unflatten(2, (h, w))
        logits = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        return (logits, coarse, v.transpose(1, 2).unflatten(2, (h, w))) if self.training else logits

    def groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr}]


# ---------------------------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, images, scales=(1.0,), flip=True):
    """RGB in [0, 1] (B, 3, H, W) -> probabilities (B, 1 + C, H, W): the mean of the softmax over scales and flips."""
    size, total = images.shape[-2:], 0
    for scale in scales:
        scaled = images
        if scale != 1:
            scaled = F.interpolate(images, [max(1, round(n * scale)) for n in size], mode="bilinear", align_corners=False)
        for mirrored in (False, True)[:1 + flip]:
            p = windows(model, scaled.flip(-1) if mirrored else scaled).float().softmax(1)
            p = F.interpolate(p, size, mode="bilinear", align_corners=False) if p.shape[-2:] != size else p
            total = total + (p.flip(-1) if mirrored else p)
    return total / (len(scales) * (1 + flip))


def windows(model, images):
    """Logits (B, 1 + C, H, W), averaged where the model's windows overlap; in one piece if it has none or the picture fits into one."""
    H, W = images.shape[-2:]
    if model.window is None or max(H, W) <= model.window[0]:
        return model(images)
    side, stride = model.window
    total, count = 0, images.new_zeros(H, W)
    for y in starts(H, side, stride):
        for x in starts(W, side, stride):
            part = model(images[..., y:y + side, x:x + side]).float()
            around = (x, max(0, W - x - side), y, max(0, H - y - side))
            total = total + F.pad(part, around)
            count[y:y + side, x:x + side] += 1
    return total / count


def starts(length, side, stride):
    """Where windows begin: every stride, the last one at the edge."""
    return [*range(0, max(1, length - side), stride), max(0, length - side)] if length > side else [0]


# ------------------------------------------------------------------------------------------------- making and loading

def build_segmenter(name, num_classes, init=None):
    """A network for `num_classes` classes besides the background. `init`: None, "imagenet" (downloaded once), or a file: weights of the
    backbone alone (torchvision's ResNet-101, a DeiT-S, the toy's backbone.pt), or a whole network of ours."""
    if name == "deeplabv2_resnet101":
        model = DeepLabV2(dilated_resnet101(), 2048, num_classes, stride=8, dilations=(6, 12, 18, 24))
    elif name == "deeplab_toy":
        model = DeepLabV2(toy_trunk(), 64, num_classes, stride=4, dilations=(1, 2, 4, 6))
    elif name in SEGMENTER:
        model = Segmenter(num_classes, **SEGMENTER[name])
    else:
        raise ValueError(f"segmenter {name}: not one of {', '.join(NAMES)}")
    if init is not None:
        content = download_imagenet(name) if init == "imagenet" else read(init)
        state = state_of(content, init)
        load_strictly(init, model.load_state_dict if model.mark in state else model.load_backbone, state)
        if init != "imagenet" and "stage" not in content and os.environ.get("RANK", "0") == "0":
            left = ", ".join(key for key in state if key.startswith(("fc.", "head.")))
            print(f"{init}: {name}'s backbone, {len(state)} tensors{f'; left out: its classifier {left}' if left else ''}")
    return model


def download_imagenet(name):
    """ResNet-101's or DeiT-S's ImageNet weights, where torch.hub keeps them, their SHA-256 checked at each reading; another file is removed."""
    if name not in ("deeplabv2_resnet101", "segmenter_deit_small"):
        raise ValueError(f"segmenter {name} has no ImageNet weights: give the file of its backbone, or none")
    url = DEIT_IMAGENET if name == "segmenter_deit_small" else ResNet101_Weights.IMAGENET1K_V1.url
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), SHA256[place.name])       # beside, then renamed
    except Exception as error:                                    # no connection, another hash, a full disk: each raises its own
        raise ValueError(f"no ImageNet weights ({error}): put {url} at {place}, or give --init FILE or --init none") from None
    try:
        content = read(place)
    except ValueError as error:
        place.unlink()
        raise ValueError(f"{error}; it is removed: run the same command again") from None
    return content.get("model", content)


def build_decoder(encode, channels, blocks, content, width=256):
    """VPL's ClipDecoder with the prototypes of a prototypes.pt."""
    return ClipDecoder(encode, channels, blocks, content["model"]["prototypes"], len(content["classes"]), content["tau_i"], width)


def load_segmenter(path, encode=None):
    """seg.pt -> the network in eval mode, whatever its kind and its number of classes. A clip_decoder needs `encode`, its frozen CLIP."""
    content = read(path)
    state, args = state_of(content, path), content.get("args")
    if content.get("stage") != "seg" or not isinstance(args, dict) or args.get("model") not in NAMES:
        raise ValueError(f"{path}: not a segmentation network of ours (train_seg.py writes seg.pt)")
    classes, crop = content.get("classes"), args.get("crop", 0)
    if not isinstance(classes, list) or not 0 < len(classes) < 255 or type(crop) is not int or not 0 <= crop <= 4096:
        raise ValueError(f"{path}: its classes or its --crop are none: train it again")
    if "prototypes" in state:
        try:
            with torch.device("meta"):                            # first without memory: the file may say any size
                load_strictly(path, lambda state: decoder_like(state, classes, encode).load_state_dict(state, assign=True), state)
            model = decoder_like(state, classes, encode)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: its tensors make no decoder ({' '.join(str(error).split())[:200]})") from None
    else:
        model = build_segmenter(args["model"], len(classes))
        if args["model"] in SEGMENTER:
            crop = crop or SEGMENTER[args["model"]]["window"][0]
            model.window = crop, 2 * crop // 3                    # pictures as large as in training, a third of them shared
    load_strictly(path, model.load_state_dict, state)
    return model.eval()


def decoder_like(state, classes, encode):
    """The ClipDecoder whose sizes are those of a checkpoint."""
    first, blocks = state["steps.0.1.weight"], sum(name.startswith("steps.") and name.endswith(".1.weight") for name in state)
    return ClipDecoder(encode, first.shape[1], blocks, state["prototypes"], len(classes), state["tau"].item(), len(first))


def read(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    digits = re.fullmatch(r"(?:deit_small_patch16_224|resnet101)-([0-9a-f]{8})\.pth", Path(path).name)    # of its SHA-256: torch.hub's convention
    if digits and not hashlib.sha256(Path(path).read_bytes()).hexdigest().startswith(SHA256.get(Path(path).name, digits[1])):
        raise ValueError(f"{path}: its SHA-256 is not the one that begins with {digits[1]}, as published: download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                    # zip, pickle and torch each raise their own for a foreign file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else str(error) if isinstance(error, OSError) else "it is torn, or torch did not write it"
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({reason})") from None


def state_of(content, path):
    """The state dict of a checkpoint, out of a {"model": ...} or {"state_dict": ...} around it and without the prefix of DataParallel if there is one."""
    wrapper = next((name for name in ("model", "state_dict") if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    state = content[wrapper] if wrapper else content
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise ValueError(f"{path}: holds no state dict, neither at the top nor under 'model' or 'state_dict'")
    state = dict(state)                                           # without its metadata, which can tell load_state_dict to take tensors as they are
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in state.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ValueError(f"{path}: {name} is no plain tensor of real numbers: take another file")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes() or value.numel() == 0:
            raise ValueError(f"{path}: {name} says {tuple(value.shape)}, its file holds other numbers: it is damaged, or made to unpack without end"[:400])
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training broke down or the file is damaged; take another one")
    return state


def load_strictly(path, load, state):
    """Every name and shape must fit, and the first that does not is named."""
    try:
        load(state)
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}") from None
