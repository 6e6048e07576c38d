import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, TCDScheduler

from dno.noise import draw_noise, keyed_generator
from dno.sampling import Point, Schedule, noise_scale, sample, step

CONFIG = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
SHAPE = (2, 3, 4, 4)


def ddim(num_steps, ends_clean=False, **config):
    scheduler = DDIMScheduler(**{**CONFIG, **config})
    scheduler.set_timesteps(num_steps)
    return scheduler, Schedule.from_alphas_cumprod(scheduler.timesteps, scheduler.alphas_cumprod, ends_clean)


def denoiser(dtype=torch.float64):
    """A small nonlinear (x, point) -> (x0, eps) that mixes channels and pixels; counts its calls."""
    weight = 0.3 * torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def denoise(x, point):
        denoise.calls += 1
        eps = torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1)) + 0.1 * x
        return (x - point.sigma * eps) / point.alpha, eps

    denoise.calls = 0
    return denoise


def noises(num_steps, seed=0, shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_steps + 1, *shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_step_is_ddim(eta):
    scheduler, schedule = ddim(10)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    x, eps, z = noises(2)
    for i in range(9):
        x0 = (x - schedule.sigma[i] * eps) / schedule.alpha[i]
        ours = step(x0, eps, z, schedule, i, eta)
        theirs = scheduler.step(eps, scheduler.timesteps[i], x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_step_is_euler_ancestral_for_alpha_one():
    schedule = Schedule(torch.arange(2), torch.ones(3, dtype=torch.float64), torch.tensor([5.0, 3.0, 1.0]).double())
    x, x0, z = noises(2)
    sigma_up = math.sqrt(3.0**2 * (5.0**2 - 3.0**2) / 5.0**2)
    sigma_down = math.sqrt(3.0**2 - sigma_up**2)
    expected = x + (x - x0) / 5.0 * (sigma_down - 5.0) + sigma_up * z
    torch.testing.assert_close(step(x0, (x - x0) / 5.0, z, schedule, 0, 1.0), expected)


def test_step_is_eulers_for_flow_matching():
    t = torch.tensor([1.0, 0.6, 0.0]).double()
    schedule = Schedule(torch.arange(2), 1 - t, t)
    x0, eps, z = noises(2)
    x = 0.4 * x0 + 0.6 * eps
    torch.testing.assert_close(step(x0, eps, z, schedule, 0, 0.0), x)
    torch.testing.assert_close(step(x0, eps, z, schedule, 1, 0.0), x + (0.0 - 0.6) * (eps - x0))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_few_steps_that_end_clean_are_diffusers_euler_ancestral(monkeypatch, num_steps):
    """From the same start with the same noises; diffusers' levels are sigma / alpha and its samples x / alpha."""
    _, schedule = ddim(num_steps, ends_clean=True, timestep_spacing="trailing")
    assert schedule.timesteps[0] == 999 and schedule.alpha[-1] == 1 and schedule.sigma[-1] == 0
    config = {name: CONFIG[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    scheduler = EulerAncestralDiscreteScheduler(**config, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    denoise, noise = denoiser(), noises(num_steps)
    z = iter(noise.flip(0)[1:])
    module = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kw: next(z))

    x = noise[-1] / schedule.alpha[0]
    for i, t in enumerate(scheduler.timesteps):
        _, eps = denoise(scheduler.scale_model_input(x, t), schedule[i])
        x = scheduler.step(eps, t, x).prev_sample.double()
    ours = sample(denoise, noise, schedule, eta=1.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    if num_steps == 1:
        assert torch.equal(ours, denoise(noise[-1], schedule[0])[0]), "one step gives x0"


def test_noise_scale():
    _, schedule = ddim(10)
    alpha, sigma = schedule.alpha, schedule.sigma
    # DDPM's posterior standard deviation.
    beta = 1 - (alpha[3] / alpha[4]) ** 2
    assert noise_scale(schedule, 3, 1.0) == pytest.approx(float(sigma[4] / sigma[3] * beta.sqrt()))
    assert noise_scale(schedule, 3, 0.5) == pytest.approx(0.5 * noise_scale(schedule, 3, 1.0))
    assert noise_scale(schedule, 9, 1.0) == 0, "no noise enters at the last step"
    equal = Schedule(torch.arange(3), torch.full((4,), 0.6).double(), torch.full((4,), 0.8).double())
    assert noise_scale(equal, 0, 1.0) == pytest.approx(0, abs=1e-7)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected a number from 0"):
            noise_scale(schedule, 3, eta)


# Points and rules.


def test_points_are_plain_numbers():
    _, schedule = ddim(4)
    points = list(schedule)
    assert len(points) == len(schedule) == schedule.num_steps == 4
    for i, point in enumerate(points):
        assert point == Point(schedule.timesteps.tolist()[i], schedule.alpha.tolist()[i], schedule.sigma.tolist()[i])
        assert type(point.timestep) is int and type(point.alpha) is type(point.sigma) is float
    assert schedule[-1] == points[-1], "the end point is not a step"
    with pytest.raises(IndexError):
        schedule[4]
    flow = Schedule(torch.tensor([1000.0, 600.5]), 1 - torch.tensor([1, 0.6, 0]).double(), torch.tensor([1, 0.6, 0]))
    assert [point.timestep for point in flow] == [1000, 600.5] and type(flow[0].timestep) is int


def test_levels_of_a_point_are_broadcast_over_the_rows():
    x = torch.ones(2, 3, 4, 4)
    assert Point(7, 0.6, 0.8).levels(x) == (0.6, 0.8)
    alpha, sigma = Point(torch.tensor([1, 2]), torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6])).levels(x)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1) and alpha.dtype == torch.float32
    torch.testing.assert_close((alpha * x)[:, 1, 2, 3], torch.tensor([0.6, 0.8]))


def following(scheduler, module, schedule, denoise, noise, monkeypatch, **kw):
    """The latents that diffusers' scheduler comes to with these noises, the denoiser telling it eps."""
    z = iter(noise.flip(0)[1:])
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *args, **kw: next(z))
    x = noise[-1]
    for point, t in zip(schedule, scheduler.timesteps, strict=True):
        x = scheduler.step(denoise(x, point)[1], t, x, **kw).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_renoise_is_diffusers_lcm(monkeypatch, num_steps):
    scheduler = LCMScheduler(**{**CONFIG, "set_alpha_to_one": True})
    scheduler.set_timesteps(num_steps)
    schedule = Schedule.from_alphas_cumprod(scheduler.timesteps, scheduler.alphas_cumprod, True, "renoise")
    plain, noise = denoiser(), noises(num_steps)

    def denoise(x, point):
        """The consistency function, which is x itself at timestep 0."""
        x0, eps = plain(x, point)
        u = 10 * point.timestep
        return u / math.sqrt(u**2 + 0.25) * x0 + 0.25 / (u**2 + 0.25) * x, eps

    expected = following(scheduler, "scheduling_lcm", schedule, plain, noise, monkeypatch)
    torch.testing.assert_close(sample(denoise, noise, schedule, eta=1.0), expected, rtol=1e-5, atol=1e-5)
    # Between that and the deterministic sampler, which every rule is at eta = 0.
    scales = [noise_scale(schedule, 0, eta) for eta in (0.0, 0.5, 1.0)]
    assert scales == ([0, 0, 0] if num_steps == 1 else [0, schedule.sigma[1] / 2, schedule.sigma[1]])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_tcd_is_diffusers(monkeypatch, num_steps, gamma):
    scheduler = TCDScheduler(**CONFIG)
    scheduler.set_timesteps(num_steps)
    schedule = Schedule.from_alphas_cumprod(scheduler.timesteps, scheduler.alphas_cumprod, rule="tcd")
    denoise, noise = denoiser(), noises(num_steps)
    expected = following(scheduler, "scheduling_tcd", schedule, denoise, noise, monkeypatch, eta=gamma)
    ours = sample(denoise, noise, schedule, eta=gamma)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    if gamma == 0:
        ddims = Schedule.from_alphas_cumprod(scheduler.timesteps, scheduler.alphas_cumprod)
        assert torch.equal(ours, sample(denoise, noise, ddims, eta=0.0))


def test_tcds_level_is_rounded_as_in_the_paper():
    """floor(0.7 * 90) is 63, although in binary the product is a little less."""
    alphas_cumprod = torch.linspace(0.99, 0.01, 100).double()
    schedule = Schedule.from_alphas_cumprod(torch.tensor([95, 90]), alphas_cumprod, rule="tcd")
    expected = math.sqrt(1 - alphas_cumprod[90] / alphas_cumprod[63])
    assert noise_scale(schedule, 0, 0.3) == pytest.approx(expected)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="the rule is 'cps'; expected one of ddpm, renoise, tcd"):
        Schedule(torch.arange(2), torch.ones(3), torch.zeros(3), "cps")
    with pytest.raises(ValueError, match="tcd needs trained_alpha"):
        Schedule(torch.arange(2), torch.ones(3), torch.zeros(3), "tcd")


@pytest.mark.parametrize("rule", ["ddpm", "renoise"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_flow_schedule_starts_at_noise_alone(rule, eta, recompute):
    """alpha = 1 - sigma and sigma = 1 at the start, where alpha = 0 must divide nothing."""
    sigma = torch.tensor([1.0, 0.75, 0.4, 0.0]).double()
    schedule = Schedule(1000 * sigma[:-1], 1 - sigma, sigma, rule)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()

    def denoise(x, point):
        velocity = torch.tanh(torch.einsum("ij,bjhw->bihw", weight, x))
        return x - point.sigma * velocity, x + (1 - point.sigma) * velocity

    noise = noises(3, shape=(1, 3, 2, 2)).requires_grad_()
    assert sample(denoise, noise, schedule, eta, recompute).isfinite().all()
    assert noise_scale(schedule, 0, eta) == pytest.approx(eta * 0.75)
    assert torch.autograd.gradcheck(lambda n: sample(denoise, n, schedule, eta, recompute), noise)


# The sampler.


def test_schedule_ends_at_timestep_zero():
    scheduler, schedule = ddim(50)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert schedule.alpha[-1].item() == pytest.approx(scheduler.alphas_cumprod[0].sqrt().item())
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(51).double())


def test_sample_of_a_known_image():
    """A denoiser that knows the image ends at it, at the end point's noise level, whatever noise enters."""
    _, schedule = ddim(10)
    clean = torch.full(SHAPE, 0.7).double()

    def denoise(x, point):
        return clean, (x - point.alpha * clean) / point.sigma

    end = sample(denoise, noises(10), schedule, eta=1.0)
    assert (end - schedule.alpha[-1] * clean).abs().max() < 5 * schedule.sigma[-1]
    # Started at the image's own trajectory, the ODE stays on it.
    x_T = schedule.alpha[0] * clean + schedule.sigma[0] * 0.5
    end = sample(denoise, [*noises(10)[:-1], x_T], schedule, eta=0.0)
    torch.testing.assert_close(end, schedule.alpha[-1] * clean + schedule.sigma[-1] * 0.5)


def test_noise_order():
    """Sampling starts at noise[T]; step i uses noise[T - 1 - i]; noise[0] has no effect."""
    _, schedule = ddim(4)
    noise = noises(4).requires_grad_()
    sample(lambda x, t: (x, torch.zeros_like(x)), noise, schedule, eta=1.0).sum().backward()
    scales = [noise_scale(schedule, i, 1.0) for i in range(4)]
    alpha = schedule.alpha.tolist()
    expected = [0.0, scales[2] * alpha[4], scales[1] * alpha[3] * alpha[4], scales[0] * alpha[2] * alpha[3] * alpha[4]]
    assert noise.grad[:, 0, 0, 0, 0].tolist() == pytest.approx([*expected, math.prod(alpha[1:])])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_gradient_equals_finite_differences(eta, recompute):
    _, schedule = ddim(3)
    denoise = denoiser()
    noise = noises(3, shape=(1, 3, 2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: sample(denoise, n, schedule, eta, recompute), noise)


def test_recomputing_changes_no_bit():
    _, schedule = ddim(7)
    results = []
    for recompute in (False, True):
        noise = noises(7, dtype=torch.float32).requires_grad_()
        latents = sample(denoiser(torch.float32), noise, schedule, 1.0, recompute)
        latents.square().sum().backward()
        results.append((latents, noise.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("recompute", [0, 1, 3, 6, 7, 9])
def test_recomputing_some_steps_gives_the_same_gradient_for_their_work_alone(recompute, eta):
    _, schedule = ddim(7)
    results = []
    for n in (False, recompute):
        noise, denoise = noises(7).requires_grad_(), denoiser()
        latents = sample(denoise, noise, schedule, eta, n)
        latents.square().sum().backward()
        results.append((latents, noise.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)
    assert denoise.calls == 7 + min(recompute, 7)


def test_the_last_steps_keep_their_graphs():
    """Of the others there are their latents; so the number of values that are kept grows with the steps that keep."""
    _, schedule = ddim(7)
    kept = []
    for recompute in range(8):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            sample(denoiser(), noises(7).requires_grad_(), schedule, 1.0, recompute)
        kept.append(sum(sizes))
    assert kept == sorted(kept, reverse=True) and kept[-1] == 7 * math.prod(SHAPE) < kept[-2] - math.prod(SHAPE)


@pytest.mark.parametrize("recompute", [2, 4, 5, 6])
def test_recomputing_some_steps_where_the_first_noises_are_frozen(recompute):
    """K = 3 of T = 7: the graph starts with step 4, the first one after noise 3 has come in."""
    _, schedule = ddim(7)
    grads = []
    for n in (False, recompute):
        separate, denoise = [z.requires_grad_(i < 4) for i, z in enumerate(noises(7))], denoiser()
        loss = sample(denoise, separate, schedule, 1.0, n).square().sum()
        grads.append(torch.autograd.grad(loss, separate[1:4]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert denoise.calls == 7 + max(recompute - 4, 0)


@pytest.mark.parametrize(("free", "calls"), [(slice(0, 8), 14), (slice(0, 7), 13), (slice(0, 3), 9), (slice(7, 8), 14)])
def test_work_and_gradient_stop_at_the_first_noise_that_is_free(free, calls):
    """K < T: x_T and the earlier noises get nothing, and the steps before them are not recomputed."""
    _, schedule = ddim(7)
    full = noises(7).requires_grad_()
    sample(denoiser(), full, schedule, 1.0, recompute=False).sum().backward()
    separate = [z.clone().requires_grad_(i in range(8)[free]) for i, z in enumerate(noises(7))]
    denoise = denoiser()
    sample(denoise, separate, schedule, 1.0).sum().backward()
    assert denoise.calls == calls
    for i, z in enumerate(separate):
        if i in range(8)[free]:
            torch.testing.assert_close(z.grad, full.grad[i])
        else:
            assert z.grad is None


def test_graph_memory_does_not_grow_with_the_denoiser():
    """Recomputing, autograd keeps one latent a step and nothing of the denoiser."""
    _, schedule = ddim(20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sample(denoiser(), noises(20).requires_grad_(), schedule, 1.0)
    assert sum(kept) == 20 * math.prod(SHAPE)


# Whatever inside the denoiser wants a gradient.


class Learned:
    """A denoiser with a parameter, a tensor in its closure, or both, that want a gradient; counts its calls.

    from_step: below this step the denoiser is without gradient, as in truncated training.
    """

    def __init__(self, schedule, parameter=True, closure=False, from_step=0, cut=False):
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(0.2 * torch.randn(3, 3, generator=generator).double(), parameter)
        self.embedding = (0.3 * torch.randn(3, generator=generator).double()).requires_grad_(closure)
        self.starts = [point.timestep for point in schedule][from_step]
        self.cut, self.calls = cut, 0
        self.wanted = [tensor for tensor in (self.weight, self.embedding) if tensor.requires_grad]

    def __call__(self, x, point):
        self.calls += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and point.timestep <= self.starts):
            shift = self.embedding.square()[None, :, None, None]  # not a leaf
            eps = torch.tanh(torch.einsum("ij,bjhw->bihw", self.weight, x) + shift) + 0.1 * x
            x0 = (x - point.sigma * eps) / point.alpha
        if self.cut or point.timestep <= self.starts:
            return x0, eps
        return (x - point.sigma * eps) / point.alpha, eps


# What `Learned` is like, and how many noises, counted from the last step's, want a gradient: 5 with the starting noise.
INSIDE = {
    "noise": ({"parameter": False}, 5), "parameter": ({}, 0), "both": ({}, 5),
    "closure": ({"parameter": False, "closure": True}, 0), "everything": ({"closure": True}, 5),
    "parameter, some noises": ({}, 3), "truncated": ({"from_step": 2}, 0), "truncated, noise": ({"from_step": 2}, 5),
    "cut off, noise": ({"from_step": 2, "cut": True}, 5),
}  # fmt: skip


def gradients_inside(name, recompute, eta):
    """(loss, (calls forward, backward), gradients, what they are of, the loss as a function) for 4 steps."""
    arguments, free = INSIDE[name]
    _, schedule = ddim(4)
    denoise = Learned(schedule, **arguments)
    noise = [z.requires_grad_(i < free) for i, z in enumerate(noises(4, shape=(1, 3, 2, 2)))]
    wanted = [*denoise.wanted, *noise[:free]]

    def loss():
        return sample(denoise, noise, schedule, eta, recompute).square().sum()

    value = loss()
    forward = denoise.calls
    grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    return value, (forward, denoise.calls - forward), grads, wanted, loss


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("recompute", [True, 2, False])
@pytest.mark.parametrize("name", INSIDE)
def test_whatever_wants_a_gradient_gets_that_of_the_full_graph(name, recompute, eta):
    expected, _, full, wanted, _ = gradients_inside(name, False, eta)
    value, calls, grads, *_ = gradients_inside(name, recompute, eta)
    assert torch.equal(value, expected)
    torch.testing.assert_close(grads, full, rtol=1e-12, atol=1e-12)
    assert all(grad.any() for grad, tensor in zip(full, wanted) if tensor.dim() < 4)
    if name == "noise":
        assert calls == (4, {True: 4, 2: 2, False: 0}[recompute])


@pytest.mark.parametrize("recompute", [True, 2, False])
@pytest.mark.parametrize("name", ["parameter", "both", "everything"])
def test_what_is_inside_gets_the_gradient_of_finite_differences(name, recompute):
    _, _, grads, wanted, loss = gradients_inside(name, recompute, 1.0)
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(tensor.shape, generator=generator).double() for tensor in wanted]

    @torch.no_grad()
    def moved(h):
        for tensor, direction in zip(wanted, directions):
            tensor.add_(h * direction)
        value = loss().item()
        for tensor, direction in zip(wanted, directions):
            tensor.sub_(h * direction)
        return value

    h = 1e-4
    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert sum((g * d).sum() for g, d in zip(grads, directions)).item() == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize(("recompute", "calls"), [(True, (4 + 1, 4)), (2, (4 + 1, 2)), (False, (4, 0))])
def test_calls_for_a_parameter_are_one_more_than_for_noise(recompute, calls):
    """The first step that is found to want a gradient inside is run again."""
    assert gradients_inside("parameter", recompute, 1.0)[1] == calls


def test_steps_are_recomputed_one_at_a_time_for_a_parameter_too():
    """Recomputing, autograd keeps no more of a step than what goes into it."""
    _, schedule = ddim(4)
    kept = []
    for recompute in (False, True):
        sizes, denoise = [], Learned(schedule)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            with torch.no_grad():
                noise = noises(4)
            sample(denoise, noise, schedule, 1.0, recompute)
        kept.append(len(sizes))
    assert kept[1] < kept[0]


def test_a_parameter_and_a_step_that_stands_still():
    _, schedule = ddim(5, timestep_spacing="linspace", steps_offset=0)
    grads = []
    for recompute in (False, True, 5):
        denoise = Learned(schedule)
        end = sample(denoise, noises(5), schedule, 1.0, recompute)
        grads += torch.autograd.grad(end.square().sum(), denoise.weight)
        assert denoise.calls == (4 if recompute is False else 4 + 1 + 4)
    torch.testing.assert_close(grads[1], grads[0]), torch.testing.assert_close(grads[2], grads[0])
    alone = Schedule(torch.tensor([0]), torch.tensor([0.6, 0.6]).double(), torch.tensor([0.8, 0.8]).double())
    noise = noises(1).requires_grad_()
    end = sample(Learned(alone), noise, alone, 1.0)
    assert torch.equal(end, noise[1]) and torch.autograd.grad(end.sum(), noise)[0][1].eq(1).all()


def test_nothing_has_a_graph_under_no_grad():
    _, schedule = ddim(4)
    denoise = Learned(schedule)
    with torch.no_grad():
        assert not sample(denoise, noises(4).requires_grad_(), schedule).requires_grad
    assert denoise.calls == 4


def test_dropout_inside_a_recomputed_step_is_drawn_once():
    """The gradient is that of the masks that were drawn, so it is that of a loss which is linear in the weight."""
    _, schedule = ddim(3)
    weight = torch.nn.Parameter(torch.tensor(0.5).double())

    def denoise(x, point):
        return weight * torch.nn.functional.dropout(torch.ones_like(x)), torch.zeros_like(x)

    torch.manual_seed(0)
    end = sample(denoise, noises(3), schedule, eta=0.0)
    (grad,) = torch.autograd.grad(end.sum(), weight)
    assert grad.item() == pytest.approx(end.sum().item() / 0.5)


def test_denoiser_call_is_skipped_where_the_end_point_is_reached():
    _, schedule = ddim(5, timestep_spacing="linspace", steps_offset=0)
    assert schedule.timesteps[-1] == 0
    denoise = denoiser()
    sample(denoise, noises(5), schedule, 1.0)
    assert denoise.calls == 4


def test_wrong_number_of_noises():
    _, schedule = ddim(5)
    with pytest.raises(ValueError, match="5 noises for 5 steps; expected 6"):
        sample(denoiser(), noises(4), schedule)


def test_draws():
    torch.manual_seed(7)
    official = torch.randn(11, 4, 8, 8)
    both = draw_noise([6, 7], 10, (4, 8, 8))
    assert torch.equal(both[:, 1], official), "the official implementation's draw"
    assert torch.equal(both[:, 0], draw_noise([6], 10, (4, 8, 8))[:, 0]), "independent of the batch"
    others = [draw_noise([7], 10, (4, 8, 8), candidate)[:, 0] for candidate in (0, 1, 2)]
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])
    assert abs(others[1].mean()) < 0.06 and abs(others[1].std() - 1) < 0.05


def test_keyed_generators():
    draws = {key: torch.rand(3, generator=keyed_generator(*key)) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1)]}
    assert torch.equal(draws[0, 1, 2], torch.rand(3, generator=keyed_generator(0, 1, 2)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4


def test_variance_exploding_levels_start_at_their_own_size():
    """x_VE = x_VP / alpha on the same levels sigma / alpha, for Gaussian data, whose denoiser is linear in x. The start
    is sigma_0 z there and z here, so the ends differ by the factor sigma of the first variance-preserving level."""
    _, preserving = ddim(6)
    alpha, sigma = preserving.alpha, preserving.sigma
    exploding = Schedule(preserving.timesteps, torch.ones_like(alpha), sigma / alpha)

    def denoise(x, point):
        x0 = point.alpha * x / (point.alpha**2 + point.sigma**2)
        return x0, (x - point.alpha * x0) / point.sigma

    start = noises(6)[-1:]
    expected = sigma[0] * sample(denoise, start, preserving, eta=0.0) / alpha[-1]
    torch.testing.assert_close(sample(denoise, start, exploding, eta=0.0), expected)
