"""The loop of DNO, against a model and a reward that are known: an image is the sum of its free noises."""

import math
import warnings

import pytest
import torch

from dno.errors import UserError
from dno.memory import Plan
from dno.methods.noise_optimization import MAX_BAD_STEPS, NoiseOptimization
from dno.noise import PERMUTATIONS, draw_noise, keyed_generator
from dno.regularization import probability, probability_min, probability_penalty
from dno.resume import make_settings
from dno.team import Team

STEPS, SHAPE = 3, (3, 4, 4)
# The last noise, x_T, is frozen.
DEFAULTS = {"model": "sprites", "num_steps": STEPS, "opt_time": 2, "lr": 0.05, "subsample": 0, "opt_steps": 10}


class StandIn:
    """A task: the image is the sum of the first three noises, its loss the squared distance to a target.

    spoil: (step, b) -> whether the loss of that image is NaN there.
    """

    device, state_dtype, team, plan = torch.device("cpu"), torch.float32, Team(), Plan(0, 0)

    def __init__(self, target=2.0, spoil=lambda step, b: False, **settings):
        self.settings = make_settings(NoiseOptimization, {**DEFAULTS, **settings}).resolve()
        self.latent_shape = (self.settings.batch_size, *SHAPE)
        self.target, self.spoil, self.calls = target, spoil, []

    def plan_graphs(self, num_steps, rewards_too=True):
        pass

    def draw(self, candidate=0):
        return draw_noise([self.settings.seed + b for b in range(self.settings.batch_size)], STEPS, SHAPE, candidate)

    def given_noise(self):
        return None

    def render(self, noises, rows, through_network=True):
        return torch.stack(noises[:3]).sum(dim=0)

    def losses(self, images, rows):
        self.calls.append(list(rows))
        losses = (images - self.target).square().mean(dim=(1, 2, 3))
        spoiled = torch.tensor([self.spoil(len(self.calls) - 1, b) for b in rows])
        return torch.where(spoiled, math.nan, losses), {"near": -losses.detach()}

    def evaluate(self, images, rows):
        return {"mean": images.mean(dim=(1, 2, 3))}


def optimize(task=None, stop=lambda state, found: None, **settings):
    """(the state at the end, every iteration). stop: called at each, as the recorder is."""
    task = task or StandIn(**settings)
    method = NoiseOptimization(task)
    state, log = method.start(), []
    for found in method.iterations(state):
        log.append(found)
        stop(state, found)
    return state, log


def rewards_of(log, row=0):
    return [-found.losses[row].item() for found in log]


def test_the_reward_rises_and_what_is_yielded_belongs_together():
    task = StandIn(opt_steps=30)
    start = task.draw()
    state, log = optimize(task)
    rewards = rewards_of(log)
    assert len(log) == state.step == 30 and rewards[-1] > rewards[0]
    assert torch.equal(log[0].noise, start), "iteration 0 is the image without alignment"
    for found in log:
        assert torch.equal(found.images, found.noise[:3].sum(dim=0)) and found.rows == [0]
        assert found.rewards["near"].item() == -found.losses.item()
        torch.testing.assert_close(found.metrics["probability"], probability(found.noise[:3], 0))
        torch.testing.assert_close(found.metrics["probability_min"], probability_min(found.noise[:3], 0))
        assert torch.equal(found.evaluations["mean"], found.images.mean(dim=(1, 2, 3)))


def test_frozen_noises_stay():
    state, log = optimize()
    start = StandIn().draw()
    assert all(torch.equal(found.noise[3], start[3]) for found in log)
    assert torch.equal(state.rest([0]), start[3:]) and not torch.equal(state.z([0]), start[:3])


def test_weight_decay_shrinks_the_frozen_noises_too():
    """As in the official trajectories: by lr * weight_decay per iteration, without a gradient."""
    state, log = optimize(weight_decay=0.5, opt_steps=4)
    start = StandIn().draw()
    for i, found in enumerate(log):
        torch.testing.assert_close(found.noise[3], start[3] * (1 - 0.05 * 0.5) ** i)
    torch.testing.assert_close(state.rest([0]), start[3:] * (1 - 0.05 * 0.5) ** 4)


def test_with_eta_0_one_noise_is_state_and_weight_decay_shrinks_it():
    class OnlyStart(StandIn):
        def render(self, noises, rows, through_network=True):
            assert len(noises) == STEPS + 1
            return noises[-1]

    settings = {"eta": 0.0, "opt_time": None, "opt_steps": 3}
    task = OnlyStart(**settings)
    state, log = optimize(task)
    assert all(found.noise.shape == (1, 1, *SHAPE) for found in log)
    assert torch.equal(log[0].noise, task.draw()[-1:]), "x_T is the last of the image's T + 1 draws"
    assert state.rest([0]).numel() == 0
    tensors, _ = state.pack()
    values = sum(tensor.numel() for tensor in tensors.values() if tensor.dim())
    assert values == 3 * math.prod(SHAPE), "x_T and Adam's two moments"
    decayed, _ = optimize(OnlyStart(weight_decay=0.5, target=0.0, **settings))
    assert decayed.z([0]).norm() < state.z([0]).norm()


def test_batch_equals_its_images_alone():
    """Bits may differ by the batch's rounding; here nothing is batched that rounds."""
    together, log = optimize(batch_size=3)
    for b in range(3):
        alone, own = optimize(seed=b)
        torch.testing.assert_close(together.z([b]), alone.z([0]))
        torch.testing.assert_close(rewards_of(log, b), rewards_of(own))


def test_gradient_is_clipped_image_by_image():
    """SGD's first step moves by lr * 1.9 along a gradient of the clipped norm."""
    state, log = optimize(StandIn(target=50.0, batch_size=2, optimizer="sgd", lr=1.0, max_grad_norm=0.5, opt_steps=1))
    for b in range(2):
        moved = (state.z([b]) - log[0].noise[:3, [b]]).norm().item()
        assert moved == pytest.approx(1.9 * 0.5, rel=1e-4)
        assert log[0].metrics["grad_norm"][b] > 1, "what is reported is the norm before clipping"


def test_the_gradient_is_that_of_the_loss_and_gamma_times_the_penalty():
    settings = {"batch_size": 2, "seed": 3, "gamma": 0.7, "permutations": 5, "opt_steps": 2}
    _, log = optimize(**settings)
    for step, found in enumerate(log):
        leaf = found.noise[:3].clone().requires_grad_()
        generators = [keyed_generator(PERMUTATIONS, 3 + b, step) for b in range(2)]
        penalty = probability_penalty(leaf, generators, 0, 5)
        loss = (leaf.sum(dim=0) - 2).square().mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad((loss + 0.7 * penalty).sum(), leaf)
        torch.testing.assert_close(found.metrics["grad_norm"], gradient.transpose(0, 1).flatten(1).norm(dim=1))
        torch.testing.assert_close(found.metrics["regularizer"], penalty.detach())


def test_gamma_holds_the_noise_where_it_is_probable():
    _, free = optimize(opt_steps=60)
    _, held = optimize(opt_steps=60, gamma=10.0)
    assert held[-1].metrics["probability"] > 2 * free[-1].metrics["probability"]
    assert rewards_of(held)[-1] < rewards_of(free)[-1]


def test_an_image_that_is_stopped_leaves_the_batch_and_the_others_are_worked_on():
    def stop(state, found):
        if state.step == 4:
            state.stop(1, "enough")

    task = StandIn(batch_size=2)
    state, log = optimize(task, stop)
    assert task.calls[3] == [0, 1] and task.calls[4] == [0] and log[-1].rows == [0]
    alone, _ = optimize(seed=0)
    torch.testing.assert_close(state.z([0]), alone.z([0]))
    earlier, _ = optimize(seed=1, opt_steps=4)
    torch.testing.assert_close(state.z([1]), earlier.z([0]))
    assert state.stopped == [None, "enough"] and state.step == 10


def test_when_every_image_is_stopped_the_loop_ends():
    state, log = optimize(stop=lambda state, found: state.stop(0, "enough"))
    assert len(log) == 1 and state.step == 1


def test_a_bad_reward_skips_the_step_of_that_image_only():
    task = StandIn(spoil=lambda step, b: b == 1 and step == 2, batch_size=2, opt_steps=6)
    with pytest.warns(UserWarning, match="iteration 2: image 1 has reward nan"):
        state, _ = optimize(task)
    clean, _ = optimize(opt_steps=6)
    fewer, _ = optimize(seed=1, opt_steps=5)
    torch.testing.assert_close(state.z([0]), clean.z([0]))
    torch.testing.assert_close(state.z([1]), fewer.z([0]))
    assert state.stopped == [None, None]


def test_an_image_without_a_finite_reward_is_given_up_and_a_run_of_such_images_fails():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, log = optimize(StandIn(spoil=lambda step, b: b == 1, batch_size=2, opt_steps=8))
        assert len(log) == 8 and log[-1].rows == [0] and not state.failed
        assert state.stopped[1] == f"{MAX_BAD_STEPS} consecutive iterations without a finite reward and gradient"
        method = NoiseOptimization(StandIn(spoil=lambda step, b: True))
        state = method.start()
        with pytest.raises(UserError, match=f"no image had a finite reward and gradient for {MAX_BAD_STEPS} consec"):
            list(method.iterations(state))
        assert state.failed and state.step == MAX_BAD_STEPS
        state.retry()
        assert state.active == [0] and state.images[0].bad_steps == 0


class Spoiled:
    """A gradient source that changes the gradients of another."""

    no_gradient = "look elsewhere"

    def __init__(self, source, change):
        self.source, self.change = source, change

    def __call__(self, z, rest, rows, step):
        estimate = self.source(z, rest, rows, step)
        self.change(estimate.gradient, step)
        return estimate


def test_an_infinite_gradient_never_reaches_the_noise():
    def overflow(gradient, step):
        if step == 1:
            gradient[0, 0, 0, 0, 0] = math.inf

    method = NoiseOptimization(StandIn(opt_steps=4))
    method.source = Spoiled(method.source, overflow)
    state = method.start()
    with pytest.warns(UserWarning, match="gradient norm inf; its step is skipped"):
        list(method.iterations(state))
    assert state.z([0]).isfinite().all() and state.step == 4


def test_a_zero_gradient_at_the_first_step_is_an_error():
    method = NoiseOptimization(StandIn())
    method.source = Spoiled(method.source, lambda gradient, step: gradient.zero_())
    with pytest.raises(UserError, match=r"objective \(near\) is zero .* look elsewhere"):
        list(method.iterations(method.start()))


def test_the_state_is_whole_whenever_the_loop_yields_and_resumes_from_there():
    """Leaving the loop at any iteration and taking the state up in a new object changes nothing."""
    settings = {"gamma": 1.0, "weight_decay": 0.1, "batch_size": 2}
    whole, expected = optimize(**settings)
    method = NoiseOptimization(StandIn(**settings))
    state, log = method.start(), []
    while state.step < 10:
        for found in method.iterations(state):
            log.append(found)
            assert state.whole and state.step == len(log)
            break
        tensors, values = state.pack()
        method = NoiseOptimization(StandIn(**settings))
        state = method.blank()
        state.unpack({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert torch.equal(state.z([0, 1]), whole.z([0, 1])) and torch.equal(state.rest([0, 1]), whole.rest([0, 1]))
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(log, expected, strict=True))


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"precondition": "spectral"}])
def test_a_state_packed_and_unpacked_is_the_same(optimizer):
    state, _ = optimize(batch_size=2, opt_steps=3, **optimizer)
    state.stop(1, "enough")
    tensors, values = state.pack()
    other = NoiseOptimization(StandIn(batch_size=2, **optimizer)).blank()
    other.unpack(tensors, values)
    again, same = other.pack()
    assert values == same and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert other.active == [0] and other.step == 3 and other.stopped == [None, "enough"]


def test_the_start_is_each_images_own_draw_or_the_best_of_several():
    class Given(StandIn):
        def draw_best(self, count):
            return self.draw(candidate=count)

        def given_noise(self):
            return self.draw() + 1 if self.settings.seed == 9 else None

    for settings, expected in (
        ({}, lambda task: task.draw()),
        ({"best_of": 5}, lambda task: task.draw(candidate=5)),
        ({"seed": 9}, lambda task: task.draw() + 1),
    ):
        task = Given(batch_size=2, opt_steps=1, **settings)
        _, log = optimize(task)
        assert torch.equal(log[0].noise, expected(task))
