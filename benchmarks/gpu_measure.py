"""What `gpu.py` measures: one row of its table, and the floating-point operations in it."""

import contextlib
import gc
import math
import statistics
import time
from dataclasses import dataclass
from functools import cache, partial

import torch
from common import ARCHITECTURES, TINY_ARCHITECTURES, make_task, random_model, synchronize
from gpu_page import OFFICIAL
from memory import ResidentPeak
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dno.methods import method_class
from dno.models.specs import resolve_device, resolve_precision
from dno.noise import draw_noise
from dno.sampling import step

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
    """

    def __init__(self, device, guided_call, num_calls, warm_up):
        self.device, self.guided_call, self.num_calls, self.warm_up = device, guided_call, num_calls, warm_up
        self.measured, self.first = [], None
        self.resident = None if device.type == "cuda" else ResidentPeak()
        self.peak = self.reserved = 0.0
        self.began = self._now()

    def __call__(self, reward, grad_norm):
        iteration = self._now() - self.began
        check(reward, grad_norm)
        self.first = self.first or {"reward": reward, "grad_norm": grad_norm}
        counts = self.warm_up == 0
        if counts:
            self._read_peak()
        call = self._calls()
        if counts:
            self.measured.append((iteration, call, iteration / (self.num_calls * call)))
        self.warm_up = max(self.warm_up - 1, 0)
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
    # Compiled again for another size or batch, because otherwise its kernels become general, and slower.
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
    settings = {
        "height": job.size, "width": job.size, "num_steps": job.num_steps, "eta": ETA, "gamma": GAMMA,
        "guidance_scale": GUIDANCE_SCALE, "opt_steps": warm_up + job.iterations, "objective": "black",
        **PLANS[job.plan],
    }  # fmt: skip
    with make_task("dno", model, **settings) as task:
        method = method_class("dno")(task)
        plan, state = task.plan, method.start()
        guided_call = _guided_call(model, task.conditioning, task.schedule, job.size)
        meter = Meter(model.device, guided_call, job.num_steps, warm_up)
        for found in method.iterations(state):
            if task.plan != plan:  # out of memory, the method has fallen back to another one: that is another row
                raise torch.OutOfMemoryError(f"{plan.describe()} does not fit")
            meter(-found.losses.item(), found.metrics["grad_norm"].item())
    return {**meter.figures(), "calls": work_of(plan, job.num_steps), "described": plan.describe()}


def _measure_official(job, model, precision):
    """The work of the official loop (see `gpu.py`), in the arithmetic of this project's sampler."""
    schedule, conditioning = model.schedule(job.num_steps), model.encode_prompts(["white duck"])
    shape = model.latent_shape(1, job.size, job.size)
    noise = draw_noise([0], job.num_steps, shape[1:]).to(model.device).requires_grad_()
    optimizer = torch.optim.AdamW([noise], lr=0.01, weight_decay=0.01)
    autocast = contextlib.nullcontext()
    if precision != torch.float32:
        autocast = torch.autocast(model.device.type, precision)
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=GUIDANCE_SCALE)
    guided_call = _guided_call(model, conditioning, schedule, job.size)

    def guided_call_in_autocast(index):
        with autocast:
            guided_call(index)

    meter = Meter(model.device, guided_call_in_autocast, job.num_steps, warm_up=1)
    for _ in range(1 + job.iterations):
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
        meter(-loss.item(), norm.item())
    calls = {"forward": 2 * job.num_steps, "backward": job.num_steps, "decode": job.num_steps + 1}
    return {**meter.figures(), "calls": calls, "described": f"float32 weights, {str(precision).removeprefix('torch.')}"}


def _guided_call(model, conditioning, schedule, size):
    x = torch.randn(model.latent_shape(1, size, size), device=model.device)

    def guided_call(index):
        model.denoise(x, schedule[index], conditioning, GUIDANCE_SCALE)

    return guided_call


def check(reward, grad_norm):
    """Raise ArithmeticError if an iteration's figures are not those of a working one."""
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
    """10^12 floating-point operations of an iteration (see `gpu.py`); calls: as `work_of` gives them."""
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
