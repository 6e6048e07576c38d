"""Train the embedded model: `python -m sprites.train STAGE`.

    scenes        draw the training set
    autoencoder   the VAE
    clip          the first judge, which is also a reward
    judge         the second judge, only for measuring
    unet          text encoder and UNet, on the latents of the finished autoencoder
    unet-xl       the same for sprites-xl, beginning with the finished `unet` and `clip`
    export        write the averaged weights of the stages trained so far beside this file

Every stage but `export` keeps a checkpoint in --work and continues from it. README.md has the measured times.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from sprites import networks
from sprites.data import caption_ids, draw_scenes, load_average, load_latents, load_scenes
from sprites.export import export
from sprites.judge import Judge
from sprites.scenes import COLOURS, PAIRS, SIZE, THINGS
from sprites.tokens import build_tokenizer
from sprites.train_unet import train_unet, train_unet_xl
from sprites.training import fit, muon_and_adamw


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("scenes", "autoencoder", "clip", "judge", "unet", "unet-xl", "export"))
    parser.add_argument("--work", type=Path, default=Path(".train"), help="folder of data and checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where `export` writes the model")
    parser.add_argument("--num_scenes", type=int, default=32768, help="size of the training set")
    parser.add_argument("--steps", type=int, help="length of the stage's learning-rate schedule; default: the recipe's")
    parser.add_argument("--stop", type=int, help="leave before this step; run again to continue")
    parser.add_argument("--batch", type=int, help="examples a step, over all processes; default: the recipe's")
    parser.add_argument("--processes", type=int, default=1, help="processes that share each step of a UNet")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    {"scenes": draw_scenes, "autoencoder": train_autoencoder, "clip": train_clip, "judge": train_judge,
     "unet": train_unet, "unet-xl": train_unet_xl, "export": export_stages}[args.stage](args)  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------


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
    tokens, _ = caption_ids(build_tokenizer())

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


def export_stages(args):
    """Write the model folders of all stages that have a checkpoint."""
    have = {
        stage.replace("-", "_"): load_average(args, stage)
        for stage in ("clip", "judge", "unet", "unet-xl")
        if (args.work / f"{stage}.pt").exists()
    }
    if (args.work / "latents.pt").exists():
        have["vae"] = load_latents(args)["vae"]
    export(args.output, **have)


if __name__ == "__main__":
    main()
