"""Charts of a report page: an SVG of the curves, with ticks and markers laid over it as text.

The curves stretch with the page while their width, and the size of the text, stay: so the plot is in per cent of its
box, and what must not be stretched is HTML beside the SVG. The page's script moves the markers, by the `data-` values.
"""

import html
import math
from typing import NamedTuple

from dno.report.reading import P_FLOOR, log_axis, say, ten_to

PALETTE = 6  # colours in report.html, --c0 and on; further runs are dashed


class Curve(NamedTuple):
    """One line. values: floats, or None if there is none; best: the step to ring; least: drawn as a lower bound."""

    run: int
    image: int
    label: str
    steps: list
    values: list
    best: int | None = None
    least: bool = False


def chart(metric, title, note, curves, steps, log=False):
    """The figure of one metric over the iterations, for all runs and images; image 0 of each run stands out.

    metric: its name in the data of the page's script; title, note: plain text over the plot.
    steps: the iterations of the whole page, sorted, since all its charts have the same axis.
    log: a logarithmic axis from P = 1 down.
    Returns HTML, or "" if no value is a number.
    """
    known = [value for curve in curves for value in curve.values if value is not None]
    if not known:
        return ""
    left, right = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    low, high, rules = log_axis(min(known)) if log else _linear_axis(known)

    def x(step):
        return 100 * (step - left) / (right - left)

    def y(value):
        return 100 * (high - (math.log10(max(value, P_FLOOR)) if log else value)) / (high - low)

    grid = "".join(f"M0 {y_of:.2f}H100" for y_of in (100 * (high - at) / (high - low) for at, _ in rules))
    lines, rings = [], []
    # The first image of each run last, so that it lies on top.
    for curve in sorted(curves, key=lambda curve: (not curve.least, -curve.image)):
        style = f"--c:var(--c{curve.run % PALETTE})"
        kind = ["curve"] + ["chosen"] * (curve.image == 0) + ["least"] * curve.least
        kind += ["dashed"] * (curve.run // PALETTE % 2)
        data = f'data-run="{curve.run}" data-image="{curve.image}"'
        path = _path([(x(s), None if v is None else y(v)) for s, v in zip(curve.steps, curve.values, strict=True)])
        lines.append(f'<path class="{" ".join(kind)}" {data} style="{style}" d="{path}"/>')
        at_best = dict(zip(curve.steps, curve.values, strict=True)).get(curve.best)
        if at_best is not None:
            place = f"left:{x(curve.best):.2f}%;top:{y(at_best):.2f}%"
            rings.append(f'<i class="ring" {data} style="{style};{place}"{" hidden" * (curve.image > 0)}></i>')
    dots = [
        f'<i class="dot" data-run="{run}" style="--c:var(--c{run % PALETTE})" hidden></i>'
        for run in sorted({curve.run for curve in curves})
    ]
    labels = [f'<span class="y" style="top:{100 * (high - at) / (high - low):.2f}%">{words}</span>'
              for at, words in rules]  # fmt: skip
    labels += [f'<span class="x" style="left:{x(at):.2f}%">{at}</span>' for at in _whole_ticks(steps)]
    scale = f'data-left="{left}" data-right="{right}" data-low="{low:.12g}" data-high="{high:.12g}"'
    return (
        f'<figure class="chart" data-metric="{html.escape(metric)}" data-log="{P_FLOOR if log else ""}" {scale}>'
        f"<figcaption><b>{html.escape(title)}</b> <span>{html.escape(note)}</span></figcaption>"
        f'<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(_in_words(title, curves))}"><path class="grid" d="{grid}"/>{"".join(lines)}</svg>'
        f'<i class="cursor" hidden></i>{"".join(rings)}{"".join(dots)}{"".join(labels)}</div>'
        f'<div class="axis">iteration</div></figure>'
    )


def _path(points):
    """SVG path data; a None breaks the line, and a point between two breaks is a short dash."""
    parts, pen = [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen = False
            continue
        if not pen and (i + 1 == len(points) or points[i + 1][1] is None):
            parts.append(f"M{x - 0.3:.2f} {y:.2f}h0.6")
            continue
        parts.append(f"{'L' if pen else 'M'}{x:.2f} {y:.2f}")
        pen = True
    return "".join(parts)


def _linear_axis(values):
    low, high = min(values), max(values)
    # A curve that hardly moves must not look as if it did.
    room = max(0.05 * (high - low), 0.01 * max(abs(low), abs(high)), 0.5 if low == high else 0)
    low, high = low - room, high + room
    step = _nice((high - low) / 5)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, list(zip(ticks, _tick_labels(ticks), strict=True))


def _tick_labels(ticks):
    """All with the same number of decimals, or all as a multiple of the same power of ten."""
    size = max((abs(at) for at in ticks), default=1)
    power = 0 if not size or 1e-3 <= size < 1e6 else math.floor(math.log10(size))
    shown = [f"{at / 10.0**power:.6g}" for at in ticks]
    decimals = max((len(words.partition(".")[2]) for words in shown), default=0)
    unit = f"×{ten_to(power)}" if power else ""
    return [f"{float(words):.{decimals}f}{unit if float(words) else ''}".replace("-", "−") for words in shown]


def _whole_ticks(steps):
    step = max(1, int(_nice((steps[-1] - steps[0]) / 6 or 1, (1, 2, 5, 10))))
    return [k * step for k in range(-(-steps[0] // step), steps[-1] // step + 1)]


def _nice(least, factors=(1, 2, 2.5, 5, 10)):
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in factors if factor * power >= least * (1 - 1e-9)), 10 * power)


def _in_words(title, curves):
    """What the curves show, for readers who cannot see them."""
    words = []
    for curve in curves:
        known = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
        if known and curve.image == 0 and not curve.least:
            (first, before), (last, after) = known[0], known[-1]
            words.append(f"{curve.label}: {say(before)} at iteration {first}, {say(after)} at iteration {last}")
    return f"{title} by iteration. {'; '.join(words)}"
