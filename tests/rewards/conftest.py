"""Scaled-down models with random weights, saved in the true file layout of the published ones."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rewards


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch):
    """Every test starts without settings and environment variables, on one thread: the models are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for model in rewards.MODELS.values():
        monkeypatch.delenv(model.variable, raising=False)
    rewards.configure()
    yield
    rewards.configure()
    torch.set_num_threads(threads)


def seeded(shape, seed, scale=1.0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


@pytest.fixture(scope="session")
def pictures():
    """pictures(batch, height, width): smooth images (B, 3, H, W), all inside (-1, 1)."""

    def draw(batch, height, width, seed=0, dtype=torch.float32):
        coarse = seeded((batch, 3, 5, 5), seed, 0.35, dtype)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        return (smooth + seeded((batch, 3, height, width), seed + 1, 0.05, dtype)).clamp(-0.95, 0.95)

    return draw


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory, pictures):
    """Three PNG files of different shapes in one folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (height, width) in enumerate([(96, 96), (64, 100), (120, 80)]):
        pixels = ((pictures(1, height, width, seed=i)[0] / 2 + 0.5) * 255).round().byte()
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def randomize():
    """Give a module random weights under which inputs matter: no layer fades the signal out."""

    def draw(module, seed):
        generator = torch.Generator().manual_seed(seed)
        for name, value in module.state_dict().items():
            if value.is_floating_point() and value.ndim > 0 and "mask" not in name:
                fan = value[0].numel() if value.ndim > 1 and "embed" not in name else 4
                noise = torch.randn(value.shape, generator=generator) * fan**-0.5
                gain = value.ndim == 1 and name.endswith("weight")
                value.copy_(noise * 0.2 + 1 if gain else noise)
        return module

    return draw


# --- CLIP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clip_vocabulary(tmp_path_factory):
    """CLIP's own vocabulary as vocab.json and merges.txt, made from the copy inside open_clip."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = open_clip.SimpleTokenizer()
    words = [*list(tokenizer.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.open(packed, "rt", encoding="utf-8").read().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>", "model_max_length": 77}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def clip_model(seed, randomize, projection=32, image_size=224, patch=32, vocabulary=49408, length=77):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocabulary, "max_position_embeddings": length, "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}  # fmt: skip
    config = CLIPConfig(text_config=tower | text, projection_dim=projection,
                        vision_config=tower | {"image_size": image_size, "patch_size": patch})  # fmt: skip
    return randomize(CLIPModel(config), seed).eval()


def save_clip(folder, model, vocabulary=None, **options):
    model.save_pretrained(folder, **options)
    for file in vocabulary.iterdir() if vocabulary else ():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, clip_vocabulary, randomize):
    """Laid out as openai/clip-vit-large-patch14; 768 dimensions at the end, as `aesthetic` needs."""
    return save_clip(tmp_path_factory.mktemp("clip"), clip_model(1, randomize, 768), clip_vocabulary)


@pytest.fixture(scope="session")
def pick_folder(tmp_path_factory, randomize):
    """Laid out as yuvalkirstain/PickScore_v1, which has no tokenizer of its own, so open_clip's is used."""
    pytest.importorskip("open_clip")
    return save_clip(tmp_path_factory.mktemp("pick"), clip_model(2, randomize))


@pytest.fixture(scope="session")
def sprites_folder(tmp_path_factory, randomize):
    """Laid out as sprites/clip: 64 px, a small vocabulary, prompts of at most 16 tokens."""
    words = ["white", "black", "red", "duck", "car"]
    letters = sorted(set("".join(words)))
    vocabulary, merges = letters + [letter + "</w>" for letter in letters], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = " ".join(parts[:2])
            parts[:2] = ["".join(parts[:2])]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    source = tmp_path_factory.mktemp("sprites-vocabulary")
    (source / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}))
    model = clip_model(3, randomize, image_size=64, patch=8, vocabulary=len(vocabulary), length=16)
    return save_clip(tmp_path_factory.mktemp("sprites"), model, source)


@pytest.fixture(scope="session")
def aesthetic_file(tmp_path_factory):
    """Laid out as sac+logos+ava1-l14-linearMSE.pth."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {}
    for number, shape in sizes.items():
        state[f"layers.{number}.weight"] = seeded(shape, number, shape[1] ** -0.5)
        state[f"layers.{number}.bias"] = seeded(shape[:1], number + 10, 0.1)
    file = tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, file)
    return file


# --- HPS ----------------------------------------------------------------------------------------------------

HPS_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def hps_architecture(tmp_path_factory):
    """Name of a scaled-down ViT-H-14 that open_clip knows from now on."""
    open_clip = pytest.importorskip("open_clip")
    file = tmp_path_factory.mktemp("architecture") / "ViT-tiny-test.json"
    file.write_text(json.dumps(HPS_CONFIG))
    open_clip.add_model_config(file)
    return file.stem


@pytest.fixture(scope="session")
def hps_file(tmp_path_factory, hps_architecture, randomize):
    """Laid out as HPS_v2_compressed.pt."""
    import open_clip

    model = randomize(open_clip.CLIP(**HPS_CONFIG), 4)
    file = tmp_path_factory.mktemp("hps") / "HPS_v2_compressed.pt"
    torch.save({"epoch": 5, "name": "hps", "state_dict": model.state_dict()}, file)
    return file


# --- ImageReward --------------------------------------------------------------------------------------------

MED_CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 24,
    "encoder_width": 768,
    "add_cross_attention": True,
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "white",
    "red",
    "duck",
    "##s",
    "on",
    ".",
    ",",
    "car",
]


def imagereward_shapes(width=128, depth=2, patch=16, positions=17):
    """Names and shapes in ImageReward.pt, scaled down: ViT of 64 px, BERT with cross-attention, MLP."""
    hidden, inner, words, places = (
        MED_CONFIG[name]
        for name in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    )

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{vit}.cls_token": (1, 1, width), f"{vit}.pos_embed": (1, positions, width)}
    shapes |= {f"{vit}.patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {f"{vit}.patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = f"{vit}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", width) | linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= linear(f"{block}.attn.proj", width, width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.mlp.fc1", 2 * width, width) | linear(f"{block}.mlp.fc2", width, 2 * width)
    shapes |= norm(f"{vit}.norm", width)
    shapes |= {f"{bert}.embeddings.word_embeddings.weight": (words, hidden)}
    shapes |= {f"{bert}.embeddings.position_embeddings.weight": (places, hidden)}
    shapes |= norm(f"{bert}.embeddings.LayerNorm", hidden)
    for i in range(MED_CONFIG["num_hidden_layers"]):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, source in (("attention", hidden), ("crossattention", width)):
            shapes |= linear(f"{layer}.{kind}.self.query", hidden, hidden)
            shapes |= linear(f"{layer}.{kind}.self.key", hidden, source)
            shapes |= linear(f"{layer}.{kind}.self.value", hidden, source)
            shapes |= linear(f"{layer}.{kind}.output.dense", hidden, hidden)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", hidden)
        shapes |= linear(f"{layer}.intermediate.dense", inner, hidden)
        shapes |= linear(f"{layer}.output.dense", hidden, inner) | norm(f"{layer}.output.LayerNorm", hidden)
    shapes |= linear("blip.vision_proj", 256, width) | linear("blip.text_proj", 256, hidden)
    for number, (outputs, inputs) in {
        0: (1024, hidden),
        2: (128, 1024),
        4: (64, 128),
        6: (16, 64),
        7: (1, 16),
    }.items():
        shapes |= linear(f"mlp.layers.{number}", outputs, inputs)
    return shapes


@pytest.fixture(scope="session")
def imagereward_folder(tmp_path_factory):
    """ImageReward.pt, med_config.json and BERT's vocab.txt in one folder."""
    folder = tmp_path_factory.mktemp("imagereward")
    state = {}
    for seed, (name, shape) in enumerate(imagereward_shapes().items()):
        gain = "norm" in name.lower() and name.endswith("weight")
        fan = state_fan(name, shape)
        state[name] = seeded(shape, seed, 0.2 if gain else fan**-0.5) + gain
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED_CONFIG["max_position_embeddings"])[
        None
    ]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def state_fan(name, shape):
    """Inputs of a unit; 4 for biases and embeddings."""
    if len(shape) < 2 or "embeddings" in name or name.endswith(("cls_token", "pos_embed")):
        return 4
    return int(np.prod(shape[1:]))


# --- all of them --------------------------------------------------------------------------------------------


@pytest.fixture
def configure(
    clip_folder, pick_folder, sprites_folder, aesthetic_file, hps_file, hps_architecture, imagereward_folder
):
    """configure(**settings): point every reward at its scaled-down weights."""

    def apply(**settings):
        paths = {"clip_path": clip_folder, "pick_path": pick_folder, "sprites_path": sprites_folder,
                 "aesthetic_path": aesthetic_file, "hps_path": hps_file, "hps_v2_1_path": hps_file,
                 "imagereward_path": imagereward_folder}  # fmt: skip
        rewards.configure(hps_architecture=hps_architecture, **(paths | settings))

    apply()
    return apply
