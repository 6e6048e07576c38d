"""The optimization loop: every image has its own noise, optimizer, best and stop rules; one batch evaluates them."""

import math
import time
import warnings
from dataclasses import dataclass, field

import torch

from dno.errors import UserError
from dno.regularization import probability, probability_min
from dno.runs.signals import signals_wait

# Iterations in a row without a finite reward and gradient after which an image is given up.
MAX_BAD_STEPS = 3


@dataclass(frozen=True)
class StopRules:
    """When an image is done before its last iteration; None switches a rule off.

    target_reward: at this reward or above.
    patience: after this many iterations without a new best.
    min_probability: at P(z) below this; that iteration no longer counts for the best.
    max_seconds: for the whole loop.
    """

    target_reward: float | None = None
    patience: int | None = None
    min_probability: float | None = None
    max_seconds: float | None = None


@dataclass
class ImageState:
    """One image of a batch while it is optimized.

    noise: (T + 1, C, h, w), the parameter of `optimizer`.
    last: the newest metrics, by name; an image that has stopped keeps its last ones.
    best_*: of the best iteration so far: reward, step, image (3, H, W), noise.
    stopped: why the image is done, None while it is not.
    """

    noise: torch.Tensor
    optimizer: torch.optim.Optimizer
    last: dict = field(default_factory=dict)
    best_reward: float = -math.inf
    best_step: int | None = None
    best_image: torch.Tensor | None = None
    best_noise: torch.Tensor | None = None
    bad_steps: int = 0
    stopped: str | None = None

    def pack(self):
        """(tensors by name, the rest as plain values): all but the best image, which its noise gives."""
        tensors = {"noise": self.noise.detach(), "best_noise": self.best_noise}
        moments = self.optimizer.state_dict()["state"].get(0, {})
        tensors |= {f"optimizer.{name}": value for name, value in moments.items() if isinstance(value, torch.Tensor)}
        names = ("last", "best_reward", "best_step", "bad_steps", "stopped")
        tensors = {name: value for name, value in tensors.items() if value is not None}
        return tensors, {name: getattr(self, name) for name in names}

    def unpack(self, tensors, values):
        """Take back what `pack` gave."""
        with torch.no_grad():
            self.noise.copy_(tensors["noise"])
        moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
        if "best_noise" in tensors:
            self.best_noise = tensors["best_noise"].to(self.noise.device)
        for name, value in values.items():
            setattr(self, name, value)

    def observe(self, step, image, rules):
        """Keep the best, and stop where a rule says so. `last` holds the metrics of this step."""
        reward, p = self.last["reward"], self.last["probability"]
        if rules.min_probability is not None and p < rules.min_probability:
            self.stopped = f"P(z) {p:.2g} fell below {rules.min_probability:g}"
        elif math.isfinite(reward) and reward > self.best_reward:
            self.best_reward, self.best_step = reward, step
            self.best_image, self.best_noise = image.clone(), self.noise.detach().clone()
        if not self.stopped and rules.target_reward is not None and self.best_reward >= rules.target_reward:
            self.stopped = f"reward {self.best_reward:.4g} reached the target {rules.target_reward:g}"
        if not self.stopped and rules.patience is not None and step - (self.best_step or 0) >= rules.patience:
            self.stopped = f"no better reward in {rules.patience} iterations"

    def update(self, gradient, max_grad_norm):
        """Clip the gradient's norm and take the optimizer's step, and say so; not where anything is not finite."""
        norm = self.last["grad_norm"]
        if not (math.isfinite(self.last["reward"]) and math.isfinite(norm)):
            self.bad_steps += 1
            if self.bad_steps == MAX_BAD_STEPS:
                self.stopped = f"{MAX_BAD_STEPS} iterations in a row without a finite reward and gradient"
            return False
        self.bad_steps = 0
        self.noise.grad = gradient
        torch.nn.utils.clip_grad_norm_([self.noise], max_grad_norm)
        self.optimizer.step()
        self.noise.grad = None
        return True


def begin(noise, make_optimizer):
    """The states of B images before the first iteration.

    noise: (T + 1, B, C, h, w), where to start; it is copied. make_optimizer: list of parameters -> optimizer.
    """
    leaves = [z.detach().clone().requires_grad_() for z in noise.unbind(1)]
    return [ImageState(z, make_optimizer([z])) for z in leaves]


def optimize_noise(
    source, states, free, regularizer, *, gamma=0.0, opt_steps=100, max_grad_norm=1.0, rules=StopRules(), subsample=1,
    evaluate=None, moving=None, report=None, first_step=0, seconds=0.0,
):  # fmt: skip
    """Climb the reward: minimize loss + gamma * regularizer over the noise of every state.

    source: (noise (T + 1, B, C, h, w), images, step) -> `Estimate`; `images` are the indices of the B images in the
        batch. Its `no_gradient` says what to do where there is none.
    states: one `ImageState` an image, as `begin` or a checkpoint gives them; they are moved.
    free: slice of the noises that are optimized and regularized, out of the T + 1.
    regularizer: (noise[free], images, step) -> penalties (B,).
    evaluate: images (B, 3, H, W), indices -> rewards by name, (B,) each, which are recorded and not optimized.
    moving: called before the states of an iteration change.
    report: called with (step, indices, images, seconds) when iteration `step` is done: `states` are as the next one
        will find them. Signals wait for its end, so a stop falls between two iterations.
    first_step, seconds: iterations and time that a resumed run has behind it.

    Step i measures the noise before its i-th update, so step 0 is the image without alignment.
    Raises UserError where the objective gives no gradient at step 0, or no image has a finite reward any more.
    """
    start = time.perf_counter() - seconds
    for step in range(first_step, opt_steps):
        began = time.perf_counter()
        active = [b for b, state in enumerate(states) if state.stopped is None]
        if not active:
            break
        batch = torch.stack([states[b].noise.detach() for b in active], dim=1)

        estimate = source(batch, active, step)
        if step == 0:
            _require_gradient(estimate, source.no_gradient)
        penalties, penalty_gradient = _penalize(regularizer, batch[free], active, step, gamma)
        gradient = torch.zeros_like(batch)
        gradient[free] = estimate.gradient
        gradient[free] += penalty_gradient
        evaluations = evaluate(estimate.images, active) if evaluate else {}
        measured = _measure(estimate, penalties, gradient, evaluations, batch[free], subsample)

        with signals_wait():
            if moving:
                moving()
            for row, b in enumerate(active):
                states[b].last = measured[row]
                states[b].observe(step, estimate.images[row], rules)
                if not states[b].update(gradient[:, row], max_grad_norm):
                    _warn_of_skipped_step(step, b, states[b])
            if rules.max_seconds is not None and time.perf_counter() - start >= rules.max_seconds:
                for state in states:
                    state.stopped = state.stopped or f"{rules.max_seconds:g} seconds are over"
            if report:
                report(step, active, estimate.images, time.perf_counter() - began)
        if all(state.bad_steps >= MAX_BAD_STEPS for state in states):
            raise UserError(
                f"no image had a finite reward and gradient for {MAX_BAD_STEPS} iterations in a row, the last at "
                f"iteration {step}; check the objective, lower --lr, or use --precision fp32"
            )


def _penalize(regularizer, noise, images, step, gamma):
    """The penalties (B,) and gamma times their gradient in the noise (0 where gamma is)."""
    noise = noise.detach().requires_grad_(gamma != 0)
    with torch.set_grad_enabled(gamma != 0):
        penalty = regularizer(noise, images, step)
    if gamma == 0:
        return penalty, 0
    return penalty.detach(), gamma * torch.autograd.grad(penalty.sum(), noise)[0]


@torch.no_grad()
def _measure(estimate, penalties, gradient, evaluations, noise, subsample):
    """The metrics of each image of the batch, by name; objectives and evaluations in tables of their own."""
    columns = {
        "reward": -estimate.losses,
        "regularizer": penalties,
        "probability": probability(noise, subsample),
        "probability_min": probability_min(noise, subsample),
        "grad_norm": gradient.transpose(0, 1).flatten(1).norm(dim=1),
    }
    columns, objectives, evaluations = (
        {name: values.tolist() for name, values in table.items()} for table in (columns, estimate.rewards, evaluations)
    )
    return [
        {
            **{name: values[row] for name, values in columns.items()},
            "objectives": {name: values[row] for name, values in objectives.items()},
            "evaluations": {name: values[row] for name, values in evaluations.items()},
        }
        for row in range(len(penalties))
    ]


def _require_gradient(estimate, advice):
    if estimate.losses.isfinite().any() and not estimate.gradient.any():
        raise UserError(
            f"the gradient of the objective ({' + '.join(estimate.rewards)}) is zero at the first iteration, so "
            f"nothing can be optimized; {advice}"
        )


def _warn_of_skipped_step(step, b, state):
    warnings.warn(
        f"iteration {step}: image {b} has reward {state.last['reward']:g} and gradient norm "
        f"{state.last['grad_norm']:g}; its step is skipped",
        stacklevel=3,
    )
