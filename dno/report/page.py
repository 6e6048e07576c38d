"""A page of one run or of several beside each other, to open in any browser: images, curves, numbers, flags.

    python -m dno.report output/SD-20260101-120000
    python -m dno.report output/SD-* --output comparison.html

What is read is args.json, metrics.jsonl and the images of each folder, so a run that stopped early, or one that is
still going, can be looked at too. The page holds all it needs in one file and asks nothing of the network.
"""

import argparse
import html
import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

from dno.errors import UserError
from dno.report.charts import PALETTE, Curve, chart, say
from dno.report.pictures import PAGE_BYTES, RUN_BYTES, Pool, read_run

BAD_INPUT = 2
# Kept apart: where a run was written says nothing about what it does.
PLACES = ("output", "folder", "model_source")
# Filled in by the run itself where they are left out: a value says nothing about what the user gave.
RESOLVED = ("precision", "device", "checkpointing", "height", "width")
# How long it went on tells runs apart less than what it did, so these are named last.
DULL = ("batch_size", "opt_steps", "opt_time", "evaluate", "save_every")


def write_report(folders, output=None):
    """Write the page of the runs in these folders.

    output: the file; None: report.html in the run's folder, or in the common parent of several.
    Returns its path. Raises UserError for a folder that holds no run, or a file that cannot be written.
    """
    folders = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    runs = [read_run(folder) for folder in folders]
    common = _common_folder(folders)
    if output is None and common is None:
        raise UserError("the runs have no common folder to write the report to; give its file with --output")
    output = common / "report.html" if output is None else Path(output).expanduser()
    _label(runs)
    _write(output, page(runs))
    return output


def _common_folder(folders):
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on several drives
        return None


def _write(path, text):
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(text.encode("utf-8", "replace"))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file with --output") from error


def page(runs):
    """The page, as HTML, of runs that have their labels."""
    pool = Pool()
    frames = [pool.add_run(run, min(RUN_BYTES, PAGE_BYTES / len(runs))) for run in runs]
    parts, watched = _union(run.parts for run in runs), _union(run.watched for run in runs)
    metrics = [["reward", "reward"], *([name, name] for name in [*parts, *watched]),
               ["probability", "P(z)"], ["grad_norm", "grad norm"]]  # fmt: skip
    data = {
        "steps": sorted({step for run in runs for step in run.steps}),
        "pool": pool.urls,
        "runs": [
            {
                "prompt": elide(run.args.get("prompt", "")),
                "steps": run.steps,
                "pictures": [
                    {"best": picture.best, "frames": shown, "values": picture.values}
                    for picture, shown in zip(run.pictures, each, strict=True)
                ],
            }
            for run, each in zip(runs, frames, strict=True)
        ],
    }
    prompts = _union([elide(run.args.get("prompt", ""))] for run in runs)
    title = f"“{prompts[0]}”" if len(prompts) == 1 else f"{len(runs)} runs"
    blocks = {
        "title": text(title),
        "subtitle": text(_subtitle(runs)),
        "kind": "single" if len(runs) == 1 else "several",
        "summary": _summary(runs, watched),
        "legend": _legend(runs),
        "last": str(len(data["steps"]) - 1),
        "cards": "".join(_card(k, run, frames[k], metrics, pool) for k, run in enumerate(runs)),
        "charts": _charts(runs, parts, watched),
        "flags": _flags(runs),
        # "<" never appears, so that no text of a run can end the script element.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: blocks[match[1]], template)


def text(value):
    """A value as HTML text, or as an attribute in double quotes."""
    return html.escape(elide(value, 10**6))


def elide(value, limit=120):
    """One line of at most `limit` characters, free of what no page may hold."""
    value = " ".join(str(value).encode("utf-8", "replace").decode().split())
    value = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", value)
    return value if len(value) <= limit else value[: limit - 1].rstrip() + "…"


def _union(lists):
    return list(dict.fromkeys(name for names in lists for name in names))


def _subtitle(runs):
    """What all runs share; of a single run also how it went."""
    prompts = _union([_plain(run.args.get("prompt"))] for run in runs)
    words = [f"{len(runs)} runs"] if len(runs) > 1 and len(prompts) == 1 else []  # else it is the title
    for name, form in (("model", "{}"), ("climbs", "optimized for {}"), ("gamma", "γ {}"), ("lr", "lr {}"),
                       ("seed", "seed {}")):  # fmt: skip
        values = _union([_plain(run.args.get(name))] for run in runs)
        if len(values) == 1 and values[0] != "–":
            words.append(form.format(elide(values[0], 80)))
    if len(runs) == 1:
        run = runs[0]
        words.append(f"{run.iterations} iteration{'s' * (run.iterations != '1')}")
        words += [] if run.seconds is None else [f"{run.seconds:.2f} s an iteration"]
        words += [] if run.peak_memory_gb is None else [f"{run.peak_memory_gb:.2f} GB at most"]
    return " · ".join(words)


def _label(runs):
    """Name each run by the settings that tell it from the others, or by its folder."""
    settings = [name for name in _setting_defaults({}) if name not in (*PLACES, *RESOLVED)]
    differing = [name for name in settings if len(_union([_plain(run.args.get(name))] for run in runs)) > 1]
    differing.sort(key=lambda name: name in DULL)
    common = _common_folder([run.folder.parent for run in runs])
    for run in runs:
        run.name = elide(run.folder.relative_to(common) if common else run.folder)
        words = [f"{name} {elide(_plain(run.args.get(name)), 32)}" for name in differing]
        run.label = " · ".join(words[:3] + ["…"] * (len(words) > 3)) or run.name


def _chip(k):
    return f'<i class="chip{" dashed" * (k // PALETTE % 2)}" style="--c:var(--c{k % PALETTE})"></i>'


def _legend(runs):
    if len(runs) == 1:
        return ""
    return "<ul class=legend>" + "".join(f"<li>{_chip(k)}{text(r.label)}</li>" for k, r in enumerate(runs)) + "</ul>"


def _summary(runs, watched):
    """One row for each image of each run."""
    if len(runs) == 1 and len(runs[0].pictures) == 1:
        return ""  # its card says all this
    heads = ["first reward", "best reward", "at iteration", "P(z) at best", *(f"{n}, first → at best" for n in watched)]
    batch = any(len(run.pictures) > 1 for run in runs)
    rows = []
    for k, run in enumerate(runs):
        span = f' rowspan="{len(run.pictures)}"' if len(run.pictures) > 1 else ""
        name = f"<small>{text(run.name)}</small>" if run.label != run.name else ""
        for b, picture in enumerate(run.pictures):
            at = run.steps.index(picture.best) if picture.best is not None else None
            cells = [f'<th scope="row"{span}><a href="#run-{k}">{_chip(k)}{text(run.label)}</a>{name}</th>'] * (b == 0)
            cells += [f"<td>{b}</td>"] * batch
            first = {metric: values[0] for metric, values in picture.values.items()}
            best = {metric: values[at] for metric, values in picture.values.items()} if at is not None else {}
            numbers = [say(first["reward"]), say(best.get("reward")), _plain(picture.best)]
            numbers += [say(best.get("probability"))]
            pairs = [(say(first.get(metric)), say(best.get(metric))) for metric in watched]
            numbers += ["–" if pair == ("–", "–") else " → ".join(pair) for pair in pairs]
            cells += [f"<td>{number}</td>" for number in numbers]
            of_run = (run.iterations, *("–" if v is None else f"{v:.2f}" for v in (run.seconds, run.peak_memory_gb)))
            cells += [f"<td{span}>{number}</td>" for number in of_run] * (b == 0)
            rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["run"] + ["image"] * batch + heads + ["iterations", "s / iteration", "peak GB"]
    heads = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    return _table("Summary", f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>", "numbers")


def _table(label, rows, kind):
    """A table that scrolls sideways in its own box, with the keyboard too."""
    table = f'<table class="{kind}">{rows}</table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{table}</div>'


def _card(k, run, frames, metrics, pool):
    """One run: before, at the slider's iteration, best; the numbers of the three. The script fills the middle."""
    picture, prompt = run.pictures[0], text(elide(run.args.get("prompt", "")))
    shown = dict(frames[0])
    columns = (("before", run.steps[0]), ("now", None), ("best", picture.best))
    shots = []
    for name, step in columns:
        url = pool.urls[shown[step]] if step in shown else ""
        image = f'<img alt="{prompt}, {name}"' + (f' src="{url}">' if url else " hidden>")
        shots.append(f'<figure class="{name}">{image}<figcaption>{name}</figcaption></figure>')
    rows = []
    for metric, title in metrics:
        if metric not in picture.values:
            continue
        cells = ""
        for name, step in columns:
            value = picture.values[metric][run.steps.index(step)] if step is not None else None
            cells += f'<td class="{name}">{say(value)}</td>'
        rows.append(f'<tr data-metric="{text(metric)}"><th scope="row">{text(title)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col" class="{name}">{name}</th>' for name, _ in columns)
    choice = "".join(
        f'<button type="button" data-image="{b}" aria-pressed="{str(b == 0).lower()}"><img alt="">image {b}</button>'
        for b in range(len(run.pictures))
    )
    choice = f'<div class="choice" role="group" aria-label="image of the batch">{choice}</div>'
    small = f"<small>{text(run.name)}</small>" if run.label != run.name or run.name != run.folder.name else ""
    table = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        f'<section class="card" id="run-{k}" data-run="{k}"><h2>{_chip(k)}{text(run.label)}{small}</h2>'
        f'{choice if len(run.pictures) > 1 else ""}<div class="shots">{"".join(shots)}</div>'
        f'<table class="numbers">{table}</table></section>'
    )


def _charts(runs, parts, watched):
    def draw(metric, title, note, log=False):
        curves = [
            Curve(k, b, run.label, run.steps, picture.values[metric], picture.best)
            for k, run in enumerate(runs)
            for b, picture in enumerate(run.pictures)
            if metric in picture.values
        ]
        if log and len(runs) == 1:  # of several runs it would hide the rest
            least = [curve.image for curve in curves]
            curves += [
                Curve(0, b, "", runs[0].steps, runs[0].pictures[b].values["probability_min"], least=True) for b in least
            ]
        return chart(metric, title, note, curves, log)

    bound = "; dashed: the least of any single noise" if len(runs) == 1 else ""
    figures = [
        draw("reward", "Reward", "ring: the best"),
        *(draw(name, name, "part of the reward") for name in parts),
        *(draw(name, name, "not optimized") for name in watched if name not in parts),
        draw("probability", "P(z)", f"1 is typical noise{bound}", log=True),
        draw("grad_norm", "Gradient norm", "before clipping"),
    ]
    return "".join(figures)


def _plain(value):
    """A value of args.json as a reader writes it."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _setting_defaults(args):
    """By setting, the value, as `_plain` writes it, that a run of this model has where its flag is left out."""
    from dno.models.specs import model_spec
    from dno.settings import Settings

    defaults = {setting.name: setting.default for setting in fields(Settings) if setting.metadata["group"]}
    spec = model_spec(str(args.get("model", defaults["model"])))
    defaults |= {"num_steps": spec.num_steps, "guidance_scale": spec.guidance_scale, "opt_time": args.get("num_steps")}
    return {name: _plain(list(value) if isinstance(value, tuple) else value) for name, value in defaults.items()}


def _flags(runs):
    """The settings that were changed, or in which the runs differ; folded away, all the rest of args.json."""
    defaults = [_setting_defaults(run.args) for run in runs]
    differing, changed, rest, single = [], [], [], len(runs) == 1
    for name in _union(run.args for run in runs):
        values = [_plain(run.args.get(name)) for run in runs]
        known = [each.get(name) if name not in (*RESOLVED, *PLACES) else None for each in defaults]
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        default = f'<td class="default">{text(" / ".join(_union([value or ""] for value in known)))}</td>'
        if len(set(values)) > 1 and name not in PLACES:
            differing.append(f'<tr class="differs"><th scope="row">{text(name)}</th>{cells}{default}</tr>')
        elif any(usual is not None and value != usual for value, usual in zip(values, known, strict=True)):
            changed.append(f'<tr><th scope="row">{text(name)}</th>{cells}{default}</tr>')
        else:
            rest.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    first = differing + changed
    heads = ["value"] if single else [run.label for run in runs]
    head = "".join(f'<th scope="col">{"" if single else _chip(k)}{text(h)}</th>' for k, h in enumerate(heads))
    full = f'<thead><tr><th scope="col">flag</th>{head}<th scope="col" class="default">default</th></tr></thead>'
    short = f'<thead><tr><th scope="col">setting</th>{head}</tr></thead>'
    shown = "<p>Every flag has its default.</p>"
    if first:
        shown = _table("Changed flags", f"{full}<tbody>{''.join(first)}</tbody>", "flags")
    folded = _table("All other settings", f"{short}<tbody>{''.join(rest)}</tbody>", "flags")
    note = '<p class="note">Marked: where the runs differ.</p>' if differing else ""
    return f"{note}{shown}<details><summary>All the rest, with versions and files</summary>{folded}</details>"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m dno.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="such as output/SD-<date>-<time>")
    place = "default: report.html in the run's folder, or in the common parent of several"
    parser.add_argument("--output", metavar="FILE", help=place)
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.runs, options.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
