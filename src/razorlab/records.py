"""One json record per run: configuration, circumstances, accuracies, memory columns, times.

Tables and figures are made from these records alone. No torch here, so that tables need none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from razorlab.errors import UserError
from razorlab.files import atomic_write_text

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "timm", "triton", "numba", "numpy", "hydra-core", "bitsandbytes", "backrazor")
# What a run's result does not depend on: the seed has a folder of its own.
NOT_HASHED = (
    "seed",
    "paths",
    "trainer.resume",
    "trainer.save_every",
    "trainer.keep",
    "trainer.progress",
    "trainer.workers",
    "trainer.measure",
)

if TYPE_CHECKING:
    from razorlab import schema
# Keys that came after the first runs: left out where they change nothing, so that those runs keep their folders.
HASHED_UNLESS = {
    "model.pos_drop_rate": 0.0,
    "model.mlp_drop_rate": 0.0,
    "data.eval_transform": None,
    "data.official_test": "test",
    "data.val_file": None,
    "razor.batch_norm": None,
    "razor.gate": None,
    "trainer.drop_last": True,
    "data.interpolation": "bicubic",
    "trainer.nonfinite": "stop",
    "trainer.channels_last": False,
    "trainer.compile": False,
    "trainer.cuda_graph": False,
    "trainer.release_gradients": False,
    "optim.grad_clip_each": None,
    "optim.state_bits": None,
    "razor.dense": None,
    "razor.forward": "dense",
    "razor.selection": "magnitude",
}
CLASSIFICATION = {
    "name": "classification",
    "output_stride": None,
    "bn_momentum": None,
    "tokens": None,
}  # as every run was before there were tasks
# What two equal runs differ in: dates, machines and clocks.
MEASURED = ("circumstances", "train_step_seconds", "wall_seconds")
MEASURED_MEMORY = (
    *("peak_bytes", "process_peak_bytes", "reserved_bytes", "peak_samples", "time_samples", "circumstances"),
    *("total_bytes", "above_bare_bytes"),
    *("step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "not_measured"),
)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return ten hex digits that two configurations share only if they describe the same run but for the seed."""
    return hashlib.sha256(json.dumps(_hashed(config), sort_keys=True).encode()).hexdigest()[:10]


def _hashed(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for path in NOT_HASHED:
        section, _, key = path.partition(".")
        if key:
            kept.get(section, {}).pop(key, None)
        else:
            kept.pop(section, None)
    if kept.get("task", CLASSIFICATION) == CLASSIFICATION:
        kept.pop("task", None)
    for path, default in HASHED_UNLESS.items():
        section, _, key = path.partition(".")
        if key in kept.get(section, {}) and kept[section][key] == default:
            del kept[section][key]
    return kept


def hashed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a configuration's hash from another's: value by key, ``optim.lr``."""
    kept = _hashed(config)
    return {
        f"{section}.{key}" if key else section: value
        for section, inside in kept.items()
        for key, value in (inside if isinstance(inside, Mapping) else {"": inside}).items()
    }


def task_of(config: schema.Config) -> str:
    """The task that a configuration names; one of before there were others is a classification."""
    return config.get("task", CLASSIFICATION)["name"]


def side_of(config: schema.Config) -> int:
    """Side of an image as it trains, in pixels; of a text its most tokens."""
    tokens = config["task"]["tokens"] if task_of(config) == "text" else None
    return tokens or config["data"]["image_size"]


def run_directory(config: schema.Config, experiment: str | None) -> Path:
    """Return ``outputs/<experiment, or model-data>/<method>-<razor>-<sparsity>/<hash>/<seed>``; makes nothing."""
    top = experiment or f"{config['model']['name']}-{config['data']['name']}"
    row = f"{config['method']['name']}-{config['razor']['name']}-{config['razor']['sparsity']:g}"
    return Path(config["paths"]["outputs"]) / top / row / config_hash(config) / str(config["seed"])


def outcome(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that configuration and seed decide: all but what a clock or the allocator says."""
    kept = {key: value for key, value in record.items() if key not in MEASURED}
    kept["memory"] = {key: value for key, value in record["memory"].items() if key not in MEASURED_MEMORY}
    return kept


def circumstances(
    device: str, threads: int, processes: int = 1, gpu: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a figure of this run depends on besides its configuration.

    Args:
        gpu: what ``razorlab.training.costs.gpu_circumstances`` says of the device; None or empty on the CPU.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "processes": processes,
        **(gpu or {}),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this code, with a plus sign where files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        run: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as json: whole or not at all."""
    atomic_write_text(path, json.dumps({"schema": SCHEMA, **record}, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        UserError: the file is no record of this schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a record ({error}): remove it and run its row again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is no record of schema {SCHEMA}: remove it and run its row again")
    return record


def find_records(folder: Path) -> list[Path]:
    """Return every record.json below ``folder``, sorted.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a folder of runs, such as outputs/demo")
    found = sorted(folder.rglob("record.json"))
    if not found:
        raise UserError(f"{folder} holds no record.json: run `python train.py` first")
    return found
