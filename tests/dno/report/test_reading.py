"""Run folders as they are read: today's form, the earlier one, and whatever a stop or another program left in them."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dno.errors import UserError
from dno.report.reading import P_FLOOR, choose_steps, elide, log_axis, number, read_log, read_run, say

OLD = {"model": "sprites", "prompt": "a red ball", "gamma": 10.0, "opt_steps": 6, "precision": "float32",
       "device": "cpu", "checkpointing": "partial (31 of 50 steps)", "height": 64, "width": 64, "output": "output",
       "folder": "output/SD-1", "climbs": "black", "weights": {"black": 1.0}, "watched": ["judge"],
       "versions": {"torch": "2.9.1"}}  # fmt: skip
NEW = {"method": "best_of_n", "settings": {"prompt": ["a duck", "a ball"], "num_candidates": 16, "height": None},
       "resolved": {"prompt": ["a duck", "a ball"], "num_candidates": 16, "height": 64, "title": "Best-of-N",
                    "iterations": 4, "columns": {"mean": "mean of the batch", "reward": "twice", "absent": "absent"}},
       "versions": {"torch": "2.9.1"}}  # fmt: skip


def make_run(folder, args, lines, images=()):
    """A run's folder with these args, lines of metrics.jsonl (texts or dicts) and image files."""
    (folder / "images").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for name in images:
        save(folder / name)
    return folder


def save(path, **text):
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def entry(step, *rewards, **more):
    images = [{"reward": reward, "mean": reward - 1, **more} for reward in rewards]
    return {"step": step, "reward": sum(rewards) / len(rewards), "rewards": list(rewards), "images": images, **more}


def test_a_folder_of_today(tmp_path):
    lines = [entry(0, 1.0, 5.0, seconds=9), entry(1, 3.0, 4.0, seconds=2), entry(2, 2.0, 4.5, seconds=2)]
    run = read_run(make_run(tmp_path / "run", NEW, lines, ["images/000.png", "images/002_b1.png", "gallery_b1.png"]))
    assert (run.method, run.title, run.steps, run.iterations) == ("best_of_n", "Best-of-N", [0, 1, 2], "3 of 4")
    assert run.asked == NEW["settings"] and run.args["height"] == 64 and run.args["versions"] == {"torch": "2.9.1"}
    assert run.columns == {"mean": "mean of the batch"}  # what has no value, or is shown anyway, is left out
    assert [image.prompt for image in run.images] == run.prompts == ["a duck", "a ball"]
    assert [image.best for image in run.images] == [1, 0] and run.best == 1
    assert run.values("mean", 1) == [4.0, 3.0, 3.5] and run.means("reward") == [3.0, 3.5, 3.25]
    assert [list(image.frames) for image in run.images] == [[0], [2]]
    assert run.images[0].gallery is None and run.images[1].gallery == run.folder / "gallery_b1.png"
    assert run.seconds == 2 and run.peak_memory_gb is None and not run.has("probability") and run.result is None


def test_a_folder_of_the_earlier_form(tmp_path):
    lines = [entry(step, float(step), judge=0.5, regularizer=3.0, probability=1.0) for step in range(6)]
    run = read_run(make_run(tmp_path / "run", OLD, lines))
    assert (run.method, run.title, run.iterations) == ("dno", "Direct Noise Optimization", "6")
    assert run.args["gamma"] == 10.0 and run.args["precision"] == "float32" and run.watched == ["judge"]
    asked = {"model", "prompt", "gamma", "opt_steps", "output"}
    assert asked <= run.asked.keys() and not {"precision", "device", "height", "folder"} & run.asked.keys()
    assert run.columns == {"regularizer": "regularizer"}  # and no grad_norm, which nobody recorded
    assert run.has("probability") and run.prompts == ["a red ball"] and run.parts == []


def test_the_best_is_what_best_png_says(tmp_path):
    """A limit on P(z) may rule out the highest reward; best.png stands in for an iteration that was not saved."""
    folder = make_run(tmp_path / "run", OLD, [entry(step, float(step)) for step in range(4)], ["images/000.png"])
    save(folder / "best.png", step=2)
    (image,) = read_run(folder).images
    assert image.best == 2 and list(image.frames) == [0] and list(image.frames_and_best) == [0, 2]
    for told in (17, "two"):
        save(folder / "best.png", step=told)
        assert read_run(folder).best == 3
    (folder / "best.png").write_bytes(b"no image")
    assert read_run(folder).best == 3


def test_initial_png_is_iteration_0_if_that_was_not_saved(tmp_path):
    lines = [entry(0, 1.0), entry(1, 2.0)]
    folder = make_run(tmp_path / "run", OLD, lines, ["initial.png", "images/001.png"])
    frames = read_run(folder).images[0].frames
    assert [path.name for path in frames.values()] == ["initial.png", "001.png"]
    save(folder / "images" / "000.png")
    assert read_run(folder).images[0].frames[0].name == "000.png"


def test_files_of_others_are_left_out(tmp_path):
    names = ["images/000.png", "images/my.png", "images/12.png", "images/000_copy.png", "images/٠٠١.png", "000.png",
             "images/000_b7.png", "images/099.png", "evolution.png"]  # fmt: skip
    run = read_run(make_run(tmp_path / "run", OLD, [entry(0, 1.0), entry(1, 2.0)], names))
    assert len(run.images) == 1 and [path.name for path in run.images[0].frames.values()] == ["000.png"]
    assert run.images[0].frames[0].parent.name == "images"


def test_lines_that_are_no_entries(tmp_path):
    lines = [entry(1, 2.0), "7", "[]", '"step"', "null", '{"step": "2"}', '{"step": true}', '{"step": 1.5}',
             '{"step": -1}', '{"reward": 1}', entry(0, 1.0), entry(1, 3.0), "", '{"step": 2, "rewa']  # fmt: skip
    folder = make_run(tmp_path / "run", OLD, lines)
    assert [line["step"] for line in read_log(folder)] == [0, 1]
    assert read_run(folder).means("reward") == [1.0, 3.0]  # a resumed run wrote iteration 1 again


def test_values_that_are_no_numbers(tmp_path):
    lines = ['{"step": 0, "reward": NaN, "images": null}', '{"step": 1, "reward": -Infinity, "images": [3]}',
             '{"step": 2, "reward": "high", "rewards": []}', f'{{"step": 3, "reward": 1{"0" * 400}}}',
             '{"step": 4, "reward": true}', '{"step": 5, "reward": 1, "rewards": [2]}']  # fmt: skip
    run = read_run(make_run(tmp_path / "run", OLD, lines))
    assert run.values("reward", 0) == [None] * 5 + [2.0] and run.means("reward") == [None] * 5 + [1.0]
    assert run.best == 5
    assert [number(value) for value in (1, -0.5, None, "1", False, float("inf"), 1e301)] == [1.0, -0.5] + [None] * 5


def test_a_value_of_the_whole_run_counts_for_each_image(tmp_path):
    run = read_run(make_run(tmp_path / "run", OLD, [entry(0, 1.0, 2.0) | {"loss": 7.0}]))
    assert [run.values("loss", b) for b in range(2)] == [[7.0], [7.0]]


def test_args_of_the_wrong_type_are_left_out(tmp_path):
    odd = {"prompt": [], "weights": [1], "watched": "judge", "columns": ["a"], "opt_steps": "many", "model": 3}
    run = read_run(make_run(tmp_path / "run", odd, [entry(0, 1.0)]))
    assert (run.prompts, run.parts, run.watched, run.columns, run.iterations) == ([""], [], [], {}, "1")


def test_a_result_is_there_once_the_run_has_ended(tmp_path):
    folder = make_run(tmp_path / "run", OLD, [entry(0, 1.0)])
    for text, result in (("{", None), ("[]", None), ('{"rewards": [1.0]}', {"rewards": [1.0]})):
        (folder / "result.json").write_text(text)
        assert read_run(folder).result == result


@pytest.mark.parametrize("args", ["{", "[]", "7", "null", '{"settings": 3}', '{"settings": {}, "resolved": []}'])
def test_a_folder_without_settings_is_one_line(tmp_path, args):
    folder = make_run(tmp_path / "run", OLD, [entry(0, 1.0)])
    (folder / "args.json").write_text(args)
    with pytest.raises(UserError, match="args.json (is not JSON|holds no settings)") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_steps_are_even_and_hold_first_best_and_last():
    assert choose_steps([0, 1, 2], 8, 1) == [0, 1, 2]
    assert choose_steps(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert choose_steps(list(range(101)), 5, 60) == [0, 25, 60, 75, 100]
    assert choose_steps(list(range(101)), 5, 99) == [0, 25, 50, 99, 100]
    assert choose_steps([0, 10, 20], 2, 10) == [0, 10, 20]  # nothing between the ends to give way
    for best in range(57):
        chosen = choose_steps(list(range(57)), 8, best)
        assert {0, best, 56} <= set(chosen) and len(chosen) == 8 and chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("value", "words", "plain"),
    [(None, "–", "-"), (float("nan"), "–", "-"), (0.0, "0.0000", "0.0000"), (-0.12429, "−0.1243", "-0.1243"),
     (12.3456, "12.346", "12.346"), (-34512.3, "−34512", "-34512"), (7.1e-10, "7.1×10⁻¹⁰", "7.1e-10"),
     (-2e6, "−2.0×10⁶", "-2.0e6"), (0.001, "0.0010", "0.0010")],
)  # fmt: skip
def test_how_a_number_is_written(value, words, plain):
    assert say(value) == words and say(value, plain=True) == plain


def test_the_axis_of_probabilities():
    bottom, top, ticks = log_axis(1.0)
    assert bottom == -2 and 0 < top < 0.1 and ticks == [(0, "1"), (-1, "0.1"), (-2, "0.01")]
    assert log_axis(2e-5)[0] == log_axis(1e-5)[0] == -5  # a decade that is just reached is the last
    assert log_axis(0.0) == log_axis(P_FLOOR) and log_axis(P_FLOOR)[2][-1] == (-12, "≤10⁻¹²")


def test_a_text_becomes_one_line_that_can_be_shown():
    assert elide("a\n b\t c") == "a b c" and elide("a" * 9, 5) == "aaaa…"
    assert elide("\x07\ud800") == "\N{REPLACEMENT CHARACTER}?"
