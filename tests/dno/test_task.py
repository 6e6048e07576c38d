"""The task of a run: checked before anything is loaded, then model, prompts and rewards as functions of noises."""

import pytest
import torch

import dno
from dno import UserError
from dno.methods import method_class
from dno.models.specs import MODELS, ModelSpec
from dno.noise import draw_noise
from dno.resume import prepare
from dno.task import Loaded, Task
from dno.team import Team

METHOD = method_class("dno")


@pytest.fixture
def settings(tiny_folder):
    """settings(**given): resolved ones for the tiny model."""
    return lambda **given: prepare({"model": str(tiny_folder), "num_steps": 3, "seed": 1, **given}).settings


@pytest.fixture
def make(settings):
    """make(arguments of `Task`, **settings)"""
    return lambda noise=None, loaded=None, team=None, **given: Task(settings(**given), noise, loaded=loaded, team=team)


def test_rendering_and_scoring(make):
    task = make(prompt=["white duck", "red car"], objective={"black": 2, "contrast": 0.5}, evaluate="jpeg")
    noise = task.draw()
    assert torch.equal(noise, draw_noise([1, 2], 3, (4, 8, 8))) and task.latent_shape == (2, 4, 8, 8)
    images = task.render(noise.unbind(), [0, 1])
    assert images.shape == (2, 3, 16, 16)
    losses, rewards = task.losses(images, [0, 1])
    assert rewards.keys() == {"black", "contrast"} and losses.shape == (2,)
    torch.testing.assert_close(losses, -2 * rewards["black"] - 0.5 * rewards["contrast"])
    watched = task.evaluate(images, [0, 1])
    assert watched.keys() == {"jpeg"} and (watched["jpeg"] < 0).all()
    assert not task.losses_or_nan(images.requires_grad_(), [0, 1])[0].requires_grad


def test_rows_are_images_in_any_order_and_may_repeat(make):
    task = make(prompt=["white duck", "red car", "green tree"], negative_prompt=["", "a", "b"])
    noise = task.draw()
    images = task.render(noise.unbind(), [0, 1, 2])
    rows = [2, 0, 2]
    some = task.render(noise[:, rows].unbind(), rows)
    torch.testing.assert_close(some, images[rows], rtol=1e-5, atol=1e-6)
    swapped = task.render(noise[:, rows].unbind(), [0, 0, 2])
    assert not torch.allclose(swapped[0], images[2], atol=1e-4), "another prompt"


@pytest.mark.parametrize("candidate", [0, 3])
def test_draws_are_keyed_by_seed_and_candidate(make, candidate):
    task = make(batch_size=2, seed=7)
    assert torch.equal(task.draw(candidate), draw_noise([7, 8], 3, (4, 8, 8), candidate))


def test_a_given_x_T_is_completed_by_the_images_own_draws(make):
    given = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    task = make(given, batch_size=2)
    noise = task.given_noise()
    assert torch.equal(noise[3:], given) and torch.equal(noise[:3], task.draw()[:3])
    assert make(batch_size=2).given_noise() is None
    whole = draw_noise([5], 3, (4, 8, 8))
    assert torch.equal(make(whole).given_noise(), whole)


def test_everything_is_checked_before_anything_is_loaded(settings, monkeypatch, tmp_path):
    order, mine = [], f"{tmp_path / 'mine.py'}:mean"
    (tmp_path / "mine.py").write_text("def mean(inference_dtype=None, device=None):\n    return None\n")
    monkeypatch.setattr("dno.task.load_model", lambda *_: order.append("model") or pytest.fail("loaded"))
    for given in (
        {"objective": "blac"}, {"objective": ["black", "black"]}, {"objective": "black:0"}, {"evaluate": "black"},
        {"evaluate": "jpeg:2"}, {"objective": "sprites/judge.py:judge_loss_fn"}, {"objective": "no/such.py:f"},
        {"lora": "no/such.safetensors"}, {"vae": "no/such.safetensors"}, {"model": "no/such/model"},
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            Task(settings(**given), before_loading=lambda: order.append("begin"))
        assert "\n" not in str(error.value)
    for noise in (torch.zeros(3, 1, 4, 8, 8), torch.zeros(4, 2, 4, 8, 8), torch.zeros(4, 4, 8, 8)):
        with pytest.raises(UserError, match="noise"):
            Task(settings(), noise, before_loading=lambda: order.append("begin"))
    with pytest.raises(UserError, match="'jpeg' is not differentiable; use --estimator hybrid"):
        Task(settings(objective="jpeg"), needs_gradient=True, before_loading=lambda: order.append("begin"))
    with pytest.raises(UserError, match="the reward 'mean' has the name of another metric"):
        Task(settings(evaluate=mine), reserved=("mean",), before_loading=lambda: order.append("begin"))
    assert order == []


def test_what_is_done_before_loading_is_done_once(settings, monkeypatch):
    order, real = [], dno.task.load_model
    monkeypatch.setattr("dno.task.load_model", lambda *a: order.append("model") or real(*a))
    Task(settings(), before_loading=lambda: order.append("begin"))
    assert order == ["begin", "model"]


def test_what_is_shared_is_loaded_once_and_left_whole(make, monkeypatch):
    shared = Loaded()
    first = make(loaded=shared, objective="contrast", evaluate="jpeg")
    assert shared.model is first.model and shared.loss is first.loss and shared.evaluation is first.evaluation
    assert first.model.pipe.text_encoder is not None
    monkeypatch.setattr("dno.task.load_model", lambda *_: pytest.fail("loaded again"))
    second = make(loaded=shared, objective="contrast", evaluate="jpeg", prompt="red car")
    assert second.model is first.model and second.loss is first.loss
    monkeypatch.undo()
    assert make().model.pipe.text_encoder is None, "one run's own model needs no text encoder any more"


def test_the_model_is_left_as_it_came(make, tiny_model):
    with make(loaded=Loaded(tiny_model), checkpointing="block") as task:
        method = METHOD(task)
        assert tiny_model.network.is_gradient_checkpointing and method.task is task
    assert not tiny_model.network.is_gradient_checkpointing


def test_the_leader_alone_evaluates(make):
    class Follower(Team):
        rank, size, leads = 1, 2, False

    task = make(evaluate="jpeg", estimator="hybrid", team=Follower())
    assert task.evaluate(torch.zeros(1, 3, 16, 16), [0]) == {}


@pytest.mark.parametrize(("eta", "opt_time"), [(1.0, None), (1.0, 2), (1.0, 1), (0.0, None)])
def test_the_plan_counts_the_steps_that_have_a_graph(make, eta, opt_time):
    """As many as the network is called with a graph: the gradient reaches back to the first step whose noise counts."""
    settings = {"num_steps": 4, "eta": eta, "opt_time": opt_time}
    task = make(**settings, checkpointing="none")
    method, graphs = METHOD(task), []
    task.model.network.register_forward_hook(lambda module, inputs, output: graphs.append(output[0].requires_grad))
    next(method.iterations(method.start()))
    assert sum(graphs) == task.plan.num_steps == (opt_time or 4)
    partial = METHOD(make(**settings, checkpointing="partial")).task.plan
    assert partial.num_steps == (opt_time or 4) and partial.kept_steps <= max(partial.num_steps - 1, 1)


def test_skipping_the_network_needs_no_graph_of_it(make):
    task = METHOD(make(gradient="skip_unet", checkpointing="none")).task
    assert task.plan.num_steps == 0


def test_sizes(make):
    task = make(height=20, width=12)
    assert task.size == (20, 12) and task.latent_shape == (1, 4, 10, 6)
    assert make(height=8).size == (8, 16) and make().size == (16, 16)
    for given, words in (
        ({"height": 17}, "--height is 17; expected a multiple of the VAE's scale factor 2, such as 16"),
        ({"width": 1}, "--width is 1; .* such as 2"),
        ({"original_size": (8, 8)}, "--original_size: .* is not told of sizes"),
        ({"subsample": 4, "height": 8}, "do not divide the 128 values of one noise; lower it"),
    ):
        with pytest.raises(UserError, match=words):
            make(**given)
    with pytest.raises(UserError, match="4 channels for --height 16 --width 8; got 4, 16 and 16"):
        make(torch.zeros(4, 1, 4, 8, 4))


def test_the_precision_is_that_of_the_model(make, tiny_folder):
    assert make().precision == "fp32" and make(precision="bf16").precision == "bf16"
    half = dno.load_model(str(tiny_folder), torch.bfloat16)
    task = make(loaded=Loaded(half))
    assert task.precision == "bf16" and task.dtype == torch.bfloat16 and task.state_dtype == torch.float32
    double = make(loaded=Loaded(dno.load_model(str(tiny_folder), torch.float64)))
    assert double.state_dtype == torch.float64 and double.draw().dtype == torch.float64 and double.precision == "auto"


def test_words_that_a_small_model_does_not_know_are_named_once(make, tiny_folder, monkeypatch):
    monkeypatch.setitem(MODELS, "toy", lambda: ModelSpec(str(tiny_folder), num_steps=2, words=("white", "duck")))
    with pytest.warns(UserWarning, match="toy was not trained on 'zebra', 'gnu', 'emu'; it knows white, duck") as seen:
        make(model="toy", prompt=["White zebra", "white Zebra", "gnu"], negative_prompt="duck, emu!")
    assert len([warning for warning in seen if "trained" in str(warning.message)]) == 1


def test_a_weak_guidance_is_named(tiny_folder):
    with pytest.warns(UserWarning, match="--guidance_scale 0.5 is as 1"):
        dno.align(model=str(tiny_folder), num_steps=2, opt_steps=1, guidance_scale=0.5)


def test_a_negative_prompt_without_guidance_is_named(tiny_folder):
    with pytest.warns(UserWarning, match="--negative_prompt has no effect at --guidance_scale 1"):
        dno.align(model=str(tiny_folder), num_steps=2, opt_steps=1, guidance_scale=1.0, negative_prompt="red car")
