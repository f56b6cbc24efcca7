"""What a saved tensor is: a label that the ledger reads.

Labels lie beside the tensors, in a dictionary with weak keys: an attribute of a user's tensor would travel with it into
files, copies and other processes.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PRUNED, SCALES, INDEX, MASK, QUANTISED, DENSE = "pruned values", "scales", "index", "mask bits", "quantised", "dense"
MEANS = "means"


_LABELS = WeakTensorKeyDictionary()


def mark(tensor: Tensor, role: str, reason: str = "") -> Tensor:
    """Label ``tensor``; returns it."""
    _LABELS[tensor] = (role, reason)
    return tensor


def role_of(tensor: Tensor) -> tuple[str, str]:
    """(role, reason); a tensor that nobody labelled is dense."""
    return _LABELS.get(tensor, (DENSE, ""))


def label_codes(codes: Tensor, scales: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Codes and scales of all rows as what is stored of a batch: (B, bytes) and (B, rows)."""
    parts = (part.view(batch, part.numel() // max(batch, 1)) for part in (codes, scales))
    return tuple(mark(part, role) for part, role in zip(parts, (QUANTISED, SCALES), strict=True))
