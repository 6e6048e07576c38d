"""The command line of the scripts, made of `dno.settings.Settings`."""

import argparse
import signal
import sys
import textwrap
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from dno.errors import UserError
from dno.settings import Settings
from rewards import MODELS, RFUNCTIONS

# Exit codes: 2 bad input (argparse's own), 130 Ctrl-C, 143 SIGTERM: 128 + the signal's number, as shells have it.
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143

EXIT_CODES = "exit codes: 0 done, 2 bad input or a fault that the one-line message names, 130 Ctrl-C, 143 SIGTERM"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the run closes its files in the same way."""


def build_parser(description, defaults):
    """One flag for each setting, in groups. defaults: the script's own, by setting name."""
    summary, commands = description.strip().split("\n\n", 1)
    rewards = ", ".join(
        name + ("" if getattr(factory, "differentiable", True) else " (--evaluate only)")
        for name, factory in RFUNCTIONS.items()
    )
    rewards = f"rewards: {rewards}, or a loss factory of your own as FILE.py:FUNCTION"
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=summary,
        epilog=f"{textwrap.fill(rewards, 100)}\n\n{commands}\n\n{EXIT_CODES}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    types = get_type_hints(Settings)
    groups = {}
    for setting in fields(Settings):
        group = setting.metadata["group"]
        if group is None:
            continue
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        kind = types[setting.name]
        groups[group].add_argument(
            f"--{setting.name}",
            default=defaults.get(setting.name, setting.default),
            help=setting.metadata["help"].replace("%", "%%"),
            **({"action": "store_true"} if kind is bool else {"type": _value_type(kind)}),
            **setting.metadata["argument"],
        )
    for model in MODELS.values():
        groups["reward models"].add_argument(f"--{model.setting}", metavar="PATH", help=model.help)
    return parser


def parse(parser, arguments=None):
    """The flags as keywords of `Settings`."""
    settings = vars(parser.parse_args(arguments))
    paths = {model.setting: settings.pop(model.setting) for model in MODELS.values()}
    return {**settings, "reward_paths": {name: path for name, path in paths.items() if path}}


def main(description, prefix, **defaults):
    """Run a script: flags in, an exit code out.

    description: the script's docstring: a summary line, then the commands to try.
    prefix: of the run folder's name.
    """
    arguments = parse(build_parser(description, defaults))
    screen = None
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _show_warning
    try:
        Settings(**arguments).resolve()  # before the libraries, which take seconds to import
        from dno.alignment import align
        from dno.screen import Screen

        screen = Screen()
        align(**arguments, prefix=prefix, screen=screen)
    except UserError as error:
        print(f"error: {error}{_what_is_kept(screen)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        print(f"stopped by {'SIGTERM' if terminated else 'Ctrl-C'}{_what_is_kept(screen)}", file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)


def _what_is_kept(screen):
    found = screen and screen.folder and Path(screen.folder).is_dir()  # gone where nothing was found
    return f"; what was found is in {screen.folder}" if found else ""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keep the commands' lines as they are, and say each default once."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action):
        shown = action.default if not isinstance(action.default, list | tuple) else " ".join(action.default)
        if shown is None or shown is False or shown in ("", argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return f"{action.help} [{shown}]"


def _value_type(hint):
    """The type of one value of a setting: of `int | None` int, of `tuple[str, ...]` str."""
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _terminate(number, frame):
    raise Terminated


def _show_warning(message, category, filename, lineno, file=None, line=None):
    # tqdm.write keeps the line clear of the progress bar.
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)

