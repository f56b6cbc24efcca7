"""What the fused LayerNorm can hold."""

from __future__ import annotations

LONGEST_ROW = 4096  # elements: the fused kernels hold a whole row in registers
