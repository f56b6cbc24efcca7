"""The measured peak of a training step, and its time, in fresh processes.

On the CPU the peak is the process's high-water mark during one step less its resident set just before (``meters``),
after full warm-up steps, with weights, gradients and optimizer state in place. Its process runs under an allocator that
returns freed blocks at once (``processes``); time is taken in processes of their own under the default one. On CUDA the
peak is ``torch.cuda.max_memory_allocated`` less what was allocated before the step.
"""

from __future__ import annotations

import gc
import pickle
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .meters import high_water_mark, reset_high_water_mark, resident_bytes
from .predict import weight_bytes
from .processes import FreshProcess, in_fresh_process
from .release import state_bytes

WARM_UP_STEPS = 2


class Step(NamedTuple):
    """A training step: ``forward`` takes nothing and returns the scalar loss of ``model``; ``optimizer`` may be
    None."""

    model: nn.Module
    forward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Measurement:
    """Samples of one configuration; the properties are medians. Bytes and seconds.

    peak_samples: above what is resident. process_samples: the whole process (CPU) or device allocator (CUDA).
        bare_samples: the process before the step was built, interpreter and libraries; empty on CUDA.
        time_samples: (forward, backward, optimizer) seconds of each timed step. reserved_samples: what the allocator
        took from the device, which is what has to fit a card; empty on the CPU. weight_bytes, gradient_bytes,
        optimizer_bytes: what is resident of the step, counted from its tensors after the warm-up; gradients that the
        step releases are 0.
    """

    peak_samples: tuple[int, ...] = ()
    process_samples: tuple[int, ...] = ()
    time_samples: tuple[tuple[float, float, float], ...] = field(default=())
    reserved_samples: tuple[int, ...] = ()
    bare_samples: tuple[int, ...] = ()
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer state and peak."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.peak_bytes

    @property
    def above_bare_bytes(self) -> int:
        """The highest of the process above itself before the step was built: the four parts, the input batch, and what
        libraries load or keep while they run."""
        return round(statistics.median(w - b for w, b in zip(self.process_samples, self.bare_samples, strict=True)))

    @property
    def peak_bytes(self) -> int:
        return round(statistics.median(self.peak_samples))

    @property
    def process_peak_bytes(self) -> int:
        return round(statistics.median(self.process_samples))

    @property
    def reserved_bytes(self) -> int:
        return round(statistics.median(self.reserved_samples))

    @property
    def step_samples(self) -> tuple[float, ...]:
        return tuple(sum(sample) for sample in self.time_samples)

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.step_samples)

    @property
    def forward_seconds(self) -> float:
        return statistics.median(sample[0] for sample in self.time_samples)

    @property
    def backward_seconds(self) -> float:
        return statistics.median(sample[1] for sample in self.time_samples)

    @property
    def optimizer_seconds(self) -> float:
        return statistics.median(sample[2] for sample in self.time_samples)


def measure_step(
    factory: Callable[[], Step],
    repeats: int = 3,
    steps: int = 5,
    what: tuple[str, ...] = ("peak", "time"),
    threads: int | None = None,
) -> Measurement:
    """Measure the training step that ``factory`` builds: ``repeats`` fresh processes for the peak and as many, of
    ``steps`` steps each, for the time.

    ``factory`` must be picklable (a module-level function, or ``functools.partial`` of one) and is called in the fresh
    process.

    Raises:
        RuntimeError: the step failed in its process; the message carries its traceback.
        TypeError: ``factory`` cannot be pickled.
    """
    return measure_steps({"": factory}, repeats, steps, what, threads)[""]


def measure_steps(
    factories: Mapping[str, Callable[[], Step]],
    repeats: int = 3,
    steps: int = 5,
    what: tuple[str, ...] = ("peak", "time"),
    threads: int | None = None,
    turns: str = "step",
) -> dict[str, Measurement]:
    """``measure_step`` for several configurations in turn, A B C A B C ..., so that a drifting machine does not favour
    one of them.

    turns: what takes turns where time is measured. "step": the processes of all configurations stand ready together and
        run one step each, over and over, so that the i-th samples of all were taken within seconds of each other and
        may be compared one by one; memory must hold them all. "process": one process after the other, for a device
        whose memory one configuration may fill.
    """
    unknown = set(what) - {"peak", "time"}
    if turns not in ("step", "process"):
        raise ValueError(f"turns={turns!r}: use 'step' or 'process'")
    if unknown or repeats < 1 or steps < 1:
        raise ValueError(
            f"what={what!r}, repeats={repeats}, steps={steps}: use 'peak' and 'time', and at least one repeat and step"
        )
    for factory in factories.values():
        _check_picklable(factory)
    threads = torch.get_num_threads() if threads is None else threads
    peaks: dict[str, list[_Peak]] = {name: [] for name in factories}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in factories}
    for _ in range(repeats):
        for name, factory in factories.items():
            if "peak" in what:
                peaks[name].append(in_fresh_process(_peak_of, factory, threads, stable_malloc=True))
        if "time" in what:
            together = [factories] if turns == "step" else [{name: factory} for name, factory in factories.items()]
            for group in together:
                for name, samples in _times_in_turns(group, threads, steps).items():
                    times[name].extend(samples)
    return {name: _measurement(peaks[name], times[name]) for name in factories}


class _Peak(NamedTuple):
    """What one process says of its step, bytes: ``reserved`` on CUDA only, ``bare`` on the CPU only."""

    peak: int
    whole: int
    weights: int
    gradients: int
    optimizer: int
    reserved: int | None = None
    bare: int | None = None


def _measurement(peaks: Sequence[_Peak], times: Sequence[tuple[float, float, float]]) -> Measurement:
    weights, gradients, optimizer = peaks[0][2:5] if peaks else (0, 0, 0)  # tensors: the same in every process
    return Measurement(
        tuple(sample.peak for sample in peaks),
        tuple(sample.whole for sample in peaks),
        tuple(times),
        tuple(sample.reserved for sample in peaks if sample.reserved is not None),
        tuple(sample.bare for sample in peaks if sample.bare is not None),
        weights,
        gradients,
        optimizer,
    )


def _check_picklable(factory: Callable[[], Step]) -> None:
    try:
        pickle.dumps(factory)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"the factory cannot be pickled for a fresh process ({error}): use a module-level function or "
            "functools.partial of one"
        ) from error


def _device_of(step: Step) -> torch.device:
    return next((parameter.device for parameter in step.model.parameters()), torch.device("cpu"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(step: Step, device: torch.device) -> tuple[float, float, float]:
    """One step, gradients kept allocated; seconds of forward, backward and optimizer."""
    _synchronize(device)
    marks = [time.perf_counter()]
    loss = step.forward()
    _synchronize(device)
    marks.append(time.perf_counter())
    loss.backward()
    del loss
    _synchronize(device)
    marks.append(time.perf_counter())
    if step.optimizer is not None:
        step.optimizer.step()
    step.model.zero_grad(set_to_none=False)
    _synchronize(device)
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def _times_in_turns(
    factories: Mapping[str, Callable[[], Step]], threads: int, steps: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds of ``steps`` steps of each configuration: one fresh process each, warmed up one after the other, then one
    step each in turn. Whoever waits for its turn sleeps."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in factories}
    with ExitStack() as stack:
        processes = {}
        for name, factory in factories.items():
            processes[name] = stack.enter_context(FreshProcess(_step_on_demand, factory, threads))
            processes[name].receive()  # warmed up
        for _ in range(steps):
            for name, process in processes.items():
                times[name].append(process.ask("step"))
    return times


def _warmed_up(factory: Callable[[], Step], threads: int) -> tuple[Step, torch.device]:
    torch.set_num_threads(threads)
    step = factory()
    device = _device_of(step)
    for _ in range(WARM_UP_STEPS):
        _run(step, device)
    return step, device


def _step_on_demand(connection: Connection, factory: Callable[[], Step], threads: int) -> None:
    step, device = _warmed_up(factory, threads)
    connection.send((True, None))
    with suppress(EOFError, OSError):  # the other end is closed when it has enough
        while connection.recv():
            connection.send((True, _run(step, device)))


def _peak_of(factory: Callable[[], Step], threads: int) -> _Peak:
    """Peak above what is resident, peak of the whole, and what is resident of the step."""
    bare = resident_bytes()
    step, device = _warmed_up(factory, threads)
    gradients = sum(p.grad.nbytes for p in step.model.parameters() if p.grad is not None)
    parts = weight_bytes(step.model), gradients, 0 if step.optimizer is None else state_bytes(step.optimizer)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the warm-up that the step does not use
        torch.cuda.reset_peak_memory_stats(device)
        resident = torch.cuda.memory_allocated(device)
        _run(step, device)
        whole = torch.cuda.max_memory_allocated(device)
        return _Peak(whole - resident, whole, *parts, reserved=torch.cuda.max_memory_reserved(device))
    resident = reset_high_water_mark()
    _run(step, device)
    whole = high_water_mark()
    return _Peak(whole - resident, whole, *parts, bare=bare)
