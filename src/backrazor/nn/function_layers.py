"""Functions with a weight or a scale by the razored operators: linear maps, convolutions, norms and products.

A handler is called as ``handler(place, function, *args, **kwargs)``; see ``function_operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functional
from ..codecs import NormCodec, activation_of, remember_source, standardised
from ..functional.rest import exactly, running


def run_exactly(place: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The function as it is, and what it saves too."""
    with exactly():
        return function(*args, **kwargs)


def _is_parameter(x: Any) -> bool:
    """Whether x is a parameter or a view of one."""
    net = running()
    return isinstance(x, Tensor) and net is not None and net.is_parameter(x)


def product(place: Any, function: Callable, input: Any, other: Any, **named: Any) -> Tensor:
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


def matmul(place: Any, function: Callable, input: Any, other: Any = None, **named: Any) -> Tensor:
    """A Linear without a bias that is written as a product with its transposed weight."""
    usual = isinstance(input, Tensor) and not named and _is_parameter(other)
    if not usual or other.dim() != 2 or input.dim() < 2 or input.shape[-1] != other.shape[0]:
        return function(input, *(() if other is None else (other,)), **named)
    return functional.linear(input, other.t(), None, place.net.rules.pruned, place.flag(input))


def linear(place: Any, function: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_parameter(weight) or input.dim() < 2:
        return function(input, weight, bias)
    return functional.linear(input, weight, bias, place.net.rules.pruned, place.flag(input))


def addmm(
    place: Any, function: Callable, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    usual = beta == 1 and alpha == 1 and isinstance(input, Tensor) and input.dim() == 1 and _is_parameter(input)
    if not usual or not _is_parameter(mat2) or mat1.dim() != 2:
        return function(input, mat1, mat2, beta=beta, alpha=alpha)
    return functional.linear(mat1, mat2.t(), input, place.net.rules.pruned, place.flag(mat1))


def _norm_codec(place: Any) -> NormCodec | None:
    """What a norm keeps of its input; None where that stays dense."""
    codec = place.net.rules.norm
    return None if codec.kind == "dense" else codec


def layer_norm(
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


def rms_norm(
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


def group_norm(
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


def batch_norm(
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


def numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """A setting of a convolution as one number per dimension; None for a word."""
    if isinstance(value, int):
        return (value,) * count
    if isinstance(value, str) or not all(isinstance(part, int) for part in value):
        return None
    return tuple(value) * count if len(value) == 1 else tuple(value)


def convolution(dims: int, transposed: bool) -> Callable:
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
        sizes = {name: numbers(given[name], dims) for name in names}
        usual = isinstance(input, Tensor) and isinstance(weight, Tensor) and input.dim() == dims + 2
        if not usual or None in sizes.values() or weight.is_complex():
            return dense(input, weight, bias)
        spec = functional.ConvNdSpec(
            sizes["stride"],
            sizes["padding"],
            sizes["dilation"],
            transposed,
            sizes["output_padding"],
            given["groups"],
        )
        return functional.conv_nd(input, weight, bias, spec, dense, place.net.rules.pruned, place.flag(input))

    return handle
