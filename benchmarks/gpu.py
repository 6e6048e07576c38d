"""Speed and memory of an iteration at full size, for every plan of memory, with random weights.

    python benchmarks/gpu.py --device cuda --compile --official --output gpu.md --json gpu.json
    python benchmarks/gpu.py --models sdxl --sizes 1024 --plans step split
    python benchmarks/gpu.py --small                                # all of it on a CPU, with tiny networks
    python benchmarks/gpu.py --models sd15 --sizes 64 --num_steps 2 # full size on a CPU, a small image

Stable Diffusion 1.5 and SDXL base are built from their published configurations, on the device; nothing is downloaded.
Their weights are random and their text encoders have one layer; time and memory hardly depend on either. An iteration
is that of the scripts: sampling, decoding, the reward `black`, the gradient in every noise, the regularizer (gamma 1),
clipping, AdamW; eta 1, guidance 5, batch 1.

    plan       what is kept for the backward pass                   guided calls per iteration of T steps
    none       every step's graph                                   T forward, T backward
    partial    the graphs of as many steps as fit, k                2T - k forward, T backward
    step       one latent per step                                  2T forward, T backward
    block      the same, and each block is recomputed               3T forward, T backward
    split      the same, and the guidance runs in two halves        3.5T forward, T backward
    skip_unet  the UNet is held constant: not the exact gradient    T forward

    overhead factor = seconds per iteration / (T x seconds of one guided denoiser call without gradient)

FLOPs are those of `torch.utils.flop_counter`: 2 per multiply-add of matrix products, convolutions and attention, the
latter by its plain formula. One guided call (two UNet calls in one batch) and one decoding are counted, forward and
backward, with frozen weights and so without weight gradients, and taken as often as the table above says; the decoder
once forward and once backward, and once more forward where it goes by blocks. So the work that is recomputed counts as
work, and TFLOP/s say how well the card is used, not how useful the work is.

On paper, SDXL at 1024 px: weights are 5.3 GB in bf16. A guided call is 13.5 TFLOP forward and 14.9 backward, 1.10 times
as much, and keeps 10.7 GB; decoding is 10.5 and 11.0 TFLOP and keeps 11 GB, 5.6 of them in its largest block. With step
the factor is 2 + b + 0.03, where b is the time of a call's backward pass over that of its forward pass: 3.4 allows
b = 1.37. In 139 GB some 10 steps keep their graph, and each is worth 0.02: 3.0 allows b = 1.17. The backward pass of
fused attention computes more than the plain formula counts, which makes 1.10 about 1.16, so that is at the edge. The
plan with the least memory needs the weights, the decoder's largest block and a few gradients of 0.5 GB: about 12.5 GB
of 16.

SD 1.5 at 512 px: a guided call is 1.61 and 1.85 TFLOP and keeps 1.6 GB, so that none takes some 83 GB. The official
loop's work is 253 TFLOP of UNet and 131 of decoding, against 178 with none and 258 with step: 0.46 and 0.67 of it,
not counting what float32 weights under autocast cost. On a card that waits for its launches all of this can shift.

`--official`: the work of the official loop, for SD 1.5: float32 weights under autocast, each guided call in
`torch.utils.checkpoint` (not re-entrant, so that the gradient is right), the image decoded after every step and thrown
away, AdamW, clipping. Those decodings are made without a graph here, and no regularizer is computed, the cheaper choice
for it in both.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from common import ARCHITECTURES
from gpu_measure import PLANS, Job, forget, measure
from gpu_page import OFFICIAL, report

from dno.memory import is_out_of_memory
from dno.models.specs import resolve_device

OUT_OF_MEMORY = "out of memory"


def attempt(job, own_process):
    """The row of a job as a dict: its figures, or `failed` and why."""
    failed = None
    try:
        figures = _in_own_process(job) if own_process else measure(job)
    except Exception as error:
        if is_out_of_memory(error):
            failed = OUT_OF_MEMORY
        else:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    # Outside of the except clause, where the error no longer holds the frames and with them the memory.
    if not own_process:
        forget()
    return {**asdict(job), "name": job.name, **({"failed": failed} if failed else figures)}


def _in_own_process(job):
    """What `measure` gives, of a new process: on a CPU, what an allocator once took it may keep."""
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -9:  # the system ends a process that takes too much
        raise MemoryError
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": f"exit code {done.returncode}"}
    if "failed" in answer:
        raise MemoryError if answer["failed"] == OUT_OF_MEMORY else RuntimeError(answer["failed"])
    return answer


def jobs_of(args):
    """The rows of the table in the order in which they are measured, which builds each model as rarely as possible."""
    shared = {
        "num_steps": args.num_steps, "iterations": args.iterations, "device": args.device,
        "precision": args.precision, "small": args.small, "tuning": tuple(args.tuning),
    }  # fmt: skip
    jobs = []
    for model in args.models:
        jobs += [Job(model, size, plan, False, **shared) for size in args.sizes for plan in args.plans]
        if args.compile:
            jobs += [Job(model, size, plan, True, **shared) for size in args.sizes for plan in args.plans]
        if args.official and model == "sd15":
            jobs += [Job(model, size, OFFICIAL, False, **shared) for size in args.sizes]
    return jobs


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--sizes", type=int, nargs="+", help="height and width in pixels; default: 512 1024")
    parser.add_argument("--num_steps", type=int, help="default: 50")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--iterations", type=int, default=3, help="those that are counted (default: 3)")
    parser.add_argument("--compile", action="store_true", help="measure each plan with compiled blocks too")
    parser.add_argument("--official", action="store_true", help="measure the official loop's work too, for sd15")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument(
        "--tuning", nargs="+", default=[], choices=["channels_last", "cudnn_benchmark"],
        help="changes that the project does not make, to see what they would gain",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny networks and images, 3 steps: a test on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the markdown here too, after each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here, after each row")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sizes = args.sizes or ([16, 32] if args.small else [512, 1024])
    args.num_steps = args.num_steps or (3 if args.small else 50)
    return args


def main(argv=None):
    args = parse(argv)
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(attempt(Job(**{**job, "tuning": tuple(job["tuning"])}), own_process=False)))
        return 0
    own_process = resolve_device(args.device).type == "cpu" and not args.small
    rows = []
    for job in jobs_of(args):
        start = time.perf_counter()
        rows.append(attempt(job, own_process))
        outcome = rows[-1].get("failed") or f"{rows[-1]['seconds']:.3f} s per iteration"
        print(f"{job.name}: {outcome} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        if args.output:
            args.output.write_text(report(args, rows))
    print(report(args, rows), flush=True)
    return int(any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


if __name__ == "__main__":
    sys.exit(main())
