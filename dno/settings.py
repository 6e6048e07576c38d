"""Every setting of a run: default, meaning and the values it takes. The flags of the scripts are made of it."""

import importlib.util
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from dno.errors import UserError
from dno.methods.optimizers import OPTIMIZERS, PRECONDITIONERS
from dno.models.specs import DEFAULT_MODEL, TIMESTEP_SPACINGS, model_spec

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
CHECKPOINTING = ("auto", "none", "partial", "step", "block")
GRADIENTS = ("full", "skip_unet")
TRACKERS = ("tensorboard", "wandb", "trackio")
ESTIMATORS = ("backprop", "hybrid", "hybrid_image", "zo")


def _setting(group, default, help, **argument):
    """A field with the group, help text and further `add_argument` keywords of its flag."""
    return field(default=default, metadata={"group": group, "help": help, "argument": argument})


@dataclass(frozen=True)
class Settings:
    """The settings of one run, as the user gave them. None means "see the help text": `resolve` fills most of them."""

    model: str = _setting(
        "model",
        DEFAULT_MODEL,
        "hub id, diffusers folder or single .safetensors file, or sprites or sprites-xl, which come with the project",
    )
    prompt: str = _setting("model", "white duck", "what the picture shows")
    negative_prompt: str | None = _setting(
        "model", None, "what it should not show; default: the model family's own empty prompt", metavar="PROMPT"
    )
    height: int | None = _setting(
        "model", None, "image height in pixels, a multiple of the VAE's scale factor (8); default: the model's"
    )
    width: int | None = _setting("model", None, "image width in pixels, likewise")
    precision: str = _setting(
        "model",
        "auto",
        "what the frozen networks are stored and run in; noise, sampler and regularizer stay float32. "
        "auto: bf16 on a GPU that has it, else fp32",
        choices=PRECISIONS,
    )
    device: str = _setting("model", "auto", "where to run; auto: cuda, else mps, else cpu", choices=DEVICES)
    variant: str | None = _setting("model", None, "variant of the weight files to load, such as fp16")
    lora: str | None = _setting(
        "model",
        None,
        "LoRA weights to add: file, folder or hub id, and a scale (default 1)",
        metavar="PATH_OR_ID[:SCALE]",
    )
    model_config: str | None = _setting(
        "model",
        None,
        "pipeline folder to configure a single-file model by, where the hub cannot be reached",
        metavar="DIR",
    )

    vae: str | None = _setting(
        "model",
        None,
        "another VAE than the model's, such as an SDXL VAE for fp16: hub id, folder or .safetensors file",
        metavar="PATH_OR_ID",
    )
    vae_precision: str = _setting(
        "model",
        "auto",
        "precision of the VAE; auto: the networks', but fp32 where that is fp16 and the VAE overflows in it",
        choices=PRECISIONS,
    )

    num_steps: int | None = _setting("sampling", None, "sampling steps T; default: 50 (sprites 25, turbo models 1)")
    timestep_spacing: str | None = _setting(
        "sampling", None, "how the steps' timesteps are spread; default: the model's", choices=TIMESTEP_SPACINGS
    )
    eta: float = _setting(
        "sampling", 1.0, "0 = deterministic ODE, only the starting noise counts; 1 = DDPM's noise at every step"
    )
    guidance_scale: float | None = _setting(
        "sampling",
        None,
        "weight of the prompt; <= 1 drops the negative prompt and half the time; default: 5 (sprites 3, turbo 0)",
    )
    original_size: tuple[int, int] | None = _setting(
        "sampling",
        None,
        "SDXL: size in pixels that the picture is said to have had; default: its own",
        nargs=2,
        metavar=("H", "W"),
    )
    crops_coords_top_left: tuple[int, int] = _setting(
        "sampling",
        (0, 0),
        "SDXL: pixels that are said to have been cut off above and to the left",
        nargs=2,
        metavar=("TOP", "LEFT"),
    )
    target_size: tuple[int, int] | None = _setting(
        "sampling",
        None,
        "SDXL: size in pixels that the picture is said to be wanted in; default: its own",
        nargs=2,
        metavar=("H", "W"),
    )
    seed: int = _setting("sampling", 0, "seed of the noise; image b of a batch has seed + b")
    batch_size: int = _setting("sampling", 1, "independent images that are optimized together, each as if alone")
    best_of: int = _setting("sampling", 1, "start each image from the best of this many drawn noises", metavar="N")
    noise: str | None = _setting(
        "sampling", None, "start from this best_noise.safetensors of another run", metavar="FILE"
    )

    objective: tuple[str, ...] = _setting(
        "objective",
        ("black",),
        "rewards to climb, summed with their weights (default weight 1)",
        nargs="+",
        metavar="NAME[:WEIGHT]",
    )
    evaluate: tuple[str, ...] = _setting(
        "objective",
        (),
        "rewards to record without optimizing them: the honest sign of reward hacking",
        nargs="+",
        metavar="NAME",
    )

    reward_precision: str = _setting(
        "reward models", "fp32", "precision of the reward models' weights", choices=PRECISIONS[1:]
    )
    reward_preprocess: str = _setting(
        "reward models",
        "own",
        "own: resize, crop or pad as each reward model does; reference: aesthetic, hps, pick as in the official code",
        choices=("own", "reference"),
    )
    reward_checkpointing: bool = _setting(
        "reward models", False, "recompute the reward models' activations: less memory, more time"
    )
    # Local copies of the reward models: {"hps_path": ...}, a flag each. See `rewards.MODELS`.
    reward_paths: dict = field(default_factory=dict, metadata={"group": None, "argument": {}})

    opt_steps: int = _setting("optimization", 100, "iterations; iteration 0 measures the image without alignment")
    opt_time: int | None = _setting(
        "optimization",
        None,
        "K: only the noises of the last K + 1 steps are optimized, and backpropagation stops there; "
        "default: num_steps, all of them",
    )
    lr: float = _setting("optimization", 0.01, "step size of the noise")
    optimizer: str = _setting("optimization", "adamw", "adamw, or sgd with Nesterov momentum 0.9", choices=OPTIMIZERS)
    weight_decay: float = _setting(
        "optimization",
        0.0,
        "shrinks the noise by lr * this an iteration, out of the Gaussian's typical set; the official code has 0.01",
    )
    max_grad_norm: float = _setting("optimization", 1.0, "clip each image's gradient to this norm")
    precondition: str = _setting(
        "optimization",
        "none",
        "spectral: whiten the spatial spectrum of each gradient map and move by lr relative to the noise, "
        "instead of --optimizer",
        choices=tuple(PRECONDITIONERS),
    )
    checkpointing: str = _setting(
        "optimization",
        "auto",
        "memory against time, never the result: none keeps every step's graph (fastest), partial as many as fit, step "
        "recomputes a step at a time, block also each block within it (leanest); auto: the fastest that fits well. Out "
        "of memory, the next leaner way is taken in the same iteration",
        choices=CHECKPOINTING,
    )
    split_guidance: bool = _setting(
        "optimization", False, "run the two halves of the guidance one after the other: less memory, a little more time"
    )
    compile: bool = _setting(
        "optimization", False, "torch.compile the UNet's blocks: a slow first iteration, faster ones after it"
    )
    gradient: str = _setting(
        "optimization",
        "full",
        "full: the true gradient. skip_unet: hold the UNet's output constant, as the official SDXL script does in "
        "effect: a third of the time, another direction",
        choices=GRADIENTS,
    )

    estimator: str = _setting(
        "estimation",
        "backprop",
        "where the gradient comes from. backprop: the reward's own. For any reward, from perturbed samples: hybrid "
        "perturbs the noise and uses the model's Jacobian, hybrid_image perturbs the image instead, zo has no Jacobian",
        choices=ESTIMATORS,
    )
    mu: float = _setting("estimation", 0.01, "standard deviation of the perturbations")
    num_samples: int = _setting(
        "estimation", 16, "q: perturbed samples an iteration and image, over all processes", metavar="Q"
    )
    batch_per_device: int = _setting("estimation", 4, "the most of them that a process renders at once")
    antithetic: bool = _setting(
        "estimation", False, "perturb in pairs, z + mu xi and z - mu xi: less variance where the reward is curved"
    )
    backprop_cost: float = _setting(
        "estimation",
        3.0,
        "what the first process does besides its samples, in samples an image; it gets that many fewer",
        metavar="SAMPLES",
    )
    max_bad_samples: int = _setting(
        "estimation", 10, "end the run after this many samples in a row without a finite reward", metavar="N"
    )
    timeout: float = _setting(
        "estimation",
        600.0,
        "with several processes: end them all when one does not answer for this long; above the slowest reward's time",
        metavar="SECONDS",
    )

    gamma: float = _setting("regularization", 0.0, "weight of the probability regularizer; 0 = none")
    subsample: int = _setting(
        "regularization", 1, "the regularizer looks at the noise in rows of 4 ** subsample values"
    )
    permutations: int = _setting("regularization", 100, "random permutations that the regularizer averages over")

    target_reward: float | None = _setting("stopping", None, "stop an image at this reward", metavar="REWARD")
    patience: int | None = _setting(
        "stopping", None, "stop an image after this many iterations without a better reward", metavar="N"
    )
    max_seconds: float | None = _setting(
        "stopping", None, "stop after this many seconds of optimization", metavar="SECONDS"
    )
    min_probability: float | None = _setting("stopping", None, "stop an image whose P(z) falls below this", metavar="P")

    output: str | None = _setting("output", "output", "folder that the run's own folder is made in")
    save_every: int = _setting("output", 1, "save every n-th iteration's image", metavar="N")
    checkpointing_steps: int = _setting(
        "output", 10, "iterations from one checkpoint to the next; one is written on a stop too", metavar="N"
    )
    checkpoints_total_limit: int = _setting("output", 2, "the newest so many checkpoints are kept", metavar="N")
    report_to: tuple[str, ...] = _setting(
        "output", (), "trackers to send metrics and images to", nargs="+", choices=TRACKERS
    )
    report_images_every: int = _setting("output", 10, "send them every n-th iteration's images", metavar="N")

    def resolve(self):
        """These settings, checked, with the model's own steps and guidance and K filled in. Raises UserError."""
        spec = model_spec(self.model)
        num_steps = spec.num_steps if self.num_steps is None else self.num_steps
        texts = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = {name: str(value) for name, value in texts.items() if isinstance(value, Path)}
        settings = replace(
            self,
            **texts,
            num_steps=num_steps,
            guidance_scale=spec.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            opt_time=num_steps if self.opt_time is None else self.opt_time,
            objective=_names(self.objective),
            evaluate=_names(self.evaluate),
            original_size=self.original_size and tuple(self.original_size),
            crops_coords_top_left=tuple(self.crops_coords_top_left),
            target_size=self.target_size and tuple(self.target_size),
            report_to=_names(self.report_to),
        )
        settings._check()
        return settings

    def _check(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            choices = setting.metadata["argument"].get("choices")
            for entry in value if isinstance(value, tuple) else (value,):
                if choices and entry is not None and entry not in choices:
                    raise UserError(f"--{setting.name} is {entry!r}; expected one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{setting.name} is {value}; expected a finite number")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; expected {least} or more")
        for name in ("lr", "max_grad_norm", "max_seconds", "mu", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} is {value:g}; expected a number above 0")
        for name in ("eta", "min_probability"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise UserError(f"--{name} is {value:g}; expected a number from 0 to 1")
        if self.seed + self.batch_size > 2**63:
            raise UserError(f"--seed is {self.seed}; expected less than 2 ** 63")
        if self.opt_time > self.num_steps:
            raise UserError(f"--opt_time {self.opt_time} is above --num_steps; expected 1 to {self.num_steps}")
        if self.eta == 0 and self.opt_time < self.num_steps:
            raise UserError(
                f"--eta 0 leaves only the starting noise, which --opt_time {self.opt_time} freezes; "
                f"leave --opt_time out or raise --eta"
            )
        if self.precondition != "none" and (self.optimizer != "adamw" or self.weight_decay):
            raise UserError(
                f"--precondition {self.precondition} takes its own step; leave --optimizer and --weight_decay out"
            )
        if self.antithetic and self.num_samples % 2:
            raise UserError(f"--antithetic makes pairs; --num_samples is {self.num_samples}, expected an even number")
        if not self.objective:
            raise UserError("--objective is empty; expected at least one reward")
        for name in ("noise", "model_config"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().exists():
                raise UserError(f"--{name} {path} does not exist")
        for name in self.report_to:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")
        for name, least in (("original_size", 1), ("target_size", 1), ("crops_coords_top_left", 0)):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or min(pair) < least):
                raise UserError(f"--{name} is {' '.join(map(str, pair))}; expected two numbers, {least} or more each")
        if self.noise is not None and self.best_of > 1:
            raise UserError("--noise says where to start, and so does --best_of; give one of them")


_AT_LEAST = {
    "num_steps": 1, "eta": 0, "guidance_scale": 0, "seed": 0, "batch_size": 1, "best_of": 1, "height": 1, "width": 1,
    "opt_steps": 1, "opt_time": 1, "weight_decay": 0, "gamma": 0, "subsample": 0, "permutations": 1, "patience": 1,
    "min_probability": 0, "save_every": 1, "num_samples": 1, "batch_per_device": 1, "backprop_cost": 0,
    "max_bad_samples": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "report_images_every": 1,
}  # fmt: skip


def _names(value):
    return (value,) if isinstance(value, str) else tuple(value)
