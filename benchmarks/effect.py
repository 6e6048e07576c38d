"""What the regularizer and the preconditioner do: darkness on the embedded model, with and without them.

  python benchmarks/effect.py                                     # 2 seeds, 101 iterations: 10 minutes on two cores
  python benchmarks/effect.py --seeds 3 4 5 --iterations 41 --lr 0.005

Prints two tables in markdown and writes a picture of the first seed's runs. In the tables each cell is mean brightness
of the image (0 black, 1 white) / the second judge's probability that it shows its prompt / P(z), means over the seeds;
the second table asks what brightness each run had reached when the judge last gave its prompt 0.9 or more.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from common import ROOT, make_task
from PIL import Image, ImageDraw, ImageFont

from dno import load_model
from dno.methods import method_class
from rewards import to_uint8

JUDGE = ROOT / "sprites" / "judge.py"

RUNS = {
    "gamma 0": {},
    "gamma 1": {"gamma": 1.0},
    "gamma 10": {"gamma": 10.0},
    "spectral": {"precondition": "spectral", "lr": 0.02},
}
SHOWN = (0, 5, 10, 20, 40, 70, 100)


def run(model, **settings):
    """One run: brightness, judge's probability and P(z) of each iteration, (N, 3), and images to show, by iteration."""
    rows, shown = [], {}
    with make_task("dno", model, objective="black", evaluate=f"{JUDGE}:judge_loss_fn", **settings) as task:
        method = method_class("dno")(task)
        for step, found in enumerate(method.iterations(method.start())):
            black, judge, p = found.rewards["black"], found.evaluations["judge"], found.metrics["probability"]
            rows.append((0.5 - black.item() / 2, judge.item(), p.item()))
            if step in SHOWN:
                shown[step] = Image.fromarray(to_uint8(found.images)[0])
    return np.array(rows), shown


def picture(rows, path, scale=3):
    """A grid with a labelled row of images per run. rows: by run, images by iteration."""
    tile, left, top = 64 * scale, 110, 26
    names = list(rows)
    page = Image.new("RGB", (left + len(SHOWN) * (tile + 6), top + len(names) * (tile + 6)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for column, step in enumerate(SHOWN):
        pen.text((left + column * (tile + 6) + tile / 2, top / 2), f"iteration {step}", "#222222", font, "mm")
    for row, name in enumerate(names):
        pen.text((8, top + row * (tile + 6) + tile / 2), name, "#222222", font, "lm")
        for column, step in enumerate(SHOWN):
            if step in rows[name]:
                image = rows[name][step].resize((tile, tile), Image.Resampling.LANCZOS)
                page.paste(image, (left + column * (tile + 6), top + row * (tile + 6)))
    page.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="white duck")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--iterations", type=int, default=101)
    parser.add_argument("--lr", type=float, default=0.01, help="of all runs but the spectral one")
    parser.add_argument("--picture", type=Path, default=Path("effect.png"), help="where to write the picture")
    arguments = parser.parse_args()

    model = load_model("sprites")
    curves, images = {}, {}
    for name, settings in RUNS.items():
        settings = {"prompt": arguments.prompt, "lr": arguments.lr, "opt_steps": arguments.iterations, **settings}
        runs = [run(model, seed=seed, **settings) for seed in arguments.seeds]
        curves[name] = np.stack([rows for rows, _ in runs])  # (seeds, N, 3)
        images[name] = runs[0][1]
        print(f"{name} done", flush=True)
    picture(images, arguments.picture)

    steps = [step for step in SHOWN if step < arguments.iterations]
    print(f"\n| iteration | {' | '.join(RUNS)} |\n|{'---|' * (len(RUNS) + 1)}")
    for step in steps:
        cells = []
        for name in RUNS:
            brightness, agreement, p = curves[name][:, step].T
            geometric = math.exp(np.log(np.maximum(p, 1e-30)).mean())
            cells.append(f"{brightness.mean():.3f} / {agreement.mean():.3f} / {geometric:.2g}")
        print(f"| {step} | {' | '.join(cells)} |")

    print("\n| run | darkest with the judge at >= 0.9, each seed | at iteration |\n|---|---|---|")
    for name in RUNS:
        darkest, when = [], []
        for rows in curves[name]:
            good = np.flatnonzero(rows[:, 1] >= 0.9)
            best = good[rows[good, 0].argmin()] if len(good) else None
            darkest.append("never" if best is None else f"{rows[best, 0]:.3f}")
            when.append("-" if best is None else str(best))
        print(f"| {name} | {', '.join(darkest)} | {', '.join(when)} |")


if __name__ == "__main__":
    main()
