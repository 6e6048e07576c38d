"""Train the embedded model: `python -m sprites.train STAGE`.

    scenes        draw the training set
    autoencoder   the VAE
    clip          the first judge, which is also a reward
    judge         the second judge, only for measuring
    unet          text encoder and UNet, on the latents of the finished autoencoder
    export        write the averaged weights of the stages trained so far beside this file

Every stage but `export` keeps a checkpoint in --work and continues from it. README.md has the measured times.
"""

import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sprites import networks
from sprites.export import export
from sprites.judge import Judge
from sprites.scenes import COLOURS, PAIRS, SIZE, THINGS, caption, scenes
from sprites.tokens import build_tokenizer, token_ids
from sprites.training import adamw, fit, generator, muon_and_adamw

CAPTIONS = [[caption(*pair, article=article) for pair in PAIRS] for article in (False, True)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("scenes", "autoencoder", "clip", "judge", "unet", "export"))
    parser.add_argument("--work", type=Path, default=Path(".train"), help="folder of data and checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where `export` writes the model")
    parser.add_argument("--num_scenes", type=int, default=32768, help="size of the training set")
    parser.add_argument("--steps", type=int, help="length of the stage's learning-rate schedule; default: the recipe's")
    parser.add_argument("--stop", type=int, help="leave before this step; run again to continue")
    parser.add_argument("--batch", type=int, help="examples a step, over all processes; default: the recipe's")
    parser.add_argument("--processes", type=int, default=1, help="processes that share each step of `unet`")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    {"scenes": draw_scenes, "autoencoder": train_autoencoder, "clip": train_clip, "judge": train_judge,
     "unet": train_unet, "export": export_stages}[args.stage](args)  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------


def draw_scenes(args):
    """Write the training set, uint8 (N, 64, 64, 3), where other stages map it into memory."""
    args.work.mkdir(parents=True, exist_ok=True)
    chunk = 1024
    data = np.lib.format.open_memmap(args.work / "scenes.npy.tmp", "w+", np.uint8, (args.num_scenes, SIZE, SIZE, 3))
    starts = range(0, args.num_scenes, chunk)
    stops = [min(start + chunk, args.num_scenes) for start in starts]
    with ProcessPoolExecutor(2) as pool:
        for start, (images, _) in zip(starts, pool.map(scenes, starts, stops, [args.seed] * len(stops))):
            data[start : start + len(images)] = images
    data.flush()
    os.replace(args.work / "scenes.npy.tmp", args.work / "scenes.npy")


def load_scenes(args):
    """The training set, uint8 (N, 64, 64, 3), mapped from disk; scene i shows PAIRS[i % 64]."""
    if not (args.work / "scenes.npy").exists():
        draw_scenes(args)
    return np.load(args.work / "scenes.npy", mmap_mode="r")


def draw_batch(data, size, gen):
    """A random batch: images (B, 3, 64, 64) and their pairs (B,)."""
    index = torch.randint(len(data), (size,), generator=gen)
    return networks.to_images(data[index.numpy()]), index % len(PAIRS)


def disturb(images, gen, reach=4):
    """Move each picture by up to `reach` pixels, its border repeated, and add noise of a random strength."""
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * reach + 1, (2, len(images)), generator=gen).tolist()
    moved = torch.stack([p[:, y : y + SIZE, x : x + SIZE] for p, y, x in zip(padded, dy, dx)])
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=gen)
    return moved + strength * torch.randn(moved.shape, generator=gen)


# --- stages -----------------------------------------------------------------------------------------------


def train_autoencoder(args):
    """Reconstruct scenes: L1, squared error and the L1 of finite differences (edges), a light KL term."""
    data, batch, steps = load_scenes(args), args.batch or 8, args.steps or 2100

    def loss(vae, step, gen):
        # The first third sees smaller batches: early on, steps are worth more than their precision.
        images, _ = draw_batch(data, batch // 2 if step < steps // 3 else batch, gen)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=gen)
            error = (vae.decode(latents).sample - images).float()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.35 * edges + 1e-3 * kl

    torch.manual_seed(args.seed)
    vae = networks.autoencoder().to(memory_format=torch.channels_last)
    fit(vae, loss, steps, muon_and_adamw(vae, 2e-3), args.work / "autoencoder.pt", seed=args.seed,
        stop=args.stop, flat=0.4)  # fmt: skip


def train_clip(args):
    """Find each picture's caption among all 64."""
    data, batch, steps = load_scenes(args), args.batch or 96, args.steps or 900
    tokens = [token_ids(build_tokenizer(), captions) for captions in CAPTIONS]

    def loss(clip, step, gen):
        images, pairs = draw_batch(data, batch, gen)
        with torch.autocast("cpu", torch.bfloat16):
            article = int(torch.rand((), generator=gen) < 0.15)
            output = clip(input_ids=tokens[article], pixel_values=disturb(images, gen))
        return F.cross_entropy(output.logits_per_image.float(), pairs)

    torch.manual_seed(args.seed + 1)
    clip = networks.clip(build_tokenizer())
    fit(
        clip,
        loss,
        steps,
        muon_and_adamw(clip, 2e-3),
        args.work / "clip.pt",
        seed=args.seed + 1,
        stop=args.stop,
    )


def train_judge(args):
    """Name colour and thing."""
    data, batch, steps = load_scenes(args), args.batch or 64, args.steps or 1200

    def loss(judge, step, gen):
        images, pairs = draw_batch(data, batch, gen)
        with torch.autocast("cpu", torch.bfloat16):
            colour, thing = judge(disturb(images, gen))
        return F.cross_entropy(colour.float(), pairs // len(THINGS)) + F.cross_entropy(
            thing.float(), pairs % len(THINGS)
        )

    assert len(PAIRS) == len(COLOURS) * len(THINGS)
    torch.manual_seed(args.seed + 2)
    judge = Judge()
    fit(
        judge,
        loss,
        steps,
        muon_and_adamw(judge, 2e-3),
        args.work / "judge.pt",
        seed=args.seed + 2,
        stop=args.stop,
    )


def train_unet(args):
    """Predict the noise in latents from captions: text encoder and UNet together."""
    latents = args.work / "latents.pt"
    if not latents.exists():
        torch.set_num_threads(args.threads * args.processes)
        vae = networks.evened_autoencoder(load_average(args, "autoencoder"), load_scenes(args))
        torch.save({"vae": vae.state_dict(), "latents": networks.encode_all(vae, load_scenes(args))}, latents)
    if args.processes == 1:
        return train_unet_process(0, args, None)
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(train_unet_process, (args, f"file://{meeting}/store"), args.processes)


def train_unet_process(rank, args, meeting):
    """One process of `train_unet`; they meet at the address `meeting`."""
    torch.set_num_threads(args.threads)
    world, steps = args.processes, args.steps or 6600
    if world > 1:
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    latents = torch.load(args.work / "latents.pt", mmap=True, weights_only=True)["latents"]
    batch = (args.batch or 32) // world
    tokenizer = build_tokenizer()
    tokens = torch.stack([token_ids(tokenizer, captions) for captions in CAPTIONS])  # (2, 64, 16)
    nothing = token_ids(tokenizer, [""])[0]
    alpha_bar = networks.scheduler().alphas_cumprod

    def loss(model, step, gen):
        index = torch.randint(len(latents), (batch,), generator=gen)
        x0, pairs = latents[index].float(), index % len(PAIRS)
        ids = tokens[(torch.rand(batch, generator=gen) < 0.1).long(), pairs]
        # No caption for a tenth: the other half of classifier-free guidance.
        ids = torch.where(torch.rand(batch, 1, generator=gen) < 0.1, nothing, ids)
        # Timesteps stratified over the whole batch, all processes together.
        offset = torch.rand((), generator=generator(args.seed + 3, step))
        t = (torch.arange(batch) * world + rank + offset) / (batch * world) * len(alpha_bar)
        t = t.long().clamp(max=len(alpha_bar) - 1)
        eps = torch.randn(x0.shape, generator=gen)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        with torch.autocast("cpu", torch.bfloat16):
            error = model["unet"](x, t, model["text_encoder"](ids)[0]).sample - eps
        return noise_loss(error.float(), a.flatten())

    torch.manual_seed(args.seed + 3)
    model = networks.text_to_latents(tokenizer)
    fit(model, loss, steps, [adamw(model.parameters(), 1e-3)], args.work / "unet.pt", seed=args.seed + 3,
        stop=args.stop, ema=0.999, warmup=200, flat=0.45, rank=rank, world=world)  # fmt: skip
    if world > 1:
        dist.destroy_process_group()


def noise_loss(error, alpha_bar):
    """Squared error of the noise, min-SNR weighted, and on noisy inputs its coarsest frequencies once more.

    The brightness of a whole picture is one number among a thousand, decided where there is hardly any
    signal; the plain mean gives it too little weight to be learned in a short run.
    error: (B, 4, 16, 16). alpha_bar: (B,). SNR is that of latents whose std is networks.LATENT_STD.
    """
    snr = networks.LATENT_STD**2 * alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / snr
    mean = error.mean((2, 3)).square().mean(1)
    coarse = F.adaptive_avg_pool2d(error, 4).square().mean((1, 2, 3))
    low = 0.02 * (256 * mean + 16 * coarse) * (snr < 0.5)
    return (weight * error.square().mean((1, 2, 3)) + low).mean()


def load_average(args, stage):
    """Averaged weights of a stage, finished or not."""
    return torch.load(args.work / f"{stage}.pt", weights_only=True)["average"]


def export_stages(args):
    """Write the model folders of all stages that have a checkpoint."""
    have = {
        stage: load_average(args, stage) for stage in ("clip", "judge", "unet") if (args.work / f"{stage}.pt").exists()
    }
    if (args.work / "latents.pt").exists():
        have["vae"] = torch.load(args.work / "latents.pt", mmap=True, weights_only=True)["vae"]
    export(args.output, **have)


if __name__ == "__main__":
    main()
