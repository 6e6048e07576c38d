"""Where the settings of a run come from: what is given, a configuration file, the run that is resumed."""

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

from dno.errors import UserError
from dno.methods import method_class
from dno.runs.checkpoints import Checkpoint, load_newest
from dno.runs.folder import versions
from dno.runs.stop_rules import StopRules

# What args.json has, instead of a name, for a model or a noise that was given as an object.
FROM_PYTHON = "(given from Python)"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    method: its class. asked: every setting as it was asked for, by name, None if it was left open.
    settings: the same, checked and resolved. folder, checkpoint: of the run to resume, or None.
    """

    method: type
    asked: dict
    settings: object
    folder: Path | None = None
    checkpoint: Checkpoint | None = None


def prepare(given, method=None, config=None, resume=None, defaults=None):
    """The `Start` of a run.

    given: settings by name. method: its name; None is that of `resume` or `config`, else "dno".
    config: a file of settings, which hold where none are given. resume: the folder of a run.
    defaults: what holds instead of the settings' own defaults.
    Raises UserError for whatever is wrong with them, before anything is loaded.
    """
    if resume is not None:
        if config is not None:
            raise UserError("--resume and --config both say what the settings are; give one of them")
        return _resumed(resume, given, method)
    name, given = _configured(config, method, given)
    cls = method_class(name)
    settings = make_settings(cls, {**(defaults or {}), **given})
    return Start(cls, vars(settings), settings.resolve())


def make_settings(method, given):
    """The settings of a method, a class, with its presets: in their types, and not yet resolved. Raises UserError."""
    return _settings(method, {**method.presets, **given})


def _settings(method, given):
    cls = method.settings_class()
    if unknown := given.keys() - {f.name for f in fields(cls)}:
        raise UserError(
            f"{method.name} has no setting {', '.join(sorted(unknown))}; python -m dno {method.name} --help_all lists "
            "them"
        )
    return cls(**given).typed()


# Configuration files


def _configured(config, method, given):
    """(the method's name, settings by name) of a configuration file and of what is given besides, which wins."""
    if config is None:
        return method or "dno", given
    path = Path(config).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {path} cannot be read: {why}; expected an args.json") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
        raise UserError(f"--config {path} is not a JSON object of settings by name; expected an args.json")
    if "settings" not in found and "git_revision" in found:
        raise UserError(f"--config {path} is of an earlier version, which kept no settings as they were asked for")
    name = found.get("method") or "dno"
    if method not in (None, name):
        raise UserError(f"--config {path} is for the method {name!r}; got {method!r}")
    known = found["settings"] if "settings" in found else {k: v for k, v in found.items() if k != "method"}
    missing = [k for k, v in known.items() if v == FROM_PYTHON and k not in given]
    if missing:
        raise UserError(f"--config {path} names no {missing[0]}: it was given from Python; give --{missing[0]} too")
    return name, {**known, **given}


# Resuming


def _resumed(folder, given, method):
    """The `Start` of the run in `folder`, with what is given besides.

    Raises UserError if a setting that is not changeable differs from the run's, with the list of them, and if there is
    no whole checkpoint.
    """
    where = Path(folder).expanduser()
    if not (where / "checkpoints").exists() and any(where.glob("*/checkpoints")):
        raise UserError(f"{folder} is the folder of several runs; repeat the command that made it to resume them")
    checkpoint = load_newest(folder)
    state, name = checkpoint.state, checkpoint.state["method"]
    if method not in (None, name):
        raise UserError(f"{folder} is a run of {name}, not of {method}; resume it with python -m dno --resume {folder}")
    cls = method_class(name)
    changeable = cls.settings_class().changeable()
    # None and "auto" leave open what the run has settled.
    given = {k: v for k, v in given.items() if k in changeable or (v is not None and str(v) != "auto")}
    run = _settings(cls, state["resume"])
    # The checkpoint has the noise; the file that the run started from may be gone.
    asked = _settings(cls, {**vars(run), "noise": None, **given})
    settings = asked.resolve()
    differences = [
        f"--{k} {_text(getattr(settings, k))} (the run's: {_text(getattr(run, k))})"
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
        warnings.warn(f"{folder} was made with torch {then} and is resumed with {now}: not bit for bit", stacklevel=4)
    asked = {**state["settings"], **{k: getattr(asked, k) for k in given}}
    return Start(cls, asked, settings, Path(folder).expanduser(), checkpoint)


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
