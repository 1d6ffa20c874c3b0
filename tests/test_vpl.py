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
NAMES = CLASSES + GROUNDS
ENSEMBLE = [f"a clean origami {name}." for name in NAMES]
SHARED = ["--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0", "--tau-t", "0.02"]


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


def flags(world, out, *more):
    return ["--data", world / "data", "--out", out, "--clip", world / "clip.pt", *SHARED, *more]


def vpl_flags(world, out, *more):
    return flags(world, out, "--batch-size", "2", "--phi", "0.6", "--steps", "20", "--lr", "0.1",
                 "--log-every", "5", "--save-every", "5", *more)


def vpl(world, out, *more):
    done = call("vpl.py", *vpl_flags(world, out, *more))
    assert done.returncode == 0, done.stderr
    return read(out)


def read(out):
    return torch.load(out / "prototypes.pt", weights_only=True)


def log_of(out):
    """The log without its clock."""
    return [{**row, "seconds": 0} for row in rows(out / "prototypes.jsonl")]


def features(out, ids=LABELS):
    """{id: (x (n, D), class (n,))} as stored."""
    stored = {id: np.load(out / f"features/{id}.npy") for id in ids}
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

def expected(world, id, affinity=True, kind="patch"):
    """Feature and class of every patch, 3 for background, -1 for neither: the rule as a loop."""
    texts = clip_model.load_clip(world / "clip.pt").encode_text(ENSEMBLE)
    maps, clip, x = look(world, id, texts, 0.02, affinity)
    marked = []
    for n in range(20):                                       # 4 x 5 patches of 8 pixels
        values = [m.flatten()[n].item() for m in maps]
        top = max(values, default=0)
        marked.append(LABELS[id][values.index(top)] if top >= 0.6 else 3 if 1 - top >= 0.6 else -1)
    return gradcam.patch_features(clip, x, kind)[0].numpy(), np.array(marked)


def test_stored_are_the_features_of_marked_pixels(world, tmp_path):
    """Images of two classes, of one and of none; maps with and without affinity, both kinds of x."""
    vpl(world, tmp_path, "--no-affinity", "--features", "value", "--steps", "1")
    for out, more in ((world / "out", {}), (tmp_path, {"affinity": False, "kind": "value"})):
        for id in ("a_2", "a_1", "a_3"):
            x, marked = expected(world, id, **more)
            assert len(x) == 20 and set(marked) - {-1} == {*LABELS[id], 3}
            found, classes = features(out)[id]
            assert classes.tolist() == marked[marked >= 0].tolist()
            np.testing.assert_allclose(found, x[marked >= 0], atol=1e-3)


def test_regions_are_means_over_the_pixels_of_a_class(world, tmp_path):
    made = vpl(world, tmp_path, "--pool", "region", "--steps", "1")
    for id, (pooled, classes) in features(tmp_path).items():
        x, marked = features(world / "out")[id]
        assert classes.tolist() == sorted(set(marked))
        for row, k in zip(pooled, classes):
            mean = x[marked == k].mean(0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-3)
    assert sum(made["pixels"]) == sum(len(set(marked)) for _, marked in features(world / "out").values())


def test_max_pixels_bounds_every_image_and_draws_the_same(world, tmp_path):
    made = vpl(world, tmp_path / "a", "--max-pixels", "37", "--steps", "1")
    vpl(world, tmp_path / "b", "--max-pixels", "37", "--steps", "1", "--batch-size", "1")
    vpl(world, tmp_path / "c", "--max-pixels", "37", "--steps", "1", "--seed", "1")
    a, b, c, everything = (features(out) for out in (*(tmp_path / name for name in "abc"), world / "out"))
    assert sum(made["pixels"]) <= 37
    for id, (x, marked) in a.items():
        all_x, all_marked = everything[id]
        assert len(x) == min(7, len(all_x))
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


def descend(x, p_text, W, tau, lr, steps, learned):
    """Eq. 7, 10, 11 by autograd; the rate halves when the gradient's norm grows. -> W, losses, rates"""
    norm, seen = torch.inf, []
    for _ in range(steps):
        W = W.detach().requires_grad_()
        loss = -(p_text * (x @ W.T / tau).log_softmax(1)).sum(1).mean()
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


@pytest.mark.parametrize("more,allowed,learned", [
    ([], own, 7), (["--no-label-mask"], lambda present, k: range(7), 7),
    (["--target", "hard"], lambda present, k: [k] if k < 3 else [3, 4, 5, 6], 7),
    (["--no-learn-background"], own, 3), (["--no-background-pixels"], own, 7)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_the_scripts_own_steps_are_the_papers_equations(world, tmp_path, more, allowed, learned):
    made = vpl(world, tmp_path, *more)
    Z = made["model"]["text"].double()
    x, p_text = targets(tmp_path, Z, allowed)
    W, loss, rates = descend(x, p_text, Z, 0.03, 0.1, 20, learned)
    torch.testing.assert_close(made["model"]["prototypes"].double(), W, rtol=0, atol=1e-4)
    assert (W[:learned] - Z[:learned]).abs().max() > 0.01
    torch.testing.assert_close(made["model"]["prototypes"][learned:].double(), Z[learned:])
    assert rates[-1] < rates[0] == 0.1
    for row, step in zip(log_of(tmp_path), (1, 5, 10, 15, 20), strict=True):
        assert row["step"] == step
        assert (row["loss"], row["lr"]) == (pytest.approx(loss[step - 1], rel=1e-4), rates[step - 1])
    gaps = {name: (x.mean(0) - V[:learned].mean(0)).norm().item()
            for name, V in (("before", Z), ("after", W))}
    assert made["gap"] == pytest.approx(gaps, abs=1e-4)
    assert log_of(tmp_path)[0]["gap"] == pytest.approx(gaps["before"], abs=1e-5)
    kinds = [k for _, marked in features(tmp_path).values() for k in marked]
    assert made["pixels"] == [kinds.count(k) for k in range(4)]
    assert (made["pixels"][3] == 0) == (more[:1] in (["--no-learn-background"], ["--no-background-pixels"]))


def test_texts_are_the_optimum_at_their_own_temperature(world, tmp_path):
    """With all columns in P' and tau_I = tau_T, W = Z has no gradient; the label mask alone moves it."""
    for more, moves in (["--no-label-mask"], False), ([], True):
        made = vpl(world, tmp_path / str(moves), "--tau-i", "0.02", *more)
        W, Z = made["model"]["prototypes"], made["model"]["text"]
        assert (rows(tmp_path / str(moves) / "prototypes.jsonl")[0]["norm"] > 1e-3) == moves
        assert ((W - Z).abs().max() > 1e-3) == moves


def test_prototypes_say_what_they_are(world, tmp_path):
    made, clip = read(world / "out"), clip_model.load_clip(world / "clip.pt")
    W, Z = made["model"]["prototypes"], made["model"]["text"]
    assert (made["stage"], made["classes"], made["backgrounds"]) == ("prototypes", CLASSES, GROUNDS)
    assert (made["tau_t"], made["tau_i"], made["clip"]) == (0.02, 0.03, clip.fingerprint())
    assert W.shape == Z.shape == (7, 16) and W.dtype == Z.dtype == torch.float32
    torch.testing.assert_close(W.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(Z, clip.encode_text(ENSEMBLE))
    single = vpl(world, tmp_path, "--steps", "1", "--prompt", "single")["model"]["text"]
    torch.testing.assert_close(single, clip.encode_text([f"a photo of a {name}." for name in NAMES]))


def test_synonyms_and_backgrounds_of_clip_es(tmp_path, tiny_clip):
    """Where the folder names no backgrounds; a class without a pixel is named."""
    make_world(tmp_path, tiny_clip, labels={"b_1": [0], "b_2": [2]}, classes=["bird", "boat", "cow"])
    done = call("vpl.py", *vpl_flags(tmp_path, tmp_path / "out", "--steps", "1"))
    assert "no pixel was assigned to boat: trained only as negatives" in done.stdout
    text = read(tmp_path / "out")["model"]["text"]
    want = [f"a clean origami {name}." for name in ("bird avian", "boat", "cow", "ground")]
    torch.testing.assert_close(text[:4], clip_model.load_clip(tiny_clip).encode_text(want))
    assert len(text) == 3 + 25


# ---------------------------------------------------------------- the same numbers, however it is run

def test_batches_and_processes_do_not_matter(world, tmp_path):
    more = ["--max-pixels", "50"]
    one = vpl(world, tmp_path / "one", *more)
    run_together([("vpl.py", *vpl_flags(world, tmp_path / "two", *more))], tmp_path)
    for other in (vpl(world, tmp_path / "five", "--batch-size", "5", *more), read(tmp_path / "two")):
        W, V = one["model"]["prototypes"], other["model"]["prototypes"]
        torch.testing.assert_close(W, V, rtol=0, atol=1e-5)
        assert one["pixels"] == other["pixels"] and one["gap"] == pytest.approx(other["gap"], abs=1e-6)
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def strike_features(monkeypatch):
    atomic = files.atomic

    def killed(path):
        if path.name == "a_2.npy":
            raise KeyboardInterrupt
        return atomic(path)
    monkeypatch.setattr(files, "atomic", killed)
    return 130, "finished files are kept: run the same command again", 3


def strike_save(monkeypatch):
    """As if killed in step 10, before its state is saved."""
    save = checkpoints.save

    def killed(path, **content):
        if content["step"] == 10:
            raise KeyboardInterrupt
        save(path, **content)
    monkeypatch.setattr(checkpoints, "save", killed)
    return 130, "run the same command again", 5


def strike_step(monkeypatch):
    """SIGTERM in step 7, which is finished and saved."""
    steps, step = [], losses.prototype_step

    def struck(*args):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    monkeypatch.setattr(losses, "prototype_step", struck)
    return 143, "step 7 is saved in", 5


@pytest.mark.parametrize("strike", [strike_features, strike_save, strike_step])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, strike, monkeypatch):
    with monkeypatch.context() as patch:
        code, words, kept = strike(patch)
        done = call("vpl.py", *vpl_flags(world, tmp_path))
    assert done.returncode == code and words in done.stderr and not (tmp_path / "prototypes.pt").exists()
    made = times(tmp_path)
    assert len(made) == kept
    resumed, uninterrupted = vpl(world, tmp_path), read(world / "out")
    assert all(torch.equal(resumed["model"][name], value) for name, value in uninterrupted["model"].items())
    assert resumed["gap"] == uninterrupted["gap"] and log_of(tmp_path) == log_of(world / "out")
    assert times(tmp_path).items() >= made.items()            # read, not made again


def test_finished_is_skipped_another_recipe_refused_and_features_read_again(world, tmp_path):
    out = world / "out"
    before = (out / "prototypes.pt").stat().st_mtime_ns
    assert "is finished" in call("vpl.py", *vpl_flags(world, out)).stdout
    assert (out / "prototypes.pt").stat().st_mtime_ns == before
    refused(call("vpl.py", *vpl_flags(world, out, "--tau-i", "0.02")), "--tau-i 0.03 (now 0.02)", "--out")
    vpl(world, tmp_path)
    made = times(tmp_path)
    for more in (["--tau-i", "0.02"], ["--target", "hard"], ["--no-label-mask"]):     # of the same pixels
        vpl(world, tmp_path, "--no-resume", "--steps", "5", *more)
        assert times(tmp_path) == made
    (tmp_path / "prototypes.pt").unlink()
    done = call("vpl.py", *vpl_flags(world, tmp_path, "--features", "value"))
    refused(done, "features was made with --features patch (now value)")
    vpl(world, tmp_path, "--no-resume", "--features", "value")
    assert not times(tmp_path).items() & made.items()


# ---------------------------------------------------------------- bad input

def test_refused_in_one_line(world, tmp_path, tiny_clip):
    for more in (["--tau-t", "0"], ["--tau-i", "-1"], ["--lr", "nan"], ["--phi", "1.5"], ["--box", "1"]):
        done = call("vpl.py", *vpl_flags(world, tmp_path / "out", *more))
        assert done.returncode == 2 and more[0] in done.stderr
    done = call("vpl.py", *vpl_flags(world, tmp_path / "out", "--max-pixels", "4"))
    refused(done, "less than one for each of 5 images")
    done = call("vpl.py", *vpl_flags(world, tmp_path / "out", "--lr", "1e300", "--steps", "3"))
    refused(done, "the prototypes are not of unit length: take a smaller --lr than 1e+300")
    state = torch.load(tiny_clip, weights_only=True)
    state["visual.ln_post.bias"][:] = 3e38                    # its sums are infinite
    torch.save(state, tmp_path / "large.pt")
    done = call("vpl.py", *vpl_flags(world, tmp_path / "new", "--clip", tmp_path / "large.pt"))
    refused(done, "features of a_1 are not finite")
    (tmp_path / "out/features/a_4.npy").write_bytes(b"\x93NUMPY")
    done = call("vpl.py", *vpl_flags(world, tmp_path / "out"))
    refused(done, "a_4.npy is not a plain .npy array", "remove it")
    bare = make_world(tmp_path / "bare", tiny_clip, labels={"b_1": [], "b_2": []})
    done = call("vpl.py", *vpl_flags(bare, tmp_path / "bare/out"))
    refused(done, "no pixel of 2 images is marked as any class", "--phi 0.6")
    assert not list(tmp_path.rglob("prototypes*.pt"))


# ---------------------------------------------------------------- maps by texts and by vision prototypes

@pytest.mark.parametrize("source", ["text", "vision"])
def test_maps_are_the_gradcam_of_each_image(world, source):
    """One image at a time, against batches of two; by W and tau_I where the source is vision."""
    name, out = f"cam_{source}", world / "out"
    more = ["--source", source, "--cam", name, "--batch-size", "2", "--sheets", "0"]
    assert call("make_cam.py", *flags(world, out, *more)).returncode == 0
    made = read(out)["model"]
    columns, tau = (made["text"], 0.02) if source == "text" else (made["prototypes"], 0.03)
    for id, present in LABELS.items():
        maps, *_ = look(world, id, columns, tau)
        size = folders.Folder(world / "data").image(id).shape[1:]
        stored = np.load(out / name / f"{id}.npy")
        assert stored.shape == (len(present), *size)
        for row, m in zip(stored, maps):
            m = F.interpolate(m[None, None], size, mode="bilinear")[0, 0]
            m = (m - m.min()) / (m.max() - m.min())
            assert np.abs(row - m.numpy()).max() < 2e-3


def test_maps_refuse_what_does_not_fit(world, tmp_path, tiny_clip):
    def cam(out, *more, where=world):
        return call("make_cam.py", *flags(where, out, "--source", "vision", "--cam", "x", *more))

    refused(cam(tmp_path / "none"), "prototypes.pt is missing: run vpl.py")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "other.pt")
    done = cam(world / "out", "--clip", tmp_path / "other.pt")
    refused(done, "was learned with another --clip")
    other = make_world(tmp_path / "d", tiny_clip)
    (other / "data/backgrounds.txt").write_text("fog\n")
    refused(cam(world / "out", where=other), "was learned with other backgrounds")
    assert cam(world / "out", "--source", "text", "--init", "x.pt").returncode == 2
