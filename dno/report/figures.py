"""Pictures of a run, drawn from the files in its folder: a sheet to read and a loop to watch.

All that is read is `args.json`, `metrics.jsonl` and the saved images, so a run that stopped early can be
drawn, and an old one drawn again.
"""

import io
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The sheet, in pixels. Eight columns of 192 show a 64-pixel picture at exactly three times its size.
DPI, WIDTH, MARGIN, COLUMNS, TILE, GAP, ROWS = 120, 1680, 44, 8, 192, 8, 4
STRIP_TOP, PLOT_HEIGHT, PANEL_HEIGHT, AROUND_PLOT, TICKS = 158, 300, 170, 146, 66
P_FLOOR = 1e-12  # P(z) falls without end; below this there is nothing more to say
# Okabe and Ito's blue and vermilion, and a dark green and purple: apart for the colour-blind too.
BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#00795A", "#8A4F7D", "#222222", "#666666"

# The loop. A run of few frames plays more slowly, or it would be over before it is seen.
GIF_FRAMES, GIF_MIN, GIF_MAX, GIF_MAX_IN_BATCH, CAPTION = 150, 256, 512, 256, 30
GIF_MS, GIF_SLOWEST_MS, GIF_WHOLE_MS, GIF_LAST_MS = 100, 400, 2500, 1500


class Run(NamedTuple):
    """What a folder holds. metrics: entries by step; frames[step][b]: image b; both sorted by step."""

    args: dict
    metrics: dict[int, dict]
    frames: dict[int, dict[int, Path]]
    best: int | None  # of the highest mean reward, or as best.png says; None where no reward is a number

    @property
    def batch(self) -> int:
        return 1 + max(b for images in self.frames.values() for b in images)

    def reward(self, step: int, b: int | None = None) -> float:
        """The reward of image b, or the batch's mean; NaN where the run did not say."""
        entry = self.metrics.get(step, {})
        values = [entry.get("reward")] if b is None else (entry.get("rewards") or [])[b : b + 1]
        return _row(values)[0] if values else float("nan")


def read_run(folder: Path) -> Run:
    """Read what a run left. Raises ValueError, in one line, where there is nothing to draw."""
    folder, metrics, frames = Path(folder), {}, {}
    log, arguments = folder / "metrics.jsonl", folder / "args.json"
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []:
        try:
            entry = json.loads(line)
            metrics[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError):  # a run that was killed leaves half a line
            continue
    if not metrics:
        raise ValueError(f"{log}: got no entry, expected one JSON object per iteration")
    metrics = dict(sorted(metrics.items()))

    def add(pattern, names, step=None):
        for path in names:
            if match := re.fullmatch(pattern, path.stem):
                frames.setdefault(int(match[1]) if step is None else step, {})[int(match[2] or 0)] = path

    add(r"(\d{3,})(?:_b(\d+))?", (folder / "images").glob("*.png"))
    rewards = {step: _row([entry.get("reward")])[0] for step, entry in metrics.items()}
    rewards = {step: reward for step, reward in rewards.items() if np.isfinite(reward)}
    best = max(rewards, key=rewards.get) if rewards else None
    # Where only some steps were saved, the first and the best are still there under names of their own.
    # In a batch each image has a best step of its own, so there best.png has no place.
    if 0 not in frames:
        add(r"(initial)(?:_b(\d+))?", folder.glob("initial*.png"), 0)
    if (folder / "best.png").is_file() and not list(folder.glob("best_b*.png")):
        with Image.open(folder / "best.png") as image:
            told = str(image.info.get("step", best))  # a limit on P(z) may have ruled out a higher reward
        best = int(told) if told.isdigit() and int(told) in metrics else best
        if best is not None and best not in frames:
            frames[best] = {0: folder / "best.png"}
    if not frames:
        raise ValueError(f"{folder}: got no images, expected images/000.png and so on, or initial.png")
    latest: dict[int, Path] = {}
    for step in sorted(frames):  # an image of a batch that stopped before the others stays as it was
        latest = frames[step] = latest | frames[step]
    args = json.loads(arguments.read_text(encoding="utf-8")) if arguments.is_file() else {}
    return Run(args, metrics, dict(sorted(frames.items())), best)


def choose_steps(steps: list[int], count: int, best: int | None = None) -> list[int]:
    """At most count of the sorted steps, evenly spaced, with the first, the last and (if there) the best."""
    if len(steps) <= count:
        return list(steps)
    chosen = {min(steps, key=lambda s: abs(s - goal)) for goal in np.linspace(steps[0], steps[-1], count)}
    if best in steps and best not in chosen:
        inner = sorted(chosen - {steps[0], steps[-1]}, key=lambda s: abs(s - best))
        chosen = chosen - set(inner[:1]) | {best}  # it takes its neighbour's place
    return sorted(chosen)


def evolution_sheet(folder: Path) -> None:
    """Write folder/evolution.png: frames over the iterations; under them the reward, P(z), held-out rewards.

    folder: a run's folder, with metrics.jsonl, images/ and args.json.
    Raises ValueError where the folder has no metrics or no images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = read_run(folder)
    # Where every k-th step was saved, the best of the frames need not be the best of the run.
    marked = max((s for s in run.frames if np.isfinite(run.reward(s))), key=run.reward, default=None)
    marked = run.best if run.best in run.frames else marked
    shown, rows = choose_steps(list(run.frames), COLUMNS, marked), min(run.batch, ROWS)
    tiles = {(b, s): _tile(run.frames[s][b]) for s in shown for b in range(rows) if b in run.frames[s]}
    tile_height = max(tile.height for tile in tiles.values())
    row_height = tile_height + 42

    # Reward and P(z) side by side, a single further panel beside them; several go below, four to a row.
    panels = _panels(run)
    wide, small = (panels, []) if len(panels) <= 3 else (panels[:2], panels[2:])
    small_rows = -(-len(small) // 4)
    plot_top = STRIP_TOP + rows * row_height + (28 if run.batch > rows else 0) + 76
    small_top = plot_top + PLOT_HEIGHT + AROUND_PLOT
    height = plot_top + PLOT_HEIGHT + 76 + small_rows * (PANEL_HEIGHT + AROUND_PLOT)
    height = -(-height // 15) * 15  # whole eighths of an inch, so that inches and pixels agree exactly
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def write(x, y, words, size=10.5, color=INK, room=WIDTH - 2 * MARGIN, **style):
        """Words with their baseline at pixel (x, y) from the top left, smaller where there is no room."""
        style = {"family": "DejaVu Sans", "parse_math": False, "color": color, "size": size} | style
        text = figure.text(x / WIDTH, 1 - y / height, words, **style)
        # Step by step, for hinting makes widths jump.
        while text.get_window_extent(canvas.get_renderer()).width > room and text.get_size() > 4:
            text.set_size(0.95 * text.get_size())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a prompt may be in any script
        write(MARGIN, 62, f"“{_elide(run.args.get('prompt', ''))}”", 17, weight="bold")
        write(MARGIN, 98, _subtitle(run), 11, GREY)
        for column, step in enumerate(shown):
            x, first = MARGIN + column * (TILE + GAP) + TILE / 2, column == 0
            head, style = ("iteration " if first else "") + str(step), {"color": GREY}
            if step == marked:
                head += " · best" if step == run.best else " · best shown"
                style = {"color": ORANGE, "weight": "bold"}
            write(x, STRIP_TOP - 13, head, room=TILE + GAP, ha="center", **style)
            for b in (b for b in range(rows) if (b, step) in tiles):
                words = ("reward " if first else "") + _say(run.reward(step, b))
                write(x, STRIP_TOP + b * row_height + tile_height + 23, words, room=TILE, ha="center")
        if run.batch > rows:
            words = f"and {run.batch - rows} more in the batch"
            write(MARGIN, STRIP_TOP + rows * row_height + 18, words, color=GREY)
        for group, top, tall in ((wide, plot_top, PLOT_HEIGHT), (small, small_top, PANEL_HEIGHT)):
            across = -(-len(group) // max(1, small_rows)) if group is small else len(group)
            for i, (title, words, color, draw) in enumerate(group):
                pitch = (WIDTH - 2 * MARGIN + 28) / across
                left, width = MARGIN + TICKS + i % across * pitch, pitch - TICKS - 28
                y = top + i // across * (PANEL_HEIGHT + AROUND_PLOT)
                write(left - TICKS, y - 42, title, 12, room=width + TICKS, weight="bold")
                write(left - TICKS, y - 18, words, 10.5, color, room=width + TICKS)
                plot = figure.add_axes((left / WIDTH, 1 - (y + tall) / height, width / WIDTH, tall / height))
                draw(plot, shown)
                _dress(plot, list(run.metrics), run.best)
        canvas.draw()

    # The frames go in last and past matplotlib, which would resample them.
    page = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    for (b, step), tile in tiles.items():
        x = MARGIN + shown.index(step) * (TILE + GAP) + (TILE - tile.width) // 2
        y = STRIP_TOP + b * row_height + (tile_height - tile.height) // 2
        if step == marked:
            page.paste(ORANGE, (x - 4, y - 4, x + tile.width + 4, y + tile.height + 4))
        page.paste(tile, (x, y))
    _save(page, Path(folder) / "evolution.png", format="PNG")


def evolution_gif(folder: Path) -> None:
    """Write folder/evolution.gif: the saved frames as a loop, each over its iteration and its reward.

    folder: a run's folder, with metrics.jsonl, images/ and args.json.
    Raises ValueError where the folder has no metrics or no images.
    """
    run = read_run(folder)
    steps = choose_steps(list(run.frames), GIF_FRAMES, run.best)
    count = min(run.batch, ROWS)
    with Image.open(next(iter(run.frames[steps[0]].values()))) as image:
        longer, limit = max(image.size), GIF_MAX if count == 1 else GIF_MAX_IN_BATCH
        scale = -(-GIF_MIN // longer) if longer < GIF_MIN else min(1, limit / longer)
        size = tuple(max(1, round(side * scale)) for side in image.size)
    pages = [_gif_page(run, step, count, size, (step + 1) / (steps[-1] + 1)) for step in steps]
    pace = max(GIF_MS, min(GIF_SLOWEST_MS, GIF_WHOLE_MS // len(pages) // 10 * 10))
    durations = [pace] * (len(pages) - 1) + [GIF_LAST_MS]
    _save(pages[0], Path(folder) / "evolution.gif", format="GIF", save_all=True, append_images=pages[1:],
          duration=durations, loop=0)  # fmt: skip


def _gif_page(run: Run, step: int, count: int, size: tuple[int, int], done: float) -> Image.Image:
    """One frame of the loop: count images side by side, a bar that fills with `done`, the captions."""
    (width, height), roomy = size, size[0] >= 220
    page = Image.new("RGB", (count * (width + 4) - 4, height + CAPTION), "white")
    pen, font, y = ImageDraw.Draw(page), ImageFont.load_default(15), height + CAPTION * 0.6
    for b in (b for b in range(count) if b in run.frames[step]):
        page.paste(_resize(run.frames[step][b], size), (b * (width + 4), 0))
        words = ("reward " if b == 0 and roomy else "") + _say(run.reward(step, b))
        words = words.replace("−", "-").replace("–", "-")  # the font has neither
        pen.text((b * (width + 4) + width - 6, y), words, INK, font, "rm")
    pen.text((6, y), f"iteration {step}" if roomy else str(step), INK, font, "lm")
    # A palette a frame, for a run goes through more than 256 colours. Median cut alone leaves halos on edges,
    # so it is refined (kmeans), on a small copy for speed. The caption keeps its own colours.
    # No dithering: its grain would crawl from frame to frame, and double the file.
    palette = page.crop((0, 0, page.width, height)).resize((128, 128), Image.Resampling.NEAREST)
    palette = palette.quantize(252, method=Image.Quantize.MEDIANCUT, kmeans=1).getpalette()[: 3 * 252]
    colors = Image.new("P", (1, 1))
    colors.putpalette(palette + [255, 255, 255, *bytes.fromhex(INK[1:]), *bytes.fromhex(BLUE[1:])])
    pen.rectangle((0, height, max(1, round(page.width * done)) - 1, height + 2), BLUE)
    return page.quantize(palette=colors, dither=Image.Dither.NONE)


def _resize(path: Path, size: tuple[int, int]) -> Image.Image:
    """LANCZOS keeps edges clean at 3 or 4 times a drawing's size; past that only whole pixels stay crisp."""
    with Image.open(path) as image:
        kind = Image.Resampling.NEAREST if size[0] > 4 * image.width else Image.Resampling.LANCZOS
        return image.convert("RGB").resize(size, kind)


def _tile(path: Path) -> Image.Image:
    """A frame as the sheet shows it: as wide as its column, unless that made it more than twice as high."""
    with Image.open(path) as image:
        scale = min(TILE / image.width, 2 * TILE / image.height)
        return _resize(path, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _panels(run: Run) -> list[tuple]:
    """What to plot, the reward and P(z) first: (title, line under it, colour, draw(axes, shown steps))."""
    steps, log = list(run.metrics), list(run.metrics.values())

    def curves(each, bold, color, best=None, dot=5):
        def draw(plot, shown):
            if each.shape[1] > 1:
                plot.plot(steps, each, color=color, lw=0.9, alpha=0.35)
            taken = [i for i, step in enumerate(steps) if step in shown]  # dots: the frames above
            plot.plot(steps, bold, "-o", color=color, lw=2.2, ms=dot, markevery=taken, clip_on=False)
            if best is not None:
                plot.plot([best], [bold[steps.index(best)]], "o", color=ORANGE, ms=8, clip_on=False, zorder=5)

        return draw

    reward = _row([entry.get("reward") for entry in log])
    each = _table(log, "reward")
    words = _change(reward) + ("" if run.best is None else f", best at iteration {run.best}")
    words += "  (bold: mean of the batch)" if each.shape[1] > 1 else ""
    panels = [("Reward", words, BLUE, curves(each, reward, BLUE, run.best))]

    each = np.clip(_table(log, "probability"), P_FLOOR, 1)
    least = np.clip(_over_images(np.nanmin, _table(log, "probability_min")), P_FLOOR, 1)
    lowest = min(each.min(initial=1, where=each > 0), least.min(initial=1, where=least > 0))
    if np.isfinite(each).any() or np.isfinite(least).any():
        bold = np.exp(_over_images(np.nanmean, np.log(each)))  # geometric: else the largest hides the others

        draw_lines = curves(each, bold, GREEN)

        def draw_probability(plot, shown):
            _log_axis(plot, lowest)
            plot.plot(steps, least, color=GREEN, lw=1.5, ls=(0, (3, 2)))
            draw_lines(plot, shown)

        words = "1 = typical noise; dashed: the least of any single noise"
        panels.append(("P(z), how probable the noise is", words, GREEN, draw_probability))

    parts = run.args.get("weights") or {}
    for names, note, color in (
        (parts if len(parts) > 1 else (), "part of the reward", BLUE),
        (run.args.get("watched") or (), "not optimized", PURPLE),
    ):
        for name in names:
            each = _table(log, name)
            mean = _over_images(np.nanmean, each)
            draw = curves(each, mean, color, dot=3.5)
            panels.append((_elide(name, 40), f"{note}: {_change(mean)}", color, draw))
    return panels


def _dress(plot, steps: list[int], best: int | None) -> None:
    """Quiet axes: no box, pale rules, whole iterations, a dotted line at the best of them."""
    from matplotlib.ticker import MaxNLocator

    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color("#AAAAAA")
    plot.grid(axis="y", color="#E4E4E4", lw=0.8)
    plot.set_axisbelow(True)
    single = len(steps) == 1
    plot.set_xlim((steps[0] - 0.5, steps[0] + 0.5) if single else (steps[0], steps[-1]))
    plot.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if single:
        plot.set_xticks(steps)
    plot.set_xlabel("iteration", size=10, color=GREY, family="DejaVu Sans")
    if plot.get_yscale() == "linear":
        low, high = plot.get_ylim()
        if single or high - low < 1e-6 * max(abs(low), abs(high)):  # constant, but for rounding
            plot.set_ylim(low - 0.5, high + 0.5)
        plot.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        # Each label by itself: a power of ten written once over the axis would run into the line above it.
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:.7g}".replace("-", "−"))
    if best is not None:
        plot.axvline(best, color=ORANGE, lw=1.3, ls=(0, (1, 2)), zorder=1.5)
    plot.tick_params(labelsize=10, colors=GREY, labelfontfamily="DejaVu Sans", length=3)


def _log_axis(plot, lowest: float) -> None:
    """A logarithmic axis from P = 1 down to the decade of the lowest value, two decades at least."""
    floor = min(-2, int(np.floor(np.log10(lowest) + 1e-9)))
    plot.set_yscale("log")
    plot.set_ylim(10.0**floor, 10 ** (-0.03 * floor))  # a little room over 1, where most lines begin
    ticks, raised = range(0, floor - 1, -max(1, -floor // 4)), str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    labels = [{0: "1", -1: "0.1", -2: "0.01"}.get(t, "10" + str(t).translate(raised)) for t in ticks]
    labels = [label.replace("10⁻¹²", "≤10⁻¹²") for label in labels]  # where P_FLOOR cuts
    plot.set_yticks([10.0**t for t in ticks], labels)
    plot.set_yticks([], minor=True)


def _subtitle(run: Run) -> str:
    args, gamma = run.args, run.args.get("gamma")
    words = [
        args.get("model"),
        f"optimized for {args.get('climbs', 'a reward')}",
        f"{len(run.metrics)} iteration" + "s" * (len(run.metrics) > 1),
        gamma is not None and (f"regularization γ = {gamma:g}" if gamma else "no regularization"),
        args.get("seed") is not None and f"seed {args['seed']}",
    ]
    return "   ·   ".join(_elide(word, 70) for word in words if word)


def _elide(words, limit: int = 90) -> str:
    """One line of at most limit characters, free of what no font can draw."""
    words = " ".join(str(words).encode("utf-8", "replace").decode().split())
    return words if len(words) <= limit else words[: limit - 1].rstrip() + "…"


def _row(values: list) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _table(log: list[dict], name: str) -> np.ndarray:
    """A metric's values, (N, B), with NaN where there is none.

    An entry holds them image by image, as entry["images"][b][name].
    """
    rows = [_row([image.get(name) for image in entry.get("images") or []]) for entry in log]
    table = np.full((len(rows), max(1, *map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _over_images(reduce, table: np.ndarray) -> np.ndarray:
    """reduce (np.nanmean, np.nanmin) each row; NaN, without a warning, where no image has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(table, axis=1)


def _say(value: float) -> str:
    """A number as a reader wants it: three digits, a true minus sign."""
    size = abs(value)
    if not np.isfinite(value):
        return "–"
    digits = 3 if size < 1 else max(0, 2 - int(np.log10(size)))
    return (f"{value:.{digits}f}" if size == 0 or 1e-3 <= size < 1e6 else f"{value:.1e}").replace("-", "−")


def _change(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return " → ".join(map(_say, known[[0, -1]] if len(known) > 1 else known)) or "no value"


def _save(image: Image.Image, path: Path, **options) -> None:
    """Write the whole file or leave the old one."""
    data = io.BytesIO()
    image.save(data, **options)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def draw_run(folder) -> None:
    """evolution.png and evolution.gif. A figure that fails is a warning: the results are on disk already."""
    for name, draw in (("evolution.png", evolution_sheet), ("evolution.gif", evolution_gif)):
        try:
            draw(folder)
        except Exception as error:
            warnings.warn(f"{name} could not be drawn: {type(error).__name__}: {error}", stacklevel=2)
