"""The probability of a noise, and the penalty that keeps an optimized noise probable.

A noise of D values that is standard normal, cut into m rows of k values, has column means near 0 and second moments
near the identity, and concentration inequalities bound how far from them it may stray:

    M1 = ||column means||_2          log p1 = min(-m M1^2 / (2k), -ln 2)
    M2 = ||X^T X / m - I||_2         log p2 = min(-m max(sqrt(1 + M2) - 1 - sqrt(k/m), 0)^2 / 2, -ln 2)

Source: Tang et al. 2024, arXiv 2405.18881, section on probability regularization. The clamp at -ln 2 leaves typical
noise alone: there the bounds say nothing, and the gradient is zero.

Shapes: `noise` is (N, B, C, h, w), N noises of B images; each image's D = N C h w values count in memory order.
All of it runs in the noise's own precision, which the optimization keeps at float32 or better.
"""

import math

import torch

# The largest number of segments that the noise is cut into. Time grows with it, and the table of inner products with
# its square; fewer make the random permutations' average noisier.
SEGMENTS = 512
# The largest `subsample`: at 5, rows of 1024 values are more than there are segments, and each permutation would take a
# table of 1024 x 1024 (several GB in all).
MAX_SUBSAMPLE = 4


def log_probability_bounds(mean, second_moment, m):
    """(log p1, log p2), each (...), from column means (..., k) and second moments (..., k, k) over m rows."""
    k = mean.shape[-1]
    deviation = second_moment - torch.eye(k, dtype=mean.dtype, device=mean.device)
    # Symmetric, so the spectral norm is the largest eigenvalue in size. MPS has no eigenvalue solver.
    deviation = deviation.cpu() if deviation.device.type == "mps" else deviation
    finite = deviation.isfinite().flatten(-2).all(dim=-1)  # squares that overflow: improbable, and no error
    m2 = torch.linalg.eigvalsh(deviation.where(finite[..., None, None], 0)).abs().amax(dim=-1)
    m2 = m2.where(finite, torch.inf).to(mean.device)
    excess = ((1 + m2).sqrt() - 1 - math.sqrt(k / m)).clamp(min=0)
    log_p1 = -m * mean.square().sum(dim=-1) / (2 * k)
    log_p2 = -m * excess.square() / 2
    return log_p1.clamp(max=-math.log(2)), log_p2.clamp(max=-math.log(2))


def probability(noise, subsample=1):
    """P(z) of each image's noise, (B,): 1 = typical, towards 0 = out of distribution.

    P(z) = min(2 p1, 2 p2), of the values in their given order; rows have k = 4 ** subsample values.
    Raises ValueError as `probability_penalty` does.
    """
    log_p1, log_p2 = _given_order(_values(noise), _row_size(subsample))
    return 2 * torch.minimum(log_p1, log_p2).exp()


def probability_min(noise, subsample=1):
    """The smallest P over the N individual noises, (B,).

    It sees what the average over all of them hides, such as a starting noise x_T of half its size. As the smallest of N
    numbers it lies below `probability` for typical noise too (near 0.4 for 51 noises).
    """
    each = probability(noise.flatten(0, 1)[None], subsample)  # each noise as an "image": (N B,)
    return each.view(len(noise), -1).amin(dim=0)


def probability_penalty(noise, generators, subsample=1, permutations=100):
    """The probability regularizer, (B,), differentiable; at least 4 ln 2, its value for typical noise.

        penalty = -(log p1 + log p2 in the given order + the mean of (log p1 + log p2) over random permutations)

    Random permutations alone do not see correlation between neighbours, and the given order does not see all of it.

    generators: one CPU `torch.Generator` per image, the source of its permutations.
    permutations: how many are averaged; more of them make the penalty less noisy, not larger.
    Raises ValueError if the number of values is not a multiple of k = 4 ** subsample, or subsample is not in 0..4.
    """
    k = _row_size(subsample)
    values = _values(noise)
    given = torch.stack(_given_order(values, k)).sum(dim=0)
    shuffled = [_shuffled_order(row, k, permutations, g) for row, g in zip(values, generators, strict=True)]
    return -(given + torch.stack(shuffled))


def _values(noise):
    return noise.transpose(0, 1).flatten(1)  # (B, D)


def _row_size(subsample):
    if not 0 <= subsample <= MAX_SUBSAMPLE:
        raise ValueError(f"subsample is {subsample}; expected 0 to {MAX_SUBSAMPLE}, for rows of 4 ** subsample values")
    return 4**subsample


def _given_order(values, k):
    batch, size = values.shape
    if size % k:
        raise ValueError(f"{size} noise values do not divide into rows of {k} (4 ** subsample); lower subsample")
    rows = values.view(batch, size // k, k)
    m = rows.shape[1]
    return log_probability_bounds(rows.mean(dim=1), rows.mT @ rows / m, m)


def _shuffled_order(values, k, permutations, generator):
    """The mean of log p1 + log p2 over random permutations of `values` (D,).

    Shuffling D values a hundred times is a hundred passes over memory in random order. Instead, one uniform
    permutation cuts the values into R segments, and each further permutation shuffles whole segments: each of them
    taken alone is a uniform permutation, and all their second moments are sums over one R x R table of the segments'
    inner products. The averages differ from independent permutations by sampling error only.
    """
    size = len(values)
    num_segments = _num_segments(size, k)
    m = size // k

    order = torch.randperm(size, generator=generator).to(values.device)
    segments = values[order].view(num_segments, -1)  # (R, D/R)
    shuffles = torch.stack([torch.randperm(num_segments, generator=generator) for _ in range(permutations)])
    columns = shuffles.view(permutations, k, -1).to(values.device)  # (P, k, R/k): the segments of each column

    mean = _pick(segments.sum(dim=1), columns).sum(dim=-1) / m  # (P, k)
    products = (segments @ segments.T).flatten()  # (R R,)
    pairs = _pick(products, columns[:, :, None] * num_segments + columns[:, None, :])  # (P, k, k, R/k)
    log_p1, log_p2 = log_probability_bounds(mean, pairs.sum(dim=-1) / m, m)
    return (log_p1 + log_p2).mean()


def _pick(values, index):
    """values[index], whose gradient on a CPU adds up in a fixed order: that of indexing depends on the threads."""
    return values.index_select(0, index.flatten()).view(index.shape)


def _num_segments(size, k):
    """The largest divisor of `size` that is a multiple of k and at most SEGMENTS (k itself if none is)."""
    return next((r for r in range(SEGMENTS - SEGMENTS % k, k, -k) if size % r == 0), k)
