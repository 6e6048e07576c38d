"""Runs on several ranks, for the tests that need them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).parent / "rank_server.py"


@pytest.fixture(scope="session")
def rank_server():
    root = SERVER.parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, str(SERVER)], env=environment, cwd=root, **pipes)
    assert json.loads(server.stdout.readline()) == "ready"
    yield server
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture
def launch(rank_server, tmp_path, tiny_folder):
    """launch(size, flags, during=None, environment={}, **defaults) -> [(exit code, output, error output)] of each rank.

    The runs are of the tiny model unless the flags say otherwise. during: called with the process ids of the ranks.
    environment: variables to change; None removes one.
    only: what `dno.cli.main` is called with, instead of the defaults here.
    """
    if sys.platform == "win32":
        pytest.skip("ranks are forked")

    def launch(size, flags, during=None, environment=None, only=None, **defaults):
        settings = {
            "prefix": "SD-NoGrad", "estimator": "hybrid", "model": str(tiny_folder), "num_steps": 3, "opt_steps": 3,
            "objective": ("contrast",), "num_samples": 6, "save_every": 100, "checkpointing_steps": 1,
            "draw": False, **defaults,
        }  # fmt: skip
        request = {
            "size": size, "flags": flags.split(), "cwd": str(tmp_path), "defaults": only or settings,
            "environment": environment or {},
        }  # fmt: skip
        rank_server.stdin.write(json.dumps(request) + "\n")
        rank_server.stdin.flush()
        pids = json.loads(rank_server.stdout.readline())["pids"]
        if during:
            during(pids)
        codes = json.loads(rank_server.stdout.readline())["codes"]
        texts = [[(tmp_path / f"{name}{rank}.txt").read_text() for name in ("out", "err")] for rank in range(size)]
        return [(code, *text) for code, text in zip(codes, texts)]

    return launch
