"""Memory: how much is free, how much a graph takes, the plan that follows, and running out of it."""

import contextlib
import math
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dno.errors import UserError

# Share of the free memory that the sampler's graphs may take; decoder, reward and fragmentation need the rest.
SHARE = 0.5
# The same if decoder and reward were measured too, on a GPU: there a wrong guess is an error that can be handled, but
# on a CPU it is the end of the process.
MEASURED_SHARE = 0.85


def free_bytes(device, root=Path("/"), environment=os.environ):
    """Bytes that this process can still allocate on the device, or None if that is unknown (mps).

    On a CPU the least of what the machine has left and what the limits of the process's control groups leave (a
    container's, a batch job's), divided by the number of processes that a launcher started here, LOCAL_WORLD_SIZE.

    root: where /proc and /sys are. environment: where LOCAL_WORLD_SIZE is.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        import psutil

        processes = environment.get("LOCAL_WORLD_SIZE", "")
        processes = max(int(processes), 1) if processes.isdecimal() else 1
        return int(min(psutil.virtual_memory().available, _cgroup_free_bytes(root))) // processes
    return None


def _cgroup_free_bytes(root):
    """Bytes left under the memory limits of this process's control groups (v1 and v2); inf if there are none.

    A group is also bound by the limits of those that it lies in. The page cache that a group has not used lately counts
    as free, as the kernel takes it back on demand.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    free, top = math.inf, root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cache = top, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = mount / path.lstrip("/")  # inside a container there may be nothing but the mount itself
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                free = min(free, max(room + _statistic(folder / "memory.stat", cache), 0))
            if folder == mount:
                break
    return free


def _statistic(file, name):
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def graph_bytes(function):
    """Bytes of the tensors that autograd keeps for the backward pass of `function()`, without the parameters."""
    kept = {}

    def pack(tensor):
        whole = tensor if tensor._base is None else tensor._base  # a linear layer keeps a view of its weight
        if not isinstance(whole, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may be a result, and would keep its own graph alive forever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


@dataclass(frozen=True)
class Plan:
    """What is kept for the backward pass and what is recomputed. The gradient is the same for every plan.

    num_steps: number of sampling steps that have the network's graph; 0 if the gradient skips the network.
    kept_steps: how many of them, the last ones, keep it; the others keep their latents only.
    network_blocks, vae_blocks: within a graph, recompute each block of the network, of the VAE's decoder.
    split_guidance: run the two halves of the guidance one after the other.
    guided: whether there are two halves.
    """

    num_steps: int
    kept_steps: int
    network_blocks: bool = False
    vae_blocks: bool = False
    split_guidance: bool = False
    guided: bool = True

    @property
    def name(self):
        """none, partial, step or block."""
        if self.network_blocks:
            return "block"
        return {0: "step", self.num_steps: "none"}.get(self.kept_steps, "partial")

    def recompute(self, num_steps):
        """The argument `recompute` of `dno.sampling.sample` for a schedule of `num_steps` steps."""
        return num_steps - self.kept_steps if self.kept_steps < self.num_steps else 0

    def leaner(self):
        """The next plan, which takes less memory and more time, or None if no plan takes less."""
        if self.kept_steps:
            return replace(self, kept_steps=self.kept_steps // 2)
        if not (self.network_blocks and self.vae_blocks):
            return replace(self, network_blocks=True, vae_blocks=True)
        if self.guided and not self.split_guidance:
            return replace(self, split_guidance=True)
        return None

    def describe(self):
        """A text for the banner, such as "partial (31 of 50 steps keep their graph), split guidance"."""
        kept = f" ({self.kept_steps} of {self.num_steps} steps keep their graph)" if self.name == "partial" else ""
        vae = ", VAE by block" if self.vae_blocks and not self.network_blocks else ""
        return f"{self.name}{kept}{vae}{', split guidance' if self.split_guidance and self.guided else ''}"


def choose_plan(
    checkpointing, num_steps, device, one_step, finish=None, guided=True, split_guidance=False, free_bytes=free_bytes
):
    """The plan that the user names, or the fastest that fits well into the free memory.

    checkpointing: none, partial, step, block or auto. partial keeps as many steps' graphs as fit, and at least one.
    num_steps: as in `Plan`.
    one_step: a function that runs one step of the sampler with its graph.
    finish: a function that decodes latents and scores the images with a graph, which is in memory together with those
        of the kept steps. Without it, half of the free memory is reserved for it.
    free_bytes: device -> bytes that can still be allocated, or None if unknown.
    """
    step = Plan(num_steps, 0, guided=guided, split_guidance=split_guidance)
    block = replace(step, network_blocks=True, vae_blocks=True)
    whole = replace(step, kept_steps=num_steps)
    if checkpointing in ("none", "step", "block"):
        return {"none": whole, "step": step, "block": block}[checkpointing]
    auto, least = checkpointing == "auto", 0 if checkpointing == "auto" else 1
    free = free_bytes(device)
    if free is None:
        return step if auto else replace(step, kept_steps=num_steps // 2)
    room = free * (MEASURED_SHARE if finish and device.type == "cuda" else SHARE)
    needed, end = _bytes_or_inf(one_step), _bytes_or_inf(finish) if finish else 0
    if auto and needed > room:
        return block
    if auto and end > room:
        return replace(step, vae_blocks=True)
    # The kept graphs are there when the decoder runs backward, and gone when the first step is recomputed.
    if math.inf in (needed, end):
        fits = 0
    else:
        fits = (room - end) // needed if needed else num_steps
    most = num_steps if auto else max(num_steps - 1, 0)
    return replace(step, kept_steps=int(min(max(fits, least), most)))


def _bytes_or_inf(function):
    try:
        return graph_bytes(function)
    except Exception as error:
        if is_out_of_memory(error):
            return math.inf
        raise


class LeanerOnDemand:
    """A gradient source that falls back to the next plan that uses less memory when it runs out, with a warning.

    source: called with any arguments, of which the last is the iteration. user: has the `plan` in use, and `use(plan)`
    to change it.
    """

    def __init__(self, source, user):
        self.source, self.user, self.no_gradient = source, user, source.no_gradient

    def __call__(self, *arguments):
        while True:
            try:
                return self.source(*arguments)
            except Exception as error:
                if not is_out_of_memory(error) or self.user.plan.leaner() is None:
                    raise
            # Outside of the except, where the error no longer holds the frames and with them the memory.
            plan = self.user.plan.leaner()
            warnings.warn(f"iteration {arguments[-1]}: out of memory; falling back to {plan.describe()}", stacklevel=2)
            self.user.use(plan)


class PeakMemory:
    """Peak memory in GB (10^9 bytes): of the tensors on a GPU since `reset`, of the whole process on a CPU."""

    def __init__(self, device):
        self.device = device

    def reset(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / 1e9
        return _process_peak_bytes() / 1e9


def _process_peak_bytes():
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset


OUT_OF_MEMORY = (
    "out of memory; lower, in this order: --checkpointing block --split_guidance, --batch_size 1, "
    "--batch_per_device 1 (estimators), --reward_checkpointing, --precision bf16, --height and --width"
)


@contextlib.contextmanager
def out_of_memory_explained():
    """Turn a failed allocation into a UserError that names the flags to lower."""
    try:
        yield
    except Exception as failure:
        if is_out_of_memory(failure):
            raise UserError(OUT_OF_MEMORY) from failure
        raise


# How the messages of allocators without an exception of their own begin: the CPU's, MPS's, the CUDA driver's, and those
# of NVIDIA's and AMD's libraries. From the beginning, so that a reward that quotes another machine's is not meant.
_ALLOCATORS = re.compile(
    r"(\[enforce fail at [^\]]*\] .*?)?DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|MPS backend out of memory|Invalid buffer size: "
    r"|(CUDA|HIP) error: (out of memory|(CU|HIP)\w+_STATUS_ALLOC_FAILED)"
    r"|cu\w+ error: CU\w+_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc"
)


def is_out_of_memory(error):
    """Whether an allocator of this process failed, as opposed to an error that mentions memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATORS.match(str(error)) is not None
    )
