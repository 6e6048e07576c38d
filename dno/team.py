"""The processes of one run: what travels between them, and what is said when one of them fails.

Noise, reference image, losses, counts and the sum of the estimate travel, once an iteration and as CPU tensors over
gloo: they are a few megabytes, and there a peer's end is an error that can be explained, not an abort as with NCCL.
"""

import contextlib
import os
import time
from datetime import timedelta

import torch

from dno.errors import UserError

_DTYPES = (torch.float32, torch.float64, torch.int64)


class Team:
    """One process, which is its own leader. `ProcessTeam` is several."""

    rank, size, device = 0, 1, None

    @property
    def leads(self):
        return self.rank == 0

    def send_task(self, noise, images, step):
        """The leader's: have every process estimate the gradient at this noise."""
        images = torch.tensor([step, *images])
        self.broadcast(images)
        self.broadcast(noise)

    def receive_task(self):
        """The others' end of `send_task`: (noise, images, step), or None when the leader has `dismiss`ed them."""
        task = self.broadcast(None).tolist()
        return (self.broadcast(None), task[1:], task[0]) if task else None

    def dismiss(self):
        """The leader's: no more tasks."""
        self.broadcast(torch.tensor([], dtype=torch.int64))

    def broadcast(self, tensor):
        """The leader's tensor, on every process."""
        return tensor

    def sum(self, tensor):
        """The sum over processes; only the leader's is right."""
        return tensor

    def alive(self):
        """Tell the others that this process gets on."""

    def check(self):
        """Raise UserError where another process has failed, or has not been `alive` for too long."""

    def wait_for_all(self):
        """The leader's: until every other process has called `finished`."""

    def finished(self):
        """Tell the leader that this process has done its part."""

    def failed(self, why):
        """Tell the others why this process ends."""

    def cause(self):
        """What another process said when it failed, or None."""

    def close(self):
        """Leave; always to be called, whatever happened."""


class ProcessTeam(Team):
    """The processes that `accelerate launch` or `torchrun` started.

    device: "cpu", or anything else for what accelerate finds; timeout: seconds after which a process counts as stalled.
    """

    def __init__(self, device, timeout):
        import torch.distributed as dist
        from accelerate import Accelerator, InitProcessGroupKwargs
        from torch.distributed.distributed_c10d import _get_default_store

        limit = timedelta(seconds=timeout)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=limit)])
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        found = self.accelerator.device
        self.device = torch.device("cpu") if found.type == "cpu" else found  # not cpu:0
        self.timeout, self.meetings, self.checked, self.signs = timeout, 0, 0.0, {}
        self.dist, self.group = dist, dist.new_group(backend="gloo", timeout=limit)
        self.store = dist.PrefixStore("dno", _get_default_store())

    def broadcast(self, tensor):
        # Shape and type first: gloo sends bytes, and a difference would go unnoticed.
        about = torch.zeros(8, dtype=torch.int64)
        if self.leads:
            tensor = tensor.detach().cpu().contiguous()
            about[: 2 + tensor.dim()] = torch.tensor([tensor.dim(), _DTYPES.index(tensor.dtype), *tensor.shape])
        with self._meeting():
            self.dist.broadcast(about, 0, group=self.group)
        dim, dtype, *shape = about.tolist()
        if not self.leads:
            tensor = torch.empty(shape[:dim], dtype=_DTYPES[dtype])
        with self._meeting():
            self.dist.broadcast(tensor, 0, group=self.group)
        return tensor.to(self.device)

    def sum(self, tensor):
        total = tensor.detach().to("cpu", copy=True).contiguous()
        with self._meeting():
            self.dist.reduce(total, 0, group=self.group)
        return total.to(tensor.device)

    def alive(self):
        self.store.add(f"alive/{self.rank}", 1)

    def finished(self):
        self.store.set(f"finished/{self.rank}", "")

    def check(self):
        now = time.monotonic()
        if now - self.checked < 1:
            return
        self.checked = now
        if cause := self.cause():
            raise UserError(cause)
        for rank in self._unfinished():
            count, since = self.store.add(f"alive/{rank}", 0), self.signs.get(rank, (0, now))[1]
            if count != self.signs.get(rank, (0, now))[0]:
                self.signs[rank] = count, now
            elif count and now - since > self.timeout:  # before its first sign it may be loading, or waiting for a hub
                raise UserError(f"rank {rank} gave no sign of life for {self.timeout:g} seconds (--timeout)")

    def wait_for_all(self):
        while self._unfinished():
            self.check()
            time.sleep(0.05)

    def _unfinished(self):
        others = (rank for rank in range(self.size) if rank != self.rank)
        return [rank for rank in others if not self.store.check([f"finished/{rank}"])]

    def failed(self, why):
        with contextlib.suppress(RuntimeError):
            self.store.set(f"failed/{self.rank}", why)

    def cause(self):
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                if rank != self.rank and self.store.check([f"failed/{rank}"]):
                    return f"rank {rank} failed: {self.store.get(f'failed/{rank}').decode()}"
        return None

    def close(self):
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _meeting(self):
        """Where every process has to come; one that does not is named."""
        self.meetings += 1
        try:
            self.store.set(f"met/{self.rank}", str(self.meetings))
            yield
        except RuntimeError as error:
            raise UserError(self._why_broken(error)) from error

    def _why_broken(self, error):
        patience = time.monotonic() + 2  # what a failing process says may still be on its way
        while not (cause := self.cause()) and time.monotonic() < patience:
            time.sleep(0.05)
        if cause:
            return cause
        missing = []
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                key = f"met/{rank}"
                if rank != self.rank and (not self.store.check([key]) or int(self.store.get(key)) < self.meetings):
                    missing.append(str(rank))
        who = f"rank {', '.join(missing)}" if missing else "another rank"
        if "imed out" in str(error):
            return f"{who} did not answer within {self.timeout:g} seconds (--timeout): stalled, or the limit is too low"
        return f"{who} ended without a word: killed, or out of memory?"


def join_team(device, timeout):
    """The team that `accelerate launch` or `torchrun` speaks of in the environment, or this process alone."""
    return ProcessTeam(device, timeout) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Team()


def shares(num_units, ranks, burden=0):
    """Where each rank's part of `num_units` ends: rank r has units ends[r]..ends[r + 1], ends[0] = 0.

    burden: what rank 0 does in addition, in units. It gets that much less than its even part, the others share the
        rest.
    """
    first = num_units if ranks == 1 else max(0, round((num_units + burden) / ranks - burden))
    rest, others = num_units - first, max(ranks - 1, 1)
    return [0] + [first + rest * r // others for r in range(ranks)]
