"""Gradient sources: from noise to images, losses and the gradient of the losses in the noise.

A source is called as `source(z, rest, rows, step)` and returns an `Estimate`; the loop does not know how it came by its
gradient. z: (N, B, C, h, w), the noises that are optimized. rest: (M, B, C, h, w), the frozen ones, which `render` puts
z into. rows: the B indices of the images in the batch. step: the iteration, which keys random draws.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """What one evaluation of B images gives.

    images: (B, 3, H, W), nominally in [-1, 1], detached.
    losses: (B,), detached.
    rewards: each objective's unweighted reward by name, (B,).
    gradient: of each image's own loss in its z, (N, B, C, h, w).
    """

    images: torch.Tensor
    losses: torch.Tensor
    rewards: dict
    gradient: torch.Tensor


class Backpropagation:
    """The true gradient, through reward, decoder and every sampling step.

    render: (z, rest, rows) -> images (B, 3, H, W). loss: (images, rows) -> (losses (B,), rewards by name).
    """

    no_gradient = "use --estimator hybrid for rewards without a gradient"

    def __init__(self, render, loss):
        self.render, self.loss = render, loss

    def __call__(self, z, rest, rows, step=0):
        # The caller may have switched gradients off, as notebooks do.
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            images = self.render(leaf, rest, rows)
            losses, rewards = self.loss(images, rows)
            # The losses are summed, never averaged, so each image gets the gradient that it would get alone; one that
            # is not finite is left out of the sum, where it could only do harm.
            gradient = pull_back(leaf, torch.where(losses.isfinite(), losses, 0).sum())
        return Estimate(images.detach(), losses.detach(), rewards, gradient)


def pull_back(leaf, result, direction=None):
    """The gradient of `result`, or of its product with `direction`, in the leaf: zeros where there is no path."""
    (gradient,) = torch.autograd.grad(result, leaf, direction, allow_unused=True, materialize_grads=True)
    return gradient
