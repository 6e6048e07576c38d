"""The rewards that need no weights: values and gradients known beforehand, and what every reward promises."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RFUNCTIONS

PROMPTS = ["white duck", "red car", ""]


@pytest.fixture
def images():
    """Three images, some of their values outside [-1, 1]."""
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def losses_and_gradient(name, images):
    images = images.clone().requires_grad_()
    losses = RFUNCTIONS[name](device="cpu")(images, PROMPTS[: len(images)])
    return losses.detach(), torch.autograd.grad(losses.sum(), images)[0]


@pytest.mark.parametrize(("name", "sign"), [("black", 1), ("white", -1)])
def test_brightness_is_the_mean_of_the_unclamped_image(name, sign, images):
    images[0] = 2.5
    losses, gradient = losses_and_gradient(name, images)
    assert losses[0] == sign * 2.5
    torch.testing.assert_close(losses, sign * images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(gradient, torch.full_like(images, sign / (3 * 8 * 12)))


def test_contrast_of_a_checkerboard_and_of_a_plain_image():
    """Channel sums of +3 and -3 have variance 9, and d(-var)/dx = -2 (sum - mean) / pixels."""
    board = torch.tensor([1.0, -1.0]).repeat(8, 6)
    board = torch.stack([board, torch.full_like(board, 0.7)])[:, None].expand(2, 3, 8, 12)
    losses, gradient = losses_and_gradient("contrast", board)
    torch.testing.assert_close(losses, torch.tensor([-9.0, 0.0]))
    torch.testing.assert_close(gradient[0], -2 * 3 * board[0] / (8 * 12))
    torch.testing.assert_close(gradient[1], torch.zeros(3, 8, 12))


def test_jpeg_is_the_size_of_the_file_in_kilobytes(images):
    images = torch.cat([images, torch.zeros(1, 3, 8, 12)])
    losses = RFUNCTIONS["jpeg"]()(images, PROMPTS)
    pixels = np.rint((images.numpy().clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for loss, array in zip(losses, pixels):
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=95)
        assert loss == pytest.approx(len(file.getvalue()) / 1000)
    assert losses[3] < losses[:3].min()  # a grey image compresses best


def test_jpeg_alone_says_that_it_has_no_gradient():
    without = [name for name, factory in RFUNCTIONS.items() if not getattr(factory, "differentiable", True)]
    assert without == ["jpeg", "jpeg_incompressibility"]


def test_incompressibility_is_the_opposite(images):
    losses = [RFUNCTIONS[name]()(images, PROMPTS) for name in ("jpeg", "jpeg_incompressibility")]
    assert torch.equal(losses[0], -losses[1])


@pytest.mark.parametrize("name", ["white", "black", "contrast", "jpeg"])
def test_a_batch_gives_what_its_images_give_alone(name, images):
    loss_fn = RFUNCTIONS[name](inference_dtype=torch.float32, device="cpu")
    losses = loss_fn(images, PROMPTS)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    singles = [loss_fn(image[None], [prompt]) for image, prompt in zip(images, PROMPTS)]
    torch.testing.assert_close(losses, torch.cat(singles))
