"""Figures of a run, drawn from the files in its folder: a sheet to read and a loop to watch.

All that is read is `args.json`, `metrics.jsonl` and the saved images, so a run that stopped early can be
drawn, and an old one drawn again. Whatever the method, what is drawn is what the run recorded.
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dno.errors import UserError
from dno.report.reading import P_FLOOR, Run, choose_steps, elide, log_axis, open_image, read_run, say
from dno.runs.files import write_whole

# The sheet, in pixels. Eight columns of 192 show a 64-pixel image at exactly three times its size.
DPI, WIDTH, MARGIN, COLUMNS, TILE, GAP, ROWS = 120, 1680, 44, 8, 192, 8, 4
STRIP_TOP, PLOT_HEIGHT, PANEL_HEIGHT, AROUND_PLOT, TICKS, PROMPT_LINE = 158, 300, 170, 146, 66, 26
# Okabe and Ito's blue and vermilion, and a dark green and purple: apart for the colour-blind too.
BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#00795A", "#8A4F7D", "#222222", "#666666"

# The loop. A run of few frames plays more slowly, or it would be over before it is seen.
GIF_FRAMES, GIF_MIN, GIF_MAX, GIF_MAX_IN_BATCH, CAPTION = 150, 256, 512, 256, 30
GIF_MS, GIF_SLOWEST_MS, GIF_WHOLE_MS, GIF_LAST_MS = 100, 400, 2500, 1500


def draw_run(folder) -> None:
    """evolution.png and evolution.gif. A figure that fails is a warning: the results are on disk already."""
    for name, draw in (("evolution.png", evolution_sheet), ("evolution.gif", evolution_gif)):
        try:
            draw(folder)
        except Exception as error:
            warnings.warn(f"{name} could not be drawn: {type(error).__name__}: {error}", stacklevel=2)


def evolution_sheet(folder) -> None:
    """Write folder/evolution.png: frames over the iterations; under them the reward, P(z) and what else was recorded.

    folder: a run's folder, with metrics.jsonl, images/ and args.json.
    Raises UserError if the folder has no metrics or no images.
    """
    run = read_run(folder)
    strip = _strip(run)
    groups = _arranged(_panels(run), strip.bottom + 76)
    _, top, tall, _ = groups[-1]
    sheet = _Sheet(top + tall + 76)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a prompt may be in any script
        sheet.write(MARGIN, 62, _heading(run), 17, weight="bold")
        sheet.write(MARGIN, 98, _subtitle(run), 11, GREY)
        _write_strip(sheet, run, strip)
        for panels, top, tall, across in groups:
            for i, panel in enumerate(panels):
                pitch = (WIDTH - 2 * MARGIN + 28) / across
                left, room = MARGIN + i * pitch, pitch - 28
                sheet.write(left, top - 42, panel.title, 12, room=room, weight="bold")
                sheet.write(left, top - 18, panel.words, 10.5, panel.color, room=room)
                plot = sheet.axes(left + TICKS, top, room - TICKS, tall)
                panel.draw(plot, strip.shown)
                _dress(plot, run.steps, run.best)
        page = sheet.image()
    # The frames go in last and past matplotlib, which would resample them.
    for (b, step), tile in strip.tiles.items():
        x, y = strip.place(b, step, tile)
        if step == strip.marked:
            page.paste(ORANGE, (x - 4, y - 4, x + tile.width + 4, y + tile.height + 4))
        page.paste(tile, (x, y))
    _save(page, run.folder / "evolution.png", format="PNG")


def evolution_gif(folder) -> None:
    """Write folder/evolution.gif: the saved frames as a loop, each over its iteration and its reward.

    folder: a run's folder, with metrics.jsonl, images/ and args.json.
    Raises UserError if the folder has no metrics or no images.
    """
    run = read_run(folder)
    frames, count = _frames(run), min(len(run.images), ROWS)
    steps = choose_steps(list(frames), GIF_FRAMES, run.best)
    first = next(filter(None, (open_image(path) for step in steps for path in frames[step].values())), None)
    if first is None:
        raise _no_images(run)
    longer, limit = max(first.size), GIF_MAX if count == 1 else GIF_MAX_IN_BATCH
    scale = -(-GIF_MIN // longer) if longer < GIF_MIN else min(1, limit / longer)
    size = tuple(max(1, round(side * scale)) for side in first.size)
    pages = [_gif_page(run, frames[step], step, size, (step + 1) / (steps[-1] + 1)) for step in steps]
    pace = max(GIF_MS, min(GIF_SLOWEST_MS, GIF_WHOLE_MS // len(pages) // 10 * 10))
    durations = [pace] * (len(pages) - 1) + [GIF_LAST_MS]
    _save(pages[0], run.folder / "evolution.gif", format="GIF", save_all=True, append_images=pages[1:],
          duration=durations, loop=0)  # fmt: skip


def _frames(run: Run) -> dict[int, dict[int, Path]]:
    """The files of the images by iteration; of one that stopped before the others, its last."""
    # In a batch each image has a best iteration of its own, so there best.png is no column.
    single = len(run.images) == 1
    each = [image.frames_and_best if single else image.frames for image in run.images]
    frames, latest = {}, {}
    for step in sorted({step for one in each for step in one}):
        frames[step] = latest = latest | {b: one[step] for b, one in enumerate(each) if step in one}
    if not frames:
        raise _no_images(run)
    return frames


def _no_images(run: Run) -> UserError:
    return UserError(f"{run.folder} has no images to draw; expected images/000.png and so on, or initial.png")


class _Strip(NamedTuple):
    """The frames at the top of the sheet: a column per shown iteration, a row per image of the batch.

    marked: the iteration with a frame round it; rows, more: images that are shown, and that are not; tiles: by
    (image, iteration); prompt_line: pixels over each row for its own prompt.
    """

    shown: list[int]
    marked: int | None
    rows: int
    more: int
    tiles: dict[tuple[int, int], Image.Image]
    tile_height: int
    prompt_line: int

    def top(self, b: int) -> int:
        return STRIP_TOP + b * (self.tile_height + 42 + self.prompt_line) + self.prompt_line

    @property
    def bottom(self) -> int:
        return self.top(self.rows) - self.prompt_line + (28 if self.more else 0)

    def place(self, b: int, step: int, tile: Image.Image) -> tuple[int, int]:
        x = MARGIN + self.shown.index(step) * (TILE + GAP) + (TILE - tile.width) // 2
        return x, self.top(b) + (self.tile_height - tile.height) // 2


def _strip(run: Run) -> _Strip:
    frames, batch = _frames(run), len(run.images)
    # If every k-th iteration was saved, the best of the frames need not be the best of the run.
    rewards = dict(zip(run.steps, run.means("reward"), strict=True))
    marked = max((step for step in frames if rewards[step] is not None), key=rewards.get, default=None)
    marked = run.best if run.best in frames else marked
    shown, rows = choose_steps(list(frames), COLUMNS, marked), min(batch, ROWS)
    tiles = {(b, s): _tile(frames[s][b]) for s in shown for b in range(rows) if b in frames[s]}
    tiles = {place: tile for place, tile in tiles.items() if tile is not None}
    if not tiles:
        raise _no_images(run)
    height = max(tile.height for tile in tiles.values())
    return _Strip(shown, marked, rows, batch - rows, tiles, height, PROMPT_LINE if len(run.prompts) > 1 else 0)


def _write_strip(sheet: "_Sheet", run: Run, strip: _Strip) -> None:
    for column, step in enumerate(strip.shown):
        x, first = MARGIN + column * (TILE + GAP) + TILE / 2, column == 0
        head, style = ("iteration " if first else "") + str(step), {"color": GREY}
        if step == strip.marked:
            head += " · best" if step == run.best else " · best shown"
            style = {"color": ORANGE, "weight": "bold"}
        sheet.write(x, STRIP_TOP - 13, head, room=TILE + GAP, ha="center", **style)
        for b in (b for b in range(strip.rows) if (b, step) in strip.tiles):
            words = ("reward " if first else "") + say(run.values("reward", b)[run.steps.index(step)])
            sheet.write(x, strip.top(b) + strip.tile_height + 23, words, room=TILE, ha="center")
    for b in range(strip.rows if strip.prompt_line else 0):
        sheet.write(MARGIN, strip.top(b) - 9, f"“{elide(run.images[b].prompt)}”", color=GREY)
    if strip.more:
        sheet.write(MARGIN, strip.bottom - 10, f"and {strip.more} more in the batch", color=GREY)


class _Sheet:
    """A page of matplotlib, measured in pixels from the top left."""

    def __init__(self, height: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height = -(-height // 15) * 15  # whole eighths of an inch, so that inches and pixels agree exactly
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def write(self, x, y, words, size=10.5, color=INK, room=WIDTH - 2 * MARGIN, **style):
        """Words with their baseline at (x, y), smaller if there is no room."""
        style = {"family": "DejaVu Sans", "parse_math": False, "color": color, "size": size} | style
        text = self.figure.text(x / WIDTH, 1 - y / self.height, words, **style)
        # Step by step, for hinting makes widths jump.
        while text.get_window_extent(self.canvas.get_renderer()).width > room and text.get_size() > 4:
            text.set_size(0.95 * text.get_size())

    def axes(self, left, top, width, height):
        box = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(box)

    def image(self) -> Image.Image:
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")


def _gif_page(run: Run, frames: dict[int, Path], step: int, size: tuple[int, int], done: float) -> Image.Image:
    """One frame of the loop: the images side by side, a bar that fills with `done`, the captions."""
    (width, height), roomy, count = size, size[0] >= 220, min(len(run.images), ROWS)
    page = Image.new("RGB", (count * (width + 4) - 4, height + CAPTION), "white")
    pen, font, y = ImageDraw.Draw(page), ImageFont.load_default(15), height + CAPTION * 0.6
    for b in (b for b in range(count) if b in frames):
        image = open_image(frames[b])
        if image is not None:
            page.paste(_resize(image, size), (b * (width + 4), 0))
        reward = run.values("reward", b)[run.steps.index(step)]
        words = ("reward " if b == 0 and roomy else "") + say(reward, plain=True)
        pen.text((b * (width + 4) + width - 6, y), words, INK, font, "rm")
    pen.text((6, y), f"iteration {step}" if roomy else str(step), INK, font, "lm")
    # A palette per frame, for a run goes through more than 256 colours. Median cut alone leaves halos on edges,
    # so it is refined (kmeans), on a small copy for speed. The caption keeps its own colours.
    # No dithering: its grain would crawl from frame to frame, and double the file.
    palette = page.crop((0, 0, page.width, height)).resize((128, 128), Image.Resampling.NEAREST)
    palette = palette.quantize(252, method=Image.Quantize.MEDIANCUT, kmeans=1).getpalette()[: 3 * 252]
    colors = Image.new("P", (1, 1))
    colors.putpalette(palette + [255, 255, 255, *bytes.fromhex(INK[1:]), *bytes.fromhex(BLUE[1:])])
    pen.rectangle((0, height, max(1, round(page.width * done)) - 1, height + 2), BLUE)
    return page.quantize(palette=colors, dither=Image.Dither.NONE)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """LANCZOS keeps edges clean at 3 or 4 times a drawing's size; past that only whole pixels stay crisp."""
    kind = Image.Resampling.NEAREST if size[0] > 4 * image.width else Image.Resampling.LANCZOS
    return image.resize(size, kind)


def _tile(path: Path) -> Image.Image | None:
    """A frame as the sheet shows it: as wide as its column, unless that made it more than twice as high."""
    image = open_image(path)
    if image is None:
        return None
    scale = min(TILE / image.width, 2 * TILE / image.height)
    return _resize(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))


class _Panel(NamedTuple):
    """A plot: its title, a line of words under it in its colour, and draw(axes, shown iterations)."""

    title: str
    words: str
    color: str
    draw: object


def _panels(run: Run) -> tuple[list[_Panel], list[_Panel]]:
    """(the reward and, if there is one, P(z); everything else that was recorded)."""
    reward, each = _floats(run.means("reward")), _table(run, "reward")
    words = _change(reward) + ("" if run.best is None else f", best at iteration {run.best}")
    words += "  (bold: mean of the batch)" if each.shape[1] > 1 else ""
    main = [_Panel("Reward", words, BLUE, _curves(run, each, reward, BLUE, run.best))]
    if run.has("probability") or run.has("probability_min"):
        main.append(_probability(run))
    others = [(name, name, "part of the reward: ", BLUE) for name in run.parts]
    others += [(name, name, "not optimized: ", PURPLE) for name in run.watched if name not in run.parts]
    others += [(name, title[:1].upper() + title[1:], "", GREY) for name, title in run.columns.items()]
    small = []
    for name, title, note, color in others:
        each = _table(run, name)
        mean = _over_images(np.nanmean, each)
        draw = _curves(run, each, mean, color, dot=3.5)
        small.append(_Panel(elide(title, 40), note + _change(mean), color, draw))
    return main, small


def _probability(run: Run) -> _Panel:
    each = np.clip(_table(run, "probability"), P_FLOOR, 1)
    least = np.clip(_over_images(np.nanmin, _table(run, "probability_min")), P_FLOOR, 1)
    lowest = min(each.min(initial=1, where=each > 0), least.min(initial=1, where=least > 0))
    bold = np.exp(_over_images(np.nanmean, np.log(each)))  # geometric: else the largest hides the others
    draw_lines = _curves(run, each, bold, GREEN)

    def draw(plot, shown):
        _log_scale(plot, lowest)
        plot.plot(run.steps, least, color=GREEN, lw=1.5, ls=(0, (3, 2)))
        draw_lines(plot, shown)

    words = "1 = typical noise" + ("; dashed: the least of any single noise" if np.isfinite(least).any() else "")
    return _Panel("P(z), how probable the noise is", words, GREEN, draw)


def _curves(run: Run, each: np.ndarray, bold: np.ndarray, color: str, best: int | None = None, dot: float = 5):
    """draw(axes, shown): every image thin, their mean bold, with dots where frames are shown and a ring at the best."""

    def draw(plot, shown):
        if each.shape[1] > 1:
            plot.plot(run.steps, each, color=color, lw=0.9, alpha=0.35)
        taken = [i for i, step in enumerate(run.steps) if step in shown]  # dots: the frames above
        plot.plot(run.steps, bold, "-o", color=color, lw=2.2, ms=dot, markevery=taken, clip_on=False)
        if best is not None:
            plot.plot([best], [bold[run.steps.index(best)]], "o", color=ORANGE, ms=8, clip_on=False, zorder=5)

    return draw


def _arranged(panels: tuple[list[_Panel], list[_Panel]], top: int) -> list[tuple[list[_Panel], int, int, int]]:
    """Rows of panels from this pixel on: (panels, top, height of a plot, how many fit beside each other).

    Up to three stand in one row; of more, the main ones do, and the others in rows of up to four under them.
    """
    main, small = panels
    if len(main) + len(small) <= 3:
        main, small = main + small, []
    rows = -(-len(small) // 4)
    across = -(-len(small) // max(1, rows))
    below = range(top + PLOT_HEIGHT + AROUND_PLOT, 10**9, PANEL_HEIGHT + AROUND_PLOT)
    groups = [(small[i * across : (i + 1) * across], y, PANEL_HEIGHT, across) for i, y in zip(range(rows), below)]
    return [(main, top, PLOT_HEIGHT, len(main)), *groups]


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
        room = 0.01 * max(abs(low), abs(high)) - (high - low) / 2
        if room > 0:  # a curve that hardly moves must not look as if it did
            plot.set_ylim(low - room, high + room)
        plot.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        # Each label separately: a power of ten written once over the axis would run into the line above it.
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:.7g}".replace("-", "−"))
    if best is not None:
        plot.axvline(best, color=ORANGE, lw=1.3, ls=(0, (1, 2)), zorder=1.5)
    plot.tick_params(labelsize=10, colors=GREY, labelfontfamily="DejaVu Sans", length=3)


def _log_scale(plot, lowest: float) -> None:
    bottom, top, ticks = log_axis(lowest)
    plot.set_yscale("log")
    plot.set_ylim(10.0**bottom, 10.0**top)
    plot.set_yticks([10.0**at for at, _ in ticks], [label for _, label in ticks])
    plot.set_yticks([], minor=True)


def _heading(run: Run) -> str:
    first, more = run.prompts[0], len(run.prompts) - 1
    return (f"“{elide(first, 90)}”" if first else run.title) + (f" and {more} more" if more else "")


def _subtitle(run: Run) -> str:
    args, gamma = run.args, run.args.get("gamma")
    regularized = isinstance(gamma, int | float)
    words = [
        args.get("model"),
        run.title,
        args.get("climbs") and f"reward {args['climbs']}",
        f"{run.iterations} iteration" + "s" * (run.iterations != "1"),
        regularized and (f"regularization γ = {gamma:g}" if gamma else "no regularization"),
        args.get("seed") is not None and f"seed {args['seed']}",
    ]
    return "   ·   ".join(elide(word, 70) for word in words if word)


def _floats(values: list) -> np.ndarray:
    """As floats, with NaN for None."""
    return np.array(values, dtype=float)


def _table(run: Run, name: str) -> np.ndarray:
    """A metric's values, (N, B)."""
    return np.stack([_floats(run.values(name, b)) for b in range(len(run.images))], axis=1)


def _over_images(reduce, table: np.ndarray) -> np.ndarray:
    """reduce (np.nanmean, np.nanmin) each row; NaN, without a warning, if no image has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(table, axis=1)


def _change(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return " → ".join(map(say, known[[0, -1]] if len(known) > 1 else known)) or "no value"


def _save(image: Image.Image, path: Path, **options) -> None:
    data = io.BytesIO()
    image.save(data, **options)
    write_whole(path, data.getvalue())
