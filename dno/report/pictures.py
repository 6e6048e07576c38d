"""What a report is made of: the runs as their folders hold them, and their images as data URLs."""

import base64
import io
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dno.errors import UserError
from dno.report.figures import choose_steps

LOSSLESS = 128  # px; images up to this size are kept as they are, for every pixel of theirs is seen
# Longest side and JPEG quality of larger images. Smaller where a run's frames would not fit otherwise.
SIZES = ((512, 90), (384, 88), (256, 85))
RUN_BYTES, PAGE_BYTES = 9e6, 30e6  # of frames, in base64: of one run, of all runs
SAMPLE = 6  # frames that the size of all is judged by


@dataclass
class Picture:
    """One image of a batch: its curves and its files.

    values: by metric, a float or None for each step of the run; best: its best step; frames: files by step.
    """

    values: dict
    best: int | None
    frames: dict = field(default_factory=dict)


@dataclass
class Run:
    """What a folder holds. steps: those of metrics.jsonl, sorted; log: its entries; label: set by `_label`."""

    folder: Path
    args: dict
    steps: list
    log: list
    pictures: list
    label: str = ""
    name: str = ""

    @property
    def watched(self):
        return [str(name) for name in self.args.get("watched") or ()]

    @property
    def parts(self):
        """The objectives, where the reward is a sum of several."""
        weights = self.args.get("weights")
        return list(weights) if isinstance(weights, dict) and len(weights) > 1 else []

    @property
    def iterations(self):
        planned = self.args.get("opt_steps")
        unfinished = isinstance(planned, int) and planned > len(self.steps)
        return f"{len(self.steps)} of {planned}" if unfinished else str(len(self.steps))

    @property
    def seconds(self):
        """The median: the first iteration often takes longer."""
        known = [value for value in (_number(entry.get("seconds")) for entry in self.log) if value is not None]
        return statistics.median(known) if known else None

    @property
    def peak_memory_gb(self):
        return max((v for v in (_number(e.get("peak_memory_gb")) for e in self.log) if v is not None), default=None)


def read_run(folder):
    """The run in a folder. Raises UserError, in one line, where there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the folder of a run, such as output/SD-<date>-<time>")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        name = Path(error.filename or folder).name
        raise UserError(f"{folder} has no {name} to read ({error.strerror}); expected the folder of a run") from error
    except ValueError as error:
        raise UserError(f"{folder / 'args.json'} is not JSON: {error}") from error
    if not isinstance(args, dict):
        raise UserError(f"{folder / 'args.json'} holds no settings; expected a JSON object")
    entries = {}
    for line in lines:
        try:
            entry = json.loads(line)
            entries[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError, OverflowError):  # a run that was killed leaves half a line
            continue
    if not entries:
        raise UserError(f"{folder / 'metrics.jsonl'} has no entry; expected one JSON object an iteration")
    steps = sorted(entries)
    run = Run(folder, args, steps, [entries[step] for step in steps], [])
    files = _files(folder)
    count = max([1, *(len(e[k]) for e in run.log for k in ("images", "rewards") if isinstance(e.get(k), list)),
                 *(b + 1 for _, b in files)])  # fmt: skip
    metrics = ("reward", *run.parts, *run.watched, "probability", "probability_min", "grad_norm")
    for b in range(count):
        values = {name: [_value(entry, b, name) for entry in run.log] for name in metrics}
        run.pictures.append(_picture(b, steps, values, files))
    return run


def _files(folder):
    """The saved images, by (step, image); the step of initial.png and best.png is their name."""
    files = {}
    for path in sorted([*folder.glob("*.png"), *folder.glob("images/*.png")]):
        pattern = r"(\d{3,})(?:_b(\d+))?" if path.parent != folder else r"(initial|best)(?:_b(\d+))?"
        if match := re.fullmatch(pattern, path.stem):
            step = int(match[1]) if match[1].isdigit() else match[1]
            files[step, int(match[2] or 0)] = path
    return files


def _picture(b, steps, values, files):
    rewards = {step: reward for step, reward in zip(steps, values["reward"], strict=True) if reward is not None}
    best = max(rewards, key=rewards.get, default=None)
    saved = files.get(("best", b))
    if saved is not None:
        told = _step_of(saved)  # a limit on P(z) may have ruled out a higher reward
        best = told if told in steps else best
    frames = {step: path for (step, image), path in files.items() if image == b and step in steps}
    # Where only some steps were saved, the first and the best are there under names of their own.
    if ("initial", b) in files:
        frames.setdefault(steps[0], files["initial", b])
    if saved is not None and best is not None:
        frames.setdefault(best, saved)
    return Picture(values, best, dict(sorted(frames.items())))


def _step_of(path):
    try:
        with Image.open(path) as image:
            return int(image.info.get("step", ""))
    except (OSError, ValueError):
        return None


def _value(entry, b, name):
    """A metric of image b: as entry["images"][b][name], or as the mean where there is one image."""
    images, rewards = entry.get("images"), entry.get("rewards")
    if isinstance(images, list) and b < len(images) and isinstance(images[b], dict):
        return _number(images[b].get(name))
    if name == "reward" and isinstance(rewards, list) and b < len(rewards):
        return _number(rewards[b])
    return _number(entry.get(name)) if b == 0 else None


def _number(value):
    """The value as a finite float, else None. Seven digits: more than is shown, fewer than would fill the page."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")


class Pool:
    """The images of the page as data URLs, each once. A file that cannot be read as an image has no place in it."""

    def __init__(self):
        self.urls, self.places = [], {}

    def add(self, path, size):
        """The place of an image in `urls`, or None."""
        url = encode(path, *size)
        if url is not None and url not in self.places:
            self.places[url] = len(self.urls)
            self.urls.append(url)
        return self.places.get(url)

    def add_run(self, run, limit):
        """[[step, place], ...] for each picture, in at most about `limit` characters of base64."""
        paths = [path for picture in run.pictures for path in picture.frames.values()]
        sample = paths[:: max(1, len(paths) // SAMPLE)]
        for size in SIZES:
            typical = statistics.fmean([len(encode(path, *size) or "") for path in sample] or [0])
            if typical * len(paths) <= limit:
                break
        kept = max(2, int(limit / typical / len(run.pictures))) if typical else 0
        frames = []
        for picture in run.pictures:
            steps = choose_steps(list(picture.frames), kept, picture.best)
            places = [[step, self.add(picture.frames[step], size)] for step in steps]
            frames.append([[step, place] for step, place in places if place is not None])
        return frames


def encode(path, side, quality):
    """An image file as a data URL: PNG up to LOSSLESS px, else JPEG of at most `side` px; None if it is no image."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None
    file = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(file, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=quality, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
