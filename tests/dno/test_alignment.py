"""`align` from Python: what it returns, and what it never does."""

import builtins
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import dno
import rewards
from dno import UserError, align
from dno.noise import draw_noise


@pytest.fixture
def quick(tiny_folder):
    """`align` on the tiny pipeline with few steps."""

    def run(**settings):
        first = {"model": str(tiny_folder), "num_steps": 3, "opt_steps": 4, "lr": 0.05, "seed": 1, "draw": False}
        return align(**{**first, **settings})

    return run


@pytest.fixture
def reward(monkeypatch):
    """reward(function): the reward `black` is function(images), where gradients flow."""

    def use(function):
        def factory(inference_dtype=None, device=None):
            return lambda images, prompts: function(images)

        factory.differentiable = True
        monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)

    return use


def mean(images):
    return images.mean(dim=(1, 2, 3))


def args_of(result):
    return json.loads((result.folder / "args.json").read_text())


def check_equal(a, b):
    """Everything that two runs found is equal, bit for bit."""
    for name in ("images", "rewards", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.steps, a.stopped) == (b.steps, b.stopped)
    clock = ("seconds", "peak_memory_gb")
    lines = [[{k: v for k, v in line.items() if k not in clock} for line in run.metrics] for run in (a, b)]
    assert lines[0] == lines[1]


def test_it_raises_the_reward_in_memory_and_writes_nothing(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    result = quick(callback=seen.append)
    assert list(tmp_path.iterdir()) == [] and result.folder is None
    assert result.metrics == seen and len(seen) == 4
    assert result.rewards[0] > result.metrics[0]["reward"]
    assert result.rewards[0] == max(metrics["reward"] for metrics in seen)
    assert result.images.shape == (1, 3, 16, 16) and result.images.dtype == torch.float32
    assert result.noise.shape == (4, 1, 4, 8, 8)
    assert result.rewards[0].item() == pytest.approx(-result.images.mean().item(), abs=1e-6)


def test_the_noise_replays_the_best_image(quick):
    result = quick(batch_size=2)
    again = quick(batch_size=2, noise=result.noise, opt_steps=1)
    assert torch.equal(again.images, result.images) and torch.equal(again.rewards, result.rewards)


def test_one_seed_one_result(quick):
    first, second = quick(gamma=1.0), quick(gamma=1.0)
    assert torch.equal(first.noise, second.noise) and torch.equal(first.images, second.images)
    assert not torch.equal(first.noise, quick(gamma=1.0, seed=2).noise)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gamma": 10.0, "lr": 0.3}, {"eta": 0.0}, {"opt_time": 1}, {"precondition": "spectral"}, {"best_of": 3}],
    ids=str,
)
def test_batch_equals_single_runs_with_its_seeds(quick, settings):
    together = quick(batch_size=3, seed=4, **settings)
    for b in range(3):
        alone = quick(seed=4 + b, **settings)
        torch.testing.assert_close(together.noise[:, b], alone.noise[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.rewards[b], alone.rewards[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["step", "block", "auto"])
def test_checkpointing_changes_no_bit(quick, checkpointing):
    plain = quick(checkpointing="none")
    result = quick(checkpointing=checkpointing)
    assert torch.equal(result.noise, plain.noise) and torch.equal(result.images, plain.images)


def test_checkpointing_is_not_left_on_for_the_next_run(tiny_model):
    align(model=tiny_model, num_steps=2, opt_steps=1, checkpointing="block")
    assert not tiny_model.network.is_gradient_checkpointing


def test_noise_that_overflows_is_named_not_a_traceback(quick):
    with pytest.warns(UserWarning, match="its step is skipped"), pytest.raises(UserError, match="lower --lr"):
        quick(lr=1e20, opt_steps=9)


def test_only_the_noises_that_count_move(quick):
    untouched = quick(opt_steps=1, lr=0.05).noise
    last = quick(opt_time=1).noise
    assert torch.equal(last[2:], untouched[2:]) and not torch.equal(last[1], untouched[1])
    ode = quick(eta=0.0).noise
    assert ode.shape == (1, 1, 4, 8, 8), "of x_T alone"
    assert not torch.equal(ode[0], untouched[3]) and torch.equal(quick(eta=0.0, opt_steps=1).noise[0], untouched[3])


def test_best_of_starts_from_the_best_draw(quick):
    single = quick(opt_steps=1).rewards[0]
    best = quick(opt_steps=1, best_of=6)
    assert best.rewards[0] > single
    assert quick(opt_steps=1, best_of=12).rewards[0] >= best.rewards[0]


def test_objectives_are_summed_with_their_weights(quick):
    result = quick(objective=["black:2", "contrast:-0.5"], evaluate=["jpeg", "white"], opt_steps=2)
    for metrics in result.metrics:
        assert metrics["reward"] == pytest.approx(2 * metrics["black"] - 0.5 * metrics["contrast"], rel=1e-5)
        assert metrics["white"] == pytest.approx(-metrics["black"]) and metrics["jpeg"] < 0


def test_batch_metrics_are_means_of_the_images(quick):
    metrics = quick(batch_size=2, opt_steps=1).metrics[0]
    assert len(metrics["images"]) == len(metrics["rewards"]) == 2
    assert metrics["reward"] == pytest.approx(sum(metrics["rewards"]) / 2)
    assert metrics["grad_norm"] == pytest.approx(sum(image["grad_norm"] for image in metrics["images"]) / 2)
    assert metrics["probability_min"] == min(image["probability_min"] for image in metrics["images"])


def test_the_regularizer_holds_the_noise(quick):
    settings = {"opt_steps": 12, "lr": 0.05, "objective": "black"}
    free, held = quick(**settings), quick(**settings, gamma=10.0)
    assert held.metrics[-1]["probability"] > 10 * free.metrics[-1]["probability"]
    assert held.metrics[-1]["regularizer"] < free.metrics[-1]["regularizer"]


def test_a_loaded_model_is_used_and_kept(quick, tiny_model):
    first, second = quick(model=tiny_model), quick(model=tiny_model)
    assert tiny_model.pipe.text_encoder is not None
    assert torch.equal(first.noise, second.noise) and torch.equal(first.noise, quick().noise)


def test_a_loaded_model_takes_no_settings_of_loading(tiny_model):
    with pytest.raises(UserError, match="lora, precision, vae: the model is loaded already"):
        align(model=tiny_model, lora="x.safetensors", precision="bf16", vae="x.safetensors")


def test_negative_prompt_and_guidance_matter(quick):
    plain = quick(opt_steps=1).images
    assert not torch.equal(quick(opt_steps=1, negative_prompt="red car").images, plain)
    empty = quick(opt_steps=1, negative_prompt="").images
    assert torch.equal(empty, plain), "SD's empty conditioning is the empty prompt"
    low = quick(opt_steps=1, guidance_scale=1.0).images
    assert torch.equal(quick(opt_steps=1, guidance_scale=1.0, negative_prompt="red car").images, low)


def test_sizes(quick):
    assert quick(opt_steps=1, height=20, width=12).images.shape == (1, 3, 20, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 17}, "--height is 17; expected a multiple of the VAE's scale factor 2, such as 16"),
        ({"subsample": 4, "height": 8}, "--subsample 4 cuts the noise into rows of 256 values"),
        ({"num_steps": 1001}, "--num_steps 1001 asks for timesteps past the model's last, 999"),
        ({"objective": "jpeg"}, "'jpeg' is not differentiable; use --estimator hybrid"),
        ({"nonsense": 1}, "dno has no setting nonsense; python -m dno dno --help_all lists them"),
        ({"method": "best_of_n", "lr": 1.0, "opt_steps": 1}, "best_of_n has no setting lr, opt_steps"),
        ({"method": "best_of_m"}, "no method is called 'best_of_m'; expected one of dno, best_of_n"),
        ({"method": ["dno"]}, "no method is called"),
        ({"model": 3}, "--model is 3 \\(int\\); expected a text"),
        ({"noise": np.zeros((4, 1, 4, 8, 8))}, "--noise is array.* \\(ndarray\\); expected a text or None"),
        ({"noise": 3}, "--noise is 3 \\(int\\)"),
        ({"callback": 3}, "callback is 3; expected a function"),
        ({"resume": 3}, "resume is 3; expected a path"),
        ({"config": {"lr": 1}}, "config is .*; expected a path"),
        ({"prompt": []}, "--prompt is an empty list"),
        ({"prompt": ["a", "b"], "batch_size": 3}, "--prompt has 2 entries for 3 images"),
        ({"objective": []}, "--objective is empty"),
        ({"objective": {}}, "--objective is empty"),
        ({"objective": {"black": 0}}, "weight.* 'black.*expected a number other than 0"),
        ({"objective": {"blac": 1}}, "no reward is called 'blac'"),
        ({"noise": torch.zeros(4, 1, 4, 8, 8), "best_of": 0}, "--best_of is 0"),
        ({"noise": torch.zeros(3, 1, 4, 8, 8)}, "for --num_steps 2 --batch_size 1; got 3 and 1"),
        ({"noise": torch.zeros(4, 1, 4, 8, 4)}, "4 channels for --height 16 --width 8; got 4, 16 and 16"),
        ({"noise": torch.zeros(4, 4, 8, 8)}, "expected a finite float tensor"),
        ({"noise": torch.zeros(1, 2, 4, 8, 8)}, "for any --num_steps --batch_size 2; got 3 and 1"),
        ({"noise": torch.zeros(1, 1, 3, 8, 8)}, "3 channels for"),
        ({"noise": torch.full((4, 1, 4, 8, 8), torch.nan)}, "expected a finite float tensor"),
        ({"noise": torch.zeros(4, 1, 4, 8, 8, dtype=torch.int32)}, "expected a finite float tensor"),
        ({"seed": 2**63}, "expected less than 2 \\*\\* 63"),
        ({"lora": "no/such.safetensors"}, "no such file or folder"),
        ({"evaluate": "jpeg:2"}, "has no weight"),
        ({"evaluate": "black"}, "both an objective and an evaluation"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_one_line_and_leaves_no_folder(quick, tmp_path, settings, message):
    """Before anything is written."""
    with pytest.raises(UserError, match=message) as caught:
        quick(output=str(tmp_path), **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_found_before_anything_is_loaded(quick, monkeypatch):
    monkeypatch.setattr("dno.task.load_model", lambda *_: pytest.fail("the model was loaded"))
    for settings in (
        {"prompt": ["a", "b"], "batch_size": 3}, {"objective": []}, {"objective": "blac"}, {"evaluate": "jpeg:2"},
        {"noise": torch.zeros(3, 1, 4, 8, 8)}, {"lr": "0.1"}, {"objective": "jpeg"}, {"lora": "no/such.safetensors"},
    ):  # fmt: skip
        with pytest.raises(UserError):
            quick(**settings)


def test_unknown_words_are_named(tiny_folder, monkeypatch):
    from dno.models import specs

    spec = specs.ModelSpec(str(tiny_folder), num_steps=2, words=("white", "duck"))
    monkeypatch.setitem(specs.MODELS, "toy", lambda: spec)
    with pytest.warns(UserWarning, match="toy was not trained on 'zebra'; it knows white, duck"):
        result = align(model="toy", prompt="White zebra", opt_steps=1)
    assert len(result.noise) == 3, "the row's own number of steps"


def test_files(quick, tmp_path):
    result = quick(output=str(tmp_path), batch_size=2, save_every=2, draw=True)
    paths = (path.relative_to(result.folder) for path in result.folder.rglob("*") if path.is_file())
    names = sorted(str(path) for path in paths if path.parts[0] != "checkpoints")
    assert names == sorted(
        ["args.json", "metrics.jsonl", "best_noise.safetensors", "evolution.png", "evolution.gif", "result.json"]
        + [f"{name}{b}.png" for name in ("best", "initial", "images/000", "images/002") for b in ("", "_b1")]
    )
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    for noise in (result.folder, str(result.folder / "best_noise.safetensors")):
        again = quick(noise=noise, batch_size=2, opt_steps=1)
        assert torch.equal(again.images, result.images)


def test_pictures_may_be_left_out(quick, tmp_path):
    result = quick(output=tmp_path, opt_steps=1)
    assert not list(result.folder.glob("evolution.*")) and (result.folder / "best.png").is_file()


# Prompts and objectives.


def test_a_prompt_per_image_equals_runs_of_their_own(quick):
    prompts, negative = ["white duck", "red car", ""], ["red car", "", "white duck"]
    together = quick(prompt=prompts, negative_prompt=negative, seed=4, gamma=1.0)
    assert together.images.shape[0] == 3
    for b in range(3):
        alone = quick(prompt=prompts[b], negative_prompt=negative[b], seed=4 + b, gamma=1.0)
        torch.testing.assert_close(together.noise[:, b], alone.noise[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.rewards[b], alone.rewards[0], rtol=1e-5, atol=1e-6)
    others = quick(prompt=prompts[::-1], negative_prompt=negative, seed=4, gamma=1.0)
    assert not torch.equal(others.rewards[0], together.rewards[0])


def test_rewards_are_told_each_images_own_prompt(quick, monkeypatch, tmp_path):
    told = []

    def factory(inference_dtype=None, device=None):
        return lambda images, prompts: told.append(list(prompts)) or mean(images)

    factory.differentiable = True
    monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)
    result = quick(prompt=["a", "b"], opt_steps=1, output=tmp_path)
    assert told == [["a", "b"]]
    from PIL import Image

    for name, prompt in (("best.png", "a"), ("best_b1.png", "b")):
        with Image.open(result.folder / name) as png:
            assert png.text["prompt"] == prompt
    assert args_of(result)["settings"]["prompt"] == ["a", "b"]


def test_objectives_may_be_a_dict_of_weights(quick):
    expected = quick(objective=["black:2", "contrast:-0.5"], opt_steps=2)
    check_equal(quick(objective={"black": 2, "contrast": -0.5}, opt_steps=2), expected)
    check_equal(quick(objective={"black": 1.0}), quick(objective="black"))


def test_args_name_the_files_of_a_runs_own_rewards(quick, tmp_path):
    """Also if the rewards are shared, and another run came between."""
    from dno.task import Loaded

    shared = Loaded()
    settings = {"opt_steps": 1, "output": tmp_path}
    files = [
        args_of(quick(objective=objective, loaded=loaded, **settings))["reward_files"]
        for objective, loaded in (("sprites", shared), ("black", None), ("sprites", shared))
    ]
    assert files[0] == files[2] and files[0] and not files[1]


# Noise to start from.


def test_x_T_alone_gets_the_other_noises_of_the_images_own_draws(quick):
    """As runs with eta 0 leave it."""
    ode = quick(eta=0.0, batch_size=2)
    drawn = draw_noise([1, 2], 3, (4, 8, 8))
    expected = quick(noise=torch.cat([drawn[:3], ode.noise]), batch_size=2)
    check_equal(quick(noise=ode.noise, batch_size=2), expected)
    again = quick(eta=0.0, noise=ode.noise, batch_size=2, opt_steps=1)
    assert torch.equal(again.images, ode.images) and torch.equal(again.noise, ode.noise)
    whole = quick(eta=0.0, noise=torch.cat([drawn[:3], ode.noise]), batch_size=2, opt_steps=1)
    check_equal(whole, again)


def test_noise_of_another_sampler_is_refused_in_one_line(quick, tmp_path):
    from safetensors.torch import save_file

    for sampler, metadata in (("karras", {"sampler": "karras"}), (None, None), ("schedule", {"sampler": "schedule"})):
        save_file({"noise": torch.zeros(4, 1, 4, 8, 8)}, tmp_path / "noise.safetensors", metadata)
        if sampler != "karras":
            assert quick(noise=tmp_path / "noise.safetensors", opt_steps=1)
            continue
        with pytest.raises(UserError, match="is for the sampler 'karras'.*expected one for 'schedule'") as error:
            quick(noise=tmp_path / "noise.safetensors")
        assert "\n" not in str(error.value)


def test_a_folder_without_a_noise_is_one_line(quick, tmp_path):
    with pytest.raises(UserError, match="--noise .*could not be read.*expected a best_noise.safetensors"):
        quick(noise=tmp_path)


# What the caller has switched off.


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_whatever_the_caller_has_switched_off(quick, switched_off, tiny_folder):
    expected = quick()
    with switched_off():
        check_equal(quick(), expected)
        assert not torch.is_grad_enabled()
        check_equal(quick(noise=draw_noise([1], 3, (4, 8, 8)).clone()), expected)
    with switched_off():
        model = dno.load_model(str(tiny_folder), torch.float32)
        check_equal(quick(model=model), expected)


# Configurations.


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 1.0, "batch_size": 2, "objective": {"black": 1, "contrast": 0.5}, "evaluate": "jpeg"},
     {"eta": 0.0, "prompt": ["a", "b"], "negative_prompt": "c", "height": 8, "seed": np.int64(3)},
     {"estimator": "hybrid", "num_samples": 4, "objective": "jpeg", "opt_time": 2, "patience": 9},
     {"method": "best_of_n", "opt_steps": None, "lr": None, "num_candidates": 6, "search": "neighbours"}],
    ids=str,
)  # fmt: skip
def test_a_configuration_starts_the_same_run_again(quick, tmp_path, tiny_folder, settings):
    first = {"model": Path(tiny_folder), "num_steps": 3, "opt_steps": 4, "lr": 0.05, "seed": 1, "draw": False}
    settings = {k: v for k, v in (first | settings).items() if v is not None}
    whole = align(output=tmp_path, **settings)
    args = args_of(whole)
    assert args["settings"]["output"] == str(tmp_path) and args["settings"]["precision"] == "auto"
    assert args["resolved"]["precision"] == "float32" and args["resolved"]["guidance_scale"] == 5.0
    again = align(config=whole.folder / "args.json")
    check_equal(again, whole)
    assert again.folder.parent == whole.folder.parent and again.folder != whole.folder
    assert args_of(again)["settings"] == args["settings"] and args_of(again)["method"] == args["method"]
    nowhere = align(config=str(whole.folder / "args.json"), method=args["method"], seed=5, folder=tmp_path / "other")
    assert nowhere.folder == tmp_path / "other" and not torch.equal(nowhere.noise, whole.noise)
    assert args_of(nowhere)["settings"] == args["settings"] | {"seed": 5}


def test_settings_written_by_hand(quick, tmp_path, tiny_folder):
    config = tmp_path / "mine.json"
    settings = {"model": str(tiny_folder), "num_steps": 3, "opt_steps": 4, "lr": 0.05, "seed": 1, "draw": False}
    config.write_text(json.dumps(settings | {"objective": {"black": 1}}))
    check_equal(align(config=config), quick())
    assert sorted(tmp_path.iterdir()) == [config], "from Python nothing is written unless it is asked for"
    check_equal(align(config=config, lr=0.1), quick(lr=0.1))
    config.write_text(json.dumps({"method": "best_of_n", "settings": {"model": str(tiny_folder), "num_candidates": 2}}))
    assert align(config=config, num_steps=3).metrics[0]["candidate"] in (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read: Expecting property name"), ("[1]", "is not a JSON object"), ("3", "is not a JSON object"),
     ('{"settings": [1]}', "is not a JSON object"), (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec"),
     ('{"lr": "0.1"}', "--lr is '0.1' (str); expected a number"), ('{"opt_steps": 1.5}', "--opt_steps is 1.5"),
     ('{"draw": "no"}', "--draw is 'no'"), ('{"nonsense": 1}', "dno has no setting nonsense"),
     ('{"settings": {"rho": 1}}', "dno has no setting rho"), ('{"objective": {"black": null}}', "black"),
     ('{"method": "best_of_n"}', "is for the method 'best_of_n'; got 'dno'"),
     ('{"method": ["dno"], "settings": {}}', "is for the method ['dno']; got 'dno'"),
     ('{"lr": 0.1, "git_revision": null, "versions": {}}', "is of an earlier version"),
     ('{"noise": "no/such"}', "--noise no/such does not exist"), ("", "cannot be read: Expecting value")],
)  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path, text, words):
    config = tmp_path / "args.json"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        align("no/such", config=config, method="dno")
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_a_configuration_that_is_no_file_is_one_line(tmp_path):
    for path, words in ((tmp_path, "Is a directory"), (tmp_path / "none.json", "No such file or directory")):
        with pytest.raises(UserError, match=f"--config .*{words}; expected an args.json"):
            align(config=path)
    (tmp_path / "odd.json").write_text('{"method": "magic"}')
    with pytest.raises(UserError, match="no method is called 'magic'"):
        align(config=tmp_path / "odd.json")


def test_what_no_file_can_name_is_not_said_to_have_been_left_out(quick, tiny_model, tmp_path):
    noise = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    result = quick(model=tiny_model, noise=noise, output=tmp_path)
    asked = args_of(result)["settings"]
    assert asked["noise"] == asked["model"] == "(given from Python)"
    config = result.folder / "args.json"
    for given, missing in (({"model": tiny_model}, "noise"), ({"noise": noise}, "model")):
        with pytest.raises(UserError, match=f"names no {missing}: it was given from Python; give --{missing} too"):
            align(config=config, **given)
    check_equal(align(model=tiny_model, config=config, noise=noise), result)
    assert args_of(quick(output=tmp_path, opt_steps=1))["settings"]["noise"] is None


# The end of a run that the caller wants.


def after(count, then=True):
    """A callback for `count` iterations; its end is True, or an exception that it raises."""

    def callback(metrics):
        if metrics["step"] < count - 1:
            return None
        if then is True:
            return True
        raise then

    return callback


def test_a_callback_that_returns_true_ends_the_run_and_keeps_its_result(quick, tmp_path):
    whole, shorter = quick(), quick(opt_steps=2)
    result = quick(callback=after(2), output=tmp_path)
    check_equal(result, shorter)
    assert json.loads((result.folder / "result.json").read_text())["iterations"] == 2
    check_equal(align(resume=result.folder), whole)
    for value in (1, "yes", [True], None, np.False_):
        assert len(quick(callback=lambda metrics, value=value: value).metrics) == 4, "True alone ends it"
    assert len(quick(callback=lambda metrics: np.mean(metrics["rewards"]) > -10).metrics) == 1, "numpy's True too"
    assert len(quick(callback=lambda metrics: metrics.clear()).metrics[-1]["images"]) == 1, "it gets its own copy"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("enough"), SystemExit(3)], ids=repr)
def test_what_a_callback_raises_has_the_result_so_far(quick, tmp_path, error):
    whole, shorter = quick(), quick(opt_steps=2)
    for output in (None, tmp_path):
        with pytest.raises(type(error)) as end:
            quick(callback=after(2, error), output=output)
        assert end.value is error
        check_equal(error.result, shorter)
    folder = error.result.folder
    assert (folder / "best.png").is_file() and not (folder / "result.json").exists()
    check_equal(align(resume=folder), whole)


def test_ctrl_c_in_a_reward_has_the_result_so_far(quick, reward, tmp_path):
    calls = []

    def stop(images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mean(images)

    whole, shorter = quick(), quick(opt_steps=2)
    reward(stop)
    with pytest.raises(KeyboardInterrupt) as end:
        quick(output=tmp_path)
    check_equal(end.value.result, shorter)
    check_equal(align(resume=end.value.result.folder), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("where", ["reward", "callback"])
def test_a_real_signal_has_the_result_so_far(quick, reward, tmp_path, where):
    """Ctrl-C, sent to this process: at once where the network works, after the line where files are written."""
    sent, before = [], signal.getsignal(signal.SIGINT)

    def kill():
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    whole = quick()
    reward(lambda images: (where == "reward" and started and kill()) or mean(images))
    started = []
    with pytest.raises(KeyboardInterrupt) as end:
        quick(output=tmp_path, callback=lambda metrics: started.append(1) or (where == "callback" and kill()))
    assert len(end.value.result.metrics) == 1 and signal.getsignal(signal.SIGINT) is before
    reward(mean)
    check_equal(align(resume=end.value.result.folder), whole)


def test_in_a_notebook_ctrl_c_returns_the_result(quick, monkeypatch):
    shorter = quick(opt_steps=2)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with pytest.warns(UserWarning, match="stopped by Ctrl-C after 2 iterations"):
        result = quick(callback=after(2, KeyboardInterrupt()))
    check_equal(result, shorter)
    with pytest.raises(ValueError, match="enough"):
        quick(callback=after(2, ValueError("enough")))


def test_in_a_notebook_ctrl_c_without_a_result_is_ctrl_c(quick, reward, monkeypatch):
    def stop(images):
        raise KeyboardInterrupt

    reward(stop)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with pytest.raises(KeyboardInterrupt) as end:
        quick()
    assert end.value.result is None


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("no"), torch.OutOfMemoryError("out of memory")], ids=repr
)
def test_an_end_in_the_first_iteration_warns_of_nothing_and_leaves_nothing(quick, reward, tmp_path, error):
    def fail(images):
        raise error

    reward(fail)
    with warnings.catch_warnings(record=True) as seen, pytest.raises((KeyboardInterrupt, UserError)) as end:
        warnings.simplefilter("always")
        quick(output=tmp_path / "output", checkpointing="block", split_guidance=True)
    assert [str(warning.message) for warning in seen if "cannot write" in str(warning.message)] == []
    assert end.value.result is None and list((tmp_path / "output").iterdir()) == []


def test_best_of_n_ends_in_the_same_ways(tiny_folder, tmp_path):
    settings = {"method": "best_of_n", "model": str(tiny_folder), "num_steps": 3, "num_candidates": 9, "draw": False}
    settings |= {"candidates_per_iteration": 3, "batch_size": 2, "objective": "jpeg"}
    whole, shorter = align(**settings), align(**settings | {"num_candidates": 6})
    check_equal(align(**settings, callback=after(2)), shorter)
    with pytest.raises(KeyboardInterrupt) as end:
        align(**settings, callback=after(2, KeyboardInterrupt()), output=tmp_path)
    check_equal(end.value.result, shorter)
    check_equal(align(resume=end.value.result.folder), whole)
