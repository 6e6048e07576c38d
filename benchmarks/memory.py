"""Peak memory of an iteration of DNO against the number of sampling steps.

    python benchmarks/memory.py                               # sprites and the tests' tiny pipeline
    python benchmarks/memory.py --models sprites --checkpointing step block --num_steps 10 100
    python benchmarks/memory.py --random_weights --size 512 --device cuda

Each figure is a separate process: load, encode the prompt, note the memory in use, run two iterations of `dno.align`
(two, so that the optimizer's state exists), note the peak; the difference is printed, in MB (10^6 bytes). On a GPU it
counts tensors. On a CPU it counts the process's pages, which an allocator holds on to, so a few MB either way say
nothing; if the system cannot reset its record of the peak, what loading took hides smaller peaks.

"State" is what must grow with the steps, 4 bytes per value: noise, its gradient, AdamW's two moments and the latents
that the sampler visits. The loop holds further copies of it, such as the batch and the best noise so far.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import ROOT, add_model_arguments, benchmark_model, machine, print_table, sampling_settings

from dno.alignment import align
from dno.memory import PeakMemory
from dno.models.specs import resolve_device

TINY = "tests/golden/tiny-sd"
STATE = 5  # tensors of (T + 1, B, C, h, w): noise, gradient, two moments, latents


def current_gb(device):
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9


class ResidentPeak:
    """Peak of the process's resident memory since `reset`, in GB, where the system can reset it (Linux)."""

    def __init__(self):
        self.peak = PeakMemory(torch.device("cpu"))
        self.resettable = False

    def reset(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.resettable = True
        except OSError:
            pass

    def read(self):
        if not self.resettable:
            return self.peak.read()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def measure(args):
    """MB that two iterations take above what was in use before, and MB of the state, of this process."""
    model = benchmark_model(args)
    settings = sampling_settings(args)
    peak = PeakMemory(model.device) if model.device.type == "cuda" else ResidentPeak()
    before = current_gb(model.device)
    peaks = []

    def after_iteration(metrics):
        # On a GPU the loop resets the record at each iteration and reports it; here it is reset once.
        peaks.append(metrics["peak_memory_gb"] if model.device.type == "cuda" else peak.read())

    peak.reset()
    result = align(
        model=model, objective="black", gamma=args.gamma, opt_steps=2, checkpointing=args.checkpointing[0],
        height=args.size, width=args.size, callback=after_iteration, **settings,
    )  # fmt: skip
    print(json.dumps([1e3 * (max(peaks) - before), STATE * 4 * result.noise.numel() / 1e6]))


def in_own_process(args, model, checkpointing, num_steps):
    """What `measure` prints, of a new process."""
    command = [sys.executable, __file__, "--measure", "--models", model, "--num_steps", str(num_steps)]
    command += ["--checkpointing", checkpointing, "--size", str(args.size), "--gamma", str(args.gamma)]
    command += ["--device", args.device, "--precision", args.precision] + ["--random_weights"] * args.random_weights
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--models", nargs="+", default=["sprites", TINY], help="several of --model")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--checkpointing", nargs="+", default=["step", "none"], choices=["step", "none", "block"])
    parser.add_argument("--size", type=int, default=64, help="height and width of the image in pixels")
    parser.add_argument("--gamma", type=float, default=1.0, help="0 leaves the regularizer's backward pass out")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        args.model, args.num_steps = args.models[0], args.num_steps[0]
        args.model = str(ROOT / TINY) if args.model == TINY else args.model
        return measure(args)

    print(f"MB above the memory in use before the run; {machine(resolve_device(args.device))}\n")
    rows = []
    for model in ["Stable Diffusion 1.5's sizes"] if args.random_weights else args.models:
        for checkpointing in args.checkpointing:
            figures = [in_own_process(args, model, checkpointing, steps) for steps in args.num_steps]
            peaks, states = zip(*figures)
            name = "tiny pipeline" if model == TINY else model
            rows.append([f"{name}, {checkpointing}", *(f"{peak:.0f}" for peak in peaks)])
        rows.append([f"{name}: state", *(f"{state:.1f}" for state in states)])
    print_table(["checkpointing", *(f"{steps} steps" for steps in args.num_steps)], rows)


if __name__ == "__main__":
    main()
