"""Stopping a run by a signal, at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from razorlab.errors import Interrupted

NOTICE = b"\nstopping at the end of this step; Ctrl-C stops at once\n"


class StopSignals:
    """A context in which SIGINT and SIGTERM ask for a stop instead of causing one. A second SIGINT ends the process.

    SIGUSR2 is heeded too where somebody has a handler for it, as submitit has, which SLURM tells so that time is up:
    that handler is called when the context ends. Outside the main thread, where Python allows no handlers, nothing is
    heeded.

    Args:
        announce: say on the terminal that the signal was heard.
    """

    def __init__(self, announce: bool = True) -> None:
        self.announce = announce
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [signal.SIGINT, signal.SIGTERM]
            if callable(signal.getsignal(signal.SIGUSR2)):
                heeded.append(signal.SIGUSR2)
            self.before = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received == signal.SIGUSR2:
            self.before[signal.SIGUSR2](self.received, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.announce:
            os.write(2, NOTICE)  # print is not allowed to be interrupted by itself

    def check(self) -> None:
        """Raise ``Interrupted`` where a stop was asked for."""
        if self.received is not None:
            raise Interrupted(self.received)
