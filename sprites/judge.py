"""The second judge: a small residual network that names the colour and the thing in a picture.

It shares neither architecture nor seed with the CLIP in sprites/clip and is never offered as an objective,
so an image that was optimized for something else can be asked honestly what it shows.

    judge = load_judge()
    judge_probability(judge, images, ["white duck"])      # (1,), in 0..1
    name(judge, images)                                   # [("white", "duck")]

Images are (B, 3, H, W) in [-1, 1]; another size than 64 x 64 is resized.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from sprites.scenes import COLOURS, SIZE, THINGS

FOLDER = Path(__file__).parent / "judge"


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; the first may reduce the picture by two."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits of the colour (B, 8) and of the thing (B, 8)."""

    def __init__(self, widths=(24, 48, 96, 128), colours=tuple(COLOURS), things=THINGS):
        super().__init__()
        self.config = {"widths": list(widths), "colours": list(colours), "things": list(things)}
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)  # (B, 24, 32, 32)
        self.blocks = nn.Sequential(*(Block(a, b, 2) for a, b in pairwise(widths)))  # (B, 128, 4, 4)
        self.norm = nn.GroupNorm(8, widths[-1])
        self.colour = nn.Linear(2 * widths[-1], len(colours))
        self.thing = nn.Linear(2 * widths[-1], len(things))

    def forward(self, images):
        h = F.silu(self.norm(self.blocks(self.stem(images))))
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)  # (B, 256)
        return self.colour(h), self.thing(h)


def load_judge(folder=FOLDER, device="cpu"):
    """The trained judge, frozen, in eval mode."""
    config = json.loads((Path(folder) / "config.json").read_text())
    judge = Judge(**config)
    judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return judge.to(device).eval().requires_grad_(False)


def log_probabilities(judge, images):
    """Log probability of each colour, (B, 8), and of each thing, (B, 8)."""
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return tuple(logits.log_softmax(1) for logits in judge(images.float()))


def judge_probability(judge, images, prompts):
    """Probability that each image shows its prompt's colour and thing: (B,), in 0..1.

    prompts: B strings, or one for all, of which each contains a colour and a thing that the judge knows.
    """
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    colours, things = zip(*(parse(prompt, judge.config["colours"], judge.config["things"]) for prompt in prompts))
    log_colour, log_thing = log_probabilities(judge, images)
    rows = torch.arange(len(images), device=images.device)
    return (log_colour[rows, list(colours)] + log_thing[rows, list(things)]).exp()


def judge_loss_fn(inference_dtype=None, device=None):
    """The judge in the form of a reward, to be watched: `--evaluate sprites/judge.py:judge_loss_fn`.

    The reward is the probability, in 0..1, that the picture shows its prompt. See `rewards` for the contract.
    """
    judge = load_judge(device=device or "cpu")

    def loss_fn(images, prompts):
        return -judge_probability(judge, images, prompts)

    return loss_fn


# What is optimized for is no judge any more: the scripts refuse it as an objective.
judge_loss_fn.evaluation_only = True


def parse(prompt, colours, things):
    """Indices of the first colour and the first thing named in the prompt."""
    words = prompt.lower().split()
    found = [next((known.index(w) for w in words if w in known), None) for known in (colours, things)]
    if None in found:
        raise ValueError(
            f'the judge got "{prompt}", which needs one colour of {", ".join(colours)} and one thing of '
            f"{', '.join(things)}"
        )
    return found


@torch.no_grad()
def name(judge, images):
    """What the judge sees: a list of (colour, thing), one for each image."""
    colours, things = (logits.argmax(1).tolist() for logits in log_probabilities(judge, images))
    return [(judge.config["colours"][c], judge.config["things"][t]) for c, t in zip(colours, things)]
