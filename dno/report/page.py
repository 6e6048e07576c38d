"""Report page of one run, or of several side by side, for any browser: images, curves, numbers, flags.

    python -m dno.report output/SD-20260101-120000
    python -m dno.report output/SD-* output/BestOfN-* --output comparison.html

What is read is args.json, metrics.jsonl and the images of each folder, so a run of any method, one that stopped early,
or one that is still going can be looked at. The page holds all it needs in one file and asks nothing of the network.
"""

import argparse
import html
import json
import re
import sys
from pathlib import Path

from dno.errors import UserError
from dno.report.charts import PALETTE, Curve, chart
from dno.report.flags import common_folder, labels_of, plain, rows_of
from dno.report.pictures import PAGE_BYTES, RUN_BYTES, Pool
from dno.report.reading import elide, read_run, say
from dno.runs.files import write_whole

BAD_INPUT = 2


def write_report(folders, output=None):
    """Write the page of the runs in these folders.

    output: the file; None: report.html in the run's folder, or in the common parent of several, or here without one.
    Returns its path. Raises UserError for a folder that holds no run, or a file that cannot be written.
    """
    folders = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    runs = [read_run(folder) for folder in folders]
    output = (common_folder(folders) or Path.cwd()) / "report.html" if output is None else Path(output).expanduser()
    _write(output, page(runs))
    return output


def _write(path, text):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file with --output") from error


def page(runs):
    """The page of these runs, as HTML."""
    pool, labels = Pool(), labels_of(runs)
    added = [pool.add_run(run, min(RUN_BYTES, PAGE_BYTES / len(runs))) for run in runs]
    values = [_values(run) for run in runs]
    data = {
        "steps": _steps(runs),
        "pool": pool.urls,
        "runs": [
            {
                "steps": run.steps,
                "images": [
                    {"prompt": elide(image.prompt), "best": image.best, "frames": shown, "values": table,
                     "gallery": gallery}
                    for image, shown, gallery, table in zip(run.images, *kept, tables, strict=True)
                ],
            }
            for run, kept, tables in zip(runs, added, values, strict=True)
        ],
    }  # fmt: skip
    blocks = {
        "title": text(_title(runs)),
        "subtitle": text(_subtitle(runs)),
        "kind": "single" if len(runs) == 1 else "several",
        "summary": _summary(runs, labels, values),
        "legend": _legend(labels) if len(runs) > 1 else "",
        "last": str(len(data["steps"]) - 1),
        "cards": "".join(_card(k, *of_run, pool) for k, of_run in enumerate(zip(runs, labels, values, added))),
        "galleries": _galleries(labels, [galleries for _, galleries in added], pool),
        "charts": _charts(runs, labels, values),
        "flags": _flags(runs, labels),
        # "<" never appears, so that no text of a run can end the script element.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: blocks[match[1]], template)


def _steps(runs):
    return sorted({step for run in runs for step in run.steps})


def _metrics(run):
    """{metric: title} of what the run's card shows, in order; only what has a value."""
    names = {"reward": "reward", **{name: name for name in (*run.parts, *run.watched)}, "probability": "P(z)"}
    names |= run.columns
    return {name: title for name, title in names.items() if name == "reward" or run.has(name)}


def _values(run):
    """{metric: a number or None per iteration} for each image."""
    names = [*_metrics(run), "probability_min"]
    return [{name: [_short(value) for value in run.values(name, b)] for name in names} for b in range(len(run.images))]


def _short(value):
    """Seven digits: more than is shown, fewer than would fill the page."""
    return None if value is None else float(f"{value:.7g}")


def text(value):
    """A value as HTML text, or as an attribute in double quotes."""
    return html.escape(elide(value, 10**6))


def _union(lists):
    return list(dict.fromkeys(name for names in lists for name in names))


def _title(runs):
    prompts = _union(run.prompts for run in runs)
    if len(runs) == 1 and prompts[0]:
        return f"“{elide(prompts[0])}”" + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
    if len(prompts) == 1 and prompts[0]:
        return f"“{elide(prompts[0])}”"
    return f"{len(runs)} runs" if len(runs) > 1 else runs[0].title


def _subtitle(runs):
    """What all runs share; of a single run also how it went."""
    count = f"{len(runs)} runs"
    words = [count] if len(runs) > 1 and _title(runs) != count else []
    shared = [("{}", [run.args.get("model") for run in runs]), ("{}", [run.title for run in runs])]
    shared += [(form, [run.args.get(name) for run in runs]) for name, form in
               (("climbs", "reward {}"), ("gamma", "γ {}"), ("lr", "lr {}"), ("seed", "seed {}"))]  # fmt: skip
    for form, values in shared:
        values = _union([plain(value)] for value in values)
        if len(values) == 1 and values[0] != "–":
            words.append(form.format(elide(values[0], 80)))
    if len(runs) == 1:
        run = runs[0]
        words.append(f"{run.iterations} iteration{'s' * (run.iterations != '1')}")
        words += [] if run.seconds is None else [f"{run.seconds:.2f} s per iteration"]
        words += [] if run.peak_memory_gb is None else [f"at most {run.peak_memory_gb:.2f} GB"]
    return " · ".join(words)


def _chip(k):
    return f'<i class="chip{" dashed" * (k // PALETTE % 2)}" style="--c:var(--c{k % PALETTE})"></i>'


def _legend(labels):
    items = "".join(f"<li>{_chip(k)}{text(label.words)}</li>" for k, label in enumerate(labels))
    return f"<ul class=legend>{items}</ul>"


def _summary(runs, labels, values):
    """One row for each image of each run."""
    if len(runs) == 1 and len(runs[0].images) == 1:
        return ""  # its card says all this
    watched = _union(run.watched for run in runs)
    probable, batch = any(run.has("probability") for run in runs), any(len(run.images) > 1 for run in runs)
    heads = ["run"] + ["image"] * batch + ["first reward", "best reward", "at iteration"]
    heads += ["P(z) at best"] * probable + [f"{name}, first → at best" for name in watched]
    heads += ["iterations", "s / iteration", "peak GB"]
    rows = []
    for k, (run, label, tables) in enumerate(zip(runs, labels, values, strict=True)):
        span = f' rowspan="{len(run.images)}"' if len(run.images) > 1 else ""
        head = f'<th scope="row"{span}><a href="#run-{k}">{_chip(k)}{text(label.words)}</a>{_small(label.name)}</th>'
        of_run = (run.iterations, *("–" if v is None else f"{v:.2f}" for v in (run.seconds, run.peak_memory_gb)))
        for b, image in enumerate(run.images):
            prompt = _small(elide(image.prompt, 60)) if len(run.prompts) > 1 else ""
            cells = [head] * (b == 0) + [f"<td>{b}{prompt}</td>"] * batch
            cells += [f"<td>{number}</td>" for number in _numbers(run, image, tables[b], probable, watched)]
            cells += [f"<td{span}>{number}</td>" for number in of_run] * (b == 0)
            rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    return _table("Summary", f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>", "numbers")


def _numbers(run, image, table, probable, watched):
    """The cells of an image in the summary, from "first reward" to the watched rewards."""
    at = run.steps.index(image.best) if image.best is not None else None
    first = {metric: values[0] for metric, values in table.items()}
    best = {metric: values[at] for metric, values in table.items()} if at is not None else {}
    pairs = [(say(first.get(metric)), say(best.get(metric))) for metric in watched]
    return [
        say(first["reward"]), say(best.get("reward")), plain(image.best), *[say(best.get("probability"))] * probable,
        *("–" if pair == ("–", "–") else " → ".join(pair) for pair in pairs),
    ]  # fmt: skip


def _table(label, rows, kind):
    """A table that scrolls sideways in its own box, with the keyboard too."""
    table = f'<table class="{kind}">{rows}</table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{table}</div>'


def _card(k, run, label, values, added, pool):
    """One run: before, at the slider's iteration, best; the numbers of the three. The script fills the middle."""
    image, shown = run.images[0], dict(added[0][0])
    prompt = text(elide(image.prompt))
    columns = (("before", run.steps[0]), ("now", None), ("best", image.best))
    shots = []
    for name, step in columns:
        shot = f'<img alt="{prompt}, {name}"{_source(pool, shown.get(step))}>'
        shots.append(f'<figure class="{name}">{shot}<figcaption>{name}</figcaption></figure>')
    rows = []
    for metric, title in _metrics(run).items():
        cells = ""
        for name, step in columns:
            value = values[0][metric][run.steps.index(step)] if step is not None else None
            cells += f'<td class="{name}">{say(value)}</td>'
        rows.append(f'<tr data-metric="{text(metric)}"><th scope="row">{text(title)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col" class="{name}">{name}</th>' for name, _ in columns)
    table = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    words = f'<p class="prompt">“{prompt}”</p>' if len(run.prompts) > 1 else ""
    return (
        f'<section class="card" id="run-{k}" data-run="{k}"><h2>{_chip(k)}{text(label.words)}{_small(label.name)}</h2>'
        f'{_choice(run)}{words}<div class="shots">{"".join(shots)}</div>'
        f'<table class="numbers">{table}</table></section>'
    )


def _small(words):
    return f"<small>{text(words)}</small>" if words else ""


def _source(pool, place):
    return " hidden" if place is None else f' src="{pool.urls[place]}"'


def _choice(run):
    """Buttons for the images of a batch."""
    if len(run.images) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" data-image="{b}" aria-pressed="{str(b == 0).lower()}" title="{text(image.prompt)}">'
        f'<img alt="">image {b}</button>'
        for b, image in enumerate(run.images)
    )
    return f'<div class="choice" role="group" aria-label="image of the batch">{buttons}</div>'


def _galleries(labels, galleries, pool):
    """The contact sheets, of the chosen image of each run that has any."""
    figures = "".join(
        f'<figure class="gallery" data-run="{k}"><figcaption>{_chip(k)}{text(label.words)}</figcaption>'
        f'<img alt="further images of this run"{_source(pool, places[0])}></figure>'
        for k, (label, places) in enumerate(zip(labels, galleries, strict=True))
        if any(place is not None for place in places)
    )
    return figures and f'<h2 class="heading">Gallery</h2><div class="galleries">{figures}</div>'


def _charts(runs, labels, values):
    steps = _steps(runs)

    def draw(metric, title, note, log=False):
        curves = [
            Curve(k, b, label.words, run.steps, tables[b][metric], image.best)
            for k, (run, label, tables) in enumerate(zip(runs, labels, values, strict=True))
            for b, image in enumerate(run.images)
            if metric in tables[b]
        ]
        if log and len(runs) == 1:  # of several runs it would hide the rest
            lowest = [Curve(0, b, "", runs[0].steps, table["probability_min"], least=True)
                      for b, table in enumerate(values[0])]  # fmt: skip
            curves += lowest
        return chart(metric, title, note, curves, steps, log)

    parts, watched = (_union(getattr(run, names) for run in runs) for names in ("parts", "watched"))
    columns = {name: title for run in reversed(runs) for name, title in run.columns.items()}
    several_methods = len({run.method for run in runs}) > 1

    def of_methods(name):
        return ", ".join(_union([run.title] for run in runs if name in run.columns)) if several_methods else ""

    bound = "; dashed: the least of any single noise" if len(runs) == 1 and runs[0].has("probability_min") else ""
    figures = [
        draw("reward", "Reward", "ring: the best"),
        *(draw(name, name, "part of the reward") for name in parts),
        *(draw(name, name, "not optimized") for name in watched if name not in parts),
        draw("probability", "P(z)", f"1 is typical noise{bound}", log=True),
        *(draw(name, title[:1].upper() + title[1:], of_methods(name)) for name, title in columns.items()),
    ]
    return "".join(figures)


def _flags(runs, labels):
    """The settings that were changed, or in which the runs differ; folded away, all the rest of args.json."""
    differing, changed, rest = rows_of(runs)
    heads = ["value"] if len(runs) == 1 else [label.words for label in labels]
    chips = [""] if len(runs) == 1 else map(_chip, range(len(runs)))
    head = "".join(f'<th scope="col">{chip}{text(words)}</th>' for chip, words in zip(chips, heads, strict=True))
    full = f'<thead><tr><th scope="col">flag</th>{head}<th scope="col" class="default">default</th></tr></thead>'
    short = f'<thead><tr><th scope="col">setting</th>{head}</tr></thead>'

    def line(row, kind="", default=True):
        cells = "".join(f"<td>{text(value)}</td>" for value in row.values)
        cells += f'<td class="default">{text(row.default)}</td>' if default else ""
        return f'<tr{kind}><th scope="row">{text(row.name)}</th>{cells}</tr>'

    first = [line(row, ' class="differs"') for row in differing] + [line(row) for row in changed]
    folded = "".join(line(row, default=False) for row in rest)
    shown = "<p>Every flag has its default.</p>"
    if first:
        shown = _table("Changed flags", f"{full}<tbody>{''.join(first)}</tbody>", "flags")
    folded = _table("All other settings", f"{short}<tbody>{folded}</tbody>", "flags")
    note = '<p class="note">Marked: the runs differ here.</p>' if differing else ""
    return f"{note}{shown}<details><summary>All the rest, with versions and files</summary>{folded}</details>"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m dno report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="such as output/SD-<date>-<time>")
    place = "default: report.html in the run's folder, or in the common parent of several, or here if they have none"
    parser.add_argument("--output", metavar="FILE", help=place)
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.runs, options.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
