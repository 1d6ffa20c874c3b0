"""The toy world: a small data set in VOC layout that has the papers' problem, and two pre-trained networks.

Eight classes, each with a background it nearly always comes with (train and rails, boat and water, ...),
drawn by toy/drawings.py.

Reads   weights/toy_clip.pt, weights/toy_backbone.pt (made by --train-weights)
Writes  <out>/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/{train,val}.txt
        labels.txt  classes.txt  backgrounds.txt (texts of the backgrounds)
        clip.pt (a state dict with OpenAI's names)  backbone.pt (for train_cls.py --backbone)

    python make_toy.py --out data/toy
    python make_toy.py --out data/other --seed 7 --train 96 --val 32         # another draw
"""
import argparse
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from plumbing import checkpoints, files, flags, guard, weights
from plumbing.masks import save_mask
from toy import clip, drawings
from toy.drawings import CLASSES, GROUNDS
from toy.networks import ToyCNN

VAL_START = 500_000  # image numbers of val: neither split depends on the other's length


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Manual)
    p.add_argument("--out", type=Path, default=Path("data/toy"), help="data folder to make")
    p.add_argument("--seed", type=flags.natural, default=0,
                   help="seed of the images; a longer data set begins with the images of a shorter one")
    p.add_argument("--train", type=flags.positive, default=384, help="images to train on")
    p.add_argument("--val", type=flags.positive, default=128, help="images to validate on")
    p.add_argument("--size", type=flags.positive, default=96, help="side of an image in pixels, 32 to 1024")
    p.add_argument("--weights", type=Path, default=files.ROOT / "weights",
                   help="where the two pre-trained networks are stored")
    p.add_argument("--train-weights", action="store_true",
                   help="train the two networks anew and replace those in --weights, 20 CPU-minutes")
    p.add_argument("--weights-seed", type=flags.natural, default=0,
                   help="seed of the networks and of what they are trained on")
    p.add_argument("--clip-steps", type=flags.positive, default=1200, help="training steps of the CLIP")
    p.add_argument("--backbone-steps", type=flags.positive, default=500, help="training steps of the CNN")
    return p.parse_args()


# ---------------------------------------------------------------- the pre-trained networks

def train_backbone(seed, steps=500, batch=48, lr=3e-3, count=6000):
    """Stands for ImageNet's weights: the toy's CNN learns to classify objects and textures. 4 CPU-minutes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, drawings.OBJECTS])
    samples = [drawings.object_on_texture(rng, 96) for _ in tqdm(range(count), desc="objects")]
    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
    labels = torch.tensor([label for _, label in samples])
    model = ToyCNN(1)
    torch.nn.Module.train(model)  # unlike S later: it gathers BatchNorm statistics
    classifier = torch.nn.Linear(model.head.in_channels, len(CLASSES) + len(GROUNDS))
    parameters = [*model.trunk.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=.15)
    for _ in tqdm(range(steps), desc="backbone"):
        some = torch.randint(len(labels), (batch,))
        x = images[some].float() / 255
        x = x.flip(-1) if torch.rand(()) < .5 else x
        features = model.trunk((x - model.mean) / model.std)                          # (B, width, h, w)
        loss = F.cross_entropy(classifier(features.mean((2, 3))), labels[some])

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value for name, value in model.state_dict().items() if name.startswith("trunk.")}


def read_weights(args):
    """-> the contents of toy_clip.pt and toy_backbone.pt, trained first if asked."""
    paths = [args.weights / "toy_clip.pt", args.weights / "toy_backbone.pt"]
    sums = args.weights / "SHA256SUMS"
    if args.train_weights:
        args.weights.mkdir(parents=True, exist_ok=True)
        packed = clip.pack(clip.train_clip(args.weights_seed, args.clip_steps))
        checkpoints.save(paths[0], **packed, seed=args.weights_seed, steps=args.clip_steps)
        checkpoints.save(paths[1], model=train_backbone(args.weights_seed, args.backbone_steps))
        with files.atomic(sums) as beside:
            beside.write_text("".join(f"{files.sha256(path)}  {path.name}\n" for path in paths))
    remedy = "it comes with the repository; --train-weights makes another"
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {remedy}")
        if sums.exists() and files.sha256(path) not in sums.read_text():
            raise ValueError(f"{path}: its SHA-256 is not in {sums}: {remedy}")
    return [weights.read(path) for path in paths]


# ---------------------------------------------------------------- the data set

def write_lines(path, lines):
    with files.atomic(path) as beside:
        beside.write_text("".join(f"{line}\n" for line in lines))


def write_images(out, seed, train, val, size):
    """Images, masks, lists and labels in VOC layout. Images and masks of an interrupted run stay."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    numbers = {"train": range(train), "val": range(VAL_START, VAL_START + val)}
    labels = []
    for index in tqdm([*numbers["train"], *numbers["val"]], desc="images"):
        name = f"toy_{index:06d}"
        scene = drawings.scene(seed, index, size)
        labels.append(" ".join([name, *(CLASSES[c] for c in scene.labels)]))
        image, mask = out / "JPEGImages" / f"{name}.jpg", out / "SegmentationClass" / f"{name}.png"
        if not image.exists():
            jpeg = io.BytesIO()  # PIL does not notice a full disk, write_bytes does
            Image.fromarray(scene.image).save(jpeg, format="JPEG", quality=92)
            with files.atomic(image) as beside:
                beside.write_bytes(jpeg.getvalue())
        if not mask.exists():
            save_mask(mask, scene.mask)
    for split, chosen in numbers.items():
        write_lines(out / f"ImageSets/Segmentation/{split}.txt", [f"toy_{index:06d}" for index in chosen])
    write_lines(out / "labels.txt", labels)
    write_lines(out / "classes.txt", CLASSES)
    write_lines(out / "backgrounds.txt", GROUNDS)


def main():
    args = parse()
    if not 32 <= args.size <= 1024:
        raise ValueError(f"--size {args.size}: images are 32 to 1024 pixels wide")
    if args.train > VAL_START:
        raise ValueError(f"--train {args.train}: at most {VAL_START:,}")
    packed_clip, backbone = read_weights(args)
    recipe = {name: getattr(args, name) for name in ("seed", "train", "val", "size")}
    names = ("toy_clip.pt", "toy_backbone.pt")
    recipe["weights"] = [files.fingerprint(args.weights / name) for name in names]
    done = args.out / "toy.json"
    if done.exists():
        before = files.read_json(done)
        finished = before.pop("finished", False)
        if before != recipe:
            raise ValueError(f"{args.out} holds a data set made with other arguments or weights ({done}): "
                             "delete it or choose another --out")
        if finished:
            print(f"{args.out} is complete")
            return
    elif args.out.exists() and any(args.out.glob("[!.]*")):
        raise ValueError(f"{args.out} is not empty and not a toy data set: choose another --out")
    guard.claim(done)
    files.save_json(done, {**recipe, "finished": False})
    write_images(args.out, args.seed, args.train, args.val, args.size)
    for name, content in {"clip.pt": clip.unpack(packed_clip), "backbone.pt": backbone}.items():
        if not (args.out / name).exists():
            checkpoints.save(args.out / name, **content)
    files.save_json(done, {**recipe, "finished": True})
    print(f"{args.out}: {args.train} + {args.val} images, clip.pt, backbone.pt")


if __name__ == "__main__":
    guard.run(main)
