"""Stop rules: when an image is done before its last iteration, and the best of what it had."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StopRules:
    """None switches a rule off.

    target_reward: stop at this reward or above.
    patience: stop after this many iterations without a new best.
    min_probability: stop at P(z) below this; that iteration no longer counts for the best.
    max_seconds: for all iterations.
    """

    target_reward: float | None = None
    patience: int | None = None
    min_probability: float | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, settings):
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


@dataclass
class Best:
    """The best iteration of one image so far: reward, step, image (3, H, W), and its noise, if the method has one."""

    reward: float = -math.inf
    step: int | None = None
    image: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def observe(self, step, reward, probability, rules):
        """(whether this iteration is the new best, why the image is done or None)."""
        if rules.min_probability is not None and probability is not None and probability < rules.min_probability:
            return False, f"P(z) {probability:.2g} fell below {rules.min_probability:g}"
        better = math.isfinite(reward) and reward > self.reward
        best, since = (reward, step) if better else (self.reward, self.step or 0)
        if rules.target_reward is not None and best >= rules.target_reward:
            return better, f"reward {best:.4g} reached the target {rules.target_reward:g}"
        if rules.patience is not None and step - since >= rules.patience:
            return better, f"no better reward in {rules.patience} iterations"
        return better, None

    def pack(self):
        """(tensors by name, the rest as plain values)."""
        tensors = {name: getattr(self, name) for name in ("image", "noise")}
        return {k: v for k, v in tensors.items() if v is not None}, {"reward": self.reward, "step": self.step}

    @classmethod
    def unpack(cls, tensors, values):
        return cls(values["reward"], values["step"], tensors.get("image"), tensors.get("noise"))
