"""Optimizers of the noise: torch's own, or steps along a preconditioned gradient."""

import torch


def spectral(gradient):
    """Whiten the spatial spectrum of a gradient, map by map.

        G = FFT2(g),   direction = IFFT2(G / (|G| + 0.1 rms |G|))

    The gradient that comes out of a diffusion sampler is strongest at the lowest frequencies, while white noise has the
    same power at all of them; this gives every frequency a say. Related to arXiv 2602.08646.

    gradient: (..., h, w); each (h, w) map is whitened separately. A map that is zero stays zero.
    """
    spectrum = torch.fft.rfft2(gradient)
    amplitude = spectrum.abs()
    # Over the whole plane, so the half of the spectrum that rfft2 leaves out is counted too (Parseval).
    rms = gradient.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    whitened = spectrum / (amplitude + 0.1 * rms).clamp(min=torch.finfo(gradient.dtype).tiny)
    return torch.fft.irfft2(whitened, s=gradient.shape[-2:])


# A preconditioner maps a gradient (..., h, w) to a direction of the same shape.
PRECONDITIONERS = {"none": None, "spectral": spectral}


class NormPreservingDescent(torch.optim.Optimizer):
    """Steps along a preconditioned gradient that keep the rms of each map.

        d = precondition(g) scaled to rms 1,   z <- z - lr rms(z) d, scaled back to rms(z)

    Each (h, w) map of a parameter (..., h, w) takes its own step, of relative size lr whatever the gradient's size. A
    map without a gradient, or that is zero, stays as it is.

    So a map that the image does not depend on (the noise of a last step that adds none) moves by lr whenever the
    regularizer's gradient in it is not zero, however small gamma is. The image is not affected. The same happens with
    AdamW, whose steps do not depend on the gradient's size either.
    """

    def __init__(self, params, lr, precondition):
        super().__init__(params, {"lr": lr})
        self.precondition = precondition

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for z in group["params"]:
                direction = self.precondition(z.grad)
                size = _rms(direction)
                moved = z - group["lr"] * _rms(z) * direction / size
                scale = _rms(z) / _rms(moved).clamp(min=torch.finfo(z.dtype).tiny)
                z.copy_(torch.where(size > 0, moved * scale, z))


def _rms(maps):
    return maps.square().mean(dim=(-2, -1), keepdim=True).sqrt()


def make_optimizer(params, name="adamw", lr=0.01, weight_decay=0.0, precondition="none"):
    """The optimizer of a list of noises.

    name: "adamw" (betas 0.9 and 0.999) or "sgd" (Nesterov momentum 0.9). A preconditioner takes its own step of
    relative size lr instead, and neither momentum nor weight decay.
    """
    if PRECONDITIONERS[precondition] is not None:
        return NormPreservingDescent(params, lr, PRECONDITIONERS[precondition])
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


OPTIMIZERS = ("adamw", "sgd")
