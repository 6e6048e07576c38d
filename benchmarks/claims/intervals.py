"""Paired differences with their confidence intervals, and the rule that makes verdicts of them."""

import math
from dataclasses import dataclass

import numpy as np

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
HOLDS, PARTLY, FAILS, MISSING = "holds", "holds partly", "does not hold here", "not measured"


def t_975(freedom):
    """The quantile; beyond the table by the first term of its expansion, to 0.002."""
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.960 + 2.372 / freedom


def interval(values):
    """(mean, low, high) of values (P, S): P prompts with S seeds each, the 95 % interval over the prompts.

    Seeds of one prompt are averaged first: they are not independent samples of what prompts do. With one prompt, or
    if a value is not finite, the interval is everything.
    """
    means = np.asarray(values, dtype=float).mean(axis=1)
    mean = float(means.mean())
    if len(means) < 2 or not np.isfinite(means).all():
        return mean, -math.inf, math.inf
    half = t_975(len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Comparison:
    """A paired difference of which the claim says that it is positive. prompts: how many it is the mean of."""

    label: str
    mean: float
    low: float
    high: float
    prompts: int

    @classmethod
    def of(cls, label, differences):
        """differences: (P, S)."""
        return cls(label, *interval(differences), len(differences))

    @property
    def outcome(self):
        """yes if the interval lies above 0, the reverse if it lies below, else undecided."""
        return "yes" if self.low > 0 else "the reverse" if self.high < 0 else "undecided"


def verdict(comparisons):
    """holds: all outcomes are yes; holds partly: some are; does not hold here: none is.

    comparisons: None is one that was not measured, and does not count; if there are no others, neither is the claim.
    """
    outcomes = [comparison.outcome for comparison in comparisons if comparison is not None]
    if not outcomes:
        return MISSING
    held = outcomes.count("yes")
    return HOLDS if held == len(outcomes) else PARTLY if held else FAILS


def best_so_far(curves):
    """The running maximum of (..., N); NaN does not count."""
    return np.fmax.accumulate(curves, axis=-1)


def at_budget(curves, unit, budget):
    """The last of (..., N) that `budget` pays for, where each costs `unit`; at least the first."""
    return curves[..., min(max(int(budget / unit + 1e-6), 1), curves.shape[-1]) - 1]


def first_at_least(curves, level):
    """The first index at which (P, S, N) is at least level (P, S), and N where it never is: (P, S)."""
    reached = np.nan_to_num(curves, nan=-np.inf) >= np.asarray(level)[..., None]
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1), curves.shape[-1])


def best_while(rewards, judged, bar):
    """The highest reward (P, S) among the iterations whose judgement is at least `bar`; the first one's if none is."""
    held = np.where(judged >= bar, rewards, -np.inf).max(axis=-1)
    return np.where(np.isfinite(held), held, rewards[..., 0])


def frontier(points):
    """Of (reward, judgement) pairs those that no other one beats in both, by rising reward."""
    kept, best = [], -math.inf
    for reward, judged in sorted(points, key=lambda p: (-p[0], -p[1])):
        if judged > best:
            kept.append((reward, judged))
            best = judged
    return kept[::-1]
