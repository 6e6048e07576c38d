"""The README says what the program does: its flags are the program's, and its commands parse."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from dno.cli import RUN_FLAGS, build_parser, parse
from dno.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
# Whatever starts them: python, accelerate launch or torchrun.
COMMANDS = re.findall(r"^(?!#)(?:\S.* )?dno_\w+\.py (.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_the_table_of_flags_is_complete():
    rows = re.findall(r"^\| `--(\w+)` \|", README, re.MULTILINE)
    assert rows == [setting.name for setting in fields(Settings) if setting.metadata["group"]] + list(RUN_FLAGS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "-h"])
def test_commands_parse(command):
    parser = build_parser("A script.\n\ncommands:", {"estimator": "hybrid"})
    Settings(**parse(parser, shlex.split(command))[0]).resolve()


def test_nothing_is_left_open():
    assert "@@" not in README


def test_there_are_commands():
    assert len(COMMANDS) > 12


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
