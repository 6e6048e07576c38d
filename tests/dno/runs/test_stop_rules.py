"""When an image is done, and which of its iterations is the best."""

import math

import pytest
import torch

from dno.runs.stop_rules import Best, StopRules


def follow(rewards, probabilities=None, **rules):
    """(the best step, why and where it stopped) of these rewards, one per iteration."""
    best, rules = Best(), StopRules(**rules)
    for step, reward in enumerate(rewards):
        better, why = best.observe(step, reward, probabilities and probabilities[step], rules)
        if better:
            best = Best(reward, step)
        if why:
            return best.step, why, step
    return best.step, None, None


def test_without_rules_nothing_stops_and_the_first_of_the_highest_is_the_best():
    assert follow([1.0, 3.0, 2.0, 3.0]) == (1, None, None)
    assert follow([1.0] * 100) == (0, None, None)


def test_what_is_not_finite_is_never_the_best():
    assert follow([math.nan, 1.0, math.inf, math.nan, 0.5]) == (1, None, None)
    assert follow([math.nan, -math.inf]) == (None, None, None)


def test_the_target():
    assert follow([1.0, 2.0, 2.5, 9.0], target_reward=2.5) == (2, "reward 2.5 reached the target 2.5", 2)
    assert follow([1.0, 2.0], target_reward=2.5) == (1, None, None)
    assert follow([-3.0, -1.0], target_reward=-2.0)[2] == 1
    assert follow([math.inf, math.nan], target_reward=0.0) == (None, None, None), "no number reached it"


def test_patience_counts_from_the_best():
    assert follow([1, 2, 1, 1, 1, 1], patience=3) == (1, "no better reward in 3 iterations", 4)
    assert follow([1, 2, 1, 1, 3, 1, 1], patience=3) == (4, None, None)
    assert follow([math.nan] * 9, patience=3)[1:] == ("no better reward in 3 iterations", 3)


def test_an_improbable_iteration_no_longer_counts():
    best, why, step = follow([1.0, 2.0, 9.0], [1.0, 0.5, 0.01], min_probability=0.1)
    assert (best, step) == (1, 2) and why == "P(z) 0.01 fell below 0.1"
    assert follow([1.0, 2.0], [0.1, 0.1], min_probability=0.1) == (1, None, None)
    assert follow([1.0, 2.0], min_probability=0.1) == (1, None, None), "a method without P(z)"


def test_a_target_that_is_lowered_is_reached_by_the_best_so_far():
    """As on resume: the next iteration need not reach it again."""
    better, why = Best(5.0, 2).observe(3, 1.0, None, StopRules(target_reward=4.0))
    assert not better and "reward 5 reached the target 4" in why


@pytest.mark.parametrize("noise", [None, torch.randn(2, 4, 8, 8)])
def test_packed_and_unpacked(noise):
    best = Best(0.25, 7, torch.randn(3, 8, 8), noise)
    tensors, values = best.pack()
    again = Best.unpack(tensors, values)
    assert (again.reward, again.step) == (0.25, 7) and torch.equal(again.image, best.image)
    assert again.noise is None if noise is None else torch.equal(again.noise, noise)
    empty = Best.unpack(*Best().pack())
    assert empty == Best()
