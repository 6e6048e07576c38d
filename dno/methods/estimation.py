"""Gradients for rewards that give none, estimated from perturbed samples, on one process or many.

Symbols: z is the noise, x = M(z) its image (M is sampler and decoder), xi_j standard normal, mu the size of the
perturbations, q their number. Each estimator is a mean of products

    mean_j (loss_j - loss) / mu * (p_j - p) / mu

of a change of the loss and the change of the point p that caused it. If p is the image, the mean is a direction g in
image space, and the model's Jacobian, which is known, takes it back to the noise: the gradient of <g, x>. If p is the
noise, the mean is the gradient itself and the model as black a box as the reward.

The norm of g is made 1, as in the official code; here g has the factor 1 / mu^2 before its epsilon of 1e-3 is added, so
that one epsilon serves every mu. The official code, without the factor, shrinks the gradient where rewards hardly
differ.

Source: Tang et al. 2024 (arXiv 2405.18881), the hybrid gradient approximation for non-differentiable rewards.
"""

import warnings

import torch

from dno.errors import UserError
from dno.methods.gradients import Estimate, pull_back
from dno.team import Team, shares


def hybrid(work):
    """Perturb the noise, measure in image space: x_j = M(z + mu xi_j), g = mean_j (loss_j - loss)(x_j - x) / mu^2."""
    graph = work.forward()  # first, while the other processes sample
    reference = work.reference(work.render_reference())
    images, losses = [], []
    for chunk in work.chunks():
        pixels = work.render(*work.perturbed_noise(chunk), work.rows_of(chunk))
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
    reference = work.reference(work.render_reference())
    noises, losses = [], []
    for chunk in work.chunks():
        z, rest = work.perturbed_noise(chunk)
        noises.extend(z.unbind(1))
        losses.extend(work.rate(work.render(z, rest, work.rows_of(chunk)), work.rows_of(chunk)))
    x, loss = work.share(reference)
    mean = work.mean_product(losses, loss, noises, work.z.transpose(0, 1))
    return work.estimate(x, loss, None if mean is None else mean.transpose(0, 1))


ESTIMATORS = {"hybrid": hybrid, "hybrid_image": hybrid_image, "zo": zo}


class Estimation:
    """A gradient source like `Backpropagation`, for any reward.

    render: (z, rest, images) -> pixels (n, 3, H, W), where `images` says which image each row is of.
    loss: (pixels, images) -> (losses (n,), rewards by name); a loss that is NaN costs its sample.
    estimator: a name in `ESTIMATORS`.
    mu: standard deviation of the perturbations, in units of the noise or, for hybrid_image, of pixels in [-1, 1].
    num_samples: q, perturbed samples per image.
    draw: (image, step, index, shape) -> standard normal on the CPU; it depends on nothing else.
    batch_size: the most samples that are rendered at once.
    antithetic: samples in pairs z +- mu xi; their differences are central, which takes out every even order.
    pad: fill up batches to batch_size. In half precision the path of a sample, and so its rounding, depends on the
        size of its batch, and what is wanted is a small difference between two samples.
    idle: which rows of z have no effect on the image, such as the last step's; they are not perturbed.
    team: the processes that share the samples. The first of them is called; the others `serve`.
    backprop_cost: what the first one does in addition for each image, in samples: with hybrid it gets that many fewer.
    max_bad_samples: that many consecutive samples without a finite reward end the run.
    """

    no_gradient = "no perturbed sample changed it; raise --mu or --num_samples"

    def __init__(
        self, render, loss, estimator, *, mu, num_samples, draw, batch_size=4, antithetic=False, pad=False,
        idle=(), team=None, backprop_cost=3.0, max_bad_samples=10,
    ):  # fmt: skip
        self.render, self.loss, self.estimator = render, loss, ESTIMATORS[estimator]
        self.mu, self.num_samples, self.draw, self.batch_size = mu, num_samples, draw, batch_size
        self.antithetic, self.pad, self.idle = antithetic, pad, list(idle)
        self.team = Team() if team is None else team
        self.backprop_cost, self.max_bad_samples = backprop_cost, max_bad_samples
        self.bad_in_a_row = 0

    def __call__(self, z, rest, images, step=0):
        self.team.send_task(torch.cat([z, rest]) if self.team.size > 1 else z, images, step)
        return self.estimator(_Work(self, z, rest, list(images), step))

    def serve(self, num_free):
        """Take part in the first process's estimates until it is done. num_free: N, the length of z."""
        while (task := self.team.receive_task()) is not None:
            noise, images, step = task
            if images:  # none: the leader is busy with something else, and alive
                self.estimator(_Work(self, noise[:num_free], noise[num_free:], images, step))

    def count_bad(self, bad, step, images):
        """Warn of lost samples, and end the run at too many in a row. bad: (B, q) booleans, in sample order."""
        for image, row in zip(images, bad.tolist()):
            if any(row):
                warnings.warn(f"iteration {step}: image {image} lost {sum(row)} of {len(row)} samples", stacklevel=4)
            for is_bad in row:
                self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
                if self.bad_in_a_row >= self.max_bad_samples:
                    raise UserError(
                        f"iteration {step}: {self.bad_in_a_row} consecutive samples without a finite reward "
                        "(--max_bad_samples); mend the reward, or lower --mu or --lr"
                    )


def sum_of_products(samples, losses, loss, points, origin, antithetic=False):
    """(the sums over j of (loss_j - loss)(p_j - p) for each row (B, ...), how many there are (B,)), of finite losses.

    samples: (row, j) of each, in order; antithetic pairs stand side by side, and their central differences count.
    losses, points: of the samples. loss: (B,), origin: (B, ...), of what they are compared with.
    """
    sums, counts = torch.zeros_like(origin), torch.zeros_like(loss)
    found = list(zip(samples, losses, points))
    if antithetic:
        for ((row, _), ahead, p_ahead), (_, behind, p_behind) in zip(found[::2], found[1::2]):
            if ahead.isfinite() and behind.isfinite():
                sums[row] += (ahead - behind) / 2 * (p_ahead - p_behind) / 2
                counts[row] += 1
    else:
        for (row, _), value, point in found:
            if value.isfinite():
                sums[row] += (value - loss[row]) * (point - origin[row])
                counts[row] += 1
    return sums, counts


class _Work:
    """One estimate, as one process sees it: its own samples, and its part of what all of them do together.

    A sample is (row, j): the j-th of the row-th image of the batch.
    """

    def __init__(self, source, z, rest, images, step):
        self.source, self.z, self.rest, self.images, self.step = source, z, rest, images, step
        self.rows, self.leads, self.rewards = list(range(len(images))), source.team.leads, None
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

    # Perturbing

    def perturbations(self, chunk, shape, dim):
        """mu xi_j of the samples of a chunk, stacked along `dim`; antithetic pairs have one xi, with both signs."""
        moves = []
        for row, j in chunk:
            index, sign = (j // 2, 1 - 2 * (j % 2)) if self.source.antithetic else (j, 1)
            moves.append(sign * self.source.draw(self.images[row], self.step, index, shape))
        return self.source.mu * torch.stack(moves, dim).to(self.z.device, self.z.dtype)

    def perturbed_noise(self, chunk):
        """(z (N, n, C, h, w), moved; rest (M, n, C, h, w))."""
        rows = self.rows_of(chunk)
        moves = self.perturbations(chunk, (len(self.z), *self.z.shape[2:]), 1)
        moves[self.source.idle] = 0
        return self.z[:, rows] + moves, self.rest[:, rows]

    def perturbed_images(self, x, chunk):
        return x[self.rows_of(chunk)] + self.perturbations(chunk, tuple(x.shape[1:]), 0)

    # Rendering and rating

    @torch.no_grad()
    def render(self, z, rest, rows):
        """Pixels of n noises, at most batch_size at once."""
        size, pixels = self.source.batch_size, []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = part + part[-1:] * (size - len(part)) if self.source.pad else part
            index = list(range(start, start + len(part))) + [start + len(part) - 1] * (len(filled) - len(part))
            images = [self.images[row] for row in filled]
            pixels.append(self.source.render(z[:, index], rest[:, index], images)[: len(part)])
        return torch.cat(pixels)

    @torch.no_grad()
    def rate(self, pixels, rows):
        """Losses (n,) of pixels (n, 3, H, W)."""
        losses, rewards = self.source.loss(pixels, [self.images[row] for row in rows])
        self.rewards = self.rewards or rewards  # the reference is rated first
        return losses

    # The leader's

    def forward(self):
        """z as a leaf, and the images with a graph to it."""
        if self.leads:
            with torch.enable_grad():
                leaf = self.z.detach().requires_grad_()
                return leaf, self.source.render(leaf, self.rest, self.images)

    def render_reference(self):
        """The images (B, 3, H, W) that the samples are compared with, rendered as they are."""
        return self.render(self.z, self.rest, self.rows) if self.leads else None

    def reference(self, pixels):
        """The reference images, and their losses."""
        return (pixels, self.rate(pixels, self.rows)) if self.leads else (None, None)

    def pull_back(self, graph, direction):
        """The gradient in z of <g, x>, with g of norm 1 for each image: (N, B, C, h, w)."""
        if self.leads:
            norm = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            return pull_back(*graph, direction / (norm + 1e-3))

    def estimate(self, pixels, losses, gradient):
        return Estimate(pixels, losses, self.rewards, gradient) if self.leads else None

    # Together

    def share(self, reference):
        """The reference, for every process."""
        return tuple(self.source.team.broadcast(part) for part in reference)

    def mean_product(self, losses, loss, points, origin):
        """mean_j (loss_j - loss)(p_j - p) / mu^2 over the good samples of all processes: (B, ...), the leader's.

        An image without a good sample has NaN.
        """
        bad = torch.zeros(len(self.images), self.source.num_samples, dtype=loss.dtype, device=loss.device)
        for (row, j), value in zip(self.samples, losses):
            bad[row, j] = float(not value.isfinite())
        sums, counts = sum_of_products(self.samples, losses, loss, points, origin, self.source.antithetic)
        sums, counts, bad = (self.source.team.sum(part) for part in (sums, counts, bad))
        if not self.leads:
            return None
        self.source.count_bad(bad > 0, self.step, self.images)
        return sums / counts.view(-1, *[1] * (sums.dim() - 1)) / self.source.mu**2
