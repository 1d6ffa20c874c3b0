"""VPL phase 1, vision prototypes: what each class looks like in CLIP's image space, learned from its text.

Paper   VPL "Learning Vision Prototypes from Text Supervision", Eq. 3-11, Alg. 1
Reads   images and image labels of --data, CLIP (a ViT)
Writes  <out>/prototypes.pt, <out>/prototypes.last.pt (to resume), <out>/prototypes.jsonl
        <out>/features/<id>.npy: float16 (n, D + 1), unit features x of the marked pixels, then their class
        (C: background); read again by a run that was interrupted, and not needed after it

1. The texts Z mark pixels: refined GradCAM maps (CLIP-ES) of every present class against the other present
   classes and all backgrounds. A pixel belongs to its strongest class where that map is at least --phi, else
   to the background if 1 - map is at least --phi, else to neither. A pixel is a patch of CLIP.
2. P' = softmax(x . Z / tau_T) over all columns, rows whose maximum exceeds --harden made one-hot; x: the
   pixel's value in the last block, taken to CLIP's joint space.
   So by default, with --phi up to .5, every pixel is marked, and P' does not depend on its mark: neither maps
   nor image labels reach W. They do with a higher --phi, --no-background-pixels, --no-learn-background,
   --label-mask, --target hard or --pool region.
3. W starts at Z and minimises the mean of KL(P' || P), P = softmax(x . W / tau_I) over all columns, by
   projected gradient descent. The log's loss is the mean of -sum P' log P, larger by the entropy of P'.

The gap is the distance between the mean of x and the mean of the prototypes, of Z before and of W after.
Maps by W are those of the texts with W for Z and tau_I for tau_T: make_cam.py --source vision.

    python vpl.py --data /data/VOC2012 --out runs/voc
    torchrun --nproc_per_node 4 vpl.py --data /data/COCO --out runs/coco --split train --box 0.7
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import checkpoints, files, flags, folders, guard, log, networks, processes, samples
from wsss import gradcam, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=16)
    g = p.add_argument_group("what the texts mark (CLIP-ES)")
    flags.clip(g, "ViT-B/16")
    g.add_argument("--prompt", choices=list(texts.PROMPTS), default="ensemble",
                   help="texts of classes and backgrounds (Table 4): 'a photo of a {}.'; CLIP-ES's 'a clean "
                        "origami {}.' with synonyms; or the mean over seven templates")
    g.add_argument("--tau-t", type=flags.above_zero,
                   help="temperature of texts (default: CLIP's own, 1 / its logit scale: .01 for OpenAI's)")
    g.add_argument("--affinity", action=argparse.BooleanOptionalAction, default=True,
                   help="refine the maps by attention (CLIP-ES's CAA)")
    g.add_argument("--box", type=flags.share, default=0.4,
                   help="refined inside boxes around what is above this share of a map's maximum (COCO: 0.7)")
    flags.max_side(g)
    g.add_argument("--phi", type=flags.fraction, default=0.4,
                   help="least map value of a marked pixel (Table 6); up to .5 all, with background")
    g.add_argument("--background-pixels", action=argparse.BooleanOptionalAction, default=True,
                   help="mark background pixels too; --no-background-pixels: only the seeds of classes")
    # Not in the paper: a bound. VOC's train_aug has about 7 million pixels (patches of CLIP).
    g.add_argument("--max-pixels", type=flags.natural, default=4_000_000,
                   help="bound on marked pixels: each image keeps at most its share, drawn by chance; 0: all")
    g = p.add_argument_group("what W learns (VPL)")
    # Differs from the paper: a patch's output is what GradCAM reads; values say better what lies at a patch.
    g.add_argument("--features", choices=["patch", "value"], default="value",
                   help="x: a patch's output, or its own value in the last block as MaskCLIP reads CLIP")
    g.add_argument("--pool", choices=["pixel", "region"], default="pixel",
                   help="x of every marked pixel, or their mean over each class of an image")
    g.add_argument("--target", choices=["soft", "hard"], default="soft",
                   help="P' by the texts (Eq. 7), or by the maps (Eq. 3): 1 for the marked class")
    g.add_argument("--harden", type=flags.share, default=0.6,
                   help="rows of P' whose maximum exceeds this become one-hot, as in InMaP; 0: none")
    g.add_argument("--label-mask", action=argparse.BooleanOptionalAction, default=False,
                   help="leave the classes that an image does not hold out of its P'")
    g.add_argument("--learn-background", action=argparse.BooleanOptionalAction, default=True,
                   help="learn the backgrounds' prototypes too; else they stay texts and mark no pixels")
    g.add_argument("--tau-i", type=flags.above_zero, default=0.03,
                   help="temperature of the prototypes (Table 5)")
    g.add_argument("--steps", type=flags.positive, default=3000, help="steps over all pixels (T_w, Table 7)")
    g.add_argument("--modify-gap", action="store_true",
                   help="a row of Table 4: no learning, the texts are shifted by the gap between the means")
    g.add_argument("--lr", type=flags.above_zero, default=10.0,
                   help="first rate; it halves whenever the norm of the gradient grows")
    flags.training(p, log_every=50)
    return p.parse_args()


NOT_OF_FEATURES = ("tau_i", "target", "harden", "label_mask", "steps", "lr", "modify_gap", "batch_size")


# ---------------------------------------------------------------- what the texts mark

def mark(clip, x, attention, grid, labels, Z, tau, args):
    """The class of every patch by the texts' maps, (B, N): 0..C-1, C for the background, -1 for neither."""
    b, k = labels.nonzero(as_tuple=True)                                              # (P,) image and class
    box = args.box if args.affinity else None
    maps = gradcam.class_maps(clip, x, attention, grid, Z, labels.shape[1], b, k, 1 / tau, box)
    scores = maps.new_zeros(*labels.shape, *grid)                                     # (B, C, h, w)
    scores[b, k] = maps
    best, marked = scores.flatten(2).max(1)                                           # (B, N) each
    background = (1 - best >= args.phi) & (args.learn_background and args.background_pixels)
    return torch.where(best >= args.phi, marked, torch.where(background, labels.shape[1], -1))


def choose_pixels(x, marked, number, quota, args):
    """Of one image: its patches' features (N, D) and classes (N,) -> what is stored, (n, D + 1)."""
    kept = marked >= 0
    x, marked = x[kept], marked[kept]
    if args.pool == "region":
        kinds = marked.unique()
        x = F.normalize((kinds[:, None] == marked).to(x) @ x, dim=1)  # the mean of each class's
        marked = kinds
    if len(x) > quota:
        draw = torch.Generator().manual_seed(hash((args.seed, number)) & 0x7FFFFFFFFFFFFFFF)
        drawn = torch.randperm(len(x), generator=draw)[:quota].sort()[0].to(x.device)
        x, marked = x[drawn], marked[drawn]
    return torch.cat([x, marked[:, None]], 1)


@torch.no_grad()
def collect_features(clip, Z, tau, folder, ids, labels, args, run):
    """Writes the features of this process's images that are not there yet."""
    where = args.out / "features"
    mine = [n for n in run.shard(range(len(ids))) if not (where / f"{ids[n]}.npy").exists()]
    quota = args.max_pixels // len(ids) if args.max_pixels else float("inf")
    todo = [ids[n] for n in mine]
    loader = samples.by_size(folder, todo, args.batch_size, run, args.workers, args.max_side)
    for batch, images in run.progress(loader, "features"):
        numbers = [mine[i] for i in batch]
        images = images.to(run.device, non_blocking=True)
        with run.autocast():
            x, attention, grid = gradcam.last_inputs(clip, images)
        marked = mark(clip, x, attention, grid, labels[numbers].to(run.device), Z, tau, args)
        for n, features, classes in zip(numbers, gradcam.patch_features(clip, x, args.features), marked):
            if not features.isfinite().all():
                raise ValueError(f"CLIP's features of {ids[n]} are not finite: look at the image, take --amp "
                                 "bf16 or off, or another --clip")
            stored = choose_pixels(features, classes, n, quota, args).half().cpu().numpy()
            with files.atomic(where / f"{ids[n]}.npy") as beside, open(beside, "wb") as file:
                np.save(file, stored, allow_pickle=False)


# ---------------------------------------------------------------- what W learns from

def text_targets(x, marked, label, Z, tau, args):
    """P' of one image's pixels (n, M); `label` (C,) says which classes it holds."""
    C, M = len(label), len(Z)
    owner = torch.arange(M, device=x.device).clamp(max=C)                             # (M,) a column's class
    allowed = None
    if args.target == "hard":
        allowed = marked[:, None] == owner                    # one class, or every background
    elif args.label_mask:
        allowed = F.pad(label, (0, M - C), value=1).bool().expand(len(x), -1)
    p_text = losses.assignment(x, Z, tau, allowed)                                    # Eq. 5
    return losses.harden(p_text, args.harden) if args.harden else p_text


def read_features(Z, tau, ids, labels, args, run):
    """This process's share of <out>/features: x (n, D) float16, P' (n, M), pixels of every class (C + 1,)."""
    x, p_text = [Z[:0].half()], [Z.new_zeros(0, len(Z))]
    marked = [torch.zeros(0, dtype=torch.long, device=Z.device)]
    for n in run.shard(range(len(ids))):
        path = args.out / "features" / f"{ids[n]}.npy"
        try:
            rows = torch.from_numpy(files.read_npy(path)).to(Z.device)
            if rows.dtype != torch.half or rows.shape[1:] != (Z.shape[1] + 1,) or not rows.isfinite().all():
                raise ValueError("it holds no features and classes")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a plain .npy array ({files.first_line(error)}): "
                             "remove it and run vpl.py again") from None
        x.append(rows[:, :-1])
        marked.append(rows[:, -1].long())
        p_text.append(text_targets(x[-1], marked[-1], labels[n].to(Z.device), Z, tau, args))
    return torch.cat(x), torch.cat(p_text), torch.bincount(torch.cat(marked), minlength=labels.shape[1] + 1)


def main():
    args = parse()
    run = processes.Run(args)
    keeper = checkpoints.Keeper(run, args, "prototypes.pt", clip=args.clip)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    labels, classes = folder.labels(ids), folder.classes
    backgrounds = folder.backgrounds or texts.backgrounds(classes)
    if 0 < args.max_pixels < len(ids):
        raise ValueError(f"--max-pixels {args.max_pixels}: less than one for each of {len(ids)} images; 0: "
                         "no bound")

    clip = networks.load_clip(args.clip, run, vit=True, gelu=args.clip_gelu)
    prompts = texts.prompt_texts(classes, backgrounds, args.prompt)
    Z = clip.encode_ensemble(prompts)                         # (M, D): classes, backgrounds
    tau_t = args.tau_t or clip.tau
    checkpoints.open_folder(args.out / "features", args, run, NOT_OF_FEATURES, keep=True, classes=classes,
                            backgrounds=backgrounds)
    keeper.drop_old()
    collect_features(clip, Z, tau_t, folder, ids, labels, args, run)
    run.barrier()
    x, p_text, pixels = read_features(Z, tau_t, ids, labels, args, run)  # (n, D), (n, M) of this process
    pixels = run.sum(pixels).tolist()
    n = sum(pixels)
    if sum(pixels[:-1]) == 0:
        raise ValueError(f"no pixel of {len(ids)} images is marked as any class: do the labels of "
                         f"{args.data} name classes, is --phi {args.phi} too high?")
    mean = run.sum(x.sum(0, dtype=torch.float64)) / n                                 # (D,)

    def gap(W):
        learned = W if args.learn_background else W[:len(classes)]
        return (mean - learned.double().mean(0)).norm().item()

    W, lr, norm, begin = Z.double(), args.lr, torch.inf, 0
    if args.modify_gap:                                                               # Liang et al. 2022
        W, begin = F.normalize(W + mean - W.mean(0), dim=1), args.steps
    if keeper.last.exists() and not args.modify_gap:
        state = checkpoints.load(keeper.last, "descent", classes, run.device)
        checkpoints.same_recipe(keeper.last, state["args"], args)
        W, lr, norm, begin = (state[name] for name in ("W", "lr", "norm", "step"))
    write_row = log.Log(args.out / "prototypes.jsonl", args, run, begin, texts=prompts)

    for step in run.progress(range(begin + 1, args.steps + 1), "prototypes", args.steps, begin):
        gradient, loss = losses.prototype_gradient(x, W, p_text, args.tau_i)  # Eq. 7, 10: sums over pixels
        gradient, loss = run.sum(gradient) / n, run.sum(loss) / n
        if not args.learn_background:
            gradient[len(classes):] = 0
        before = W
        W, lr, norm = losses.prototype_step(before, gradient, lr, norm)               # Eq. 11

        shown = step in (1, args.steps) or step % args.log_every == 0
        stopping = run.stopping()
        save_now = stopping or step % args.save_every == 0
        if (shown or save_now) and not ((W.norm(dim=1) - 1).abs() < 1e-3).all():      # NaN, or an overflow
            raise ValueError(f"after step {step} the prototypes are not of unit length: take a smaller --lr "
                             f"than {args.lr:g}; the last saved state is from before")
        if shown:
            write_row(step, loss=loss, norm=norm, lr=lr, gap=gap(before))
        if run.main and save_now:
            checkpoints.save(keeper.last, stage="descent", W=W, lr=lr, norm=norm, step=step, classes=classes,
                             args=flags.plain(args))
        guard.leave(keeper.last, step)

    gaps = {"before": gap(Z), "after": gap(W)}
    if run.main:
        counts = zip([*classes, "background"], pixels)
        print(f"{n} {args.pool}s: {', '.join(f'{name} {count}' for name, count in counts)}")
        unseen = [name for name, count in zip(classes, pixels) if count == 0]
        if unseen:
            print(f"no {args.pool} was assigned to {', '.join(unseen)}: trained only as negatives")
        print(f"gap {gaps['before']:.3f} with texts, {gaps['after']:.3f} with vision prototypes")
    keeper.finish(model={"prototypes": W.float().cpu(), "text": Z.cpu()}, classes=classes,
                  backgrounds=list(backgrounds), clip=clip.fingerprint(), gap=gaps, pixels=pixels,
                  tau_t=tau_t, tau_i=args.tau_i)


if __name__ == "__main__":
    guard.run(main)
