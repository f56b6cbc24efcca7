"""The memory columns of a run's record: what this process can tell, then a step measured in fresh processes.

A measurement that fails leaves the run as it is: a warning, and ``not_measured`` with the reason in the record.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from typing import Any

import torch

import backrazor as br
from razorlab import schema
from razorlab.errors import one_line
from razorlab.training.costs import build_step, measured_columns, saved_columns, step_shape
from razorlab.training.loop import Trainer
from razorlab.training.monitor import LOGGER
from razorlab.training.network import Network

NOT_MEASURED = "not_measured"  # column: why there is no peak and no time
PENDING = "the run ended before its step was measured; the same command measures it"


def columns_here(network: Network, trainer: Trainer, config: schema.Config) -> dict[str, Any]:
    """Return the columns of one forward in this process; the rest is pending where ``trainer.measure.mode=all``."""
    mode = config["trainer"]["measure"]["mode"]
    if mode == "none":
        return {}
    images, labels = (tensor.to(trainer.device) for tensor in next(iter(trainer.train_loader)))
    try:
        columns = saved_columns(network, process_share(config, trainer.world.size), images, labels)
    except RuntimeError as error:  # a measured batch larger than the one that trains may not fit
        columns = {}
        LOGGER.warning("what a step saves is not measured: %s", one_line(error))
    return columns | ({NOT_MEASURED: PENDING} if mode == "all" else {})


def is_pending(record: Mapping[str, Any]) -> bool:
    """Whether the run of ``record`` is finished but for the measurement."""
    return record["memory"].get(NOT_MEASURED) is not None


def measure_apart(config: schema.Config, record: dict[str, Any], processes: int) -> None:
    """Measure peak and time of a step in fresh processes, and put the columns into ``record``.

    What this process holds of the device's memory is released first, as far as nothing refers to it any more.
    """
    config = process_share(config, processes)
    batch, size = step_shape(config)
    measure = config["trainer"]["measure"]
    release_device_memory()
    LOGGER.info("measuring peak and time of a step (batch %d, %d px) in fresh processes", batch, size)
    factory = functools.partial(build_step, config, record["classes"], batch, size)
    try:
        result = br.memory.measure_step(factory, repeats=measure["repeats"], steps=measure["steps"])
    except RuntimeError as error:
        reason = one_line(RuntimeError(str(error).strip().splitlines()[-1]))
        record["memory"][NOT_MEASURED] = reason
        LOGGER.warning("peak and time of a step are not measured: %s; the record is kept without them", reason)
        return
    record["memory"].pop(NOT_MEASURED, None)
    record["memory"] |= measured_columns(result, rows=1)


def release_device_memory() -> None:
    """Give back what nothing refers to, so that a fresh process finds it free."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def process_share(config: schema.Config, processes: int) -> schema.Config:
    """Return ``config`` with the measured step that of one process, where several share a batch."""
    settings = config["trainer"]
    if processes == 1 or settings["micro_batch"] or settings["measure"]["batch_size"]:
        return config
    measure: schema.Measure = {**settings["measure"], "batch_size": -(-settings["batch_size"] // processes)}
    return {**config, "trainer": {**settings, "measure": measure}}
