"""Which image comes when, and what augmentation makes of it: functions of the seed, the epoch and the image alone.

Neither the number of data workers, nor the number of processes, nor where a run was cut changes an image of it.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from razorlab.data.build import Items
from razorlab.errors import UserError, one_line

STOPPING_SECONDS = 20  # that a data worker outlives a signal to stop, so that the step it serves can end
MOST_WORKERS = 8
DEAD_WORKER = "DataLoader worker"  # how torch's message about one begins
Key = tuple[int, int]  # epoch, index


class BatchOrder(Sampler[list[Key]]):
    """The batches of one epoch, in an order that depends on the seed and the epoch alone.

    Args:
        length: images in the split.
        batch: images per optimizer step, over all processes.
        seed: the run's.
        rank, size: this process and how many share each batch.
        drop_last: leave what does not fill a batch out of the epoch. A last batch of fewer images than processes is
            left out anyway.

    ``epoch``, and ``first`` and ``last`` (batches, the last exclusive), are set before each pass.
    """

    def __init__(
        self, length: int, batch: int, seed: int, rank: int = 0, size: int = 1, drop_last: bool = True
    ) -> None:
        self.length, self.batch, self.seed, self.rank, self.size = length, batch, seed, rank, size
        whole, rest = divmod(length, batch)
        self.batches = whole if drop_last or rest < size else whole + 1
        self.epoch, self.first, self.last = 0, 0, self.batches

    def __len__(self) -> int:
        return self.batches

    def images(self, number: int) -> int:
        """How many images batch ``number`` of an epoch has, over all processes."""
        return min(self.batch, self.length - number * self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for number in range(self.first, self.last):
            whole = order[number * self.batch : (number + 1) * self.batch]
            yield [(self.epoch, index) for index in whole[self.rank :: self.size]]


class SeededImages(Dataset):
    """``images`` with the random part of their transform drawn from the seed, the epoch and the index.

    Transforms draw from torch's generator, which is handed back as it was.
    """

    def __init__(self, images: Items, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int | Tensor]:
        epoch, index = key
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=7).digest()
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(digest))
        try:
            return self.images[index]
        finally:
            torch.set_rng_state(before)


def train_loader(images: Items, order: BatchOrder, seed: int, **options: Any) -> DataLoader:
    """Return the loader of the training split: uint8 images (N, 3, S, S) and classes (N,).

    Args:
        options: ``num_workers`` and ``pin_memory``.
    """
    return DataLoader(SeededImages(images, seed), batch_sampler=order, **_common(), **options)


def eval_loader(images: Items, batch: int, rank: int, size: int, **options: Any) -> DataLoader:
    """Return the loader of this process's share of a split: every image is in exactly one share."""
    return DataLoader(images, batch, sampler=range(rank, len(images), size), **_common(), **options)


def worker_count(asked: int | None, device: torch.device, processes_here: int) -> int:
    """Return the data workers of this process.

    Args:
        asked: ``trainer.workers``; None is 0 on the CPU, whose cores compute, and on CUDA a share of the cores.
        processes_here: of the job on this machine.
    """
    if asked is not None:
        return asked
    if device.type != "cuda":
        return 0
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes_here - 1))  # one core drives the device


def _common() -> dict[str, Any]:
    # A generator of its own: the loader would draw its workers' seeds from the one that dropout draws from.
    return {"worker_init_fn": outlive_the_signal, "generator": torch.Generator()}


def outlive_the_signal(worker: int) -> None:
    """Let a data worker live on when its whole process group is told to stop: the trainer ends the step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOPPING_SECONDS))


def fetched(loader: DataLoader) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the batches of ``loader``.

    Raises:
        UserError: a file cannot be read, or a data worker died.
    """
    batches = iter(loader)
    try:
        yield from batches
    except RuntimeError as error:
        raise worker_death(error) or error from None
    finally:
        if hasattr(batches, "_shutdown_workers"):  # at the interpreter's end they would be sent the signal they outlive
            batches._shutdown_workers()


def worker_death(error: RuntimeError) -> UserError | None:
    """Return the user's error where torch says that a data worker is gone, which it may do at any point."""
    text = one_line(error)
    if not text.startswith(DEAD_WORKER):
        return None
    return UserError(
        f"a data worker died ({text.split('. ')[0]}): it was killed, or memory ran out; set trainer.workers lower. "
        "The same command goes on from the last checkpoint"
    )
