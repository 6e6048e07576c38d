"""The networks behind the rewards: image towers with a gradient, text towers with cached embeddings.

Weights are frozen, in eval mode and in the requested precision. What leaves a tower is float32 (float64 if the weights
are), so norms, cosines and losses never run below it.
"""

import json
import logging
import warnings
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import weights
from .preprocess import CLIP_MEAN, CLIP_STD, check, normalize, reference
from .weights import RewardError


def full(dtype):
    """The precision around a tower of this dtype: float32, or float64 if the tower is."""
    return torch.promote_types(dtype, torch.float32)


def freeze(module, device):
    """The module on its device, without gradients for its weights and without dropout."""
    return module.to(device).eval().requires_grad_(False)


def checkpoint_blocks(blocks):
    """Make each block recompute its activations in the backward pass, if the settings ask for it.

    Done here because transformers checkpoints only in training mode and each library has its own switch.
    """
    if weights.settings().checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def through(tower, pixels, dtype):
    """tower(pixels) with the tower in `dtype` and float32 outside; pixels (B, 3, S, S) -> features (B, D).

    In float16 the gradient of one pixel would round to zero on its way back. It is therefore scaled to a
    largest element of 1 for each image where it enters the tower, and scaled back where it leaves.
    """
    features = tower(pixels.to(dtype)).to(full(dtype))
    if dtype == torch.float16 and features.requires_grad:
        size = None

        def enter(gradient):
            nonlocal size
            size = gradient.abs().amax(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)  # (B,)
            return gradient / size[:, None]

        features.register_hook(enter)
        pixels.register_hook(lambda gradient: gradient * size[:, None, None, None])
    return features


class LinearHead(nn.Module):
    """Embeddings (B, width) -> scores (B,): the head of `aesthetic` and of ImageReward.

    The published heads have no activations. They were trained with dropout, which is off in use and stands
    here because it counts in the names of the weights: layers.0, .2, .4, .6 and .7.
    """

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings):
        return self.layers(embeddings)[:, 0]


class Prompts:
    """Embeddings of prompts, each computed once.

    load: loads the text tower and returns it as a function, prompt -> tensor. The tower is kept until the
    first prompts are embedded and is then freed: a run has one prompt, and a text tower is hundreds of
    megabytes. New prompts bring it back, and then it stays.
    """

    def __init__(self, load, tower):
        self.load, self.tower = load, tower
        self.embeddings, self.keep = {}, False

    def __call__(self, prompts):
        """Embeddings (B, D) of the prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.embeddings]
        if new:
            if self.tower is None:
                self.tower, self.keep = self.load(), True
            with torch.no_grad():
                self.embeddings.update((prompt, self.tower(prompt)) for prompt in new)
            if not self.keep:
                self.tower = None
        return torch.stack([self.embeddings[prompt] for prompt in prompts])


def similarity_loss(name, embed_images, embed_prompts, scale):
    """Loss of a reward that is `scale` times the cosine between an image and its prompt."""

    def loss_fn(images, prompts):
        prompts = check(name, images, prompts)
        cosine = (embed_images(images) * embed_prompts(prompts)).sum(dim=1)  # (B,)
        return (-scale * cosine).to(images.device)

    return loss_fn


def prepared(own, size, mean=CLIP_MEAN, std=CLIP_STD, official=True):
    """The preprocessing in force: images -> normalised pixels (B, 3, size, size).

    own: the reward model's, as (images, size) -> pixels in [0, 1].
    official: whether the official DNO code has this reward and so `reference` has a meaning.
    """
    chosen = reference if official and weights.settings().preprocess == "reference" else own
    return lambda images: normalize(chosen(images, size), mean, std)


# --- CLIP in transformers' format ---------------------------------------------------------------------------


@contextmanager
def quiet():
    """Keep transformers from printing bars and tables while it loads; whatever is wrong is raised as one error."""
    import transformers

    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()


def load_clip(key, folder, dtype, device):
    """The CLIPModel in a folder; RewardError if its weights are damaged or do not fill it exactly."""
    from transformers import CLIPModel

    try:
        with quiet():
            config = json.loads((folder / "config.json").read_text())
            if config.get("model_type") != "clip":
                raise another_architecture(
                    key, folder, f"{config.get('model_type')} in config.json, not clip"
                )
            model, report = CLIPModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except RewardError:
        raise
    except Exception as error:  # a damaged file makes the libraries below raise anything at all
        if "mismatch" in str(error):
            raise another_architecture(key, folder, "shapes differ from config.json") from error
        raise weights.unreadable(key, folder, error) from error
    wrong = [f"{len(report[kind])} {kind.replace('_', ' ')} (first: {min(report[kind])})"
             for kind in ("missing_keys", "unexpected_keys") if report[kind]]  # fmt: skip
    if wrong:
        raise another_architecture(key, folder, "; ".join(wrong))
    weights.loaded(key, folder)
    return freeze(model, device)


def another_architecture(key, folder, what):
    return RewardError(f"{key}: weights in {folder} have another architecture: {what}; {weights.again(key)}")


def clip_image_tower(key, model, folder, dtype, own, official=True):
    """images -> normalised embeddings (B, D). own: the preprocessing, see `prepared`."""
    vision, projection = model.vision_model, model.visual_projection
    checkpoint_blocks(vision.encoder.layers)
    statistics = read_statistics(key, folder)
    prepare = prepared(own, model.config.vision_config.image_size, *statistics, official)
    device = projection.weight.device

    def tower(pixels):
        return projection(vision(pixel_values=pixels).pooler_output)

    return lambda images: F.normalize(through(tower, prepare(images.to(device, full(dtype))), dtype), dim=1)


def read_statistics(key, folder):
    """Mean and standard deviation of the pixels from preprocessor_config.json, CLIP's if there is none."""
    file = folder / "preprocessor_config.json"
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise weights.unreadable(key, file, error) from error
    return found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)


def clip_text_tower(key, model, folder, dtype):
    """prompt -> normalised embedding (D,)."""
    text, projection = model.text_model, model.text_projection
    tokenize = clip_tokenizer(key, folder, model.config.text_config)
    device = projection.weight.device

    def embed(prompt):
        features = projection(text(input_ids=tokenize(prompt).to(device)).pooler_output)[0]  # (D,)
        return F.normalize(features.to(full(dtype)), dim=0)

    return embed


def clip_tokenizer(key, folder, config):
    """prompt -> token ids (1, L), at most as many as the model reads.

    The tokenizer is the folder's own, or CLIP's as open_clip ships it if the folder has none. CLIP's text
    tower is causal and reads its result at the end token, so no padding is needed.
    """
    length = config.max_position_embeddings
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        own = import_open_clip().SimpleTokenizer(context_length=length)

        def tokenize(prompt):
            ids = own([prompt])  # (1, length), zeros after the end token
            warn_if_cut(key, prompt, len(own.encode(prompt)) + 2, length)
            return ids[:, : int(ids.argmax()) + 1]

        return tokenize

    from transformers import CLIPTokenizer

    try:
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise weights.unreadable(key, f"the tokenizer in {folder}", error) from error
    if len(tokenizer) > config.vocab_size:
        raise another_architecture(
            key, folder, f"the tokenizer has {len(tokenizer)} words, the model {config.vocab_size}"
        )

    def tokenize(prompt):
        with quiet():
            ids = tokenizer(prompt).input_ids
        warn_if_cut(key, prompt, len(ids), length)
        return torch.tensor([ids if len(ids) <= length else ids[: length - 1] + ids[-1:]])

    return tokenize


def warn_if_cut(key, prompt, tokens, limit):
    if tokens > limit:
        warnings.warn(
            f"{key} reads {limit} of {tokens} tokens, not the end of this prompt: {prompt!r}", stacklevel=2
        )


def clip_loss(name, key, dtype, device, own, official=True):
    """Loss of a CLIPModel's agreement between image and prompt: minus logit scale times cosine."""
    dtype, device, folder = dtype or torch.float32, device or "cpu", weights.locate(key)
    # The scale is read before the cast: ln 100 in bfloat16 is off by 0.01, and so every score by 1 %.
    model = load_clip(key, folder, full(dtype), "cpu")
    scale = model.logit_scale.exp().to(device)
    model = model.to(device, dtype)
    image_tower = clip_image_tower(key, model, folder, dtype, own, official)

    def load_text():
        return clip_text_tower(key, load_clip(key, folder, dtype, device), folder, dtype)

    prompts = Prompts(load_text, clip_text_tower(key, model, folder, dtype))
    return similarity_loss(name, image_tower, prompts, scale)


# --- CLIP in open_clip's format -----------------------------------------------------------------------------


def import_open_clip():
    try:
        import open_clip
    except ImportError as error:
        raise RewardError(
            f"this reward needs open_clip ({weights.brief(error)}): pip install open_clip_torch"
        ) from error
    return open_clip


def load_open_clip(key, path, architecture, dtype, device):
    """An open_clip model from a pickled state dict."""
    open_clip = import_open_clip()
    state = weights.read_pickle(key, path)
    with torch.device("meta"):  # no time spent on drawing weights that are replaced
        model = open_clip.CLIP(**open_clip.get_model_config(architecture)).to(dtype)
    model = model.to_empty(device=device)
    length = model.context_length
    # The causal mask is not in the file.
    model.attn_mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)
    weights.load_strict(key, path, model, state)
    weights.loaded(key, path)
    return freeze(model, device)


def hps_loss(name, key, dtype, device, own):
    """Loss of HPS v2: minus the cosine between image and prompt."""
    dtype, device = dtype or torch.float32, device or "cpu"
    path, architecture = weights.locate(key), weights.settings().hps_architecture
    model = load_open_clip(key, path, architecture, dtype, device)
    tokenizer = import_open_clip().get_tokenizer(architecture)

    def text_tower(model):
        def embed(prompt):
            warn_if_cut(key, prompt, len(tokenizer.encode(prompt)) + 2, tokenizer.context_length)
            features = model.encode_text(tokenizer([prompt]).to(device))[0]  # (D,)
            return F.normalize(features.to(full(dtype)), dim=0)

        return embed

    visual = model.visual
    checkpoint_blocks(visual.transformer.resblocks)
    prepare = prepared(own, visual.image_size[0])

    def embed_images(images):
        return F.normalize(through(visual, prepare(images.to(device, full(dtype))), dtype), dim=1)  # (B, D)

    def load_text():
        return text_tower(load_open_clip(key, path, architecture, dtype, device))

    prompts = Prompts(load_text, text_tower(model))
    return similarity_loss(name, embed_images, prompts, 1)
