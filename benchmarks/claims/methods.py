"""The two methods that the claims compare Direct Noise Optimization with, beyond those of `dno.methods`.

`add_methods` puts them into the table of methods, so that `align`, sweeps and `resume` know them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dno.methods import METHODS
from dno.methods.noise_optimization import NoiseOptimization
from dno.noise import Split
from dno.settings import Group, setting


@dataclass(frozen=True)
class Blocks(Group):
    title: ClassVar[str] = "restarts"

    block: int = setting(4, "iterations from one fresh noise to the next", least=1, metavar="N")


class Restarts(NoiseOptimization):
    """DNO, begun again from the next draw of each image's noise every `block` iterations."""

    name, title = "restarts", "DNO with random restarts"
    groups = (*NoiseOptimization.groups, Blocks)

    def iterations(self, state):
        for found in super().iterations(state):
            if state.step % self.settings.block == 0:
                state.images = self._state(self.task.draw(candidate=state.step // self.settings.block)).images
            yield found


class StartOnly(NoiseOptimization):
    """DNO of x_T alone, while every step's noise, as it was drawn, reaches the image."""

    name, title = "start_only", "DNO of the starting noise alone"

    def __init__(self, task):
        super().__init__(task)
        self.split = StartAlone(task.settings.num_steps, task.settings.num_steps, task.settings.eta)


class StartAlone(Split):
    """x_T is free and all other noises are frozen."""

    num_free = 1

    def split(self, noise):
        return noise[-1:], noise[:-1]

    def join(self, z, rest):
        return [*rest.unbind(), z[0]]

    def whole(self, z, rest):
        return torch.cat([rest, z])


def add_methods():
    """Make them known by their names in this process."""
    METHODS.update({method.name: (__name__, method.__name__) for method in (Restarts, StartOnly)})
