"""Time and memory of a training step of SemPLeS (a), (b), (c), beside the same step written straight down.

DeiT-S, ViT-B/32, 224 px, 20 classes, random weights and pictures. Both sides compute the same loss and the same gradients (tests/test_steps.py).
`here` makes the calls of train_match.py, train_prompt.py and train_refine.py; bench/flops.py counts as many operations in the stages themselves.
`plain` is the method by its equations, the way public code has it:

    each term of a loss encodes what it compares    class texts at every step, in (c) the foreground twice
    a loop over the classes                         after the maps of all C were resized
    CLIP's own text encoder                         all 77 tokens; in (c) too all prompts, with a graph
    frozen is what no optimizer has                 CLIP's weights get gradients that nobody reads, S's backbone records a graph that nobody walks

By torch.utils.flop_counter this makes about 650 / 700 / 1,190 GFLOP at 4 pictures with 7 pairs; the public steps, from reading what they compute, 652 / 693 / 1,224.

The sides take turns in one process, `--rounds` times after a warm-up; times and ratios are medians over the rounds. Peak memory is of a process that does
nothing but two steps of one side: on a CPU its largest resident set, python, torch and the weights included; on a GPU what torch allocated. Pictures lie
ready for both, though a stage with stored features reads none after the first epochs. `b stored` is an epoch on features that are there; `b 60 epochs` is
all of (b), 60 epochs on 8 views, their encoding included.

    python bench/steps.py                                                  # 4 pictures with 7 pairs, minutes on a CPU
    python bench/steps.py --rows b --rounds 5 --write
    python bench/steps.py --device cuda --amp bf16 --rows a c --pictures 64 --pairs 100 --steps 100 --peak 989
    python bench/steps.py --device cuda --amp bf16 --rows b --pictures 128 --pairs 199 --steps 100 --peak 989

From 100 steps a turn on a last column has the minutes that 60 epochs of VOC (10,582 pictures) take at this batch if reading pictures keeps up.
"""
import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import clip as openai_clip
import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from ablations.pairs import write  # noqa: E402
import train_prompt  # noqa: E402
from plumbing import folders, processes  # noqa: E402
from wsss import clip_model, generator, losses, texts as names  # noqa: E402

LAMBDA_B, LAMBDA_T, LAMBDA, EPS, EPS_PROMPT = 2.4, 0.02, 0.05, 0.1, 1e-4              # VOC
TEXTS = names.class_texts(folders.VOC_CLASSES)
VIEWS, EPOCHS, PICTURES = 8, 60, 10582
STEPS = {"a": ["match"], "b": ["prompt", "stored"], "c": ["refine"]}                  # `plain` has no stored features: its step of (b) is `prompt`


def optimizers(last, prompts):
    """What steps after which loss, as in the stages."""
    last, prompts = (processes.adamw([{"params": weights}], argparse.Namespace(lr=lr, weight_decay=0.03)) for weights, lr in ((last, 6.4e-5), (prompts, 0.025)))
    return {"match": last, "refine": last, "prompt": prompts, "stored": prompts}


class Here:
    """The steps by the calls of the stages."""

    def __init__(self, model, S, vectors, texts, autocast):
        self.clip, self.S, self.autocast, self.features = clip_model.FrozenClip(model).to(vectors.device), S, autocast, None
        self.prompts = clip_model.BackgroundPrompts(self.clip, *vectors.shape[:2])
        self.prompts.vectors.data.copy_(vectors)
        self.class_text = self.clip.encode_text(texts)                                # u_f (C, D), once
        with torch.no_grad():
            self.fixed = self.prompts()                                               # u_b (C, D), once
        self.optimizers = optimizers([w for _, w in generator.parameters_to_train(S)], self.prompts.parameters())

    def match(self, images, labels, refine=0.0):
        b, k = (x.to(images.device, non_blocking=True) for x in labels.nonzero(as_tuple=True))
        with self.autocast():
            maps = F.interpolate(self.S(images)[0][b, k][:, None], self.clip.size, mode="bilinear")[:, 0]
            regions = losses.split_regions(self.clip.normalize(images)[b], losses.mask_from_map(maps, EPS))
            v_f, v_b = self.clip.encode_normalized(torch.cat(regions)).chunk(2)
        return processes.mean(losses.match_loss(v_f, v_b, self.class_text[k], LAMBDA_B)) + refine * processes.mean(losses.refine_loss(v_f, self.fixed[k]))

    def refine(self, images, labels):
        return self.match(images, labels, LAMBDA)

    def encode(self, images, labels):
        b, k = (x.to(images.device, non_blocking=True) for x in labels.nonzero(as_tuple=True))
        with self.autocast():
            return train_prompt.encode_background(self.clip, self.S, images, b, k, argparse.Namespace(mask_eps=EPS_PROMPT, mask_fill="mean", micro_batch=0))[0]

    def prompt(self, images, labels):
        return self.prompt_loss(self.encode(images, labels), labels)

    def stored(self, images, labels):
        self.features = self.encode(images, labels) if self.features is None else self.features
        return self.prompt_loss(self.features, labels)

    def prompt_loss(self, v_b, labels):
        k = labels.nonzero()[:, 1]
        present, at = k.unique(return_inverse=True)
        k, present, at = (x.to(v_b.device, non_blocking=True) for x in (k, present, at))
        with self.autocast():
            u_b = self.prompts(present)[at]
        return processes.mean(losses.prompt_loss(u_b, v_b, self.class_text[k], LAMBDA_T))


class Plain:
    """The steps by the equations, term by term."""

    def __init__(self, model, S, vectors, texts, autocast):
        self.clip, self.S, self.autocast = model.to(vectors.device).eval().requires_grad_(True), S.requires_grad_(True), autocast
        self.vectors, self.side = torch.nn.Parameter(vectors.clone()), model.visual.input_resolution
        self.tokens, self.frame = (openai_clip.tokenize(x).to(vectors.device) for x in (texts, "a photo of ."))       # (C, 77), (1, 77)
        self.mean, self.std = (torch.tensor(x, device=vectors.device).view(3, 1, 1) for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
        blocks = S.run_blocks

        def detached(images):
            tokens, *rest = blocks(images)
            return tokens.detach(), *rest
        S.run_blocks = detached
        self.optimizers = optimizers([w for name, w in S.named_parameters() if name.startswith(S.trains_when_frozen)], [self.vectors])

    def image(self, regions):
        with self.autocast():
            return F.normalize(self.clip.encode_image(regions).float(), dim=-1)

    def class_texts(self):
        with torch.no_grad(), self.autocast():
            return F.normalize(self.clip.encode_text(self.tokens).float(), dim=-1)    # (C, D)

    def prompts(self):
        C, L, _ = self.vectors.shape
        with self.autocast():
            words = self.clip.token_embedding(self.frame).detach().expand(C, -1, -1)  # SOS a photo of . EOS 0 0 ...
            x = torch.cat([words[:, :4], self.vectors, words[:, 4:77 - L]], dim=1) + self.clip.positional_embedding
            x = self.clip.ln_final(self.clip.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
            return F.normalize((x[:, 5 + L] @ self.clip.text_projection).float(), dim=-1)

    def regions(self, images, labels, eps):
        """-> foregrounds and backgrounds, each a list of a class and the regions (n, 3, H, W) of the pictures that hold it"""
        with self.autocast():
            maps = F.interpolate(self.S(images)[0], (self.side, self.side), mode="bilinear")           # (B, C, H, W)
        fore, back, x = [], [], (images - self.mean) / self.std
        for k in range(labels.shape[1]):
            b = labels[:, k].nonzero().flatten().to(images.device)
            if len(b):
                low, high = maps[b, k].amin((1, 2), keepdim=True), maps[b, k].amax((1, 2), keepdim=True)
                mask = ((maps[b, k] - low) / (high - low + eps))[:, None]
                fore.append((k, mask * x[b])), back.append((k, (1 - mask) * x[b]))
        return fore, back

    def pull(self, regions, u):
        return sum(-similarity(self.image(x), u[k]).log().sum() for k, x in regions)

    def push(self, regions, u):
        return sum(-(1 - similarity(self.image(x), u[k])).log().sum() for k, x in regions)

    def match(self, images, labels):
        fore, back = self.regions(images, labels, EPS)
        return (self.pull(fore, self.class_texts()) + LAMBDA_B * self.push(back, self.class_texts())) / labels.sum()

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


def networks(device):
    """-> CLIP ViT-B/32, DeiT-S and the prompts' vectors, at random, the same at every call."""
    torch.manual_seed(0)
    model = CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32, context_length=77, vocab_size=49408,
                 transformer_width=512, transformer_heads=8, transformer_layers=12)
    return model, generator.build_generator("deit_small", len(TEXTS)).to(device).train(), torch.rand(len(TEXTS), 30, 512).to(device)


def batch(pictures, pairs, classes, size):
    """-> images (B, 3, size, size) and labels (B, C), on the CPU, of as many classes as can be."""
    labels, k = torch.zeros(pictures, classes, dtype=torch.long), itertools.cycle(range(classes))
    for n in range(pictures):
        labels[n, list(itertools.islice(k, pairs // pictures + (n < pairs % pictures)))] = 1
    return torch.rand(pictures, 3, size, size), labels


def step(side, name, images, labels):
    with side.autocast():                                         # around all: what is inside keeps the weights that it has cast
        loss = getattr(side, name)(images, labels)
    loss.backward()
    side.optimizers[name].step(), side.optimizers[name].zero_grad(set_to_none=True)


def seconds(side, name, args, images, labels):
    """Of a step, mean over --steps."""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(args.steps):
        step(side, name, images, labels)
    wait()
    return (time.perf_counter() - start) / args.steps


def counted(*call):
    with FlopCounterMode(display=False) as counter:
        step(*call)
    return counter.get_total_flops() / 1e9


def peak(side, name):
    """GB of a fresh process that does two steps of one side."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--peak-of", side, name], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else sys.exit(done.stderr)


def two_steps(args, images, labels, prepare):
    """What `peak` runs."""
    side, name = args.peak_of
    side = prepare(side)
    for _ in range(2):
        step(side, name, images, labels)
    print(torch.cuda.max_memory_allocated() / 1e9 if images.is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def table(args, gflop, times, peaks):
    """Markdown. times[side, step]: seconds by round."""
    times = dict(times)
    if ("here", "stored") in times:                               # encoding is what a step with fresh crops has more; an epoch has as many steps as another
        times["here", "all"] = [(VIEWS * (fresh - known) + EPOCHS * known) / EPOCHS for fresh, known in zip(times["here", "prompt"], times["here", "stored"])]
        gflop = {**gflop, ("here", "all"): gflop["here", "stored"] + VIEWS / EPOCHS * (gflop["here", "prompt"] - gflop["here", "stored"])}
        peaks = {**peaks, ("here", "all"): peaks["here", "prompt"]}
    names = {"match": "a", "prompt": "b fresh crops", "stored": "b stored", "all": f"b {EPOCHS} epochs, {VIEWS} views", "refine": "c"}
    lines = ["| step | GFLOP plain | here | seconds plain | here | plain / here | peak GB plain | here | TFLOP/s plain | here | "
             + ("of peak plain | here | " if args.peak else "") + ("VOC minutes plain | here |" if args.steps >= 100 else "")]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, title in names.items():
        if ("here", name) not in times:
            continue
        sides = ("plain", name if ("plain", name) in times else "prompt"), ("here", name)
        ratio = statistics.median(a / b for a, b in zip(*(times[side] for side in sides)))
        second = [statistics.median(times[side]) for side in sides]
        rate = [gflop[side] / 1e3 / s for side, s in zip(sides, second)]
        cells = [title, *(f"{gflop[side]:,.0f}" for side in sides), *(f"{s:.3g}" for s in second), f"{ratio:.1f}", *(f"{peaks[side]:.2f}" for side in sides), *(f"{r:.3g}" for r in rate)]
        cells += [f"{100 * r / args.peak:.1f} %" for r in rate] if args.peak else []
        cells += [f"{EPOCHS * (PICTURES // args.pictures) * s / 60:.1f}" for s in second] if args.steps >= 100 else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=list(STEPS), default=list(STEPS))
    p.add_argument("--pictures", type=int, default=4)
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=1, help="steps of a side in a turn")
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", choices=["off", "bf16"], default="off")
    p.add_argument("--peak", type=float, help="TFLOP/s that the device could do at this precision, for the share of it (H100, H200 in bf16: 989)")
    p.add_argument("--write", action="store_true", help="put the table between its marks in docs/results.md")
    p.add_argument("--peak-of", nargs=2, metavar=("SIDE", "STEP"), help="two steps in this process (used for the peaks)")
    return p.parse_args()


def main():
    args = parse()
    device = torch.device(args.device)
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")                   # as processes.Env does for a CPU
    images, labels = batch(args.pictures, args.pairs, len(TEXTS), 224)
    images = images.to(device)

    def prepare(side):
        return SIDES[side](*networks(device), TEXTS, lambda: torch.autocast(device.type, processes.AMP[args.amp], enabled=args.amp != "off"))

    if args.peak_of:
        return two_steps(args, images, labels, prepare)
    jobs = [(side, name) for row in args.rows for name in STEPS[row] for side in SIDES if hasattr(SIDES[side], name)]
    peaks = {job: peak(*job) for job in jobs}                     # first: a process starts with the resident set of the one that started it
    sides, gflop, times = {side: prepare(side) for side in SIDES}, {}, {job: [] for job in jobs}
    for row in args.rows:
        turn = [job for job in jobs if job[1] in STEPS[row]]
        for side, name in turn:
            if name == "stored":
                step(sides[side], name, images, labels)           # encodes, once
            gflop[side, name] = counted(sides[side], name, images, labels)            # and warms up
        for n in range(args.rounds):
            for side, name in turn[::-1 if n % 2 else 1]:
                times[side, name].append(seconds(sides[side], name, args, images, labels))
    text = table(args, gflop, times, peaks)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.pictures} pictures, {args.pairs} pairs, {len(TEXTS)} classes, amp {args.amp}; {hardware}, torch {torch.__version__}; {args.rounds} rounds of {args.steps}\n")
    print(text)
    if args.write:
        write("bench/steps.py", text)


if __name__ == "__main__":
    main()
