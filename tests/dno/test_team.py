"""Several processes: the same result as one, and one line when one of them fails."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dno.errors import UserError
from dno.noise import load_noise
from dno.runs.checkpoints import load_newest
from dno.team import join_team, shares


def only_run(tmp_path, output="output"):
    (folder,) = (tmp_path / output).iterdir()
    return folder


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def reward(tmp_path):
    """reward(body, rank): flags for a reward that runs `body` on that rank only, from its fourth call on."""

    def write(body, rank=1):
        (tmp_path / "reward.py").write_text(
            "import os, signal, sys, time, torch\n\ndef fickle(inference_dtype=None, device=None):\n"
            "    calls = iter(range(10**6))\n\n    def loss_fn(images, prompts):\n"
            f"        if next(calls) >= 3 and os.environ.get('RANK') == '{rank}':\n            {body}\n"
            "        return -images.square().mean(dim=(1, 2, 3))\n\n    return loss_fn\n"
        )
        return "--objective reward.py:fickle --opt_steps 100 --batch_per_device 2"

    return write


@pytest.mark.parametrize("flags", ["", "--antithetic --batch_size 2", "--estimator hybrid_image", "--estimator zo"])
def test_one_two_and_three_processes_give_the_same_result(launch, tmp_path, flags):
    for size in (1, 2, 3):
        for code, _, err in launch(size, f"{flags} --lr 0.05 --gamma 1 --output {size}"):
            assert code == 0, err
    one, two, three = (metrics_of(only_run(tmp_path, str(size))) for size in (1, 2, 3))
    assert one[-1]["reward"] > one[0]["reward"]
    for other in (two, three):
        assert [line["reward"] for line in other] == pytest.approx([line["reward"] for line in one], abs=1e-4)
        assert [line["grad_norm"] for line in other] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)


def test_a_run_on_two_processes_is_equal_to_itself_bit_for_bit_and_resumes(launch, tmp_path):
    for output in ("a", "b"):
        assert [code for code, *_ in launch(2, f"--output {output}")] == [0, 0]
    a, b = (only_run(tmp_path, output) for output in "ab")
    assert torch.equal(*(load_noise(folder / "best_noise.safetensors") for folder in (a, b)))
    assert [code for code, *_ in launch(2, "--output c --opt_steps 2")] == [0, 0]
    c = only_run(tmp_path, "c")
    results = launch(2, f"--resume {c} --opt_steps 3")
    assert [code for code, *_ in results] == [0, 0], results
    assert torch.equal(*(load_noise(folder / "best_noise.safetensors") for folder in (a, c)))


def test_the_first_alone_speaks_and_writes(launch, tmp_path):
    (_, out, _), (_, other, other_err) = launch(2, "")
    assert "hybrid, 6 samples, mu 0.01, 2 processes" in out and other == ""
    assert "it/s" not in other_err and len(list((tmp_path / "output").iterdir())) == 1


# What the launcher announces, and what this machine has.

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@without_gpu
def test_ranks_on_a_machine_without_a_gpu_are_one_team_whether_or_not_accelerate_is_told(launch, tmp_path):
    results = launch(2, "--opt_steps 1", environment={"ACCELERATE_USE_CPU": None})
    assert [code for code, *_ in results] == [0, 0], results
    assert "2 processes" in results[0][1] and results[1][1] == ""
    only_run(tmp_path)


@without_gpu
@pytest.mark.parametrize("cpu", ["true", None])
def test_a_gpu_that_is_not_there_is_refused_in_a_team_too(launch, tmp_path, cpu):
    for code, out, err in launch(2, "--device cuda", environment={"ACCELERATE_USE_CPU": cpu}):
        assert code == 2 and out == "" and not (tmp_path / "output").exists()
        assert "error: --device cuda" in err and "use --device auto" in err and err.count("\n") == 1


ANNOUNCED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "got RANK '', MASTER_PORT '', MASTER_ADDR ''"),
     ({"MASTER_ADDR": ""}, "got MASTER_ADDR ''"),
     ({"RANK": None}, "got RANK ''"),
     ({"RANK": "first"}, "got RANK 'first'"),
     ({"RANK": "2"}, "got RANK 2 of WORLD_SIZE 2"),
     ({"WORLD_SIZE": "two"}, "got WORLD_SIZE 'two'"),
     ({"WORLD_SIZE": "0"}, "got RANK 0 of WORLD_SIZE 0"),
     ({"MASTER_PORT": None}, "got MASTER_PORT ''")],
)  # fmt: skip
def test_what_another_launch_has_left_behind_is_one_line(monkeypatch, changed, words):
    for name, value in {**ANNOUNCED, **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        join_team("auto", 10)
    assert words in str(error.value) and "unset WORLD_SIZE" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, "", "1"])
def test_one_process_needs_nothing_of_a_launcher(monkeypatch, size):
    for name in (*ANNOUNCED, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    team = join_team("auto", 10)
    assert team.size == 1 and team.leads


def test_a_device_that_accelerate_is_told_not_to_use_is_refused(monkeypatch):
    for name, value in {**ANNOUNCED, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cuda: ACCELERATE_USE_CPU selects the CPU"):
        join_team("cuda", 10)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU is 'perhaps'; expected true or false"):
        join_team("auto", 10)


def test_ranks_that_never_come_are_one_line(launch):
    ((code, _, err),) = launch(1, "--timeout 3", environment={"WORLD_SIZE": 2})
    assert code == 2 and "the 2 processes that WORLD_SIZE announces could not be joined at 127.0.0.1:" in err
    assert "Traceback" not in err and "start all of them" in err


@without_gpu
def test_ranks_that_accelerate_does_not_join_are_refused(monkeypatch):
    """As on a Mac, where each of them would be alone, and write a run of its own."""
    from accelerate.state import AcceleratorState

    for name, value in ANNOUNCED.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match="2 processes, but on the device mps each of them is alone"):
            join_team("auto", 10)
    finally:
        AcceleratorState._reset_state(True)


# Faults, each caused for real. What is left can be resumed.


def check_ended(results, tmp_path, words, codes=None):
    (_, _, err), _ = results
    assert all(code != 0 for code, *_ in results), results
    assert words in err and "Traceback" not in err, results
    folder = only_run(tmp_path)
    assert load_newest(folder).step == len(metrics_of(folder)) >= 1
    assert f"--resume {folder.relative_to(tmp_path)}" in err


def test_a_rank_that_raises(launch, tmp_path, reward):
    flags = reward("raise ValueError('the service is gone')")
    results = launch(2, f"{flags} --max_bad_samples 4 --timeout 30")
    check_ended(results, tmp_path, "4 consecutive samples without a finite reward")
    assert "rank 1: the reward 'fickle' failed: ValueError: the service is gone (reward.py:" in results[1][2]


def test_a_rank_that_breaks_the_contract(launch, tmp_path, reward):
    results = launch(2, f"{reward('return None')} --timeout 30")
    check_ended(results, tmp_path, "error: rank 1 failed: error: the reward 'fickle' returned NoneType")


def test_a_rank_with_a_fault_of_its_own(launch, tmp_path, reward):
    results = launch(2, f"{reward('raise SystemError(1) from None if 0 else sys.exit(7)')} --timeout 30")
    assert results[1][0] == 7
    check_ended(results, tmp_path, "rank 1 failed: SystemExit: 7")


def test_a_rank_that_exits_early(launch, tmp_path, reward):
    check_ended(launch(2, f"{reward('os._exit(3)')} --timeout 30"), tmp_path, "error: rank 1 exited without")


def test_a_rank_that_is_killed(launch, tmp_path, reward):
    flags, began = reward("pass"), time.monotonic()

    def kill(pids):
        while not any((tmp_path / "output").glob("*/checkpoints/000002.safetensors")):
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        os.kill(pids[1], signal.SIGKILL)

    check_ended(launch(2, f"{flags} --opt_steps 5000 --timeout 30", kill), tmp_path, "rank 1 exited without")


def test_a_rank_that_stalls(launch, tmp_path, reward):
    began = time.monotonic()
    results = launch(2, f"{reward('time.sleep(1000)')} --timeout 6")
    check_ended(results, tmp_path, "rank 1 did not answer within 6 seconds; if it is not stalled, raise --timeout")
    assert time.monotonic() - began < 40


def test_the_first_rank_stalls(launch, tmp_path, reward):
    results = launch(2, f"{reward('time.sleep(1000)', rank=0)} --timeout 6")
    check_ended(results, tmp_path, "stopped by SIGTERM (rank 1 failed: error: rank 0 did not answer within 6 seconds")
    assert results[0][0] == 143


def test_a_user_error_before_the_start_is_one_line_once(launch):
    results = launch(2, "--objective nothing")
    assert [code for code, *_ in results] == [2, 2]
    assert results[0][2].startswith("error: no reward is called 'nothing'") and results[0][2].count("\n") == 1


def test_two_processes_and_one_gradient_run_are_refused(launch):
    results = launch(2, "--estimator backprop")
    assert all(code == 2 for code, *_ in results) and "give --prompts or --seeds" in results[0][2]


def test_and_so_is_such_a_run_gone_on_with(launch, tmp_path):
    assert launch(1, "--estimator backprop")[0][0] == 0
    results = launch(2, f"--resume {only_run(tmp_path)}")
    assert all(code == 2 and "Traceback" not in err for code, _, err in results), results
    assert "give --prompts or --seeds" in results[0][2]


def test_a_leader_who_tries_many_starts_is_not_taken_for_stalled(launch, tmp_path, reward):
    flags = reward("pass").replace("--opt_steps 100", "--opt_steps 1")
    (tmp_path / "reward.py").write_text(
        (tmp_path / "reward.py").read_text().replace("return -images", "time.sleep(0.7)\n        return -images")
    )
    assert [code for code, *_ in launch(2, f"{flags} --best_of 14 --timeout 8 --num_samples 2")] == [0, 0]


@pytest.mark.parametrize(
    ("units", "ranks", "burden", "expected"),
    [
        (16, 1, 3, [16]),
        (16, 2, 3, [6, 10]),  # 6 + 3 against 10
        (16, 2, 0, [8, 8]),
        (16, 4, 3, [2, 4, 5, 5]),
        (3, 4, 3, [0, 1, 1, 1]),
        (2, 4, 3, [0, 0, 1, 1]),
    ],
)
def test_shares_are_even_and_the_first_process_gets_fewer(units, ranks, burden, expected):
    ends = shares(units, ranks, burden)
    assert [b - a for a, b in zip(ends, ends[1:])] == expected and ends[-1] == units


# Best-of-N, whose processes share the candidates.

CANDIDATES = {
    "method": "best_of_n", "prefix": "BestOfN", "num_steps": 3, "objective": ("contrast",), "num_candidates": 14,
    "candidates_per_iteration": 5, "batch_per_device": 2, "checkpointing_steps": 1, "draw": False,
}  # fmt: skip


@pytest.fixture
def search(launch, tiny_folder):
    """search(size, flags, during=None): best-of-N on so many processes, as `launch` does it."""

    def search(size, flags, during=None):
        return launch(size, flags, during, only={"model": str(tiny_folder), **CANDIDATES})

    return search


def check_same_candidates(one, other):
    """The same best noise bit for bit; images, rewards and ranking as far as batches of another size let them."""
    assert torch.equal(load_noise(one), load_noise(other))
    lines, others = metrics_of(one), metrics_of(other)
    assert len(lines) == len(others)
    for name in ("reward", "mean", "std", "probability", "candidate"):
        assert [line[name] for line in others] == pytest.approx([line[name] for line in lines], abs=1e-4), name
    for a in one.rglob("*.png"):
        with Image.open(a) as x, Image.open(other / a.relative_to(one)) as y:
            assert np.abs(np.asarray(x, dtype=int) - np.asarray(y, dtype=int)).max() <= 1, a
    ranks, others = (load_newest(folder).state["state"]["ranks"] for folder in (one, other))
    assert [[k for _, k in image] for image in ranks] == [[k for _, k in image] for image in others]


@pytest.mark.parametrize("flags", ["--batch_size 2", "--search neighbours --eta 0"])
def test_one_two_and_three_processes_find_the_same_candidates(search, tmp_path, flags):
    for size in (1, 2, 3):
        for rank, (code, out, err) in enumerate(search(size, f"{flags} --output {size}")):
            assert code == 0 and (out == "") == (rank > 0), err
    one, two, three = (only_run(tmp_path, str(size)) for size in (1, 2, 3))
    assert (one / "gallery.png").is_file()
    check_same_candidates(one, two)
    check_same_candidates(one, three)


def test_more_processes_than_candidates(search, tmp_path):
    flags = "--num_candidates 3 --candidates_per_iteration 1"
    assert [code for size in (1, 3) for code, *_ in search(size, f"{flags} --output {size}")] == [0] * 4
    check_same_candidates(only_run(tmp_path, "1"), only_run(tmp_path, "3"))


def test_candidates_of_a_rank_that_fails_once_are_lost(search, tmp_path, reward):
    flags = reward("raise ValueError('the service is gone')").replace("--opt_steps 100", "--num_candidates 40")
    results = search(2, flags)
    assert [code for code, *_ in results] == [0, 0], results
    assert "rank 1: the reward 'fickle' failed: ValueError: the service is gone" in results[1][2]
    assert len(metrics_of(only_run(tmp_path))) == 8


def many(flags):
    return flags.replace("--opt_steps 100", "--num_candidates 100000")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "rank 1 failed: error: the reward 'fickle' returned NoneType"),
        ("sys.exit(7)", "rank 1 failed: SystemExit: 7"),
        ("os._exit(3)", "error: rank 1 "),
    ],
)
def test_a_rank_that_fails_while_candidates_are_tried(search, tmp_path, reward, body, words):
    check_ended(search(2, f"{many(reward(body))} --timeout 30"), tmp_path, words)


def test_a_rank_that_stalls_while_candidates_are_tried(search, tmp_path, reward):
    began = time.monotonic()
    results = search(2, f"{many(reward('time.sleep(1000)'))} --timeout 6")
    check_ended(results, tmp_path, "rank 1 did not answer within 6 seconds")
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("flags", ["", "--search neighbours"])
def test_a_rank_that_is_killed_and_the_run_resumed_on_another_number_of_processes(search, tmp_path, reward, flags):
    flags = f"{flags} {reward('os.path.exists(chr(109)) or os.kill(os.getpid(), signal.SIGKILL)')}"
    flags = flags.replace("--opt_steps 100", "--num_candidates 40")
    check_ended(search(2, f"{flags} --timeout 30"), tmp_path, "rank 1 ")
    folder = only_run(tmp_path)
    done = len(metrics_of(folder))
    assert 1 <= done < 8
    (tmp_path / "m").touch()
    for code, _, err in search(3, f"--resume {folder}"):
        assert code == 0, err
    assert [code for code, *_ in search(1, f"{flags} --output whole")] == [0]
    check_same_candidates(only_run(tmp_path, "whole"), folder)
