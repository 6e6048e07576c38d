"""python -m rewards score."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
from rewards.__main__ import main, read

ROOT = Path(__file__).parents[2]


def rows(text):
    return [line.split() for line in text.strip().splitlines()]


def test_table_and_csv_agree_with_the_rewards(picture_files, tmp_path, capsys):
    file = tmp_path / "scores.csv"
    arguments = [
        "score",
        "--reward",
        "white",
        "contrast",
        "jpeg",
        "--prompt",
        "white duck",
        "--csv",
        str(file),
    ]
    assert main([*arguments, str(picture_files)]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert table[0] == ["image", "white", "contrast", "jpeg"]
    assert [row[0] for row in table[1:]] == [str(picture_files / f"{i}.png") for i in range(3)] + ["mean"]
    assert "white" in captured.err, "a folder gets a progress bar"
    for i in range(3):
        for column, name in enumerate(("white", "contrast", "jpeg"), start=1):
            expected = -rewards.RFUNCTIONS[name]()(read(picture_files / f"{i}.png"), [""]).item()
            assert float(table[i + 1][column]) == pytest.approx(expected, abs=6e-5)
    with open(file, newline="") as lines:
        written = list(csv.DictReader(lines))
    assert [row["prompt"] for row in written] == ["white duck"] * 3
    assert float(written[1]["white"]) == pytest.approx(float(table[2][1]), abs=6e-5)


def test_rewards_with_weights_by_flag(picture_files, pick_folder, imagereward_folder, capsys):
    files = [str(picture_files / "0.png"), str(picture_files / "1.png")]
    flags = ["--pick_path", str(pick_folder), "--imagereward_path", str(imagereward_folder)]
    assert main(["score", "--reward", "pick", "imagereward", "--prompt", "red car", *flags, *files]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no bar for single files"
    rewards.configure(pick_path=pick_folder, imagereward_path=imagereward_folder)
    for column, name in enumerate(("pick", "imagereward"), start=1):
        loss_fn = rewards.RFUNCTIONS[name](None, "cpu")
        for line, file in zip(rows(captured.out)[1:], files):
            with torch.no_grad():
                assert float(line[column]) == pytest.approx(
                    -loss_fn(read(file), ["red car"]).item(), abs=6e-5
                )


def test_errors_are_one_line(picture_files, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    (tmp_path / "empty").mkdir()
    picture = str(picture_files / "0.png")
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "is not an image"),
        ([str(tmp_path / "empty")], "no images in the folder"),
        ([str(broken)], "broken.png"),
        ([picture, "--csv", str(tmp_path / "nowhere" / "x.csv")], "--csv"),
        ([picture, "--pick_path", str(tmp_path)], "config.json"),
    ):
        assert main(["score", "--reward", "pick" if "pick" in str(arguments) else "white", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and words in error and "\n" not in error
    assert main(["score", "--reward", "white", "whit", picture]) == 2
    assert "whit is not an image" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["score", "--reward", picture])
    assert left.value.code == 2


def test_a_reward_whose_library_is_missing_is_one_line(picture_files, tmp_path, monkeypatch, capsys):
    """As without the extra `rewards`."""
    (tmp_path / "HPS_v2_compressed.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    flags = ["--reward", "hps", "--hps_path", str(tmp_path)]
    assert main(["score", *flags, str(picture_files / "0.png")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: this reward needs open_clip") and error.endswith("pip install open_clip_torch")
    assert "\n" not in error


def test_it_runs_as_a_module_and_lists_the_rewards():
    done = subprocess.run([sys.executable, "-m", "rewards", "list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    listed = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(listed) == list(rewards.RFUNCTIONS)
    assert "[no gradient]" in listed["jpeg"] and "[no gradient]" not in listed["pick"]
