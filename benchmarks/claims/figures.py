"""A picture per claim: means over prompts and seeds, with the 95 % interval over the prompts as a band."""

import io

import numpy as np

from claims.intervals import frontier, interval
from claims.plan import GAMMAS, OBJECTIVES
from claims.section import BAR, P_FLOOR, tuned_rows
from dno.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE
from dno.runs.files import write_whole

SKY = "#56B4E9"  # Okabe and Ito's, for a sixth line
AXES = {
    "black": "darkness", "white": "brightness", "sprites": "sprites (CLIP)", "jpeg": "JPEG reward (−kB)",
    "judge": "judge's agreement", "probability": "P(z)", "calls": "denoiser calls per image",
    "seconds": "seconds per image, one thread", "iterations": "iteration",
}  # fmt: skip


def draw(results, letter, path):
    """Write the picture of one section. Returns False if nothing of it has been measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(results.prompts(row.name) for row in results.plan[letter]):
        return False
    rows, columns, height = {"a": (2, 2, 6.0), "b": (2, 3, 5.6), "c": (1, 2, 3.9), "d": (1, 2, 3.7), "e": (2, 2, 6.0),
                             "f": (4, 2, 11.5)}[letter]  # fmt: skip
    figure = Figure(figsize=(9, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    _DRAW[letter](results, panels)
    for panel in panels.flat:
        if not panel.has_data():
            panel.set_axis_off()
            panel.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=panel.transAxes)
            continue
        if panel.get_ylabel() == AXES["judge"]:  # a difference in the third decimal must not fill the panel
            panel.set_ylim(min(panel.get_ylim()[0], BAR - 0.05), 1.02)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#AAAAAA")
        panel.grid(color="#E4E4E4", lw=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9, colors=GREY, length=3)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set(size=10, color=INK)
    handles = {}
    for panel in panels.flat:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels())}
    columns_of_words = min(len(handles), 4 if len(handles) in (4, 7, 8) else 3)
    if handles:
        lines = -(-len(handles) // columns_of_words)
        figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=columns_of_words, frameon=False,
                      fontsize=10, handlelength=2.2)  # fmt: skip
        figure.tight_layout(rect=(0, 0, 1, 1 - (0.08 + 0.22 * lines) / height))
    data = io.BytesIO()
    figure.savefig(data, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())
    return True


def _against(results, panel, name, objective, axis, label, colour, style="-", key=None, band=True):
    """The best reward so far (or another metric as it is) against iterations, calls or seconds.

    band: the interval along the line; without it, at the line's end.
    """
    prompts = results.prompts(name)
    unit = {"iterations": 1, "calls": results.calls(name), "seconds": results.seconds(name)}[axis]
    if not prompts or unit is None:
        return
    curves = results.curve(name, key, prompts) if key else results.best(name, objective, prompts)
    curves = np.log10(np.maximum(curves, P_FLOOR)) if key == "probability" else curves
    mean, low, high = np.array([interval(curves[..., i]) for i in range(curves.shape[-1])]).T
    # Iteration i is known when it has been paid for, and counted from 0.
    x = unit * (np.arange(len(mean)) + (axis != "iterations"))
    if key == "probability":
        mean, low, high = 10**mean, 10**low, 10**high
        panel.set_yscale("log")
    high = np.minimum(high, 1) if key in ("probability", "judge") else high
    panel.plot(x, mean, color=colour, ls=style, lw=1.8, label=label)
    if np.isfinite(low).all() and band:
        panel.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
    elif np.isfinite(low).all():
        ends = [[mean[-1] - low[-1]], [high[-1] - mean[-1]]]
        panel.errorbar(x[-1:], mean[-1:], ends, color=colour, lw=1.1, capsize=3, alpha=0.7)
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel(AXES[key or objective])


def _trade(results, panel, name, objective, label, colour, style="-", marker="o", key="judge"):
    """A held-out metric against the reward, one point per iteration, means."""
    prompts = results.prompts(name)
    if not prompts:
        return
    reward, other = (results.curve(name, k, prompts).mean(axis=(0, 1)) for k in (objective, key))
    panel.plot(reward, other, color=colour, ls=style, lw=1.3, marker=marker, ms=3.2, label=label)
    panel.set_xlabel(AXES[objective])
    panel.set_ylabel(AXES[key])


def _draw_a(results, panels):
    for row, objective in zip(panels, ("black", "sprites")):
        for panel, axis in zip(row, ("calls", "seconds")):
            _against(results, panel, objective, objective, axis, "DNO", BLUE)
            _against(results, panel, f"{objective} restarts", objective, axis, "DNO, random restarts", GREEN, "--")
            _against(results, panel, "draws", objective, axis, "best-of-N", ORANGE, "-.")


def _draw_b(results, panels):
    rows = [("black", "γ = 0", INK, "-")]
    styles = zip(GAMMAS, (ORANGE, GREEN, BLUE), ("-.", "--", (0, (5, 1))))
    rows += [(f"black gamma {gamma:g}", f"γ = {gamma:g}", colour, style) for gamma, colour, style in styles]
    for name, label, colour, style in rows:
        for panel, key in zip(panels.flat, (None, "probability", "judge", "sprites")):
            _against(results, panel, name, "black", "iterations", label, colour, style, key)
        for panel, key in zip(panels.flat[4:], ("judge", "sprites")):
            _trade(results, panel, name, "black", label, colour, style, key=key)


def _draw_c(results, panels):
    rows = [("black", "η = 1, all noises", BLUE, "-"), ("black eta 0.5", "η = 0.5", SKY, "--"),
            ("black eta 0", "η = 0", ORANGE, "-"), ("black eta 0 lr 0.05", "η = 0, step size 0.05", ORANGE, ":"),
            ("black x_T only", "η = 1, x_T alone", GREEN, "-.")]  # fmt: skip
    last = [name for name in results.rows if name.startswith("black last ")]
    for name, colour, style in zip(last, (PURPLE, INK), ("--", ":")):
        rows.append((name, f"η = 1, K = {name.split()[-1]}", colour, style))
    for name, label, colour, style in rows:
        _against(results, panels[0, 0], name, "black", "calls", label, colour, style, band=False)
        _trade(results, panels[0, 1], name, "black", label, colour, style)


def _draw_d(results, panels):
    rows = [("jpeg hybrid", "hybrid", BLUE, "-"), ("jpeg hybrid antithetic", "hybrid, antithetic", SKY, "--"),
            ("jpeg", "hybrid_image", GREEN, (0, (5, 1))), ("jpeg zo", "zo", INK, ":"),
            ("draws", "best-of-N", ORANGE, "-.")]  # fmt: skip
    for name, label, colour, style in rows:
        for panel, axis in zip(panels.flat, ("calls", "seconds")):
            _against(results, panel, name, "jpeg", axis, label, colour, style, band=False)


def _draw_e(results, panels):
    for row, objective in zip(panels, ("black", "sprites")):
        for name, label, colour, style in (
            (objective, "full gradient", BLUE, "-"),
            (f"{objective} skip_unet", "skip_unet", ORANGE, "--"),
        ):
            _against(results, row[0], name, objective, "calls", label, colour, style)
            _trade(results, row[1], name, objective, label, colour, style)


def _draw_f(results, panels):
    """Left the frontiers, right the rewards over the iterations."""
    for (left, right), objective in zip(panels, OBJECTIVES):
        adamw, spectral, gamma = tuned_rows(results.size, objective)
        groups = (
            (adamw, "AdamW", BLUE),
            (spectral, "spectral", ORANGE),
            ([gamma], f"spectral, γ = {GAMMAS[-1]:g}", GREEN),
        )
        for names, words, colour in groups:
            points = []
            for name, marker, style in zip(names, "osv^", ("-", "--", ":", "-.")):
                if prompts := results.prompts(name):
                    run = [results.curve(name, key, prompts).mean(axis=(0, 1)) for key in (objective, "judge")]
                    left.plot(*run, color=colour, lw=0, marker=marker, ms=3, alpha=0.4)
                    points += zip(*run)
                    label = f"{words}, {results.rows[name].settings['lr']:g}"
                    _against(results, right, name, objective, "iterations", label, colour, style, band=False)
            if points:
                reward, judged = zip(*frontier(points))
                left.step(reward, judged, where="pre", color=colour, lw=1.9)
        left.axhline(BAR, color=GREY, lw=0.8, ls=(0, (1, 3)))
        left.set_xlabel(AXES[objective])
        left.set_ylabel(AXES["judge"])


_DRAW = {"a": _draw_a, "b": _draw_b, "c": _draw_c, "d": _draw_d, "e": _draw_e, "f": _draw_f}
