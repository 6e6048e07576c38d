"""Gradients for rewards that give none, estimated from perturbed samples, on one process or many.

Symbols: z is the noise, x = M(z) its image (M is sampler and decoder), xi_j standard normal, mu the size of the
perturbations, q their number. Each estimator is a mean of products

    mean_j (loss_j - loss) / mu * (p_j - p) / mu

of a change of the loss and the change of the point p that caused it. Where p is the image, the mean is a direction g
in image space, and the model's Jacobian, which is known, takes it back to the noise: the gradient of <g, x>. Where p is
the noise, the mean is the gradient itself and the model as black a box as the reward.

Source: Tang et al. 2024 (arXiv 2405.18881), the hybrid gradient approximation for non-differentiable rewards.
"""

import warnings

import torch

from dno.errors import UserError
from dno.methods.gradients import Estimate, pull_back, with_graph
from dno.team import Team


def hybrid(work):
    """Perturb the noise, measure in image space: x_j = M(z + mu xi_j), g = mean_j (loss_j - loss)(x_j - x) / mu^2."""
    graph = work.forward()  # first, while the other processes sample
    reference = work.reference(work.render(work.noise, work.rows))
    images, losses = [], []
    for chunk in work.chunks():
        pixels = work.render(work.perturbed_noise(chunk), work.rows_of(chunk))
        images.extend(pixels)
        losses.extend(work.rate(pixels, work.rows_of(chunk)))
    x, loss = work.share(reference)
    return work.estimate(x, loss, work.pull_back(graph, work.mean_product(losses, loss, images, x)))


def hybrid_image(work):
    """Perturb the image, which takes no further sampling: x_j = x + mu xi_j, g as for `hybrid`."""
    graph = work.forward()
    x, loss = work.share(work.reference(graph and graph[1].detach()))
    images, losses = [], []
    for chunk in work.chunks():
        pixels = work.perturbed_images(x, chunk)
        images.extend(pixels)
        losses.extend(work.rate(pixels, work.rows_of(chunk)))
    return work.estimate(x, loss, work.pull_back(graph, work.mean_product(losses, loss, images, x)))


def zo(work):
    """Zeroth order alone, without the model's Jacobian: the gradient is mean_j (loss_j - loss) xi_j / mu."""
    reference = work.reference(work.render(work.noise, work.rows))
    noises, losses = [], []
    for chunk in work.chunks():
        noise = work.perturbed_noise(chunk)
        noises.extend(noise[work.free].unbind(1))
        losses.extend(work.rate(work.render(noise, work.rows_of(chunk)), work.rows_of(chunk)))
    x, loss = work.share(reference)
    mean = work.mean_product(losses, loss, noises, work.noise[work.free].transpose(0, 1))
    return work.estimate(x, loss, None if mean is None else mean.transpose(0, 1))


ESTIMATORS = {"hybrid": hybrid, "hybrid_image": hybrid_image, "zo": zo}


class Estimation:
    """A gradient source like `Backpropagation`, for any reward.

    render: a sequence of T + 1 noises (n, C, h, w) and the image that each row is of -> pixels (n, 3, H, W).
    loss: (pixels, images) -> (losses (n,), rewards by name); a loss that is NaN costs its sample.
    free: slice of the noises that are optimized; they alone are perturbed.
    estimator: a name in `ESTIMATORS`.
    mu: standard deviation of the perturbations, in units of the noise or, for hybrid_image, of pixels in [-1, 1].
    num_samples: q, perturbed samples an image.
    draw: (image, step, index, shape) -> standard normal on the CPU; it depends on nothing else.
    batch_size: the most samples that are rendered at once.
    antithetic: samples in pairs z +- mu xi; their differences are central, which takes out every even order.
    pad: fill up batches to batch_size. In half precision the path of a sample, and so its rounding, depends on the
        size of its batch, and what is wanted is a small difference between two samples.
    idle: which of the free noises have no effect on the image, such as the last step's; they are not perturbed.
    team: the processes that share the samples. The first of them is called; the others `serve`.
    backprop_cost: what the first one does besides for each image, in samples: with hybrid it gets that many fewer.
    max_bad_samples: so many in a row without a finite reward end the run.
    """

    no_gradient = "no perturbed sample changed it; raise --mu or --num_samples"

    def __init__(
        self, render, loss, free, estimator, *, mu, num_samples, draw, batch_size=4, antithetic=False, pad=False,
        idle=(), team=None, backprop_cost=3.0, max_bad_samples=10,
    ):  # fmt: skip
        self.render, self.loss, self.free, self.estimator = render, loss, free, ESTIMATORS[estimator]
        self.mu, self.num_samples, self.draw, self.batch_size = mu, num_samples, draw, batch_size
        self.antithetic, self.pad, self.idle = antithetic, pad, list(idle)
        self.team = Team() if team is None else team
        self.backprop_cost, self.max_bad_samples = backprop_cost, max_bad_samples
        self.bad_in_a_row = 0

    def __call__(self, noise, images, step=0):
        """noise: (T + 1, B, C, h, w); images: the B indices of the images in the batch; step: keys the draws."""
        self.team.send_task(noise, images, step)
        return self.estimator(_Work(self, noise, list(images), step))

    def serve(self):
        """Take part in the first process's estimates until it is done."""
        while (task := self.team.receive_task()) is not None:
            noise, images, step = task
            if images:  # none: the leader is busy with something else, and alive
                self.estimator(_Work(self, noise, images, step))

    def judge(self, bad, step, images):
        """Warn of lost samples, and end the run at too many in a row. bad: (B, q) booleans, in sample order."""
        for image, row in zip(images, bad.tolist()):
            if any(row):
                warnings.warn(f"iteration {step}: image {image} lost {sum(row)} of {len(row)} samples", stacklevel=4)
            for is_bad in row:
                self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
                if self.bad_in_a_row >= self.max_bad_samples:
                    raise UserError(
                        f"iteration {step}: {self.bad_in_a_row} samples in a row without a finite reward "
                        "(--max_bad_samples); mend the reward, or lower --mu or --lr"
                    )


def shares(num_units, ranks, burden):
    """Where each rank's part of `num_units` ends: rank r has units ends[r]..ends[r + 1], ends[0] = 0.

    burden: what rank 0 does besides, in units. It gets that much less than its even part, the others share the rest.
    """
    first = num_units if ranks == 1 else max(0, round((num_units + burden) / ranks - burden))
    rest, others = num_units - first, max(ranks - 1, 1)
    return [0] + [first + rest * r // others for r in range(ranks)]


class _Work:
    """One estimate, as one process sees it. A sample is (row, j): the j-th of the row-th image of the batch."""

    def __init__(self, source, noise, images, step):
        self.source, self.noise, self.images, self.step = source, noise, images, step
        self.free, self.rows, self.leads = source.free, list(range(len(images))), source.team.leads
        self.rewards = None
        pair = 2 if source.antithetic else 1
        units = [(row, j) for row in self.rows for j in range(0, source.num_samples, pair)]
        # Only hybrid's leader renders while the others already sample; backward comes when all samples are there.
        burden = source.backprop_cost * len(images) / pair if source.estimator is hybrid else 0
        ends = shares(len(units), source.team.size, burden)
        mine = units[ends[source.team.rank] : ends[source.team.rank + 1]]
        self.samples = [(row, j + k) for row, j in mine for k in range(pair)]

    def chunks(self):
        """This process's samples, at most batch_size at once."""
        size = self.source.batch_size
        return [self.samples[start : start + size] for start in range(0, len(self.samples), size)]

    def rows_of(self, chunk):
        return [row for row, _ in chunk]

    def perturbations(self, chunk, shape, dim):
        """mu xi_j of the samples of a chunk, stacked along `dim`; antithetic pairs have one xi, with both signs."""
        moves = []
        for row, j in chunk:
            index, sign = (j // 2, 1 - 2 * (j % 2)) if self.source.antithetic else (j, 1)
            moves.append(sign * self.source.draw(self.images[row], self.step, index, shape))
        return self.source.mu * torch.stack(moves, dim).to(self.noise.device, self.noise.dtype)

    def perturbed_noise(self, chunk):
        """(T + 1, n, C, h, w), the free noises moved."""
        noise = self.noise[:, self.rows_of(chunk)]
        shape = (len(noise[self.free]), *noise.shape[2:])
        moves = self.perturbations(chunk, shape, 1)
        moves[self.source.idle] = 0
        noise[self.free] += moves
        return noise

    def perturbed_images(self, x, chunk):
        return x[self.rows_of(chunk)] + self.perturbations(chunk, tuple(x.shape[1:]), 0)

    @torch.no_grad()
    def render(self, noise, rows):
        """Pixels of noises (T + 1, n, C, h, w), at most batch_size at once. Of the reference, the leader's alone."""
        if noise is self.noise and not self.leads:
            return None
        size, pixels = self.source.batch_size, []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = part + part[-1:] * (size - len(part)) if self.source.pad else part
            index = list(range(start, start + len(part))) + [start + len(part) - 1] * (len(filled) - len(part))
            images = [self.images[row] for row in filled]
            pixels.append(self.source.render(noise[:, index].unbind(), images)[: len(part)])
        return torch.cat(pixels)

    @torch.no_grad()
    def rate(self, pixels, rows):
        """Losses (n,) of pixels (n, 3, H, W)."""
        losses, rewards = self.source.loss(pixels, [self.images[row] for row in rows])
        self.rewards = self.rewards or rewards  # the reference is rated first
        return losses

    def forward(self):
        """The leader's: the free noises as leaves, and the images with a graph to them."""
        return with_graph(self.source.render, self.noise, self.images, self.free) if self.leads else None

    def reference(self, pixels):
        """The leader's: the images (B, 3, H, W) that the samples are compared with, and their losses."""
        if self.leads:
            return pixels, self.rate(pixels, self.rows)

    def share(self, reference):
        """The reference, for every process."""
        pixels, losses = reference or (None, None)
        return self.source.team.broadcast(pixels), self.source.team.broadcast(losses)

    def mean_product(self, losses, loss, points, origin):
        """mean_j (loss_j - loss)(p_j - p) / mu^2 over the good samples of all processes: (B, ...), the leader's.

        losses, points: of this process's samples, in order. loss: (B,), origin: (B, ...), of the reference.
        Where an image has no good sample at all the mean is NaN.
        """
        sums, counts = torch.zeros_like(origin), torch.zeros_like(loss)
        bad = torch.zeros(len(self.images), self.source.num_samples, dtype=loss.dtype, device=loss.device)
        for (row, j), value in zip(self.samples, losses):
            bad[row, j] = float(not value.isfinite())
        samples = list(zip(self.samples, losses, points))
        if self.source.antithetic:
            for ((row, _), ahead, p_ahead), (_, behind, p_behind) in zip(samples[::2], samples[1::2]):
                if ahead.isfinite() and behind.isfinite():
                    sums[row] += (ahead - behind) / 2 * (p_ahead - p_behind) / 2
                    counts[row] += 1
        else:
            for (row, _), value, point in samples:
                if value.isfinite():
                    sums[row] += (value - loss[row]) * (point - origin[row])
                    counts[row] += 1
        sums, counts, bad = (self.source.team.sum(part) for part in (sums, counts, bad))
        if not self.leads:
            return None
        self.source.judge(bad > 0, self.step, self.images)
        return sums / counts.view(-1, *[1] * (sums.dim() - 1)) / self.source.mu**2

    def pull_back(self, graph, direction):
        """The gradient in the noise of <g, x>, with g of norm 1 for each image: (N, B, C, h, w)."""
        if self.leads:
            norm = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            return pull_back(*graph, direction / (norm + 1e-3))

    def estimate(self, pixels, losses, gradient):
        return Estimate(pixels, losses, self.rewards, gradient) if self.leads else None
