"""Mask2Former through transformers: SemPLeS's best rows. An optional extra: pip install transformers scipy.

    model = new_mask2former("mask2former_swin_large", num_classes=20, init="imagenet")
    logits = model.eval()(images)         # RGB in [0, 1] (B, 3, H, W) -> (B, 1 + C, H, W), background first

Its losses are in mask2former_losses.py: those of transformers know no ignored pixels.
"""
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import weights

SWIN_LARGE = "microsoft/swin-large-patch4-window12-384-in22k"     # what init="imagenet" means
STAGES = [f"stage{n}" for n in (1, 2, 3, 4)]
CONFIGS = {  # the Swin, and what differs from transformers' Mask2Former
    "mask2former_swin_large": {
        "backbone_config": {"image_size": 384, "embed_dim": 192, "depths": [2, 2, 18, 2],
                            "num_heads": [6, 12, 24, 48], "window_size": 12, "drop_path_rate": 0.3}},
    "mask2former_toy": {
        "backbone_config": {"image_size": 96, "embed_dim": 16, "depths": [1, 1, 1, 1],
                            "num_heads": [1, 2, 4, 8], "window_size": 6, "drop_path_rate": 0.0},
        "hidden_dim": 64, "feature_size": 64, "mask_feature_size": 64, "num_attention_heads": 4,
        "encoder_layers": 1, "encoder_feedforward_dim": 128, "decoder_layers": 3, "dim_feedforward": 128,
        "num_queries": 10, "train_num_points": 512},
}
NAMES = tuple(CONFIGS)


class Mask2Former(nn.Module):
    """Cheng et al. 2022: every query gives a class, or null, and a mask. The background is a class too."""

    window = None                                             # eval.py: the whole image at once
    origin = None                                             # what was read at the start, and what is fresh
    stride = 32                                               # of the Swin's last stage

    def __init__(self, config, num_classes):
        """`config`: numbers of a Mask2FormerConfig, and those of its SwinConfig as "backbone_config"."""
        super().__init__()
        library = transformers()
        swin = library.SwinConfig(**numbers(config["backbone_config"]), out_features=STAGES)
        full = library.Mask2FormerConfig(backbone_config=swin, num_labels=1 + num_classes, **numbers(config))
        self.network = library.Mask2FormerForUniversalSegmentation(full)
        self.config = {**numbers(full.to_dict()), "backbone_config": numbers(swin.to_dict())}
        for name, weight in self.network.named_parameters():  # that norm is of Swin's classifier
            weight.requires_grad_(".swin.layernorm." not in name)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> logits (B, 1 + C, H, W).

        In training, of L decoder layers: logits of the last (B, 1 + C, h, w), class logits (L, B, Q, 2 + C),
        null last, mask logits (L, B, Q, h, w)."""
        H, W = images.shape[-2:]
        x = F.pad((images - self.mean) / self.std, (0, -W % self.stride, 0, -H % self.stride))  # mean colour
        out = self.network(pixel_values=x, output_auxiliary_logits=True)
        classes, masks = out.class_queries_logits.float(), out.masks_queries_logits.float()
        if not self.training:
            masks = F.interpolate(masks, x.shape[-2:], mode="bilinear", align_corners=False)
            return semantic_logits(classes, masks[..., :H, :W])
        logits = semantic_logits(classes.detach(), masks.detach())
        earlier = out.auxiliary_logits
        classes = torch.stack([*(layer["class_queries_logits"].float() for layer in earlier), classes])
        masks = torch.stack([*(layer["masks_queries_logits"].float() for layer in earlier), masks])
        return logits, classes, masks

    def groups(self, lr):
        """For the optimizer: the Swin learns a tenth as fast as the rest; norms, embeddings and tables of
        positions do not decay."""
        # From the authors' code, not in the paper: (Mask2Former's) both.
        fixed = {f"{name}.{own}" for name, module in self.network.named_modules()
                 if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
                 for own, _ in module.named_parameters(recurse=False)}
        groups = {(swin, decays): {"params": [], "lr": 0.1 * lr if swin else lr}
                  for swin in (False, True) for decays in (True, False)}
        for swin in (False, True):
            groups[swin, False]["weight_decay"] = 0
        for name, weight in self.network.named_parameters():
            if weight.requires_grad:
                tables = ("relative_position_bias_table", "position_embeddings")
                decays = name not in fixed and not name.endswith(tables)
                groups[name.startswith("model.pixel_level_module.encoder."), decays]["params"].append(weight)
        return list(groups.values())


def semantic_logits(classes, masks):
    """(B, Q, 2 + C), (B, Q, H, W) -> (B, 1 + C, H, W): log sum_q softmax(class without null) sigmoid(mask).

    The softmax over classes of this log is that sum divided by its total: a pixel's probabilities."""
    with torch.autocast(classes.device.type, enabled=False):
        scores = torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
        return scores.clamp(min=1e-6).log()


# ---------------------------------------------------------------- making one

def transformers():
    try:
        import scipy  # noqa: F401  its Hungarian matching
        import transformers
    except ImportError as error:
        raise ValueError(f"Mask2Former needs the library {error.name}: "
                         "pip install transformers scipy") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def numbers(config):
    """Of a configuration the numbers alone, single or in lists: transformers would download what a string
    names, and may run code of it."""
    def is_number(value):
        each = value if isinstance(value, (list, tuple)) else [value]
        return all(isinstance(x, (bool, int, float)) for x in each)

    return {name: value for name, value in config.items() if is_number(value) and name != "out_indices"}


def new_mask2former(name, num_classes, init="none"):
    """`init`: "none", "imagenet", or a name or folder that transformers reads: a Swin or a Mask2Former."""
    if init == "none":
        return Mask2Former(CONFIGS[name], num_classes)
    if init == "imagenet" and name != "mask2former_swin_large":
        raise ValueError(f"segmenter {name} has no ImageNet weights: give a folder that transformers reads, "
                         "or none")
    return start_from(name, num_classes, SWIN_LARGE if init == "imagenet" else init)


def from_checkpoint(content, path):
    """The network of a seg.pt, without its weights. No connection is needed."""
    try:
        return Mask2Former(content["config"], len(content["classes"]))
    except (ImportError, MemoryError):
        raise
    except Exception as error:                                # transformers' checks each raise their own
        raise ValueError(f"{path}: its configuration is not one of hosts.train_mask2former "
                         f"({' '.join(str(error).split())[:100]}): train it again") from None


def start_from(name, num_classes, init):
    """A Mask2Former with the weights of a Swin, or of a whole Mask2Former but for its classes.

    A weight that is missing there is refused; `origin` says what was read."""
    library, folder = transformers(), weights.from_hub(init)
    config = pretrained(library.AutoConfig, folder)
    if config.model_type not in ("swin", "mask2former"):
        raise ValueError(f"{init} is a {config.model_type}: {name} starts from a Swin or from a whole "
                         "Mask2Former")
    if config.model_type == "mask2former":
        check_swin(init, config.backbone_config, name)
        source, notes = pretrained(library.Mask2FormerForUniversalSegmentation, folder,
                                   output_loading_info=True)
        prefix, fresh = "", ("class_predictor.", "criterion.")                        # our classes are others
        settings = {**config.to_dict(), "backbone_config": config.backbone_config.to_dict()}
    else:
        check_swin(init, config, name)
        source, notes = pretrained(library.SwinBackbone, folder, out_features=STAGES,
                                   output_loading_info=True)
        # A classifier's Swin has no norms of its stages.
        prefix, fresh = "model.pixel_level_module.encoder.", ("hidden_states_norms.",)
        drop_path = CONFIGS[name]["backbone_config"]["drop_path_rate"]
        settings = {**CONFIGS[name], "backbone_config": {**config.to_dict(), "drop_path_rate": drop_path}}
    missing = [key for key in notes["missing_keys"] if not key.startswith(fresh)]
    if missing:
        raise ValueError(f"{init} lacks {len(missing)} weights of a {config.model_type}, {min(missing)} "
                         "among them")
    model = Mask2Former(settings, num_classes)
    read = {prefix + key: value for key, value in source.state_dict().items() if not key.startswith(fresh)}
    new = {key: value for key, value in model.network.state_dict().items() if key not in read}
    weights.fit(init, model.network.load_state_dict, {**new, **read})
    parts = Counter(".".join(key.split(".")[:-1][:3]) for key in new)
    commit = f" ({Path(folder).name})" if folder != init else ""  # the hub's folders are named so
    model.origin = (f"{init}{commit}: {len(read)} tensors read; "
                    f"fresh are {', '.join(f'{part} ({n})' for part, n in parts.items())}; "
                    f"left out: {', '.join(sorted(notes['unexpected_keys'])) or 'nothing'}")
    return model


def check_swin(path, found, name):
    """Refuses another backbone than `name` has."""
    want = CONFIGS[name]["backbone_config"]
    width, depths = getattr(found, "embed_dim", None), getattr(found, "depths", None)     # a ResNet has none
    if (width, depths and list(depths)) != (want["embed_dim"], want["depths"]):
        raise ValueError(f"{path} has a backbone of width {width} and depths {depths}, {name} a Swin of "
                         f"{want['embed_dim']} and {want['depths']}")


def pretrained(kind, folder, **more):
    try:
        return kind.from_pretrained(folder, **more)
    except Exception as error:                # no model, a torn file, other shapes: each raises its own
        line = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{folder}: transformers reads no network there ({line}): give a model's name, with "
                         "a connection, or the folder of a downloaded one") from None
