"""The command line: flags made of the settings of a method, exit codes, signals."""

import argparse
import functools
import shlex
import signal
import sys
import textwrap
import warnings
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from dno.errors import UserError
from dno.methods import method_class
from rewards import MODELS, RFUNCTIONS

# Exit codes: 2 bad input (argparse's own), 130 Ctrl-C, 143 SIGTERM: 128 + the signal's number, as shells have it.
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143

# Flags of the command line alone: (help, its short form for -h, keywords of add_argument).
RUN_FLAGS = {
    "resume": (
        "resume the run in this folder, in place; its flags are the run's, and those that change no result (such as "
        "--opt_steps) may be changed",
        "resume the run in this folder",
        {"metavar": "RUN_FOLDER"},
    ),
    "config": (
        "start a new run with the settings of this file, such as the args.json of a run; other flags override them",
        "start a new run with the settings of an args.json; other flags override them",
        {"metavar": "FILE"},
    ),
    "prompts": (
        "one run per line of this file, instead of --prompt; repeat the command to resume what is missing",
        "one run per line of this file, as its prompt",
        {"metavar": "FILE"},
    ),
    "seeds": (
        "one run per seed, instead of --seed", "one run per seed", {"metavar": "SEED", "type": int, "nargs": "+"}
    ),
}  # fmt: skip

EXIT_CODES = "exit codes: 0 done, 2 bad input or a reported error, 130 Ctrl-C, 143 SIGTERM"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the run closes its files in the same way."""


def build_parser(method, description=None, presets=None, everything=False):
    """The parser of a method's flags, which holds what is given and nothing else.

    description: a summary line, a blank line, and the commands to try. presets: the script's own defaults, by setting.
    everything: `-h` shows all flags in their groups, not the basic ones alone.
    """
    cls, presets = method.settings_class(), {**method.presets, **(presets or {})}
    summary, _, commands = (description or _describe(method)).strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=_program(method), usage="%(prog)s [flags]", description=summary, epilog=_epilog(commands),
        formatter_class=_Help, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False,
    )  # fmt: skip
    hints = get_type_hints(cls)
    basic = None if everything else parser.add_argument_group("flags")
    for group in cls.groups():
        place = basic or parser.add_argument_group(group.title)
        for f in fields(group):
            if hints[f.name] is not dict:
                default = presets.get(f.name, f.default)
                text = _help(f.metadata["help"] if everything else f.metadata["basic"], default)
                argument = _argument(hints[f.name], f.metadata["argument"])
                if hints[f.name] is bool:
                    argument["on"] = default
                if not everything and "choices" in argument:
                    argument["metavar"] = "NAME"
                place.add_argument(f"--{f.name}", help=text, **argument)
        if group.title == "reward models":
            for model in MODELS.values():
                text = model.help if everything else argparse.SUPPRESS
                place.add_argument(f"--{model.setting}", metavar="PATH", help=text)
    place = basic or parser.add_argument_group("multiple runs and resuming")
    for name, (help, brief, argument) in RUN_FLAGS.items():
        place.add_argument(f"--{name}", help=help if everything else brief, **argument)
    place.add_argument("-h", "--help", action="help", help="show the basic flags")
    place.add_argument("--help_all", action=_HelpAll, build=functools.partial(
        build_parser, method, description, presets, everything=True), help="show every flag, with all that it does",
    )  # fmt: skip
    return parser


def parse(parser, arguments=None):
    """What the flags say: (settings by name, as given; the values of RUN_FLAGS)."""
    given = vars(parser.parse_args(arguments))
    run = {name: given.pop(name, None) for name in RUN_FLAGS}
    paths = {model.setting: given.pop(model.setting) for model in MODELS.values() if model.setting in given}
    if paths:
        given["reward_paths"] = {name: path for name, path in paths.items() if path}
    return given, run


def main(description, prefix, method="dno", **presets):
    """Run a script: flags in, an exit code out.

    description: the script's docstring: a summary line, then the commands to try.
    prefix: of the run folder's name. presets: the script's own defaults of settings.
    """
    run_method(method, None, description, prefix, presets)


def run_method(name, arguments=None, description=None, prefix=None, presets=None):
    """Run a method by its name, as `main` and `python -m dno` do. arguments: None for those of the command line."""
    method = method_class(name)
    given, run = parse(build_parser(method, description, presets), arguments)
    warnings.showwarning = _show_warning
    command = _Command(method, given, run, prefix or method.prefix, presets or {})
    signal.signal(signal.SIGTERM, command.interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored for jobs in the background of a shell
        signal.signal(signal.SIGINT, command.interrupt)
    try:
        command.check()  # before the libraries, which take seconds to import
        command.run()
    except UserError as error:
        command.end(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        command.end(f"stopped by {'SIGTERM' if terminated else 'Ctrl-C'}", TERMINATED if terminated else INTERRUPTED)
    except BaseException as error:
        if command.team:
            command.team.failed(f"{type(error).__name__}: {error}")
        raise
    finally:
        if command.team:
            command.team.close()


class _Command:
    """What a command line asks for: one run, a resumed run, or several."""

    def __init__(self, method, given, run, prefix, presets):
        self.method, self.given, self.prefix, self.presets = method, given, prefix, presets
        self.prompts, self.seeds, self.resume, self.config = (run[n] for n in ("prompts", "seeds", "resume", "config"))
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
        from dno.resume import prepare

        if self.resume is not None and (self.prompts or self.seeds):
            raise UserError(
                "--resume is for one run, which has its settings; to resume several, repeat the command of --prompts "
                "or --seeds"
            )
        self.start = prepare(self.given, self.method.name, self.config, self.resume, self.presets)
        if self.start.settings.output is None and self.resume is None:
            # The configuration is of a run from Python, which writes nothing unless it is told to.
            self.given["output"] = self.method.settings_class().output
            self.start = prepare(self.given, self.method.name, self.config, self.resume, self.presets)

    def run(self):
        from dno.alignment import run
        from dno.runs.screen import Screen
        from dno.sweep import sweep
        from dno.team import join_team

        settings = self.start.settings
        self.team = join_team(settings.device, settings.timeout)
        if not self.team.leads:
            warnings.showwarning = functools.partial(_show_warning, rank=self.team.rank)
        if self.prompts or self.seeds:
            return sweep(self.method, self.start.asked, self.prompts, self.seeds, self.prefix, self.team, self.insist)
        self.screen = Screen() if self.team.leads else None
        result = run(self.start, prefix=self.prefix, screen=self.screen, team=self.team, callback=self.insist)
        if self.screen:
            self.screen.end(result)

    def end(self, why, code):
        """Say why, what is left and how to resume, and exit."""
        other = self.team and self.team.cause()
        if self.team:
            self.team.failed(why)
        if not self.team or self.team.leads:
            because = f" ({other})" if other and other not in why else ""
            print(f"{why}{because}{self._what_is_kept(code)}", file=sys.stderr)
        elif not other:
            print(f"rank {self.team.rank}: {why}", file=sys.stderr)
        sys.exit(code)

    def _what_is_kept(self, code):
        if self.prompts or self.seeds:
            return "; repeat the command to resume what is missing" if code != BAD_INPUT else ""
        folder = self.screen and self.screen.folder
        if not folder or not Path(folder).is_dir():  # gone if nothing was found
            return ""
        if not (Path(folder) / "checkpoints").is_dir():
            return f"; partial results are in {folder}"
        program = "-m dno" if _by_name() else shlex.quote(sys.argv[0])
        return f"; partial results are in {folder}; to resume:\n  python {program} --resume {shlex.quote(str(folder))}"


def _by_name():
    """Whether `python -m dno` was started, not a script."""
    return Path(sys.argv[0]).name == "__main__.py"


def _program(method):
    return f"python -m dno {method.name}" if _by_name() else Path(sys.argv[0]).name


def fail(why, code):
    """End with one line on standard error."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(code)


# Help


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keep the commands' lines as they are, and say each flag in few words."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=116)

    def _format_action_invocation(self, action):
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings[: 2 if action.on else 1])
        return super()._format_action_invocation(action)

    def _format_args(self, action, default_metavar):
        if action.nargs in ("+", "*"):
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


class _HelpAll(argparse.Action):
    def __init__(self, *args, build, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)
        self.build = build

    def __call__(self, parser, *_):
        self.build().print_help()
        parser.exit()


def _help(text, default):
    """The help text of a flag, with its default unless the text says it or there is none."""
    if text is None:
        return argparse.SUPPRESS
    shown = "on" if default is True else default
    shown = " ".join(map(str, shown)) if isinstance(shown, list | tuple) else shown
    if shown is None or shown is False or shown == "" or "default" in text:
        return text.replace("%", "%%")
    return f"{text} [{shown}]".replace("%", "%%")


def _argument(hint, more):
    """The keywords of `add_argument` for a setting of this type."""
    if hint is bool:
        return {"action": _Switch, **more}
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional = type(None) in kinds
    kind = kinds[0]
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return {"type": _optional(kind) if optional and kind is not str and "nargs" not in more else kind, **more}


def _optional(kind):
    """A parser of one value, or of none, which unsets what a resumed run has."""

    def convert(text):
        return None if text == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


class _Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag; the help shows the second one only if the first is the default (`on`)."""

    def __init__(self, *args, on=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.on = on


def _describe(method):
    """The help's description of a method without a script: what it is, and a command to try."""
    command = f'python -m dno {method.name} --model sprites --prompt "white duck" --objective sprites'
    return f"{about(method)}\n\ncommands to try:\n  {command}"


def about(method):
    """What a method is: the first sentence of its file, or its title."""
    return (sys.modules[method.__module__].__doc__ or f"{method.title}.").split("\n\n")[0].strip()


def _epilog(commands):
    rewards = ", ".join(
        name + ("" if getattr(factory, "differentiable", True) else " (no gradient)")
        for name, factory in RFUNCTIONS.items()
    )
    rewards = textwrap.fill(f"rewards: {rewards}, or your own loss factory as FILE.py:FUNCTION", 116)
    switches = "turn a switch off with --no-NAME, such as --no-split_guidance; none unsets an optional number"
    return f"{rewards}\n{switches}\n{EXIT_CODES}\n\n{commands}"


def _show_warning(message, category, filename, lineno, file=None, line=None, rank=0):
    # tqdm.write keeps the line clear of the progress bar.
    from tqdm import tqdm

    tqdm.write(f"warning: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
