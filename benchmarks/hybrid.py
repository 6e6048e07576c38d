"""The gradient estimators: samples a second on one and two processes, agreement with the true gradient, reward in time.

    python benchmarks/hybrid.py                        # all three; Linux, two idle cores
    python benchmarks/hybrid.py --only speed           # 3 minutes
    python benchmarks/hybrid.py --only cosine --fast   # a rough look

speed    Every rank is a process of one thread on a core of its own. The first iteration warms up; figures are medians
         of the others. Efficiency is the rate on two ranks over twice the rate on one.
cosine   Cosine between the estimated and the true gradient of rewards that have one, at an unaligned noise. The samples
         of the largest q are drawn once for each mu; a smaller q is the mean over disjoint parts of them.
reward   JPEG size against the CPU seconds of one thread, which other jobs on the machine hardly change.

The embedded model on the CPU; markdown tables to standard output, pictures to --pictures.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import ROOT, machine, print_table

import rewards
from dno.alignment import align
from dno.methods.estimation import ESTIMATORS
from dno.methods.gradients import Backpropagation, with_graph
from dno.models.loading import load_model
from dno.noise import draw_noise
from dno.objectives import Losses, parse_objectives
from dno.report.figures import BLUE, GREEN, GREY, INK, ORANGE
from dno.settings import Settings
from dno.task import Loaded, Problem
from dno.team import join_team

COLOURS = {"hybrid": BLUE, "hybrid_image": ORANGE, "zo": GREEN}
MARKS = {"hybrid": "o", "hybrid_image": "s", "zo": "^"}
CPU = torch.device("cpu")


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(args):
    """Print samples a second of one and two ranks."""
    costs = [{"num_samples": q, "backprop_cost": cost} for q, cost in product(args.q, args.backprop_cost)]
    one = dict(zip(args.q, seconds_an_iteration(1, [{"num_samples": q} for q in args.q], args)))
    two = seconds_an_iteration(2, costs, args)
    print(f"Speed: {args.num_steps} steps, batches of {args.batch_per_device}, {machine(CPU)}, a core a rank\n")
    print_table(
        ["q", "--backprop_cost", "1 rank: s", "samples/s", "2 ranks: s", "samples/s", "efficiency"],
        [speed_row(run["num_samples"], run["backprop_cost"], one[run["num_samples"]], s) for run, s in zip(costs, two)],
    )


def speed_row(q, cost, one, two):
    """A line of the table, from the seconds of an iteration on one and on two ranks."""
    return [
        q, f"{cost:g}", f"{one:.2f}", f"{q / one:.2f}", f"{two:.2f}", f"{q / two:.2f}", f"{one / (2 * two):.2f}",
    ]  # fmt: skip


def seconds_an_iteration(ranks, runs, args):
    """The median of each of the runs, which the same `ranks` processes make one after another."""
    common = {"num_steps": args.num_steps, "batch_per_device": args.batch_per_device, "opt_steps": args.repeats + 1}
    command = [sys.executable, __file__, "--worker", json.dumps([{**common, **run} for run in runs])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    cores, processes = os.sched_getaffinity(0), []
    for rank, core in zip(range(ranks), sorted(cores), strict=False):
        os.sched_setaffinity(0, {core})  # which a child inherits
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment | own, stdout=subprocess.PIPE, text=True))
    os.sched_setaffinity(0, cores)
    try:
        if len(processes) < ranks:
            raise SystemExit(f"{ranks} ranks want a core each; {len(cores)} may be used")
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise SystemExit(f"rank {failed[0]} failed")
    return json.loads(outputs[0].splitlines()[-1])


def work(runs):
    """A rank: take part in every run; the first prints the median seconds of each."""
    team, loaded, medians = join_team("cpu", 600), Loaded(), []
    try:
        for run in runs:
            settings = {"estimator": "hybrid", "objective": "jpeg", "device": "cpu", **run}
            result = align("sprites", team=team, loaded=loaded, **settings)
            if team.leads:
                medians.append(statistics.median(metrics["seconds"] for metrics in result.metrics[1:]))
        if team.leads:
            print(json.dumps(medians))
    finally:
        if team.size > 1:
            team.close()


# --- cosine ----------------------------------------------------------------------------------------------------------


def cosine(args):
    """Print the cosines of every estimator against q and mu, and plot them."""
    began = time.process_time()
    problem = make_problem(load_model("sprites", device=CPU), args.num_steps, args.batch_per_device)
    found = [cosines(problem, seed, args.mu, args.q, args.rewards) for seed in args.seeds]
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


def make_problem(model, num_steps, batch_size, prompt="white duck"):
    """A loaded problem whose graphs are kept, since several directions are pulled back through each."""
    settings = Settings(
        model=model.name, prompt=prompt, num_steps=num_steps, checkpointing="none", batch_per_device=batch_size
    )
    problem = Problem(settings.resolve(), loaded=Loaded(model))
    problem.load()
    return problem


def cosines(problem, seed, mus, counts, names):
    """Cosines by (reward, estimator, pairs or not, mu, q), and their limits by (reward, estimator, "limit").

    counts: the q, each a divisor of the largest, even.
    """
    noise, most = noise_of(problem, seed), max(counts)
    shape = len(noise[problem.free]), *noise.shape[2:]  # (N, C, h, w)
    losses = {name: reward_loss(name, problem) for name in names}
    x, pull_back = render(problem, noise), transposed_jacobian(problem, noise)
    sources = {name: Backpropagation(problem.render, losses[name], problem.free) for name in names}
    true = {name: source(noise, [0]).gradient[:, 0] for name, source in sources.items()}
    found = {}
    for name, gradient in true.items():
        limit = similarity(pull_back(jacobian_product(problem, noise, gradient))[0], gradient)
        found |= {(name, "hybrid", "limit"): limit, (name, "hybrid_image", "limit"): 1.0, (name, "zo", "limit"): 1.0}
    for mu in mus:
        generator = torch.Generator().manual_seed(seed)
        xi = mu * torch.randn(most, *shape, generator=generator)
        pixel_xi = mu * torch.randn(most, *x.shape[1:], generator=generator)
        ahead = render(problem, moved(problem, noise, xi))
        behind = render(problem, moved(problem, noise, -xi[: most // 2]))
        image_ahead, image_behind = x + pixel_xi, x - pixel_xi[: most // 2]
        zero = torch.zeros(1, *shape)
        samples = {  # images and the points that made them, of the samples and of their opposites, and the origin
            "hybrid": (ahead, ahead, behind, behind, x),
            "hybrid_image": (image_ahead, image_ahead, image_behind, image_behind, x),
            "zo": (ahead, xi, behind, -xi[: most // 2], zero),
        }
        for (estimator, sample), name, pairs in product(samples.items(), names, (False, True)):
            images, points, opposites, opposite_points, origin = sample
            loss, first, second = (losses[name](part, [0] * len(part))[0] for part in (x, images, opposites))
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


def noise_of(problem, seed):
    """(T + 1, 1, C, h, w), the start of a run with this seed."""
    return draw_noise([seed], problem.settings.num_steps, problem.latent_shape[1:])


def reward_loss(name, problem):
    """(pixels, images) -> (losses, rewards by name), as gradient sources take it."""
    losses = Losses(parse_objectives([name], rewards.RFUNCTIONS), torch.float32, problem.device)
    return lambda pixels, images: losses(pixels, [problem.settings.prompt] * len(images))


def moved(problem, noise, steps):
    """The noise with its free part moved by each step (n, N, C, h, w): (T + 1, n, C, h, w)."""
    noise = noise.repeat(1, len(steps), 1, 1, 1)
    noise[problem.free] += steps.transpose(0, 1)
    return noise


@torch.no_grad()
def render(problem, noise):
    """(T + 1, n, C, h, w) -> (n, 3, H, W), a few at once."""
    size = problem.settings.batch_per_device
    return torch.cat([problem.render(part.unbind(), [0] * part.shape[1]) for part in noise.split(size, dim=1)])


def products(losses, loss, points, origin):
    """(losses_j - loss)(p_j - p), sample by sample: (n, ...)."""
    return (losses - loss).view(-1, *[1] * (points.dim() - 1)) * (points - origin)


def means_of_parts(values, length, most=2):
    """Means of the first parts of `length` consecutive rows, at most `most` of them."""
    parts = min(most, len(values) // length)
    return values[: parts * length].unflatten(0, (parts, length)).mean(dim=1)


def transposed_jacobian(problem, noise):
    """Directions g (n, 3, H, W) -> the gradients of <g, x> in the free noises (n, N, C, h, w); one graph serves all."""
    size = problem.settings.batch_per_device
    leaves, pixels = with_graph(problem.render, noise.repeat(1, size, 1, 1, 1), [0] * size, problem.free)

    def pull_back(directions):
        found = []
        for part in directions.split(size):
            filled = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            gradient = torch.autograd.grad(
                pixels, leaves, filled, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(torch.stack(gradient, dim=1)[: len(part)])
        return torch.cat(found)

    return pull_back


def jacobian_product(problem, noise, direction, size=0.1):
    """J d by a central difference of norm `size` to both sides: d (N, C, h, w) -> (1, 3, H, W).

    J^T J grad is what `hybrid` converges to for small mu.
    """
    length = direction.norm()
    step = size / length * direction.unsqueeze(0)
    ahead, behind = render(problem, moved(problem, noise, torch.cat([step, -step])))
    return (ahead - behind).unsqueeze(0) * length / (2 * size)


def similarity(a, b):
    """The cosine of two tensors."""
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


def plot_cosines(table, args):
    """Cosine against q (above) and mu (below), a column for each reward."""
    from matplotlib.figure import Figure

    names = args.rewards
    figure = Figure(figsize=(4.2 * len(names), 7), dpi=120, layout="constrained")
    plots = figure.subplots(2, len(names), sharey=True, squeeze=False)
    for column, name in enumerate(names):
        for row, (values, fixed) in enumerate(((args.q, f"mu {args.shown_mu:g}"), (args.mu, f"q {args.shown_q}"))):
            plot = plots[row, column]
            for estimator, pairs in product(ESTIMATORS, (False, True)):
                keys = [(args.shown_mu, v) if row == 0 else (v, args.shown_q) for v in values]
                plot.plot(
                    values, [table[name, estimator, pairs, *key] for key in keys], marker=MARKS[estimator], ms=5,
                    color=COLOURS[estimator], ls="-" if pairs else (0, (3, 2)), mfc=None if pairs else "white",
                    label=estimator + (", pairs" if pairs else ""),
                )  # fmt: skip
            limit = table[name, "hybrid", "limit"]
            plot.axhline(limit, color=BLUE, lw=1, ls=(0, (1, 2)), label="hybrid, its limit")
            plot.set_xscale("log", base=2 if row == 0 else 10)
            plot.set_title(f"{name}, {fixed}", size=11, color=INK, loc="left")
            plot.set_xlabel("samples q" if row == 0 else "mu", color=GREY)
            if row == 0:
                plot.set_xticks(values, [str(v) for v in values])
            dress(plot)
        plots[0, 0].set_ylabel("cosine with the true gradient", color=GREY)
        plots[1, 0].set_ylabel("cosine with the true gradient", color=GREY)
    handles, labels = plots[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, args.pictures / "hybrid-cosine.png")


# --- reward ----------------------------------------------------------------------------------------------------------


def reward(args):
    """Print the JPEG size of every estimator after equal CPU seconds, and plot it."""
    model, curves = load_model("sprites", device=CPU), {}
    for estimator, seed in product(ESTIMATORS, args.seeds):
        curves.setdefault(estimator, []).append(reward_curve(model, estimator, seed, args))
        print(f"{estimator}, seed {seed}: {curves[estimator][-1][-1]}", file=sys.stderr, flush=True)
    ends = [curve[-1][0] for each in curves.values() for curve in each]
    times = [args.seconds * part / 4 for part in range(5)]
    print(f"Reward: {args.num_steps} steps, {reward_flags(args)}, {machine(CPU)}; longest run {max(ends):.0f} s\n")
    header = ["estimator", *(f"{t:.0f} s" for t in times), "fall", "judge at the end", "P(z)"]
    rows = []
    for estimator, each in curves.items():
        sizes = [statistics.fmean(best_until(curve, t) for curve in each) for t in times]
        judge, typical = (statistics.fmean(curve[-1][column] for curve in each) for column in (2, 3))
        fall = f"{100 * (1 - sizes[-1] / sizes[0]):.0f} %"
        rows.append([estimator, *(f"{size:.3f}" for size in sizes), fall, f"{judge:.2f}", f"{typical:.2g}"])
    print_table(header, rows)
    plot_rewards(curves, args)


def reward_flags(args):
    return (
        f"q {args.num_samples} in pairs, mu {args.run_mu:g}, spectral steps of {args.lr:g}, gamma {args.gamma:g}, "
        f"seeds {', '.join(map(str, args.seeds))}"
    )


class Enough(Exception):
    """The time is over."""


def reward_curve(model, estimator, seed, args):
    """[(CPU seconds, kilobytes, judge, P(z))], an entry an iteration, until the seconds are over."""
    curve, began = [], time.process_time()

    def enough(metrics):
        seconds = time.process_time() - began
        curve.append((seconds, -metrics["jpeg"], metrics["judge"], metrics["probability"]))
        if seconds > args.seconds:
            raise Enough

    try:
        align(
            model=model, estimator=estimator, objective="jpeg", evaluate=f"{ROOT}/sprites/judge.py:judge_loss_fn",
            seed=seed, num_steps=args.num_steps, num_samples=args.num_samples, mu=args.run_mu, lr=args.lr,
            precondition="spectral", gamma=args.gamma, batch_per_device=args.batch_per_device, antithetic=True,
            opt_steps=10**6, callback=enough,
        )  # fmt: skip
    except Enough:
        pass
    return curve


def best_until(curve, seconds):
    """The smallest size that was seen by then; the start's where there was no time for another."""
    return min(entry[1] for entry in curve if entry[0] <= max(seconds, curve[0][0]))


def plot_rewards(curves, args):
    """The size of each run (pale) and the mean of each estimator's smallest so far (bold)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    plot, times = figure.subplots(), np.linspace(0, args.seconds, 200)
    for estimator, each in curves.items():
        for curve in each:
            plot.plot([e[0] for e in curve], [e[1] for e in curve], color=COLOURS[estimator], lw=0.9, alpha=0.35)
        mean = [statistics.fmean(best_until(curve, t) for curve in each) for t in times]
        plot.plot(times, mean, color=COLOURS[estimator], lw=2.2, label=estimator)
    plot.set_xlim(0, args.seconds)
    plot.set_xlabel("CPU seconds", color=GREY)
    plot.set_ylabel("JPEG size, kilobytes", color=GREY)
    plot.set_title("pale: each seed; bold: mean of the smallest so far", size=11, color=INK, loc="left")
    plot.legend(frameon=False)
    dress(plot)
    save(figure, args.pictures / "hybrid-reward.png")


# --- what they share -------------------------------------------------------------------------------------------------


def dress(plot):
    """Axes as in the runs' own pictures: no box, pale rules."""
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color("#AAAAAA")
    plot.grid(axis="y", color="#E4E4E4", lw=0.8)
    plot.set_axisbelow(True)
    plot.tick_params(labelsize=9, colors=GREY, length=3)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\n{path}\n", flush=True)


PARTS = {"speed": speed, "cosine": cosine, "reward": reward}
FAST = {
    "num_steps": 4, "repeats": 1, "q": [4, 8], "mu": [0.01, 0.1], "shown_mu": 0.01, "shown_q": 8, "seconds": 10,
    "seeds": [0],
}  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--fast", action="store_true", help="few steps, samples and iterations: to see that it runs")
    parser.add_argument("--num_steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--batch_per_device", type=int, default=4)
    parser.add_argument("--q", type=int, nargs="+", help="speed: 32 64; cosine: 4 8 16 32 64 128 256, even, divisors")
    parser.add_argument("--pictures", type=Path, default=Path("."), help="folder for the plots")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    group = parser.add_argument_group("speed")
    group.add_argument("--backprop_cost", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    group.add_argument("--repeats", type=int, default=4, help="iterations that are counted")
    group = parser.add_argument_group("cosine")
    group.add_argument("--mu", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
    group.add_argument("--shown_mu", type=float, default=0.01, help="the mu of the table and plots against q")
    group.add_argument("--shown_q", type=int, default=64, help="the q of the table and plots against mu")
    group.add_argument("--rewards", nargs="+", default=["contrast", "white", "sprites"], help="differentiable ones")
    group = parser.add_argument_group("reward")
    group.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each run")
    group.add_argument("--num_samples", type=int, default=16)
    group.add_argument("--run_mu", type=float, default=0.05)
    group.add_argument("--lr", type=float, default=0.03)
    group.add_argument("--gamma", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", help="cosine: 0; reward: 123 124 125")
    return parser


DEFAULTS = {
    "speed": {"q": [32, 64]},
    "cosine": {"q": [4, 8, 16, 32, 64, 128, 256], "seeds": [0]},
    "reward": {"seeds": [123, 124, 125]},
}


def main(arguments=None):
    args = build_parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    for name in [args.only] if args.only else PARTS:
        given = {key: value for key, value in vars(args).items() if value is not None}
        PARTS[name](SimpleNamespace(**{**DEFAULTS[name], **given, **(FAST if args.fast else {})}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
