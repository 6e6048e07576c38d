"""`python -m dno`: every method and command of the toolkit.

python -m dno                                             the methods and commands
python -m dno dno --model sprites --objective black       a method and its flags; -h for help
python -m dno --resume output/BestOfN-20260101-120000     whatever method the run is of
python -m dno report output/SD-*                          a page of one or several runs
"""

import importlib
import json
import sys
from pathlib import Path

from dno.methods import METHODS, method_class

# Commands that are not methods: the module whose main(arguments) does the work, and what it does.
COMMANDS = {"report": ("dno.report.page", "a page of one or several runs, to open in any browser")}


def overview():
    """The text of `python -m dno`."""
    methods = {name: method_class(name).title for name in METHODS}
    commands = {name: what for name, (_, what) in COMMANDS.items()}
    width = max(map(len, [*methods, *commands])) + 2
    lines = ["usage: python -m dno METHOD [flags]", "       python -m dno COMMAND [arguments]", "", "methods:"]
    lines += [f"  {name:<{width}}{title}" for name, title in methods.items()]
    lines += ["", "commands:", *(f"  {name:<{width}}{what}" for name, what in commands.items())]
    return "\n".join([*lines, "", "-h after a method or command lists its flags"])


def main(arguments=None):
    from dno.cli import BAD_INPUT, fail, run_method

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
        if (method := _method_of(arguments)) not in METHODS:
            fail(f"which method? expected one of {', '.join(METHODS)} before {name}", BAD_INPUT)
        run_method(method, arguments)
    else:
        known = ", ".join([*METHODS, *COMMANDS])
        fail(f"{name!r} is neither a method nor a command; expected one of {known}", BAD_INPUT)


def _method_of(arguments):
    """The method that the run of --resume, or the file of --config, is of; None if there is none."""
    for flag, file in (("--resume", "args.json"), ("--config", "")):
        if flag in arguments[:-1]:
            path = Path(arguments[arguments.index(flag) + 1]).expanduser() / file
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return found.get("method", "dno")
            except (OSError, ValueError, AttributeError):
                return "dno"  # which will say what is wrong with the file
    return None


if __name__ == "__main__":
    main()
