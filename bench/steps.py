"""Time and memory of a training step of SemPLeS (a), (b), (c), beside the same step written straight down.

DeiT-S, ViT-B/32, 224 px, 20 classes; random weights and images, which lie ready. Both sides compute the same
loss and the same gradients (tests/test_bench.py). `here` makes the calls of train_match.py, train_prompt.py
and train_refine.py. `plain` follows the equations term by term, as public code does:

    what a term compares is encoded for it    class texts at every step; in (c) the foreground twice
    a loop over the classes                   after the maps of all C were resized
    CLIP's own text encoder                   all 77 tokens; in (c) all prompts too, with a graph
    frozen is what no optimizer has           CLIP's weights get gradients that nobody reads

At 4 images with 7 pairs this makes about 650 / 700 / 1,190 GFLOP; the public steps, by reading what they
compute, 652 / 693 / 1,224.

The sides take turns in one process; times and ratios are medians over --rounds. Peak memory is that of a
process that does two steps of one side: on a CPU its largest resident set, python and weights included; on a
GPU what torch allocated. `b stored` is an epoch on stored features (--views); `b 60 epochs, 8 views` is all
of (b), the encoding of its 8 views included.

    python -m bench.steps                                     # 4 images with 7 pairs: minutes on a CPU
    python -m bench.steps --rows b --rounds 5 --write
    python -m bench.steps --device cuda --amp bf16 --rows a c --batch 64 --pairs 100 --steps 100
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys

import clip as openai_clip
import torch
import torch.nn.functional as F

import train_prompt
from bench import inputs, tables
from plumbing import files, flags, folders, markdown, processes
from wsss import clip_model, generator, losses, texts

LAMBDA_B, LAMBDA_T, LAMBDA, EPS, EPS_PROMPT = 2.4, 0.02, 0.05, 0.1, 1e-4              # VOC
VIEWS, EPOCHS, SIZE = 8, 60, 224
ROWS = {  # row -> the step of `plain`, the step of `here`
    "a": ("match", "match"), "b fresh crops": ("prompt", "prompt"), "b stored": ("prompt", "stored"),
    f"b {EPOCHS} epochs, {VIEWS} views": ("prompt", "views"), "c": ("refine", "refine")}


def make_optimizers(last_layers, prompts):
    """Step -> the optimizer that follows it, as in the stages."""
    last_layers = torch.optim.AdamW(last_layers, 6.4e-5, weight_decay=0.03)
    prompts = torch.optim.AdamW(prompts, 0.025, weight_decay=0.03)
    return {"match": last_layers, "refine": last_layers, "prompt": prompts, "stored": prompts}


def pairs_of(labels, device):
    """Labels (B, C) on the CPU -> image b and class k of every pair (P,)."""
    b, k = labels.nonzero(as_tuple=True)
    return b.to(device, non_blocking=True), k.to(device, non_blocking=True)


# ---------------------------------------------------------------- the two sides

class Here:
    """The steps by the calls of the stages."""

    def __init__(self, model, S, vectors, class_texts):
        self.clip, self.S, self.features = clip_model.FrozenClip(model).to(vectors.device), S, None
        self.prompts = clip_model.BackgroundPrompts(self.clip, *vectors.shape[:2])
        self.prompts.vectors.data.copy_(vectors)
        self.u_f = self.clip.encode_text(class_texts)                                 # (C, D), once
        with torch.no_grad():
            self.u_b = self.prompts()                                                 # (C, D), once
        self.optimizers = make_optimizers(generator.parameters_to_train(S), self.prompts.parameters())

    def encode_regions(self, images, b, k):
        """-> v_f and v_b (P, D)"""
        maps = losses.resize_map(self.S(images)[0][b, k], self.clip.size)
        masks = losses.mask_from_map(maps, EPS)
        regions = losses.split_regions(self.clip.normalize(images)[b], masks)
        return self.clip.encode_normalized(torch.cat(regions)).chunk(2)

    def match(self, images, labels):
        b, k = pairs_of(labels, images.device)
        v_f, v_b = self.encode_regions(images, b, k)
        return losses.match_loss(v_f, v_b, self.u_f[k], LAMBDA_B).mean()

    def refine(self, images, labels):
        b, k = pairs_of(labels, images.device)
        v_f, v_b = self.encode_regions(images, b, k)
        match = losses.match_loss(v_f, v_b, self.u_f[k], LAMBDA_B).mean()
        return match + LAMBDA * losses.refine_loss(v_f, self.u_b[k]).mean()

    def encode_background(self, images, labels):
        args = argparse.Namespace(mask_eps=EPS_PROMPT, mask_fill="mean")
        b, k = pairs_of(labels, images.device)
        return train_prompt.encode_background(self.clip, self.S, images, b, k, args)[0]

    def prompt(self, images, labels):
        return self.prompt_loss(self.encode_background(images, labels), labels)

    def stored(self, images, labels):
        if self.features is None:
            self.features = self.encode_background(images, labels)
        return self.prompt_loss(self.features, labels)

    def prompt_loss(self, v_b, labels):
        k = labels.nonzero()[:, 1]
        present, at = k.unique(return_inverse=True)
        k, present, at = (x.to(v_b.device, non_blocking=True) for x in (k, present, at))
        u_b = self.prompts(present)[at]
        return losses.prompt_loss(u_b, v_b, self.u_f[k], LAMBDA_T).mean()


class Plain:
    """The steps by the equations, term by term."""

    def __init__(self, model, S, vectors, class_texts):
        device = vectors.device
        self.clip, self.S = model.to(device).eval().requires_grad_(True), S.requires_grad_(True)
        self.vectors, self.size = torch.nn.Parameter(vectors.clone()), model.visual.input_resolution
        self.tokens = openai_clip.tokenize(class_texts).to(device)                    # (C, 77)
        self.frame = openai_clip.tokenize("a photo of .").to(device)                  # (1, 77)
        self.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
        self.std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)
        run_blocks = S.run_blocks

        def detached(images):                                 # what freezes S's backbone in public code
            tokens, *rest = run_blocks(images)
            return tokens.detach(), *rest

        S.run_blocks = detached
        last_layers = [w for name, w in S.named_parameters() if name.startswith(S.last_layers)]
        self.optimizers = make_optimizers(last_layers, [self.vectors])

    def image(self, regions):
        return F.normalize(self.clip.encode_image(regions).float(), dim=-1)

    @torch.no_grad()
    def class_texts(self):
        return F.normalize(self.clip.encode_text(self.tokens).float(), dim=-1)        # (C, D)

    def prompts(self):
        C, L, _ = self.vectors.shape
        words = self.clip.token_embedding(self.frame).detach().expand(C, -1, -1)      # SOS a photo of . EOS 0
        x = torch.cat([words[:, :4], self.vectors, words[:, 4:77 - L]], dim=1)        # (C, 77, width)
        x = (x + self.clip.positional_embedding).permute(1, 0, 2)
        x = self.clip.ln_final(self.clip.transformer(x).permute(1, 0, 2))
        return F.normalize((x[:, 5 + L] @ self.clip.text_projection).float(), dim=-1)

    def regions(self, images, labels, eps):
        """-> foregrounds and backgrounds: lists of a class and the regions (n, 3, H, W) of its images"""
        maps = F.interpolate(self.S(images)[0], (self.size, self.size), mode="bilinear",
                             align_corners=True)                                      # (B, C, H, W)
        x = (images - self.mean) / self.std
        fore, back = [], []
        for k in range(labels.shape[1]):
            b = labels[:, k].nonzero().flatten().to(images.device)
            if len(b):
                low, high = maps[b, k].amin((1, 2), keepdim=True), maps[b, k].amax((1, 2), keepdim=True)
                mask = ((maps[b, k] - low) / (high - low + eps))[:, None]
                fore.append((k, mask * x[b]))
                back.append((k, (1 - mask) * x[b]))
        return fore, back

    def pull(self, regions, u):
        return sum(-similarity(self.image(x), u[k]).log().sum() for k, x in regions)

    def push(self, regions, u):
        return sum(-(1 - similarity(self.image(x), u[k])).log().sum() for k, x in regions)

    def match(self, images, labels):
        fore, back = self.regions(images, labels, EPS)
        loss = self.pull(fore, self.class_texts()) + LAMBDA_B * self.push(back, self.class_texts())
        return loss / labels.sum()

    def refine(self, images, labels):
        fore, back = self.regions(images, labels, EPS)
        match = self.pull(fore, self.class_texts()) + LAMBDA_B * self.push(back, self.class_texts())
        return (match + LAMBDA * self.push(fore, self.prompts())) / labels.sum()

    def prompt(self, images, labels):
        with torch.no_grad():
            _, back = self.regions(images, labels, EPS_PROMPT)
        u_b, u_f = self.prompts(), self.class_texts()
        away = sum(-(1 - similarity(u_b[k], u_f[k])).log() * len(x) for k, x in back)
        return (self.pull(back, u_b) + LAMBDA_T * away) / labels.sum()


def similarity(a, b):
    return F.cosine_similarity(a, b, dim=-1).clamp(1e-4, 1 - 1e-4)


SIDES = {"plain": Plain, "here": Here}


# ---------------------------------------------------------------- measuring

class Bench:
    """Both sides, from the same weights, on one batch."""

    def __init__(self, args):
        self.args, self.device, self.made = args, torch.device(args.device), {}
        self.labels = inputs.multi_hot(inputs.deal(args.batch, args.pairs))
        self.images = torch.rand(args.batch, 3, SIZE, SIZE).to(self.device)

    def side(self, name):
        if name not in self.made:
            model, C = inputs.random_clip(), inputs.CLASSES
            S = generator.DeiT(C).to(self.device).train()
            vectors = torch.rand(C, 30, model.transformer.width).to(self.device)
            self.made[name] = SIDES[name](model, S, vectors, texts.class_texts(folders.VOC_CLASSES))
        return self.made[name]

    def step(self, side, name):
        side, dtype = self.side(side), processes.DTYPES[self.args.amp]
        with torch.autocast(self.device.type, dtype, enabled=self.args.amp != "off"):
            loss = getattr(side, name)(self.images, self.labels)
        loss.backward()
        side.optimizers[name].step()
        side.optimizers[name].zero_grad(set_to_none=True)

    def peak(self, side, name):
        """GB that a process of its own needs for two steps."""
        command = [sys.executable, "-W", "ignore", "-m", "bench.steps", *sys.argv[1:], "--peak-of", side,
                   name]
        done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return float(done.stdout.split()[-1])

    def two_steps(self, side, name):
        """What `peak` runs -> GB"""
        self.step(side, name)
        self.step(side, name)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def measure(self, jobs):
        """Jobs (side, step) -> {job: (GFLOP, seconds of each round, peak GB)}"""
        peaks = {job: self.peak(*job) for job in jobs}        # first: a child starts with our resident set
        for job in jobs:
            self.step(*job)                                   # warms up; `stored` encodes its features
        count = {job: tables.gflop(lambda job=job: self.step(*job)) for job in jobs}
        ways = {job: lambda job=job: [self.step(*job) for _ in range(self.args.steps)] for job in jobs}
        times = tables.take_turns(ways, self.args.rounds, self.device)
        return {job: (count[job], [s / self.args.steps for s in times[job]], peaks[job]) for job in jobs}


def add_views(found):
    """The mean step of (b) with stored views. A step with fresh crops has the encoding more, and each of the
    views is encoded once."""
    fresh, stored = found["here", "prompt"], found["here", "stored"]

    def mean(a, b):
        return b + VIEWS / EPOCHS * (a - b)

    times = [mean(a, b) for a, b in zip(fresh[1], stored[1])]
    found["here", "views"] = mean(fresh[0], stored[0]), times, fresh[2]


def make_table(found, rows):
    head = ["step", "GFLOP plain", "here", "seconds plain", "here", "plain / here", "peak GB plain", "here",
            "TFLOP/s plain", "here"]
    lines = []
    for row in rows:
        sides = [found[job] for job in zip(SIDES, ROWS[row])]
        count, times, peaks = zip(*sides)
        median = [statistics.median(s) for s in times]
        lines.append([row, *(f"{n:,.0f}" for n in count), *(f"{s:.3g}" for s in median),
                      f"{tables.ratio(*times):.1f}", *(f"{gb:.2f}" for gb in peaks),
                      *(f"{n / 1e3 / s:.3g}" for n, s in zip(count, median))])
    return markdown.table(head, lines)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--rows", nargs="+", choices=["a", "b", "c"], default=["a", "b", "c"])
    p.add_argument("--batch", type=flags.positive, default=4, help="images of a step")
    p.add_argument("--pairs", type=flags.positive, default=7, help="pairs of an image and a class in it")
    p.add_argument("--rounds", type=flags.positive, default=3)
    p.add_argument("--steps", type=flags.positive, default=1, help="steps of a side in a turn")
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", choices=["off", "bf16"], default="off")
    p.add_argument("--peak-of", nargs=2, metavar=("SIDE", "STEP"),
                   help="two steps in this process (used for the peaks)")
    return p.parse_args()


def main():
    args = parse()
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")                   # as processes.Run does
    bench = Bench(args)
    if args.peak_of:
        return print(bench.two_steps(*args.peak_of))
    rows = [row for row in ROWS if row[0] in args.rows]
    jobs = dict.fromkeys(job for row in rows for job in zip(SIDES, ROWS[row]) if job[1] != "views")
    found = bench.measure(list(jobs))
    if "b" in args.rows:
        add_views(found)
    facts = (f"{args.batch} images, {args.pairs} pairs, {inputs.CLASSES} classes, amp {args.amp}; "
             f"{args.rounds} rounds of {args.steps} steps.")
    tables.show("bench.steps", args.write, make_table(found, rows), facts, args.device)


if __name__ == "__main__":
    main()
