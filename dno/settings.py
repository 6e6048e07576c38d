"""Settings: one dataclass per group, of which the flags are made.

The groups here are shared by all methods; a method adds its own (see `dno.methods`), and `settings_class` joins them
into one flat dataclass: `Model` comes first, then the method's groups, then those that every run ends with.
"""

import importlib.util
import math
import reprlib
import types
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar, Union, get_args, get_origin, get_type_hints

from dno.errors import UserError
from dno.models.specs import DEFAULT_MODEL, TIMESTEP_SPACINGS, model_spec
from dno.objectives import objective_texts
from dno.regularization import MAX_SUBSAMPLE

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
CHECKPOINTING = ("auto", "none", "partial", "step", "block")
TRACKERS = ("tensorboard", "wandb", "trackio")


def setting(
    default, help, *, basic=None, changeable=False, least=None, most=None, above=None, convert=None, **argument
):  # fmt: skip
    """A field of a group, with all that is known of its flag.

    basic: its help in `-h`, with the choices, if it has any; None: `--help_all` alone shows it.
    changeable: a resumed run may have another value, since it says when to stop, where to compute, with how much
    memory, or what is shown: not what is computed.
    least, most, above: the range of a number. convert: value -> value of the field's type, before it is checked.
    argument: further keywords of `add_argument`.
    """
    how = {"default_factory": default} if default is dict else {"default": default}
    return field(**how, metadata={
        "help": help, "basic": basic, "changeable": changeable, "least": least, "most": most, "above": above,
        "convert": convert, "argument": argument,
    })  # fmt: skip


class Group:
    """Base class of the groups. `title` is the heading in `-h`."""

    title: ClassVar[str]

    def resolved(self):
        """Values, by name, of settings that were left open or that stand for another value."""
        return {}

    def check(self):
        """Raise UserError for values that do not go together. Types, choices and ranges are checked already."""


@dataclass(frozen=True)
class Model(Group):
    title: ClassVar[str] = "model"

    model: str = setting(
        DEFAULT_MODEL,
        "hub id, diffusers folder or single .safetensors file, or sprites or sprites-xl, which come with the project",
        basic="hub id, folder, file, or sprites",
    )
    prompt: str | tuple[str, ...] = setting(
        "white duck", "what the image shows", basic="what the image shows", metavar="TEXT"
    )
    negative_prompt: str | tuple[str, ...] | None = setting(
        None, "what it should not show; default: the model family's own empty prompt", metavar="TEXT"
    )
    height: int | None = setting(
        None,
        "image height in pixels, a multiple of the VAE's scale factor (8); default: the model's",
        least=1,
        metavar="PX",
    )
    width: int | None = setting(None, "image width in pixels, likewise; default: the model's", least=1, metavar="PX")
    precision: str = setting(
        "auto",
        "what the frozen networks are stored and run in; noise, sampler and regularizer stay float32. "
        "auto: bf16 on a GPU that has it, else fp32",
        basic="precision of the frozen networks: auto, fp32, bf16 or fp16",
        choices=PRECISIONS,
    )
    device: str = setting(
        "auto",
        "where to run; auto: cuda, else mps, else cpu",
        basic="where to run: auto, cpu, cuda or mps",
        changeable=True,
        choices=DEVICES,
    )
    variant: str | None = setting(None, "variant of the weight files to load, such as fp16", metavar="NAME")
    lora: str | None = setting(
        None, "LoRA weights to add: file, folder or hub id, and a scale (default 1)", metavar="PATH_OR_ID[:SCALE]"
    )
    model_config: str | None = setting(
        None, "pipeline folder to configure a single-file model by, where the hub cannot be reached", metavar="DIR"
    )
    vae: str | None = setting(
        None,
        "another VAE than the model's, such as an SDXL VAE for fp16: hub id, folder or .safetensors file",
        metavar="PATH_OR_ID",
    )
    vae_precision: str = setting(
        "auto",
        "precision of the VAE; auto: the networks', but fp32 where that is fp16 and the VAE overflows in it",
        choices=PRECISIONS,
    )

    def check(self):
        if self.model_config is not None and not Path(self.model_config).expanduser().exists():
            raise UserError(f"--model_config {self.model_config} does not exist")


@dataclass(frozen=True)
class Sampling(Group):
    title: ClassVar[str] = "sampling"

    num_steps: int | None = setting(
        None,
        "sampling steps T; default: 50 (sprites 25, turbo models 1)",
        basic="sampling steps; default: the model's (50)",
        least=1,
        metavar="T",
    )
    timestep_spacing: str | None = setting(
        None, "how the steps' timesteps are spread; default: the model's", choices=TIMESTEP_SPACINGS
    )
    eta: float | None = setting(
        None,
        "0 = deterministic ODE, only the starting noise counts; 1 = DDPM's noise at every step; "
        "default: the model's (1)",
        basic="0 = deterministic, 1 = fresh noise at each step; default: the model's",
        least=0,
        most=1,
        metavar="X",
    )
    guidance_scale: float | None = setting(
        None,
        "weight of the prompt; <= 1 drops the negative prompt and half the time; default: 5 (sprites 3, turbo 0)",
        basic="weight of the prompt; default: the model's (5)",
        least=0,
        metavar="X",
    )
    original_size: tuple[int, int] | None = setting(
        None,
        "SDXL: size in pixels that the image is said to have had; default: its own",
        least=1,
        nargs=2,
        metavar=("H", "W"),
    )
    crops_coords_top_left: tuple[int, int] = setting(
        (0, 0),
        "SDXL: pixels that are said to have been cut off above and to the left",
        least=0,
        nargs=2,
        metavar=("TOP", "LEFT"),
    )
    target_size: tuple[int, int] | None = setting(
        None,
        "SDXL: size in pixels that the image is said to be wanted in; default: its own",
        least=1,
        nargs=2,
        metavar=("H", "W"),
    )
    seed: int = setting(
        0,
        "seed of the noise; image b of a batch has seed + b",
        basic="image b of a batch has seed + b",
        least=0,
        metavar="N",
    )
    batch_size: int = setting(
        1,
        "independent images that are worked on together, each as if alone",
        basic="independent images that are worked on together",
        least=1,
        metavar="B",
    )
    noise: str | None = setting(
        None, "start from the best noise of another run: its folder, or a best_noise.safetensors", metavar="RUN_OR_FILE"
    )
    subsample: int = setting(
        1,
        "P(z) and its regularizer look at the noise in rows of 4 ** subsample values",
        basic="P(z) looks at the noise in rows of 4 ** N values",
        least=0,
        most=MAX_SUBSAMPLE,
        metavar="N",
    )

    def resolved(self):
        spec = model_spec(self.model)
        prompt, negative = (
            value[0] if isinstance(value, tuple) and len(value) == 1 else value
            for value in (self.prompt, self.negative_prompt)
        )
        images = max((len(value) for value in (prompt, negative) if isinstance(value, tuple)), default=1)
        return {
            "num_steps": spec.num_steps if self.num_steps is None else self.num_steps,
            "guidance_scale": spec.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "eta": spec.eta if self.eta is None else self.eta,
            "prompt": prompt, "negative_prompt": negative,
            "batch_size": images if self.batch_size == 1 and images else self.batch_size,
        }  # fmt: skip

    def check(self):
        if self.seed + self.batch_size > 2**63:
            raise UserError(f"--seed is {self.seed}; expected less than 2 ** 63")
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value == ():
                raise UserError(f"--{name} is an empty list; expected a text, or one per image")
            for text in value if isinstance(value, tuple) else (value or "",):
                if not text.isprintable() and text.encode("utf-8", "ignore").decode() != text:
                    raise UserError(f"--{name} is {text!r}, which is not text; expected valid Unicode")
            if isinstance(value, tuple) and len(value) != self.batch_size:
                raise UserError(
                    f"--{name} has {len(value)} entries for {self.batch_size} images; expected one, or one per image"
                )
        if self.noise is not None and not Path(self.noise).expanduser().exists():
            raise UserError(f"--noise {self.noise} does not exist; expected a run's folder or best_noise.safetensors")


@dataclass(frozen=True)
class Objective(Group):
    title: ClassVar[str] = "objective"

    objective: tuple[str, ...] = setting(
        ("black",),
        "rewards to climb, summed with their weights (default weight 1)",
        basic="rewards to climb, summed with their weights",
        convert=objective_texts,
        nargs="+",
        metavar="NAME[:WEIGHT]",
    )
    evaluate: tuple[str, ...] = setting(
        (),
        "rewards to record without optimizing them: the most reliable sign of reward hacking",
        basic="rewards to record, not to climb: they show reward hacking",
        nargs="*",
        metavar="NAME",
    )

    def check(self):
        if not self.objective:
            raise UserError("--objective is empty; expected at least one reward")


@dataclass(frozen=True)
class RewardModels(Group):
    title: ClassVar[str] = "reward models"

    reward_precision: str = setting("fp32", "precision of the reward models' weights", choices=PRECISIONS[1:])
    reward_preprocess: str = setting(
        "own",
        "own: resize, crop or pad as each reward model does; reference: aesthetic, hps, pick as in the official code",
        choices=("own", "reference"),
    )
    reward_checkpointing: bool = setting(
        False, "recompute the reward models' activations: less memory, more time", changeable=True
    )
    # Local copies of the reward models: {"hps_path": ...}, a flag each. See `rewards.MODELS`.
    reward_paths: dict = setting(dict, "local copies of the reward models, by setting", changeable=True)


@dataclass(frozen=True)
class Memory(Group):
    title: ClassVar[str] = "memory and speed"

    checkpointing: str = setting(
        "auto",
        "memory against time, never the result: none keeps every step's graph (fastest), partial as many as fit, step "
        "recomputes one step at a time, block also each block within it (least memory); auto: the fastest that fits "
        "well. Out of memory, it falls back to the next plan that uses less, in the same iteration",
        basic="memory against time: auto, none, partial, step or block",
        changeable=True,
        choices=CHECKPOINTING,
    )
    split_guidance: bool = setting(
        False,
        "run the two halves of the guidance one after the other: less memory, a little more time",
        basic="run the two halves of guidance one after the other",
        changeable=True,
    )
    compile: bool = setting(
        False, "torch.compile the network's blocks: a slow first iteration, faster ones after it", changeable=True
    )


@dataclass(frozen=True)
class Stopping(Group):
    title: ClassVar[str] = "stopping"

    target_reward: float | None = setting(None, "stop an image at this reward", changeable=True, metavar="REWARD")
    patience: int | None = setting(
        None, "stop an image after this many iterations without a better reward", changeable=True, least=1, metavar="N"
    )
    max_seconds: float | None = setting(
        None, "stop after this many seconds of iterations", changeable=True, above=0, metavar="SECONDS"
    )
    min_probability: float | None = setting(
        None, "stop an image whose P(z) falls below this", changeable=True, least=0, most=1, metavar="P"
    )


@dataclass(frozen=True)
class Output(Group):
    title: ClassVar[str] = "output"

    output: str | None = setting(
        "output", "folder that the run's own folder is made in", basic="folder for the run's folder", metavar="DIR"
    )
    save_every: int = setting(1, "save every n-th iteration's image", changeable=True, least=1, metavar="N")
    draw: bool = setting(True, "draw evolution.png and evolution.gif at the end", changeable=True)
    checkpointing_steps: int = setting(
        10,
        "iterations from one checkpoint to the next; one is written on a stop too",
        changeable=True,
        least=1,
        metavar="N",
    )
    checkpoints_total_limit: int = setting(2, "keep the newest N checkpoints", changeable=True, least=1, metavar="N")
    report_to: tuple[str, ...] = setting(
        (), "trackers to send metrics and images to", changeable=True, nargs="*", choices=TRACKERS
    )
    report_images_every: int = setting(
        10, "send them every n-th iteration's images", changeable=True, least=1, metavar="N"
    )
    timeout: float = setting(
        600.0,
        "with several processes: end them all when one does not answer for this long; above the slowest reward's time",
        changeable=True,
        above=0,
        metavar="SECONDS",
    )

    def check(self):
        for name in self.report_to:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")


BEFORE, AFTER = (Model, Sampling, Objective, RewardModels), (Memory, Stopping, Output)


class Settings:
    """What the joined settings of every method can do. Their fields are those of their groups."""

    @classmethod
    def groups(cls):
        """The groups, in order."""
        return [group for group in reversed(cls.__mro__) if Group in group.__bases__]

    @classmethod
    def changeable(cls):
        """The names of the settings that a resumed run may change."""
        return [f.name for f in fields(cls) if f.metadata["changeable"]]

    def typed(self):
        """These settings in the types of their hints: a list as a tuple, a path as text. Raises UserError."""
        return replace(self, **{f.name: _typed(self, f) for f in fields(self)})

    def resolve(self):
        """These settings, checked, with the model's and the method's own values filled in. Raises UserError."""
        settings = self.typed()
        for group in self.groups():
            settings = replace(settings, **group.resolved(settings))
        for f in fields(settings):
            _check_range(f, getattr(settings, f.name))
        for group in self.groups():
            group.check(settings)
        return settings


@cache
def settings_class(name, groups):
    """The settings of a method: a flat, frozen dataclass of the shared groups and its own.

    groups: a tuple of subclasses of `Group`.
    """
    # The fields of a dataclass are in the reverse order of its bases.
    bases = (*reversed((*BEFORE, *groups, *AFTER)), Settings)
    return make_dataclass(name, [], bases=bases, frozen=True)


_EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", dict: "a dict"}


def _typed(settings, f):
    """The value of a field in the type that its hint names. Raises UserError."""
    value, hint = getattr(settings, f.name), get_type_hints(type(settings))[f.name]
    if f.metadata.get("convert"):
        value = f.metadata["convert"](value)
    for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        converted = _as(kind, value)
        if converted is not _WRONG:
            return converted
    got = " ".join(reprlib.repr(value).split())  # a tensor's has many lines
    raise UserError(f"--{f.name} is {got} ({type(value).__name__}); expected {_describe(hint)}")


_WRONG = object()


def _as(kind, value):
    if get_origin(kind) is tuple:
        if isinstance(value, str) and get_args(kind)[1:] == (...,):
            value = (value,)
        if not isinstance(value, list | tuple):
            return _WRONG
        entry, count = get_args(kind)[0], None if get_args(kind)[1:] == (...,) else len(get_args(kind))
        entries = tuple(_as(entry, one) for one in value)
        return _WRONG if _WRONG in entries or count not in (None, len(entries)) else entries
    if kind is str:
        return str(value) if isinstance(value, str | Path) else _WRONG
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        try:
            return kind(value) if number else _WRONG
        except OverflowError:
            return _WRONG
    return value if isinstance(value, kind) else _WRONG


def _describe(hint):
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(kind) for kind in get_args(hint)))
    if get_origin(hint) is tuple:
        entry = _EXPECTED[get_args(hint)[0]].removeprefix("a ")
        return f"a list of {entry}s" if get_args(hint)[1:] == (...,) else f"{len(get_args(hint))} {entry}s"
    return "None" if hint is type(None) else _EXPECTED[hint]


def _check_range(f, value):
    m = f.metadata
    for entry in value if isinstance(value, tuple) else (value,):
        if entry is None or isinstance(entry, dict):
            continue
        if (choices := m["argument"].get("choices")) and entry not in choices:
            raise UserError(f"--{f.name} is {entry!r}; expected one of {', '.join(choices)}")
        if isinstance(entry, float) and not math.isfinite(entry):
            raise UserError(f"--{f.name} is {entry}; expected a finite number")
        low, high, above = m["least"], m["most"], m["above"]
        if (
            (low is not None and entry < low)
            or (high is not None and entry > high)
            or (above is not None and entry <= above)
        ):
            raise UserError(f"--{f.name} is {entry:g}; expected {_range(low, high, above)}")


def _range(low, high, above):
    """The numbers that a setting takes, in words."""
    if above is not None:
        return f"a number above {above}" + ("" if high is None else f", {high} at most")
    return f"{low} or more" if high is None else f"a number from {low} to {high}"
