"""Segmentation networks: DeepLab-v2, Segmenter (WeakTr's), and the decoder of VPL's second phase.

    model = DeepLabV2(dilated_resnet101(), 2048, num_classes=20, stride=8, dilations=(6, 12, 18, 24))
    logits = model.eval()(images)           # RGB in [0, 1] (B, 3, H, W) -> (B, 1 + C, H, W), background first
    probabilities = predict(model, images, scales=(0.5, 1.0, 1.5), flip=True)

A network owns its mean and std, its parameter groups, and `window`: side and stride of the windows it wants
at test time, None for the whole image. `mark` names a weight that a whole network's file has and a
backbone's has not.
"""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE = (122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255,) * 3  # mean, std of RGB in [0, 1]


def register_statistics(module, statistics=IMAGENET):
    for name, values in zip(("mean", "std"), statistics):
        module.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)


# ---------------------------------------------------------------- DeepLab-v2

class DeepLabV2(nn.Module):
    """A dilated backbone and four 3x3 convolutions of growing dilation, summed.

    Every convolution is centred, so logit (i, j) sits on pixel (stride i, stride j): image and grid meet
    corner to corner if the side is a multiple of the stride plus 1, as the 321 of the training crop is at
    all three scales. Hence align_corners everywhere."""

    mark, window = "aspp.0.weight", None
    scales = (0.75, 0.5)                                      # of the multi-scale loss, besides 1

    def __init__(self, backbone, channels, num_classes, stride, dilations, statistics=IMAGENET):
        super().__init__()
        self.backbone, self.stride = backbone, stride
        self.aspp = nn.ModuleList(nn.Conv2d(channels, 1 + num_classes, 3, padding=d, dilation=d)
                                  for d in dilations)
        for branch in self.aspp:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)
        register_statistics(self, statistics)
        self.batchnorm_trains = True

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W).

        In training a tuple, (B, 1 + C, h, w) each: at scales 1, .75 and .5, and their elementwise maximum."""
        x = (images - self.mean) / self.std
        if not self.training:
            H, W = x.shape[-2:]
            x = F.pad(x, (0, (1 - W) % self.stride, 0, (1 - H) % self.stride))        # until the corners meet
            return resize(self.logits(x), x.shape[-2:])[..., :H, :W]
        whole = self.logits(x)
        sizes = [[round((n - 1) * scale) + 1 for n in x.shape[-2:]] for scale in self.scales]
        others = [self.logits(resize(x, size)) for size in sizes]
        highest = torch.stack([whole, *(resize(z, whole.shape[-2:]) for z in others)]).max(0).values
        return whole, *others, highest

    def logits(self, x):
        x = self.backbone(x)                                  # (B, channels, h, w)
        return sum(branch(x).float() for branch in self.aspp)                         # (B, 1 + C, h, w)

    def groups(self, lr):
        """For the optimizer: the convolutions learn 10 times as fast as the backbone, their biases 20."""
        return [{"params": [w for w in self.backbone.parameters() if w.requires_grad], "lr": lr},
                {"params": [branch.weight for branch in self.aspp], "lr": 10 * lr},
                {"params": [branch.bias for branch in self.aspp], "lr": 20 * lr}]

    def freeze_batchnorm(self):
        """For a pre-trained start: BatchNorm keeps what it has, for any number of processes."""
        # From the authors' code, not in the paper: DeepLab-v2's freezes scales and shifts, too.
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
        """Weights of a classifier with torchvision's names, or the toy's trunk, without its last layer."""
        self.backbone.load_state_dict({name.removeprefix("trunk."): value for name, value in state.items()
                                       if not name.startswith("fc.")})


def resize(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def dilated_resnet101():
    """torchvision's at stride 8, with its names, without pooling and classifier."""
    from torchvision.models import resnet101
    layers = resnet101(replace_stride_with_dilation=[False, True, True]).named_children()
    return nn.Sequential(OrderedDict(layer for layer in layers if layer[0] not in ("avgpool", "fc")))


def caffe_resnet101():
    """The same as deeplab-pytorch's published weights want it: those that were trained on COCO's masks."""
    net = dilated_resnet101()
    net.maxpool.ceil_mode = True
    net.layer2[0].conv1.stride, net.layer2[0].conv2.stride = (2, 2), (1, 1)  # the 1x1 convolution strides
    for layer, d in ((net.layer3, 2), (net.layer4, 4)):       # the first block dilates too
        layer[0].conv2.dilation = layer[0].conv2.padding = (d, d)
    return net


# ---------------------------------------------------------------- Segmenter (WeakTr's network)

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        # (B, heads, N, d) each
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """DeiT's transformer block under its names, with stochastic depth, and dropout at the end of a branch."""

    def __init__(self, width, heads, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))
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
    """DeiT under its names, so that its published weights load; its class token is dropped at the end."""

    def __init__(self, width, depth, heads, patch, grid, drop_path):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid ** 2, width))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        """Normalised images (B, 3, H, W), whole patches -> patch tokens (B, h w, width), (h, w)"""
        x = self.patch_embed["proj"](x)                       # (B, width, h, w)
        size = tuple(x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + resize_positions(self.pos_embed, size)
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
    """Segmenter (Strudel et al. 2021): a DeiT, then a mask transformer with a token for each class.

    logit = cosine of a patch and a class after the last layer, normalised over the classes, enlarged to the
    image. The defaults are DeiT-S's, as WeakTr trains it."""

    mark = "classes"

    def __init__(self, num_classes, width=384, depth=12, heads=6, patch=16, grid=30, window=(480, 320),
                 drop_path=0.1, dropout=0.1, layers=2):
        # From the authors' code, not in the paper: WeakTr's DropPath 0.1 in the encoder, dropout 0.1 here.
        # Differs from that code, which drops attention weights and the MLP's hidden layer too.
        super().__init__()
        self.patch, self.grid, self.window = patch, grid, window
        self.encoder = Encoder(width, depth, heads, patch, grid, drop_path)
        self.enter = nn.Linear(width, width)
        self.classes = nn.Parameter(0.02 * torch.randn(1, 1 + num_classes, width))
        self.layers = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.patch_space = nn.Linear(width, width, bias=False)
        self.class_space = nn.Linear(width, width, bias=False)
        self.balance = nn.LayerNorm(1 + num_classes)          # over the classes of a pixel
        register_statistics(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                last = layer in (self.patch_space, self.class_space)
                nn.init.normal_(layer.weight, std=width ** -0.5 if last else 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W); in training a tuple of one"""
        H, W = images.shape[-2:]
        x = (images - self.mean) / self.std
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))                        # to whole patches
        tokens, size = self.encoder(x)
        y = torch.cat([self.enter(tokens), self.classes.expand(len(x), -1, -1)], 1)  # (B, h w + 1 + C, width)
        for layer in self.layers:
            y = layer(y)
        with torch.autocast(images.device.type, enabled=False):  # small differences: float32
            patches, classes = self.norm(y.float()).split([tokens.shape[1], self.classes.shape[1]], 1)
            patches = F.normalize(self.patch_space(patches), dim=-1)
            classes = F.normalize(self.class_space(classes), dim=-1)
            logits = self.balance(patches @ classes.transpose(1, 2))                  # (B, h w, 1 + C)
            logits = logits.transpose(1, 2).unflatten(2, size)
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)[..., :H, :W]
        return (logits,) if self.training else logits

    def groups(self, lr):
        """For the optimizer: the encoder learns a tenth as fast as the rest."""
        encoder = list(self.encoder.parameters())
        rest = [w for name, w in self.named_parameters() if not name.startswith("encoder.")]
        return [{"params": rest, "lr": lr}, {"params": encoder, "lr": 0.1 * lr}]

    def load_backbone(self, state):
        """A DeiT's ImageNet weights: the position embedding is resized, the classifier is left out."""
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        if "pos_embed" in state:
            state["pos_embed"] = resize_positions(state["pos_embed"], (self.grid, self.grid))
        self.encoder.load_state_dict(state)


# ---------------------------------------------------------------- VPL, phase 2

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
    """VPL's second phase: a decoder over the frozen CLIP, whose pixels V are compared with prototypes W.

    The patches of every block but the last, each through an MLP of two layers, are concatenated and mixed;
    then three transformer blocks, and V in CLIP's joint space. logits: "raw" W^T V, as in Eq. 12-14, or
    "cosine" cos(V, W) / tau_I; the background's is the logsumexp over its columns.
    `encode`: images -> list of (B, N, channels), grid (h, w)."""
    # Not in the paper, which says "decoder" and no more: one of WeCLIP's kind.
    mark, window = "prototypes", None

    def __init__(self, encode, channels, blocks, prototypes, num_classes, tau, width=256, logits="raw",
                 heads=8, layers=3):
        super().__init__()
        self.encode, self.num_classes, self.kind = encode, num_classes, logits
        self.steps = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(blocks))
        self.mix = nn.Linear(blocks * width, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, prototypes.shape[1]))
        self.register_buffer("prototypes", prototypes.clone())  # W (M, D), saved with the weights
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W).

        In training also those of the grid (B, 1 + C, h, w) and V (B, D, h, w)."""
        with torch.no_grad():
            tokens, (h, w) = self.encode(images)
        x = self.mix(torch.cat([step(x) for step, x in zip(self.steps, tokens)], -1))  # (B, N, width)
        for layer in self.layers:
            x = layer(x)
        v = self.project(x).float()                                                   # (B, N, D)
        with torch.autocast(images.device.type, enabled=False):  # 1 / tau is large: float32
            x = v if self.kind == "raw" else F.normalize(v, dim=-1) / self.tau
            logits = x @ self.prototypes.T                                            # (B, N, M)
        # Differs from the paper, which names no background column: those of W are one, by logsumexp.
        background = logits[..., self.num_classes:].logsumexp(-1, keepdim=True)
        coarse = torch.cat([background, logits[..., :self.num_classes]], -1)          # (B, N, 1 + C)
        coarse = coarse.transpose(1, 2).unflatten(2, (h, w))
        logits = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        return (logits, coarse, v.transpose(1, 2).unflatten(2, (h, w))) if self.training else logits

    def groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr}]


# ---------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, images, scales=(1.0,), flip=True):
    """RGB in [0, 1] (B, 3, H, W) -> the mean softmax over scales and flips, (B, 1 + C, H, W)"""
    size, total = images.shape[-2:], 0
    for scale in scales:
        scaled = images
        if scale != 1:
            at = [max(1, round(n * scale)) for n in size]
            scaled = F.interpolate(images, at, mode="bilinear", align_corners=False)
        for mirrored in (False, True)[:1 + flip]:
            p = windows(model, scaled.flip(-1) if mirrored else scaled).float().softmax(1)
            if p.shape[-2:] != size:
                p = F.interpolate(p, size, mode="bilinear", align_corners=False)
            total = total + (p.flip(-1) if mirrored else p)
    return total / (len(scales) * (1 + flip))


def windows(model, images):
    """Logits (B, 1 + C, H, W), averaged where the model's windows overlap; at once if one window is enough"""
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
