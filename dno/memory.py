"""Memory: how much there is, how much a graph takes, and what to do about too little."""

import contextlib
import math
import re
import warnings
from dataclasses import dataclass, replace

import torch

from dno.errors import UserError

# Share of the free memory that the sampler's graphs may take; decoder, reward and fragmentation need the rest.
SHARE = 0.5
# The same where decoder and reward were measured too, on a GPU: there a wrong guess is an error that can be mended, and
# on a CPU it is the end of the process.
MEASURED_SHARE = 0.85


def free_bytes(device):
    """Bytes that this process can still allocate on the device, or None where nobody knows (mps)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return None


def graph_bytes(function):
    """Bytes of the tensors that autograd keeps for the backward pass of `function()`, parameters left out."""
    kept = {}

    def pack(tensor):
        whole = tensor if tensor._base is None else tensor._base  # a linear layer keeps a view of its weight
        if not isinstance(whole, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may be a result, and would keep its own graph alive for ever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


@dataclass(frozen=True)
class Plan:
    """What is kept for the backward pass, and what is computed again. The gradient is the same for every plan.

    num_steps: the sampling steps that have the network's graph: 0 where the gradient skips the network.
    kept_steps: how many of them, the last ones, keep it; the others keep their latents only.
    unet_blocks, vae_blocks: within a graph, recompute each block of the UNet, of the VAE's decoder.
    split_guidance: run the two halves of the guidance one after the other.
    guided: whether there are two halves.
    """

    num_steps: int
    kept_steps: int
    unet_blocks: bool = False
    vae_blocks: bool = False
    split_guidance: bool = False
    guided: bool = True

    @property
    def name(self):
        """none, partial, step or block."""
        if self.unet_blocks:
            return "block"
        return {0: "step", self.num_steps: "none"}.get(self.kept_steps, "partial")

    def recompute(self, num_steps):
        """What `dno.sampling.sample` calls by this name, for a schedule of so many steps."""
        return num_steps - self.kept_steps if self.kept_steps < self.num_steps else 0

    def leaner(self):
        """The next plan for less memory and more time, or None where this is the leanest."""
        if self.kept_steps:
            return replace(self, kept_steps=self.kept_steps // 2)
        if not (self.unet_blocks and self.vae_blocks):
            return replace(self, unet_blocks=True, vae_blocks=True)
        if self.guided and not self.split_guidance:
            return replace(self, split_guidance=True)
        return None

    def describe(self):
        """For the banner, such as "partial (31 of 50 steps keep their graph), split guidance"."""
        kept = f" ({self.kept_steps} of {self.num_steps} steps keep their graph)" if self.name == "partial" else ""
        vae = ", VAE by block" if self.vae_blocks and not self.unet_blocks else ""
        return f"{self.name}{kept}{vae}{', split guidance' if self.split_guidance and self.guided else ''}"


def choose_plan(checkpointing, num_steps, device, one_step, finish=None, guided=True, split_guidance=False):
    """The plan that the user names, or the fastest that fits well into the free memory.

    checkpointing: none, partial, step, block or auto. partial keeps as many steps' graphs as fit, and at least one.
    num_steps: as in `Plan`.
    one_step: a function that runs one step of the sampler with its graph.
    finish: a function that decodes latents, and scores the images, with a graph; it is there beside those of the
        steps that are kept. Without it, half of the free memory is left to it.
    """
    step = Plan(num_steps, 0, guided=guided, split_guidance=split_guidance)
    block = replace(step, unet_blocks=True, vae_blocks=True)
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
    """A gradient source that, out of memory, computes the same again with the next plan that uses less, and says so.

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
    """Turn an allocator's failure into a UserError that names the flags to lower."""
    try:
        yield
    except Exception as failure:
        if is_out_of_memory(failure):
            raise UserError(OUT_OF_MEMORY) from failure
        raise


def is_out_of_memory(error):
    """Whether an allocator failed. Those of the CPU and of MPS have no exception class of their own."""
    words = "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    )
