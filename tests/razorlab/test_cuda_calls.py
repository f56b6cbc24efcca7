"""What is asked of CUDA, and when, on machines without one: torch.cuda's functions are patched."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.distributed as dist

import backrazor as br
from backrazor.memory import peak
from razorlab.errors import UserError
from razorlab.records import circumstances
from razorlab.training import costs, distributed
from razorlab.training.costs import measured_columns
from razorlab.training.state import random_state, set_random_state


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
    monkeypatch.setattr(distributed.logging.getLogger("razorlab"), "level", 0)
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


class Factory:
    """Can be pickled; is never called here."""

    def __call__(self) -> br.memory.Step:
        raise AssertionError


def test_the_peak_on_a_gpu_comes_with_what_the_allocator_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, device = [], torch.device("cuda")
    model = torch.nn.Linear(2, 1)
    step = br.memory.Step(model, lambda: model(torch.ones(1, 2)).sum())
    monkeypatch.setattr(peak, "_warmed_up", lambda factory, threads: (step, device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 700), ("max_memory_reserved", 900)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    found = peak._peak_of(Factory(), 1)
    assert (found.peak, found.whole, found.reserved, found.bare) == (600, 700, 900, None)
    assert calls == ["emptied", "reset"], "blocks of the warm-up are none of the step's"
    monkeypatch.setattr(peak, "in_fresh_process", lambda function, *rest, **_: function(*rest))
    measured = br.memory.measure_step(Factory(), repeats=2, what=("peak",))
    assert measured.reserved_samples == (900, 900)
    assert measured_columns(measured, rows=1)["reserved_bytes"] == 900


def test_a_peak_on_the_cpu_reserves_nothing() -> None:
    assert "reserved_bytes" not in measured_columns(br.memory.Measurement((5,), (7,)), rows=1)


def test_a_record_names_gpu_driver_cudnn_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 of {device}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    done = subprocess.CompletedProcess([], 0, stdout="570.86.15\n570.86.15\n")
    with monkeypatch.context() as patch:
        patch.setattr(costs.subprocess, "run", lambda *_, **__: done)
        told = costs.gpu_circumstances("cuda:1")
    expected = {"gpu": "NVIDIA H100 of cuda:1", "driver": "570.86.15", "cuda": torch.version.cuda, "cudnn": 91002}
    assert told == expected and costs.gpu_circumstances("cpu") == {}
    made = circumstances("cuda:1", 1, gpu=told)
    assert made["driver"] == "570.86.15" and "triton" in made["versions"]


def test_without_the_drivers_tool_the_driver_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(costs.subprocess, "run", absent)
    assert costs.driver_version() is None


def test_a_run_on_cuda_saves_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    set_random_state(random_state())
    assert given == [kept]
