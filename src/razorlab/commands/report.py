"""Make one self-contained HTML page from the records of finished runs: tables, figures, circumstances, commands.

python -m razorlab report                            every run below outputs/, to outputs/report.html
python -m razorlab report outputs/demo --out demo.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from razorlab.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="every record.json below is read")
    parser.add_argument("--out", type=Path, help="the page; default FOLDER/report.html")
    options = parser.parse_args(arguments)
    page = options.out or options.folder / "report.html"
    print(f"{write_report(options.folder, page)} runs in {page}")
    return 0
