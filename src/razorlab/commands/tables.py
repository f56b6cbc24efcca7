"""Make the table and figure of a folder of runs from its records.

python -m razorlab tables outputs/demo --expect demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from razorlab.composition import options
from razorlab.errors import UserError
from razorlab.tables import accuracy_against_peak, caption, load_runs, summarise, to_terminal, wrap, write_tables


def expected_rows(table: str | None) -> list[str]:
    """Return the experiments of one table.

    Raises:
        UserError: there is no such table.
    """
    if table is None:
        return []
    every = options()["experiment"]
    names = [name for name in every if name.startswith(f"{table}/")]
    if not names:
        known = dict.fromkeys(name.partition("/")[0] for name in every)
        raise UserError.value("--expect", table, "|".join(known))
    return names


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of runs; every record.json below it is read")
    parser.add_argument("--expect", metavar="TABLE", help="show a row for each experiment TABLE/...")
    parser.add_argument("--out", type=Path, help="where the files go; default FOLDER/tables")
    given = parser.parse_args(arguments)
    runs = load_runs(given.folder)
    summary = summarise(runs, expected_rows(given.expect))
    out = given.out or given.folder / "tables"
    written = write_tables(summary, runs, out)
    figure = accuracy_against_peak(summary, out / "accuracy_against_peak.png")
    print(to_terminal(summary))
    print(f"\n{wrap(caption(runs))}")
    print(f"\nWritten: {', '.join(str(path) for path in [*written, figure] if path)}")
    return 0
