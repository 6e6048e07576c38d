import pytest
import torch

from dno.methods.optimizers import NormPreservingDescent, make_optimizer, spectral


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x):
    return x.square().mean(dim=(-2, -1))


def test_spectral_is_its_formula():
    gradient = maps(3, 2, 8, 6)
    spectrum = torch.fft.fft2(gradient)
    amplitude = spectrum.abs()
    floor = 0.1 * amplitude.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    torch.testing.assert_close(spectral(gradient), torch.fft.ifft2(spectrum / (amplitude + floor)).real)


def test_spectral_gives_every_frequency_a_say():
    """A gradient that is all constant but for a faint checkerboard comes out with both alike."""
    checkerboard = torch.ones(8, 8, dtype=torch.float64)
    checkerboard[::2, ::2] = checkerboard[1::2, 1::2] = -1
    direction = spectral(100 + 50 * checkerboard)
    constant, alternating = direction.mean(), (direction * checkerboard).mean()
    assert alternating / constant == pytest.approx(0.9, abs=0.1)


def test_spectral_ignores_scale_and_leaves_zero_alone():
    gradient = maps(2, 8, 8)
    torch.testing.assert_close(spectral(1e-4 * gradient), spectral(gradient))
    assert not spectral(torch.zeros(2, 8, 8)).any()


def test_norm_preserving_step():
    z = maps(2, 3, 8, 8).requires_grad_()
    before = z.detach().clone()
    z.grad = maps(2, 3, 8, 8, seed=1)
    z.grad[0, 1] = 0
    NormPreservingDescent([z], lr=0.02, precondition=lambda g: g).step()
    torch.testing.assert_close(rms(z), rms(before))
    assert torch.equal(z[0, 1], before[0, 1]), "a map without a gradient stays"
    direction = z.grad[1, 2] / rms(z.grad[1, 2]).sqrt()
    expected = before[1, 2] - 0.02 * rms(before[1, 2]).sqrt() * direction
    expected *= (rms(before[1, 2]) / rms(expected)).sqrt()
    torch.testing.assert_close(z[1, 2].detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_that_is_zero_stays_zero_and_the_others_move(dtype):
    z = maps(2, 8, 8).to(dtype)
    z[0] = 0
    z.requires_grad_().grad = maps(2, 8, 8, seed=1).to(dtype)
    before = z.detach().clone()
    NormPreservingDescent([z], lr=0.02, precondition=spectral).step()
    assert torch.equal(z[0], before[0]) and not torch.equal(z[1], before[1]) and z.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_every_map_with_a_gradient_moves_by_lr_whatever_the_gradients_size(scale):
    """So does one that the regularizer alone gives a gradient; see the docstring."""
    z = maps(1, 8, 8).requires_grad_()
    before = z.detach().clone()
    z.grad = scale * maps(1, 8, 8, seed=1)
    NormPreservingDescent([z], lr=0.02, precondition=spectral).step()
    assert (rms(z.detach() - before) / rms(before)).sqrt().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("precondition", ["none", "spectral"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_optimizer_descends(name, precondition):
    target = maps(1, 8, 8, seed=5)
    z = maps(1, 8, 8).requires_grad_()
    optimizer = make_optimizer([z], name, lr=0.01, precondition=precondition)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -(z * target).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))


def test_first_steps_by_hand():
    z = torch.ones(1, 2, 2).requires_grad_()
    z.grad = torch.full((1, 2, 2), 3.0)
    make_optimizer([z], "adamw", lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(z.detach(), torch.full((1, 2, 2), 1 - 0.1 * 0.5 - 0.1))
    z = torch.ones(1, 2, 2).requires_grad_()
    z.grad = torch.full((1, 2, 2), 3.0)
    make_optimizer([z], "sgd", lr=0.1).step()
    torch.testing.assert_close(z.detach(), torch.full((1, 2, 2), 1 - 0.1 * 3.0 * 1.9))  # Nesterov looks ahead
