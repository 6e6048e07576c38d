"""claims.md: the size of the run, the verdicts, and for each claim its numbers. Nothing in it is written by hand."""

import math
import os
import textwrap

from claims.figures import draw
from claims.intervals import MISSING
from claims.plan import LR
from claims.section import digits_of, number
from claims.sections_picture import section_b, section_e, section_f
from claims.sections_reward import section_a, section_c, section_d
from dno.runs.files import write_whole

OUTCOMES = ("yes", "undecided", "the reverse")
SECTIONS = (section_a, section_b, section_c, section_d, section_e, section_f)


def write_page(results, path, pictures, command, cores):
    """Write the page and its pictures, claims-a.png and on, into the folder `pictures`.

    command: what makes the page; cores: of the machine that measured. Returns the sections.
    """
    sections = [make(results) for make in SECTIONS]
    parts = [_head(results, command, cores), _summary(sections)]
    for section in sections:
        parts.append(_section(section, results, path, pictures))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n\n".join(parts).encode() + b"\n")
    return sections


def table(header, rows):
    """A markdown table; the first column is text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def counted(claim):
    """`2 yes, 1 undecided, 1 not measured` of a claim's comparisons."""
    found = [MISSING if one is None else one.outcome for one in claim.comparisons]
    return ", ".join(f"{found.count(word)} {word}" for word in (*OUTCOMES, MISSING) if word in found)


def _head(results, command, cores):
    size, (done, planned) = results.size, results.complete()
    dates = sorted(results.dates)
    when = "not yet" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    one, iteration = (results.seconds(name) for name in ("draws", "black"))
    ratio = ""
    if one and iteration:
        ratio = f" Measured: {iteration:.2f} s per iteration, {one:.2f} s per draw, a ratio of {iteration / one:.1f}."
    missing = "" if done == planned else f" `{command}` makes the others and writes this page again."
    text = f"""# The paper's claims on the embedded model

Written by `{command}` from its measurements; nothing in it is written by hand.

**Size.** Model `{size.model}`, {len(size.prompts)} prompts ({", ".join(size.prompts)}) x {size.seeds} seeds,
{size.num_steps} sampling steps, eta 1 unless it says otherwise, {size.iterations} iterations (other lengths are in the
tables), {size.draws} draws for best-of-N. AdamW with step size {LR:g} unless it says otherwise. {done} of {planned}
measurements (one row, one prompt, all seeds) are there, made on {when} in {results.took / 3600:.1f} hours of processes
of one thread each, on a machine with {cores} CPU cores.{missing}

**Cost.** A *denoiser call* is one guided UNet evaluation on one image; the backward pass through a call counts as two
more, so an iteration with the gradient through T steps costs 3 T calls and a draw T. *Seconds* are processor seconds of
one thread for an iteration on a single image, the median of a separate run, times the iterations; the runs themselves
take the seeds of a prompt as one batch, in which each image is optimized as if alone.{ratio}

**Numbers.** A cell is a mean over prompts and seeds with its 95 % interval in brackets: Student's t over the prompts,
the seeds of a prompt averaged first. The bands in the pictures are the same; the verdicts rest on paired differences,
so two bands may overlap where the difference is clear. The *judge* is `sprites/judge.py`'s probability that the picture
shows its prompt; it is never optimized. Intervals are not corrected for the number of comparisons.

**Verdicts.** Each claim is one or more paired differences that it says are above 0. A comparison is
*yes* if its 95 % interval lies above 0, *the reverse* if it lies below, else *undecided*. A claim *holds* if all
its comparisons are yes, *holds partly* if some are, *does not hold here* if none is. Comparisons that were not measured
are left out of the count and listed with it; a row with only some of the prompts counts as not measured."""
    return "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in text.split("\n\n"))


def _summary(sections):
    rows = [
        [f"({section.letter})", claim.statement, f"**{claim.verdict}**", counted(claim)]
        for section in sections
        for claim in section.claims
    ]
    return "## Verdicts\n\n" + table(["", "claim", "verdict", "comparisons"], rows)


def _section(section, results, path, pictures):
    picture = pictures / f"claims-{section.letter}.png"
    parts = [f"## ({section.letter}) {section.title}", textwrap.fill(section.text, 120)]
    if draw(results, section.letter, picture):
        link = os.path.relpath(picture, path.parent).replace(os.sep, "/")
        parts.append(f"![{section.title}]({link})")
    else:
        parts.append("Not measured.")
        return "\n\n".join(parts)
    for caption, header, rows in section.tables:
        parts += [caption] * bool(caption) + [table(header, rows)]
    for claim in section.claims:
        parts.append(f"**{claim.statement}** Verdict: **{claim.verdict}**.")
        rows = [_comparison(one) for one in claim.comparisons if one]
        missing = len(claim.comparisons) - len(rows)
        if rows:
            parts.append(table(["comparison", "mean difference", "95 % interval", "above 0", "prompts"], rows))
        if missing and rows:
            parts.append(f"{missing} of {len(claim.comparisons)} comparisons: not measured.")
    return "\n\n".join(parts)


def _comparison(one):
    digits = digits_of(one.mean)
    bounds = f"{number(one.low, digits)} to {number(one.high, digits)}" if math.isfinite(one.low) else "unknown"
    return [one.label, number(one.mean, digits), bounds, one.outcome, one.prompts]
