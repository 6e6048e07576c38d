"""The benchmark of the estimators: its arithmetic, and a run in small."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dno.methods.estimation import ESTIMATORS, Estimation
from dno.noise import draw_noise

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


NAMES = ("hybrid", "hybrid_cosine", "hybrid_plots", "common")


@pytest.fixture(scope="module")
def hybrid():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import hybrid as module

        yield module
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def cosine(hybrid):
    """The benchmark's room of cosines."""
    return sys.modules["hybrid_cosine"]


@pytest.fixture
def task(cosine, tiny_model):
    return cosine.make_task("dno", tiny_model, objective="contrast", num_steps=3)


def noise_of(task, seed):
    return draw_noise([seed], 3, task.latent_shape[1:])


def test_products_and_means(cosine):
    losses, points = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([[1.0], [2.0], [0.0], [4.0]])
    each = cosine.products(losses, torch.tensor([1.0]), points, torch.tensor([[1.0]]))
    assert each.flatten().tolist() == [0, 2, -1, 15]
    assert cosine.means_of_parts(each, 2).flatten().tolist() == [1, 7]
    assert cosine.means_of_parts(each, 1).flatten().tolist() == [0, 2], "no more than two parts"
    assert cosine.means_of_parts(each, 4).flatten().tolist() == [4]


def test_rates_and_efficiency(hybrid):
    """32 samples in 4 s on one rank and in 2.5 s on two: 8 and 12.8 per second, 12.8 of 16."""
    assert hybrid.speed_row(32, 3.0, 4.0, 2.5) == [32, "3", "4.00", "8.00", "2.50", "12.80", "0.80"]


def test_the_smallest_size_by_then(hybrid):
    curve = [(1.0, 5.0), (2.0, 4.0), (3.0, 6.0), (4.0, 3.0)]
    assert [hybrid.best_until(curve, t) for t in (0, 1, 3.5, 9)] == [5, 5, 4, 3]


def test_jacobian_product_and_its_transpose_agree(cosine, task):
    """<g, J d> = <J^T g, d> for two directions at once."""
    z = noise_of(task, 0)
    d, g = torch.randn_like(z[:, 0]), torch.randn(5, 3, 16, 16)
    forward = (g * cosine.jacobian_product(task, z, d, 4)).flatten(1).sum(dim=1)
    backward = (cosine.transposed_jacobian(task, z, 4)(g) * d).flatten(1).sum(dim=1)
    torch.testing.assert_close(forward, backward, rtol=0.02, atol=0.02 * backward.abs().max().item())


def test_cosines_are_those_of_the_estimators(cosine, task):
    mu, q = 0.05, 6
    found = cosine.cosines({"contrast": task}, 7, [mu], [2, q], 4)
    z = noise_of(task, 7)
    true = cosine.true_gradient(task, z)
    generator = torch.Generator().manual_seed(7)
    draws = {len(shape): torch.randn(q, *shape, generator=generator) for shape in ((4, 4, 8, 8), (3, 16, 16))}
    for estimator in ESTIMATORS:
        for pairs in (False, True):
            source = Estimation(
                lambda z, rest, rows: task.render(z.unbind(), rows), task.losses_or_nan, estimator, mu=mu,
                num_samples=q, antithetic=pairs, draw=lambda image, step, index, shape: draws[len(shape)][index],
            )  # fmt: skip
            expected = cosine.similarity(source(z, z[:0], [0]).gradient, true)
            assert found["contrast", estimator, pairs, mu, q] == pytest.approx(expected, abs=2e-3)


def test_a_run_in_small(hybrid, tmp_path, capsys):
    hybrid.main(["--only", "cosine", "--fast", "--rewards", "contrast", "--pictures", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| contrast, hybrid_image, pairs |" in printed and "limit" in printed
    assert (tmp_path / "hybrid-cosine.png").stat().st_size > 10_000


def test_reward_curves(hybrid, tiny_model, tmp_path):
    """A run ends with its time, and its plot is drawn."""
    args = SimpleNamespace(
        num_steps=2, num_samples=4, run_mu=0.1, lr=0.02, gamma=0.0, batch_per_device=4, seconds=1e-3, pictures=tmp_path
    )
    curve = hybrid.reward_curve(tiny_model, "hybrid", 1, args)
    assert len(curve) == 1 and 0.3 < curve[0][1] < 3 and 0 <= curve[0][2] <= 1
    hybrid.plot_rewards({"hybrid": [curve]}, args)
    assert (tmp_path / "hybrid-reward.png").exists()
