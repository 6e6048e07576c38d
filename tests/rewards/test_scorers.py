"""Every reward with weights: an independent computation, batches, finite differences, half precision."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import rewards

transforms = pytest.importorskip("torchvision.transforms.v2", reason="the extra `rewards` is not installed")
tv, InterpolationMode = transforms.functional, transforms.InterpolationMode

PROMPTS = ["a white duck", "red car, on a hill!"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
WEIGHTED = ("aesthetic", "hps", "hps_v2.1", "pick", "clip", "imagereward", "sprites")


def build(name, dtype=None):
    return rewards.RFUNCTIONS[name](dtype, "cpu")


def value_and_gradient(loss_fn, images, *rest):
    images = images.clone().requires_grad_(True)
    losses = loss_fn(images, *rest)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach(), gradient


def cropped(images, size=224):
    """CLIP's preprocessing out of torchvision's pieces."""
    pixels = tv.resize(images / 2 + 0.5, [size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return tv.normalize(tv.center_crop(pixels, [size, size]), MEAN, STD)


def padded(images, size=224):
    """HPS v2's preprocessing, likewise, for images that are wider than high."""
    height = round(images.shape[-2] * size / images.shape[-1])
    pixels = tv.resize(images / 2 + 0.5, [height, size], InterpolationMode.BICUBIC, antialias=True)
    above = (size - height) // 2
    return tv.normalize(tv.pad(pixels, [0, above, 0, size - height - above]), MEAN, STD)


# --- (a) independent computations ---------------------------------------------------------------------------


def transformers_clip(folder, vocabulary, size=224):
    """Loss from CLIPModel's own logits, the text padded to full length and masked as its processor does."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    length = model.config.text_config.max_position_embeddings

    def loss_fn(images, prompts):
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        output = model(pixel_values=cropped(images, size), **tokens)
        return -output.logits_per_image.diagonal()

    return loss_fn


def aesthetic_by_hand(clip_folder, head_file):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    head = torch.load(head_file, weights_only=True)

    def loss_fn(images, prompts):
        x = model.get_image_features(pixel_values=cropped(images)).pooler_output
        x = x / x.norm(dim=1, keepdim=True)
        for layer in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
        return -x[:, 0]

    return loss_fn


def open_clip_hps(architecture, file):
    import open_clip

    model = open_clip.create_model(architecture, pretrained=str(file)).eval()
    tokenizer = open_clip.get_tokenizer(architecture)

    def loss_fn(images, prompts):
        features, _, _ = model(padded(images), tokenizer(prompts))
        return -(features * model.encode_text(tokenizer(prompts), normalize=True)).sum(1)

    return loss_fn


@pytest.fixture
def independent(
    clip_folder, clip_vocabulary, pick_folder, sprites_folder, aesthetic_file, hps_architecture, hps_file
):
    def build(name):
        if name == "aesthetic":
            return aesthetic_by_hand(clip_folder, aesthetic_file)
        if name.startswith("hps"):
            return open_clip_hps(hps_architecture, hps_file)
        if name == "sprites":
            return transformers_clip(sprites_folder, sprites_folder, 64)
        folder = {"clip": clip_folder, "pick": pick_folder}[name]
        return transformers_clip(folder, clip_vocabulary)

    return build


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "imagereward"])
def test_value_and_gradient_agree_with_an_independent_computation(name, configure, independent, pictures):
    images = pictures(2, 120, 180)
    prompts = ["white duck", "red car"] if name == "sprites" else PROMPTS
    losses, gradient = value_and_gradient(build(name), images, prompts)
    expected, expected_gradient = value_and_gradient(independent(name), images, prompts)
    assert losses.shape == (2,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    scale = expected_gradient.abs().max()
    assert scale > 1e-6, "the test's own model must react to its images"
    torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=0, atol=1e-4)


def test_prompts_matter(configure, pictures):
    images = pictures(1, 96, 96)
    for name in WEIGHTED:
        prompts = ("white duck", "red car")
        losses = [build(name)(images, [prompt]).item() for prompt in prompts]
        assert (losses[0] == losses[1]) == (name == "aesthetic"), name


@pytest.mark.parametrize("name", ["aesthetic", "hps", "pick"])
def test_reference_preprocessing_is_the_official_one(name, configure, pictures):
    configure(preprocess="reference")
    images = pictures(1, 300, 300)
    by_hand = tv.resize(images / 2 + 0.5, [224], InterpolationMode.BILINEAR, antialias=True)
    configure()
    same_size = build(name)(by_hand * 2 - 1, PROMPTS[:1])  # 224 px are left as they are
    configure(preprocess="reference")
    torch.testing.assert_close(build(name)(images, PROMPTS[:1]), same_size)
    with pytest.raises(rewards.RewardError, match="square"):
        build(name)(pictures(1, 64, 96), PROMPTS[:1])


# --- (b) batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rewards.RFUNCTIONS)
def test_a_batch_scores_as_its_members_do(name, configure, pictures):
    images = pictures(3, 70, 90) * 1.3  # some pixels outside [-1, 1]
    prompts = ["white duck", "red car", "white duck"]
    loss_fn = build(name)
    together = loss_fn(images, prompts)
    alone = torch.cat([build(name)(image[None], [prompt]) for image, prompt in zip(images, prompts)])
    assert together.shape == (3,) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTED)
def test_sizes_and_shapes(name, configure, pictures):
    loss_fn = build(name)
    for height, width in [(64, 64), (224, 224), (33, 150), (300, 40)]:
        losses, gradient = value_and_gradient(loss_fn, pictures(1, height, width), ["red car"])
        assert losses.isfinite().all() and gradient.isfinite().all() and gradient.any()


# --- (c) finite differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradient_agrees_with_finite_differences(name, configure, pictures):
    loss_fn = build(name, torch.float64)
    images = pictures(1, 40, 60, dtype=torch.float64) * 0.8  # away from the clamp
    losses, gradient = value_and_gradient(loss_fn, images, ["red car"])
    assert losses.dtype == torch.float64
    for seed in range(3):
        direction = pictures(1, 40, 60, seed=10 + seed, dtype=torch.float64)
        step = 1e-5 * direction
        with torch.no_grad():
            numeric = (loss_fn(images + step, ["red car"]) - loss_fn(images - step, ["red car"])) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), numeric[0], rtol=1e-5, atol=1e-9)


# --- precision, memory, contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WEIGHTED)
def test_half_precision_is_close_to_single(name, dtype, configure, pictures):
    images = pictures(2, 96, 96)
    expected, expected_gradient = value_and_gradient(build(name), images, ["red car", "white duck"])
    losses, gradient = value_and_gradient(build(name, dtype), images, ["red car", "white duck"])
    assert losses.dtype == gradient.dtype == torch.float32
    # 1e-2 of a cosine; of ImageReward, whose unit is a standard deviation, 3e-2
    unit = {"pick": 1 / 0.07, "clip": 1 / 0.07, "sprites": 1 / 0.07, "imagereward": 3}.get(name, 1)
    assert (losses - expected).abs().max() < 1e-2 * unit
    assert F.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("name", WEIGHTED)
def test_small_gradients_survive_float16(name, configure, pictures):
    """A weight of 1e-5 on the loss, as in a mean over many samples, costs no precision."""
    images, prompts = pictures(2, 96, 96), ["red car", "white duck"]
    _, expected = value_and_gradient(build(name), images, prompts)
    loss_fn = build(name, torch.float16)
    _, gradient = value_and_gradient(lambda *given: 1e-5 * loss_fn(*given), images, prompts)
    for i in range(2):
        assert F.cosine_similarity(gradient[i].flatten(), expected[i].flatten(), dim=0) > 0.98
        torch.testing.assert_close(gradient[i].norm() * 1e5, expected[i].norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", WEIGHTED)
def test_checkpointing_changes_memory_and_nothing_else(name, configure, pictures):
    def kept(loss_fn):
        """The result, and how many tensors the forward pass keeps for the backward pass."""
        seen = []
        images = pictures(1, 96, 96).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(0) or t, lambda t: t):
            losses = loss_fn(images, ["red car"])
        (gradient,) = torch.autograd.grad(losses.sum(), images)
        return losses, gradient, len(seen)

    losses, gradient, tensors = kept(build(name))
    configure(checkpointing=True)
    losses2, gradient2, tensors2 = kept(build(name))
    torch.testing.assert_close(losses2, losses, rtol=0, atol=0)
    torch.testing.assert_close(gradient2, gradient, rtol=1e-6, atol=0)
    assert tensors2 < 0.6 * tensors


@pytest.mark.parametrize("name", ["hps", "pick", "clip", "sprites"])
def test_the_text_tower_is_freed_and_comes_back_for_new_prompts(name, configure, pictures, monkeypatch):
    from rewards import towers

    towers_seen = []
    original = towers.Prompts.__init__

    def spy(self, load, tower):
        towers_seen.append(weakref.ref(tower))
        original(self, load, tower)

    monkeypatch.setattr(towers.Prompts, "__init__", spy)
    loss_fn, images = build(name), pictures(1, 64, 64)
    assert towers_seen[0]() is not None
    first = loss_fn(images, ["red car"])
    gc.collect()
    assert towers_seen[0]() is None
    torch.testing.assert_close(loss_fn(images, ["red car"]), first, rtol=0, atol=0)
    torch.testing.assert_close(loss_fn(images, ["white duck"]), build(name)(images, ["white duck"]))


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_frozen_and_in_eval_mode(name, configure, monkeypatch):
    from rewards import imagereward, towers

    seen = []
    freeze = towers.freeze
    for module in (towers, imagereward):
        monkeypatch.setattr(module, "freeze", lambda *args: seen.append(freeze(*args)) or seen[-1])
    build(name, torch.bfloat16)
    assert seen
    for model in seen:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in seen[0].parameters()} <= {torch.bfloat16, torch.float32}


def test_long_prompts_are_cut_with_a_warning(configure, pictures):
    images = pictures(1, 64, 64)
    for name, words in (("hps", 90), ("pick", 90), ("clip", 90), ("imagereward", 50), ("sprites", 20)):
        with pytest.warns(UserWarning, match="tokens"):
            loss = build(name)(images, ["duck " * words])
        assert loss.isfinite().all()


def test_the_empty_prompt_is_allowed(configure, pictures):
    for name in WEIGHTED:
        assert build(name)(pictures(1, 64, 64), [""]).isfinite().all()


def test_misuse_is_one_line(configure, pictures):
    loss_fn = build("pick")
    for images, prompts in [(pictures(2, 64, 64), ["a"]), (pictures(1, 64, 64)[0], ["a"]),
                            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a"])]:  # fmt: skip
        with pytest.raises(rewards.RewardError) as caught:
            loss_fn(images, prompts)
        assert "pick got" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(loss_fn(pictures(2, 64, 64), "a"), loss_fn(pictures(2, 64, 64), ["a", "a"]))
