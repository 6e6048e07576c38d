"""The command line of the scripts, made of `dno.settings.Settings`."""

import argparse
import copy
import functools
import shlex
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

# Flags of the command line alone: (help, keywords of add_argument).
RUN_FLAGS = {
    "prompts": (
        "one run for each line of this file, instead of --prompt; the same command again goes on with what is missing",
        {"metavar": "FILE"},
    ),
    "seeds": ("one run for each of these seeds, instead of --seed", {"metavar": "SEED", "type": int, "nargs": "+"}),
    "resume": (
        "go on with the run in this folder, in place; its flags are the run's, and those that change no result (such "
        "as --opt_steps) may be given anew",
        {"metavar": "RUN_FOLDER"},
    ),
}

EXIT_CODES = "exit codes: 0 done, 2 bad input or a fault that the one-line message names, 130 Ctrl-C, 143 SIGTERM"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the run closes its files in the same way."""


def build_parser(description, defaults):
    """One flag for each setting, in groups. defaults: the script's own, by setting name."""
    summary, commands = description.strip().split("\n\n", 1)
    rewards = ", ".join(
        name + ("" if getattr(factory, "differentiable", True) else " (no gradient: --estimator hybrid)")
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
    group = parser.add_argument_group("several runs, and runs gone on with")
    for name, (help, argument) in RUN_FLAGS.items():
        group.add_argument(f"--{name}", help=help, **argument)
    return parser


def parse(parser, arguments=None):
    """The flags: (keywords of `Settings`, which of them were given, the values of RUN_FLAGS)."""
    flags = vars(parser.parse_args(arguments))
    given = set(vars(_without_defaults(parser).parse_args(arguments)))
    run = {name: flags.pop(name) for name in RUN_FLAGS}
    paths = {model.setting: flags.pop(model.setting) for model in MODELS.values()}
    if given & paths.keys():
        given.add("reward_paths")
    flags["reward_paths"] = {name: path for name, path in paths.items() if path}
    return flags, given & flags.keys(), run


def _without_defaults(parser):
    parser = copy.deepcopy(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def main(description, prefix, **defaults):
    """Run a script: flags in, an exit code out.

    description: the script's docstring: a summary line, then the commands to try.
    prefix: of the run folder's name.
    """
    settings, given, run = parse(build_parser(description, defaults))
    warnings.showwarning = _show_warning
    work = _Work(settings, given, run, prefix)
    signal.signal(signal.SIGTERM, work.interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored for jobs in the background of a shell
        signal.signal(signal.SIGINT, work.interrupt)
    try:
        work.check()  # before the libraries, which take seconds to import
        work.run()
    except UserError as error:
        work.end(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        work.end(f"stopped by {'SIGTERM' if terminated else 'Ctrl-C'}", TERMINATED if terminated else INTERRUPTED)
    except BaseException as error:
        if work.team:
            work.team.failed(f"{type(error).__name__}: {error}")
        raise
    finally:
        if work.team:
            work.team.close()


class _Work:
    """What a command line asks for: one run, a run gone on with, or several."""

    def __init__(self, settings, given, run, prefix):
        self.settings, self.given, self.prefix = settings, given, prefix
        self.prompts, self.seeds, self.resume = run["prompts"], run["seeds"], run["resume"]
        self.screen, self.team, self.stop = None, None, None

    def interrupt(self, number, frame):
        """The handler of Ctrl-C and SIGTERM."""
        self.stop = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        raise self.stop

    def insist(self, metrics):
        """After each iteration: raise once more what a library's bare `except` or a destructor has swallowed."""
        if self.stop is not None:
            raise self.stop

    def check(self):
        if self.resume is None:
            return Settings(**self.settings).resolve()
        if self.prompts or self.seeds:
            raise UserError(
                "--resume goes on with one run; to go on with several, repeat the command of --prompts or --seeds"
            )
        self.settings = {name: value for name, value in self.settings.items() if name in self.given}

    def run(self):
        from dno.alignment import align
        from dno.runs.screen import Screen
        from dno.sweep import sweep
        from dno.team import join_team

        known = self._run_settings()
        self.team = join_team(known["device"], known["timeout"])
        if not self.team.leads:
            warnings.showwarning = functools.partial(_show_warning, rank=self.team.rank)
        if self.prompts or self.seeds:
            return sweep(self.settings, self.prompts, self.seeds, self.prefix, self.team, self.insist)
        self.screen = Screen() if self.team.leads else None
        common = {"screen": self.screen, "team": self.team, "callback": self.insist}
        align(**self.settings, prefix=self.prefix, resume=self.resume, **common)

    def _run_settings(self):
        """The flags, and on --resume the run's own where none are given."""
        if self.resume is None:
            return self.settings
        from dno.resume import newest

        return {**newest(self.resume, report=lambda line: None).state["settings"], **self.settings}

    def end(self, why, code):
        """Say why, what is left and how to go on, and exit."""
        other = self.team and self.team.cause()
        if self.team:
            self.team.failed(why)
        if not self.team or self.team.leads:
            because = f" ({other})" if other and other not in why else ""
            print(f"{why}{because}{self._what_is_kept()}", file=sys.stderr)
        elif not other:
            print(f"rank {self.team.rank}: {why}", file=sys.stderr)
        sys.exit(code)

    def _what_is_kept(self):
        if self.prompts or self.seeds:
            return "; the same command goes on with what is missing"
        folder = self.screen and self.screen.folder
        if not folder or not Path(folder).is_dir():  # gone where nothing was found
            return ""
        if not (Path(folder) / "checkpoints").is_dir():
            return f"; what was found is in {folder}"
        command = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"
        return f"; what was found is in {folder}, to go on:\n  {command}"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keep the commands' lines as they are, and say each default once."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action):
        shown = action.default if not isinstance(action.default, list | tuple) else " ".join(map(str, action.default))
        if shown is None or shown is False or shown in ("", argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return f"{action.help} [{shown}]"


def _value_type(hint):
    """The type of one value of a setting: of `int | None` int, of `tuple[str, ...] | None` str."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return _value_type(kinds[0]) if kinds else hint


def _show_warning(message, category, filename, lineno, file=None, line=None, rank=0):
    # tqdm.write keeps the line clear of the progress bar.
    from tqdm import tqdm

    tqdm.write(f"warning: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
