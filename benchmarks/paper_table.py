"""The paper's table for Stable Diffusion 1.5: each reward after 1, 3 and 5 minutes, over 45 simple animals.

  python benchmarks/paper_table.py                                      # 45 prompts x 3 rewards x 5 minutes: 11 hours
  python benchmarks/paper_table.py --limit 5 --minutes 1 3              # the first five prompts, three minutes each
  python benchmarks/paper_table.py --objectives aesthetic --evaluate hps pick
  python benchmarks/paper_table.py --model sprites --objectives sprites contrast --prompts ducks.txt --minutes 0.1 0.5

Each row is what was optimized, and for how long; each column a reward, mean ± standard error over the prompts. The
reward that a row optimizes is its best so far, the others are held out and measured on the same image. The first row
is the images before alignment. Time is that of the iterations alone: loading is not in it.

Weights are looked for before anything starts. The runs for one reward are a sweep with its own folder in --output, so
the same command resumes where it was stopped, even in the middle of a run. The table is written as each run begins,
and at the end.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

from common import ROOT

import rewards
from dno.errors import UserError
from dno.models.specs import DEFAULT_MODEL
from dno.resume import prepare
from dno.runs.files import write_whole
from dno.sweep import RunSpec, read_prompts, row_of, run_all, run_name
from dno.task import Loaded

ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip
ITERATIONS = 10**6  # the time ends a run


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as the scripts' --model (default: %(default)s)")
    parser.add_argument("--objectives", nargs="+", default=["aesthetic", "hps", "pick"], metavar="NAME",
                        help="rewards to optimize, one after the other, the others held out (default: aesthetic hps "
                        "pick); names, or FILE.py:FUNCTION")  # fmt: skip
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="NAME", help="further rewards, always held out")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 3, 5], help="when to read (default: 1 3 5)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one per line (default: the 45 simple animals)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "paper-table", metavar="DIR",
                        help="folder of the runs and of table.md (default: output/paper-table)")  # fmt: skip
    for name, kind, default in (
        ("num_steps", int, None), ("lr", float, 0.01), ("gamma", float, 0.0), ("seed", int, 0),
        ("precision", str, "auto"), ("device", str, "auto"), ("checkpointing", str, "auto"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, help="as of dno_stable_diffusion.py")
    rewards.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.minutes = sorted(set(args.minutes))
    if args.minutes[0] <= 0:
        parser.error(f"--minutes {args.minutes[0]:g}; expected numbers above 0")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}; expected 1 or more")
    return args


def prompts_of(args):
    """The prompts that the flags ask for. Raises UserError."""
    prompts = list(ANIMALS) if args.prompts is None else read_prompts(args.prompts)
    return prompts[: args.limit]


def settings_of(args, objective):
    """The settings of `align` of all runs for one objective."""
    held_out = [name for name in dict.fromkeys([*args.objectives, *args.evaluate]) if name != objective]
    names = ("model", "num_steps", "lr", "gamma", "seed", "precision", "device", "checkpointing")
    names += ("reward_precision", "reward_preprocess", "reward_checkpointing")
    paths = {model.setting: getattr(args, model.setting) for model in rewards.MODELS.values()}
    return {
        **{name: getattr(args, name) for name in names},
        "reward_paths": {name: path for name, path in paths.items() if path},
        "objective": objective, "evaluate": held_out, "opt_steps": ITERATIONS, "max_seconds": 60 * args.minutes[-1],
        "save_every": 10**9, "draw": False,
    }  # fmt: skip


def sweep_folder(args, objective):
    """The folder of the runs for one objective, by its settings; where they are computed does not count."""
    elsewhere = ("device", "checkpointing", "reward_checkpointing", "reward_paths", "evaluate", "save_every", "draw")
    same = {name: value for name, value in settings_of(args, objective).items() if name not in elsewhere}
    same["watched"] = sorted({*args.objectives, *args.evaluate})
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9.]+", "-", short(objective).lower()).strip("-")[:40]
    return args.output.expanduser() / f"{slug}-{digest}"


def folders_of(args, objective, prompts):
    """The folders of the runs for one objective."""
    return [sweep_folder(args, objective) / run_name(prompt, args.seed) for prompt in prompts]


def short(name):
    """A reward's name in files and metrics: that of the function where it is FILE.py:FUNCTION."""
    return name.rpartition(":")[2].removesuffix("_loss_fn") if ".py:" in name else name


def is_done(folder):
    return "failed" not in row_of(folder)


def read(folder, objective, seconds):
    """The metrics of a run at its start and after each of `seconds`: at the best reward so far."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    ends = list(itertools.accumulate(line["seconds"] for line in metrics))
    found = [metrics[0]]
    for limit in seconds:
        in_time = [line for line, end in zip(metrics, ends) if end <= limit and line[objective] is not None]
        found.append(max(in_time, key=lambda line: line[objective], default=metrics[0]))
    return found


def table(args, prompts):
    """The table as markdown, of the runs that are done."""
    names = [short(name) for name in dict.fromkeys([*args.objectives, *args.evaluate])]
    rows, starts = [], {}
    for objective in args.objectives:
        own = short(objective)
        done = {p: f for p, f in zip(prompts, folders_of(args, objective, prompts)) if is_done(f)}
        found = {p: read(f, own, [60 * minutes for minutes in args.minutes]) for p, f in done.items()}
        starts |= {prompt: lines[0] for prompt, lines in found.items()}
        for i, minutes in enumerate(args.minutes, 1):
            cells = [_cell([lines[i][name] for lines in found.values()]) for name in names]
            cells = [f"**{cell}**" if name == own and found else cell for name, cell in zip(names, cells)]
            steps = [lines[i]["step"] for lines in found.values()]
            median = f"{statistics.median(steps):g}" if steps else "-"
            rows.append([own, f"{minutes:g} min", *cells, median, len(found)])
    first = ["none", "start", *(_cell([line[name] for line in starts.values()]) for name in names), "0", len(starts)]
    header = ["optimized", "time", *names, "at iteration (median)", "prompts"]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), first, *rows))


def _cell(values):
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    error = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.4f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4f}{error}"


def write_table(args, prompts):
    settings = prepare(settings_of(args, args.objectives[0])).settings
    text = (
        f"# Rewards after {', '.join(f'{minutes:g}' for minutes in args.minutes)} minutes\n\n"
        f"{args.model}, {len(prompts)} prompts, seed {args.seed}, {settings.num_steps} steps, eta {settings.eta:g}, "
        f"AdamW with step size {args.lr:g}, gamma {args.gamma:g}. Mean ± standard error over the prompts; bold is what "
        f"the row optimized (best so far), the rest is held out.\n\n{table(args, prompts)}\n"
    )
    args.output.expanduser().mkdir(parents=True, exist_ok=True)
    write_whole(args.output.expanduser() / "table.md", text.encode())
    return text


def main(arguments=None):
    """Make the runs that are missing and write the table. Returns how many were missing. Raises UserError."""
    args = parse(arguments)
    prompts, missing, model = prompts_of(args), 0, None

    def each_iteration(metrics):
        if metrics["step"] == 0:
            write_table(args, prompts)

    write_table(args, prompts)
    for objective in args.objectives:
        folders, settings = folders_of(args, objective, prompts), settings_of(args, objective)
        left = sum(not is_done(folder) for folder in folders)
        if left:
            # The rewards of one objective at a time; the first run loads them all, so what is missing is known at once.
            loaded = Loaded(model)
            runs = [
                RunSpec(folder.name, "dno", {**settings, "prompt": prompt}, f"{short(objective)}, {prompt!r}", loaded)
                for prompt, folder in zip(prompts, folders)
            ]
            about = {"method": "dno", "settings": settings}
            run_all(sweep_folder(args, objective), runs, about, callback=each_iteration)
            missing, model = missing + left, loaded.model
    print(f"\n{write_table(args, prompts)}\n{args.output / 'table.md'}")
    if failed := sum(not is_done(f) for o in args.objectives for f in folders_of(args, o, prompts)):
        raise UserError(f"{failed} runs failed; see above, and repeat the command to try them again")
    return missing


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
