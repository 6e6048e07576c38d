"""Settings: their types and ranges, the rows of the models, and what is filled in."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from dno.errors import UserError
from dno.methods import METHODS, method_class
from dno.models.specs import DEFAULT_MODEL, MODELS, PACKAGE_ROOT, ModelSpec, model_spec
from dno.resume import make_settings

PUBLISHED = {
    "prompt": "white duck", "num_steps": 50, "eta": 1, "guidance_scale": 5, "seed": 0, "opt_steps": 100,
    "opt_time": 50, "objective": ("black",), "gamma": 0, "subsample": 1, "lr": 0.01, "model": DEFAULT_MODEL,
    "output": "output", "weight_decay": 0, "permutations": 100, "batch_size": 1, "best_of": 1, "evaluate": (),
}  # fmt: skip


def resolve(method="dno", **settings):
    return make_settings(method_class(method), settings).resolve()


def refused(method="dno", **settings):
    with pytest.raises(UserError) as error:
        resolve(method, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_published_defaults():
    settings = resolve()
    assert {name: getattr(settings, name) for name in PUBLISHED} == PUBLISHED
    assert model_spec(DEFAULT_MODEL).source == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize("method", METHODS)
def test_groups_share_out_all_settings(method):
    cls = method_class(method).settings_class()
    named = [f.name for group in cls.groups() for f in fields(group)]
    assert sorted(named) == sorted(set(named)) and named == [f.name for f in fields(cls)]
    assert all(len(f.metadata["help"]) > 10 for f in fields(cls))
    assert [group.title for group in cls.groups()][0] == "model" and cls.groups()[-1].title == "output"


def test_a_method_has_no_settings_of_another():
    assert "no setting lr" in refused("best_of_n", lr=0.1) and "no setting rho" in refused("dno", rho=0.1)


def test_a_models_row_fills_in_what_the_user_left_open(monkeypatch):
    monkeypatch.setitem(MODELS, "small", lambda: ModelSpec("somewhere", 7, 2.5, eta=0.5))
    settings = resolve(model="small")
    assert (settings.num_steps, settings.opt_time, settings.guidance_scale, settings.eta) == (7, 7, 2.5, 0.5)
    given = resolve(model="small", num_steps=3, guidance_scale=0.0, eta=1)
    assert (given.num_steps, given.opt_time, given.guidance_scale, given.eta) == (3, 3, 0.0, 1.0)
    # The sprites' row, and a model without one.
    assert resolve(model="sprites").num_steps == 25 and model_spec("sprites").source == str(PACKAGE_ROOT / "sprites")
    assert {"white", "duck"} <= set(model_spec("sprites").words)
    assert resolve(model="some/folder").num_steps == 50 and not model_spec("some/folder").words


AT_LEAST_ONE = (
    "num_steps", "batch_size", "best_of", "height", "width", "opt_steps", "opt_time", "permutations", "patience",
    "save_every", "num_samples", "batch_per_device", "checkpointing_steps", "checkpoints_total_limit",
    "report_images_every", "max_bad_samples",
)  # fmt: skip
AT_LEAST_ZERO = ("guidance_scale", "seed", "weight_decay", "gamma", "backprop_cost")
ABOVE_ZERO = ("lr", "max_grad_norm", "max_seconds", "mu", "timeout")
NUMBERS = ("eta", "guidance_scale", "lr", "gamma", "weight_decay", "max_grad_norm", "target_reward")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, 0, "expected 1 or more") for name in AT_LEAST_ONE]
    + [(name, -1, "expected 0 or more") for name in AT_LEAST_ZERO]
    + [(name, 0.0, "above 0") for name in ABOVE_ZERO]
    + [(name, float(value), "finite") for name in NUMBERS for value in ("nan", "inf")]
    + [(name, value, "from 0 to 1") for name in ("eta", "min_probability") for value in (-0.1, 1.01)]
    + [("subsample", value, "from 0 to 4") for value in (-1, 5)]
    + [("opt_time", 51, "1 to 50"), ("original_size", (0, 64), "1 or more"),
       ("crops_coords_top_left", (0, -1), "0 or more"), ("antithetic", True, "pairs"),
       ("precision", "fp8", "auto, fp32, bf16, fp16"), ("device", "tpu", "cpu, cuda, mps"),
       ("checkpointing", "some", "partial, step, block"), ("optimizer", "lion", "adamw, sgd"),
       ("precondition", "diagonal", "spectral"), ("report_to", ("wandb", "paper"), "tensorboard, wandb, trackio"),
       ("objective", (), "at least one reward"), ("objective", {}, "at least one reward"),
       ("noise", "no/such.safetensors", "does not exist"), ("model_config", "no/such", "does not exist")],
)  # fmt: skip
def test_out_of_range(name, value, expected):
    message = refused(**{name: value}, **({"num_samples": 3} if name == "antithetic" else {}))
    assert message.startswith(f"--{name} ") and expected in message


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan")])
def test_the_range_of_rho(value):
    assert refused("best_of_n", rho=value).startswith("--rho is ")


WRONG = {
    int: ["3", 1.5, True, None, [1], 3.0, float("inf"), 2j, torch.tensor(1), np.array([1, 2])],
    float: ["0.1", True, None, [0.1], 1j, np.zeros(2), torch.ones(2), object()],
    str: [3, True, None, b"x", object(), np.float64(1)],
    bool: ["no", 0, 1, None, "True", np.zeros(1)],
}
SETTINGS = {
    int: ["num_steps", "seed", "batch_size", "opt_steps", "best_of", "permutations", "num_samples", "save_every",
          "checkpointing_steps", "height", "patience", "opt_time", "subsample"],
    float: ["lr", "gamma", "eta", "guidance_scale", "weight_decay", "mu", "max_grad_norm", "timeout", "target_reward"],
    str: ["model", "prompt", "precision", "device", "optimizer", "checkpointing", "output", "lora", "noise", "variant"],
    bool: ["split_guidance", "compile", "draw", "antithetic", "reward_checkpointing"],
}  # fmt: skip
OPTIONAL = {
    "num_steps", "height", "patience", "opt_time", "eta", "guidance_scale", "target_reward", "output", "lora", "noise",
    "variant",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for names in SETTINGS.values() for name in names])
def test_wrong_types_are_one_line(name):
    kind = next(kind for kind, names in SETTINGS.items() if name in names)
    for value in WRONG[kind]:
        if value is None and name in OPTIONAL:
            assert getattr(resolve(**{name: None}), name) == getattr(resolve(), name) or name == "output"
            continue
        message = refused(**{name: value})
        assert message.startswith(f"--{name} is ") and type(value).__name__ in message and len(message) < 200
        assert ("or None" in message) == (name in OPTIONAL), message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("original_size", (64,), "2 whole numbers or None"), ("original_size", (64, 64.0), "2 whole numbers"),
     ("original_size", 64, "2 whole numbers"), ("original_size", "64", "2 whole numbers"),
     ("crops_coords_top_left", None, "2 whole numbers"), ("evaluate", None, "a list of texts"),
     ("evaluate", [1], "a list of texts"), ("report_to", {"wandb"}, "a list of texts"),
     ("prompt", ["a", 2], "a text or a list of texts"), ("prompt", {"a": 1}, "a text or a list of texts"),
     ("negative_prompt", 3, "a text or a list of texts or None"), ("reward_paths", "x", "a dict")],
)  # fmt: skip
def test_wrong_lists_are_one_line(name, value, expected):
    message = refused(**{name: value})
    assert message.startswith(f"--{name} is ") and f"expected {expected}" in message


@pytest.mark.parametrize("value", [None, 3, [3], [None], {"black": None}, {"black": "much"}, {1: 1}, {1, 2}], ids=str)
def test_wrong_objectives_are_one_line(value):
    """What has the form NAME:WEIGHT is checked where the rewards are known, see test_task.py."""
    try:
        assert all(isinstance(text, str) for text in resolve(objective=value).objective) and isinstance(value, dict)
    except UserError as error:
        assert "objective" in str(error) and "\n" not in str(error)


def test_numbers_of_numpy_and_paths_are_taken():
    settings = resolve(
        seed=np.int64(3), lr=np.float32(0.5), gamma=1, num_steps=np.int16(7), model=Path("some") / "folder",
        original_size=[np.int32(8), 16], output=Path("there"), eta=np.float64(1),
    )  # fmt: skip
    got = (settings.seed, settings.lr, settings.gamma, settings.num_steps, settings.model, settings.original_size)
    assert got == (3, 0.5, 1.0, 7, str(Path("some") / "folder"), (8, 16)) and settings.output == "there"
    assert [type(value) for value in got] == [int, float, float, int, str, tuple]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"eta": 0.0, "opt_time": 10}, ("--eta 0", "--opt_time 10")),
     ({"num_steps": 10, "opt_time": 11}, ("--opt_time 11", "1 to 10")),
     ({"precondition": "spectral", "optimizer": "sgd"}, ("--precondition", "--optimizer")),
     ({"precondition": "spectral", "weight_decay": 0.01}, ("--precondition", "--weight_decay")),
     ({"noise": __file__, "best_of": 2}, ("--noise", "--best_of")),
     ({"seed": 2**63}, ("--seed is", "2 ** 63")),
     ({"prompt": []}, ("--prompt is an empty list",)),
     ({"prompt": "x", "negative_prompt": ()}, ("--negative_prompt is an empty list",)),
     ({"prompt": ["a", "b"], "batch_size": 3}, ("--prompt has 2 entries for 3 images",)),
     ({"negative_prompt": ["a", "b"], "batch_size": 3}, ("--negative_prompt has 2 entries for 3 images",)),
     ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, ("--negative_prompt has 2 entries for 3 images",)),
     ({"prompt": ["a", "b"], "negative_prompt": ["d", "e", "f"]}, ("--prompt has 2 entries for 3 images",))],
)  # fmt: skip
def test_settings_that_exclude_each_other(settings, words):
    message = refused(**settings)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("prompt", "negative", "expected"),
    [("a", None, ("a", None, 1)), (["a"], ["b"], ("a", "b", 1)), (["a", "b"], "c", (("a", "b"), "c", 2)),
     ("a", ["b", "c"], ("a", ("b", "c"), 2)), (("a", "b"), ["c", "d"], (("a", "b"), ("c", "d"), 2)),
     ("ab", "", ("ab", "", 1))],
)  # fmt: skip
def test_a_list_of_prompts_says_how_many_images_there_are(prompt, negative, expected):
    settings = resolve(prompt=prompt, negative_prompt=negative)
    assert (settings.prompt, settings.negative_prompt, settings.batch_size) == expected


@pytest.mark.parametrize(
    "settings",
    [{"eta": 0.0}, {"eta": 0.0, "opt_time": 50}, {"opt_time": 1}, {"guidance_scale": 0.0}, {"subsample": 0},
     {"subsample": 4}, {"precondition": "spectral"}, {"min_probability": 1.0}, {"target_reward": -3.0},
     {"antithetic": True}],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(settings):
    resolved = resolve(**settings)
    assert {name: getattr(resolved, name) for name in settings} == settings


def test_one_name_will_do_for_a_list_of_rewards():
    settings = resolve(objective="white", evaluate="jpeg")
    assert (settings.objective, settings.evaluate) == (("white",), ("jpeg",))


def test_what_may_change_on_a_resume():
    for method in METHODS:
        changeable = set(method_class(method).settings_class().changeable())
        assert {"device", "checkpointing", "patience", "draw", "batch_per_device"} <= changeable
        assert not changeable & {"seed", "prompt", "objective", "num_steps", "precision", "noise", "batch_size"}
    assert not set(method_class("dno").settings_class().changeable()) & {"lr", "gamma", "mu", "num_samples", "best_of"}
    assert not set(method_class("best_of_n").settings_class().changeable()) & {"num_candidates", "search", "rho"}
