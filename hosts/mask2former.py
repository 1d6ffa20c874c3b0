"""Mask2Former through transformers: SemPLeS's best rows. An optional extra: pip install transformers scipy.

    model = build_mask2former("mask2former_swin_large", num_classes=20, init="imagenet")
    model = rebuild_mask2former(torch.load("seg.pt", weights_only=True), "seg.pt")
    logits = model.eval()(images)                                  # RGB in [0, 1] (B, 3, H, W) -> (B, 1 + C, H, W), background first

Its losses are in losses.py (set_losses): transformers' own know no ignored pixels.
"""
import json
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

NAMES = ("mask2former_swin_large", "mask2former_toy")

SWIN_LARGE = "microsoft/swin-large-patch4-window12-384-in22k"     # what --init imagenet means
STAGES = [f"stage{n}" for n in (1, 2, 3, 4)]
MASK2FORMER = {  # the Swin, and what is not Mask2Former's default
    "mask2former_swin_large": (dict(image_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, drop_path_rate=0.3), {}),
    "mask2former_toy": (dict(image_size=96, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=6, drop_path_rate=0.0),
                        dict(hidden_dim=64, feature_size=64, mask_feature_size=64, num_attention_heads=4, encoder_layers=1, encoder_feedforward_dim=128,
                             decoder_layers=3, dim_feedforward=128, num_queries=10, train_num_points=512)),
}


class Mask2Former(nn.Module):
    """Mask2Former (Cheng et al. 2022): every query says a class, or null, and a mask. The background is a class like the others.

    `config`, plain values, rebuilds it; `origin` says what was read at the start and what is fresh."""

    window, origin = None, None
    stride = 32                                                   # of the Swin's last stage

    def __init__(self, config):
        super().__init__()
        library = transformers()
        self.network = library.Mask2FormerForUniversalSegmentation(library.Mask2FormerConfig.from_dict(config))
        self.config = config
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(".swin.layernorm." not in name)                     # the classifier's: on no path to a mask
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W). In training, of L decoder layers: logits of the last (B, 1 + C, h, w),
        class logits (L, B, Q, 2 + C), null last, mask logits (L, B, Q, h, w)."""
        H, W = images.shape[-2:]
        x = F.pad((images - self.mean) / self.std, (0, -W % self.stride, 0, -H % self.stride))        # by mean colour
        out = self.network(pixel_values=x, output_auxiliary_logits=True)
        classes, masks = out.class_queries_logits.float(), out.masks_queries_logits.float()
        if not self.training:
            return semantic_logits(classes, F.interpolate(masks, x.shape[-2:], mode="bilinear", align_corners=False)[..., :H, :W])
        classes, masks = (torch.stack([*(layer[name].float() for layer in out.auxiliary_logits), last])
                          for name, last in (("class_queries_logits", classes), ("masks_queries_logits", masks)))
        return semantic_logits(classes[-1].detach(), masks[-1].detach()), classes, masks

    def groups(self, lr):
        """For the optimizer: the Swin learns a tenth as fast as the rest; norms, embeddings and the tables of positions do not decay."""
        # From the authors' code, not in the paper: (Mask2Former's) both.
        resting = {f"{name}.{own}" for name, module in self.network.named_modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
                   for own, _ in module.named_parameters(recurse=False)}
        groups = {(swin, decays): {"params": [], "lr": (0.1 if swin else 1) * lr, **({} if decays else {"weight_decay": 0})}
                  for swin in (False, True) for decays in (True, False)}
        for name, weight in self.network.named_parameters():
            if weight.requires_grad:
                decays = name not in resting and not name.endswith(("relative_position_bias_table", "position_embeddings"))
                groups[name.startswith("model.pixel_level_module.encoder."), decays]["params"].append(weight)
        return list(groups.values())


def semantic_logits(classes, masks):
    """(B, Q, 2 + C), (B, Q, H, W) -> (B, 1 + C, H, W): the log of sum_q softmax(class without null) sigmoid(mask).

    The softmax over classes of this log is that sum divided by its total: each pixel's scores as probabilities."""
    with torch.autocast(classes.device.type, enabled=False):
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid()).clamp(min=1e-6).log()


def transformers():
    try:
        import scipy  # noqa: F401: its Hungarian matching
        import transformers
    except ImportError as error:
        raise ValueError(f"Mask2Former needs the library {error.name}: pip install transformers scipy") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build_mask2former(name, num_classes, init=None, find=str):
    """`init`: None, "imagenet", or a model's name or folder that transformers reads: a Swin, or a whole Mask2Former. `find`: name -> folder of a checked download."""
    if init is not None:
        return start_mask2former(name, num_classes, init, find)
    library, (swin, rest) = transformers(), MASK2FORMER[name]
    config = library.Mask2FormerConfig(backbone_config=library.SwinConfig(**swin, out_features=STAGES), num_labels=1 + num_classes, **rest)
    return Mask2Former(plain(config))


def rebuild_mask2former(content, path, name=None):
    """The network that a seg.pt holds, from its own configuration: no connection is needed. Another than `name`, where given, is refused."""
    if not isinstance(content.get("config"), dict):
        raise ValueError(f"{path}: not a Mask2Former of ours (train_seg.py writes seg.pt); of others give the name or the folder")
    tame(content["config"], path)
    try:
        config = transformers().Mask2FormerConfig.from_dict(content["config"])
        with torch.device("meta"):                                # sizes cost nothing there
            empty = Mask2Former(content["config"])
    except ImportError:
        raise
    except Exception as error:                                    # transformers' checks each raise their own
        raise ValueError(f"{path}: its configuration is none of a Mask2Former of ours ({' '.join(str(error).split())[:100]}): train it again") from None
    if sum(w.numel() for w in empty.state_dict().values()) > 2 * sum(w.numel() for w in content["model"].values() if torch.is_tensor(w)):
        raise ValueError(f"{path}: its configuration asks for more weights than the file holds: train it again")
    check_swin(path, config.backbone_config, name or content["args"]["model"])
    if config.num_labels != 1 + len(content["classes"]):
        raise ValueError(f"{path}: its network has {config.num_labels - 1} classes, its list of classes {len(content['classes'])}: train it again")
    model = Mask2Former(content["config"])
    load_strictly(path, model, content["model"])
    return model


ASKS = re.compile("^backbone$|^use_timm_backbone$|^use_pretrained_backbone$|_implementation|auto_map|name_or_path|kernel_config")       # code or weights of others


def tame(config, path):
    """Refuses a configuration that asks for a download, or for sizes that no Mask2Former has."""
    todo, count = [config], 0
    while todo:
        value, count = todo.pop(), count + 1
        downloads = isinstance(value, dict) and any(value[name] and ASKS.search(str(name)) for name in value) or isinstance(value, str) and "/" in value
        if downloads or count > 10_000 or isinstance(value, int) and abs(value) > 1 << 15:
            raise ValueError(f"{path}: its configuration is none of a Mask2Former of ours: train it again")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def start_mask2former(name, num_classes, init, find):
    """A Mask2Former with the weights of a Swin, or of a whole one but for its classes. What is not there and should be is refused; `origin` says the rest."""
    library = transformers()
    if init == "imagenet" and name != "mask2former_swin_large":
        raise ValueError(f"segmenter {name} has no ImageNet weights: give a folder that transformers reads, or none")
    init, (swin, rest) = SWIN_LARGE if init == "imagenet" else init, MASK2FORMER[name]
    where = find(init)
    config = pretrained(library.AutoConfig, where)
    commit = Path(where).name if where != init else None          # of a download: the hub's folders are named so
    if config.model_type not in ("swin", "mask2former"):
        raise ValueError(f"{init} is a {config.model_type}: {name} starts from a Swin or from a whole Mask2Former")
    whole = config.model_type == "mask2former"
    check_swin(init, config.backbone_config if whole else config, name)
    if whole:
        source, notes = pretrained(library.Mask2FormerForUniversalSegmentation, where, output_loading_info=True)
        prefix, own = "", ("class_predictor.", "criterion.")      # our classes are others
        config.num_labels = 1 + num_classes
    else:
        source, notes = pretrained(library.SwinBackbone, where, out_features=STAGES, output_loading_info=True)
        prefix, own = "model.pixel_level_module.encoder.", ("hidden_states_norms.",)                  # a classifier's Swin has none
        source.config.drop_path_rate = swin["drop_path_rate"]
        config = library.Mask2FormerConfig(backbone_config=source.config, num_labels=1 + num_classes, **rest)
    missing = [key for key in notes["missing_keys"] if not key.startswith(own)]
    if missing:
        raise ValueError(f"{init} lacks {len(missing)} weights of a {config.model_type}, {min(missing)} among them")
    model = Mask2Former(plain(config))
    state = {prefix + key: value for key, value in source.state_dict().items() if not key.startswith(own)}
    fresh = {key: value for key, value in model.network.state_dict().items() if key not in state}
    load_strictly(init, model.network, {**fresh, **state})
    parts = Counter(".".join(key.split(".")[:-1][:3]) for key in fresh)
    model.origin = (f"{init}{f' ({commit})' if commit else ''}: {len(state)} tensors read; fresh are {', '.join(f'{part} ({n})' for part, n in parts.items())}; "
                    f"left out: {', '.join(sorted(notes['unexpected_keys'])) or 'nothing'}")
    return model


def check_swin(path, found, name):
    """Refuses the configuration of another backbone than `name` has: its weights would fit their own network, not the one that is asked for."""
    want = MASK2FORMER[name][0]
    width, depths = getattr(found, "embed_dim", None), getattr(found, "depths", None)             # a ResNet has no width
    if (width, depths and list(depths)) != (want["embed_dim"], want["depths"]):
        raise ValueError(f"{path} has a backbone of width {width} and depths {depths}, {name} a Swin of {want['embed_dim']} and {want['depths']}")


def pretrained(kind, where, **more):
    try:
        return kind.from_pretrained(where, **more)
    except Exception as error:                                    # no model, no connection, a torn file, other shapes: each raises its own
        raise ValueError(f"{where}: transformers reads no network there ({' '.join(str(error).split())[:120] or type(error).__name__}): "
                         "give a model's name, with a connection, or the folder of a downloaded one") from None


def plain(config):
    """A configuration of transformers as JSON has it: no tuple, no class."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def load_strictly(path, model, state):
    """Every name and shape must fit, and the first that does not is named."""
    try:
        model.load_state_dict(dict(state))                        # without its metadata, which can tell torch to take tensors as they are
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}") from None
