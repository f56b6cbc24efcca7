"""What the CPU's vector blocks look like to code that must not import Numba."""

from __future__ import annotations

LANES = 16  # elements of a vector block
