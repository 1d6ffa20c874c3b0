"""One process of a run: device, rank, precision, seed; means over ranks; a pool of worker processes."""
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent import futures
from multiprocessing import forkserver

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import guard


AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


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
        guard.STOP.later = True                                     # from here on a step is finished first
        guard.STOP.agreed = guard.STOP.signal
        if self.world > 1:
            self.words = self.words or (dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo"))
            heard = torch.tensor([guard.STOP.signal])
            dist.all_reduce(heard, dist.ReduceOp.MAX, self.words)
            guard.STOP.agreed = guard.STOP.signal = heard.item()
        return guard.STOP.agreed > 0

    def close(self, message=None):
        """Leave together: a rank that exits early takes the rendezvous store with it."""
        if message and self.main:
            print(message)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        guard.release()


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
                with guard.STOP.hold():                                                     # it may start a process: not by halves
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
