"""From DNO's images to a reward model's input: the only place that resizes, crops, pads and normalises.

Images are (B, 3, H, W), nominally in [-1, 1] and unclamped. Everything here is differentiable and works in
the images' own precision. Resizing is bicubic with antialiasing in Pillow's convention, with which all these
models were trained; an image file's rounding to 256 levels is left out because it has no gradient.
"""

import math

import torch
import torch.nn.functional as F

from .weights import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_unit(images):
    """[-1, 1] to [0, 1], clamped: a reward sees what an image file would show."""
    return (images / 2 + 0.5).clamp(0, 1)


def normalize(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """Subtract the mean and divide by the standard deviation of each channel, both in units of [0, 1]."""
    mean, std = (pixels.new_tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    return (pixels - mean) / std


def resize(pixels, height, width, mode="bicubic"):
    if pixels.shape[-2:] == (height, width):
        return pixels
    if pixels.device.type == "mps":  # where not every torch has the backward of an antialiased resize
        return resize(pixels.cpu(), height, width, mode).to(pixels.device)
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)


def short_side(pixels, size, mode="bicubic"):
    """Resize until the shorter side is `size`; the longer is rounded down, as in torchvision's Resize."""
    height, width = pixels.shape[-2:]
    scaled = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    return resize(pixels, *scaled, mode)


def crop(images, size, place=math.floor):
    """CLIP's: shorter side to `size`, then the middle square.

    place: how half a pixel of margin is rounded; `math.floor` in transformers, `round` in torchvision.
    """
    pixels = short_side(to_unit(images), size).clamp(0, 1)  # bicubic overshoots, an image file cannot
    top, left = (place((side - size) / 2) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def pad(images, size):
    """HPS v2's: longer side to `size`, then black on both sides of the shorter."""
    pixels = to_unit(images)
    scale = size / max(pixels.shape[-2:])
    pixels = resize(pixels, *(max(1, round(side * scale)) for side in pixels.shape[-2:]))
    down, across = (size - side for side in pixels.shape[-2:])
    return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))


def reference(images, size):
    """The official DNO code's: bilinear, shorter side to `size`, no crop; so the images must be square."""
    height, width = images.shape[-2:]
    if height != width:
        raise RewardError(
            f"--reward_preprocess reference got images of {width} x {height} and needs square ones: use own, "
            "which crops or pads"
        )
    return short_side(to_unit(images), size, "bilinear")


def check(name, images, prompts):
    """The prompts as a list, one for each image; RewardError if the shapes or numbers do not fit."""
    if images.ndim != 4 or images.shape[1] != 3 or not torch.is_floating_point(images):
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise RewardError(f"{name} got images in {got}: expected floats of shape (B, 3, H, W)")
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(images):
        raise RewardError(f"{name} got {len(prompts)} prompts for {len(images)} images: expected as many")
    return prompts
