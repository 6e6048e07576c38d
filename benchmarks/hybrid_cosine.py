"""Cosine between the estimated and the true gradient, for `hybrid.py`: every estimator against q and mu.

All noises are free here (eta 1, every step), so a noise z is all of it: (T + 1, B, C, h, w).
"""

import statistics
import time
from itertools import product

import torch
from common import machine, make_task, print_table
from hybrid_plots import plot_cosines

from dno.methods.estimation import ESTIMATORS
from dno.methods.gradients import Backpropagation
from dno.models.loading import load_model
from dno.noise import draw_noise

CPU = torch.device("cpu")


def cosine(args):
    """Print the cosines of every estimator against q and mu, and plot them."""
    began = time.process_time()
    model, settings = load_model("sprites", device=CPU), {"num_steps": args.num_steps, "prompt": "white duck"}
    tasks = {name: make_task("dno", model, objective=name, **settings) for name in args.rewards}
    found = [cosines(tasks, seed, args.mu, args.q, args.batch_per_device) for seed in args.seeds]
    table = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
    seconds = time.process_time() - began
    starts = f"{len(args.seeds)} start{'s' * (len(args.seeds) > 1)}"
    print(f'Cosine: "white duck", {args.num_steps} steps, {starts}, {machine(CPU)}, {seconds:.0f} CPU seconds\n')
    mu, q = args.shown_mu, args.shown_q
    kinds = list(product(args.rewards, ESTIMATORS, (False, True)))
    names = [f"{reward}, {estimator}{', pairs' * pairs}" for reward, estimator, pairs in kinds]
    print(f"Against q at mu {mu:g}; limit: q without end and mu towards 0\n")
    rows = [
        [name, *(f"{table[*kind, mu, count]:.2f}" for count in args.q), f"{table[kind[0], kind[1], 'limit']:.2f}"]
        for name, kind in zip(names, kinds)
    ]
    print_table(["reward, estimator", *map(str, args.q), "limit"], rows)
    print(f"\nAgainst mu at q {q}\n")
    rows = [[name, *(f"{table[*kind, size, q]:.2f}" for size in args.mu)] for name, kind in zip(names, kinds)]
    print_table(["reward, estimator", *(f"{size:g}" for size in args.mu)], rows)
    plot_cosines(table, args)


def cosines(tasks, seed, mus, counts, batch_size):
    """Cosines by (reward, estimator, pairs or not, mu, q), and their limits by (reward, estimator, "limit").

    tasks: one per reward, by its name, of the same model, prompt and steps; all of them render alike.
    counts: the q, each a divisor of the largest, even. batch_size: the most images that are rendered at once.
    """
    most, task = max(counts), next(iter(tasks.values()))
    z = draw_noise([seed], task.schedule.num_steps, task.latent_shape[1:])
    shape = len(z), *z.shape[2:]  # (T + 1, C, h, w)
    x, pull_back = render(task, z, batch_size), transposed_jacobian(task, z, batch_size)
    true = {name: true_gradient(each, z)[:, 0] for name, each in tasks.items()}
    found = {}
    for name, gradient in true.items():
        limit = similarity(pull_back(jacobian_product(task, z, gradient, batch_size))[0], gradient)
        found |= {(name, "hybrid", "limit"): limit, (name, "hybrid_image", "limit"): 1.0, (name, "zo", "limit"): 1.0}
    for mu in mus:
        generator = torch.Generator().manual_seed(seed)
        xi = mu * torch.randn(most, *shape, generator=generator)
        pixel_xi = mu * torch.randn(most, *x.shape[1:], generator=generator)
        ahead = render(task, moved(z, xi), batch_size)
        behind = render(task, moved(z, -xi[: most // 2]), batch_size)
        image_ahead, image_behind = x + pixel_xi, x - pixel_xi[: most // 2]
        zero = torch.zeros(1, *shape)
        samples = {  # images and the points that made them, of the samples and of their opposites, and the origin
            "hybrid": (ahead, ahead, behind, behind, x),
            "hybrid_image": (image_ahead, image_ahead, image_behind, image_behind, x),
            "zo": (ahead, xi, behind, -xi[: most // 2], zero),
        }
        for (estimator, sample), name, pairs in product(samples.items(), tasks, (False, True)):
            images, points, opposites, opposite_points, origin = sample
            loss, first, second = (tasks[name].losses(part, [0] * len(part))[0] for part in (x, images, opposites))
            if pairs:
                each = products(first[: most // 2], second, points[: most // 2], opposite_points) / 4
            else:
                each = products(first, loss, points, origin)
            means = [means_of_parts(each, count // (1 + pairs)) for count in counts]
            gradients = torch.cat(means) if estimator == "zo" else pull_back(torch.cat(means))
            for count, part in zip(counts, gradients.split([len(mean) for mean in means])):
                values = [similarity(gradient, true[name]) for gradient in part]
                found[name, estimator, pairs, mu, count] = statistics.fmean(values)
    return found


def true_gradient(task, z):
    """That of the task's loss in the noise of one image, as z: (T + 1, 1, C, h, w)."""
    source = Backpropagation(lambda z, rest, rows: task.render(z.unbind(), rows), task.losses)
    return source(z, z[:0], [0]).gradient


def moved(z, steps):
    """The noise with each step (n, T + 1, C, h, w) added: (T + 1, n, C, h, w)."""
    return z + steps.transpose(0, 1)


@torch.no_grad()
def render(task, noise, batch_size):
    """(T + 1, n, C, h, w) -> (n, 3, H, W), a few at once."""
    return torch.cat([task.render(part.unbind(), [0] * part.shape[1]) for part in noise.split(batch_size, dim=1)])


def products(losses, loss, points, origin):
    """(losses_j - loss)(p_j - p), sample by sample: (n, ...)."""
    return (losses - loss).view(-1, *[1] * (points.dim() - 1)) * (points - origin)


def means_of_parts(values, length, most=2):
    """Means of the first parts of `length` consecutive rows, at most `most` of them."""
    parts = min(most, len(values) // length)
    return values[: parts * length].unflatten(0, (parts, length)).mean(dim=1)


def transposed_jacobian(task, z, batch_size):
    """Directions g (n, 3, H, W) -> the gradients of <g, x> in the noise (n, T + 1, C, h, w); one graph serves all."""
    leaf = z.repeat(1, batch_size, 1, 1, 1).requires_grad_()
    pixels = task.render(leaf.unbind(), [0] * batch_size)

    def pull_back(directions):
        found = []
        for part in directions.split(batch_size):
            filled = torch.cat([part, part.new_zeros(batch_size - len(part), *part.shape[1:])])
            (gradient,) = torch.autograd.grad(pixels, leaf, filled, retain_graph=True)
            found.append(gradient.transpose(0, 1)[: len(part)])
        return torch.cat(found)

    return pull_back


def jacobian_product(task, z, direction, batch_size, size=0.1):
    """J d by a central difference of norm `size` to both sides: d (T + 1, C, h, w) -> (1, 3, H, W).

    J^T J grad is what `hybrid` converges to for small mu.
    """
    length = direction.norm()
    step = size / length * direction.unsqueeze(0)
    ahead, behind = render(task, moved(z, torch.cat([step, -step])), batch_size)
    return (ahead - behind).unsqueeze(0) * length / (2 * size)


def similarity(a, b):
    """The cosine of two tensors."""
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()
