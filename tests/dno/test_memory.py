"""What is kept for the backward pass is counted, and too little memory is named."""

import pytest
import torch

from dno import memory
from dno.memory import OUT_OF_MEMORY, PeakMemory, choose_checkpointing, graph_bytes, out_of_memory_explained

CPU = torch.device("cpu")


def test_graph_bytes_counts_each_kept_tensor_once_and_no_parameter():
    x, weight = torch.ones(1000, requires_grad=True), torch.nn.Parameter(torch.ones(1000))
    assert graph_bytes(lambda: x + 1) == 0  # an addition needs nothing to go back
    assert graph_bytes(lambda: x * weight) == 4000  # x for the weight's gradient; the weight itself is no extra memory
    assert graph_bytes(lambda: (x * 2).exp().square()) == 4000  # both keep the result of exp
    with torch.no_grad():
        assert graph_bytes(lambda: (x * 1).exp()) == 4000  # it counts a graph, whatever the caller does


@pytest.mark.parametrize(
    ("free", "expected"),
    # One step keeps 4000 bytes, ten steps 40000, of which half the free memory must be enough.
    [(80_000, "none"), (79_999, "step"), (8_000, "step"), (7_999, "block"), (None, "step")],
)
def test_checkpointing_is_the_fastest_that_fits(monkeypatch, free, expected):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    x = torch.ones(1000, requires_grad=True)
    assert choose_checkpointing(lambda: x.exp(), 10, CPU) == expected


def test_a_step_that_does_not_fit_at_all_is_cut_into_blocks():
    def one_step():
        raise torch.OutOfMemoryError

    assert choose_checkpointing(one_step, 10, CPU) == "block"


def test_free_and_peak_memory_of_the_process_are_plausible():
    assert 2**20 < memory.free_bytes(CPU) < 2**50
    peak = PeakMemory(CPU)
    peak.reset()
    before = peak.read()
    block = torch.ones(60_000_000)
    assert 0.01 < before < 1000 and peak.read() >= max(before, block.nbytes / 1e9)


def allocate_too_much():
    torch.empty(2**50)


def fail(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "function",
    [allocate_too_much, fail(MemoryError()), fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
     fail(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))],
)  # fmt: skip
def test_running_out_of_memory_names_the_flags_in_order(function):
    with pytest.raises(ValueError) as error, out_of_memory_explained():
        function()
    assert str(error.value) == OUT_OF_MEMORY
    flags = ("--checkpointing block", "--batch_size 1", "--precision bf16", "--height and --width")
    places = [OUT_OF_MEMORY.index(flag) for flag in flags]
    assert places == sorted(places)


def test_other_failures_pass_unchanged():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), out_of_memory_explained():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_a_frozen_linear_layer_keeps_no_weight_in_the_graph():
    """Autograd saves a transposed view of the weight, which is there anyhow."""
    layer = torch.nn.Linear(100, 100).requires_grad_(False)
    x = torch.zeros(2, 100, requires_grad=True)
    assert graph_bytes(lambda: layer(x)) < 4 * 100
