"""The processes of one job: one for each GPU, or several on CPU cores, as ``torchrun`` or submitit starts them.

Who fails first speaks; every other process ends without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from razorlab.errors import Interrupted, RankLost, UserError, one_line

TIMEOUT = timedelta(hours=1)  # for one process that checks a data set while the others wait
BROKEN = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl|socket|timed out", re.IGNORECASE)
LOST = "another process of this job ended before its time; its own message or the launcher's says why"
EXPECTED = (UserError, FloatingPointError, Interrupted, RankLost)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those of the job. Alone, every collective is the identity.

    Args:
        rank: number of the process, from 0.
        local_rank: number on its machine, which is its GPU's.
        size: processes in the job.
        local_size: of them, those on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files, log and progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """Return the sums of ``values`` (n,) over the processes: one read of the device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every process's ``value``, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the main process's ``value``."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def one_at_first(self) -> Iterator[bool]:
        """Let one process of each machine through; the others follow when it is done. Yields whether it is that one."""
        first = self.local_rank == 0
        if not first:
            self.barrier()
        yield first
        if first:
            self.barrier()

    def same_statistics(self, model: nn.Module) -> None:
        """Give every process the main one's running statistics, in place: batch norm updates them by its own share."""
        if self.size > 1:
            for name, buffer in model.named_buffers():
                if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
                    dist.broadcast(buffer, 0)

    def share(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return ``model`` so wrapped that backward averages the gradients over the processes."""
        if self.size == 1:
            return model
        # Buffers stay each process's own: a razored layer's flag tells what that process saw.
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False)


def planned_world() -> World:
    """Return what the environment says of this process, as ``torchrun`` sets it.

    Raises:
        UserError: it is told to be one of several but not all that takes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE={size} is set but {missing[0]} is not: start the job with torchrun")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), size, local_size)


@contextlib.contextmanager
def joined_world(device: str) -> Iterator[World]:
    """A context in which the processes of the job can talk.

    Args:
        device: ``cpu`` (gloo) or ``cuda`` (nccl).

    Raises:
        RankLost: another process is gone, or has failed and said why.
        UserError: there is no GPU for this process.

    An exception that leaves the context carries ``spoken``: whether another process has failed before.
    """
    world = planned_world()
    if world.size == 1:
        yield world
        return
    # Before the group is there: NCCL's object collectives go through the current device, which is 0 for all otherwise.
    gpu = own_gpu(world.local_rank) if device == "cuda" else None
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if gpu is not None else "gloo",
        store=dist.PrefixStore("job", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=gpu,
    )
    ours = dist.PrefixStore("failures", store)
    if not world.main:
        logging.getLogger("razorlab").setLevel(logging.CRITICAL)
    try:
        yield world
    except BaseException as error:
        error = _translated(error)
        with contextlib.suppress(RuntimeError):  # the store is gone with the launcher
            spoken = ours.add("count", 1) > 1
            if spoken and not isinstance(error, EXPECTED):
                error = RankLost(LOST)
            error.spoken = spoken
        raise error from None
    finally:
        dist.destroy_process_group()


def _translated(error: BaseException) -> BaseException:
    """Return ``error``, or what a broken connection means."""
    broken = isinstance(error, dist.DistError) or (type(error) is RuntimeError and BROKEN.search(one_line(error)))
    return RankLost(LOST) if broken else error


def own_gpu(local_rank: int) -> torch.device:
    """Return the GPU of this process, which is the current one from now on.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if not count:
        raise UserError("trainer.device=cuda is not possible: torch sees no CUDA device; choose cpu or auto")
    if local_rank >= count:
        raise UserError(f"process {local_rank} of this machine finds {count} GPUs: start at most that many per machine")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
