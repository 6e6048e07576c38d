"""Score images from the command line.

    python -m rewards score --reward aesthetic hps --prompt "white duck" output/*/best.png
    python -m rewards score --reward pick --prompt "white duck" --csv scores.csv runs/
    python -m rewards list

A folder stands for the images in it and below. The score is the reward: higher is better.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import rewards

BAD_INPUT = 2  # exit code, also argparse's
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def main(argv=None):
    args = parse(argv)
    try:
        if args.command == "list":
            list_rewards()
        else:
            score(args)
    except rewards.RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def parse(argv):
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser("python -m rewards", description=about, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the rewards, one line each")
    scoring = commands.add_parser("score", help="score image files and folders")
    scoring.add_argument("--reward", nargs="+", required=True, metavar="REWARD",
                         help=f"one or more of {', '.join(rewards.RFUNCTIONS)}")  # fmt: skip
    scoring.add_argument("--prompt", default="", help="what all the images should show")
    scoring.add_argument("--csv", type=Path, metavar="FILE", help="also write the scores into this file")
    scoring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                         help="(default: %(default)s)")  # fmt: skip
    scoring.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image file or folder")
    rewards.add_arguments(scoring)
    args = parser.parse_args(argv)
    if args.command == "score":
        # Image files right after `--reward a b` are parsed as rewards too: whatever is not a reward is a file.
        args.images = [Path(word) for word in args.reward if word not in rewards.RFUNCTIONS] + args.images
        args.reward = [word for word in args.reward if word in rewards.RFUNCTIONS]
        if not args.reward or not args.images:
            scoring.error(f"expected a reward of {', '.join(rewards.RFUNCTIONS)} and an image")
    return args


def list_rewards():
    for name, factory in rewards.RFUNCTIONS.items():
        summary = (factory.__doc__ or "").partition("\n")[0]
        kind = "" if getattr(factory, "differentiable", True) else " [no gradient]"
        print(f"{name:12} {summary}{kind}")


def score(args):
    """Score every image with every reward; the weights of one reward at a time are in memory."""
    files = find(args.images)
    if args.csv:
        check_writable(args.csv)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise rewards.RewardError(f"--device {args.device}: this torch has no such device; use --device cpu") from error
    rewards.configure_from(args)
    dtype = rewards.PRECISIONS[args.reward_precision]
    table = {file: {} for file in files}
    for name in args.reward:
        loss_fn = rewards.RFUNCTIONS[name](dtype, args.device)
        for file in progress(files, name, shown=any(path.is_dir() for path in args.images)):
            with torch.no_grad():
                loss = loss_fn(read(file).to(args.device), [args.prompt])
            table[file][name] = -float(torch.as_tensor(loss).reshape(-1)[0])
        del loss_fn
    show(table, args.reward)
    if args.csv:
        write_csv(args.csv, table, args.reward, args.prompt)


def find(paths):
    """The image files among `paths` and in the folders among them, sorted within a folder, each once."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*")
                if file.suffix.lower() in SUFFIXES and file.stem != "evolution"  # a run's contact sheet
            )  # fmt: skip
            if not inside:
                raise rewards.RewardError(f"no images in the folder {path}: expected {', '.join(SUFFIXES)}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise rewards.RewardError(
                f"{path} is not an image, a folder or a reward; python -m rewards list shows the rewards"
            )
    return list(dict.fromkeys(files))


def read(file):
    """An image file as a tensor (1, 3, H, W) in [-1, 1]; transparency is dropped."""
    try:
        pixels = np.array(Image.open(file).convert("RGB"), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise rewards.RewardError(f"{file} is not an image that can be read ({error}); leave it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def check_writable(file):
    """Find out before the models load whether the CSV can be written."""
    if file.is_dir() or not file.parent.is_dir():
        raise rewards.RewardError(f"--csv got {file}: expected a file in a folder that exists")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise rewards.RewardError(f"--csv cannot write {file}: permission denied")


def progress(files, name, shown):
    from tqdm import tqdm

    return tqdm(files, desc=name, unit="image", disable=not shown, file=sys.stderr)


def show(table, names):
    """Print the table, with a row of means below more than one image."""
    rows = [(str(file), *(f"{scores[name]:.4f}" for name in names)) for file, scores in table.items()]
    if len(rows) > 1:
        means = (sum(scores[name] for scores in table.values()) / len(table) for name in names)
        rows.append(("mean", *(f"{mean:.4f}" for mean in means)))
    rows.insert(0, ("image", *names))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for file, *scores in rows:
        cells = (score.rjust(width) for score, width in zip(scores, widths[1:]))
        print("  ".join([file.ljust(widths[0]), *cells]))


def write_csv(file, table, names, prompt):
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "prompt", *names])
        writer.writerows([file, prompt, *(scores[name] for name in names)] for file, scores in table.items())


if __name__ == "__main__":
    sys.exit(main())
