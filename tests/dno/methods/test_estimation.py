"""Estimated gradients, against directions that are known."""

import math

import pytest
import torch

from dno.errors import UserError
from dno.methods.estimation import ESTIMATORS, Estimation
from dno.methods.gradients import Backpropagation
from dno.noise import keyed_generator

NOISES, SHAPE = 3, (2, 4, 4)
NONE = torch.zeros(0, 3, *SHAPE, dtype=torch.float64)  # no frozen noise, of up to three images


def draw(image, step, index, shape):
    return torch.randn(shape, generator=keyed_generator(9, image, step, index), dtype=torch.float64)


def linear_map(z, rest, images):
    """M(z): a fixed, ill-conditioned linear map of all noises to pixels (B, 3, 4, 4), a little different by image."""
    matrix = torch.randn(48, NOISES * 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix * torch.logspace(0, -1, NOISES * 32, dtype=torch.float64)
    flat = torch.cat([z, rest]).transpose(0, 1).flatten(1)
    return (flat @ matrix.T + torch.tensor(images).view(-1, 1)).view(-1, 3, 4, 4)


def curved_map(z, rest, images):
    return torch.tanh(0.3 * linear_map(z, rest, images))


def linear_loss(pixels, images):
    weights = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = (weights * pixels).sum(dim=(1, 2, 3))
    return losses, {"linear": -losses.detach()}


def estimation(estimator, render=linear_map, loss=linear_loss, **options):
    """A source for noises that are all free, (z, rows, step) -> Estimate."""
    source = Estimation(render, loss, estimator, **{"mu": 0.01, "num_samples": 64, "draw": draw, **options})
    return lambda z, rows, step=0: source(z, NONE[:, : len(rows)], rows, step)


def start(batch=1):
    return torch.randn(NOISES, batch, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("estimator", ["hybrid_image", "zo"])
def test_it_converges_to_the_true_direction_of_a_linear_reward(estimator, antithetic):
    """In D dimensions the cosine after q samples is about sqrt(q / (q + D)): 48 pixels, 96 noise values."""
    noise = start()
    true = Backpropagation(linear_map, linear_loss)(noise, NONE[:, :1], [0]).gradient
    found = {}
    for q in (16, 2048):
        estimate = estimation(estimator, num_samples=q, antithetic=antithetic)(noise, [0])
        found[q] = cosine(estimate.gradient, true)
    assert found[16] < 0.8 < 0.95 < found[2048]


def test_the_hybrid_gradient_converges_to_the_true_direction_through_the_models_jacobian():
    """Where the Jacobian is orthogonal, J J^T = 1 and the expectation is the true gradient."""
    orthogonal = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0)).double())[0][:48]

    def render(z, rest, images):
        return (z.transpose(0, 1).flatten(1) @ orthogonal.T).view(-1, 3, 4, 4)

    noise = start()
    true = Backpropagation(render, linear_loss)(noise, NONE[:, :1], [0]).gradient
    assert cosine(estimation("hybrid", render, num_samples=2048)(noise, [0]).gradient, true) > 0.95
    assert cosine(estimation("hybrid", render, num_samples=16)(noise, [0]).gradient, true) < 0.8


def test_the_hybrid_gradient_is_that_of_the_mean_product():
    """g written out sample by sample, and the gradient of <g, x>."""
    noise = start(2)
    source = estimation("hybrid", curved_map, num_samples=5, batch_size=3, mu=0.1)
    got = source(noise, [1, 4], step=7)
    x, losses = curved_map(noise, NONE[:, :2], [1, 4]), linear_loss(curved_map(noise, NONE[:, :2], [1, 4]), None)[0]
    g = torch.zeros_like(x)
    for b, image in enumerate((1, 4)):
        for j in range(5):
            moved = noise[:, b : b + 1] + 0.1 * draw(image, 7, j, noise[:, b].shape).unsqueeze(1)
            pixels = curved_map(moved, NONE[:, :1], [image])
            g[b] += (linear_loss(pixels, None)[0] - losses[b]) * (pixels[0] - x[b]) / 0.1**2 / 5
    g /= g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-3
    leaf = noise.clone().requires_grad_()
    (expected,) = torch.autograd.grad((g * curved_map(leaf, NONE[:, :2], [1, 4])).sum(), leaf)
    torch.testing.assert_close(got.gradient, expected)
    torch.testing.assert_close(got.images, x)
    torch.testing.assert_close(got.losses, losses)
    torch.testing.assert_close(got.rewards["linear"], -losses)


def test_zeroth_order_is_the_mean_of_slopes():
    noise = start()
    got = estimation("zo", curved_map, num_samples=4, mu=0.1)(noise, [0], step=2)
    loss = linear_loss(curved_map(noise, NONE[:, :1], [0]), None)[0]
    expected = torch.zeros_like(noise)
    for j in range(4):
        xi = draw(0, 2, j, noise[:, 0].shape).unsqueeze(1)
        expected += (linear_loss(curved_map(noise + 0.1 * xi, NONE[:, :1], [0]), None)[0] - loss) / 0.1 * xi / 4
    torch.testing.assert_close(got.gradient, expected)


def test_the_image_is_perturbed_without_sampling():
    calls = []

    def render(z, rest, images):
        calls.append(len(images))
        return linear_map(z, rest, images)

    estimation("hybrid_image", render)(start(), [0])
    assert calls == [1]
    estimation("hybrid", render, batch_size=24)(start(), [0])
    assert calls == [1, 1, 1, 24, 24, 16], "once for the Jacobian, once for the reference, then the samples"


def test_pairs_take_out_the_even_orders():
    """For an even loss around the noise itself the true slope is 0: pairs find exactly that, single samples do not."""
    noise = start()
    centre = linear_map(noise, NONE[:, :1], [0])

    def even(pixels, images):
        losses = (pixels - centre).square().sum(dim=(1, 2, 3))
        return losses, {"even": -losses}

    assert estimation("zo", loss=even, antithetic=True)(noise, [0]).gradient.norm() < 1e-10
    assert estimation("zo", loss=even)(noise, [0]).gradient.norm() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_noises_get_no_gradient_and_are_not_perturbed(estimator):
    noise, seen = start(), []

    def render(z, rest, images):
        seen.append(rest.clone())
        return linear_map(z, rest, images)

    source = Estimation(render, linear_loss, estimator, mu=0.01, num_samples=64, draw=draw)
    gradient = source(noise[:2], noise[2:], [0]).gradient
    assert gradient.shape == (2, 1, *SHAPE) and all((rest == noise[2]).all() for rest in seen)


def test_noises_without_effect_get_no_gradient_from_luck():
    gradient = estimation("zo", idle=[0])(start(), [0]).gradient
    assert not gradient[0].any() and gradient[1].any() and gradient[2].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_batches_of_samples_and_of_images_change_nothing(estimator, antithetic):
    noise = start(3)
    options = {"num_samples": 6, "antithetic": antithetic, "mu": 0.1}
    together = estimation(estimator, curved_map, batch_size=4, **options)(noise, [0, 1, 2], step=3)
    one_by_one = estimation(estimator, curved_map, batch_size=1, **options)(noise, [0, 1, 2], step=3)
    torch.testing.assert_close(together.gradient, one_by_one.gradient)
    for b in range(3):
        alone = estimation(estimator, curved_map, **options)(noise[:, b : b + 1], [b], step=3)
        torch.testing.assert_close(together.gradient[:, b], alone.gradient[:, 0])


def test_every_iteration_and_image_has_draws_of_its_own_and_equal_calls_are_equal():
    noise, source = start(), estimation("zo", num_samples=2)
    first = source(noise, [0], step=0).gradient
    assert torch.equal(first, source(noise, [0], step=0).gradient)
    assert not torch.allclose(first, source(noise, [0], step=1).gradient)
    assert not torch.allclose(first, source(noise, [1], step=0).gradient)


def test_padding_keeps_every_batch_at_its_size():
    sizes = []

    def render(z, rest, images):
        sizes.append(len(images))
        return linear_map(z, rest, images)

    plain = estimation("zo", num_samples=6)(start(2), [0, 1])
    padded = estimation("zo", render, num_samples=6, pad=True)(start(2), [0, 1])
    torch.testing.assert_close(plain.gradient, padded.gradient)
    assert set(sizes) == {4}


def lossy(lost):
    """linear_loss, NaN at the calls' samples counted in `lost`."""
    count = iter(range(10**6))

    def loss(pixels, images):
        losses, _ = linear_loss(pixels, images)
        losses = torch.stack([torch.tensor(math.nan).double() if next(count) in lost else value for value in losses])
        return losses, {"linear": -losses}

    return loss


def test_a_bad_sample_is_left_out():
    noise = start()
    with pytest.warns(UserWarning, match="iteration 0: image 0 lost 1 of 4 samples"):
        got = estimation("zo", loss=lossy({2}), num_samples=4)(noise, [0]).gradient  # sample 1; the reference is 0
    loss, expected = linear_loss(linear_map(noise, NONE[:, :1], [0]), None)[0], 0
    for j in (0, 2, 3):
        xi = draw(0, 0, j, noise[:, 0].shape).unsqueeze(1)
        expected += (linear_loss(linear_map(noise + 0.01 * xi, NONE[:, :1], [0]), None)[0] - loss) / 0.01 * xi / 3
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:iteration")
def test_many_bad_samples_in_a_row_end_the_run_and_a_good_one_breaks_the_row():
    source = estimation("zo", loss=lossy({*range(3, 6), *range(7, 30)}), num_samples=5, max_bad_samples=6)
    source(start(), [0], step=0)  # the reference, 2 good, 3 bad; the next reference is no sample
    with pytest.raises(UserError, match=r"iteration 1: 6 consecutive samples .*--max_bad_samples"):
        source(start(), [0], step=1)


@pytest.mark.filterwarnings("ignore:iteration")
def test_without_a_good_sample_the_gradient_is_nan_so_that_the_step_is_skipped():
    estimate = estimation("hybrid", loss=lossy(set(range(1, 9))), num_samples=2)(start(), [0])
    assert estimate.gradient.isnan().all() and estimate.losses.isfinite().all()
