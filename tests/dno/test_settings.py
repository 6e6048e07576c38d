"""Every setting's range, the rows of the models, and what is filled in."""

from dataclasses import fields

import pytest

from dno.errors import UserError
from dno.models.specs import DEFAULT_MODEL, MODELS, PACKAGE_ROOT, ModelSpec, model_spec
from dno.settings import Settings

PUBLISHED = {
    "prompt": "white duck", "num_steps": 50, "eta": 1, "guidance_scale": 5, "seed": 0, "opt_steps": 100,
    "opt_time": 50, "objective": ("black",), "gamma": 0, "subsample": 1, "lr": 0.01, "model": DEFAULT_MODEL,
    "output": "output", "weight_decay": 0, "permutations": 100, "batch_size": 1, "best_of": 1, "evaluate": (),
}  # fmt: skip


def refused(**settings):
    with pytest.raises(UserError) as error:
        Settings(**settings).resolve()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_published_defaults():
    settings = Settings().resolve()
    assert {name: getattr(settings, name) for name in PUBLISHED} == PUBLISHED
    assert model_spec(DEFAULT_MODEL).source == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_every_setting_has_a_help_text():
    assert all(len(setting.metadata["help"]) > 10 for setting in fields(Settings) if setting.metadata["group"])


def test_a_models_row_fills_in_what_the_user_left_open(monkeypatch):
    monkeypatch.setitem(MODELS, "small", lambda: ModelSpec("somewhere", 7, 2.5))
    settings = Settings(model="small").resolve()
    assert (settings.num_steps, settings.opt_time, settings.guidance_scale) == (7, 7, 2.5)
    assert (settings.height, settings.width) == (None, None)
    given = Settings(model="small", num_steps=3, guidance_scale=0.0, height=8).resolve()
    assert (given.num_steps, given.opt_time, given.guidance_scale) == (3, 3, 0.0)
    assert (given.height, given.width) == (8, None)
    # The sprites' row, and a model without one.
    sprites = Settings(model="sprites").resolve()
    assert sprites.num_steps == 25 and model_spec("sprites").source == str(PACKAGE_ROOT / "sprites")
    assert {"white", "duck"} <= set(model_spec("sprites").words)
    assert Settings(model="some/folder").resolve().num_steps == 50 and not model_spec("some/folder").words


AT_LEAST_ONE = (
    "num_steps", "batch_size", "best_of", "height", "width", "opt_steps", "opt_time", "permutations", "patience",
    "save_every",
)  # fmt: skip
AT_LEAST_ZERO = ("eta", "guidance_scale", "seed", "weight_decay", "gamma", "subsample", "min_probability")
ABOVE_ZERO = ("lr", "max_grad_norm", "max_seconds")
NUMBERS = ("eta", "guidance_scale", "lr", "gamma", "weight_decay", "max_grad_norm", "target_reward")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, 0, "expected 1 or more") for name in AT_LEAST_ONE]
    + [(name, -1, "expected 0 or more") for name in AT_LEAST_ZERO]
    + [(name, 0.0, "above 0") for name in ABOVE_ZERO]
    + [(name, float(value), "finite") for name in NUMBERS for value in ("nan", "inf")]
    + [("eta", 1.01, "from 0 to 1"), ("min_probability", 1.01, "from 0 to 1"), ("opt_time", 51, "1 to 50")]
    + [("precision", "fp8", "auto, fp32, bf16, fp16"), ("device", "tpu", "cpu, cuda, mps"),
       ("checkpointing", "some", "partial, step, block"), ("optimizer", "lion", "adamw, sgd"),
       ("precondition", "diagonal", "spectral"), ("objective", (), "at least one reward"),
       ("noise", "no/such.safetensors", "does not exist"), ("model_config", "no/such", "does not exist")],
)  # fmt: skip
def test_out_of_range(name, value, expected):
    message = refused(**{name: value})
    assert message.startswith(f"--{name} ") and expected in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"eta": 0.0, "opt_time": 10}, ("--eta 0", "--opt_time 10")),
     ({"num_steps": 10, "opt_time": 11}, ("--opt_time 11", "1 to 10")),
     ({"precondition": "spectral", "optimizer": "sgd"}, ("--precondition", "--optimizer")),
     ({"precondition": "spectral", "weight_decay": 0.01}, ("--precondition", "--weight_decay")),
     ({"noise": __file__, "best_of": 2}, ("--noise", "--best_of"))],
)  # fmt: skip
def test_settings_that_exclude_each_other(settings, words):
    message = refused(**settings)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "settings",
    [{"eta": 0.0}, {"eta": 0.0, "opt_time": 50}, {"opt_time": 1}, {"guidance_scale": 0.0}, {"subsample": 0},
     {"precondition": "spectral"}, {"min_probability": 1.0}, {"target_reward": -3.0}],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(settings):
    resolved = Settings(**settings).resolve()
    assert {name: getattr(resolved, name) for name in settings} == settings


def test_one_name_will_do_for_a_list_of_rewards():
    settings = Settings(objective="white", evaluate="jpeg").resolve()
    assert (settings.objective, settings.evaluate) == (("white",), ("jpeg",))
