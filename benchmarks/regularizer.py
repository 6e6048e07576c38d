"""The probability regularizer against the plain loop that it replaces: time, and the value.

    python benchmarks/regularizer.py                          # Stable Diffusion 1.5's and sprites' noise
    python benchmarks/regularizer.py --device cuda --iteration_seconds 6.1

The plain loop permutes all values a hundred times, as the formula says; `dno.regularization` permutes them once and
then whole segments of them. Times are medians of forward and backward together, the two taken in turns. The values are
means and standard deviations over seeds of the permutations, for one noise each: the two means may differ by sampling
error only, which the last column gives in standard errors of the difference.
"""

import argparse
import math
import statistics
import time

import torch
from common import machine, print_table, synchronize

from dno.models.specs import resolve_device
from dno.noise import PERMUTATIONS, keyed_generator
from dno.regularization import log_probability_bounds, probability_penalty

# (T + 1, B, C, h, w) at the default number of steps.
NOISES = {"SD 1.5": (51, 1, 4, 64, 64), "sprites": (26, 1, 4, 16, 16)}


def plain_penalty(noise, generator, subsample=1, permutations=100):
    """The formula as it is written: one permutation of all values at a time. Returns (1,)."""
    values, k = noise.flatten(), 4**subsample
    m = len(values) // k

    def log_probability(values):
        rows = values.view(m, k)
        return sum(log_probability_bounds(rows.mean(dim=0), rows.T @ rows / m, m))

    given = log_probability(values)
    shuffled = 0
    for _ in range(permutations):
        order = torch.randperm(len(values), generator=generator).to(values.device)
        shuffled = shuffled + log_probability(values[order])
    return -(given + shuffled / permutations)[None]


def batched_penalty(noise, generator, subsample=1, permutations=100):
    return probability_penalty(noise, [generator], subsample, permutations)


PENALTIES = (plain_penalty, batched_penalty)


def seconds(penalty, noise, args, seed):
    """Of one forward and backward pass."""
    noise = noise.detach().requires_grad_()
    generator = keyed_generator(PERMUTATIONS, seed, 0)
    synchronize(noise.device)
    start = time.perf_counter()
    torch.autograd.grad(penalty(noise, generator, args.subsample, args.permutations).sum(), noise)
    synchronize(noise.device)
    return time.perf_counter() - start


def time_row(name, shape, args, device):
    noise = 1.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = [[seconds(penalty, noise, args, seed) for penalty in PENALTIES] for seed in range(args.repeats + 1)]
    plain, batched = (statistics.median(column) for column in zip(*times[1:]))
    row = [name, math.prod(shape), f"{plain:.3f}", f"{batched:.4f}", f"{plain / batched:.0f}x"]
    if args.iteration_seconds:
        row.append(f"{100 * batched / args.iteration_seconds:.1f} %")
    return row


def value_rows(name, shape, args, device):
    """Fresh noise, and noise scaled and shifted just far enough for the penalty to see it."""
    off = 1 / math.sqrt(math.prod(shape))
    cases = {"fresh": (1, 0), f"x {1 - 6 * off:.4f}": (1 - 6 * off, 0), f"+ {3 * off:.4f}": (1, 3 * off)}
    for case, (scale, shift) in cases.items():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device) * scale + shift
        values = [
            torch.stack([
                penalty(noise, keyed_generator(PERMUTATIONS, seed, index), args.subsample, args.permutations)
                for seed in range(args.seeds)
            ])
            for index, penalty in enumerate(PENALTIES)
        ]  # fmt: skip
        (a, a_std), (b, b_std) = ((v.mean().item(), v.std().item()) for v in values)
        error = math.hypot(a_std, b_std) / math.sqrt(args.seeds)
        yield [f"{name}, {case}", f"{a:.3f} ± {a_std:.3f}", f"{b:.3f} ± {b_std:.3f}", f"{(b - a) / error:+.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--subsample", type=int, default=1)
    parser.add_argument("--permutations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each after one that warms up")
    parser.add_argument("--seeds", type=int, default=20, help="of the permutations; 0 leaves the values out")
    parser.add_argument(
        "--iteration_seconds", type=float, metavar="SECONDS",
        help="of an iteration (see step_time.py), to print the regularizer's share of it",
    )  # fmt: skip
    args = parser.parse_args()
    device = resolve_device(args.device)

    print(f"{args.permutations} permutations, rows of {4**args.subsample} values, {machine(device)}\n")
    header = ["noise", "values", "plain loop s", "dno s", "faster"] + ["share"] * bool(args.iteration_seconds)
    print_table(header, [time_row(name, shape, args, device) for name, shape in NOISES.items()])
    if args.seeds > 1:
        print()
        rows = [row for name, shape in NOISES.items() for row in value_rows(name, shape, args, device)]
        print_table(["penalty", "plain loop", "dno", "difference / error"], rows)


if __name__ == "__main__":
    main()
