"""A resumed run is the run that was never stopped."""

import json
import os
import shutil
import warnings
from importlib import metadata

import pytest
import torch

from dno import UserError, align
from dno.cli import main
from dno.noise import load_noise
from dno.runs.checkpoints import load_newest


@pytest.fixture
def quick(tiny_folder, tmp_path):
    """`align` on the tiny pipeline, into a folder of tmp_path."""

    def run(folder, **settings):
        first = {"model": str(tiny_folder), "num_steps": 3, "opt_steps": 7, "lr": 0.05, "seed": 1, "draw": False}
        return align(folder=tmp_path / folder, **{**first, **settings})

    return run


@pytest.fixture
def best_of_n(tiny_folder, tmp_path):
    """The same for Best-of-N."""

    def run(folder, **settings):
        first = {"method": "best_of_n", "model": str(tiny_folder), "num_steps": 3, "num_candidates": 14, "seed": 1}
        first |= {"candidates_per_iteration": 2, "draw": False}
        return align(folder=tmp_path / folder, **{**first, **settings})

    return run


@pytest.fixture
def reward(monkeypatch):
    """reward(function): the reward `black` is function(images), where gradients flow."""
    import rewards

    def use(function):
        def factory(inference_dtype=None, device=None):
            return lambda images, prompts: function(images)

        factory.differentiable = True
        monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)

    return use


def checkpoint_of(folder, step):
    """The file of a run's checkpoint; a tensor is at its end."""
    return folder / "checkpoints" / f"{step:06d}.safetensors"


def steps_of(folder):
    """The steps whose checkpoints are on disk."""
    return sorted(int(path.stem) for path in (folder / "checkpoints").iterdir())


def mean(images):
    return images.mean(dim=(1, 2, 3))


def after(count):
    """A callback that returns True after `count` iterations."""
    return lambda metrics: metrics["step"] == count - 1


def lines_of(folder):
    """metrics.jsonl without what a clock and a meter say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gb")} for line in lines]


def check_equal(a, b):
    """Everything that two runs left is equal, byte by byte where nothing is measured."""
    assert lines_of(a.folder) == lines_of(b.folder)
    pictures = [
        sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*.png") if p.stem != "evolution")
        for run in (a, b)
    ]
    assert pictures[0] == pictures[1]
    for name in pictures[0]:
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), name
    for name in ("images", "rewards", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.steps, a.stopped) == (b.steps, b.stopped)


CASES = [
    {"gamma": 10.0},
    {"batch_size": 2, "objective": ("contrast:0.1", "white"), "evaluate": ("jpeg",)},
    {"optimizer": "sgd", "eta": 0.0},
    {"prompt": ("white duck", "red car"), "negative_prompt": ("", "green"), "objective": {"contrast": 0.1, "black": 1}},
    {"precondition": "spectral", "opt_time": 2},
    {"weight_decay": 0.01, "best_of": 2, "patience": 2},
    {"estimator": "hybrid", "objective": ("jpeg",), "num_samples": 4},
    {"estimator": "zo", "objective": ("contrast",), "num_samples": 4, "antithetic": True},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_n_and_m_iterations_are_n_resume_m_bit_for_bit(quick, settings):
    whole = quick("whole", **settings)
    part = quick("part", **{**settings, "opt_steps": 3})
    check_equal(whole, align(resume=part.folder, opt_steps=7))


@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_a_run_that_was_stopped_at_any_iteration_can_be_resumed(quick, tmp_path, stop_at):
    def stop(metrics):
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    whole = quick("whole", gamma=1.0, checkpointing_steps=2)
    with pytest.raises(KeyboardInterrupt):
        quick("part", gamma=1.0, checkpointing_steps=2, callback=stop)
    assert len(lines_of(tmp_path / "part")) == stop_at + 1
    check_equal(whole, align(resume=tmp_path / "part"))


def test_lines_past_the_checkpoint_are_cut(quick, tmp_path):
    """As after a kill, which leaves metrics and pictures that are newer than the checkpoint."""
    whole = quick("whole", checkpointing_steps=2)
    part = quick("part", checkpointing_steps=2)
    checkpoint_of(part.folder, 7).unlink()
    with open(part.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "rew')
    seen = []
    resumed = align(resume=part.folder, callback=lambda metrics: seen.append(metrics["step"]))
    assert seen == [6]
    check_equal(whole, resumed)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(quick):
    whole = quick("whole", checkpointing_steps=2)
    part = quick("part", checkpointing_steps=2)
    path = checkpoint_of(part.folder, 7)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"000007.* is damaged .*; using 000006"):
        check_equal(whole, align(resume=part.folder))


def test_the_newest_are_kept(quick):
    assert steps_of(quick("run", checkpointing_steps=2).folder) == [6, 7]
    run = quick("more", checkpointing_steps=1, checkpoints_total_limit=4)
    assert steps_of(run.folder) == [4, 5, 6, 7]


def test_a_finished_run_resumed_does_nothing_and_gives_its_result(quick):
    run = quick("run", batch_size=2)
    again = align(resume=run.folder, callback=lambda metrics: pytest.fail("an iteration"))
    check_equal(run, again)
    assert (run.folder / "result.json").is_file()


def test_stop_rules_may_change_and_a_stopped_image_then_continues(quick):
    run = quick("run", target_reward=-10.0)
    assert run.stopped[0] and len(run.metrics) == 1
    assert align(resume=run.folder).stopped == run.stopped, "without another rule it stays stopped"
    more = align(resume=run.folder, target_reward=None)
    assert more.stopped == [None] and len(more.metrics) == 7
    check_equal(quick("whole"), more)


def test_other_settings_are_refused_with_the_list_of_them(quick):
    run = quick("run", opt_steps=2)
    with pytest.raises(UserError) as error:
        align(resume=run.folder, lr=0.3, gamma=1.0, seed=1, opt_steps=4, objective="black")
    assert "--lr 0.3 (the run's: 0.05), --gamma 1.0 (the run's: 0.0)" in str(error.value)
    assert "seed" not in str(error.value) and "opt_steps" not in str(error.value)
    assert len(lines_of(run.folder)) == 2


def test_memory_flags_may_change_and_change_nothing(quick):
    whole = quick("whole")
    part = quick("part", opt_steps=3)
    check_equal(whole, align(resume=part.folder, opt_steps=7, checkpointing="block"))


def test_the_command_line_resumes_too(quick, tmp_path, capsys, monkeypatch):
    whole = quick("whole")
    part = quick("part", opt_steps=3)
    # The script's own defaults are not flags that were given.
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(part.folder), "--opt_steps", "7"])
    main("A test.\n\ncommands:", prefix="SD", seed=99, prompt="another", lr=0.5)
    captured = capsys.readouterr()
    assert "resumed at iteration 3" in captured.out and "7/7" in captured.err
    assert lines_of(part.folder) == lines_of(whole.folder)
    args = json.loads((part.folder / "args.json").read_text())
    assert args["settings"]["opt_steps"] == args["resolved"]["opt_steps"] == 7 and args["settings"]["seed"] == 1
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(part.folder), "--seed", "5", "--objective", "white"])
    with pytest.raises(SystemExit) as end:
        main("A test.\n\ncommands:", prefix="SD")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "--seed 5 (the run's: 1), --objective white (the run's: black)" in err


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "images").mkdir(parents=True)])
def test_no_run_is_an_error_and_never_a_new_run(tmp_path, make):
    make(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        align(resume=tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_at_the_last_checkpoint_keeps_the_one_before(quick, tmp_path, monkeypatch):
    """The disk fills up after iteration 3, and with it the run ends; there is room again when it is resumed."""
    real = os.fsync

    def fill(handle):
        if len(lines_of(tmp_path / "run")) > 2:
            raise OSError(28, "No space left on device")
        real(handle)

    whole = quick("whole")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left") as seen:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            quick("run", checkpointing_steps=2)
    assert len(seen) == 1, "once more when the run ended"
    assert steps_of(tmp_path / "run") == [2] and len(lines_of(tmp_path / "run")) == 4
    check_equal(whole, align(resume=tmp_path / "run"))


@pytest.mark.parametrize(("settings", "noises"), [({}, 4), ({"eta": 0.0}, 4 / 8), ({"opt_time": 3}, 3)], ids=str)
def test_the_state_on_disk_is_at_most_four_noises(quick, settings, noises):
    """The noise, its best, and two moments of AdamW of what is free, and little besides; with eta 0 of x_T alone."""
    run = quick("run", num_steps=7, opt_steps=2, height=64, width=64, **settings)
    size, one = checkpoint_of(run.folder, 2).stat().st_size, 8 * 4 * 32 * 32 * 4
    image = 3 * 64 * 64 * 4
    assert noises * one <= size - image < noises * one + 12_000


def test_a_run_that_another_process_is_writing_is_left_alone(quick):
    pytest.importorskip("fcntl")
    from dno.runs.folder import lock_folder

    run = quick("run", opt_steps=2)
    before = lines_of(run.folder)
    handle = lock_folder(run.folder)
    with pytest.raises(UserError, match="another process is writing to"):
        align(resume=run.folder, opt_steps=4)
    assert lines_of(run.folder) == before and (run.folder / "result.json").is_file()
    os.close(handle)
    assert len(align(resume=run.folder, opt_steps=4).metrics) == 4


def test_a_stop_while_the_images_move_leaves_the_state_before_it(quick, tmp_path, monkeypatch):
    """Image 0 of iteration 3 has moved and image 1 has not: what is on disk is from before both."""
    whole, real, calls = quick("whole", batch_size=2), torch.optim.AdamW.step, []

    def step(optimizer, *rest):
        calls.append(optimizer)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(UserError, match="out of memory") as end:
            quick("part", batch_size=2, checkpointing_steps=2)
    assert len(lines_of(tmp_path / "part")) == 3 and len(end.value.result.metrics) == 3
    check_equal(whole, align(resume=tmp_path / "part"))


def test_a_stop_in_a_reward(quick, tmp_path, reward):
    whole, calls = quick("whole"), []

    def stop(images):
        calls.append(images)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return mean(images)

    reward(stop)
    with pytest.raises(KeyboardInterrupt):
        quick("part")
    check_equal(whole, align(resume=tmp_path / "part"))


def test_what_lies_past_the_checkpoint_is_gone(quick, tmp_path):
    shorter, run = quick("shorter", opt_steps=4), quick("run", checkpointing_steps=3, checkpoints_total_limit=9)
    checkpoint_of(run.folder, 7).unlink()
    checkpoint_of(run.folder, 6).unlink()
    check_equal(shorter, align(resume=run.folder, opt_steps=4))
    kept = [(folder / "best_noise.safetensors") for folder in (shorter.folder, run.folder)]
    assert torch.equal(*(load_noise(path) for path in kept))


def test_the_best_before_the_checkpoint_is_restored(quick):
    """It was found at iteration 2, the checkpoint is of 3, and a later and better one is past it."""
    run = quick("run", opt_steps=3)
    later = quick("later", opt_steps=7)
    for name in ("best.png", "best_noise.safetensors"):
        shutil.copy(later.folder / name, run.folder / name)
    before = (run.folder / "images" / "002.png").read_bytes()
    again = align(resume=run.folder)
    assert again.steps == [2] and (run.folder / "best.png").read_bytes() == before
    assert torch.equal(load_noise(run.folder / "best_noise.safetensors"), run.noise)


@pytest.mark.parametrize("every", [1, 10])
def test_a_run_that_was_given_up_gets_another_chance(quick, tmp_path, reward, every):
    """Whether its last checkpoint was written on the way, or when it was given up."""
    mended = False
    reward(lambda images: mean(images) * (1.0 if mended else torch.nan))
    with pytest.raises(UserError, match="no image had a finite reward") as end, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick("run", checkpointing_steps=every)
    assert end.value.result.steps == [None] and end.value.result.images.isnan().all()
    mended = True
    result = align(resume=tmp_path / "run")
    assert len(result.metrics) == 7 and result.stopped == [None] and result.rewards.isfinite().all()


@pytest.mark.parametrize("rules", [{"patience": 2}, {"target_reward": -9.0}, {"min_probability": 0.9}])
def test_other_rules_give_stopped_images_another_chance(quick, reward, rules):
    worse = iter(range(100))
    reward(lambda images: mean(images) + next(worse) * ("patience" in rules))
    part = quick("part", batch_size=2, lr=0.3, **rules)
    assert all(part.stopped) and len(part.metrics) < 7
    assert align(resume=part.folder).stopped == part.stopped, "the same rules"
    off = align(resume=part.folder, **dict.fromkeys(rules))
    assert len(off.metrics) == 7 and off.stopped == [None, None]


def test_paths_may_be_paths_and_the_noise_file_may_go(quick, tmp_path):
    first = quick("first", opt_steps=1)
    noise = first.folder / "best_noise.safetensors"
    whole = quick("whole", noise=noise)
    part = quick("part", noise=noise, opt_steps=2)
    noise.unlink()
    check_equal(whole, align(resume=part.folder, opt_steps=7))
    settings = {"model": model_of(part), "num_steps": 3, "opt_steps": 1, "draw": False}
    assert align(output=tmp_path / "out", resume=None, **settings).folder


def model_of(run):
    return json.loads((run.folder / "args.json").read_text())["settings"]["model"]


def test_a_folder_with_files_in_it_is_left_alone(quick, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("42")
    with pytest.raises(UserError, match="has files in it"):
        quick("mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "42"


def test_what_means_the_same_is_no_difference(quick):
    run = quick("run", opt_steps=2)
    align(resume=run.folder, precision="auto", height=16, width=None, opt_steps=3)
    with pytest.raises(UserError, match="--height 24"):
        align(resume=run.folder, height=24)


def test_what_a_run_was_made_with_is_kept(quick, monkeypatch):
    from dno.runs.folder import versions

    run = quick("run", opt_steps=2)
    assert json.loads((run.folder / "args.json").read_text())["history"] == []
    real = metadata.version
    versions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda package: "9.9" if package == "torch" else real(package))
        with pytest.warns(UserWarning, match="is resumed with 9.9: not bit for bit"):
            align(resume=run.folder, opt_steps=3)
    versions.cache_clear()
    (entry,) = json.loads((run.folder / "args.json").read_text())["history"]
    assert entry["until"] == 2 and entry["versions"]["torch"] == metadata.version("torch")
    assert entry["device"] == "cpu" and entry["processes"] == 1


def test_the_folder_of_several_runs_is_named_as_such(tmp_path):
    (tmp_path / "SD-sweep-0123abcd" / "white-duck-s0" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="the folder of several runs"):
        align(resume=tmp_path / "SD-sweep-0123abcd")


# What is there of it, and what must be as it was.


def test_images_of_a_batch_are_bit_for_bit(quick):
    """The best of some images was found before the checkpoint, in a batch of all of them."""
    for settings in ({"lr": 0.15, "seed": 0}, {"lr": 0.3, "seed": 3}, {"lr": 0.2, "seed": 7, "eta": 0.0}):
        name, settings = str(settings), {"batch_size": 3, "objective": "contrast", **settings}
        whole = quick(f"whole {name}", **settings)
        part = quick(f"part {name}", **settings, callback=after(4))
        check_equal(whole, align(resume=part.folder))


@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_size": 2, "objective": "contrast"}, {"search": "neighbours"}, {"search": "neighbours", "eta": 0.0}],
    ids=str,
)
def test_best_of_n_is_resumed_bit_for_bit(best_of_n, settings):
    whole = best_of_n("whole", **settings)
    part = best_of_n("part", **settings, callback=after(3))
    assert len(part.metrics) == 3 < len(whole.metrics)
    resumed = align(resume=part.folder)
    check_equal(whole, resumed)
    assert (resumed.folder / "gallery.png").read_bytes() == (whole.folder / "gallery.png").read_bytes()


def test_a_run_of_another_method_is_named(quick, best_of_n, capsys, monkeypatch):
    run = best_of_n("run", num_candidates=2)
    with pytest.raises(UserError, match="run is a run of best_of_n, not of dno; resume it with python -m dno --resume"):
        align(resume=run.folder, method="dno")
    with pytest.raises(UserError, match="best_of_n has no setting lr"):
        align(resume=run.folder, lr=0.1)
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(run.folder)])
    with pytest.raises(SystemExit) as end:
        main("A test.\n\ncommands:", prefix="SD")
    assert end.value.code == 2 and "is a run of best_of_n, not of dno" in capsys.readouterr().err


def test_a_picture_of_the_users_in_images_stays(quick):
    whole, part = quick("whole"), quick("part", callback=after(3))
    for name in ("my_favourite.png", "07.png", "005-copy.png", "1e3.png", "٠٠٩.png"):
        shutil.copy(part.folder / "best.png", part.folder / "images" / name)
    shutil.copy(part.folder / "best.png", part.folder / "images" / "009.png")  # as a run that was killed leaves it
    resumed = align(resume=part.folder)
    for name in ("my_favourite.png", "07.png", "005-copy.png", "1e3.png", "٠٠٩.png"):
        (part.folder / "images" / name).unlink()
    check_equal(whole, resumed)


def test_switches_and_rules_have_an_off_on_a_resume(quick, capsys, monkeypatch):
    part = quick("part", opt_steps=3, patience=9, split_guidance=True, reward_checkpointing=True)
    flags = "--no-split_guidance --no-reward_checkpointing --patience none --draw"
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(part.folder), "--opt_steps", "4", *flags.split()])
    main("A test.\n\ncommands:", prefix="SD")
    resolved = json.loads((part.folder / "args.json").read_text())["resolved"]
    assert (resolved["split_guidance"], resolved["reward_checkpointing"], resolved["patience"]) == (False, False, None)
    assert (part.folder / "evolution.png").is_file()
    align(resume=part.folder, opt_steps=5, patience=5, draw=False)
    assert json.loads((part.folder / "args.json").read_text())["settings"]["patience"] == 5
    align(resume=part.folder, patience=None)
    args = json.loads((part.folder / "args.json").read_text())
    assert args["settings"]["patience"] is args["resolved"]["patience"] is None and args["settings"]["draw"] is False


def test_wrong_settings_of_a_resume_are_one_line(quick):
    run = quick("run", opt_steps=1)
    for settings, words in (
        ({"opt_steps": "9"}, "--opt_steps is '9' (str)"), ({"lr": "0.05"}, "--lr is '0.05' (str)"),
        ({"nonsense": 1}, "dno has no setting nonsense"), ({"opt_steps": None}, "--opt_steps is None"),
        ({"noise": torch.zeros(4, 1, 4, 8, 8)}, "the run to resume has its own"), ({"config": "x"}, "give one of them"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            align(resume=run.folder, **settings)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert len(lines_of(run.folder)) == 1


def test_a_run_that_started_from_a_tensor_is_resumed(quick):
    noise = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    whole, part = quick("whole", noise=noise), quick("part", noise=noise, callback=after(2))
    check_equal(whole, align(resume=part.folder))


def test_a_checkpoint_says_what_made_it(quick):
    run = quick("run", opt_steps=2, objective={"black": 2})
    state = load_newest(run.folder).state
    assert state["method"] == "dno" and {"settings", "resume", "state", "best", "last"} <= state.keys()
    assert state["settings"]["objective"] == ["black:2"] and state["settings"]["num_steps"] == 3
    assert state["settings"]["guidance_scale"] is None and state["resume"]["guidance_scale"] == 5.0
    assert state["resume"]["height"] == 16 and state["resume"]["precision"] == "fp32"


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    """One flat args.json, and a folder per checkpoint whose state had `settings` and `images`."""
    import hashlib

    from safetensors.torch import save

    folder = tmp_path / "SD-20260101-120000"
    checkpoint = folder / "checkpoints" / "000002"
    checkpoint.mkdir(parents=True)
    settings = {"model": "sprites", "prompt": "white duck", "lr": 0.01, "opt_steps": 2, "output": "output"}
    (folder / "args.json").write_text(json.dumps({**settings, "git_revision": None, "versions": {}, "history": []}))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    tensors = save({"0.noise": torch.zeros(26, 4, 8, 8), "0.best_noise": torch.zeros(26, 4, 8, 8)})
    state = json.dumps({"settings": settings, "images": [{}]}).encode()
    contents = {"tensors.safetensors": tensors, "state.json": state}
    files = {n: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in contents.items()}
    contents["manifest.json"] = json.dumps({"format": 1, "step": 2, "files": files}).encode()
    for name, data in contents.items():
        (checkpoint / name).write_bytes(data)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="earlier version") as error:
        align(resume=folder)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(folder), "--opt_steps", "7"])
    with pytest.raises(SystemExit) as end:
        main("A test.\n\ncommands:", prefix="SD")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and "earlier version" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("method", "size"), [("dno", {"opt_steps": 3}), ("best_of_n", {"num_candidates": 4})])
def test_a_run_that_failed_in_its_last_iteration_cannot_be_resumed(tiny_folder, tmp_path, method, size):
    (tmp_path / "bad.py").write_text(
        "def bad(inference_dtype=None, device=None):\n"
        "    return lambda images, prompts: images.mean(dim=(1, 2, 3)) * float('nan')\n\nbad.differentiable = True\n"
    )
    settings = {"model": str(tiny_folder), "num_steps": 3, "draw": False, "objective": f"{tmp_path / 'bad.py'}:bad"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="finite reward"):
            align(method=method, folder=tmp_path / "run", **settings, **size)
        with pytest.raises(UserError, match="nothing is left to resume"):
            align(resume=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_refused_resume_removes_nothing(quick):
    run = quick("run", opt_steps=2)
    (run.folder / "metrics.jsonl").write_text("")
    (run.folder / "notes.txt").write_text("mine")
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(UserError, match="has not the 2 iterations"):
        align(resume=run.folder, opt_steps=4)
    assert sorted(run.folder.rglob("*")) == before


def test_a_folder_that_the_user_made_stays(tiny_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        align(model=str(tiny_folder), folder=tmp_path / "mine", num_steps=3, height=17)
    assert list((tmp_path / "mine").iterdir()) == []


def test_fewer_iterations_than_there_are_is_one_line(quick):
    run = quick("run", opt_steps=3)
    with pytest.raises(UserError, match="has 3 iterations already, more than the 2 asked for"):
        align(resume=run.folder, opt_steps=2)
    assert (run.folder / "result.json").is_file()


def test_a_run_may_be_called_a_sweep(quick):
    run = quick("lr-sweep-1", opt_steps=2)
    assert len(align(resume=run.folder, opt_steps=3).metrics) == 3
