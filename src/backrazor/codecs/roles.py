"""What a saved tensor is: a label that the ledger reads, carried by the tensor itself."""

from __future__ import annotations

from torch import Tensor

PRUNED, SCALES, INDEX, MASK, QUANTISED, DENSE = "pruned values", "scales", "index", "mask bits", "quantised", "dense"


def mark(tensor: Tensor, role: str, reason: str = "") -> Tensor:
    """Label ``tensor``; returns it."""
    tensor._backrazor_role = (role, reason)
    return tensor


def role_of(tensor: Tensor) -> tuple[str, str]:
    """(role, reason); a tensor that nobody labelled is dense."""
    return getattr(tensor, "_backrazor_role", (DENSE, ""))


def label_codes(codes: Tensor, scales: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Codes and scales of all rows as what is stored of a batch: (B, bytes) and (B, rows)."""
    parts = (part.view(batch, part.numel() // max(batch, 1)) for part in (codes, scales))
    return tuple(mark(part, role) for part, role in zip(parts, (QUANTISED, SCALES), strict=True))
