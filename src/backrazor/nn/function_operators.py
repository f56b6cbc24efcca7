"""Functions of PyTorch by the razored operators: ``RAZORED`` maps each to what takes its place.

A handler is called as ``handler(place, function, *args, **kwargs)``; ``place`` has the rules of the module under the
net that runs, and its status bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..codecs import NormCodec, activation_of, remember_source, standardised
from ..functional.rest import exactly, running


def run_exactly(place: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The function as it is, and what it saves too."""
    with exactly():
        return function(*args, **kwargs)


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


def _product(place: Any, function: Callable, input: Any, other: Any, **named: Any) -> Tensor:
    """That of an activation's output, or with a parameter for a scale; other products are left alone."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or named:
        return function(input, other, **named)
    if input.shape == other.shape:
        gated = activation_of(input) is not None or activation_of(other) is not None
        kept = place.net.rules.gate
        return functional.gated_product(input, other, kept, place.flag(input)) if gated else function(input, other)
    for x, scale in (input, other), (other, input):
        if 0 < scale.dim() <= x.dim() > 1 and _is_parameter(scale) and not _is_parameter(x):
            return functional.channel_scale(x, scale, place.net.rules.pruned, place.flag(x))
    return function(input, other)


def _matmul(place: Any, function: Callable, input: Any, other: Any, **named: Any) -> Tensor:
    """A Linear without a bias that is written as a product with its transposed weight."""
    usual = isinstance(input, Tensor) and not named and _is_parameter(other)
    if not usual or other.dim() != 2 or input.dim() < 2 or input.shape[-1] != other.shape[0]:
        return function(input, other, **named)
    return functional.linear(input, other.t(), None, place.net.rules.pruned, place.flag(input))


def _extreme(largest: bool) -> Callable:
    def handle(place: Any, function: Callable, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
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


def _linear(place: Any, function: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_parameter(weight) or input.dim() < 2:
        return function(input, weight, bias)
    return functional.linear(input, weight, bias, place.net.rules.pruned, place.flag(input))


def _addmm(
    place: Any, function: Callable, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    usual = beta == 1 and alpha == 1 and isinstance(input, Tensor) and input.dim() == 1 and _is_parameter(input)
    if not usual or not _is_parameter(mat2) or mat1.dim() != 2:
        return function(input, mat1, mat2, beta=beta, alpha=alpha)
    return functional.linear(mat1, mat2.t(), input, place.net.rules.pruned, place.flag(mat1))


def _is_parameter(x: Any) -> bool:
    """Whether x is a parameter or a view of one."""
    net = running()
    return isinstance(x, Tensor) and net is not None and net.is_parameter(x)


def _norm_codec(place: Any) -> NormCodec | None:
    """What a norm keeps of its input; None where that stays dense."""
    codec = place.net.rules.norm
    return None if codec.kind == "dense" else codec


def _layer_norm(
    place: Any,
    function: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    codec = _norm_codec(place)
    if codec is None:
        return run_exactly(place, function, input, normalized_shape, weight, bias, eps)
    return functional.layer_norm(input, tuple(normalized_shape), weight, bias, eps, codec, place.flag(input))


def _rms_norm(
    place: Any,
    function: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    codec = _norm_codec(place)
    if codec is None:
        return run_exactly(place, function, input, normalized_shape, weight, eps)
    return functional.rms_norm(input, tuple(normalized_shape), weight, eps, codec, place.flag(input))


def _group_norm(
    place: Any,
    function: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    codec = _norm_codec(place)
    if codec is None:
        return run_exactly(place, function, input, num_groups, weight, bias, eps)
    return functional.group_norm(input, num_groups, weight, bias, eps, codec, place.flag(input))


def _batch_norm(
    place: Any,
    function: Callable,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    codec, arguments = _norm_codec(place), (running_mean, running_var, weight, bias, training, momentum, eps)
    if codec is None or _is_parameter(input):
        out = run_exactly(place, function, input, *arguments)
        if _is_parameter(input) and training and running_mean is None and running_var is None and bias is None:
            remember_source(out, standardised(input, weight, eps))
        return out
    return functional.batch_norm(input, *arguments, codec, place.flag(input))


def _numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """A setting of a convolution as one number per dimension; None for a word."""
    if isinstance(value, int):
        return (value,) * count
    if isinstance(value, str) or not all(isinstance(part, int) for part in value):
        return None
    return tuple(value) * count if len(value) == 1 else tuple(value)


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
        return functional.max_pool(input, *(_numbers(setting, dims) for setting in given), ceil_mode)

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
    sizes = (_numbers(setting, 2) for setting in (kernel_size, stride or kernel_size, padding))
    return functional.avg_pool2d(input, *sizes, ceil_mode, count_include_pad, divisor_override)


def _adaptive_avg_pool2d(place: Any, function: Callable, input: Tensor, output_size: Any) -> Tensor:
    return functional.adaptive_avg_pool2d(input, output_size)


def _convolution(dims: int, transposed: bool) -> Callable:
    def handle(
        place: Any,
        function: Callable,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *settings: Any,
        **named: Any,
    ) -> Tensor:
        order = ("stride", "padding", "output_padding", "groups", "dilation")
        order = order if transposed else ("stride", "padding", "dilation", "groups")
        given = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
        given.update(zip(order, settings, strict=False), **named)
        if given["padding"] == "valid":
            given["padding"] = 0

        def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return function(x, weight, bias, *settings, **named)

        names = ("stride", "padding", "dilation", "output_padding")
        numbers = {name: _numbers(given[name], dims) for name in names}
        usual = isinstance(input, Tensor) and isinstance(weight, Tensor) and input.dim() == dims + 2
        if not usual or None in numbers.values() or weight.is_complex():
            return dense(input, weight, bias)
        spec = functional.ConvNdSpec(
            numbers["stride"],
            numbers["padding"],
            numbers["dilation"],
            transposed,
            numbers["output_padding"],
            given["groups"],
        )
        return functional.conv_nd(input, weight, bias, spec, dense, place.net.rules.pruned, place.flag(input))

    return handle


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
    torch.mul: _product,
    torch.multiply: _product,
    Tensor.mul: _product,
    Tensor.multiply: _product,
    Tensor.__mul__: _product,
    Tensor.__rmul__: _product,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.amax: _extreme(largest=True),
    Tensor.amax: _extreme(largest=True),
    torch.amin: _extreme(largest=False),
    Tensor.amin: _extreme(largest=False),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool(2),
    torch.max_pool2d: _max_pool(2),
    F.max_pool3d: _max_pool(3),
    torch.max_pool3d: _max_pool(3),
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.conv1d: _convolution(1, transposed=False),
    F.conv2d: _convolution(2, transposed=False),
    F.conv3d: _convolution(3, transposed=False),
    F.conv_transpose1d: _convolution(1, transposed=True),
    F.conv_transpose2d: _convolution(2, transposed=True),
    F.conv_transpose3d: _convolution(3, transposed=True),
}
