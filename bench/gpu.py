"""Everything on one device: seconds, peak memory and share of the matrix peak of each part, by --amp, with
and without torch.compile; the hours of VOC and COCO that follow; the toy run and the tests of a device.

On a GPU at the real shapes: DeiT-S, ViT-B/32 and ViT-B/16, 20 classes, 224 px, 64 images with 100 pairs; maps
and masks of 375x500; 4 million pixels of VPL. On a CPU tiny networks, to see that all of it runs. Random
weights and images, which lie on the device. What <out>/gpu.json holds is not measured again.

    python -m bench.gpu --device cuda --write
    python -m bench.gpu --device cpu --out runs/bench_cpu --minutes 2
"""
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import train_seg
from bench import inputs, maps, prototypes, steps, tables
from plumbing import files, flags, folders, markdown, networks, processes
from wsss import clip_model, crf, generator, gradcam, losses, texts

REAL = {"clip32": {"patch": 32}, "clip16": {"patch": 16}, "deit": {}, "crop": 224, "batch": 64, "pairs": 100,
        "size": (375, 500), "maps": 16, "pixels": 4_000_000, "channels": 512, "matrix": 8192, "seconds": 2.0,
        "deeplab": ("deeplabv2_resnet101", 10, 321), "decoder": (6, 320)}
TOWER = {"patch": 8, "embed_dim": 16, "image_resolution": 32, "vision_layers": 9, "vision_width": 64,
         "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
SMALL = {"clip32": TOWER, "clip16": TOWER, "deit": networks.TINY, "crop": 32, "batch": 4, "pairs": 6,
         "size": (40, 56), "maps": 2, "pixels": 2000, "channels": 16, "matrix": 256, "seconds": 0.0,
         "deeplab": ("deeplab_toy", 2, 33), "decoder": (2, 32)}
SCALES, WIDTH = [1.0, 1.2], 256
VOC, COCO = SimpleNamespace(images=10582, pairs=1.55), SimpleNamespace(images=82081, pairs=2.9)
MEAN = SimpleNamespace(mean=lambda values, where: torch.where(where, values, 0).sum() / where.sum())  # Run's


class Bench:
    """What the parts share: the shapes, the device, the batch."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.of = SimpleNamespace(**(REAL if self.device.type == "cuda" else SMALL))
        self.labels = inputs.multi_hot(inputs.deal(self.of.batch, self.of.pairs))
        self.present = self.labels.to(self.device)

    def clip(self, name):
        return clip_model.FrozenClip(inputs.random_clip(**getattr(self.of, name))).to(self.device)

    def generator(self):
        torch.manual_seed(0)
        return generator.DeiT(inputs.CLASSES, **self.of.deit).to(self.device)

    def images(self, count, height, width):
        return torch.rand(count, 3, height, width, device=self.device)

    def follow(self, loss_of, optimizer, amp):
        """-> a training step as the stages make it."""
        run = SimpleNamespace(device=self.device, amp=amp)
        scaler = processes.Run.scaler(run)

        def step():
            with processes.Run.autocast(run):
                loss = loss_of()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return step

    # -- a part is a function without arguments, and how many images it takes

    def semples(self, name, amp, compiled=False):
        model, S = inputs.random_clip(**self.of.clip32), self.generator().train()
        vectors = torch.rand(inputs.CLASSES, 30, model.transformer.width, device=self.device)
        here = steps.Here(model, S, vectors, texts.class_texts(folders.VOC_CLASSES))
        if compiled:
            here.S, here.clip.encode_normalized = (torch.compile(f) for f in (S, here.clip.encode_normalized))
        images = self.images(self.of.batch, self.of.crop, self.of.crop)
        return self.follow(lambda: getattr(here, name)(images, self.labels), here.optimizers[name],
                           amp), self.of.batch

    def cls(self, amp):
        S = self.generator().train()
        optimizer = torch.optim.AdamW(generator.parameters_to_train(S, True), 1e-4)
        images = self.images(self.of.batch, self.of.crop, self.of.crop)

        def loss_of():
            return sum(losses.cls_loss(z, self.present).mean() for z in S(images, from_labels=True)[1])
        return self.follow(loss_of, optimizer, amp), self.of.batch

    def maps_of_s(self, amp, count):
        S, images = self.generator().eval(), self.images(count, *self.of.size)
        k = torch.arange(2 * count, device=self.device).view(-1, 2) % inputs.CLASSES
        return self.look(lambda: maps.in_batches(S, images, k, SCALES, count), amp), count

    def maps_of_clip(self, amp, count):
        clip, images = self.clip("clip16"), self.images(count, *self.of.size)
        width = clip.model.text_projection.shape[1]
        columns = torch.randn(inputs.CLASSES + maps.BACKGROUNDS, width, device=self.device)
        columns = F.normalize(columns, dim=1)
        b = torch.arange(count, device=self.device).repeat_interleave(2)
        k = torch.arange(2 * count, device=self.device) % inputs.CLASSES

        def make():
            x, attention, grid = gradcam.last_inputs(clip, images)
            return gradcam.class_maps(clip, x, attention, grid, columns, inputs.CLASSES, b, k, 100, 0.4)
        return self.look(make, amp), count

    def look(self, function, amp):
        run = SimpleNamespace(device=self.device, amp=amp)

        @torch.no_grad()
        def step():
            with processes.Run.autocast(run):
                function()
        return step

    def descent(self):
        step = prototypes.step_of(self.of.pixels, self.of.channels, inputs.CLASSES + maps.BACKGROUNDS,
                                  self.device)
        return step, None

    def dense_crf(self):
        image = (255 * self.images(1, *self.of.size)[0].permute(1, 2, 0)).byte().cpu().numpy()
        probability = torch.rand(3, *self.of.size).softmax(0).numpy()
        return lambda: crf.dense_crf(image, probability, "deeplab", backend="torch", device=self.device), 1

    def deeplab(self, amp):
        name, count, crop = self.of.deeplab
        model = networks.new_segmenter(name, inputs.CLASSES).to(self.device).train()
        model.freeze_batchnorm()
        optimizer = torch.optim.SGD(model.groups(2.5e-4), momentum=0.9)
        images, masks = self.images(count, crop, crop), self.masks(count, crop)

        def loss_of():
            outputs = model(images)
            targets = (train_seg.labels_on_grid(masks, z.shape[2:]) for z in outputs)
            return sum(train_seg.pixel_loss(z, target, MEAN) for z, target in zip(outputs, targets))
        return self.follow(loss_of, optimizer, amp), count

    def decoder(self, amp):
        count, crop = self.of.decoder
        clip = self.clip("clip16")
        W = F.normalize(torch.randn(inputs.CLASSES + maps.BACKGROUNDS, self.of.channels), dim=1)
        content = {"model": {"prototypes": W}, "classes": folders.VOC_CLASSES, "tau_i": 0.03}
        model = networks.new_decoder(clip, content, WIDTH, "raw").to(self.device).train()
        optimizer = torch.optim.AdamW(model.groups(2e-3))
        images, masks = self.images(count, crop, crop), self.masks(count, crop)
        W = model.prototypes[:inputs.CLASSES]

        def loss_of():
            logits, coarse, V = model(images)
            P = losses.region_embeddings(V, coarse.softmax(1)[:, 1:])
            present = train_seg.present_classes(masks, inputs.CLASSES)
            return train_seg.pixel_loss(logits, masks, MEAN) + losses.region_contrast(P, W, present, 0.07)
        return self.follow(loss_of, optimizer, amp), count

    def masks(self, count, side):
        return torch.randint(inputs.CLASSES + 1, (count, side, side), device=self.device)


def parts(bench):
    """{name: (the function that makes the part, its arguments)}"""
    gpu, many = bench.device.type == "cuda", bench.of.maps
    half = ["bf16", "fp16", "off"] if gpu else ["off"]
    found = {}
    for step, name in (("(a)", "match"), ("(b), fresh crops", "prompt"), ("(b), stored", "stored"),
                       ("(c)", "refine")):
        found |= {f"{step} {amp}": (bench.semples, name, amp) for amp in half}
        if gpu and name in ("match", "refine"):
            found[f"{step} {half[0]}, compiled"] = (bench.semples, name, half[0], True)
    found |= {f"train_cls.py {amp}": (bench.cls, amp) for amp in half}
    for amp in half[::2]:
        found |= {f"S's maps, {n} a batch, {amp}": (bench.maps_of_s, amp, n) for n in (1, many)}
        found |= {f"CLIP's maps, {n} a batch, {amp}": (bench.maps_of_clip, amp, n) for n in (1, many)}
    found |= {f"VPL, a step over {bench.of.pixels:,} pixels": (bench.descent,), "CRF": (bench.dense_crf,)}
    found |= {f"DeepLab {half[0]}": (bench.deeplab, half[0]), f"decoder {half[0]}": (bench.decoder, half[0])}
    return found


# ---------------------------------------------------------------- measuring

def finished(of):
    """What failed is tried again by the next call."""
    return of is not None and "error" not in of and not of.get("code")


def measure(bench, make, *args):
    """-> seconds, images, peak GB (of a GPU), GFLOP"""
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, images = make(*args)
    for _ in range(3 if bench.device.type == "cuda" else 1):
        step()
    times, start = [], time.time()
    while len(times) < 3 or time.time() - start < bench.of.seconds:
        times.append(tables.seconds(step, bench.device))
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None
    compiled = bool(args) and args[-1] is True                # torch does not count inside of it
    gflop = None if compiled else tables.gflop(step)
    return {"seconds": statistics.median(times), "images": images, "peak": peak, "gflop": gflop}


def matrix_peak(bench):
    """TFLOP/s of a bf16 product of square matrices, float32 on a CPU: the most that this device gives."""
    n, dtype = bench.of.matrix, torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=bench.device, dtype=dtype)
    times = [tables.seconds(lambda: a @ a, bench.device) for _ in range(20)]
    return {"tflops": 2 * n ** 3 / statistics.median(times) / 1e12}


def run_command(command, **environment):
    """-> seconds, the last line of its output; its failure is a result, too."""
    start = time.time()
    done = subprocess.run(command, cwd=files.ROOT, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).strip().splitlines() or [""]
    return {"seconds": time.time() - start, "code": done.returncode, "said": lines[-1][-200:]}


def toy_run(device, out):
    found = run_command(["bash", "run_toy.sh", "--device", device], DATA=str(out / "toy_data"),
                        OUT=str(out / "toy"))
    scores = {"maps": "toy/eval_cam_refine_train.json", "network": "toy/eval_seg_val.json",
              "decoder": "toy/vpl/eval_seg_val.json"}
    scores = {name: 100 * files.read_json(out / path)["miou"] for name, path in scores.items()
              if (out / path).exists()}
    said = ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
    return {**found, "said": said or found["said"]}


# ---------------------------------------------------------------- tables

def part_table(found, peak):
    rows = []
    for name, of in found.items():
        if "error" in of:
            rows.append([name, of["error"], "", "", "", ""])
        if "images" not in of:
            continue
        rate = of["gflop"] / 1e3 / of["seconds"] if of["gflop"] else None
        rows.append([name, f"{1e3 * of['seconds']:.3g}",
                     f"{of['images'] / of['seconds']:,.3g}" if of["images"] else "",
                     "" if of["peak"] is None else f"{of['peak']:.2f}", f"{rate:.3g}" if rate else "",
                     f"{100 * rate / peak:.1f} %" if rate else ""])
    return markdown.table(["part", "ms", "images/s", "peak GB", "TFLOP/s", "of the matrix peak"], rows)


def hours_table(found, bench):
    """Whole runs, from the parts. (a), (b) and (c) grow with pairs as their operations do; COCO's 80 classes
    are left out; no loader is waited for."""
    amp = "bf16" if bench.device.type == "cuda" else "off"
    size, many = bench.of.batch, bench.of.maps
    seconds = {name: of["seconds"] / (of["images"] or 1) for name, of in found.items() if "images" in of}
    rows, here = [], bench.of.pairs / size
    for name, part, epochs, per_pair in (                     # the share of operations that grows with pairs
            ("train_cls.py, 60 epochs", f"train_cls.py {amp}", 60, 0),
            ("(a), 60 epochs", f"(a) {amp}", 60, 0.85), ("(c), 60 epochs", f"(c) {amp}", 60, 0.85),
            ("(b), 8 views", f"(b), fresh crops {amp}", 8, 0.57),
            ("(b), 60 stored epochs", f"(b), stored {amp}", 60, 0),
            ("S's maps", f"S's maps, {many} a batch, {amp}", 1, 0),
            ("CLIP's maps", f"CLIP's maps, {many} a batch, {amp}", 1, 0), ("CRF masks", "CRF", 1, 0)):
        hours = [epochs * data.images * seconds.get(part, math.nan) / 3600
                 * (1 - per_pair + per_pair * data.pairs / here) for data in (VOC, COCO)]
        rows.append([name, *(f"{each:.3g}" for each in hours)])
    for name, part, count in (("VPL's 3,000 steps", f"VPL, a step over {bench.of.pixels:,} pixels", 3000),
                              ("DeepLab, 20,000 and 100,000 steps", f"DeepLab {amp}", 20_000),
                              ("VPL's decoder, 30,000 steps", f"decoder {amp}", 30_000)):
        voc = count * found[part].get("seconds", math.nan) / 3600
        rows.append([name, f"{voc:.3g}", f"{voc * (5 if part.startswith('DeepLab') else 1):.3g}"])
    return markdown.table(["hours, extrapolated", "VOC", "COCO"], rows)


def show(found, bench, write):
    peak = found["matrix peak"].get("tflops", math.nan)
    facts = (f"{bench.of.batch} images with {bench.of.pairs} pairs at {bench.of.crop} px, maps and masks of "
             f"{bench.of.size[0]}x{bench.of.size[1]}; matrix peak {peak:.3g} TFLOP/s.")
    for name in ("tests", "toy run"):
        if name in found:
            facts += f" {name.capitalize()}: {found[name]['seconds']:.0f} s, {found[name]['said']}."
    table = f"{part_table(found, peak)}\n\n{hours_table(found, bench)}"
    tables.show("bench.gpu", write, table, facts, bench.device)


def parse():
    p = tables.parser(__doc__)
    p.add_argument("--device", default="cuda")
    p.add_argument("--out", type=Path, help="where figures are kept (default: runs/bench_cuda, _cpu)")
    p.add_argument("--minutes", type=flags.above_zero, default=9,
                   help="no part is begun after this time: the next call goes on")
    p.add_argument("--parts-only", action="store_true", help="without the tests and the toy run")
    args = p.parse_args()
    args.out = args.out or files.ROOT / f"runs/bench_{torch.device(args.device).type}"
    return args


def main():
    args = parse()
    start, bench = time.time(), Bench(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    found = files.read_json(path) if path.exists() else {"machine": {"name": tables.machine(bench.device)}}
    if found["machine"]["name"] != tables.machine(bench.device):
        sys.exit(f"{path} holds figures of {found['machine']['name']}: give another --out")
    pytest = [sys.executable, "-m", "pytest", "-q", "tests/test_device.py"]
    todo = {} if args.parts_only else {
        "tests": lambda: run_command(pytest, TEST_DEVICE=args.device),
        "toy run": lambda: toy_run(args.device, args.out.resolve())}
    todo["matrix peak"] = lambda: matrix_peak(bench)
    todo |= {name: lambda part=part: measure(bench, *part) for name, part in parts(bench).items()}
    left = [name for name in todo if not finished(found.get(name))]
    for n, name in enumerate(left):
        if time.time() - start > 60 * args.minutes:
            return print(f"{path}: {len(left) - n} parts are left: run the same command again")
        print(f"{time.time() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
        try:
            found[name] = todo[name]()
        except Exception as error:                            # no compiler, no memory: the others go on
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {files.first_line(error)}"}
        files.save_json(path, found)
    show(found, bench, args.write)


if __name__ == "__main__":
    main()
