"""What only a CUDA device can show. Skipped where there is none."""

import pytest
import torch

from dno import align

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def quick(tiny_folder):
    def run(**settings):
        return align(model=str(tiny_folder), num_steps=3, opt_steps=4, lr=0.05, gamma=1.0, device="cuda", **settings)

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
def test_the_reward_rises_in_every_precision(quick, precision, checkpointing):
    result = quick(precision=precision, checkpointing=checkpointing, batch_size=2)
    assert result.rewards.mean() > result.metrics[0]["reward"]
    assert result.noise.dtype == torch.float32 and result.noise.isfinite().all()


def test_the_device_changes_the_result_by_rounding_only(quick, tiny_folder):
    on_cpu = align(model=str(tiny_folder), num_steps=3, opt_steps=4, lr=0.05, gamma=1.0, device="cpu")
    torch.testing.assert_close(quick(precision="fp32").noise, on_cpu.noise, rtol=1e-2, atol=1e-2)
