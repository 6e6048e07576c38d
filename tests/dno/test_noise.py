"""Draws that depend on their key alone, which part of the noise is free, and noise files."""

import pytest
import torch
from safetensors.torch import save_file

from dno.errors import UserError
from dno.noise import FILE, Split, check_noise, draw_noise, keyed_generator, load_noise

T, SHAPE = 4, (2, 3, 3)


def test_a_draw_is_that_of_the_official_code():
    noise = draw_noise([5, 9], T, SHAPE)
    assert noise.shape == (T + 1, 2, *SHAPE)
    for b, seed in enumerate((5, 9)):
        torch.manual_seed(seed)
        assert torch.equal(noise[:, b], torch.randn(T + 1, *SHAPE))


def test_further_candidates_are_independent_of_each_other_and_of_other_seeds():
    draws = [draw_noise([seed], 50, SHAPE, k) for seed in (0, 1) for k in range(3)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.12
    assert torch.equal(draw_noise([3, 7], T, SHAPE, 2)[:, 1:], draw_noise([7], T, SHAPE, 2))


def test_equal_keys_give_equal_draws_and_every_part_of_a_key_counts():
    def first(*key):
        return torch.randn(4, generator=keyed_generator(*key))

    assert torch.equal(first(1, 2, 3), first(1, 2, 3))
    others = [first(*key) for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2), (1, 2, 3, 1))]
    assert len({tuple(draw.tolist()) for draw in others}) == len(others)


@pytest.mark.parametrize("opt_time", [1, 3, T])
def test_the_split_and_its_inverse(opt_time):
    noise, split = draw_noise([0, 1], T, SHAPE), Split(T, opt_time, 1.0)
    z, rest = split.split(noise)
    assert len(z) == split.num_free == opt_time + 1 and len(z) + len(rest) == T + 1
    assert torch.equal(split.whole(z, rest), noise)
    assert all(torch.equal(a, b) for a, b in zip(split.join(z, rest), noise, strict=True))


def test_with_eta_0_the_starting_noise_alone_is_kept():
    noise, split = draw_noise([0, 1], T, SHAPE), Split(T, T, 0.0)
    z, rest = split.split(noise)
    assert torch.equal(z, noise[-1:]) and len(rest) == 0 and split.num_free == 1
    assert torch.equal(split.whole(z, rest), z)
    assert torch.equal(split.split(z)[0], z), "a noise file of such a run"
    joined = split.join(z, rest)
    assert len(joined) == T + 1 and torch.equal(joined[-1], noise[-1]) and not any(part.any() for part in joined[:-1])
    assert all(part.shape == noise[0].shape for part in joined)


def test_a_noise_file_comes_back_from_its_path_and_its_folder(tmp_path):
    noise = draw_noise([0], T, SHAPE)
    save_file({"noise": noise}, tmp_path / FILE, {"sampler": "schedule"})
    assert torch.equal(load_noise(tmp_path), noise) and torch.equal(load_noise(tmp_path / FILE), noise)
    save_file({"noise": noise}, tmp_path / FILE)  # of an earlier version
    assert torch.equal(load_noise(tmp_path), noise)


def test_a_file_of_another_sampler_is_refused(tmp_path):
    save_file({"noise": draw_noise([0], T, SHAPE)}, tmp_path / FILE, {"sampler": "edict"})
    with pytest.raises(UserError, match=r"is for the sampler 'edict', .* expected one for 'schedule'"):
        load_noise(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "could not be read"),
        (b"no safetensors", "could not be read"),
        ({"other": torch.zeros(1)}, "no tensor 'noise'"),
        ({"noise": torch.zeros(5, 4, 8, 8)}, r"shape \(5, 4, 8, 8\)"),
        ({"noise": torch.zeros(5, 1, 4, 8, 8, dtype=torch.int32)}, "int32"),
        ({"noise": torch.full((5, 1, 4, 8, 8), torch.inf)}, "expected a finite float tensor"),
    ],
)
def test_what_is_no_noise_is_refused_in_one_line(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    elif content is not None:
        save_file(content, tmp_path / FILE)
    with pytest.raises(UserError, match=words) as error:
        load_noise(tmp_path)
    assert "\n" not in str(error.value)


def test_noise_of_half_precision_becomes_float32():
    assert check_noise(torch.zeros(2, 1, 4, 8, 8, dtype=torch.float16)).dtype == torch.float32
