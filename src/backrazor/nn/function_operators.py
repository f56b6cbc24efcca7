"""Functions of PyTorch by the razored operators: ``RAZORED`` maps each to what takes its place.

A handler is called as ``handler(place, function, *args, **kwargs)``; ``place`` has the rules of the module under the
net that runs, and its status bits. Those of functions with a weight stand in ``function_layers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..functional.rest import exactly
from . import function_layers as layers
from .function_layers import numbers


def _smooth(place: Any, name: str, plain: Callable[[], Tensor], x: Tensor, inplace: bool = False) -> Tensor:
    word = place.net.rules.activation
    if word == "dense" or not isinstance(x, Tensor) or x.dtype == torch.float64:
        with exactly():
            return plain()
    return functional.smooth(x, name, word, place.flag(x), inplace)


def _gelu(place: Any, function: Callable, input: Tensor, approximate: str = "none") -> Tensor:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    if name is None:
        return function(input, approximate=approximate)
    return _smooth(place, name, lambda: function(input, approximate=approximate), input)


def _silu(place: Any, function: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    return _smooth(place, "silu", lambda: F.silu(input, inplace), input, inplace)


def _hardswish(place: Any, function: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    return _smooth(place, "hardswish", lambda: F.hardswish(input, inplace), input, inplace)


def _relu(place: Any, function: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    return functional.piecewise_linear(input, lambda x: F.relu(x, inplace), 0.0, math.nan, inplace)


def _relu_(place: Any, function: Callable, input: Tensor) -> Tensor:
    return _relu(place, function, input, True)


def _relu6(place: Any, function: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    return functional.piecewise_linear(input, lambda x: F.relu6(x, inplace), 0.0, 6.0, inplace)


def _dropout(
    place: Any, function: Callable, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return functional.dropout(input, p, training, inplace)


def _extreme(largest: bool) -> Callable:
    def handle(
        place: Any, function: Callable, input: Tensor, dim: Any = (), keepdim: bool = False, **named: Any
    ) -> Tensor:
        if named:  # NumPy's names, or a tensor for the output
            given = {"dim": dim, "keepdim": keepdim} if "axis" not in named and "keepdims" not in named else {}
            return layers.run_exactly(place, function, input, **given, **named)
        return functional.extreme(input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim, largest)

    return handle


def _attention(
    place: Any,
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    codec = place.net.rules.attention

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    fits = functional.fits_attention(query, key, value, attn_mask, is_causal, enable_gqa)
    if not fits or codec.rule == "dense":
        with exactly():  # its backward reads inputs and sums that have to agree
            return dense(query, key, value)
    settings = attn_mask, dropout_p, is_causal, scale, codec, place.flag(query)
    return functional.sdpa(query, key, value, *settings, dense=dense)


def _multi_head(place: Any, function: Callable, *args: Any, need_weights: bool = True, **kwargs: Any) -> Any:
    if need_weights:
        return function(*args, need_weights=need_weights, **kwargs)
    with exactly():  # it calls the fused attention where nobody sees it
        return function(*args, need_weights=need_weights, **kwargs)


def _max_pool(dims: int) -> Callable:
    def handle(
        place: Any,
        function: Callable,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            return function(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        given = kernel_size, stride or kernel_size, padding, dilation
        return functional.max_pool(input, *(numbers(setting, dims) for setting in given), ceil_mode)

    return handle


def _avg_pool2d(
    place: Any,
    function: Callable,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    sizes = (numbers(setting, 2) for setting in (kernel_size, stride or kernel_size, padding))
    return functional.avg_pool2d(input, *sizes, ceil_mode, count_include_pad, divisor_override)


def _adaptive_avg_pool2d(place: Any, function: Callable, input: Tensor, output_size: Any) -> Tensor:
    return functional.adaptive_avg_pool2d(input, output_size)


RAZORED: dict[Any, Callable] = {
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    F.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.relu6: _relu6,
    F.dropout: _dropout,
    torch.mul: layers.product,
    torch.multiply: layers.product,
    Tensor.mul: layers.product,
    Tensor.multiply: layers.product,
    Tensor.__mul__: layers.product,
    Tensor.__rmul__: layers.product,
    torch.matmul: layers.matmul,
    torch.mm: layers.matmul,
    Tensor.matmul: layers.matmul,
    Tensor.mm: layers.matmul,
    Tensor.__matmul__: layers.matmul,
    torch.amax: _extreme(largest=True),
    Tensor.amax: _extreme(largest=True),
    torch.amin: _extreme(largest=False),
    Tensor.amin: _extreme(largest=False),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    F.linear: layers.linear,
    torch.addmm: layers.addmm,
    F.layer_norm: layers.layer_norm,
    F.group_norm: layers.group_norm,
    F.rms_norm: layers.rms_norm,
    F.batch_norm: layers.batch_norm,
    F.max_pool2d: _max_pool(2),
    torch.max_pool2d: _max_pool(2),
    F.max_pool3d: _max_pool(3),
    torch.max_pool3d: _max_pool(3),
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.conv1d: layers.convolution(1, transposed=False),
    F.conv2d: layers.convolution(2, transposed=False),
    F.conv3d: layers.convolution(3, transposed=False),
    F.conv_transpose1d: layers.convolution(1, transposed=True),
    F.conv_transpose2d: layers.convolution(2, transposed=True),
    F.conv_transpose3d: layers.convolution(3, transposed=True),
}
