"""What the CPU's vector blocks look like to code that must not import Numba."""

from __future__ import annotations

import torch

LANES = 16  # elements of a vector block
# How kernels name types of elements. Neither here nor for other settings are 0 and 1 names: where a setting is known to
# equal a loop's first index, LLVM 20 and 21 put it in the place of that index, and later get the loop's end wrong.
F32, F16, BF16 = 101, 102, 103
KIND = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
