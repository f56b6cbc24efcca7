"""Measure the step of several finished runs in turn, and write peak and time into their records.

Every figure comes from a fresh process; the runs take turns, so that a slow minute of the machine meets all of them.

    python -m razorlab measure outputs/demo
    python -m razorlab measure outputs/digits --what peak --missing    one by one, those without; may be interrupted
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import backrazor as br
from razorlab.errors import UserError
from razorlab.records import circumstances, find_records, read_record, write_record
from razorlab.tables.collect import row_label
from razorlab.training.costs import build_step, gpu_circumstances, measured_columns, step_shape
from razorlab.training.measuring import NOT_MEASURED

INTERRUPTED = "with --missing the same command goes on"
COLUMN = {"peak": "peak_bytes", "time": "step_seconds"}


def measure(paths: list[Path], repeats: int | None, steps: int | None, what: tuple[str, ...]) -> None:
    """Measure the records at ``paths`` (same batch and image size) and write the columns into each.

    Raises:
        UserError: the records state different batches or image sizes.
    """
    records = {path: read_record(path) for path in paths}
    configs = {path: record["config"] for path, record in records.items()}
    shapes = {step_shape(config) for config in configs.values()}
    if len(shapes) > 1:
        raise UserError(
            f"the runs state different measured steps (batch, pixels): {sorted(shapes)}; set "
            "trainer.measure.batch_size and trainer.measure.image_size alike, or give fewer runs"
        )
    batch, size = shapes.pop()
    factories = {
        str(path): functools.partial(build_step, config, records[path]["classes"], batch, size)
        for path, config in configs.items()
    }
    first = next(iter(configs.values()))["trainer"]["measure"]
    on_cpu = all(record["circumstances"]["device"] == "cpu" for record in records.values())
    results = br.memory.measure_steps(
        factories, repeats or first["repeats"], steps or first["steps"], what, turns="step" if on_cpu else "process"
    )
    for path, record in records.items():
        record["memory"] |= measured_columns(results[str(path)], rows=len(paths))
        record["memory"].pop(NOT_MEASURED, None)
        before = record["circumstances"]
        record["memory"]["circumstances"] = circumstances(
            before["device"], before["threads"], gpu=gpu_circumstances(before["device"])
        )
        write_record(path, record)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of runs; every record.json below it is measured")
    parser.add_argument("--repeats", type=int, help="fresh processes per figure; default as configured")
    parser.add_argument("--steps", type=int, help="timed steps per process; default as configured")
    parser.add_argument("--what", default="peak,time", help="peak, time or both; default %(default)s")
    parser.add_argument(
        "--missing", action="store_true", help="only rows that lack a figure, each written before the next is measured"
    )
    options = parser.parse_args(arguments)
    what = tuple(options.what.split(","))
    if not set(what) <= COLUMN.keys():
        raise UserError.value("--what", options.what, "peak|time|peak,time")
    paths = one_seed_each(find_records(options.folder))
    if options.missing:
        paths = [path for path in paths if any(read_record(path)["memory"].get(COLUMN[w]) is None for w in what)]
    print(
        f"measuring {len(paths)} rows {'one by one' if options.missing else 'in turn'}: "
        + "; ".join(row_label(read_record(path)["config"]) for path in paths),
        file=sys.stderr,
    )
    for group in [[path] for path in paths] if options.missing else [paths]:
        measure(group, options.repeats, options.steps, what)
    return 0


def one_seed_each(paths: list[Path]) -> list[Path]:
    """Return the lowest seed's record of each configuration: memory and time do not depend on the seed."""
    chosen: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: read_record(path)["seed"]):
        chosen.setdefault(path.parent.parent, path)
    return list(chosen.values())
