"""What is kept for the backward pass is counted, and too little memory is named."""

import weakref

import pytest
import torch

from dno.memory import (
    OUT_OF_MEMORY,
    PeakMemory,
    Plan,
    choose_plan,
    free_bytes,
    graph_bytes,
    is_out_of_memory,
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
    """A function whose graph keeps `size` bytes."""
    x = torch.ones(size // 4, requires_grad=True)
    return x.exp


def there_are(size):
    """`free_bytes` of a device on which `size` bytes are free."""
    return lambda device: size


@pytest.mark.parametrize(
    ("free", "finish", "expected"),
    # As above, without a word on the end; then with 10000 bytes of it, beside which the steps' graphs must fit.
    [(80_000, None, Plan(10, 10)), (79_999, None, Plan(10, 9)), (8_000, None, Plan(10, 1)),
     (7_999, None, Plan(10, 0, network_blocks=True, vae_blocks=True)), (None, None, Plan(10, 0)),
     (100_000, 10_000, Plan(10, 10)), (99_999, 10_000, Plan(10, 9)), (28_000, 10_000, Plan(10, 1)),
     (27_999, 10_000, Plan(10, 0)), (19_999, 10_000, Plan(10, 0, vae_blocks=True))],
)  # fmt: skip
def test_the_plan_is_the_fastest_that_fits(free, finish, expected):
    finish = finish and keeping(finish)
    assert choose_plan("auto", 10, CPU, keeping(4000), finish, free_bytes=there_are(free)) == expected


def test_a_gpu_is_filled_further_if_the_end_was_measured():
    cuda, free = torch.device("cuda"), there_are(40_000)
    assert choose_plan("auto", 10, cuda, keeping(4000), free_bytes=free).kept_steps == 5
    assert choose_plan("auto", 10, cuda, keeping(4000), keeping(4000), free_bytes=free).kept_steps == 7  # of 34000


@pytest.mark.parametrize(
    ("free", "kept"), [(10**9, 9), (28_000, 3), (100, 1), (None, 5)], ids=["all", "some", "none", "unknown"]
)
def test_partial_keeps_what_fits_and_recomputes_something(free, kept):
    assert choose_plan("partial", 10, CPU, keeping(4000), free_bytes=there_are(free)) == Plan(10, kept)


def test_a_named_plan_is_not_measured():
    for name, expected in (("none", Plan(10, 10)), ("step", Plan(10, 0)), ("block", Plan(10, 0, True, True))):
        assert choose_plan(name, 10, CPU, one_step=None) == expected
        assert expected.name == expected.describe() == name
    lone = choose_plan("step", 10, CPU, None, guided=False, split_guidance=True)
    assert lone == Plan(10, 0, split_guidance=True, guided=False)


def test_what_runs_out_of_memory_when_it_is_measured_does_not_fit():
    failing, free = fail(torch.OutOfMemoryError()), {"free_bytes": there_are(10**6)}
    assert choose_plan("auto", 10, CPU, failing, **free).name == "block"
    assert choose_plan("auto", 10, CPU, keeping(4000), failing, **free) == Plan(10, 0, vae_blocks=True)
    assert choose_plan("partial", 10, CPU, failing, **free).kept_steps == 1
    with pytest.raises(KeyError):
        choose_plan("auto", 10, CPU, fail(KeyError()), **free)


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


def test_a_gradient_that_skips_the_network_keeps_every_graph():
    """Nothing is ever recomputed, so the network runs once."""
    x = torch.ones(1000, requires_grad=True)
    for name in ("auto", "none", "partial", "step", "block"):
        assert choose_plan(name, 0, CPU, lambda: x * 2, free_bytes=there_are(10**4)).recompute(50) == 0
    assert ladder(Plan(0, 0)) == ["none", "block", "block, split guidance"]
    assert Plan(0, 0).leaner().recompute(50) == 0


def test_the_steps_that_are_recomputed_are_the_first():
    assert Plan(50, 31).recompute(50) == 19 and Plan(50, 50).recompute(50) == 0 and Plan(50, 0).recompute(50) == 50
    assert Plan(11, 5).recompute(50) == 45 and Plan(11, 11).recompute(50) == 0


def write(root, **files):
    """Write small files under `root`; __ in a name stands for /, and the values may be numbers."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


V2 = "0::/jobs/mine"
V1 = "12:pids:/\n4:cpu,memory:/jobs/mine\n0::/"
MB = 2**20


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [(V2, {"jobs__mine__memory.max": 9 * MB, "jobs__mine__memory.current": 2 * MB}, 7 * MB),
     (V2, {"jobs__mine__memory.max": 9 * MB, "jobs__mine__memory.current": 8 * MB,
           "jobs__mine__memory.stat": f"anon 1\ninactive_file {3 * MB}"}, 4 * MB),  # cache is given back
     (V2, {"jobs__mine__memory.max": "max", "jobs__mine__memory.current": 8 * MB,
           "jobs__memory.max": 9 * MB, "jobs__memory.current": 8 * MB}, MB),  # the limit of all jobs together
     (V2, {"memory.max": 9 * MB, "memory.current": 5 * MB}, 4 * MB),  # a container: its own group is the mount
     (V2, {"jobs__mine__memory.max": 9 * MB, "jobs__mine__memory.current": 10 * MB}, 0),
     (V1, {"memory__jobs__mine__memory.limit_in_bytes": 9 * MB, "memory__jobs__mine__memory.usage_in_bytes": 8 * MB,
           "memory__jobs__mine__memory.stat": f"inactive_file 7\ntotal_inactive_file {MB}"}, 2 * MB),
     (V1, {"memory__memory.limit_in_bytes": 9 * MB, "memory__memory.usage_in_bytes": 8 * MB}, MB)],
)  # fmt: skip
def test_the_limit_of_a_container_or_job_counts(tmp_path, groups, files, expected):
    write(tmp_path, proc__self__cgroup=groups, **{f"sys__fs__cgroup__{name}": text for name, text in files.items()})
    assert free_bytes(CPU, tmp_path, {}) == expected


@pytest.mark.parametrize(
    ("groups", "files"),
    [(V2, {"jobs__mine__memory.max": "max", "jobs__mine__memory.current": 8 * MB}), (V2, {}), ("1:name=systemd:/", {}),
     (V1, {"memory__jobs__mine__memory.limit_in_bytes": 9223372036854771712,
           "memory__jobs__mine__memory.usage_in_bytes": 8 * MB})],
)  # fmt: skip
def test_without_a_limit_the_machine_alone_counts(tmp_path, groups, files):
    machine = free_bytes(CPU, tmp_path / "not Linux", {})
    write(tmp_path, proc__self__cgroup=groups, **{f"sys__fs__cgroup__{name}": text for name, text in files.items()})
    assert free_bytes(CPU, tmp_path, {}) == pytest.approx(machine, rel=0.5) and machine > 100 * MB


def test_the_processes_of_one_machine_share_its_memory(tmp_path):
    files = {"sys__fs__cgroup__memory.max": 9 * MB, "sys__fs__cgroup__memory.current": MB}
    write(tmp_path, proc__self__cgroup="0::/", **files)
    for value, expected in (("4", 2 * MB), ("1", 8 * MB), ("0", 8 * MB), ("", 8 * MB), ("some", 8 * MB)):
        assert free_bytes(CPU, tmp_path, {"LOCAL_WORLD_SIZE": value}) == expected


def test_free_and_peak_memory_of_the_process_are_plausible():
    assert 2**20 < free_bytes(CPU) < 2**50
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


@pytest.mark.parametrize(
    "text",
    ["[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
     "4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
     "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
     "MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 256.00 KB, max allowed: 18.13 GB).",
     "Invalid buffer size: 21.36 GB",
     "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
     "HIP error: out of memory",
     "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
     "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
     "std::bad_alloc"],
)  # fmt: skip
def test_the_texts_of_allocators_are_known(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize(
    "text",
    ["the service answered 500: CUDA error: out of memory", "out of memory", "ALLOC_FAILED", "not enough memory of you",
     "CUDA error: an illegal memory access was encountered", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
     "the judge said: DefaultCPUAllocator: can't allocate memory"],
)  # fmt: skip
def test_what_only_mentions_memory_is_another_failure(text):
    assert not is_out_of_memory(RuntimeError(text))


def test_other_failures_pass_unchanged():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), out_of_memory_explained():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_a_frozen_linear_layer_keeps_no_weight_in_the_graph():
    """Autograd saves a transposed view of the weight, which is there anyhow."""
    layer = torch.nn.Linear(100, 100).requires_grad_(False)
    x = torch.zeros(2, 100, requires_grad=True)
    assert graph_bytes(lambda: layer(x)) < 4 * 100
