"""Going on with a run: its own settings, and which of them may be given anew."""

import warnings
from dataclasses import fields, replace
from pathlib import Path

from dno.errors import UserError
from dno.methods.noise_optimization import MAX_BAD_STEPS
from dno.runs.checkpoints import load_newest
from dno.runs.folder import versions
from dno.settings import Settings

STOPPING = ("target_reward", "patience", "max_seconds", "min_probability")
# What says when to stop, where to compute and with how much memory, and what is shown: not what is computed.
CHANGEABLE = (
    "opt_steps", *STOPPING, "device", "checkpointing", "split_guidance", "compile", "reward_checkpointing",
    "reward_paths", "batch_per_device", "backprop_cost", "max_bad_samples", "timeout", "save_every",
    "checkpointing_steps", "checkpoints_total_limit", "report_to", "report_images_every",
)  # fmt: skip


def resumed(folder, given):
    """(settings, checkpoint) to go on with the run in `folder`.

    given: settings by name that the user gave besides. Raises UserError where one that is not CHANGEABLE differs from
    the run's, with the list of them, and where there is no whole checkpoint.
    """
    checkpoint = newest(folder)
    known = {field.name for field in fields(Settings)}
    run = Settings(**{name: _frozen(value) for name, value in checkpoint.state["settings"].items() if name in known})
    given = {name: value for name, value in given.items() if value not in (None, "auto") or name in CHANGEABLE}
    # The checkpoint has the noise; the file that the run started from may be gone.
    settings = replace(run, **{"noise": None, **given}).resolve()
    differences = [
        f"--{name} {getattr(settings, name)} (the run's: {getattr(run, name)})"
        for name in given
        if name not in CHANGEABLE and getattr(settings, name) != getattr(run, name)
    ]
    if differences:
        raise UserError(
            f"{folder} cannot go on with other settings: {', '.join(differences)}; leave them out, or start a new run"
        )
    # Other rules, or a fault that ended the run and may be mended: stopped images get another chance.
    images = checkpoint.state["images"]
    gave_up = all(values["bad_steps"] >= MAX_BAD_STEPS for values in images)
    if gave_up or any(getattr(settings, name) != getattr(run, name) for name in STOPPING):
        for values in images:
            values |= {"stopped": None, "bad_steps": 0}
    then, now = checkpoint.state.get("versions", {}).get("torch"), versions()["torch"]
    if then not in (None, now):
        warnings.warn(f"{folder} was made with torch {then}, and goes on with {now}: not bit for bit", stacklevel=2)
    return settings, checkpoint


def newest(folder, report=warnings.warn):
    """The newest whole checkpoint of the run in `folder`, see `dno.runs.checkpoints.load_newest`."""
    if "-sweep-" in Path(folder).expanduser().resolve().name:
        raise UserError(f"{folder} is the folder of several runs; the command that made it goes on with them")
    return load_newest(folder, report)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value
