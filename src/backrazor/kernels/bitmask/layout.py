"""How one-bit masks are stored: element i of a sample is bit i % 8 of its byte i // 8."""

from __future__ import annotations


def mask_bytes(n: int) -> int:
    """Bytes of a sample of n elements."""
    return -(-n // 8)
