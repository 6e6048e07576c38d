"""The gradient that reaches the noise is the true one: through reward, decoder and every call of the network."""

from functools import partial

import pytest
import torch

import dno
from dno.methods.gradients import Backpropagation
from dno.noise import draw_noise
from dno.sampling import sample

STEPS = 3


@pytest.fixture(scope="module")
def model(tiny_folder):
    return dno.load_model(str(tiny_folder), torch.float64)


def problem(model, recompute=True, eta=1.0, free=slice(0, STEPS + 1), guidance_scale=5.0, batch=1):
    """Backpropagation for the mean of each image times its index + 1, and a noise to start from."""
    conditioning = model.encode_prompts(["white duck"] * batch)
    schedule = model.schedule(STEPS)

    def render(noises, images):
        denoise = partial(model.denoise, conditioning=conditioning[images], guidance_scale=guidance_scale)
        return model.decode(sample(denoise, noises, schedule, eta, recompute))

    def loss(pixels, images):
        weights = torch.linspace(0, 1, pixels[0].numel(), dtype=pixels.dtype).view(pixels[0].shape)
        losses = (weights * pixels).mean(dim=(1, 2, 3))
        return losses, {"weighted": -losses.detach()}

    shape = model.latent_shape(1, *model.default_size)[1:]
    noise = draw_noise(range(batch), STEPS, shape).double()
    return Backpropagation(render, loss, free), noise


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_equals_finite_differences(model, eta):
    source, noise = problem(model, eta=eta)
    gradient = source(noise, [0]).gradient
    for seed in range(3):
        direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ahead, behind = (source(noise + h * direction, [0]).losses.item() for h in (1e-5, -1e-5))
        slope = (ahead - behind) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_each_noise_by_itself_equals_finite_differences(model):
    source, noise = problem(model)
    gradient = source(noise, [0]).gradient
    assert not gradient[0].any(), "the last step's noise has no effect"
    for i in range(1, STEPS + 1):
        direction = torch.zeros_like(noise)
        direction[i] = torch.randn(noise[i].shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        ahead, behind = (source(noise + h * direction, [0]).losses.item() for h in (1e-5, -1e-5))
        assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_recomputing_and_block_checkpointing_give_the_same_gradient(model):
    plain = problem(model, recompute=False)
    expected = plain[0](plain[1], [0])
    recomputed = problem(model)
    result = recomputed[0](recomputed[1], [0])
    assert torch.equal(result.gradient, expected.gradient) and torch.equal(result.images, expected.images)
    model.checkpoint_blocks(True)
    try:
        torch.testing.assert_close(recomputed[0](recomputed[1], [0]).gradient, expected.gradient)
    finally:
        model.checkpoint_blocks(False)


def test_the_gradient_passes_through_the_network(model):
    """Not the gradient of a sampler whose network is held constant, which a lost checkpoint gives."""
    source, noise = problem(model)
    full = source(noise, [0]).gradient
    true_predict = model._predict
    model._predict = lambda *args: true_predict(*args).detach()
    try:
        held = source(noise, [0]).gradient
    finally:
        del model._predict
    assert held.any() and (full - held).norm() > 0.02 * full.norm()


@pytest.mark.parametrize("free", [slice(0, 2), slice(0, STEPS), slice(STEPS, STEPS + 1)])
def test_noises_that_are_not_free_get_no_gradient(model, free):
    whole, noise = problem(model)
    part, _ = problem(model, free=free)
    estimate = part(noise, [0])
    assert len(estimate.gradient) == len(range(STEPS + 1)[free])
    torch.testing.assert_close(estimate.gradient, whole(noise, [0]).gradient[free])


def test_batch_equals_its_images_alone(model):
    source, noise = problem(model, batch=3)
    together = source(noise, [0, 1, 2])
    for b in range(3):
        alone = source(noise[:, b : b + 1], [b])
        torch.testing.assert_close(together.gradient[:, b], alone.gradient[:, 0])
        torch.testing.assert_close(together.losses[b], alone.losses[0])


def test_a_loss_that_is_not_finite_is_left_out_of_the_sum(model):
    source, noise = problem(model, batch=2)
    expected = source(noise, [0, 1]).gradient[:, 1]
    loss = source.loss
    source.loss = lambda pixels, images: (loss(pixels, images)[0] * torch.tensor([torch.nan, 1.0]), {})
    gradient = source(noise, [0, 1]).gradient
    torch.testing.assert_close(gradient[:, 1], expected)
