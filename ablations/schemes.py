"""The other learning schemes of SemPLeS (arXiv, Table 6): joint training, alternate rounds of (b) and (c).

Paper   SemPLeS 3.2, Eq. 1 to 3; Table 6 of the arXiv version
Reads   images and image labels of --data, CLIP, <out>/cls.pt (train_cls.py) or --init for S;
        alternate: <out>/prompts.pt (train_prompt.py)
Writes  <out>/refine.pt, <out>/refine.last.pt (to resume), <out>/refine.jsonl, as train_refine.py does

joint        S and fresh prompts train at once, by L_match + lambda L_refine + L_prompt, for --epochs epochs.
             The prompts are detached in L_refine, S is detached in L_prompt.
alternate    (c) as train_refine.py; then (b) with the new S and (c) with the new prompts, until there are
             --rounds rounds of (c). Each has --epochs epochs. One round is train_refine.py.

    python -m ablations.schemes --data data/toy --out runs/joint --scheme joint --init runs/toy/cls.pt \
        --split train --clip data/toy/clip.pt
    python -m ablations.schemes --data /data/VOC2012 --out runs/voc --scheme alternate --rounds 2
"""
import argparse
from itertools import islice

import torch

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import clip_model, generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=64)
    g = p.add_argument_group("learning schemes")
    g.add_argument("--scheme", choices=["joint", "alternate"], required=True)
    g.add_argument("--rounds", type=flags.positive, default=2, help="rounds of (c) in --scheme alternate")
    g.add_argument("--init", help="generator to start from: published or one of ours")
    flags.clip(g, "ViT-B/32")
    g.add_argument("--lambda-b", type=flags.number, default=2.4, help="weight of L_match's background term")
    g.add_argument("--lambda-refine", type=flags.number, default=0.05, help="weight lambda of L_refine")
    g.add_argument("--lambda-t", type=flags.number, default=0.02, help="weight of the text term of L_prompt")
    g.add_argument("--repel", choices=["one_minus", "log"], default="one_minus", help="as in train_prompt.py")
    g.add_argument("--prompt-length", type=flags.positive, default=30, help="vectors a class, joint only")
    g.add_argument("--prompt-init", choices=["uniform", "normal"], default="uniform",
                   help="as in train_prompt.py, joint only")
    g.add_argument("--mask-eps", type=flags.above_zero, default=0.1, help="eps of the masks where S trains")
    g.add_argument("--prompt-mask-eps", type=flags.above_zero, default=1e-4,
                   help="eps of the masks in the rounds of (b), alternate only")
    g.add_argument("--mask-fill", choices=["mean", "imagenet"], default="mean",
                   help="what CLIP sees, as in train_match.py")
    g.add_argument("--pool", choices=["max", "avg"],
                   help="pooling of S's attention fusion, as in train_match.py")
    g.add_argument("--train-backbone", action="store_true", help="train all of S")
    g.add_argument("--epochs", type=flags.positive, default=60,
                   help="of joint, and of each (b) and (c) in alternate")
    g.add_argument("--lr", type=flags.number, default=6.4e-5, help="AdamW's rate for S")
    g.add_argument("--lr-prompts", type=flags.number, default=0.025, help="AdamW's rate for the prompts")
    g.add_argument("--weight-decay", type=flags.number, default=0.03)
    g.add_argument("--crop", type=flags.positive, default=224, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.08, help="least share of an image in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=True)
    g.add_argument("--erase", type=flags.share, default=0.25, help="probability of random erasing")
    g.add_argument("--drop-path", type=flags.share, default=0.1,
                   help="stochastic depth of a DeiT while S trains")
    flags.training(p)
    return p.parse_args()


# ---------------------------------------------------------------- joint

def train_jointly(keeper, S, prompts, clip, u_f, run, args):
    """Both train at every step; the prompts see the masks of (c)."""
    for images, labels in keeper.steps():
        b, k = run.pairs(labels)                                              # (P,) image and class
        with run.autocast():
            x_f, x_b, masks = split_images(clip, S, images, b, k, args.mask_eps, args)
            v_f, v_b = clip.encode_normalized(torch.cat([x_f, x_b])).chunk(2)
            u_b = encode_prompts(prompts, labels, run)                        # (P, D)
        match = run.mean(losses.match_loss(v_f, v_b, u_f[k], args.lambda_b))                          # Eq. 1
        prompt = run.mean(losses.prompt_loss(u_b, v_b.detach(), u_f[k], args.lambda_t, args.repel))   # Eq. 2
        refine = run.mean(losses.refine_loss(v_f, u_b.detach()))                                      # Eq. 3
        take_step(keeper, match + args.lambda_refine * refine + prompt,
                  match=match, refine=refine, prompt=prompt, mask=run.mean(masks.mean((1, 2))))


# ---------------------------------------------------------------- alternate

def train_in_turns(keeper, S, prompts, clip, u_f, run, args):
    """(c), (b), (c), ...: a phase has --epochs epochs, and a cosine of the rates of its own."""
    # Differs from the paper: later rounds of (b) see the crops, the batches and the epochs of (c).
    steps = keeper.steps()
    length = args.epochs * len(keeper.loader)
    while keeper.done < keeper.total:
        phase = islice(steps, length - keeper.done % length)
        if keeper.done // length % 2 == 0:
            refine_generator(phase, keeper, S.train(), prompts, clip, u_f, run, args)
        else:
            learn_prompts(phase, keeper, S.eval(), prompts, clip, u_f, run, args)
    next(steps, None)                                                         # ends the progress bar


def refine_generator(phase, keeper, S, prompts, clip, u_f, run, args):
    """A phase of (c): the prompts rest."""
    with torch.no_grad():
        u_b = prompts()                                                       # (C, D), once a phase
    none = torch.zeros((), device=run.device)
    for images, labels in phase:
        b, k = run.pairs(labels)
        with run.autocast():
            x_f, x_b, masks = split_images(clip, S, images, b, k, args.mask_eps, args)
            v_f, v_b = clip.encode_normalized(torch.cat([x_f, x_b])).chunk(2)
        match = run.mean(losses.match_loss(v_f, v_b, u_f[k], args.lambda_b))                          # Eq. 1
        refine = run.mean(losses.refine_loss(v_f, u_b[k]))                                            # Eq. 3
        take_step(keeper, match + args.lambda_refine * refine,
                  match=match, refine=refine, prompt=none, mask=run.mean(masks.mean((1, 2))))


def learn_prompts(phase, keeper, S, prompts, clip, u_f, run, args):
    """A phase of (b): S rests."""
    none = torch.zeros((), device=run.device)
    for images, labels in phase:
        b, k = run.pairs(labels)
        with run.autocast():
            with torch.no_grad():
                _, x_b, masks = split_images(clip, S, images, b, k, args.prompt_mask_eps, args)
                v_b = clip.encode_normalized(x_b)                             # (P, D)
            u_b = encode_prompts(prompts, labels, run)
        prompt = run.mean(losses.prompt_loss(u_b, v_b, u_f[k], args.lambda_t, args.repel))            # Eq. 2
        take_step(keeper, prompt, match=none, refine=none, prompt=prompt, mask=run.mean(masks.mean((1, 2))))


# ---------------------------------------------------------------- the parts of a step

def split_images(clip, S, images, b, k, eps, args):
    """Of the pairs (b, k): X_f = M X and X_b = (1 - M) X, (P, 3, H, W) of CLIP's input, and M (P, H, W)."""
    maps = losses.resize_map(S(images)[0][b, k], clip.size)
    masks = losses.mask_from_map(maps, eps)
    return *losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks), masks


def encode_prompts(prompts, labels, run):
    """u_b of every pair, (P, D); each class in the batch is encoded once."""
    present, at = labels.nonzero()[:, 1].unique(return_inverse=True)          # on the CPU: nothing waits
    return prompts(present.to(run.device, non_blocking=True))[at.to(run.device, non_blocking=True)]


def take_step(keeper, loss, **parts):
    """A step of the optimizer. What is not part of this phase's loss is logged as 0."""
    keeper.optimizer.zero_grad(set_to_none=True)                              # None: what rests is not moved
    keeper.backward(loss)
    keeper.step()
    with torch.no_grad():
        keeper.after(loss=loss, **parts)


def main():
    args = parse()
    run = processes.Run(args)
    joint = args.scheme == "joint"
    start = args.init or args.out / "cls.pt"
    learned = None if joint else args.out / "prompts.pt"
    keeper = checkpoints.Keeper(run, args, "refine.pt", start=start, clip=args.clip, prompts=learned)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    clip = networks.load_clip(args.clip, run, gelu=args.clip_gelu)
    S = networks.load_generator(start, run, folder.classes, args.pool, args.drop_path, masks=False)
    args.pool = S.pool
    processes.seed_all(args.seed)                                             # the same prompts on all ranks
    if joint:
        prompts = clip_model.BackgroundPrompts(clip, len(folder.classes), args.prompt_length,
                                               args.prompt_init)
    else:
        prompts = networks.load_prompts(args, clip, folder.classes)
    processes.seed_all(args.seed + run.rank)
    u_f = clip.encode_text(texts.class_texts(folder.classes))                 # (C, D), once

    augment = samples.train_transform(args.crop, args.min_scale, args.randaugment, args.erase)
    ids = folder.ids(args.split, args.limit)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    optimizer = torch.optim.AdamW(
        [{"params": generator.parameters_to_train(S, args.train_backbone), "lr": args.lr},
         {"params": prompts.parameters(), "lr": args.lr_prompts}], weight_decay=args.weight_decay)
    length = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, length)      # a cosine a phase
    model = torch.nn.ModuleDict({"S": S, "prompts": prompts})
    keeper.begin(model, optimizer, schedule, loader, length if joint else length * (2 * args.rounds - 1))

    train = train_jointly if joint else train_in_turns
    # Each is under DDP by itself, since they do not always train together.
    train(keeper, run.parallel(S), run.parallel(prompts), clip, u_f, run, args)
    keeper.finish(model=S, classes=folder.classes, prompts=prompts.state_dict())


if __name__ == "__main__":
    guard.run(main)
