"""What is written, kept and stopped, for iterations that are known: a method that plays a script."""

import json
import math

import pytest
import torch
from PIL import Image

from dno import UserError, align
from dno.methods import METHODS
from dno.methods.base import Iteration, Method, State
from dno.noise import load_noise
from dno.runs.checkpoints import load_newest

NAN = math.nan


class Scripted(Method):
    """Iteration i is `script[i]`: rewards, further metrics and evaluations by name, one value per image.

    The image of iteration i has the value (i + 1) / 100, and its noise the value i.
    """

    name, title, prefix = "scripted", "A script", "Script"
    script, has_noise, fails_at = (), True, None

    @property
    def num_iterations(self):
        return len(self.script)

    def blank(self):
        return State(self.settings.batch_size)

    def iterations(self, state):
        while state.step < len(self.script) and (rows := state.active):
            step = state.step
            if step == self.fails_at:
                raise RuntimeError("a fault of the method")
            entry = {name: torch.tensor(values)[rows] for name, values in self.script[step].items()}
            rewards = entry.pop("rewards")
            images = torch.full((len(rows), 3, *self.task.size), (step + 1) / 100)
            noise = torch.full((4, len(rows), 4, 8, 8), float(step))
            found = Iteration(
                rows, images, -rewards, {"contrast": rewards}, noise if self.has_noise else None, entry,
                self.task.evaluate(images, rows),
            )  # fmt: skip
            with state.changing():
                pass
            yield found
            images.fill_(-1)  # a method may use its memory again
            noise.fill_(-1)


@pytest.fixture
def play(tiny_model, tmp_path, monkeypatch):
    """play(script, has_noise=True, fails_at=None, **settings): align with such a method, into tmp_path / "run"."""
    monkeypatch.setitem(METHODS, "scripted", (__name__, "Scripted"))

    def play(script, has_noise=True, fails_at=None, **settings):
        for name, value in (("script", script), ("has_noise", has_noise), ("fails_at", fails_at)):
            monkeypatch.setattr(Scripted, name, value)
        settings = {"folder": tmp_path / "run", "num_steps": 3, "objective": "contrast", "draw": False, **settings}
        return align(tiny_model, method="scripted", **settings)

    return play


def rewards(*values):
    return [{"rewards": [value] if isinstance(value, float) else value} for value in values]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_of(path):
    with Image.open(path) as image:
        return int(image.text["step"])


def test_the_best_is_kept_whatever_the_method_does_with_its_memory(play):
    result = play(rewards(1.0, 5.0, 3.0))
    assert result.steps == [1] and result.rewards.tolist() == [5.0] and result.stopped == [None]
    assert (result.images == 0.02).all() and result.images.shape == (1, 3, 16, 16)
    assert (result.noise == 1).all() and result.noise.shape == (4, 1, 4, 8, 8)
    assert torch.equal(load_noise(result.folder), result.noise)
    with Image.open(result.folder / "best.png") as image:
        assert image.getpixel((0, 0)) == (130, 130, 130)  # 0.02 / 2 + 0.5
        assert image.text == {"prompt": "white duck", "seed": "0", "step": "1", "reward": "5.0"}
    assert step_of(result.folder / "initial.png") == 0


def test_a_line_has_means_minima_and_the_images_one_by_one(play):
    script = [{"rewards": [1.0, 3.0], "speed": [10.0, 20.0], "probability_min": [0.5, 0.25]}]
    result = play(script, batch_size=2, evaluate="white")
    (line,) = lines_of(result.folder)
    assert line.pop("seconds") >= 0 and line.pop("peak_memory_gb") > 0
    white = pytest.approx(0.01, abs=1e-6)
    assert line == {
        "step": 0, "reward": 2.0, "rewards": [1.0, 3.0], "speed": 15.0, "probability_min": 0.25, "contrast": 2.0,
        "white": white,
        "images": [
            {"reward": 1.0, "speed": 10.0, "probability_min": 0.5, "contrast": 1.0, "white": white},
            {"reward": 3.0, "speed": 20.0, "probability_min": 0.25, "contrast": 3.0, "white": white},
        ],
    }  # fmt: skip
    assert list(result.metrics[0]) == list(lines_of(result.folder)[0])


def test_an_image_that_is_done_keeps_its_last_numbers_and_its_files_end(play):
    result = play(rewards([1.0, 9.0], [2.0, 1.0], [3.0, 1.0]), batch_size=2, target_reward=8.0)
    assert result.stopped == [None, "reward 9 reached the target 8"] and result.steps == [2, 0]
    assert [line["rewards"] for line in lines_of(result.folder)] == [[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]]
    names = sorted(path.name for path in (result.folder / "images").iterdir())
    assert names == ["000.png", "000_b1.png", "001.png", "002.png"]
    assert (result.noise[:, 0] == 2).all() and (result.noise[:, 1] == 0).all()


def test_rules_end_the_run(play, tmp_path):
    def stopped(script, folder, **rules):
        result = play(script, folder=tmp_path / folder, **rules)
        return len(result.metrics), result.stopped[0], result.steps[0]

    rising = rewards(1.0, 2.0, 3.0, 4.0)
    assert stopped(rising, "a", target_reward=3.0) == (3, "reward 3 reached the target 3", 2)
    assert stopped(rewards(*[1.0] * 9), "b", patience=2) == (3, "no better reward in 2 iterations", 0)
    assert stopped(rising, "c", max_seconds=1e-9) == (1, "1e-09 seconds are over", 0)
    falling = [{**line, "probability": [p]} for line, p in zip(rising, (1.0, 0.5, 0.1, 1.0))]
    assert stopped(falling, "d", min_probability=0.3) == (3, "P(z) 0.1 fell below 0.3", 1)


def test_the_seconds_of_earlier_starts_count(play, tiny_model, tmp_path):
    result = play(rewards(1.0, 2.0, 3.0), callback=lambda metrics: metrics["step"] == 1)
    assert len(result.metrics) == 2
    path = result.folder / "metrics.jsonl"
    lines = [{**line, "seconds": 1000.0} for line in lines_of(result.folder)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = align(tiny_model, resume=result.folder, max_seconds=2000.0)
    assert len(resumed.metrics) == 3 and resumed.stopped == ["2000 seconds are over"]


def test_what_is_not_finite_is_null_in_files_and_never_the_best(play):
    result = play(rewards([NAN, 1.0], [math.inf, NAN], [NAN, 2.0]), batch_size=2)
    assert [line["rewards"] for line in lines_of(result.folder)] == [[None, 1.0], [None, None], [None, 2.0]]
    assert [line["reward"] for line in lines_of(result.folder)] == [1.0, None, 2.0]
    assert result.steps == [None, 2] and result.rewards.tolist() == [-math.inf, 2.0]
    assert result.images[0].isnan().all() and (result.images[1] == 0.03).all()
    assert (result.noise[:, 0] == 2).all(), "without a best, the newest"
    assert not (result.folder / "best.png").exists() and (result.folder / "best_b1.png").exists()


def test_a_method_without_noise_leaves_no_noise_file(play):
    result = play(rewards(1.0, 2.0), has_noise=False)
    assert result.noise is None and (result.images == 0.02).all()
    assert not (result.folder / "best_noise.safetensors").exists() and (result.folder / "best.png").exists()


def test_a_callback_sees_the_lines_and_may_end_the_run(play):
    seen = []

    def callback(metrics):
        seen.append(metrics)
        return metrics["step"] == 1

    result = play(rewards(1.0, 2.0, 3.0), callback=callback)
    assert [line["reward"] for line in seen] == [1.0, 2.0] == [line["reward"] for line in lines_of(result.folder)]
    assert seen == result.metrics and (result.folder / "result.json").is_file()
    assert len(play(rewards(1.0, 2.0), folder=None, callback=lambda metrics: 1).metrics) == 2, "True itself ends it"


def test_every_nth_image(play):
    result = play(rewards(*map(float, range(7))), save_every=3)
    assert sorted(path.name for path in (result.folder / "images").iterdir()) == ["000.png", "003.png", "006.png"]
    assert step_of(result.folder / "best.png") == 6


def test_without_a_folder_nothing_is_written(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = play(rewards(1.0, 2.0), folder=None)
    assert result.folder is None and result.steps == [1] and not list(tmp_path.iterdir())


def test_a_fault_keeps_what_there_is_and_says_what_was_found(play, tiny_model, tmp_path):
    script = rewards(1.0, 3.0, 2.0, 4.0)
    whole = play(script, folder=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="a fault of the method") as error:
        play(script, fails_at=2)
    found = error.value.result
    assert found.steps == [1] and len(found.metrics) == 2 and (found.noise == 1).all()
    assert load_newest(found.folder).step == 2 and not (found.folder / "result.json").exists()
    Scripted.fails_at = None
    resumed = align(tiny_model, resume=found.folder)
    assert resumed.steps == whole.steps and torch.equal(resumed.noise, whole.noise)
    for name in ("images/000.png", "images/003.png", "best.png"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_fault_before_anything_is_found_leaves_no_folder(play, tmp_path):
    with pytest.raises(RuntimeError) as error:
        play(rewards(1.0), fails_at=0)
    assert error.value.result is None and not (tmp_path / "run").exists()


def test_the_best_at_the_checkpoint_takes_its_place_again(play, tiny_model, tmp_path):
    """After a kill: best.png and the noise file are of iteration 3, which the checkpoint at 2 does not know."""
    result = play(rewards(1.0, 3.0, 2.0, 4.0), checkpointing_steps=2, checkpoints_total_limit=9)
    (newest,) = (result.folder / "checkpoints").glob("*04*")
    newest.rename(tmp_path / "away")
    Scripted.script = rewards(1.0, 3.0, 2.0, 0.0)
    assert step_of(result.folder / "best.png") == 3
    again = align(tiny_model, resume=result.folder)
    assert again.steps == [1] and step_of(result.folder / "best.png") == 1 and (again.images == 0.02).all()
    assert (load_noise(result.folder) == 1).all() and torch.equal(load_noise(result.folder), again.noise)


def test_a_full_disk_ends_the_run_in_one_line(play, monkeypatch):
    from dno.runs.folder import Run

    def full(run, metrics):
        raise UserError("cannot write metrics.jsonl: no space left")

    monkeypatch.setattr(Run, "log", full)
    with pytest.raises(UserError, match="no space left") as error:
        play(rewards(1.0, 2.0))
    assert error.value.result is None


def test_the_gallery_of_a_state_is_drawn(play, monkeypatch):
    import numpy as np

    entries = {0: [], 1: [("a caption", np.zeros((16, 16, 3), dtype=np.uint8))]}
    monkeypatch.setattr(State, "gallery", lambda state: entries)
    result = play(rewards([1.0, 1.0]), batch_size=2)
    assert not (result.folder / "gallery.png").exists() and (result.folder / "gallery_b1.png").exists()


def test_the_result_file(play):
    result = play(rewards([1.0, 2.0], [3.0, 1.0]), batch_size=2)
    found = json.loads((result.folder / "result.json").read_text())
    assert found["rewards"] == [3.0, 2.0] and found["steps"] == [1, 0] and found["iterations"] == 2
    assert [image["reward"] for image in found["first"]] == [1.0, 2.0]
    assert [image["reward"] for image in found["best"]] == [3.0, 2.0]
