"""The shipped weights: they load with no argument, show what the prompt says, and the judges can tell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sprites.judge import judge_probability, load_judge, name
from sprites.networks import LATENT_STD, to_images
from sprites.scenes import COLOURS, PAIRS, caption, layout, render, scenes
from sprites.tokens import build_tokenizer, token_ids

SPRITES = Path(__file__).resolve().parents[2] / "sprites"
HELD_OUT = 2000  # a seed of scenes that nothing was trained on


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(str(SPRITES))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(SPRITES / "clip").eval()


@torch.no_grad()
def clip_names(clip, images):
    ids = token_ids(CLIPTokenizer.from_pretrained(SPRITES / "clip"), [caption(*pair) for pair in PAIRS])
    return [PAIRS[i] for i in clip(input_ids=ids, pixel_values=images).logits_per_image.argmax(1)]


def agreement(seen, truth):
    return np.mean([s == t for s, t in zip(seen, truth, strict=True)])


def test_size_limit():
    """16 MB for all that is tracked: code, weights, tokenizers, pictures; sprites/xl has its own limit."""
    files = [f for f in SPRITES.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    files = [f for f in files if SPRITES / "xl" not in f.parents]
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    assert not [f.name for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]  # safetensors only


def test_pipeline_is_consistent_float32(pipeline):
    assert {p.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    assert pipeline.safety_checker is None
    assert pipeline.vae.config.scaling_factor == 0.18215
    schedule = pipeline.scheduler.config
    assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert schedule.prediction_type == "epsilon"
    assert not schedule.clip_sample
    assert not schedule.set_alpha_to_one


@pytest.mark.parametrize("folder", ["tokenizer", "clip"])
def test_tokenizer_files_agree_with_the_code(folder):
    tokenizer, built = CLIPTokenizer.from_pretrained(SPRITES / folder), build_tokenizer()
    assert (SPRITES / folder / "vocab.json").exists()
    assert (SPRITES / folder / "merges.txt").exists()
    prompts = [*(caption(*pair) for pair in PAIRS), "a white zebra", ""]
    assert torch.equal(token_ids(tokenizer, prompts), token_ids(built, prompts))


def test_samples_show_their_prompts_to_both_judges(pipeline, judge, clip):
    pairs = [("white", "duck"), ("red", "car"), ("blue", "fish"), ("black", "cat")]
    prompts = [caption(*pair) for pair in pairs]
    generators = [torch.Generator().manual_seed(i) for i in range(len(pairs))]
    output = pipeline(
        prompts, num_inference_steps=25, eta=1.0, guidance_scale=3.0, generator=generators, output_type="pt"
    )
    images = output.images * 2 - 1
    assert images.shape == (4, 3, 64, 64)
    assert name(judge, images) == pairs
    assert clip_names(clip, images) == pairs
    assert (judge_probability(judge, images, prompts) > 0.5).all()


def test_held_out_scenes_are_named_right(judge, clip):
    images, pairs = scenes(0, 512, HELD_OUT)
    images, truth = to_images(images), [PAIRS[pair] for pair in pairs]
    assert agreement(name(judge, images), truth) >= 0.98
    assert agreement(clip_names(clip, images), truth) >= 0.98


def test_judge_names_a_recoloured_duck(judge):
    """The same picture, its duck repainted: were the new colour not seen, cheating would not be either."""
    pictures, colours = [], []
    for i, colour in enumerate(c for c in COLOURS if c != "white"):
        for j in range(6):
            drawing = layout("duck", np.random.default_rng((HELD_OUT, i, j)), avoid=("white", colour))
            pictures.append(np.asarray(render(drawing, colour)))
            colours.append(colour)
    images = to_images(np.stack(pictures))
    assert agreement([colour for colour, _ in name(judge, images)], colours) >= 0.95
    assert (judge_probability(judge, images, "white duck") < 0.5).float().mean() >= 0.95


def test_judge_says_what_it_needs(judge):
    with pytest.raises(ValueError, match="one colour of white, black"):
        judge_probability(judge, torch.zeros(1, 3, 64, 64), ["a zebra"])


def test_judge_accepts_other_sizes(judge):
    images = to_images(scenes(0, 8, HELD_OUT)[0])
    larger = torch.nn.functional.interpolate(images, scale_factor=2.0, mode="bilinear")
    assert name(judge, larger) == name(judge, images)


@torch.no_grad()
def test_autoencoder_and_its_latents(pipeline):
    images = to_images(scenes(0, 256, HELD_OUT)[0])
    latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.shape == (256, 4, 16, 16)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert 10 * torch.log10(4 / (decoded - images).square().mean()) >= 33
    covariance = latents.transpose(0, 1).flatten(1).cov()
    assert torch.allclose(covariance, LATENT_STD**2 * torch.eye(4), atol=0.04)


def test_clip_preprocessor_gives_the_range_clip_was_trained_on():
    processor = CLIPImageProcessor.from_pretrained(SPRITES / "clip")
    pixels = processor(Image.new("RGB", (128, 128), "white"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.allclose(pixels, torch.ones(1))
