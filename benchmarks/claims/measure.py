"""Measurements: one file each in the work folder, which is there once it is made and not before.

Those of one row are a sweep over the prompts, in a folder below `runs/` of the work folder; the curves of a finished
run become the measurement's file.
"""

import hashlib
import json
import re
import statistics
import time
from dataclasses import dataclass
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from common import ROOT

from claims.methods import add_methods
from dno import align, load_model
from dno.runs.files import write_whole
from dno.sweep import RunSpec, run_all
from dno.task import Loaded

JUDGE = f"{ROOT / 'sprites' / 'judge.py'}:judge_loss_fn"
WATCHED = ("sprites", "jpeg")  # besides the judge
TIMED = 4  # iterations of a timing run; the first, which warms up, is left out
METHOD_OF = {"run": "dno", "restarts": "restarts", "start": "start_only", "draws": "best_of_n"}
_KEPT = ("reward", "probability", "probability_min", "judge", "black", "white", "sprites", "jpeg")


@dataclass(frozen=True)
class Job:
    """A measurement of one prompt, or, without a prompt, of the seconds that an iteration takes."""

    measurement: object
    size: object
    prompt: str | None
    folder: Path

    @property
    def path(self):
        if self.prompt is None:
            common = {**self.size.common, "batch_size": 1, "prompt": self.size.prompts[0], "timed": TIMED}
            key, name = {**self.measurement.cost, **common}, "seconds"
        else:
            key, name = {**self.measurement.key(self.size), "prompt": self.prompt}, self.measurement.name
            name = f"{name} {self.prompt}"
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / f"{slug(name)}-{digest}.json"

    @property
    def missing(self):
        return not self.path.is_file()

    def write(self, found, took):
        """Write the file, whole or not at all."""
        about = {"name": self.measurement.name, "prompt": self.prompt, "key": self.measurement.key(self.size)}
        about |= {"date": time.strftime("%Y-%m-%d"), "took": took}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({**found, **about}).encode())


def slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def measure_all(rows, size, folder, processes=1, report=print):
    """Measure what has no file yet, row by row, in this many processes of one thread each. Returns how many were made.

    The timings come last, in one process: two would share memory and caches.
    """
    groups = [[job for prompt in size.prompts if (job := Job(row, size, prompt, folder)).missing] for row in rows]
    groups = [jobs for jobs in groups if jobs]
    timings = {job.path: job for row in rows if (job := Job(row, size, None, folder)).missing}
    began = time.time()

    def follow(done, total, what):
        for count, name in enumerate(done, 1):
            report(f"{count}/{total} {what}  {(time.time() - began) / 60:.1f} min  {name}")

    if processes > 1 and len(groups) > 1:
        # spawn, because a forked process inherits torch's threads in an unknown state.
        with get_context("spawn").Pool(processes) as pool:
            follow(pool.imap_unordered(measure_row, groups), len(groups), "rows")
    else:
        follow(map(measure_row, groups), len(groups), "rows")
    follow(map(measure_seconds, timings.values()), len(timings), "timings")
    return sum(not job.missing for job in (*chain(*groups), *timings.values()))


def measure_row(jobs):
    """Measure one row on the prompts of these jobs, and write their files. Returns the row's name."""
    torch.set_num_threads(1)
    add_methods()
    began = time.time()
    row, size, folder = jobs[0].measurement, jobs[0].size, jobs[0].folder
    loaded, quiet = Loaded(_model(size.model)), {"save_every": 10**9, "draw": False}
    runs = [
        RunSpec(job.path.stem, METHOD_OF[row.kind], {**settings_of(job), **quiet}, f"{row.name}, {job.prompt}", loaded)
        for job in jobs
    ]
    sweep = folder / "runs" / slug(row.name)
    results = run_all(sweep, runs, row.key(size))
    took = (time.time() - began) / len(jobs)
    for job, result in zip(jobs, results):
        if "failed" not in result:
            lines = (sweep / result["folder"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            job.write({"images": _curves([json.loads(line) for line in lines])}, took)
    return row.name


def measure_seconds(job):
    """Measure the processor seconds of an iteration on one image, with one thread: the median after the first."""
    torch.set_num_threads(1)
    began, times = time.time(), [time.process_time()]
    of_a_prompt = Job(job.measurement, job.size, job.size.prompts[0], job.folder)
    settings = settings_of(of_a_prompt, length=TIMED + 1) | {"batch_size": 1, "evaluate": ()}
    settings.pop("block", None)  # restarting, or moving x_T alone, costs what a plain run costs
    method = "best_of_n" if job.measurement.kind == "draws" else "dno"
    loaded = Loaded(_model(job.size.model))
    align(method=method, loaded=loaded, callback=lambda metrics: times.append(time.process_time()), **settings)
    steps = [after - before for before, after in zip(times[1:], times[2:])]
    job.write({"seconds": statistics.median(steps), "all": steps}, time.time() - began)
    return job.measurement.name


_model = cache(load_model)  # one per process


def settings_of(job, length=None):
    """The settings of `align` for a job. length: of the run, instead of the measurement's."""
    row, size = job.measurement, job.size
    length = length or row.length
    own = {"objective": "black", **row.settings}
    watched = (JUDGE, *(name for name in WATCHED if name != own["objective"]))
    if row.kind == "draws":  # draw 0 is where the runs start
        lengths = {"num_candidates": length, "candidates_per_iteration": 1}
    else:
        lengths = {"opt_steps": length, **({"block": size.block} if row.kind == "restarts" else {})}
    return {**size.common, "prompt": job.prompt, **own, "evaluate": watched, **lengths}


def _curves(metrics):
    """One dict per image, of lists over the iterations."""
    images = range(len(metrics[0]["images"]))
    names = [name for name in _KEPT if name in metrics[0]["images"][0]]
    return [{name: [line["images"][b][name] for line in metrics] for name in names} for b in images]
