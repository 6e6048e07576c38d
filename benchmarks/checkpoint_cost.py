"""What checkpoints cost: seconds to write and read one, and its size, for the noise of each model.

    python benchmarks/checkpoint_cost.py --folder output
    python benchmarks/checkpoint_cost.py --iteration_seconds 6.1      # a share of ten such iterations

The state is what a run of one image keeps: noise, AdamW's two moments, the best noise and the best image. Every save is
fsynced; times are medians of `--repeats` saves to the disk that holds `--folder`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine, print_table

from dno.methods.noise_optimization import NoiseState
from dno.methods.optimizers import make_optimizer
from dno.runs.checkpoints import load_newest, save_checkpoint
from dno.runs.stop_rules import Best

# (T + 1, C, h, w) at the default number of steps; the images are 8 times as wide, of sprites 4 times.
NOISES = {
    "SD 1.5, 512 px": (51, 4, 64, 64), "SDXL, 1024 px": (51, 4, 128, 128), "sprites, 64 px": (26, 4, 16, 16)
}  # fmt: skip


def state(shape):
    """The packed state of a run of one image after one step of AdamW."""
    noise = torch.randn(shape)[:, None]  # (T + 1, 1, C, h, w)
    state = NoiseState(noise, noise[:0], make_optimizer)
    state.images[0].update(torch.randn(shape), max_grad_norm=1.0)
    tensors, values = state.pack()
    scale = 8 if shape[-1] > 16 else 4
    best, _ = Best(0.0, 0, torch.rand(3, scale * shape[-2], scale * shape[-1]), torch.randn(shape)).pack()
    return tensors | best, values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where to write; its disk is what is measured")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--iteration_seconds", type=float, help="of a run, for the share at the default interval")
    args = parser.parse_args()
    rows = []
    for name, shape in NOISES.items():
        tensors, values = state(shape)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            (Path(folder) / "args.json").write_text("{}")
            saves, loads = [], []
            for step in range(1, args.repeats + 1):
                start = time.perf_counter()
                path = save_checkpoint(folder, step, tensors, values)
                saves.append(time.perf_counter() - start)
                start = time.perf_counter()
                load_newest(folder)
                loads.append(time.perf_counter() - start)
            size = path.stat().st_size
        noise = tensors["noise"].nbytes  # the best one's
        save, load = statistics.median(saves), statistics.median(loads)
        row = [name, f"{size / 1e6:.2f} MB", f"{size / noise:.2f}", f"{save:.3f} s", f"{load:.3f} s"]
        rows.append(row + ([f"{save / (10 * args.iteration_seconds):.2%}"] if args.iteration_seconds else []))
    header = ["noise", "on disk", "times the noise", "save", "load"]
    print(machine(torch.device("cpu")))
    print_table(header + (["share of ten iterations"] if args.iteration_seconds else []), rows)


if __name__ == "__main__":
    main()
