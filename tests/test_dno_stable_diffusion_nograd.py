"""The script as its users start it, on two ranks of `torchrun`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "dno_stable_diffusion_nograd.py"


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun on Windows are another story")
def test_the_published_command_on_two_cpu_ranks(tiny_folder, tmp_path):
    flags = f"--model {tiny_folder} --num_steps 3 --opt_steps 2 --num_samples 5 --lr 0.01 --gamma 1 --objective jpeg"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    if not torch.cuda.is_available():  # then it must not be needed
        del environment["ACCELERATE_USE_CPU"]
    result = subprocess.run(
        [*launcher, str(SCRIPT), *flags.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "output").iterdir()
    assert folder.name.startswith("SD-NoGrad-")
    args = json.loads((folder / "args.json").read_text())
    published = {"prompt": "black duck", "seed": 123, "mu": 0.01, "batch_per_device": 4, "estimator": "hybrid"}
    assert args["settings"].items() >= published.items() and args["resolved"]["processes"] == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(line["jpeg"] < 0 for line in lines)
    assert result.stdout.count("best reward") == 1
