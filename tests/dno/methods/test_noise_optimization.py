import math
import warnings

import pytest
import torch

from dno.errors import UserError
from dno.methods.gradients import Estimate
from dno.methods.noise_optimization import MAX_BAD_STEPS, StopRules, begin, optimize_noise
from dno.methods.optimizers import make_optimizer

FREE = slice(0, 3)  # of four noises


class Quadratic:
    """A source whose image is the sum of its free noises and whose loss is the distance to a target."""

    def __init__(self, target=2.0, spoil=lambda step, b: False):
        self.target, self.spoil, self.calls = target, spoil, []

    no_gradient = "look elsewhere"

    def __call__(self, noise, images, step):
        self.calls.append(list(images))
        leaf = noise[FREE].clone().requires_grad_()
        pixels = leaf.sum(dim=0)
        losses = (pixels - self.target).square().mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach()
        for row, b in enumerate(images):
            if self.spoil(step, b):
                losses[row] = math.nan
        return Estimate(pixels.detach(), losses, {"near": -losses}, gradient)


def no_penalty(noise, images, step):
    return noise.new_zeros(len(images))


def start(batch=1, seed=0):
    draws = [torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed + b)) for b in range(batch)]
    return torch.stack(draws, dim=1)


def optimize(source=None, noise=None, regularizer=no_penalty, lr=0.05, **options):
    log = []

    def report(step, active, images, seconds):
        log.append({b: dict(states[b].last, step=step) for b in active})

    states = begin(start() if noise is None else noise, lambda params: make_optimizer(params, lr=lr))
    optimize_noise(source or Quadratic(), states, FREE, regularizer, subsample=0, report=report, **options)
    return states, log


def test_the_reward_rises_and_the_best_is_kept():
    noise = start()
    before = noise.clone()
    (state,), log = optimize(noise=noise, opt_steps=30)
    rewards = [entry[0]["reward"] for entry in log]
    assert rewards[-1] > rewards[0]
    assert state.best_reward == max(rewards) and rewards[state.best_step] == state.best_reward
    torch.testing.assert_close(state.best_noise[FREE].sum(dim=0), state.best_image)
    assert torch.equal(noise, before), "the noise that is given is not changed"


def test_step_zero_is_the_unaligned_image_and_frozen_noises_stay():
    noise = start()
    (state,), log = optimize(noise=noise, opt_steps=3)
    assert log[0][0]["reward"] == pytest.approx(-(noise[FREE].sum(dim=0) - 2).square().mean().item())
    assert torch.equal(state.noise[3], noise[3, 0])


def test_batch_equals_its_images_alone():
    """Bits may differ by the batch's rounding; here nothing is batched that rounds."""
    together, _ = optimize(noise=start(batch=3), opt_steps=10)
    for b, state in enumerate(together):
        (alone,), _ = optimize(noise=start(seed=b), opt_steps=10)
        torch.testing.assert_close(state.noise, alone.noise)
        assert state.best_step == alone.best_step


def test_gradient_is_clipped_image_by_image():
    """SGD's first step moves by lr * 1.9 along a gradient of the clipped norm."""
    noise = start(batch=2)
    source = Quadratic(target=50.0)
    states = begin(noise, lambda params: make_optimizer(params, "sgd", lr=1.0))
    optimize_noise(source, states, FREE, no_penalty, opt_steps=1, max_grad_norm=0.5, subsample=0)
    for b, state in enumerate(states):
        assert (state.noise - noise[:, b]).norm().item() == pytest.approx(1.9 * 0.5, rel=1e-4)
        assert state.last["grad_norm"] > 1, "what is reported is the norm before clipping"


def test_gamma_weighs_the_regularizer():
    def penalty(noise, images, step):
        return noise.square().sum(dim=(0, 2, 3, 4))

    (free,), _ = optimize(regularizer=penalty, opt_steps=40)
    (held,), log = optimize(regularizer=penalty, gamma=10.0, opt_steps=40)
    assert held.noise[FREE].norm() < 0.7 * free.noise[FREE].norm()
    assert log[0][0]["regularizer"] == pytest.approx(start()[FREE].square().sum().item(), rel=1e-5)


def test_stop_rules():
    (state,), log = optimize(rules=StopRules(target_reward=-4.0), opt_steps=100)
    assert len(log) < 100 and state.best_reward >= -4.0 and "reached the target -4" in state.stopped
    # Each step overshoots, so nothing is better than the start.
    (state,), log = optimize(lr=50.0, rules=StopRules(patience=3), opt_steps=100)
    assert len(log) == 4 and "no better reward in 3 iterations" in state.stopped
    (state,), log = optimize(rules=StopRules(max_seconds=1e-9), opt_steps=100)
    assert len(log) == 1 and "seconds are over" in state.stopped


def test_stop_below_a_probability_keeps_the_best_before_it():
    (state,), log = optimize(lr=0.5, rules=StopRules(min_probability=0.05), opt_steps=100)
    probabilities = [entry[0]["probability"] for entry in log]
    assert probabilities[-1] < 0.05 <= min(probabilities[:-1])
    assert state.best_step < len(log) - 1 and "fell below 0.05" in state.stopped


def test_an_image_that_stops_leaves_the_batch_and_the_others_go_on():
    source = Quadratic()
    noise = start(batch=2)
    noise[FREE, 1] += 0.6  # nearer to the target, so it gets there first
    states, _ = optimize(source, noise, rules=StopRules(target_reward=-2.5), opt_steps=200)
    assert source.calls[0] == [0, 1] and source.calls[-1] == [0]
    (alone,), _ = optimize(noise=noise[:, 1:], rules=StopRules(target_reward=-2.5), opt_steps=200)
    torch.testing.assert_close(states[1].noise, alone.noise)


def test_a_bad_reward_skips_the_step_of_that_image_only():
    source = Quadratic(spoil=lambda step, b: b == 1 and step == 2)
    with pytest.warns(UserWarning, match="iteration 2: image 1 has reward nan"):
        states, _ = optimize(source, start(batch=2), opt_steps=6)
    (clean,), _ = optimize(noise=start(), opt_steps=6)
    (fewer,), _ = optimize(noise=start(seed=1), opt_steps=5)
    torch.testing.assert_close(states[0].noise, clean.noise)
    torch.testing.assert_close(states[1].noise, fewer.noise)
    assert states[1].noise.isfinite().all() and math.isfinite(states[1].best_reward)


def test_an_image_without_a_finite_reward_is_given_up_and_a_run_of_such_images_fails():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states, log = optimize(Quadratic(spoil=lambda step, b: b == 1), start(batch=2), opt_steps=8)
        assert len(log) == 8 and len(log[-1]) == 1 and "without a finite reward" in states[1].stopped
        with pytest.raises(UserError, match=f"no image had a finite reward and gradient for {MAX_BAD_STEPS} iter"):
            optimize(Quadratic(spoil=lambda step, b: True), opt_steps=8)


def test_an_infinite_gradient_never_reaches_the_noise():
    class Overflowing(Quadratic):
        def __call__(self, noise, images, step):
            estimate = super().__call__(noise, images, step)
            if len(self.calls) == 2:
                estimate.gradient[0, 0, 0, 0, 0] = math.inf
            return estimate

    with pytest.warns(UserWarning, match="gradient norm inf; its step is skipped"):
        (state,), _ = optimize(Overflowing(), opt_steps=4)
    assert state.noise.isfinite().all()


def test_a_zero_gradient_at_the_first_step_is_an_error():
    class Flat(Quadratic):
        def __call__(self, noise, images, step):
            estimate = super().__call__(noise, images, step)
            estimate.gradient.zero_()
            return estimate

    with pytest.raises(UserError, match=r"objective \(near\) is zero .* look elsewhere"):
        optimize(Flat())


def test_evaluations_are_recorded_and_not_optimized():
    def evaluate(images, indices):
        return {"mean": images.mean(dim=(1, 2, 3))}

    (plain,), _ = optimize(opt_steps=5)
    (watched,), log = optimize(opt_steps=5, evaluate=evaluate)
    assert torch.equal(plain.noise, watched.noise)
    assert log[0][0]["evaluations"]["mean"] == pytest.approx(start()[FREE].sum(dim=0).mean().item(), abs=1e-6)
    assert log[0][0]["objectives"]["near"] == log[0][0]["reward"]
