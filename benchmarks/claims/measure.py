"""One measurement: a file in the work folder, which is there when it has been made and not before."""

import hashlib
import json
import re
import statistics
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from common import ROOT

from dno import align, load_model
from dno.methods.noise_optimization import begin, optimize_noise
from dno.noise import draw_noise
from dno.runs.files import write_whole
from dno.settings import Settings
from dno.task import Loaded, Problem

JUDGE = f"{ROOT / 'sprites' / 'judge.py'}:judge_loss_fn"
WATCHED = ("sprites", "jpeg")  # besides the judge
TIMED = 4  # iterations of a timing run; the first, which warms up, is left out

_models, _loaded = {}, {}  # of this process


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
            name = f"{name} {self.prompt}".lower()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / f"{re.sub(r'[^a-z0-9.]+', '-', name)}-{digest}.json"


def measure_all(jobs, processes=1, report=print):
    """Measure what has no file yet, in order, in so many processes of one thread each. Returns how many that were."""
    left = list({job.path: job for job in jobs if not job.path.is_file()}.values())
    began = time.time()
    if processes > 1 and len(left) > 1:
        # spawn, because a forked process inherits torch's threads in an unknown state.
        with get_context("spawn").Pool(processes) as pool:
            _follow(pool.imap_unordered(measure, left), len(left), began, report)
    else:
        _follow(map(measure, left), len(left), began, report)
    return len(left)


def _follow(done, total, began, report):
    for count, path in enumerate(done, 1):
        report(f"{count}/{total}  {(time.time() - began) / 60:.1f} min  {path.stem}")


def measure(job):
    """Measure one job and write its file, whole or not at all. Another start may have made it meanwhile."""
    if job.path.is_file():
        return job.path
    torch.set_num_threads(1)
    began = time.time()
    found = _seconds(job) if job.prompt is None else {"images": _KINDS[job.measurement.kind](job)}
    found |= {"name": job.measurement.name, "prompt": job.prompt, "key": job.measurement.key(job.size)}
    found |= {"date": time.strftime("%Y-%m-%d"), "took": time.time() - began}
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.path, json.dumps(found).encode())
    return job.path


def _settings(job, **changed):
    """The settings of `align` for a job, and what is loaded for them."""
    size, measurement = job.size, job.measurement
    own = {"objective": "black", **measurement.settings}
    watched = (JUDGE, *(name for name in WATCHED if name != own["objective"]))
    settings = {**size.common, "prompt": job.prompt, **own, "evaluate": watched, "opt_steps": measurement.length}
    settings |= changed
    if size.model not in _models:
        _models[size.model] = load_model(size.model)
    estimated = "estimator" in settings
    key = size.model, settings["objective"], settings["evaluate"], estimated
    if key not in _loaded:
        _loaded[key] = Loaded(_models[size.model])
    return settings, _loaded[key]


def _run(job):
    settings, loaded = _settings(job)
    return _curves(align(loaded=loaded, **settings).metrics)


def _restarts(job):
    """`align` from a fresh noise every few iterations, the images' curves one after the other."""
    size = job.size
    blocks, block = -(-job.measurement.length // size.block), size.block
    settings, loaded = _settings(job, opt_steps=block)
    seeds = [size.first_seed + b for b in range(size.seeds)]
    shape = loaded.model.latent_shape(1, *loaded.model.default_size)[1:]
    metrics = []
    for candidate in range(blocks):
        noise = draw_noise(seeds, size.num_steps, shape, candidate)
        metrics += align(loaded=loaded, noise=noise, **settings).metrics
    return _curves(metrics[: job.measurement.length])


def _start_only(job):
    """A run that moves x_T alone while every step's noise reaches the image; `align` has no setting for it."""
    settings, loaded = _settings(job)
    settings = Settings(**settings, output=None).resolve()
    problem = Problem(settings, loaded=loaded)
    problem.load()
    problem.free = slice(settings.num_steps, settings.num_steps + 1)
    states, metrics = begin(problem.starting_noise(), problem.make_optimizer), []

    def report(*_):
        images = [{**state.last, **state.last["objectives"], **state.last["evaluations"]} for state in states]
        metrics.append({"images": images})

    optimize_noise(
        problem.source(), states, problem.free, problem.regularizer, gamma=settings.gamma, opt_steps=settings.opt_steps,
        max_grad_norm=settings.max_grad_norm, evaluate=problem.evaluate, report=report,
    )  # fmt: skip
    return _curves(metrics)


@torch.no_grad()
def _draws(job):
    """The rewards of independent draws: draw 0 is where the runs start."""
    size = job.size
    problem = _problem(job)
    shape, every = problem.latent_shape[1:], list(range(size.seeds))
    rows = []
    for candidate in range(job.measurement.length):
        noise = draw_noise([size.first_seed + b for b in every], size.num_steps, shape, candidate)
        images = problem.render(list(noise), every)
        losses, _ = problem.losses(images, every)
        found = {"black": -losses, "white": losses, **problem.evaluate(images, every)}
        rows.append({name: values.tolist() for name, values in found.items()})
    return [{name: [row[name][b] for row in rows] for name in rows[0]} for b in every]


def _problem(job, **changed):
    settings, loaded = _settings(job, **changed)
    settings.pop("opt_steps")
    problem = Problem(Settings(**settings, output=None).resolve(), loaded=loaded)
    problem.load()
    return problem


def _seconds(job):
    """Processor seconds of an iteration (or draw) on one image, one thread: the median after the first."""
    job = Job(job.measurement, job.size, job.size.prompts[0], job.folder)
    clock, times = time.process_time, []
    if job.measurement.kind == "draws":
        problem = _problem(job, batch_size=1)
        for seed in range(TIMED + 1):
            times.append(clock())
            with torch.no_grad():
                noise = draw_noise([seed], job.size.num_steps, problem.latent_shape[1:])
                problem.losses(problem.render(list(noise), [0]), [0])
        times.append(clock())
    else:
        # Moving x_T alone and starting anew cost what a plain run costs.
        settings, loaded = _settings(job, batch_size=1, evaluate=(), opt_steps=TIMED + 1)
        times.append(clock())
        align(loaded=loaded, callback=lambda metrics: times.append(clock()), **settings)
    steps = [after - before for before, after in zip(times[1:], times[2:])]
    return {"seconds": statistics.median(steps), "all": steps}


_KINDS = {"run": _run, "restarts": _restarts, "start": _start_only, "draws": _draws}
_KEPT = ("reward", "probability", "probability_min", "judge", "black", "white", "sprites", "jpeg")


def _curves(metrics):
    """One dict of lists over the iterations an image."""
    images = range(len(metrics[0]["images"]))
    names = [name for name in _KEPT if name in metrics[0]["images"][0]]
    return [{name: [line["images"][b][name] for line in metrics] for name in names} for b in images]
