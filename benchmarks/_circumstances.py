"""What a number is worth nothing without: command, commit, device, versions, date."""

from __future__ import annotations

import csv
import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def command_line() -> str:
    """The running benchmark as it was called."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def circumstances(command: str) -> dict[str, str]:
    """Columns that every benchmark row carries."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "src"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    return {
        "command": command,
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else ""),
        "date": datetime.date.today().isoformat(),
        "device": _cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def append_rows(path: Path, rows: list[dict], common: dict[str, str]) -> None:
    """Append to a CSV; a file whose columns differ is kept and continued under its own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in (*row, *common)))
    known = path.read_text().splitlines()[0].split(",") if path.exists() and path.stat().st_size else None
    if known is not None and set(columns) - set(known):
        raise ValueError(f"{path} has other columns than these rows: move it away first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, known or columns, restval="")
        if known is None:
            writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
