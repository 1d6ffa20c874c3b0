"""Checkpoints, finished folders, and the state to resume from."""
import contextlib
import hashlib
import json
import math
import os
import pickletools
import random
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing import files, flags, guard, processes



def save(path, **content):
    """A checkpoint of plain values and tensors."""
    with files.atomic(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:                         # torch closes its archive over a full disk and reports that
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.flush()
        os.fsync(file.fileno())


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
        found[name] = (files.fingerprint(path) if Path(path).is_file() else files.read_json(note).get("fingerprint") if note.exists()
                       else files.folder_fingerprint(path) if isinstance(path, Path) and path.is_dir() else None)
    return found


def load(path, stage=None, classes=None, map_location="cpu"):
    """A checkpoint of ours: of that stage and that class list, or one line that says what to do."""
    path = Path(path)
    if not path.exists():
        script = files.MADE_BY.get(path.name, "the stage that makes it")
        raise FileNotFoundError(f"{path} is missing: run {script} first (README.md has the order)")
    content = read_tensors(path, map_location)
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise ValueError(f"{path} holds no stage: it is not one of our checkpoints; published weights go to --init")
    content = checked(path, content)
    if stage is not None and content["stage"] != stage:
        raise ValueError(f"{path} is of stage {content['stage']!r}, {stage!r} is needed: run {files.MADE_BY.get(stage + '.pt', stage)}")
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
        raise ValueError(f"{path} is not a checkpoint of this project ({why}): remove it and run {files.MADE_BY.get(path.name, 'its stage')} again") from None


def checked(path, content):
    """Names are texts, arguments plain values: what is told of them in one line is one line."""
    plain = lambda value: value is None or isinstance(value, (str, int, float))
    args, again = content.get("args", {}), f"remove it and run {files.MADE_BY.get(path.name, 'its stage')} again"
    if not isinstance(args, dict) or not all(plain(v) or isinstance(v, (list, tuple)) and all(map(plain, v)) or isinstance(v, dict) and all(map(plain, v.values()))
                                             for v in args.values()):
        raise ValueError(f"{path} holds arguments that are no plain values: {again}")
    for names in ("classes", "backgrounds"):
        if names in content and not (isinstance(content[names], list) and all(isinstance(name, str) and len(name) <= 100 for name in content[names])):
            raise ValueError(f"{path} holds {names} that are no list of names: {again}")
    return files.Found(path, {**content, "args": files.Found(path, args)} if "args" in content else content)


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
        processes.unwrap(model).load_state_dict(dict(weights), strict=True)       # without its metadata, which can tell torch to take tensors as they are
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
    before, now = flags.recipe(before), flags.recipe(args)
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
    before = files.read_json(note) if note.exists() else {"script": "another program" if made else script}
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
        decides = {k: v for k, v in flags.recipe(args).items() if k not in free}
        digest = hashlib.sha256(json.dumps([decides, facts], sort_keys=True).encode()).hexdigest()[:16]
        if not (keep and before.get("fingerprint") == digest):                        # else it stands there, and another stage may be reading it
            files.save_json(note, {"script": script, "args": flags.plain(args), **facts, "fingerprint": digest})
    env.barrier()


def short(fact):
    return describe(fact) if isinstance(fact, list) else json.dumps(fact)[:200]


def save_state(path, model, optimizer, scheduler, scaler, epoch, step, args):
    """Everything the next step depends on: call it on all ranks, rank 0 writes. `step`: batches of `epoch` already done."""
    broken = not_finite(processes.unwrap(model), optimizer, scaler)
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
        save(path, model=processes.unwrap(model).state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
             scaler=scaler.state_dict(), rng=ranks, epoch=epoch, step=step, args=flags.plain(args))
    guard.leave(path, f"{step} of epoch {epoch + 1}" if epoch else step)


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
