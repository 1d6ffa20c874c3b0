"""One HTML page to look at a run: pictures side by side, where learned prompts look, regions, losses, scores, arguments.

Paper   SemPLeS Fig. 5 (manual and learned background prompts) and Fig. 6 (what each loss changes), by picture; VPL Fig. 4 (regions with and without RSC)
Reads   pictures, image labels and, where there are any, true masks of --data; of --out, and of --vpl beside it, whatever is there:
        folders of maps and masks (with their recipe.json), pred/<split>/, prompts.pt, seg.pt of a clip_decoder, prototypes.pt, *.jsonl, eval_*.json
Writes  <out>/report.html: one file that holds its pictures, without scripts, for a laptop and for a phone

What is missing is left out, with a line that says which command makes it. Nothing is scored here: numbers are those of eval_*.json.
A map is shown from its smallest value (dark) to its largest (bright), each by itself; colours of masks are VOC's, dotted grey is 255.

    python report.py --data data/toy --out runs/toy --split train
    python report.py --data /data/VOC2012 --out runs/voc --vpl runs/vpl --ids 2007_000032 2007_000039
    python report.py --data /data/VOC2012 --out runs/vpl --pictures 20 --without-rsc runs/vpl_ce
"""
import base64
import html
import io
import json
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from plumbing import checkpoints, files, flags as flag_types, folders, guard, images as image_files, log as logs, maps as map_files, masks as mask_files, processes, samples
from wsss import clip_model, gradcam, losses, segmenter, texts as names

SIDE = 240                                                                  # longer side of an embedded picture: twice what is shown, for fine screens
REGIONS = 200                                                               # pictures whose regions are in the scatter
SOURCES = {"cls": "image labels alone", "match": "+ L_match", "refine": "+ L_prompt, L_refine", "text": "CLIP, texts", "vision": "CLIP, prototypes W"}
WHAT = {"cam": "maps", "pseudo": "pseudo masks", "masks": "masks", "seg": "network"}
TRAINED = {Path(name).stem: script for name, script in files.MADE_BY.items()}


def parse():
    p = flag_types.parser(__doc__, split="train", batch_size=8)
    p.add_argument("--vpl", type=Path, help="second output folder, shown beside --out (default: <out>/vpl if it is there)")
    p.add_argument("--without-rsc", type=Path, help="third, with a clip_decoder trained with --lambda-rsc 0: its regions beside the other's")
    p.add_argument("--pictures", type=flag_types.positive, default=8, help="pictures of --split, and of each split with predictions; classes take turns")
    p.add_argument("--ids", nargs="+", help="these pictures instead")
    p.add_argument("--clip", help="CLIP of prompts and decoders, if it is not where it was in training")
    p.add_argument("--features", choices=["patch", "value"], default="value", help="what prompts are compared with: a patch's output, or its value in the last block")
    return p.parse_args()


# ---------------------------------------------------------------- pieces of a page

esc = lambda text: html.escape(str(text))


def picture(image, caption, place="", kind=""):
    """A PIL picture at SIDE, inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85, subsampling=0)
    code = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure class="{kind}" style="{place}"><img src="data:image/jpeg;base64,{code}" width="{image.width}" height="{image.height}" alt="{esc(caption)}">'
            f"<figcaption>{esc(caption)}</figcaption></figure>")


def fit(image, how=Image.BICUBIC):
    return image.resize([max(1, round(n * SIDE / max(image.size))) for n in image.size], how)


def heat(image, cam):
    """A map (h, w) from its smallest to its largest value, in colour over the picture."""
    cam = np.float32(cam)
    return map_files.heat(image, (cam - cam.min()) / max(cam.max() - cam.min(), 1e-8))


def painted(image, mask):
    """A label map in VOC's colours over the picture, which is grey and light where the mask is background; 255 is dotted."""
    mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.NEAREST))
    grey = np.asarray(image.convert("L"))[..., None]
    shown = np.where(mask[..., None] == 0, 175 + 0.3 * grey, 0.15 * grey + 0.85 * mask_files.palette()[mask])
    y, x = np.indices(mask.shape)
    shown[mask == mask_files.IGNORE] = np.where(((y // 3 + x // 3) % 2)[..., None], 255, 90)[mask == mask_files.IGNORE]
    return Image.fromarray(np.uint8(shown.clip(0, 255)))


def chip(name, k):
    return f'<span class="chip"><i style="background:rgb{tuple(mask_files.palette()[k + 1].tolist())}"></i>{esc(name)}</span>'


def command(args, script, *flags, out=None):
    return " ".join(["python", script, "--data", shlex.quote(str(args.data)), "--out", shlex.quote(str(out or args.out)), *map(str, flags)])


def missing(what, how):
    return f'<p class="missing">No {esc(what)} here. <code>{esc(how)}</code></p>'


def section(name, title, note, *parts):
    return f'<section id="{name}"><h2>{title}</h2><p class="note">{note}</p>{"".join(parts)}</section>'


# ---------------------------------------------------------------- what is there

class Run:
    """What lies in one output folder. `name` is empty for --out."""

    def __init__(self, name, out, folder):
        classes = folder.classes
        self.name, self.out, self.recipes = name, out, {}
        for note in sorted(out.glob("*/recipe.json")):
            theirs, made = read_note(note, classes)
            if theirs != classes:
                raise ValueError(f"{note.parent} was made for other classes ({checkpoints.describe(theirs)}) than --data has ({checkpoints.describe(classes)}): give its own --data")
            self.recipes[note.parent.name] = made
        of = {folder: made["source"] for folder, made in self.recipes.items() if made.get("source") in SOURCES}
        self.maps = {folder: of[folder] for folder in sorted(of, key=lambda folder: (list(SOURCES).index(of[folder]), folder))}
        self.masks = [folder for folder, made in self.recipes.items() if "pseudo" in made]
        made = sorted(path for path in out.glob("pred/*") if path.is_dir())
        self.predictions = [path for path in made if (folder.root / "ImageSets/Segmentation" / f"{path.name}.txt").exists()]
        self.photos = [path for path in made if path not in self.predictions]           # somebody's own pictures: eval.py --images
        order = lambda found: (list(WHAT).index(found[1]["protocol"]["what"]), list(SOURCES).index(source(found[1]["protocol"])), len(found[0]), found[0])
        found = [(path.stem.removeprefix("eval_"), read_score(path)) for path in out.glob("eval_*.json")]
        self.scores = sorted((pair for pair in found if pair[1]), key=order)
        self.logs = [Log(out / f"{stage}.jsonl", stage) for stage in TRAINED if (out / f"{stage}.jsonl").exists()]

    def label(self, text):
        return f"{text} ({self.name})" if self.name else text


def read_note(path, classes):
    """recipe.json: the classes and arguments a folder was made with, of the types that a stage writes."""
    note = files.read_json(path)
    theirs, made = note.get("classes", classes), note.get("args", {})
    if not (isinstance(theirs, list) and all(isinstance(name, str) and name.isprintable() for name in theirs)) or not all(isinstance(made.get(name), (str, type(None))) for name in ("source", "clip")):
        raise ValueError(f"{path} is no recipe of ours, its classes or arguments are of other types: remove it and run its stage again")
    return theirs, made


def read_score(path):
    """eval_*.json as eval.py writes it; None if it has no protocol, and is somebody else's."""
    score = files.read_json(path)
    if "protocol" not in score:
        return None
    try:
        p, best = score["protocol"], score.get("oracle_best") or {"miou": 0, "threshold": 0}
        in_words(p), source(p), json.dumps(p, indent=1)                                 # all that the page says of it
        shares = [score["miou"], score["pixel_accuracy"], best["miou"], best["threshold"], *(v for v in score["iou"].values() if v is not None)]
        good = p["what"] in WHAT and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in shares)
    except Exception:                                                                   # in a foreign file any part may be of any type
        good = False
    if not good:
        raise ValueError(f"{path} is no score of eval.py's, its protocol or numbers are of other types: remove it and run eval.py again")
    return score


def source(protocol):
    """Whose maps were scored, or made into the masks that were: one of SOURCES; cls for those of another project."""
    made = protocol.get("made_by") or {}
    made = made.get("maps") if protocol["what"] == "pseudo" else made
    return made["source"] if made and made.get("source") in SOURCES else "cls"


class Log:
    """<stage>.jsonl: arguments and versions, then rows; the torn last line of a killed run is left out."""

    def __init__(self, path, stage):
        lines = logs.log_lines(path)
        try:
            head = json.loads(lines[0])
            self.args, self.versions = dict(head["args"]), dict(head["versions"])
        except (ValueError, IndexError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} does not begin with a line of arguments: remove it and run {TRAINED[stage]} again") from None
        self.stage, self.rows = stage, [json.loads(line) for line in lines[1:] if logs.whole(line)]

    def curves(self):
        """{name: [(step, value)]}, the loss first."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in ("step", "seconds", "epoch"))
        found = {name: [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), (int, float)) and np.isfinite(row[name])] for name in sorted(names, key=lambda n: n != "loss")}
        return {name: points for name, points in found.items() if points}


def choose(folder, ids, there, count):
    """`count` of the ids for which `there` holds: every class in turn gives its next picture, pictures without a class come last."""
    ids = [id for id in ids if there(id)]
    labels = folder.labels(ids)
    queues = [[ids[n] for n in holds.nonzero()[:, 0].tolist()] for holds in (*labels.T, labels.sum(1) == 0)]
    chosen = {}
    for turn in range(max(map(len, queues), default=0)):
        chosen.update(dict.fromkeys(queue[turn] for queue in queues[:-1] if turn < len(queue)))
    return list(chosen | dict.fromkeys(queues[-1]))[:count]


def pick(args, folder, runs):
    """{title: ids}: of --split those with maps or masks, and of each split with predictions."""
    if args.ids:
        for id in args.ids:
            folder.picture(folders.check_id(id, "--ids"))
        return {"chosen": args.ids}
    made = [run.out / name / "{}.npy" for run in runs for name in run.maps] + [run.out / name / "{}.png" for run in runs for name in run.masks]
    any_of = lambda paths: lambda id: not paths or any(Path(str(path).replace("{}", id)).exists() for path in paths)
    found = {args.split: choose(folder, folder.ids(args.split, args.limit), any_of(made), args.pictures)}
    for name in dict.fromkeys(path.name for run in runs for path in run.predictions):
        if name != args.split:
            found[name] = choose(folder, folder.ids(name), any_of([run.out / "pred" / name / "{}.png" for run in runs]), args.pictures)
    return {name: ids for name, ids in found.items() if ids}


# ---------------------------------------------------------------- pictures

def card(folder, runs, id):
    """One picture and all that was made of it, a row for each present class."""
    label = folder.labels([id])[0]
    image = fit(image_files.load_image(folder.picture(id)))
    tiles, column = [picture(image, "picture", "grid-area:1/1", "first")], 1
    for run in runs:
        for name, of in run.maps.items():
            path = run.out / name / f"{id}.npy"
            if path.exists():
                column += 1
                tiles += [picture(heat(image, cam), ", ".join([folder.classes[k]] * (label.sum() > 1) + [f"{run.label(name)}: {SOURCES[of]}"]), f"grid-area:{row}/{column}")
                          for row, (k, cam) in enumerate(zip(*map_files.load_cam(path, label)), 1)]
    masks = [(f"{run.label(name)}: mask", run.out / name / f"{id}.png") for run in runs for name in run.masks]
    masks += [(f"{run.label('seg')}: prediction", path / f"{id}.png") for run in runs for path in run.predictions]
    masks += [("truth", folder.mask_path(id))] if folder.has_mask(id) else []
    for caption, path in masks:
        if path.exists():
            column += 1
            tiles.append(picture(painted(image, mask_files.load_mask(path, len(folder.classes))), caption, f"grid-area:1/{column}"))
    chips = "".join(chip(folder.classes[k], k) for k in map_files.present(label)) or '<span class="chip">no class</span>'
    return f'<article style="--columns:{column}"><h3>{esc(id)} {chips}</h3><div class="row">{"".join(tiles)}</div></article>'


def pictures(args, folder, runs, chosen):
    parts = []
    for name, ids in chosen.items():
        parts.append(f'<h3 class="list">{esc(name)}</h3><div class="cards">{"".join(card(folder, runs, id) for id in ids)}</div>')
    for path in [path for run in runs for path in run.photos]:
        shown = sorted(path.glob("*.jpg"))[:args.pictures]                              # overlays
        if shown:
            tiles = "".join(picture(fit(image_files.load_image(jpg)), jpg.stem) for jpg in shown)
            parts.append(f'<h3 class="list">{esc(path.name)}</h3><div class="row flow">{tiles}</div>')
    shared = ("--split", args.split)
    parts += [missing(f"maps of {of} ({SOURCES[of]})", command(args, "make_cam.py", *shared, "--source", of, "--cam", f"cam_{of}", *clip, out=run.out))
              for run, of, clip in lacking(runs)]
    if not any(run.masks for run in runs):
        parts.append(missing("pseudo masks", command(args, "make_pseudo.py", *shared)))
    if not any(run.predictions or run.photos for run in runs):
        listed = (folder.root / "ImageSets/Segmentation/val.txt").exists()
        parts.append(missing("predictions", command(args, "eval.py", "--split", "val", "--what", "seg", "--save") if listed else
                             f"python eval.py --out {shlex.quote(str(args.out))} --what seg --images PHOTOGRAPHS"))
    if not any(folder.has_mask(id) for ids in chosen.values() for id in ids):
        parts.append(f'<p class="missing">No true masks of these pictures in <code>{esc(folder.root)}</code>.</p>')
    return section("pictures", "Pictures, side by side", "What each stage changes, by picture (SemPLeS Fig. 6): maps in the order of the stages, a row for each class "
                   "of the picture, then masks, predictions and the truth. Dark is a map's smallest value, bright its largest. Rows scroll sideways.", *parts)


def lacking(runs):
    """(run, source, flags) of the maps that are missing beside others of their kind, S's or CLIP's; all of them where there are none at all."""
    kinds, found = (("cls", "match", "refine"), ("text", "vision")), []
    for kind in kinds:
        there = [run for run in runs if set(kind) & set(run.maps.values())]
        run = there[0] if there else runs[-1 if "text" in kind else 0]
        clip = next((made["clip"] for made in run.recipes.values() if made.get("clip")), None)
        if there or not any(run.maps for run in runs):
            found += [(run, of, ["--clip", shlex.quote(clip)] if clip and "text" in kind else []) for of in kind if of not in run.maps.values()]
    return found


# ---------------------------------------------------------------- where prompts look

def find_clip(args, content, env):
    """The CLIP a checkpoint was trained with: from where it was then, else --clip; None if that is not it, or not given."""
    known = (content["args"].get("inputs") or {}).get("clip")                           # of a file; a name to download has none
    for name in dict.fromkeys(filter(None, [content["args"]["clip"], args.clip])):
        if known and Path(name).is_file() and files.fingerprint(name) != known:
            continue
        checkpoints.inputs(clip=name)                                                        # must be sound
        try:
            clip = clip_model.load_clip(name, env.device)
        except FileNotFoundError:
            if name == args.clip:
                raise
            continue
        if content.get("clip") in (None, clip.fingerprint()):
            return clip
    return None


@torch.no_grad()
def look(clip, folder, id, columns, kind, env):
    """Cosine of a picture's patches with columns (M, D) of unit length -> (M, h, w)"""
    image = folder.image(id)[None].to(env.device)
    x, _, grid = gradcam.last_inputs(clip, image, size=gradcam.within(image.shape[-2:], 640))
    return (columns @ gradcam.patch_features(clip, x, kind)[0].T).unflatten(1, grid).cpu().numpy()


@torch.no_grad()
def prompts(args, folder, runs, chosen, env):
    note = ("Cosine of CLIP's patches with a class's learned background prompt u_b, beside manual background texts and the class's own text (SemPLeS Fig. 5). "
            "A good prompt lights up what comes with the class, and not the class.")
    head = "prompts", "Where learned prompts look", note
    path = next((run.out / "prompts.pt" for run in runs if (run.out / "prompts.pt").exists()), None)
    if path is None:
        return section(*head, missing("prompts", command(args, "train_prompt.py", "--split", args.split)))
    content = checkpoints.load(path, "prompts", folder.classes)
    clip = find_clip(args, content, env)
    if clip is None or not hasattr(clip.model.visual, "transformer"):
        return section(*head, missing(f"vision transformer {content['args']['clip']}, with which {path} was trained,", command(args, "report.py", "--clip", "FILE")))
    model = clip_model.BackgroundPrompts(clip, len(folder.classes), content["model"]["vectors"].shape[1])
    checkpoints.load_weights(model, content["model"], path)
    u_b, template = model(), content["args"]["template"]
    texts = clip.encode_text(names.class_texts(folder.classes + folder.backgrounds, template))
    manual = texts[len(folder.classes):]
    near = (u_b @ manual.T).topk(min(3, len(manual)))                                   # values and backgrounds (C, 3)
    every = F.normalize(manual.mean(0, keepdim=True), dim=1)
    cards = []
    for id in next(iter(chosen.values()), []):
        image = fit(image_files.load_image(folder.picture(id)))
        for k in map_files.present(folder.labels([id])[0]):
            best = near.indices[k, 0].item()
            maps = look(clip, folder, id, torch.stack([u_b[k], manual[best], every[0], texts[k]]), args.features, env)
            captions = ["learned prompt", f"“{folder.backgrounds[best]}”: closest manual text", "all manual texts", f"“{folder.classes[k]}”: the class"]
            tiles = [picture(image, "picture", "grid-area:1/1", "first")] + [picture(heat(image, m), c, f"grid-area:1/{n}") for n, (m, c) in enumerate(zip(maps, captions), 2)]
            cards.append(f'<article class="small" style="--columns:5"><h3>{chip(folder.classes[k], k)} <small>{esc(id)}</small></h3><div class="row">{"".join(tiles)}</div></article>')
    own = (u_b * texts[:len(folder.classes)]).sum(1)
    rows = "".join(f"<tr><th>{chip(name, k)}</th>" + "".join(f"<td>{esc(folder.backgrounds[m])} <b>{v:.2f}</b></td>" for v, m in zip(near.values[k].tolist(), near.indices[k].tolist()))
                   + f"<td>{own[k]:.2f}</td></tr>" for k, name in enumerate(folder.classes))
    table = f'<h3 class="list">Manual texts closest to each prompt</h3><div class="scroll"><table><tr><th>class</th><th>closest</th><th>second</th><th>third</th><th>its own text</th></tr>{rows}</table></div>'
    return section(*head, f'<div class="cards">{"".join(cards)}</div>', table if len(manual) >= 3 else "")


# ---------------------------------------------------------------- regions

@torch.no_grad()
def region_features(content, path, folder, ids, clip, args, env):
    """VPL Eq. 12 of every (picture, present class) -> unit vectors (P, D), their classes (P,), prototypes W (C, D)"""
    model = segmenter.load_segmenter(path, lambda images: gradcam.block_outputs(clip, images)).to(env.device).train()        # in training it also gives V
    labels, rows, owners = folder.labels(ids), [], []
    for numbers, images in samples.by_size(folder, ids, args.batch_size, env, args.workers):
        _, coarse, v = model(images.to(env.device))
        b, k = labels[numbers].nonzero(as_tuple=True)
        rows.append(F.normalize(losses.region_embeddings(v, coarse.softmax(1)[:, 1:]).cpu()[b, k], dim=-1))
        owners.append(k)
    return torch.cat(rows), torch.cat(owners), model.prototypes[:len(folder.classes)].cpu()


def pca(points, others):
    """Both on the first two principal axes of points (n, D), and the share of their variance those hold."""
    mean = points.mean(0)
    _, s, axes = torch.linalg.svd(points - mean, full_matrices=False)
    axes = axes[:2].T * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign().T               # (D, 2); an axis has no sign of its own
    return (points - mean) @ axes, (others - mean) @ axes, (s[:2].square().sum() / s.square().sum().clamp(min=1e-12)).item()


def apart(points, owners):
    """Share of the variance that lies between the classes' means: 1 if every class is one point."""
    means = torch.stack([points[owners == k].mean(0) for k in owners])
    return ((means - points.mean(0)).square().sum() / (points - points.mean(0)).square().sum().clamp(min=1e-12)).item()


def scatter(points, owners, prototypes, folder):
    everything = torch.cat([points, prototypes])
    low, high = everything.amin(0), everything.amax(0)
    scale = (torch.tensor([310.0, 225.0]) / (high - low).clamp(min=1e-8)).min()        # the same on both axes
    place = lambda xy: ((xy - (low + high) / 2) * scale * torch.tensor([1.0, -1.0]) + torch.tensor([180.0, 132.0])).tolist()
    colour = lambda k: f"rgb{tuple(mask_files.palette()[k + 1].tolist())}"
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(k)}" fill-opacity=".6"><title>{esc(folder.classes[k])}</title></circle>'
                   for (x, y), k in zip(place(points), owners.tolist()))
    names = ""                                                              # on top of all points
    for k in owners.unique().tolist():
        (x, y), (px, py) = place(torch.stack([points[owners == k].mean(0), prototypes[k]]))
        dots += (f'<path d="M{px:.1f} {py - 6:.1f}l6 6l-6 6l-6 -6z" fill="#fff" stroke="{colour(k)}" stroke-width="2"><title>W of {esc(folder.classes[k])}</title></path>')
        names += (f'<text class="name" x="{min(max(x, 40), 320):.1f}" y="{y - 7:.1f}" text-anchor="middle">{esc(folder.classes[k])}</text>')
    return f'<svg viewBox="0 0 360 260" role="img" aria-label="regions on two principal axes">{dots}{names}</svg>'


def regions(args, folder, runs, env):
    head = ("regions", "Regions and prototypes", "The regions of each class in a picture (VPL Eq. 12) in the decoder's space, on the two principal axes of the points; diamonds are "
            "vision prototypes W (VPL Fig. 4, there by t-SNE). “Between classes” is the share of the whole variance that lies between the classes' means.")
    parts, panels, kinds = [], [], set()
    for run in runs:
        if (run.out / "prototypes.pt").exists():
            gap = checkpoints.load(run.out / "prototypes.pt", "prototypes", folder.classes)["gap"]
            parts.append(f"<p>{esc(run.out)}: the mean of the pixels' features is {gap['before']:.3f} from the mean of the texts Z, {gap['after']:.3f} from that of the vision prototypes W.</p>")
    ids = folder.ids(args.split, args.limit)
    ids = [id for id, label in zip(ids, folder.labels(ids)) if label.any()][:REGIONS]
    for out in dict.fromkeys([run.out for run in runs] + ([args.without_rsc] if args.without_rsc else [])):
        if out == args.without_rsc or (out / "seg.pt").exists():
            content = checkpoints.load(out / "seg.pt", "seg", folder.classes)
            if content["args"]["model"] != "clip_decoder":
                continue
            clip = find_clip(args, content, env)
            if clip is None:
                parts.append(missing(f"CLIP {content['args']['clip']}, with which {out / 'seg.pt'} was trained,", command(args, "report.py", "--clip", "FILE")))
                continue
            weight = content["args"]["lambda_rsc"]
            points, owners, W = region_features(content, out / "seg.pt", folder, ids, clip, args, env)
            if len(points) < 3:
                continue
            kinds.add(weight > 0)
            flat, diamonds, share = pca(points, W)
            title = f"with RSC, λ {weight:g}" if weight else "without RSC"
            panels.append(f'<figure class="panel"><figcaption><b>{title}</b> · {esc(out.name)}<br>{len(points)} regions, {100 * apart(points, owners):.0f} % of the variance '
                          f"between classes; axes hold {100 * share:.0f} %</figcaption>{scatter(flat, owners, diamonds, folder)}</figure>")
    if True not in kinds:
        parts.append(missing("clip_decoder with RSC", command(args, "train_seg.py", "--split", args.split, "--model", "clip_decoder", out=runs[-1].out)))
    if False not in kinds:
        parts.append(missing("clip_decoder without RSC", command(args, "train_seg.py", "--split", args.split, "--model", "clip_decoder", "--lambda-rsc", 0, out="OTHER")
                             + "; then report.py --without-rsc OTHER"))
    return section(*head, f'<div class="panels">{"".join(panels)}</div>', *parts)


# ---------------------------------------------------------------- numbers

def in_words(p):
    """A protocol as a line of text; the whole of it is in the page too."""
    made, words = p.get("made_by") or {}, [f"{p['split']} of {p['data']}", f"{p['pictures']} pictures{' (--limit)' if p.get('limit') else ''}"]
    words += [f"maps of {source(p)}"] if made and p["what"] in ("cam", "pseudo") else []
    tau = (made.get("args") or {}).get({"text": "tau_t", "vision": "tau_i"}.get(made.get("source")))
    words += [f"tau {tau:g}"] if tau and p["what"] == "cam" else []
    words += [f"background {p['background']} {p['value']:g}"] if "background" in p else []
    if p["what"] == "pseudo" and made:
        if "vote" in made:
            bare = f" ({made['without_segments']} pictures without)" if made["without_segments"] else ""
            words += [f"{made['segments']['source'] or made['segments']['folder']} segments, vote {made['vote']}{bare}"]
        if "pixels" in made and (made["crf"] or made["without_segments"]):
            words += [f"background {made['pixels']['background']} {made['pixels']['value']:g} for the CRF and pictures without segments"]
        words += [f"background {made['background']} {made['value']:g}", f"CRF {made['crf']}" if made["crf"] else "no CRF"]
    if p["what"] == "seg":
        words += [made.get("model", ""), f"scales {' '.join(map(str, p['scales']))}{', flips' if p['flip'] else ''}", f"CRF {p['crf']}" if p["crf"] else "no CRF"]
    return " · ".join(filter(None, [*words, "used the truth" if p.get("oracle") else ""]))


def scores(args, folder, runs):
    head = ("scores", "Scores", "mIoU from one confusion matrix over all pixels of the split, background counted. A number is worth what its protocol says: compare rows of one protocol.")
    found = [(run.label(name), score) for run in runs for name, score in run.scores]
    if not found:
        return section(*head, missing("scores", command(args, "eval.py", "--split", args.split, "--what", "cam")))
    rows = ""
    for name, score in found:
        p, best = score["protocol"], score.get("oracle_best")
        oracle = f"<br><small>{100 * best['miou']:.1f} at {best['threshold']:.2f}, chosen with the truth</small>" if best else ""
        rows += (f'<tr><th>{esc(name)} <small>{esc(WHAT[p["what"]])}</small><details><summary>{esc(in_words(p))}</summary><pre>{esc(json.dumps(p, indent=1))}</pre></details></th>'
                 f'<td class="bar" style="--share:{100 * score["miou"]:.1f}%"><b>{100 * score["miou"]:.1f}</b>{oracle}</td><td>{100 * score["pixel_accuracy"]:.1f}</td></tr>')
    classes = ["background", *folder.classes]
    cell = lambda v: "<td>–</td>" if v is None else f'<td style="background:rgba(46,125,180,{0.55 * v:.2f})">{100 * v:.1f}</td>'
    by_class = "".join(f"<tr><th>{chip(name, k)}</th>{''.join(cell(score['iou'].get(name)) for _, score in found)}</tr>" for k, name in enumerate(classes, -1))
    top = "".join(f"<th>{esc(name)}</th>" for name, _ in found)
    return section(*head, f'<table class="scores"><tr><th>what</th><th>mIoU</th><th>pixel accuracy</th></tr>{rows}</table>',
                   f'<h3 class="list">IoU by class</h3><div class="scroll"><table class="iou"><tr><th></th>{top}</tr>{by_class}</table></div>')


def chart(name, points, big):
    """A curve as inline SVG: its range on the left, its last value above."""
    width, height = (340, 124) if big else (170, 60)
    steps, values = zip(*points)
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    place = [(46 + (s - first) / max(last - first, 1) * (width - 52), 6 + (high - v) / max(high - low, 1e-12) * (height - 22)) for s, v in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    dot = f'<circle cx="{place[-1][0]:.1f}" cy="{place[-1][1]:.1f}" r="2.5"/>'
    return (f'<figure class="chart {"big" if big else ""}"><figcaption>{esc(name)} <b>{values[-1]:.4g}</b></figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(name)}">'
            f'<path d="M46 4V{height - 14}H{width - 4}"/><polyline points="{line}"/>{dot}<text x="42" y="12" text-anchor="end">{high:.3g}</text>'
            f'<text x="42" y="{height - 14}" text-anchor="end">{low:.3g}</text><text x="46" y="{height - 3}">{first}</text><text x="{width - 4}" y="{height - 3}" text-anchor="end">{last}</text></svg></figure>')


def curves(args, runs):
    parts, logs = [], [(run.label(log.stage), log) for run in runs for log in run.logs]
    for title, log in logs:
        found = log.curves()
        loss, rest = ("".join(chart(name, points, name == "loss") for name, points in found.items() if (name == "loss") == big) for big in (True, False))
        last = log.rows[-1] if log.rows else {"step": 0, "seconds": 0}
        parts.append(f'<article><h3>{esc(title)} <small>{TRAINED[log.stage]}, {last["step"]} steps, {last["seconds"] / 60:.1f} min</small></h3>'
                     f'<div class="charts">{loss}<div>{rest or "nothing logged yet"}</div></div></article>')
    there = {log.stage for _, log in logs}
    parts += [missing(f"log of {stage}", command(args, script, "--split", args.split)) for stage, script in TRAINED.items() if stage not in there]
    return section("curves", "Losses", "The loss of each stage, large, and what it was made of, by training step.", *parts)


def arguments(runs):
    """Arguments and versions of all that is there, as each stage wrote them down."""
    rows = lambda content: "".join(f"<tr><th>{esc(k)}</th><td>{esc(v if isinstance(v, str) else json.dumps(v))}</td></tr>" for k, v in content.items())
    box = lambda title, *tables: f'<details><summary>{esc(title)}</summary><div class="scroll">{"".join(f"<table>{rows(t)}</table>" for t in tables)}</div></details>'
    parts = [box(run.label(f"{TRAINED[log.stage]} → {log.stage}.jsonl"), log.args, log.versions) for run in runs for log in run.logs]
    parts += [box(run.label(f"{name}/"), recipe) for run in runs for name, recipe in run.recipes.items()]
    return section("arguments", "Arguments and versions", "As each stage wrote them down.", *parts, box("this page", logs.versions()))


# ---------------------------------------------------------------- the page

STYLE = """
:root{--tile:6.9rem;--ink:#1d2430;--soft:#5c6675;--line:#dfe3e8;--accent:#2e7db4}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:#f5f6f8;color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
header,section,footer{max-width:82rem;margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem)}
h1{font-size:1.6rem;line-height:1.25;margin:.4rem 0}h2{font-size:1.3rem;margin:1rem 0 .2rem}h3{font-size:1rem;margin:0 0 .5rem}h3.list{margin:1.2rem 0 .5rem}
small{font-weight:400;color:var(--soft);font-size:.8rem}.note{color:var(--soft);max-width:60rem;margin:.2rem 0 .9rem;font-size:.92rem}
nav{position:sticky;top:0;z-index:3;background:#fffffff2;border-block:1px solid var(--line);overflow-x:auto;white-space:nowrap}
nav div{max-width:82rem;margin:0 auto;padding:.55rem clamp(.75rem,3vw,2rem)}nav a{color:var(--accent);text-decoration:none;margin-right:1.2rem}
section{scroll-margin-top:2.6rem}
article{background:#fff;border:1px solid var(--line);border-radius:.6rem;padding:.8rem;margin:0;min-width:0}section>article{margin-bottom:.8rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}.cards article{max-width:100%}.small{--tile:6.6rem}article .chip:first-of-type{margin-left:.3rem}
.row{display:grid;grid-template-columns:repeat(var(--columns),var(--tile));gap:.5rem;overflow-x:auto;align-items:start}.row.flow{display:flex;flex-wrap:wrap}.row.flow figure{width:min(14rem,47%)}
figure{margin:0;min-width:0}img{display:block;width:100%;height:auto;border-radius:.3rem}figcaption{font-size:.72rem;line-height:1.25;color:var(--soft);margin-top:.25rem}
figure.first{position:sticky;left:0;z-index:1;background:#fff;box-shadow:.5rem 0 0 #fff}
.chip{display:inline-flex;align-items:center;gap:.35rem;margin-right:.5rem;font-weight:500}.chip i{width:.75rem;height:.75rem;border-radius:.2rem;flex:none}
table{border-collapse:collapse;background:#fff;font-size:.88rem}th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:500}td{font-variant-numeric:tabular-nums}.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem;background:#fff}.scroll table{min-width:100%;overflow-wrap:normal}
.scores{width:100%;border:1px solid var(--line)}.scores td{white-space:nowrap;width:8rem}.scores tr:first-child th{overflow-wrap:normal}.bar{background:linear-gradient(90deg,#cfe3f1 var(--share),#0000 0)}
.iou td{text-align:right}.iou th:first-child{position:sticky;left:0;background:#fff}
summary{cursor:pointer;color:var(--soft);font-weight:400;font-size:.8rem}section>details{background:#fff;border:1px solid var(--line);border-radius:.4rem;padding:.4rem .7rem;margin:.3rem 0}
section>details>summary{color:var(--ink);font-size:.9rem}pre{font-size:.75rem;font-weight:400;white-space:pre-wrap;max-height:24rem;overflow:auto}
.missing{font-size:.85rem;color:var(--soft);margin:.5rem 0;padding-left:.7rem;border-left:3px solid #e2b64c}code{font-size:.85em;background:#eceff3;padding:.1em .3em;border-radius:.25rem;color:var(--ink)}
.panels{display:flex;flex-wrap:wrap;gap:.8rem}.panel{flex:1 1 24rem;max-width:38rem;background:#fff;border:1px solid var(--line);border-radius:.6rem;padding:.8rem}
.panel figcaption{font-size:.85rem;margin:0 0 .4rem}svg{display:block;width:100%;height:auto}svg text{font-size:9px;fill:var(--soft)}
svg .name{font-size:11px;font-weight:600;fill:var(--ink);paint-order:stroke;stroke:#fff;stroke-width:3px}
.charts{display:grid;grid-template-columns:21rem minmax(0,1fr);gap:.6rem 1.5rem}.charts>div{display:flex;flex-wrap:wrap;gap:.6rem 1rem;align-content:flex-start}
.chart{width:10.6rem;max-width:47%}.chart.big{width:21rem;max-width:100%}.chart figcaption{font-size:.8rem;margin:0 0 .2rem}
.chart path{fill:none;stroke:var(--line)}.chart polyline{fill:none;stroke:#8a94a3;stroke-width:1.5;stroke-linejoin:round}.chart circle{fill:#8a94a3}
.chart.big polyline{stroke:var(--accent);stroke-width:2}.chart.big circle{fill:var(--accent)}.chart figcaption b{color:var(--ink)}
@media(max-width:40rem){:root,.small{--tile:6.2rem}body{font-size:15px}.charts{grid-template-columns:minmax(0,1fr)}.scores td{width:4rem}th,td{padding:.3rem .4rem}}
"""


def page(args, folder, ids, sections):
    titles = {"scores": "Scores", "pictures": "Pictures", "prompts": "Prompts", "regions": "Regions", "curves": "Losses", "arguments": "Arguments"}
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in titles.items())
    facts = f"{esc(args.data)}: {len(folder.classes)} classes, {len(ids)} pictures in {esc(args.split)}"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{esc(args.out)}</title>'
            f'<style>{STYLE}</style></head>\n<body><header><small>SemPLeS and VPL: segmentation from image labels</small><h1>{esc(args.out)}</h1><p class="note">{facts}</p></header><nav><div>{links}</div></nav>\n'
            + "\n".join(sections) + "\n</body></html>\n")


def main():
    args = parse()
    folder = folders.Folder(args.data)
    for out in filter(None, [args.out, args.vpl, args.without_rsc]):
        if not out.is_dir():
            raise FileNotFoundError(f"{out} is missing: a report is of a folder that stages have written to")
    env = processes.Env(args)
    if not env.main:                                                           # a page is one process's work
        return env.close()
    path = args.out / "report.html"
    guard.claim(path)
    second = args.vpl or args.out / "vpl"
    runs = [Run("", args.out, folder)] + ([Run(second.name, second, folder)] if second.is_dir() else [])
    chosen = pick(args, folder, runs)
    sections = [scores(args, folder, runs), pictures(args, folder, runs, chosen), prompts(args, folder, runs, chosen, env), regions(args, folder, runs, env),
                curves(args, runs), arguments(runs)]
    with files.atomic(path) as beside:
        beside.write_text(page(args, folder, folder.ids(args.split, args.limit), sections), encoding="utf-8", errors="xmlcharrefreplace")      # JSON may hold half a character
    env.close(f"{path}: {path.stat().st_size / 2**20:.1f} MB, open it in a browser")


if __name__ == "__main__":
    guard.run(main)
