"""Write trained weights as folders that diffusers and transformers load with no further argument."""

import json
import os
import tempfile
from pathlib import Path

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from sprites import networks
from sprites.judge import Judge
from sprites.scenes import SIZE
from sprites.tokens import build_tokenizer


def export(output, vae=None, unet=None, clip=None, judge=None, unet_xl=None):
    """Write what is given, state dicts, below the folder `output`; each file is replaced when complete."""
    output = Path(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        folder = Path(folder)
        if vae and unet:
            write_pipeline(folder, vae, unet)
        if vae and unet_xl:
            write_pipeline_xl(folder / "xl", vae, unet_xl)
        if clip:
            write_clip(folder / "clip", clip)
        if judge:
            write_judge(folder / "judge", judge)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = output / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def write_pipeline(folder, vae_weights, unet_weights):
    """The pipeline. UNet and VAE are stored in float16, which diffusers loads as float32.

    The text encoder is stored in float32: transformers keeps the stored type, and half against float fails.
    """
    vae, tokenizer = networks.autoencoder(), build_tokenizer()
    vae.load_state_dict(vae_weights)
    model = networks.text_to_latents(tokenizer)
    model.load_state_dict(unet_weights)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model["text_encoder"].float(),
        tokenizer=tokenizer,
        unet=model["unet"].half(),
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_vocabulary(folder / "tokenizer")


def write_pipeline_xl(folder, vae_weights, unet_weights):
    """sprites-xl, stored as the pipeline above; both tokenizers are the same."""
    vae, tokenizer = networks.autoencoder(), build_tokenizer()
    vae.load_state_dict(vae_weights)
    model = networks.text_to_latents_xl(tokenizer)
    model.load_state_dict(unet_weights)
    pipeline = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=model["text_encoder"].float(),
        text_encoder_2=model["text_encoder_2"].float(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model["unet"].half(),
        scheduler=networks.scheduler(),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        write_vocabulary(folder / name)


def write_clip(folder, weights):
    """CLIPModel with its tokenizer and a preprocessor that only brings images to 64 x 64 and [-1, 1]."""
    tokenizer = build_tokenizer()
    clip = networks.clip(tokenizer)
    clip.load_state_dict(weights)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_vocabulary(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half).save_pretrained(folder)


def write_vocabulary(folder):
    """vocab.json and merges.txt, which older readers expect beside tokenizer.json."""
    state = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_judge(folder, weights):
    """The second judge; stored in float16, read back into its float32 network."""
    judge = Judge()
    judge.load_state_dict(weights)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(judge.config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
