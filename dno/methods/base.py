"""The contract of methods: what `align` asks of them, and what they give."""

import contextlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dno.settings import settings_class


@dataclass(frozen=True)
class Iteration:
    """What one iteration measured, of n of the B images.

    rows: the n indices of the images.
    images: (n, 3, H, W), nominally in [-1, 1]; losses: (n,); rewards: each objective's unweighted reward, (n,).
    noise: (T + 1 or, at eta 0, 1, n, C, h, w), which the model's sampler turns into these images; None where the
        method has none.
    metrics: further columns of metrics.jsonl by name, (n,) each. A name that ends in `_min` is a minimum over images,
        the others are means.
    evaluations: rewards that are recorded only, (n,) each.
    """

    rows: list
    images: torch.Tensor
    losses: torch.Tensor
    rewards: dict
    noise: torch.Tensor | None = None
    metrics: dict = field(default_factory=dict)
    evaluations: dict = field(default_factory=dict)


class State:
    """What a method carries from one iteration to the next, for B images; subclasses add theirs.

    step: iterations that are done.
    stopped: why each image is done, None while it is worked on. Whoever finds a reason says `stop`.
    whole: False while `changing`, when the state is neither the old one nor the new one.
    failed: the method gave up; a resumed run gets another chance.
    """

    # A context that `changing` runs in; the recorder has signals wait there.
    guard = staticmethod(contextlib.nullcontext)

    def __init__(self, batch):
        self.step, self.stopped, self.whole, self.failed = 0, [None] * batch, True, False

    @property
    def active(self):
        """The indices of the images that are worked on."""
        return [b for b, why in enumerate(self.stopped) if why is None]

    def stop(self, b, why):
        """Image b is done; the first reason counts."""
        self.stopped[b] = self.stopped[b] or why

    @contextlib.contextmanager
    def changing(self):
        """The end of an iteration, and the only place where a state changes: all of it or nothing is saved."""
        with self.guard():
            self.whole = False
            yield
            self.step += 1
            self.whole = True

    def gallery(self):
        """Further images to show beside each best, by image: lists of (caption, pixels (H, W, 3), uint8)."""
        return {}

    def pack(self):
        """(tensors by name, a dict for JSON): all that `unpack` needs."""
        return {}, {"step": self.step, "stopped": self.stopped, "failed": self.failed}

    def unpack(self, tensors, values):
        """Take back what `pack` gave."""
        self.step, self.stopped = values["step"], list(values["stopped"])

    def retry(self):
        """Give images that have stopped another chance: the stop rules have changed, or a fault was mended."""
        self.stopped = [None] * len(self.stopped)


class Method:
    """Base class of methods. One object is one run's.

        state = method.start()
        for iteration in method.iterations(state):
            ...

    name: on the command line. title: for people. prefix: of the run folders' names.
    groups: its own groups of settings, which are its flags. presets: its own defaults of shared settings.
    result: "noise" (the model's sampler turns it into the images), "image" (there is no such noise) or "weights".
    columns: metric -> title, of its own metrics that are worth a chart; metrics: the names of the others.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    prefix: ClassVar[str]
    groups: ClassVar[tuple] = ()
    presets: ClassVar[dict] = {}
    result: ClassVar[str] = "noise"
    columns: ClassVar[dict] = {}
    metrics: ClassVar[tuple] = ()

    @classmethod
    def settings_class(cls):
        """Its settings: the shared groups and its own, as one dataclass."""
        return settings_class(f"{cls.__name__}Settings", cls.groups)

    @classmethod
    def needs_gradient(cls, settings):
        """Whether every objective must be differentiable. settings: resolved."""
        return False

    @classmethod
    def shares_work(cls, settings):
        """Whether several processes work on one run; else they share out the runs of a sweep."""
        return False

    def __init__(self, task):
        """task: a loaded `dno.task.Task`."""
        self.task, self.settings = task, task.settings

    @property
    def num_iterations(self):
        """How many iterations a run has that nothing stops."""
        raise NotImplementedError

    def describe(self):
        """Rows of the banner, by name."""
        return {}

    def blank(self):
        """A state of the right shapes, for `State.unpack` to fill."""
        raise NotImplementedError

    def start(self):
        """The state before the first iteration. It may take time: it can draw and render."""
        return self.blank()

    def iterations(self, state):
        """Yield an `Iteration` for each one from `state.step` on, as long as an image is active.

        The state is whole, and of the next iteration, whenever this yields, so a caller may leave the loop, save the
        state, or `stop` images of it.
        """
        raise NotImplementedError

    def serve(self):
        """What the other processes of a run do until the first one dismisses them (`Team.receive_task`)."""
        raise NotImplementedError
