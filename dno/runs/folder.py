"""The output folder of one run. Only this and the pictures of `figures` write files."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
import weakref
from importlib import metadata
from pathlib import Path

from dno.errors import UserError
from dno.models.specs import PACKAGE_ROOT
from dno.runs.files import write_whole
from rewards import to_uint8

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


class Run:
    """A folder `<output>/<prefix>-<date>-<time>/`, made here and never shared with another run.

    folder: this folder instead, which is missing or empty, or with `resume` the folder of a run.
    args.json, metrics.jsonl, images/, initial.png, best.png, best_noise.safetensors, evolution.png, evolution.gif,
    result.json, and the checkpoints (see `dno.runs.checkpoints`).
    Every file is written aside and renamed, and metrics line by line, so a stop at any moment leaves whole files.
    No other process can write to it until `close` is called, or the object is gone.
    Each method raises UserError where the disk is full or the folder cannot be written.
    """

    def __init__(self, output=None, prefix="SD", folder=None, resume=False):
        stem = f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"
        with _disk(output if folder is None else folder):
            self.made = folder is None or not Path(folder).expanduser().exists()
            if folder is None:
                Path(output).expanduser().mkdir(parents=True, exist_ok=True)
                folder = _new_folder(Path(output).expanduser(), stem)
            self.folder = Path(folder).expanduser()
            if not resume and self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"{folder} has files in it; give another folder, or resume the run that is there")
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            handle = lock_folder(self.folder)
            self.close = weakref.finalize(self, os.close, handle) if handle is not None else lambda: None
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def write_args(self, args, done=0):
        """args.json: what was asked and what it was resolved to, versions of the packages, revision of this code.

        done: iterations that an earlier start of the run made; what they were made with is kept as `history`.
        """
        history = []
        if done:
            with contextlib.suppress(OSError, ValueError):
                before = json.loads((self.folder / "args.json").read_text(encoding="utf-8"))
                run = {**before.get("resolved", {}), **before}
                names = ("versions", "git_revision", "device", "processes")
                history = [*before.get("history", []), {"until": done, **{name: run.get(name) for name in names}}]
        args = {**args, "versions": versions(), "git_revision": git_revision(), "history": history}
        self._write("args.json", json.dumps(_plain(args), indent=2).encode() + b"\n")

    def log(self, metrics):
        """Add one line to metrics.jsonl; what is not finite is written as null."""
        path = self.folder / "metrics.jsonl"
        line = json.dumps(_plain(metrics)).encode() + b"\n"
        (self.folder / "result.json").unlink(missing_ok=True)  # a run that goes on has no result yet
        # Unbuffered: a buffer would be written again when the file is closed, after the half line was cut off.
        with _disk(path), open(path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut(self, steps):
        """Keep what the first `steps` iterations left, and return their metrics; null, not finite, is NaN."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_bytes().splitlines(keepends=True)[:steps]
            metrics = [_numbers(json.loads(line)) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; it belongs to the run's checkpoint") from error
        if [isinstance(line, dict) and line.get("step") for line in metrics] != list(range(steps)):
            raise UserError(f"{path} has not the {steps} iterations that the checkpoint follows")
        with _disk(path):
            write_whole(path, b"".join(lines), fsync=True)
            for image in (self.folder / "images").glob("*.png"):
                match = re.fullmatch(r"(\d{3,})(_b\d+)?", image.stem, re.ASCII)  # the user's own files stay
                if match and int(match[1]) >= steps:
                    image.unlink()
        return metrics

    def sync(self):
        """Bring metrics.jsonl to the disk itself, before a checkpoint that relies on it."""
        path = self.folder / "metrics.jsonl"
        with _disk(path), open(path, "rb+") as file:
            os.fsync(file.fileno())

    def picture_step(self, name, index):
        """The iteration that `<name>.png` of an image is of, or None."""
        from PIL import Image

        try:
            with Image.open(self._picture(name, index)) as picture:
                return int(picture.text["step"])
        except (OSError, KeyError, ValueError):
            return None

    def write_result(self, result):
        """result.json, which says that the run was not cut short."""
        found = {
            "rewards": result.rewards.tolist(), "steps": result.steps, "stopped": result.stopped,
            "iterations": len(result.metrics), "first": result.metrics[0]["images"],
            "best": [{} if step is None else result.metrics[step]["images"][b] for b, step in enumerate(result.steps)],
            "seconds": sum(metrics["seconds"] for metrics in result.metrics),
        }  # fmt: skip
        self._write("result.json", json.dumps(_plain(found), indent=2).encode() + b"\n")

    def save_image(self, name, image, index=0, **text):
        """`<name>.png`, or `<name>_b<index>.png` for a batch's further images, of an image (3, H, W) in [-1, 1].

        text: what goes into the PNG's text chunk.
        """
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, str(value))
        file = io.BytesIO()
        Image.fromarray(to_uint8(image[None])[0]).save(file, format="PNG", pnginfo=info, compress_level=4)
        self._write(self._picture(name, index).relative_to(self.folder), file.getvalue())

    def _picture(self, name, index):
        return self.folder / f"{name}{f'_b{index}' if index else ''}.png"

    def save_noise(self, noise, **text):
        """best_noise.safetensors: `noise` (T + 1, B, C, h, w), float32, and what it belongs to as metadata."""
        from safetensors.torch import save

        tensors = {"noise": noise.detach().float().cpu().contiguous()}
        self._write("best_noise.safetensors", save(tensors, {key: str(value) for key, value in text.items()}))

    def save_gallery(self, entries, index=0):
        """`gallery.png`, or `gallery_b<index>.png`, of (caption, pixels (H, W, 3) in uint8), in rows of four."""
        if entries:
            self._write(self._picture("gallery", index).relative_to(self.folder), _contact_sheet(entries))

    def discard(self):
        """Take back what a new run that ended before its first iteration has made; nothing else is removed."""
        if self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for name in ("images", "trackers"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "args.json").unlink(missing_ok=True)

    def _write(self, name, data):
        path = self.folder / name
        with _disk(path):
            write_whole(path, data)


def _contact_sheet(entries, columns=4, gap=8, caption=26, tile=192):
    """The images in rows, each over its caption, as a PNG. Small ones are enlarged by a whole factor."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = entries[0][1].shape[:2]
    scale = -(-tile // width)  # at least as wide as a tile, or the caption would not fit
    kind = Image.Resampling.LANCZOS if scale <= 4 else Image.Resampling.NEAREST  # as the figures enlarge
    width, height, columns = width * scale, height * scale, min(columns, len(entries))
    rows = -(-len(entries) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, (text, pixels) in enumerate(entries):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + caption + gap)
        page.paste(Image.fromarray(pixels).resize((width, height), kind), (x, y))
        pen.text((x + width / 2, y + height + caption / 2), text, "#222222", font, "mm")
    file = io.BytesIO()
    page.save(file, format="PNG")
    return file.getvalue()


def lock_folder(folder):
    """Keep other processes from writing to the folder until the handle that this returns is closed.

    None where the system has no such locks. Raises UserError where another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is writing to {folder}; wait for it, or stop it first") from None
    except OSError:  # a network disk without locks
        os.close(handle)
        return None
    return handle


def git_revision():
    """The revision of the code, with "-dirty" where it was changed, or None outside a checkout."""
    command = ["git", "-C", str(PACKAGE_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _new_folder(parent, stem):
    for attempt in range(1, 1000):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise FileExistsError(f"{stem} and its numbered neighbours all exist")


@functools.cache
def versions():
    """The installed version of each package that a result may depend on, by name."""
    return {name: _version(name) for name in PACKAGES}


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(value):
    """What `_plain` wrote, with NaN where a number was not finite."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return math.nan if value is None else value


def _plain(value):
    """The value with JSON's types alone; a float that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextlib.contextmanager
def _disk(path):
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space or choose" if full else "choose"
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; {fix} another folder with --output"
        ) from error
