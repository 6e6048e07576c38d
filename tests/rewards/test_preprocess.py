"""The one place that resizes, against the libraries that the reward models were trained with."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import preprocess

T = pytest.importorskip("torchvision.transforms", reason="the extra `rewards` is not installed")

SHAPES = [(64, 64), (224, 224), (512, 512), (300, 500), (832, 1216), (100, 40), (225, 224)]


def pillow(images):
    """The first image as a Pillow picture, and the same rounded image as a tensor in [-1, 1]."""
    pixels = ((images[0] / 2 + 0.5).clamp(0, 1) * 255).round()
    picture = Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
    return picture, (pixels / 127.5 - 1)[None]


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_the_clip_processors(shape, pictures):
    from transformers import CLIPImageProcessor

    picture, images = pillow(pictures(1, *shape))
    expected = CLIPImageProcessor()(picture, return_tensors="pt").pixel_values
    got = preprocess.normalize(preprocess.crop(images, 224))
    assert got.shape == (1, 3, 224, 224)
    assert (got - expected).abs().max() < 2.5 / 255 / 0.26  # the processor rounds to 256 levels


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_with_rounding_is_torchvisions(shape, pictures):
    picture, images = pillow(pictures(1, *shape))
    transform = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()])
    got = preprocess.crop(images, 224, round)
    assert (got[0] - transform(picture)).abs().max() < 2.5 / 255


def test_the_two_roundings_of_a_crop_differ_where_half_a_pixel_is_left(pictures):
    images = pictures(1, 832, 1216)  # 224 x 327: 51.5 px to cut on each side
    floor, rounded = preprocess.crop(images, 224, math.floor), preprocess.crop(images, 224, round)
    assert torch.equal(floor[..., 1:], rounded[..., :-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_pillows_bicubic_on_black(shape, pictures):
    picture, images = pillow(pictures(1, *shape) * 0.8)  # no overshoot, which Pillow would cut
    scale = 224 / max(shape)
    height, width = (round(side * scale) for side in shape)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(
        picture.resize((width, height), Image.Resampling.BICUBIC), ((224 - width) // 2, (224 - height) // 2)
    )
    expected = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    assert (preprocess.pad(images, 224)[0] - expected).abs().max() < 2.5 / 255


def test_reference_is_torchvisions_default_resize(pictures):
    images = pictures(2, 512, 512)
    expected = T.Resize(224, antialias=True)((images / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(preprocess.reference(images, 224), expected)


def test_pixels_outside_the_range_are_clamped_and_have_no_gradient(pictures):
    images = torch.full((1, 3, 224, 224), 1.5, requires_grad=True)
    pixels = preprocess.pad(images, 224)
    assert torch.equal(pixels, torch.ones_like(pixels))
    (gradient,) = torch.autograd.grad(pixels.sum(), images)
    assert not gradient.any()


@pytest.mark.parametrize("function", [preprocess.crop, preprocess.pad, preprocess.reference])
def test_gradients_agree_with_finite_differences(function, pictures):
    images = (pictures(1, 9, 9, dtype=torch.float64) * 0.7).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: preprocess.normalize(function(x, 6)), images)


@pytest.mark.parametrize("shape", [(1000, 2), (2, 1000)])
def test_extreme_shapes_keep_at_least_one_pixel(shape):
    assert preprocess.pad(torch.zeros(1, 3, *shape), 224).shape == (1, 3, 224, 224)
