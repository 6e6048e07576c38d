"""What the sections of the page have in common: claims, cells, and differences of two measurements."""

import math
from dataclasses import dataclass, field

import numpy as np

from claims.intervals import Comparison, at_budget, best_while, interval, verdict
from claims.plan import GAMMAS, LR

BAR = 0.9  # the second judge's agreement from which a picture counts as showing its prompt
P_FLOOR = 1e-30


@dataclass(frozen=True)
class Claim:
    """One sentence that is true or not. comparisons: `Comparison`s, or None for one that was not measured."""

    statement: str
    comparisons: list

    @property
    def verdict(self):
        return verdict(self.comparisons)


@dataclass(frozen=True)
class Section:
    """One letter of the page. tables: (caption, header, rows of cells)."""

    letter: str
    title: str
    text: str
    claims: list
    tables: list = field(default_factory=list)


def say(values):
    """mean (low to high) of values (P, S)."""
    mean, low, high = interval(values)
    digits = digits_of(mean)
    return number(mean, digits) + (f" ({number(low, digits)} to {number(high, digits)})" if math.isfinite(low) else "")


def digits_of(value):
    """Decimals to show, of this number and of its interval."""
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def number(value, digits):
    """With this many decimals, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def compare(results, names, label, difference):
    """The comparison of `difference(prompts)`, (P, S); None if one of the rows `names` was not measured."""
    prompts = results.prompts(*names)
    if not prompts:
        return None
    found = difference(prompts)
    return None if found is None else Comparison.of(label, found)


def at_equal(results, objective, name, other, axis, share, label, least=False):
    """Best reward so far of `name` minus that of `other`, where both have cost the same.

    least: the budget is that of the cheaper row, instead of that of `name`.
    """
    unit, other_unit = (getattr(results, axis)(row) for row in (name, other))
    if unit is None or other_unit is None:
        return None
    budget = share * unit * results.rows[name].length
    if least:
        budget = min(budget, share * other_unit * results.rows[other].length)

    def difference(prompts):
        mine, others = results.best(name, objective, prompts), results.best(other, objective, prompts)
        return at_budget(mine, unit, budget) - at_budget(others, other_unit, budget)

    return compare(results, [name, other], f"{label}, equal {axis}", difference)


def log_p(values):
    return np.log10(np.maximum(values, P_FLOOR))


def ending(results, name, key, prompts):
    last = results.curve(name, key, prompts)[..., -1]
    return log_p(last) if key == "probability" else last


def held(results, name, objective, prompts):
    """The highest reward at which the judge still sees the prompt, (P, S)."""
    return best_while(results.curve(name, objective, prompts), results.curve(name, "judge", prompts), BAR)


def tuned_rows(size, objective):
    """(names of AdamW's rows, of the spectral step's, the spectral row with gamma)."""
    adamw = [objective if lr == LR else f"{objective} lr {lr:g}" for lr in size.step_sizes]
    spectral = [f"{objective} spectral lr {lr:g}" for lr in size.step_sizes]
    return adamw, spectral, f"{objective} spectral lr {LR:g} gamma {GAMMAS[-1]:g}"
