"""Conditioning: what the network is told besides the noisy latents, row by row."""

from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Shared:
    """A value in a `Conditioning` that has no batch: the same for every row."""

    value: object


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of B prompts, in its precision: keywords of its call.

    positive: tensors and lists have the batch first; dicts are looked into; what has no batch is `Shared` or None.
    negative: the same for what guidance leads away from, or None if nothing is guided.
    `conditioning[rows]` takes the rows of these numbers, which may repeat, in this order.
    """

    positive: dict
    negative: dict | None = None

    def __len__(self):
        return _length(self.positive)

    def __getitem__(self, rows):
        rows = [int(row) for row in rows]  # a tensor's numbers would be taken for coordinates
        taken = (keywords and _map(partial(_rows, rows), keywords) for keywords in (self.positive, self.negative))
        return Conditioning(*taken)

    def negated(self):
        """The negative keywords in the place of the positive ones."""
        return Conditioning(self.negative)

    def doubled(self):
        """The negative rows and then the positive ones, 2 B in one batch.

        Raises ValueError if the halves differ in what has no batch, and so must run one after the other.
        """
        return Conditioning(_map(_joined, self.negative, self.positive))


def _map(function, *values):
    """function at each leaf of dicts of the same keys; what has no batch is the same in all, and unchanged."""
    last = values[-1]
    if isinstance(last, dict) and all(isinstance(value, dict) and value.keys() == last.keys() for value in values):
        return {key: _map(function, *(value[key] for value in values)) for key in last}
    if not any(value is None or isinstance(value, Shared | dict) for value in values):
        return function(*values)
    if not all(_same(value, last) for value in values):
        raise ValueError("the positive and the negative conditioning differ in what has no batch; use split_guidance")
    return last


def _same(a, b):
    a, b = unwrapped(a), unwrapped(b)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def _rows(rows, value):
    return [value[row] for row in rows] if isinstance(value, list) else value[rows]


def _joined(negative, positive):
    return negative + positive if isinstance(positive, list) else torch.cat([negative, positive])


def leaves(value):
    """The leaves of nested dicts that have a batch, one after the other."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif value is not None and not isinstance(value, Shared):
        yield value


def _length(keywords):
    return len(next(leaves(keywords)))


def unwrapped(value):
    """The keywords with `Shared` values as they are."""
    if isinstance(value, dict):
        return {key: unwrapped(inner) for key, inner in value.items()}
    return value.value if isinstance(value, Shared) else value
