"""Text-to-image models: one row a model, one class a family.

A model is `encode_prompts`, `denoise`, `decode`, `schedule` and `latent_shape`. Guidance, the meaning of the network's
output (epsilon, v or x0) and the border between the sampler's float32 and the network's precision live here only.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dno.errors import UserError
from dno.quiet import quiet
from dno.sampling import Schedule

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ModelSpec:
    """One row: where a model is and what it wants unless the user says otherwise.

    source: hub id, diffusers folder or single .safetensors file.
    words: the words that the model was trained on, where it knows a few only; others earn a warning.
    """

    source: str
    num_steps: int = 50
    guidance_scale: float = 5.0
    size: tuple[int, int] | None = None  # height, width in pixels; None = the model's own
    words: tuple[str, ...] = ()


def _sprites():
    from sprites.scenes import WORDS

    return ModelSpec(str(PACKAGE_ROOT / "sprites"), num_steps=25, guidance_scale=3.0, words=WORDS)


MODELS = {
    DEFAULT_MODEL: lambda: ModelSpec(DEFAULT_MODEL),
    "sprites": _sprites,
}


def model_spec(name):
    """The row of a model; a hub id, folder or file without a row gets the defaults."""
    return MODELS[name]() if name in MODELS else ModelSpec(name)


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of the prompts: text embeddings, (B, L, D) each, in the network's precision."""

    positive: torch.Tensor
    negative: torch.Tensor

    def __getitem__(self, images):
        return replace(self, positive=self.positive[images], negative=self.negative[images])


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x, frozen, from a diffusers `StableDiffusionPipeline`.

    The sampler's side of every method has the dtype of the tensors that come in (float32, or float64 in tests); the
    networks run in the precision that they are stored in.
    """

    pipeline_class = "StableDiffusionPipeline"

    def __init__(self, pipe, name):
        """name: what the user called the model; its row in `MODELS` has its defaults."""
        from diffusers import DDIMScheduler

        for network in (pipe.unet, pipe.vae, pipe.text_encoder):
            network.requires_grad_(False).eval()
        self.name, self.pipe, self.unet, self.vae = name, pipe, pipe.unet, pipe.vae
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type
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
        alpha_bar = self.scheduler.alphas_cumprod.double()
        self._alpha, self._sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()

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

    def schedule(self, num_steps):
        """The model's own DDIM timesteps, ending at alpha_bar of timestep 0. Raises UserError for too many steps."""
        most = len(self._alpha)
        spacing = self.scheduler.config.timestep_spacing
        if num_steps <= most:
            self.scheduler.set_timesteps(num_steps)
        if num_steps > most or int(self.scheduler.timesteps.max()) >= most:
            raise UserError(
                f"--num_steps {num_steps} asks for timesteps past the model's last, {most - 1} "
                f"({spacing} spacing); lower it"
            )
        schedule = Schedule.from_alphas_cumprod(self.scheduler.timesteps, self.scheduler.alphas_cumprod)
        if num_steps == 1 and schedule.stands_still(0):
            raise UserError(f"--num_steps 1 does nothing with the model's {spacing} spacing; expected 2 or more")
        return schedule

    @torch.no_grad()
    def encode_prompts(self, prompts, negative_prompt=None):
        """Conditioning of B prompts; the negative one is the family's empty prompt unless given.

        Warns, with the words that are cut, where a prompt is longer than the tokenizer takes.
        """
        if self.pipe.text_encoder is None:
            raise UserError("the text encoder was freed; encode every prompt before free_text_encoder()")
        for prompt in dict.fromkeys([*prompts, negative_prompt or ""]):
            self._warn_of_cut(prompt)
        with quiet():
            positive, negative = self.pipe.encode_prompt(
                list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=True,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            )  # fmt: skip
        return Conditioning(positive.to(self.dtype), negative.to(self.dtype))

    def _warn_of_cut(self, prompt):
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > limit - 2:  # the start and end tokens take two places
            cut = tokenizer.decode(ids[limit - 2 :], clean_up_tokenization_spaces=False).strip()
            warnings.warn(f"the prompt has {len(ids)} tokens, the model takes {limit - 2}; cut: {cut!r}", stacklevel=3)

    def free_text_encoder(self):
        """Give back the text encoder's memory, once every prompt is encoded."""
        self.pipe.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def denoise(self, x, timestep, conditioning, guidance_scale):
        """The predicted clean latents and noise (x0, eps), each (B, C, h, w), with classifier-free guidance.

        guidance_scale: weight of the conditional prediction against the negative one; <= 1 leaves the negative one,
            and half of the work, out.
        Source: Ho and Salimans 2022 (arXiv 2207.12598); Salimans and Ho 2022 (arXiv 2202.00512) for v.
        """
        t = int(timestep)
        if guidance_scale > 1:
            both = torch.cat([conditioning.negative, conditioning.positive])
            negative, positive = self._predict(torch.cat([x, x]), t, both).chunk(2)
            prediction = negative + guidance_scale * (positive - negative)
        else:
            prediction = self._predict(x, t, conditioning.positive)
        return _CLEAN_AND_NOISE[self.prediction_type](x, prediction, self._alpha[t], self._sigma[t])

    def _predict(self, x, t, embeddings):
        # A tensor filled on the device: a Python number would be copied to it, and waited for, at every call.
        t = torch.full((len(x),), t, device=x.device)
        return _in_precision_of(self.unet, lambda x: self.unet(x, t, embeddings, return_dict=False)[0], x)

    def decode(self, latents):
        """Images (B, 3, H, W), nominally in [-1, 1], not clamped, in the dtype of the latents."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        return _in_precision_of(self.vae, lambda x: self.vae.decode(x, return_dict=False)[0], latents)

    def checkpoint_blocks(self, enabled=True):
        """Recompute each block of UNet and VAE in the backward pass: less memory for one step's graph, more time."""
        for network in (self.unet, self.vae):
            network.enable_gradient_checkpointing() if enabled else network.disable_gradient_checkpointing()


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
