"""Speed and memory of an iteration at full size, for every plan of memory, with random weights.

    python benchmarks/gpu.py --device cuda --compile --official --output gpu.md --json gpu.json
    python benchmarks/gpu.py --models sdxl --sizes 1024 --plans step split
    python benchmarks/gpu.py --small                                # all of it on a CPU, with tiny networks
    python benchmarks/gpu.py --models sd15 --sizes 64 --num_steps 2 # full size on a CPU, a small image

Stable Diffusion 1.5 and SDXL base are built from their published configurations, on the device; nothing is downloaded.
Random numbers stand in for the text embeddings, so no text encoder is needed. Time and memory do not depend on either.
An iteration is that of the scripts: sampling, decoding, the reward `black`, the gradient in every noise, the
regularizer (gamma 1), clipping, AdamW; eta 1, guidance 5, batch 1.

    plan       what is kept for the backward pass                   guided calls' work an iteration of T steps
    none       every step's graph                                   T forward, T backward
    partial    the graphs of as many steps as fit, k                2T - k forward, T backward
    step       one latent a step                                    2T forward, T backward
    block      the same, and each block is recomputed               3T forward, T backward
    split      the same, and the guidance runs in two halves        3.5T forward, T backward
    skip_unet  the UNet is held constant: not the exact gradient    T forward

    overhead factor = seconds an iteration / (T x seconds of one guided denoiser call without gradient)

FLOPs are those of `torch.utils.flop_counter`: 2 a multiply-add of matrix products, convolutions and attention, the
latter by its plain formula. One guided call (two UNet calls in one batch) and one decoding are counted, forward and
backward, with frozen weights and so without weight gradients, and taken as often as the table above says; the decoder
once forward and once backward, and once more forward where it goes by blocks. So the work that is recomputed counts as
work, and TFLOP/s say how well the card is used, not how useful the work is.

On paper, SDXL at 1024 px: weights are 5.3 GB in bf16. A guided call is 13.5 TFLOP forward and 14.9 backward, 1.10 times
as much, and keeps 10.7 GB; decoding is 10.5 and 11.0 TFLOP and keeps 11 GB, 5.6 of them in its largest block. With step
the factor is 2 + b + 0.03, where b is the time of a call's backward pass over that of its forward pass: 3.4 allows
b = 1.37. In 139 GB some 10 steps keep their graph, and each is worth 0.02: 3.0 allows b = 1.17. The backward pass of
fused attention computes more than the plain formula counts, which makes 1.10 about 1.16, so that is at the edge. The
leanest plan needs the weights, the decoder's largest block and a few gradients of 0.5 GB: about 12.5 GB of 16.

SD 1.5 at 512 px: a guided call is 1.61 and 1.85 TFLOP and keeps 1.6 GB, so that none takes some 83 GB. The official
loop's work is 253 TFLOP of UNet and 131 of decoding, against 178 with none and 258 with step: 0.46 and 0.67 of it,
before what float32 weights under autocast cost. On a card that waits for its launches all of this can shift.

`--official`: the work of the official loop, for SD 1.5: float32 weights under autocast, each guided call in
`torch.utils.checkpoint` (not re-entrant, so that the gradient is right), the image decoded after every step and thrown
away, AdamW, clipping. Those decodings are made without a graph here, and no regularizer is computed, the cheaper choice
for it in both.
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from common import ARCHITECTURES, TINY_ARCHITECTURES, random_model, synchronize
from gpu_page import OFFICIAL, report
from memory import ResidentPeak
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dno.memory import is_out_of_memory
from dno.methods.gradients import Backpropagation
from dno.methods.noise_optimization import begin, optimize_noise
from dno.models.specs import resolve_device, resolve_precision
from dno.noise import draw_noise
from dno.sampling import step
from dno.settings import Settings
from dno.task import Loaded, Problem

# The settings of `align` that make each plan. The first five give the exact gradient.
PLANS = {
    "none": {"checkpointing": "none"},
    "partial": {"checkpointing": "partial"},
    "step": {"checkpointing": "step"},
    "block": {"checkpointing": "block"},
    "split": {"checkpointing": "block", "split_guidance": True},
    "skip_unet": {"checkpointing": "step", "gradient": "skip_unet"},
}
GUIDANCE_SCALE, ETA, GAMMA = 5.0, 1.0, 1.0
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """One row of the table: what is measured, and with which of the command's settings."""

    model: str
    size: int
    plan: str
    compiled: bool
    num_steps: int
    iterations: int
    device: str
    precision: str
    small: bool
    tuning: tuple

    @property
    def architecture(self):
        return (TINY_ARCHITECTURES if self.small else ARCHITECTURES)[self.model]

    @property
    def name(self):
        compiled = ", compiled" if self.compiled else ""
        return f"{self.architecture.title}, {self.size} px, {self.plan}{compiled}"


class Meter:
    """Called after each iteration: the time of the iteration, that of as many guided calls as it has steps, the peak.

    guided_call: called with 0, ..., num_calls - 1. warm_up: iterations that are not counted.
    last: called without arguments; the iteration's reward and gradient norm by name.
    """

    def __init__(self, device, guided_call, num_calls, warm_up, last):
        self.device, self.guided_call, self.num_calls, self.warm_up = device, guided_call, num_calls, warm_up
        self.last, self.measured, self.first = last, [], None
        self.resident = None if device.type == "cuda" else ResidentPeak()
        self.peak = self.reserved = 0.0
        self.began = self._now()

    def __call__(self, index, *_):
        iteration = self._now() - self.began
        last = {name: self.last()[name] for name in ("reward", "grad_norm")}
        _check(**last)
        self.first = self.first or last
        if index >= self.warm_up:
            self._read_peak()
        call = self._calls()
        if index >= self.warm_up:
            self.measured.append((iteration, call, iteration / (self.num_calls * call)))
        self._reset_peak()
        self.began = self._now()

    def figures(self):
        """Medians; the factor is that of the iterations' own factors."""
        seconds, call, factor = (statistics.median(column) for column in zip(*self.measured))
        return {
            "seconds": seconds, "call": call, "factor": factor, "peak": self.peak, "reserved": self.reserved,
            "first": self.first,
        }  # fmt: skip

    @torch.no_grad()
    def _calls(self):
        start = self._now()
        for index in range(self.num_calls):
            self.guided_call(index)
        return (self._now() - start) / self.num_calls

    def _now(self):
        synchronize(self.device)
        return time.perf_counter()

    def _reset_peak(self):
        if self.resident:
            self.resident.reset()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    def _read_peak(self):
        if self.resident:
            self.peak, self.reserved = max(self.peak, self.resident.read()), None
        else:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) / 1e9)
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device) / 1e9)


def measure(job):
    """The figures of one row. Raises what an allocator raises, and ArithmeticError for a gradient of NaN or zero."""
    official = job.plan == OFFICIAL
    precision = resolve_precision(job.precision, resolve_device(job.device))
    model = built(job, torch.float32 if official else precision)
    figures = (_measure_official if official else _measure_plan)(job, model, precision)
    work = tera_flops(job.architecture, job.size, figures["calls"])
    return {**figures, "tflop": work, "tflops": work / figures["seconds"]}


_BUILT = {}


def built(job, dtype):
    """The model of a job; the newest is kept for the next one."""
    # Compiled anew for another size or batch, because otherwise its kernels become general, and slower.
    compiled_for = (job.size, job.plan == "split") if job.compiled else None
    key = job.architecture, dtype, job.device, compiled_for, job.tuning
    if key not in _BUILT:
        _BUILT.clear()
        forget()
        model = random_model(job.architecture, dtype, resolve_device(job.device))
        if "channels_last" in job.tuning:
            model.network.to(memory_format=torch.channels_last)
            model.vae.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = "cudnn_benchmark" in job.tuning
        if job.compiled:
            torch._dynamo.reset()
            # A split plan beside the guided call in one batch has more variants of a block than are allowed by default.
            torch._dynamo.config.recompile_limit = 64
            model.compile_blocks()
        _BUILT[key] = model
    return _BUILT[key]


def forget():
    """Give back what an earlier measurement, or its failure, has left on the card."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _measure_plan(job, model, precision):
    warm_up = 2 if job.compiled else 1  # compiled code may be compiled again when it is met a second time
    settings = Settings(
        model=model.name, height=job.size, width=job.size, num_steps=job.num_steps, eta=ETA, gamma=GAMMA,
        guidance_scale=GUIDANCE_SCALE, opt_steps=warm_up + job.iterations, objective="black", output=None,
        **PLANS[job.plan],
    )  # fmt: skip
    problem = Problem(settings.resolve(), loaded=Loaded(model))
    try:
        problem.load()
        # Not the problem's own source, which would go on with a leaner plan where memory does not suffice.
        source = Backpropagation(problem.render, problem.losses, problem.free)
        states = begin(problem.starting_noise(), problem.make_optimizer)
        guided_call = _guided_call(model, problem.conditioning, problem.schedule, job.size)
        meter = Meter(model.device, guided_call, job.num_steps, warm_up, lambda: states[0].last)
        optimize_noise(
            source, states, problem.free, problem.regularizer, gamma=settings.gamma, opt_steps=settings.opt_steps,
            report=meter,
        )  # fmt: skip
    finally:
        problem.release()
    return {**meter.figures(), "calls": work_of(problem.plan, job.num_steps), "described": problem.plan.describe()}


def _measure_official(job, model, precision):
    """The work of the official loop (see the top of the file), in the arithmetic of this project's sampler."""
    schedule, conditioning = model.schedule(job.num_steps), model.encode_prompts(["white duck"])
    shape = model.latent_shape(1, job.size, job.size)
    noise = draw_noise([0], job.num_steps, shape[1:]).to(model.device).requires_grad_()
    optimizer, last = torch.optim.AdamW([noise], lr=0.01, weight_decay=0.01), {}
    autocast = contextlib.nullcontext()
    if precision != torch.float32:
        autocast = torch.autocast(model.device.type, precision)
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=GUIDANCE_SCALE)
    guided_call = _guided_call(model, conditioning, schedule, job.size)

    def guided_call_in_autocast(index):
        with autocast:
            guided_call(index)

    meter = Meter(model.device, guided_call_in_autocast, job.num_steps, 1, lambda: last)
    for iteration in range(1 + job.iterations):
        with autocast:
            x, *z = reversed(noise.unbind())
            for i, point in enumerate(schedule):
                x0, eps = checkpoint(denoise, x, point, use_reentrant=False)
                x = step(x0, eps, z[i], schedule, i, ETA)
                with torch.no_grad():
                    model.decode(x)
            loss = model.decode(x).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([noise], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last.update(reward=-loss.item(), grad_norm=norm.item())
        meter(iteration)
    calls = {"forward": 2 * job.num_steps, "backward": job.num_steps, "decode": job.num_steps + 1}
    return {**meter.figures(), "calls": calls, "described": f"float32 weights, {str(precision).removeprefix('torch.')}"}


def _guided_call(model, conditioning, schedule, size):
    x = torch.randn(model.latent_shape(1, size, size), device=model.device)

    def guided_call(index):
        model.denoise(x, schedule[index], conditioning, GUIDANCE_SCALE)

    return guided_call


def _check(reward, grad_norm):
    """Raise where an iteration's figures are not those of a working one."""
    if not (math.isfinite(reward) and math.isfinite(grad_norm) and grad_norm > 0):
        raise ArithmeticError(f"reward {reward:g}, gradient norm {grad_norm:g}")


def work_of(plan, num_steps):
    """How often an iteration makes a guided call forward and backward, and decodes, with a `dno.memory.Plan`."""
    if plan.num_steps == 0:  # skip_unet
        return {"forward": num_steps, "backward": 0, "decode": 1 + plan.vae_blocks}
    forward = num_steps + plan.recompute(num_steps)
    forward += num_steps * plan.network_blocks + num_steps / 2 * plan.split_guidance
    return {"forward": forward, "backward": num_steps, "decode": 1 + plan.vae_blocks}


def tera_flops(architecture, size, calls):
    """10^12 floating-point operations of an iteration (see the top of the file); calls: as `work_of` gives them."""
    counted = count_flops(architecture, size)
    unet = calls["forward"] * counted["call"] + calls["backward"] * counted["call backward"]
    return (unet + calls["decode"] * counted["decode"] + counted["decode backward"]) / 1e12


@cache
def count_flops(architecture, size, device="meta"):
    """FLOPs of one guided call and of one decoding, forward and backward; "meta" computes shapes alone."""
    model = random_model(architecture, torch.float32, device)
    conditioning = model.encode_prompts(["white duck"])
    x = torch.zeros(model.latent_shape(1, size, size), device=device, requires_grad=True)
    functions = {
        "call": lambda: model.denoise(x, model.point(500), conditioning, GUIDANCE_SCALE)[1],
        "decode": lambda: model.decode(x),
    }
    counted = {}
    for name, function in functions.items():
        with FlopCounterMode(display=False) as forward:
            result = function()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(result.sum(), x)
        counted |= {name: forward.get_total_flops(), f"{name} backward": backward.get_total_flops()}
    return counted


def attempt(job, own_process):
    """The row of a job as a dict: its figures, or `failed` and why."""
    failed = None
    try:
        figures = _in_own_process(job) if own_process else measure(job)
    except Exception as error:
        if is_out_of_memory(error):
            failed = OUT_OF_MEMORY
        else:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    # Outside of the except, where the error no longer holds the frames and with them the memory.
    if not own_process:
        forget()
    return {**asdict(job), "name": job.name, **({"failed": failed} if failed else figures)}


def _in_own_process(job):
    """What `measure` gives, of a new process: on a CPU, what an allocator once took it may keep."""
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -9:  # the system ends a process that takes too much
        raise MemoryError
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": f"exit code {done.returncode}"}
    if "failed" in answer:
        raise MemoryError if answer["failed"] == OUT_OF_MEMORY else RuntimeError(answer["failed"])
    return answer


def jobs_of(args):
    """The rows of the table in the order in which they are measured, which builds each model as seldom as it can."""
    shared = {
        "num_steps": args.num_steps, "iterations": args.iterations, "device": args.device,
        "precision": args.precision, "small": args.small, "tuning": tuple(args.tuning),
    }  # fmt: skip
    jobs = []
    for model in args.models:
        jobs += [Job(model, size, plan, False, **shared) for size in args.sizes for plan in args.plans]
        if args.compile:
            jobs += [Job(model, size, plan, True, **shared) for size in args.sizes for plan in args.plans]
        if args.official and model == "sd15":
            jobs += [Job(model, size, OFFICIAL, False, **shared) for size in args.sizes]
    return jobs


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--sizes", type=int, nargs="+", help="height and width in pixels; default: 512 1024")
    parser.add_argument("--num_steps", type=int, help="default: 50")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--iterations", type=int, default=3, help="those that are counted (default: 3)")
    parser.add_argument("--compile", action="store_true", help="measure each plan with compiled blocks too")
    parser.add_argument("--official", action="store_true", help="measure the official loop's work too, for sd15")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument(
        "--tuning", nargs="+", default=[], choices=["channels_last", "cudnn_benchmark"],
        help="changes that the project does not make, to see what they would bring",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny networks and images, 3 steps: a test on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the markdown here too, after each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here, after each row")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sizes = args.sizes or ([16, 32] if args.small else [512, 1024])
    args.num_steps = args.num_steps or (3 if args.small else 50)
    return args


def main(argv=None):
    args = parse(argv)
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(attempt(Job(**{**job, "tuning": tuple(job["tuning"])}), own_process=False)))
        return 0
    own_process = resolve_device(args.device).type == "cpu" and not args.small
    rows = []
    for job in jobs_of(args):
        start = time.perf_counter()
        rows.append(attempt(job, own_process))
        outcome = rows[-1].get("failed") or f"{rows[-1]['seconds']:.3f} s an iteration"
        print(f"{job.name}: {outcome} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        if args.output:
            args.output.write_text(report(args, rows))
    print(report(args, rows), flush=True)
    return int(any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


if __name__ == "__main__":
    sys.exit(main())
