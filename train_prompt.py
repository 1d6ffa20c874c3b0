"""SemPLeS (b), contrastive prompt learning: one text prompt per class that describes its co-occurring background (rails for train).

Paper   SemPLeS 3.2.2, Eq. 2
Reads   pictures and image labels of --data, CLIP, <out>/match.pt (train_match.py) or --init
Writes  <out>/prompts.pt, <out>/prompts.last.pt (to resume), <out>/prompts.jsonl

For every pair (picture X, class k that it holds), with S fixed: v_b = E_I((1 - M) X), u_b = E_T(p_k), u_f = E_T("a photo of k."), and
L_prompt = -log sim(u_b, v_b) - lambda_t log(1 - sim(u_b, u_f)). Only the prompts train, L vectors a class.

S and CLIP are frozen, so v_b depends on the crop alone: --views V encodes V crops of each picture once and then trains on the
stored features, epoch e on crop e mod V, with no image encoder in the loop. --views 0 draws and encodes fresh crops every epoch, as
the paper does; --views EPOCHS gives the same numbers as that.

    python train_prompt.py --data /data/VOC2012 --out runs/voc --views 8
    python train_prompt.py --data /data/COCO --out runs/coco --split train --lr 2.5e-3 --lambda-t 0.01 --pool avg
"""
import torch
import torch.nn.functional as F

from plumbing import checkpoints, flags, folders, guard, log as logs, processes, samples as sampling
from wsss import clip_model, generator, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=128)
    p.add_argument("--lambda-t", type=flags.number, default=0.02, help="weight of the term that keeps a prompt away from its class text")
    p.add_argument("--lambda-i", type=flags.number, default=1.0, help="weight of the image term; 0: the ablation with the text term alone (Table 5)")
    p.add_argument("--repel", choices=["one_minus", "log"], default="one_minus", help="text term: -log(1 - sim) (WACV), or +log sim (arXiv v2)")
    p.add_argument("--prompt-length", type=flags.positive, default=30, help="learned vectors a class")
    p.add_argument("--prompt-init", choices=["uniform", "normal"], default="uniform", help="[0, 1) as in the authors' code, or CLIP's own scale, std 0.02")
    p.add_argument("--views", type=flags.natural, default=0, help="crops of each picture to encode once and train on; 0: fresh crops every epoch")
    p.add_argument("--init", help="generator to take instead of <out>/match.pt: a published checkpoint or one of ours")
    flags.matching(p, mask_eps=1e-4)
    flags.training(p, epochs=60, lr=0.025, randaugment=False, erase=0.0)
    return p.parse_args()


@torch.no_grad()
def encode_background(clip, S, images, b, k, args):
    """v_b = E_I((1 - M) X) of the pairs (b, k) of a batch, (P, D), and the mean of each mask (P,)."""
    maps = F.interpolate(S(images)[0][b, k][:, None], clip.size, mode="bilinear")[:, 0]               # (P, H, W)
    masks = maps if S.maps_are_masks else losses.mask_from_map(maps, args.mask_eps)
    _, background = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
    return clip.encode_normalized(background, args.micro_batch, args.mask_fill), masks.mean((1, 2))


def fresh(loader, clip, S, args, env):
    """Per batch: v_b and the mean mask of its pairs, their classes (on the CPU), picture numbers; every crop is drawn and encoded here."""
    for images, labels, numbers in loader:
        b, k = labels.nonzero(as_tuple=True)
        with env.autocast():
            v_b, area = encode_background(clip, S, *(x.to(env.device, non_blocking=True) for x in (images, b, k)), args)
        yield v_b, area, k, numbers


class Stored:
    """The features of --views crops of every picture, encoded once, each process its share: (views, pairs, D + 1), last the mean mask."""

    def __init__(self, samples, clip, S, args, env):
        self.labels, views = samples.labels, min(args.views, args.epochs)
        self.first = torch.cat([torch.zeros(1), self.labels.sum(1).cumsum(0)]).long()                   # pairs of picture i: first[i] .. first[i + 1]
        self.features = torch.zeros(views, int(self.first[-1]), clip.encode_text(["x"]).shape[1] + 1, device=env.device)
        keys = [(view, i) for view in range(views) for i in env.shard(range(len(samples)))]
        size = max(1, args.batch_size // env.world)
        chunks = [keys[n:n + size] for n in range(0, len(keys), size)]
        loader = torch.utils.data.DataLoader(samples, batch_sampler=chunks, num_workers=args.workers, collate_fn=samples.collate, worker_init_fn=sampling.serve,
                                             generator=torch.Generator(), pin_memory=env.device.type == "cuda")        # as sampling.loader's
        for chunk, (images, labels, _) in zip(chunks, env.progress(loader, f"prompts: {views} views", len(chunks))):
            b, k = labels.nonzero(as_tuple=True)
            with env.autocast():
                v_b, area = encode_background(clip, S, *(x.to(env.device) for x in (images, b, k)), args)
            self.features[self.rows(chunk)] = torch.cat([v_b, area[:, None]], dim=1)
        env.sum(self.features)                                                          # rows of other processes are zero here

    def rows(self, keys):
        """(epoch, picture) keys -> view and pair numbers of their features, (P,) each."""
        rows = [(epoch % len(self.features), pair) for epoch, i in keys for pair in range(self.first[i], self.first[i + 1])]
        return torch.tensor(rows, dtype=torch.long).view(-1, 2).unbind(1)

    def __call__(self, batches, env):
        """As `fresh`, from the store."""
        for batch in batches:
            numbers = torch.tensor([i for _, i in batch], dtype=torch.long)
            k = self.labels[numbers].nonzero()[:, 1]
            stored = self.features[tuple(x.to(env.device, non_blocking=True) for x in self.rows(batch))]
            yield stored[:, :-1], stored[:, -1], k, numbers


def main():
    args = parse()
    env = processes.Env(args)
    out, last = args.out / "prompts.pt", args.out / "prompts.last.pt"
    start = args.init or args.out / "match.pt"
    args.inputs = checkpoints.inputs(start=start, clip=args.clip)
    if checkpoints.finished(out, args):
        return env.close(f"{out} is finished")
    guard.claim(out)
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)

    clip = env.in_turn(lambda: clip_model.load_clip(args.clip, env.device))
    class_text = clip.encode_text(texts.class_texts(folder.classes, args.template))      # u_f (C, D), once
    if not args.init:
        checkpoints.load(start, "match", folder.classes)
    S = generator.load_generator(start, args.pool, folder.classes).to(env.device).eval().requires_grad_(False)
    args.pool = S.pool
    processes.seed_all(args.seed)                                                          # the same prompts on every process
    model = clip_model.BackgroundPrompts(clip, len(folder.classes), args.prompt_length, args.prompt_init)

    optimizer = processes.adamw([{"params": model.parameters()}], args)
    samples = sampling.Samples(folder, ids, sampling.train_transform(args.crop, (args.min_scale, 1), args.randaugment, args.erase), args.seed)
    loader, batches = sampling.loader(samples, args.batch_size, env, args.workers)
    schedule, scaler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(batches)), env.scaler()
    begin, skip = checkpoints.load_state(last, model, optimizer, schedule, scaler, args)
    stored = Stored(samples, clip, S, args, env) if args.views else None
    prompts = env.parallel(model)
    log, meter = logs.Log(args.out / "prompts.jsonl", args, env, begin * len(batches) + skip), logs.Meter(env)

    for epoch in range(begin, args.epochs):
        batches.start(epoch, skip)
        features = stored(batches, env) if stored else fresh(loader, clip, S, args, env)
        for step, (v_b, area, k, numbers) in enumerate(env.progress(features, f"prompts {epoch + 1}/{args.epochs}", len(batches), skip), skip + 1):
            present, at = k.unique(return_inverse=True)                                 # of labels on the CPU: nothing waits for the device
            k, present, at = (x.to(env.device, non_blocking=True) for x in (k, present, at))
            with env.autocast():
                u_b = prompts(present)[at]                                              # (P, D), each of the batch's classes encoded once
            loss = processes.mean(losses.prompt_loss(u_b, v_b, class_text[k], args.lambda_t, args.repel, args.lambda_i))    # Eq. 2
            lr = optimizer.param_groups[0]["lr"]
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad(set_to_none=True), schedule.step()

            with torch.no_grad():
                sim_image, sim_text = losses.similarity(u_b, v_b), losses.similarity(u_b, class_text[k])
                meter.add(numbers, loss=loss, image=processes.mean(-sim_image.log()), text=processes.mean(-(1 - sim_text).log()),
                          mask=processes.mean(area), sim_image=processes.mean(sim_image), sim_text=processes.mean(sim_text))
            done = epoch * len(batches) + step
            save = env.stopping() or step == len(batches) or done % args.save_every == 0
            if save or done % args.log_every == 0:
                log(done, epoch=epoch, lr=lr, **meter.read(ids))
            if save:
                checkpoints.save_state(last, model, optimizer, schedule, scaler, epoch, step, args)
        skip = 0

    if env.main:
        checkpoints.save(out, stage="prompts", model=model.state_dict(), classes=folder.classes, args=flags.plain(args))
    env.close(f"{out} is finished")


if __name__ == "__main__":
    guard.run(main)
