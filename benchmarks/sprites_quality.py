"""Quality of the embedded models: measures every bar of sprites/README.md and prints the table.

    python benchmarks/sprites_quality.py                       # 64 prompts x 8 seeds, minutes on two cores
    python benchmarks/sprites_quality.py --grid samples.png    # also writes a sheet of the samples
    python benchmarks/sprites_quality.py --model sprites/xl    # also measures the micro-conditioning

Sampling is diffusers' own pipeline on the folder as it lies in the repository.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sprites.data import WHOLE
from sprites.judge import load_judge, name
from sprites.networks import to_images
from sprites.scenes import COLOURS, PAIRS, SIZE, THINGS, caption, layout, render, scenes
from sprites.tokens import token_ids

SPRITES = Path(__file__).resolve().parent.parent / "sprites"
HELD_OUT = 1000  # the seed of scenes that no stage was trained on
CAPTIONS = [caption(*pair) for pair in PAIRS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SPRITES)
    parser.add_argument("--seeds", type=int, default=8, help="samples per prompt, of 64")
    parser.add_argument("--num_steps", type=int, default=25)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_scenes", type=int, default=4096, help="held-out scenes, a multiple of 64")
    parser.add_argument("--grid", help="write the samples of the first seeds to this picture")
    parser.add_argument("--grid_seeds", type=int, default=2, help="how many seeds the picture shows")
    args = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    judges = args.model if (args.model / "judge").exists() else SPRITES
    judge, clip = load_judge(judges / "judge"), load_clip(judges / "clip")
    drawn, pairs = scenes(0, args.num_scenes, HELD_OUT)
    truth = [PAIRS[pair] for pair in pairs]
    drawn = to_images(drawn)

    began = time.perf_counter()
    samples = sample(pipeline, args, args.seeds)
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
        ("seconds per sample", "", f"{sampling / len(samples):.2f} s"),
    ]  # fmt: skip
    if isinstance(pipeline, StableDiffusionXLPipeline):
        rows += micro_conditioning(pipeline, args, judge, samples, drawn)
    print("| measure | bar | measured |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(
        "\nmisnamed:",
        *(f"{' '.join(p)} as {' '.join(s)}" for s, p in zip(seen, prompts) if s != p),
        sep="\n  ",
    )
    if args.grid:
        contact_sheet(samples[: args.grid_seeds * len(PAIRS)]).save(args.grid, optimize=True)


@torch.no_grad()
def sample(pipeline, args, seeds, **options):
    """All prompts for each seed, one generator per sample: (64 * seeds, 3, 64, 64) in [-1, 1]."""
    images = []
    for seed in range(seeds):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(CAPTIONS))]
        images += pipeline(CAPTIONS, num_inference_steps=args.num_steps, eta=args.eta, generator=generators,
                           guidance_scale=args.guidance_scale, output_type="pt", **options).images  # fmt: skip
    return torch.stack(images) * 2 - 1


def micro_conditioning(pipeline, args, judge, samples, drawn, size=24, crop=16):
    """Rows about sprites-xl's original size and crop: 64 samples each, beside held-out scenes treated alike.

    samples, drawn: pictures (N, 3, 64, 64) in [-1, 1]; the first 64 samples began from the same noise.
    """
    samples = samples[: len(PAIRS)]
    small = sample(pipeline, args, 1, original_size=(size, size))
    treated = resize(resize(drawn, size), SIZE)
    ours, scenes = sharpness(small) / sharpness(samples), sharpness(treated) / sharpness(drawn)
    # The autoencoder has seen sharp scenes only and sharpens others: no sample can be softer than it allows.
    rebuilt = sharpness(reconstruct(pipeline.vae, treated[:512])) / sharpness(reconstruct(pipeline.vae, drawn[:512]))
    cropped = sample(pipeline, args, 1, crops_coords_top_left=(crop, crop))
    treated = F.pad(drawn, (0, crop, 0, crop), mode="replicate")[..., crop:, crop:]
    down, right = (place(cropped) - place(samples)).tolist()
    drawn_down, drawn_right = (place(treated) - place(drawn)).tolist()
    return [
        (f"sharpness with original_size {size} / without: samples / scenes through the autoencoder / scenes", "",
         f"{ours:.2f} / {rebuilt:.2f} / {scenes:.2f}"),
        ("  second judge agrees with the prompt, 64 of these samples", "", percent(name(judge, small), PAIRS)),
        (f"subject moves (down, right) with crops_coords_top_left ({crop}, {crop}), samples / scenes", "",
         f"({down:.1f}, {right:.1f}) / ({drawn_down:.1f}, {drawn_right:.1f}) pixels"),
    ]  # fmt: skip


def resize(images, size):
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


def sharpness(images):
    """Mean squared difference of neighbouring pixels."""
    return (images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()).item()


def place(images):
    """Mean place (y, x) in pixels of what differs from the background, which is read at the right edge: (2,)."""
    seen = ((images - images[..., -2:].mean(3, keepdim=True)).abs().amax(1) > 0.4).float()  # (B, H, W)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    total = seen.sum((1, 2)).clamp(min=1)
    return torch.stack([((seen * axis).sum((1, 2)) / total).mean() for axis in (y, x)])


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
def reconstruct(vae, images):
    """What the autoencoder makes of images (B, 3, 64, 64) in [-1, 1], from the latents' mean."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in images.split(64)]
    return torch.cat(parts)


def psnr(vae, images):
    """Peak signal-to-noise ratio of reconstructions, dB; the pixels' range is 2."""
    return (10 * torch.log10(4 / (reconstruct(vae, images) - images).square().mean())).item()


def brightness(images):
    """Mean of each picture over pixels and channels: (B,), in 0..1."""
    return images.mean((1, 2, 3)) / 2 + 0.5


@torch.no_grad()
def timings(pipeline, repeats=15):
    """Median milliseconds of a guided UNet call (a batch of two) and of decoding one image."""
    x = torch.randn(2, 4, SIZE // 4, SIZE // 4)
    text = torch.randn(2, pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim)
    added = None
    if isinstance(pipeline, StableDiffusionXLPipeline):
        pooled = torch.randn(2, pipeline.text_encoder_2.config.projection_dim)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([WHOLE, WHOLE])}

    def clock(function):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    call = clock(lambda: pipeline.unet(x, 500, text, added_cond_kwargs=added).sample)
    return call, clock(lambda: pipeline.vae.decode(x[:1]).sample)


def contact_sheet(images):
    """Images (R * 64, 3, H, W) in [-1, 1] as a sheet: one row per colour, R times eight things across."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    cells = pixels.reshape(-1, len(COLOURS), len(THINGS), SIZE, SIZE, 3).transpose(1, 3, 0, 2, 4, 5)
    return Image.fromarray(cells.reshape(len(COLOURS) * SIZE, -1, 3))


if __name__ == "__main__":
    main()
