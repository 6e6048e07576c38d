"""The script as its users start it: a process of its own, with its exit codes, its signals and its files."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dno.noise import load_noise
from dno.runs.checkpoints import load_newest

SCRIPT = Path(__file__).resolve().parent.parent / "dno_stable_diffusion.py"


def command(flags=""):
    return [sys.executable, str(SCRIPT), *shlex.split(flags)]


def run(flags, cwd):
    return subprocess.run(command(flags), cwd=cwd, capture_output=True, text=True, timeout=120)


def check_whole(folder):
    """Every file of the run is whole; returns the lines of metrics.jsonl."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    with Image.open(folder / "evolution.gif") as gif:
        gif.seek(gif.n_frames - 1)
    assert load_noise(folder / "best_noise.safetensors").isfinite().all()
    assert json.loads((folder / "args.json").read_text())["settings"]["prompt"]
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_help_needs_no_diffusion_library(tmp_path):
    python, script, flag = command("-h")
    result = subprocess.run(
        [python, "-X", "importtime", script, flag], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "Direct Noise Optimization" in result.stdout
    assert 'python dno_stable_diffusion.py --prompt "white duck" --objective black --lr 0.001' in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "dno.settings" in imported and not imported & {"diffusers", "transformers", "matplotlib", "scipy"}


def test_the_published_command_on_a_small_model(tiny_folder, tmp_path):
    """From another folder than the script's; the run says all that it has to say, and nothing else."""
    longest = " ".join("x" * 75)
    published = f'--prompt "white duck {longest}" --objective black --gamma 1'
    result = run(f"{published} --model {tiny_folder} --num_steps 3 --opt_steps 2", tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "output").glob("SD-*")
    lines = check_whole(folder)
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["reward"] != lines[1]["reward"]
    assert json.loads((folder / "args.json").read_text())["settings"]["lr"] == 0.01
    assert result.stdout.endswith(f"images: {Path('output') / folder.name / 'evolution.png'}\n")
    warnings = [line for line in result.stderr.splitlines() if line and "it/s" not in line and "?it" not in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: the prompt has"), result.stderr


def test_a_mistake_is_one_line(tmp_path):
    result = run("--objective jpeg --model sprites", tmp_path)
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    assert result.stderr.startswith("error: the objective 'jpeg'") and result.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_stopped_runs_leave_whole_files(tiny_folder, tmp_path):
    """Ctrl-C and SIGTERM, in two runs at once, since starting takes longest."""
    stops = {signal.SIGINT: (130, "Ctrl-C"), signal.SIGTERM: (143, "SIGTERM")}
    runs = {}
    for number in stops:
        flags = (
            f"--model {tiny_folder} --num_steps 3 --opt_steps 100000 --gamma 1 --save_every 1000 --output {int(number)}"
        )
        runs[number] = subprocess.Popen(command(flags), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    for number, (code, name) in stops.items():
        process, output = runs[number], tmp_path / str(int(number))
        while not any(path.stat().st_size > 1000 for path in output.glob("*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in err
        (folder,) = output.iterdir()
        where = folder.relative_to(tmp_path)
        assert err.endswith(
            f"stopped by {name}; partial results are in {where}; to resume:\n  python {SCRIPT} --resume {where}\n"
        )
        lines = check_whole(folder)
        assert load_newest(folder).step == len(lines)
        assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) >= 2
        assert {"best.png", "initial.png", "evolution.png"} <= {path.name for path in folder.iterdir()}
