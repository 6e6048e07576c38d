"""The SDXL script's flags, from the command line to the network, on a tiny SDXL."""

import json

import pytest
import torch

from dno import align
from dno.cli import main
from dno.errors import UserError


@pytest.fixture
def call(tiny_xl_folder, tmp_path, monkeypatch, capsys):
    """call(flags) -> (exit code, standard output, standard error, the run's folder or None)."""
    monkeypatch.chdir(tmp_path)

    def call(flags):
        fixed = f"--model {tiny_xl_folder} --num_steps 3 --opt_steps 2 --no-draw"
        monkeypatch.setattr("sys.argv", ["dno_sdxl.py", *fixed.split(), *flags.split()])
        code = 0
        try:
            main("A test.\n\ncommands:", prefix="SDXL")
        except SystemExit as end:
            code = end.code
        folders = sorted((tmp_path / "output").glob("SDXL-*"))
        captured = capsys.readouterr()
        return code, captured.out, captured.err, folders[-1] if folders else None

    return call


def rewards_of(folder):
    return [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_the_defaults(call):
    code, out, err, folder = call("--lr 0.05")
    assert code == 0, err
    first, second = rewards_of(folder)
    assert second > first
    args = json.loads((folder / "args.json").read_text())["settings"]
    assert (args["gradient"], args["crops_coords_top_left"], args["original_size"]) == ("full", [0, 0], None)


@pytest.mark.parametrize(
    "flags",
    ["--original_size 64 64", "--crops_coords_top_left 8 0", "--target_size 99 16", "--timestep_spacing trailing"],
)
def test_sizes_and_spacing_reach_the_network(call, flags):
    plain, changed = (rewards_of(call(f"{more} --opt_steps 1")[3]) for more in ("", flags))
    assert plain != changed


@pytest.mark.parametrize(
    "flags", ["--checkpointing none", "--checkpointing partial", "--checkpointing step", "--checkpointing block",
              "--checkpointing block --split_guidance"],
)  # fmt: skip
def test_every_plan_gives_the_same_rewards(call, flags):
    expected = rewards_of(call("--lr 0.05")[3])
    code, out, _, folder = call(f"--lr 0.05 {flags}")
    assert code == 0 and f"checkpointing {flags.split()[1]}" in out
    assert rewards_of(folder) == pytest.approx(expected, abs=1e-6)


def test_skip_unet_is_another_direction_and_calls_the_unet_once_a_step(tiny_xl_folder):
    import dno

    model = dno.load_model(str(tiny_xl_folder))
    calls = []
    model.network.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].requires_grad))
    settings = {"num_steps": 3, "opt_steps": 1, "checkpointing": "step"}
    full = align(model, **settings).metrics[0]
    assert calls == [False] * 3 + [True] * 3
    calls.clear()
    skipped = align(model, gradient="skip_unet", **settings).metrics[0]
    assert calls == [False] * 3
    assert skipped["reward"] == full["reward"] and skipped["grad_norm"] != pytest.approx(full["grad_norm"], rel=1e-3)


def test_without_guidance_half_of_the_work_is_left_out(call, tiny_xl_folder):
    import dno

    model = dno.load_model(str(tiny_xl_folder))
    sizes = []
    model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    align(model, num_steps=3, opt_steps=1, guidance_scale=1.0, checkpointing="none")
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--original_size 0 64", "--original_size is 0; expected 1 or more"),
        ("--crops_coords_top_left -1 0", "--crops_coords_top_left is -1; expected 0 or more"),
        ("--vae /nowhere/vae", "--vae"),
    ],
)
def test_mistakes_are_one_line(call, flags, words):
    code, _, err, folder = call(flags)
    assert code == 2 and err.startswith("error:") and words in err and err.count("\n") == 1 and folder is None


def test_sizes_for_a_model_that_is_not_told_of_them_are_refused(tiny_folder):
    with pytest.raises(UserError, match=r"--original_size: .* is not told of sizes"):
        align(model=str(tiny_folder), num_steps=3, opt_steps=1, original_size=(64, 64))


# Out of memory: an allocator that refuses, at one moment or another.


class Refusing:
    """A loss that is out of memory in its first `times` calls of iteration `step`."""

    def __init__(self, times, step=1):
        self.times, self.step, self.calls = times, step, 0

    def __call__(self, images, prompts):
        if images.requires_grad:
            self.calls += 1
            if self.step < self.calls <= self.step + self.times:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return images.mean(dim=(1, 2, 3))


@pytest.fixture
def refusing(monkeypatch):
    import rewards

    def use(times):
        loss = Refusing(times)

        def factory(inference_dtype=None, device=None):
            return loss

        factory.differentiable = True
        monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)

    return use


def test_out_of_memory_falls_back_to_the_next_plan_in_the_same_iteration_and_loses_nothing(refusing, tiny_xl_folder):
    settings = {"model": str(tiny_xl_folder), "num_steps": 3, "opt_steps": 3, "lr": 0.05, "checkpointing": "none"}
    expected = align(**settings)
    refusing(4)
    with pytest.warns(UserWarning) as seen:
        result = align(**settings)
    said = [str(warning.message) for warning in seen if "out of memory" in str(warning.message)]
    assert said == [
        f"iteration 1: out of memory; falling back to {plan}"
        for plan in ("partial (1 of 3 steps keep their graph)", "step", "block", "block, split guidance")
    ]
    assert [m["step"] for m in result.metrics] == [0, 1, 2]
    torch.testing.assert_close(result.noise, expected.noise, rtol=1e-5, atol=1e-6)
    assert result.rewards.item() == pytest.approx(expected.rewards.item(), abs=1e-6)


def test_out_of_memory_with_the_last_plan_keeps_what_was_found(refusing, call):
    refusing(5)
    code, _, err, folder = call("--checkpointing none --opt_steps 3")
    assert code == 2 and "error: out of memory; lower, in this order:" in err and "--resume" in err
    assert len(rewards_of(folder)) == 1
