"""`align`: one run of Direct Noise Optimization, from settings to aligned images. The scripts are its command line."""

import math
import statistics
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import rewards
from dno.errors import UserError
from dno.memory import PeakMemory, out_of_memory_explained
from dno.methods.noise_optimization import StopRules, begin, optimize_noise
from dno.models.specs import model_spec
from dno.objectives import describe
from dno.resume import resumed
from dno.runs.checkpoints import save_checkpoint
from dno.runs.folder import Run, versions
from dno.runs.trackers import Trackers
from dno.settings import Settings
from dno.task import Loaded, Problem

# Settings that are of no use where the model is loaded already.
LOADED_WITH = {"lora", "variant", "model_config", "precision", "device", "vae", "vae_precision", "compile"}


@dataclass(frozen=True)
class Alignment:
    """What a run found, for its B images.

    images: the best image of each, (B, 3, H, W), nominally in [-1, 1], not clamped, float32 on the CPU.
    rewards: their rewards, (B,); steps: the iterations that gave them; stopped: why each ended early, or None.
    noise: the noise that gives them, (T + 1, B, C, h, w); `align(noise=...)` takes it back.
    metrics: one dict an iteration, as in metrics.jsonl.
    folder: where the files are, or None.
    """

    images: torch.Tensor
    rewards: torch.Tensor
    steps: list
    stopped: list
    noise: torch.Tensor
    metrics: list
    folder: Path | None


def align(
    model=None, *, noise=None, callback=None, screen=None, prefix="SD", output=None, resume=None, team=None,
    folder=None, loaded=None, **settings,
):  # fmt: skip
    """Optimize the noise of a text-to-image model for a reward, and return the best images.

        from dno import align
        result = align(model="sprites", prompt="white duck", objective="black", gamma=10, lr=0.005, opt_steps=30)

    model: a name (see `dno.settings.Settings.model`), or a model that `load_model` gave, which keeps its text encoder.
    noise: (T + 1, B, C, h, w) to start from, or the path of a best_noise.safetensors.
    callback: called with each iteration's metrics (a dict).
    output: the folder to make the run's folder in; None writes nothing. folder: the run's folder itself, instead.
    resume: the folder of a run to go on with, in place, from its newest checkpoint. Settings given besides must be the
        run's own, but for those in `dno.resume.CHANGEABLE`.
    team: the processes that share the perturbed samples (see `dno.team`); each of them calls `align`, and gets None but
        for the first.
    loaded: a `dno.task.Loaded` that several runs of the same model and rewards share.
    settings: any other field of `dno.settings.Settings`; the flags of the scripts have the same names. The settings of
        the reward models, `reward_paths` with them, replace what `rewards.configure` was told.
    Raises UserError, a ValueError with one line, for bad input. On KeyboardInterrupt all that was found is on disk, and
    a checkpoint with it.
    """
    unknown = settings.keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise UserError(f"align() has no setting {', '.join(sorted(unknown))}; dno.settings.Settings lists them")
    if isinstance(model, str | Path):
        settings["model"], model = str(model), None
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
        settings, checkpoint = resumed(resume, settings)
    else:
        settings = Settings(**{"output": None, **settings}).resolve()
    if team is not None and team.size > 1 and settings.estimator == "backprop":
        raise UserError(
            f"{team.size} processes and one run; give --prompts or --seeds, which are shared out to them, or "
            "--estimator hybrid, which shares out samples"
        )
    problem = Problem(settings, noise, team, loaded)
    return _Alignment(problem, checkpoint, callback, screen).run(resume or folder, prefix)


class _Alignment:
    """One run of a checked problem: load, optimize, and leave whole files behind whatever happens."""

    def __init__(self, problem, checkpoint, callback, screen):
        self.problem, self.settings, self.team = problem, problem.settings, problem.team
        self.checkpoint, self.callback, self.screen = checkpoint, callback, screen
        self.metrics, self.states, self.saved = [], [], checkpoint and checkpoint.step
        self.peak = PeakMemory(problem.device)
        self.run_folder, self.trackers, self.whole = None, Trackers(), True

    def run(self, folder, prefix):
        if self.team.leads:
            self._open(folder, prefix)
        try:
            with out_of_memory_explained():
                self.problem.load()
                if not self.team.leads:
                    return self.problem.source().serve()
                self._begin()
                self._optimize()
                self._checkpoint()
                self.team.dismiss()
                result = self._result()
                if self.run_folder is not None:
                    self.run_folder.write_result(result)
        except BaseException:
            self._save_what_there_is()
            raise
        finally:
            self._close()
        if self.screen:
            self.screen.end(result)
        return result

    def _open(self, folder, prefix):
        settings = self.settings
        if self.checkpoint is not None:
            self.run_folder = Run(folder=folder, resume=True)
            self.metrics = self.run_folder.cut(self.checkpoint.step)
        elif folder is not None or settings.output is not None:
            self.run_folder = Run(settings.output, prefix, folder)

    def _begin(self):
        if self.run_folder is not None:
            args = {**self.describe(), "reward_files": rewards.loaded_files()}
            self.run_folder.write_args(args, done=len(self.metrics))
            settings = self.settings
            folder, every = self.run_folder.folder / "trackers", settings.report_images_every
            self.trackers = Trackers(settings.report_to, folder, self.describe(), every)
        if self.screen:
            self.screen.begin(self.describe(), len(self.metrics))

    def _optimize(self):
        settings, problem = self.settings, self.problem
        # What a checkpoint has replaces what starts here.
        noise = problem.starting_noise() if self.checkpoint is None else problem.empty_noise()
        self.states = begin(noise, problem.make_optimizer)
        if self.checkpoint is not None:
            self._unpack()
            self._restore_best()
        self.peak.reset()
        optimize_noise(
            problem.source(), self.states, problem.free, problem.regularizer,
            gamma=settings.gamma,
            opt_steps=settings.opt_steps,
            max_grad_norm=settings.max_grad_norm,
            rules=StopRules(settings.target_reward, settings.patience, settings.min_probability, settings.max_seconds),
            subsample=settings.subsample,
            evaluate=problem.evaluate if problem.evaluation else None,
            moving=self._move,
            report=self._report,
            first_step=len(self.metrics),
            seconds=sum(metrics["seconds"] for metrics in self.metrics),
        )  # fmt: skip

    def _move(self):
        self.whole = False  # until every image has moved and the metrics are on disk

    def _report(self, step, active, images, seconds):
        metrics = _metrics(step, self.states, seconds, self.peak.read())
        self.peak.reset()
        if self.run_folder is not None:
            self._save(step, active, images, metrics)
        self.metrics.append(metrics)
        self.whole = True
        self.trackers.log(metrics, images)
        if len(self.metrics) % self.settings.checkpointing_steps == 0:
            self._checkpoint()
        if self.screen:
            self.screen.iteration(metrics, self.states)
        if self.callback:
            self.callback(metrics)

    def _save(self, step, active, images, metrics):
        for row, b in enumerate(active):
            image, reward = images[row], metrics["rewards"][b]
            if step % self.settings.save_every == 0:
                self._save_picture(f"images/{step:03d}", image, b, step, reward)
            if step == 0:
                self._save_picture("initial", image, b, step, reward)
            if self.states[b].best_step == step:
                self._save_picture("best", image, b, step, reward)
        if any(self.states[b].best_step == step for b in active):
            self._save_noise()
        self.run_folder.log(metrics)

    def _save_picture(self, name, image, b, step, reward=None):
        reward = self.metrics[step]["rewards"][b] if reward is None else reward
        text = {"prompt": self.settings.prompt, "seed": self.settings.seed + b, "step": step, "reward": reward}
        self.run_folder.save_image(name, image, b, **text)

    def _save_noise(self):
        names = ("model", "prompt", "seed", "num_steps", "eta", "guidance_scale")
        self.run_folder.save_noise(_best_noise(self.states), **{name: getattr(self.settings, name) for name in names})

    def _checkpoint(self):
        """The state after the last whole iteration, unless it is on disk already."""
        step = len(self.metrics)
        if self.run_folder is None or step == self.saved:
            return
        tensors, values = {}, []
        for b, state in enumerate(self.states):
            image_tensors, image_values = state.pack()
            tensors |= {f"{b}.{name}": tensor for name, tensor in image_tensors.items()}
            values.append(image_values)
        # Not "auto" and None: the run may go on elsewhere, but with the same precision and size.
        height, width = self.problem.size
        resolved = {"precision": self.problem.precision, "height": height, "width": width}
        state = {"settings": {**asdict(self.settings), **resolved}, "images": values, "versions": versions()}
        self.run_folder.sync()
        save_checkpoint(self.run_folder.folder, step, tensors, state, self.settings.checkpoints_total_limit)
        self.saved = step

    def _unpack(self):
        for b, (state, values) in enumerate(zip(self.states, self.checkpoint.state["images"], strict=True)):
            prefix = f"{b}."
            tensors = {k.removeprefix(prefix): v for k, v in self.checkpoint.tensors.items() if k.startswith(prefix)}
            state.unpack(tensors, values)

    def _restore_best(self):
        """best.png and best_noise.safetensors as they were at the checkpoint, where later ones took their place."""
        later = [b for b, s in enumerate(self.states) if self.run_folder.picture_step("best", b) != s.best_step]
        if not later:
            return
        self._best_images()
        for b in later:
            if self.states[b].best_step is not None:
                self._save_picture("best", self.states[b].best_image, b, self.states[b].best_step)
        self._save_noise()

    def _save_what_there_is(self):
        if self.whole and self.states:
            try:
                self._checkpoint()
            except UserError as error:  # a full disk may be what ended the run
                warnings.warn(str(error), stacklevel=2)

    def _close(self):
        if self.screen:
            self.screen.close()
        self.problem.release()
        self.trackers.finish()
        if self.run_folder is not None:
            self.run_folder.draw() if self.metrics else self.run_folder.discard()
            self.run_folder.close()

    def describe(self):
        """Every resolved setting, for args.json and the banner."""
        problem = self.problem
        return {
            **asdict(self.settings),
            "model_source": model_spec(self.settings.model).source,
            "height": problem.size[0], "width": problem.size[1],
            "device": str(problem.device), "precision": str(problem.dtype).removeprefix("torch."),
            "processes": self.team.size,
            "checkpointing": problem.plan.describe(),
            "prediction_type": problem.model.prediction_type,
            "folder": str(self.run_folder.folder) if self.run_folder is not None else None,
            "climbs": describe(problem.objectives),
            "weights": {objective.name: objective.weight for objective in problem.objectives},
            "watched": [evaluation.name for evaluation in problem.evaluations],
        }  # fmt: skip

    def _result(self):
        return Alignment(
            images=self._best_images(),
            rewards=torch.tensor([s.best_reward for s in self.states]),
            steps=[s.best_step for s in self.states],
            stopped=[s.stopped for s in self.states],
            noise=_best_noise(self.states).cpu(),
            metrics=self.metrics,
            folder=self.run_folder.folder if self.run_folder is not None else None,
        )

    @torch.no_grad()
    def _best_images(self):
        """(B, 3, H, W); of those that were found before the checkpoint, the noise alone is known."""
        states = self.states
        lost = [b for b, state in enumerate(states) if state.best_image is None and state.best_noise is not None]
        if lost:
            noise = torch.stack([states[b].best_noise for b in lost], dim=1)
            for b, image in zip(lost, self.problem.render(noise.unbind(), lost)):
                states[b].best_image = image
        nothing = torch.full((3, *self.problem.size), torch.nan)  # where no reward was finite
        return torch.stack([nothing if s.best_image is None else s.best_image.cpu() for s in states])


def _metrics(step, states, seconds, peak_memory_gb):
    """The line of metrics.jsonl: means over the images, and the images one by one."""
    images = [{**state.last, **state.last["objectives"], **state.last["evaluations"]} for state in states]
    images = [{name: value for name, value in image.items() if not isinstance(value, dict)} for image in images]
    means = {name: _mean(image[name] for image in images) for name in images[0]}
    return {
        "step": step,
        "reward": means.pop("reward"),
        "rewards": [image["reward"] for image in images],
        **means,
        "probability_min": min(image["probability_min"] for image in images),
        "seconds": seconds,
        "peak_memory_gb": peak_memory_gb,
        "images": images,
    }


def _mean(values):
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _best_noise(states):
    return torch.stack([s.noise.detach() if s.best_noise is None else s.best_noise for s in states], dim=1)
