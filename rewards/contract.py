"""The contract of rewards, as far as it can be checked on any of them."""

import torch


def is_differentiable(factory, loss_fn=None, prompt="", device=None):
    """Whether a gradient flows from the losses of `factory` to its images.

    The factory's attribute `differentiable` decides. A factory without one is tried on one random image; a gradient
    that is missing or zero everywhere counts as none.

    loss_fn: what the factory returned; None = call it here.
    """
    declared = getattr(factory, "differentiable", None)
    if declared is not None:
        return declared
    loss_fn = loss_fn or factory(device=device)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    images = noise.to(device).requires_grad_(True)
    with torch.enable_grad():
        loss = loss_fn(images, [prompt])
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(loss.sum(), images, allow_unused=True)
    return gradient is not None and bool(gradient.any())
