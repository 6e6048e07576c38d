"""Stored results of the official code, on the same pipelines with the same flags: `python -m pytest -m golden`.

They are read from the folder that the environment variable DNO_GOLDEN names, or else from tests/golden; what is not in
the folder is skipped.
"""

import json
import os
from pathlib import Path

import pytest

from dno import align

GIVEN = os.environ.get("DNO_GOLDEN")
GOLDEN = Path(GIVEN or Path(__file__).parent.parent / "golden").expanduser().resolve()
assert GOLDEN.is_dir(), f"DNO_GOLDEN: there is no folder {GOLDEN}"


def cases(file):
    """The cases in a JSON file of the folder by name, or none."""
    path = GOLDEN / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


TRAJECTORIES = cases("trajectories.json")


@pytest.mark.golden
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_rewards_are_the_official_ones(name):
    case = TRAJECTORIES[name]
    flags = dict(case["flags"])
    if not GIVEN and case["model"] == "tiny-sdxl":
        flags["opt_steps"] = 2  # it attends over 16,384 positions; the second reward already depends on the gradient
    result = align(model=str(GOLDEN / case["model"]), **flags)
    rewards = [metrics["reward"] for metrics in result.metrics]
    assert rewards == pytest.approx(case["rewards"][: flags["opt_steps"]], abs=case["tolerance"])
