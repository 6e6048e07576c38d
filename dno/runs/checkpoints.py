"""Checkpoints of a run: one file each, whole after a stop at any moment, verified bit by bit when read.

`<run folder>/checkpoints/000010.safetensors` holds the tensors and, as safetensors metadata, format, step, state (JSON)
and sha256: the digest of the whole file with 64 zeros in the place of the digest itself. No code in it is ever run.
"""

import contextlib
import errno
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from dno.errors import UserError
from dno.runs.files import sync_folder, write_whole

FORMAT = 2
NAME = r"(\d{6}|[1-9]\d{6,})\.safetensors"
PART = rf"\.{NAME}\.\d+-[0-9a-f]{{8}}\.part"  # what `write_whole` leaves behind if the process is killed
BLANK = "0" * 64


@dataclass(frozen=True)
class Checkpoint:
    """What `load_newest` returns. tensors: on the CPU, by name; state: a dict as JSON gives it back."""

    step: int
    tensors: dict
    state: dict
    path: Path


class OtherVersion(UserError):
    """The checkpoints are not damaged, but another version of this code made them. Leave the folder as it is."""


class _Damaged(Exception):
    """Why a checkpoint cannot be used, in a few words."""


def save_checkpoint(run_folder, step, tensors, state, keep=2):
    """Write the checkpoint of a step, then remove all but the newest `keep`. Returns its path.

    tensors: by name, on any device; dtypes and bits are kept.
    state: a dict for JSON; inf and nan survive, tuples become lists and all keys strings.
    keep: at least 1. Checkpoints of later steps are removed too: they were damaged, and the run resumed before them.
    Raises UserError if the disk is full or the folder cannot be written; the older checkpoints are then kept.
    """
    assert keep >= 1 and step >= 0, (keep, step)
    # Clones, because safetensors refuses two names for one memory.
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    metadata = {"format": str(FORMAT), "step": str(step), "state": json.dumps(state), "sha256": BLANK}
    data = save(tensors, metadata)
    data = data.replace(_field(BLANK), _field(_digest(data)), 1)

    folder = Path(run_folder).expanduser() / "checkpoints"
    path = folder / f"{step:06d}.safetensors"
    try:
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        _remove(part for _, part in _find(folder, PART))
        found = _find(folder, NAME)
        write_whole(path, data, fsync=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {_fix(error)}") from error
    older = [path for other, path in found if other < step and _is_file(path)]
    _remove([*older[keep - 1 :], *(path for other, path in found if other > step)])
    return path


def load_newest(run_folder, report=warnings.warn):
    """The newest undamaged `Checkpoint`. `report` gets one line for each damaged one that is newer.

    Raises UserError if there is none: no such folder, not a run folder, no checkpoint yet, or all damaged; and
    OtherVersion if an earlier or a newer version of this code made them.
    """
    run_folder = Path(run_folder).expanduser()
    folder = run_folder / "checkpoints"
    try:
        if not run_folder.exists():
            raise UserError(f"{run_folder} does not exist; expected a run folder, with args.json in it")
        if not folder.is_dir() and not (run_folder / "args.json").is_file():
            raise UserError(f"{run_folder} is not a run folder: it has no args.json and no checkpoints")
        found = _find(folder, NAME) if folder.is_dir() else []
        if not found and any(folder.glob("*/manifest.json")):  # format 1: a folder per checkpoint
            raise OtherVersion(
                f"{run_folder} was made by an earlier version, whose checkpoints cannot be resumed; "
                f"start a new run with --noise {run_folder / 'best_noise.safetensors'}"
            )
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}; make the folder readable") from error
    if not found:
        raise UserError(f"{run_folder} has no checkpoint to resume from; start a new run")
    faults = {}
    for step, path in found:
        try:
            checkpoint = _read(path, step)
        except _Damaged as fault:
            faults[path.stem] = fault
            continue
        for name, fault in faults.items():
            report(f"checkpoint {name} is damaged ({fault}); using {path.stem}")
        return checkpoint
    listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
    raise UserError(f"every checkpoint in {folder} is damaged: {listed}; start a new run")


def _read(path, step):
    """The checkpoint in a file. Raises _Damaged unless every bit is as it was written."""
    if not _is_file(path):
        raise _Damaged("not a regular file")
    try:
        with safe_open(path, "numpy") as file:  # maps the file and checks the sizes in its header; allocates nothing
            metadata = file.metadata()
        data, sha256 = path.read_bytes(), metadata["sha256"]
        # The digest comes first, in every format to come as well: a flipped bit must not look like another version.
        if _digest(data, sha256) != sha256:
            raise _Damaged("sha256 differs")
        version = int(metadata["format"])
        if version > FORMAT:
            raise OtherVersion(f"{path} was made by a newer version (format {version}, this is {FORMAT}); update")
        if (version, int(metadata["step"])) != (FORMAT, step):
            raise _Damaged(f"not of format {FORMAT} and step {step}")
        return Checkpoint(step, load(data), json.loads(metadata["state"]), path)
    except OtherVersion:
        raise
    except OSError as error:
        raise _Damaged(error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _Damaged("cut short, or not a safetensors file") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Damaged(f"not a checkpoint, {type(error).__name__}") from error


def _find(folder, pattern):
    """(step, path) of everything in the folder with such a name, newest first."""
    matches = ((re.fullmatch(pattern, path.name, re.ASCII), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _is_file(path):
    return path.is_file() and not path.is_symlink()


def _remove(paths):
    """Remove what is a file; a folder or a link with such a name is not ours."""
    for path in filter(_is_file, paths):
        with contextlib.suppress(OSError):  # no reason to fail; the next save tries again
            path.unlink()


def _field(sha256):
    """The digest as it stands in the header. In a text the quotes are escaped, so it stands there only once."""
    return f'"sha256":"{sha256}"'.encode()


def _digest(data, written=BLANK):
    """sha256 of a whole file, with zeros for the digest that is written in its header."""
    end = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[:end].replace(_field(written), _field(BLANK), 1))
    digest.update(memoryview(data)[end:])  # not copied
    return digest.hexdigest()


def _fix(error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space; the older checkpoints are kept"
    if error.errno == errno.ENOENT:
        return "the run folder must stay where it is, and no other process may write to it"
    if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
        return "move away what is there; the older checkpoints are kept"
    return "make the folder writable; the older checkpoints are kept"
