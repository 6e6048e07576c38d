"""Figures of a run against facts known beforehand: which frames, where, in which order, for how long."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from dno.errors import UserError
from dno.report.figures import COLUMNS, WIDTH, draw_run, evolution_gif, evolution_sheet
from dno.report.reading import choose_steps


def color(step, b=0):
    """A colour that no other frame, line or letter has."""
    return (200 - 7 * step, 40 + 9 * step, 90 + 30 * b)


def make_run(folder, steps=20, batch=1, every=1, size=(16, 16), rewards=None, evaluate=("jpeg",), **args):
    """A run's folder whose frames are plain colours and whose best iteration is the last but two."""
    rewards = rewards or [float(step if step < steps - 2 else 0) for step in range(steps)]
    (folder / "images").mkdir(parents=True)
    args = {"prompt": "a red ball", "climbs": "black", "weights": {"black": 1.0}, "watched": list(evaluate),
            "model": "tiny", "gamma": 0.1, "num_steps": 4, "opt_steps": steps, "seed": 1, "batch_size": batch,
            "script": "run.py"} | args  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step, reward in enumerate(rewards):
        p = [10.0 ** -(step * (b + 1)) for b in range(batch)]
        images = [{"reward": reward, "probability": p[b], "probability_min": p[b], "black": reward,
                   **dict.fromkeys(evaluate, 1.0)} for b in range(batch)]  # fmt: skip
        lines.append({"step": step, "reward": reward, "rewards": [reward] * batch, "images": images})
        for b in range(batch if step % every == 0 else 0):
            name = f"{step:03d}" + (f"_b{b}" if b else "")
            Image.new("RGB", size, color(step, b)).save(folder / "images" / f"{name}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sheet(folder):
    evolution_sheet(folder)
    with Image.open(folder / "evolution.png") as image:
        assert image.width == WIDTH and image.mode == "RGB"
        return np.asarray(image).astype(int)


def boxes(pixels, rgb):
    """Left, top, right and bottom of the pixels of exactly this colour, and whether they fill their box."""
    y, x = np.nonzero((pixels == rgb).all(-1))
    if not len(x):
        return None
    box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
    assert len(x) == (box[2] - box[0]) * (box[3] - box[1])
    return box


def test_sheet_shows_the_chosen_frames_from_left_to_right(tmp_path):
    pixels = sheet(make_run(tmp_path / "run"))
    chosen = choose_steps(list(range(20)), COLUMNS, 17)
    found = [boxes(pixels, color(step)) for step in chosen]
    assert all(box[2] - box[0] == box[3] - box[1] == 192 for box in found)
    assert [box[0] for box in found] == sorted({box[0] for box in found})
    assert len({box[1] for box in found}) == 1
    assert all(boxes(pixels, color(step)) is None for step in set(range(20)) - set(chosen))
    framed = [tuple(pixels[box[1] - 2, box[0] - 2]) == (0xD5, 0x5E, 0) for box in found]
    assert framed == [step == 17 for step in chosen]  # the best is marked, and it alone


def test_sheet_has_a_row_for_each_image_up_to_four(tmp_path):
    pixels = sheet(make_run(tmp_path / "run", steps=3, batch=5, size=(32, 16)))
    for step in range(3):
        column = [boxes(pixels, color(step, b)) for b in range(4)]
        assert all(box[2] - box[0] == 192 and box[3] - box[1] == 96 for box in column)
        assert len({box[0] for box in column}) == 1
        assert [box[1] for box in column] == sorted({box[1] for box in column})
        assert boxes(pixels, color(step, 4)) is None


def columns(folder):
    """The iterations that have a colour of `color` on the sheet, of a run of 20, from left to right."""
    pixels = sheet(folder)
    found = {step: box for step in range(20) if (box := boxes(pixels, color(step)))}
    return sorted(found, key=lambda step: found[step][0])


def test_first_and_best_stand_in_for_steps_that_were_not_saved(tmp_path):
    folder = make_run(tmp_path / "run", every=5)
    Image.new("RGB", (16, 16), color(17)).save(folder / "best.png")
    Image.new("RGB", (16, 16), (4, 5, 6)).save(folder / "initial.png")
    assert columns(folder) == [0, 5, 10, 15, 17]  # the saved frame comes before initial.png
    (folder / "images" / "000.png").unlink()
    pixels = sheet(folder)
    assert boxes(pixels, (4, 5, 6))[0] < boxes(pixels, color(5))[0]


def test_in_a_batch_the_best_of_one_image_is_no_column(tmp_path):
    folder = make_run(tmp_path / "run", every=5, batch=2)
    for name in ("best.png", "best_b1.png"):
        Image.new("RGB", (16, 16), color(17)).save(folder / name)
    assert columns(folder) == [0, 5, 10, 15]


def test_best_image_names_its_own_step(tmp_path):
    """A limit on P(z) may rule out the highest reward: best.png says which step it is of."""
    folder, text = make_run(tmp_path / "run"), PngInfo()
    text.add_itxt("step", "11")
    Image.new("RGB", (16, 16), color(11)).save(folder / "best.png", pnginfo=text)
    left, top, _, _ = boxes(sheet(folder), color(11))
    assert tuple(sheet(folder)[top - 2, left - 2]) == (0xD5, 0x5E, 0)


def test_an_image_that_stopped_early_stays_as_it_was(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, batch=2)
    for step in (2, 3):
        (folder / "images" / f"{step:03d}_b1.png").unlink()
    pixels = sheet(folder)
    places = np.nonzero((pixels == color(1, 1)).all(-1).any(0))[0]
    assert boxes(pixels, color(0, 1)) is not None and len(places) == 3 * 192  # in columns 1, 2 and 3


def test_gif_shows_every_frame_in_order_and_rests_on_the_last(tmp_path):
    folder = make_run(tmp_path / "run", steps=20, size=(64, 48))
    evolution_gif(folder)
    with Image.open(folder / "evolution.gif") as gif:
        assert gif.n_frames == 20 and gif.info["loop"] == 0 and gif.size == (256, 192 + 30)
        durations = []
        for step in range(20):
            gif.seek(step)
            durations.append(gif.info["duration"])
            assert np.abs(np.subtract(gif.convert("RGB").getpixel((128, 96)), color(step))).max() <= 3
    assert len(set(durations[:-1])) == 1 and 100 <= durations[0] <= 200 and durations[-1] == 1500


def test_gif_of_a_long_run_is_thinned_and_plays_ten_frames_a_second(tmp_path):
    folder = make_run(tmp_path / "run", steps=1)
    line = json.loads((folder / "metrics.jsonl").read_text())
    lines = [json.dumps(line | {"step": step}) + "\n" for step in range(400)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in range(0, 400, 2):
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(folder / "images" / f"{step:03d}.png")
    evolution_gif(folder)
    with Image.open(folder / "evolution.gif") as gif:
        assert gif.n_frames == 150 and gif.info["duration"] == 100


@pytest.mark.parametrize(
    ("size", "batch", "expected"),
    [((64, 64), 1, (256, 286)), ((100, 50), 1, (300, 180)), ((300, 200), 1, (300, 230)),
     ((1024, 512), 1, (512, 286)), ((512, 512), 2, (516, 286)), ((64, 64), 6, (1036, 286))],
)  # fmt: skip
def test_gif_size(tmp_path, size, batch, expected):
    folder = make_run(tmp_path / "run", steps=2, size=size, batch=batch)
    evolution_gif(folder)
    with Image.open(folder / "evolution.gif") as gif:
        assert gif.size == expected


def test_gif_sets_a_batch_side_by_side(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, batch=3)
    evolution_gif(folder)
    with Image.open(folder / "evolution.gif") as gif:
        tiles = [gif.convert("RGB").getpixel((128 + 260 * b, 128)) for b in range(3)]
    assert np.abs(np.subtract(tiles, [color(0, b) for b in range(3)])).max() <= 3


def spoil(folder, change):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


ODD = {
    "one iteration": (dict(steps=1), None),
    "constant": (dict(steps=9, rewards=[0.5] * 9), None),
    "a run of nulls": (dict(steps=6), lambda e: {k: e[k] if k == "step" else None for k in e}),
    "some nulls": (dict(steps=6), lambda e: e | {"reward": None, "rewards": [None]} if e["step"] == 2 else e),
    "P is 0": (dict(steps=6), lambda e: e | {"probability": [0.0], "probability_min": [0.0]}),
    "no P": (dict(steps=6), lambda e: {k: v for k, v in e.items() if "prob" not in k}),
    "huge": (dict(steps=6), lambda e: e | {"reward": 1e9 * e["step"], "rewards": [1e-9]}),
    "mathtext": (dict(steps=2, prompt="$5, $x^{2$ \\frac\n" * 9, model="$\\a$", evaluate=["a$_b$^{"]), None),
    "wide": (dict(steps=2, prompt="W" * 200), None),
    "no glyph": (dict(steps=2, prompt="鸭 🦆 \ud800 \x07"), None),
    "many panels": (dict(steps=3, evaluate=list("abcdefg"), weights={"black": 1, "a": 0.5}), None),
    "no prompt": (dict(steps=2, prompt=None, climbs=None, model=None, gamma=None), None),
    "prompts": (dict(steps=3, batch=3, prompt=["a duck", "W" * 300, "$x^{2$"]), None),
    "columns": (dict(steps=3, columns={"probability_min": "least P", "black": "$x^{2$" * 30, "no": "none"}), None),
    "fewer names": (dict(steps=3, batch=3, prompt=["a duck"]), None),
    "tall": (dict(steps=3, size=(8, 64), batch=2), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_drawn_without_a_warning(tmp_path, name):
    options, change = ODD[name]
    folder = make_run(tmp_path / "run", **options)
    if change:
        spoil(folder, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = sheet(folder)
        evolution_gif(folder)
    assert (pixels[:, :20] == 255).all() and (pixels[:, -20:] == 255).all()  # nothing runs over the margin
    assert boxes(pixels, color(0)) is not None


def test_a_line_cut_short_and_frames_missing_in_the_middle(tmp_path):
    folder = make_run(tmp_path / "run", steps=8)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "rewa')
    (folder / "images" / "003.png").unlink()
    (folder / "images" / "004.png").write_bytes(b"no image")
    assert columns(folder) == [0, 1, 2, 5, 6, 7]
    evolution_gif(folder)


@pytest.mark.parametrize("draw", [evolution_sheet, evolution_gif])
@pytest.mark.parametrize(("missing", "words"), [("metrics.jsonl", "has no metrics.jsonl"), ("images", "has no images")])
def test_nothing_to_draw_is_one_clear_line_and_leaves_the_old_figure(tmp_path, draw, missing, words):
    folder = make_run(tmp_path / "run", steps=2)
    for name in ("evolution.png", "evolution.gif"):
        (folder / name).write_bytes(b"old")
    (folder / missing).rename(tmp_path / "away")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{words}.*expected") as error:
        draw(folder)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_failed_write_leaves_the_old_figure_and_no_litter(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "evolution.png").write_bytes(b"old")

    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        evolution_sheet(folder)
    assert (folder / "evolution.png").read_bytes() == b"old"
    names = {path.name for path in folder.iterdir()}
    assert names == {"images", "args.json", "metrics.jsonl", "evolution.png"}


def test_same_run_same_bytes_and_the_run_is_only_read(tmp_path):
    folder = make_run(tmp_path / "run", steps=5, batch=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    figures = []
    for _ in range(2):
        evolution_sheet(folder)
        evolution_gif(folder)
        figures.append([(folder / name).read_bytes() for name in ("evolution.png", "evolution.gif")])
    assert figures[0] == figures[1]
    assert {path: path.read_bytes() for path in before} == before
    with Image.open(folder / "evolution.png") as image:
        assert not image.info  # no date, no version: they would change the bytes


def test_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib

    before = matplotlib.rcParams.copy()
    evolution_sheet(make_run(tmp_path / "run", steps=2))
    assert matplotlib.rcParams.copy() == before


def test_importing_is_light():
    code = "import sys, dno.report.figures; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_curve_moves_with_the_reward(tmp_path):
    """Two runs that differ in one reward differ in the reward's plot, and nowhere in another panel."""
    rewards = [0.0, 0.2, 0.5, 0.9, 1.0]
    one = sheet(make_run(tmp_path / "one", steps=5, rewards=rewards))
    two = sheet(make_run(tmp_path / "two", steps=5, rewards=rewards[:3] + [0.1, 1.0]))
    as_image = [Image.fromarray(pixels.astype(np.uint8)) for pixels in (one, two)]
    below = [image.crop((0, 400, WIDTH, image.height)) for image in as_image]
    left, _, right, _ = ImageChops.difference(*below).getbbox()
    assert right < WIDTH // 3 + 20 and right - left > 50


def without_probability(entry):
    images = [{k: v for k, v in image.items() if "prob" not in k} for image in entry["images"]]
    return {k: v for k, v in entry.items() if "prob" not in k} | {"images": images}


def test_a_run_without_a_probability_has_no_panel_for_it(tmp_path):
    """Green is P(z)'s alone; further columns of the method are drawn in grey instead."""
    green, grey = (0x00, 0x79, 0x5A), (0x66, 0x66, 0x66)
    folder = make_run(tmp_path / "run", steps=6, gamma=None, evaluate=())
    below = sheet(folder)[400:]
    assert (below == green).all(-1).any()
    spoil(folder, without_probability)
    below = sheet(folder)[400:]
    assert not (below == green).all(-1).any()
    lines = (below[60:] == grey).all(-1).sum()
    spoil(folder, lambda entry: entry | {"mean": 0.5 * entry["step"]})
    assert (sheet(folder)[460:] == grey).all(-1).sum() < lines + 50, "a column that nobody named is not drawn"
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"columns": {"mean": "mean of the candidates"}}))
    assert (sheet(folder)[460:] == grey).all(-1).sum() > lines + 500


def test_a_curve_that_hardly_moves_looks_level(tmp_path):
    """A reward that changes by rounding alone stays within a few pixels; one that doubles fills its panel."""
    heights = []
    for name, change in (("level", 1e-7), ("rising", 0.5)):
        rewards = [0.5 + change * step for step in range(3)]
        pixels = sheet(make_run(tmp_path / name, steps=3, rewards=rewards, evaluate=()))[500:, :760]
        heights.append(np.ptp(np.nonzero((pixels == (0, 0x72, 0xB2)).all(-1))[0]))
    assert heights[0] < 20 and heights[1] > 200


def test_each_row_has_its_own_prompt(tmp_path):
    """One prompt for all images leaves no line for it over each row; two do, and move the second row down."""
    one = sheet(make_run(tmp_path / "one", steps=2, batch=2, prompt="a duck"))
    two = sheet(make_run(tmp_path / "two", steps=2, batch=2, prompt=["a duck", "a ball"]))
    tops = [[boxes(pixels, color(0, b))[1] for b in range(2)] for pixels in (one, two)]
    assert tops[1][0] - tops[0][0] == 26 and tops[1][1] - tops[0][1] == 52


def test_a_figure_that_fails_is_a_warning_and_the_other_is_drawn(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", steps=2)

    def fail(folder):
        raise RuntimeError("no font")

    monkeypatch.setattr("dno.report.figures.evolution_sheet", fail)
    with pytest.warns(UserWarning, match="evolution.png could not be drawn: RuntimeError: no font"):
        draw_run(folder)
    assert (folder / "evolution.gif").is_file() and not (folder / "evolution.png").exists()
