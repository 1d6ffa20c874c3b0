"""The plumbing that every stage shares and no paper describes: flags, processes, precision, whole files, checkpoints, log.

    args = common.parser(__doc__, batch_size=64).parse_args()
    env = common.Env(args)                                   # device, rank, precision; torchrun or plain python
    loss = common.mean(losses.match_loss(...))               # over the pairs of all ranks
    common.save(args.out / "match.pt", stage="match", ...)   # whole or not at all
    common.run(main)                                         # bad input: one line and exit 1
"""
import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import math
import os
import pickletools
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from concurrent import futures
from multiprocessing import forkserver
from pathlib import Path

try:
    import fcntl
except ImportError:
    sys.exit("this system has no fcntl: the scripts run on Linux, on Windows under WSL")
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
MADE_BY = {  # finished weights -> the script to run when they are missing
    "cls.pt": "train_cls.py", "match.pt": "train_match.py", "prompts.pt": "train_prompt.py", "refine.pt": "train_refine.py",
    "prototypes.pt": "vpl.py", "seg.pt": "train_seg.py",
}
# Flags that say where and how fast, not what: two runs that differ only in these give the same numbers.
NOT_THE_RECIPE = ("data", "out", "workers", "device", "deterministic", "resume", "save_every", "log_every")


# ---------------------------------------------------------------- flags

def parser(doc, split="train_aug", batch_size=1, data=True):
    """The flags that all scripts share; the docstring of the script is its manual page. data=False: --data may be left out."""
    class Manual(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    p = argparse.ArgumentParser(description=doc, formatter_class=Manual)
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", type=Path, required=data, help="data folder in VOC layout (prepare_data.py check DIR says what is wrong with one)")
    g.add_argument("--out", type=Path, required=True, help="folder that all stages of a run share")
    g.add_argument("--split", default=split, help="list in ImageSets/Segmentation to work on")
    g.add_argument("--batch-size", type=positive, default=batch_size, help="pictures a step, over all processes together")
    g.add_argument("--workers", type=natural, default=4, help="loader or CRF processes for each process; 0: none")
    g.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda; auto takes a GPU if there is one")
    g.add_argument("--amp", choices=list(AMP), default="bf16", help="precision of the networks; losses are always float32")
    g.add_argument("--deterministic", action="store_true", help="on a GPU the same bits in each run, where PyTorch can, at the price of time; a CPU gives them anyway")
    g.add_argument("--limit", type=natural, default=0, help="only the first N pictures, for a look; 0: all")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on from what --out holds; --no-resume starts this stage again")
    return p


def matching(p, mask_eps=0.1):
    """The flags of the stages that show CLIP the regions of a mask."""
    g = p.add_argument_group("CLIP and masks")
    g.add_argument("--clip", default="ViT-B/32", help="OpenAI name, or a file with CLIP's weights")
    g.add_argument("--template", default="a photo of {}.", help="text of a class")
    g.add_argument("--pool", choices=["max", "avg"], help="pooling of S's attention fusion; left out: what the file of S says, else max (max: VOC, avg: COCO)")
    g.add_argument("--mask-eps", type=above_zero, default=mask_eps, help="m = (c - min) / (max - min + eps): a small map stays a weak mask")
    g.add_argument("--mask-fill", choices=["mean", "black", "imagenet"], default="mean",
                   help="what a removed pixel becomes: mean colour, black, or the mean colour under ImageNet's statistics (authors' code)")
    g.add_argument("--micro-batch", type=natural, default=0, help="regions CLIP encodes at a time, to save memory; 0: all of a step")
    return g


def clims(p):
    """The flags of the stages that train S on CLIP's regions, for CLIMS's losses; the defaults are SemPLeS's on WeakTr's generator, without them."""
    g = p.add_argument_group("CLIMS (SemPLeS Table 4): lambda_match L_match + lambda_cbs CBS + lambda_reg REG")
    g.add_argument("--lambda-match", type=number, default=1.0, help="weight of L_match (CLIMS: 10 with --lambda-b 2.4 on VOC, 2 with 7 on COCO)")
    g.add_argument("--lambda-cbs", type=number, default=0.0, help="weight of co-occurring background suppression (CLIMS: 1, COCO 1.25); CBS is a sum over pairs "
                   "and texts, so that a larger batch makes it count more: CLIMS's weight is one for --batch-size 16")
    g.add_argument("--lambda-reg", type=number, default=0.0, help="weight of the mean of all maps (CLIMS: 0.2); raise it if masks swallow the picture")
    g.add_argument("--tau-cbs", type=float, default=0.26, help="CBS counts a text from this cosine on (COCO: 0.285)")
    g.add_argument("--background-texts", default="clims", help="backgrounds of CBS: clims for CLIMS's ten, or a file of names, one a line")
    return g


def localising(p):
    """The flags of the stages that ask CLIP's GradCAM where a class is (CLIP-ES)."""
    g = p.add_argument_group("CLIP's GradCAM")
    g.add_argument("--clip", default="ViT-B/16", help="OpenAI name, or a file with CLIP's weights; a vision transformer")
    g.add_argument("--prompt", choices=["single", "ensemble"], default="ensemble", help="texts of classes and backgrounds (VPL Table 4)")
    g.add_argument("--template", help="another template than --prompt's")
    g.add_argument("--tau-t", type=above_zero, default=0.01, help="temperature of CLIP's own softmax over texts: 1 / its logit scale")
    g.add_argument("--affinity", action=argparse.BooleanOptionalAction, default=True, help="refine the maps by attention (CLIP-ES's CAA)")
    g.add_argument("--box", type=share, default=0.4, help="refined inside the boxes of a map's parts above this share of its maximum (0.7: COCO)")
    g.add_argument("--max-side", type=natural, default=640, help="CLIP sees larger pictures at this longer side (VOC's and COCO's are not); 0: as they are")
    g.add_argument("--cache", action="store_true", help="keep what enters CLIP's last block in <out>/cache, half precision: a later pass starts from there")
    return g


def training(p, epochs=60, lr=6.4e-5, weight_decay=0.03, crop=224, randaugment=True, erase=0.25):
    """The flags of the stages that train on random crops; the defaults are those of the paper's VOC recipe for the stage."""
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive, default=epochs)
    g.add_argument("--lr", type=number, default=lr, help="first rate, as it is used (for AdamW: the paper's number times batch / 512); falls to 0")
    g.add_argument("--weight-decay", type=number, default=weight_decay)
    g.add_argument("--crop", type=positive, default=crop, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=float, default=0.08, help="least share of the picture in a crop")
    g.add_argument("--randaugment", action=argparse.BooleanOptionalAction, default=randaugment, help="RandAugment of magnitude 9")
    g.add_argument("--erase", type=float, default=erase, help="probability of random erasing")
    g.add_argument("--log-every", type=positive, default=20, help="steps between two lines of the log")
    g.add_argument("--save-every", type=positive, default=500, help="steps between two states to resume from; one more after each epoch")
    return g


def optimizing(g):
    """The flags of the stages that train S, in the group of `training`."""
    g.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="adamw with a cosine (WeakTr, SemPLeS), or sgd with poly 0.9 (CLIMS)")
    g.add_argument("--head-rate", type=above_zero, default=1.0, help="rate of S's last layers, times --lr (CLIMS: 10)")
    # From the authors' code, not in the paper: IRN's, and so CLIMS's, optimiser hands the weight decay to SGD as its momentum.
    g.add_argument("--momentum", type=number, default=0.9, help="SGD's momentum; CLIMS was trained with 1e-4, which makes its rates ten times smaller than with 0.9")
    return g


def natural(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text):
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def name(text):
    if not text or text.startswith(".") or set(text) & set("/\\"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder in --out")
    return text


def above_zero(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def number(text):
    value = float(text)
    if not 0 <= value < 1e30:                                 # a rate or a weight; beyond, float32 overflows
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def share(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def plain(args):
    """Arguments as JSON and weights_only checkpoints hold them: no Path, no tuple."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def recipe(args):
    """The part of the arguments that decides the numbers."""
    return {k: v for k, v in (args if isinstance(args, dict) else plain(args)).items() if k not in NOT_THE_RECIPE}


# ---------------------------------------------------------------- processes and precision

class Env:
    """One process of a run: its device, its rank among `world` processes, its precision, its seed."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.amp, self.seed = args.amp, args.seed
        kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; --device cpu or auto runs without one")
        if kind == "cuda" and self.world > 1:
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(kind)
        except RuntimeError:
            raise ValueError(f"--device {kind}: no such device; auto, cpu, cuda or cuda:1") from None
        if args.deterministic:                                # before the GPU's libraries start
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)          # an operation that has no such form says so and goes on
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:                                                 # all up to AMX, which some virtual machines advertise and then kill the process that uses it
            os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.world > 1:                                    # ranks whose torchrun was killed would go on without it
            threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
        self.words = None                                     # a group of processes that talks through main memory
        args.out.mkdir(parents=True, exist_ok=True)
        seed_all(args.seed + self.rank)                       # ranks draw different noise (DropPath), the same weights are broadcast by DDP

    def autocast(self):
        return torch.autocast(self.device.type, AMP[self.amp], enabled=self.amp != "off")

    def scaler(self):
        """Inert unless fp16, so that the loop has no branch. It leaves a step out whose gradients overflow, and halves its scale; the schedule goes on."""
        # At PyTorch's 2 ** 16 gradients overflow inside CLIP: the first three steps, those of the highest rates, would be left out.
        return torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 10, enabled=self.amp == "fp16")

    def parallel(self, model):
        """The model under DDP when there are several processes; weights and buffers then start as rank 0's."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def shard(self, items):
        """This rank's share: disjoint, exhaustive, never padded."""
        return list(items)[self.rank::self.world]

    def sum(self, tensor):
        """Sum over ranks; int64 stays exact."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows, total):
        """Rows (n, ...) of all ranks, in the order of the batch of `total` that `shard` dealt out -> (total, ...).

        This rank's rows get `world` times their gradient, because DDP averages what the ranks compute, each the same loss of all rows."""
        if self.world == 1:
            return rows
        mine = rows.new_zeros(total, *rows.shape[1:])
        mine[self.rank::self.world] = rows
        return self.sum(mine.detach().clone()) + self.world * (mine - mine.detach())

    def in_turn(self, make):
        """make() on rank 0 first: it may download what the others then find."""
        if not self.main:
            self.barrier()
        made = make()
        if self.main:
            self.barrier()
        return made

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def progress(self, items, desc, total=None, initial=0):
        """A bar with the time left, on rank 0."""
        return tqdm(items, desc=desc, total=total, initial=initial, disable=not self.main, dynamic_ncols=True, mininterval=0.5)

    def stopping(self):
        """Asked after each step of a training loop: did Ctrl-C or SIGTERM come, to any process? Then the state is to be saved now, and `leave` follows.

        All processes learn it after the same step, by way of main memory: no GPU is waited for."""
        STOP.later = True                                     # from here on a step is finished first
        STOP.agreed = STOP.signal
        if self.world > 1:
            self.words = self.words or (dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo"))
            heard = torch.tensor([STOP.signal])
            dist.all_reduce(heard, dist.ReduceOp.MAX, self.words)
            STOP.agreed = STOP.signal = heard.item()
        return STOP.agreed > 0

    def close(self, message=None):
        """Leave together: a rank that exits early takes the rendezvous store with it."""
        if message and self.main:
            print(message)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        release()


def mean(values, where=None):
    """Mean over the values (P,) of all ranks, or over those `where` says, such that DDP's average of gradients is the gradient of that mean.

    Ranks hold different numbers of pairs, so the mean of per-rank means would weigh pairs differently:
    sum * world / count, with the count summed over ranks. A rank with no pair contributes a zero that has a gradient."""
    count = torch.full((), values.numel(), dtype=torch.float32, device=values.device)      # filled on the device: nothing waits
    if where is not None:
        values, count = torch.where(where, values, 0), where.sum().float()
    world = 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    return values.sum() * world / count.clamp(min=1)


def total(values):
    """Sum over the values of all ranks, such that DDP's average of gradients is the gradient of that sum. Meter divides by the ranks again."""
    return values.sum() * (dist.get_world_size() if dist.is_initialized() else 1)


def optimizer(groups, args):
    """AdamW or SGD, as `optimizing` has it."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    return adamw(groups, args)


def adamw(groups, args):
    """AdamW; for weights on a GPU as one kernel."""
    groups = [{**group, "params": list(group["params"])} for group in groups]
    fused = all(w.is_cuda for group in groups for w in group["params"]) or None
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=fused)


def schedule(optimizer, args, steps):
    """The rates fall to 0 in `steps` steps: poly 0.9 for SGD; a cosine for AdamW, which then starts again."""
    if args.optimizer == "sgd":
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, steps)


def unwrap(model):
    return getattr(model, "module", model)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)                                   # every GPU too


# ---------------------------------------------------------------- a pool of processes

def pooled(function, tasks, workers, where):
    """function(*task) in `workers` processes of one thread each, 0: here. Yields every result as it is finished, in any order.

    Tasks are drawn when there is room for them, so memory does not grow with their number. `where` names the folder that is being filled."""
    if not workers:
        yield from (function(*task) for task in tasks)
        return
    tasks, waiting = iter(tasks), set()
    context = multiprocessing.get_context("forkserver")       # processes of a clean server that has imported the function once, without our threads
    context.set_forkserver_preload(["__main__", function.__module__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})                # Ctrl-C is this process's to handle; the server inherits that
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool = futures.ProcessPoolExecutor(workers, context, initializer=serve)
    try:
        while True:
            for task in itertools.islice(tasks, 2 * workers - len(waiting)):
                with STOP.hold():                                                     # it may start a process: not by halves
                    waiting.add(pool.submit(function, *task))
            if not waiting:
                return
            done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
            yield from (task.result() for task in done)
    except futures.process.BrokenProcessPool:
        raise ValueError(f"{where}: a worker process died, most likely out of memory: run the same command again with fewer --workers; "
                         "finished files are kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def serve():
    torch.set_num_threads(1)                                  # a process a core: more threads in each only get in each other's way
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()      # a killed run leaves none behind


def follow(parent):
    """Ends this process, as SIGTERM does, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- Ctrl-C and SIGTERM

class Stop:
    """What Ctrl-C and SIGTERM do. At most times they end the run at once; while `later`, the first one only leaves word, and a second ends it."""

    def __init__(self):
        self.signal = self.agreed = self.count = self.time = 0
        self.later, self.before = False, {}                   # signal -> what it did before us

    def listen(self):
        """From here to `rest`. A signal that was ignored before stays so: that of a background job, say."""
        self.__init__()
        self.pid, self.hook = os.getpid(), sys.unraisablehook
        sys.unraisablehook = self.miss
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.hear)

    def rest(self):
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():           # in a script of ours there is nothing left to interrupt but python's own end
            signal.signal(number, signal.SIG_IGN if getattr(handler, "__module__", "") == "wsss" else handler or signal.SIG_DFL)

    def hear(self, number, frame):
        if os.getpid() != self.pid or "WORLD_SIZE" in os.environ and time.time() < self.time + 1:
            return                                            # a loader's process, which its parent ends; torchrun hands on the Ctrl-C that we got too
        self.signal, self.time, self.count = number, time.time(), self.count + 1
        if not self.later or self.count > 1:
            raise KeyboardInterrupt

    def miss(self, error):
        """Where Python lets no exception through, as around a fork, what `hear` raised is lost: a moment later it is heard again."""
        if error.exc_type is not KeyboardInterrupt:
            return self.hook(error)
        self.count, self.time = self.count - 1, 0
        threading.Timer(0.1, os.kill, (os.getpid(), self.signal)).start()

    @contextlib.contextmanager
    def hold(self):
        """What is within is done whole."""
        before, self.later = self.later, True
        try:
            yield
        finally:
            self.later = before
        if self.signal and not before:
            raise KeyboardInterrupt


STOP = Stop()


def leave(path, step):
    """Called on all ranks after a state was saved: where `stopping` has said so, the run ends here."""
    if STOP.agreed:
        if dist.is_initialized():                             # torchrun ends the others once one has left
            dist.barrier()
        raise KeyboardInterrupt(f"step {step} is saved in {path}")


# ---------------------------------------------------------------- one run at a time

HELD = {}                                                     # path of a lock -> its open file


def claim(path):
    """Until the run ends, this process alone writes `path`, a file or a folder: .<name>.lock beside it says who. Of several ranks the first asks.

    A record lock: gone with its process, however that ends, not inherited by a forked one, and known to NFS."""
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    if int(os.environ.get("RANK", 0)) or lock in HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while lock not in HELD:
        file = open(lock, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{lock}: {error.strerror}: a second run into the same folder would not be noticed", file=sys.stderr)
                return file.close()
            file.seek(0)
            raise ValueError(f"{path} is being written by {file.read().strip() or 'another process'}: wait for it, stop it, or take another --out") from None
        with contextlib.suppress(FileNotFoundError):          # its last holder has just removed it: once more
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                HELD[lock] = file
    with contextlib.suppress(OSError):                        # a full disk has no room for a name: the lock holds all the same
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name})".encode())


def release():
    while HELD:
        lock, file = HELD.popitem()
        with contextlib.suppress(OSError):                    # the folder may be gone
            lock.unlink()
        file.close()


# ---------------------------------------------------------------- whole files

@contextlib.contextmanager
def atomic(path):
    """Write beside, then rename: a file that exists is whole."""
    beside = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:                                  # PIL, numpy and torch do not say which file
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):                    # what went wrong before is what is told
            beside.unlink(missing_ok=True)


def save(path, **content):
    """A checkpoint of plain values and tensors."""
    with atomic(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:                         # torch closes its archive over a full disk and reports that
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.flush()
        os.fsync(file.fileno())


def save_json(path, content):
    with atomic(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path):
    """The first 16 digits of a file's SHA-256: says which weights made a result."""
    return sha256(path)[:16]


def from_hub(name):
    """A model's name on the Hugging Face hub -> the folder of its files, downloaded once; a folder is itself.

    The hub, and its folder here, name a file of weights by its SHA-256: one that is torn or was changed is removed."""
    if Path(name).is_dir():
        return str(name)
    try:
        from huggingface_hub import snapshot_download        # comes with transformers
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except ImportError:
        raise ValueError(f"{name} is no folder, and to download it huggingface_hub is missing: pip install transformers") from None
    except Exception as error:                                # no connection, no such model, no permission: each raises its own
        raise ValueError(f"{name} cannot be loaded: no folder, and not to be had from the Hugging Face hub ({' '.join(str(error).split())[:120]}): "
                         "give a model's name, with a connection, or the folder of a downloaded one") from None
    for path in folder.iterdir():
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            blob.unlink(), path.unlink(missing_ok=True)
            raise ValueError(f"{path}: its SHA-256 is not {blob.name[:16]}..., the hub's: removed, run the same command again to download it")
    return str(folder)


class Found(dict):
    """What a file holds: a name it lacks is the file's fault, not a bug."""

    def __init__(self, path, content):
        super().__init__(content)
        self.path = path

    def __missing__(self, name):
        raise ValueError(f"{self.path} has no {name!r}: remove it and run {MADE_BY.get(Path(self.path).name, 'its stage')} again")


def read_json(path):
    """The object in a JSON file."""
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > 1 << 24:
            raise ValueError("no file, or a large one")
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("args", {}), dict):
            raise ValueError("no object with names")
    except (ValueError, RecursionError) as error:             # RecursionError: nested without end
        raise ValueError(f"{path} is not JSON of ours ({str(error)[:200]}): remove it and run its stage again") from None
    return Found(path, content)


# ---------------------------------------------------------------- checkpoints

# torch.load(weights_only=True) runs no code, but takes a file's word for how much there is. `sound` asks first, for files of ours and for others'.
ASKED = re.compile(r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections (OrderedDict|Counter)|torch (Size|device)|_codecs encode|argparse Namespace|"
                   r"numpy dtype|numpy\.(_core|core)\.multiarray scalar|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")
BYTES = dict(Float=4, Double=8, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1)
WORDS = 400_000                                               # of a checkpoint's pickle: 25 a tensor


def sound(path):
    """`path`, if what the checkpoint claims to hold is what its file has room for; of TorchScript nothing is said."""
    try:
        if not Path(path).is_file():
            raise ValueError("it is no file but a folder, a pipe or a device")
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":                     # torch looks there, too
                with zipfile.ZipFile(file) as parts:
                    entries = {part.filename.lower(): part for part in parts.infolist()}           # torch's reader of zips knows no case
                    program, = (name for name in entries if name.endswith("data.pkl"))
                    if program.removesuffix("data.pkl") + "constants.pkl" in parts.namelist():      # TorchScript, which weights_only=True refuses
                        return path
                    if len(entries) < len(parts.infolist()) or any(part.compress_type for part in entries.values()) or sum(part.file_size for part in entries.values()) > size:
                        raise ValueError("its parts are compressed, or overlap: torch writes them plainly")
                    with parts.open(entries[program]) as words:
                        claims = read_claims(words, size)
                    rooms = {key: entries[f"{program[:-len('data.pkl')]}data/{key}".lower()].file_size for key in claims}
                    if any(room < claims[key] for key, room in rooms.items()):
                        raise ValueError("a tensor in it is larger than its part of the file")
            else:
                file.seek(0)                                  # as torch wrote before 1.6: five pickles, then the numbers
                if sum(sum(read_claims(file, size).values()) for _ in range(5)) > size:
                    raise ValueError("its tensors are larger than the file")
    except Exception as error:                                # zip and pickle each raise their own for a foreign file
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({reason(error)}): take another file, or download it again") from None
    return path


def read_claims(file, size):
    """Reads the words of one pickle of torch's without doing what they say -> {storage: bytes that its tensors need}."""
    stack, marks, memo, claims, total = [], [], {}, {}, 0     # of the stack: (a value: text, number, tuple, else None; how many parts a tuple has, at any depth)
    for count, (word, arg, _) in enumerate(pickletools.genops(file)):
        name, before, args = word.name, [kind.name for kind in word.stack_before], None
        if name == "GLOBAL" and not ASKED.fullmatch(arg):
            raise ValueError(f"it asks for {arg.replace(' ', '.')[:100]}")
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
            continue
        start = marks.pop() if "mark" in before else len(stack) - len(before)
        parts = stack[start:]
        del stack[start - (before.index("mark") if "mark" in before else 0):]
        if name in ("BINGET", "LONG_BINGET"):
            made = memo[arg]
        elif name.startswith(("TUPLE", "EMPTY_TUPLE")):
            made = tuple(value for value, _ in parts), 1 + sum(weight for _, weight in parts)
        elif name == "BINPERSID":
            _, kind, key, _, numbers = parts[0][0][:5]
            each = BYTES[kind.removeprefix("torch ").removesuffix("Storage")]
            claims[str(key)] = max(numbers * each, claims.get(str(key), 0))
            made = (key, numbers, each), 1
        else:
            made = arg if isinstance(arg, (str, int)) else None, 1
        if name == "REDUCE":
            what, args = (value for value, _ in parts)
            total += room_of(what, args)
        stack += [made] * len(word.stack_after)
        if made[1] > 2_000 or count > WORDS or total > 16 * size:
            raise ValueError("it nests, or repeats, without end")
    return claims


def room_of(what, args):
    """Bytes of what a checkpoint's pickle makes by calling `what`; refused if that is more than its storage."""
    if what == "_codecs encode" and args[1:] != ("latin1",):
        raise ValueError("it asks for another encoding")
    if what not in ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"):
        return 0
    (_, numbers, each), offset, shape, stride = args[:4]
    if min((offset, *shape, *stride)) < 0 or len(shape) != len(stride) or math.prod(shape) > numbers or 0 in shape and len(shape) > 1:
        raise ValueError(f"a tensor in it is of {shape} numbers, and not in the file"[:100])
    return math.prod(shape) * each


def reason(error):
    """Why a checkpoint is refused, in our words: torch's are advice to trust the file."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it asks for {asked[1][:100]}"
    if isinstance(error, OSError) or type(error) is ValueError and str(error).startswith(("it ", "its ", "a tensor ")):
        return str(error)[:300]
    return "it does not fit into memory" if isinstance(error, MemoryError) or "allocate memory" in str(error) else "it is torn, or torch did not write it"


TEXTS = ("backgrounds",)


def inputs(**paths):
    """Fingerprints of what a stage reads, kept with its arguments: other weights, or a folder of another recipe, are another recipe. Weights must be sound.

    Of a folder that is not ours it is of the names, sizes and times of its files. A text that is no file is a name to download, and has none."""
    found = {}
    for name, path in paths.items():
        if name not in TEXTS and path is not None and Path(path).is_file():
            sound(path)
        note = Path(path) / "recipe.json"
        found[name] = (fingerprint(path) if Path(path).is_file() else read_json(note).get("fingerprint") if note.exists()
                       else folder_fingerprint(path) if isinstance(path, Path) and path.is_dir() else None)
    return found


def folder_fingerprint(folder):
    """The same of a folder's files below it, by name, size and time of the last change: their contents may be many gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def load(path, stage=None, classes=None, map_location="cpu"):
    """A checkpoint of ours: of that stage and that class list, or one line that says what to do."""
    path = Path(path)
    if not path.exists():
        script = MADE_BY.get(path.name, "the stage that makes it")
        raise FileNotFoundError(f"{path} is missing: run {script} first (README.md has the order)")
    content = read_tensors(path, map_location)
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise ValueError(f"{path} holds no stage: it is not one of our checkpoints; published weights go to --init")
    content = checked(path, content)
    if stage is not None and content["stage"] != stage:
        raise ValueError(f"{path} is of stage {content['stage']!r}, {stage!r} is needed: run {MADE_BY.get(stage + '.pt', stage)}")
    if classes is not None and content["classes"] != list(classes):
        raise ValueError(f"{path} was trained on other classes ({describe(content['classes'])}) than this data folder's ({describe(classes)}): "
                         f"give the --data it was trained on, or another --out")
    return content


def read_tensors(path, map_location="cpu"):
    """What a checkpoint of ours holds, or one line that says why it is none."""
    try:
        return torch.load(sound(path), map_location=map_location, weights_only=True)
    except Exception as error:                                # zip, pickle and torch each raise their own for a foreign file
        why = str(error).partition("(")[2].rpartition(")")[0] if type(error) is ValueError else reason(error)
        if path.name.endswith(".last.pt"):
            raise ValueError(f"{path} is damaged ({why}): remove it, the stage then starts again") from None
        raise ValueError(f"{path} is not a checkpoint of this project ({why}): remove it and run {MADE_BY.get(path.name, 'its stage')} again") from None


def checked(path, content):
    """Names are texts, arguments plain values: what is told of them in one line is one line."""
    plain = lambda value: value is None or isinstance(value, (str, int, float))
    args, again = content.get("args", {}), f"remove it and run {MADE_BY.get(path.name, 'its stage')} again"
    if not isinstance(args, dict) or not all(plain(v) or isinstance(v, (list, tuple)) and all(map(plain, v)) or isinstance(v, dict) and all(map(plain, v.values()))
                                             for v in args.values()):
        raise ValueError(f"{path} holds arguments that are no plain values: {again}")
    for names in ("classes", "backgrounds"):
        if names in content and not (isinstance(content[names], list) and all(isinstance(name, str) and len(name) <= 100 for name in content[names])):
            raise ValueError(f"{path} holds {names} that are no list of names: {again}")
    return Found(path, {**content, "args": Found(path, args)} if "args" in content else content)


def load_prototypes(args, folder, clip):
    """<out>/prototypes.pt (vpl.py), learned for this folder's classes and backgrounds with this CLIP."""
    path = args.out / "prototypes.pt"
    content = load(path, "prototypes", folder.classes)
    W = content["model"].get("prototypes") if isinstance(content["model"], dict) else None
    if not torch.is_tensor(W) or W.dtype != torch.float32 or W.dim() != 2 or len(W) != len(folder.classes) + len(content["backgrounds"]) or not W.isfinite().all():
        raise ValueError(f"{path} holds no prototypes of its classes and backgrounds, or NaN: remove it and run vpl.py again")
    if content["backgrounds"] != folder.backgrounds:
        raise ValueError(f"{path} was learned with other backgrounds ({describe(content['backgrounds'])}) than --data names: run vpl.py again")
    if content["clip"] != clip.fingerprint():
        raise ValueError(f"{path} was learned with another --clip ({content['args']['clip']}): give the same, or run vpl.py with this one")
    return content


def load_weights(model, weights, path):
    """Strict: a wrong name or shape, or a number that is none, is an error that names the file, never a print."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in weights.items()):
        raise ValueError(f"{path} holds no weights of a network: take another file, or remove it")
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training broke down or the file is damaged; remove it or take another one")
    try:
        unwrap(model).load_state_dict(dict(weights), strict=True)       # without its metadata, which can tell torch to take tensors as they are
    except RuntimeError as error:
        problems = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"{path} does not fit this network: {problems[:300]}") from error


def describe(classes):
    return f"{len(classes)}: {', '.join(map(str, list(classes)[:3]))}{', ...' if len(classes) > 3 else ''}"[:200]


def finished(path, args):
    """True when `path` was made by the same recipe. Made by another one it is refused, never taken in silence."""
    if not Path(path).exists() or not args.resume:
        return False
    same_recipe(path, load(path)["args"], args)
    return True


def same_recipe(path, before, args, free=()):
    """Refuses `path` if it was made with other arguments than now, those in `free` left aside."""
    before, now = recipe(before), recipe(args)
    old, new = (x.pop("inputs", {}) for x in (before, now))
    changed = [k for k in new if new[k] and old.get(k) and new[k] != old[k]]
    if changed:
        raise ValueError(f"{path} was made from another {changed[0]} file than is there now: take another --out, or --no-resume to replace it")
    if None in (before.get("pool"), now.get("pool")):           # left out now: what the file of S says; None before: an S without
        free = (*free, "pool")
    other = [f"--{k.replace('_', '-')} {before.get(k)} (now {now.get(k)})" for k in {**before, **now} if k not in free and before.get(k) != now.get(k)]
    if other:
        raise ValueError(f"{path} was made with {', '.join(other)}: take another --out, or --no-resume to replace it")


def open_folder(folder, args, env, free, keep=False, **facts):
    """Claims a folder of many files for one recipe: what lies there must be of the same arguments, those in `free` left aside, and `facts`.

    The note that says so, recipe.json, is written before the first file. <folder>.json, which stands for a finished folder, goes.
    --no-resume empties the folder; with `keep`, for what several stages use, only if it is of another recipe. What another script made, or somebody
    put there, is never touched."""
    note, same, script = folder / "recipe.json", True, Path(sys.argv[0]).name
    made = [path for ending in ("npy", "npz", "png", "pt") for path in folder.glob(f"*.{ending}")]
    before = read_json(note) if note.exists() else {"script": "another program" if made else script}
    if before.get("script") != script and not keep:
        raise ValueError(f"{folder} holds what {str(before.get('script', 'another program'))[:80]} made: {script} writes to a folder of its own, give another name or --out")
    if note.exists():
        try:
            same_recipe(folder, before["args"], args, free)
            for name, now in facts.items():
                if before.get(name) != now:
                    raise ValueError(f"{folder} was made with other {name} ({short(before.get(name))}, now {short(now)}): take another --out, or --no-resume to replace it")
        except ValueError:
            if args.resume:
                raise
            same = False
    env.barrier()
    if env.main:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):                   # of killed runs; where several stages write, of the last hour it may be another's
            with contextlib.suppress(FileNotFoundError):      # renamed just now
                if not keep or time.time() - part.stat().st_mtime > 3600:
                    part.unlink()
        if not args.resume and not (keep and same):
            for path in made:
                path.unlink(missing_ok=True)
        folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
        decides = {k: v for k, v in recipe(args).items() if k not in free}
        digest = hashlib.sha256(json.dumps([decides, facts], sort_keys=True).encode()).hexdigest()[:16]
        if not (keep and before.get("fingerprint") == digest):                        # else it stands there, and another stage may be reading it
            save_json(note, {"script": script, "args": plain(args), **facts, "fingerprint": digest})
    env.barrier()


def short(fact):
    return describe(fact) if isinstance(fact, list) else json.dumps(fact)[:200]


# ---------------------------------------------------------------- resume

def save_state(path, model, optimizer, scheduler, scaler, epoch, step, args):
    """Everything the next step depends on: call it on all ranks, rank 0 writes. `step`: batches of `epoch` already done."""
    broken = not_finite(unwrap(model), optimizer, scaler)
    if broken:
        raise ValueError(f"{path}: {broken} after step {step} of epoch {epoch}, though the loss was finite: not saved; lower --lr, or take --amp bf16 or off; "
                         "the last saved state is from before")
    rng = {"python": random.getstate(), "numpy": numpy_state(), "torch": torch.get_rng_state(),
           "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    ranks = [rng]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, rng)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save(path, model=unwrap(model).state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
             scaler=scaler.state_dict(), rng=ranks, epoch=epoch, step=step, args=plain(args))
    leave(path, f"{step} of epoch {epoch + 1}" if epoch else step)


def not_finite(model, optimizer, scaler):
    """What the last steps have broken, or None. All ranks hold the same, so all of them answer alike."""
    values = [*model.state_dict().items(), *((f"the optimizer's {name}", value) for state in optimizer.state.values() for name, value in state.items())]
    broken = next((name for name, value in values if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all()), None)
    if broken:
        return f"{broken} holds NaN or infinity"
    if scaler.is_enabled() and scaler.get_scale() < 1e-6:     # it halves with every step that is left out
        return "no step is taken, since fp16 gradients are not finite at any scale,"


def load_state(path, model, optimizer, scheduler, scaler, args):
    """-> (epoch, step) to go on from; (0, 0) when there is nothing to resume."""
    path = Path(path)
    if not args.resume:                                       # what is there is to be replaced: an interrupted run then goes on, not back to it
        path.unlink(missing_ok=True), path.with_name(path.name.replace(".last", "")).unlink(missing_ok=True)
    if not path.exists():
        return 0, 0
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no state of a run: remove it, the stage then starts again")
    state = checked(path, state)
    same_recipe(path, state["args"], args)
    load_weights(model, state["model"], path)
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        for group, now in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
            group["fused"] = now.get("fused")                 # the kernel is this device's; the run may have begun on another
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        if rank < len(state["rng"]):                          # more ranks than before: the new ones keep their fresh seed
            set_rng(state["rng"][rank])
        epoch, step = int(state["epoch"]), int(state["step"])
    except Exception as error:                                # whatever its parts provoke
        raise ValueError(f"{path} is damaged ({type(error).__name__} in its state): remove it, the stage then starts again") from None
    return epoch, step


def numpy_state():
    kind, keys, *rest = np.random.get_state()
    return [kind, torch.from_numpy(keys.astype(np.int64)), *rest]


def set_rng(rng):
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = rng["numpy"]
    if not 0 <= rest[0] <= 624:                               # numpy reads there without asking
        raise ValueError("a place that is none")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


# ---------------------------------------------------------------- log

class Log:
    """<stage>.jsonl: first line arguments and versions, then one line for each log step. Rank 0 writes.

    Resumed at `step`, it drops what was logged after the state that is resumed from: the file reads as if never interrupted, but for a line of the
    step at which Ctrl-C or SIGTERM saved the state; the next line's means start there."""

    def __init__(self, path, args, env, step=0):
        self.path, self.env, self.start = Path(path), env, time.time()
        if not env.main:
            return
        lines = log_lines(self.path) if step and self.path.exists() else []
        kept = [line for line in lines[1:] if whole(line) and json.loads(line)["step"] <= step]
        self.start -= json.loads(kept[-1])["seconds"] if kept else 0
        with atomic(self.path) as beside:
            beside.write_text("\n".join([json.dumps({"args": plain(args), "versions": versions(), "world": env.world}), *kept]) + "\n")

    def __call__(self, step, **values):
        """Tensors are read here and nowhere else: this is the one place that waits for the device."""
        if self.env.main:
            row = {k: float(f"{float(v):.6g}") if isinstance(v, (float, torch.Tensor)) else v for k, v in values.items()}
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step, "seconds": round(time.time() - self.start, 1), **row}) + "\n")
            except OSError as error:                          # a write does not say which file
                raise OSError(error.errno, error.strerror, str(self.path)) from error


class Meter:
    """Means of a step's numbers since the last log line, kept on the device: nothing in a step waits for them.

    The first number is the loss. If it was ever not finite, on any rank, `read` stops all of them and names the batch; no state was saved since."""

    def __init__(self, env):
        self.env, self.rows, self.batches = env, [], []

    def add(self, pictures, **values):
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float() for v in values.values()]))
        self.batches.append(pictures)

    def read(self, ids):
        rows = torch.stack(self.rows)                         # (steps, values)
        bad = self.env.sum((~rows[:, 0].isfinite()).int()).nonzero().flatten().tolist()      # steps: ranks that go on alone would wait for the others
        if bad:
            found = [(rows[bad[0], 0].item(), [ids[i] for i in self.batches[bad[0]].tolist()[:8]])] * self.env.world
            if self.env.world > 1:
                dist.all_gather_object(found, found[0])
            value, batch = next(seen for seen in found if not math.isfinite(seen[0]))
            raise ValueError(f"the loss is {value} on the batch {', '.join(batch)}, ...: look at these pictures and their labels, "
                             "lower --lr, or take --amp bf16 or off; the last saved state is from before")
        means = self.env.sum(rows.mean(0)) / self.env.world   # common.mean scales by world, so this is the mean over all pairs
        self.rows, self.batches = [], []
        return dict(zip(self.names, means))


def log_lines(path):
    if not path.is_file() or path.stat().st_size > 1 << 26:
        raise ValueError(f"{path} is no log, but a pipe, a folder or a large file: remove it")
    return path.read_text(errors="replace").splitlines()


def whole(line):
    """False for the torn last line of a killed run."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in ("step", "seconds")) and all(not isinstance(v, int) or abs(v) < 1 << 62 for v in row.values())


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "platform": platform.platform()}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):                        # no git on this machine
        answer = subprocess.run(git, capture_output=True, text=True)
        found["commit"] = answer.stdout.strip() if answer.returncode == 0 else None
    return found


# ---------------------------------------------------------------- the way out

def run(main):
    """Runs a script's main. What we or the system refuse ends in one line and exit 1, Ctrl-C in one and 130, SIGTERM 143; a bug keeps its traceback."""
    STOP.listen()
    try:
        main()
        if STOP.signal:                                       # it came after the last step
            raise KeyboardInterrupt
    except KeyboardInterrupt as saved:
        interrupted(str(saved))
    except RuntimeError as error:
        if STOP.signal:                                       # a loader's process or another rank was quicker to leave
            interrupted()
        if "DataLoader worker" in str(error):                 # killed; what it raises itself keeps its type
            sys.exit(told("a loader process died, most likely out of memory: run the same command again with fewer --workers"))
        if not dist.is_initialized() or not re.search("peer|closed|aborted", str(error), re.I):      # gloo and nccl, when another rank has left
            told(f"{type(error).__name__}: {error}")
            raise
        told("another process left first", later=60)
        sys.exit(1)
    except (OSError, ValueError) as error:
        if not ours(error):
            raise
        print(told(one_line(error)), file=sys.stderr)
        sys.exit(1)
    finally:
        release()
        STOP.rest()


def interrupted(saved=""):
    """The end of a run that was asked to end: says how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):        # what comes now is no news; torch's SIGCHLD raises when a loader's process was killed
        STOP.before.setdefault(number, signal.signal(number, lambda *_: None))
    for child in multiprocessing.active_children():
        if child.daemon:                                      # a loader's, which would pass over a first SIGTERM
            child.kill(), child.join()
    again = f"run the same command again{', without --no-resume' if '--no-resume' in sys.argv else ''}"
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n{told(f'interrupted; {saved}: to go on, {again}' if saved else f'interrupted; nothing finished is lost: {again}')}", file=sys.stderr, flush=True)
    code = 128 + (STOP.signal or signal.SIGINT)
    if STOP.count > 1:                                        # at once: without waiting for the processes of a pool, which then see that we are gone
        release()
        os._exit(code)
    sys.exit(code)


def told(line, later=0):
    """The line that ends a run, after the name of its script. torchrun, which looks for the first failure among its processes, gets it too."""
    line = f"{Path(sys.argv[0]).name}: {line}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(
                {"message": {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()) + later)}}}))
    return line


def ours(error):
    """Refused by a line of this repo or by the operating system, here or in a loader's worker; else it is a bug."""
    if isinstance(error, OSError):
        return True
    frames = re.findall(r'File "([^"]+)", line', f"{error} {error.__cause__}")        # a worker's traceback travels as text
    if not frames:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return Path(frames[-1]).resolve().parent in (ROOT, ROOT / "wsss")


def one_line(error):
    line = re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1])           # a worker's error comes with a traceback before it
    system = re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", line)
    return f"{system[2]}: {system[1]}; check that the folder exists, is writable and has room" if system else line
