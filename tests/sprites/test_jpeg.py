"""A reward without a gradient on the embedded model: the JPEG file gets smaller, and still shows its prompt."""

from dno import align
from sprites import judge

JUDGE = f"{judge.__file__}:judge_loss_fn"


def test_a_smaller_jpeg_of_a_red_car():
    """In small: q 16 and 50 iterations of this take off 30 %."""
    result = align(
        model="sprites", prompt="red car", objective="jpeg", evaluate=["sprites", JUDGE], estimator="hybrid", seed=7,
        num_steps=5, opt_steps=11, num_samples=12, mu=0.05, antithetic=True, precondition="spectral", lr=0.02, gamma=3,
        batch_per_device=12,
    )  # fmt: skip
    start, best = result.metrics[0], result.metrics[result.steps[0]]
    assert best["jpeg"] > 0.9 * start["jpeg"], "minus kilobytes"
    assert best["sprites"] > start["sprites"] - 3 and best["judge"] > 0.9
    assert best["probability"] > 0.5
