"""`align`: one run of a method, from settings to aligned images. The command line is made of it."""

import builtins
import contextlib
import json
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from dno.errors import UserError
from dno.memory import out_of_memory_explained
from dno.methods import method_class
from dno.report.figures import draw_run
from dno.resume import resumed
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
    screen=None, prefix=None, team=None, loaded=None, **settings,
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
    screen, prefix, team, loaded: for the command line and sweeps: what to show, the folder's name, the processes that
        share the work (each calls `align`; all but the first get None), and a `dno.task.Loaded` to share.

    Raises UserError, a ValueError with one line, for bad input. If anything else ends the run, Ctrl-C among it, all
    that was found is on disk with a checkpoint, and the exception's `result` is the Alignment so far, or None; in a
    notebook Ctrl-C returns it instead.
    """
    if isinstance(model, str | Path):
        settings["model"] = str(model)
    elif model is not None:
        if late := settings.keys() & LOADED_WITH:
            raise UserError(f"{', '.join(sorted(late))}: the model is loaded already; give it to load_model")
        settings["model"], loaded = model.name, Loaded(model)
    if not isinstance(noise, torch.Tensor):
        settings |= {} if noise is None else {"noise": noise}
        noise = None
    if output is not None:
        settings["output"] = output
    checkpoint = None
    if resume is not None:
        method, asked, settings, checkpoint = resumed(resume, settings, method)
        method = method_class(method)
    else:
        method, asked = configured(config, method, settings)
        method = method_class(method)
        settings = make_settings(method, {"output": None, **asked}).typed()
        asked, settings = asdict(settings), settings.resolve()
    if team is not None and team.size > 1 and not method.shares_work(settings):
        raise UserError(
            f"{team.size} processes and one run; give --prompts or --seeds, which are shared out to them, or "
            "a method that shares its work, such as --estimator hybrid"
        )
    recorder = Recorder(settings, method, checkpoint, screen, callback, draw_run)
    # Whatever the caller has switched off, gradients are needed here.
    with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        stack.callback(recorder.close)
        make_task = partial(
            Task,
            settings,
            noise,
            needs_gradient=method.needs_gradient(settings),
            team=team,
            loaded=loaded,
            reserved=("probability", "probability_min", *method.columns),
        )
        return _run(make_task, method, recorder, asked, resume or folder, prefix or method.prefix, stack)


def _run(make_task, method, recorder, asked, folder, prefix, stack):
    state = None
    try:
        with out_of_memory_explained():
            team = make_task.keywords["team"]
            leads = team is None or team.leads
            task = make_task(before_loading=(lambda: recorder.open(folder, prefix)) if leads else lambda: None)
            stack.callback(task.release)
            method = method(task)
            if not leads:
                return method.serve()
            recorder.begin(task, method, asked)
            state = method.blank() if recorder.checkpoint else method.start()
            recorder.follow(state)
            for found in method.iterations(state):
                recorder.record(found)
                if recorder.done:
                    break
            task.team.dismiss()
            result = _result(recorder, state)
            recorder.finish(result)
    except BaseException as error:
        recorder.save_what_there_is()
        error.result = _result(recorder, state) if recorder.metrics and state else None
        if isinstance(error, KeyboardInterrupt) and error.result and hasattr(builtins, "__IPYTHON__"):
            warnings.warn(f"stopped by Ctrl-C after {len(recorder.metrics)} iterations", stacklevel=3)
            return error.result
        raise
    if recorder.screen:
        recorder.screen.end(result)
    return result


def _result(recorder, state):
    return Alignment(
        images=recorder.best_images(),
        rewards=torch.tensor([best.reward for best in recorder.best]),
        steps=[best.step for best in recorder.best],
        stopped=list(state.stopped),
        noise=recorder.best_noise(),
        metrics=recorder.metrics,
        folder=None if recorder.folder is None else recorder.folder.folder,
    )


def make_settings(method, given):
    """The settings of a method, with its presets, not yet resolved. Raises UserError for names that it has not."""
    cls = method.settings_class()
    unknown = given.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise UserError(
            f"{method.name} has no setting {', '.join(sorted(unknown))}; python -m dno {method.name} --help_all lists "
            "them"
        )
    return cls(**{**method.presets, **given})


def configured(config, method, given):
    """(the method's name, settings by name) of a configuration file and of what is given besides, which wins."""
    if config is None:
        return method or "dno", given
    path = Path(config).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read: {error}; expected an args.json") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
        raise UserError(f"--config {path} is not a JSON object with 'method' and 'settings'; expected an args.json")
    if "settings" not in found and "git_revision" in found:
        raise UserError(f"--config {path} is of an earlier version, which kept no settings as they were asked for")
    name = found.get("method", "dno")
    if method not in (None, name):
        raise UserError(f"--config {path} is for the method {name!r}; got {method!r}")
    known = found["settings"] if "settings" in found else {k: v for k, v in found.items() if k != "method"}
    return name, {**known, **given}
