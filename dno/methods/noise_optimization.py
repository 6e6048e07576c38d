"""Direct Noise Optimization: the noise is the parameter, and climbs the reward.

    z <- optimizer(z, clip(d loss / dz + gamma * d penalty / dz)),    loss = -reward(decode(sample(z)))

Every image has its own noise, optimizer and clipping; one batch evaluates them, so each comes out as if alone.
Iteration i measures the noise before its i-th update: iteration 0 is the image without alignment.

Source: Tang et al. 2024, "Tuning-Free Alignment of Diffusion Models with Direct Noise Optimization", arXiv 2405.18881.
"""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from dno.errors import UserError
from dno.memory import LeanerOnDemand
from dno.methods.base import Iteration, Method, State
from dno.methods.estimation import ESTIMATORS, Estimation
from dno.methods.gradients import Backpropagation
from dno.methods.optimizers import OPTIMIZERS, PRECONDITIONERS, make_optimizer
from dno.noise import PERMUTATIONS, PERTURBATION, Split, keyed_generator
from dno.regularization import probability, probability_min, probability_penalty
from dno.sampling import noise_scale
from dno.settings import Group, setting

# Consecutive iterations without a finite reward and gradient after which an image is given up.
MAX_BAD_STEPS = 3


@dataclass(frozen=True)
class Optimization(Group):
    title: ClassVar[str] = "optimization"

    opt_steps: int = setting(
        100,
        "iterations; iteration 0 measures the image without alignment",
        basic="iterations; iteration 0 is the image without alignment",
        changeable=True,
        least=1,
        metavar="N",
    )
    opt_time: int | None = setting(
        None,
        "K: only the noises of the last K + 1 steps are optimized, and backpropagation stops there; "
        "default: num_steps, all of them",
        basic="optimize the noises of the last K + 1 steps; default: all",
        least=1,
        metavar="K",
    )
    lr: float = setting(0.01, "step size of the noise", basic="step size of the noise", above=0, metavar="X")
    optimizer: str = setting("adamw", "adamw, or sgd with Nesterov momentum 0.9", choices=OPTIMIZERS)
    weight_decay: float = setting(
        0.0,
        "shrinks the noise by lr * this per iteration, out of the Gaussian's typical set; the official code has 0.01",
        least=0,
        metavar="X",
    )
    max_grad_norm: float = setting(1.0, "clip each image's gradient to this norm", above=0, metavar="X")
    precondition: str = setting(
        "none",
        "spectral: whiten the spatial spectrum of each gradient map and move by lr relative to the noise, "
        "instead of --optimizer",
        choices=tuple(PRECONDITIONERS),
    )
    gradient: str = setting(
        "full",
        "full: the true gradient. skip_unet: hold the network's output constant, as the official SDXL script does in "
        "effect: a third of the time, another direction",
        choices=("full", "skip_unet"),
    )
    best_of: int = setting(1, "start each image from the best of this many drawn noises", least=1, metavar="N")

    def resolved(self):
        return {"opt_time": self.num_steps if self.opt_time is None else self.opt_time}

    def check(self):
        if self.opt_time > self.num_steps:
            raise UserError(f"--opt_time {self.opt_time} is above --num_steps; expected 1 to {self.num_steps}")
        if self.eta == 0 and self.opt_time < self.num_steps:
            raise UserError(
                f"--eta 0 leaves only the starting noise, which --opt_time {self.opt_time} freezes; "
                f"leave --opt_time out or raise --eta"
            )
        if self.precondition != "none" and (self.optimizer != "adamw" or self.weight_decay):
            raise UserError(
                f"--precondition {self.precondition} takes its own step; leave --optimizer and --weight_decay out"
            )
        if self.noise is not None and self.best_of > 1:
            raise UserError("--noise says where to start, and so does --best_of; give one of them")


@dataclass(frozen=True)
class Regularization(Group):
    title: ClassVar[str] = "regularization"

    gamma: float = setting(
        0.0,
        "weight of the probability regularizer; 0 = none",
        basic="weight of the probability regularizer; 0 = none",
        least=0,
        metavar="X",
    )
    permutations: int = setting(100, "random permutations that the regularizer averages over", least=1, metavar="N")


@dataclass(frozen=True)
class EstimationSettings(Group):
    title: ClassVar[str] = "estimation of the gradient"

    estimator: str = setting(
        "backprop",
        "where the gradient comes from. backprop: the reward's own. For any reward, from perturbed samples: hybrid "
        "perturbs the noise and uses the model's Jacobian, hybrid_image perturbs the image instead, zo has no Jacobian",
        basic="backprop; for rewards without a gradient hybrid, hybrid_image or zo",
        choices=("backprop", *ESTIMATORS),
    )
    mu: float = setting(
        0.01, "standard deviation of the perturbations", basic="size of the perturbations", above=0, metavar="X"
    )
    num_samples: int = setting(
        16,
        "q: perturbed samples per iteration and image, over all processes",
        basic="perturbed samples per iteration and image",
        least=1,
        metavar="Q",
    )
    batch_per_device: int = setting(
        4,
        "samples that one process renders at once, at most",
        basic="samples that one process renders at once",
        changeable=True,
        least=1,
        metavar="B",
    )
    antithetic: bool = setting(
        False, "perturb in pairs, z + mu xi and z - mu xi: less variance where the reward is curved"
    )
    backprop_cost: float = setting(
        3.0,
        "what the first process does in addition to its samples, in samples per image; it gets that many fewer",
        changeable=True,
        least=0,
        metavar="SAMPLES",
    )
    max_bad_samples: int = setting(
        10,
        "end the run after this many consecutive samples without a finite reward",
        changeable=True,
        least=1,
        metavar="N",
    )

    def check(self):
        if self.antithetic and self.num_samples % 2:
            raise UserError(f"--antithetic makes pairs; --num_samples is {self.num_samples}, expected an even number")


class NoiseOptimization(Method):
    name, title, prefix = "dno", "Direct Noise Optimization", "SD"
    groups = (Optimization, Regularization, EstimationSettings)
    columns = {"regularizer": "regularizer", "grad_norm": "gradient norm"}

    @classmethod
    def needs_gradient(cls, settings):
        return settings.estimator == "backprop"

    @classmethod
    def shares_work(cls, settings):
        return settings.estimator != "backprop"

    def __init__(self, task):
        super().__init__(task)
        settings = self.settings
        self.split = Split(settings.num_steps, settings.opt_time, settings.eta)
        # The gradient reaches back to the first step whose noise is free. skip_unet needs no network's graph.
        steps = 0 if settings.gradient == "skip_unet" else min(settings.opt_time, settings.num_steps)
        task.plan_graphs(steps, rewards_too=settings.estimator == "backprop")
        self.source = self._source()

    @property
    def num_iterations(self):
        return self.settings.opt_steps

    def describe(self):
        s = self.settings
        noises = f"noises 0..{s.opt_time}" if s.opt_time < s.num_steps else "all noises"
        rule = s.optimizer if s.precondition == "none" else s.precondition
        iterations = f"{s.opt_steps} iteration{'s' * (s.opt_steps > 1)}"
        rows = {
            "optimizing": f"{'x_T' if s.eta == 0 else noises}, {iterations}, {rule}, lr {s.lr:g}, "
            f"gamma {s.gamma:g}, checkpointing {self.task.plan.describe()}"
        }
        if s.estimator != "backprop":
            pairs, size = " in pairs" if s.antithetic else "", self.task.team.size
            processes = f", {size} processes" if size > 1 else ""
            rows["gradient"] = f"{s.estimator}, {s.num_samples} samples{pairs}, mu {s.mu:g}{processes}"
        return rows

    # The start

    def blank(self):
        task = self.task
        noise = torch.zeros(self.settings.num_steps + 1, *task.latent_shape, device=task.device, dtype=task.state_dtype)
        return self._state(noise)

    def start(self):
        """From the given noise, each image's own draw, or the best of several draws."""
        noise = self.task.given_noise()
        if noise is None:
            noise = self.task.draw() if self.settings.best_of == 1 else self.task.draw_best(self.settings.best_of)
        return self._state(noise)

    def _state(self, noise):
        settings = self.settings

        def optimizer(params):
            return make_optimizer(params, settings.optimizer, settings.lr, settings.weight_decay, settings.precondition)

        z, rest = self.split.split(noise)
        return NoiseState(z, rest, optimizer, decays=settings.weight_decay > 0)

    # The loop

    def iterations(self, state):
        settings, task = self.settings, self.task
        while state.step < settings.opt_steps and (rows := state.active):
            step, z, rest = state.step, state.z(rows), state.rest(rows)
            estimate = self.source(z, rest, rows, step)
            if step == 0:
                _require_gradient(estimate, self.source.no_gradient)
            penalties, pull = self._penalize(z, rows, step)
            gradient = estimate.gradient + pull
            found = Iteration(
                rows, estimate.images, estimate.losses, estimate.rewards, self.split.whole(z, rest),
                metrics={
                    "regularizer": penalties,
                    "probability": probability(z, settings.subsample),
                    "probability_min": probability_min(z, settings.subsample),
                    "grad_norm": gradient.transpose(0, 1).flatten(1).norm(dim=1),
                },
                evaluations=task.evaluate(estimate.images, rows),
            )  # fmt: skip
            rewards, norms = (-found.losses).tolist(), found.metrics["grad_norm"].tolist()
            with state.changing():
                for row, (b, reward, norm) in enumerate(zip(rows, rewards, norms)):
                    if math.isfinite(reward) and math.isfinite(norm):
                        state.images[b].update(gradient[:, row], settings.max_grad_norm)
                    else:
                        self._skip(state, b, step, reward, norm)
                state.failed = all(image.bad_steps >= MAX_BAD_STEPS for image in state.images)
            yield found
            if state.failed:
                raise UserError(
                    f"no image had a finite reward and gradient for {MAX_BAD_STEPS} consecutive iterations, the last "
                    f"at iteration {step}; check the objective, lower --lr, or use --precision fp32"
                )

    def _penalize(self, z, rows, step):
        """The penalties (B,), and gamma times their gradient in z (0 where gamma is)."""
        settings = self.settings
        generators = [keyed_generator(PERMUTATIONS, settings.seed + b, step) for b in rows]
        with torch.set_grad_enabled(settings.gamma != 0):
            leaf = z.detach().requires_grad_(settings.gamma != 0)
            penalty = probability_penalty(leaf, generators, settings.subsample, settings.permutations)
        if settings.gamma == 0:
            return penalty, 0
        return penalty.detach(), settings.gamma * torch.autograd.grad(penalty.sum(), leaf)[0]

    def _skip(self, state, b, step, reward, norm):
        image = state.images[b]
        image.bad_steps += 1
        if image.bad_steps == MAX_BAD_STEPS:
            state.stop(b, f"{MAX_BAD_STEPS} consecutive iterations without a finite reward and gradient")
        warnings.warn(
            f"iteration {step}: image {b} has reward {reward:g} and gradient norm {norm:g}; its step is skipped",
            stacklevel=3,
        )

    # The gradient

    def _source(self):
        settings, task = self.settings, self.task
        full = settings.gradient == "full"

        def render(z, rest, rows):
            return task.render(self.split.join(z, rest), rows, through_network=full)

        if settings.estimator == "backprop":
            return LeanerOnDemand(Backpropagation(render, task.losses), task)

        def draw(image, step, index, shape):
            generator = keyed_generator(PERTURBATION, settings.seed + image, step, index)
            return torch.randn(shape, generator=generator)

        source = Estimation(
            render, task.losses_or_nan, settings.estimator,
            mu=settings.mu, num_samples=settings.num_samples, draw=draw, batch_size=settings.batch_per_device,
            antithetic=settings.antithetic, pad=self._half_precision(), team=task.team,
            backprop_cost=settings.backprop_cost, max_bad_samples=settings.max_bad_samples, idle=self._idle(),
        )  # fmt: skip
        # Several processes cannot try again, for the others are past it; zo keeps nothing that could be spared.
        return source if task.team.size > 1 or settings.estimator == "zo" else LeanerOnDemand(source, task)

    def serve(self):
        self.source.serve(self.split.num_free)

    def _half_precision(self):
        return {self.task.dtype, self.task.model.vae.dtype} & {torch.bfloat16, torch.float16} != set()

    def _idle(self):
        """The rows of z that no step of the sampler adds."""
        steps = self.settings.num_steps
        if self.split.only_start:
            return []
        return [
            k for k in range(min(self.settings.opt_time + 1, steps))
            if noise_scale(self.task.schedule, steps - 1 - k, self.settings.eta) == 0
        ]  # fmt: skip


class ImageNoise:
    """The noise of one image.

    z: (N, C, h, w), the parameter of `optimizer`. rest: (M, C, h, w), frozen, but shrunk by weight decay, as the
    official trajectories have it: then it is a parameter too, whose gradient is zero.
    bad_steps: consecutive iterations without a finite reward and gradient.
    """

    def __init__(self, z, rest, make_optimizer, decays):
        self.z, self.rest, self.bad_steps = z.detach().clone().requires_grad_(), rest.detach().clone(), 0
        self.params = [self.z, self.rest] if decays and len(rest) else [self.z]
        self.optimizer = make_optimizer(self.params)

    def update(self, gradient, max_grad_norm):
        """Clip the gradient's norm and take the optimizer's step."""
        self.bad_steps = 0
        for param in self.params:
            param.grad = gradient if param is self.z else torch.zeros_like(param)
        torch.nn.utils.clip_grad_norm_([self.z], max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def pack(self):
        tensors = {"z": self.z.detach(), "rest": self.rest}
        for k, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{n}": v for n, v in moments.items() if isinstance(v, torch.Tensor)}
        return tensors, {"bad_steps": self.bad_steps}

    def unpack(self, tensors, values):
        with torch.no_grad():
            self.z.copy_(tensors["z"])
            self.rest.copy_(tensors["rest"])
        moments = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, k, moment = name.split(".")
                moments.setdefault(int(k), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.bad_steps = values["bad_steps"]


class NoiseState(State):
    """The noises of B images. z: (N, B, C, h, w), rest: (M, B, C, h, w), where to start; they are copied."""

    def __init__(self, z, rest, make_optimizer, decays=False):
        super().__init__(z.shape[1])
        self.images = [ImageNoise(z[:, b], rest[:, b], make_optimizer, decays) for b in range(z.shape[1])]

    def z(self, rows):
        """A copy of the free noises of these images, (N, n, C, h, w)."""
        return torch.stack([self.images[b].z.detach() for b in rows], dim=1)

    def rest(self, rows):
        """Likewise the frozen ones, (M, n, C, h, w)."""
        return torch.stack([self.images[b].rest.detach() for b in rows], dim=1)

    def pack(self):
        tensors, values = super().pack()
        packed = [image.pack() for image in self.images]
        tensors |= {f"{b}.{name}": tensor for b, (each, _) in enumerate(packed) for name, tensor in each.items()}
        return tensors, {**values, "images": [each for _, each in packed]}

    def unpack(self, tensors, values):
        super().unpack(tensors, values)
        for b, image in enumerate(self.images):
            prefix = f"{b}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            image.unpack(own, values["images"][b])

    def retry(self):
        super().retry()
        for image in self.images:
            image.bad_steps = 0


def _require_gradient(estimate, advice):
    if estimate.losses.isfinite().any() and not estimate.gradient.any():
        raise UserError(
            f"the gradient of the objective ({' + '.join(estimate.rewards)}) is zero at the first iteration, so "
            f"nothing can be optimized; {advice}"
        )
