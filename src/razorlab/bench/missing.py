"""What the step benchmark has not measured yet, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from razorlab.bench.measure import QUANTITIES, Failures, file_of, name_of
from razorlab.bench.rows import Row


def missing_rounds(row: Row, quantity: str, folder: Path, repeats: int) -> list[int]:
    """The rounds, from 1, of which ``folder`` has no measurement by this commit on this device."""
    return [round_ + 1 for round_ in range(repeats) if not file_of(folder, row, quantity, round_).exists()]


def report(rows: Sequence[Row], folder: Path, repeats: int, failed: Failures) -> str:
    """One line for each row and quantity that is missing: backbone, precision, row, quantity, rounds, and the reason
    where it failed."""
    lines = []
    for row in rows:
        for quantity in QUANTITIES:
            rounds = missing_rounds(row, quantity, folder, repeats)
            if not rounds:
                continue
            reasons = [
                f"{failure} failed: {failed[row, failure]}" for failure in QUANTITIES if (row, failure) in failed
            ]
            which = f"round {', '.join(map(str, rounds))} of {repeats}"
            lines.append(f"  {name_of(row)}, {quantity}: {'; '.join([which, *reasons])}")
    if not lines:
        return f"nothing is missing: peak and time of {len(rows)} rows, {repeats} rounds"
    return "\n".join(["missing:", *lines])
