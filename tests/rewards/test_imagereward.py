"""ImageReward against a forward pass written out here, straight from the names in the file."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rewards

transforms = pytest.importorskip("torchvision.transforms.v2", reason="the extra `rewards` is not installed")
tv, InterpolationMode = transforms.functional, transforms.InterpolationMode

IDS = {"a white duck": [2, 5, 6, 8, 3], "red ducks, on a car.": [2, 7, 8, 9, 12, 10, 5, 13, 11, 3]}


def forward(state, images, prompts, vision_heads=2, text_heads=4):
    """Minus the reward. The token ids are those of the test's own vocabulary, worked out by hand."""
    weight = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    linear = lambda x, name: F.linear(x, *weight(name))  # noqa: E731
    norm = lambda x, name, eps: F.layer_norm(x, x.shape[-1:], *weight(name), eps)  # noqa: E731

    def attend(q, k, v, heads, mask=None):
        q, k, v = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)
        )  # (B, heads, L, D / heads)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    # picture
    pixels = tv.resize(images / 2 + 0.5, [64], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    pixels = tv.center_crop(pixels, [64, 64])
    pixels = tv.normalize(pixels, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, *weight(f"{vit}.patch_embed.proj"), stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{vit}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{vit}.pos_embed"]
    for i in range(2):
        block = f"{vit}.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, vision_heads), f"{block}.attn.proj")
        h = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(h, f"{block}.mlp.fc2")
    seen = norm(x, f"{vit}.norm", 1e-6)

    # prompt, padded to 35 tokens
    ids = torch.tensor([IDS[prompt] + [0] * (35 - len(IDS[prompt])) for prompt in prompts])
    mask = ids != 0
    x = state[f"{bert}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{bert}.embeddings.position_embeddings.weight"][:35]
    x = norm(x, f"{bert}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            name = f"{layer}.{kind}"
            source = x if source is None else source
            q = linear(x, f"{name}.self.query")
            k, v = linear(source, f"{name}.self.key"), linear(source, f"{name}.self.value")
            h = linear(attend(q, k, v, text_heads, hidden), f"{name}.output.dense")
            x = norm(x + h, f"{name}.output.LayerNorm", 1e-12)
        h = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + h, f"{layer}.output.LayerNorm", 1e-12)

    x = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{number}")
    return -(x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def state(imagereward_folder):
    return torch.load(imagereward_folder / "ImageReward.pt", weights_only=True)


def test_value_and_gradient_agree_with_the_forward_pass_written_out(configure, state, pictures):
    loss_fn = rewards.RFUNCTIONS["imagereward"]()
    images = pictures(2, 96, 144).requires_grad_(True)
    expected = forward(state, images, list(IDS))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    losses = loss_fn(images, list(IDS))
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    scale = expected_gradient.abs().max()
    assert scale > 1e-6
    torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=0, atol=1e-4)


def test_the_published_text_config_is_used_without_med_config(configure, imagereward_folder, tmp_path):
    for name in ("ImageReward.pt", "vocab.txt"):
        (tmp_path / name).write_bytes((imagereward_folder / name).read_bytes())
    configure(imagereward_path=tmp_path / "ImageReward.pt")
    with pytest.raises(rewards.RewardError, match=r"expected \(30524, 768\)|another architecture"):
        rewards.RFUNCTIONS["imagereward"]()


def test_every_weight_is_used_or_known_to_be_unused(state):
    from rewards.imagereward import ImageReward, rename, text_config, vision_config

    renamed = rename(state)
    unused = len(state) - len(renamed)
    assert unused == 5  # two projections of two tensors each, and the buffer of positions
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    with torch.device("meta"):
        published = ImageReward(vision | {"image_size": 224, "patch_size": 16}, text_config(Path("nowhere")))
    # BLIP-L: 304 M in the ViT, 138 M in the BERT with cross-attention, under 1 M in the MLP
    assert 440e6 < sum(p.numel() for p in published.parameters()) < 450e6
    assert vision_config(state)["num_attention_heads"] == 2


def test_missing_and_extra_weights_are_refused(configure, state, imagereward_folder, tmp_path):
    (tmp_path / "med_config.json").write_bytes((imagereward_folder / "med_config.json").read_bytes())
    (tmp_path / "vocab.txt").write_bytes((imagereward_folder / "vocab.txt").read_bytes())
    configure(imagereward_path=tmp_path)
    lacking = {
        k: v
        for k, v in state.items()
        if k != "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    }
    extra = state | {"blip.visual_encoder.blocks.0.attn.gate": torch.zeros(3)}
    for changed, word in (
        (lacking, "1 missing"),
        (extra, "1 unexpected"),
        ({"x": torch.zeros(1)}, "visual_encoder"),
    ):
        torch.save(changed, tmp_path / "ImageReward.pt")
        with pytest.raises(rewards.RewardError, match=word):
            rewards.RFUNCTIONS["imagereward"]()


def test_tokenizer_comes_from_its_own_row_too(configure, imagereward_folder, tmp_path, pictures):
    expected = rewards.RFUNCTIONS["imagereward"]()(pictures(1, 64, 64), ["red car"])
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_bytes((imagereward_folder / name).read_bytes())
    configure(imagereward_path=tmp_path, bert_path=imagereward_folder / "vocab.txt")
    assert torch.equal(rewards.RFUNCTIONS["imagereward"]()(pictures(1, 64, 64), ["red car"]), expected)
    files = {entry["model"]: entry["file"] for entry in rewards.loaded_files()}
    assert files == {"imagereward": "ImageReward.pt", "bert": "vocab.txt"}
    (tmp_path / "vocab.txt").write_text(json.dumps(["not", "a", "vocabulary"]))
    with pytest.raises(rewards.RewardError, match="bert"):
        rewards.RFUNCTIONS["imagereward"]()
