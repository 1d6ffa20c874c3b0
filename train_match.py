"""SemPLeS (a), segment-label matching: train the mask generator S so that CLIP sees the class in the foreground and not in the background.

Paper   SemPLeS 3.2.1, Eq. 1; Table 4, the host CLIMS
Reads   pictures and image labels of --data, CLIP, <out>/cls.pt (train_cls.py) or --init
Writes  <out>/match.pt, <out>/match.last.pt (to resume), <out>/match.jsonl

For every pair (picture X, class k that it holds): M = S(X)_k, X_f = M X, X_b = (1 - M) X, and
L_match = -log sim(E_I(X_f), E_T("a photo of k.")) - lambda_b log(1 - sim(E_I(X_b), E_T("a photo of k."))).
CLIP is frozen, and so is S's backbone: its head and its attention fusion train.

CLIMS is this stage on a ResNet-50 (train_cls.py --generator resnet50) that trains as a whole, with two losses more: CBS keeps ten backgrounds, named
by hand, out of the foreground, REG keeps the masks small. Its 10 OTM + 24 BTM + 1 CBS + 0.2 REG is lambda_match 10 of L_match with lambda_b 2.4, and so on.

    python train_match.py --data /data/VOC2012 --out runs/voc                                                          # VOC
    torchrun --nproc_per_node 4 train_match.py --data /data/COCO --out runs/coco --split train --batch-size 32 \\
        --lr 3.2e-7 --lambda-b 0.75 --pool avg                                                                        # COCO
    python train_match.py --data /data/VOC2012 --out runs/clims --train-backbone --lambda-match 10 --lambda-cbs 1 --lambda-reg 0.2 --batch-size 16 \\
        --epochs 15 --optimizer sgd --lr 2.5e-4 --head-rate 10 --momentum 1e-4 --weight-decay 1e-4 --crop 512 --min-scale 0.5 \\
        --no-randaugment --erase 0                                                                                    # CLIMS
"""
import torch
import torch.nn.functional as F

from plumbing import checkpoints, flags, folders, guard, log as logs, processes, samples as sampling
from wsss import clip_model, generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=64)
    p.add_argument("--lambda-b", type=flags.number, default=2.4, help="weight of the background term; raise it if the masks miss parts of the object")
    p.add_argument("--init", help="generator to start from instead of <out>/cls.pt: a published checkpoint or one of ours")
    p.add_argument("--train-backbone", action="store_true", help="train all of S, as CLIMS does, and as SemPLeS's text may be read")
    # Neither paper has this: VPL's answer to the modality gap put into SemPLeS's question.
    p.add_argument("--targets", choices=["text", "vision"], default="text",
                   help="what CLIP compares regions with: texts, or the vision prototypes in <out>/prototypes.pt (vpl.py with the same --clip)")
    flags.matching(p)
    flags.clims(p)
    g = flags.optimizing(flags.training(p, epochs=60, lr=6.4e-5))
    # From the authors' code, not in the paper: stochastic depth stays on in S's frozen backbone.
    g.add_argument("--drop-path", type=flags.share, default=0.1, help="stochastic depth of a DeiT while S trains")
    return p.parse_args()


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "match.pt", args.out / "match.last.pt"
    start = args.init or args.out / "cls.pt"
    vision = {"prototypes": args.out / "prototypes.pt"} if args.targets == "vision" else {}
    args.inputs = checkpoints.inputs(start=start, clip=args.clip, backgrounds=args.background_texts, **vision)
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)

    clip = env.in_turn(lambda: clip_model.load_clip(args.clip, env.device))
    if vision:
        class_text = checkpoints.load_prototypes(args, folder, clip)["model"]["prototypes"][:len(folder.classes)].to(env.device)
    else:
        class_text = clip.encode_text(texts.class_texts(folder.classes, args.template))  # u_f (C, D), once
    manual_text = clip.encode_text(texts.manual_texts(args.background_texts, args.template))     # (T, D), for CBS
    if not args.init:
        checkpoints.load(start, "cls", folder.classes)
    model = generator.load_generator(start, args.pool, folder.classes, args.drop_path).to(env.device)
    args.pool = model.pool

    optimizer = processes.optimizer(generator.parameter_groups(model, args.train_backbone, args.lr, args.head_rate), args)
    samples = sampling.Samples(folder, ids, sampling.train_transform(args.crop, (args.min_scale, 1), args.randaugment, args.erase), args.seed)
    loader, batches = sampling.loader(samples, args.batch_size, env, args.workers)
    schedule, scaler = processes.schedule(optimizer, args, args.epochs * len(batches)), env.scaler()
    begin, skip = checkpoints.load_state(last, model, optimizer, schedule, scaler, args)
    S = env.parallel(model.train())
    log, meter = logs.Log(args.out / "match.jsonl", args, env, begin * len(batches) + skip), logs.Meter(env)

    for epoch in range(begin, args.epochs):
        batches.start(epoch, skip)
        for step, (images, labels, numbers) in enumerate(env.progress(loader, f"match {epoch + 1}/{args.epochs}", len(batches), skip), skip + 1):
            b, k = (x.to(env.device, non_blocking=True) for x in labels.nonzero(as_tuple=True))      # (P,) picture and class of every pair
            images = images.to(env.device, non_blocking=True)
            with env.autocast():
                every = S(images)[0]                                                    # (B, C, h, w)
                maps = F.interpolate(every[b, k][:, None], clip.size, mode="bilinear")[:, 0]                         # (P, H, W) of CLIP's input
                masks = maps if model.maps_are_masks else losses.mask_from_map(maps, args.mask_eps)
                regions = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
                v_f, v_b = clip.encode_normalized(torch.cat(regions), args.micro_batch, args.mask_fill).chunk(2)     # (P, D) each
            match = processes.mean(losses.match_loss(v_f, v_b, class_text[k], args.lambda_b))                           # Eq. 1
            cbs, reg = processes.total(losses.suppression_loss(v_f, manual_text, args.tau_cbs)), processes.mean(losses.area_loss(every))
            loss = args.lambda_match * match + args.lambda_cbs * cbs + args.lambda_reg * reg
            lr = optimizer.param_groups[0]["lr"]
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True), schedule.step()

            with torch.no_grad():
                sim_f, sim_b = losses.similarity(v_f, class_text[k]), losses.similarity(v_b, class_text[k])
                meter.add(numbers, loss=loss, foreground=processes.mean(-sim_f.log()), background=processes.mean(-(1 - sim_b).log()), cbs=cbs, reg=reg,
                          mask=processes.mean(masks.mean((1, 2))), sim_f=processes.mean(sim_f), sim_b=processes.mean(sim_b))
            done = epoch * len(batches) + step
            save = env.stopping() or step == len(batches) or done % args.save_every == 0
            if save or done % args.log_every == 0:
                log(done, epoch=epoch, lr=lr, **meter.read(ids))
            if save:
                checkpoints.save_state(last, model, optimizer, schedule, scaler, epoch, step, args)
        skip = 0

    if env.main:
        checkpoints.save(out, stage="match", model=model.state_dict(), classes=folder.classes, args=flags.plain(args))
    env.close(f"{out} is finished")


if __name__ == "__main__":
    guard.run(main)
