"""Running out of memory, on a device or on the host, told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from razorlab.errors import UserError, one_line

_FULL = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_LONGEST = 200  # characters of the allocator's own words
LESS = "lower trainer.batch_size or set trainer.micro_batch, raise razor.sparsity, or choose a smaller network"


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: the allocator's, a library's, Triton's or Python's."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_FULL.search(one_line(error))))


class OutOfMemory(UserError):
    """Memory ran out in the middle of a step, whose half-done work is not to be saved."""


@contextmanager
def fits(what: str, advice: str, good: str, kind: type[UserError] = OutOfMemory) -> Iterator[None]:
    """A context for work that may need more memory than there is.

    Args:
        what: the work, for the message.
        advice: what to do.
        good: what of the run is safe.
        kind: of the error to raise.

    Raises:
        UserError: instead of the error that memory is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        words = one_line(error)
        words = words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."
        raise kind(f"{what}: memory is full ({words or type(error).__name__}); {good}; {advice}") from error
