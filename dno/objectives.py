"""Named rewards with weights: parsing `--objective` and `--evaluate`, and calling what they name."""

import importlib.util
import math
import re
import reprlib
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch

from dno.errors import UserError
from dno.memory import is_out_of_memory
from rewards import RewardError, is_differentiable, loaded_files, recorded

# The columns of metrics.jsonl that no reward may be called.
METRICS = (
    "step", "reward", "rewards", "regularizer", "probability", "probability_min", "grad_norm", "seconds",
    "peak_memory_gb", "images",
)  # fmt: skip


class RewardFailed(UserError):
    """A reward raised an exception."""


@dataclass(frozen=True)
class Objective:
    """One reward: its name on screen and in files, its weight, and its loss factory (see `rewards`)."""

    name: str
    weight: float
    factory: object

    @property
    def differentiable(self):
        """False if the factory says that no gradient flows to the images."""
        return getattr(self.factory, "differentiable", True)


def objective_texts(value, setting="objective"):
    """Any way to write rewards in Python -> the texts that `parse_objectives` reads, a tuple.

    "black:0.5", ["black", "white:0.5"] and {"black": 1, "white": 0.5} are understood; weights are checked when the
    texts are parsed.

    setting: its name, for the message.
    Raises UserError for anything else.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Mapping):
        return tuple(_weighted(name, weight, setting) for name, weight in value.items())
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise _no_objectives(value, setting)
    return tuple(_weighted(text, 1, setting) for text in value)


def _weighted(name, weight, setting):
    if not isinstance(name, str) or not name:
        raise _no_objectives(name, setting)
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise UserError(f"{setting}: the weight of {name!r} is {weight!r}; expected a number other than 0")
    return name if weight == 1 else f"{name}:{repr(float(weight)).removesuffix('.0')}"


def _no_objectives(value, setting):
    return UserError(
        f"{setting}: got {reprlib.repr(value)}; expected a name such as 'black', a list such as "
        "['black', 'white:0.5'], or a dict of names and weights such as {'black': 1, 'white': 0.5}"
    )


def parse_objective(text, zoo, reserved=METRICS):
    """`NAME[:WEIGHT]` from the table `zoo`, or `path/to/file.py:function[:WEIGHT]` -> Objective.

    reserved: names that no reward may have, since other columns of the metrics have them.
    Raises UserError.
    """
    match = re.fullmatch(r"(?P<name>(?P<file>.+\.py):(?P<function>\w+)|[^:]+)(:(?P<weight>[^:]*))?", text)
    if not match:
        raise UserError(f"objective {text!r} is not of the form NAME[:WEIGHT] or FILE.py:FUNCTION[:WEIGHT]")
    try:
        weight = 1.0 if match["weight"] is None else float(match["weight"])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"the weight in objective {text!r} is {match['weight']!r}; expected a number other than 0")
    if match["file"]:
        name = match["function"].removesuffix("_loss_fn")
        if name in reserved:
            raise UserError(f"the reward {name!r} has the name of another metric; rename the function")
        return Objective(name, weight, _function_of_file(match["file"], match["function"]))
    if match["name"] not in zoo:
        known = ", ".join(zoo)
        raise UserError(f"no reward is called {match['name']!r}; expected one of {known}, or FILE.py:FUNCTION")
    return Objective(match["name"], weight, zoo[match["name"]])


def parse_evaluations(value, zoo, reserved=METRICS):
    """Rewards that are only recorded: as `parse_objectives`, without weights. Raises UserError."""
    evaluations = parse_objectives(objective_texts(value, "evaluate"), zoo, reserved)
    for evaluation in evaluations:
        if evaluation.weight != 1:
            raise UserError(
                f"--evaluate {evaluation.name}:{evaluation.weight:g}: a reward that is only recorded has no weight; "
                "leave it out"
            )
    return evaluations


def parse_objectives(value, zoo, reserved=METRICS):
    """What `objective_texts` understands -> a list of objectives with different names, in order. Raises UserError."""
    objectives = [parse_objective(text, zoo, reserved) for text in objective_texts(value)]
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the reward {name!r} is given {names.count(name)} times; give it once, with a weight")
    return objectives


def _function_of_file(file, function):
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file} does not exist; expected a Python file with the loss factory {function}")
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look for it there
    with _one_line(f"{file} could not be imported"):
        spec.loader.exec_module(module)
    factory = getattr(module, function, None)
    if not callable(factory):
        raise UserError(f"{file} has no function {function}; expected {function}(inference_dtype=None, device=None)")
    return factory


class Losses:
    """Loaded objectives: images and prompts -> one checked loss per image.

    objectives: list of Objective; their factories are called here, which may load weights.
    """

    def __init__(self, objectives, inference_dtype=None, device=None):
        self.objectives, self.device = objectives, device
        self.loss_fns, self._paths = {}, {}
        for objective in objectives:
            with _one_line(f"the reward {objective.name!r} could not be loaded"), recorded() as paths:
                loss_fn = objective.factory(inference_dtype=inference_dtype, device=device)
            self._paths |= paths
            if not callable(loss_fn):
                raise UserError(
                    f"the factory of the reward {objective.name!r} gave {type(loss_fn).__name__}; expected a function "
                    "loss_fn(images, prompts): does it end with `return loss_fn`?"
                )
            self.loss_fns[objective.name] = loss_fn

    @property
    def files(self):
        """The weight files that these objectives loaded, in the form of `rewards.loaded_files`.

        They are hashed here, which takes seconds for the largest files.
        """
        return loaded_files(self._paths)

    def require_gradients(self, prompt):
        """Raise UserError if a reward that does not say whether it is differentiable turns out not to be."""
        for objective in self.objectives:
            try:
                found = is_differentiable(objective.factory, self.loss_fns[objective.name], prompt, self.device)
            except Exception:
                continue  # not every reward takes a small random image; the first real one will tell
            if not found:
                raise _no_gradient(objective.name)

    def __call__(self, images, prompts):
        """(the weighted sum of the losses (B,), each unweighted reward by name, (B,), detached).

        images: (B, 3, H, W); prompts: B strings, one per image. If the images require a gradient, every loss must give
        one.
        """
        total, rewards = 0, {}
        for objective in self.objectives:
            with _one_line(f"the reward {objective.name!r} failed", RewardFailed):
                # A copy, for a reward may write into what it gets.
                losses = self.loss_fns[objective.name](images.clone(), list(prompts))
            losses = _checked(losses, objective.name, images)
            total = total + objective.weight * losses
            rewards[objective.name] = -losses.detach()
        return total, rewards

    @torch.no_grad()
    def forgiving(self, images, prompts):
        """As the call, without gradients; an image for which a reward raises has the loss NaN, with a warning."""
        try:
            return self(images, prompts)
        except RewardFailed as failure:
            if len(images) > 1:  # find out which
                each = [self.forgiving(images[b : b + 1], prompts[b : b + 1]) for b in range(len(images))]
                losses, rewards = zip(*each)
                return torch.cat(losses), {name: torch.cat([r[name] for r in rewards]) for name in rewards[0]}
            warnings.warn(str(failure), stacklevel=2)
            lost = images.new_full((1,), math.nan)
            return lost, {objective.name: lost for objective in self.objectives}


def _checked(losses, name, images):
    batch = len(images)
    if not isinstance(losses, torch.Tensor):
        got = f"{type(losses).__name__}" + ("; does loss_fn end with `return loss`?" if losses is None else "")
        raise UserError(f"the reward {name!r} returned {got}; expected a tensor of {batch} losses")
    if losses.numel() != batch:
        raise UserError(
            f"the reward {name!r} returned losses of shape {tuple(losses.shape)} for {batch} images; "
            f"expected ({batch},)"
        )
    if torch.is_grad_enabled() and images.requires_grad and not losses.requires_grad:
        raise _no_gradient(name)
    return losses.reshape(batch).to(images.device, images.dtype)


def _no_gradient(name):
    return UserError(f"the reward {name!r} gives no gradient; use --estimator hybrid, which needs none")


class _one_line:
    """A context that turns any exception of a user's reward into one line that says where it was raised."""

    def __init__(self, what, kind=UserError):
        self.what, self.kind = what, kind

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception) or isinstance(error, UserError) or is_out_of_memory(error):
            return
        if isinstance(error, RewardError):
            raise UserError(str(error)) from error
        frame = traceback.extract_tb(trace)[-1]
        message = " ".join(str(error).split()) or "no message"
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise self.kind(f"{self.what}: {kind.__name__}: {message} ({where})") from error


def describe(objectives):
    """The sum as text, such as `black + 0.5 * white`."""
    return " + ".join(o.name if o.weight == 1 else f"{o.weight:g} * {o.name}" for o in objectives)
