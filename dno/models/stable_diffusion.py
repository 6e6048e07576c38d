"""Stable Diffusion 1.x, 2.x, XL and turbo: a UNet on discrete, variance-preserving noise levels."""

import warnings

import torch

from dno.errors import UserError
from dno.models.base import TextToImage
from dno.models.conditioning import Shared
from dno.models.specs import TIMESTEP_SPACINGS
from dno.sampling import Point, Schedule

# diffusers' schedulers with discrete variance-preserving levels, whose timesteps and alphas DDIM reads alike.
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE",
        "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
        "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
    )
)  # fmt: skip
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# Settings of those schedulers that change their images and not ours, with the values that say so.
_IGNORED = {
    "clip_sample": (True,), "thresholding": (True,), "set_alpha_to_one": (True,), "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,), "use_beta_sigmas": (True,), "use_lu_lambdas": (True,),
    "timestep_type": ("continuous",),
}  # fmt: skip


class StableDiffusion(TextToImage):
    """Stable Diffusion 1.x and 2.x, frozen, from a diffusers `StableDiffusionPipeline`."""

    pipeline_class = "StableDiffusionPipeline"
    pipeline_options = {"safety_checker": None, "requires_safety_checker": False}
    text_encoders, tokenizers = ("text_encoder",), ("tokenizer",)
    prediction_types = ("epsilon", "v_prediction", "sample")
    addition_embed_type = None  # what the UNet is told besides the text embeddings

    def __init__(self, pipe, name):
        from diffusers import DDIMScheduler

        _check_scheduler(pipe.scheduler)
        # What its file leaves out has the defaults of its own class, which are not always DDIM's.
        config = {name: value for name, value in pipe.scheduler.config.items() if name != "_use_default_values"}
        self.scheduler = DDIMScheduler.from_config(config)
        _check_levels(self.scheduler, pipe.scheduler)
        self.prediction_type = self.scheduler.config.prediction_type
        super().__init__(pipe, name)
        alpha_bar = self.scheduler.alphas_cumprod.double()
        self._alpha, self._sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        _warn_of_ignored_settings(pipe.scheduler.config, self.spec)

    def check(self, pipe):
        super().check(pipe)
        config, channels = pipe.unet.config, pipe.vae.config.latent_channels
        if config.in_channels != channels:
            raise UserError(
                f"the model's UNet takes {config.in_channels} channels and its VAE has {channels}: it wants more than "
                "noise and a prompt, as models for inpainting do; expected a text-to-image model"
            )
        if config.out_channels != channels:
            raise UserError(
                f"the model's UNet gives {config.out_channels} channels and its VAE has {channels}; expected a model "
                "that does not predict its own variance"
            )
        wanted = self.addition_embed_type
        others = {"addition_embed_type": wanted, "class_embed_type": None, "num_class_embeds": None,
                  "encoder_hid_dim_type": None}  # fmt: skip
        for setting, expected in others.items():
            if config.get(setting) != expected:
                raise UserError(
                    f"the model's UNet has {setting} {config.get(setting)!r}; expected {expected!r}: it wants to be "
                    "told more than this pipeline says"
                )
        if config.time_cond_proj_dim is not None:
            raise UserError(
                "the model's UNet takes the guidance scale as an input (time_cond_proj_dim), as latent consistency "
                "models do, which is not supported; use the base model with the LCM LoRA instead"
            )
        if self.prediction_type == "epsilon" and self.scheduler.alphas_cumprod[-1] == 0:
            raise UserError(
                "the model's noise levels end without signal (rescale_betas_zero_snr), where noise prediction says "
                "nothing of the image; expected prediction_type v_prediction in its scheduler's configuration"
            )

    def schedule(self, num_steps, height=None, width=None, timestep_spacing=None):
        """The model's own DDIM timesteps, ending at alpha_bar of timestep 0, or clean if the model's row says so.

        height, width: of the images; they do not matter here.
        timestep_spacing: one of `TIMESTEP_SPACINGS`; None = the row's, else that of the scheduler's configuration.
        Raises UserError for too many steps and for an unknown spacing.
        """
        from diffusers import DDIMScheduler

        most = len(self._alpha)
        spacing = timestep_spacing or self.spec.timestep_spacing or self.scheduler.config.timestep_spacing
        if spacing not in TIMESTEP_SPACINGS:
            raise UserError(f"the timestep spacing is {spacing!r}; expected one of {', '.join(TIMESTEP_SPACINGS)}")
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing=spacing)
        if num_steps <= most:
            scheduler.set_timesteps(num_steps)
        if num_steps > most or int(scheduler.timesteps.max()) >= most:
            raise UserError(
                f"--num_steps {num_steps} asks for timesteps past the model's last, {most - 1} "
                f"({spacing} spacing); lower it"
            )
        # By a rounding error diffusers has one timestep too many, -1, in some trailing schedules, such as 61 steps.
        timesteps = scheduler.timesteps[:num_steps]
        schedule = Schedule.from_alphas_cumprod(timesteps, scheduler.alphas_cumprod, self.spec.ends_clean)
        if num_steps == 1 and schedule.stands_still(0):
            raise UserError(f"--num_steps 1 does nothing with the model's {spacing} spacing; expected 2 or more")
        return schedule

    def point(self, timestep=None, *, sigma=None):
        """The `Point` of any noise level between the model's first and last.

        timestep: from 0 to the model's last, fractions too: between two levels log(sigma / alpha) is interpolated.
        sigma: instead of it, sigma / alpha, the level of variance-exploding models (Karras et al. 2022, arXiv
            2206.00364).
        Either one is a number, or a tensor (B,) for one level per row. Raises ValueError outside the model's range.
        """
        if (timestep is None) == (sigma is None):
            raise ValueError("point takes a timestep or a sigma, one of the two")
        given = timestep if sigma is None else sigma
        per_row = isinstance(given, torch.Tensor)
        values = given.double() if per_row else torch.tensor(given, dtype=torch.float64)
        alpha, sigmas = self._alpha.to(values.device), self._sigma.to(values.device)
        levels = (sigmas / alpha).log()
        levels = levels[levels.isfinite()]  # all but a last level without signal
        if sigma is None:
            _check_range("timestep", values, 0, len(alpha) - 1)
            t, low = values, values.floor().long().clamp(max=len(levels) - 2)
            log_ratio = torch.lerp(levels[low], levels[low + 1], t - low)
        else:
            least, most = levels[[0, -1]].exp().tolist()
            _check_range("sigma", values, least * (1 - 1e-6), most * (1 + 1e-6))  # the ends may be rounded
            log_ratio = values.log().clamp(levels[0], levels[-1])
            high = torch.searchsorted(levels, log_ratio).clamp(min=1)
            t = high - 1 + (log_ratio - levels[high - 1]) / (levels[high] - levels[high - 1])
        # The model's own levels are its own numbers, and their timesteps whole.
        nearest = t.round().long()
        own = (t - nearest).abs() < 1e-9
        t = torch.where(own, nearest, t)
        alpha = torch.where(own, alpha[nearest], torch.sigmoid(-2 * log_ratio).sqrt())
        sigmas = torch.where(own, sigmas[nearest], torch.sigmoid(2 * log_ratio).sqrt())
        if per_row:
            return Point(nearest if own.all() else t, alpha, sigmas)
        return Point(int(t) if own else t.item(), alpha.item(), sigmas.item())

    def encode_texts(self, prompts, negatives, guided):
        return [e if e is None else {"encoder_hidden_states": e} for e in self._embed(prompts, negatives, guided)]

    def _embed(self, prompts, negatives, guided):
        """What the pipeline's own `encode_prompt` returns, in the network's precision."""
        embeddings = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided,
            negative_prompt=negatives,
        )  # fmt: skip
        return [None if e is None else e.to(self.dtype) for e in embeddings]


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, frozen, from a diffusers `StableDiffusionXLPipeline`.

    Two text encoders, whose embeddings are joined; the second one's pooled embedding; and, beside them, the sizes that
    an image of the training set had before it was scaled and cropped, and after. `encode_prompts` takes them, in
    pixels, the same for the negative prompt:

    original_size: (height, width) that the image is said to have had; small ones make it look so.
    crops_coords_top_left: (top, left) of what is said to have been cut off; (0, 0) centres the subject.
    target_size: (height, width) that it was trained for. None is the image's own, here and for original_size.

    Its empty negative prompt is all zeros where the model's configuration says so.
    Source: Podell et al. 2023 (arXiv 2307.01952), section "Micro-Conditioning".
    """

    pipeline_class = "StableDiffusionXLPipeline"
    pipeline_options = {"add_watermarker": False}
    text_encoders, tokenizers = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
    addition_embed_type = "text_time"
    size_conditioned = True
    vae_obeys_force_upcast = True  # the published VAE overflows in float16

    def check(self, pipe):
        super().check(pipe)
        config, encoders = pipe.unet.config, [getattr(pipe, part) for part in self.text_encoders]
        # The refiner has one text encoder, and an aesthetic score in the place of the target's height and width.
        if None in encoders or config.projection_class_embeddings_input_dim != (
            encoders[1].config.projection_dim + 6 * (config.addition_time_embed_dim or 0)
        ):
            raise UserError(
                "the model's UNet does not take two text encoders and six sizes, as SDXL's base model does; a refiner "
                "cannot make images of noise alone"
            )

    def encode_texts(
        self, prompts, negatives, guided, original_size=None, crops_coords_top_left=(0, 0), target_size=None
    ):  # fmt: skip
        positive, negative, pooled, negative_pooled = self._embed(prompts, negatives, guided)
        sizes = Shared((original_size, crops_coords_top_left, target_size))

        def keywords(embeddings, pooled):
            added = {"text_embeds": pooled, "time_ids": sizes}
            return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}

        return keywords(positive, pooled), None if negative is None else keywords(negative, negative_pooled)

    def keywords(self, x, keywords):
        keywords = super().keywords(x, keywords)
        image = [side * self.scale_factor for side in x.shape[2:]]
        original, crop, target = keywords["added_cond_kwargs"]["time_ids"]
        # float32 in every precision: bfloat16 has no 1022. Filled on the device, as the timestep is.
        numbers = [*(original or image), *crop, *(target or image)]
        time_ids = torch.stack([torch.full((len(x),), float(n), device=x.device) for n in numbers], dim=1)  # (B, 6)
        return keywords | {"added_cond_kwargs": keywords["added_cond_kwargs"] | {"time_ids": time_ids}}


def _check_scheduler(scheduler):
    """Raise UserError for a scheduler whose noise levels DDIM would misread."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind not in SCHEDULERS or config.get("use_flow_sigmas"):
        flow = " with use_flow_sigmas" if kind in SCHEDULERS else ""
        raise UserError(
            f"the model's scheduler is {kind}{flow}; expected discrete variance-preserving noise levels, of one of "
            f"{', '.join(SCHEDULERS)}"
        )
    if config.get("trained_betas") is None and config.get("beta_schedule") not in BETA_SCHEDULES:
        raise UserError(
            f"the scheduler's beta_schedule is {config.get('beta_schedule')!r}; expected one of "
            f"{', '.join(BETA_SCHEDULES)}"
        )


def _check_levels(ddim, scheduler):
    """Raise UserError if DDIM reads other noise levels from the configuration than the scheduler itself."""
    own = getattr(scheduler, "alphas_cumprod", None)
    if own is None or own.shape != ddim.alphas_cumprod.shape or (own - ddim.alphas_cumprod).abs().max() > 1e-6:
        raise UserError(
            f"the noise levels of the model's {type(scheduler).__name__} cannot be had from its configuration; "
            "expected beta_schedule, beta_start, beta_end and num_train_timesteps that say them"
        )


def _warn_of_ignored_settings(config, spec):
    """Warn of what the scheduler's file itself asks for and the sampler does not do."""
    said = {name: config.get(name) for name in _IGNORED if name not in config.get("_use_default_values", ())}
    ignored = [f"{name}={value}" for name, value in said.items() if value in _IGNORED[name]]
    if spec.ends_clean:
        ignored = [setting for setting in ignored if setting != "set_alpha_to_one=True"]
    if ignored:
        warnings.warn(f"ignored settings of the model's scheduler: {', '.join(ignored)}", stacklevel=3)


def _check_range(name, values, least, most):
    """Raise ValueError for values outside."""
    if not ((values >= least) & (values <= most)).all():
        raise ValueError(f"{name} is {values.tolist()}; expected from {least:g} to {most:g}, the model's levels")
