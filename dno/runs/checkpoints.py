"""Checkpoints of a run: written so that a stop at any moment leaves a whole one, and checked when they are read.

    <run folder>/checkpoints/000010/{tensors.safetensors, state.json, manifest.json}

manifest.json, written last, holds the size and the sha256 of the others. Nothing in them is ever run as code.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dno.errors import UserError
from dno.runs.files import sync_folder, write

FORMAT = 1
FILES = ("tensors.safetensors", "state.json")
# A folder on its way in or out has a name that is never taken for a checkpoint's:
# .part is half written or half removed, .old is whole and waits until another of the same step has its place.
FINAL = r"(\d{6}|[1-9]\d{6,})"
PART, OLD = rf"\.{FINAL}\.part", rf"\.{FINAL}\.old"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_newest` read. tensors: on the CPU, by name; state: a dict as JSON gives it back."""

    step: int
    tensors: dict
    state: dict
    path: Path


class _Damaged(Exception):
    """Why a checkpoint cannot be used, in a few words."""


def save_checkpoint(run_folder, step, tensors, state, keep=2):
    """Write the checkpoint of a step, then remove all but the newest `keep`. Returns its folder.

    tensors: by name, of any device; their dtype and bits are kept.
    state: a dict for JSON; inf and nan survive, tuples become lists and all keys strings.
    keep: at least 1. Checkpoints of later steps go too: the run went back before them, for they were damaged.
    Raises UserError where the disk is full or the folder cannot be written; the checkpoints so far are then kept.
    """
    assert keep >= 1 and step >= 0, (keep, step)
    # A clone, for safetensors refuses two names of one memory.
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    contents = dict(zip(FILES, (save(tensors), json.dumps(state, indent=1).encode())))
    entries = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
    contents["manifest.json"] = json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1).encode()

    folder = Path(run_folder).expanduser() / "checkpoints"
    path, part, old = (folder / form.format(step) for form in ("{:06d}", ".{:06d}.part", ".{:06d}.old"))
    try:
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        _settle(folder)
        try:
            part.mkdir()
            for name, data in contents.items():
                write(part / name, data, fsync=True)
            sync_folder(part)
            if path.exists():
                os.replace(path, old)  # `load_newest` finds it there too
            os.replace(part, path)
            sync_folder(folder)
        finally:
            _settle(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {_fix(error)}") from error
    with contextlib.suppress(OSError):  # the checkpoint is there; what cannot be removed is tried again next time
        found = _find(folder, FINAL)
        for other in found.keys() - sorted(s for s in found if s <= step)[-keep:]:
            _remove(found[other])
    return path


def load_newest(run_folder, report=warnings.warn):
    """The newest checkpoint that is whole. `report` gets one line for each damaged one that is newer.

    Raises UserError where there is none: no such folder, not the folder of a run, no checkpoint yet, all damaged.
    """
    run_folder = Path(run_folder).expanduser()
    folder = run_folder / "checkpoints"
    try:
        if not run_folder.exists():
            raise UserError(f"{run_folder} does not exist; expected the folder of a run, with args.json in it")
        if not folder.is_dir() and not (run_folder / "args.json").is_file():
            raise UserError(f"{run_folder} is not the folder of a run: it has no args.json and no checkpoints")
        found = [(step, kind, path) for kind in (FINAL, OLD) for step, path in _find(folder, kind).items()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{run_folder} has no checkpoint to continue from; start a new run")
    faults = {}
    for step, _, path in sorted(found, key=lambda entry: (entry[0], entry[1] == FINAL), reverse=True):
        try:
            checkpoint = _read(path, step)
        except _Damaged as fault:
            faults[path.name] = fault
            continue
        for name, fault in faults.items():
            report(f"checkpoint {name} is damaged ({fault}); using {path.name}")
        return checkpoint
    listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
    raise UserError(f"every checkpoint in {folder} is damaged: {listed}; start a new run")


def _read(path, step):
    """The checkpoint in a folder. Raises _Damaged for whatever is not as it was written."""
    try:
        name = "manifest.json"
        manifest = json.loads((path / name).read_bytes())
        if manifest["format"] != FORMAT:
            raise _Damaged(f"{name}: format {manifest['format']!r:.40}, expected {FORMAT}")
        entries = {file: (entry["size"], entry["sha256"]) for file, entry in manifest["files"].items()}
        if manifest["step"] != step or entries.keys() != set(FILES):
            raise _Damaged(f"{name}: not of step {step} and its {len(FILES)} files")
        contents = {}
        for name in FILES:
            size, sha256 = entries[name]
            if (path / name).stat().st_size != size:  # looked at first: a file of any length may lie there
                raise _Damaged(f"{name}: {(path / name).stat().st_size} bytes, expected {size!r:.40}")
            contents[name] = (path / name).read_bytes()
            if _sha256(contents[name]) != sha256:
                raise _Damaged(f"{name}: sha256 differs")
        name = "tensors.safetensors"
        tensors = load(contents[name])
        name = "state.json"
        return Checkpoint(step, tensors, json.loads(contents[name]), path)
    except OSError as error:
        raise _Damaged(f"{name}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{name}: not what a checkpoint holds, {type(error).__name__}") from error


def _find(folder, pattern):
    """step -> path of the folders with such names, nobody else's."""
    if not folder.is_dir():
        return {}
    matches = ((re.fullmatch(pattern, path.name, re.ASCII), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir() and not path.is_symlink()}


def _settle(folder):
    """Clear up after a save that was stopped: whole checkpoints get their place back, the rest is removed."""
    with contextlib.suppress(OSError):
        for part in _find(folder, PART).values():
            shutil.rmtree(part, ignore_errors=True)
        for step, old in _find(folder, OLD).items():
            if (folder / f"{step:06d}").exists():
                _remove(old)
            else:
                os.replace(old, folder / f"{step:06d}")


def _remove(path):
    """Remove a folder of ours. Renamed first: a half removed one must not look like a damaged checkpoint."""
    part = path.with_name(f".{path.name.strip('.').removesuffix('.old')}.part")
    with contextlib.suppress(OSError):
        os.replace(path, part)
        shutil.rmtree(part, ignore_errors=True)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _fix(error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space; the older checkpoints are kept"
    if error.errno == errno.ENOENT:
        return "the folder of the run must stay where it is, and no other process may write there"
    return "make the folder writable; the older checkpoints are kept"
