"""What a run may end in besides its record: a wrong input, a signal, another process's failure."""

import signal
from collections.abc import Sequence


class UserError(ValueError):
    """A wrong setting, file or data set. Its text is one line: the key, the value, what is allowed, what to do.

    ``train.py`` and the scripts print it without a traceback and exit with code 2.
    """

    @classmethod
    def value(cls, key: str, value: object, allowed: str, advice: str = "") -> "UserError":
        """Build the usual line, ``key=value is not allowed: allowed; advice``."""
        tail = f"; {advice}" if advice else ""
        return cls(f"{key}={value} is not allowed: {allowed}{tail}")


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state is saved. The exit code is 128 + the signal's number.

    Not an ``Exception``, so that a sweep stops, too.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.code = 128 + number


class RankLost(RuntimeError):
    """Another process of this job is gone, or has failed and said why."""


def stop_with_reader() -> None:
    """Let a command that only prints end without a word where its reader does, as in ``... | head``."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` of ``texts`` in one line, and how many there are besides."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def one_line(error: BaseException) -> str:
    """Return the text of ``error`` as a single line of printable characters; a file's name may hold any.

    A data worker process hands its exception over with the traceback inside the text; the last line is the message.
    """
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
