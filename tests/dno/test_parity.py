"""The rewards that the official implementation reports, on the same pipeline with the same flags."""

import json
from pathlib import Path

import pytest

from dno import align

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "trajectories.json").read_text())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["script"] == "dno_stable_diffusion.py"])
def test_rewards_are_the_official_ones(name):
    case = CASES[name]
    result = align(model=str(GOLDEN / case["model"]), **case["flags"])
    rewards = [metrics["reward"] for metrics in result.metrics]
    assert rewards == pytest.approx(case["rewards"], abs=case["tolerance"])
