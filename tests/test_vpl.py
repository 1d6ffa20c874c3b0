"""VPL phase 1 as a command on a tiny world: what is marked, what W learns from it against Eq. 5, 7, 10 and 11
written out, interrupted against uninterrupted; and make_cam.py's maps by texts and by W. (Several processes:
test_ranks.py.)"""
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused, rows

from plumbing import files, folders
from wsss import clip_model, gradcam, losses, texts

GROUNDS = ["rails", "water", "grass", "sky"]
TEXTS = [f"a clean origami {name}." for name in CLASSES + GROUNDS]
SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--tau-t", "0.02"]
STEPS = ["--batch-size", "2", "--phi", "0.6", "--steps", "20", "--lr", "0.1", "--log-every", "5",
         "--save-every", "5"]


def make_world(root, clip, **more):
    make_folder(root / "data", **more)
    (root / "clip.pt").symlink_to(clip)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, and one finished run in `out`."""
    root = make_world(tmp_path_factory.mktemp("world"), tiny_clip)
    (root / "data/backgrounds.txt").write_text("\n".join(GROUNDS))
    vpl(root, root / "out")
    return root


def line(script, world, out, *more):
    more = [*(STEPS if script == "vpl.py" else []), *more]
    return [script, "--data", world / "data", "--out", out, "--clip", world / "clip.pt", *SHARED, *more]


def vpl(world, out, *more):
    done = call(*line("vpl.py", world, out, *more))
    assert done.returncode == 0, done.stderr
    return read(out)


def read(out):
    return torch.load(out / "prototypes.pt", weights_only=True)


def log_of(out):
    """The log without its clock."""
    return [{**row, "seconds": 0} for row in rows(out / "prototypes.jsonl")]


def features(out):
    """{id: (x (n, D), class (n,))} as stored."""
    stored = {id: np.load(out / f"features/{id}.npy") for id in LABELS}
    assert all(file.dtype == np.float16 for file in stored.values())
    return {id: (file[:, :-1].astype(float), file[:, -1].astype(int)) for id, file in stored.items()}


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "features").glob("*.npy")}


def look(world, id, columns, tau, affinity=True, mirrored=False):
    """CLIP-ES on one image, by what test_gradcam.py checks -> maps (P, h, w), CLIP, its last block's input"""
    clip = clip_model.load_clip(world / "clip.pt")
    image = folders.Folder(world / "data").image(id)[None]
    x, attention, grid = gradcam.last_inputs(clip, image.flip(3) if mirrored else image)
    competes = torch.tensor([[n in LABELS[id] or n >= 3 for n in range(len(columns))]])
    k = torch.tensor(LABELS[id], dtype=torch.long)
    maps = gradcam.gradcam(clip, x, grid, columns, competes, 0 * k, k, 1 / tau)
    if affinity:
        maps = gradcam.refine(maps, gradcam.affinity(attention), 0 * k, 0.4)
    return maps, clip, x


# ---------------------------------------------------------------- what is marked

@pytest.mark.parametrize("affinity,kind", [(True, "patch"), (False, "value")])
def test_stored_are_the_features_of_marked_pixels(world, tmp_path, affinity, kind):
    """Images of two classes, of one and of none. 3 marks background, -1 neither: the rule as a loop."""
    Z = vpl(world, tmp_path, *([] if affinity else ["--no-affinity"]), "--features", kind)["model"]["text"]
    for id in ("a_2", "a_1", "a_3"):
        maps, clip, x = look(world, id, Z, 0.02, affinity)
        marked = []
        for n in range(25 if id == "a_2" else 20):            # of 8 pixels, the last ones begun: 34 are 5
            values = [m.flatten()[n].item() for m in maps]
            top = max(values, default=0)
            marked.append(LABELS[id][values.index(top)] if top >= 0.6 else 3 if 1 - top >= 0.6 else -1)
        marked = np.array(marked)
        assert set(marked) - {-1} == {*LABELS[id], 3}
        found, classes = features(tmp_path)[id]
        assert classes.tolist() == marked[marked >= 0].tolist()
        x = gradcam.patch_features(clip, x, kind)[0].numpy()[marked >= 0]
        np.testing.assert_allclose(found, x, atol=1e-3)


def test_regions_are_means_and_max_pixels_is_a_draw(world, tmp_path):
    """A region is the mean over the pixels of a class; each image keeps at most its share of --max-pixels."""
    vpl(world, tmp_path / "region", "--steps", "1", "--pool", "region")
    vpl(world, tmp_path / "few", "--steps", "1", "--max-pixels", "37")
    region, few = features(tmp_path / "region"), features(tmp_path / "few")
    for id, (x, marked) in features(world / "out").items():
        pooled, classes = region[id]
        assert classes.tolist() == sorted(set(marked))
        for row, k in zip(pooled, classes):
            mean = x[marked == k].mean(0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-3)
        drawn, kinds = few[id]
        places = [int(np.abs(x - row).sum(1).argmin()) for row in drawn]
        assert len(drawn) == min(37 // 5, len(x)) and places == sorted(set(places))    # a subset, each once
        assert (marked[places] == kinds).all()


# ---------------------------------------------------------------- what W learns

def targets(out, Z, allowed, harden=0.6):
    """x (n, D), P' (n, M) of Eq. 5 for all stored pixels. `allowed`: image's classes, own class -> columns"""
    all_x, p_text = [], []
    for id, (x, marked) in features(out).items():
        for pixel, k in zip(torch.from_numpy(x), marked):
            columns = allowed(LABELS[id], k)
            p = torch.zeros(7).double()
            p[columns] = (Z[columns] @ pixel / 0.02).softmax(0)
            p_text.append((p == p.max()).double() if harden and p.max() > harden else p)
            all_x.append(pixel)
    return torch.stack(all_x), torch.stack(p_text)


def descend(x, p_text, W, learned):
    """Eq. 7, 10, 11 by autograd; the rate halves when the gradient's norm grows. -> W, losses, rates"""
    norm, lr, seen = torch.inf, 0.1, []
    for _ in range(20):
        W = W.detach().requires_grad_()
        loss = -(p_text * (x @ W.T / 0.03).log_softmax(1)).sum(1).mean()
        gradient, = torch.autograd.grad(loss, W)
        gradient[learned:] = 0
        lr = lr / 2 if gradient.norm() > norm else lr
        norm = gradient.norm()
        W = F.normalize(W - lr * gradient, dim=1)
        seen.append((loss.item(), lr))
    return W.detach(), *zip(*seen)


def every(present, k):
    return list(range(7))


@pytest.mark.parametrize("more,allowed,harden", [
    ("", every, 0.6), ("--harden 0", every, 0), ("--harden 0.4", every, 0.4),
    ("--label-mask --harden 0", lambda present, k: present + [3, 4, 5, 6], 0),
    ("--no-background-pixels", every, 0.6), ("--no-learn-background", every, 0.6),
    ("--target hard", lambda present, k: [k] if k < 3 else [3, 4, 5, 6], 0.6)])
def test_the_scripts_own_steps_are_the_papers_equations(world, tmp_path, more, allowed, harden):
    made = vpl(world, tmp_path, *more.split())
    V, Z = (made["model"][name].double() for name in ("prototypes", "text"))
    x, p_text = targets(tmp_path, Z, allowed, harden)
    if more == "--harden 0.4":
        assert 0.05 < (p_text.max(1)[0] == 1).double().mean() < 0.95
    learned = 3 if more == "--no-learn-background" else 7
    W, loss, rates = descend(x, p_text, Z, learned)
    torch.testing.assert_close(V, W, rtol=0, atol=1e-4)
    torch.testing.assert_close(V[learned:], Z[learned:])
    assert (W[:learned] - Z[:learned]).abs().max() > 0.01 and rates[-1] < 0.1
    for row, step in zip(log_of(tmp_path), (1, 5, 10, 15, 20), strict=True):
        assert row["step"] == step and row["lr"] == rates[step - 1]
        assert row["loss"] == pytest.approx(loss[step - 1], rel=1e-4)
    before, after = ((x.mean(0) - M[:learned].mean(0)).norm().item() for M in (Z, W))
    assert made["gap"] == pytest.approx({"before": before, "after": after}, abs=1e-4)
    assert log_of(tmp_path)[0]["gap"] == pytest.approx(before, abs=1e-5)
    kinds = [k for _, marked in features(tmp_path).values() for k in marked]
    assert made["pixels"] == [kinds.count(k) for k in range(4)]
    assert (kinds.count(3) == 0) == ("background" in more)


def test_texts_have_clips_own_temperature_by_default(world, tmp_path):
    """vpl.py and make_cam.py without --tau-t: as with 1 / logit scale, and not as with another."""
    state = torch.load(world / "clip.pt", weights_only=True)
    own = 1 / state["logit_scale"].float().exp().item()
    found = {}
    for name, more in (("default", []), ("own", ["--tau-t", own]), ("other", ["--tau-t", 3 * own])):
        out = tmp_path / name
        shared = ["--data", world / "data", "--out", out, "--clip", world / "clip.pt", *SHARED[:-2], *more]
        for script in (["vpl.py", *STEPS], ["make_cam.py", "--source", "text", "--sheets", "0"]):
            done = call(*script, *shared)
            assert done.returncode == 0, done.stderr
        maps = [np.load(path) for path in sorted((out / "cam").glob("*.npy"))]
        found[name] = np.concatenate([m.ravel() for m in [read(out)["model"]["prototypes"].numpy(), *maps]])
        assert read(out)["tau_t"] == pytest.approx(own * (3 if name == "other" else 1))
    np.testing.assert_array_equal(found["default"], found["own"])
    assert found["other"].shape != found["own"].shape or np.abs(found["other"] - found["own"]).max() > 0.01


def test_modify_gap_shifts_the_texts_and_learns_nothing(world, tmp_path):
    made = vpl(world, tmp_path, "--modify-gap")
    Z, (x, _) = made["model"]["text"].double(), targets(tmp_path, made["model"]["text"].double(), every)
    want = torch.stack([row + x.mean(0) - sum(Z) / 7 for row in Z])
    want = torch.stack([row / row.norm() for row in want])
    torch.testing.assert_close(made["model"]["prototypes"].double(), want, rtol=0, atol=1e-5)
    assert made["gap"]["after"] < made["gap"]["before"] and not log_of(tmp_path)


def test_prototypes_say_what_they_are(world, tmp_path, tiny_clip):
    """Synonyms and backgrounds are CLIP-ES's where the folder names none; no pixel is a boat's."""
    made, clip = read(world / "out"), clip_model.load_clip(tiny_clip)
    W, Z = made["model"]["prototypes"], made["model"]["text"]
    assert (made["stage"], made["classes"], made["backgrounds"]) == ("prototypes", CLASSES, GROUNDS)
    assert (made["tau_t"], made["tau_i"], made["clip"]) == (0.02, 0.03, clip.fingerprint())
    assert W.shape == (7, 16) and W.dtype == torch.float32
    torch.testing.assert_close(W.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(Z, clip.encode_text(TEXTS))
    make_world(tmp_path, tiny_clip, labels={"b_1": [0], "b_2": [2]}, classes=["bird", "boat", "cow"])
    seven = texts.PROMPTS["templates"][0]
    for prompt, want in (("ensemble", ["a clean origami bird avian."]),
                         ("templates", [template.format("bird") for template in seven])):
        out = tmp_path / prompt
        done = call(*line("vpl.py", tmp_path, out, "--steps", "1", "--prompt", prompt))
        assert "no pixel was assigned to boat: trained only as negatives" in done.stdout
        Z = read(out)["model"]["text"]
        mean = sum(clip.encode_text([text])[0] for text in want)
        torch.testing.assert_close(Z[0], mean / mean.norm())
        assert len(Z) == 3 + 25
        shown = json.loads((out / "prototypes.jsonl").read_text().splitlines()[0])["texts"]
        assert [row[0] for row in shown] == want


# ---------------------------------------------------------------- the same numbers, however it is run

def strike(patch, module, name, number, struck):
    """A signal comes at the `number`-th call of a function."""
    function, calls = getattr(module, name), []

    def struck_function(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), struck)
        return function(*args)

    patch.setattr(module, name, struck_function)


@pytest.mark.parametrize("module,name,number,struck,words,kept", [
    (files, "atomic", 5, signal.SIGINT, "finished files are kept: run the same command", 3),
    (losses, "prototype_step", 8, signal.SIGTERM, "step 8 is saved in", 5)])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
        world, tmp_path, monkeypatch, module, name, number, struck, words, kept):
    """While the fourth file of features is written; in step 8 (9 halves lr)."""
    with monkeypatch.context() as patch:
        strike(patch, module, name, number, struck)
        done = call(*line("vpl.py", world, tmp_path))
    assert done.returncode > 128 and words in done.stderr and not (tmp_path / "prototypes.pt").exists()
    made = times(tmp_path)
    assert len(made) == kept
    resumed, uninterrupted = vpl(world, tmp_path), read(world / "out")
    assert torch.equal(resumed["model"]["prototypes"], uninterrupted["model"]["prototypes"])
    assert resumed["gap"] == uninterrupted["gap"] and log_of(tmp_path) == log_of(world / "out")
    assert times(tmp_path).items() >= made.items()            # read, not made again


def test_finished_is_skipped_another_recipe_refused_and_features_read_again(world, tmp_path):
    vpl(world, tmp_path, "--steps", "5")
    made = times(tmp_path)
    assert "is finished" in call(*line("vpl.py", world, tmp_path, "--steps", "5")).stdout
    refused(call(*line("vpl.py", world, tmp_path, "--tau-i", "0.02")), "--tau-i 0.03 (now 0.02)", "--out")
    vpl(world, tmp_path, "--no-resume", "--steps", "5", "--tau-i", "0.02", "--target", "hard")
    assert times(tmp_path) == made                            # of the same pixels
    (tmp_path / "prototypes.pt").unlink()
    done = call(*line("vpl.py", world, tmp_path, "--features", "patch"))
    refused(done, "features was made with --features value (now patch)")


def test_an_interrupted_no_resume_goes_on_and_leaves_no_old_prototypes(world, tmp_path, monkeypatch):
    vpl(world, tmp_path, "--steps", "5")
    refused(call(*line("vpl.py", world, tmp_path, "--no-resume", "--split", "trian")), "trian.txt is missing")
    assert (tmp_path / "prototypes.pt").exists()              # nothing was begun
    with monkeypatch.context() as patch:
        strike(patch, losses, "prototype_step", 8, signal.SIGTERM)
        done = call(*line("vpl.py", world, tmp_path, "--no-resume"))
    assert done.returncode > 128 and not (tmp_path / "prototypes.pt").exists()
    resumed, uninterrupted = vpl(world, tmp_path), read(world / "out")
    assert torch.equal(resumed["model"]["prototypes"], uninterrupted["model"]["prototypes"])


def test_refused_in_one_line(world, tmp_path, tiny_clip):
    def refuses(words, *more, where=world, out=tmp_path / "out", script="vpl.py"):
        refused(call(*line(script, where, out, *more)), words)

    refuses("less than one for each of 5 images", "--max-pixels", "4")
    refuses("not of unit length: take a smaller --lr than 1e+300", "--lr", "1e300", "--steps", "3")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "other.pt")
    state["visual.ln_post.bias"][:] = 3e38                    # its sums are infinite
    torch.save(state, tmp_path / "large.pt")
    refuses("features of a_1 are not finite", "--clip", tmp_path / "large.pt", out=tmp_path / "new")
    maps = ["--source", "vision", "--cam", "x"]
    assert call(*line("make_cam.py", world, world / "out", *maps)).returncode == 0
    assert json.loads((world / "out/x.json").read_text())["args"]["tau_i"] == 0.03   # that of the prototypes
    refuses("prototypes.pt is missing: run vpl.py", *maps, script="make_cam.py")
    refuses("was learned with another --clip", *maps, "--clip", tmp_path / "other.pt", out=world / "out",
            script="make_cam.py")
    done = call(*line("vpl.py", world, tmp_path, "--phi", "0"))        # no map at all would mark class 0
    assert done.returncode == 2 and "--phi: 0 is not in (0, 1]" in done.stderr
    fog = make_world(tmp_path / "fog", tiny_clip)
    (fog / "data/backgrounds.txt").write_text("fog\n")
    refuses("was learned with other backgrounds", *maps, where=fog, out=world / "out", script="make_cam.py")
    assert not list(tmp_path.rglob("prototypes*.pt"))


# ---------------------------------------------------------------- maps by texts and by vision prototypes

@pytest.mark.parametrize("source,tau,more", [("text", 0.02, ["--scales", "1", "1", "--flip"]),
                                             ("vision", 0.03, [])])
def test_maps_are_the_mean_gradcam_of_each_image(world, source, tau, more):
    """Over scales and flips, not min-max scaled again (resizing: test_make_cam.py); one image at a time,
    against batches; by W and tau_I where the source is vision."""
    out, name = world / "out", f"cam_{source}"
    done = call(*line("make_cam.py", world, out, "--source", source, "--cam", name, *more))
    assert done.returncode == 0, done.stderr
    columns = read(out)["model"]["text" if source == "text" else "prototypes"]
    for id, present in LABELS.items():
        found = np.load(out / name / f"{id}.npy")
        want = torch.zeros(found.shape)
        for mirrored in (False, True)[:1 + len(more)] if present else ():
            maps = look(world, id, columns, tau, mirrored=mirrored)[0]
            maps = F.interpolate(maps[None], found.shape[1:], mode="bilinear")[0]
            want += (maps.flip(2) if mirrored else maps) / (2 if more else 1)
        assert len(found) == len(present) and np.abs(found - want.numpy()).max(initial=0) < 2e-3
    note = json.loads((out / f"{name}.json").read_text())
    assert note["texts"] == ([TEXTS] if source == "text" else None)
