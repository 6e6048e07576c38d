"""Seconds per iteration of DNO, split into its parts, and the overhead factor.

    python benchmarks/step_time.py                                  # sprites, with and without checkpointing
    python benchmarks/step_time.py --num_steps 50 --checkpointing step none block
    python benchmarks/step_time.py --random_weights --device cuda   # Stable Diffusion 1.5's sizes on a GPU

    overhead factor = seconds per iteration / (num_steps x seconds of one guided denoiser call without gradient)

The iterations are those of `dno.align`, without its files. After each of them the denoiser is called num_steps times
without gradient, so that both see the same machine: the factor is the median of the iterations' own ratios. The first
iteration warms up and is not counted. Other figures are medians too, in seconds, of one iteration: sampling, decoding
and reward forward; backward through all of them; the regularizer, forward and backward, called once more by itself on
the same noise; the rest is what is left.
"""

import argparse
import contextlib
import statistics
import time
from collections import Counter
from functools import wraps

import torch
from common import add_model_arguments, benchmark_model, machine, make_task, print_table, sampling_settings, synchronize

from dno.methods import method_class
from dno.noise import PERMUTATIONS, keyed_generator
from dno.regularization import probability_penalty

PARTS = ("sampling", "decoding", "reward", "backward", "regularizer")


class Stopwatch:
    """Adds up the seconds of functions, each less those of the timed functions that it calls."""

    def __init__(self, device):
        self.device, self.seconds, self.inner = device, Counter(), 0.0

    def timed(self, part, function):
        """The function, with its seconds added to `seconds[part]`."""

        @wraps(function)
        def timed(*args, **kwargs):
            outer, self.inner = self.inner, 0.0
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = self.now() - start
                self.seconds[part] += seconds - self.inner
                self.inner = outer + seconds

        return timed

    def now(self):
        synchronize(self.device)
        return time.perf_counter()


def iterations(model, args, checkpointing):
    """One dict per iteration after the first: seconds of each part, of all, and of one guided call."""
    settings = {
        "prompt": args.prompt, "objective": args.objective, "gamma": args.gamma, "eta": args.eta,
        "batch_size": args.batch_size, "height": args.height, "width": args.width, "opt_steps": args.repeats + 1,
        "checkpointing": checkpointing, **sampling_settings(args),
    }  # fmt: skip
    watch, decode, measured = Stopwatch(model.device), model.decode, []
    with make_task("dno", model, **settings) as task, contextlib.ExitStack() as stack:
        stack.callback(setattr, model, "decode", decode)
        model.decode = watch.timed("decoding", decode)
        task.render, task.losses = watch.timed("sampling", task.render), watch.timed("reward", task.losses)
        method = method_class("dno")(task)
        # What is left of a gradient when the images and their losses are there.
        method.source = watch.timed("backward", method.source)
        state = method.start()
        watch.seconds.clear()
        start = watch.now()
        for _ in method.iterations(state):
            seconds, parts = watch.now() - start, dict(watch.seconds)
            parts |= {"regularizer": regularizer_seconds(watch, state, task.settings)}
            measured.append({**parts, "iteration": seconds, "call": call_seconds(watch, task)})
            watch.seconds.clear()
            start = watch.now()
    return measured[1:]


def regularizer_seconds(watch, state, settings):
    """Seconds of the penalty, and of its gradient if gamma wants one."""
    rows = list(range(settings.batch_size))
    z = state.z(rows).requires_grad_(settings.gamma != 0)
    generators = [keyed_generator(PERMUTATIONS, settings.seed + b, state.step) for b in rows]
    start = watch.now()
    penalty = probability_penalty(z, generators, settings.subsample, settings.permutations)
    if settings.gamma:
        torch.autograd.grad(penalty.sum(), z)
    return watch.now() - start


@torch.no_grad()
def call_seconds(watch, task):
    """Seconds of one guided call without gradient: the mean over the points of the schedule."""
    x = torch.randn(task.latent_shape, device=task.device, dtype=task.state_dtype)
    start = watch.now()
    for point in task.schedule:
        task.model.denoise(x, point, task.conditioning, task.settings.guidance_scale)
    return (watch.now() - start) / len(task.schedule)


def row(checkpointing, measured, num_steps):
    """One line of the table."""

    def median(value):
        return statistics.median(value(iteration) for iteration in measured)

    factors = [one["iteration"] / (num_steps * one["call"]) for one in measured]
    return [
        checkpointing,
        f"{median(lambda one: one['iteration']):.3f}",
        *(f"{median(lambda one, part=part: one[part]):.3f}" for part in PARTS),
        f"{median(lambda one: one['iteration'] - sum(one[part] for part in PARTS)):.3f}",
        f"{median(lambda one: one['call']):.4f}",
        f"{statistics.median(factors):.2f} ({min(factors):.2f}-{max(factors):.2f})",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="white duck")
    parser.add_argument("--objective", default="black")
    parser.add_argument("--num_steps", type=int, help="default: the model's own (sprites 25, others 50)")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=1.0, help="0 leaves the regularizer's backward pass out")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--height", type=int, help="default: the model's own")
    parser.add_argument("--width", type=int)
    parser.add_argument("--checkpointing", nargs="+", default=["step", "none"], choices=["step", "none", "block"])
    parser.add_argument("--repeats", type=int, default=15, help="iterations that are counted")
    args = parser.parse_args()

    model = benchmark_model(args)
    num_steps = sampling_settings(args)["num_steps"]
    name = "Stable Diffusion 1.5's sizes, random weights" if args.random_weights else args.model
    print(f"{name}, {num_steps} steps, batch {args.batch_size}, {model.dtype}, {machine(model.device)}\n")
    rows = [row(way, iterations(model, args, way), num_steps) for way in args.checkpointing]
    header = ["checkpointing", "iteration s", *PARTS, "rest", "guided call", "overhead factor (min-max)"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
