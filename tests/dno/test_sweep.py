"""Several runs with one command: each as if alone, shared out, and resumed after a stop."""

import json
import os
import signal
import time

import pytest
import torch

from dno.cli import main
from dno.noise import load_noise


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("white duck\n\nred car\nwhite duck\ngreen | tree\n")


def folder_of(tmp_path):
    (folder,) = (tmp_path / "output").iterdir()
    return folder


def rows_of(tmp_path):
    return json.loads((folder_of(tmp_path) / "summary.json").read_text())


GRADIENT = {"estimator": "backprop", "prefix": "SD"}


def test_each_run_is_as_if_alone_on_one_process_or_two(launch, tmp_path, prompts):
    for size in (1, 2):
        results = launch(size, f"--prompts prompts.txt --seeds 3 4 --evaluate jpeg --output {size}", **GRADIENT)
        assert [code for code, *_ in results] == [0] * size, results
        assert results[0][1].count("| white duck | 3 |") == 1
    one, two = (next((tmp_path / str(size)).iterdir()) for size in (1, 2))
    assert one.name == two.name and one.name.startswith("SD-sweep-")
    rows = json.loads((one / "summary.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, seed) for prompt in ("white duck", "red car", "green | tree") for seed in (3, 4)
    ]
    assert "| P(z) | contrast | jpeg | seconds |" in (one / "summary.md").read_text()
    assert all(row["others"]["jpeg"] < 0 and row["others"]["contrast"] == row["best"] for row in rows)
    assert r"| green \| tree | 3 |" in (one / "summary.md").read_text()
    for row in rows:
        noises = [load_noise(folder / row["folder"] / "best_noise.safetensors") for folder in (one, two)]
        assert torch.equal(*noises)
    assert launch(1, "--seed 4 --output alone", **{**GRADIENT, "prompt": "red car"})[0][0] == 0
    (alone,) = (tmp_path / "alone").iterdir()
    noises = [load_noise(folder / "best_noise.safetensors") for folder in (alone, one / rows[3]["folder"])]
    assert torch.equal(*noises)


def test_what_is_finished_is_skipped_and_what_was_begun_is_resumed(launch, tmp_path, prompts):
    flags = "--prompts prompts.txt --opt_steps 12 --lr 0.01"

    def stop(pids):
        began = time.monotonic()
        while not list((tmp_path / "output").glob("*/red*/checkpoints/00000[4-9].safetensors")):
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)

    assert launch(1, flags, stop, **GRADIENT)[0][0] == -9
    folder = folder_of(tmp_path)
    duck, car = (next(folder.glob(f"{name}*")) for name in ("white", "red"))
    assert (duck / "result.json").exists() and not (car / "result.json").exists()
    before = (duck / "metrics.jsonl").stat()
    kept = len((car / "metrics.jsonl").read_text().splitlines())
    code, out, err = launch(1, flags, **GRADIENT)[0]
    assert code == 0, err
    assert (duck / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns and "1/3" not in out
    lines = [json.loads(line) for line in (car / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12)) and 4 <= kept < 12
    assert [row["iterations"] for row in rows_of(tmp_path)] == [12] * 3
    assert launch(1, f"{flags} --gamma 1", **GRADIENT)[0][0] == 0
    assert len(list((tmp_path / "output").iterdir())) == 2, "other settings are another sweep"


def test_the_estimated_gradient_shares_out_samples(launch, tmp_path, prompts):
    results = launch(2, "--prompts prompts.txt")
    assert [code for code, *_ in results] == [0, 0], results
    assert len(rows_of(tmp_path)) == 3
    args = json.loads(next(folder_of(tmp_path).glob("red*/args.json")).read_text())
    assert args["resolved"]["processes"] == 2 and args["settings"]["prompt"] == "red car"


def test_a_run_that_fails_is_noted_and_tried_again(launch, tmp_path, prompts):
    reward = (
        "from pathlib import Path\n\ndef picky(inference_dtype=None, device=None):\n"
        "    def loss_fn(images, prompts):\n        if prompts[0] == 'red car' and not Path('mended').exists():\n"
        "            raise ValueError('no cars')\n        return images.mean(dim=(1, 2, 3))\n\n    return loss_fn\n"
        "\npicky.differentiable = True\n"
    )
    (tmp_path / "reward.py").write_text(reward)
    flags = "--prompts prompts.txt --objective reward.py:picky"
    code, out, err = launch(1, flags, **GRADIENT)[0]
    assert code == 2 and "1 of 3 runs failed" in err and "ValueError: no cars" in out
    assert "failed" in rows_of(tmp_path)[1] and "best" in rows_of(tmp_path)[2]
    (tmp_path / "mended").touch()
    code, _, err = launch(1, flags, **GRADIENT)[0]
    assert code == 0 and "failed" not in rows_of(tmp_path)[1], err


def test_a_run_whose_checkpoints_are_all_damaged_starts_over(launch, tmp_path, prompts):
    assert launch(1, "--prompts prompts.txt", **GRADIENT)[0][0] == 0
    car = next(folder_of(tmp_path).glob("red*"))
    (car / "result.json").unlink()
    for path in car.glob("checkpoints/*.safetensors"):
        path.write_bytes(b"")
    code, out, err = launch(1, "--prompts prompts.txt", **GRADIENT)[0]
    assert code == 0 and "starts over; what it holds is in" in err and (car.parent / f"{car.name}.old-1").is_dir()
    assert "2/3  'red car'" in out and "1/3" not in out


def test_a_rank_that_stalls_ends_the_others(launch, tmp_path, prompts):
    (tmp_path / "reward.py").write_text(
        "import os, time\n\ndef slow(inference_dtype=None, device=None):\n    calls = iter(range(10**6))\n\n"
        "    def loss_fn(images, prompts):\n"
        "        time.sleep(1000 if os.environ['RANK'] == '1' and next(calls) > 2 else 0.2)\n"
        "        return images.mean(dim=(1, 2, 3))\n\n    return loss_fn\n\nslow.differentiable = True\n"
    )
    flags = "--prompts prompts.txt --objective reward.py:slow --opt_steps 1000 --timeout 4"
    results = launch(2, flags, **GRADIENT)
    assert all(code != 0 for code, *_ in results)
    assert "rank 1 gave no sign of life for 4 seconds" in results[0][2], results


def test_one_sweep_of_two_methods_is_two_sweeps(tmp_path, tiny_folder, prompts):
    """And from Python it is the same as from the command line."""
    from dno.methods import method_class
    from dno.sweep import sweep
    from dno.team import Team

    settings = {"model": str(tiny_folder), "num_steps": 3, "output": tmp_path / "output", "draw": False, "seed": 5}
    rows = {}
    for name, more in (("dno", {"opt_steps": 2}), ("best_of_n", {"num_candidates": 4}), ("dno", {"opt_steps": 3})):
        method = method_class(name)
        count = len(list((tmp_path / "output").glob("*")))
        rows[name] = sweep(method, settings | more, tmp_path / "prompts.txt", None, method.prefix, Team())
        assert len(list((tmp_path / "output").glob("*"))) == count + 1
        assert [row["prompt"] for row in rows[name]] == ["white duck", "red car", "green | tree"]
        assert all(row["best"] >= row["first"] for row in rows[name])
    assert {row["folder"] for row in rows["dno"]} == {row["folder"] for row in rows["best_of_n"]}
    best_of_n = next((tmp_path / "output").glob("BestOfN-sweep-*"))
    assert json.loads((best_of_n / "args.json").read_text())["method"] == "best_of_n"
    settings["num_candidates"] = 4
    again = sweep(method_class("best_of_n"), settings, tmp_path / "prompts.txt", None, "BestOfN", Team())
    assert again == rows["best_of_n"], "all of it was there"


def test_a_callback_that_returns_true_ends_each_run(tmp_path, tiny_folder, prompts):
    from dno.methods import method_class
    from dno.sweep import sweep
    from dno.team import Team

    settings = {"model": str(tiny_folder), "num_steps": 3, "output": tmp_path / "output", "draw": False}
    rows = sweep(
        method_class("dno"), settings, tmp_path / "prompts.txt", [1, 2], "SD", Team(), lambda line: line["step"] == 1
    )
    assert [row["iterations"] for row in rows] == [2] * 6


def test_trackers_follow_every_rank(launch, tmp_path):
    pytest.importorskip("tensorboard")
    assert [code for code, *_ in launch(2, "--seeds 1 2 --report_to tensorboard", **GRADIENT)] == [0, 0]
    assert len(list(folder_of(tmp_path).glob("*/trackers/dno/events*"))) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompts missing.txt", "missing.txt cannot be read"),
        ("--prompts empty.txt", "empty.txt has no prompt in it"),
        ("--seeds 1 2 --resume output/x", "--resume is for one run"),
        ("--seeds 1 2 --noise empty.txt", "leave --noise out"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, tiny_folder, flags, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py", "--model", str(tiny_folder), *flags.split()])
    with pytest.raises(SystemExit) as end:
        main("A test.\n\ncommands:", prefix="SD")
    err = capsys.readouterr().err
    assert end.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "output").exists()
