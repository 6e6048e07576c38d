"""`align` from Python: what it returns, and what it never does."""

import json

import pytest
import torch

import dno
from dno import UserError, align


@pytest.fixture
def quick(tiny_folder):
    """`align` on the tiny pipeline with few steps."""

    def run(**settings):
        return align(**{"model": str(tiny_folder), "num_steps": 3, "opt_steps": 4, "lr": 0.05, "seed": 1, **settings})

    return run


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
    assert torch.equal(ode[:3], untouched[:3]) and not torch.equal(ode[3], untouched[3])


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
        ({"subsample": 5}, "--subsample 5 cuts the noise into rows of 1024 values"),
        ({"num_steps": 1001}, "--num_steps 1001 asks for timesteps past the model's last, 999"),
        ({"objective": "jpeg"}, "'jpeg' is not differentiable; use dno_stable_diffusion_nograd.py"),
        ({"nonsense": 1}, "no setting nonsense"),
        ({"noise": torch.zeros(3, 1, 4, 8, 8)}, "for --num_steps 2 --batch_size 1; got 3 and 1"),
        ({"noise": torch.zeros(4, 1, 4, 8, 4)}, "4 channels for --height 16 --width 8; got 4, 16 and 16"),
        ({"noise": torch.zeros(4, 4, 8, 8)}, "expected a finite float tensor"),
        ({"seed": 2**63}, "expected less than 2 \\*\\* 63"),
        ({"lora": "no/such.safetensors"}, "no such file or folder"),
        ({"evaluate": "jpeg:2"}, "has no weight"),
        ({"evaluate": "black"}, "both an objective and an evaluation"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_one_line_and_leaves_no_folder(quick, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        quick(output=str(tmp_path), **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_words_are_named(tiny_folder, monkeypatch):
    spec = dno.models.specs.ModelSpec(str(tiny_folder), num_steps=2, words=("white", "duck"))
    monkeypatch.setitem(dno.models.specs.MODELS, "toy", lambda: spec)
    with pytest.warns(UserWarning, match="toy was not trained on 'zebra'; it knows white, duck"):
        result = align(model="toy", prompt="White zebra", opt_steps=1)
    assert len(result.noise) == 3, "the row's own number of steps"


def test_files(quick, tmp_path):
    result = quick(output=str(tmp_path), batch_size=2, save_every=2)
    names = sorted(str(path.relative_to(result.folder)) for path in result.folder.rglob("*") if path.is_file())
    assert names == sorted(
        ["args.json", "metrics.jsonl", "best_noise.safetensors", "evolution.png", "evolution.gif", "result.json"]
        + [f"checkpoints/000004/{file}" for file in ("manifest.json", "state.json", "tensors.safetensors")]
        + [f"{name}{b}.png" for name in ("best", "initial", "images/000", "images/002") for b in ("", "_b1")]
    )
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    again = quick(noise=str(result.folder / "best_noise.safetensors"), batch_size=2, opt_steps=1)
    assert torch.equal(again.images, result.images)
