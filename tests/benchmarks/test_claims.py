"""The claims' statistics against known answers, and the whole command on a tiny random model, started twice."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from claims import command, intervals  # noqa: E402
from claims.intervals import Comparison, best_while, first_at_least, frontier, interval, verdict  # noqa: E402
from claims.methods import add_methods  # noqa: E402
from claims.plan import Measurement, Size, plan  # noqa: E402

from dno import align  # noqa: E402
from dno.methods import METHODS  # noqa: E402


@pytest.fixture(autouse=True)
def own_methods():
    """Methods that a test adds are not there for the next one."""
    others = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(others)


# --- statistics ----------------------------------------------------------------------------------------------


def test_the_interval_is_students_over_the_means_of_the_prompts():
    # Four prompts of mean 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, t for 3 degrees of freedom 3.182.
    values = np.array([[0.5, 1.5], [2, 2], [2, 4], [4, 4]])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert interval(values) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_one_prompt_or_a_lost_value_says_nothing():
    assert interval([[1.0, 2.0]])[1:] == (-math.inf, math.inf)
    assert interval([[1.0], [math.nan]])[1:] == (-math.inf, math.inf)


def test_the_quantiles_continue_smoothly_beyond_the_table():
    assert intervals.t_975(7) == 2.365
    assert intervals.t_975(31) == pytest.approx(2.0395, abs=0.004)
    assert intervals.t_975(10**6) == pytest.approx(1.960, abs=1e-3)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for _, low, high in (interval(rng.normal(size=(8, 3))) for _ in range(2000))]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(
    "lows, expected",
    [
        ([0.1, 0.2], "holds"),
        ([0.1, -0.2], "holds partly"),
        ([-0.1, -3], "does not hold here"),
        ([], "not measured"),
        ([None], "not measured"),
        ([0.1, None], "holds"),
    ],
)
def test_the_verdict_follows_from_the_intervals_alone(lows, expected):
    comparisons = [None if low is None else Comparison("", low + 1, low, low + 2, 8) for low in lows]
    assert verdict(comparisons) == expected


def test_an_interval_below_zero_is_the_reverse_and_one_around_it_undecided():
    assert Comparison.of("", np.array([[-1.0], [-1.1], [-0.9]])).outcome == "the reverse"
    assert Comparison.of("", np.array([[-1.0], [1.1], [0.1]])).outcome == "undecided"
    assert Comparison.of("", np.array([[1.0], [1.1], [0.9]])).outcome == "yes"


def test_the_frontier_keeps_what_nothing_beats_in_both():
    points = [(1, 0.9), (2, 0.8), (1.5, 0.7), (3, 0.1), (0.5, 0.9), (2, 0.6)]
    assert frontier(points) == [(1, 0.9), (2, 0.8), (3, 0.1)]


def test_rewards_on_the_frontier_count_only_where_the_judge_agrees():
    rewards = np.array([[[0.0, 5.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0]]])
    judged = np.array([[[1.0, 0.95, 0.9, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    assert best_while(rewards, judged, 0.9).tolist() == [[5.0, 1.0]]


def test_the_first_iteration_at_a_level_is_found_or_counted_as_all():
    curves = np.array([[[0.0, 1.0, 3.0, 2.0], [0.0, math.nan, 1.0, 1.0]]])
    assert first_at_least(curves, np.array([[1.0, 2.0]])).tolist() == [[1, 4]]


def test_a_budget_buys_whole_iterations_and_at_least_one():
    best = intervals.best_so_far(np.array([1.0, math.nan, 0.5, 4.0]))
    assert best.tolist() == [1, 1, 1, 4]
    assert [intervals.at_budget(best, 30, budget) for budget in (1, 119, 120, 1000)] == [1, 1, 4, 4]


# --- costs and keys ------------------------------------------------------------------------------------------


def test_denoiser_calls_of_each_kind():
    size = Size(num_steps=10)

    def calls(kind="run", **settings):
        return Measurement("", kind, 1, settings).calls(size)

    assert calls("draws") == 10
    assert calls() == calls("start") == calls("restarts") == calls(eta=0.0) == 30
    assert calls(opt_time=2) == 14
    assert calls(gradient="skip_unet") == 10
    assert calls(estimator="hybrid", num_samples=8) == 30 + 10 + 80
    assert calls(estimator="hybrid_image", num_samples=8) == 30
    assert calls(estimator="zo", num_samples=8) == 90


def test_the_default_size_has_eight_prompts_and_three_seeds_and_names_are_not_shared():
    size = Size()
    assert len(set(size.prompts)) == 8 and size.seeds == 3
    rows = {}
    for row in (row for part in plan(size).values() for row in part):
        assert rows.setdefault(row.name, row) == row
    keys = [json.dumps(row.key(size), sort_keys=True) for row in rows.values()]
    assert len(set(keys)) == len(keys), "two rows measure the same"
    gammas = {row.settings.get("gamma", 0) for row in plan(size)["b"]}
    assert gammas == {0, 0.1, 1, 10}


# --- the whole command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    """A configuration of seconds, on the tiny random model, and where it writes."""
    sizes = (
        "--prompts 2 --seeds 1 --num_steps 2 --iterations 2 --estimates 1 --draws 4 --samples 6 --image_samples 6 "
        "--processes 1"
    )
    return [*sizes.split(), "--model", str(tiny_folder), "--work", str(tmp_path_factory.mktemp("claims"))]


def test_the_command_measures_everything_writes_the_page_and_does_so_once(flags, monkeypatch):
    work = Path(flags[-1])
    size = command.size_of(command.parse(flags, ""))
    rows = {row.name for part in plan(size).values() for row in part}

    first = command.main("", [*flags, "--claims", "ab"])
    _, verdicts = (work / "claims.md").read_text(encoding="utf-8").split("## Verdicts")
    sections = verdicts.split("## (")
    assert first > 0 and all("not measured" in section.lower() for section in sections[3:]), "c to f"
    assert "not measured" not in sections[2], "b"

    second = command.main("", flags)
    page = (work / "claims.md").read_text(encoding="utf-8")
    measured = [json.loads(path.read_text()) for path in work.glob("*.json")]
    assert len(measured) == first + second
    assert sum(entry["prompt"] is not None for entry in measured) == 2 * len(rows)
    assert "not measured" not in page.split("## Verdicts")[1].lower()
    for letter in "abcdef":
        assert f"## ({letter})" in page and (work / f"claims-{letter}.png").stat().st_size > 1000
    verdicts = page.count("Verdict: **")
    assert verdicts == page.split("## (a)")[0].count("| (") > 10

    monkeypatch.setattr("claims.page.draw", lambda *_: True)
    assert command.main("", flags) == 0, "a second start measures nothing"
    assert (work / "claims.md").read_text(encoding="utf-8") == page


def test_a_lost_measurement_is_made_again_and_only_that(flags, monkeypatch):
    monkeypatch.setattr("claims.page.draw", lambda *_: True)
    work = Path(flags[-1])
    lost = next(work.glob("black-gamma-1-*.json"))
    lost.unlink()
    assert command.main("", flags) == 1 and lost.is_file()


def test_random_restarts_begin_with_the_plain_run_and_then_with_the_draws(flags):
    work = Path(flags[-1])

    def images(name):
        (path,) = work.glob(f"{name}-white-duck-*.json")
        return json.loads(path.read_text())["images"]

    plain, draws = images("black"), images("draws")
    assert draws[0]["black"][0] == pytest.approx(plain[0]["black"][0], abs=1e-5)
    assert images("black-x-t-only")[0]["black"][0] == pytest.approx(plain[0]["black"][0], abs=1e-5)
    assert images("black-x-t-only")[0]["black"][1] != plain[0]["black"][1]
    assert images("black-gamma-10")[0]["probability"][0] == pytest.approx(plain[0]["probability"][0])


def test_a_wrong_letter_is_refused():
    with pytest.raises(SystemExit):
        command.main("", ["--claims", "xyz"])


# --- the methods of its own ----------------------------------------------------------------------------------

COMMON = {"objective": "black", "num_steps": 2, "batch_size": 2, "seed": 5}


def test_restarts_after_each_iteration_are_independent_draws(tiny_model):
    add_methods()
    restarts = align(tiny_model, method="restarts", block=1, opt_steps=3, **COMMON)
    draws = align(tiny_model, method="best_of_n", num_candidates=3, candidates_per_iteration=1, **COMMON)
    found, expected = ([line["rewards"] for line in result.metrics] for result in (restarts, draws))
    assert np.allclose(found, expected, atol=1e-5) and len({*np.ravel(found)}) == 6


def test_restarts_climb_between_them_and_resume(tiny_model, tiny_folder, tmp_path):
    add_methods()
    settings = {"method": "restarts", "block": 2, **COMMON}
    whole = align(tiny_model, opt_steps=4, **settings).metrics
    align(str(tiny_folder), opt_steps=2, folder=tmp_path / "run", draw=False, **settings)
    resumed = align(resume=tmp_path / "run", opt_steps=4).metrics
    assert [line["rewards"] for line in resumed] == [line["rewards"] for line in whole]
    assert whole[1]["reward"] > whole[0]["reward"] and whole[3]["reward"] > whole[2]["reward"]


def test_x_t_alone_moves_and_every_noise_counts(tiny_model):
    add_methods()
    first = align(tiny_model, opt_steps=1, **COMMON)
    moved = align(tiny_model, method="start_only", opt_steps=2, lr=0.1, **COMMON)
    assert moved.steps == [1, 1] and moved.metrics[0]["rewards"] == first.metrics[0]["rewards"]
    assert torch.equal(moved.noise[:-1], first.noise[:-1]) and not torch.equal(moved.noise[-1], first.noise[-1])
    replayed = align(tiny_model, noise=moved.noise, opt_steps=1, **COMMON)
    assert np.allclose(replayed.metrics[0]["rewards"], moved.rewards, atol=1e-5)
