"""`align`: one run of Direct Noise Optimization, from settings to aligned images. The scripts are its command line."""

import math
import re
import statistics
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

import rewards
from dno.errors import UserError
from dno.gradients import Backpropagation
from dno.loading import check_model, load_model, resolve_device, resolve_precision
from dno.memory import PeakMemory, choose_checkpointing, out_of_memory_explained
from dno.models import model_spec
from dno.objectives import Losses, describe, parse_evaluations, parse_objectives
from dno.optimize import StopRules, optimize_noise
from dno.optimizers import make_optimizer
from dno.regularization import probability_penalty
from dno.runs import Run, check_noise, load_noise
from dno.sampling import PERMUTATIONS, draw_noise, keyed_generator, sample
from dno.settings import Settings


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


def align(model=None, *, noise=None, callback=None, screen=None, prefix="SD", output=None, **settings):
    """Optimize the noise of a text-to-image model for a reward, and return the best images.

        from dno import align
        result = align(model="sprites", prompt="white duck", objective="black", gamma=10, lr=0.005, opt_steps=30)

    model: a name (see `dno.settings.Settings.model`), or a model that `load_model` gave, which keeps its text encoder.
    noise: (T + 1, B, C, h, w) to start from, or the path of a best_noise.safetensors.
    callback: called with each iteration's metrics (a dict).
    output: the folder to make the run's folder in; None writes nothing.
    settings: any other field of `dno.settings.Settings`; the flags of the scripts have the same names. The settings of
        the reward models, `reward_paths` with them, replace what `rewards.configure` was told.
    Raises UserError, a ValueError with one line, for bad input. On KeyboardInterrupt all that was found is on disk.
    """
    unknown = settings.keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise UserError(f"align() has no setting {', '.join(sorted(unknown))}; dno.settings.Settings lists them")
    if isinstance(model, str | Path):
        settings["model"], model = str(model), None
    elif model is not None:
        if late := settings.keys() & {"lora", "variant", "model_config", "precision", "device"}:
            raise UserError(f"{', '.join(sorted(late))}: the model is loaded already; give it to load_model")
        settings["model"] = model.name
    if not isinstance(noise, torch.Tensor):
        settings["noise"], noise = noise, None
    return _Alignment(Settings(output=output, **settings).resolve(), model, noise, prefix).run(callback, screen)


class _Alignment:
    """One run: everything is checked, then loaded, then optimized."""

    def __init__(self, settings, model, noise, prefix):
        self.settings = settings
        self.device = model.device if model is not None else resolve_device(settings.device)
        self.dtype = model.dtype if model is not None else resolve_precision(settings.precision, self.device)
        self.objectives = parse_objectives(settings.objective, rewards.RFUNCTIONS)
        self.evaluations = parse_evaluations(settings.evaluate, rewards.RFUNCTIONS)
        for objective in self.objectives:
            if getattr(objective.factory, "evaluation_only", False):
                raise UserError(f"{objective.name!r} is a judge, which optimizing would corrupt; use --evaluate for it")
            if not objective.differentiable:
                raise UserError(
                    f"the objective {objective.name!r} is not differentiable; use dno_stable_diffusion_nograd.py "
                    f"for it (--evaluate {objective.name} works here)"
                )
        for name in {o.name for o in self.objectives} & {e.name for e in self.evaluations}:
            raise UserError(f"{name!r} is both an objective and an evaluation; an objective is recorded already")
        self.noise = noise if noise is None else check_noise(noise)
        if settings.noise:
            self.noise = load_noise(settings.noise)
        if self.noise is not None and self.noise.shape[:2] != (settings.num_steps + 1, settings.batch_size):
            steps, images = self.noise.shape[0] - 1, self.noise.shape[1]
            raise UserError(
                f"the noise to start from is for --num_steps {steps} --batch_size {images}; "
                f"got {settings.num_steps} and {settings.batch_size}"
            )
        self.model = model
        if model is None:
            check_model(settings.model, settings.lora)
        self.run_folder = Run(settings.output, prefix) if settings.output is not None else None
        self.metrics = []
        self.peak = PeakMemory(self.device)

    def run(self, callback, screen):
        """Load, optimize, and leave whole files behind whatever happens."""
        self.callback, self.screen = callback, screen
        try:
            with out_of_memory_explained():
                self._load_rewards()  # first, for what they miss is known at once
                self._load_model()
                if self.run_folder is not None:
                    self.run_folder.write_args({**self.describe(), "reward_files": rewards.loaded_files()})
                if screen:
                    screen.begin(self.describe())
                states = self._optimize()
        finally:
            if screen:
                screen.close()
            if self.model is not None:
                self.model.checkpoint_blocks(False)  # the caller may use the model again
            if self.run_folder is not None:
                if self.metrics:
                    self.run_folder.draw()
                else:
                    self.run_folder.discard()
        result = self._result(states)
        if screen:
            screen.end(result)
        return result

    def _load_rewards(self):
        settings, precision = self.settings, rewards.PRECISIONS[self.settings.reward_precision]
        try:
            rewards.configure(settings.reward_preprocess, settings.reward_checkpointing, **settings.reward_paths)
        except rewards.RewardError as error:
            raise UserError(str(error)) from error
        self.loss = Losses(self.objectives, precision, self.device)
        self.loss.require_gradients(settings.prompt)
        self.evaluation = Losses(self.evaluations, precision, self.device) if self.evaluations else None

    def _load_model(self):
        settings = self.settings
        self.prompts = [settings.prompt] * settings.batch_size
        owned = self.model is None
        if owned:
            self.model = load_model(
                settings.model, self.dtype, self.device, settings.variant, settings.lora, settings.model_config
            )
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._check_size()
        self.schedule = self.model.schedule(settings.num_steps)
        _warn_of_unknown_words(settings)
        self.conditioning = self.model.encode_prompts(self.prompts, settings.negative_prompt)
        if owned:
            self.model.free_text_encoder()
        self.checkpointing = settings.checkpointing
        if self.checkpointing == "auto":
            steps_with_graph = min(settings.opt_time + 1, settings.num_steps)
            self.checkpointing = choose_checkpointing(self._one_step, steps_with_graph, self.device)
        self.model.checkpoint_blocks(self.checkpointing == "block")

    def _check_size(self):
        """Fill in the size, and check everything that depends on it."""
        settings, model = self.settings, self.model
        default = model.default_size
        self.size = settings.height or default[0], settings.width or default[1]
        for name, value in zip(("height", "width"), self.size, strict=True):
            if value % model.scale_factor:
                lower = max(value // model.scale_factor, 1) * model.scale_factor
                raise UserError(
                    f"--{name} is {value}; expected a multiple of the VAE's scale factor {model.scale_factor}, "
                    f"such as {lower}"
                )
        self.latent_shape = model.latent_shape(settings.batch_size, *self.size)
        steps = settings.num_steps
        # With eta = 0 the starting noise alone reaches the image; with K < T the starting noise is frozen.
        self.free = slice(steps, steps + 1) if settings.eta == 0 else slice(0, settings.opt_time + 1)
        one_noise = self.latent_shape[1] * self.latent_shape[2] * self.latent_shape[3]
        if one_noise % 4**settings.subsample:
            raise UserError(
                f"--subsample {settings.subsample} cuts the noise into rows of {4**settings.subsample} values, which "
                f"do not divide the {one_noise} values of one noise; lower it"
            )
        if self.noise is not None and self.noise.shape[1:] != self.latent_shape:
            _, _, channels, h, w = self.noise.shape
            raise UserError(
                f"the noise to start from has {channels} channels for --height {h * model.scale_factor} "
                f"--width {w * model.scale_factor}; got {self.latent_shape[1]}, {self.size[0]} and {self.size[1]}"
            )

    def _one_step(self):
        z = torch.zeros(self.latent_shape, device=self.device, dtype=self.state_dtype, requires_grad=True)
        timestep = self.schedule.timesteps[0]
        return self.model.denoise(z, timestep, self.conditioning, self.settings.guidance_scale)

    def render(self, noises, images):
        """T + 1 noises (B, C, h, w) -> images (B, 3, H, W), for the images of these indices."""
        denoise = partial(
            self.model.denoise, conditioning=self.conditioning[images], guidance_scale=self.settings.guidance_scale
        )
        latents = sample(denoise, noises, self.schedule, self.settings.eta, recompute=self.checkpointing != "none")
        return self.model.decode(latents)

    def losses(self, images, indices):
        return self.loss(images, [self.prompts[b] for b in indices])

    @torch.no_grad()
    def evaluate(self, images, indices):
        return self.evaluation(images, [self.prompts[b] for b in indices])[1]

    def regularizer(self, noise, images, step):
        generators = [keyed_generator(PERMUTATIONS, self.settings.seed + b, step) for b in images]
        return probability_penalty(noise, generators, self.settings.subsample, self.settings.permutations)

    @torch.no_grad()
    def starting_noise(self):
        """The given noise, or each image's own draw, or the best of several draws."""
        settings = self.settings
        if self.noise is not None:
            return self.noise.to(self.device, self.state_dtype)
        seeds = [settings.seed + b for b in range(settings.batch_size)]
        every = list(range(settings.batch_size))
        best, best_losses = None, None
        for candidate in range(settings.best_of):
            noise = draw_noise(seeds, settings.num_steps, self.latent_shape[1:], candidate)
            noise = noise.to(self.device, self.state_dtype)
            if settings.best_of == 1:
                return noise
            losses, _ = self.losses(self.render(noise, every), every)
            # A reward that is not finite never wins.
            losses = losses.nan_to_num(nan=torch.inf, neginf=torch.inf)
            if best is None:
                best, best_losses = noise, losses
            better = losses < best_losses
            best[:, better], best_losses = noise[:, better], torch.minimum(losses, best_losses)
        return best

    def _optimize(self):
        settings = self.settings
        self.peak.reset()
        return optimize_noise(
            Backpropagation(self.render, self.losses, self.free),
            self.starting_noise(),
            self.free,
            partial(
                make_optimizer,
                name=settings.optimizer, lr=settings.lr,
                weight_decay=settings.weight_decay, precondition=settings.precondition,
            ),
            self.regularizer,
            gamma=settings.gamma,
            opt_steps=settings.opt_steps,
            max_grad_norm=settings.max_grad_norm,
            rules=StopRules(settings.target_reward, settings.patience, settings.min_probability, settings.max_seconds),
            subsample=settings.subsample,
            evaluate=self.evaluate if self.evaluation else None,
            report=self._report,
        )  # fmt: skip

    def _report(self, step, states, active, images, seconds):
        metrics = _metrics(step, states, seconds, self.peak.read())
        self.peak.reset()
        self.metrics.append(metrics)
        if self.run_folder is not None:
            self._save(step, states, active, images, metrics)
        if self.screen:
            self.screen.iteration(metrics, states)
        if self.callback:
            self.callback(metrics)

    def _save(self, step, states, active, images, metrics):
        run, settings = self.run_folder, self.settings
        for row, b in enumerate(active):
            text = {"prompt": settings.prompt, "seed": settings.seed + b, "step": step, "reward": metrics["rewards"][b]}
            if step % settings.save_every == 0:
                run.save_image(f"images/{step:03d}", images[row], b, **text)
            if step == 0:
                run.save_image("initial", images[row], b, **text)
            if states[b].best_step == step:
                run.save_image("best", images[row], b, **text)
        if any(states[b].best_step == step for b in active):
            names = ("model", "prompt", "seed", "num_steps", "eta", "guidance_scale")
            run.save_noise(_best_noise(states), **{name: getattr(settings, name) for name in names})
        run.log(metrics)

    def describe(self):
        """Every resolved setting, for args.json and the banner."""
        return {
            **asdict(self.settings),
            "model_source": model_spec(self.settings.model).source,
            "height": self.size[0], "width": self.size[1],
            "device": str(self.device), "precision": str(self.dtype).removeprefix("torch."),
            "checkpointing": self.checkpointing,
            "prediction_type": self.model.prediction_type,
            "folder": str(self.run_folder.folder) if self.run_folder is not None else None,
            "climbs": describe(self.objectives),
            "weights": {objective.name: objective.weight for objective in self.objectives},
            "watched": [evaluation.name for evaluation in self.evaluations],
        }  # fmt: skip

    def _result(self, states):
        images = [s.best_image if s.best_image is not None else torch.full((3, *self.size), torch.nan) for s in states]
        return Alignment(
            images=torch.stack([image.cpu() for image in images]),
            rewards=torch.tensor([s.best_reward for s in states]),
            steps=[s.best_step for s in states],
            stopped=[s.stopped for s in states],
            noise=_best_noise(states).cpu(),
            metrics=self.metrics,
            folder=self.run_folder.folder if self.run_folder is not None else None,
        )


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


def _warn_of_unknown_words(settings):
    known = model_spec(settings.model).words
    for prompt in (settings.prompt, settings.negative_prompt or ""):
        unknown = [word for word in re.findall(r"[^\W_]+", prompt.lower()) if known and word not in known]
        if unknown:
            warnings.warn(
                f"{settings.model} was not trained on {', '.join(map(repr, unknown))}; it knows {', '.join(known)}",
                stacklevel=2,
            )
