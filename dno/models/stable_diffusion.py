"""Text-to-image models: one row a model, one class a family.

A model is `encode_prompts`, `denoise`, `decode`, `schedule` and `latent_shape`. Guidance, the meaning of the network's
output (epsilon, v or x0) and the border between the sampler's float32 and the network's precision live here only.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from dno.errors import UserError
from dno.models.quiet import quiet
from dno.models.specs import TIMESTEP_SPACINGS, model_spec
from dno.sampling import Schedule


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of B prompts, in the network's precision; indexed by a list of images.

    positive, negative: text embeddings, (B, L, D) each; no negative ones where nothing is guided.
    pooled, negative_pooled: one embedding a prompt, (B, P), where the family has them (SDXL).
    sizes: (original (height, width), crop (top, left), target (height, width)) in pixels, where the family is told of
        them (SDXL); None stands for the image's own height and width.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None
    sizes: tuple = (None, (0, 0), None)

    def __getitem__(self, images):
        return replace(self, **{name: e[images] for name, e in vars(self).items() if isinstance(e, torch.Tensor)})

    def negated(self):
        """The negative prompts in the place of the positive ones."""
        return replace(self, positive=self.negative, pooled=self.negative_pooled)

    def doubled(self):
        """The negative prompts and then the positive ones, 2 B in one batch."""
        pooled = None if self.pooled is None else torch.cat([self.negative_pooled, self.pooled])
        return replace(self, positive=torch.cat([self.negative, self.positive]), pooled=pooled)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x, frozen, from a diffusers `StableDiffusionPipeline`.

    The sampler's side of every method has the dtype of the tensors that come in (float32, or float64 in tests); the
    networks run in the precision that they are stored in.
    """

    pipeline_class = "StableDiffusionPipeline"
    pipeline_options = {"safety_checker": None, "requires_safety_checker": False}
    text_encoders, tokenizers = ("text_encoder",), ("tokenizer",)
    size_conditioned = False  # whether `encode_prompts` takes sizes
    vae_obeys_force_upcast = False  # its VAE's configuration says force_upcast by default, and does well without

    def __init__(self, pipe, name):
        """name: what the user called the model; its row in `MODELS` has its defaults."""
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type
        self._check(pipe)
        for network in (pipe.unet, pipe.vae, *(getattr(pipe, part) for part in self.text_encoders)):
            network.requires_grad_(False).eval()
        self.name, self.pipe, self.unet, self.vae = name, pipe, pipe.unet, pipe.vae
        self.spec = model_spec(name)
        alpha_bar = self.scheduler.alphas_cumprod.double()
        self._alpha, self._sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()

    def _check(self, pipe):
        """Raise UserError where the pipeline is not one of this family."""
        if self.prediction_type not in _CLEAN_AND_NOISE:
            raise UserError(
                f"the model predicts {self.prediction_type!r}; expected one of {', '.join(_CLEAN_AND_NOISE)}"
            )
        channels, wanted = pipe.vae.config.latent_channels, pipe.unet.config.in_channels
        if wanted != channels:
            raise UserError(
                f"the model's UNet takes {wanted} channels and its VAE has {channels}: it wants more than noise and a "
                "prompt, as models for inpainting do; expected a text-to-image model"
            )

    @property
    def device(self):
        return self.unet.device

    @property
    def dtype(self):
        """The precision of the frozen networks."""
        return self.unet.dtype

    @property
    def scale_factor(self):
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self):
        """Height and width in pixels that the model was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.scale_factor, width * self.scale_factor

    def latent_shape(self, batch, height, width):
        """(B, C, h, w) for images of height x width pixels."""
        return batch, self.unet.config.in_channels, height // self.scale_factor, width // self.scale_factor

    def schedule(self, num_steps, timestep_spacing=None):
        """The model's own DDIM timesteps, ending at alpha_bar of timestep 0, or clean where the model's row says so.

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

    @torch.no_grad()
    def encode_prompts(self, prompts, negative_prompt=None, *, guided=True):
        """Conditioning of B prompts; the negative one is the family's empty prompt unless given.

        guided: False, for a guidance scale <= 1, leaves the negative prompt out.
        Warns, with the words that are cut, where a prompt is longer than the tokenizer takes.
        """
        return Conditioning(*self._encode(prompts, negative_prompt, guided))

    def _encode(self, prompts, negative_prompt, guided):
        """What the pipeline's own `encode_prompt` returns, in the network's precision."""
        if any(getattr(self.pipe, part) is None for part in self.text_encoders):
            raise UserError("the text encoder was freed; encode every prompt before free_text_encoder()")
        self._warn_of_cuts([*prompts, negative_prompt or ""] if guided else prompts)
        with quiet():
            embeddings = self.pipe.encode_prompt(
                list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            )  # fmt: skip
        return [None if e is None else e.to(self.dtype) for e in embeddings]

    def _warn_of_cuts(self, prompts):
        cuts = {}  # a dict, so that what two tokenizers say alike, or of two images, is said once
        for part in self.tokenizers:
            tokenizer = getattr(self.pipe, part)
            limit = tokenizer.model_max_length - 2  # the start and end tokens take two places
            for prompt in prompts:
                ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
                if len(ids) > limit:
                    cut = tokenizer.decode(ids[limit:], clean_up_tokenization_spaces=False).strip()
                    cuts[f"the prompt has {len(ids)} tokens, the model takes {limit}; cut: {cut!r}"] = None
        for cut in cuts:
            warnings.warn(cut, stacklevel=5)  # past no_grad, to the caller of encode_prompts

    def free_text_encoder(self):
        """Give back the memory of the text encoder or encoders, once every prompt is encoded."""
        for part in self.text_encoders:
            setattr(self.pipe, part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def denoise(self, x, timestep, conditioning, guidance_scale, through_network=True, split_guidance=False):
        """The predicted clean latents and noise (x0, eps), each (B, C, h, w), with classifier-free guidance.

        guidance_scale: weight of the conditional prediction against the negative one; <= 1 leaves the negative one,
            and half of the work, out.
        through_network: False holds the network's guided output constant in the backward pass, where x0 and eps then
            depend on x by their formulas alone.
        split_guidance: run the negative and the positive half one after the other, so that at any time there are the
            activations of one half only; backward, the negative half is computed once more for that.
        Source: Ho and Salimans 2022 (arXiv 2207.12598); Salimans and Ho 2022 (arXiv 2202.00512) for v.
        """
        t = int(timestep)
        with torch.set_grad_enabled(through_network and torch.is_grad_enabled()):
            prediction = self._guided(x, t, conditioning, guidance_scale, split_guidance)
        return _CLEAN_AND_NOISE[self.prediction_type](x, prediction, self._alpha[t], self._sigma[t])

    def _guided(self, x, t, conditioning, guidance_scale, split):
        if guidance_scale <= 1:
            return self._predict(x, t, conditioning)
        if conditioning.negative is None:
            raise ValueError(f"guidance_scale is {guidance_scale}, and the negative prompt was left out (guided=False)")
        if split:
            # Backward takes the newest first: the positive half is gone when the negative one is rebuilt.
            negative = checkpoint(
                self._predict, x, t, conditioning.negated(), use_reentrant=False, preserve_rng_state=False
            )
            positive = self._predict(x, t, conditioning)
        else:
            negative, positive = self._predict(torch.cat([x, x]), t, conditioning.doubled()).chunk(2)
        return negative + guidance_scale * (positive - negative)

    def _predict(self, x, t, conditioning):
        # A tensor filled on the device: a Python number would be copied to it, and waited for, at every call.
        t = torch.full((len(x),), t, device=x.device)
        more = self._more_conditions(x, conditioning)
        return _in_precision_of(
            self.unet, lambda x: self.unet(x, t, conditioning.positive, **more, return_dict=False)[0], x
        )

    def _more_conditions(self, x, conditioning):
        """What the family's UNet is told besides timestep and text embeddings, by keyword."""
        return {}

    def decode(self, latents):
        """Images (B, 3, H, W), nominally in [-1, 1], not clamped, in the dtype of the latents."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        return _in_precision_of(self.vae, lambda x: self.vae.decode(x, return_dict=False)[0], latents)

    def checkpoint_blocks(self, unet=True, vae=None):
        """Recompute each block of the UNet, of the VAE, or of both in the backward pass: less memory, more time.

        vae: None = as the UNet.
        """
        # Nothing in a frozen network is random, so no generator's state has to be fetched and set again.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for network, enabled in ((self.unet, unet), (self.vae, unet if vae is None else vae)):
            network.enable_gradient_checkpointing(recompute) if enabled else network.disable_gradient_checkpointing()

    def compile_blocks(self, backend="inductor", **options):
        """torch.compile for the UNet, one block for all of its kind: faster steps after a slow first one.

        backend, options: of `torch.compile`.
        """
        # A graph for each batch size, with and without gradient, and for each plan that lack of memory may lead to.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.unet.compile_repeated_blocks(backend=backend, **options)


# (x, network output, alpha, sigma) -> (x0, eps), by what the network predicts.
_CLEAN_AND_NOISE = {
    "epsilon": lambda x, eps, alpha, sigma: ((x - sigma * eps) / alpha, eps),
    "v_prediction": lambda x, v, alpha, sigma: (alpha * x - sigma * v, alpha * v + sigma * x),
    "sample": lambda x, x0, alpha, sigma: (x0, (x - alpha * x0) / sigma),
}


def _in_precision_of(network, function, x):
    """function(x) run in the network's precision, returned in that of x."""
    if network.dtype != torch.float16:
        return function(x.to(network.dtype)).to(x.dtype)
    # float16 has no room for the small gradients of an image: they cross the network at unit scale, image by image.
    scale = []
    x = _ScaleGradient.apply(x, scale, False).to(network.dtype)
    return _ScaleGradient.apply(function(x).float(), scale, True)


class _ScaleGradient(torch.autograd.Function):
    """The identity. Backward, the one at a network's output scales the gradient of each image by the power of two that
    brings its largest entry near 1, and the one at the input takes the same factor out again, which is exact."""

    @staticmethod
    def forward(ctx, x, scale, at_output):
        ctx.scale, ctx.at_output = scale, at_output
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.at_output:
            return grad.float() / ctx.scale.pop(), None, None
        largest = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
        scale = torch.exp2(-torch.log2(largest).floor())
        ctx.scale.append(torch.where((largest > 0) & largest.isfinite(), scale, torch.ones_like(scale)))
        return grad * ctx.scale[-1], None, None
