"""make_pseudo.py --segments as a command: which rule is applied to what, what goes on and what is refused."""
import numpy as np
import pytest
from conftest import LABELS, refused
from PIL import Image
from test_pseudo import made, make, maps_of, put_maps
from test_votes import naive_fma, naive_sepl

from plumbing import folders
from plumbing.images import load_image
from plumbing.segments import label_segments, load_segments, save_segments
from wsss.crf import dense_crf


@pytest.fixture
def world(voc, tmp_path):
    """Images, maps and segments: parts of the truth's own outlines for most, none for a_5."""
    folder, out = folders.Folder(voc), tmp_path / "out"
    (out / "segments").mkdir(parents=True)
    for n, id in enumerate(LABELS):
        truth = folder.truth(id)
        labels = truth.astype(int) * 100 + np.arange(truth.size).reshape(truth.shape) // 500
        found = [s._replace(level=n % 3) for s in label_segments(labels)] if id != "a_5" else []
        save_segments(out / "segments" / f"{id}.npz", truth.shape, found)
    (out / "segments/recipe.json").write_text('{"fingerprint": "first", "args": {"source": "slic"}}')
    return put_maps(voc, out)


def test_the_command_votes(world):
    more = ["--threshold", "0.3", "--preset", "deeplab"]
    voted = ["--segments", world[1] / "segments"]
    plain, _ = made(world, *more, "--no-crf")
    crf, without = made(world, *more, "--pseudo", "crf")
    sams, note = made(world, *more, *voted, "--pseudo", "sams")
    power, _ = made(world, *more, *voted, "--pseudo", "power", "--power", "1.5", "--crf")
    sepl, other = made(world, *more, *voted, "--pseudo", "sepl", "--vote", "sepl")
    for id, present in LABELS.items():
        label, cam = np.array([0, *(k + 1 for k in present)]), maps_of(world, id)
        segments = load_segments(world[1] / "segments" / f"{id}.npz", cam.shape[1:])
        if not segments:                                      # masked as without --segments
            assert np.array_equal(sams[id], plain[id])
            assert np.array_equal(power[id], crf[id]) and np.array_equal(sepl[id], crf[id])
            continue
        if not present:
            assert not any(masks[id].any() for masks in (plain, crf, sams, power, sepl))
            continue
        full = np.zeros((len(segments), *cam.shape[1:]), bool)
        for mask, s in zip(full, segments):
            mask[s.where] = s.mask
        assert np.array_equal(sams[id], label[naive_fma(full, [s.level for s in segments], cam, 0.6)])
        assert np.array_equal(sepl[id], naive_sepl(full, crf[id])) and not np.array_equal(sepl[id], crf[id])
        scores = np.concatenate([np.full((1, *cam.shape[1:]), 0.3, np.float32), cam])
        image = np.array(load_image(folders.Folder(world[0]).image_path(id)))
        posterior = dense_crf(image, scores, "deeplab")[1:]   # with --crf it stands for the maps
        want = label[naive_fma(full, [s.level for s in segments], posterior, 1.5)]
        assert np.array_equal(power[id], want)

    facts = ("without_segments", "vote", "background", "value", "crf")
    assert [note[name] for name in facts] == [1, "sams", "power", 0.6, None]
    assert note["pixels"] == {"background": "constant", "value": 0.3}
    assert note["segments"] == {"folder": str(world[1] / "segments"), "source": "slic", "weights": None}
    assert [other[name] for name in facts] == [1, "sepl", "constant", 0.3, "deeplab"]
    assert "vote" not in without


def test_what_goes_on_and_what_is_refused(world):
    segments = world[1] / "segments"
    more = ["--segments", segments]
    made(world, *more, "--limit", "2")
    for _ in range(2):                                        # the second time nothing is left to do
        assert made(world, *more)[1]["without_segments"] == 1
    refused(make(world, *more, "--vote", "sepl"), "was made with", "--vote sams (now sepl)")
    (segments / "recipe.json").write_text('{"fingerprint": "second"}')
    refused(make(world, *more), "made from another segments")
    (segments / "a_4.npz").unlink()
    done = make(world, *more, "--pseudo", "new")
    refused(done, "segments of a_4 are missing", "run python -m hosts.make_segments --split train first")
    assert not (world[1] / "new").exists()
    Image.new("L", (9, 9)).save(segments / "a_4.png")
    refused(make(world, *more, "--pseudo", "new"), "a_4.png holds no segments of its image", "9x9")
    assert make(world, *more, "--crf", "--ignore-below", ".5").returncode == 2
