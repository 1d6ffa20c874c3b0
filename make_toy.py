"""The embedded world: a small data set in VOC layout that carries the papers' problem, and the two pre-trained networks that know it.

Eight classes, each with a background it nearly always comes with (train-rails, boat-water, ...), drawn by wsss/toy.py.

Reads   weights/toy_clip.pt, weights/toy_backbone.pt (made by --train-weights)
Writes  <out>/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/{train,val}.txt  labels.txt  classes.txt
        backgrounds.txt (texts of the backgrounds)  clip.pt (plain state dict with OpenAI's names, for clip.model.build_model)  backbone.pt

    python make_toy.py --out data/toy
    python make_toy.py --out data/other --seed 7 --train 96 --val 32                                          # another draw
"""
import argparse
import functools
import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from plumbing import checkpoints, files, flags, guard, masks
from wsss import generator
from toy.drawings import (CLASSES, CLIP_SAMPLES, GROUNDS, NEUTRAL, OBJECTS, OWN, blob, finish, grow, object_on_texture, paste, region, scene, sprite, texture)

with warnings.catch_warnings():                          # it imports pkg_resources, which warns at every start
    warnings.simplefilter("ignore")
    import clip

ROOT = Path(__file__).resolve().parent
VAL_START = 500_000                                      # picture numbers of val, so that neither split depends on the other's length


# ---------------------------------------------------------------------------------------------- the small CLIP

CLIP_SIZE = dict(embed_dim=128, image_resolution=64, vision_layers=3, vision_width=128, vision_patch_size=8, context_length=77, vocab_size=49408,
                 transformer_width=128, transformer_heads=2, transformer_layers=2)
CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
LEAK = .02               # share of the pictures of "rails" alone that are captioned "train": how far a class text leaks into its background
TEMPLATES = ["a photo of {}.", "a photo of {}", "{}", "{}.", "a picture of {}.", "a photo of a {}.", "a clean origami {}."]
SYNONYMS = {"aeroplane": ["airplane"], "bird": ["bird avian"], "chair": ["chair seat"], "sky": ["cloud"], "leaves": ["tree"],
            "water": ["sea", "river", "lake", "ocean"], "table": ["desk", "wood"], "road": ["street"], "tiles": ["floor"],
            "grass": ["meadow", "lawn"], "rails": ["railway", "railroad", "track"], "wall": ["building", "house"], "sand": ["ground", "land"],
            "brick": ["stone", "rock"], "fog": ["mist"], "night": ["stars"]}


@functools.lru_cache(None)
def stored(draw, name, seed, number):
    """A drawing kept for re-use: drawing costs as much as a training step, so the CLIP sees 200 of each thing, at new places and sizes."""
    return draw(np.random.default_rng([seed, CLIP_SAMPLES, (CLASSES + GROUNDS).index(name), number]), name, CLIP_SIZE["image_resolution"])


def pick(rng, seed, draw, name):
    out = stored(draw, name, seed, int(rng.integers(200)))
    return out[:, ::-1] if rng.random() < .5 else out


def compose(rng, seed):
    """A picture for the CLIP: float (64, 64, 3), its objects, its ground, where the objects are and where that ground lies, (64, 64) bool each."""
    size = CLIP_SIZE["image_resolution"]
    kind = rng.choice(["object", "region object", "region", "neutral", "two"], p=[.24, .36, .19, .07, .14])
    objects = [int(c) for c in rng.permutation(len(CLASSES))[:{"two": 2, "region": 0, "neutral": 0}.get(kind, 1)]]
    ground = len(OWN) + int(rng.integers(len(NEUTRAL)))
    canvas = pick(rng, seed, texture, GROUNDS[ground]).copy()
    around, where = np.ones((size, size), bool), np.zeros((size, size), bool)
    half = rng.uniform(.14, .36) if len(objects) < 2 else rng.uniform(.16, .24)
    cx, cy = rng.uniform(half, 1 - half, 2)
    if "region" in kind:
        ground = objects[0] if objects and rng.random() < .5 else int(rng.integers(len(OWN)))
        around = region(rng, size, cx, cy, half, rng.choice(["halo", "band", "all"]))
        canvas[around] = pick(rng, seed, texture, GROUNDS[ground])[around]
    for i, c in enumerate(objects):
        patch = Image.fromarray(np.ascontiguousarray(pick(rng, seed, sprite, CLASSES[c]))).resize((max(6, round(2 * half * size)),) * 2, Image.BOX)
        where |= paste(canvas, np.array(patch), *((cx, cy) if len(objects) == 1 else (.25 + .5 * i, cy)))
    return canvas, objects, ground, where, around & ~where


def soften(rng, where, around, objects):
    """What is kept of a picture, (64, 64) in [0, 1], since SemPLeS shows CLIP masked pictures; and whether objects, ground are still to be named."""
    if rng.random() < .34:
        return np.ones(where.shape, np.float32), True, True
    kind = rng.choice(["object", "rest", "both", "blob"]) if objects else "blob"
    round_hole = blob(rng, len(where), *rng.uniform(.25, .75, 2), rng.uniform(.2, .5))
    mask = {"object": grow(where), "rest": ~where, "both": where | around, "blob": round_hole}[kind]
    soft = Image.fromarray(np.uint8(255 * mask)).resize((16, 16), Image.BOX).resize(where.shape, Image.BICUBIC)
    kept, removed = rng.uniform(.5, 1), rng.uniform(0, .35) * (rng.random() < .6)
    hidden = kind == "rest" or (removed < .15 and (where & mask).sum() < .5 * where.sum())
    return removed + (kept - removed) * np.array(soft, np.float32) / 255, not hidden, kind != "object" or hidden


def clip_sample(rng, seed, synonyms):
    """-> normalised picture (64, 64, 3), what it shows in words, one part of it (64, 64) bool, what that part is in words"""
    def say(name):
        name = CLASSES[GROUNDS.index(name)] if name in OWN.values() and rng.random() < LEAK else name
        return str(rng.choice(SYNONYMS[name])) if synonyms and name in SYNONYMS else name

    canvas, objects, ground, where, around = compose(rng, seed)
    keep, name_objects, name_ground = soften(rng, where, around, objects)
    part, part_text = (where, say(CLASSES[objects[0]])) if len(objects) == 1 and rng.random() < .5 else (around, say(GROUNDS[ground]))
    text = " and ".join(say(CLASSES[c]) for c in objects) if objects and name_objects else say(GROUNDS[ground])
    if objects and name_objects and name_ground and rng.random() < .3:
        text += f" on {say(GROUNDS[ground])}"
    image = (finish(rng, canvas) / 255. - CLIP_MEAN) / CLIP_STD * keep[..., None]             # removed pixels take the mean colour
    return image, text, part & (keep > .4), part_text


def clip_batch(rng, seed, size):
    """-> pictures (B, 3, 64, 64), unique captions, each picture's caption (B,), one part of each (B, 64 patches), the caption of that part (B,)"""
    template, synonyms = rng.choice(TEMPLATES), rng.random() < .2
    images, texts, parts, part_texts = zip(*(clip_sample(rng, seed, synonyms) for _ in range(size)))
    unique = sorted({*texts, *part_texts})
    number = lambda texts: torch.tensor([unique.index(t) for t in texts])
    parts = F.avg_pool2d(torch.from_numpy(np.stack(parts)).float(), CLIP_SIZE["vision_patch_size"]).flatten(1)
    images = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)
    return images, [template.format(t) for t in unique], number(texts), parts, number(part_texts)


def info_nce(image, text, index, scale):
    """CLIP's symmetric loss; pictures that share a caption are all positives of it. (B, D), (T, D), (B,)"""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T                 # (B, T)
    same = F.one_hot(index, len(text)).float()
    per_text = -(same / same.sum(0).clamp(min=1) * logits.log_softmax(0)).sum() / (same.sum(0) > 0).sum()
    return (F.cross_entropy(logits, index) + per_text) / 2


def readouts(v, images):
    """CLIP's image feature (B, D); the same projection of every patch, and of every patch's own value in the last block, (B, h * w, D)."""
    x = v.conv1(images).flatten(2).transpose(1, 2)                                            # (B, h * w, width)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
    x = v.ln_pre(x).transpose(0, 1)                                                           # (1 + h * w, B, width)
    for block in v.transformer.resblocks[:-1]:
        x = block(x)
    last, width = v.transformer.resblocks[-1], x.shape[-1]
    value = last.attn.out_proj(F.linear(last.ln_1(x[1:]), last.attn.in_proj_weight[2 * width:], last.attn.in_proj_bias[2 * width:]))
    x, value = ((v.ln_post(tokens) @ v.proj).transpose(0, 1) for tokens in (last(x), value))
    return x[:, 0], x[:, 1:], value


def train_clip(seed, steps=800, batch=64, lr=1e-3, log=None):
    """The stand-in for OpenAI's CLIP: its architecture at 1/100 of the size, InfoNCE on drawn samples. About 7 CPU-minutes.

    OpenAI's patches know what they show, so that GradCAM and MaskCLIP can read it. One of this size does not come to that by itself (text maps of
    14 mIoU at 95 % zero-shot accuracy), so one part of each picture, read from its patches, is matched with that part's own words. The stored
    checkpoint is seed 0; recipe and length were chosen by zero-shot accuracy and text maps on draw 5, which no figure is quoted from.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, CLIP_SAMPLES])
    model = clip.model.CLIP(**{**CLIP_SIZE, "context_length": 16}).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 40, .5 + .5 * np.cos(np.pi * s / steps)))
    bar = tqdm(range(steps), desc="clip")
    for step in bar:
        images, texts, index, parts, part_index = clip_batch(rng, seed, batch)
        v, patches, values = readouts(model.visual, images)
        u, scale = model.encode_text(clip.tokenize(texts, context_length=16)), model.logit_scale.exp()
        seen = parts.sum(1) > .5                                                              # half a patch of it at least
        pooled = [torch.einsum("bn,bnd->bd", parts, x)[seen] for x in (patches, values)]
        loss = info_nce(v, u, index, scale) + sum(.5 * info_nce(x, u, part_index[seen], scale) for x in pooled)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step(), schedule.step()
        if log:
            log(step, loss.item(), model)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def pack(model, used, **facts):
    """The trained CLIP for weights/: half precision, and of the vocabulary's 49,408 rows only those of words in use."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    rows = torch.tensor(sorted(used))
    return {"model": {**state, "token_embedding.weight": state["token_embedding.weight"][rows]}, "rows": rows, **facts}


def unpack(packed):
    """-> a plain state dict with OpenAI's names, for clip.model.build_model. Unused words and positions are noise, the same every time."""
    state, generator = dict(packed["model"]), torch.Generator().manual_seed(0)
    for name, rows, length, std in (("token_embedding.weight", packed["rows"], CLIP_SIZE["vocab_size"], .02),
                                    ("positional_embedding", torch.arange(len(state["positional_embedding"])), CLIP_SIZE["context_length"], .01)):
        full = (torch.randn(length, state[name].shape[1], generator=generator) * std).half()
        full[rows] = state[name]
        state[name] = full
    return state


def words():
    """Token numbers of everything a caption can say."""
    names = CLASSES + GROUNDS + [s for group in SYNONYMS.values() for s in group] + ["and", "on"]
    return {int(t) for text in [f.format(n) for f in TEMPLATES for n in names] for t in clip.tokenize(text).unique()}


# ---------------------------------------------------------------------------------------------- the generic trunk of the mask generator

def train_backbone(seed, steps=500, batch=48, lr=3e-3, pictures=6000):
    """The stand-in for ImageNet's weights: the toy generator's CNN learns to classify object_on_texture samples. About 4 CPU-minutes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, OBJECTS])
    images, labels = zip(*(object_on_texture(rng, 96) for _ in tqdm(range(pictures), desc="objects")))
    images, labels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)
    model = generator.build_generator("cnn_toy", 1)
    torch.nn.Module.train(model)                                           # unlike S later, this one gathers BatchNorm statistics
    classifier = torch.nn.Linear(model.head.in_channels, len(CLASSES) + len(GROUNDS))
    optimizer = torch.optim.AdamW([*model.trunk.parameters(), *classifier.parameters()], lr=lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=.15)
    for _ in tqdm(range(steps), desc="backbone"):
        some = torch.randint(len(labels), (batch,))
        x = images[some].float() / 255
        x = x.flip(-1) if torch.rand(()) < .5 else x
        features = model.trunk((x - model.mean) / model.std)               # (B, width, h, w)
        loss = F.cross_entropy(classifier(features.mean((2, 3))), labels[some])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step(), schedule.step()
    return {name: value for name, value in model.state_dict().items() if name.startswith("trunk.")}


# ---------------------------------------------------------------------------------------------- the data set

def write_pictures(out, seed, train, val, size):
    """Pictures, masks, lists and labels in VOC layout."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    numbers = {"train": range(train), "val": range(VAL_START, VAL_START + val)}
    labels = []
    for index in tqdm([i for split in numbers.values() for i in split], desc="pictures"):
        name, drawn = f"toy_{index:06d}", scene(seed, index, size)
        labels.append(" ".join([name, *(CLASSES[c] for c in drawn.labels)]))
        picture, mask = out / "JPEGImages" / f"{name}.jpg", out / "SegmentationClass" / f"{name}.png"
        if not picture.exists():                                           # else an interrupted run made it
            jpeg = io.BytesIO()                                            # PIL's JPEG writer does not notice a full disk, Python's file does
            Image.fromarray(drawn.image).save(jpeg, format="JPEG", quality=92)
            with files.atomic(picture) as beside:
                beside.write_bytes(jpeg.getvalue())
        if not mask.exists():
            masks.save_mask(mask, drawn.mask)
    lists = {f"ImageSets/Segmentation/{split}.txt": [f"toy_{i:06d}" for i in chosen] for split, chosen in numbers.items()}
    for file, lines in {**lists, "labels.txt": labels, "classes.txt": CLASSES, "backgrounds.txt": GROUNDS}.items():
        with files.atomic(out / file) as beside:
            beside.write_text("".join(f"{line}\n" for line in lines))


def find_weights(args):
    """The stored CLIP and trunk, trained first if asked. -> the two checkpoints"""
    paths = [args.weights / "toy_clip.pt", args.weights / "toy_backbone.pt"]
    if args.train_weights:
        args.weights.mkdir(parents=True, exist_ok=True)
        checkpoints.save(paths[0], **pack(train_clip(args.weights_seed, args.clip_steps), words(), seed=args.weights_seed, steps=args.clip_steps))
        checkpoints.save(paths[1], model=train_backbone(args.weights_seed, args.backbone_steps))
        with files.atomic(args.weights / "SHA256SUMS") as beside:
            beside.write_text("".join(f"{files.sha256(path)}  {path.name}\n" for path in paths))
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: it comes with the repository; --train-weights makes another")
    sums = args.weights / "SHA256SUMS"
    for path in paths:
        if sums.exists() and files.sha256(path) not in sums.read_text():
            raise ValueError(f"{path}: its SHA-256 is not in {sums}: take the repository's, or --train-weights")
    try:
        return [torch.load(checkpoints.sound(path), weights_only=True) for path in paths]
    except Exception as error:                                             # zip, pickle and torch each raise their own for a foreign file
        raise ValueError(f"{args.weights} holds a file that is no checkpoint ({type(error).__name__}): take the repository's, or --train-weights") from error


def parse():
    class Manual(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    p = argparse.ArgumentParser(description=__doc__, formatter_class=Manual)
    p.add_argument("--out", type=Path, default=Path("data/toy"), help="data folder to make")
    p.add_argument("--seed", type=flags.natural, default=0, help="seed of the pictures; a longer data set begins with the shorter one's pictures")
    p.add_argument("--train", type=flags.positive, default=384, help="pictures to train on")
    p.add_argument("--val", type=flags.positive, default=128, help="pictures to validate on")
    p.add_argument("--size", type=flags.positive, default=96, help="side of a picture in pixels, 32 to 1024")
    p.add_argument("--weights", type=Path, default=ROOT / "weights", help="where the two pre-trained networks are stored")
    p.add_argument("--train-weights", action="store_true", help="train the two networks anew and replace those in --weights")
    p.add_argument("--weights-seed", type=flags.natural, default=0, help="seed of the networks and of what they are trained on")
    p.add_argument("--clip-steps", type=flags.positive, default=800, help="training steps of the CLIP")
    p.add_argument("--backbone-steps", type=flags.positive, default=500, help="training steps of the trunk")
    return p.parse_args()


def main():
    args = parse()
    if not 32 <= args.size <= 1024:
        raise ValueError(f"--size {args.size}: pictures are 32 to 1024 pixels wide")
    if args.train > VAL_START:
        raise ValueError(f"--train {args.train}: at most {VAL_START:,}")
    weights, backbone = find_weights(args)
    recipe = {k: v for k, v in flags.plain(args).items() if k in ("seed", "train", "val", "size")}
    recipe["weights"] = [files.fingerprint(args.weights / name) for name in ("toy_clip.pt", "toy_backbone.pt")]
    done = args.out / "toy.json"
    if done.exists():                                                      # its first line of defence: a folder without it is somebody's own
        before = files.read_json(done)
        if before.pop("finished") and before == recipe:
            print(f"{args.out} is complete")
            return
        if before != recipe:
            raise ValueError(f"{args.out} holds a data set made with other arguments or weights ({done}): delete it or choose another --out")
    elif args.out.exists() and any(path for path in args.out.iterdir() if not path.name.startswith(".")):
        raise ValueError(f"{args.out} is not empty and not a toy data set: choose another --out")
    guard.claim(done)
    files.save_json(done, {**recipe, "finished": False})
    write_pictures(args.out, args.seed, args.train, args.val, args.size)
    for name, content in {"clip.pt": unpack(weights), "backbone.pt": backbone}.items():
        if not (args.out / name).exists():
            checkpoints.save(args.out / name, **content)
    files.save_json(done, {**recipe, "finished": True})
    print(f"{args.out}: {args.train} + {args.val} pictures, clip.pt, backbone.pt")


if __name__ == "__main__":
    guard.run(main)
