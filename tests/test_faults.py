"""The table of faults names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_fault_has_its_tests():
    text = (TESTS / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row.rsplit("|", 2)[1])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8") or not test, row
