"""The run folder: never an old one, whole files or none, and a noise file that is read back with care."""

import contextlib
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dno.errors import UserError
from dno.noise import load_noise
from dno.runs import folder as runs
from dno.runs.folder import Run, git_revision

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
not_as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "output")


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20261120-101112")
    folders = [Run(tmp_path / "deep" / "output", prefix="SD").folder for _ in range(3)]
    assert [folder.name for folder in folders] == [f"SD-20261120-101112{end}" for end in ("", "-2", "-3")]
    assert all(names(folder) == ["images"] for folder in folders)


def test_the_name_holds_date_and_time(tmp_path):
    assert re.fullmatch(r"XL-\d{8}-\d{6}", Run(tmp_path, prefix="XL").folder.name)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with refused(f"cannot write {output}", "--output"):
            Run(output)


@not_as_root
def test_a_read_only_output(tmp_path):
    tmp_path.chmod(0o555)
    with refused(f"cannot write {tmp_path}", "Permission denied", "--output"):
        Run(tmp_path)


def test_args_hold_settings_versions_and_revision(run):
    settings = {"prompt": "weiße Ente", "lr": 0.01, "objective": ("a",), "limit": float("inf"), "device": Path("x")}
    run.write_args(settings)
    args = json.loads((run.folder / "args.json").read_text())
    assert args["prompt"] == "weiße Ente" and args["lr"] == 0.01 and args["objective"] == ["a"]
    assert args["limit"] is None and args["device"] == "x"
    assert torch.__version__.startswith(args["versions"]["torch"]) and args["git_revision"] == git_revision()


def test_a_missing_package_or_checkout_is_null(monkeypatch, tmp_path):
    assert runs._version("no-such-package") is None
    monkeypatch.setattr(runs, "PACKAGE_ROOT", tmp_path)
    assert git_revision() is None
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_metrics_are_lines_of_json_without_nan(run):
    for step, reward in enumerate((0.5, float("nan"))):
        run.log({"step": step, "reward": reward, "images": [{"reward": -float("inf")}]})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 0, "reward": 0.5, "images": [{"reward": None}]},
        {"step": 1, "reward": None, "images": [{"reward": None}]},
    ]


def test_images_are_clamped_and_rounded_and_say_what_they_are(run):
    image = torch.tensor([-3.0, -1.0, 0.26, 1.0]).expand(3, 2, 4)
    run.save_image("images/000", image, prompt="weiße Ente 鸭", seed=3, step=0, reward=-0.25)
    run.save_image("images/000", image, 2)
    with Image.open(run.folder / "images" / "000.png") as png:
        assert png.size == (4, 2) and png.mode == "RGB"
        assert [png.getpixel((x, 1)) for x in range(4)] == [(value,) * 3 for value in (0, 0, 161, 255)]
        assert png.text == {"prompt": "weiße Ente 鸭", "seed": "3", "step": "0", "reward": "-0.25"}
    assert names(run.folder) == ["images", "images/000.png", "images/000_b2.png"]


def test_noise_is_read_back_bit_for_bit(run):
    noise = torch.randn(4, 2, 4, 8, 8).transpose(0, 1).transpose(0, 1)
    run.save_noise(noise, prompt="weiße Ente", seed=3)
    assert torch.equal(load_noise(run.folder / "best_noise.safetensors"), noise)
    with safe_open(run.folder / "best_noise.safetensors", "pt") as file:
        assert file.metadata() == {"prompt": "weiße Ente", "seed": "3"}
    run.save_noise(noise.double())  # the state of a float64 model
    assert torch.equal(load_noise(str(run.folder / "best_noise.safetensors")), noise)


BAD_NOISE = {
    "another tensor": ({"latents": torch.zeros(2, 1, 4, 8, 8)}, "no tensor 'noise'"),
    "one dimension short": ({"noise": torch.zeros(2, 4, 8, 8)}, "shape (2, 4, 8, 8)"),
    "integers": ({"noise": torch.zeros(2, 1, 4, 8, 8, dtype=torch.int32)}, "torch.int32"),
    "not finite": ({"noise": torch.full((2, 1, 4, 8, 8), torch.nan)}, "expected a finite float tensor"),
}


@pytest.mark.parametrize("name", BAD_NOISE)
def test_what_is_no_noise(tmp_path, name):
    tensors, words = BAD_NOISE[name]
    save_file(tensors, tmp_path / "noise.safetensors")
    with refused("--noise", "noise.safetensors", words, "(T + 1, B, C, h, w)"):
        load_noise(tmp_path / "noise.safetensors")


def test_a_noise_file_that_is_damaged_a_pickle_or_absent(run, tmp_path):
    run.save_noise(torch.zeros(2, 1, 4, 8, 8))
    cut = run.folder / "best_noise.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    torch.save(torch.zeros(2), tmp_path / "noise.pt")
    (tmp_path / "empty").write_bytes(b"")
    for path in (cut, tmp_path / "noise.pt", tmp_path / "empty", tmp_path / "absent", tmp_path, run.folder):
        file = path / "best_noise.safetensors" if path.is_dir() else path
        with refused(f"--noise {file} could not be read", "expected a best_noise.safetensors"):
            load_noise(path)


# A disk that fills up: real ones (/dev/full, a limit on the size of a file), and a rename that fails.


def refuse(*args, **kw):
    raise OSError(28, "No space left on device")


def fill(run):
    """Write each kind of file, expecting a clear line for each."""
    for write in (
        lambda: run.write_args({"lr": 2}), lambda: run.save_image("best", torch.ones(3, 64, 64)),
        lambda: run.save_noise(torch.ones(2, 1, 4, 8, 8)),
    ):  # fmt: skip
        with refused("cannot write", "free some space or choose another folder with --output"):
            write()


@pytest.fixture
def written(run):
    """A run with one good file of each kind."""
    run.write_args({"lr": 1})
    run.save_image("best", torch.zeros(3, 8, 8))
    run.save_noise(torch.zeros(2, 1, 4, 8, 8))
    run.log({"step": 0})
    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_dev_full
def test_metrics_on_a_full_disk_are_an_error(written):
    (written.folder / "metrics.jsonl").unlink()
    (written.folder / "metrics.jsonl").symlink_to("/dev/full")
    with refused("cannot write", "metrics.jsonl", "No space left"):
        written.log({"step": 1})


@contextlib.contextmanager
def files_of_at_most(size):
    """Inside, no file of this process may grow over this many bytes; only the writing in question belongs here."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 20, 37])
def test_a_line_that_does_not_fit_leaves_no_half_line(written, room):
    path = written.folder / "metrics.jsonl"
    before, line = path.read_bytes(), {"step": 1, "reward": 0.123456789012345}
    with files_of_at_most(len(before) + room), refused("cannot write", "metrics.jsonl"):
        written.log(line)
    assert path.read_bytes() == before
    written.log(line)  # there is room again
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [0, 1]


def test_a_file_that_does_not_fit_leaves_nothing(written):
    before = contents(written.folder)
    with files_of_at_most(20):
        fill(written)
    assert contents(written.folder) == before


def test_a_failed_rename_leaves_the_old_files(written, monkeypatch):
    before = contents(written.folder)
    monkeypatch.setattr(os, "replace", refuse)
    fill(written)
    assert contents(written.folder) == before


def test_an_interrupted_write_leaves_no_litter(written, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = contents(written.folder)
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        written.save_image("best", torch.ones(3, 8, 8))
    assert contents(written.folder) == before


# The end of a run.


def test_a_picture_that_fails_is_a_warning_and_the_other_is_drawn(written, monkeypatch):
    from dno.report.figures import draw_run

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.draw", fail)
    written.save_image("images/000", torch.zeros(3, 8, 8))
    with pytest.warns(UserWarning, match="evolution.png could not be drawn: OSError: .*No space left"):
        draw_run(written.folder)
    assert (written.folder / "evolution.gif").is_file() and not (written.folder / "evolution.png").exists()


def test_the_result_says_what_was_found(written):
    from dno.alignment import Alignment

    metrics = [{"images": [{"reward": 0.5}, {"reward": float("nan")}], "seconds": 0.5}] * 2
    result = Alignment(None, torch.tensor([0.5, -torch.inf]), [1, None], [None, "given up"], None, metrics, None)
    written.write_result(result)
    found = json.loads((written.folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert found == {
        "rewards": [0.5, None], "steps": [1, None], "stopped": [None, "given up"], "iterations": 2, "seconds": 1.0,
        "first": [{"reward": 0.5}, {"reward": None}], "best": [{"reward": 0.5}, {}],
    }  # fmt: skip
    handle = written.folder
    written.close()
    again = Run(folder=handle, resume=True)
    assert (handle / "result.json").exists(), "nothing has changed yet"
    again.log({"step": 2})
    assert not (handle / "result.json").exists(), "it is not done yet"


# A run that is taken up again.


def test_a_cut_keeps_the_lines_and_pictures_up_to_the_checkpoint(run):
    for step in range(4):
        run.log({"step": step, "reward": None if step == 1 else 0.5})
        for index in (0, 1):
            run.save_image(f"images/{step:03d}", torch.zeros(3, 4, 4), index)
    for name in ("mine.png", "003.jpg", "3.png", "003_b1_copy.png", "1003.png", "003_b1.png.bak"):
        (run.folder / "images" / name).write_bytes(b"")
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "rew')
    metrics = run.cut(2)
    assert [line["step"] for line in metrics] == [0, 1] and metrics[1]["reward"] != metrics[1]["reward"]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    left = sorted(path.name for path in (run.folder / "images").iterdir())
    mine = ["mine.png", "003.jpg", "3.png", "003_b1_copy.png", "003_b1.png.bak"]
    assert left == sorted([*mine, "000.png", "000_b1.png", "001.png", "001_b1.png"])


@pytest.mark.parametrize(
    "text", ["", '{"step": 0}\n', '{"step": 0}\n{"step": 2}\n', '{"step": 0}\n{"step": 1', "{}\n{}\n", "1\n2\n"]
)
def test_metrics_that_are_not_the_checkpoints_are_one_line(run, text):
    (run.folder / "metrics.jsonl").write_text(text)
    with refused("metrics.jsonl"):
        run.cut(2)
    assert (run.folder / "metrics.jsonl").read_text() == text


def test_what_a_picture_is_of(run):
    run.save_image("best", torch.zeros(3, 4, 4), step=7)
    run.save_image("best", torch.zeros(3, 4, 4), 1)
    (run.folder / "best_b2.png").write_bytes(b"no picture")
    assert [run.picture_step("best", index) for index in range(4)] == [7, None, None, None]


def test_the_history_of_a_run_is_what_its_starts_were_made_with(run):
    about = {"method": "dno", "settings": {}, "resolved": {"device": "cuda", "processes": 2}}
    run.write_args(about)
    run.write_args(about | {"resolved": {"device": "cpu", "processes": 1}}, done=3)
    run.write_args(about, done=5)
    history = json.loads((run.folder / "args.json").read_text())["history"]
    made = [(entry["until"], entry["device"], entry["processes"]) for entry in history]
    assert made == [(3, "cuda", 2), (5, "cpu", 1)]
    assert all(entry["versions"]["torch"] for entry in history)
    (run.folder / "args.json").write_text("{")
    run.write_args(about, done=7)
    assert json.loads((run.folder / "args.json").read_text())["history"] == []


def test_a_gallery_is_a_sheet_of_captioned_images(run):
    pixels = torch.full((8, 8, 3), 200, dtype=torch.uint8).numpy()
    run.save_gallery([], 0)
    assert not (run.folder / "gallery.png").exists()
    run.save_gallery([(f"{k}: 0.5", pixels) for k in range(5)], 1)
    with Image.open(run.folder / "gallery_b1.png") as sheet:
        assert sheet.width > 4 * 160 and sheet.height > 2 * 160
        assert sheet.convert("RGB").getpixel((20, 20)) == (200, 200, 200)


def test_discard_removes_this_run_only(written):
    other = Run(written.folder.parent)
    written.discard()
    assert not written.folder.exists() and other.folder.is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.discard()  # twice is no harm
