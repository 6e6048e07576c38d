"""Resuming: a run's own settings, and which of them may be changed."""

import warnings
from dataclasses import fields
from pathlib import Path

from dno.errors import UserError
from dno.methods import method_class
from dno.runs.checkpoints import load_newest
from dno.runs.folder import versions
from dno.runs.stop_rules import StopRules


def resumed(folder, given, method=None):
    """(the method's name, the settings as asked, the settings to resume with, the checkpoint) of the run in `folder`.

    given: settings by name that the user gave besides. method: None, or the one that the run must be of.
    Raises UserError if a setting that is not changeable differs from the run's, with the list of them, and if there is
    no whole checkpoint.
    """
    checkpoint = newest(folder)
    state, name = checkpoint.state, checkpoint.state["method"]
    if method not in (None, name):
        raise UserError(f"{folder} is a run of {name}; resume it with python -m dno {name} --resume {folder}")
    cls = method_class(name).settings_class()
    known = {f.name for f in fields(cls)}
    if unknown := given.keys() - known:
        raise UserError(f"{name} has no setting {', '.join(sorted(unknown))}")
    run = cls(**{k: _frozen(v) for k, v in state["resume"].items() if k in known})
    changeable = cls.changeable()
    given = {k: v for k, v in given.items() if v not in (None, "auto") or k in changeable}
    # The checkpoint has the noise; the file that the run started from may be gone.
    settings = cls(**{**vars(run), "noise": None, **given}).resolve()
    differences = [
        f"--{k} {getattr(settings, k)} (the run's: {getattr(run, k)})"
        for k in given
        if k not in changeable and getattr(settings, k) != getattr(run, k)
    ]
    if differences:
        raise UserError(
            f"{folder} cannot be resumed with other settings: {', '.join(differences)}; leave them out, or start a new "
            "run"
        )
    # Other rules, or a fault that ended the run and may be mended: stopped images get another chance.
    if state["state"]["failed"] or any(getattr(settings, k) != getattr(run, k) for k in StopRules.__dataclass_fields__):
        state["retry"] = True
    then, now = state.get("versions", {}).get("torch"), versions()["torch"]
    if then not in (None, now):
        warnings.warn(f"{folder} was made with torch {then} and is resumed with {now}: not bit for bit", stacklevel=2)
    return name, {**state["settings"], **given}, settings, checkpoint


def newest(folder, report=warnings.warn):
    """The newest whole checkpoint of the run in `folder`, see `dno.runs.checkpoints.load_newest`."""
    if "-sweep-" in Path(folder).expanduser().resolve().name:
        raise UserError(f"{folder} is the folder of several runs; repeat the command that made it to resume them")
    return load_newest(folder, report)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value
