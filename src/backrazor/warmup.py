"""Compile the CPU kernels before they are needed, so that no training step waits for it.

    python -m backrazor.warmup                      # all types
    python -m backrazor.warmup --types float32      # only tensors of float32

The machine code is kept in BACKRAZOR_CACHE_DIR, else in ``backrazor`` in XDG_CACHE_HOME or in ~/.cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from .kernels.cpu.layout import KIND
from .kernels.cpu.target import shortcoming

TYPES = {str(dtype).removeprefix("torch."): kind for dtype, kind in KIND.items()}


def entry_points() -> Iterator[tuple]:
    """Of all families that have a CPU version."""
    kernels = Path(__file__).parent / "kernels"
    for file in sorted(kernels.glob("*/cpu.py")):
        yield from import_module(f"backrazor.kernels.{file.parent.name}.cpu").entry_points()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where nothing can be kept."""
    parser = argparse.ArgumentParser(
        prog="python -m backrazor.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="of tensors; default: all")
    kinds = {TYPES[name] for name in parser.parse_args(arguments).types}
    reason = shortcoming()
    if reason is not None:
        print(f"backrazor.warmup: nothing to compile, since {reason}", file=sys.stderr)
        return 2
    from .kernels.cpu.entries import entry_point
    from .kernels.cpu.kept import cache_folder, is_writable

    folder = cache_folder()
    if not is_writable(folder):
        print(f"backrazor.warmup: {folder} is not writable: set BACKRAZOR_CACHE_DIR to a folder", file=sys.stderr)
        return 2
    start = time.perf_counter()
    wanted = [point for point in entry_points() if not point[2] or point[2][0] in kinds]
    for point in wanted:
        entry_point(*point)
    print(f"{len(wanted)} kernels are ready in {folder} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
