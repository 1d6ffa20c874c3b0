"""SemPLeS (c), prompt-guided semantic refinement: S keeps matching its class and drops what the class's background prompt describes.

Paper   SemPLeS 3.2.3, Eq. 3; the learning schemes of Table 6 of the arXiv version; Table 4, the host CLIMS
Reads   pictures and image labels of --data, CLIP, <out>/match.pt (train_match.py) or --init, <out>/prompts.pt (train_prompt.py)
Writes  <out>/refine.pt, <out>/refine.last.pt (to resume), <out>/refine.jsonl

L_total = L_match + lambda L_refine, L_refine = -log(1 - sim(E_I(X_f), u_b)), with u_b = E_T(p_k) of the learned prompts, fixed.

--scheme sequential is the paper's: (a), (b), (c) once. alternate repeats (b) and (c), --rounds in all (one round is sequential);
joint trains S and fresh prompts at once by all three losses from <out>/cls.pt, the prompts detached in L_refine, S detached in L_prompt.

SemPLeS on CLIMS is CLIMS's losses, by the same flags as in train_match.py, + lambda L_refine.

--targets vision, which is in neither paper, takes VPL's prototypes W (vpl.py) for texts and prompts: u_f is the class's, u_b the learned
background's that the pair's background region is nearest to. It needs no train_prompt.py.

    python train_refine.py --data /data/VOC2012 --out runs/voc
    python train_refine.py --data /data/VOC2012 --out runs/voc --init runs/voc/cls.pt      # only the prompts carry over (authors' code)
    python train_refine.py --data /data/COCO --out runs/coco --split train --batch-size 24 --lr 2.4e-7 --lambda-b 0.75 \\
        --lambda-refine 0.2 --pool avg
"""
import torch
import torch.nn.functional as F

from plumbing import checkpoints, flags, folders, guard, log as logs, processes, samples as sampling
from wsss import clip_model, generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=64)
    p.add_argument("--lambda-b", type=flags.number, default=2.4, help="weight of the background term of L_match")
    p.add_argument("--lambda-refine", type=flags.number, default=0.05, help="weight lambda of L_refine; raise it if co-occurring backgrounds stay lit")
    p.add_argument("--init", help="generator to start from instead of <out>/match.pt: a published checkpoint or one of ours")
    p.add_argument("--prompts", default="learned", choices=["learned", "random"], help="random: prompts as initialised, the ablation of Table 5")
    p.add_argument("--train-backbone", action="store_true", help="train all of S, as CLIMS does, and as SemPLeS's text may be read")
    # Neither paper has this: VPL's answer to the modality gap put into SemPLeS's question.
    p.add_argument("--targets", choices=["text", "vision"], default="text",
                   help="what CLIP compares regions with: texts, or the vision prototypes in <out>/prototypes.pt (vpl.py with the same --clip)")
    g = p.add_argument_group("learning schemes (arXiv Table 6)")
    g.add_argument("--scheme", choices=["sequential", "alternate", "joint"], default="sequential")
    g.add_argument("--rounds", type=flags.positive, default=1, help="rounds of (b), (c) under --scheme alternate; the first (b) is train_prompt.py")
    g.add_argument("--lr-prompts", type=flags.number, default=0.025, help="rate of the prompts where they train here")
    g.add_argument("--lambda-t", type=flags.number, default=0.02, help="weight of the text term of L_prompt where prompts train here")
    g.add_argument("--repel", choices=["one_minus", "log"], default="one_minus", help="as in train_prompt.py")
    g.add_argument("--prompt-length", type=flags.positive, default=30, help="vectors a class, for joint and random prompts")
    g.add_argument("--prompt-init", choices=["uniform", "normal"], default="uniform", help="as in train_prompt.py")
    flags.matching(p)
    flags.clims(p)
    g = flags.optimizing(flags.training(p, epochs=60, lr=6.4e-5))
    # From the authors' code, not in the paper: stochastic depth stays on in S's frozen backbone.
    g.add_argument("--drop-path", type=flags.share, default=0.1, help="stochastic depth of a DeiT while S trains")
    args = p.parse_args()
    if args.targets == "vision" and args.scheme != "sequential":
        p.error("--targets vision has no prompts to train: it goes with --scheme sequential")
    if args.optimizer == "sgd" and args.scheme != "sequential":
        p.error("--optimizer sgd is for S, and prompts train by AdamW: it goes with --scheme sequential")
    if args.rounds > 1 and args.scheme != "alternate":
        p.error("--rounds goes with --scheme alternate")
    return args


def load_prompts(args, clip, classes):
    """The learned prompts; fresh ones for the joint scheme and for the ablation."""
    processes.seed_all(args.seed)                                                          # the same prompts on every process
    if args.scheme == "joint" or args.prompts == "random" or args.targets == "vision":
        return clip_model.BackgroundPrompts(clip, len(classes), args.prompt_length, args.prompt_init)
    content = checkpoints.load(args.out / "prompts.pt", "prompts", classes)
    prompts = clip_model.BackgroundPrompts(clip, len(classes), content["model"]["vectors"].shape[1])
    checkpoints.load_weights(prompts, content["model"], args.out / "prompts.pt")
    learned = {**content["args"], **content["args"]["inputs"]}
    for name, now in (("clip", args.inputs["clip"] or args.clip), ("template", args.template)):
        if learned[name] not in (now, None):
            raise ValueError(f"{args.out / 'prompts.pt'} was learned with another --{name}: give the same, or run train_prompt.py with this one")
    return prompts


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "refine.pt", args.out / "refine.last.pt"
    start = args.init or args.out / ("cls.pt" if args.scheme == "joint" else "match.pt")
    vision = args.targets == "vision"
    args.inputs = checkpoints.inputs(start=start, clip=args.clip, backgrounds=args.background_texts, prompts=args.out / ("prototypes.pt" if vision else "prompts.pt"))
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)

    clip = env.in_turn(lambda: clip_model.load_clip(args.clip, env.device))
    if vision:
        content = checkpoints.load_prototypes(args, folder, clip)
        if not content["args"]["learn_background"]:
            raise ValueError(f"{args.out / 'prototypes.pt'}: its backgrounds are texts still: run vpl.py with --learn-background")
        class_text, grounds = content["model"]["prototypes"].to(env.device).tensor_split([len(folder.classes)])
    else:
        class_text = clip.encode_text(texts.class_texts(folder.classes, args.template))  # u_f (C, D), once
    manual_text = clip.encode_text(texts.manual_texts(args.background_texts, args.template))     # (T, D), for CBS
    if not args.init:
        checkpoints.load(start, start.stem, folder.classes)
    model = torch.nn.ModuleDict({
        "S": generator.load_generator(start, args.pool, folder.classes, args.drop_path).to(env.device),
        "prompts": load_prompts(args, clip, folder.classes)})
    args.pool = model["S"].pool
    groups = generator.parameter_groups(model["S"], args.train_backbone, args.lr, args.head_rate)
    phases = {"sequential": ["refine"], "alternate": ["refine"] + ["prompt", "refine"] * (args.rounds - 1), "joint": ["joint"]}[args.scheme]
    total = args.epochs * len(phases)

    processes.seed_all(args.seed + env.rank)                                               # the noise of S differs between processes again

    optimizer = processes.optimizer([*groups, {"params": model["prompts"].parameters(), "lr": args.lr_prompts}], args)
    samples = sampling.Samples(folder, ids, sampling.train_transform(args.crop, (args.min_scale, 1), args.randaugment, args.erase), args.seed)
    loader, batches = sampling.loader(samples, args.batch_size, env, args.workers)
    schedule, scaler = processes.schedule(optimizer, args, args.epochs * len(batches)), env.scaler()             # a cosine a phase
    begin, skip = checkpoints.load_state(last, model, optimizer, schedule, scaler, args)
    S, prompts = env.parallel(model["S"]), env.parallel(model["prompts"])
    log, meter = logs.Log(args.out / "refine.jsonl", args, env, begin * len(batches) + skip), logs.Meter(env)

    for epoch in range(begin, total):
        batches.start(epoch, skip)
        phase = phases[epoch // args.epochs]
        S.train(phase != "prompt")
        with torch.no_grad():
            fixed = model["prompts"]()                                                  # u_b (C, D), once: prompts rest in a refine phase
        for step, (images, labels, numbers) in enumerate(env.progress(loader, f"{phase} {epoch + 1}/{total}", len(batches), skip), skip + 1):
            b, k = labels.nonzero(as_tuple=True)                                                     # (P,) picture and class of every pair
            present, at = k.unique(return_inverse=True)                                              # on the CPU: nothing waits for the device
            images, b, k, present, at = (x.to(env.device, non_blocking=True) for x in (images, b, k, present, at))
            with env.autocast(), torch.set_grad_enabled(phase != "prompt"):
                every = S(images)[0]                                                    # (B, C, h, w)
                maps = F.interpolate(every[b, k][:, None], clip.size, mode="bilinear")[:, 0]                         # (P, H, W) of CLIP's input
                # Differs from the paper: in later rounds (b) has its own eps, but sees the crops, the batches and the epochs of (c).
                masks = maps if model["S"].maps_are_masks else losses.mask_from_map(maps, 1e-4 if phase == "prompt" else args.mask_eps)
                regions = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
                v_f, v_b = clip.encode_normalized(torch.cat(regions), args.micro_batch, args.mask_fill).chunk(2)     # (P, D) each
            with env.autocast():
                u_b = fixed[k] if phase == "refine" else prompts(present)[at]           # (P, D)
            if vision:                                                                  # what this background region shows most of
                u_b = grounds[(v_b.detach() @ grounds.T).argmax(1)]
            match = processes.mean(losses.match_loss(v_f, v_b, class_text[k], args.lambda_b))                           # Eq. 1
            refine = processes.mean(losses.refine_loss(v_f, u_b.detach()))                                              # Eq. 3
            prompt = processes.mean(losses.prompt_loss(u_b, v_b.detach(), class_text[k], args.lambda_t, args.repel))    # Eq. 2
            cbs, reg = processes.total(losses.suppression_loss(v_f, manual_text, args.tau_cbs)), processes.mean(losses.area_loss(every))
            of_S = args.lambda_match * match + args.lambda_cbs * cbs + args.lambda_reg * reg + args.lambda_refine * refine
            loss = {"refine": of_S, "prompt": prompt, "joint": of_S + prompt}[phase]
            lr = optimizer.param_groups[-1 if phase == "prompt" else 0]["lr"]
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True), schedule.step()

            with torch.no_grad():
                meter.add(numbers, loss=loss, match=match, refine=refine, prompt=prompt, cbs=cbs, reg=reg, mask=processes.mean(masks.mean((1, 2))),
                          sim_f=processes.mean(losses.similarity(v_f, class_text[k])), sim_b=processes.mean(losses.similarity(v_b, class_text[k])),
                          sim_prompt=processes.mean(losses.similarity(v_f, u_b)))
            done = epoch * len(batches) + step
            save = env.stopping() or step == len(batches) or done % args.save_every == 0
            if save or done % args.log_every == 0:
                log(done, epoch=epoch, phase=phase, lr=lr, **meter.read(ids))
            if save:
                checkpoints.save_state(last, model, optimizer, schedule, scaler, epoch, step, args)
        skip = 0

    if env.main:
        extra = {} if vision else {"prompts": model["prompts"].state_dict()}
        checkpoints.save(out, stage="refine", model=model["S"].state_dict(), classes=folder.classes, args=flags.plain(args), **extra)
    env.close(f"{out} is finished")


if __name__ == "__main__":
    guard.run(main)
