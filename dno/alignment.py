"""`align`: one run of a method, from settings to aligned images. The command line is made of it."""

import builtins
import contextlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dno.errors import UserError
from dno.memory import out_of_memory_explained
from dno.models.base import TextToImage
from dno.report.figures import draw_run
from dno.resume import FROM_PYTHON, prepare
from dno.runs.recorder import Recorder
from dno.task import Loaded, Task

# Settings that are of no use if the model is loaded already.
LOADED_WITH = {"lora", "variant", "model_config", "precision", "device", "vae", "vae_precision", "compile"}


@dataclass(frozen=True)
class Alignment:
    """What a run found, for its B images.

    images: the best image of each, (B, 3, H, W), nominally in [-1, 1], not clamped, float32 on the CPU; NaN for an
        image whose reward was never finite.
    rewards: their rewards, (B,); steps: the iterations that gave them; stopped: why each ended early, or None.
    noise: what the sampler turns into these images, (T + 1, B, C, h, w), or with eta 0, where x_T alone counts,
        (1, B, C, h, w); `align(noise=...)` takes it back. None for a method whose result is an image alone or weights.
    metrics: one dict per iteration, as in metrics.jsonl.
    folder: where the files are, or None.
    """

    images: torch.Tensor
    rewards: torch.Tensor
    steps: list
    stopped: list
    noise: torch.Tensor | None
    metrics: list
    folder: Path | None


def align(
    model=None, *, method=None, noise=None, callback=None, output=None, resume=None, config=None, folder=None,
    team=None, loaded=None, **settings,
):  # fmt: skip
    """Align images with a reward by a method, and return the best of them as an `Alignment`.

        from dno import align
        result = align(model="sprites", prompt="white duck", objective="black", gamma=10, lr=0.005, opt_steps=30)
        result = align(method="best_of_n", model="sprites", objective={"sprites": 1, "black": 0.5}, num_candidates=32)

    model: a name (see `--model`), or a model that `load_model` gave, which keeps its text encoder.
    method: a name in `dno.methods.METHODS`; None is "dno", Direct Noise Optimization, or that of `resume` or `config`.
    noise: (T + 1, B, C, h, w) or (1, B, C, h, w) to start from, or the path of a run or its best_noise.safetensors.
    callback: called with each iteration's metrics (a dict); if it returns True the run ends and keeps its result.
    output: the folder to make the run's folder in; None writes nothing. folder: the run's folder itself, instead.
    resume: the folder of a run to resume, in place, from its newest checkpoint. Settings given besides must be the
        run's own, except those that change no result, such as opt_steps.
    config: an args.json, or a file like it, whose settings hold where none are given here.
    settings: any other setting of the method; the flags have the same names. `prompt` may be a list, one per image;
        `objective` a name, a list of names, or a dict of weights by name. The settings of the reward models,
        `reward_paths` among them, replace what `rewards.configure` was told.
    team: the processes that share the work (see `dno.team`); each calls `align`, and all but the first get None.
    loaded: a `dno.task.Loaded` that several runs of the same model and rewards share.

    Raises UserError, a ValueError with one line, for bad input. If anything else ends the run, Ctrl-C among it, all
    that was found is on disk with a checkpoint, and the exception's `result` is the Alignment so far, or None; in a
    notebook Ctrl-C returns it instead.
    """
    _check_arguments(callback, resume=resume, config=config, folder=folder)
    objects = {}  # what no file can name
    if isinstance(model, TextToImage):
        if late := settings.keys() & LOADED_WITH:
            raise UserError(f"{', '.join(sorted(late))}: the model is loaded already; give it to load_model")
        settings["model"], loaded, objects["model"] = model.name, Loaded(model), FROM_PYTHON
    elif model is not None:
        settings["model"] = model
    if isinstance(noise, torch.Tensor):
        if resume is not None:
            raise UserError("noise: the run to resume has its own; leave it out")
        settings["noise"], objects["noise"] = None, FROM_PYTHON
    elif noise is not None:
        settings["noise"], noise = noise, None
    if output is not None:
        settings["output"] = output
    start = prepare(settings, method, config, resume, defaults={"output": None})
    start = replace(start, asked=start.asked | objects)
    try:
        return run(start, noise=noise, callback=callback, folder=folder, team=team, loaded=loaded)
    except KeyboardInterrupt as stop:
        result = getattr(stop, "result", None)
        if result is None or not hasattr(builtins, "__IPYTHON__"):
            raise
        warnings.warn(f"stopped by Ctrl-C after {len(result.metrics)} iterations", stacklevel=2)
        return result


def run(
    start, *, noise=None, callback=None, folder=None, prefix=None, screen=None, team=None, loaded=None
):  # fmt: skip
    """Do a run that is prepared, as `align` does.

    start: a `dno.resume.Start`. noise: a tensor to start from. prefix: of the folder's name. screen: a
    `dno.runs.screen.Screen`. The others are `align`'s.
    """
    method, settings = start.method, start.settings
    if team is not None and team.size > 1 and not method.shares_work(settings):
        raise UserError(
            f"{team.size} processes and one run; give --prompts or --seeds, which are shared out to them, or "
            "a method that shares its work, such as --estimator hybrid"
        )
    recorder = Recorder(settings, method, start.checkpoint, screen, callback, draw_run)

    def open_folder():
        if team is None or team.leads:
            recorder.open(start.folder or folder, prefix or method.prefix)

    # Whatever the caller has switched off, gradients are needed here.
    with torch.inference_mode(False), torch.enable_grad(), contextlib.closing(recorder):
        try:
            with (
                out_of_memory_explained(),
                Task(
                    settings, noise, needs_gradient=method.needs_gradient(settings), team=team, loaded=loaded,
                    reserved=(*method.columns, *method.metrics), before_loading=open_folder,
                ) as task,
            ):  # fmt: skip
                return _iterate(method(task), recorder, start.asked)
        except BaseException as error:
            recorder.save_what_there_is()
            error.result = None
            with contextlib.suppress(Exception):  # such as on a device that has failed
                error.result = _result(recorder) if recorder.metrics and recorder.state else None
            raise


def _iterate(method, recorder, asked):
    team = method.task.team
    if not team.leads:
        return method.serve()
    done = len(recorder.metrics)
    if method.num_iterations < done:
        raise UserError(f"the run has {done} iterations already, more than the {method.num_iterations} asked for")
    recorder.begin(method, asked)
    state = method.blank() if recorder.checkpoint else method.start()
    recorder.follow(state)
    for found in method.iterations(state):
        recorder.record(found)
        if recorder.done:
            break
    contents = recorder.checkpoint and recorder.checkpoint.state
    if contents and contents["state"]["failed"] and len(recorder.metrics) == recorder.checkpoint.step:
        raise UserError("the run failed in its last iteration, so that nothing is left to resume; start a new one")
    team.dismiss()
    result = _result(recorder)
    recorder.finish(result)
    return result


def _result(recorder):
    return Alignment(
        images=recorder.best_images(),
        rewards=torch.tensor([best.reward for best in recorder.best]),
        steps=[best.step for best in recorder.best],
        stopped=list(recorder.state.stopped),
        noise=recorder.best_noise(),
        metrics=recorder.metrics,
        folder=None if recorder.folder is None else recorder.folder.folder,
    )


def _check_arguments(callback, **paths):
    if callback is not None and not callable(callback):
        raise UserError(f"callback is {callback!r}; expected a function that takes one iteration's metrics, a dict")
    for name, path in paths.items():
        if path is not None and not isinstance(path, str | Path):
            raise UserError(f"{name} is {path!r}; expected a path")
