"""One HTML page to look at a run: scores, images side by side, learned prompts, regions, losses, arguments.

Paper   SemPLeS Fig. 5 (manual and learned background prompts), Fig. 6 (what each loss changes);
        VPL Fig. 4 (regions with and without RSC)
Reads   images, image labels and, where there are any, true masks of --data; of --out, and of --vpl beside
        it, what there is: folders of maps and masks (with their recipe.json), pred/<split>/, prompts.pt,
        seg.pt of a clip_decoder, prototypes.pt, *.jsonl, eval_*.json
Writes  <out>/report.html: one file that holds its images, without scripts, for a laptop and for a phone

What is missing is left out, with a line that says which command makes it. Nothing is scored here: numbers
are those of eval_*.json. A map is shown from its smallest value (dark) to its largest (bright), each by
itself; colours of masks are VOC's, dotted grey is 255.

    python report.py --data data/toy --out runs/toy --split train
    python report.py --data /data/VOC2012 --out runs/voc --vpl runs/vpl --ids 2007_000032 2007_000039
    python report.py --data /data/VOC2012 --out runs/vpl --vpl runs/vpl_ce     # decoders with and without RSC
"""
import json
import math
import os
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F

from plumbing import checkpoints, files, flags, folders, guard, networks, page, processes, samples, scores
from plumbing.images import load_image
from plumbing.log import read_log, versions
from plumbing.maps import load_cam, present
from plumbing.masks import load_mask
from plumbing.page import chip, esc, figure, heading, show_map, shrink, tag
from wsss import clip_model, gradcam, losses, texts

REGIONS = 200                                                 # images whose regions are in the scatter
WHAT = {"cam": "maps", "pseudo": "pseudo masks", "masks": "masks", "seg": "network"}
SCRIPTS = {Path(name).stem: script for name, script in files.MADE_BY.items()}
MAPS_OF = {"cls": "cls.pt", "match": "match.pt", "refine": "refine.pt", "vision": "prototypes.pt"}


def parse():
    p = flags.parser(__doc__, split="train", batch_size=8)
    p.add_argument("--vpl", type=Path,
                   help="second output folder, shown beside --out (default: <out>/vpl if it is there)")
    p.add_argument("--images", type=flags.positive, default=8,
                   help="images of --split, and of each split with predictions; classes take turns")
    p.add_argument("--ids", nargs="+", help="these images instead")
    p.add_argument("--clip", help="CLIP of prompts and decoders, if it is not where it was in training")
    p.add_argument("--features", choices=["patch", "value"], default="value",
                   help="what prompts are compared with: a patch's output, or its value in the last block")
    return p.parse_args()


def missing(args, what, script, *more, out=None):
    """A line for what is not there, with the command that makes it."""
    words = ["python", script, "--data", args.data, "--out", out or args.out, *more]
    command = tag("code", esc(shlex.join(map(str, words))))
    return tag("p", f"No {esc(what)} here. {command}", kind="missing")


# ---------------------------------------------------------------- what is there

class Results:
    """What lies in one output folder. `name` is empty for --out."""

    def __init__(self, name, out, folder):
        self.name, self.out = name, out
        notes = sorted(out.glob("*/recipe.json"))
        self.recipes = {path.parent.name: read_recipe(path, folder.classes) for path in notes}
        order = list(scores.SOURCES)
        sources = {where: args.get("source") for where, args in self.recipes.items()}
        found = [where for where in sources if sources[where] in order]
        found.sort(key=lambda where: order.index(sources[where]))
        self.maps = {where: sources[where] for where in found}
        self.masks = [where for where, args in self.recipes.items() if "pseudo" in args]
        made = sorted(path for path in out.glob("pred/*") if path.is_dir())
        lists = folder.root / "ImageSets/Segmentation"
        self.predictions = [path for path in made if (lists / f"{path.name}.txt").exists()]
        self.photos = [path for path in made if path not in self.predictions]         # of predict.py --images
        read = ((path.stem.removeprefix("eval_"), read_score(path)) for path in out.glob("eval_*.json"))
        self.scores = sorted(((name, score) for name, score in read if score), key=by_stage)
        logs = {stage: out / f"{stage}.jsonl" for stage in SCRIPTS}
        self.logs = {stage: read_log(path) for stage, path in logs.items() if path.exists()}

    def label(self, text):
        return f"{text} ({self.name})" if self.name else text


def read_recipe(path, classes):
    """recipe.json -> the arguments that a folder was made with. It must be of the classes of --data."""
    note = files.read_json(path)
    names = note.get("classes", classes)
    if not all(isinstance(name, str) and folders.printable(name) for name in names):
        raise ValueError(f"{path} lists classes that do not print: remove it and run its stage again")
    checkpoints.check_classes(path, names, classes)
    return note.get("args", {})


def read_score(path):
    """eval_*.json as eval.py writes it; None for a file of another program."""
    score = files.read_json(path)
    if "protocol" not in score:
        return None
    protocol = score["protocol"]
    try:
        scores.in_words(protocol)
        if {"miou", "pixel_accuracy", "iou"} <= score.keys() and protocol["what"] in WHAT:
            return score
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is not a score of eval.py: remove it and run eval.py again")


def by_stage(item):
    name, score = item
    protocol = score["protocol"]
    source = list(scores.SOURCES).index(scores.maps_of(protocol))
    return list(WHAT).index(protocol["what"]), source, len(name), name


def spread_over_classes(folder, ids, count):
    """`count` of the ids: each class in turn gives its next image, images without a class come last."""
    labels = folder.labels(ids)
    queues = [[ids[n] for n in holds.nonzero()[:, 0].tolist()] for holds in (*labels.T, labels.sum(1) == 0)]
    chosen = {}
    for turn in range(max(map(len, queues))):
        chosen |= dict.fromkeys(queue[turn] for queue in queues[:-1] if turn < len(queue))
    return list(chosen | dict.fromkeys(queues[-1]))[:count]


def choose_images(args, folder, found):
    """{title: ids}: of --split those with maps or masks, and of each split with predictions."""
    if args.ids:
        for id in args.ids:
            folder.image_path(folders.check_id(id, "--ids"))
        return {"chosen": args.ids}
    places = {args.split: []}
    for results in found:
        places[args.split] += [results.out / name for name in (*results.maps, *results.masks)]
        for path in results.predictions:
            places.setdefault(path.name, []).append(path)
    chosen = {}
    for split, paths in places.items():
        made = {file.stem for path in paths for file in path.iterdir()}
        ids = [id for id in folder.ids(split, args.limit) if not made or id in made]
        chosen[split] = spread_over_classes(folder, ids, args.images)
    return {split: ids for split, ids in chosen.items() if ids}


# ---------------------------------------------------------------- scores

def draw_scores(args, folder, found):
    head = "scores", "Scores", (
        "mIoU from one confusion matrix over all pixels of the split, background counted. A number is worth "
        "what its protocol says: compare rows of one protocol.")
    listed = [(results.label(name), score) for results in found for name, score in results.scores]
    if not listed and not any(map(folder.has_mask, folder.ids(args.split, args.limit))):
        line = f"No scores: of the split {args.split} there are no true masks."
        return page.section(*head, tag("p", esc(line), kind="missing"))
    if not listed:
        return page.section(*head, missing(args, "scores", "eval.py", "--split", args.split, "--what", "cam"))
    rows = [["what", "mIoU", "pixel accuracy"]]
    for name, score in listed:
        protocol, best = score["protocol"], score.get("oracle_best")
        facts = tag("pre", esc(json.dumps(protocol, indent=1)))
        details = tag("details", tag("summary", esc(scores.in_words(protocol))), facts)
        oracle = best and f"{100 * best['miou']:.1f} at {best['threshold']:.2f}, chosen with the truth"
        miou = f"{100 * score['miou']:.1f}"
        bar = tag("td", tag("b", miou), tag("small", "<br>", oracle) if best else "", kind="bar",
                  style=f"--share:{miou}%")
        what = f"{esc(name)} {tag('small', WHAT[protocol['what']])}{details}"
        rows.append([what, bar, f"{100 * score['pixel_accuracy']:.1f}"])
    by_class = [["", *(esc(name) for name, _ in listed)]]
    for k, name in enumerate(["background", *folder.classes], -1):
        cells = []
        for _, score in listed:
            iou = score["iou"].get(name)
            shade = {} if iou is None else {"style": f"background:rgba(46,125,180,{0.55 * iou:.2f})"}
            cells.append(tag("td", "–" if iou is None else f"{100 * iou:.1f}", **shade))
        by_class.append([chip(name, k), *cells])
    tables = page.table(rows, "scores"), heading("IoU by class"), page.table(by_class, "iou")
    return page.section(*head, *tables)


# ---------------------------------------------------------------- images

def draw_card(folder, found, id):
    """One image and all that was made of it, a row for each present class."""
    label = folder.labels([id])[0]
    image = shrink(load_image(folder.image_path(id)))
    tiles, column = [figure(image, "image", "1/1", "first")], 1
    for results in found:
        for name, source in results.maps.items():
            path = results.out / name / f"{id}.npy"
            if not path.exists():
                continue
            column += 1
            for line, (k, cam) in enumerate(zip(*load_cam(path, label)), 1):
                which = f"{folder.classes[k]}, " if label.sum() > 1 else ""
                caption = f"{which}{results.label(name)}: {scores.SOURCES[source]}"
                tiles.append(figure(show_map(image, cam), caption, f"{line}/{column}"))
    masks = [(f"{results.label(name)}: mask", results.out / name / f"{id}.png")
             for results in found for name in results.masks]
    masks += [(f"{results.label('seg')}: prediction", path / f"{id}.png")
              for results in found for path in results.predictions]
    masks += [("truth", folder.mask_path(id))] if folder.has_mask(id) else []
    for caption, path in masks:
        if path.exists():
            column += 1
            mask = load_mask(path, len(folder.classes))
            tiles.append(figure(page.show_mask(image, mask), caption, f"1/{column}"))
    chips = [chip(folder.classes[k], k) for k in present(label)] or [tag("span", "no class", kind="chip")]
    return tag("article", tag("h3", esc(id), " ", *chips), page.tiles(tiles, column))


def draw_images(args, folder, found, chosen):
    parts, split = [], ("--split", args.split)
    for title, ids in chosen.items():
        cards = (draw_card(folder, found, id) for id in ids)
        parts += [heading(title), tag("div", *cards, kind="cards")]
    for path in (path for results in found for path in results.photos):
        overlays = sorted(path.glob("*.jpg"))[:args.images]
        overlays = [figure(shrink(load_image(jpg)), jpg.stem) for jpg in overlays]
        parts += [heading(path.name), tag("div", *overlays, kind="row flow")] if overlays else []
    for results in found:
        for source, weights in MAPS_OF.items():
            if source not in results.maps.values() and (results.out / weights).exists():
                more = (*split, "--source", source, "--cam", f"cam_{source}")
                parts.append(missing(args, f"maps of {source}", "make_cam.py", *more, out=results.out))
    if not any(results.maps for results in found):
        parts.append(missing(args, "maps", "make_cam.py", *split))
    if not any(results.masks for results in found):
        parts.append(missing(args, "pseudo masks", "make_pseudo.py", *split))
    if not any(results.predictions or results.photos for results in found):
        parts.append(missing(args, "predictions", "eval.py", "--split", "val", "--what", "seg", "--save"))
    if not any(folder.has_mask(id) for ids in chosen.values() for id in ids):
        parts.append(tag("p", f"No true masks of these images in {esc(folder.root)}.", kind="missing"))
    note = ("What each stage changes, by image (SemPLeS Fig. 6): maps in the order of the stages, a row for "
            "each class of the image, then masks, predictions and the truth. Dark is a map's smallest value, "
            "bright its largest. Rows scroll sideways.")
    return page.section("images", "Images, side by side", note, *parts)


# ---------------------------------------------------------------- where prompts look

def find_clip(args, content):
    """The name or file of the CLIP that a checkpoint was trained with; None if it is gone or was replaced."""
    known = content["args"].get("inputs", {}).get("clip")                             # None: a model's name
    names = [content["args"]["clip"], args.clip]
    return next((name for name in names if name and files.fingerprint(name) == known), None)


def missing_clip(args, content, path):
    lost = f"CLIP {content['args']['clip']}, with which {path} was trained,"
    return missing(args, lost, "report.py", "--clip", "FILE")


@torch.no_grad()
def compare_patches(clip, folder, id, columns, kind, run):
    """Cosine of an image's patches with columns (M, D) of unit length -> (M, h, w)"""
    image = folder.image(id, max_side=640)[None].to(run.device)
    x, _, grid = gradcam.last_inputs(clip, image)
    return (columns @ gradcam.patch_features(clip, x, kind)[0].T).unflatten(1, grid).cpu().numpy()


@torch.no_grad()
def draw_prompts(args, folder, found, chosen, run):
    head = "prompts", "Where learned prompts look", (
        "Cosine of CLIP's patches with a class's learned background prompt u_b, beside manual background "
        "texts and the class's own text (SemPLeS Fig. 5). A good prompt lights up what comes with the class, "
        "and not the class.")
    paths = (results.out / "prompts.pt" for results in found)
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return page.section(*head, missing(args, "prompts", "train_prompt.py", "--split", args.split))
    content = checkpoints.load(path, "prompts", folder.classes)
    name = find_clip(args, content)
    if name is None:
        return page.section(*head, missing_clip(args, content, path))
    clip = networks.load_clip(name, run, vit=True, gelu=content["args"]["clip_gelu"])
    classes, backgrounds = folder.classes, folder.backgrounds or texts.backgrounds(folder.classes)
    model = clip_model.BackgroundPrompts(clip, len(classes), content["model"]["vectors"].shape[1])
    checkpoints.load_weights(model, content["model"], path)
    u_b = model()                                                                     # (C, D)
    class_texts = texts.class_texts(classes, aliases=not content["args"]["raw_names"])
    u_f = clip.encode_text(class_texts)                                               # (C, D)
    manual = clip.encode_text(texts.class_texts(backgrounds))                         # (backgrounds, D)
    near = (u_b @ manual.T).topk(min(3, len(manual)))                                 # (C, 3)
    average = F.normalize(manual.mean(0), dim=0)
    cards = []
    for id in next(iter(chosen.values()), []):
        image = shrink(load_image(folder.image_path(id)))
        for k in present(folder.labels([id])[0]):
            best = near.indices[k, 0].item()
            columns = torch.stack([u_b[k], manual[best], average, u_f[k]])
            captions = ["learned prompt", f"“{backgrounds[best]}”: closest manual text",
                        "all manual texts", f"“{class_texts[k]}”"]
            maps = compare_patches(clip, folder, id, columns, args.features, run)
            tiles = [figure(show_map(image, cam), caption) for cam, caption in zip(maps, captions)]
            title = tag("h3", chip(classes[k], k), " ", tag("small", esc(id)))
            row = page.tiles([figure(image, "image", kind="first"), *tiles], 5)
            cards.append(tag("article", title, row, kind="small"))
    rows = [["class", "closest manual texts", "its own text"]]
    for k, name in enumerate(classes):
        pairs = zip(near.indices[k].tolist(), near.values[k].tolist())
        closest = " · ".join(f"{esc(backgrounds[m])} <b>{cosine:.2f}</b>" for m, cosine in pairs)
        rows.append([chip(name, k), closest, f"{(u_b[k] @ u_f[k]).item():.2f}"])
    cosines = heading("Cosines of each prompt"), page.table(rows)
    return page.section(*head, tag("div", *cards, kind="cards"), *cosines)


# ---------------------------------------------------------------- regions

@torch.no_grad()
def region_features(model, folder, ids, args, run):
    """VPL Eq. 12 of every (image, present class) -> unit vectors (P, D), their classes (P,)"""
    labels, rows, owners = folder.labels(ids), [], []
    for numbers, images in samples.by_size(folder, ids, args.batch_size, run, args.workers, max_side=640):
        _, coarse, v = model(images.to(run.device))
        b, k = labels[numbers].nonzero(as_tuple=True)
        regions = losses.region_embeddings(v, coarse.softmax(1)[:, 1:]).cpu()         # (B, C, D)
        rows.append(F.normalize(regions[b, k], dim=-1))
        owners.append(k)
    return torch.cat(rows), torch.cat(owners)


def project(points, others):
    """Both on the first two principal axes of points (n, D), and the share of their variance on these."""
    mean = points.mean(0)
    _, s, axes = torch.linalg.svd(points - mean, full_matrices=False)
    share = s[:2].square().sum() / s.square().sum().clamp(min=1e-12)
    return (points - mean) @ axes[:2].T, (others - mean) @ axes[:2].T, share.item()


def share_between(points, owners):
    """The share of the variance that lies between the classes' means: 1 if every class is one point."""
    means = torch.stack([points[owners == k].mean(0) for k in owners])
    spread = (points - points.mean(0)).square().sum().clamp(min=1e-12)
    return ((means - points.mean(0)).square().sum() / spread).item()


def draw_regions(args, folder, found, run):
    parts, panels = [], []
    for results in found:
        if (results.out / "prototypes.pt").exists():
            gap = checkpoints.load(results.out / "prototypes.pt", "prototypes", folder.classes)["gap"]
            text = (f"the mean of the pixels' features is {gap['before']:.3f} from the mean of the texts Z, "
                    f"{gap['after']:.3f} from that of W")
            parts.append(tag("p", f"{esc(results.out)}: {text}."))
    ids = folder.ids(args.split, args.limit)
    ids = [id for id, label in zip(ids, folder.labels(ids)) if label.any()][:REGIONS]
    paths = [results.out / "seg.pt" for results in found]
    for path in filter(Path.exists, paths):
        content = checkpoints.load(path, "seg", folder.classes)
        if content["args"]["model"] != "clip_decoder" or len(ids) < 3:
            continue
        name = find_clip(args, content)
        if name is None:
            parts.append(missing_clip(args, content, path))
            continue
        model = networks.load_segmenter(path, run, name).train()                      # it then also gives V
        points, owners = region_features(model, folder, ids, args, run)
        flat, marks, share = project(points, model.prototypes[:len(folder.classes)].cpu())
        weight = content["args"]["lambda_rsc"]
        title = tag("b", f"with RSC, λ {weight:g}" if weight else "without RSC")
        between = 100 * share_between(points, owners)
        facts = (f" · {esc(path.parent.name)}<br>{len(points)} regions, {between:.0f} % of the variance "
                 f"between classes; axes hold {100 * share:.0f} %")
        drawing = page.scatter(flat.numpy(), owners.numpy(), marks.numpy(), folder.classes)
        panels.append(tag("figure", tag("figcaption", title, facts), drawing, kind="panel"))
    having = [results.out for results in found if (results.out / "prototypes.pt").exists()]
    if not panels and having:
        more = ("--split", args.split, "--model", "clip_decoder")
        parts.append(missing(args, "clip_decoder", "train_seg.py", *more, out=having[-1]))
    elif not panels:
        out = found[-1].out if len(found) > 1 else f"{args.out}_vpl"
        parts.append(missing(args, "prototypes", "vpl.py", "--split", args.split, out=out))
    note = ("The regions of each class in an image (VPL Eq. 12) in the decoder's space, on the two principal "
            "axes of the points; diamonds are vision prototypes W (VPL Fig. 4, there by t-SNE). To see both, "
            "train a second decoder with --lambda-rsc 0 and give its folder to --vpl.")
    return page.section("regions", "Regions and prototypes", note, tag("div", *panels, kind="panels"), *parts)


# ---------------------------------------------------------------- losses and arguments

def find_curves(rows):
    """Rows of a log -> {name: [(step, value)]}, the loss first."""
    curves = {"loss": []}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if number and name not in ("step", "seconds", "epoch"):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: points for name, points in curves.items() if points}


def draw_losses(args, found):
    parts, there = [], set()
    for results in found:
        for stage, (_, rows) in results.logs.items():
            there.add(stage)
            curves = find_curves(rows)
            loss = page.chart("loss", curves.pop("loss"), "big") if "loss" in curves else ""
            rest = [page.chart(name, points) for name, points in curves.items()] or ["nothing logged yet"]
            last = rows[-1] if rows else {"step": 0, "seconds": 0}
            facts = f"{SCRIPTS[stage]}, {last['step']} steps, {last['seconds'] / 60:.1f} min"
            title = tag("h3", esc(results.label(stage)), " ", tag("small", facts))
            parts.append(tag("article", title, tag("div", loss, tag("div", *rest), kind="charts")))
    parts += [missing(args, f"log of {stage}", script, "--split", args.split)
              for stage, script in SCRIPTS.items() if stage not in there]
    note = "The loss of each stage, large, and what it was made of, by training step."
    return page.section("losses", "Losses", note, *parts)


def draw_box(title, content):
    """A table of names and values that opens on a click."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
    rows = [[esc(name), tag("td", esc(value))] for name, value in values.items()]
    return tag("details", tag("summary", esc(title)), page.table(rows))


def draw_arguments(found):
    """Arguments and versions of all that is there."""
    parts = []
    for results in found:
        for stage, (head, _) in results.logs.items():
            title = results.label(f"{SCRIPTS[stage]} → {stage}.jsonl")
            parts.append(draw_box(title, head["args"] | head.get("versions", {})))
        parts += [draw_box(results.label(f"{name}/"), recipe) for name, recipe in results.recipes.items()]
    parts.append(draw_box("this page", versions()))
    return page.section("arguments", "Arguments and versions", "As each stage wrote them down.", *parts)


def main():
    args = parse()
    folder = folders.Folder(args.data)
    for out in filter(None, [args.out, args.vpl]):
        if not out.is_dir():
            raise FileNotFoundError(f"{out} is missing: a report is of a folder that stages have written to")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("one process makes the page: run report.py without torchrun")
    run = processes.Run(args)
    path = args.out / "report.html"
    guard.claim(path)
    second = args.vpl or args.out / "vpl"
    found = [Results("", args.out, folder)]
    if second.is_dir():
        found.append(Results(second.name, second, folder))
    chosen = choose_images(args, folder, found)
    sections = {"scores": draw_scores(args, folder, found),
                "images": draw_images(args, folder, found, chosen),
                "prompts": draw_prompts(args, folder, found, chosen, run),
                "regions": draw_regions(args, folder, found, run),
                "losses": draw_losses(args, found),
                "arguments": draw_arguments(found)}
    count = len(folder.ids(args.split, args.limit))
    facts = f"{args.data}: {len(folder.classes)} classes, {count} images in {args.split}"
    content = page.document(args.out, facts, sections)
    with files.atomic(path) as beside:                        # JSON may hold half a character
        beside.write_text(content, encoding="utf-8", errors="xmlcharrefreplace")
    run.close(f"{path}: {path.stat().st_size / 2**20:.1f} MB, open it in a browser")


if __name__ == "__main__":
    guard.run(main)
