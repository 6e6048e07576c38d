"""What several tests share: the parity pipeline, and a much smaller one that runs in milliseconds."""

import shutil
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_folder():
    """The parity pipeline, a `StableDiffusionPipeline` of 128 x 128 px."""
    return GOLDEN / "tiny-sd"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random `StableDiffusionPipeline` of 16 x 16 px and 8 x 8 latents, with a scheduler as SD 1.5 has it.

    It is shared, so a test that wants another model copies the folder and changes the copy.
    """
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    """The model of `tiny_folder` in float32 on the CPU."""
    import dno

    return dno.load_model(str(tiny_folder), torch.float32)


@pytest.fixture(scope="session")
def golden_xl_folder():
    """The parity pipeline of SDXL, of 128 x 128 px."""
    return GOLDEN / "tiny-sdxl"


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory):
    """A random `StableDiffusionXLPipeline` of 16 x 16 px and 8 x 8 latents, with SDXL's scheduler; shared, as above."""
    folder = tmp_path_factory.mktemp("tiny-xl")
    tiny_xl_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_xl_model(tiny_xl_folder):
    """The model of `tiny_xl_folder` in float32 on the CPU."""
    import dno

    return dno.load_model(str(tiny_xl_folder), torch.float32)


def tiny_pipeline(tokenizer_folder):
    """A random `StableDiffusionPipeline`, the same each time; its tokenizer is copied to `tokenizer_folder`."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    # copyfile, because the originals may be read-only.
    shutil.copytree(GOLDEN / "tiny-sd" / "tokenizer", tokenizer_folder, copy_function=shutil.copyfile)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        ))  # fmt: skip
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        skip_prk_steps=True, timestep_spacing="leading",
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, CLIPTokenizer.from_pretrained(tokenizer_folder), unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_xl_pipeline(folder):
    """A random `StableDiffusionXLPipeline`, the same each time; its tokenizers are copied to `folder`."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(GOLDEN / "tiny-sdxl" / part, folder / part, copy_function=shutil.copyfile)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=28,
            attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=10 + 6 * 4,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        text = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
                "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=16, **text))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=12, projection_dim=10, **text))
    tokenizers = [CLIPTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2")]
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    return StableDiffusionXLPipeline(vae, text_encoder, text_encoder_2, *tokenizers, unet, scheduler)
