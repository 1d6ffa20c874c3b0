"""The benchmarks' other ways give our numbers: maps by autograd, S's maps one by one, a pass a threshold; what they claim of memory and speed is read right."""
import torch
import torch.nn.functional as F
from bench import crf, eval as scores, maps, prototypes

from wsss import generator, gradcam


def test_autograd_makes_our_maps():
    clip = maps.random_clip(embed_dim=24, image_resolution=32, vision_layers=10, vision_width=128, vision_patch_size=8)
    columns, k = F.normalize(torch.randn(maps.CLASSES + maps.BACKGROUNDS, 24), dim=-1), torch.tensor([1, 4, 7])
    image = torch.rand(1, 3, 40, 56)
    want = maps.here(clip, image, columns, k)
    for whole in (True, False):
        torch.testing.assert_close(maps.by_autograd(clip, image, columns, k, whole), want, atol=1e-3, rtol=0)
    assert not any(p.requires_grad for p in clip.parameters()) and (want[0] - want[1]).abs().max() > 0.1
    exact = gradcam.run_blocks(clip.double(), image.double(), look=10)                # attention is made in the last blocks alone: the same numbers
    fewer = gradcam.run_blocks(clip, image.double(), look=8)
    assert len(exact[1]) == 10 and len(fewer[1]) == 8
    torch.testing.assert_close(fewer[1], exact[1][2:], atol=1e-10, rtol=0)
    torch.testing.assert_close(fewer[0][-1], exact[0][-1], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_one_by_one_is_the_batch():
    torch.manual_seed(0)
    S = generator.build_generator("deit_tiny", 5).eval()
    images, k = torch.rand(3, 3, 40, 56), torch.tensor([[0, 3], [1, 2], [2, 4]])
    want = maps.one_by_one(S, images, k, [1.0, 1.2], True)
    assert want.shape == (3, 2, 40, 56) and want.amax() > 0.99
    for batch in (1, 2, 3):
        torch.testing.assert_close(maps.in_batches(S, images, k, [1.0, 1.2], True, batch), want, atol=1e-3, rtol=0)


def test_one_pass_is_a_pass_a_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(scores.stage, "ORACLE", None)                                 # put back afterwards: the benchmark sets it
    for stride in (1, 4):
        root = tmp_path / str(stride)
        scores.make_inputs(root, 4, stride, (48, 64))
        found = scores.in_one_pass(root)
        assert torch.equal(found, scores.pass_by_pass(root)) and found.shape == (20, 21, 21)
        assert (found.sum((1, 2)) == found[0].sum()).all() and found[0, 0, 0] < found[19, 0, 0]


def test_speed_and_growth_of_what_was_measured():
    rows = [(pid, 100.0 + n * (pid == 2), float(n), 50.0) for n in range(100) for pid in (1, 2)]
    assert crf.speed(rows) == 198 / 99                                                # 200 pictures in 99 s, the first of either process not counted
    worker, main_process = crf.growth(rows)
    assert worker == (100 + 6.5, 100 + 94.5) and main_process == (50, 50)


def test_a_table_of_the_descent():
    lines = prototypes.speed_table(sizes=(40,), D=8, C=5, runs=1).splitlines()
    assert lines[2].startswith("| 40 | 8 | 5 |")
