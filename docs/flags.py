"""Write docs/flags.md: every flag of every method, from the settings that the flags are made of.

    python docs/flags.py
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from dno.cli import RUN_FLAGS  # noqa: E402
from dno.methods import METHODS, method_class  # noqa: E402
from dno.settings import AFTER, BEFORE  # noqa: E402
from rewards import MODELS  # noqa: E402

INTRODUCTION = """# Flags

Every setting is a flag of the command line, a keyword of `dno.align`, and an entry of `args.json`, under the same name.
`-h` shows the basic ones, `--help_all` all of them. Those marked with * may be changed when a run is resumed. Turn
a switch off with `--no-NAME`; the value `none` unsets an optional number. `python docs/flags.py` makes this page.
"""


def table(rows):
    lines = ["| flag | default | what it does |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows])


def group_rows(group):
    hints = get_type_hints(group)
    for f in fields(group):
        if hints[f.name] is dict:
            continue
        choices = f.metadata["argument"].get("choices")
        text = f"{', '.join(f'`{choice}`' for choice in choices)}: " if choices else ""
        text, default = text + f.metadata["help"], f.default
        text, _, said = text.partition("; default: ")
        value = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if value in (None, "") or value is False else "on" if value is True else f"`{value}`"
        value = said or shown
        yield f"`--{f.name}`{' *' if f.metadata['changeable'] else ''}", value, text
    if group.title == "reward models":
        for model in MODELS.values():
            yield f"`--{model.setting}` *", "", model.help


def section(group, level):
    return f"{'#' * level} {group.title.capitalize()}\n\n{table(group_rows(group))}\n"


def page():
    parts = [INTRODUCTION, "## Shared by all methods\n", *(section(group, 3) for group in (*BEFORE, *AFTER))]
    rows = [(f"`--{name}`", "", help) for name, (help, *_) in RUN_FLAGS.items()]
    parts.append(f"### Multiple runs and resuming (command line only)\n\n{table(rows)}\n")
    for name in METHODS:
        method = method_class(name)
        parts.append(f"## {method.title}: `python -m dno {name}`\n")
        parts += [section(group, 3) for group in method.groups]
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "flags.md").write_text(page(), encoding="utf-8")
