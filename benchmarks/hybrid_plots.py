"""The plots of `hybrid.py`, and how they are dressed."""

import statistics
from itertools import product

import numpy as np

from dno.methods.estimation import ESTIMATORS
from dno.report.figures import BLUE, GREEN, GREY, INK, ORANGE

COLOURS = {"hybrid": BLUE, "hybrid_image": ORANGE, "zo": GREEN}
MARKS = {"hybrid": "o", "hybrid_image": "s", "zo": "^"}


def plot_cosines(table, args):
    """Cosine against q (above) and mu (below), a column per reward."""
    from matplotlib.figure import Figure

    names = args.rewards
    figure = Figure(figsize=(4.2 * len(names), 7), dpi=120, layout="constrained")
    plots = figure.subplots(2, len(names), sharey=True, squeeze=False)
    for column, name in enumerate(names):
        for row, (values, fixed) in enumerate(((args.q, f"mu {args.shown_mu:g}"), (args.mu, f"q {args.shown_q}"))):
            plot = plots[row, column]
            for estimator, pairs in product(ESTIMATORS, (False, True)):
                keys = [(args.shown_mu, v) if row == 0 else (v, args.shown_q) for v in values]
                plot.plot(
                    values, [table[name, estimator, pairs, *key] for key in keys], marker=MARKS[estimator], ms=5,
                    color=COLOURS[estimator], ls="-" if pairs else (0, (3, 2)), mfc=None if pairs else "white",
                    label=estimator + (", pairs" if pairs else ""),
                )  # fmt: skip
            limit = table[name, "hybrid", "limit"]
            plot.axhline(limit, color=BLUE, lw=1, ls=(0, (1, 2)), label="hybrid, its limit")
            plot.set_xscale("log", base=2 if row == 0 else 10)
            plot.set_title(f"{name}, {fixed}", size=11, color=INK, loc="left")
            plot.set_xlabel("samples q" if row == 0 else "mu", color=GREY)
            if row == 0:
                plot.set_xticks(values, [str(v) for v in values])
            dress(plot)
        plots[0, 0].set_ylabel("cosine with the true gradient", color=GREY)
        plots[1, 0].set_ylabel("cosine with the true gradient", color=GREY)
    handles, labels = plots[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, args.pictures / "hybrid-cosine.png")


def best_until(curve, seconds):
    """The smallest size that was seen by then; the start's where there was no time for another."""
    return min(entry[1] for entry in curve if entry[0] <= max(seconds, curve[0][0]))


def plot_rewards(curves, args):
    """The size of each run (pale) and the mean of each estimator's smallest so far (bold)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    plot, times = figure.subplots(), np.linspace(0, args.seconds, 200)
    for estimator, each in curves.items():
        for curve in each:
            plot.plot([e[0] for e in curve], [e[1] for e in curve], color=COLOURS[estimator], lw=0.9, alpha=0.35)
        mean = [statistics.fmean(best_until(curve, t) for curve in each) for t in times]
        plot.plot(times, mean, color=COLOURS[estimator], lw=2.2, label=estimator)
    plot.set_xlim(0, args.seconds)
    plot.set_xlabel("CPU seconds", color=GREY)
    plot.set_ylabel("JPEG size, kilobytes", color=GREY)
    plot.set_title("pale: each seed; bold: mean of the smallest so far", size=11, color=INK, loc="left")
    plot.legend(frameon=False)
    dress(plot)
    save(figure, args.pictures / "hybrid-reward.png")


def dress(plot):
    """Axes as in the runs' own pictures: no box, pale rules."""
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color("#AAAAAA")
    plot.grid(axis="y", color="#E4E4E4", lw=0.8)
    plot.set_axisbelow(True)
    plot.tick_params(labelsize=9, colors=GREY, length=3)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\n{path}\n", flush=True)
