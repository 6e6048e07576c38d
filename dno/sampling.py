"""The sampler as a differentiable map from noise to latents.

Symbols: x is the noisy latents, x0 and eps the denoiser's predictions of the clean latents and of the noise in them,
z the fresh noise of a step, (alpha, sigma) the levels in x = alpha * x0 + sigma * eps, T the number of steps.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

RULES = ("ddpm", "renoise", "tcd")


@dataclass(frozen=True)
class Point:
    """A noise level: x = alpha * x0 + sigma * eps, and the timestep by which the network knows it.

    timestep, alpha, sigma: numbers, or tensors (B,), one level per row.
    """

    timestep: int | float | torch.Tensor
    alpha: float | torch.Tensor
    sigma: float | torch.Tensor

    def doubled(self):
        """The point of twice the rows, as guidance evaluates them in one batch."""
        levels = (self.timestep, self.alpha, self.sigma)
        return Point(*(torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.dim() else v for v in levels))

    def levels(self, x):
        """(alpha, sigma) to multiply x with: numbers as they are, tensors as (B, 1, 1, 1) in the dtype of x."""

        def broadcast(level):
            return level.to(x).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(level, torch.Tensor) else level

        return broadcast(self.alpha), broadcast(self.sigma)


@dataclass(frozen=True)
class Schedule:
    """The points that the sampler visits, noisiest first: `schedule[i]` is the `Point` of step i.

    timesteps: (T,), what the denoiser is told at each step.
    alpha, sigma: (T + 1,), float64; the last entry is the end point.
    rule: how fresh noise enters a step, one of `RULES` (see `noise_scale`). Raises ValueError for another.
    trained_alpha: alpha at each integer timestep that the model was trained at, which the rule tcd looks up.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    rule: str = "ddpm"
    trained_alpha: torch.Tensor | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"the rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if self.rule == "tcd" and self.trained_alpha is None:
            raise ValueError("the rule tcd needs trained_alpha, the model's alpha at each timestep")

    @classmethod
    def from_alphas_cumprod(cls, timesteps, alphas_cumprod, ends_clean=False, rule="ddpm"):
        """DDIM's variance-preserving schedule: alpha^2 = alpha_bar(t), sigma^2 = 1 - alpha^2.

        ends_clean: the end point is alpha = 1, sigma = 0, so that the last step gives x0; else that of timestep 0.
        """
        alphas_cumprod = alphas_cumprod.double()
        end = torch.ones_like(alphas_cumprod[:1]) if ends_clean else alphas_cumprod[:1]
        alpha_bar = torch.cat([alphas_cumprod[timesteps], end])
        return cls(timesteps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), rule, alphas_cumprod.sqrt())

    @property
    def num_steps(self):
        return len(self.timesteps)

    @property
    def start_scale(self):
        """The size of the start: 1, or with variance-exploding levels (alpha = 1) the first sigma.

        Source: Karras et al. 2022 (arXiv 2206.00364), Algorithm 2.
        """
        return self.sigma[0].item() if self.alpha[0] == 1 else 1

    def __len__(self):
        return self.num_steps

    def __getitem__(self, i):
        timestep = self.timesteps[i].item()
        timestep = int(timestep) if timestep == int(timestep) else timestep
        return Point(timestep, self.alpha[:-1][i].item(), self.sigma[:-1][i].item())

    def stands_still(self, i):
        """Whether step i ends where it began: the last one does when the last timestep already is the end point."""
        same = self.alpha[i] == self.alpha[i + 1] and self.sigma[i] == self.sigma[i + 1]
        return i == self.num_steps - 1 and bool(same)


def noise_scale(schedule, i, eta):
    """The standard deviation s of the noise that enters at step i, by the schedule's rule; 0 at the last step.

        ddpm:     s = eta * (sigma'/sigma) * sqrt(sigma^2 - (alpha * sigma'/alpha')^2)
        renoise:  s = eta * sigma'
        tcd:      s = sqrt(1 - (alpha'/alpha_r)^2), with alpha_r the level of timestep r = floor((1 - eta) * t')

    eta: 0 = the deterministic ODE, by every rule; 1 = DDPM's variance by ddpm, which keeps the marginals, and all noise
        drawn anew by the other two, which are for consistency models. Raises ValueError outside [0, 1].
    Source: ddpm is DDIM (Song et al. 2021, arXiv 2010.02502), section 4.1, written for any (alpha, sigma); renoise is
    multistep consistency sampling (Song et al. 2023, arXiv 2303.01469); tcd is Trajectory Consistency Distillation's
    strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159), whose gamma is eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number from 0 (deterministic) to 1 (DDPM's variance)")
    if eta == 0 or i == schedule.num_steps - 1:
        return 0.0
    alpha, alpha_next = schedule.alpha[i : i + 2].tolist()
    sigma, sigma_next = schedule.sigma[i : i + 2].tolist()
    if schedule.rule == "renoise":
        return eta * sigma_next
    if schedule.rule == "tcd":
        # The small number is for products such as 0.7 * 90, which rounding brings below the integer that they are.
        cleaner = math.floor((1 - eta) * schedule[i + 1].timestep + 1e-6)
        return math.sqrt(max(1 - (alpha_next / schedule.trained_alpha[cleaner].item()) ** 2, 0))
    # Two equal neighbouring levels can leave a tiny negative radicand.
    return eta * (sigma_next / sigma) * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))


def step(x0, eps, z, schedule, i, eta):
    """One step of the sampler, from schedule point i to i + 1.

        x' = alpha' * x0 + sqrt(sigma'^2 - s^2) * eps + s * z

    x0, eps: the predicted clean latents and noise, (B, C, h, w).
    z: standard normal, the same shape; unused if s = 0.
    With alpha^2 + sigma^2 = 1 this is DDIM; with alpha = 1 Euler-ancestral; with alpha = 1 - sigma and eta = 0 flow
    matching's Euler step. Source: DDIM (Song et al. 2021), section 4.1.
    """
    s = noise_scale(schedule, i, eta)
    alpha, sigma = schedule.alpha[i + 1].item(), schedule.sigma[i + 1].item()
    x = alpha * x0 + math.sqrt(max(sigma**2 - s**2, 0)) * eps
    return x + s * z if s > 0 else x


def sample(denoise, noise, schedule, eta=1.0, recompute=True):
    """Run the sampler: latents (B, C, h, w) as a function of all the noise.

    denoise: (x, point) -> (x0, eps).
    noise: T + 1 tensors (B, C, h, w), a sequence or one stacked tensor: sampling starts at noise[T], times the
        schedule's `start_scale`, step i uses noise[T - 1 - i], and noise[0] (the last step's) has no effect. With eta 0
        the start alone will do. Gradient flows to those that require it, and no graph is built for the steps before the
        first of them; and it flows to whatever inside `denoise` requires it, such as the weights of the network.
    recompute: the number of steps, from the first, that keep their latents only and are rebuilt in the backward pass,
        one step's graph at a time; the others keep their graphs, and are the first that backward uses and frees. True
        is all, so that memory grows with T by the latents alone; False is none. The gradient is the same.
    """
    x, *z = reversed(noise.unbind() if isinstance(noise, torch.Tensor) else noise)
    if eta == 0 and not z:
        z = [x.new_zeros(()).expand_as(x)] * schedule.num_steps
    if len(z) != schedule.num_steps:
        raise ValueError(f"{len(z) + 1} noises for {schedule.num_steps} steps; expected {schedule.num_steps + 1}")
    if recompute < 0:
        raise ValueError(f"recompute is {recompute}; expected True, False or a number of steps")
    if schedule.start_scale != 1:
        x = schedule.start_scale * x
    recomputed = first = 0
    if recompute and torch.is_grad_enabled():
        recomputed = len(z) if recompute is True else min(recompute, len(z))
        visited = _steps_of_noise_alone(denoise, x, z[:recomputed], schedule, eta)
        first = len(visited) - 1
        x = _Recomputed.apply(denoise, schedule, eta, visited, x, *z[:first])
    for i in range(first, schedule.num_steps):
        if i < recomputed:
            x = checkpoint(_advance, denoise, x, z[i], schedule, i, eta, use_reentrant=False)
        else:
            x = _advance(denoise, x, z[i], schedule, i, eta)
    return x


def _advance(denoise, x, z, schedule, i, eta):
    if schedule.stands_still(i):
        return x
    x0, eps = denoise(x, schedule[i])
    return step(x0, eps, z, schedule, i, eta)


def _steps_of_noise_alone(denoise, x, z, schedule, eta):
    """The latents at the start and after each step, up to the first step inside which something wants a gradient.

    Such a step shows itself: its input is detached, and its output requires a gradient. It is left to be run again.
    """
    visited = [x.detach()]
    for i in range(len(z)):
        x = _advance(denoise, visited[-1], z[i].detach(), schedule, i, eta)
        if x.requires_grad:
            break
        visited.append(x)
    return visited


class _Recomputed(torch.autograd.Function):
    """The first len(z) steps of `sample`, already run: visited[i] are the latents before step i, and the last ones the
    result. Backward, one step's graph is built at a time, and differentiated in its latents and its z alone.

    torch.utils.checkpoint does the same for anything inside a step that wants a gradient, with more bookkeeping.
    """

    @staticmethod
    def forward(ctx, denoise, schedule, eta, visited, x, *z):
        ctx.denoise, ctx.schedule, ctx.eta = denoise, schedule, eta
        # Steps before the first noise that wants a gradient are never differentiated, so nothing is kept of them.
        wanted = [ctx.needs_input_grad[4] or needs for needs in ctx.needs_input_grad[5:]]
        ctx.first = wanted.index(True) if True in wanted else len(z)
        ctx.save_for_backward(*visited[ctx.first : -1])
        return visited[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        visited = ctx.saved_tensors
        grads = [None] * (len(ctx.needs_input_grad) - 5)
        for i in reversed(range(ctx.first, len(grads))):
            if ctx.needs_input_grad[5 + i]:
                grads[i] = noise_scale(ctx.schedule, i, ctx.eta) * grad
            if i == ctx.first and not ctx.needs_input_grad[4]:
                break  # x here depends on nothing that wants a gradient
            with torch.enable_grad():
                x = visited[i - ctx.first].detach().requires_grad_()
                # z enters linearly, so it is left out here: its gradient is the line above.
                x_next = _advance(ctx.denoise, x, torch.zeros_like(x), ctx.schedule, i, ctx.eta)
                if x_next.requires_grad:
                    (grad,) = torch.autograd.grad(x_next, x, grad)
                else:  # the denoiser cut its graph
                    grad = torch.zeros_like(grad)
        return None, None, None, None, grad if ctx.needs_input_grad[4] else None, *grads
