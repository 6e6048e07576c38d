"""Task: model, prompts, schedule and rewards of one run, as the functions that every method works with."""

import re
import warnings
from dataclasses import dataclass
from functools import partial

import torch

import rewards
from dno.errors import UserError
from dno.memory import Plan, choose_plan
from dno.models.loading import check_model, load_model
from dno.models.specs import PRECISIONS, model_spec, resolve_device, resolve_precision
from dno.noise import check_noise, draw_noise, load_noise
from dno.objectives import METRICS, Losses, parse_evaluations, parse_objectives
from dno.sampling import sample
from dno.team import Team


@dataclass
class Loaded:
    """What several runs can share: model (with its text encoder), losses and evaluation."""

    model: object = None
    loss: Losses | None = None
    evaluation: Losses | None = None


class Task:
    """What every method gets. Everything is checked first, and then loaded.

    settings: resolved; see `dno.settings`.
    noise: a tensor to start from, as `dno.noise.check_noise` takes it, instead of `settings.noise`; or None.
    needs_gradient: whether every objective must be differentiable.
    reserved: names of metrics that no reward may have.
    team: the processes of the run.
    loaded: what is there already, which this run leaves as it is; what is missing is loaded into it.
    before_loading: called when all is checked, and nothing is loaded.
    As a context it releases the model at the end. Raises UserError for whatever is wrong.

    model, schedule, conditioning, team, device: as named. prompts: one per image. size: height and width in pixels.
    latent_shape: (B, C, h, w). state_dtype: of noise and latents. plan: what is kept for the backward pass.
    """

    def __init__(
        self, settings, noise=None, *, needs_gradient=False, reserved=(), team=None, loaded=None,
        before_loading=lambda: None,
    ):  # fmt: skip
        self.settings, self.team, self.needs_gradient = settings, team or Team(), needs_gradient
        self.shared, loaded = loaded is not None, loaded or Loaded()
        model = loaded.model
        self.device = model.device if model else self.team.device or resolve_device(settings.device)
        self.dtype = model.dtype if model else resolve_precision(settings.precision, self.device)
        self.precision = next((name for name, dtype in PRECISIONS.items() if dtype == self.dtype), "auto")
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.prompts = _each(settings.prompt, settings.batch_size)
        self.plan = Plan(0, 0)
        self._check_rewards(reserved)
        self._check_noise(noise)
        if model is None:
            check_model(settings.model, settings.lora, settings.vae)
        before_loading()
        self._load(loaded)

    # Checking

    def _check_rewards(self, reserved):
        settings = self.settings
        reserved = (*METRICS, *reserved)
        self.objectives = parse_objectives(settings.objective, rewards.RFUNCTIONS, reserved)
        self.evaluations = parse_evaluations(settings.evaluate, rewards.RFUNCTIONS, reserved)
        for objective in self.objectives:
            if getattr(objective.factory, "evaluation_only", False):
                raise UserError(f"{objective.name!r} is a judge, which optimizing would corrupt; use --evaluate for it")
            if not objective.differentiable and self.needs_gradient:
                raise UserError(
                    f"the objective {objective.name!r} is not differentiable; use --estimator hybrid for it "
                    f"(--evaluate {objective.name} works here)"
                )
        for name in {o.name for o in self.objectives} & {e.name for e in self.evaluations}:
            raise UserError(f"{name!r} is both an objective and an evaluation; an objective is recorded already")

    def _check_noise(self, noise):
        settings = self.settings
        self.noise = load_noise(settings.noise) if settings.noise else noise if noise is None else check_noise(noise)
        if self.noise is None:
            return
        count, images = self.noise.shape[:2]
        if images != settings.batch_size or count not in (1, settings.num_steps + 1):
            steps = "any --num_steps" if count == 1 else f"--num_steps {count - 1}"
            raise UserError(
                f"the noise to start from is for {steps} --batch_size {images}; "
                f"got {settings.num_steps} and {settings.batch_size}"
            )

    # Loading

    def _load(self, loaded):
        """Rewards first, for what they miss is known at once; then the model, and what depends on it."""
        settings = self.settings
        if loaded.loss is None:
            self._load_rewards(loaded)
        self.loss, self.evaluation = loaded.loss, loaded.evaluation
        if loaded.model is None:
            loaded.model = load_model(
                settings.model, self.dtype, self.device, settings.variant, settings.lora, settings.model_config,
                settings.vae, settings.vae_precision,
            )  # fmt: skip
            if settings.compile:
                loaded.model.compile_blocks()
        self.model = loaded.model
        self._check_size()
        self.schedule = self.model.schedule(settings.num_steps, *self.size, settings.timestep_spacing)
        _warn_of_unknown_words(settings)
        self.guided = self.model.needs_negative(settings.guidance_scale)
        if 0 < settings.guidance_scale < 1 and not self.guided:
            warnings.warn(
                f"--guidance_scale {settings.guidance_scale:g} is as 1: below 1 there is no guidance to weaken",
                stacklevel=2,
            )
        if settings.negative_prompt and not self.guided:
            warnings.warn(
                f"--negative_prompt has no effect at --guidance_scale {settings.guidance_scale:g}", stacklevel=2
            )
        negative = settings.negative_prompt
        negative = list(negative) if isinstance(negative, tuple) else negative
        self.conditioning = self.model.encode_prompts(self.prompts, negative, guided=self.guided, **self._sizes())
        if not self.shared:
            self.model.free_text_encoder()

    def _load_rewards(self, loaded):
        settings, precision = self.settings, rewards.PRECISIONS[self.settings.reward_precision]
        try:
            rewards.configure(settings.reward_preprocess, settings.reward_checkpointing, **settings.reward_paths)
        except rewards.RewardError as error:
            raise UserError(str(error)) from error
        loss = Losses(self.objectives, precision, self.device)
        if self.needs_gradient:
            loss.require_gradients(self.prompts[0])
        watched = self.evaluations if self.team.leads else ()  # the leader alone evaluates
        loaded.evaluation = Losses(watched, precision, self.device) if watched else None
        loaded.loss = loss

    def _sizes(self):
        settings = self.settings
        sizes = {name: getattr(settings, name) for name in ("original_size", "crops_coords_top_left", "target_size")}
        if self.model.size_conditioned:
            return sizes
        if given := [f"--{name}" for name, value in sizes.items() if value not in (None, (0, 0))]:
            raise UserError(f"{', '.join(given)}: {settings.model} is not told of sizes, as SDXL is; leave them out")
        return {}

    def _check_size(self):
        """Fill in the size, and check everything that depends on it."""
        settings, model = self.settings, self.model
        if settings.height and settings.width:
            self.size = settings.height, settings.width
        else:
            height, width = model.default_size
            self.size = settings.height or height, settings.width or width
        for name, value in zip(("height", "width"), self.size, strict=True):
            if value % model.scale_factor:
                lower = max(value // model.scale_factor, 1) * model.scale_factor
                raise UserError(
                    f"--{name} is {value}; expected a multiple of the VAE's scale factor {model.scale_factor}, "
                    f"such as {lower}"
                )
        self.latent_shape = model.latent_shape(settings.batch_size, *self.size)
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

    # Working

    def denoise(self, rows, through_network=True):
        """The guided denoiser of these images, (x, point) -> (x0, eps)."""
        return partial(
            self.model.denoise,
            conditioning=self.conditioning[rows],
            guidance_scale=self.settings.guidance_scale,
            through_network=through_network,
            split_guidance=self.plan.split_guidance or self.settings.split_guidance,
        )

    def render(self, noises, rows, through_network=True):
        """T + 1 noises (n, C, h, w) -> images (n, 3, H, W), for the images of these indices, which may repeat.

        through_network: False holds the network's output constant in the backward pass.
        """
        recompute = self.plan.recompute(self.schedule.num_steps)
        denoise = self.denoise(rows, through_network)
        return self.model.decode(sample(denoise, noises, self.schedule, self.settings.eta, recompute))

    def losses(self, images, rows):
        """(the weighted sum of the losses (n,), each objective's unweighted reward by name, (n,), detached)."""
        return self.loss(images, [self.prompts[b] for b in rows])

    @torch.no_grad()
    def losses_or_nan(self, images, rows):
        """As `losses`, without gradients; an image for which a reward fails has NaN, with a warning."""
        return self.loss.forgiving(images, [self.prompts[b] for b in rows])

    @torch.no_grad()
    def evaluate(self, images, rows):
        """The rewards that are recorded and not optimized, by name, (n,) each."""
        return self.evaluation(images, [self.prompts[b] for b in rows])[1] if self.evaluation else {}

    def draw(self, candidate=0):
        """Each image's own noise, (T + 1, B, C, h, w), on the device. candidate: which of its independent draws."""
        settings = self.settings
        seeds = [settings.seed + b for b in range(settings.batch_size)]
        noise = draw_noise(seeds, settings.num_steps, self.latent_shape[1:], candidate)
        return noise.to(self.device, self.state_dtype)

    @torch.no_grad()
    def draw_best(self, count):
        """The best of `count` draws of each image, (T + 1, B, C, h, w); the first of equals."""
        rows, best, lowest = list(range(self.settings.batch_size)), None, None
        for k in range(count):
            noise = self.draw(candidate=k)
            self.team.send_task(noise[:0], [], -1)  # a sign of life for those who wait for the first task
            losses, _ = self.losses_or_nan(self.render(noise.unbind(), rows), rows)
            losses = losses.where(losses.isfinite(), torch.inf)  # what is not finite never wins
            if best is None:
                best, lowest = noise, losses
            better = losses < lowest
            best[:, better], lowest = noise[:, better], torch.minimum(losses, lowest)
        return best

    def given_noise(self):
        """The noise that the user gave, (T + 1, B, C, h, w) on the device, or None.

        A file that has x_T alone, as runs with eta 0 leave it, gets the fresh noise of the images' own draws.
        """
        if self.noise is None:
            return None
        noise = self.noise.to(self.device, self.state_dtype)
        return noise if len(noise) == self.settings.num_steps + 1 else torch.cat([self.draw()[:-1], noise])

    # Memory

    def plan_graphs(self, num_steps, rewards_too=True):
        """Choose what is kept for the backward pass, for a method that differentiates.

        num_steps: of how many steps, the last ones, the backward pass needs the network's graph; 0 for none.
        rewards_too: whether the gradient passes through the rewards.
        """
        settings = self.settings
        if num_steps == 0:
            block = settings.checkpointing == "block"
            plan = Plan(0, 0, vae_blocks=block, split_guidance=settings.split_guidance, guided=self.guided)
        else:
            # On a CPU the decoder's graph is small beside the free memory; without the reward's there is no call for
            # it either, and such a reward may be a person who would be asked to rate a grey image.
            finish = self._finish if self.device.type == "cuda" and rewards_too else None
            plan = choose_plan(
                settings.checkpointing, num_steps, self.device, self._one_step, finish, self.guided,
                settings.split_guidance,
            )  # fmt: skip
        self.use(plan)

    def _leaf(self):
        return torch.zeros(self.latent_shape, device=self.device, dtype=self.state_dtype, requires_grad=True)

    def _one_step(self):
        return self.denoise(list(range(self.settings.batch_size)))(self._leaf(), self.schedule[0])

    def _finish(self):
        return self.losses(self.model.decode(self._leaf()), range(self.settings.batch_size))

    def use(self, plan):
        """Follow this plan from now on."""
        self.plan = plan
        self.model.checkpoint_blocks(plan.network_blocks, plan.vae_blocks)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def release(self):
        """Leave the model as it came: the caller may use it again."""
        self.model.checkpoint_blocks(False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def _each(value, count):
    return list(value) if isinstance(value, tuple) else [value] * count


def _warn_of_unknown_words(settings):
    known = model_spec(settings.model).words
    text = " ".join((*_each(settings.prompt, 1), *_each(settings.negative_prompt or "", 1))).lower()
    unknown = [word for word in dict.fromkeys(re.findall(r"[^\W_]+", text)) if known and word not in known]
    if unknown:
        warnings.warn(
            f"{settings.model} was not trained on {', '.join(map(repr, unknown))}; it knows {', '.join(known)}",
            stacklevel=2,
        )
