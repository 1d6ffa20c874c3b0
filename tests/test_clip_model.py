"""The frozen CLIP against OpenAI's own forward, and the learned prompts, on a CLIP of few channels with the
real vocabulary."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from wsss import clip_model
from wsss.clip_model import openai_clip

TEXTS = ["a photo of dog.", "a photo of a potted plant.", "rails"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = openai_clip.model.CLIP(
        embed_dim=32, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=8,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    torch.nn.init.normal_(model.positional_embedding, std=0.3)     # a token moved would show
    torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def clip(model):
    return clip_model.FrozenClip(model)


# ---------------------------------------------------------------- images and texts

def statistics(mean, std):
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


CLIP = statistics([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = statistics([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_images_are_resized_normalised_and_encoded_as_openais(clip, model):
    images = torch.rand(3, 3, 48, 40)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        want = F.normalize(model.encode_image((resized - CLIP[0]) / CLIP[1]), dim=-1)
    torch.testing.assert_close(clip.encode_image(images), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fill,removed", [("mean", CLIP[0]), ("black", 0), ("imagenet", None)])
def test_what_a_removed_pixel_becomes(clip, model, fill, removed):
    """All pixels are removed: the image that CLIP then sees has one colour."""
    regions = 0 * clip.normalize(torch.rand(1, 3, 32, 32), fill)
    seen = torch.zeros(1, 3, 32, 32) if removed is None else (removed - CLIP[0]) / CLIP[1]
    with torch.no_grad():
        want = F.normalize(model.encode_image(seen.expand(1, 3, 32, 32)), dim=-1)
    torch.testing.assert_close(clip.encode_normalized(regions, fill=fill), want, atol=1e-5, rtol=1e-4)
    kept, pixels = clip.normalize(torch.full((1, 3, 32, 32), 0.3), fill), torch.full((1, 3, 32, 32), 0.3)
    mean, std = {"mean": CLIP, "black": (0, 1), "imagenet": IMAGENET}[fill]
    torch.testing.assert_close(kept, (pixels - mean) / std)


def test_texts_cut_at_their_end_are_openais_over_all_77_tokens(clip, model):
    with torch.no_grad():
        want = F.normalize(model.encode_text(openai_clip.tokenize(TEXTS)), dim=-1)
    found = clip.encode_text(TEXTS)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="word word .*more tokens than CLIP reads: shorten") as error:
        clip.encode_text(["word " * 80])
    assert "\n" not in str(error.value)


def test_frozen_and_never_in_training_mode(clip):
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())


def test_under_autocast_features_end_float32(clip):
    images, prompts = torch.rand(2, 3, 32, 32), clip_model.BackgroundPrompts(clip, num_classes=2, length=4)
    exact = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.encode_image(images), clip.encode_text(TEXTS), prompts()
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=-1), torch.ones(len(b)))
        assert F.cosine_similarity(a, b).min() > 0.999


def test_load_clip_reads_a_plain_file_bit_for_bit(model, tmp_path):
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77),
               "vocab_size": torch.tensor(49408)}             # as in the state dict of OpenAI's archives
    torch.save({**model.state_dict(), **numbers}, tmp_path / "clip.pt")
    loaded = clip_model.load_clip(tmp_path / "clip.pt")
    assert loaded.size == 32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name  # OpenAI's builder rounds
    other = clip_model.load_clip(str(tmp_path / "clip.pt"))
    assert other.fingerprint() == loaded.fingerprint()
    other.model.text_projection.data[0, 0] += 1
    assert other.fingerprint() != loaded.fingerprint()


# ---------------------------------------------------------------- prompts

def test_a_prompt_of_words_is_openais_text(clip, model):
    """SOS a photo of [p] . EOS: with the embeddings of words for vectors, u_b is their text's feature."""
    words = ["dog bird cat", "table road grass"]
    prompts = clip_model.BackgroundPrompts(clip, num_classes=2, length=3)
    prompts.vectors.data = model.token_embedding(openai_clip.tokenize(words)[:, 1:4]).detach()
    tokens = openai_clip.tokenize([f"a photo of {w}." for w in words])
    assert tokens[:, 7].tolist() == [269, 269] and tokens.argmax(-1).tolist() == [8, 8]        # ".", EOS
    want = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(prompts(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init,mean,std", [("uniform", 0.5, 12 ** -0.5), ("normal", 0, 0.02)])
def test_only_the_vectors_train_and_are_saved(clip, init, mean, std):
    prompts = clip_model.BackgroundPrompts(clip, num_classes=4, length=30, init=init)
    assert prompts.vectors.shape == (4, 30, 64)
    assert prompts.vectors.mean().item() == pytest.approx(mean, abs=0.05 * std)
    assert prompts.vectors.std().item() == pytest.approx(std, rel=0.05)
    assert list(prompts.state_dict()) == ["vectors"]
    assert [name for name, _ in prompts.named_parameters()] == ["vectors"]
    prompts()[[0, 2], 0].sum().backward()                     # of two classes
    assert prompts.vectors.grad.flatten(1).any(1).tolist() == [True, False, True, False]
    assert all(p.grad is None for p in clip.parameters())
    with pytest.raises(ValueError, match="prompt length 72: CLIP reads 77 tokens, so at most 71"):
        clip_model.BackgroundPrompts(clip, num_classes=1, length=72)


STEPS = [torch.tensor(k, dtype=torch.long) for k in ([3, 0, 3], [1, 0], [], [4])]     # classes of the pairs


def learn(clip, encode, steps=STEPS):
    """Four steps of AdamW on the prompts, with encode(prompts, k) -> u_b of the pairs. Returns the gradients
    and the vectors after each step."""
    torch.manual_seed(2)
    prompts, found = clip_model.BackgroundPrompts(clip, num_classes=5, length=3), []
    v_b = F.normalize(torch.randn(5, 32), dim=1)
    optimizer = torch.optim.AdamW(prompts.parameters(), 0.05, weight_decay=0.1)
    for k in steps:
        (encode(prompts, k) * v_b[k]).sum().backward()
        found.append(prompts.vectors.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        found.append(prompts.vectors.detach().clone())
    return found


def present_only(prompts, k):
    present, at = k.unique(return_inverse=True)
    return prompts(present)[at]


def test_prompts_of_the_classes_of_a_batch_learn_as_all_of_them(clip):
    """AdamW moves the absent classes too, by momentum and decay; one step has no pair at all."""
    few = learn(clip, present_only)
    for a, b in zip(few, learn(clip, lambda prompts, k: prompts()[k])):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert few[0].flatten(1).any(1).tolist() == [True, False, False, True, False] and not few[4].any()


def learn_as_rank(rank, clip, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = []

    def encode(prompts, k):
        model[:] = model or [torch.nn.parallel.DistributedDataParallel(prompts)]
        return 2 * present_only(model[0], k)                  # DDP takes the mean of the two
    torch.save(learn(clip, encode, [k[rank::2] for k in STEPS]), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_of_which_one_has_no_pair(clip, tmp_path):
    torch.multiprocessing.start_processes(learn_as_rank, (clip, tmp_path), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for one, *two in zip(learn(clip, present_only), *ranks):
        assert torch.equal(*two)
        torch.testing.assert_close(one, two[0], atol=1e-6, rtol=1e-5)
