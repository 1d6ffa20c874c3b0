"""The frozen CLIP against OpenAI's own forward, and the learned prompts, on a CLIP of few channels with the
real vocabulary."""
import functools
import sys

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F

from wsss import clip_model

assert_close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
TEXTS = ["a photo of dog.", "a photo of a potted plant.", "rails"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = openai_clip.model.CLIP(
        embed_dim=32, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=8,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    torch.nn.init.normal_(model.positional_embedding, std=0.3)    # a token moved would show
    torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def clip(model):
    return clip_model.FrozenClip(model)


CLIP = torch.tensor([[0.48145466, 0.4578275, 0.40821073],
                     [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


@pytest.mark.parametrize("fill", ["mean", "imagenet"])
def test_images_are_encoded_as_openais_and_a_removed_pixel_is_the_mean(clip, model, fill):
    images = torch.rand(3, 3, 48, 40)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = {"mean": CLIP, "imagenet": IMAGENET}[fill]
    normalized = clip.normalize(images, fill)
    assert_close(normalized, (resized - mean) / std)
    with torch.no_grad():
        want = F.normalize(model.encode_image(torch.zeros(3, 3, 32, 32)), dim=-1)
        assert_close(clip.encode_normalized(0 * normalized), want)
        want = F.normalize(model.encode_image((resized - CLIP[0]) / CLIP[1]), dim=-1)
        assert_close(clip.encode_image(images), want)


def test_load_clip_reads_what_clip_flags_take_and_alone_a_plain_state(model, tmp_path, monkeypatch):
    path, pixels = tmp_path / "clip.pt", torch.rand(1, 3, 32, 32)
    want = clip_model.FrozenClip(model).encode_image(pixels)
    torch.save({"model": model.state_dict()}, path)
    assert_close(clip_model.load_clip(path).encode_image(pixels), want)
    torch.save(model.state_dict(), path)
    monkeypatch.setitem(sys.modules, "plumbing", None)   # this file was copied alone
    assert_close(clip_model.load_clip(path).encode_image(pixels), want)


def test_texts_cut_at_their_end_are_openais_over_all_77_tokens_and_ensembles_their_mean(clip, model):
    with torch.no_grad():
        want = F.normalize(model.encode_text(openai_clip.tokenize(TEXTS)), dim=-1)
    assert_close(clip.encode_text(TEXTS), want)
    assert not clip.encode_text(TEXTS).requires_grad
    assert_close(clip.encode_ensemble([TEXTS]), want)             # of one template
    mean = clip.encode_ensemble([TEXTS[:2], TEXTS[1:]])           # two texts in two templates
    for found, (a, b) in zip(mean, ((0, 1), (1, 2)), strict=True):
        middle = (want[a] + want[b]) / 2
        assert_close(found, middle / middle.norm())
    with pytest.raises(ValueError, match="word word .*more tokens than CLIP reads: shorten") as error:
        clip.encode_text(["word " * 80])
    assert "\n" not in str(error.value)


def test_frozen_and_float32_under_autocast(clip):
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    images, prompts = torch.rand(2, 3, 32, 32), clip_model.BackgroundPrompts(clip, num_classes=2, length=4)
    exact = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32 and F.cosine_similarity(a, b).min() > 0.999
        torch.testing.assert_close(b.norm(dim=-1), torch.ones(len(b)))


def test_load_clip_reads_a_plain_file_bit_for_bit(model, tmp_path):
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77),
               "vocab_size": torch.tensor(49408)}                 # as in the state dict of OpenAI's archives
    torch.save({**model.state_dict(), **numbers}, tmp_path / "clip.pt")
    loaded = clip_model.load_clip(tmp_path / "clip.pt")
    assert loaded.size == 32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name  # OpenAI's builder rounds


def test_a_prompt_of_words_is_openais_text(clip, model):
    """SOS a photo of [p] . EOS: with the embeddings of words for vectors, u_b is their text's feature."""
    words = ["dog bird cat", "table road grass"]
    prompts = clip_model.BackgroundPrompts(clip, num_classes=2, length=3)
    prompts.vectors.data = model.token_embedding(openai_clip.tokenize(words)[:, 1:4]).detach()
    tokens = openai_clip.tokenize([f"a photo of {w}." for w in words])
    assert tokens[:, 7].tolist() == [269, 269] and tokens.argmax(-1).tolist() == [8, 8]   # ".", EOS
    assert_close(prompts(), F.normalize(model.encode_text(tokens), dim=-1))


@pytest.mark.parametrize("init,mean,std", [("uniform", 0.5, 12 ** -0.5), ("normal", 0, 0.02)])
def test_only_the_vectors_train_and_are_saved(clip, init, mean, std):
    prompts = clip_model.BackgroundPrompts(clip, num_classes=4, length=30, init=init)
    assert prompts.vectors.shape == (4, 30, 64) and list(prompts.state_dict()) == ["vectors"]
    assert prompts.vectors.mean().item() == pytest.approx(mean, abs=0.05 * std)
    assert prompts.vectors.std().item() == pytest.approx(std, rel=0.05)
    assert [name for name, _ in prompts.named_parameters()] == ["vectors"]
    some = prompts(torch.tensor([2, 0]))                          # of two classes
    assert_close(some, prompts()[[2, 0]])
    (some.sum(0)[0] + prompts(torch.tensor([], dtype=torch.long)).sum()).backward()   # of none: still a graph
    assert prompts.vectors.grad.flatten(1).any(1).tolist() == [True, False, True, False]
    assert all(p.grad is None for p in clip.parameters())
    with pytest.raises(ValueError, match="prompt length 72: CLIP reads 77 tokens, so at most 71"):
        clip_model.BackgroundPrompts(clip, num_classes=1, length=72)
