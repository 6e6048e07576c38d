"""Run folders as everything that shows a run reads them, and numbers as a reader wants them.

A folder may be of any method, of a run that stopped early or is still going, or of an earlier version: what is not
there is None, and what cannot be read is left out.
"""

import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dno.errors import UserError

P_FLOOR = 1e-12  # P(z) falls without end; below this there is nothing more to say
# When there was one method, args.json was a flat dict. It said none of these, and the run filled in the others itself:
# their values say nothing about what was asked.
_UNSAID = {"method": "dno", "title": "Direct Noise Optimization",
           "columns": {"regularizer": "regularizer", "grad_norm": "gradient norm"}}  # fmt: skip
FILLED_IN = ("precision", "device", "checkpointing", "height", "width", "model_source", "folder")


@dataclass(frozen=True)
class RunImage:
    """One image of a run.

    prompt: what it was made for. best: the iteration of its best, or None if no reward is a number.
    frames: its files by iteration, sorted. best_file, gallery: its `best.png` and `gallery.png`, or None.
    """

    prompt: str
    best: int | None
    frames: dict
    best_file: Path | None = None
    gallery: Path | None = None

    @property
    def frames_and_best(self):
        """`frames`, in which best.png stands in for the best if that iteration was not saved."""
        extra = {} if self.best is None or self.best_file is None else {self.best: self.best_file}
        return dict(sorted((extra | self.frames).items()))


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    method: its name. args: every setting as resolved, and the facts beside them, in one flat dict. asked: the settings
        as they were given.
    log: the entries of metrics.jsonl, one per iteration; steps: their iterations, sorted.
    result: what result.json holds, or None if the run did not come to its end. images: a `RunImage` per image.
    """

    folder: Path
    method: str
    args: dict
    asked: dict
    steps: list
    log: list
    result: dict | None
    images: list

    @property
    def title(self):
        """The method's name for people."""
        return str(self.args.get("title") or self.method)

    @property
    def prompts(self):
        """The different prompts of its images."""
        return list(dict.fromkeys(image.prompt for image in self.images))

    @property
    def watched(self):
        """The rewards that were recorded only."""
        names = self.args.get("watched")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def parts(self):
        """The objectives, if the reward is a sum of several."""
        weights = self.args.get("weights")
        return list(weights) if isinstance(weights, dict) and len(weights) > 1 else []

    @property
    def columns(self):
        """{metric: title} of the method's own metrics that are worth a chart."""
        columns, known = self.args.get("columns"), {"reward", "probability", *self.parts, *self.watched}
        columns = columns if isinstance(columns, dict) else {}
        return {name: str(title) for name, title in columns.items() if name not in known and self.has(name)}

    @property
    def best(self):
        """The iteration of the highest mean reward, or of a single image's best; None if no reward is a number."""
        if len(self.images) == 1:
            return self.images[0].best
        return _highest(self.steps, self.means("reward"))

    @property
    def iterations(self):
        """How many there are, as text, and of how many if the run did not make all that were planned."""
        planned = self.args.get("iterations", self.args.get("opt_steps"))
        unfinished = isinstance(planned, int) and planned > len(self.steps)
        return f"{len(self.steps)} of {planned}" if unfinished else str(len(self.steps))

    @property
    def seconds(self):
        """Seconds per iteration, or None. The median: the first iteration often takes longer."""
        known = [value for value in self.means("seconds") if value is not None]
        return statistics.median(known) if known else None

    @property
    def peak_memory_gb(self):
        return max((value for value in self.means("peak_memory_gb") if value is not None), default=None)

    def means(self, name):
        """A metric over the images, a float or None per iteration."""
        return [number(entry.get(name)) for entry in self.log]

    def values(self, name, b):
        """A metric of image b, a float or None per iteration."""
        return [_value(entry, b, name) for entry in self.log]

    def has(self, name):
        """Whether the metric has a value at all."""
        return any(value is not None for b in range(len(self.images)) for value in self.values(name, b))


def read_run(folder):
    """The run in a folder. Raises UserError, in one line, if there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the folder of a run, such as output/SD-<date>-<time>")
    method, args, asked = _read_args(folder)
    log = read_log(folder)
    run = Run(folder, method, args, asked, [entry["step"] for entry in log], log, read_result(folder), [])
    files = _files(folder)
    count = max((len(e[k]) for e in log for k in ("images", "rewards") if isinstance(e.get(k), list)), default=0)
    for b in range(count or 1 + max((b for _, b in files), default=0)):
        run.images.append(_image(run, b, files))
    return run


def read_log(folder):
    """The entries of metrics.jsonl, sorted by step; of several for a step, the last. Raises UserError for none."""
    path = Path(folder) / "metrics.jsonl"
    entries = {}
    for line in _text(path, errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # a run that was killed, or is still writing, leaves half a line
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0:
            entries[entry["step"]] = entry
    if not entries:
        raise UserError(f"{path} has no entry; expected one JSON object per iteration")
    return [entries[step] for step in sorted(entries)]


def read_result(folder):
    """What result.json holds, or None if there is none: the run did not come to its end."""
    try:
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def _read_args(folder):
    """(method, args, asked) of args.json, in its form of today or as one flat dict."""
    path = folder / "args.json"
    try:
        args = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(args, dict) and "settings" not in args:
        asked = {name: value for name, value in args.items() if name not in FILLED_IN}
        return "dno", {**_UNSAID, **args}, asked
    asked, resolved = (args.get(name, {}) if isinstance(args, dict) else None for name in ("settings", "resolved"))
    if not isinstance(asked, dict) or not isinstance(resolved, dict):
        raise UserError(f"{path} holds no settings; expected a JSON object")
    facts = {name: value for name, value in args.items() if name not in ("settings", "resolved")}
    method = str(args.get("method", "dno"))
    return method, {"method": method, **asked, **resolved, **facts}, asked


def _text(path, errors="strict"):
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise UserError(
            f"{path.parent} has no {path.name} to read ({error.strerror}); expected the folder of a run"
        ) from error


def _files(folder):
    """The saved images by (iteration, image); initial.png, best.png and gallery.png have their names for it."""
    files = {}
    for path in sorted([*folder.glob("*.png"), *folder.glob("images/*.png")]):
        pattern = r"(\d{3,})(?:_b(\d{1,4}))?" if path.parent != folder else r"(initial|best|gallery)(?:_b(\d{1,4}))?"
        if match := re.fullmatch(pattern, path.stem, re.ASCII):
            files[int(match[1]) if match[1].isdigit() else match[1], int(match[2] or 0)] = path
    return files


def _image(run, b, files):
    best, saved, known = _highest(run.steps, run.values("reward", b)), files.get(("best", b)), set(run.steps)
    if saved is not None:
        told = _step_of(saved)  # a limit on P(z) may have ruled out a higher reward
        best = told if told in known else best
    frames = {step: path for (step, image), path in files.items() if image == b and step in known}
    if 0 in known and ("initial", b) in files:  # where only some iterations were saved
        frames.setdefault(0, files["initial", b])
    prompt = run.args.get("prompt")
    if isinstance(prompt, list):
        prompt = prompt[min(b, len(prompt) - 1)] if prompt else None
    prompt = "" if prompt is None else str(prompt)
    return RunImage(prompt, best, dict(sorted(frames.items())), saved, files.get(("gallery", b)))


def _highest(steps, rewards):
    known = {step: reward for step, reward in zip(steps, rewards, strict=True) if reward is not None}
    return max(known, key=known.get, default=None)


def _step_of(path):
    try:
        with Image.open(path) as image:
            return int(image.info.get("step", ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def open_image(path):
    """The image of a file in RGB, or None if it cannot be read as one."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _value(entry, b, name):
    """A metric of image b: entry["images"][b][name], or what the entry says of all images, if it says it."""
    images, rewards = entry.get("images"), entry.get("rewards")
    own = images[b] if isinstance(images, list) and b < len(images) and isinstance(images[b], dict) else {}
    if name in own:
        return number(own[name])
    if name == "reward" and isinstance(rewards, list):
        return number(rewards[b]) if b < len(rewards) else None
    return number(entry.get(name)) if b == 0 or own else None


def number(value):
    """The value as a float, else None: also if it is not finite, or too large to be drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def choose_steps(steps, count, best=None):
    """At most count of the sorted steps, evenly spaced, with the first, the last and (if there) the best."""
    if len(steps) <= count:
        return list(steps)
    goals = [steps[0] + (steps[-1] - steps[0]) * i / (count - 1) for i in range(count)]
    chosen = {min(steps, key=lambda step: abs(step - goal)) for goal in goals}
    if best in steps and best not in chosen:
        inner = sorted(chosen - {steps[0], steps[-1]}, key=lambda step: abs(step - best))
        chosen = chosen - set(inner[:1]) | {best}  # it takes its neighbour's place
    return sorted(chosen)


def elide(value, limit=120):
    """One line of at most `limit` characters, free of what no font can draw and no page may hold."""
    value = " ".join(str(value).encode("utf-8", "replace").decode().split())
    value = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", value)
    return value if len(value) <= limit else value[: limit - 1].rstrip() + "…"


def say(value, plain=False):
    """A number as a reader wants it: four decimals, fewer if it is large, a power of ten if it is small.

    None and what is not finite are a dash. plain: for fonts without a minus sign and raised digits.
    report.html has the same function.
    """
    if value is None or not math.isfinite(value):
        return "-" if plain else "–"
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        words = f"{mantissa}e{int(exponent)}" if plain else f"{mantissa}×{ten_to(int(exponent))}"
    else:
        words = f"{value:.{4 if size < 10 else max(0, 4 - int(math.log10(size)))}f}"
    return words if plain else words.replace("-", "−")


def ten_to(exponent):
    """A power of ten, with the exponent raised."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def log_axis(lowest):
    """(bottom, top, ticks) of the axis of P(z), as exponents of ten: from a little over 1, where most lines begin, down
    to the decade of the lowest value, two decades at least.

    ticks: (exponent, label) each.
    """
    bottom = min(-2, math.floor(math.log10(max(lowest, P_FLOOR)) + 1e-9))
    cut = round(math.log10(P_FLOOR))
    labels = {0: "1", -1: "0.1", -2: "0.01", cut: f"≤{ten_to(cut)}"}
    ticks = range(0, bottom - 1, -max(1, -bottom // 4))
    return bottom, -0.03 * bottom, [(at, labels.get(at, ten_to(at))) for at in ticks]
