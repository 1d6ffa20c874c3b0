"""The processes of a run: device, ranks, precision and seed of each; means over all of them; a pool for the
CRF.

    run = processes.Run(args)                                # torchrun or plain python
    loss = run.mean(losses.match_loss(...))                  # over the pairs of all ranks
"""
import atexit
import gc
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent import futures
from datetime import timedelta
from multiprocessing import forkserver

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its functions' defaults would hold the group
from tqdm import tqdm

from plumbing import guard

A_WEEK = timedelta(weeks=1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


class Run:
    """One process of a run: its device, its rank among `world` processes, its precision, its seed."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.seed = self.rank == 0, args.seed
        self.device = find_device(args.device, self.world)
        chosen = args.device == "auto" or args.amp == "auto" and self.device.type == "cuda"
        if args.amp == "auto":
            args.amp = best_precision(self.device)            # from here on part of the recipe
        self.amp = args.amp
        if self.main and chosen:                              # a GPU that torch does not see shows here
            print(f"on {self.device}, --amp {self.amp}")
        if args.deterministic:                                # before the GPU's libraries start
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:                                        # AMX is advertised by some virtual machines that lack it
            os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
        if self.world > 1 and not dist.is_initialized():
            # Ranks that share images meet when all are done; torchrun ends them all where one dies.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=A_WEEK)
            if self.device.type == "cpu":
                atexit.register(end_group)
        if self.world > 1:                            # ranks whose torchrun was killed would go on without it
            threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        self.cpu_group = None                            # a group of processes that talks through main memory
        args.out.mkdir(parents=True, exist_ok=True)
        seed_all(args.seed + self.rank)               # ranks draw different noise; DDP broadcasts the weights

    # -- precision

    def autocast(self):
        return torch.autocast(self.device.type, DTYPES[self.amp], enabled=self.amp != "off")

    def scaler(self):
        """Inert unless fp16. It leaves out a step whose gradients overflow and halves its scale."""
        # From PyTorch's 2 ** 16 on, gradients overflow inside CLIP: the first steps would be left out.
        return torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 10, enabled=self.amp == "fp16")

    # -- several processes

    def parallel(self, model):
        """The model under DDP when there are several processes; weights and buffers then start as rank
        0's."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def shard(self, items):
        """This rank's share: disjoint, exhaustive, never padded."""
        return list(items)[self.rank::self.world]

    def pairs(self, labels):
        """Labels (B, C) on the CPU -> image b and class k of every pair, (P,) each. Nothing waits for the
        device."""
        b, k = labels.nonzero(as_tuple=True)
        return b.to(self.device, non_blocking=True), k.to(self.device, non_blocking=True)

    def mean(self, values, where=None):
        """Mean over the values (P,) of all ranks, or over those `where` says; its gradient is right under
        DDP.

        Ranks hold different numbers of pairs, so the mean of per-rank means would weigh pairs differently:
        sum * world / count, with the count summed over ranks. A rank without a pair adds a zero with a
        gradient."""
        count = torch.full((), values.numel(), dtype=torch.float32, device=values.device)
        if where is not None:
            values, count = torch.where(where, values, 0), where.sum().float()
        if self.world > 1:
            dist.all_reduce(count)
        return values.sum() * self.world / count.clamp(min=1)

    def total(self, values):
        """Sum over the values of all ranks, with the right gradient under DDP. Meter divides by the ranks
        again."""
        return values.sum() * self.world

    def sum(self, tensor):
        """Sum over ranks; int64 stays exact."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows, total):
        """Rows (n, ...) of all ranks, in the order of the batch of `total` that `shard` dealt out -> (total,
        ...).

        This rank's rows get `world` times their gradient: DDP averages what the ranks compute, each the same
        loss."""
        if self.world == 1:
            return rows
        mine = rows.new_zeros(total, *rows.shape[1:])
        mine[self.rank::self.world] = rows
        return self.sum(mine.detach().clone()) + self.world * (mine - mine.detach())

    def in_turn(self, make):
        """make() on rank 0 first, then in the first process of each other machine, then in all others: it may
        download what the next then find."""
        mine = 0 if self.main else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
        for turn in range(3):
            if turn == mine:
                made = make()
            self.barrier()
        return made

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    # -- the rest

    def progress(self, items, desc, total=None, initial=0):
        """A bar with the time left, on rank 0."""
        return tqdm(items, desc=desc, total=total, initial=initial, disable=not self.main, dynamic_ncols=True,
                    mininterval=0.5)

    def stopping(self):
        """Asked after each step: did Ctrl-C or SIGTERM come, to any process? Then save now; `guard.leave`
        follows.

        All processes learn it after the same step, by way of main memory: no GPU is waited for."""
        stop = guard.STOP
        stop.later = True                                     # from here on a step is finished first
        stop.agreed = stop.signal
        if self.world > 1:
            if self.cpu_group is None:
                gloo = self.device.type == "cpu"
                self.cpu_group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=A_WEEK)
            heard = torch.tensor([stop.signal])
            dist.all_reduce(heard, dist.ReduceOp.MAX, self.cpu_group)
            stop.agreed = heard.item()
            stop.signal = stop.agreed or stop.signal          # one that came meanwhile is for the next step
        return stop.agreed > 0

    def close(self, message=None):
        """Leave together: a rank that exits early takes the rendezvous store with it."""
        if message and self.main:
            print(message)
        if dist.is_initialized():
            dist.barrier()
            if self.device.type == "cuda":          # NCCL's end waits for all ranks: not after an error
                atexit.register(end_group)
        guard.release()


def end_group():
    """Ends gloo's threads while Python still runs: one that lets go of a tensor after that aborts the
    process. They end with the group, once no model under DDP holds it."""
    gc.collect()
    dist.destroy_process_group()


def find_device(name, world):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; --device cpu or auto runs without one")
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; auto, cpu, cuda or cuda:1") from None


def best_precision(device):
    """bf16 where a GPU has it in hardware, fp16 on another GPU. On a CPU, half precision may be many times
    slower."""
    if device.type == "cpu":
        return "off"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def unwrap(model):
    return getattr(model, "module", model)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)                                   # every GPU too


# ---------------------------------------------------------------- a pool of processes

def pooled(function, tasks, workers, where):
    """function(*task) in `workers` processes of one thread each, 0: here. Yields results as they are
    finished.

    Tasks are drawn when there is room for them: memory does not grow with their number. `where`: the folder
    filled."""
    if not workers:
        yield from (function(*task) for task in tasks)
        return
    tasks, waiting = iter(tasks), set()
    context = multiprocessing.get_context("forkserver")      # children of a clean server: without our threads
    context.set_forkserver_preload(["__main__", function.__module__])
    # Ctrl-C is for this process; children inherit
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool = futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        while True:
            for task in itertools.islice(tasks, 2 * workers - len(waiting)):
                with guard.STOP.hold():                       # it may start a process: not by halves
                    waiting.add(pool.submit(function, *task))
            if not waiting:
                return
            done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
            yield from (task.result() for task in done)
    except futures.process.BrokenProcessPool:
        raise ValueError(f"{where}: a worker process died, most likely out of memory: run the same command "
                         "again with fewer --workers; finished files are kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    torch.set_num_threads(1)                                  # a process a core: more threads slow each other
    parent = multiprocessing.parent_process()
    # ends with a killed run
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def end_with_parent(parent):
    """Ends this process, as SIGTERM does, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
