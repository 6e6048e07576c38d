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
from torch.nn.functional import avg_pool2d

from dno.errors import UserError
from dno.methods.base import Iteration, Method, State
from dno.noise import NEIGHBOUR, Split, draw_noise, keyed_generator
from dno.regularization import probability, probability_min
from dno.settings import Group, setting
from dno.team import shares
from rewards import to_uint8

# The contact sheet: how many candidates of an image it shows, and their longer side in pixels at most.
SHOWN, SHOWN_SIZE = 16, 384
# Candidates without a single finite reward after which the run is given up.
MAX_BAD_CANDIDATES = 10


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
    metrics = ("candidate",)
    columns = {"mean": "mean reward of the candidates", "std": "standard deviation of their rewards"}

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
        return Ranking(self.settings.batch_size)

    def start(self):
        state, given = self.blank(), self.task.given_noise()
        if given is not None:
            state.pivot = self._effective(given).cpu()
        return state

    def iterations(self, state):
        s, task = self.settings, self.task
        while state.step < self.num_iterations and (rows := state.active):
            ks, pivot = self._numbers(state.step), state.pivot_of(rows)
            task.team.send_task(pivot, rows, state.step)
            best, images, small, losses, rewards = self._try(pivot, rows, ks)
            n, scores = torch.arange(len(rows)), torch.where(losses.isfinite(), -losses, torch.nan)
            noise = self._candidates(pivot, rows, [(r, ks[m]) for r, m in enumerate(best)])
            mean = scores.nanmean(dim=1)
            found = Iteration(
                rows, images, losses[n, best], {name: all[n, best] for name, all in rewards.items()}, noise,
                metrics={
                    "probability": probability(noise, s.subsample),
                    "probability_min": probability_min(noise, s.subsample),
                    "candidate": best + ks[0],
                    "mean": mean,
                    "std": (scores - mean[:, None]).square().nanmean(dim=1).sqrt(),
                },
                evaluations=task.evaluate(images, rows),
            )  # fmt: skip
            with state.changing():
                for r, b in enumerate(rows):
                    state.rank(b, ks, scores[r], small[r])
                if s.search == "neighbours":
                    state.move(rows, ks, noise)
                state.failed = ks.stop >= min(MAX_BAD_CANDIDATES, s.num_candidates) and not any(state.shown)
            yield found
            if state.failed:
                raise UserError(
                    f"none of {ks.stop} candidates had a finite reward; check the objective, or use --precision fp32"
                )

    def serve(self):
        while (task := self.task.team.receive_task()) is not None:
            pivot, rows, step = task
            self._try(pivot.cpu(), rows, self._numbers(step))

    def _numbers(self, step):
        """The candidates that an iteration tries."""
        count = self.settings.candidates_per_iteration
        return range(step * count, min((step + 1) * count, self.settings.num_candidates))

    @torch.no_grad()
    def _try(self, pivot, rows, ks):
        """Try the M candidates `ks` of n images: every process renders its share, and the leader gets

        (which is best of each image (n,), their images (n, 3, H, W), all of them reduced (n, M, 3, h, w), losses
        (n, M), rewards by name (n, M)). A process keeps the best of each image alone. pivot: as for `_candidates`.
        """
        task, team, size = self.task, self.task.team, self.settings.batch_per_device
        names = [objective.name for objective in task.objectives]
        pairs, like = [(r, k) for r in range(len(rows)) for k in ks], {"device": task.device, "dtype": task.state_dtype}
        small = _reduced(torch.zeros(len(pairs), 3, *task.size, **like))
        table = torch.zeros(len(pairs), 1 + len(names), **like)
        ends, kept = shares(len(pairs), team.size), {}
        start, end = ends[team.rank], ends[team.rank + 1]
        for i in range(start, end, size):
            part = slice(i, min(i + size, end))
            z, of = self._candidates(pivot, rows, pairs[part]), [rows[r] for r, _ in pairs[part]]
            images = task.render(self.split.join(z, z[:0]), of)
            losses, rewards = task.losses_or_nan(images, of)
            table[part] = torch.stack([losses, *(rewards[name] for name in names)], dim=1)
            small[part] = _reduced(images)
            for (r, _), loss, image in zip(pairs[part], _comparable(losses).tolist(), images):
                if r not in kept or loss < kept[r][0]:
                    kept[r] = loss, image.clone()
        table, small = (team.sum(part).unflatten(0, (len(rows), len(ks))) for part in (table, small))
        losses, *others = table.unbind(-1)
        best = team.broadcast(_comparable(losses).argmin(dim=1) if team.leads else None)  # the first of equals
        images = torch.zeros(len(rows), 3, *task.size, **like)
        for r, m in enumerate(best.tolist()):
            if start <= r * len(ks) + m < end:
                images[r] = kept[r][1]
        return best, team.sum(images), small, losses, dict(zip(names, others, strict=True))

    def _candidates(self, pivot, rows, pairs):
        """The noise of candidates, each (row r of n images, k): (T + 1, len(pairs), C, h, w), or with eta 0 x_T alone.

        pivot: likewise, (T + 1, n, C, h, w) on the CPU, the noises to search around; without any, each is a draw.
        """
        s, task, noises = self.settings, self.task, []
        shape = task.latent_shape[1:]
        for r, k in pairs:
            seed = s.seed + rows[r]
            if not len(pivot):
                noises.append(self._effective(draw_noise([seed], s.num_steps, shape, k)))
            elif k == 0:
                noises.append(pivot[:, [r]])  # where the search starts
            else:
                xi = torch.randn(s.num_steps + 1, 1, *shape, generator=keyed_generator(NEIGHBOUR, seed, k))
                noises.append(neighbour(pivot[:, [r]], self._effective(xi), s.rho))
        return torch.cat(noises, dim=1).to(task.device, task.state_dtype)

    def _effective(self, noise):
        """What of the noise reaches the image: with eta 0 x_T alone."""
        return self.split.split(noise)[0]


def _comparable(losses):
    """Losses to compare: what is not finite never wins."""
    return losses.where(losses.isfinite(), torch.inf)


def _reduced(images):
    """The images (n, 3, H, W) as small as the contact sheet shows them."""
    return avg_pool2d(images, math.ceil(max(images.shape[-2:]) / SHOWN_SIZE))


def neighbour(z, xi, rho):
    """sqrt(1 - rho^2) z + rho xi, each single noise (C, h, w) scaled back to the norm that it has in z.

    z, xi: (N, B, C, h, w). rho: from 0 to 1.
    """
    moved = math.sqrt(1 - rho**2) * z + rho * xi
    wanted, got = (noise.flatten(2).norm(dim=2)[..., None, None, None] for noise in (z, moved))
    return moved * (wanted / got)


class Ranking(State):
    """The candidates of B images so far.

    shown: the best `SHOWN` of each image, best first: (reward, k, pixels (H, W, 3), uint8).
    pivot: the noise that a search looks around, the best so far: (T + 1, B, C, h, w), or with eta 0 (1, B, C, h, w),
        on the CPU. None without a search, and before the first candidates of one that draws its start.
    """

    def __init__(self, batch):
        super().__init__(batch)
        self.shown, self.pivot = [[] for _ in range(batch)], None

    def pivot_of(self, rows):
        """The pivot of these images, (T + 1, n, C, h, w), or an empty tensor for none."""
        return torch.zeros(0) if self.pivot is None else self.pivot[:, rows]

    def rank(self, b, ks, scores, images):
        """Take in candidates of image b: their rewards (M,) and images (M, 3, H, W)."""
        shown = to_uint8(_reduced(images))
        new = [(score, k, pixels) for score, k, pixels in zip(scores.tolist(), ks, shown, strict=True)]
        ranked = [*self.shown[b], *(entry for entry in new if math.isfinite(entry[0]))]
        self.shown[b] = sorted(ranked, key=lambda entry: (-entry[0], entry[1]))[:SHOWN]

    def move(self, rows, ks, noise):
        """Search around these noises (T + 1, n, C, h, w), the best of `ks`, unless an earlier candidate is better."""
        if self.pivot is None:
            count, _, *shape = noise.shape
            self.pivot = torch.zeros(count, len(self.stopped), *shape, dtype=noise.dtype)
        for r, b in enumerate(rows):
            if not self.shown[b] or self.shown[b][0][1] in ks:
                self.pivot[:, b] = noise[:, r]

    def gallery(self):
        return {
            b: [(f"candidate {k}: {score:.4f}", pixels) for score, k, pixels in shown]
            for b, shown in enumerate(self.shown)
        }

    def pack(self):
        tensors, values = super().pack()
        if self.pivot is not None:
            tensors["pivot"] = self.pivot
        for b, shown in enumerate(self.shown):
            if shown:
                tensors[f"shown.{b}"] = torch.from_numpy(np.stack([pixels for *_, pixels in shown]))
        return tensors, {**values, "ranks": [[entry[:2] for entry in shown] for shown in self.shown]}

    def unpack(self, tensors, values):
        super().unpack(tensors, values)
        self.pivot = tensors.get("pivot")
        for b, ranks in enumerate(values["ranks"]):
            self.shown[b] = [(score, k, tensors[f"shown.{b}"][i].numpy()) for i, (score, k) in enumerate(ranks)]
