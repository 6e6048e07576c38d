"""Quality of the embedded model: measures every bar of sprites/README.md and prints the table.

    python benchmarks/sprites_quality.py                       # 64 prompts x 8 seeds, minutes on two cores
    python benchmarks/sprites_quality.py --grid samples.png    # also writes a sheet of the samples

Sampling is diffusers' own StableDiffusionPipeline on the folder as it lies in the repository.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sprites.judge import load_judge, name
from sprites.networks import to_images
from sprites.scenes import COLOURS, PAIRS, SIZE, THINGS, caption, layout, render, scenes
from sprites.tokens import token_ids

HELD_OUT = 1000  # the seed of scenes that no stage was trained on
CAPTIONS = [caption(*pair) for pair in PAIRS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent.parent / "sprites"))
    parser.add_argument("--seeds", type=int, default=8, help="samples of each of the 64 prompts")
    parser.add_argument("--num_steps", type=int, default=25)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_scenes", type=int, default=4096, help="held-out scenes, a multiple of 64")
    parser.add_argument("--grid", help="write the samples of the first two seeds to this picture")
    args = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    judge, clip = load_judge(Path(args.model) / "judge"), load_clip(Path(args.model) / "clip")
    drawn, pairs = scenes(0, args.num_scenes, HELD_OUT)
    truth = [PAIRS[pair] for pair in pairs]
    drawn = to_images(drawn)

    began = time.perf_counter()
    samples = sample(pipeline, args)
    sampling = time.perf_counter() - began
    prompts = list(PAIRS) * args.seeds
    seen = name(judge, samples)
    by_thing = {t: agreement(*zip(*((s, p) for s, p in zip(seen, prompts) if p[1] == t))) for t in THINGS}
    by_colour = {c: agreement(*zip(*((s, p) for s, p in zip(seen, prompts) if p[0] == c))) for c in COLOURS}
    worst, dull = min(by_thing, key=by_thing.get), min(by_colour, key=by_colour.get)
    spread, spread_drawn = brightness(samples).std().item(), brightness(drawn).std().item()
    call, decode = timings(pipeline)

    settings = f"{len(samples)} samples, {args.num_steps} steps, eta {args.eta:g}, guidance {args.guidance_scale:g}"
    held_out = f"{len(drawn)} held-out scenes"
    mean, mean_drawn = brightness(samples).mean().item(), brightness(drawn).mean().item()
    threads = torch.get_num_threads()
    rows = [
        (f"CLIP names colour and thing, {held_out}", ">= 99 %", percent(clip_names(clip, drawn), truth)),
        (f"second judge, {held_out}", "", percent(name(judge, drawn), truth)),
        ("second judge names a recoloured duck's new colour", ">= 95 %", f"{100 * recoloured(judge):.1f} %"),
        ("autoencoder, held-out scenes", ">= 33 dB", f"{psnr(pipeline.vae, drawn[:512]):.2f} dB"),
        (f"second judge agrees with the prompt, {settings}", ">= 99 %", percent(seen, prompts)),
        (f"  on the worst thing ({worst})", ">= 97 %", f"{100 * by_thing[worst]:.1f} %"),
        (f"  on the worst colour ({dull})", "", f"{100 * by_colour[dull]:.1f} %"),
        ("CLIP agrees with the prompt, same samples", "", percent(clip_names(clip, samples), prompts)),
        ("spread of mean brightness, samples / scenes", ">= 0.9",
         f"{spread / spread_drawn:.2f} ({spread:.3f} / {spread_drawn:.3f})"),
        ("mean brightness, samples / scenes", "", f"{mean:.3f} / {mean_drawn:.3f}"),
        (f"guided UNet call / decode, {threads} threads", "", f"{call:.0f} ms / {decode:.0f} ms"),
        ("seconds a sample", "", f"{sampling / len(samples):.2f} s"),
    ]  # fmt: skip
    print("| measure | bar | measured |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(
        "\nmisnamed:",
        *(f"{' '.join(p)} as {' '.join(s)}" for s, p in zip(seen, prompts) if s != p),
        sep="\n  ",
    )
    if args.grid:
        contact_sheet(samples[: 2 * len(PAIRS)]).save(args.grid, optimize=True)


@torch.no_grad()
def sample(pipeline, args):
    """All prompts for each seed, a generator for each sample: (64 * seeds, 3, 64, 64) in [-1, 1]."""
    images = []
    for seed in range(args.seeds):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(CAPTIONS))]
        images += pipeline(CAPTIONS, num_inference_steps=args.num_steps, eta=args.eta, generator=generators,
                           guidance_scale=args.guidance_scale, output_type="pt").images  # fmt: skip
    return torch.stack(images) * 2 - 1


def load_clip(folder):
    """A function images (B, 3, 64, 64) in [-1, 1] -> logits over the 64 captions, (B, 64)."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    ids = token_ids(tokenizer, CAPTIONS)

    @torch.no_grad()
    def logits(images):
        return torch.cat([model(input_ids=ids, pixel_values=part).logits_per_image for part in images.split(256)])

    return logits


def clip_names(clip, images):
    """The (colour, thing) whose caption fits each image best."""
    return [PAIRS[i] for i in clip(images).argmax(1)]


def agreement(seen, truth):
    """Share of pictures of which both colour and thing were named right."""
    return statistics.mean(s == t for s, t in zip(seen, truth, strict=True))


def percent(seen, truth):
    return f"{100 * agreement(seen, truth):.2f} %"


def recoloured(judge, layouts=8):
    """Share of ducks, repainted in place from any colour into any other, whose new colour is named."""
    right = []
    for i, (old, new) in enumerate((a, b) for a in COLOURS for b in COLOURS if a != b):
        for j in range(layouts):
            pictures = layout("duck", np.random.default_rng((HELD_OUT, i, j)), avoid=(old, new))
            repainted = np.asarray(render(pictures, new))[None]
            right.append(name(judge, to_images(repainted))[0][0] == new)
    return statistics.mean(right)


@torch.no_grad()
def psnr(vae, images):
    """Peak signal-to-noise ratio of reconstructions from the latents' mean, dB; the pixels' range is 2."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in images.split(64)]
    return (10 * torch.log10(4 / (torch.cat(parts) - images).square().mean())).item()


def brightness(images):
    """Mean of each picture over pixels and channels: (B,), in 0..1."""
    return images.mean((1, 2, 3)) / 2 + 0.5


@torch.no_grad()
def timings(pipeline, repeats=15):
    """Median milliseconds of a guided UNet call (a batch of two) and of decoding one image."""
    x = torch.randn(2, 4, SIZE // 4, SIZE // 4)
    text = torch.randn(2, pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim)

    def clock(function):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    return clock(lambda: pipeline.unet(x, 500, text).sample), clock(lambda: pipeline.vae.decode(x[:1]).sample)


def contact_sheet(images):
    """Images (R * 64, 3, H, W) in [-1, 1] as a sheet: a row for each colour, R times eight things across."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    cells = pixels.reshape(-1, len(COLOURS), len(THINGS), SIZE, SIZE, 3).transpose(1, 3, 0, 2, 4, 5)
    return Image.fromarray(cells.reshape(len(COLOURS) * SIZE, -1, 3))


if __name__ == "__main__":
    main()
