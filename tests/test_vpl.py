"""VPL phase 1 as a command on a tiny world: what is marked, what W learns from it, resumed, batched and shared among processes alike."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, call, make_folder, refused, run_together

import train_seg
from plumbing import flags as flag_types, folders, maps as map_files, processes, samples as sampling
from wsss import clip_model, gradcam, losses, segmenter, texts as names

C, GROUNDS = 3, ["rails", "water", "grass", "sky"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip):
    """Data, CLIP, and one finished run in `out`."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "data")
    (root / "data/backgrounds.txt").write_text("\n".join(GROUNDS))
    (root / "clip.pt").symlink_to(tiny_clip)
    vpl(root, root / "out")
    return root


def flags(world, out, *more):
    return ["--data", world / "data", "--out", out, "--clip", world / "clip.pt", "--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0",
            "--batch-size", "2", "--tau-t", "0.02", "--phi", "0.6", "--steps", "20", "--lr", "0.1", "--log-every", "5", "--save-every", "5", *more]


def vpl(world, out, *more):
    done = call("vpl.py", *flags(world, out, *more))
    assert done.returncode == 0, done.stderr
    return torch.load(out / "prototypes.pt", weights_only=True)


def cam_flags(world, out, *more):
    return ["--data", world / "data", "--out", out, "--clip", world / "clip.pt", "--split", "train", "--device", "cpu", "--amp", "off",
            "--workers", "0", "--sheets", "0", "--tau-t", "0.02", *more]


def decoder_flags(world, out, *more):
    """Phase 2 on the true masks."""
    return ["--data", world / "data", "--out", out, "--clip", world / "clip.pt", "--split", "train", "--device", "cpu", "--amp", "off", "--workers", "0",
            "--model", "clip_decoder", "--label-dir", world / "data/SegmentationClass", "--width", "16", "--crop", "32", "--batch-size", "3", "--iterations", "4",
            "--lr", "0.05", "--log-every", "1", *more]


def rows(out):
    lines = [json.loads(line) for line in (out / "prototypes.jsonl").read_text().splitlines()][1:]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def features(out):
    """{id: (x (n, D), class (n,))} as stored."""
    files = {id: np.load(out / f"features/{id}.npy").astype(np.float64) for id in LABELS}
    return {id: (f[:, :-1], f[:, -1].astype(int)) for id, f in files.items()}


def expected(world, id, affinity=True, kind="patch"):
    """Features and marked class of every patch of a picture, -1 for none, the rule written as a loop. -> (N, D), (N,)"""
    clip, folder = clip_model.load_clip(world / "clip.pt"), folders.Folder(world / "data")
    texts = clip.encode_text(names.class_texts(CLASSES + GROUNDS, "a clean origami {}."))
    x, attention, grid = gradcam.last_inputs(clip, folder.image(id)[None])
    present = torch.tensor(LABELS[id], dtype=torch.long)
    competes = torch.tensor([[n in LABELS[id] or n >= C for n in range(C + len(GROUNDS))]])
    b = torch.zeros_like(present)
    maps = gradcam.gradcam(clip, x, grid, texts, competes, b, present, 50)
    if affinity:
        maps = gradcam.refine(maps, gradcam.affinity(attention), b, 0.4)
    marked = []
    for n in range(grid[0] * grid[1]):
        values = [m.flatten()[n].item() for m in maps]
        top = max(values, default=0)
        marked.append(LABELS[id][values.index(top)] if top >= 0.6 else C if 1 - top >= 0.6 else -1)
    return gradcam.patch_features(clip, x, kind)[0].numpy(), np.array(marked)


# ---------------------------------------------------------------- what it makes

def test_prototypes_of_classes_and_backgrounds_of_unit_length(world):
    made = torch.load(world / "out/prototypes.pt", weights_only=True)
    W, Z = made["model"]["prototypes"], made["model"]["text"]
    assert made["stage"] == "prototypes" and made["classes"] == CLASSES and made["backgrounds"] == GROUNDS
    assert (made["tau_t"], made["tau_i"]) == (0.02, 0.03)
    assert W.shape == Z.shape == (7, 16) and W.dtype == Z.dtype == torch.float32
    torch.testing.assert_close(W.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(Z, clip_model.load_clip(world / "clip.pt").encode_text(names.class_texts(CLASSES + GROUNDS, "a clean origami {}.")))
    mean = torch.from_numpy(np.concatenate([x for x, _ in features(world / "out").values()]).mean(0))
    for name, prototypes in (("before", Z), ("after", W)):
        assert made["gap"][name] == pytest.approx((mean - prototypes.double().mean(0)).norm().item(), abs=1e-6)
    log = rows(world / "out")
    assert [row["step"] for row in log] == [1, 5, 10, 15, 20] and log[-1]["loss"] < log[0]["loss"]
    assert log[0]["gap"] == pytest.approx(made["gap"]["before"], rel=1e-5)


def test_stored_are_the_features_of_marked_pixels(world, tmp_path):
    """Classes 1 and 2, one class, and none; with --no-affinity the maps alone, with --features value another x."""
    vpl(world, tmp_path, "--no-affinity", "--features", "value", "--steps", "1")
    for out, more in ((world / "out", {}), (tmp_path, dict(affinity=False, kind="value"))):
        for id in ("a_2", "a_1", "a_3"):
            x, marked = expected(world, id, **more)
            assert len(x) == 20 and set(marked) - {-1} == {*LABELS[id], C} or id == "a_3"
            found, classes = features(out)[id]
            assert classes.tolist() == marked[marked >= 0].tolist()
            np.testing.assert_allclose(found, x[marked >= 0], atol=1e-3)
    assert (features(world / "out")["a_3"][1] == C).all()


@pytest.mark.parametrize("more", [[], ["--target", "hard"], ["--no-label-mask"], ["--no-learn-background"], ["--no-background-pixels"]], ids=" ".join)
def test_prototypes_are_descent_from_the_texts_on_the_stored_pixels(world, tmp_path, more):
    """P' written as a loop over pixels; columns that are not learned get no gradient."""
    made = vpl(world, tmp_path / "out", *more)
    Z, all_x, p_text = made["model"]["text"].double(), [], []
    for id, (x, marked) in features(tmp_path / "out").items():
        for pixel, k in zip(torch.from_numpy(x), marked):
            columns = [n for n in range(7) if n >= C or n in LABELS[id]]
            if "--target" in more:
                columns = [k] if k < C else [3, 4, 5, 6]
            elif "--no-label-mask" in more:
                columns = range(7)
            e = [(pixel @ Z[n] / 0.02).exp() if n in columns else torch.tensor(0.) for n in range(7)]
            p_text.append(torch.stack([v / sum(e) for v in e])), all_x.append(pixel)
            assert k < C or not {"--no-learn-background", "--no-background-pixels"} & {*more}
    all_x, p_text, W, lr, norm = torch.stack(all_x), torch.stack(p_text).double(), Z, 0.1, torch.inf
    learned = C if "--no-learn-background" in more else 7
    for _ in range(20):
        gradient = losses.prototype_gradient(all_x, W, p_text, 0.03)[0] / len(all_x)
        gradient[learned:] = 0
        W, lr, norm = losses.prototype_step(W, gradient, lr, norm)
    torch.testing.assert_close(made["model"]["prototypes"].double(), W, rtol=0, atol=1e-4)
    assert (W[:learned] - Z[:learned]).abs().max() > 0.01
    assert made["gap"]["after"] == pytest.approx((all_x.mean(0) - W[:learned].mean(0)).norm().item(), abs=1e-4)
    assert made["pixels"] == [sum((marked == k).sum() for _, marked in features(tmp_path / "out").values()) for k in range(C + 1)]


def test_regions_are_means_over_the_pixels_of_a_class(world, tmp_path):
    made = vpl(world, tmp_path, "--pool", "region", "--steps", "1")
    for id, (pooled, classes) in features(tmp_path).items():
        x, marked = features(world / "out")[id]
        assert classes.tolist() == sorted(set(marked))
        for row, k in zip(pooled, classes):
            mean = x[marked == k].mean(0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-3)
    assert sum(made["pixels"]) == sum(len(set(marked)) for _, marked in features(world / "out").values())


def test_texts_of_one_prompt_and_of_another_template(world, tmp_path):
    clip = clip_model.load_clip(world / "clip.pt")
    for more, template in ((["--prompt", "single"], "a photo of a {}."), (["--template", "the {}"], "the {}")):
        made = vpl(world, tmp_path / more[0], "--steps", "1", *more)
        torch.testing.assert_close(made["model"]["text"], clip.encode_text([template.format(name) for name in CLASSES + GROUNDS]))


def test_synonyms_stand_in_the_names_of_an_ensemble(tmp_path, tiny_clip):
    make_folder(tmp_path / "data", labels={"b_1": [0], "b_2": [2]})
    for name, before, after in (("classes.txt", "train", "bird"), ("labels.txt", "train", "bird")):
        file = tmp_path / "data" / name
        file.write_text(file.read_text().replace(before, after))
    (tmp_path / "clip.pt").symlink_to(tiny_clip)
    done = call("vpl.py", *flags(tmp_path, tmp_path / "out", "--steps", "1"))
    assert "no pixel is marked as boat: these" in done.stdout and "b_" not in done.stdout
    text = torch.load(tmp_path / "out/prototypes.pt", weights_only=True)["model"]["text"]
    want = [f"a clean origami {name}." for name in ("bird avian", "boat", "cow", "ground")]
    torch.testing.assert_close(text[:4], clip_model.load_clip(tiny_clip).encode_text(want))
    assert len(text) == 3 + 25                                                          # VOC's backgrounds where the folder names none


# ---------------------------------------------------------------- the same numbers, however it is run

def test_batches_do_not_matter(world, tmp_path):
    five, two = vpl(world, tmp_path, "--batch-size", "5"), torch.load(world / "out/prototypes.pt", weights_only=True)
    torch.testing.assert_close(five["model"]["prototypes"], two["model"]["prototypes"], rtol=0, atol=1e-5)


def test_two_processes_are_one(world, tmp_path):
    """vpl.py, make_cam.py and the decoder, whose contrast is over the whole batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    jobs = lambda out: [("vpl.py", *flags(world, out, "--max-pixels", "50")), ("make_cam.py", *cam_flags(world, out, "--source", "vision")),
                        ("train_seg.py", *decoder_flags(world, out))]
    run_together(jobs(two), tmp_path)
    for job in jobs(one):
        assert call(*job).returncode == 0
    a, b = (torch.load(out / "prototypes.pt", weights_only=True) for out in (one, two))
    torch.testing.assert_close(a["model"]["prototypes"], b["model"]["prototypes"], rtol=0, atol=1e-5)
    assert a["pixels"] == b["pixels"] and a["gap"] == pytest.approx(b["gap"], abs=1e-6)
    for row, other in zip(rows(one), rows(two)):
        assert row == pytest.approx(other, rel=1e-4)
    for id in LABELS:
        assert np.abs(np.load(one / f"cam/{id}.npy").astype(float) - np.load(two / f"cam/{id}.npy")).max(initial=0) < 5e-3
    a, b = (torch.load(out / "seg.pt", weights_only=True)["model"] for out in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    logs = [[json.loads(line) for line in (out / "seg.jsonl").read_text().splitlines()[1:]] for out in (one, two)]
    assert len(logs[0]) == 4 and all(x[k] == pytest.approx(y[k], abs=1e-4) for x, y in zip(*logs) for k in ("loss", "ce", "rsc", "accuracy"))


def test_max_pixels_bounds_every_picture_and_draws_the_same(world, tmp_path):
    made = vpl(world, tmp_path / "a", "--max-pixels", "37", "--steps", "1")
    assert sum(made["pixels"]) <= 37
    vpl(world, tmp_path / "b", "--max-pixels", "37", "--steps", "1", "--batch-size", "1")
    vpl(world, tmp_path / "c", "--max-pixels", "37", "--steps", "1", "--seed", "1")
    for id, (x, marked) in features(tmp_path / "a").items():
        all_x, all_marked = features(world / "out")[id]
        assert len(x) == min(7, len(all_x))
        places = [int(np.abs(all_x - row).sum(1).argmin()) for row in x]
        assert places == sorted(set(places)) and (all_marked[places] == marked).all()   # a subset, each once
        assert (features(tmp_path / "b")[id][1] == marked).all()
    assert any(not np.array_equal(features(tmp_path / "c")[id][0], features(tmp_path / "a")[id][0]) for id in LABELS)


def test_sigterm_saves_the_step_of_the_descent(world, tmp_path, monkeypatch):
    steps, step = [], losses.prototype_step

    def struck(*args):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(losses, "prototype_step", struck)
    done = call("vpl.py", *flags(world, tmp_path))
    assert done.returncode == 143 and f"step 7 is saved in {tmp_path / 'prototypes.last.pt'}" in done.stderr, done.stderr
    resumed, uninterrupted = vpl(world, tmp_path), torch.load(world / "out/prototypes.pt", weights_only=True)
    assert torch.equal(resumed["model"]["prototypes"], uninterrupted["model"]["prototypes"]) and rows(tmp_path) == rows(world / "out")
    assert len(steps) == uninterrupted["args"]["steps"]


@pytest.mark.parametrize("kill", ["features", "descent"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path, kill, monkeypatch):
    def killed(path, *args, **content):
        if path.name == ("a_2.npy" if kill == "features" else "prototypes.last.pt") and not (kill == "descent" and content["step"] < 10):
            raise KeyboardInterrupt
        return whole(path, *args, **content)

    name = "atomic" if kill == "features" else "save"
    whole = getattr(checkpoints, name)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, name, killed)
        done = call("vpl.py", *flags(world, tmp_path))
    assert done.returncode == 130 and "nothing finished is lost" in done.stderr and not (tmp_path / "prototypes.pt").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("features/*.npy")}
    assert len(kept) == (3 if kill == "features" else 5) and (tmp_path / "prototypes.last.pt").exists() == (kill == "descent")
    resumed, uninterrupted = vpl(world, tmp_path), torch.load(world / "out/prototypes.pt", weights_only=True)
    assert all(torch.equal(resumed["model"][k], uninterrupted["model"][k]) for k in ("prototypes", "text"))
    assert resumed["gap"] == uninterrupted["gap"] and rows(tmp_path) == rows(world / "out")
    assert all((tmp_path / "features" / file).stat().st_mtime_ns == time for file, time in kept.items())          # read, not made again


def test_finished_is_skipped_and_another_recipe_refused(world, tmp_path):
    before = (world / "out/prototypes.pt").stat().st_mtime_ns
    done = call("vpl.py", *flags(world, world / "out"))
    assert done.returncode == 0 and "is finished" in done.stdout and (world / "out/prototypes.pt").stat().st_mtime_ns == before
    refused(call("vpl.py", *flags(world, world / "out", "--tau-i", "0.02")), "--tau-i 0.03 (now 0.02)", "another --out")
    (tmp_path / "features").symlink_to(world / "out/features")                          # Table 5 in another folder: pixels are collected once
    time = (world / "out/features/a_1.npy").stat().st_mtime_ns
    vpl(world, tmp_path, "--tau-i", "0.02", "--steps", "5")
    assert (world / "out/features/a_1.npy").stat().st_mtime_ns == time
    (tmp_path / "prototypes.pt").unlink()
    refused(call("vpl.py", *flags(world, tmp_path, "--features", "value")), "--features patch (now value)")


# ---------------------------------------------------------------- bad input

def test_refused_in_one_line(world, tmp_path):
    for more in (["--tau-t", "0"], ["--tau-i", "-1"], ["--lr", "nan"], ["--phi", "0"], ["--phi", "1.5"], ["--box", "1"]):
        done = call("vpl.py", *flags(world, tmp_path, *more))
        assert done.returncode == 2 and more[0] in done.stderr
    for more, words in ((["--max-pixels", "4"], "less than one for each of 5 pictures"), (["--clip", "ViT-Z/1"], "ViT-Z/1: no such file"),
                        (["--template", "a {x}"], "a text with one {} in it"), (["--template", "a {} of {}"], "a text with one {} in it")):
        refused(call("vpl.py", *flags(world, tmp_path, *more)), words)
    assert not list(tmp_path.glob("*.pt"))


def test_pictures_without_any_class_are_refused(tmp_path, tiny_clip):
    make_folder(tmp_path / "data", labels={"b_1": [], "b_2": []})
    (tmp_path / "clip.pt").symlink_to(tiny_clip)
    refused(call("vpl.py", *flags(tmp_path, tmp_path / "out")), "no pixel of 2 pictures is marked", "--phi 0.6")


def test_a_resnet_is_refused(world, tmp_path):
    from clip.model import CLIP
    model = CLIP(embed_dim=16, image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=4, vision_patch_size=None, context_length=77, vocab_size=49408,
                 transformer_width=64, transformer_heads=1, transformer_layers=1)
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    refused(call("vpl.py", *flags(world, tmp_path / "out", "--clip", tmp_path / "resnet.pt")), "ResNet", "ViT-B/16")


def test_features_that_are_not_finite_name_their_picture(world, tmp_path):
    state = torch.load(world / "clip.pt", weights_only=True)
    state["visual.ln_post.bias"][:] = 3e38                                              # sums to infinity; NaN itself would be refused as it is read
    torch.save(state, tmp_path / "nan.pt")
    refused(call("vpl.py", *flags(world, tmp_path / "out", "--clip", tmp_path / "nan.pt")), "features of a_1 are not finite")


def test_torn_features_are_named(world, tmp_path):
    vpl(world, tmp_path, "--steps", "1")
    (tmp_path / "prototypes.pt").unlink()
    (tmp_path / "features/a_4.npy").write_bytes(b"\x93NUMPY")
    refused(call("vpl.py", *flags(world, tmp_path, "--steps", "1")), "a_4.npy is not a plain .npy array", "remove it")


# ---------------------------------------------------------------- maps by texts and by vision prototypes

def cam(world, out, *more):
    return call("make_cam.py", *cam_flags(world, out, *more))


@pytest.mark.parametrize("source", ["text", "vision"])
def test_maps_are_the_gradcam_of_each_picture(world, tmp_path, source):
    """One picture at a time by the shared functions, against batches of two; by W and tau_I where the source is vision."""
    done = cam(world, world / "out", "--source", source, "--cam", f"cam_{source}", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    made = torch.load(world / "out/prototypes.pt", weights_only=True)
    columns, tau = (made["model"]["text"], 0.02) if source == "text" else (made["model"]["prototypes"], 0.03)
    clip, folder = clip_model.load_clip(world / "clip.pt"), folders.Folder(world / "data")
    for id, present in LABELS.items():
        image = folder.image(id)
        x, attention, grid = gradcam.last_inputs(clip, image[None])
        competes = torch.tensor([[n in present or n >= C for n in range(C + len(GROUNDS))]])
        k = torch.tensor(present, dtype=torch.long)
        maps = gradcam.refine(gradcam.gradcam(clip, x, grid, columns, competes, 0 * k, k, 1 / tau), gradcam.affinity(attention), 0 * k, 0.4)
        maps = map_files.resize_maps(maps, image.shape[1:])
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        stored = np.load(world / f"out/cam_{source}/{id}.npy")
        assert stored.shape == (len(present), *image.shape[1:]) and np.abs(stored - ((maps - low) / (high - low)).numpy()).max(initial=0) < 2e-3


def test_vision_maps_are_others_than_text_maps(world, tmp_path):
    made = [cam(world, world / "out", "--source", source, "--cam", f"other_{source}", "--limit", "2") for source in ("text", "vision")]
    a, b = (np.load(world / f"out/other_{source}/a_2.npy") for source in ("text", "vision"))
    assert all(done.returncode == 0 for done in made) and not np.allclose(a, b, atol=0.02)


def test_the_stored_inputs_of_the_last_block_give_the_same_maps(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    vpl(world, out, "--cache")
    assert len(list((out / "cache").glob("*.pt"))) == 5
    looks = []
    monkeypatch.setattr(gradcam, "last_inputs", lambda *_: looks.append(1))      # nothing goes through CLIP again
    assert cam(world, out, "--source", "vision", "--cache").returncode == 0 and not looks
    monkeypatch.undo()
    assert cam(world, out, "--source", "vision", "--cam", "fresh").returncode == 0
    for id in LABELS:
        assert np.abs(np.load(out / f"cam/{id}.npy").astype(float) - np.load(out / f"fresh/{id}.npy")).max(initial=0) < 0.02
    refused(cam(world, out, "--source", "vision", "--cam", "third", "--cache", "--amp", "bf16"), "cache was made with --amp off (now bf16)")


def test_maps_refuse_what_does_not_fit(world, tmp_path, tiny_clip):
    refused(cam(world, tmp_path / "none", "--source", "vision"), "prototypes.pt is missing: run vpl.py")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "other.pt")
    refused(cam(world, world / "out", "--source", "vision", "--cam", "x", "--clip", tmp_path / "other.pt"), "was learned with another --clip")
    other = make_folder(tmp_path / "d")
    (other / "backgrounds.txt").write_text("fog\n")
    refused(call("make_cam.py", "--data", other, "--out", world / "out", "--cam", "x", "--clip", world / "clip.pt", "--split", "train", "--source", "vision"),
            "was learned with other backgrounds")
    for wrong in (["--source", "text", "--init", "x.pt"], ["--source", "text", "--cache", "--flip"], ["--source", "refine", "--cache"], ["--source", "text", "--tau-t", "0"]):
        assert cam(world, world / "out", "--cam", "x", *wrong).returncode == 2


# ---------------------------------------------------------------- phase 2

@pytest.fixture(scope="module")
def decoded(world):
    done = call("train_seg.py", *decoder_flags(world, world / "out"))
    assert done.returncode == 0, done.stderr
    return world / "out"


def test_decoder_compares_its_pixels_with_the_prototypes(world, decoded):
    clip, content = clip_model.load_clip(world / "clip.pt"), torch.load(decoded / "seg.pt", weights_only=True)
    seen = []
    model = segmenter.load_segmenter(decoded / "seg.pt", lambda images: seen.append(gradcam.block_outputs(clip, images)) or seen[-1])
    W = torch.load(decoded / "prototypes.pt", weights_only=True)["model"]["prototypes"]
    assert torch.equal(content["model"]["prototypes"], W) and not any("conv1" in name for name in content["model"])      # CLIP is not stored
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        whole = model(images)
        logits, coarse, v = model.train()(images)
    tokens, grid = seen[0]
    assert grid == (3, 5) and len(tokens) == 1 and tokens[0].shape == (2, 15, 64)       # of two blocks the first
    assert whole.shape == logits.shape == (2, 4, 24, 40) and coarse.shape == (2, 4, 3, 5) and v.shape == (2, 16, 3, 5)
    torch.testing.assert_close(whole, logits, rtol=1e-4, atol=1e-4)
    cosine = torch.einsum("bdhw,md->bmhw", torch.nn.functional.normalize(v, dim=1), W) / 0.03
    torch.testing.assert_close(coarse[:, 1:], cosine[:, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coarse[:, 0], cosine[:, 3:].exp().sum(1).log(), rtol=1e-4, atol=1e-4)


def test_logged_losses_are_equations_12_to_14(world, decoded):
    """The first line of seg.jsonl: the batch, the crops and the fresh weights are known by the seed."""
    folder, W = folders.Folder(world / "data"), torch.load(decoded / "prototypes.pt", weights_only=True)["model"]["prototypes"]
    args = flag_types.parser("").parse_args(["--data", "x", "--out", str(decoded), "--device", "cpu"])
    env, clip = processes.Env(args), clip_model.load_clip(world / "clip.pt")
    content = torch.load(decoded / "prototypes.pt", weights_only=True)
    model = segmenter.build_decoder(lambda images: gradcam.block_outputs(clip, images), 64, 1, content, 16).train()
    samples = sampling.Samples(folder, folder.ids("train"), train_seg.transform(32, 0.5, 1.5), 0, lambda id: folder.root / f"SegmentationClass/{id}.png")
    images, masks, _ = samples.collate([samples[key] for key in next(iter(sampling.Batches(5, 3, env)))])
    with torch.no_grad():
        logits, coarse, v = model(images)
    ce = torch.nn.functional.cross_entropy(logits, masks, ignore_index=255)
    P, present = torch.zeros(3, 3, 16), torch.zeros(3, 3)
    for i in range(3):
        for n in range(3):
            A = coarse[i].softmax(0)[n + 1]
            P[i, n] = (A * v[i]).sum((1, 2)) / A.sum()
            present[i, n] = bool((masks[i] == n + 1).any())
    first = json.loads((decoded / "seg.jsonl").read_text().splitlines()[1])
    assert first["ce"] == pytest.approx(ce.item(), abs=1e-4) and present.any()
    assert first["rsc"] == pytest.approx(losses.region_contrast(P, W[:3], present, 0.07).item(), abs=1e-4)
    assert first["loss"] == pytest.approx(first["ce"] + first["rsc"], abs=1e-4)


def test_decoder_is_scored_by_eval(world, decoded, tmp_path):
    flags = ["--data", world / "data", "--out", decoded, "--split", "train", "--what", "seg", "--scales", "1", "--device", "cpu", "--amp", "off", "--workers", "0", "--no-crf"]
    done = call("eval.py", *flags)
    assert done.returncode == 0 and json.loads((decoded / "eval_seg_train.json").read_text())["protocol"]["made_by"]["model"] == "clip_decoder", done.stderr
    torch.save({k: v + 0.01 for k, v in torch.load(world / "clip.pt", weights_only=True).items()}, tmp_path / "other.pt")
    refused(call("eval.py", *flags, "--clip", tmp_path / "other.pt"), "was trained on another CLIP", "--clip")


def test_decoder_without_contrast_and_what_it_refuses(world, decoded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused(call("train_seg.py", *decoder_flags(world, out)), "prototypes.pt is missing: run vpl.py")
    (out / "prototypes.pt").symlink_to(decoded / "prototypes.pt")
    assert call("train_seg.py", *decoder_flags(world, out, "--lambda-rsc", "0", "--optimizer", "adamw")).returncode == 0
    log = [json.loads(line) for line in (out / "seg.jsonl").read_text().splitlines()[1:]]
    assert all(row["rsc"] == 0 and row["loss"] == pytest.approx(row["ce"]) for row in log)
    assert call("train_seg.py", *decoder_flags(world, out, "--width", "20")).returncode == 2
