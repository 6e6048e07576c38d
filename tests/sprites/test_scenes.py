"""The scenes: reproducible, true to their captions, and varied in all that captions do not mention."""

import numpy as np
import pytest

from sprites.scenes import (
    COLOURS,
    PAIRS,
    SIZE,
    THINGS,
    WORDS,
    caption,
    layout,
    render,
    scene,
    scenes,
)
from sprites.tokens import MAX_LENGTH, build_tokenizer, byte_pair_merges, token_ids


def test_one_seed_draws_one_picture():
    first, again = (np.asarray(scene("white", "duck", np.random.default_rng(3))) for _ in range(2))
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.asarray(scene("white", "duck", np.random.default_rng(4))))


def test_a_set_may_be_drawn_in_parts():
    whole, pairs = scenes(0, 20, seed=5)
    part, part_pairs = scenes(12, 20, seed=5)
    assert np.array_equal(whole[12:], part)
    assert np.array_equal(pairs[12:], part_pairs)


@pytest.mark.parametrize("thing", THINGS)
def test_most_of_the_subject_has_the_colour_of_its_name(thing):
    """Drawn in two colours, a layout differs only where it is painted; there the name must fit."""
    drawing = layout(thing, np.random.default_rng(0), avoid=tuple(COLOURS))
    red, blue = (np.asarray(render(drawing, colour)).astype(int) for colour in ("red", "blue"))
    painted = np.abs(red - blue).sum(2) > 200
    assert 0.05 < painted.mean() < 0.5
    palette = np.array(list(COLOURS.values()))
    nearest = np.abs(red[painted][:, None] - palette).sum(2).argmin(1)
    assert (nearest == list(COLOURS).index("red")).mean() > 0.6


def test_scenes_reach_from_nearly_black_to_nearly_white():
    images, _ = scenes(0, 640, seed=6)
    corners = images[:, 0, 0].mean(1)
    assert (corners < 30).mean() > 0.1
    assert (corners > 225).mean() > 0.08
    assert images.mean((1, 2, 3)).std() / 255 > 0.12


def test_backgrounds_stay_clear_of_the_subject():
    for seed in range(50):
        rows = layout("duck", np.random.default_rng(seed), avoid=("black",)).background
        assert np.linalg.norm(rows[[0, -1], 0] / 255 - np.array(COLOURS["black"]) / 255, axis=1).min() >= 0.42


def test_every_caption_is_made_of_single_tokens():
    tokenizer = build_tokenizer()
    for pair in PAIRS:
        for article in (False, True):
            words = caption(*pair, article=article)
            assert tokenizer.tokenize(words) == [word + "</w>" for word in words.split()]
    assert caption("orange", "cat", article=True) == "an orange cat"
    assert token_ids(tokenizer, ["white duck", ""]).shape == (2, MAX_LENGTH)


def test_merges_join_every_word_and_do_not_depend_on_the_order_of_words():
    assert len(byte_pair_merges(WORDS)) == len(set(byte_pair_merges(WORDS)))
    assert byte_pair_merges(WORDS) == byte_pair_merges(WORDS[::-1])
