"""Best-of-N: draw noise N times for each image, and keep the draw whose image has the highest reward.

    z* = argmax_k reward(M(z_k)),    z_k ~ N(0, I)

With `--search neighbours` the candidates of an iteration are drawn around the best so far instead (zero-order search):

    z_k = sqrt(1 - rho^2) z* + rho xi_k,    each noise scaled back to the norm of its own in z*

No gradient is needed, and every candidate that is drawn afresh is as probable as any. Candidate k of an image is
`draw_noise(candidate=k)`, whatever the batch and the number of processes.

Source: best-of-N is folklore; the search around a pivot is in Ma et al. 2025 (arXiv 2501.09732), "Zero-Order Search".
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from dno.errors import UserError
from dno.methods.base import Iteration, Method, State
from dno.methods.estimation import shares
from dno.noise import NEIGHBOUR, Split, draw_noise, keyed_generator
from dno.regularization import probability, probability_min
from dno.settings import Group, setting
from rewards import to_uint8

SHOWN = 16  # candidates on the contact sheet


@dataclass(frozen=True)
class Candidates(Group):
    title: ClassVar[str] = "candidates"

    num_candidates: int = setting(
        64,
        "N: noises that are tried for each image",
        basic="noises that are tried for each image",
        least=1,
        metavar="N",
    )
    candidates_per_iteration: int = setting(
        8,
        "how many of them one iteration tries; a search moves on after each iteration",
        basic="how many of them one iteration tries",
        least=1,
        metavar="M",
    )
    batch_per_device: int = setting(
        4,
        "candidates that one process renders at once, at most",
        basic="candidates that one process renders at once",
        changeable=True,
        least=1,
        metavar="B",
    )
    search: str = setting(
        "none",
        "none: independent draws. neighbours: draws around the best so far (zero-order search)",
        basic="none, or neighbours: draw around the best so far",
        choices=("none", "neighbours"),
    )
    rho: float = setting(
        0.3,
        "distance of a neighbour: 0 is the best so far itself, 1 an independent draw",
        basic="distance of a neighbour, 0 to 1",
        above=0,
        most=1,
        metavar="X",
    )


class BestOfN(Method):
    name, title, prefix = "best_of_n", "Best-of-N", "BestOfN"
    groups = (Candidates,)
    columns = {"mean": "mean reward of the candidates", "std": "their standard deviation"}

    @classmethod
    def shares_work(cls, settings):
        return True

    def __init__(self, task):
        super().__init__(task)
        settings = self.settings
        self.split = Split(settings.num_steps, settings.num_steps, settings.eta)
        if task.noise is not None and settings.search == "none":
            raise UserError("--noise is where a search starts; add --search neighbours, or leave it out")

    @property
    def num_iterations(self):
        return math.ceil(self.settings.num_candidates / self.settings.candidates_per_iteration)

    def describe(self):
        s, size = self.settings, self.task.team.size
        around = f", around the best so far with rho {s.rho:g}" if s.search == "neighbours" else ""
        processes = f", {size} processes" if size > 1 else ""
        return {"candidates": f"{s.num_candidates}, {s.candidates_per_iteration} per iteration{around}{processes}"}

    def blank(self):
        return Ranking(self.task.latent_shape[0])

    def start(self):
        """Without candidates; a search starts at the given noise, if there is one."""
        state, given = self.blank(), self.task.given_noise()
        if given is not None:
            state.best = self._reduced(given).cpu()
        return state

    def iterations(self, state):
        s, task = self.settings, self.task
        while state.step < self.num_iterations and (rows := state.active):
            searches = s.search == "neighbours" and state.best is not None
            pivot = state.best[:, rows] if searches else torch.zeros(0)
            task.team.send_task(pivot, rows, state.step)
            ks = self._candidates_of(state.step)
            images, losses, rewards = self._try(pivot, rows, ks)
            # A reward that is not finite never wins.
            best = losses.nan_to_num(nan=torch.inf, neginf=torch.inf).argmin(dim=1)
            every, scores = torch.arange(len(rows)), -losses
            finite = scores.where(scores.isfinite(), torch.nan)
            mean = finite.nanmean(dim=1)
            noise = torch.cat([self._candidate(pivot, r, b, ks[k]) for r, (b, k) in enumerate(zip(rows, best))], dim=1)
            z, _ = self.split.split(noise)
            shown = {b: state.ranked(b, ks, scores[r], images[r]) for r, b in enumerate(rows)}
            found = Iteration(
                rows, images[every, best], losses[every, best], {n: v[every, best] for n, v in rewards.items()}, noise,
                metrics={
                    "probability": probability(z, s.subsample),
                    "probability_min": probability_min(z, s.subsample),
                    "candidate": best + ks[0],
                    "mean": mean,
                    "std": (finite - mean[:, None]).square().nanmean(dim=1).sqrt(),
                },
                evaluations=task.evaluate(images[every, best], rows),
                gallery={b: [(f"{k}: {score:.4g}", pixels) for score, k, pixels in shown[b]] for b in rows},
            )  # fmt: skip
            with state.changing():
                state.take(found, shown)
            yield found

    def serve(self):
        while (task := self.task.team.receive_task()) is not None:
            pivot, rows, step = task
            self._try(pivot, rows, self._candidates_of(step))

    def _candidates_of(self, step):
        count = self.settings.candidates_per_iteration
        return range(step * count, min((step + 1) * count, self.settings.num_candidates))

    def _try(self, pivot, rows, ks):
        """Images (n, M, 3, H, W), losses (n, M) and rewards by name, (n, M), of the candidates `ks` of these images.

        Every process renders its share, and the leader gets them all.
        """
        task, team, size = self.task, self.task.team, self.settings.batch_per_device
        tried = [(r, m) for r in range(len(rows)) for m in range(len(ks))]
        names = [objective.name for objective in task.objectives]
        images = torch.zeros(len(tried), 3, *task.size, device=task.device, dtype=task.state_dtype)
        table = torch.zeros(len(tried), 1 + len(names), device=task.device, dtype=task.state_dtype)
        ends = shares(len(tried), team.size)
        start, end = ends[team.rank], ends[team.rank + 1]
        for i in range(start, end, size):
            chunk = slice(i, min(i + size, end))
            noise = torch.cat([self._candidate(pivot, r, rows[r], ks[m]) for r, m in tried[chunk]], dim=1)
            images[chunk], losses, rewards = self._render(noise, [rows[r] for r, _ in tried[chunk]])
            table[chunk] = torch.stack([losses, *(rewards[name] for name in names)], dim=1).to(table)
        images, table = (team.sum(part).unflatten(0, (len(rows), len(ks))) for part in (images, table))
        return images, table[..., 0], {name: table[..., 1 + i] for i, name in enumerate(names)}

    @torch.no_grad()
    def _render(self, noise, rows):
        images = self.task.render(self.split.join(*self.split.split(noise)), rows)
        return images, *self.task.losses_or_nan(images, rows)

    def _candidate(self, pivot, r, b, k):
        """Candidate k of image b, row r of the pivot: (T + 1, 1, C, h, w), or with eta 0 (1, 1, C, h, w)."""
        s, task = self.settings, self.task
        if len(pivot) and k == 0:
            return pivot[:, [r]].to(task.device, task.state_dtype)  # where the search starts
        if not len(pivot):
            return self._reduced(draw_noise([s.seed + b], s.num_steps, task.latent_shape[1:], k))
        generator = keyed_generator(NEIGHBOUR, s.seed + b, k)
        xi = torch.randn(s.num_steps + 1, 1, *task.latent_shape[1:], generator=generator)
        return neighbour(pivot[:, [r]].to(task.device, task.state_dtype), self._reduced(xi), s.rho)

    def _reduced(self, noise):
        """What of the noise reaches the image, on the device."""
        return self.split.whole(*self.split.split(noise.to(self.task.device, self.task.state_dtype)))


def neighbour(z, xi, rho):
    """sqrt(1 - rho^2) z + rho xi, each single noise (C, h, w) scaled back to the norm that it has in z.

    z, xi: (N, B, C, h, w). rho: from 0 to 1.
    """
    moved = math.sqrt(1 - rho**2) * z + rho * xi
    norms = [noise.flatten(2).norm(dim=2)[..., None, None, None] for noise in (z, moved)]
    return moved * (norms[0] / norms[1].clamp(min=torch.finfo(z.dtype).tiny))


class Ranking(State):
    """What best-of-N keeps of B images.

    best: the noise of the best candidate of each, (T + 1, B, C, h, w), or with eta 0 (1, B, C, h, w); None before the
        first. scores: their rewards.
    shown: the best `SHOWN` candidates of each image: (reward, k, pixels (H, W, 3), uint8), best first.
    """

    def __init__(self, batch):
        super().__init__(batch)
        self.best, self.scores, self.shown = None, [-math.inf] * batch, [[] for _ in range(batch)]

    def ranked(self, b, ks, scores, images):
        """What is shown of image b when these candidates, (M, 3, H, W), are there too."""
        new = [
            (score, k, pixels)
            for score, k, pixels in zip(scores.tolist(), ks, to_uint8(images))
            if math.isfinite(score)
        ]
        return sorted([*self.shown[b], *new], key=lambda entry: (-entry[0], entry[1]))[:SHOWN]

    def take(self, found, shown):
        """Keep what is better than the best so far, and what is shown by now."""
        if self.best is None:
            count, _, *shape = found.noise.shape
            self.best = torch.zeros(count, len(self.stopped), *shape, dtype=found.noise.dtype)
        for row, b in enumerate(found.rows):
            self.shown[b], reward = shown[b], -found.losses[row].item()
            reward = reward if math.isfinite(reward) else -math.inf
            if reward > self.scores[b] or self.scores[b] == -math.inf:
                self.best[:, b], self.scores[b] = found.noise[:, row], reward

    def pack(self):
        tensors, values = super().pack()
        if self.best is not None:
            tensors["best"] = self.best
        for b, shown in enumerate(self.shown):
            if shown:
                tensors[f"shown.{b}"] = torch.from_numpy(np.stack([pixels for *_, pixels in shown]))
        ranks = [[entry[:2] for entry in shown] for shown in self.shown]
        return tensors, {**values, "scores": self.scores, "ranks": ranks}

    def unpack(self, tensors, values):
        super().unpack(tensors, values)
        self.best, self.scores = tensors.get("best"), list(values["scores"])
        for b, ranks in enumerate(values["ranks"]):
            self.shown[b] = [(score, k, tensors[f"shown.{b}"][i].numpy()) for i, (score, k) in enumerate(ranks)]


@torch.no_grad()
def best_candidates(task, count):
    """The best of `count` draws for each image, (T + 1, B, C, h, w): what another method can start from."""
    rows, best, best_losses = list(range(task.settings.batch_size)), None, None
    for k in range(count):
        noise = task.draw(candidate=k)
        task.team.send_task(noise[:0], [], -1)  # a sign of life for those who wait for the first task
        losses, _ = task.losses_or_nan(task.render(noise.unbind(), rows), rows)
        losses = losses.nan_to_num(nan=torch.inf, neginf=torch.inf)  # a reward that is not finite never wins
        if best is None:
            best, best_losses = noise, losses
        better = losses < best_losses
        best[:, better], best_losses = noise[:, better], torch.minimum(losses, best_losses)
    return best
