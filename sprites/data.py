"""What lies in the folder --work of train.py: the training set, its latents, the weights trained so far."""

import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image

from sprites import networks
from sprites.scenes import PAIRS, SIZE, caption, scenes
from sprites.tokens import token_ids

CAPTIONS = [[caption(*pair, article=article) for pair in PAIRS] for article in (False, True)]
# What Stable Diffusion XL calls time ids: original height and width, top and left of the crop, target height and width.
WHOLE = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # those of a sharp and whole picture
SMALLEST = 12  # original size that sprites-xl is shown


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


def encode_scenes(args):
    """Write the evened autoencoder and the latents of all scenes, which `load_latents` reads."""
    if not (args.work / "latents.pt").exists():
        torch.set_num_threads(args.threads * args.processes)
        vae = networks.evened_autoencoder(load_average(args, "autoencoder"), load_scenes(args))
        torch.save(
            {"vae": vae.state_dict(), "latents": networks.encode_all(vae, load_scenes(args))},
            args.work / "latents.pt",
        )


def micro_conditioned(scenes, seed):
    """Scenes (N, 64, 64, 3) changed as Stable Diffusion XL's micro-conditioning tells: uint8, and time ids (N, 6).

    A third of them are reduced to an original size below 64 and enlarged again. The others are continued below and to
    the right, their border repeated, and the 64 x 64 pixels from (top, left) on are cut out: a part of
    the subject leaves the picture at the top or on the left.
    """
    rng = np.random.default_rng((seed, len(scenes)))
    images, time_ids = np.empty_like(scenes), np.tile(WHOLE, (len(scenes), 1))
    for scene, image, ids in zip(scenes, images, time_ids):
        if rng.random() < 1 / 3:
            ids[:2] = round(SMALLEST * (SIZE / SMALLEST) ** rng.random())
            image[:] = Image.fromarray(scene).resize(ids[:2]).resize((SIZE, SIZE))
        else:
            top, left = ids[2:4] = rng.integers(SIZE // 2, size=2) * ((1, 1), (1, 0), (0, 1))[rng.integers(3)]
            image[:] = np.pad(scene, ((0, top), (0, left), (0, 0)), "edge")[top:, left:]
    return images, torch.from_numpy(time_ids)


def encode_changed_scenes(args):
    """Write the latents and time ids of `micro_conditioned`, made of the first half of the scenes."""
    if not (args.work / "latents-xl.pt").exists():
        vae = networks.autoencoder()
        vae.load_state_dict(load_latents(args)["vae"])
        data = load_scenes(args)
        images, time_ids = micro_conditioned(data[: len(data) // 2], args.seed + 4)
        content = {"latents": networks.encode_all(vae, images), "time_ids": time_ids}
        torch.save(content, args.work / "latents-xl.pt")


def load_latents(args):
    """The autoencoder's weights, `vae`, and the scenes' latents, float16 (N, 4, 16, 16), mapped from disk."""
    return torch.load(args.work / "latents.pt", mmap=True, weights_only=True)


def caption_ids(tokenizer):
    """Token ids of all captions without and with article, (2, 64, 16), and of the empty one, (16,)."""
    return torch.stack([token_ids(tokenizer, captions) for captions in CAPTIONS]), token_ids(tokenizer, [""])[0]


def load_average(args, stage):
    """Averaged weights of a stage, finished or not."""
    return torch.load(args.work / f"{stage}.pt", weights_only=True)["average"]
