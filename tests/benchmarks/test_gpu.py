"""benchmarks/gpu.py on tiny networks: its table, its arithmetic, its way round what does not fit. No time is tested."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dno.methods import method_class

EXACT = ["none", "partial", "step", "block", "split"]
SMALL = ["--small", "--device", "cpu", "--sizes", "16", "--num_steps", "2", "--iterations", "1"]


@pytest.fixture(scope="module")
def gpu():
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import gpu

        yield gpu
    finally:
        sys.path.remove(folder)


def gpu_page():
    """The benchmark's page, which is imported with it."""
    return sys.modules["gpu_page"]


def measuring():
    """What the benchmark measures, likewise."""
    return sys.modules["gpu_measure"]


@pytest.fixture(scope="module")
def rows(gpu, tmp_path_factory):
    """Every figure of a whole run on tiny networks, and its page; without the regularizer, as in the official loop."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring(), "GAMMA", 0.0)
        code = gpu.main([
            *SMALL, "--models", "sd15", "sdxl", "--official",
            "--output", str(folder / "page.md"), "--json", str(folder / "rows.json"),
        ])  # fmt: skip
    assert code == 0
    return json.loads((folder / "rows.json").read_text()), (folder / "page.md").read_text()


class Flops(TorchDispatchMode):
    """Counts as `FlopCounterMode` does, whose hooks on modules do not stand a checkpoint within a backward pass."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def job(gpu, **changes):
    settings = {
        "model": "sd15", "size": 16, "plan": "step", "compiled": False, "num_steps": 2, "iterations": 1,
        "device": "cpu", "precision": "fp32", "small": True, "tuning": (),
    }  # fmt: skip
    return gpu.Job(**{**settings, **changes})


def test_every_model_and_plan_has_a_row(rows):
    figures, page = rows
    official = "official loop (float32 weights, float32)"
    partial = "partial (1 of 2 steps keep their graph)"
    names = [f"tiny SD, 16 px, {plan}" for plan in ["none", partial, "step", "block", "split", "skip_unet", official]]
    names += [f"tiny SDXL, 16 px, {plan}" for plan in ["none", partial, "step", "block", "split", "skip_unet"]]
    assert [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| tiny")] == names
    assert len(figures) == len(names)


def test_figures_are_sound(rows):
    for row in rows[0]:
        assert 0 < row["factor"] < float("inf"), row["name"]
        assert row["seconds"] > 0 and row["call"] > 0 and row["peak"] > 0
        assert row["tflops"] == pytest.approx(row["tflop"] / row["seconds"])


def test_the_plans_give_the_same_gradient_and_the_official_loop_the_same_picture(rows):
    for model in ("sd15", "sdxl"):
        first = {row["plan"]: row["first"] for row in rows[0] if row["model"] == model}
        for plan in EXACT:
            assert first[plan]["grad_norm"] == pytest.approx(first["none"]["grad_norm"], rel=1e-4)
        assert {plan: one["reward"] for plan, one in first.items()} == {
            plan: pytest.approx(first["none"]["reward"], rel=1e-4) for plan in first
        }
    first = {row["plan"]: row["first"] for row in rows[0] if row["model"] == "sd15"}
    assert first["official loop"]["grad_norm"] == pytest.approx(first["none"]["grad_norm"], rel=1e-4)


def test_targets_are_not_measured_on_tiny_networks(rows):
    assert rows[1].count(": not measured") == 5
    assert "GB (" not in rows[1]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_flops_of_a_call_are_those_of_a_real_one(gpu, name):
    architecture = measuring().TINY_ARCHITECTURES[name]
    model = measuring().random_model(architecture, torch.float32, "cpu")
    x = torch.randn(model.latent_shape(1, 16, 16), requires_grad=True)
    conditioning = model.encode_prompts([""])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        eps = model.denoise(x, model.point(500), conditioning, 5.0)[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        torch.autograd.grad(eps.sum(), x)
    counted = measuring().count_flops(architecture, 16)
    assert counted["call"] == forward.get_total_flops() > 0
    assert counted["call backward"] == backward.get_total_flops() > 0


@pytest.mark.parametrize("plan", [*EXACT, "skip_unet"])
def test_work_of_a_plan_is_that_of_a_real_iteration(gpu, plan):
    architecture = measuring().TINY_ARCHITECTURES["sd15"]
    model = measuring().random_model(architecture, torch.float32, "cpu")
    with measuring().make_task("dno", model, height=16, width=16, num_steps=2, **gpu.PLANS[plan]) as task:
        method = method_class("dno")(task)
        state = method.start()
        with sdpa_kernel(SDPBackend.MATH), Flops() as counter:
            method.source(state.z([0]), state.rest([0]), [0], 0)
    said = measuring().tera_flops(architecture, 16, measuring().work_of(task.plan, 2)) * 1e12
    if plan in ("block", "split"):  # what lies outside of the blocks is not computed again
        assert 0.9 * said < counter.total <= said
    else:
        assert counter.total == pytest.approx(said, rel=1e-6)


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(gpu, monkeypatch, capsys):
    measure = gpu.measure

    def too_little_memory(job):
        if job.plan == "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(job)

    monkeypatch.setattr(gpu, "measure", too_little_memory)
    assert gpu.main([*SMALL, "--models", "sd15", "--plans", "none", "skip_unet"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert lines[0] == "| tiny SD, 16 px, none | out of memory | - | - | - | - | - | - | - |"
    assert lines[1].startswith("| tiny SD, 16 px, skip_unet | 0.")


def test_another_failure_is_a_row_too_and_the_exit_code_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "measure", lambda job: measuring().check(reward=float("nan"), grad_norm=1.0))
    assert gpu.main([*SMALL, "--models", "sd15", "--plans", "step"]) == 1
    out, err = capsys.readouterr()
    assert "| tiny SD, 16 px, step | ArithmeticError: reward nan, gradient norm 1 | - |" in out
    assert "Traceback" in err


def test_a_process_that_the_system_ends_was_out_of_memory(gpu, monkeypatch):
    def run(answer, code):
        done = gpu.subprocess.CompletedProcess([], code, stdout=answer)
        monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: done)
        return gpu.attempt(job(gpu), own_process=True)

    assert run("", -9)["failed"] == "out of memory"
    assert run('{"failed": "out of memory"}\n', 0)["failed"] == "out of memory"
    assert run('a line\n{"seconds": 1.5}\n', 0)["seconds"] == 1.5
    assert "exit code 3" in run("", 3)["failed"]


@pytest.mark.parametrize("figures", [(float("inf"), 1.0), (1.0, float("nan")), (1.0, 0.0)])
def test_figures_of_a_broken_iteration_are_refused(gpu, figures):
    with pytest.raises(ArithmeticError):
        measuring().check(*figures)


@pytest.mark.parametrize("card, rate", [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA H100 PCIe", None),
    ("NVIDIA H200 NVL", None), ("NVIDIA GeForce RTX 4090 D", None), ("Some other card", None), ("", None),
])  # fmt: skip
def test_dense_rates(gpu, card, rate):
    assert gpu_page().dense_rate(card, torch.bfloat16) == gpu_page().dense_rate(card, torch.float16) == rate
    assert gpu_page().dense_rate(card, torch.float32) is None


def test_the_page_of_a_card(gpu):
    row = {
        "name": "SDXL, 1024 px, step", "model": "sdxl", "size": 1024, "plan": "step", "described": "step",
        "compiled": False, "num_steps": 50, "small": False, "seconds": 8.0, "call": 0.05, "factor": 3.2, "peak": 21.0,
        "reserved": 23.5, "tflop": 2120.0, "tflops": 265.0, "first": {"reward": 0.1, "grad_norm": 0.5},
    }  # fmt: skip
    split = {**row, "name": "SDXL, 1024 px, split", "plan": "split", "described": "block, split guidance",
             "factor": 4.8, "peak": 12.5}  # fmt: skip
    partial = {**row, "plan": "partial", "name": "SDXL, 1024 px, partial", "factor": 2.9, "described": "partial (k)"}
    sd = {**row, "model": "sd15", "size": 512}
    official = {**sd, "plan": gpu.OFFICIAL, "seconds": 2.0}
    ours, compiled = {**sd, "seconds": 0.9}, {**sd, "seconds": 0.6, "compiled": True}
    assert "| 265 | 26.8% |" in gpu_page().table([row], 989)
    assert "| SDXL, 1024 px, partial (k) |" in gpu_page().table([partial])
    every = gpu_page().targets([row, split, partial, official, ours, compiled])
    found = [line.rsplit(": ", 1)[1] for line in every.split("\n")]
    assert found == ["12.5 GB (block, split guidance)", "3.20", "2.90 (partial (k))", "0.45 (step)", "0.30 (step)"]
    skipped = {**row, "plan": "skip_unet", "factor": 1.1, "peak": 7.0}
    assert gpu_page().targets([skipped]) == gpu_page().targets([])


def test_the_networks_have_the_published_sizes(gpu):
    def parameters(network):
        return sum(parameter.numel() for parameter in network.parameters())

    for name, unet in (("sd15", 859_520_964), ("sdxl", 2_567_463_684)):
        model = measuring().random_model(measuring().ARCHITECTURES[name], torch.bfloat16, "meta")
        assert parameters(model.network) == unet
        assert parameters(model.vae) == 83_653_863


def test_a_product_of_matrices_has_a_rate(gpu):
    assert gpu_page().matmul_tflops(torch.device("cpu"), torch.float32, size=32) > 0


def test_on_a_card_the_peaks_are_its_own_and_the_page_names_its_rate(gpu, monkeypatch):
    cuda = {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 5e9,
            "max_memory_reserved": 6e9, "get_device_name": "NVIDIA H200"}  # fmt: skip
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    page = sys.modules["gpu_page"]
    monkeypatch.setattr(page, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(page, "resolve_precision", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(page, "matmul_tflops", lambda device, dtype: 790.0)
    calls = []
    last = {"reward": 0.1, "grad_norm": 2.0}
    meter = measuring().Meter(torch.device("cuda"), calls.append, num_calls=3, warm_up=1)
    for _ in range(3):
        meter(**last)
    assert calls == [0, 1, 2] * 3 and len(meter.measured) == 2
    figures = meter.figures()
    assert (figures["peak"], figures["reserved"], figures["first"]) == (5.0, 6.0, last)
    row = {
        "name": "SDXL, 1024 px, step", "model": "sdxl", "size": 1024, "plan": "step", "described": "step",
        "compiled": False, "num_steps": 50, "small": False, **figures, "tflop": 2120.0, "tflops": 494.5,
    }  # fmt: skip
    page = page.report(gpu.parse(["--device", "cuda", "--tuning", "channels_last"]), [row])
    assert "cuda (NVIDIA H200)" in page and "989 TFLOP/s; a product of two 8192 x 8192 matrices reaches 790" in page
    assert "| 5.00 | 6.00 | 2120 | 494 | 50.0% |" in page and "with channels_last" in page
    assert "5.0 GB (step)" in page
