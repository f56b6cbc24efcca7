"""The laboratory's one command.

    python -m razorlab train model=efficientnet_lite0 data=digits razor.sparsity=0.9
    python -m razorlab profile model=vit_b16 batch=16
    python -m razorlab COMMAND --help

Installed, it is called ``backrazor``, too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from razorlab.errors import UserError, one_line, stop_with_reader

COMMANDS = {
    "train": "fine-tune a network; what `python train.py` runs",
    "profile": "which layer keeps what for backward; what batch or sparsity fits a budget",
    "measure": "peak and time of finished runs, in turns",
    "tables": "the table and the figure of a folder of runs",
    "report": "one HTML page of finished runs",
    "reproduce": "a table of the paper, or one on embedded data: what it needs, its runs, its table",
    "table3": "memory of every backbone, preset and sparsity",
    "bench": "a training step beside its rivals on every backbone",
    "bench-gpu": "the same on one CUDA device",
    "zoo": "every family of networks: forward, saved bytes, gradient",
}
WRONG_INPUT, INTERRUPTED = 2, 130


def usage() -> str:
    """The text of ``python -m razorlab --help``."""
    lines = (f"  {name:<10} {about}" for name, about in COMMANDS.items())
    return "\n".join(("usage: python -m razorlab COMMAND ...", "", *lines, "", "COMMAND --help tells what each takes."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: what it refuses, and an interrupt, ends in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else WRONG_INPUT
    name, *rest = words
    if name not in COMMANDS:
        print(f"razorlab: {name} is no command: use {'|'.join(COMMANDS)}", file=sys.stderr)
        return WRONG_INPUT
    sys.argv[0] = f"razorlab {name}"  # as argparse names it
    try:
        command = import_module(f"razorlab.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        print(f"razorlab: {error.name} is not installed: pip install 'backrazor[lab]'", file=sys.stderr)
        return WRONG_INPUT
    try:
        return command.main(rest)
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"razorlab {name}: {one_line(error)}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        then = getattr(command, "INTERRUPTED", "the same command goes on with what is missing")
        print(f"razorlab {name}: interrupted; {then}", file=sys.stderr)
        return INTERRUPTED


def console() -> int:
    """The console script."""
    if sys.argv[1:2] == ["profile"]:  # which only prints
        stop_with_reader()
    return main()


if __name__ == "__main__":
    sys.exit(console())
