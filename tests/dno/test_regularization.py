import math

import pytest
import torch

from dno.regularization import (
    MAX_SUBSAMPLE,
    SEGMENTS,
    _num_segments,
    probability,
    probability_min,
    probability_penalty,
)


def naive_log_probabilities(values, k):
    """log p1 and log p2 of a flat vector, as the formula reads."""
    rows = values.reshape(-1, k)
    m = len(rows)
    m1 = torch.linalg.vector_norm(rows.sum(dim=0) / m)
    m2 = torch.linalg.matrix_norm(rows.T @ rows / m - torch.eye(k, dtype=rows.dtype), ord=2)
    log_p1 = -m * m1**2 / (2 * k)
    log_p2 = -m * torch.clamp(torch.sqrt(1 + m2) - 1 - math.sqrt(k / m), min=0) ** 2 / 2
    return log_p1.clamp(max=-math.log(2)), log_p2.clamp(max=-math.log(2))


def naive_penalty(values, k, permutations, generator):
    total = sum(naive_log_probabilities(values, k))
    shuffled = [
        sum(naive_log_probabilities(values[torch.randperm(len(values), generator=generator)], k))
        for _ in range(permutations)
    ]
    return -(total + sum(shuffled) / permutations)


def draw(num_noises=26, batch=1, shape=(4, 16, 16), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_noises, batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def correlated(noise, rho=0.3):
    neighbour = noise.roll(1, dims=-1)
    return rho * neighbour + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize("subsample", [0, 1, 2, 3])
def test_given_order_is_the_formula(subsample):
    k = 4**subsample
    for noise in (draw(), 0.8 * draw(), draw() + 0.2, correlated(draw())):
        log_p1, log_p2 = naive_log_probabilities(noise.flatten(), k)
        expected = min(2 * log_p1.exp(), 2 * log_p2.exp())
        torch.testing.assert_close(probability(noise, subsample)[0], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 64, 64)])
def test_probability_tells_typical_noise_from_every_other(shape):
    noise = draw(shape=shape)
    assert min(probability(draw(shape=shape, seed=seed)).item() for seed in range(10)) > 0.5
    for other in (0.9 * noise, noise + 0.1, correlated(noise)):
        assert probability(other).item() < 1e-3


def test_probability_sees_one_noise_repeated_at_every_step():
    noise = draw(51, shape=(4, 64, 64))
    assert probability(noise[:1].repeat(51, 1, 1, 1, 1)).item() < 1e-3


def test_least_probability_sees_one_bad_noise():
    noise = draw(51, shape=(4, 64, 64))
    halved = noise.clone()
    halved[-1] *= 0.5
    assert probability_min(noise).item() > 0.1
    assert probability_min(halved).item() < 1e-3
    singles = torch.stack([probability(halved[i : i + 1])[0] for i in range(51)])
    assert probability_min(halved)[0] == singles.min()


@pytest.mark.parametrize("change", [lambda z: z, lambda z: 0.93 * z, lambda z: z + 0.05, lambda z: 1.04 * z - 0.03])
def test_penalty_equals_uniform_permutations_within_sampling_error(change):
    """Value and spread: over 24 seeds each, the means agree within 4 standard errors and the spreads are alike."""
    values = change(draw(num_noises=5, seed=3))
    ours = torch.stack([probability_penalty(values, generators(s), permutations=20)[0] for s in range(24)])
    plain = torch.stack([naive_penalty(values.flatten(), 4, 20, generators(100 + s)[0]) for s in range(24)])
    error = math.sqrt(ours.var() / 24 + plain.var() / 24)
    assert abs(ours.mean() - plain.mean()) < 4 * error + 1e-4
    assert ours.std() < 2 * plain.std() + 1e-4


def test_penalty_sees_shift_and_scale_in_a_few_permutations():
    typical = 4 * math.log(2)
    assert probability_penalty(draw(), generators(0), permutations=2).item() == pytest.approx(typical, abs=0.5)
    for other in (0.9 * draw(), draw() + 0.1):
        assert probability_penalty(other, generators(0), permutations=2).item() > 20


@pytest.mark.parametrize("subsample", [1, 2])
def test_gradient_equals_finite_differences(subsample):
    noise = (0.6 * draw(2, 2, (4, 4, 8), dtype=torch.float64) + 0.4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: probability_penalty(z, generators(1, 2), subsample, permutations=3), noise, fast_mode=True
    )


def test_no_gradient_inside_the_typical_set():
    # Any order can be a little unlucky: take noise and a permutation where both orders are inside.
    for seed in range(20):
        noise = draw(seed=seed).requires_grad_()
        penalty = probability_penalty(noise, generators(seed), permutations=1)
        if penalty.item() == pytest.approx(4 * math.log(2)):
            break
    assert penalty.item() == pytest.approx(4 * math.log(2))
    penalty.sum().backward()
    assert not noise.grad.any()
    scaled = (0.9 * noise.detach()).requires_grad_()
    probability_penalty(scaled, generators(0)).sum().backward()
    assert (scaled.grad * scaled).sum() < 0, "a noise that is too small is told to grow"


def test_batch_equals_its_images_alone():
    noise = 0.9 * draw(batch=3)
    together = probability_penalty(noise, generators(5, 6, 7))
    alone = [probability_penalty(noise[:, b : b + 1], generators(5 + b))[0] for b in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    torch.testing.assert_close(probability(noise), torch.cat([probability(noise[:, b : b + 1]) for b in range(3)]))


def test_rows_must_divide_the_noise():
    with pytest.raises(ValueError, match="48 noise values do not divide into rows of 64"):
        probability(draw(1, shape=(3, 4, 4)), subsample=3)


@pytest.mark.parametrize("subsample", [-1, 5])
def test_rows_that_would_make_huge_tables_are_refused(subsample):
    noise = draw()  # 26 * 1024 values, which rows of 1024 divide
    for function in (probability, probability_min, lambda z, s: probability_penalty(z, generators(0), s)):
        with pytest.raises(ValueError, match=f"subsample is {subsample}; expected 0 to 4"):
            function(noise, subsample)


def test_the_tables_of_the_largest_rows_are_small():
    """Numbers in the table of pairs for each permutation: at most k * max(k, SEGMENTS)."""
    k = 4**MAX_SUBSAMPLE
    assert k <= SEGMENTS and k * _num_segments(26 * 1024, k) <= 2**17


@pytest.mark.parametrize(
    ("size", "k", "expected"), [(51 * 4 * 64 * 64, 4, 512), (26 * 1024, 16, 512), (4 * 67 * 53, 4, 268)]
)
def test_segments_divide_the_noise_into_whole_columns(size, k, expected):
    assert _num_segments(size, k) == expected
    assert size % expected == 0 and expected % k == 0
