"""FSDP2 (``fully_shard``) and activation checkpointing around a razored transformer, by two processes over gloo."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import backrazor as br

CONFIG = br.RazorConfig(sparsity=0.5)
STEPS, BATCH = 5, 8


def build(recompute: bool) -> nn.Module:
    """A transformer of 0.4 M parameters with pruned attention, Linears and norms."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    model.set_grad_checkpointing(recompute)
    br.razor_(model, CONFIG)
    return model


def losses(model: nn.Module, rank: int = 0, size: int = 1) -> list[float]:
    """Train on this process's rows; returns its share of each step's loss."""
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(x[rank::size]), y[rank::size])
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
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    (share,) = {p.to_local().numel() / p.numel() for p in model.blocks[0].mlp.fc1.parameters()}
    assert share == 0.5, "each process holds half"
    torch.save(losses(model, rank, 2), folder / f"{rank}.pt")
    layer = nn.Sequential(nn.Linear(4, 4))
    fully_shard(layer[0], mesh=mesh)
    with pytest.raises(ValueError, match="nothing in Sequential was converted"):
        br.razor_(layer, CONFIG)  # fully_shard changes the class of what it wraps: razor_ comes first
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
