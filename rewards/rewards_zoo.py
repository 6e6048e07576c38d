"""Loss factories: a new reward is one function here and one row in `RFUNCTIONS`.

The contract of a factory is

    factory(inference_dtype=None, device=None) -> loss_fn(images, prompts) -> losses

images: float32, (B, 3, H, W), nominally in [-1, 1] but *not* clamped, any size.
prompts: one string an image.
losses: float32, (B,), the negative of the reward (a scalar will do for a batch of one).

A factory loads its weights when it is called, so importing this file loads nothing. Where no gradient can flow from
the losses to the images, the factory says so with the attribute `differentiable = False`.
"""

import io

import torch
from PIL import Image


def white_loss_fn(inference_dtype=None, device=None):
    """Brightness: the reward is the mean of the image, in [-1, 1] (the official implementation's `white`)."""

    def loss_fn(images, prompts):
        return -images.mean(dim=(1, 2, 3))

    return loss_fn


def black_loss_fn(inference_dtype=None, device=None):
    """Darkness: the reward is the negative mean of the image, in [-1, 1] (the official implementation's `black`)."""

    def loss_fn(images, prompts):
        return images.mean(dim=(1, 2, 3))

    return loss_fn


def contrast_loss_fn(inference_dtype=None, device=None):
    """Contrast: the reward is the variance over pixels of the sum of the three channels, >= 0."""

    def loss_fn(images, prompts):
        return -images.sum(dim=1).var(dim=(1, 2), correction=0)

    return loss_fn


def jpeg_compressibility(inference_dtype=None, device=None):
    """JPEG compressibility: the loss is the size of the image at JPEG quality 95, in kilobytes of 1000 bytes.

    Source: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301). No gradient.
    """

    def loss_fn(images, prompts):
        sizes = []
        for pixels in to_uint8(images):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG", quality=95)
            sizes.append(file.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)

    return loss_fn


jpeg_compressibility.differentiable = False


def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] as a NumPy array (B, H, W, 3) of 0..255, clamped and rounded."""
    pixels = (images.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
