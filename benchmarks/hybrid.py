"""The gradient estimators: samples per second on one and two processes, the true gradient's cosine, reward in time.

    python benchmarks/hybrid.py                        # all three; Linux, two idle cores
    python benchmarks/hybrid.py --only speed           # 3 minutes
    python benchmarks/hybrid.py --only cosine --fast   # a rough look

speed    Every rank is a process of one thread on its own core. The first iteration warms up; figures are medians
         of the others. Efficiency is the rate on two ranks over twice the rate on one.
cosine   Cosine between the estimated and the true gradient of rewards that have one, at an unaligned noise. The samples
         of the largest q are drawn once per mu; a smaller q is the mean over disjoint parts of them.
reward   JPEG size against the CPU seconds of one thread, which other jobs on the machine hardly change.

The embedded model on the CPU; markdown tables to standard output, pictures to --pictures.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from common import ROOT, machine, print_table
from hybrid_cosine import CPU, cosine
from hybrid_plots import best_until, plot_rewards

from dno.alignment import align
from dno.methods.estimation import ESTIMATORS
from dno.models.loading import load_model
from dno.task import Loaded
from dno.team import join_team

# --- speed -----------------------------------------------------------------------------------------------------------


def speed(args):
    """Print samples per second of one and two ranks."""
    costs = [{"num_samples": q, "backprop_cost": cost} for q, cost in product(args.q, args.backprop_cost)]
    one = dict(zip(args.q, seconds_per_iteration(1, [{"num_samples": q} for q in args.q], args)))
    two = seconds_per_iteration(2, costs, args)
    print(f"Speed: {args.num_steps} steps, batches of {args.batch_per_device}, {machine(CPU)}, one core per rank\n")
    print_table(
        ["q", "--backprop_cost", "1 rank: s", "samples/s", "2 ranks: s", "samples/s", "efficiency"],
        [speed_row(run["num_samples"], run["backprop_cost"], one[run["num_samples"]], s) for run, s in zip(costs, two)],
    )


def speed_row(q, cost, one, two):
    """A line of the table, from the seconds of an iteration on one and on two ranks."""
    return [
        q, f"{cost:g}", f"{one:.2f}", f"{q / one:.2f}", f"{two:.2f}", f"{q / two:.2f}", f"{one / (2 * two):.2f}",
    ]  # fmt: skip


def seconds_per_iteration(ranks, runs, args):
    """The median of each of the runs, which the same `ranks` processes make one after another."""
    common = {"num_steps": args.num_steps, "batch_per_device": args.batch_per_device, "opt_steps": args.repeats + 1}
    command = [sys.executable, __file__, "--worker", json.dumps([{**common, **run} for run in runs])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    cores, processes = os.sched_getaffinity(0), []
    for rank, core in zip(range(ranks), sorted(cores), strict=False):
        os.sched_setaffinity(0, {core})  # which a child inherits
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment | own, stdout=subprocess.PIPE, text=True))
    os.sched_setaffinity(0, cores)
    try:
        if len(processes) < ranks:
            raise SystemExit(f"{ranks} ranks need a core each; {len(cores)} are available")
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise SystemExit(f"rank {failed[0]} failed")
    return json.loads(outputs[0].splitlines()[-1])


def work(runs):
    """A rank: take part in every run; the first prints the median seconds of each."""
    team, loaded, medians = join_team("cpu", 600), Loaded(), []
    try:
        for run in runs:
            settings = {"estimator": "hybrid", "objective": "jpeg", "device": "cpu", **run}
            result = align("sprites", team=team, loaded=loaded, **settings)
            if team.leads:
                medians.append(statistics.median(metrics["seconds"] for metrics in result.metrics[1:]))
        if team.leads:
            print(json.dumps(medians))
    finally:
        if team.size > 1:
            team.close()


# --- reward ----------------------------------------------------------------------------------------------------------


def reward(args):
    """Print the JPEG size of every estimator after equal CPU seconds, and plot it."""
    model, curves = load_model("sprites", device=CPU), {}
    for estimator, seed in product(ESTIMATORS, args.seeds):
        curves.setdefault(estimator, []).append(reward_curve(model, estimator, seed, args))
        print(f"{estimator}, seed {seed}: {curves[estimator][-1][-1]}", file=sys.stderr, flush=True)
    ends = [curve[-1][0] for each in curves.values() for curve in each]
    times = [args.seconds * part / 4 for part in range(5)]
    print(f"Reward: {args.num_steps} steps, {reward_flags(args)}, {machine(CPU)}; longest run {max(ends):.0f} s\n")
    header = ["estimator", *(f"{t:.0f} s" for t in times), "fall", "judge at the end", "P(z)"]
    rows = []
    for estimator, each in curves.items():
        sizes = [statistics.fmean(best_until(curve, t) for curve in each) for t in times]
        judge, typical = (statistics.fmean(curve[-1][column] for curve in each) for column in (2, 3))
        fall = f"{100 * (1 - sizes[-1] / sizes[0]):.0f} %"
        rows.append([estimator, *(f"{size:.3f}" for size in sizes), fall, f"{judge:.2f}", f"{typical:.2g}"])
    print_table(header, rows)
    plot_rewards(curves, args)


def reward_flags(args):
    return (
        f"q {args.num_samples} in pairs, mu {args.run_mu:g}, spectral steps of {args.lr:g}, gamma {args.gamma:g}, "
        f"seeds {', '.join(map(str, args.seeds))}"
    )


def reward_curve(model, estimator, seed, args):
    """[(CPU seconds, kilobytes, judge, P(z))], one entry per iteration, until the seconds are over."""
    curve, began = [], time.process_time()

    def over(metrics):
        seconds = time.process_time() - began
        curve.append((seconds, -metrics["jpeg"], metrics["judge"], metrics["probability"]))
        return seconds > args.seconds

    align(
        model=model, estimator=estimator, objective="jpeg", evaluate=f"{ROOT}/sprites/judge.py:judge_loss_fn",
        seed=seed, num_steps=args.num_steps, num_samples=args.num_samples, mu=args.run_mu, lr=args.lr,
        precondition="spectral", gamma=args.gamma, batch_per_device=args.batch_per_device, antithetic=True,
        opt_steps=10**6, callback=over,
    )  # fmt: skip
    return curve


# --- the command -----------------------------------------------------------------------------------------------------

PARTS = {"speed": speed, "cosine": cosine, "reward": reward}
FAST = {
    "num_steps": 4, "repeats": 1, "q": [4, 8], "mu": [0.01, 0.1], "shown_mu": 0.01, "shown_q": 8, "seconds": 10,
    "seeds": [0],
}  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="only this part")
    parser.add_argument("--fast", action="store_true", help="few steps, samples and iterations: a check that it runs")
    parser.add_argument("--num_steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--batch_per_device", type=int, default=4)
    parser.add_argument("--q", type=int, nargs="+", help="speed: 32 64; cosine: 4 8 16 32 64 128 256, even, divisors")
    parser.add_argument("--pictures", type=Path, default=Path("."), help="folder for the plots")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    group = parser.add_argument_group("speed")
    group.add_argument("--backprop_cost", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    group.add_argument("--repeats", type=int, default=4, help="iterations that are counted")
    group = parser.add_argument_group("cosine")
    group.add_argument("--mu", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
    group.add_argument("--shown_mu", type=float, default=0.01, help="the mu of the table and plots against q")
    group.add_argument("--shown_q", type=int, default=64, help="the q of the table and plots against mu")
    group.add_argument("--rewards", nargs="+", default=["contrast", "white", "sprites"], help="differentiable ones")
    group = parser.add_argument_group("reward")
    group.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each run")
    group.add_argument("--num_samples", type=int, default=16)
    group.add_argument("--run_mu", type=float, default=0.05)
    group.add_argument("--lr", type=float, default=0.03)
    group.add_argument("--gamma", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", help="cosine: 0; reward: 123 124 125")
    return parser


DEFAULTS = {
    "speed": {"q": [32, 64]},
    "cosine": {"q": [4, 8, 16, 32, 64, 128, 256], "seeds": [0]},
    "reward": {"seeds": [123, 124, 125]},
}


def main(arguments=None):
    args = build_parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    for name in [args.only] if args.only else PARTS:
        given = {key: value for key, value in vars(args).items() if value is not None}
        PARTS[name](SimpleNamespace(**{**DEFAULTS[name], **given, **(FAST if args.fast else {})}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
