"""The lists of packages agree: pyproject.toml, the constraints, environment.yml."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Torch's own choice for each platform.
LEFT_TO_TORCH = re.compile("nvidia-|cuda-|triton")


def plain(name):
    return re.sub("[-_.]+", "-", name).lower()


def names(requirements):
    return {plain(Requirement(requirement).name) for requirement in requirements}


def pins(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {plain(line.partition("==")[0]) for line in lines if line and line[0] not in "#-"}


def installed_closure(roots):
    """The roots, and all that is installed because of them; what is not installed is left out."""
    found, left = set(), [(name, "") for name in roots]
    while left:
        name, extra = left.pop()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(plain(name))
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                new = [(requirement.name, e) for e in (requirement.extras or {""})]
                left += [item for item in new if plain(item[0]) not in found]
    return found


@pytest.mark.parametrize("extras", [("rewards", "dev"), ("rewards", "notebook", "dev")])
def test_all_that_an_installation_brings_is_pinned(extras):
    roots = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in extras))
    pinned = pins("constraints.txt") | (pins("constraints-notebook.txt") if "notebook" in extras else set())
    closure = installed_closure(roots)
    assert "torch" in closure
    assert not {name for name in closure | roots if name not in pinned and not LEFT_TO_TORCH.match(name)}


def test_the_notebooks_constraints_are_the_others_and_more():
    assert "-c constraints.txt" in (ROOT / "constraints-notebook.txt").read_text(encoding="utf-8").splitlines()
    assert not pins("constraints.txt") & pins("constraints-notebook.txt")
    assert "jupyterlab" in pins("constraints-notebook.txt")


def test_conda_gets_the_same_packages_by_name():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    lines = environment["dependencies"][-1]["pip"]
    named = names(line for line in lines if not line.startswith("-"))
    assert named == names([*PROJECT["dependencies"], *EXTRAS["rewards"], *EXTRAS["notebook"]])
    assert [line for line in lines if line.startswith("-")] == ["-c constraints-notebook.txt", "-e ."]
