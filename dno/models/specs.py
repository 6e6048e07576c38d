"""Model rows: where each model is and what it wants; the names of precisions and devices."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dno.errors import UserError

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_SDXL_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """One row per model: where it is and what it wants unless the user says otherwise.

    source: hub id, diffusers folder or single .safetensors file.
    eta: how much fresh noise enters at each step, as `dno.sampling.noise_scale` has it.
    words: the words that the model was trained on, if it knows a few only; other words trigger a warning.
    timestep_spacing: one of `TIMESTEP_SPACINGS`; None = the one in the scheduler's own configuration.
    ends_clean: the last step ends at alpha = 1, sigma = 0, not at timestep 0, where a little noise is left.
    """

    source: str
    num_steps: int = 50
    guidance_scale: float = 5.0
    eta: float = 1.0
    words: tuple[str, ...] = ()
    timestep_spacing: str | None = None
    ends_clean: bool = False


def _sprites(folder):
    from sprites.scenes import WORDS

    return ModelSpec(str(PACKAGE_ROOT / folder), num_steps=25, guidance_scale=3.0, words=WORDS)


def _turbo(source):
    """A few-step model: 1 to 4 steps without guidance, as published (arXiv 2311.17042)."""
    return ModelSpec(source, num_steps=1, guidance_scale=0.0, timestep_spacing="trailing", ends_clean=True)


MODELS = {
    DEFAULT_MODEL: lambda: ModelSpec(DEFAULT_MODEL),
    DEFAULT_SDXL_MODEL: lambda: ModelSpec(DEFAULT_SDXL_MODEL),
    "stabilityai/sd-turbo": lambda: _turbo("stabilityai/sd-turbo"),
    "stabilityai/sdxl-turbo": lambda: _turbo("stabilityai/sdxl-turbo"),
    "sprites": lambda: _sprites("sprites"),
    "sprites-xl": lambda: _sprites("sprites/xl"),
}


def model_spec(name):
    """The row of a model; a hub id, folder or file without a row gets the defaults."""
    return MODELS[name]() if name in MODELS else ModelSpec(name)


def resolve_device(name):
    """`--device` as a torch.device. Raises UserError where this torch cannot use it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(f"--device {name}: this torch ({torch.__version__}) sees no such device; use --device auto")
    return torch.device(name)


def resolve_precision(name, device):
    """`--precision` as a torch dtype: auto is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return PRECISIONS[name]
