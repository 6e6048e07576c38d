"""Noise: keyed random draws, and noise files."""

from pathlib import Path

import numpy as np
import torch

from dno.errors import UserError

# What a random draw is for: the first entry of its key, so that no two uses share a stream.
CANDIDATE, PERMUTATIONS, PERTURBATION = range(3)


def keyed_generator(*key):
    """A CPU generator for one key of non-negative integers, (use, seed, index, ...): equal keys, equal draws.

    Draws that are keyed, not taken in turn from one stream, do not depend on batch size, processes or a resume.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_noise(seeds, num_steps, shape, candidate=0):
    """Standard normal noise for one image a seed: (T + 1, len(seeds), C, h, w), float32, on the CPU.

    shape: (C, h, w). Each image's noise depends on its own seed alone and is `torch.randn(T + 1, C, h, w)` after
    `torch.manual_seed(seed)`, as in the official implementation; candidate > 0 gives further independent draws.
    """

    def generator(seed):
        return keyed_generator(CANDIDATE, seed, candidate) if candidate else torch.Generator().manual_seed(seed)

    return torch.stack([torch.randn(num_steps + 1, *shape, generator=generator(seed)) for seed in seeds], dim=1)


def load_noise(path):
    """The noise of a best_noise.safetensors, checked as `check_noise` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        noise = load_file(Path(path).expanduser()).get("noise")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--noise {path} could not be read: {error}; expected a best_noise.safetensors") from error
    return check_noise(noise, f"--noise {path}")


def check_noise(noise, what="noise"):
    """The noise, (T + 1, B, C, h, w), in float32. Raises UserError for anything else."""
    if noise is None or noise.dim() != 5 or not noise.is_floating_point() or not noise.isfinite().all():
        got = "no tensor 'noise'" if noise is None else f"'noise' of shape {tuple(noise.shape)}, {noise.dtype}"
        raise UserError(f"{what} has {got}; expected a finite float tensor (T + 1, B, C, h, w)")
    return noise.float()
