"""Primitives on tensors, as ``torch.library`` operators with fake implementations.

A primitive is one folder. ``ops.py`` holds schema, fake implementation and dispatch, ``layout.py`` every constant that
more than one file has to know, ``reference.py`` the definition in plain PyTorch; ``cpu.py`` (Numba) and ``triton.py``
are the fast versions, equal to the definition bit for bit but for those that sum (product, layernorm, softmax). A
primitive sees a sample as a row: (B, n), where row b is sample b in logical order; those that sum see their operands'
shapes. Rows that do not lie contiguously are copied first.

    topk        keep the K largest magnitudes of each sample
    bitmask     one bit per element: the derivative of piecewise-linear functions
    derivative  the quantised derivative of smooth functions
    product     weight gradients straight from what topk packed
    guess       topk of what differs from a guess: a mean per channel or feature
    rowquant    normalised rows quantised with a scale each
    layernorm   LayerNorm that packs its output while it is produced, and its backward from the codes
    softmax     the backward of a softmax between a scale and a dropout
    cpu         what the CPU versions share

The last two primitives exist to save passes over memory on a GPU, where ``fused_norm`` and ``fused_softmax`` say so;
their reference is the arithmetic that PyTorch's own operators do one after another.
"""

from .bitmask.ops import mask_apply, mask_clamp_, mask_encode, mask_scale
from .derivative.ops import level_apply, level_encode
from .guess.ops import guess_pack, guess_unpack
from .layernorm.ops import fused_norm, norm_backward, norm_forward
from .product.layout import Window, conv_fits, linear_fits
from .product.layout import lanes_of_taps as product_lanes
from .product.layout import padded as product_padded
from .product.layout import sums_shape as product_sums_shape
from .product.ops import add_conv_product, add_linear_product, multiplies_packed, product_transposed, sums_masks
from .rowquant.ops import row_decode, row_encode
from .softmax.ops import fused_softmax, softmax_backward
from .topk.layout import INTEGERS, TILE, Stored, index_bytes, stored_dtype
from .topk.ops import topk_pack, topk_unpack, topk_unpack_normalised

__all__ = [
    "INTEGERS",
    "TILE",
    "Stored",
    "Window",
    "add_conv_product",
    "add_linear_product",
    "conv_fits",
    "fused_norm",
    "fused_softmax",
    "guess_pack",
    "guess_unpack",
    "index_bytes",
    "level_apply",
    "level_encode",
    "linear_fits",
    "mask_apply",
    "mask_clamp_",
    "mask_encode",
    "mask_scale",
    "multiplies_packed",
    "norm_backward",
    "norm_forward",
    "product_lanes",
    "product_padded",
    "product_sums_shape",
    "product_transposed",
    "row_decode",
    "row_encode",
    "softmax_backward",
    "stored_dtype",
    "sums_masks",
    "topk_pack",
    "topk_unpack",
    "topk_unpack_normalised",
]
