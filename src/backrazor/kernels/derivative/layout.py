"""How codes of 2, 4 or 8 bits are stored: element i of a row takes bits [i * bits, (i + 1) * bits) of the row's
little-endian bytes."""

from __future__ import annotations


def code_bytes(n: int, bits: int) -> int:
    """Bytes of a row of n codes."""
    return -(-n * bits // 8)
