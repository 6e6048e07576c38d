"""The gradient that reaches the noise is the true one: through reward, decoder and every call of the network."""

from functools import partial

import pytest
import torch

import dno
from dno.methods.gradients import Backpropagation
from dno.noise import Split, draw_noise
from dno.sampling import sample

STEPS = 3


@pytest.fixture(scope="module")
def model(tiny_folder):
    return dno.load_model(str(tiny_folder), torch.float64)


class Problem:
    """A weighted mean of each image's pixels as a function of its noise, and a noise to start from."""

    def __init__(self, model, recompute=True, eta=1.0, opt_time=STEPS, guidance_scale=5.0, batch=1, network=True):
        conditioning = model.encode_prompts(["white duck"] * batch)
        schedule, split = model.schedule(STEPS), Split(STEPS, opt_time, eta)

        def render(z, rest, rows):
            denoise = partial(
                model.denoise, conditioning=conditioning[rows], guidance_scale=guidance_scale, through_network=network
            )
            return model.decode(sample(denoise, split.join(z, rest), schedule, eta, recompute))

        shape = model.latent_shape(1, *model.default_size)[1:]
        self.z, self.rest = split.split(draw_noise(range(batch), STEPS, shape).double())
        self.render = render

    @staticmethod
    def loss(images, rows):
        weights = torch.linspace(0, 1, images[0].numel(), dtype=images.dtype).view(images[0].shape)
        losses = (weights * images).mean(dim=(1, 2, 3))
        return losses, {"weighted": -losses.detach()}

    def __call__(self, rows=(0,), move=0, loss=None):
        """The estimate of these images, with `move` added to z."""
        rows = list(rows)
        z, rest = self.z[:, rows] + move, self.rest[:, rows]
        return Backpropagation(self.render, loss or self.loss)(z, rest, rows)

    def slope(self, direction):
        ahead, behind = (self(move=h * direction).losses.item() for h in (1e-5, -1e-5))
        return (ahead - behind) / 2e-5


def direction_like(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_equals_finite_differences(model, eta):
    problem = Problem(model, eta=eta)
    gradient = problem().gradient
    assert gradient.shape == problem.z.shape and len(gradient) == (1 if eta == 0 else STEPS + 1)
    for seed in range(3):
        direction = direction_like(problem.z, seed)
        assert (gradient * direction).sum().item() == pytest.approx(problem.slope(direction), rel=1e-5)


def test_each_noise_by_itself_equals_finite_differences(model):
    problem = Problem(model)
    gradient = problem().gradient
    assert not gradient[0].any(), "the last step's noise has no effect"
    for i in range(1, STEPS + 1):
        direction = torch.zeros_like(problem.z)
        direction[i] = direction_like(problem.z[i], i)
        assert (gradient * direction).sum().item() == pytest.approx(problem.slope(direction), rel=1e-5)


def test_recomputing_and_block_checkpointing_give_the_same_gradient(model):
    expected, recomputed = Problem(model, recompute=False)(), Problem(model)
    result = recomputed()
    assert torch.equal(result.gradient, expected.gradient) and torch.equal(result.images, expected.images)
    model.checkpoint_blocks(True)
    try:
        torch.testing.assert_close(recomputed().gradient, expected.gradient)
    finally:
        model.checkpoint_blocks(False)


def test_the_gradient_passes_through_the_network(model):
    """Not the gradient of a sampler whose network is held constant, which a lost checkpoint gives."""
    full, held = Problem(model)().gradient, Problem(model, network=False)().gradient
    assert held.any() and (full - held).norm() > 0.02 * full.norm()


@pytest.mark.parametrize("opt_time", [1, STEPS - 1])
def test_frozen_noises_get_no_gradient_and_change_none(model, opt_time):
    whole, part = Problem(model)(), Problem(model, opt_time=opt_time)
    estimate = part()
    assert len(part.rest) == STEPS - opt_time and len(estimate.gradient) == opt_time + 1
    torch.testing.assert_close(estimate.gradient, whole.gradient[: opt_time + 1])
    torch.testing.assert_close(estimate.images, whole.images)


def test_batch_equals_its_images_alone(model):
    problem = Problem(model, batch=3)
    together = problem([0, 1, 2])
    for b in range(3):
        alone = problem([b])
        torch.testing.assert_close(together.gradient[:, b], alone.gradient[:, 0])
        torch.testing.assert_close(together.losses[b], alone.losses[0])


def test_a_loss_that_is_not_finite_is_left_out_of_the_sum(model):
    problem = Problem(model, batch=2)
    expected = problem([0, 1]).gradient[:, 1]

    def spoiled(images, rows):
        return problem.loss(images, rows)[0] * torch.tensor([torch.nan, 1.0]), {}

    torch.testing.assert_close(problem([0, 1], loss=spoiled).gradient[:, 1], expected)


def test_it_works_where_the_caller_has_switched_gradients_off(model):
    problem = Problem(model)
    expected = problem().gradient
    with torch.no_grad():
        assert torch.equal(problem().gradient, expected)


def test_without_a_path_to_the_noise_the_gradient_is_zero(model):
    def constant(images, rows):
        return images.detach().mean(dim=(1, 2, 3)) + torch.zeros(len(images), requires_grad=True), {}

    gradient = Problem(model)(loss=constant).gradient
    assert not gradient.any()
