"""The loop that every stage of train.py shares: seeded, resumable, on one or several processes.

The randomness of a step comes from a generator made of (seed, step, rank), so nothing but tensors has to be
saved for a resumed run to equal an uninterrupted one bit for bit.
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def generator(*key):
    """A torch generator whose seed is made of the given non-negative integers, well mixed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def fit(model, loss, steps, optimizers, checkpoint, *, seed=0, stop=None, flat=0.5, warmup=50, ema=0.998,
        rank=0, world=1, save_every=200, log_every=50):  # fmt: skip
    """Minimize `loss(model, step, generator)`; continue from `checkpoint` if that file exists.

    optimizers: their groups' "initial_lr" is the peak of the schedule, which warms up for `warmup` steps,
        stays flat up to the share `flat` of `steps` and falls to zero as a cosine.
    stop: leave before this step, as if interrupted.
    ema: decay of the averaged weights, which are the ones to use; it warms up as (1 + step) / (10 + step).
    rank, world: this process among how many; gradients are averaged over all of them.
    Returns the averaged weights, a state dict.
    """
    average = {name: value.detach().clone().float() for name, value in model.state_dict().items()}
    start, checkpoint = 0, Path(checkpoint)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start, average = saved["step"], saved["average"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    peaks = [group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, began = [], time.perf_counter()
    for step in range(start, steps if stop is None else min(stop, steps)):
        factor = learning_rate(step, steps, flat, warmup)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * factor
        value = loss(model, step, generator(seed, step, rank))
        value.backward()
        if world > 1:
            average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(ema, (1 + step) / (10 + step))
        for name, value_now in model.state_dict().items():
            average[name].lerp_(value_now.float(), 1 - decay)
        losses.append(value.item())
        if rank == 0 and (step + 1) % log_every == 0:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            mean = sum(losses[-log_every:]) / len(losses[-log_every:])
            print(f"{checkpoint.stem} {step + 1}/{steps}  loss {mean:.4f}  {pace:.3f} s a step", flush=True)
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 in (steps, stop)):
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(
                checkpoint,
                {"step": step + 1, "model": model.state_dict(), "average": average, "optimizers": states},
            )
    return average


def save(path, content):
    """torch.save through a temporary file, so that an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def learning_rate(step, steps, flat, warmup):
    """Share of the peak learning rate at `step`: linear warm-up, flat, cosine to zero."""
    down = max(0.0, (step / steps - flat) / (1 - flat))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, down)))


def average_gradients(parameters, world):
    """Replace each gradient by its mean over the processes, sent as one bfloat16 message."""
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients]).div_(world).bfloat16()
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def adamw(parameters, lr, weight_decay=0.01):
    """AdamW with the betas of short runs; its `lr` is remembered as the schedule's peak."""
    groups = [{"params": list(parameters), "initial_lr": lr}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def muon_and_adamw(model, lr, adam_lr=1e-3):
    """Muon for the matrices and convolutions inside the network, AdamW for everything else."""
    inner = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    chosen = {id(p) for p in inner}
    return [Muon(inner, lr), adamw((p for p in model.parameters() if id(p) not in chosen), adam_lr)]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al. 2024).

    A convolution's kernel counts as a matrix (outputs, inputs * height * width). The update's rms is brought
    to 0.2, about AdamW's, so that learning rates carry over (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__([{"params": list(parameters), "initial_lr": lr}], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalize(matrix, steps=5):
    """About U V^T for matrix = U S V^T, by a quintic Newton-Schulz iteration (Jordan et al.'s)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
