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

    no_gradient = "use --estimator hybrid for rewards without a gradient"

    def __init__(self, render, loss, free):
        self.render, self.loss, self.free = render, loss, free

    def __call__(self, noise, images, step=0):
        """noise: (T + 1, B, C, h, w); images: the B indices of the images in the batch that it is for."""
        leaves, pixels = with_graph(self.render, noise, images, self.free)
        losses, rewards = self.loss(pixels, images)
        # The losses are summed, never averaged, so each image gets the gradient that it would get alone; one that is
        # not finite is left out of the sum, where it could only do harm.
        gradient = pull_back(leaves, torch.where(losses.isfinite(), losses, 0).sum())
        return Estimate(pixels.detach(), losses.detach(), rewards, gradient)


def with_graph(render, noise, images, free):
    """Render: (the free noises as leaves of the graph, the images (B, 3, H, W))."""
    noises = list(noise.detach().unbind())
    leaves = [z.requires_grad_() for z in noises[free]]
    return leaves, render(noises, images)


def pull_back(leaves, result, direction=None):
    """The gradient of `result`, or of its product with `direction`, in the leaves: (N, B, C, h, w)."""
    gradient = torch.autograd.grad(result, leaves, direction, allow_unused=True, materialize_grads=True)
    return torch.stack(gradient)
