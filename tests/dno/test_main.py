"""`python -m dno`, and that the scripts are presets of it: started as Python starts them, within this process."""

import json
import runpy
import shlex
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dno.__main__ import COMMANDS
from dno.methods import METHODS, method_class
from dno.noise import load_noise

ROOT = Path(__file__).parents[2]
SCRIPTS = ("dno_stable_diffusion.py", "dno_stable_diffusion_nograd.py", "dno_sdxl.py")


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """start(program, flags) -> (exit code, standard output, standard error). program: "-m dno", or a script's name."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def start(program, flags=""):
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(flags)])
        code = 0
        try:
            if program == "-m dno":
                monkeypatch.delitem(sys.modules, "dno.__main__", raising=False)
                runpy.run_module("dno", run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def quick(tiny_folder):
    return f"--model {tiny_folder} --num_steps 3 --no-draw"


def newest(folder):
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def lines_of(folder):
    """metrics.jsonl without what a clock and a meter say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gb")} for line in lines]


def check_equal(a, b):
    assert lines_of(a) == lines_of(b)
    assert torch.equal(load_noise(a), load_noise(b))
    for name in ("best.png", "initial.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("flags", ["", "-h", "--help"])
def test_the_overview_names_every_method_and_command(start, flags):
    code, out, err = start("-m dno", flags)
    assert code == 0 and err == "" and len(out.splitlines()) < 30
    for name in METHODS:
        assert f"  {name} " in out and method_class(name).title in out
    for name, (_, what) in COMMANDS.items():
        assert f"  {name} " in out and what in out


def test_the_help_of_a_method(start):
    for name in METHODS:
        code, out, _ = start("-m dno", f"{name} -h")
        assert code == 0 and out.startswith(f"usage: python -m dno {name} [flags]") and len(out.splitlines()) <= 45
        assert f"python -m dno {name} --model sprites" in out
        code, out, _ = start("-m dno", f"{name} --help_all")
        assert code == 0 and out.startswith(f"usage: python -m dno {name} [flags]") and len(out.splitlines()) > 80


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script(start, script):
    code, out, _ = start(script, "-h")
    assert code == 0 and out.startswith(f"usage: {script} [flags]") and len(out.splitlines()) <= 45
    assert out.count(f"python {script} ") + out.count(f" {script} ") >= 3 and "rewards to climb" in out
    default = {"dno_stable_diffusion_nograd.py": "[jpeg]"}.get(script, "[black]")
    assert f"summed with their weights {default}" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [("dnoo --lr 1", "'dnoo' is neither a method nor a command; expected one of dno, best_of_n, report"),
     ("--lr 1", "which method? expected one of dno, best_of_n before --lr"),
     ("--resume no/such", "no/such does not exist; expected a run folder"),
     ("--resume=no/such", "no/such does not exist; expected a run folder"),
     ("--config no/such.json", "--config no/such.json cannot be read"),
     ("--config odd.json", "no method is called 'magic'"),
     ("--config odder.json", "no method is called ['dno']"),
     ("best_of_n --lr 1", "unrecognized arguments: --lr 1"),
     ("dno --resume x --config y", "give one of them"),
     ("--opt_steps 3 --resume", "argument --resume: expected one argument")],
)  # fmt: skip
def test_mistakes_are_one_line(start, tmp_path, flags, words):
    (tmp_path / "odd.json").write_text('{"method": "magic", "settings": {}}')
    (tmp_path / "odder.json").write_text('{"method": ["dno"], "settings": {}}')
    code, out, err = start("-m dno", flags)
    assert code == 2 and out == "" and words in err.splitlines()[-1] and "Traceback" not in err
    assert len(err.splitlines()) <= 2 and not (tmp_path / "output").exists()


def test_a_script_is_the_method_with_its_presets(start, quick, tmp_path):
    flags = f"{quick} --opt_steps 3 --gamma 1"
    for script, same in (
        ("dno_stable_diffusion.py", ""), ("dno_sdxl.py", ""),
        ("dno_stable_diffusion_nograd.py", "--estimator hybrid --prompt 'black duck' --objective jpeg --seed 123"),
    ):  # fmt: skip
        assert start(script, f"{flags} --output {script}")[0] == 0
        assert start("-m dno", f"dno {flags} {same} --output {script}-m")[0] == 0
        a, b = newest(tmp_path / script), newest(tmp_path / f"{script}-m")
        check_equal(a, b)
        args = [json.loads((folder / "args.json").read_text()) for folder in (a, b)]
        assert [entry["settings"] | {"output": ""} for entry in args][0] == args[1]["settings"] | {"output": ""}


@pytest.mark.parametrize("method", METHODS)
def test_resume_and_config_find_the_method(start, quick, tmp_path, method):
    more, count = {"dno": ("--opt_steps 2 --lr 0.05", 2), "best_of_n": ("--num_candidates 4", 1)}[method]
    code, _, err = start("-m dno", f"{method} {quick} --seed 3 {more}")
    assert code == 0, err
    run = newest(tmp_path / "output")
    assert run.name.startswith(f"{method_class(method).prefix}-")
    code, _, err = start("-m dno", f"--config {run / 'args.json'}")
    assert code == 0, err
    again = newest(tmp_path / "output")
    assert again != run
    check_equal(run, again)
    assert start("-m dno", f"--seed 4 --config={run / 'args.json'} --output elsewhere")[0] == 0
    assert lines_of(newest(tmp_path / "elsewhere")) != lines_of(run)
    for flags in (f"--resume {run} --draw", f"--resume={run}", f"{method} --resume {run}"):
        code, out, err = start("-m dno", flags)
        assert code == 0 and f"resumed at iteration {count}" in out, err
    assert (run / "evolution.png").is_file() and len(lines_of(run)) == count


def test_a_config_of_a_script_holds_over_its_presets(start, quick, tmp_path):
    """And under the flags. An args.json has them all; a file that was written by hand has some."""
    (tmp_path / "mine.json").write_text('{"seed": 5, "lr": 0.05}')
    script = "dno_stable_diffusion_nograd.py"
    assert start(script, f"{quick} --config mine.json --seed 6 --opt_steps 1")[0] == 0
    asked = json.loads((newest(tmp_path / "output") / "args.json").read_text())["settings"]
    assert (asked["seed"], asked["lr"], asked["estimator"], asked["prompt"]) == (6, 0.05, "hybrid", "black duck")
    (tmp_path / "other.json").write_text('{"method": "best_of_n"}')
    code, _, err = start(script, "--config other.json")
    assert code == 2 and err == "error: --config other.json is for the method 'best_of_n'; got 'dno'\n"


def test_a_stopped_run_says_how_to_resume_it(start, quick, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(inference_dtype=None, device=None):\n    calls = iter(range(99))\n\n"
        "    def loss_fn(images, prompts):\n        if next(calls) == 2:\n            raise KeyboardInterrupt\n"
        "        return images.mean(dim=(1, 2, 3))\n\n    return loss_fn\n\n\nscore.differentiable = True\n"
    )
    code, _, err = start("-m dno", f"dno {quick} --objective mine.py:score")
    where = newest(tmp_path / "output").relative_to(tmp_path)
    resume = f"partial results are in {where}; to resume:\n  python -m dno --resume {where}\n"
    assert code == 130 and err.endswith(f"stopped by Ctrl-C; {resume}")
    code, out, err = start("-m dno", f"--resume {where} --opt_steps 3")
    assert code == 0 and "resumed at iteration 2" in out and len(lines_of(tmp_path / where)) == 3, err


def test_reports(start, quick, tmp_path):
    assert start("-m dno", f"dno {quick} --opt_steps 2")[0] == 0
    run = newest(tmp_path / "output")
    code, out, _ = start("-m dno", f"report {run} --output page.html")
    assert code == 0 and "page.html" in out and run.name in (tmp_path / "page.html").read_text(encoding="utf-8")
    code, out, err = start("-m dno", "report no/such")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
