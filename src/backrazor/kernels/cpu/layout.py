"""What the CPU's vector blocks look like to code that must not import Numba."""

from __future__ import annotations

import torch

LANES = 16  # elements of a vector block
# How kernels name types of elements.
F32, F16, BF16 = 0, 1, 2
KIND = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
