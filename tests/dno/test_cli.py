"""The command line, run within this process: flags, exit codes, the screen, the folder, and the faults of a run."""

import json
import re
import shlex
import signal
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from PIL import Image

import rewards
from dno import cli, task
from dno.cli import build_parser, main, parse
from dno.methods import METHODS, method_class
from dno.noise import load_noise
from dno.resume import make_settings
from rewards import MODELS, RFUNCTIONS

DESCRIPTION = "What it does.\n\ncommands to try:\n  python script.py --prompt x\n"
DNO = method_class("dno")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, tiny_folder):
    """call(flags) -> (exit code, standard output, standard error) of a short run of the tiny model in tmp_path."""
    # What `main` changes in the process is changed back after the test.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(flags="", model=tiny_folder):
        always = f"--model {model} --num_steps 3 --opt_steps 3 --lr 0.05 --output {tmp_path / 'output'} --no-draw"
        monkeypatch.setattr(sys, "argv", ["script.py", *shlex.split(f"{always} {flags}")])
        code = 0
        try:
            main(DESCRIPTION, prefix="SD")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def reward(tmp_path):
    """reward(body) -> the --objective of a reward of one's own; `call` counts up from 0.

    declared: whether it says that it is differentiable; one that does not is called once more, to find out.
    """

    def write(body, declared=True):
        (tmp_path / "mine.py").write_text(
            "import torch\n\ndef score(inference_dtype=None, device=None):\n    calls = iter(range(10**6))\n\n"
            f"    def loss_fn(images, prompts):\n        call = next(calls)\n        {body}\n\n    return loss_fn\n"
            + ("\nscore.differentiable = True\n" if declared else "")
        )
        return f"--objective {tmp_path / 'mine.py'}:score"

    return write


@pytest.fixture
def loads(monkeypatch):
    """loads(function) -> the model is loaded by it."""
    return lambda function: monkeypatch.setattr(task, "load_model", function)


def run_folder(tmp_path):
    (folder,) = (tmp_path / "output").iterdir()
    return folder


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def no_folder(tmp_path):
    return not list((tmp_path / "output").glob("*"))


# Flags.


def full_help(method=DNO, presets=None):
    return build_parser(method, DESCRIPTION, presets, everything=True).format_help()


def entry_of(name, text):
    """The help of one flag, on one line."""
    found = re.findall(rf"^  --{name}\b(?!-).*(?:\n {{8,}}.*)*", text, re.MULTILINE)
    assert len(found) == 1, (name, found)
    return " ".join(found[0].split())


@pytest.mark.parametrize("method", METHODS)
def test_help_all_names_every_flag_and_reward_and_the_commands(method):
    text = full_help(method_class(method))
    names = [f.name for f in fields(method_class(method).settings_class()) if f.name != "reward_paths"]
    for name in [*names, *(model.setting for model in MODELS.values()), *cli.RUN_FLAGS, "help_all"]:
        assert len(entry_of(name, text)) > len(name) + 10
    assert all(name in text for name in RFUNCTIONS) and "jpeg (no gradient)" in " ".join(text.split())
    assert "python script.py --prompt x" in text and "FILE.py:FUNCTION" in text and "exit codes: 0 done" in text
    assert max(map(len, text.splitlines())) <= 120
    assert [f"{group.title}:" in text.splitlines() for group in method_class(method).settings_class().groups()]


@pytest.mark.parametrize("method", METHODS)
def test_help_all_says_a_default_once(method):
    cls, text = method_class(method).settings_class(), full_help(method_class(method))
    for f in fields(cls):
        if f.name == "reward_paths":
            continue
        entry = entry_of(f.name, text)
        shown = re.findall(r" \[([^\]]+)\]$", entry)
        assert entry.count("default") + len(shown) <= 1, entry
        if f.default not in (None, False, ()) and "default" not in entry:
            expected = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
            expected = "on" if f.default is True else expected
            assert shown == [expected], entry
    if method == "dno":
        assert "has seed + b [0]" in text and "0 = none [0.0]" in text, "a default of 0 is a default too"


def test_help_shows_a_scripts_own_defaults():
    text = full_help(presets={"lr": 0.5, "objective": ("white", "black"), "draw": False, "split_guidance": True})
    assert entry_of("lr", text).endswith("[0.5]") and "--no-draw" not in text
    assert "--split_guidance, --no-split_guidance" in text and "--draw, --no-draw" in full_help()
    brief = build_parser(DNO, DESCRIPTION, {"objective": ("white", "black")}).format_help()
    assert entry_of("objective", brief).endswith("[white black]")


@pytest.mark.parametrize("method", METHODS)
def test_help_is_short_and_says_where_the_rest_is(method):
    text = build_parser(method_class(method), DESCRIPTION).format_help()
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 120
    published = ["num_steps", "eta", "guidance_scale", "objective", "precision", "subsample", "seed", "device", "model",
                 "prompt", "output", "batch_per_device"]  # fmt: skip
    published += ["opt_steps", "opt_time", "gamma", "lr", "mu"] if method == "dno" else ["num_candidates"]
    for name in [*published, "evaluate", "checkpointing", "resume", "config", "help_all"]:
        entry_of(name, text)
    assert "--permutations" not in text and "SUPPRESS" not in text


@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_a_setting(method):
    cls = method_class(method)
    given, run = parse(build_parser(cls, DESCRIPTION), [])
    assert given == {} and run == dict.fromkeys(cli.RUN_FLAGS)
    assert make_settings(cls, given) == cls.settings_class()(**cls.presets)


def test_published_flags_are_read_as_published():
    command = (
        "--num_steps 20 --eta 0.5 --guidance_scale 7.5 --seed 3 --opt_steps 10 --opt_time 5 --objective black "
        "--precision fp16 --gamma 1 --subsample 2 --lr 0.001 --output there --device cuda --model owner/name "
        "--prompt 'white duck' --mu 0.02 --batch_per_device 8"
    )
    given, _ = parse(build_parser(DNO, DESCRIPTION), shlex.split(command))
    assert given == {
        "num_steps": 20, "eta": 0.5, "guidance_scale": 7.5, "seed": 3, "opt_steps": 10, "opt_time": 5,
        "objective": ["black"], "precision": "fp16", "gamma": 1.0, "subsample": 2, "lr": 0.001, "output": "there",
        "device": "cuda", "model": "owner/name", "prompt": "white duck", "mu": 0.02, "batch_per_device": 8,
    }  # fmt: skip
    several, _ = parse(build_parser(DNO), "--objective black white:0.5 --evaluate jpeg contrast".split())
    assert several == {"objective": ["black", "white:0.5"], "evaluate": ["jpeg", "contrast"]}


@pytest.mark.parametrize("method", METHODS)
def test_every_switch_has_an_off(method):
    """And what is not given says nothing, so that a resumed run keeps its own."""
    cls = method_class(method)
    switches = [f.name for f in fields(cls.settings_class()) if isinstance(f.default, bool)]
    assert {"split_guidance", "compile", "reward_checkpointing", "draw"} <= set(switches)
    for name in switches:
        for flag, value in ((f"--{name}", True), (f"--no-{name}", False)):
            assert parse(build_parser(cls), [flag])[0] == {name: value}


@pytest.mark.parametrize("name", ["patience", "target_reward", "max_seconds", "min_probability", "num_steps", "height"])
def test_none_unsets_an_optional_number(name):
    assert parse(build_parser(DNO), [f"--{name}", "none"])[0] == {name: None}


def test_none_is_no_value_of_a_number_that_a_run_needs(call):
    code, _, err = call("--lr none")
    assert code == 2 and "invalid float value: 'none'" in err


def test_paths_of_reward_models_are_one_setting():
    given, _ = parse(build_parser(DNO), ["--hps_path", "a", "--clip_path", "b"])
    assert given == {"reward_paths": {"hps_path": "a", "clip_path": "b"}}


@pytest.mark.parametrize(
    "flags", ["--num_steps ten", "--lr", "--no-lr", "--patience never", "--help_al", "--precision fp8", "--objective",
              "--no_such_flag 1", "--obj white", "stray"],
)  # fmt: skip
def test_flags_that_cannot_be_read(call, tmp_path, flags):
    code, _, err = call(flags)
    assert code == 2 and err.splitlines()[-1].startswith("script.py: error:") and no_folder(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--height 17", "--height is 17; expected a multiple of the VAE's scale factor 2, such as 16"),
     ("--width 1", "--width is 1;"),
     ("--height 0", "--height is 0; expected 1 or more"),
     ("--subsample 5", "--subsample is 5; expected a number from 0 to 4"),
     ("--subsample 4 --height 8", "--subsample 4 cuts the noise into rows of 256 values"),
     ("--num_steps 1000", "--num_steps 1000"),
     ("--opt_time 4", "--opt_time 4 is above --num_steps"),
     ("--objective blac", "no reward is called 'blac'"),
     ("--objective jpeg", "'jpeg' is not differentiable; use --estimator hybrid"),
     ("--objective black jpeg:0.1", "'jpeg' is not differentiable; use --estimator hybrid"),
     ("--evaluate nothing", "no reward is called 'nothing'"),
     ("--noise no/such.safetensors", "--noise no/such.safetensors does not exist"),
     ("--model no/such/folder", "--model no/such/folder: no such folder or file"),
     ("--lora no/such.safetensors", "--lora no/such.safetensors: no such file"),
     ("--variant fp16", "--variant")],
)  # fmt: skip
def test_bad_input_is_one_line_exit_code_2_and_no_folder(call, tmp_path, flags, words):
    code, out, err = call(flags)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and "Traceback" not in err
    assert no_folder(tmp_path)


def test_an_output_that_is_a_file_is_found_before_the_model_is_loaded(call, tmp_path, loads):
    loads(lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "output").write_text("")
    code, _, err = call()
    assert code == 2 and err.startswith("error: cannot write") and "--output" in err


# A whole run.


def test_a_run_writes_and_says_what_is_promised(call, tmp_path):
    flags = "--prompt 'red car' --gamma 1 --objective black contrast:0.1 --evaluate jpeg --save_every 2 --draw"
    code, out, err = call(flags)
    assert code == 0
    folder = run_folder(tmp_path)
    assert re.fullmatch(r"SD-\d{8}-\d{6}", folder.name)
    files = ["args.json", "best.png", "best_noise.safetensors", "checkpoints", "evolution.gif", "evolution.png",
             "images", "images/000.png", "images/002.png", "initial.png", "metrics.jsonl", "result.json"]  # fmt: skip
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in path.parent.parts)
    assert sorted(found) == files

    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line.keys() == {
            "step", "reward", "rewards", "black", "contrast", "jpeg", "regularizer", "probability", "probability_min",
            "grad_norm", "seconds", "peak_memory_gb", "images",
        }  # fmt: skip
        assert line["reward"] == pytest.approx(line["black"] + 0.1 * line["contrast"], abs=1e-6)
        assert line["rewards"] == [line["reward"]] and line["jpeg"] < 0 < line["seconds"]
        assert 0 < line["probability_min"] <= 1 and 0 < line["probability"] <= 1 and line["grad_norm"] > 0

    args = json.loads((folder / "args.json").read_text())
    assert args.keys() == {
        "method", "settings", "resolved", "reward_files", "versions", "git_revision", "history"
    }  # fmt: skip
    names = {f.name for f in fields(DNO.settings_class())}
    asked, found = args["settings"], args["resolved"]
    assert asked.keys() == names and names < found.keys() and args["method"] == "dno"
    assert (asked["height"], asked["opt_time"], asked["guidance_scale"], asked["precision"]) == (None,) * 3 + ("auto",)
    assert (found["height"], found["width"], found["opt_time"], found["guidance_scale"]) == (16, 16, 3, 5.0)
    assert (found["device"], found["precision"], found["checkpointing"]) == ("cpu", "float32", "none")
    assert found["weights"] == {"black": 1.0, "contrast": 0.1} and found["watched"] == ["jpeg"]
    assert found["iterations"] == 3 and found["folder"] == str(folder) and found["processes"] == 1

    with Image.open(folder / "images" / "002.png") as png:
        assert png.size == (16, 16) and png.text["prompt"] == "red car" and png.text["seed"] == "0"
        assert png.text["step"] == "2" and float(png.text["reward"]) == lines[2]["reward"]
    assert (folder / "initial.png").read_bytes() == (folder / "images" / "000.png").read_bytes()

    assert all(words in out for words in ("'red car'", "black + 0.1 * contrast; watching jpeg", "3 iterations"))
    best = max(lines, key=lambda line: line["reward"])
    assert f"best reward {best['reward']:.4f} at iteration {best['step']}" in out
    assert out.endswith(f"images: {folder / 'evolution.png'}\n")
    assert "3/3" in err and "P(z)" in err and "Traceback" not in err


@pytest.mark.parametrize("noise", ["", "best_noise.safetensors"])
def test_the_noise_of_a_run_replays_its_best_image(call, tmp_path, noise):
    call("--batch_size 2 --seed 3")
    first = run_folder(tmp_path).rename(tmp_path / "first")
    call(f"--batch_size 2 --seed 3 --opt_steps 1 --noise {first / noise}")
    second = run_folder(tmp_path)
    best = [max(line["rewards"][b] for line in metrics_of(first)) for b in range(2)]
    assert metrics_of(second)[0]["rewards"] == best
    for name in ("best.png", "best_b1.png"):
        with Image.open(first / name) as a, Image.open(second / name) as b:
            assert a.tobytes() == b.tobytes()
    noises = [load_noise(folder / "best_noise.safetensors") for folder in (first, second)]
    assert torch.equal(*noises)
    code, _, err = call(f"--noise {first / 'best_noise.safetensors'}")
    assert code == 2 and "--num_steps 3 --batch_size 2" in err


def test_two_runs_with_one_seed_are_identical(call, tmp_path):
    flags = "--gamma 1 --seed 4 --best_of 2 --batch_size 2"
    call(flags)
    first = run_folder(tmp_path).rename(tmp_path / "first")
    call(flags)
    second = run_folder(tmp_path)
    for a, b in zip(metrics_of(first), metrics_of(second), strict=True):
        for line in (a, b):
            del line["seconds"], line["peak_memory_gb"]
        assert a == b
    for path in first.rglob("*.png"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_flags_reach_the_model(call, loads, tiny_folder):
    def load(*args, **kwargs):
        raise cli.UserError(repr((args, kwargs)))

    loads(load)
    where = f"--model_config {tiny_folder} --vae {tiny_folder}/vae"
    _, _, err = call(f"--precision bf16 --variant abc --lora x:0.5 {where}")
    for value in (str(tiny_folder), torch.bfloat16, torch.device("cpu"), "abc", "x:0.5", f"{tiny_folder}/vae", "auto"):
        assert repr(value) in err and err.count("\n") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_climbs(call, tmp_path, precision):
    assert call(f"--precision {precision} --gamma 0.1")[0] == 0
    lines = metrics_of(run_folder(tmp_path))
    assert lines[-1]["reward"] > lines[0]["reward"]


def test_a_long_prompt_is_one_warning_on_the_screen(call):
    code, _, err = call(f"--opt_steps 1 --prompt '{' '.join('x' * 75)} y z'")
    assert code == 0
    said = [line for line in err.splitlines() if "cut" in line or "longer" in line or "truncated" in line]
    assert said == ["warning: the prompt has 77 tokens, the model takes 75; cut: 'y z'"]


def test_the_banner_names_a_reward_of_ones_own_as_the_metrics_do(call, reward):
    objective = reward("return images.mean(dim=(1, 2, 3))")
    code, out, _ = call(f"--objective black --evaluate {objective.split()[1]} --opt_steps 1")
    assert code == 0 and "black; watching score\n" in out


def test_an_empty_prompt_is_allowed(call):
    code, _, err = call("--opt_steps 1 --prompt '' --negative_prompt ''")
    assert code == 0 and "warning" not in err


# Faults.


def test_one_bad_reward_is_left_out_with_a_warning(call, reward, tmp_path):
    mine = reward("return images.mean(dim=(1, 2, 3)) * (float('nan') if call == 1 else 1)")
    code, out, err = call(f"{mine} --opt_steps 4")
    assert code == 0 and "warning: iteration 1: image 0 has reward nan" in err and "its step is skipped" in err
    values = [line["reward"] for line in metrics_of(run_folder(tmp_path))]
    assert [value is None for value in values] == [False, True, False, False]
    assert values[2] > values[0]  # it continues from where it was
    assert "best reward" in out and "nan" not in out


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_bad_rewards_in_a_row_end_the_run_and_keep_what_was_found(call, reward, tmp_path, value):
    mine = reward(f"return images.mean(dim=(1, 2, 3)) * (1 if call < 2 else float('{value}'))")
    code, _, err = call(f"{mine} --opt_steps 9")
    assert code == 2 and "error: no image had a finite reward and gradient for 3 consecutive iterations" in err
    folder = run_folder(tmp_path)
    assert [line["reward"] is None for line in metrics_of(folder)] == [False, False, True, True, True]
    assert (folder / "best.png").is_file() and (folder / "best_noise.safetensors").is_file()


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    "body", ["return 0 * images.mean(dim=(1, 2, 3))", "return images.sign().mean(dim=(1, 2, 3))",
             "return images.detach().mean(dim=(1, 2, 3))", "return torch.zeros(len(images))"]
)  # fmt: skip
def test_a_reward_without_a_gradient_is_named_with_the_estimator_for_it(call, reward, tmp_path, body, declared):
    code, out, err = call(reward(body, declared))
    assert code == 2 and "error: " in err and "score" in err and "--estimator hybrid" in err
    assert "Traceback" not in err and no_folder(tmp_path)


def test_out_of_memory_names_the_flags_and_keeps_what_was_found(call, reward, tmp_path):
    mine = reward("return images.mean(dim=(1, 2, 3)) if call < 2 else torch.empty(2**50)")
    code, _, err = call(mine)
    assert code == 2 and "out of memory; lower, in this order: --checkpointing block --split_guidance" in err
    assert len(metrics_of(run_folder(tmp_path))) == 2 and (run_folder(tmp_path) / "best.png").is_file()


def test_a_failing_picture_is_a_warning(call, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no font")

    monkeypatch.setattr("matplotlib.figure.Figure.draw", fail)
    code, out, err = call("--draw")
    assert code == 0 and "warning: evolution.png could not be drawn: RuntimeError: no font" in err
    assert (run_folder(tmp_path) / "evolution.gif").is_file() and "best reward" in out


@pytest.mark.parametrize(
    ("stop", "code", "name"), [(KeyboardInterrupt, 130, "Ctrl-C"), (cli.Terminated, 143, "SIGTERM")]
)
def test_a_stop_before_the_first_iteration_leaves_nothing(call, tmp_path, monkeypatch, loads, stop, code, name):
    def factory(inference_dtype=None, device=None):
        def loss_fn(images, prompts):
            raise stop

        return loss_fn

    factory.differentiable = True
    monkeypatch.setitem(rewards.RFUNCTIONS, "black", factory)
    got, _, err = call()
    assert got == code and err.endswith(f"\nstopped by {name}\n") and no_folder(tmp_path) and "warning" not in err
    loads(lambda *_: (_ for _ in ()).throw(stop))
    got, _, err = call()
    assert got == code and err == f"stopped by {name}\n" and no_folder(tmp_path)


def test_a_stop_that_a_library_swallows_takes_effect_after_the_iteration(call, reward, tmp_path):
    lines = ("try:", "    import os, signal", "    os.kill(os.getpid(), signal.SIGINT)", "except: pass")
    body = "\n        ".join([*lines, "return images.mean(dim=(1, 2, 3))"])
    code, _, err = call(f"{reward(body)} --opt_steps 50")
    assert code == 130 and "stopped by Ctrl-C" in err and len(metrics_of(run_folder(tmp_path))) == 1
