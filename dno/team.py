"""Several processes as one team: what they exchange, and how the failure of one is reported by the others.

What a method shares (noise, losses, images, sums) travels once per iteration, as CPU tensors over gloo: it is a few
megabytes, and there the end of a peer is an error that can be explained, not an abort as with NCCL.
"""

import contextlib
import os
import time
from datetime import timedelta

import torch

from dno.errors import UserError
from dno.models.specs import resolve_device

_DTYPES = (torch.float32, torch.float64, torch.int64)


class Team:
    """One process, which is its own leader. `ProcessTeam` is several."""

    rank, size, device = 0, 1, None

    @property
    def leads(self):
        return self.rank == 0

    def send_task(self, noise, rows, step):
        """Leader only: have every process do its part of an iteration at this noise, of the images of these indices."""
        self.broadcast(torch.tensor([step, *rows]))
        self.broadcast(noise)

    def receive_task(self):
        """The other end of `send_task`: (noise, rows, step), or None once the leader has called `dismiss`."""
        task = self.broadcast(None).tolist()
        return (self.broadcast(None), task[1:], task[0]) if task else None

    def dismiss(self):
        """Leader only: there are no more tasks."""
        self.broadcast(torch.tensor([], dtype=torch.int64))

    def broadcast(self, tensor):
        """The leader's tensor, on every process."""
        return tensor

    def sum(self, tensor):
        """The sum over processes; only the leader's is right."""
        return tensor

    def alive(self):
        """Tell the others that this process is making progress."""

    def check(self):
        """Raise UserError if another process has failed, or has not been `alive` for too long."""

    def wait_for_all(self):
        """Leader only: wait until every other process has called `finished`."""

    def finished(self):
        """Tell the leader that this process is done."""

    def failed(self, why):
        """Tell the others why this process ends."""

    def cause(self):
        """What another process said when it failed, or None."""

    def close(self):
        """Leave the team; to be called whatever happened."""


class ProcessTeam(Team):
    """The processes that `torchrun` or `accelerate launch` started.

    device: as `--device`; with "auto", ACCELERATE_USE_CPU selects the CPU.
    timeout: seconds after which a process counts as stalled.
    Raises UserError, one line, if the device cannot be used or the processes do not find each other.
    """

    def __init__(self, device, timeout):
        import torch.distributed as dist
        from accelerate import Accelerator, InitProcessGroupKwargs
        from torch.distributed.distributed_c10d import _get_default_store

        size, limit = _launched_processes(), timedelta(seconds=timeout)
        kind, forced = resolve_device(device).type, _cpu_is_forced()
        if forced and device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: ACCELERATE_USE_CPU selects the CPU; unset it, or use --device cpu")
        try:
            self.accelerator = Accelerator(
                cpu=forced or kind == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=limit)]
            )
        except (RuntimeError, ValueError, OSError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"the {size} processes that WORLD_SIZE announces could not be joined at {place} ({why}); start all of "
                "them, on as many devices, or unset WORLD_SIZE to run one"
            ) from error
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        if self.size != size:
            if dist.is_initialized():  # by accelerate, which then leaves it unused
                dist.destroy_process_group()
            raise UserError(
                f"WORLD_SIZE announces {size} processes, but on the device {kind} each of them is alone; use --device "
                "cpu, or start with torchrun or accelerate launch on a machine with several GPUs"
            )
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
        """A step that every process takes together; a process that does not arrive is named."""
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
        # One that was there and ended afterwards is not missing; of two processes it must be the other one.
        others = missing or [str(rank) for rank in range(self.size) if rank != self.rank]
        who = f"rank {', '.join(others)}" if missing or len(others) == 1 else f"one of the ranks {', '.join(others)}"
        if "imed out" in str(error):
            return f"{who} did not answer within {self.timeout:g} seconds; if it is not stalled, raise --timeout"
        return f"{who} exited without reporting a reason (killed or out of memory?)"


def join_team(device, timeout):
    """The team that `torchrun` or `accelerate launch` announces in the environment, else this process alone.

    device, timeout: as in `ProcessTeam`.
    Raises UserError, one line, if the environment is incomplete, or what `ProcessTeam` raises.
    """
    return ProcessTeam(device, timeout) if _launched_processes() > 1 else Team()


def _launched_processes():
    """WORLD_SIZE, 1 if it is not set. Raises UserError where it announces several and the rest is missing."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return 1
    numbers = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    wrong = [f"{name} {value!r}" for name, value in numbers.items() if not value.isdecimal()]
    if not wrong and int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        wrong = [f"RANK {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']}"]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR ''")
    if wrong:
        raise UserError(
            f"WORLD_SIZE is set without all that torchrun or accelerate launch sets with it: got {', '.join(wrong)}; "
            "expected RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT; to run one process, unset WORLD_SIZE"
        )
    return int(numbers["WORLD_SIZE"])


def _cpu_is_forced():
    from accelerate.utils import parse_flag_from_env

    try:
        return parse_flag_from_env("ACCELERATE_USE_CPU")
    except ValueError as error:
        got = os.environ["ACCELERATE_USE_CPU"]
        raise UserError(f"ACCELERATE_USE_CPU is {got!r}; expected true or false") from error


def shares(num_units, ranks, burden=0):
    """Where each rank's part of `num_units` ends: rank r has units ends[r]..ends[r + 1], ends[0] = 0.

    burden: what rank 0 does in addition, in units. It gets that much less than its even part, the others share the
        rest.
    """
    first = num_units if ranks == 1 else max(0, round((num_units + burden) / ranks - burden))
    rest, others = num_units - first, max(ranks - 1, 1)
    return [0] + [first + rest * r // others for r in range(ranks)]
