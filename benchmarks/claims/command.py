"""The command line of `benchmarks/claims.py`."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from common import ROOT

from claims.measure import measure_all
from claims.page import counted, write_page
from claims.plan import FAST, LR, Size, plan
from claims.results import Results

WORK = ROOT / "output" / "claims"


def parse(arguments, description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="3 prompts x 2 seeds, fewer steps and iterations")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="workers of one thread (default: cores)")
    parser.add_argument("--claims", default="abcdef", help="letters of the claims to measure (default: abcdef)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the measurements; what is there is kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/claims.md; with --fast claims.md in --work")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; default: assets/, with --fast --work")
    parser.add_argument("--page_only", action="store_true", help="measure nothing, write the page of what is there")
    parser.add_argument("--model", help="as the scripts' --model (default: sprites)")
    for name, words in (
        ("prompts", "number of prompts, at most 8"), ("seeds", "seeds of each"), ("num_steps", "sampling steps"),
        ("iterations", "iterations of a run"), ("estimates", "iterations of hybrid and zo"),
        ("draws", "N of best-of-N"), ("samples", "q of hybrid and zo"), ("image_samples", "q of hybrid_image"),
    ):  # fmt: skip
        default = getattr(Size(), name)
        default = len(default) if name == "prompts" else default
        parser.add_argument(f"--{name}", type=int, help=f"{words} (default: {default})")
    parser.add_argument("--step_sizes", type=float, nargs="+", metavar="LR",
                        help="of claim f, 0.02 among them (default: 0.02 0.05 0.1)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.step_sizes and LR not in args.step_sizes:
        parser.error(f"--step_sizes {args.step_sizes}; expected {LR:g} among them")
    if unknown := set(args.claims) - set("abcdef"):
        parser.error(f"--claims {args.claims}: no claim {', '.join(sorted(unknown))}; expected letters of abcdef")
    return args


def size_of(args):
    """The size that the flags ask for."""
    base = FAST if args.fast else Size()
    names = ("seeds", "num_steps", "iterations", "estimates", "draws", "samples", "image_samples", "model")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.step_sizes:
        given["step_sizes"] = tuple(sorted(set(args.step_sizes)))
    prompts = Size().prompts[: args.prompts] if args.prompts else base.prompts
    return replace(base, prompts=prompts, **given)


def main(description, arguments=None):
    """Measure what is missing, claim by claim, and write the page. Returns how many measurements were made."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments, description)
    size = size_of(args)
    aside = args.fast or args.model is not None
    output = args.output or (args.work / "claims.md" if aside else ROOT / "benchmarks" / "claims.md")
    pictures = args.pictures or (args.work if aside else ROOT / "assets")
    measured = 0
    if not args.page_only:
        # A row that several claims share is measured once.
        rows = {row.name: row for letter, rows in plan(size).items() if letter in args.claims for row in rows}
        measured = measure_all(rows.values(), size, args.work, args.processes, lambda line: print(line, flush=True))
    flags = " ".join(word for word in arguments if word != "--page_only")
    results = Results(size, args.work)
    sections = write_page(results, output, pictures, f"python benchmarks/claims.py {flags}".strip(), os.cpu_count())
    for section in sections:
        for claim in section.claims:
            print(f"({section.letter}) {claim.statement} {claim.verdict} ({counted(claim)})")
    print(f"\n{output}")
    return measured
