"""Sweeps: one run per prompt and seed, on one process or shared out to many; repeated, the command resumes them."""

import contextlib
import hashlib
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dno.alignment import run as do_run
from dno.errors import UserError
from dno.methods import method_class
from dno.resume import make_settings, prepare
from dno.runs.checkpoints import OtherVersion, load_newest
from dno.runs.files import write_whole
from dno.runs.folder import lock_folder
from dno.runs.stop_rules import StopRules
from dno.task import Loaded
from dno.team import Team

DONE, NEW, STARTED = range(3)


@dataclass(frozen=True)
class RunSpec:
    """One run of a sweep. name: of its folder; settings: as `align` takes them; title: for the screen; loaded: shared
    with the other runs of the same model and rewards."""

    name: str
    method: str
    settings: dict
    title: str
    loaded: Loaded


def sweep(method, settings, prompts, seeds, prefix, team, callback=lambda metrics: None):
    """Run every prompt of the file `prompts` (else the settings' prompt) with every seed (else the settings' seed).

    The runs' folders are in `<output>/<prefix>-sweep-<digest of the settings>/`, so the same command finds them again:
    what is finished is skipped, what was begun resumes from its checkpoint. A run that fails after it began is noted
    and the others follow. Gradient runs are shared out to the processes; a method that shares its work has all of them
    on each run. method: its class. callback: as that of `align`.
    Raises UserError at the end if a run failed. Returns the table's rows.
    """
    resolved = make_settings(method, settings).resolve()
    if resolved.output is None or resolved.noise is not None:
        raise UserError("several runs need --output, and start from their own noise; leave --noise out")
    texts = [resolved.prompt] if prompts is None else read_prompts(prompts)
    pairs = [(p, s) for p in texts for s in dict.fromkeys(seeds or [resolved.seed])]
    may_differ = {*method.settings_class().changeable(), "prompt", "seed", "output"}
    may_differ -= {"opt_steps", *StopRules.__dataclass_fields__}
    same = {name: value for name, value in asdict(resolved).items() if name not in may_differ}
    digest = hashlib.sha256(json.dumps({"method": method.name, **same}, sort_keys=True).encode()).hexdigest()[:8]
    folder, loaded = Path(resolved.output).expanduser() / f"{prefix}-sweep-{digest}", Loaded()
    runs = [
        RunSpec(run_name(p, s), method.name, {**settings, "prompt": p, "seed": s}, f"{p!r}, seed {s}", loaded)
        for p, s in pairs
    ]
    for run in runs:  # before anything is made
        make_settings(method, run.settings).resolve()
    about = {"method": method.name, "settings": asdict(resolved)}
    rows = run_all(folder, runs, about, team, together=method.shares_work(resolved), callback=callback)
    if team.leads:
        return _summary(folder, [{"prompt": p, "seed": s, **row} for (p, s), row in zip(pairs, rows)])


def run_all(folder, runs, about, team=None, together=False, callback=lambda metrics: None):
    """Do every run that is not done yet, each in its folder below `folder`.

    runs: `RunSpec`s. about: what is written to args.json there. together: all processes of the team work on each run;
    else they share them out. Returns one dict per run, as `row_of` gives them, on the first process.
    """
    team = team or Team()
    folders = [folder / run.name for run in runs]
    with contextlib.ExitStack() as stack:
        if team.leads:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(folder)
                if lock is not None:
                    stack.callback(os.close, lock)
                write_whole(folder / "args.json", json.dumps(about, indent=2, default=str).encode() + b"\n")
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from error
            print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {folder}", flush=True)
        # The leader decides, since the others may see the disk late.
        stages = team.broadcast(torch.tensor([_stage(path) for path in folders])).tolist()
        left = [i for i, stage in enumerate(stages) if stage != DONE]
        for i in left if together else left[team.rank :: team.size]:
            count = f"{i + 1}/{len(runs)}"
            _one(runs[i], folders[i], stages[i], team if together else None, team, count, callback)
        team.finished()
        if team.leads:
            team.wait_for_all()
            return [row_of(path) for path in folders]


def _one(run, path, stage, shared_by, team, count, callback):
    """One run: new, or resumed. shared_by: the team, if all of it works on this run."""

    def lives(metrics):
        stop = callback(metrics)
        team.alive()
        if shared_by is None:
            team.check()
        return stop

    common = {"loaded": run.loaded, "team": shared_by, "callback": lives}
    try:
        if team.leads or shared_by is None:
            (path / "failed.txt").unlink(missing_ok=True)
            if stage == NEW and path.is_dir():  # stopped before its first checkpoint, or all of them are damaged
                _put_aside(path)
        if stage == STARTED:
            changeable = method_class(run.method).settings_class().changeable()
            given = {name: run.settings[name] for name in changeable if name in run.settings}
            result = do_run(prepare(given, run.method, resume=path), **common)
        else:
            result = do_run(prepare(run.settings, run.method), folder=path, **common)
    except UserError as error:
        # With others at work on the run, or nothing loaded, the next one would fail like this one.
        if team.cause() or run.loaded.model is None or (shared_by is not None and team.size > 1):
            raise
        print(f"{count}  {run.title}: failed: {error}", flush=True)
        path.mkdir(exist_ok=True)
        write_whole(path / "failed.txt", f"{error}\n".encode())
    else:
        if result is not None:
            first, best = result.metrics[0]["reward"], result.rewards.mean()
            print(f"{count}  {run.title}: {first:.4f} -> {best:.4f}", flush=True)


def _put_aside(path):
    """Give a folder another name, unless it is empty: what is in it may be of use."""
    if not any(path.rglob("*")):
        path.rmdir()
        return
    for n in range(1, 1000):
        aside = path.with_name(f"{path.name}.old-{n}")
        if not aside.exists():
            path.rename(aside)
            warnings.warn(f"{path} cannot be resumed and starts over; what it holds is in {aside}", stacklevel=2)
            return


def read_prompts(file):
    """The prompts in a text file, one per line, each once. Raises UserError."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--prompts {file} cannot be read: {why}; expected a text file, one prompt per line") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"--prompts {file} has no prompt in it; expected one per line")
    return prompts


def run_name(prompt, seed):
    """The name of a run's folder within a sweep: readable, and different for different prompts."""
    prompt = prompt if isinstance(prompt, str) else " ".join(prompt)
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-s{seed}"


def _stage(path):
    if (path / "result.json").is_file():
        return DONE
    if not (path / "checkpoints").is_dir():
        return NEW
    try:
        load_newest(path)
    except OtherVersion:  # what it found is kept
        raise
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return NEW
    return STARTED


def row_of(path):
    """What summary.json says of the run in a folder: means over its images, at the best iteration of each."""
    if not (path / "result.json").is_file():
        file = path / "failed.txt"
        why = file.read_text(encoding="utf-8").strip() if file.is_file() else "no result"
        return {"folder": path.name, "failed": why}
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    run = json.loads((path / "args.json").read_text(encoding="utf-8"))["resolved"]
    best = {
        name: _mean(image.get(name) for image in result["best"])
        for name in ("probability", *run["weights"], *run["watched"])
    }
    return {
        "folder": path.name, "first": _mean(image["reward"] for image in result["first"]),
        "best": _mean(result["rewards"]), "steps": result["steps"], "iterations": result["iterations"],
        "probability": best.pop("probability"), "seconds": result["seconds"], "stopped": result["stopped"],
        "others": best,
    }  # fmt: skip


def _summary(folder, rows):
    """Write summary.md and summary.json, and print the table."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("others", ())))
    header = ["prompt", "seed", "first reward", "best", "at iteration", "P(z)", *names, "seconds"]
    table = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        if "failed" in row:
            cells = [f"failed: {row['failed']}"] + [""] * (len(header) - 3)
        else:
            others = [_number(row["others"].get(name)) for name in names]
            steps = ", ".join("-" if step is None else str(step) for step in row["steps"])
            cells = [_number(row["first"]), _number(row["best"]), steps, _number(row["probability"], ".2g"), *others]
            cells.append(f"{row['seconds']:.1f}")
        prompt = row["prompt"] if isinstance(row["prompt"], str) else ", ".join(row["prompt"])
        cells = [prompt, str(row["seed"]), *cells]
        table.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    text = "\n".join(table)
    write_whole(folder / "summary.md", f"{text}\n".encode())
    write_whole(folder / "summary.json", json.dumps(rows, indent=2).encode() + b"\n")
    print(f"{text}\n\nsummary: {folder / 'summary.md'}", flush=True)
    if failed := sum("failed" in row for row in rows):
        raise UserError(f"{failed} of {len(rows)} runs failed, see the table; repeat the command to try them again")
    return rows


def _mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value, form=".4f"):
    return "-" if value is None else format(value, form)
