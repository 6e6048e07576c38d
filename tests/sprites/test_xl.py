"""sprites-xl as shipped: a StableDiffusionXLPipeline that shows its prompt and obeys its micro-conditioning."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sprites.judge import judge_probability, load_judge, name
from sprites.scenes import caption

SPRITES = Path(__file__).resolve().parents[2] / "sprites"
PAIRS = [("white", "duck"), ("red", "car"), ("blue", "fish"), ("black", "cat")]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(SPRITES / "xl"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plain(pipeline):
    return draw(pipeline, number=len(PAIRS))


def draw(pipeline, number=2, **options):
    """Pictures of the first of PAIRS, always from the same noise: (number, 3, 64, 64) in [-1, 1]."""
    generators = [torch.Generator().manual_seed(i) for i in range(number)]
    prompts = [caption(*pair) for pair in PAIRS[:number]]
    output = pipeline(prompts, num_inference_steps=10, eta=1.0, guidance_scale=3.0, generator=generators,
                      output_type="pt", **options)  # fmt: skip
    return output.images * 2 - 1


def test_size_limit():
    files = [f for f in (SPRITES / "xl").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    assert not [f.name for f in files if f.suffix not in (".safetensors", ".json", ".txt", ".png")]


def test_pipeline_is_consistent_float32(pipeline):
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.timestep_spacing == "trailing"


def test_same_autoencoder_and_tokenizers_as_sprites():
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (SPRITES / "xl" / "vae" / file).read_bytes() == (SPRITES / "vae" / file).read_bytes()
    for folder in ("tokenizer", "tokenizer_2"):
        for file in (SPRITES / "tokenizer").iterdir():
            assert (SPRITES / "xl" / folder / file.name).read_bytes() == file.read_bytes()


def test_samples_show_their_prompts(plain):
    judge = load_judge()
    assert plain.shape == (4, 3, 64, 64)
    assert name(judge, plain) == PAIRS
    assert (judge_probability(judge, plain, [caption(*pair) for pair in PAIRS]) > 0.5).all()


def test_a_negative_prompt_may_be_given(pipeline):
    assert name(load_judge(), draw(pipeline, negative_prompt=["", ""])) == PAIRS[:2]


def test_a_small_original_size_gives_blurred_pictures(pipeline, plain):
    """Compared by the energy of differences between neighbouring pixels."""
    blurred = draw(pipeline, original_size=(12, 12))
    for sharp, soft in zip(plain, blurred):
        assert soft.diff(dim=2).square().mean() < 0.85 * sharp.diff(dim=2).square().mean()


def test_a_crop_moves_the_subject_out_of_the_picture(pipeline, plain):
    """Cropped on the left, the subject lies further left; the background is read at the right edge."""

    def middle(images):
        seen = ((images - images[..., -2:].mean(3, keepdim=True)).abs().amax(1) > 0.4).float()  # (B, H, W)
        return (seen * torch.arange(64)).sum((1, 2)) / seen.sum((1, 2))

    assert (middle(draw(pipeline, crops_coords_top_left=(0, 20))) < middle(plain[:2]) - 5).all()
