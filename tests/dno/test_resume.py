"""A run gone on with is the run that was never stopped."""

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
from dno.resume import CHANGEABLE
from dno.settings import Settings


@pytest.fixture
def quick(tiny_folder, tmp_path, monkeypatch):
    """`align` on the tiny pipeline, into a folder of tmp_path."""
    from dno.runs.folder import Run

    monkeypatch.setattr(Run, "draw", lambda run: None)

    def run(folder, **settings):
        settings = {"model": str(tiny_folder), "num_steps": 3, "opt_steps": 7, "lr": 0.05, "seed": 1, **settings}
        return align(folder=tmp_path / folder, **settings)

    return run


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
def test_a_stop_at_any_iteration_can_be_gone_on_with(quick, tmp_path, stop_at):

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
    (part.folder / "checkpoints" / "000007.safetensors").unlink()
    with open(part.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "rew')
    seen = []
    resumed = align(resume=part.folder, callback=lambda metrics: seen.append(metrics["step"]))
    assert seen == [6]
    check_equal(whole, resumed)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(quick):
    whole = quick("whole", checkpointing_steps=2)
    part = quick("part", checkpointing_steps=2)
    path = part.folder / "checkpoints" / "000007.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"checkpoint 000007 is damaged .*sha256 differs.*; using 000006"):
        check_equal(whole, align(resume=part.folder))


def test_the_newest_are_kept(quick):
    run = quick("run", checkpointing_steps=2)
    assert sorted(p.stem for p in (run.folder / "checkpoints").iterdir()) == ["000006", "000007"]
    run = quick("more", checkpointing_steps=1, checkpoints_total_limit=4)
    assert sorted(p.stem for p in (run.folder / "checkpoints").iterdir()) == [f"00000{i}" for i in (4, 5, 6, 7)]


def test_a_finished_run_resumed_does_nothing_and_gives_its_result(quick):
    run = quick("run", batch_size=2)
    again = align(resume=run.folder, callback=lambda metrics: pytest.fail("an iteration"))
    check_equal(run, again)
    assert (run.folder / "result.json").is_file()


def test_stop_rules_may_change_and_a_stopped_image_then_goes_on(quick):
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


def test_what_may_change_is_a_setting():
    names = Settings.__dataclass_fields__
    assert all(name in names for name in CHANGEABLE)
    assert not {"lr", "seed", "prompt", "objective", "gamma", "num_steps", "precision", "mu", "num_samples"} & {
        *CHANGEABLE
    }


def test_memory_flags_may_change_and_change_nothing(quick):
    whole = quick("whole")
    part = quick("part", opt_steps=3)
    check_equal(whole, align(resume=part.folder, opt_steps=7, checkpointing="block"))


def test_the_command_line_goes_on_too(quick, tmp_path, capsys, monkeypatch):
    whole = quick("whole")
    part = quick("part", opt_steps=3)
    # The script's own defaults are no flags that were given.
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(part.folder), "--opt_steps", "7"])
    main("A test.\n\ncommands:", prefix="SD", seed=99, prompt="another", lr=0.5)
    captured = capsys.readouterr()
    assert "going on at iteration 3" in captured.out and "7/7" in captured.err
    assert lines_of(part.folder) == lines_of(whole.folder)
    assert json.loads((part.folder / "args.json").read_text())["opt_steps"] == 7
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", str(part.folder), "--seed", "5", "--objective", "white"])
    with pytest.raises(SystemExit) as end:
        main("A test.\n\ncommands:", prefix="SD")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "--seed 5 (the run's: 1)" in err and "--objective" in err


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "images").mkdir(parents=True)])
def test_no_run_is_an_error_and_never_a_new_run(tmp_path, make):
    make(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        align(resume=tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_at_the_last_checkpoint_keeps_the_one_before(quick, tmp_path, monkeypatch):
    import dno.alignment

    real, calls = dno.alignment.save_checkpoint, []

    def fail(folder, step, *rest):
        calls.append(step)
        if step > 2:
            raise UserError("cannot write: No space left on device")
        return real(folder, step, *rest)

    monkeypatch.setattr(dno.alignment, "save_checkpoint", fail)
    with warnings.catch_warnings(record=True) as seen, pytest.raises(UserError, match="No space left"):
        warnings.simplefilter("always")
        quick("run", checkpointing_steps=2)
    assert calls == [2, 4, 4] and [str(w.message) for w in seen] == ["cannot write: No space left on device"]
    monkeypatch.undo()
    assert len(align(resume=tmp_path / "run").metrics) == 7


def test_the_state_on_disk_is_at_most_four_noises_and_a_megabyte(tmp_path):
    """For Stable Diffusion 1.5's sizes: the noise, AdamW's two moments and the best noise."""
    from dno.methods.noise_optimization import ImageState
    from dno.methods.optimizers import make_optimizer
    from dno.runs.checkpoints import save_checkpoint

    noise = torch.randn(51, 4, 64, 64)
    leaf = noise.clone().requires_grad_()
    state = ImageState(leaf, make_optimizer([leaf]), best_noise=noise.clone(), best_image=torch.rand(3, 512, 512))
    leaf.grad = noise
    state.optimizer.step()
    tensors, values = state.pack()
    size = save_checkpoint(tmp_path, 1, tensors, {"images": [values]}).stat().st_size
    assert 4 * noise.nbytes <= size < 4 * noise.nbytes + 1_000_000


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
    from dno.methods.noise_optimization import ImageState

    whole, real, calls = quick("whole", batch_size=2), ImageState.update, []

    def update(state, *rest):
        calls.append(state)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(state, *rest)

    monkeypatch.setattr(ImageState, "update", update)
    with pytest.raises(UserError, match="out of memory"):
        quick("part", batch_size=2, checkpointing_steps=2)
    monkeypatch.undo()
    assert len(lines_of(tmp_path / "part")) == 3
    check_equal(whole, align(resume=tmp_path / "part"))


def test_a_stop_in_a_reward(quick, tmp_path, monkeypatch):
    import rewards

    whole, calls = quick("whole"), []

    def factory(inference_dtype=None, device=None):
        def loss_fn(images, prompts):
            calls.append(prompts)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return images.mean(dim=(1, 2, 3))

        return loss_fn

    factory.differentiable = True
    monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)
    with pytest.raises(KeyboardInterrupt):
        quick("part")
    check_equal(whole, align(resume=tmp_path / "part"))


def test_what_lies_past_the_checkpoint_is_gone(quick, tmp_path):
    shorter, run = quick("shorter", opt_steps=4), quick("run", checkpointing_steps=3, checkpoints_total_limit=9)
    (run.folder / "checkpoints" / "000007.safetensors").unlink()
    (run.folder / "checkpoints" / "000006.safetensors").unlink()
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


def test_a_run_that_was_given_up_gets_another_chance(quick, tmp_path, monkeypatch):
    import rewards

    def factory(inference_dtype=None, device=None):
        return lambda images, prompts: images.mean(dim=(1, 2, 3)) * (1.0 if mended else torch.nan)

    factory.differentiable, mended = True, False
    monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)
    with pytest.raises(UserError, match="no image had a finite reward"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick("run")
    mended = True
    result = align(resume=tmp_path / "run")
    assert len(result.metrics) == 7 and result.stopped == [None] and result.rewards.isfinite().all()


def test_paths_may_be_paths_and_the_noise_file_may_go(quick, tmp_path):
    first = quick("first", opt_steps=1)
    noise = first.folder / "best_noise.safetensors"
    whole = quick("whole", noise=noise)
    part = quick("part", noise=noise, opt_steps=2)
    noise.unlink()
    check_equal(whole, align(resume=part.folder, opt_steps=7))
    assert align(output=tmp_path / "out", resume=None, model=whole_model(part), num_steps=3, opt_steps=1).folder


def whole_model(run):
    return json.loads((run.folder / "args.json").read_text())["model"]


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
    import dno.resume

    run = quick("run", opt_steps=2)
    assert json.loads((run.folder / "args.json").read_text())["history"] == []
    monkeypatch.setattr(dno.resume, "versions", lambda: {"torch": "9.9"})
    with pytest.warns(UserWarning, match="goes on with 9.9: not bit for bit"):
        align(resume=run.folder, opt_steps=3)
    (entry,) = json.loads((run.folder / "args.json").read_text())["history"]
    assert entry["until"] == 2 and entry["versions"]["torch"] == metadata.version("torch")


def test_the_folder_of_several_runs_is_named_as_such(tmp_path):
    (tmp_path / "SD-sweep-0123abcd").mkdir()
    with pytest.raises(UserError, match="the folder of several runs"):
        align(resume=tmp_path / "SD-sweep-0123abcd")
