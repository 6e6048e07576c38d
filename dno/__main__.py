"""`python -m dno`: every method and command of the toolkit.

python -m dno                                             the methods and commands
python -m dno dno --model sprites --objective black       a method and its flags; -h for help
python -m dno --resume output/BestOfN-20260101-120000     whatever method the run is of
python -m dno report output/SD-*                          a page of one or several runs
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from dno.methods import METHODS, method_class

# Commands that are not methods: the module whose main(arguments) does the work, and what it does.
COMMANDS = {"report": ("dno.report.page", "a page of one or several runs, to open in any browser")}


def overview():
    """The text of `python -m dno`."""
    from dno.cli import about

    methods = {name: about(method_class(name)) for name in METHODS}
    commands = {name: what for name, (_, what) in COMMANDS.items()}
    width = max(map(len, [*methods, *commands])) + 2
    lines = ["usage: python -m dno METHOD [flags]", "       python -m dno --resume RUN_FOLDER"]
    lines += ["       python -m dno COMMAND [arguments]", "", "methods:"]
    lines += [f"  {name:<{width}}{title}" for name, title in methods.items()]
    lines += ["", "commands:", *(f"  {name:<{width}}{what}" for name, what in commands.items())]
    return "\n".join([*lines, "", "-h after a method or command lists its flags"])


def main(arguments=None):
    from dno.cli import BAD_INPUT, fail, run_method
    from dno.errors import UserError

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    name = arguments[0]
    if name in COMMANDS:
        importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
    elif name in METHODS:
        run_method(name, arguments[1:])
    elif name.startswith("-"):
        if (method := _method_of(arguments)) is None:
            fail(f"which method? expected one of {', '.join(METHODS)} before {name}", BAD_INPUT)
        try:
            run_method(method, arguments)
        except UserError as error:  # not one of ours
            fail(str(error), BAD_INPUT)
    else:
        known = ", ".join([*METHODS, *COMMANDS])
        fail(f"{name!r} is neither a method nor a command; expected one of {known}", BAD_INPUT)


def _method_of(arguments):
    """The method that the run of --resume, or the file of --config, is of; None if neither is given."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--resume")
    flags.add_argument("--config")
    try:
        given, _ = flags.parse_known_args(arguments)
    except argparse.ArgumentError:  # a flag without its value, which the method's own parser reports
        return "dno"
    if given.resume is None and given.config is None:
        return None
    path = Path(given.config or "") if given.resume is None else Path(given.resume, "args.json")
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8-sig"))["method"] or "dno"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "dno"  # which says what is wrong with the file, or takes it as its own


if __name__ == "__main__":
    main()
