"""The sampler as a differentiable map from noise to latents.

Symbols: x is the noisy latents, x0 and eps the denoiser's predictions of the clean latents and of the noise in them,
z the fresh noise of a step, (alpha, sigma) the levels in x = alpha * x0 + sigma * eps, T the number of steps.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Schedule:
    """The points that the sampler visits, noisiest first.

    timesteps: (T,), what the denoiser is told at each step.
    alpha, sigma: (T + 1,), float64; the last entry is the end point.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def from_alphas_cumprod(cls, timesteps, alphas_cumprod, ends_clean=False):
        """DDIM's variance-preserving schedule: alpha^2 = alpha_bar(t), sigma^2 = 1 - alpha^2.

        ends_clean: the end point is alpha = 1, sigma = 0, so that the last step gives x0; else that of timestep 0.
        """
        alphas_cumprod = alphas_cumprod.double()
        end = torch.ones_like(alphas_cumprod[:1]) if ends_clean else alphas_cumprod[:1]
        alpha_bar = torch.cat([alphas_cumprod[timesteps], end])
        return cls(timesteps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @property
    def num_steps(self):
        return len(self.timesteps)

    def stands_still(self, i):
        """Whether step i ends where it began: the last one does when the last timestep already is the end point."""
        same = self.alpha[i] == self.alpha[i + 1] and self.sigma[i] == self.sigma[i + 1]
        return i == self.num_steps - 1 and bool(same)


def noise_scale(schedule, i, eta):
    """The standard deviation s of the noise that enters at step i.

        s = eta * (sigma'/sigma) * sqrt(sigma^2 - (alpha * sigma'/alpha')^2),  and 0 at the last step

    eta: 0 = the deterministic ODE, 1 = DDPM's variance. Raises ValueError outside [0, 1].
    Source: DDIM (Song et al. 2021, arXiv 2010.02502), section 4.1, written for any (alpha, sigma).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number from 0 (deterministic) to 1 (DDPM's variance)")
    if eta == 0 or i == schedule.num_steps - 1:
        return 0.0
    alpha, alpha_next = schedule.alpha[i : i + 2].tolist()
    sigma, sigma_next = schedule.sigma[i : i + 2].tolist()
    # Two equal neighbouring levels can leave a tiny negative radicand.
    return eta * (sigma_next / sigma) * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))


def step(x0, eps, z, schedule, i, eta):
    """One step of the sampler, from schedule point i to i + 1.

        x' = alpha' * x0 + sqrt(sigma'^2 - s^2) * eps + s * z

    x0, eps: the predicted clean latents and noise, (B, C, h, w).
    z: standard normal, the same shape; unused where s = 0.
    With alpha^2 + sigma^2 = 1 this is DDIM; with alpha = 1 Euler-ancestral; with alpha = 1 - sigma and eta = 0 flow
    matching's Euler step. Source: DDIM (Song et al. 2021), section 4.1.
    """
    s = noise_scale(schedule, i, eta)
    alpha, sigma = schedule.alpha[i + 1].item(), schedule.sigma[i + 1].item()
    x = alpha * x0 + math.sqrt(max(sigma**2 - s**2, 0)) * eps
    return x + s * z if s > 0 else x


def sample(denoise, noise, schedule, eta=1.0, recompute=True):
    """Run the sampler: latents (B, C, h, w) as a function of all the noise.

    denoise: (x, timestep) -> (x0, eps).
    noise: T + 1 tensors (B, C, h, w), a sequence or one stacked tensor: noise[T] is where sampling starts, step i uses
        noise[T - 1 - i], and noise[0] (the last step's) has no effect. Gradient flows to those that require it, and
        no graph is built for the steps before the first of them.
    recompute: how many steps, from the first, keep their latents only and are rebuilt in the backward pass, one
        step's graph at a time; the others keep their graphs, and are the first that backward uses and frees. True is
        all, so that memory grows with T by the latents alone; False is none. The gradient is the same.
    """
    x, *z = reversed(noise.unbind() if isinstance(noise, torch.Tensor) else noise)
    if len(z) != schedule.num_steps:
        raise ValueError(f"{len(z) + 1} noises for {schedule.num_steps} steps; expected {schedule.num_steps + 1}")
    first_kept = 0
    if recompute and torch.is_grad_enabled():
        first_kept = len(z) if recompute is True else min(recompute, len(z))
        x = _Recomputed.apply(denoise, schedule, eta, x, *z[:first_kept])
    for i in range(first_kept, schedule.num_steps):
        x = _advance(denoise, x, z[i], schedule, i, eta)
    return x


def _advance(denoise, x, z, schedule, i, eta):
    if schedule.stands_still(i):
        return x
    x0, eps = denoise(x, schedule.timesteps[i])
    return step(x0, eps, z, schedule, i, eta)


class _Recomputed(torch.autograd.Function):
    """The first len(z) steps of `sample` with a backward of their own: no graph in the forward pass, then one step's
    graph at a time.

    torch.utils.checkpoint would do the same with more bookkeeping a step, and re-entrant it loses the gradient of a
    denoiser that returns a dataclass.
    """

    @staticmethod
    def forward(ctx, denoise, schedule, eta, x, *z):
        ctx.denoise, ctx.schedule, ctx.eta = denoise, schedule, eta
        # Steps before the first noise that wants a gradient are never differentiated, so nothing is kept of them.
        wanted = [ctx.needs_input_grad[3] or needs for needs in ctx.needs_input_grad[4:]]
        ctx.first = wanted.index(True) if True in wanted else len(z)
        visited = []
        for i in range(len(z)):
            if i >= ctx.first:
                visited.append(x)
            x = _advance(denoise, x, z[i], schedule, i, eta)
        ctx.save_for_backward(*visited)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        visited = ctx.saved_tensors
        grads = [None] * (len(ctx.needs_input_grad) - 4)
        for i in reversed(range(ctx.first, len(grads))):
            if ctx.needs_input_grad[4 + i]:
                grads[i] = noise_scale(ctx.schedule, i, ctx.eta) * grad
            if i == ctx.first and not ctx.needs_input_grad[3]:
                break  # x here depends on nothing that wants a gradient
            with torch.enable_grad():
                x = visited[i - ctx.first].detach().requires_grad_()
                # z enters linearly, so it is left out here: its gradient is the line above.
                x_next = _advance(ctx.denoise, x, torch.zeros_like(x), ctx.schedule, i, ctx.eta)
                (grad,) = torch.autograd.grad(x_next, x, grad)
        return None, None, None, grad if ctx.needs_input_grad[3] else None, *grads
