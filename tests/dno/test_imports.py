"""The order of the rooms: each imports only what stands below it, and importing does nothing expensive."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the top of the house to its foundation; README's table says what is in each.
ROOMS = (
    "__main__", "cli", "sweep", "alignment", "resume", "report", "runs", "methods", "task", "settings", "team",
    "models", "objectives", "memory", "regularization", "noise", "sampling", "errors",
)  # fmt: skip
FILES = [path for path in (ROOT / "dno").rglob("*.py") if path != ROOT / "dno" / "__init__.py"]


def room_of(module):
    """The room of `dno.room.file`, or None for what is no part of dno."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "dno" and rest else None


def imported(path):
    """(line, module) of each import, those inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module
            if node.module == "dno":
                yield from ((node.lineno, f"dno.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_stands_below_it(path):
    own = path.relative_to(ROOT / "dno").parts[0].removesuffix(".py")
    for line, module in imported(path):
        room = room_of(module)
        if room not in (None, own):
            assert ROOMS.index(own) < ROOMS.index(room), f"{path}:{line} imports {module}, which stands above it"


def test_every_room_has_its_place():
    assert {path.relative_to(ROOT / "dno").parts[0].removesuffix(".py") for path in FILES} == set(ROOMS)


def test_rewards_know_nothing_of_the_house():
    for path in (ROOT / "rewards").rglob("*.py"):
        for line, module in imported(path):
            assert module.partition(".")[0] != "dno", f"{path}:{line} imports {module}"


def test_the_readme_names_the_rooms():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| room of `dno/` |")[2].partition("\n\n")[0]
    named = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([\w/.]+)`", table)]
    assert set(ROOMS) <= set(named)
    # The table runs from top to bottom as well.
    rooms = [name for name in named if name in ROOMS]
    assert sorted(rooms, key=ROOMS.index) == rooms


@pytest.mark.parametrize("module", ["dno", "dno.report.figures"])
def test_importing_loads_no_library(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
