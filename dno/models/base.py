"""What the text-to-image families share: guidance, the border between precisions, checkpointing, adapters, the VAE.

A model is `encode_prompts`, `denoise`, `decode`, `schedule` and `latent_shape`; for training also `point`, `encode` and
`add_adapter`. A family replaces what differs: how its network is called (`predict`, `keywords`), guided
(`needs_negative`, `guide`) and read (`prediction_type`, `clean_and_noise`).
"""

import contextlib
import warnings
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from dno.errors import UserError
from dno.models.conditioning import Conditioning, leaves, unwrapped
from dno.models.quiet import quiet
from dno.models.specs import model_spec

# The projections of every attention of diffusers' networks.
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")

# (x, network output, alpha, sigma) -> (x0, eps), by what the network predicts.
_CLEAN_AND_NOISE = {
    "epsilon": lambda x, eps, alpha, sigma: ((x - sigma * eps) / alpha, eps),
    "v_prediction": lambda x, v, alpha, sigma: (alpha * x - sigma * v, alpha * v + sigma * x),
    "sample": lambda x, x0, alpha, sigma: (x0, (x - alpha * x0) / sigma),
    # The velocity eps - x0 of flow matching, with alpha = 1 - sigma.
    "flow_prediction": lambda x, v, alpha, sigma: (x - sigma * v, x + alpha * v),
}


class TextToImage:
    """A frozen text-to-image model, made of a diffusers pipeline. Base of the families, which define

        encode_texts(prompts, negatives, guided, **sizes) -> (positive keywords, negative keywords or None)
        schedule(num_steps, height=None, width=None, timestep_spacing=None) -> Schedule
        point(timestep=None, *, sigma=None) -> Point of any noise level, by its timestep or by sigma / alpha

    The sampler's side of every method has the dtype of the tensors that come in (float32, or float64 in tests); the
    networks run in the precision that they are stored in.
    """

    pipeline_class = None  # its name in diffusers
    pipeline_options = {}  # keywords that it is loaded with
    text_encoders, tokenizers = (), ()  # names of its parts
    network_part = "unet"  # name of the part that denoises
    size_conditioned = False  # whether `encode_prompts` takes sizes
    vae_obeys_force_upcast = False  # its VAE's configuration says force_upcast by default, and does well without
    prediction_types = tuple(_CLEAN_AND_NOISE)  # what a network of this family may predict
    prediction_type = None  # what this one does

    def __init__(self, pipe, name):
        """name: what the user called the model; its row in `MODELS` has its defaults. Raises UserError if the pipeline
        is not of this family."""
        self.name, self.pipe, self.spec = name, pipe, model_spec(name)
        self.network, self.vae = getattr(pipe, self.network_part), pipe.vae
        self._whole = []  # networks without blocks to checkpoint, which are recomputed whole
        self.check(pipe)
        self.freeze()

    def check(self, pipe):
        """Raise UserError if the pipeline is not one of this family, or asks for what is not supported."""
        if self.prediction_type not in self.prediction_types:
            raise UserError(
                f"the model predicts {self.prediction_type!r}; expected one of {', '.join(self.prediction_types)}"
            )
        config = pipe.vae.config
        if config.get("scaling_factor", 1) in (None, 0):
            raise UserError(
                f"the VAE's scaling_factor is {config.get('scaling_factor')}; expected a number other than 0"
            )
        if (config.get("latents_mean") is None) != (config.get("latents_std") is None):
            raise UserError("the VAE has one of latents_mean and latents_std; expected both, or none")

    def freeze(self):
        """No gradient for any weight, no dropout."""
        for module in (self.network, self.vae, *(getattr(self.pipe, part) for part in self.text_encoders)):
            if module is not None:
                module.requires_grad_(False).eval()

    @property
    def device(self):
        return self.network.device

    @property
    def dtype(self):
        """The precision of the frozen networks."""
        return self.network.dtype

    @property
    def scale_factor(self):
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self):
        """Height and width in pixels that the model was trained at. Raises UserError if no configuration says it."""
        size, factor = self.network.config.sample_size, self.scale_factor
        if size is None and "sample_size" not in self.vae.config.get("_use_default_values", ()):
            size, factor = self.vae.config.get("sample_size"), 1
        if size is None:
            raise UserError(f"{self.name} does not say what size its images have; give --height and --width")
        height, width = (size, size) if isinstance(size, int) else size
        return height * factor, width * factor

    def latent_shape(self, batch, height, width):
        """(B, C, h, w) for images of height x width pixels."""
        return batch, self.network.config.in_channels, height // self.scale_factor, width // self.scale_factor

    # Prompts.

    @torch.no_grad()
    def encode_prompts(self, prompts, negative_prompt=None, *, guided=True, **sizes):
        """The `Conditioning` of B prompts.

        negative_prompt: a text for all of them, or a list of B texts; None is the family's own empty prompt.
        guided: False, where guidance needs no negative prompt, leaves it out.
        sizes: of families that are told of sizes.
        Warns, with the words that are cut, if a prompt is longer than the tokenizer takes. Raises UserError after
        `free_text_encoder`, and for another number of negative prompts.
        """
        prompts, negatives = list(prompts), negative_prompt
        if any(getattr(self.pipe, part) is None for part in self.text_encoders):
            raise UserError("the text encoder was freed; encode every prompt before free_text_encoder()")
        if isinstance(negatives, str):
            negatives = [negatives] * len(prompts)
        if negatives is not None and len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; expected one each, or one")
        self._warn_of_cuts([*prompts, *(negatives or [])] if guided else prompts)
        with quiet():
            return Conditioning(*self.encode_texts(prompts, negatives, guided, **sizes))

    def _warn_of_cuts(self, prompts):
        cuts = {}  # a dict, to report each cut only once across tokenizers and images
        for part in self.tokenizers:
            tokenizer = getattr(self.pipe, part)
            limit = tokenizer.model_max_length - 2  # the start and end tokens take two places
            for prompt in prompts:
                ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
                if len(ids) > limit:
                    cut = tokenizer.decode(ids[limit:], clean_up_tokenization_spaces=False).strip()
                    cuts[f"the prompt has {len(ids)} tokens, the model takes {limit}; cut: {cut!r}"] = None
        for cut in cuts:
            warnings.warn(cut, stacklevel=4)  # past no_grad, to the caller of encode_prompts

    def free_text_encoder(self):
        """Give back the memory of the text encoder or encoders, once every prompt is encoded."""
        for part in self.text_encoders:
            setattr(self.pipe, part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Denoising.

    def needs_negative(self, guidance_scale):
        """Whether guidance of this scale compares with a negative prompt, at twice the work."""
        return guidance_scale > 1

    def denoise(self, x, point, conditioning, guidance_scale, through_network=True, split_guidance=False):
        """The predicted clean latents and noise (x0, eps), each (B, C, h, w), with guidance.

        x: (B, C, h, w). point: the `Point` of its noise, of all rows or one level per row.
        guidance_scale: weight of the conditional prediction against the negative one; <= 1 leaves the negative one,
            and half of the work, out.
        through_network: False holds the network's guided output constant in the backward pass, where x0 and eps then
            depend on x by their formulas alone.
        split_guidance: run the negative and the positive half one after the other, so that at any time there are the
            activations of one half only; backward, the negative half is computed once more for that.
        """
        with torch.set_grad_enabled(through_network and torch.is_grad_enabled()):
            output = self.guide(x, point, conditioning, guidance_scale, split_guidance)
        return self.clean_and_noise(x, output, *point.levels(x))

    def guide(self, x, point, conditioning, guidance_scale, split=False):
        """The network's guided output for x, (B, C, h, w): classifier-free guidance.

        Source: Ho and Salimans 2022 (arXiv 2207.12598).
        """
        if not self.needs_negative(guidance_scale):
            return self.predict(x, point, conditioning.positive)
        if conditioning.negative is None:
            raise ValueError(f"guidance_scale is {guidance_scale}, and the negative prompt was left out (guided=False)")
        if split:
            # Backward takes the newest first: the positive half is gone when the negative one is rebuilt.
            negative = checkpoint(
                self.predict, x, point, conditioning.negative, use_reentrant=False, preserve_rng_state=False
            )
            positive = self.predict(x, point, conditioning.positive)
        else:
            both = self.predict(torch.cat([x, x]), point.doubled(), conditioning.doubled().positive)
            negative, positive = both.chunk(2)
        return negative + guidance_scale * (positive - negative)

    def predict(self, x, point, keywords):
        """The network's output for x (B, C, h, w), told what `Conditioning` has for these rows."""
        t, keywords = self.timesteps(x, point.timestep), self.keywords(x, keywords)
        return self._run(self.network, lambda x: self.network(x, t, **keywords, return_dict=False)[0], x, keywords)

    def timesteps(self, x, timestep):
        """What the network is told of a timestep: (B,), integers as int64 and others as float32, on the device of x."""
        if isinstance(timestep, torch.Tensor):
            dtype = torch.float32 if timestep.is_floating_point() else torch.int64
            return timestep.to(x.device, dtype).expand(len(x))
        # A tensor filled on the device: a Python number would be copied to it, and waited for, at every call.
        dtype = torch.float32 if isinstance(timestep, float) else torch.int64
        return torch.full((len(x),), timestep, device=x.device, dtype=dtype)

    def keywords(self, x, keywords):
        """The network's keywords besides x and timestep, from those of the `Conditioning`."""
        return unwrapped(keywords)

    def clean_and_noise(self, x, output, alpha, sigma):
        """(x0, eps) of the network's output for x = alpha * x0 + sigma * eps, by the model's `prediction_type`.

        Source: Salimans and Ho 2022 (arXiv 2202.00512) for v.
        """
        return _CLEAN_AND_NOISE[self.prediction_type](x, output, alpha, sigma)

    # The VAE.

    def decode(self, latents):
        """Images (B, 3, H, W), nominally in [-1, 1], not clamped, in the dtype of the latents."""
        scale, shift = self._latent_statistics(latents)
        return self._run(self.vae, lambda x: self.vae.decode(x, return_dict=False)[0], latents / scale + shift)

    def encode(self, images, z=None):
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], in their dtype.

        z: standard normal (B, C, h, w), for a draw mean + std * z of the VAE's posterior; None gives its mean.
        """
        moments = self._run(self.vae, lambda x: self.vae.encode(x).latent_dist.parameters, images)
        mean, log_variance = moments.chunk(2, dim=1)
        if z is not None:
            mean = mean + (log_variance.clamp(-30, 20) / 2).exp() * z  # the clamp is the VAE's own
        scale, shift = self._latent_statistics(mean)
        return (mean - shift) * scale

    def _latent_statistics(self, latents):
        """(scale, shift): the VAE's latents are the sampler's / scale + shift; numbers, or (1, C, 1, 1)."""
        config = self.vae.config
        scale, shift = config.get("scaling_factor", 1), config.get("shift_factor") or 0
        if config.get("latents_mean") is not None:
            mean, std = (latents.new_tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
            scale, shift = scale / std, mean
        return scale, shift

    # Memory and speed.

    def _run(self, network, function, x, keywords=None):
        """function(x), which calls the network, in its precision and by the plan for its memory."""
        if network in self._whole:
            function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return _in_precision_of(network, function, x, keywords or {})

    def checkpoint_blocks(self, network=True, vae=None):
        """Recompute each block of the network, of the VAE, or of both in the backward pass: less memory, more time.

        One whose class cannot do so by block is recomputed whole. vae: None = as the network.
        """
        # Nothing in these networks is random, so no generator's state has to be fetched and set again.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self._whole = []
        for module, enabled in ((self.network, network), (self.vae, network if vae is None else vae)):
            if not getattr(module, "_supports_gradient_checkpointing", False):
                self._whole += [module] if enabled else []
            elif enabled:
                module.enable_gradient_checkpointing(recompute)
            else:
                module.disable_gradient_checkpointing()

    def compile_blocks(self, backend="inductor", **options):
        """torch.compile for the network, one block for all of its kind: faster steps after a slow first one.

        A network whose class does not name its blocks is compiled whole. backend, options: of `torch.compile`.
        """
        # A graph for each batch size, with and without gradient, and for each plan that lack of memory may lead to.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        if getattr(self.network, "_repeated_blocks", None):
            self.network.compile_repeated_blocks(backend=backend, **options)
        else:
            self.network.compile(backend=backend, **options)

    # Adapters.

    def add_adapter(self, rank, alpha=None, target_modules=None, seed=0):
        """Give the network a LoRA that can be trained: its parameters, a list, in float32 or better.

        rank: of each change B A to a weight matrix; alpha: the change is scaled by alpha / rank; None = rank.
        target_modules: names of layers, by their ends; None = the projections of every attention.
        seed: of the random start of A; B starts at zero, so that the model is unchanged at first.
        Raises UserError for a model in float16, one that has an adapter, a rank below 1, and names without a layer.
        Source: Hu et al. 2021 (arXiv 2106.09685).
        """
        from peft import LoraConfig

        names = [target_modules] if isinstance(target_modules, str) else list(target_modules or ATTENTION_LAYERS)
        if self.dtype == torch.float16:
            raise _no_training_in_float16()
        if getattr(self.network, "peft_config", None):
            raise UserError("the model has an adapter already; load it again for another one")
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"the rank of the adapter is {rank!r}; expected a whole number, 1 or more")
        layers = [name for name, _ in self.network.named_modules()]
        for name in names:
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                raise UserError(f"the network has no layer {name!r} for the adapter; expected names such as 'to_q'")
        frozen = {id(parameter) for parameter in self.network.parameters()}
        config = LoraConfig(
            r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names
        )  # fmt: skip
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.network.add_adapter(config)
        parameters = [p for p in self.network.parameters() if id(p) not in frozen]
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return parameters

    @contextlib.contextmanager
    def without_adapter(self):
        """The model as it was before `add_adapter`, such as for a reference to compare with."""
        if not getattr(self.network, "peft_config", None):
            yield
            return
        wanted = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)

    def save_adapter(self, folder):
        """Write the LoRA to pytorch_lora_weights.safetensors in the folder, as `load_model(lora=folder)` reads it.

        Its scale alpha / rank is multiplied into B, because not every reader of such files looks for alpha.
        """
        import diffusers
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        (config,) = self.network.peft_config.values()
        state = get_peft_model_state_dict(self.network)
        scale = config.lora_alpha / config.r
        state = {name: value * scale if ".lora_B." in name else value for name, value in state.items()}
        with quiet():
            getattr(diffusers, self.pipeline_class).save_lora_weights(
                folder, **{f"{self.network_part}_lora_layers": convert_state_dict_to_diffusers(state)}
            )


def _no_training_in_float16():
    return UserError(
        "in float16 only the noise gets its exact gradient, and weights or embeddings would not; use bf16 or fp32"
    )


def _in_precision_of(network, function, x, keywords):
    """function(x) run in the network's precision, returned in that of x."""
    if network.dtype != torch.float16:
        return function(x.to(network.dtype)).to(x.dtype)
    if torch.is_grad_enabled():
        inside = (*network.parameters(), *(leaf for leaf in leaves(keywords) if isinstance(leaf, torch.Tensor)))
        if any(tensor.requires_grad for tensor in inside):
            raise _no_training_in_float16()
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
            return grad.float() / _per_image(ctx.scale.pop(), grad), None, None
        largest = grad.abs().reshape(len(grad), -1).amax(dim=1)  # (B,)
        scale = torch.exp2(-torch.log2(largest).floor().clamp(min=-126))  # float32 has no 2^128
        ctx.scale.append(torch.where((largest > 0) & largest.isfinite(), scale, torch.ones_like(scale)))
        return grad * _per_image(ctx.scale[-1], grad), None, None


def _per_image(scale, x):
    return scale.view(-1, *[1] * (x.dim() - 1))
