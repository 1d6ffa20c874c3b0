"""From a file of weights to a network on its device: the one module here that knows wsss, toy and hosts.

    clip = networks.load_clip("ViT-B/32", run)
    S = networks.load_generator("match.pt", run, classes)
    model = networks.load_segmenter("seg.pt", run)
"""
from pathlib import Path

import numpy as np

from plumbing import checkpoints, clip_files, samples, weights
from plumbing.folders import COCO_CLASSES
from wsss import clip_model, generator, gradcam, segmenter

# ---------------------------------------------------------------- CLIP

def openais():
    """{name: address, whose last folder is the SHA-256}"""
    return clip_model.openai().clip._MODELS


def load_clip(name, run, vit=False, gelu=None):
    """--clip: a name of OpenAI's or of the Hugging Face hub (downloaded once, SHA-256 checked), a file or a
    folder -> FrozenClip. `gelu`: --clip-gelu.

    With `vit`, a CLIP whose image encoder is a ResNet is refused: GradCAM and the decoder read patches."""
    if name in openais() and gelu:
        raise ValueError(f"--clip {name} is OpenAI's, whose GELU is known: leave --clip-gelu out")
    clip = run.in_turn(lambda: open_openais(name) if name in openais() else open_clip_file(str(name), gelu))
    if vit and not hasattr(clip.model.visual, "transformer"):
        kind = type(clip.model.visual).__name__
        raise ValueError(f"--clip {name}: the image encoder of this CLIP is a {kind}: "
                         "a vision transformer is needed, take ViT-B/16")
    return clip.to(run.device)


def open_clip_file(name, gelu=None):
    path = clip_files.locate(name)
    if not path.exists():
        raise FileNotFoundError(f"CLIP {name}: no such file, and not one of {', '.join(openais())}")
    published = {address.split("/")[-2]: model for model, address in openais().items()}
    state, gelu, pixels, kind, notes = clip_files.read(path, published, gelu)
    clip = weights.fit(path, lambda state: clip_model.clip_from_state(state, gelu, pixels), state)
    visual = clip.model.visual
    shape = type(visual).__name__
    if hasattr(visual, "transformer"):
        shape = f"ViT of {visual.conv1.kernel_size[0]} px patches"
    weights.announce(path, f"CLIP, {kind}, {shape}, {clip.size} px", notes)
    return clip


def open_openais(name):
    file = f"{name.replace('/', '-').replace('@', '-')}.pt"
    place = Path.home() / ".cache" / "clip" / file
    try:
        return clip_model.load_clip(name)
    except (OSError, RuntimeError) as error:
        if "SHA256" in str(error):                            # what was downloaded is another file
            place.unlink(missing_ok=True)
        raise FileNotFoundError(f"CLIP {name}: download failed ({error}); put {openais()[name]} into "
                                f"{place.parent}, or give --clip its path") from None


def load_prompts(args, clip, classes):
    """<out>/prompts.pt (train_prompt.py), learned with this CLIP -> BackgroundPrompts"""
    path = args.out / "prompts.pt"
    content = checkpoints.load(path, "prompts", classes)
    if content["clip"] != clip.fingerprint():
        raise ValueError(f"{path} was learned with another --clip: give the same, or run train_prompt.py "
                         "again")
    prompts = clip_model.BackgroundPrompts(clip, len(classes), content["model"]["vectors"].shape[1])
    checkpoints.load_weights(prompts, content["model"], path)
    return prompts


def load_prototypes(path, folder, backgrounds, clip):
    """The content of prototypes.pt (vpl.py), learned for this folder's classes and backgrounds with this
    CLIP."""
    content = checkpoints.load(path, "prototypes", folder.classes)
    if content["backgrounds"] != list(backgrounds):
        known = checkpoints.describe(content["backgrounds"])
        raise ValueError(f"{path} was learned with other backgrounds ({known}) than --data names: "
                         "run vpl.py again")
    if content["clip"] != clip.fingerprint():
        raise ValueError(f"{path} was learned with another --clip ({content['args']['clip']}): "
                         "give the same, or run vpl.py with this one")
    return content


# ---------------------------------------------------------------- mask generators

IMAGENET = {"deit_small": "deit_small_patch16_224-cd65a155.pth", "resnet50": "resnet50-0676ba61.pth",
            "segmenter_deit_small": "deit_small_patch16_224-cd65a155.pth",
            "deeplabv2_resnet101": "resnet101-63fe2227.pth"}
TINY = {"width": 64, "depth": 2, "heads": 4, "patch": 6, "grid": 4, "reduction": 2}      # DeiT for tests


def imagenet_weights(kind, name):
    if name not in IMAGENET:
        raise ValueError(f"{kind} {name} has no ImageNet weights: give the file of its backbone, or none")
    return weights.download(IMAGENET[name])


def new_generator(name, num_classes, start, pool=None, drop_path=0.1, reduction=8):
    """A fresh S. `start`: "none", "imagenet" (downloaded once), or a file with ImageNet or toy backbone
    weights."""
    pool = pool or "max"
    if name == "deit_small":
        model = generator.DeiT(num_classes, pool=pool, reduction=reduction, drop_path=drop_path)
    elif name == "deit_tiny_toy":
        model = generator.DeiT(num_classes, pool=pool, drop_path=drop_path, **TINY)
    elif name == "resnet50":
        from hosts.clims import ResNet50
        model = ResNet50(num_classes)
    else:
        from toy import networks as toy
        model = {"cnn_toy": toy.ToyCNN, "clims_toy": toy.ToyClims}[name](num_classes)
    if start == "imagenet":
        model.load_imagenet(imagenet_weights("generator", name))
    elif start != "none":
        state, notes = weights.state_of(weights.read(start), start)
        weights.fit(start, model.load_imagenet, state)
        left = [key for key in state if key.startswith(("head.", "fc."))]
        notes += [f"its classifier {', '.join(left)}"] if left else []
        weights.announce(start, f"{name}'s backbone, {len(state)} tensors", notes)
    return model


KIND = {  # what --init must give: are its maps masks?
    True: ", whose maps are not masks: CLIMS takes the generator of hosts.train_cam, IRN or CLIMS",
    False: " of CLIMS's kind, whose maps are masks already: python -m hosts.train_clims trains it"}


def load_generator(path, run, classes=None, pool=None, drop_path=0.1, masks=None):
    """A checkpoint of ours, of WeakTr, SemPLeS, CLIMS or IRN -> S on its device. Sizes come from the weights.

    `pool` (max: VOC, avg: COCO) is in our files alone, and must be theirs; of others it is max where it is
    None, and COCO's 90 ids ask for it. A generator for other classes than `classes`, the data folder's, is
    refused; with `masks`, one whose maps are not (True), or are (False), masks as CLIMS's."""
    content = weights.read(path)
    state, notes = weights.state_of(content, path)
    if "resnet50.conv1.weight" in state:
        copies, state = len(state), weights.rename_irn(state, path)
        notes.append(f"{copies - len(state)} copies that agree")
    known = content.get("args", {}).get("pool") if "stage" in content else None
    if known and pool not in (None, known):
        raise ValueError(f"{path}: trained with --pool {known}: leave --pool {pool} out, or train it again "
                         "with that")
    model, kind = generator_from_state(path, state, content, known or pool or "max", drop_path)
    if masks not in (None, model.maps_are_masks):
        raise ValueError(f"{path} is a {type(model).__name__}{KIND[masks]}")
    found = len(state["classifier.weight" if "classifier.weight" in state else "head.weight"])
    if classes is not None and kind.startswith("DeiT") and (found, len(classes)) == (90, 80):
        keep_coco(path, model, classes, known or pool)
        kind += ", of COCO's 90 ids the 80 in use"
    elif classes is not None and found != len(classes):
        raise ValueError(f"{path}: maps {found} classes, the data folder has {len(classes)}: "
                         "give the --data it was trained on, or another generator")
    checkpoints.check_classes(path, content.get("classes"), classes)
    if "stage" not in content:
        weights.announce(path, f"{kind}, {found} classes", notes)
    return model.to(run.device)


def generator_from_state(path, state, content, pool, drop_path):
    """-> the network whose names and sizes are those of a state dict, and what it is."""
    if "trunk.0.weight" in state and not state.keys().isdisjoint(("head.weight", "classifier.weight")):
        from toy import networks as toy
        return weights.fit(path, toy.generator_from_state, state), "toy CNN"
    if "classifier.weight" in state:
        from hosts.clims import ResNet50
        model = ResNet50(num_classes=len(state["classifier.weight"]))
        weights.fit(path, model.load_state_dict, state)
        return model, "ResNet-50 as in CLIMS"
    if {"head.weight", "pos_embed", "adaptive_attention_fusion.attn_head_ffn.0.weight"} <= state.keys():
        model = weights.fit(path, lambda state: generator.deit_from_state(state, pool, drop_path), state)
        return model, f"DeiT with attention fusion as in WeakTr, pooling {pool} (not in the file: --pool)"
    raise ValueError(f"{path}: not a mask generator ({what_else(state, content)})")


def keep_coco(path, model, classes, pool):
    """Of COCO's 90 category ids a published generator maps, the 80 in use."""
    if list(classes) != COCO_CLASSES:
        raise ValueError(f"{path}: maps 90 classes, the data folder has 80, not named as COCO's: "
                         "which 80 of the 90 they are is known of COCO's only")
    if not pool:
        raise ValueError(f"{path}: of COCO's 90 ids, and its pooling is in no such file: give --pool avg, as "
                         "the published ones were trained, or --pool max")
    model.kept = generator.COCO_KEPT


def what_else(state, content):
    """What a file that is not a generator is, as far as its names tell."""
    if "stage" in content:
        return f"it is of stage {content['stage']!r}: give a cls.pt, match.pt or refine.pt"
    if "adaptive_attention_fusion.fc.0.weight" in state:
        return "WeakTr's first release, whose fusion had other weights: take the present one"
    classifiers = ({"cls_token", "head.weight"}, {"fc.weight", "layer4.0.conv1.weight"}, {"trunk.0.weight"})
    if any(names <= state.keys() for names in classifiers):
        return "weights of a classifier or backbone: they go to train_cls.py --backbone"
    return f"no head with attention fusion and no classifier among its {len(state)} weights"


# ---------------------------------------------------------------- segmentation networks

SEGMENTERS = ("deeplabv2_resnet101", "deeplabv2_resnet101_caffe", "segmenter_deit_small", "deeplab_toy",
              "segmenter_toy")


def new_segmenter(name, num_classes, init="none", classes=None):
    """A network for `num_classes` classes besides the background. `init`: "none", "imagenet" (downloaded
    once), or a file: weights of its backbone, or a whole network of ours, for these `classes`."""
    if name == "deeplabv2_resnet101":
        backbone = segmenter.dilated_resnet101()
        model = segmenter.DeepLabV2(backbone, 2048, num_classes, stride=8, dilations=(6, 12, 18, 24))
    elif name == "deeplabv2_resnet101_caffe":
        backbone = segmenter.caffe_resnet101()
        model = segmenter.DeepLabV2(backbone, 2048, num_classes, 8, (6, 12, 18, 24), segmenter.CAFFE)
    elif name == "segmenter_deit_small":
        model = segmenter.Segmenter(num_classes)
    else:
        from toy import networks as toy
        model = {"deeplab_toy": toy.deeplab_toy, "segmenter_toy": toy.segmenter_toy}[name](num_classes)
    if init == "imagenet":
        model.load_backbone(imagenet_weights("segmenter", name))
    elif init != "none":
        content = weights.read(init)
        state, notes = weights.state_of(content, init)
        if name.endswith("_caffe") and model.mark not in state:
            state = weights.fit(init, weights.rename_deeplab, state)
        checkpoints.check_classes(init, content.get("classes") if "stage" in content else None, classes)
        weights.fit(init, model.load_state_dict if model.mark in state else model.load_backbone, state)
        if "stage" not in content:
            weights.announce(init, f"{name}'s backbone, {len(state)} tensors", notes)
    return model


def new_decoder(clip, prototypes, width, logits):
    """VPL's ClipDecoder on the frozen CLIP, with the prototypes of a prototypes.pt."""
    visual = clip.model.visual
    return segmenter.ClipDecoder(
        lambda images: gradcam.block_outputs(clip, images), visual.conv1.out_channels,
        len(visual.transformer.resblocks) - 1, prototypes["model"]["prototypes"], len(prototypes["classes"]),
        prototypes["tau_i"], width, logits)


def load_segmenter(path, run, clip=None):
    """seg.pt -> the network on its device, in eval mode, whatever its kind and its number of classes.

    `clip`: where the frozen CLIP of a clip_decoder is, if it is not where it was in training."""
    content = checkpoints.load(path, "seg")
    args, state, classes = content["args"], content["model"], content["classes"]
    if args["model"].startswith("mask2former"):
        from hosts import mask2former
        model = mask2former.from_checkpoint(content, path)
    elif args["model"] == "clip_decoder":
        frozen = load_clip(clip or args["clip"], run, vit=True, gelu=args["clip_gelu"])
        if frozen.fingerprint() != content["clip"]:
            raise ValueError(f"{path} was trained on another CLIP than {clip or args['clip']}: "
                             "give its name or file with --clip")
        prototypes = {"model": state, "classes": classes, "tau_i": state["tau"].item()}
        model = new_decoder(frozen, prototypes, args["width"], args["logits"])
    else:
        model = new_segmenter(args["model"], len(classes))
        if args["model"].startswith("segmenter"):             # images as large as in training, a third shared
            model.window = args["crop"], 2 * args["crop"] // 3
    checkpoints.load_weights(model, state, path)
    return model.eval().to(run.device)


def predict(model, folder, ids, run, args, workers):
    """Yields (id, image (H, W, 3) uint8, probabilities (1 + C, H, W)) of all ids, over --scales and --flip;
    larger images at --max-side."""
    for numbers, images in samples.by_size(folder, ids, args.batch_size, run, workers, args.max_side):
        with run.autocast():
            batch = segmenter.predict(model, images.to(run.device, non_blocking=True), args.scales, args.flip)
        for i, image, probability in zip(numbers, images, batch.cpu().numpy()):
            yield ids[i], np.uint8((255 * image).round().permute(1, 2, 0)), probability
