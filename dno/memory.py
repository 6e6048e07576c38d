"""Memory: how much there is, how much a graph takes, and what to do about too little."""

import contextlib
import re

import torch

from dno.errors import UserError

# Share of the free memory that the sampler's graphs may take; decoder, reward and fragmentation need the rest.
SHARE = 0.5


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
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


def choose_checkpointing(one_step, num_steps, device):
    """`none`, `step` or `block`: the fastest way that fits well into the free memory.

    one_step: a function that runs one step of the sampler with a graph; num_steps: how many of them have one.
    """
    free = free_bytes(device)
    if free is None:
        return "step"
    try:
        needed = graph_bytes(one_step)
    except torch.OutOfMemoryError:
        return "block"
    if needed * num_steps <= SHARE * free:
        return "none"
    return "step" if needed <= SHARE * free else "block"


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
    "out of memory; lower, in this order: --checkpointing block, --batch_size 1, --precision bf16, --height and --width"
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
