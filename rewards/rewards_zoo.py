"""Loss factories: a new reward is one function here and one row in `RFUNCTIONS`.

The contract of a factory is

    factory(inference_dtype=None, device=None) -> loss_fn(images, prompts) -> losses

images: float32, (B, 3, H, W), nominally in [-1, 1] but *not* clamped, any size.
prompts: one string per image.
losses: float32, (B,), the negative of the reward (a scalar will do for a batch of one).

A factory loads its weights when it is called, so importing this file loads nothing. Its attribute `differentiable` says
whether a gradient flows from the losses to the images: a row of `RFUNCTIONS` has one unless the factory says
`differentiable = False`, and a factory of a user's file without the attribute is tried by `rewards.is_differentiable`.
`inference_dtype` is the precision of the weights, float32 if None.
"""

import io
from functools import partial

import torch
from PIL import Image

from .preprocess import check, crop, pad


def white_loss_fn(inference_dtype=None, device=None):
    """Brightness: the reward is the mean of the image, in [-1, 1] (the official implementation's `white`)."""

    def loss_fn(images, prompts):
        return -images.mean(dim=(1, 2, 3))

    return loss_fn


def black_loss_fn(inference_dtype=None, device=None):
    """Darkness: minus the mean of the image, in [-1, 1] (the official implementation's `black`)."""

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
    return lambda images, prompts: _jpeg_size(images)


def jpeg_incompressibility(inference_dtype=None, device=None):
    """JPEG incompressibility: the reward is the size of the image at JPEG quality 95, in kilobytes of 1000 bytes.

    Source: as `jpeg_compressibility`. No gradient.
    """
    return lambda images, prompts: -_jpeg_size(images)


jpeg_compressibility.differentiable = jpeg_incompressibility.differentiable = False


def _jpeg_size(images):
    sizes = []
    for pixels in to_uint8(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] as a NumPy array (B, H, W, 3) of 0..255, clamped and rounded."""
    pixels = (images.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# --- rewards with weights -----------------------------------------------------------------------------------
# What differs between them is here; towers.py loads and runs the networks, weights.py finds and reads the files. The
# libraries are imported when a factory is called: importing this file stays cheap.


def aesthetic_loss_fn(inference_dtype=None, device=None):
    """LAION aesthetic score, about 1 to 10: an MLP on the CLIP ViT-L/14 image embedding; blind to the prompt.

    Source: improved-aesthetic-predictor, head sac+logos+ava1-l14-linearMSE. Other heads have other scales.
    """
    from . import towers, weights

    dtype, device = inference_dtype or torch.float32, device or "cpu"
    folder = weights.locate("clip")
    clip = towers.load_clip("clip", folder, dtype, device)
    embed = towers.clip_image_tower("clip", clip, folder, dtype, own=partial(crop, place=round))
    path = weights.locate("aesthetic")
    state = weights.read_pickle("aesthetic", path)
    head = towers.LinearHead(clip.config.projection_dim)
    weights.load_strict("aesthetic", path, head, state)
    weights.loaded("aesthetic", path)
    head = towers.freeze(head.to(towers.full(dtype)), device)

    def loss_fn(images, prompts=None):
        check("aesthetic", images, [""] * len(images))
        return -head(embed(images)).to(images.device)

    return loss_fn


def clip_loss_fn(inference_dtype=None, device=None):
    """CLIP score: logit scale (100) times the cosine between image and prompt, about 10 to 40."""
    from .towers import clip_loss

    return clip_loss("clip", "clip", inference_dtype, device, own=crop, official=False)


def pick_loss_fn(inference_dtype=None, device=None):
    """PickScore, about 15 to 25: logit scale times cosine of a CLIP ViT-H/14.

    Source: Kirstain et al. 2023, arXiv 2305.01569.
    """
    from .towers import clip_loss

    return clip_loss("pick", "pick", inference_dtype, device, own=crop)


def sprites_loss_fn(inference_dtype=None, device=None):
    """Agreement with the prompt according to the embedded model's CLIP: logit scale times cosine.

    The softmax of this score over all captions is that CLIP's probability of a caption. The score itself is the reward
    because it needs no list of captions, and because its gradient does not vanish where that probability is near 0 or
    1: it can start from the wrong image.
    """
    from .towers import clip_loss

    return clip_loss("sprites", "sprites", inference_dtype, device, own=crop, official=False)


def hps_loss_fn(inference_dtype=None, device=None):
    """Human Preference Score v2.0, about 0.2 to 0.35: the cosine of a CLIP ViT-H/14.

    Source: Wu et al. 2023, arXiv 2306.09341.
    """
    from .towers import hps_loss

    return hps_loss("hps", "hps", inference_dtype, device, own=pad)


def hps_v21_loss_fn(inference_dtype=None, device=None):
    """Human Preference Score v2.1: as `hps` with other weights and another scale; their scores are not comparable."""
    from .towers import hps_loss

    return hps_loss("hps_v2.1", "hps_v2.1", inference_dtype, device, own=pad)


def imagereward_loss_fn(inference_dtype=None, device=None):
    """ImageReward, about -2 to 2: a BLIP with an MLP; 0 is the average of its training images.

    Source: Xu et al. 2023, arXiv 2304.05977.
    """
    from .imagereward import imagereward_loss

    return imagereward_loss(inference_dtype, device)
