"""What `gpu.py` writes of its measurements: the table, the targets, and whether the plans agree."""

import re
import statistics
import time
from functools import cache

import torch
from common import machine, markdown_table, synchronize

from dno.models.specs import resolve_device, resolve_precision

OFFICIAL = "official loop"
# Dense TFLOP/s in bf16 and fp16 of the cards that go by these names; their PCIe and NVL variants are slower.
DENSE_TFLOPS = {
    r"NVIDIA H200": 989,
    r"NVIDIA H100( 80GB HBM3| SXM.*)?": 989,
    r"(NVIDIA )?A100.*": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA GeForce RTX 4090": 165,
    r"NVIDIA GeForce RTX 3090": 71,
}
HEADER = [
    "model, size, plan", "iteration s", "guided call s", "overhead factor", "peak GB allocated", "peak GB reserved",
    "TFLOP per iteration", "TFLOP/s", "share of the card",
]  # fmt: skip


def dense_rate(card, precision):
    """Dense TFLOP/s of a card by name, or None if it is unknown, or for float32."""
    if precision == torch.float32:
        return None
    return next((rate for name, rate in DENSE_TFLOPS.items() if re.fullmatch(name, card)), None)


def table(rows, rate=None):
    """The markdown table of rows as `attempt` gives them; rate: the card's dense TFLOP/s, if it is known."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], row["failed"].replace("|", "/"), *["-"] * (len(HEADER) - 2)])
            continue
        name = row["name"] + (f" ({row['described']})" if row["plan"] == OFFICIAL else "")
        if row["plan"] == "partial":
            name = name.replace("partial", row["described"])
        lines.append([
            name, f"{row['seconds']:.3f}", f"{row['call']:.4f}", f"{row['factor']:.2f}",
            f"{row['peak']:.2f}", "-" if row["reserved"] is None else f"{row['reserved']:.2f}",
            _digits(row["tflop"]), _digits(row["tflops"]), f"{row['tflops'] / rate:.1%}" if rate else "-",
        ])  # fmt: skip
    return markdown_table(HEADER, lines)


def _digits(number):
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def targets(rows):
    """The targets, for 50 steps on an H200, with what was measured of them, as a markdown list."""

    def measured(model, size, *, compiled=False):
        return {
            row["plan"]: row for row in rows
            if (row["model"], row["size"], row["compiled"], row["num_steps"]) == (model, size, compiled, 50)
            and not row["small"] and "failed" not in row and row["plan"] != "skip_unet"
        }  # fmt: skip

    def line(target, value):
        return f"- {target}: {value or 'not measured'}"

    xl = measured("sdxl", 1024)
    leanest = min(xl.values(), key=lambda row: row["peak"], default=None)
    fastest = min(xl.values(), key=lambda row: row["factor"], default=None)
    peak = leanest and leanest["reserved"] is not None and f"{leanest['peak']:.1f} GB ({leanest['described']})"
    lines = [
        line("SDXL, 1024 px, exact gradient of all noises, peak of the plan with the least memory <= 16 GB", peak),
        line("the same, overhead factor with step <= 3.4", xl and "step" in xl and f"{xl['step']['factor']:.2f}"),
        line(
            "the same, overhead factor of the fastest plan that fits 139 GB <= 3.0",
            fastest and f"{fastest['factor']:.2f} ({fastest['described']})",
        ),
    ]
    official = measured("sd15", 512).get(OFFICIAL)
    for compiled, most, what in ((False, 0.5, ""), (True, 0.333, " with compiled blocks")):
        ours = [row for plan, row in measured("sd15", 512, compiled=compiled).items() if plan != OFFICIAL]
        best = min(ours, key=lambda row: row["seconds"], default=None)
        ratio = official and best and f"{best['seconds'] / official['seconds']:.2f} ({best['described']})"
        lines.append(line(f"SD 1.5, 512 px, an iteration{what} / the official loop's work <= {most:g}", ratio))
    return "\n".join(lines)


def agreement(rows):
    """A line per model and size: how far apart the plans' gradient norms at the first iteration are."""
    norms = {}
    for row in rows:
        if "failed" not in row and row["plan"] not in ("skip_unet", OFFICIAL):
            title = row["name"].rsplit(", ", 2 if row["compiled"] else 1)[0]
            norms.setdefault(title, []).append(row["first"]["grad_norm"])
    return "\n".join(
        f"- {title}: {statistics.median(values):.3e}, within {max(values) / min(values) - 1:.1e} ({len(values)} rows)"
        for title, values in norms.items()
        if len(values) > 1
    )


@cache
def matmul_tflops(device, dtype, size=8192):
    """TFLOP/s that this card reaches in one large matrix product of random numbers: its own ceiling."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def report(args, rows):
    """The whole page, in markdown."""
    device, first = resolve_device(args.device), rows[0]
    dtype = resolve_precision(args.precision, device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    rate = dense_rate(card, dtype)
    what = "tiny networks, a test of the benchmark, whose figures say nothing" if args.small else "random weights"
    tuning = f", with {' and '.join(args.tuning)}" if args.tuning else ""
    ceiling = f"The card's dense rate: {f'{rate} TFLOP/s' if rate else 'not known'}"
    if card:
        ceiling += f"; a product of two 8192 x 8192 matrices reaches {matmul_tflops(device, dtype):.0f}"
    return "\n".join([
        f"{time.strftime('%Y-%m-%d')}, {machine(device)}: {what}{tuning}; {first['num_steps']} steps, batch 1, "
        f"{str(dtype).removeprefix('torch.')}, medians of {args.iterations} iterations after a warm-up. {ceiling}.",
        "",
        table(rows, rate),
        "",
        "Peaks have the weights in them; text encoders are left out. "
        + ("" if card else "On a CPU they are the process's resident memory. ")
        + "TFLOP count recomputation as work, and attention by its plain formula.",
        "",
        "Targets, for an H200 and 50 steps:",
        "",
        targets(rows),
        "",
        "The norm of the gradient at the first iteration, which every exact plan should give alike:",
        "",
        agreement(rows) or "- not measured",
        "",
    ])  # fmt: skip
