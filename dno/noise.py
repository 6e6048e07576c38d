"""Noise: keyed random draws, the part of it that is free, and noise files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dno.errors import UserError

# What a random draw is for: the first entry of its key, so that no two uses share a stream.
CANDIDATE, PERMUTATIONS, PERTURBATION, NEIGHBOUR = range(4)

# The form of sampling that turns a noise file's tensor into its image. Others may come; each file names its own.
SAMPLER = "schedule"
FILE = "best_noise.safetensors"


def keyed_generator(*key):
    """A CPU generator for one key of non-negative integers, (use, seed, index, ...): equal keys, equal draws.

    Draws that are keyed, not taken in turn from one stream, do not depend on batch size, processes or a resume.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_noise(seeds, num_steps, shape, candidate=0):
    """Standard normal noise for one image per seed: (T + 1, len(seeds), C, h, w), float32, on the CPU.

    shape: (C, h, w). Each image's noise depends on its own seed alone and is `torch.randn(T + 1, C, h, w)` after
    `torch.manual_seed(seed)`, as in the official implementation; candidate > 0 gives further independent draws.
    """

    def generator(seed):
        return keyed_generator(CANDIDATE, seed, candidate) if candidate else torch.Generator().manual_seed(seed)

    return torch.stack([torch.randn(num_steps + 1, *shape, generator=generator(seed)) for seed in seeds], dim=1)


@dataclass(frozen=True)
class Split:
    """Which of the T + 1 noises are free, and which are frozen.

    With eta 0 the starting noise x_T alone reaches the image, so it alone is kept. Otherwise the noises of the last
    K + 1 steps are free, and the others, x_T among them where K < T, are frozen.

    num_steps: T. opt_time: K.
    """

    num_steps: int
    opt_time: int
    eta: float

    @property
    def only_start(self):
        return self.eta == 0

    @property
    def num_free(self):
        """N, how many noises are free."""
        return 1 if self.only_start else self.opt_time + 1

    def split(self, noise):
        """(z (N, ...), rest (M, ...)) of all the noise (T + 1, ...), or of x_T alone (1, ...) with eta 0."""
        if self.only_start:
            return noise[-1:], noise[:0]
        return noise[: self.opt_time + 1], noise[self.opt_time + 1 :]

    def join(self, z, rest):
        """The tensors (B, C, h, w) that `dno.sampling.sample` takes. No memory is copied."""
        return [*z.unbind(), *rest.unbind()]

    def whole(self, z, rest):
        """The noise as one tensor, as noise files have it: the inverse of `split`."""
        return torch.cat([z, rest]) if len(rest) else z


def load_noise(path):
    """The noise of a run's folder or of its best_noise.safetensors, checked as `check_noise` does."""
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            sampler = (file.metadata() or {}).get("sampler", SAMPLER)
            noise = file.get_tensor("noise") if "noise" in file.keys() else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"--noise {path} could not be read: {error}; expected a {FILE}") from error
    if sampler != SAMPLER:
        raise UserError(
            f"--noise {path} is for the sampler {sampler!r}, which would be needed to turn it into its image; "
            f"expected one for {SAMPLER!r}"
        )
    return check_noise(noise, f"--noise {path}")


def check_noise(noise, what="noise"):
    """The noise, (T + 1, B, C, h, w) or (1, B, C, h, w), in float32. Raises UserError for anything else."""
    if noise is None or noise.dim() != 5 or not noise.is_floating_point() or not noise.isfinite().all():
        got = "no tensor 'noise'" if noise is None else f"'noise' of shape {tuple(noise.shape)}, {noise.dtype}"
        raise UserError(f"{what} has {got}; expected a finite float tensor (T + 1, B, C, h, w)")
    return noise.float()
