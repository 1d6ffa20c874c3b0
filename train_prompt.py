"""SemPLeS (b), contrastive prompt learning: a prompt per class for its co-occurring background.

Paper   SemPLeS 3.2.2, Eq. 2
Reads   images and image labels of --data, CLIP, <out>/match.pt (train_match.py) or --init
Writes  <out>/prompts.pt, <out>/prompts.last.pt (to resume), <out>/prompts.jsonl

For every pair of an image X and a class k present in it, with M = S(X)_k fixed:

    v_b = E_I((1 - M) X),   u_b = E_T(p_k),   u_f = E_T("a photo of k.")
    L_prompt = -log sim(u_b, v_b) - lambda_T log(1 - sim(u_b, u_f))                        Eq. 2

Only the prompts p_k train: L vectors a class (the paper's K = 30). S and CLIP are frozen, so v_b depends on
the crop alone. --views 0: fresh crops, encoded every epoch. --views V: V crops of each image are encoded once
and epoch e trains on crop e mod V, without an image encoder; V = EPOCHS equals --views 0 up to rounding.

    python train_prompt.py --data /data/VOC2012 --out runs/voc --views 8
    python train_prompt.py --data /data/COCO --out runs/coco --split train --lr 2.5e-3 --lambda-t 0.01 \\
        --pool avg
"""
import argparse

import torch

from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import clip_model, losses, texts


def parse():
    p = flags.parser(__doc__, batch_size=128)
    g = p.add_argument_group("SemPLeS (b)")
    g.add_argument("--lambda-t", type=flags.number, default=0.02,
                   help="weight of the term that keeps a prompt away from its class text")
    g.add_argument("--lambda-i", type=flags.number, default=1.0,
                   help="weight of the image term; 0: the text term alone, a row of Table 5")
    g.add_argument("--repel", choices=["one_minus", "log"], default="one_minus",
                   help="text term: -log(1 - sim) (WACV), or +log sim (arXiv v2)")
    g.add_argument("--prompt-length", type=flags.positive, default=30, help="learned vectors a class")
    g.add_argument("--prompt-init", choices=["uniform", "normal"], default="uniform",
                   help="[0, 1) as in the authors' code, or CLIP's own scale, std 0.02")
    g.add_argument("--views", type=flags.natural, default=0,
                   help="crops of each image to encode once and train on; 0: fresh crops every epoch")
    g.add_argument("--init", help="generator to take instead of <out>/match.pt: published or one of ours")
    flags.clip(g, "ViT-B/32")
    g.add_argument("--raw-names", action="store_true",
                   help="feed VOC's names as they are (diningtable), not the authors' (dining table, player)")
    # From the authors' code, not in the paper: eps 0.1 in (a) and (c), 1e-4 in (b); rates, batches of (b).
    g.add_argument("--mask-eps", type=flags.above_zero, default=1e-4,
                   help="m = (c - min) / (max - min + eps): a small map becomes a full mask here")
    g.add_argument("--mask-fill", choices=["mean", "imagenet"], default="mean",
                   help="a removed pixel is the mean colour; imagenet: and all pixels that CLIP sees are "
                        "normalised by ImageNet's statistics, as in the authors' code")
    g.add_argument("--pool", choices=["max", "avg"],
                   help="S's attention fusion, max: VOC, avg: COCO; left out: as in the file of S, else max")
    g.add_argument("--epochs", type=flags.positive, default=60)
    g.add_argument("--lr", type=flags.number, default=0.025,
                   help="AdamW's rate as it is used, whatever --batch-size, from the authors' code")
    g.add_argument("--weight-decay", type=flags.number, default=0.03)
    g.add_argument("--crop", type=flags.positive, default=224, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.08, help="least share of an image in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=False)
    g.add_argument("--erase", type=flags.share, default=0.0, help="probability of random erasing")
    flags.training(p)
    return p.parse_args()


@torch.no_grad()
def encode_background(clip, S, images, b, k, args):
    """v_b = E_I((1 - M) X) of the pairs (b, k) of a batch, (P, D), and the mean of each mask (P,)."""
    maps, _ = S(images)                                                               # (B, C, h, w)
    maps = losses.resize_map(maps[b, k], clip.size)                                   # (P, H, W), CLIP's size
    # CLIMS's maps are sigmoids, not scaled; its (a) and (c) are hosts/train_clims.py.
    masks = maps if S.maps_are_masks else losses.mask_from_map(maps, args.mask_eps)
    _, x_b = losses.split_regions(clip.normalize(images, args.mask_fill)[b], masks)
    return clip.encode_normalized(x_b), masks.mean((1, 2))


def encode_batches(loader, clip, S, args, run):
    """Per batch: v_b and the mean mask of its pairs, their classes (on the CPU), image numbers."""
    for images, labels, numbers in loader:
        b, k = run.pairs(labels)
        with run.autocast():
            v_b, area = encode_background(clip, S, images.to(run.device, non_blocking=True), b, k, args)
        yield v_b, area, labels.nonzero()[:, 1], numbers


class StoredFeatures:
    """Features v_b of V crops of every image, encoded once: `features` (V, pairs, D + 1), the mean mask last.

    Every rank encodes its share; a sum over ranks gives all to all. Iterated: what encode_batches yields."""

    def __init__(self, loader, clip, S, args, run):
        self.batches, self.labels, self.run = loader.batch_sampler, loader.dataset.labels, run
        # The pairs of image i are numbers first[i] to first[i + 1] - 1.
        self.first = torch.cat([torch.zeros(1), self.labels.sum(1).cumsum(0)]).long()
        views, width = min(args.views, args.epochs), clip.model.text_projection.shape[1]
        self.features = torch.zeros(views, int(self.first[-1]), width + 1, device=run.device)
        keys = [(view, i) for view in range(views) for i in run.shard(range(len(self.labels)))]
        size = max(1, args.batch_size // run.world)
        chunks = [keys[n:n + size] for n in range(0, len(keys), size)]
        crops = samples.make_loader(loader.dataset, chunks, run, args.workers)
        encoded = encode_batches(crops, clip, S, args, run)
        encoded = run.progress(encoded, f"{views} views", len(chunks))
        for (v_b, area, _, _), chunk in zip(encoded, chunks):
            self.features[self.rows(chunk)] = torch.cat([v_b, area[:, None]], dim=1)
        run.sum(self.features)                                # rows of other ranks are zero

    def rows(self, keys):
        """(epoch, image) keys -> view and pair numbers of their features, (P,) each."""
        rows = [(epoch % len(self.features), pair)
                for epoch, i in keys for pair in range(self.first[i], self.first[i + 1])]
        return torch.tensor(rows, dtype=torch.long).view(-1, 2).unbind(1)

    def __iter__(self):
        for batch in self.batches:
            numbers = torch.tensor([i for _, i in batch], dtype=torch.long)
            k = self.labels[numbers].nonzero()[:, 1]
            stored = self.features[tuple(x.to(self.run.device, non_blocking=True) for x in self.rows(batch))]
            yield stored[:, :-1], stored[:, -1], k, numbers


def main():
    args = parse()
    run = processes.Run(args)
    start = args.init or args.out / "match.pt"
    keeper = checkpoints.Keeper(run, args, "prompts.pt", start=start, clip=args.clip)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    ids = folder.ids(args.split, args.limit)
    S = networks.load_generator(start, run, folder.classes, args.pool).eval().requires_grad_(False)
    args.pool = S.pool
    clip = networks.load_clip(args.clip, run, gelu=args.clip_gelu)
    class_texts = texts.class_texts(folder.classes, aliases=not args.raw_names)
    u_f = clip.encode_text(class_texts)                                               # (C, D), once
    processes.seed_all(args.seed)                             # not what loading S has left of chance
    model = clip_model.BackgroundPrompts(clip, len(folder.classes), args.prompt_length, args.prompt_init)

    augment = samples.train_transform(args.crop, args.min_scale, args.randaugment, args.erase)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    prompts = keeper.begin(model, optimizer, schedule, loader, args.epochs * len(loader), texts=class_texts)
    stored = StoredFeatures(loader, clip, S, args, run) if args.views else None

    def epoch():
        return stored if args.views else encode_batches(loader, clip, S, args, run)

    for v_b, area, k in keeper.steps(epoch):                                          # (P, D), (P,), (P,)
        present, inverse = k.unique(return_inverse=True)      # on the CPU: a GPU would have to wait
        k, present, inverse = (x.to(run.device, non_blocking=True) for x in (k, present, inverse))
        with run.autocast():
            u_b = prompts(present)[inverse]                                           # (P, D), a class once
        pairs = losses.prompt_loss(u_b, v_b, u_f[k], args.lambda_t, args.repel, args.lambda_i)  # Eq. 2
        loss = run.mean(pairs)

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        with torch.no_grad():
            sim_image, sim_text = losses.similarity(u_b, v_b), losses.similarity(u_b, u_f[k])
            keeper.after(loss=loss, image=run.mean(-sim_image.log()), text=run.mean(-(1 - sim_text).log()),
                         mask=run.mean(area), sim_image=run.mean(sim_image), sim_text=run.mean(sim_text))
    keeper.finish(model=model, classes=folder.classes, clip=clip.fingerprint())


if __name__ == "__main__":
    guard.run(main)
