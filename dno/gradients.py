"""Gradient sources: from noise to images, losses and the gradient of the losses in the noise.

A source is called as `source(noise, images)` and returns an `Estimate`; the optimization loop does not know how it came
by its gradient.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """What one evaluation of B images gives.

    images: (B, 3, H, W), nominally in [-1, 1], detached.
    losses: (B,), detached.
    rewards: each objective's unweighted reward by name, (B,).
    gradient: of each image's own loss, (N, B, C, h, w) for the N noises that are optimized.
    """

    images: torch.Tensor
    losses: torch.Tensor
    rewards: dict
    gradient: torch.Tensor


class Backpropagation:
    """The true gradient, through reward, decoder and every sampling step.

    render: a sequence of T + 1 noises (B, C, h, w) and the indices of the images -> images (B, 3, H, W).
    loss: (images, indices) -> (losses (B,), rewards by name).
    free: slice of the noises that are optimized; the others get no gradient, and no work is done for it.
    """

    def __init__(self, render, loss, free):
        self.render, self.loss, self.free = render, loss, free

    def __call__(self, noise, images):
        """noise: (T + 1, B, C, h, w); images: the B indices of the images in the batch that it is for."""
        noises = list(noise.detach().unbind())
        leaves = [z.requires_grad_() for z in noises[self.free]]
        pixels = self.render(noises, images)
        losses, rewards = self.loss(pixels, images)
        # The losses are summed, never averaged, so each image gets the gradient that it would get alone; one that is
        # not finite is left out of the sum, where it could only do harm.
        total = torch.where(losses.isfinite(), losses, 0).sum()
        gradient = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return Estimate(pixels.detach(), losses.detach(), rewards, torch.stack(gradient))
