"""Seconds an iteration of DNO, split into its parts, and the overhead factor.

    python benchmarks/step_time.py                                  # sprites, with and without checkpointing
    python benchmarks/step_time.py --num_steps 50 --checkpointing step none block
    python benchmarks/step_time.py --random_weights --device cuda   # Stable Diffusion 1.5's sizes on a GPU

    overhead factor = seconds an iteration / (num_steps x seconds of one guided denoiser call without gradient)

The iterations are those of `dno.align`, which writes no files here. After each of them the denoiser is called num_steps
times without gradient, so that both see the same machine: the factor is the median of the iterations' own ratios. The
first iteration warms up and is not counted. Other figures are medians too, in seconds, of one iteration.
"""

import argparse
import statistics
import time
from collections import Counter
from functools import wraps
from unittest import mock

import torch
from common import add_model_arguments, benchmark_model, machine, print_table, sampling_settings, synchronize

import dno.alignment
import dno.methods.gradients
import dno.methods.noise_optimization
from dno.alignment import align

PARTS = ("sampling", "decoding", "reward", "backward", "regularizer")


class Stopwatch:
    """Adds up the seconds of the functions that it times; what one of them calls counts for the outer one."""

    def __init__(self, device):
        self.device, self.seconds, self.busy = device, Counter(), False

    def timed(self, part, function):
        @wraps(function)
        def timed(*args, **kwargs):
            if self.busy:
                return function(*args, **kwargs)
            self.busy = True
            synchronize(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.seconds[part] += time.perf_counter() - start
                self.busy = False

        return timed

    def patch(self, part, owner, name):
        """A context in which `owner.name` is timed."""
        return mock.patch.object(owner, name, self.timed(part, getattr(owner, name)))


def iterations(model, args, checkpointing):
    """One dict an iteration after the first: seconds of each part, of all, and of one guided call."""
    watch = Stopwatch(model.device)
    settings = sampling_settings(args)
    schedule = model.schedule(settings["num_steps"])
    conditioning = model.encode_prompts([args.prompt] * args.batch_size)
    size = args.height or model.default_size[0], args.width or model.default_size[1]
    x = torch.randn(model.latent_shape(args.batch_size, *size), device=model.device)
    measured = []

    @torch.no_grad()
    def after_iteration(metrics):
        parts = {part: watch.seconds[part] for part in PARTS}
        synchronize(model.device)
        start = time.perf_counter()
        for point in schedule:
            model.denoise(x, point, conditioning, settings["guidance_scale"])
        synchronize(model.device)
        call = (time.perf_counter() - start) / schedule.num_steps
        measured.append({**parts, "iteration": metrics["seconds"], "call": call})
        watch.seconds.clear()

    with (
        watch.patch("sampling", dno.alignment, "sample"),
        watch.patch("decoding", model, "decode"),
        watch.patch("reward", dno.alignment.Losses, "__call__"),
        watch.patch("backward", torch.autograd, "grad"),
        watch.patch("regularizer", dno.methods.noise_optimization, "_penalize"),
    ):
        align(
            model=model, prompt=args.prompt, objective=args.objective, gamma=args.gamma, eta=args.eta,
            batch_size=args.batch_size, height=size[0], width=size[1], opt_steps=args.repeats + 1,
            checkpointing=checkpointing, callback=after_iteration, **settings,
        )  # fmt: skip
    return measured[1:]


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
