"""Rewards by name and from a user's file: what is read, what is checked, and what a mistake is told."""

import hashlib

import numpy as np
import pytest
import torch

import rewards
from dno import align
from dno.errors import UserError
from dno.objectives import (
    METRICS,
    Losses,
    Objective,
    describe,
    objective_texts,
    parse_evaluations,
    parse_objective,
    parse_objectives,
)
from rewards import RFUNCTIONS

PROMPTS = ["white duck", "red car"]

# The format of the published README, section 3, with its indentation; a model put in, and `return loss_fn` added.
RECIPE = """
import torch

# The format for custom reward function.
# The output is loss, i.e., negative of reward function.
def custom_loss_fn(inference_dtype = None, device = None):\x20
\t\t# load your model here
    your_model = Redness().to(device, dtype=inference_dtype)
  \t
    # If your wish to do optimization with gradient.
    # The loss_fn must be differentiable w.r.t im_pix_un.
    def loss_fn(im_pix_un, prompts):
      # denormalize the image output from diffusion model
      im_pix = ((im_pix_un / 2) + 0.5).clamp(0, 1)\x20\x20
      # do the inference here
      scores = your_model(im_pix, prompts)
      loss = - scores
      return loss

    return loss_fn


class Redness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 1, bias=False).requires_grad_(False)
        self.layer.weight.copy_(torch.tensor([2.0, -1.0, -1.0]).view(1, 3, 1, 1))

    def forward(self, images, prompts):
        assert len(images) == len(prompts)
        return self.layer(images).mean(dim=(1, 2, 3))
"""


@pytest.fixture
def write(tmp_path):
    """write(code) -> the path of a Python file with a function `score` in it."""

    def write(code, name="my rewards.py"):
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return write


def factory(loss_fn):
    return lambda inference_dtype=None, device=None: loss_fn


def losses(*loss_fns, weights=(1.0, 1.0)):
    return Losses([Objective(f"r{i}", weight, factory(f)) for i, (f, weight) in enumerate(zip(loss_fns, weights))])


def refused(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading.


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [("black", "black", 1), ("white:0.5", "white", 0.5), ("jpeg:-2", "jpeg", -2), ("contrast:1e-3", "contrast", 1e-3)],
)
def test_a_name_and_a_weight(text, name, weight):
    assert parse_objective(text, RFUNCTIONS) == Objective(name, weight, RFUNCTIONS[name])


@pytest.mark.parametrize("weight", ["", ":0.25"])
def test_a_file_a_function_and_a_weight(write, weight):
    path = write("def score(inference_dtype=None, device=None):\n    return 42\n")
    objective = parse_objective(f"{path}:score{weight}", RFUNCTIONS)
    assert (objective.name, objective.weight, objective.factory()) == ("score", float(weight[1:] or 1), 42)
    assert objective.differentiable


@pytest.mark.parametrize(
    ("text", "words"),
    [("blac", ("'blac'", "white, black, contrast, jpeg", "FILE.py:FUNCTION")),
     ("black:", ("weight", "''", "other than 0")),
     ("black:heavy", ("weight", "'heavy'")),
     ("black:0", ("weight", "'0'")),
     ("black:nan", ("weight", "'nan'")),
     ("black:1:2", ("NAME[:WEIGHT]",)),
     ("", ("NAME[:WEIGHT]",)),
     ("file.py", ("'file.py'", "FILE.py:FUNCTION")),
     ("no/such.py:score", ("no/such.py does not exist", "score")),
     (r"C:\my\rewards.py:score:2", (r"C:\my\rewards.py does not exist", "factory score"))],
)  # fmt: skip
def test_what_cannot_be_read(text, words):
    message = refused(parse_objective, text, RFUNCTIONS)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("code", "words"),
    [("x = 1\n", ("has no function score", "score(inference_dtype=None, device=None)")),
     ("score = 1\n", ("has no function score",)),
     ("import no_such_package\n", ("could not be imported", "ModuleNotFoundError", "my rewards.py:1")),
     ("x = 1\nraise ValueError('two\\nlines')\n", ("ValueError: two lines (my rewards.py:2)",)),
     ("def score(:\n", ("could not be imported: SyntaxError",))],
)  # fmt: skip
def test_a_file_with_a_mistake(write, code, words):
    message = refused(parse_objective, f"{write(code)}:score", RFUNCTIONS)
    assert all(word in message for word in words)


def test_a_list_keeps_its_order_and_has_no_name_twice():
    objectives = parse_objectives(["white:0.5", "black", "contrast:-1"], RFUNCTIONS)
    assert describe(objectives) == "0.5 * white + black + -1 * contrast"
    assert "'black' is given 2 times" in refused(parse_objectives, ["black", "white", "black:2"], RFUNCTIONS)


@pytest.mark.parametrize(
    ("value", "texts"),
    [("black", ("black",)), ("black:0.5", ("black:0.5",)), (["black", "white:-2"], ("black", "white:-2")),
     (("black",), ("black",)), ((), ()), ({}, ()),
     ({"black": 1, "white": 0.5}, ("black", "white:0.5")), ({"black": 2}, ("black:2",)), ({"black": 2.0}, ("black:2",)),
     ({"black": 1e-9}, ("black:1e-09",)), ({"black": 0.1 + 0.2}, ("black:0.30000000000000004",)),
     ({"black": np.float32(0.5)}, ("black:0.5",)), ({r"C:\my.py:score": 1.0}, (r"C:\my.py:score",))],
)  # fmt: skip
def test_ways_to_write_objectives_in_python(value, texts):
    assert objective_texts(value) == texts


def test_a_dict_of_weights_is_read_back_exactly():
    weights = {"black": 0.1 + 0.2, "white": -1e-300, "contrast": 3}
    assert {o.name: o.weight for o in parse_objectives(weights, RFUNCTIONS)} == weights


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "got None; expected a name"), (3, "got 3; expected a name"), (0.5, "got 0.5"), (True, "got True"),
     ("", "got ''"), (["black", ""], "got ''"), (["black", None], "got ['black', None]"), ({"": 1}, "got ''"),
     ({3: 1}, "got 3"), ({"black"}, "got {'black'}"), (b"black", "got b'black'"),
     ({"black": "much"}, "the weight of 'black' is 'much'; expected a number"), ({"black": None}, "'black' is None"),
     ({"black": True}, "'black' is True"), ([("black", 1)], "got [('black', 1)]")],
)  # fmt: skip
def test_what_is_no_objective(value, words):
    assert words in refused(objective_texts, value)
    assert refused(objective_texts, value, "evaluate").startswith("evaluate: ")


@pytest.mark.parametrize("weight", [0, float("nan"), float("inf")])
def test_a_weight_that_weighs_nothing_is_refused_when_it_is_read(weight):
    assert "expected a number other than 0" in refused(parse_objectives, {"black": weight}, RFUNCTIONS)


def test_evaluations_have_no_weights():
    assert [e.name for e in parse_evaluations({"white": 1, "black": 1}, RFUNCTIONS)] == ["white", "black"]
    assert "--evaluate white:0.5" in refused(parse_evaluations, ["black", "white:0.5"], RFUNCTIONS)


def test_further_names_can_be_reserved(write):
    path = write("def score(inference_dtype=None, device=None): pass\n")
    assert parse_objectives([f"{path}:score"], RFUNCTIONS)[0].name == "score"
    for parse in (parse_objectives, parse_evaluations):
        message = refused(lambda parse=parse: parse([f"{path}:score"], RFUNCTIONS, reserved=(*METRICS, "score")))
        assert "rename the function" in message


@pytest.mark.parametrize("name", METRICS)
def test_a_function_must_not_have_the_name_of_another_metric(write, name):
    path = write(f"def {name}(inference_dtype=None, device=None): pass\n")
    assert "rename the function" in refused(parse_objective, f"{path}:{name}", RFUNCTIONS)


def test_the_names_of_the_metrics_are_those_of_a_run(tiny_model):
    (line,) = align(model=tiny_model, num_steps=2, opt_steps=1).metrics
    assert line.keys() == {*METRICS, "black"}


# Calling.


def test_losses_are_summed_with_their_weights_and_rewards_are_not():
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss_fn = losses(lambda x, p: x.mean(dim=(1, 2, 3)), lambda x, p: x[:, 0, 0, 0], weights=(2.0, -0.5))
    total, named = loss_fn(images, PROMPTS)
    mean, corner = images.mean(dim=(1, 2, 3)), images[:, 0, 0, 0]
    torch.testing.assert_close(total, 2 * mean - 0.5 * corner)
    torch.testing.assert_close(named, {"r0": -mean.detach(), "r1": -corner.detach()})
    (gradient,) = torch.autograd.grad(total.sum(), images)
    assert gradient[0, 0, 0, 0] == pytest.approx(2 / 48 - 0.5) and gradient[0, 1, 1, 1] == pytest.approx(2 / 48)


def test_factories_and_losses_get_what_they_are_promised():
    got = []

    def make(inference_dtype=None, device=None):
        got.append((inference_dtype, device))
        return lambda images, prompts: got.append(prompts) or images.sum(dim=(1, 2, 3))

    loss_fn = Losses([Objective("r", 1.0, make)], torch.float32, "cpu")
    loss_fn(torch.zeros(2, 3, 4, 4), PROMPTS)
    assert got == [(torch.float32, "cpu"), PROMPTS]


@pytest.mark.parametrize(
    ("batch", "loss_fn"),
    [(1, lambda x, p: x.mean()),
     (1, lambda x, p: x.mean()[None, None]),
     (2, lambda x, p: x.mean(dim=(1, 2, 3))[:, None]),
     (2, lambda x, p: x.mean(dim=(1, 2, 3)).double()),
     (2, lambda x, p: x.mean(dim=(1, 2, 3)).bfloat16())],
)  # fmt: skip
def test_shapes_and_types_that_mean_one_loss_an_image(batch, loss_fn):
    images = torch.randn(batch, 3, 4, 4, requires_grad=True)
    total, named = losses(loss_fn)(images, PROMPTS[:batch])
    assert total.shape == named["r0"].shape == (batch,) and total.dtype == torch.float32
    torch.testing.assert_close(total, images.mean(dim=(1, 2, 3)), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [(lambda x, p: None, ("NoneType", "return loss", "2 losses")),
     (lambda x, p: 0.5, ("float", "2 losses")),
     (lambda x, p: [0.5, 0.5], ("list", "2 losses")),
     (lambda x, p: x.mean(), ("shape ()", "2 images", "expected (2,)")),
     (lambda x, p: x.mean(dim=1), ("shape (2, 4, 4)", "expected (2,)")),
     (lambda x, p: x.mean(dim=(1, 2, 3)).repeat(2), ("shape (4,)", "expected (2,)")),
     (lambda x, p: x.detach().mean(dim=(1, 2, 3)), ("no gradient", "--estimator hybrid")),
     (lambda x, p: x @ torch.ones(7, 7), ("failed: RuntimeError", "test_objectives.py:")),
     (lambda x, p: {}["score"], ("failed: KeyError: 'score' (test_objectives.py:",))],
)  # fmt: skip
def test_what_is_no_loss(loss_fn, words):
    message = refused(losses(loss_fn), torch.randn(2, 3, 4, 4, requires_grad=True), PROMPTS)
    assert "'r0'" in message and all(word in message for word in words)


def test_without_a_wish_for_gradients_none_is_asked_for():
    total, _ = losses(lambda x, p: x.detach().mean(dim=(1, 2, 3)))(torch.zeros(2, 3, 4, 4), PROMPTS)
    assert total.tolist() == [0, 0]


def test_a_factory_that_fails_or_forgets_to_return():
    def fail(inference_dtype=None, device=None):
        raise FileNotFoundError("weights are\nmissing")

    def forget(inference_dtype=None, device=None):
        def loss_fn(images, prompts): ...

    message = refused(Losses, [Objective("mine", 1.0, fail)])
    assert "'mine' could not be loaded: FileNotFoundError: weights are missing (test_objectives.py:" in message
    assert "'mine' gave NoneType" in (message := refused(Losses, [Objective("mine", 1.0, forget)]))
    assert "return loss_fn" in message


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
     KeyboardInterrupt()],
)  # fmt: skip
def test_memory_and_interruption_are_not_the_rewards_fault(error):
    def loss_fn(images, prompts):
        raise error

    with pytest.raises(type(error)) as raised:
        losses(loss_fn)(torch.zeros(2, 3, 4, 4), PROMPTS)
    assert raised.value is error


def test_the_files_of_losses_are_their_own_whatever_is_configured_later(tmp_path):
    """As when several runs share their rewards and another run with other rewards comes between."""
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())

    def reward(name):
        def factory(inference_dtype=None, device=None):
            rewards.weights.loaded(name, tmp_path / name)
            return lambda images, prompts: images.mean(dim=(1, 2, 3))

        return Objective(name, 1.0, factory)

    rewards.configure()
    first = Losses([reward("a"), reward("b")])
    same_again = Losses([reward("a")])
    rewards.configure()
    other = Losses([reward("c")])
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abc"}
    expected = {name: {"model": name, "file": name, "sha256": digest[name]} for name in "abc"}
    assert first.files == [expected["a"], expected["b"]]
    assert same_again.files == [expected["a"]] and other.files == [expected["c"]]
    assert rewards.loaded_files() == other.files, "what was loaded since `configure`, as ever"


def test_losses_without_weights_have_no_files():
    assert Losses([Objective("black", 1.0, RFUNCTIONS["black"])]).files == []


# The published recipe.


@pytest.mark.parametrize("way", ["file", "row"])
def test_the_published_recipe_climbs(write, tiny_model, monkeypatch, way):
    objective = f"{write(RECIPE)}:custom_loss_fn"
    if way == "row":
        custom_loss_fn = parse_objective(objective, {}).factory
        monkeypatch.setitem(rewards.RFUNCTIONS, "A_Short_Name_For_Your_Reward_Function", custom_loss_fn)
        objective = "A_Short_Name_For_Your_Reward_Function"
    result = align(model=tiny_model, objective=objective, num_steps=3, opt_steps=4, lr=0.05, batch_size=2)
    climbed = [line["reward"] for line in result.metrics]
    assert climbed == sorted(climbed) and climbed[-1] > climbed[0] + 1e-3
    red, green, blue = (result.images / 2 + 0.5).clamp(0, 1).mean(dim=(2, 3)).T
    torch.testing.assert_close(result.rewards, 2 * red - green - blue)
    name = objective.rpartition(":")[2].removesuffix("_loss_fn")
    assert result.metrics[0][name] == pytest.approx(climbed[0])


def test_the_recipe_as_it_was_printed_is_told_what_it_forgot(write, tiny_model):
    path = write(RECIPE.replace("    return loss_fn\n", ""))
    message = refused(lambda: align(model=tiny_model, objective=f"{path}:custom_loss_fn", num_steps=2, opt_steps=1))
    assert "'custom'" in message and "return loss_fn" in message


def test_forgiving_loses_the_images_whose_reward_raises():
    def factory(inference_dtype=None, device=None):
        def loss_fn(images, prompts):
            if "bad" in prompts:
                raise ConnectionError("no answer")
            return images.mean(dim=(1, 2, 3))

        return loss_fn

    losses = Losses([Objective("service", 2.0, factory)])
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    with pytest.warns(UserWarning, match=r"the reward 'service' failed: ConnectionError: no answer \(test_objectives"):
        total, rewards = losses.forgiving(images, ["good", "bad", "good"])
    assert total.tolist()[::2] == [0.0, 4.0] and total[1].isnan()
    assert rewards["service"].tolist()[::2] == [0.0, -2.0] and rewards["service"][1].isnan()


def test_forgiving_does_not_forgive_a_broken_contract():
    losses = Losses([Objective("none", 1.0, lambda inference_dtype, device: lambda images, prompts: None)])
    with pytest.raises(UserError, match="returned NoneType"):
        losses.forgiving(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_a_reward_that_writes_into_its_images_spoils_nothing():
    def writes(inference_dtype=None, device=None):
        return lambda images, prompts: images.clamp_(0, 0.1).mean(dim=(1, 2, 3))

    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    Losses([Objective("writes", 1.0, writes)])(images, ["a", "b"])
    assert torch.equal(images, before)
