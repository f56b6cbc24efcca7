"""What the benchmarks time with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def seconds(function: Callable[[], object]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quartiles(samples: Sequence[float]) -> list[float]:
    """The three quartiles; of a single sample, itself."""
    return statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
