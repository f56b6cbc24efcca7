"""What is asked of CUDA, and when, on machines without one: torch.cuda's functions are patched."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from transfer.errors import UserError
from transfer.training import distributed
from transfer.training.state import random_state, set_random_state


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Process 1 of 2 on a machine with two GPUs; returns the calls that matter, in order."""
    made: list[tuple] = []
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("set_device", device)))
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append(("destroyed",)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: made.append((backend, options["device_id"]))
    )
    monkeypatch.setattr(distributed.logging.getLogger("transfer"), "level", 0)
    return made


def test_each_process_has_its_gpu_before_the_group_is_there(calls: list[tuple]) -> None:
    with distributed.joined_world("cuda") as world:
        assert world.local_rank == 1
    assert calls == [("set_device", 1), ("nccl", torch.device("cuda", 1)), ("destroyed",)]


def test_on_the_cpu_no_gpu_is_touched(calls: list[tuple]) -> None:
    with distributed.joined_world("cpu"):
        pass
    assert calls == [("gloo", None), ("destroyed",)]


@pytest.mark.parametrize(("count", "words"), [(1, "process 1 of this machine finds 1 GPUs"), (0, "no CUDA device")])
def test_too_few_gpus_end_in_one_line_before_anybody_waits(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=words), distributed.joined_world("cuda"):
        pass
    assert calls == []


def test_saving_the_random_state_makes_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU of a machine that has a GPU."""

    def asked(*_: object) -> None:
        raise AssertionError("a CUDA context would be made")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    monkeypatch.setattr(torch.cuda, "set_rng_state", asked)
    state = random_state()
    assert "cuda" not in state
    set_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})


def test_a_run_on_cuda_saves_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    set_random_state(random_state())
    assert given == [kept]
