"""VPL phase 1 as a command on a tiny world: what is marked, what W learns from it against Eq. 5, 7, 10 and 11
written out, interrupted against uninterrupted; and make_cam.py's maps by texts and by W."""
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LABELS, call, make_folder, refused, rows, run_together

from plumbing import checkpoints, files, folders
from wsss import clip_model, gradcam, losses

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


def look(world, id, columns, tau, affinity=True):
    """CLIP-ES on one image, by what test_gradcam.py checks -> maps (P, h, w), CLIP, its last block's input"""
    clip = clip_model.load_clip(world / "clip.pt")
    x, attention, grid = gradcam.last_inputs(clip, folders.Folder(world / "data").image(id)[None])
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
        for n in range(20):                                   # 4 x 5 patches of 8 pixels
            values = [m.flatten()[n].item() for m in maps]
            top = max(values, default=0)
            marked.append(LABELS[id][values.index(top)] if top >= 0.6 else 3 if 1 - top >= 0.6 else -1)
        marked = np.array(marked)
        assert set(marked) - {-1} == {*LABELS[id], 3}
        found, classes = features(tmp_path)[id]
        assert classes.tolist() == marked[marked >= 0].tolist()
        x = gradcam.patch_features(clip, x, kind)[0].numpy()[marked >= 0]
        np.testing.assert_allclose(found, x, atol=1e-3)


def test_regions_are_means_over_the_pixels_of_a_class(world, tmp_path):
    vpl(world, tmp_path, "--pool", "region", "--steps", "1")
    for id, (pooled, classes) in features(tmp_path).items():
        x, marked = features(world / "out")[id]
        assert classes.tolist() == sorted(set(marked))
        for row, k in zip(pooled, classes):
            mean = x[marked == k].mean(0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-3)


def test_max_pixels_bounds_every_image_and_draws_the_same(world, tmp_path):
    for out, more in (("a", []), ("b", ["--batch-size", "1"]), ("c", ["--seed", "1"])):
        vpl(world, tmp_path / out, "--max-pixels", "37", "--steps", "1", *more)
    a, b, c, everything = (features(out) for out in (*(tmp_path / name for name in "abc"), world / "out"))
    for id, (x, marked) in a.items():
        all_x, all_marked = everything[id]
        assert len(x) == min(37 // 5, len(all_x))
        places = [int(np.abs(all_x - row).sum(1).argmin()) for row in x]
        assert places == sorted(set(places)) and (all_marked[places] == marked).all()  # a subset, each once
        assert (b[id][1] == marked).all()
    assert any(not np.array_equal(a[id][0], c[id][0]) for id in LABELS)


# ---------------------------------------------------------------- what W learns

def targets(out, Z, allowed):
    """x (n, D), P' (n, M) of Eq. 5 for all stored pixels. `allowed`: image's classes, own class -> columns"""
    all_x, p_text = [], []
    for id, (x, marked) in features(out).items():
        for pixel, k in zip(torch.from_numpy(x), marked):
            e = [(pixel @ Z[n] / 0.02).exp() if n in allowed(LABELS[id], k) else torch.zeros(()).double()
                 for n in range(7)]
            p_text.append(torch.stack(e) / sum(e))
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
        W = W - lr * gradient
        W = W / W.norm(dim=1, keepdim=True)
        seen.append((loss.item(), lr))
    return W.detach(), *zip(*seen)


def own(present, k):
    return present + [3, 4, 5, 6]


@pytest.mark.parametrize("more,allowed", [
    ("", own), ("--no-label-mask", lambda present, k: range(7)), ("--no-background-pixels", own),
    ("--target hard", lambda present, k: [k] if k < 3 else [3, 4, 5, 6]), ("--no-learn-background", own)])
def test_the_scripts_own_steps_are_the_papers_equations(world, tmp_path, more, allowed):
    made = vpl(world, tmp_path, *more.split())
    V, Z = (made["model"][name].double() for name in ("prototypes", "text"))
    x, p_text = targets(tmp_path, Z, allowed)
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


def test_texts_are_the_optimum_at_their_own_temperature(world, tmp_path):
    """With all columns in P' and tau_I = tau_T, W = Z has no gradient; the label mask alone moves it."""
    for more, moves in (["--no-label-mask"], False), ([], True):
        made = vpl(world, tmp_path / str(moves), "--tau-i", "0.02", *more)["model"]
        assert (log_of(tmp_path / str(moves))[0]["norm"] > 1e-3) == moves
        assert ((made["prototypes"] - made["text"]).abs().max() > 1e-3) == moves


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
    for prompt, want in (("ensemble", "a clean origami bird avian."), ("single", "a photo of a bird.")):
        more = ["--steps", "1", "--prompt", prompt]
        done = call(*line("vpl.py", tmp_path, tmp_path / prompt, *more))
        assert "no pixel was assigned to boat: trained only as negatives" in done.stdout
        Z = read(tmp_path / prompt)["model"]["text"]
        torch.testing.assert_close(Z[:1], clip.encode_text([want]))
        assert len(Z) == 3 + 25


# ---------------------------------------------------------------- the same numbers, however it is run

def test_two_processes_are_one(world, tmp_path):
    more = ["--max-pixels", "50"]
    run_together([line("vpl.py", world, tmp_path / "two", *more)], tmp_path)
    one, two = vpl(world, tmp_path / "one", "--batch-size", "5", *more), read(tmp_path / "two")
    W, V = one["model"]["prototypes"], two["model"]["prototypes"]
    torch.testing.assert_close(W, V, rtol=0, atol=1e-5)
    assert one["pixels"] == two["pixels"] and one["gap"] == pytest.approx(two["gap"], abs=1e-6)
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("module,name,number,struck,code,words,kept", [
    (files, "atomic", 5, KeyboardInterrupt, 130, "finished files are kept: run the same command", 3),
    (checkpoints, "save", 2, KeyboardInterrupt, 130, "run the same command again", 5),
    (losses, "prototype_step", 8, signal.SIGTERM, 143, "step 8 is saved in", 5)])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
        world, tmp_path, monkeypatch, module, name, number, struck, code, words, kept):
    """While the fourth file of features is written, before step 10 is saved, in step 8 (9 halves lr)."""
    function, calls = getattr(module, name), []

    def strike(*args, **content):
        calls.append(1)
        if len(calls) == number:
            if struck is KeyboardInterrupt:
                raise struck
            os.kill(os.getpid(), struck)
        return function(*args, **content)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, strike)
        done = call(*line("vpl.py", world, tmp_path))
    assert done.returncode == code and words in done.stderr and not (tmp_path / "prototypes.pt").exists()
    made = times(tmp_path)
    assert len(made) == kept
    resumed, uninterrupted = vpl(world, tmp_path), read(world / "out")
    assert torch.equal(resumed["model"]["prototypes"], uninterrupted["model"]["prototypes"])
    assert resumed["gap"] == uninterrupted["gap"] and log_of(tmp_path) == log_of(world / "out")
    assert times(tmp_path).items() >= made.items()            # read, not made again


def test_finished_is_skipped_another_recipe_refused_and_features_read_again(world, tmp_path):
    vpl(world, tmp_path)
    made = times(tmp_path)
    assert "is finished" in call(*line("vpl.py", world, tmp_path)).stdout
    refused(call(*line("vpl.py", world, tmp_path, "--tau-i", "0.02")), "--tau-i 0.03 (now 0.02)", "--out")
    for more in (["--tau-i", "0.02"], ["--target", "hard"], ["--no-label-mask"]):     # of the same pixels
        vpl(world, tmp_path, "--no-resume", "--steps", "5", *more)
        assert times(tmp_path) == made
    (tmp_path / "prototypes.pt").unlink()
    done = call(*line("vpl.py", world, tmp_path, "--features", "value"))
    refused(done, "features was made with --features patch (now value)")
    vpl(world, tmp_path, "--no-resume", "--features", "value")
    assert not times(tmp_path).items() & made.items()


def test_refused_in_one_line(world, tmp_path, tiny_clip):
    def refuses(words, *more, where=world, out=tmp_path / "out"):
        refused(call(*line("vpl.py", where, out, *more)), words)

    assert call(*line("vpl.py", world, tmp_path, "--tau-t", "0")).returncode == 2
    refuses("less than one for each of 5 images", "--max-pixels", "4")
    refuses("not of unit length: take a smaller --lr than 1e+300", "--lr", "1e300", "--steps", "3")
    (tmp_path / "out/features/a_4.npy").write_bytes(b"\x93NUMPY")
    refuses("a_4.npy is not a plain .npy array")
    state = torch.load(tiny_clip, weights_only=True)
    state["visual.ln_post.bias"][:] = 3e38                    # its sums are infinite
    torch.save(state, tmp_path / "large.pt")
    refuses("features of a_1 are not finite", "--clip", tmp_path / "large.pt", out=tmp_path / "new")
    bare = make_world(tmp_path / "bare", tiny_clip, labels={"b_1": [], "b_2": []})
    refuses("no pixel of 2 images is marked as any class", where=bare, out=bare / "out")
    assert not list(tmp_path.rglob("prototypes*.pt"))


# ---------------------------------------------------------------- maps by texts and by vision prototypes

@pytest.mark.parametrize("source,tau", [("text", 0.02), ("vision", 0.03)])
def test_maps_are_the_gradcam_of_each_image(world, source, tau):
    """One image at a time, against batches of two; by W and tau_I where the source is vision."""
    out, name = world / "out", f"cam_{source}"
    more = ["--source", source, "--cam", name, "--batch-size", "2", "--sheets", "0"]
    assert call(*line("make_cam.py", world, out, *more)).returncode == 0
    columns = read(out)["model"]["text" if source == "text" else "prototypes"]
    for id, present in LABELS.items():
        maps, *_ = look(world, id, columns, tau)
        stored = np.load(out / name / f"{id}.npy")
        assert len(stored) == len(present)
        for row, m in zip(stored, maps):
            m = F.interpolate(m[None, None], row.shape, mode="bilinear")[0, 0]
            m = (m - m.min()) / (m.max() - m.min())
            assert np.abs(row - m.numpy()).max() < 2e-3


def test_maps_refuse_what_does_not_fit(world, tmp_path, tiny_clip):
    def refuses(words, out, *more, where=world):
        refused(call(*line("make_cam.py", where, out, "--source", "vision", "--cam", "x", *more)), words)

    refuses("prototypes.pt is missing: run vpl.py", tmp_path / "none")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "other.pt")
    refuses("was learned with another --clip", world / "out", "--clip", tmp_path / "other.pt")
    other = make_world(tmp_path / "d", tiny_clip)
    (other / "data/backgrounds.txt").write_text("fog\n")
    refuses("was learned with other backgrounds", world / "out", where=other)
