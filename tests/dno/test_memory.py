"""What is kept for the backward pass is counted, and too little memory is named."""

import weakref

import pytest
import torch

from dno import memory
from dno.memory import (
    OUT_OF_MEMORY,
    PeakMemory,
    Plan,
    choose_plan,
    graph_bytes,
    out_of_memory_explained,
)

CPU = torch.device("cpu")


def test_graph_bytes_counts_each_kept_tensor_once_and_no_parameter():
    x, weight = torch.ones(1000, requires_grad=True), torch.nn.Parameter(torch.ones(1000))
    assert graph_bytes(lambda: x + 1) == 0  # an addition needs nothing to go back
    assert graph_bytes(lambda: x * weight) == 4000  # x for the weight's gradient; the weight itself is no extra memory
    assert graph_bytes(lambda: (x * 2).exp().square()) == 4000  # both keep the result of exp
    with torch.no_grad():
        assert graph_bytes(lambda: (x * 1).exp()) == 4000  # it counts a graph, whatever the caller does


def test_measuring_a_graph_leaves_none_behind():
    x, alive = torch.ones(10, requires_grad=True), []

    def function():
        result = x.exp()  # keeps its own result
        alive.append(weakref.ref(result))
        return result

    assert graph_bytes(function) == 40 and alive[0]() is None


def test_a_step_that_does_not_fit_at_all_is_cut_into_blocks():
    def one_step():
        raise torch.OutOfMemoryError

    assert choose_plan("auto", 10, CPU, one_step).name == "block"


def keeping(size):
    """A function whose graph keeps so many bytes."""
    x = torch.ones(size // 4, requires_grad=True)
    return x.exp


@pytest.mark.parametrize(
    ("free", "finish", "expected"),
    # As above, without a word on the end; then with 10000 bytes of it, beside which the steps' graphs must fit.
    [(80_000, None, Plan(10, 10)), (79_999, None, Plan(10, 9)), (8_000, None, Plan(10, 1)),
     (7_999, None, Plan(10, 0, unet_blocks=True, vae_blocks=True)), (None, None, Plan(10, 0)),
     (100_000, 10_000, Plan(10, 10)), (99_999, 10_000, Plan(10, 9)), (28_000, 10_000, Plan(10, 1)),
     (27_999, 10_000, Plan(10, 0)), (19_999, 10_000, Plan(10, 0, vae_blocks=True))],
)  # fmt: skip
def test_the_plan_is_the_fastest_that_fits(monkeypatch, free, finish, expected):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert choose_plan("auto", 10, CPU, keeping(4000), finish and keeping(finish)) == expected


def test_a_gpu_is_filled_further_where_the_end_was_measured(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40_000)
    cuda = torch.device("cuda")
    assert choose_plan("auto", 10, cuda, keeping(4000)).kept_steps == 5
    assert choose_plan("auto", 10, cuda, keeping(4000), keeping(4000)).kept_steps == 7  # of 34000 bytes


@pytest.mark.parametrize(
    ("free", "kept"), [(10**9, 9), (28_000, 3), (100, 1), (None, 5)], ids=["all", "some", "none", "unknown"]
)
def test_partial_keeps_what_fits_and_recomputes_something(monkeypatch, free, kept):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert choose_plan("partial", 10, CPU, keeping(4000)) == Plan(10, kept)


def test_a_named_plan_is_not_measured():
    for name, expected in (("none", Plan(10, 10)), ("step", Plan(10, 0)), ("block", Plan(10, 0, True, True))):
        assert choose_plan(name, 10, CPU, one_step=None) == expected
        assert expected.name == expected.describe() == name
    lone = choose_plan("step", 10, CPU, None, guided=False, split_guidance=True)
    assert lone == Plan(10, 0, split_guidance=True, guided=False)


def test_what_runs_out_of_memory_when_it_is_measured_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    failing = fail(torch.OutOfMemoryError())
    assert choose_plan("auto", 10, CPU, failing).name == "block"
    assert choose_plan("auto", 10, CPU, keeping(4000), failing) == Plan(10, 0, vae_blocks=True)
    assert choose_plan("partial", 10, CPU, failing).kept_steps == 1
    with pytest.raises(KeyError):
        choose_plan("auto", 10, CPU, fail(KeyError()))


def ladder(plan):
    plans = []
    while plan is not None:
        plans.append(plan.describe())
        plan = plan.leaner()
    return plans


def test_each_plan_is_leaner_than_the_one_before():
    assert ladder(Plan(9, 9)) == [
        "none", "partial (4 of 9 steps keep their graph)", "partial (2 of 9 steps keep their graph)",
        "partial (1 of 9 steps keep their graph)", "step", "block", "block, split guidance",
    ]  # fmt: skip
    assert ladder(Plan(9, 0, vae_blocks=True, split_guidance=True)) == [
        "step, VAE by block, split guidance", "block, split guidance",
    ]  # fmt: skip
    assert ladder(Plan(9, 0, guided=False)) == ["step", "block"]


def test_a_gradient_that_skips_the_network_keeps_every_graph(monkeypatch):
    """Nothing is ever recomputed, so the network runs once."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**4)
    x = torch.ones(1000, requires_grad=True)
    for name in ("auto", "none", "partial", "step", "block"):
        assert choose_plan(name, 0, CPU, lambda: x * 2).recompute(50) == 0
    assert ladder(Plan(0, 0)) == ["none", "block", "block, split guidance"]
    assert Plan(0, 0).leaner().recompute(50) == 0


def test_the_steps_that_are_recomputed_are_the_first():
    assert Plan(50, 31).recompute(50) == 19 and Plan(50, 50).recompute(50) == 0 and Plan(50, 0).recompute(50) == 50
    assert Plan(11, 5).recompute(50) == 45 and Plan(11, 11).recompute(50) == 0


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
