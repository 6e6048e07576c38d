"""What the project is for, on the embedded model, with few sampling steps."""

import pytest

import dno
from dno import align
from sprites import judge

JUDGE = f"{judge.__file__}:judge_loss_fn"
SETTINGS = {"prompt": "white duck", "num_steps": 10, "opt_steps": 31, "lr": 0.02, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return dno.load_model("sprites")


@pytest.fixture(scope="module")
def darkness(model):
    """Metrics of a run for darkness without and with the regularizer."""
    return {
        gamma: align(model=model, objective="black", evaluate=JUDGE, gamma=gamma, **SETTINGS).metrics
        for gamma in (0.0, 10.0)
    }


def test_darkness_rises_with_and_without_the_regularizer(darkness):
    for metrics in darkness.values():
        assert metrics[-1]["black"] > metrics[0]["black"] + 0.3


def test_the_regularizer_keeps_the_noise_probable_at_equal_reward_and_the_duck_a_duck(darkness):
    free, held = darkness[0.0], darkness[10.0]
    # The end of the regularized run, and the first iteration of the other that is as dark.
    end = held[-1]
    equal = next(metrics for metrics in free if metrics["black"] >= end["black"])
    assert end["probability"] > 0.1 and end["probability"] > 2 * equal["probability"]
    assert end["judge"] > 0.9
    assert free[-1]["judge"] < 0.5, "without it the duck is given up in the end"


def test_the_spectral_step_is_quick(model):
    settings = {**SETTINGS, "opt_steps": 8}
    metrics = align(model=model, objective="black", evaluate=JUDGE, precondition="spectral", **settings).metrics
    best = max((m for m in metrics if m["judge"] > 0.9), key=lambda m: m["black"])
    assert best["black"] > metrics[0]["black"] + 0.3


def test_a_wrong_picture_is_turned_into_its_prompt(model, monkeypatch):
    """Conditioned on another prompt, the picture moves towards its own all the same; both parts of a sum rise."""
    settings = {**SETTINGS, "prompt": "red car", "guidance_scale": 1.0, "opt_steps": 8}
    wrong = model.encode_prompts(["white duck"])
    monkeypatch.setattr(model, "encode_prompts", lambda *_, **__: wrong)
    alone = align(model=model, objective="sprites", **settings).metrics
    assert alone[-1]["sprites"] > alone[0]["sprites"] + 1
    both = align(model=model, objective=["sprites:0.05", "black"], **settings).metrics
    assert both[-1]["sprites"] > both[0]["sprites"] and both[-1]["black"] > both[0]["black"]
