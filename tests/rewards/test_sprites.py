"""The `sprites` reward with the embedded CLIP's real weights, on drawn scenes."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rewards
from sprites.scenes import COLOURS, PAIRS, caption, scene


@pytest.fixture(scope="module")
def score():
    rewards.configure()
    loss_fn = rewards.RFUNCTIONS["sprites"](None, "cpu")
    return lambda images, prompts: -loss_fn(images, prompts)


def draw(colour, thing, seed, size=64):
    picture = scene(colour, thing, np.random.default_rng(seed)).resize((size, size))
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def probability(score, image, prompt):
    """Softmax of the score over all captions."""
    captions = [caption(*pair) for pair in PAIRS]
    with torch.no_grad():
        scores = score(image.expand(len(captions), -1, -1, -1), captions)
    return scores.softmax(0)[captions.index(prompt)].item()


def test_a_picture_agrees_most_with_its_own_caption(score):
    captions = [caption(*pair) for pair in PAIRS]
    right, asked = 0, range(0, len(PAIRS), 7)  # every colour and every thing
    for i in asked:
        colour, thing = PAIRS[i]
        with torch.no_grad():
            scores = score(draw(colour, thing, i).expand(len(PAIRS), -1, -1, -1), captions)
        right += int(scores.argmax()) == i
    assert right >= 0.9 * len(asked)


def test_size_does_not_matter_much(score):
    small, large = (draw("white", "duck", 0, size) for size in (64, 256))
    with torch.no_grad():
        assert abs(score(small, ["white duck"]) - score(large, ["white duck"])) < 2


def test_climbing_it_raises_the_agreement_from_a_wrong_start(score):
    """Plain gradient ascent on the pixels of a red car towards "white duck"."""
    image = draw("red", "car", 1).requires_grad_(True)
    before, before_p = score(image, ["white duck"]).item(), probability(score, image.detach(), "white duck")
    for _ in range(20):
        (gradient,) = torch.autograd.grad(score(image, ["white duck"]).sum(), image)
        assert gradient.any()
        image = (image + 2 * gradient / gradient.norm()).detach().clamp(-1, 1).requires_grad_(True)
    assert score(image, ["white duck"]).item() > before + 1
    assert probability(score, image.detach(), "white duck") > max(0.9, before_p)


def test_a_weighted_sum_of_two_rewards_raises_both(score):
    dark = rewards.RFUNCTIONS["black"]()
    image = draw("red", "car", 2).requires_grad_(True)
    prompt = ["white duck"]
    before = score(image, prompt).item(), -dark(image, prompt).item()
    for _ in range(20):
        total = score(image, prompt) - 40 * dark(image, prompt)
        (gradient,) = torch.autograd.grad(total.sum(), image)
        image = (image + 2 * gradient / gradient.norm()).detach().clamp(-1, 1).requires_grad_(True)
    after = score(image, prompt).item(), -dark(image, prompt).item()
    assert after[0] > before[0] and after[1] > before[1]


def test_half_precision_and_loaded_file(score):
    image = draw("blue", "star", 3)
    expected = score(image, ["blue star"])
    half = -rewards.RFUNCTIONS["sprites"](torch.bfloat16, "cpu")(image, ["blue star"])
    torch.testing.assert_close(half, expected, rtol=3e-2, atol=0.3)
    (entry,) = [entry for entry in rewards.loaded_files() if entry["model"] == "sprites"]
    assert entry["file"] == "model.safetensors" and len(entry["sha256"]) == 64
    assert len(COLOURS) == 8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_a_large_logit_scale(tmp_path, precision):
    """With the scale of CLIP and PickScore, 100, a score is within 1e-2 of itself: ln 100 in bfloat16 would not be."""
    folder = shutil.copytree(rewards.MODELS["sprites"].folder, tmp_path / "clip", copy_function=shutil.copyfile)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(math.log(100))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    images = torch.cat([draw("white", "duck", seed) for seed in range(4)])
    rewards.configure(sprites_path=folder)
    try:
        full, half = (
            rewards.RFUNCTIONS["sprites"](rewards.PRECISIONS[name], "cpu")(images, ["white duck"] * 4)
            for name in ("fp32", precision)
        )
    finally:
        rewards.configure()
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)
