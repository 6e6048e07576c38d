"""Flags of runs: what tells several apart, and what was changed."""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from dno.report.reading import FILLED_IN, elide

# Kept apart: where a run was written says nothing about what it does.
PLACES = ("output", "folder", "model_source")
# These follow from the flags, so a difference in them is one of the flags.
FOLLOWING = ("title", "result", "columns", "iterations", "climbs", "weights", "watched", "reward_files", "history")
# How long it went on tells runs apart less than what it did, so these are named last.
DULL = ("batch_size", "opt_steps", "opt_time", "evaluate", "save_every")


class Label(NamedTuple):
    """What a run is called: by what tells it from the others, and by its folder if that is not in the words."""

    words: str
    name: str = ""


class Row(NamedTuple):
    """A setting: a text per run, and that of its default."""

    name: str
    values: list
    default: str


def labels_of(runs):
    """A label per run: its method if they differ, and the settings that tell it from the others; or its folder."""
    common = common_folder([run.folder.parent for run in runs])
    names = [elide(run.folder.relative_to(common) if common else run.folder) for run in runs]
    settings = dict.fromkeys(name for run in runs for name in _setting_defaults(run))
    # Of an old run it is unknown what was asked of the machine.
    settings = [name for name in settings if name not in FILLED_IN or all(name in run.asked for run in runs)]
    differing = [name for name in settings if name not in PLACES and _differs(name, runs, _given)]
    differing.sort(key=lambda name: name in DULL)
    several_methods = len({run.method for run in runs}) > 1
    labels = []
    for run in runs:
        own = [name for name in differing if run.method in _methods_with(name, runs)]
        words = [f"{name} {elide(plain(_given(run, name)), 32)}" for name in own[:3]] + ["…"] * (len(own) > 3)
        labels.append(" · ".join([elide(run.title, 40)] * several_methods + words))
    twice = Counter(labels)
    return [
        Label(words, name) if words and twice[words] == 1 else Label(" · ".join(filter(None, (words, name))))
        for words, name in zip(labels, names, strict=True)
    ]


def _methods_with(name, runs):
    """The methods that have this setting."""
    return {run.method for run in runs if name in run.args}


def _given(run, name):
    """A setting as it was resolved, except where that depends on the machine."""
    return (run.asked if name in FILLED_IN else run.args).get(name)


def _resolved(run, name):
    return run.args.get(name)


def _differs(name, runs, value=_resolved):
    """Whether a setting differs between runs that have it: what only some methods have tells no runs apart."""
    methods = _methods_with(name, runs)
    return len({plain(value(run, name)) for run in runs if run.method in methods}) > 1


def rows_of(runs):
    """(settings in which the runs differ, settings that were changed, everything else in args.json), as `Row`s."""
    defaults = [_setting_defaults(run) for run in runs]
    differing, changed, rest = [], [], []
    for name in dict.fromkeys(name for run in runs for name in run.args):
        usual = [each.get(name, []) if name not in PLACES else [] for each in defaults]
        given = [plain(run.asked[name]) if name in run.asked else None for run in runs]
        asked = [bool(known) and value not in (None, *known) for known, value in zip(usual, given, strict=True)]
        values = [g if a else plain(run.args.get(name)) for run, g, a in zip(runs, given, asked, strict=True)]
        row = Row(name, values, " / ".join(dict.fromkeys(known[-1] for known in usual if known)))
        if name not in (*PLACES, *FOLLOWING) and _differs(name, runs):
            differing.append(row)
        else:
            (changed if any(asked) else rest).append(row)
    return differing, changed, rest


def common_folder(paths):
    """What all paths have in common, or None: the root of a disk says nothing."""
    try:
        common = Path(os.path.commonpath(paths))
    except ValueError:  # on several drives
        return None
    return common if common != Path(common.anchor) else None


def _defaults(method):
    """{setting: default} of a method; nothing of one that this version does not have."""
    from dno.methods import METHODS, method_class

    if method not in METHODS:
        return {}
    cls = method_class(method)
    return asdict(cls.settings_class()()) | cls.presets


def _setting_defaults(run):
    """By setting, as texts, the values that say no more than its default; the last is the one to show."""
    from dno.models.specs import model_spec

    defaults = {name: [plain(value)] for name, value in _defaults(run.method).items()}
    spec = model_spec(str(run.args.get("model", "")))
    own = {name: getattr(spec, name, None) for name in ("num_steps", "guidance_scale", "eta")}
    for name, value in {**own, "opt_time": run.args.get("num_steps")}.items():
        if defaults.get(name) == ["–"] and value is not None:  # the model's
            defaults[name].append(plain(value))
    return defaults


def plain(value):
    """A value of args.json as a reader writes it."""
    if value in (None, [], (), {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        words = [plain(entry) for entry in value]
        return " ".join(f'"{word}"' if " " in word and len(words) > 1 else word for word in words)
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
