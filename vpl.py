"""VPL phase 1, vision prototypes: what each class looks like in CLIP's own image space, learned from what its text marks.

Paper   VPL "Learning Vision Prototypes from Text Supervision", Eq. 3-11, Alg. 1
Reads   pictures and image labels of --data, CLIP (a ViT)
Writes  <out>/prototypes.pt, <out>/prototypes.last.pt (to resume), <out>/prototypes.jsonl
        <out>/features/<id>.npy: float16 (n, D + 1), unit features x of the picture's marked pixels, then their class (C: background);
        read again by a run that was interrupted, and not needed after it

1. The texts Z mark pixels: GradCAM of every present class against the other present classes and all backgrounds (CLIP-ES), refined by
   attention. A pixel is its strongest class's where that map is at least --phi, else the background's where 1 - map is.
2. P' = softmax(x . Z / tau_T) over the picture's own classes and the backgrounds, x the pixel's feature in CLIP's joint space.
3. W starts at Z and minimises the mean of KL(P' || P), P = softmax(x . W / tau_I) over all columns, by projected gradient descent.
The gap is the distance between the mean of x and the mean of the prototypes, of Z before and of W after.

--prompt single is "a photo of a {}.". --prompt ensemble is CLIP-ES's "a clean origami {}." with the synonyms written into the class name.
Maps by W are those of the texts with W for Z and tau_I for tau_T; a larger tau alone changes the texts' maps too, so compare at the same one.

    python vpl.py --data /data/VOC2012 --out runs/voc
    torchrun --nproc_per_node 4 vpl.py --data /data/COCO --out runs/coco --split train --box 0.7
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import checkpoints, files, flags, folders, guard, log as logs, processes, samples
from wsss import clip_model, gradcam, losses, texts as names


def parse():
    p = flags.parser(__doc__, batch_size=16)
    flags.localising(p)
    p.add_argument("--tau-i", type=flags.above_zero, default=0.03, help="temperature of the softmax over vision prototypes (Table 5); larger than --tau-t")
    p.add_argument("--phi", type=float, default=0.4, help="least map value of a marked pixel (Table 6); up to 0.5 it matters only with --no-background-pixels: each pixel is marked as one or the other")
    p.add_argument("--background-pixels", action=argparse.BooleanOptionalAction, default=True,
                   help="mark background pixels too; --no-background-pixels: only the seeds of classes")
    p.add_argument("--features", choices=["patch", "value"], default="patch",
                   help="x: a patch's output, or its own value in the last block as MaskCLIP reads CLIP")
    p.add_argument("--pool", choices=["pixel", "region"], default="pixel", help="x of every marked pixel, or their mean over each class of a picture")
    p.add_argument("--target", choices=["soft", "hard"], default="soft",
                   help="P' by the texts (Eq. 7), or by the maps (Eq. 3): 1 for the marked class; background pixels share theirs among the backgrounds")
    p.add_argument("--label-mask", action=argparse.BooleanOptionalAction, default=True, help="leave the classes that a picture does not hold out of its P'")
    p.add_argument("--learn-background", action=argparse.BooleanOptionalAction, default=True,
                   help="learn the backgrounds' prototypes too; --no-learn-background leaves them at their texts and drops background pixels")
    # Differs from the paper: it sets no bound. VOC's train_aug has about 7 million patches of 16 pixels, COCO's train about 90.
    p.add_argument("--max-pixels", type=flags.natural, default=4_000_000,
                   help="bound on marked pixels, 2 D bytes each and 4 for every column of P': every picture keeps at most its share, drawn by chance; 0: all")
    p.add_argument("--steps", type=flags.positive, default=3000, help="steps of gradient descent over all pixels (T_w, Table 7)")
    p.add_argument("--lr", type=flags.above_zero, default=10.0, help="first rate; it halves whenever the norm of the gradient grows")
    p.add_argument("--log-every", type=flags.positive, default=50, help="steps between two lines of the log")
    p.add_argument("--save-every", type=flags.positive, default=500, help="steps between two states to resume from")
    args = p.parse_args()
    if not 0 < args.phi <= 1:
        p.error("--phi: maps go from 0 to 1, so it is above 0 and at most 1")
    return args


DESCENT = ("tau_i", "target", "label_mask", "steps", "lr", "batch_size")     # what <out>/features does not depend on


def stored(args, id):
    return args.out / "features" / f"{id}.npy"


# ---------------------------------------------------------------- what the texts mark

def mark(clip, x, attention, grid, labels, texts, args):
    """The class of every patch by the texts' maps, (B, N): 0..C-1, C for the background, -1 for neither."""
    b, k = labels.nonzero(as_tuple=True)                                                # (P,) picture and class of every map
    maps = gradcam.class_maps(clip, x, attention, grid, texts, labels.shape[1], b, k, 1 / args.tau_t, args.box if args.affinity else None)
    scores = maps.new_zeros(*labels.shape, *grid)                                       # (B, C, h, w); 0 where a class is absent
    scores[b, k] = maps
    best, marked = scores.flatten(2).max(1)                                             # (B, N) each
    background = (1 - best >= args.phi) & (args.learn_background and args.background_pixels)
    return torch.where(best >= args.phi, marked, torch.where(background, labels.shape[1], -1))


def choose(x, marked, number, quota, args):
    """Of one picture: its patches' features (N, D) and classes (N,) -> what is stored, (n, D + 1)."""
    kept = marked >= 0
    x, marked = x[kept], marked[kept]
    if args.pool == "region":
        kinds = marked.unique()
        x, marked = F.normalize((kinds[:, None] == marked).to(x) @ x, dim=1), kinds     # the mean of each class's pixels, of unit length
    if len(x) > quota:
        generator = torch.Generator().manual_seed(hash((args.seed, number)) & 0x7FFFFFFFFFFFFFFF)
        drawn = torch.randperm(len(x), generator=generator)[:quota].sort()[0].to(x.device)
        x, marked = x[drawn], marked[drawn]
    return torch.cat([x, marked[:, None]], 1)


@torch.no_grad()
def collect(clip, texts, folder, ids, labels, args, env):
    """Writes the features of this process's pictures that are not there yet."""
    mine = [n for n in env.shard(range(len(ids))) if not stored(args, ids[n]).exists()]
    quota = args.max_pixels // len(ids) if args.max_pixels else float("inf")
    for batch, images in env.progress(samples.by_size(folder, [ids[n] for n in mine], args.batch_size, env, args.workers), "features"):
        numbers = [mine[i] for i in batch]
        look = lambda: gradcam.last_inputs(clip, images.to(env.device, non_blocking=True), size=gradcam.within(images.shape[-2:], args.max_side))
        with env.autocast():
            seen = gradcam.stored_inputs(args.out / "cache", [ids[n] for n in numbers], look, checkpoints.sound) if args.cache else look()
        x, attention, grid = (part.to(env.device) if torch.is_tensor(part) else part for part in seen)
        marked = mark(clip, x, attention, grid, labels[numbers].to(env.device), texts, args)
        for n, features, classes in zip(numbers, gradcam.patch_features(clip, x, args.features), marked):
            if not features.isfinite().all():
                raise ValueError(f"CLIP's features of {ids[n]} are not finite: look at the picture, take --amp bf16 or off, or another --clip")
            with files.atomic(stored(args, ids[n])) as beside, open(beside, "wb") as file:
                np.save(file, choose(features, classes, n, quota, args).half().cpu().numpy(), allow_pickle=False)


# ---------------------------------------------------------------- what W learns from

def text_targets(x, marked, label, texts, args):
    """P' of one picture's pixels (n, M); `label` (C,) says which classes it holds."""
    C, M = len(label), len(texts)
    owner = torch.arange(M, device=x.device).clamp(max=C)                               # (M,) the class a column stands for; C: background
    if args.target == "hard":
        allowed = marked[:, None] == owner                                              # one class, or every background
    elif args.label_mask:
        allowed = F.pad(label, (0, M - C), value=1).bool().expand(len(x), -1)
    else:
        allowed = None
    return losses.assignment(x, texts, args.tau_t, allowed)


def read_features(texts, ids, labels, args, env):
    """This process's share of <out>/features: x (n, D) float16, P' (n, M), pixels of every class and of the background (C + 1,)."""
    x, p_text, marked = [texts[:0].half()], [texts.new_zeros(0, len(texts))], [torch.zeros(0, dtype=torch.long, device=texts.device)]
    for n in env.shard(range(len(ids))):
        path = stored(args, ids[n])
        try:
            rows = torch.from_numpy(files.read_npy(path)).to(texts.device)
            if rows.dtype != torch.half or rows.shape[1:] != (texts.shape[1] + 1,) or not rows.isfinite().all() or not ((rows[:, -1] >= 0) & (rows[:, -1] <= labels.shape[1])).all():
                raise ValueError("no features and classes")
        except Exception as error:                                                      # numpy raises whatever a foreign file's bytes provoke
            raise ValueError(f"{path} is not a plain .npy array ({files.why(error)}): remove it and run vpl.py again") from None
        x.append(rows[:, :-1]), marked.append(rows[:, -1].long())
        p_text.append(text_targets(x[-1], marked[-1], labels[n].to(texts.device), texts, args))
    return torch.cat(x), torch.cat(p_text), torch.bincount(torch.cat(marked), minlength=labels.shape[1] + 1)


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "prototypes.pt", args.out / "prototypes.last.pt"
    args.inputs = checkpoints.inputs(clip=args.clip)
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels, classes = folder.labels(ids), folder.classes
    if 0 < args.max_pixels < len(ids):
        raise ValueError(f"--max-pixels {args.max_pixels}: less than one for each of {len(ids)} pictures; 0 sets no bound")

    clip = env.in_turn(lambda: clip_model.load_clip(args.clip, env.device, vit=True))
    texts = clip.encode_text(names.prompt_texts(folder, args.prompt, args.template))     # Z (M, D): classes, then backgrounds

    if args.cache:
        checkpoints.open_folder(args.out / "cache", argparse.Namespace(resume=args.resume, amp=args.amp, max_side=args.max_side), env, (), keep=True, clip=clip.fingerprint())
    checkpoints.open_folder(args.out / "features", args, env, DESCENT, keep=True, classes=classes, backgrounds=folder.backgrounds)
    collect(clip, texts, folder, ids, labels, args, env)
    env.barrier()
    x, p_text, pixels = read_features(texts, ids, labels, args, env)
    pixels = env.sum(pixels).tolist()
    n = sum(pixels)
    if sum(pixels[:-1]) == 0:
        raise ValueError(f"no pixel of {len(ids)} pictures is marked as any class: do the labels of {args.data} name classes, "
                         f"is --phi {args.phi} too high?")
    mean = env.sum(x.sum(0, dtype=torch.float64)) / n                                   # (D,)
    gap = lambda W: (mean - W[:len(W) if args.learn_background else len(classes)].double().mean(0)).norm().item()

    W, lr, norm, begin = texts.double(), args.lr, torch.inf, 0
    if not args.resume:
        out.unlink(missing_ok=True), last.unlink(missing_ok=True)
    if last.exists():
        state = checkpoints.load(last, "descent", classes, env.device)
        checkpoints.same_recipe(last, state["args"], args)
        W, lr, norm, begin = (state[name] for name in ("W", "lr", "norm", "step"))
    log = logs.Log(args.out / "prototypes.jsonl", args, env, begin)

    for step in env.progress(range(begin + 1, args.steps + 1), "prototypes", args.steps, begin):
        gradient, loss = losses.prototype_gradient(x, W, p_text, args.tau_i)            # Eq. 7, 10: sums over this process's pixels
        gradient, loss = env.sum(gradient) / n, env.sum(loss) / n
        if not args.learn_background:
            gradient[len(classes):] = 0
        before = W
        W, lr, norm = losses.prototype_step(before, gradient, lr, norm)                 # Eq. 11
        shown, stopping = step == 1 or step % args.log_every == 0 or step == args.steps, env.stopping()
        if (shown or stopping or step % args.save_every == 0) and not ((W.norm(dim=1) - 1).abs() < 1e-3).all():       # NaN is not; a rate that overflows leaves 0
            raise ValueError(f"after step {step} the prototypes are not of unit length: a smaller --lr than {args.lr:g}; the last saved state is from before")
        if shown:
            log(step, loss=loss, norm=norm, lr=lr, gap=gap(before))
        if env.main and (stopping or step % args.save_every == 0):
            checkpoints.save(last, stage="descent", W=W, lr=lr, norm=norm, step=step, classes=classes, args=flags.plain(args))
        guard.leave(last, step)

    gaps = {"before": gap(texts), "after": gap(W)}
    unseen = [name for name, count in zip(classes, pixels) if count == 0]
    if env.main:
        checkpoints.save(out, stage="prototypes", model={"prototypes": W.float().cpu(), "text": texts.cpu()}, classes=classes,
                    backgrounds=folder.backgrounds, clip=clip.fingerprint(), gap=gaps, pixels=pixels, tau_t=args.tau_t, tau_i=args.tau_i, args=flags.plain(args))
        print(f"{n} {args.pool}s: {', '.join(f'{name} {count}' for name, count in zip([*classes, 'background'], pixels))}")
        if unseen:
            print(f"no {args.pool} is marked as {', '.join(unseen)}: these prototypes are only what the pixels of others make of them")
    env.close(f"{out} is finished: gap {gaps['before']:.3f} with texts, {gaps['after']:.3f} with vision prototypes")


if __name__ == "__main__":
    guard.run(main)
