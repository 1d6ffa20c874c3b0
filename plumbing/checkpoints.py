"""Checkpoints, folders that are finished file by file, and a training run that can be interrupted.

    keeper = checkpoints.Keeper(run, args, "match.pt", start=path, clip=args.clip)   # refuses another recipe
    S = keeper.begin(S, optimizer, schedule, loader, steps)                          # resumes an earlier run
    for images, labels in keeper.steps():
        ...
        keeper.backward(loss)
        keeper.step()
        keeper.after(loss=loss)                                                      # log, state, Ctrl-C
    keeper.finish(model=S, classes=classes)
"""
import hashlib
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing import files, flags, guard, log, processes

# ---------------------------------------------------------------- saving and loading

def save(path, **content):
    """A checkpoint of plain values and tensors, whole or not at all."""
    with files.atomic(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:                  # torch closes its archive over a full disk and says so
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())


def load(path, stage=None, classes=None, map_location="cpu"):
    """A checkpoint of this project, of that stage and that class list."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {files.maker(path)} first (README.md has the order)")
    content = read_tensors(path, map_location)
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise ValueError(f"{path} holds no stage: it is not one of our checkpoints; "
                         "published weights go to --init")
    missing = {"args", "classes"} - content.keys()
    if missing:
        raise ValueError(f"{path} has no {min(missing)!r}: remove it and run {files.maker(path)} again")
    if stage is not None and content["stage"] != stage:
        raise ValueError(f"{path} is of stage {content['stage']!r}, {stage!r} is needed: "
                         f"run {files.maker(f'{stage}.pt')}")
    check_classes(path, content["classes"], classes)
    return content


def check_classes(path, found, wanted):
    """Refuses a checkpoint of other classes than `wanted`, where both are known."""
    if found is not None and wanted is not None and list(found) != list(wanted):
        raise ValueError(f"{path} was trained on other classes ({describe(found)}) than this data folder's "
                         f"({describe(wanted)}): give the --data it was trained on, or another --out")


def read_tensors(path, map_location="cpu"):
    """What a checkpoint of this project holds. weights_only: nothing in it is run."""
    try:
        return torch.load(files.regular(path), map_location=map_location, weights_only=True)
    except Exception as error:                                # zip, pickle and torch each raise their own
        kind = f"{type(error).__name__}: it is torn, or torch did not write it"
        if path.name.endswith(".last.pt"):
            raise ValueError(f"{path} is damaged ({kind}): remove it, the stage then starts again") from None
        raise ValueError(f"{path} is not a checkpoint of this project ({kind}): "
                         f"remove it and run {files.maker(path)} again") from None


def load_weights(model, weights, path):
    """Strict: a wrong name or shape, or a number that is not finite, is an error that names the file."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training broke down or the file is "
                             "damaged; remove it or take another one")
    try:
        processes.unwrap(model).load_state_dict(weights, strict=True)
    except RuntimeError as error:
        problems = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"{path} does not fit this network: {problems[:300]}") from error


def describe(classes):
    shown = ", ".join(map(str, list(classes)[:3])) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes)}: {shown}"[:200]


# ---------------------------------------------------------------- one recipe

def same_recipe(path, before, args, free=()):
    """Refuses `path` if it was made with other arguments than now, those in `free` left aside."""
    before, now = flags.recipe(before), flags.recipe(args)
    old, new = (x.pop("inputs", {}) for x in (before, now))
    changed = [name for name in new if new[name] and old.get(name) and new[name] != old[name]]
    if changed:
        raise ValueError(f"{path} was made from another {changed[0]} file than is there now: "
                         "take another --out, or --no-resume to replace it")
    if None in (before.get("pool"), now.get("pool")):         # left out: what the file of S says
        free = (*free, "pool")
    other = [f"--{k.replace('_', '-')} {before.get(k)} (now {now.get(k)})" for k in {**before, **now}
             if k not in free and before.get(k) != now.get(k)]
    if other:
        raise ValueError(f"{path} was made with {', '.join(other)}: "
                         "take another --out, or --no-resume to replace it")


def open_folder(folder, args, run, free, keep=False, **facts):
    """Claims a folder of many files for one recipe: what lies there must be of the same arguments, those in
    `free` left aside, and of the same `facts`.

    The note that says so, recipe.json, is written before the first file. <folder>.json, which stands for a
    finished folder, goes. --no-resume empties the folder; with `keep`, only if it is of another recipe. A
    folder of another script is refused, and one that holds files without a note."""
    note, script, same = folder / "recipe.json", Path(sys.argv[0]).name, True
    made = [path for ending in ("npy", "npz", "png", "pt") for path in folder.glob(f"*.{ending}")]
    before = files.read_json(note) if note.exists() else {"script": "another program" if made else script}
    if before.get("script") != script:
        raise ValueError(f"{folder} holds what {before.get('script', 'another program')} made: {script} "
                         "writes to a folder of its own, give another name or --out")
    if note.exists() and made:
        try:
            same_facts(folder, before, args, free, facts)
        except ValueError:
            if args.resume:
                raise
            same = False
    run.barrier()
    if run.main:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):                   # of killed runs
            part.unlink(missing_ok=True)
        if not args.resume and not (keep and same):
            for path in made:
                path.unlink(missing_ok=True)
        folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
        decides = {k: v for k, v in flags.recipe(args).items() if k not in free}
        digest = hashlib.sha256(json.dumps([decides, facts], sort_keys=True).encode()).hexdigest()[:16]
        content = {"script": script, "args": flags.plain(args), **facts, "fingerprint": digest}
        files.save_json(note, content)
    run.barrier()


def same_facts(folder, before, args, free, facts):
    same_recipe(folder, before.get("args", {}), args, free)
    for name, now in facts.items():
        if before.get(name) != now:
            shown = [describe(x) if isinstance(x, list) else json.dumps(x) for x in (before.get(name), now)]
            raise ValueError(f"{folder} was made with other {name} ({shown[0]}, now {shown[1]}): "
                             "take another --out, or --no-resume to replace it")


# ---------------------------------------------------------------- a training run

class Keeper:
    """Keeps one training run: its finished file, its state to resume from, its log, and the way out.

    `reads`: name -> file or folder that the stage starts from. Their fingerprints are part of the recipe."""

    def __init__(self, run, args, name, **reads):
        self.run, self.args, self.path = run, args, args.out / name
        self.stage, self.last = self.path.stem, self.path.with_suffix(".last.pt")
        args.inputs = {key: None if path is None else files.fingerprint(path) for key, path in reads.items()}
        self.finished = self.path.exists() and args.resume
        if self.finished:
            same_recipe(self.path, load(self.path)["args"], args)
            run.close(f"{self.path} is finished")
            return
        guard.claim(self.path)

    def begin(self, model, optimizer, schedule, loader, steps, **facts):
        """-> `model` for the loop: in training mode, under DDP, at the state that an earlier run has left.

        `facts` go into the log's first line."""
        self.model, self.optimizer, self.schedule, self.loader = model.train(), optimizer, schedule, loader
        self.scaler, self.total, self.done = self.run.scaler(), steps, 0
        self.resume()
        self.log = log.Log(self.path.with_suffix(".jsonl"), self.args, self.run, self.done, **facts)
        self.meter = log.Meter(self.run)
        return self.run.parallel(model)

    def steps(self, epoch_of=None):
        """Yields (images, targets) of every step that is left; images are on the device.

        `epoch_of()` gives an epoch's batches instead of the loader, each with its image numbers last."""
        batches = self.loader.batch_sampler
        with self.run.progress(None, self.stage, self.total, self.done) as bar:
            while self.done < self.total:
                batches.start(self.done // len(batches), self.done % len(batches))
                for batch in islice((epoch_of or self.batches)(), self.total - self.done):
                    *parts, self.numbers = batch
                    yield parts
                    bar.update()

    def batches(self):
        for images, targets, numbers in self.loader:
            yield images.to(self.run.device, non_blocking=True), targets, numbers

    def backward(self, loss):
        """Gradients, scaled for fp16."""
        self.scaler.scale(loss).backward()

    def step(self):
        """One step of the optimizer, left out where fp16 gradients overflow, and of its schedule."""
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    def after(self, **values):
        """After each step: the numbers to log, the loss first. Saves a state every --save-every steps and
        when the run is asked to end, which it then does."""
        self.meter.add(self.numbers, **values)
        self.done += 1
        save_now = self.run.stopping() or self.done % self.args.save_every == 0
        if save_now or self.done == self.total or self.done % self.args.log_every == 0:
            means = self.meter.read(self.loader.dataset.ids)
            self.log(self.done, epoch=(self.done - 1) // len(self.loader), lr=self.rate, **means)
        if save_now:
            self.save_state()
            guard.leave(self.last, self.done)

    def finish(self, model, classes, **more):
        """Writes the finished weights, of a module or as they are; all ranks leave together."""
        if self.run.main:
            state = model if isinstance(model, dict) else processes.unwrap(model).state_dict()
            # Of the flags the recipe alone: equal results are equal files.
            save(self.path, stage=self.stage, model=state, classes=classes, args=flags.recipe(self.args),
                 **more)
        self.run.close(f"{self.path} is finished")

    # -- the state to resume from

    def save_state(self):
        """Everything the next step depends on; all ranks call it, rank 0 writes."""
        broken = self.broken()
        if broken:
            raise ValueError(f"{self.last}: {broken} after step {self.done}, though the loss was finite: "
                             "not saved; lower --lr, or take --amp bf16 or off")
        states = [random_state()] * self.run.world
        if self.run.world > 1:
            dist.all_gather_object(states, states[0])
        if self.run.main:
            save(self.last, model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                 schedule=self.schedule.state_dict(), scaler=self.scaler.state_dict(), random=states,
                 step=self.done, args=flags.plain(self.args))

    def broken(self):
        """What the last steps have broken, or None. All ranks hold the same, so all of them answer alike."""
        values = dict(self.model.state_dict())
        for state in self.optimizer.state.values():
            values |= {f"the optimizer's {name}": value for name, value in state.items()}
        for name, value in values.items():
            if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
                return f"{name} holds NaN or infinity"
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1e-6:   # it halves with every step left out
            return "no step is taken, since fp16 gradients are not finite at any scale,"
        return None

    def drop_old(self):
        """With --no-resume: an interrupted run then goes on from here."""
        if not self.args.resume:
            self.last.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def resume(self):
        self.drop_old()
        if not self.last.exists():
            return
        state = read_tensors(self.last)
        try:
            same_recipe(self.last, state["args"], self.args)
            load_weights(self.model, state["model"], self.last)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            if self.run.rank < len(state["random"]):  # of more ranks than before the new ones keep their seed
                set_random_state(state["random"][self.run.rank])
            self.done = state["step"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.last} is damaged ({type(error).__name__} in its state): "
                             "remove it, the stage then starts again") from None


def random_state():
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_random_state(state):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
