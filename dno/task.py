"""What one run optimizes: model, prompts and rewards as the functions that the loop takes."""

import re
import warnings
from dataclasses import dataclass
from functools import partial

import torch

import rewards
from dno.errors import UserError
from dno.memory import LeanerOnDemand, Plan, choose_plan
from dno.methods.estimation import Estimation
from dno.methods.gradients import Backpropagation
from dno.methods.optimizers import make_optimizer
from dno.models.loading import check_model, load_model
from dno.models.specs import PRECISIONS, model_spec, resolve_device, resolve_precision
from dno.noise import PERMUTATIONS, PERTURBATION, check_noise, draw_noise, keyed_generator, load_noise
from dno.objectives import Losses, parse_evaluations, parse_objectives
from dno.regularization import probability_penalty
from dno.sampling import noise_scale, sample
from dno.team import Team


@dataclass
class Loaded:
    """What several runs can share: model (with its text encoder), losses and evaluation."""

    model: object = None
    loss: Losses | None = None
    evaluation: Losses | None = None


class Problem:
    """Everything is checked when it is made, and loaded by `load`, which fills in `size`, `free` and `plan`.

    settings: resolved `Settings`. noise: (T + 1, B, C, h, w) to start from, or None.
    team: the processes of the run.
    loaded: what is there already, which this run leaves as it is; what is missing is loaded into it.
    """

    def __init__(self, settings, noise=None, team=None, loaded=None):
        self.settings, self.team = settings, team or Team()
        self.shared, self.loaded = loaded is not None, loaded or Loaded()
        self.estimates = settings.estimator != "backprop"
        model = self.loaded.model
        self.device = model.device if model else self.team.device or resolve_device(settings.device)
        self.dtype = model.dtype if model else resolve_precision(settings.precision, self.device)
        self.precision = next((name for name, dtype in PRECISIONS.items() if dtype == self.dtype), "auto")
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.prompts = [settings.prompt] * settings.batch_size
        self._check_rewards()
        self._check_noise(noise)
        if model is None:
            check_model(settings.model, settings.lora, settings.vae)

    def _check_rewards(self):
        self.objectives = parse_objectives(self.settings.objective, rewards.RFUNCTIONS)
        self.evaluations = parse_evaluations(self.settings.evaluate, rewards.RFUNCTIONS)
        for objective in self.objectives:
            if getattr(objective.factory, "evaluation_only", False):
                raise UserError(f"{objective.name!r} is a judge, which optimizing would corrupt; use --evaluate for it")
            if not objective.differentiable and not self.estimates:
                raise UserError(
                    f"the objective {objective.name!r} is not differentiable; use dno_stable_diffusion_nograd.py "
                    f"for it (--evaluate {objective.name} works here)"
                )
        for name in {o.name for o in self.objectives} & {e.name for e in self.evaluations}:
            raise UserError(f"{name!r} is both an objective and an evaluation; an objective is recorded already")

    def _check_noise(self, noise):
        settings = self.settings
        self.noise = noise if noise is None else check_noise(noise)
        if settings.noise:
            self.noise = load_noise(settings.noise)
        if self.noise is not None and self.noise.shape[:2] != (settings.num_steps + 1, settings.batch_size):
            steps, images = self.noise.shape[0] - 1, self.noise.shape[1]
            raise UserError(
                f"the noise to start from is for --num_steps {steps} --batch_size {images}; "
                f"got {settings.num_steps} and {settings.batch_size}"
            )

    def load(self):
        """Rewards first, for what they miss is known at once; then the model, and what depends on it."""
        if self.loaded.loss is None:
            self._load_rewards()
        self.loss, self.evaluation = self.loaded.loss, self.loaded.evaluation
        settings = self.settings
        if self.loaded.model is None:
            self.loaded.model = load_model(
                settings.model, self.dtype, self.device, settings.variant, settings.lora, settings.model_config,
                settings.vae, settings.vae_precision,
            )  # fmt: skip
            if settings.compile:
                self.loaded.model.compile_blocks()
        self.model = self.loaded.model
        self._check_size()
        self.schedule = self.model.schedule(settings.num_steps, settings.timestep_spacing)
        _warn_of_unknown_words(settings)
        self.guided = settings.guidance_scale > 1
        self.conditioning = self.model.encode_prompts(
            self.prompts, settings.negative_prompt, guided=self.guided, **self._sizes()
        )
        if not self.shared:
            self.model.free_text_encoder()
        self.use(self._choose_plan())

    def _sizes(self):
        settings = self.settings
        sizes = {name: getattr(settings, name) for name in ("original_size", "crops_coords_top_left", "target_size")}
        if self.model.size_conditioned:
            return sizes
        if given := [f"--{name}" for name, value in sizes.items() if value not in (None, (0, 0))]:
            raise UserError(f"{', '.join(given)}: {settings.model} is not told of sizes, as SDXL is; leave them out")
        return {}

    def _choose_plan(self):
        """How much is kept for the backward pass."""
        settings = self.settings
        steps = min(settings.opt_time + 1, settings.num_steps)
        if settings.gradient == "skip_unet":  # a step's graph is a few latents
            block = settings.checkpointing == "block"
            return Plan(0, 0, vae_blocks=block, split_guidance=settings.split_guidance, guided=self.guided)
        # On a CPU the decoder's graph is small beside the free memory; an estimator keeps none of the reward's, and its
        # reward may be a person who would be asked to rate a grey picture.
        finish = self._finish if self.device.type == "cuda" and not self.estimates else None
        return choose_plan(
            settings.checkpointing, steps, self.device, self._one_step, finish, self.guided, settings.split_guidance
        )

    def use(self, plan):
        """Follow this plan from now on."""
        self.plan = plan
        self.model.checkpoint_blocks(plan.network_blocks, plan.vae_blocks)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def release(self):
        """Leave the model as it came: somebody may use it again."""
        if self.loaded.model is not None:
            self.loaded.model.checkpoint_blocks(False)

    def _load_rewards(self):
        settings, precision = self.settings, rewards.PRECISIONS[self.settings.reward_precision]
        try:
            rewards.configure(settings.reward_preprocess, settings.reward_checkpointing, **settings.reward_paths)
        except rewards.RewardError as error:
            raise UserError(str(error)) from error
        loss = Losses(self.objectives, precision, self.device)
        if not self.estimates:
            loss.require_gradients(settings.prompt)
        watched = self.evaluations if self.team.leads else ()  # the leader alone evaluates
        self.loaded.evaluation = Losses(watched, precision, self.device) if watched else None
        self.loaded.loss = loss

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

    def _leaf(self):
        return torch.zeros(self.latent_shape, device=self.device, dtype=self.state_dtype, requires_grad=True)

    def _one_step(self):
        return self._denoise(self.conditioning)(self._leaf(), self.schedule.timesteps[0])

    def _finish(self):
        return self.losses(self.model.decode(self._leaf()), range(self.settings.batch_size))

    def _denoise(self, conditioning, plan=None):
        return partial(
            self.model.denoise,
            conditioning=conditioning,
            guidance_scale=self.settings.guidance_scale,
            through_network=self.settings.gradient == "full",
            split_guidance=plan.split_guidance if plan else self.settings.split_guidance,
        )

    def render(self, noises, images):
        """T + 1 noises (B, C, h, w) -> images (B, 3, H, W), for the images of these indices."""
        denoise = self._denoise(self.conditioning[images], self.plan)
        recompute = self.plan.recompute(self.schedule.num_steps)
        return self.model.decode(sample(denoise, noises, self.schedule, self.settings.eta, recompute))

    def losses(self, images, indices):
        loss = self.loss.forgiving if self.estimates else self.loss
        return loss(images, [self.prompts[b] for b in indices])

    @torch.no_grad()
    def evaluate(self, images, indices):
        return self.evaluation(images, [self.prompts[b] for b in indices])[1]

    def regularizer(self, noise, images, step):
        generators = [keyed_generator(PERMUTATIONS, self.settings.seed + b, step) for b in images]
        return probability_penalty(noise, generators, self.settings.subsample, self.settings.permutations)

    def empty_noise(self):
        return torch.zeros(self.settings.num_steps + 1, *self.latent_shape, device=self.device, dtype=self.state_dtype)

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
            self.team.send_task(noise[:0], [], -1)  # a sign of life for those who wait for the first task
            losses, _ = self.losses(self.render(noise, every), every)
            # A reward that is not finite never wins.
            losses = losses.nan_to_num(nan=torch.inf, neginf=torch.inf)
            if best is None:
                best, best_losses = noise, losses
            better = losses < best_losses
            best[:, better], best_losses = noise[:, better], torch.minimum(losses, best_losses)
        return best

    def source(self):
        """The gradient source that the settings ask for."""
        settings = self.settings
        if not self.estimates:
            return LeanerOnDemand(Backpropagation(self.render, self.losses, self.free), self)

        def draw(image, step, index, shape):
            generator = keyed_generator(PERTURBATION, settings.seed + image, step, index)
            return torch.randn(shape, generator=generator)

        source = Estimation(
            self.render, self.losses, self.free, settings.estimator,
            mu=settings.mu, num_samples=settings.num_samples, draw=draw, batch_size=settings.batch_per_device,
            antithetic=settings.antithetic, pad=self._half_precision(), team=self.team,
            backprop_cost=settings.backprop_cost, max_bad_samples=settings.max_bad_samples, idle=self._idle(),
        )  # fmt: skip
        # Several processes cannot try again, for the others are past it; zo keeps nothing that could be spared.
        return source if self.team.size > 1 or settings.estimator == "zo" else LeanerOnDemand(source, self)

    def _half_precision(self):
        return {self.dtype, self.model.vae.dtype} & {torch.bfloat16, torch.float16} != set()

    def _idle(self):
        """The free noises that no step of the sampler adds."""
        steps = self.settings.num_steps
        free = range(steps + 1)[self.free]
        return [
            row for row, k in enumerate(free)
            if k < steps and noise_scale(self.schedule, steps - 1 - k, self.settings.eta) == 0
        ]  # fmt: skip

    def make_optimizer(self, params):
        settings = self.settings
        return make_optimizer(params, settings.optimizer, settings.lr, settings.weight_decay, settings.precondition)


def _warn_of_unknown_words(settings):
    known = model_spec(settings.model).words
    for prompt in (settings.prompt, settings.negative_prompt or ""):
        unknown = [word for word in re.findall(r"[^\W_]+", prompt.lower()) if known and word not in known]
        if unknown:
            warnings.warn(
                f"{settings.model} was not trained on {', '.join(map(repr, unknown))}; it knows {', '.join(known)}",
                stacklevel=2,
            )
