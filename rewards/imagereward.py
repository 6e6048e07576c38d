"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP, without its own package.

The image goes through a ViT, the prompt through a BERT that attends to the image in every layer, and an MLP reads the
reward off BERT's first token:

    reward = (mlp(bert(prompt | vit(image))[0]) - MEAN) / STD

MEAN and STD are the published ones, over the training pairs: the average image scores 0.
"""

import json

import torch
from torch import nn

from . import weights
from .preprocess import check, crop
from .towers import (
    LinearHead,
    Prompts,
    checkpoint_blocks,
    freeze,
    full,
    prepared,
    quiet,
    through,
    warn_if_cut,
)
from .weights import RewardError

MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPT_LENGTH = 35  # tokens, the two at the ends included
HEAD_SIZE = 64  # of the ViT's attention, whatever its width

# med_config.json as published; a file of that name beside the weights wins.
TEXT_CONFIG = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}

# Names in ImageReward.pt and in transformers' BLIP, applied in this order. The text encoder's names agree.
VISION_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


class ImageReward(nn.Module):
    """Two encoders and an MLP; `imagereward_loss` runs the three.

    vision, text: settings of the BlipVisionConfig and the BlipTextConfig.
    """

    def __init__(self, vision, text):
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6, hidden_act="gelu"))
        # `is_decoder` makes the cross-attention; the calls below still attend in both directions.
        config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.mlp = LinearHead(text["hidden_size"])

    def encode(self, pixels, ids, mask):
        """Pixels (B, 3, S, S) and token ids (B, L) with their mask -> the first token's features (B, D)."""
        seen = self.vision(pixels).last_hidden_state  # (B, 1 + patches, D)
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state  # (B, L, D)
        return read[:, 0]


def imagereward_loss(dtype, device):
    """Loss of ImageReward: minus the reward, about 0 for an average image, above 1 for a very good one."""
    dtype, device = dtype or torch.float32, device or "cpu"
    model, size = load(dtype, device)
    tokenizer = load_tokenizer(model.text.config.vocab_size)
    checkpoint_blocks([*model.vision.encoder.layers, *model.text.encoder.layer])
    prepare = prepared(lambda images, size: crop(images, size, round), size, official=False)

    def tokenize(prompt):
        """(2, 35): ids and mask."""
        with quiet():
            warn_if_cut("imagereward", prompt, len(tokenizer(prompt).input_ids), PROMPT_LENGTH)
            tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=PROMPT_LENGTH)
        return torch.tensor([tokens.input_ids, tokens.attention_mask], device=device)

    # The prompt is read together with the image, so only its tokens can be cached.
    prompt_tokens = Prompts(lambda: tokenize, tokenize)

    def loss_fn(images, prompts):
        ids, mask = prompt_tokens(check("imagereward", images, prompts)).unbind(1)  # (B, 35) each
        pixels = prepare(images.to(device, full(dtype)))
        features = through(lambda pixels: model.encode(pixels, ids, mask), pixels, dtype)
        # As published, the MLP runs in float32 whatever the encoders are in.
        return -((model.mlp(features) - MEAN) / STD).to(images.device)

    return loss_fn


def load(dtype, device):
    """The model from ImageReward.pt, and the size of its images."""
    path = weights.locate("imagereward")
    state = weights.read_pickle("imagereward", path)
    try:
        vision = vision_config(state)
    except (KeyError, IndexError) as error:
        raise RewardError(
            f"imagereward: {path} has another architecture: it lacks {error.args[0]}, expected a BLIP under "
            f"blip.visual_encoder and blip.text_encoder; {weights.again('imagereward')}"
        ) from error
    with torch.device("meta"):
        model = ImageReward(vision, text_config(path.parent / "med_config.json")).to(dtype)
    model.mlp.to(full(dtype))
    model = model.to_empty(device=device)
    words = model.text.embeddings  # its positions are not in the file
    words.position_ids = torch.arange(words.position_embeddings.num_embeddings, device=device)[None]
    weights.load_strict("imagereward", path, model, rename(state))
    weights.loaded("imagereward", path)
    return freeze(model, device), vision["image_size"]


def vision_config(state):
    """The ViT's sizes, read off its weights."""
    patches = state["blip.visual_encoder.patch_embed.proj.weight"]  # (D, 3, P, P)
    width, patch = patches.shape[0], patches.shape[-1]
    side = round((state["blip.visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    blocks = {name.split(".")[3] for name in state if name.startswith("blip.visual_encoder.blocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "image_size": side * patch,
        "patch_size": patch,
    }


def text_config(file):
    """TEXT_CONFIG, with what a med_config.json says instead."""
    given = {}
    if file.is_file():
        try:
            given = json.loads(file.read_text())
        except ValueError as error:
            raise weights.unreadable("imagereward", file, error) from error
    return {name: given.get(name, value) for name, value in TEXT_CONFIG.items()}


def rename(state):
    """The part of ImageReward.pt that the reward uses, under this module's names.

    Left out are BLIP's projections to its contrastive space and a buffer of positions.
    """
    renamed = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            name = "." + name.removeprefix("blip.visual_encoder.")
            name = name.replace(".norm.", ".post_layernorm.")
            for old, new in VISION_NAMES:
                name = name.replace(old, new)
            renamed["vision" + name] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            renamed["text." + name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp."):
            renamed[name] = value
    return renamed


def load_tokenizer(vocabulary):
    """BERT's tokenizer from its vocab.txt, beside the weights or wherever the row `bert` says.

    vocabulary: number of words that the text encoder knows; two of the published 30524 are BLIP's own marks,
    which a prompt never contains.
    """
    from transformers import BertTokenizer

    beside = weights.locate("imagereward").parent / "vocab.txt"
    path = beside if beside.is_file() else weights.locate("bert")
    try:
        words = set(path.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise weights.unreadable("bert", path, error) from error
    if len(words) > vocabulary or not words.issuperset(("[PAD]", "[UNK]", "[CLS]", "[SEP]")):
        raise RewardError(
            f"bert: {path} is not the vocabulary of ImageReward: {len(words)} words, expected at most "
            f"{vocabulary} with [PAD], [UNK], [CLS] and [SEP]; {weights.again('bert')}"
        )
    weights.loaded("bert", path)
    with quiet():
        return BertTokenizer(vocab=str(path), do_lower_case=True)
