"""FSDP2 (``fully_shard``) and activation checkpointing around a razored model, by two processes over gloo."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import backrazor as br

CONFIG = br.RazorConfig(sparsity=0.5)
STEPS, BATCH, WIDTH = 5, 8, 32


class Block(nn.Module):
    """A transformer's MLP block, recomputed in backward where asked for."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        inside = nn.Sequential(self.norm, self.fc1, self.act, self.fc2)
        return x + (checkpoint(inside, x, use_reentrant=False) if self.recompute else inside(x))


def build(recompute: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(recompute) for _ in range(3)), nn.Linear(WIDTH, 10))
    br.razor_(model, CONFIG)
    return model


def losses(model: nn.Module, rank: int = 0, size: int = 1) -> list[float]:
    """Train on this process's rows; returns its share of each step's loss."""
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, 6, WIDTH), torch.randint(10, (BATCH, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(STEPS):
        logits = model(x[rank::size])
        loss = F.cross_entropy(logits.flatten(0, 1), y[rank::size].flatten())
        optimizer.zero_grad()
        loss.backward()
        br.check_finite(model)
        optimizer.step()
        found.append(loss.item() / size)
    return found


def one_of_two(rank: int, port: int, recompute: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = build(recompute)
    mesh = init_device_mesh("cpu", (2,))
    for block in list(model)[:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    (local,) = {p.to_local().numel() / p.numel() for p in model[0].fc1.parameters()}
    assert local == 0.5, "each process holds half"
    torch.save(losses(model, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointed"])
def test_a_razored_model_trains_sharded_as_it_does_whole(tmp_path: Path, recompute: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, recompute, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = losses(build(recompute))
    assert [a + b for a, b in zip(*shares, strict=True)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_sharding_comes_after_razoring() -> None:
    """``fully_shard`` changes the class of what it wraps, and ``razor_`` matches exact classes: the order is fixed."""
    assert type(build(False)[0].fc1) is not nn.Linear
