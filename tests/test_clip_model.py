"""The frozen CLIP and the learned prompts, on a CLIP of 0.5 M weights with the real vocabulary's tokens."""
import hashlib

import clip as openai_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from wsss import clip_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = openai_clip.model.CLIP(embed_dim=32, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=8, context_length=77,
                                   vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    torch.nn.init.normal_(model.positional_embedding, std=0.3)    # so that a token at a wrong place shows
    torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def clip(model):
    return clip_model.FrozenClip(model)


TEXTS = ["a photo of dog.", "a photo of a potted plant.", "rails"]


def test_images_are_resized_normalised_and_encoded_as_clip_does(clip, model):
    images = torch.rand(3, 3, 48, 40)
    want = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    want = F.normalize(model.encode_image((want - mean.view(3, 1, 1)) / std.view(3, 1, 1)), dim=-1)
    got = clip.encode_image(images)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.encode_image(images, micro_batch=2), got, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(3))


def test_micro_batches_give_the_same_gradient(clip):
    grads = []
    for micro_batch in (0, 2):
        regions = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        clip.encode_normalized(regions, micro_batch)[:, 0].sum().backward()
        grads.append(regions.grad)
    torch.testing.assert_close(*grads)


def test_texts_equal_openai_encode_text(clip, model):
    want = F.normalize(model.encode_text(openai_clip.tokenize(TEXTS)), dim=-1)       # all 77 tokens
    torch.testing.assert_close(clip.encode_text(TEXTS), want, atol=1e-5, rtol=1e-4)
    assert not clip.encode_text(TEXTS).requires_grad


def test_prompt_made_of_words_equals_the_text_through_all_77_tokens(clip, model):
    """Vectors = embeddings of the words: then u_b must be OpenAI's own encode_text of "a photo of <words>."."""
    words = ["dog bird cat", "table road grass"]
    tokens = openai_clip.tokenize(words)[:, 1:4]                  # three tokens each, without SOS
    prompts = clip_model.BackgroundPrompts(clip, num_classes=2, length=3)
    prompts.vectors.data = model.token_embedding(tokens).detach()
    full = openai_clip.tokenize([f"a photo of {w}." for w in words])
    assert full.argmax(-1).tolist() == [8, 8] and full[0, 7] == 269                   # EOS at 5 + L, after the full stop
    torch.testing.assert_close(prompts(), F.normalize(model.encode_text(full), dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init,low,high", [("uniform", 0.4, 0.6), ("normal", -0.01, 0.01)])
def test_only_the_vectors_train_and_are_saved(clip, init, low, high):
    prompts = clip_model.BackgroundPrompts(clip, num_classes=4, length=30, init=init)
    assert low < prompts.vectors.mean() < high and prompts.vectors.shape == (4, 30, 64)
    assert list(prompts.state_dict()) == ["vectors"] and [n for n, _ in prompts.named_parameters()] == ["vectors"]
    prompts().square().sum().backward()                           # length 1 whatever the vectors are ...
    prompts()[:, 0].sum().backward()                              # ... but not its coordinates
    assert (prompts.vectors.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in clip.parameters())


def test_a_prompt_depends_on_its_own_vectors_only(clip):
    prompts = clip_model.BackgroundPrompts(clip, num_classes=3, length=5)
    prompts()[1, 0].backward()
    assert prompts.vectors.grad[1].abs().max() > 0 and prompts.vectors.grad[[0, 2]].abs().max() == 0


PAIRS = [torch.tensor(k, dtype=torch.long) for k in ([3, 0, 3], [1, 0], [], [4])]  # the classes of the pairs of four steps


def learn(clip, encode, pairs=PAIRS):
    """Four steps of AdamW on the prompts, u_b of the pairs from encode(prompts, k) -> features and gradient of every step, the vectors after them."""
    torch.manual_seed(2)
    prompts = clip_model.BackgroundPrompts(clip, num_classes=5, length=3)
    v_b, optimizer, found = F.normalize(torch.randn(5, 32), dim=1), torch.optim.AdamW(prompts.parameters(), 0.05, weight_decay=0.1), []
    for k in pairs:
        u_b = encode(prompts, k)
        (u_b * v_b[k]).sum().backward()
        found += [u_b.detach(), prompts.vectors.grad.clone()]
        optimizer.step(), optimizer.zero_grad()
    return [*found, prompts.vectors.detach()]


def present_only(prompts, k):
    present, at = k.unique(return_inverse=True)
    return prompts(present)[at]


def test_prompts_of_the_classes_in_a_batch_are_a_step_as_of_all(clip):
    """Features, gradients and AdamW, whose momentum and weight decay move the absent classes too; a step without a pair among them."""
    few, all_ = learn(clip, present_only), learn(clip, lambda prompts, k: prompts()[k])
    for a, b in zip(few, all_):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    loop = learn(clip, lambda prompts, k: torch.stack([prompts(k[i:i + 1])[0] for i in range(len(k))]) if len(k) else prompts(k))
    torch.testing.assert_close(few[-1], loop[-1], atol=1e-6, rtol=1e-5)
    gradient = few[1]
    assert (gradient[[0, 3]].flatten(1).norm(dim=1) > 0).all() and not gradient[[1, 2, 4]].any() and not few[5].any()


def rank_without_a_pair(rank, clip, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = []

    def encode(prompts, k):
        model[:] = model or [torch.nn.parallel.DistributedDataParallel(prompts)]
        return 2 * present_only(model[0], k)                      # DDP takes the mean of the two
    torch.save(learn(clip, encode, [k[rank::2] for k in PAIRS])[1::2], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_of_which_one_has_no_pair(clip, tmp_path):
    torch.multiprocessing.start_processes(rank_without_a_pair, (clip, tmp_path), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for one, *two in zip(learn(clip, present_only)[1::2], *ranks):
        assert torch.equal(*two)
        torch.testing.assert_close(one, two[0], atol=1e-6, rtol=1e-5)


def test_frozen_and_never_in_training_mode(clip):
    clip.train()
    assert not clip.training and not clip.model.visual.training and not any(p.requires_grad for p in clip.parameters())


def test_under_autocast_features_end_float32(clip):
    images = torch.rand(2, 3, 32, 32)
    prompts = clip_model.BackgroundPrompts(clip, num_classes=2, length=4)
    exact = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=-1), torch.ones(len(b)))
        assert F.cosine_similarity(a, b).min() > 0.999


def test_files_load_without_rounding_and_wrong_ones_are_refused(model, clip, tmp_path, monkeypatch):
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    loaded = clip_model.load_clip(tmp_path / "clip.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name              # bit for bit, though OpenAI's builder halves
    images = torch.rand(1, 3, 32, 32)
    archive = torch.jit.trace(Visual(model), images)              # TorchScript, as OpenAI's downloads are
    archive.save(str(tmp_path / "archive.pt"))
    with pytest.raises(ValueError, match="archive.pt: TorchScript, which may run code, and by SHA-256 .* none of OpenAI's"):
        clip_model.load_clip(tmp_path / "archive.pt")
    monkeypatch.setitem(clip_model.PUBLISHED, hashlib.sha256((tmp_path / "archive.pt").read_bytes()).hexdigest(), "ViT-T/8")
    torch.testing.assert_close(clip_model.load_clip(tmp_path / "archive.pt").encode_image(images), clip.encode_image(images))

    with pytest.raises(FileNotFoundError, match="CLIP ViT-Z: no such file, and not one of RN50"):
        clip_model.load_clip("ViT-Z")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, words in (("text.pt", "neither"), ("other.pt", "not the weights of a CLIP"), ("list.pt", "not the weights of a CLIP")):
        with pytest.raises(ValueError, match=f"{name}: {words}") as error:
            clip_model.load_clip(tmp_path / name)
        assert "\n" not in str(error.value)


class Visual(torch.nn.Module):
    """CLIP under its own names, with a forward that can be traced."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, images):
        return self.visual(images)


def test_offline_says_where_to_put_the_file(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(openai_clip, "load", offline)
    with pytest.raises(FileNotFoundError, match=r"put ViT-B-32.pt into .*clip") as error:
        clip_model.load_clip("ViT-B/32")
    assert "\n" not in str(error.value)
