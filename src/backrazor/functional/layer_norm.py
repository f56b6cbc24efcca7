"""LayerNorm and GroupNorm that keep their input by the norm rule. Shape legend: B samples, * any inner shape, D
normalised elements, G groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import AffineForm, NormCodec, Packed, load, mark, packed_of, remember_source, save_outputs
from ..codecs.roles import DENSE, label_codes
from ..kernels import fused_norm, norm_backward, norm_forward
from ..kernels.sealed import sealed
from .common import accumulator, added, needs_grad, reshaped, sample_chunks, write
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def layer_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    codec: NormCodec,
    flag: Tensor,
) -> Tensor:
    """``F.layer_norm`` of x (B, *, D...) over its last dimensions ``shape``.

    Keeps the normalised input by ``codec`` and a reciprocal deviation per row. With h the normalised input as kept
    and g the gradient times ``weight``, the gradient of x is rstd * (g - mean(g) - h * mean(g * h)), means over D
    (Ba et al., https://arxiv.org/abs/1607.06450). Under int8 and int4 the output carries a note that layers reading
    it directly may use h * weight + bias instead of packing it again.
    """
    if not needs_grad(x, weight, bias) or codec.kind == "dense" or not has_rows(x, shape):
        return F.layer_norm(x, shape, weight, bias, eps)
    x = _autocast(x)
    out, rstd, *stored = _LayerNorm.run(x, weight, bias, tuple(shape), eps, codec, flag)
    if codec.bits is not None:
        affine = tuple(p for p in (weight, bias) if p is not None)
        form = AffineForm(codec.form(x, rstd.numel()), out.dtype, weight is not None, bias is not None)
        remember_source(out, Packed((*stored, *affine), form))
    return out


def _autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to normalisation: in float32 on CUDA."""
    return x.float() if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x


def has_rows(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x is a batch of rows of this shape."""
    return x.dim() > len(shape) and tuple(x.shape[-len(shape) :]) == tuple(shape)


def _layer_statistics_type(grad: Tensor, weight: Tensor | None) -> torch.dtype:
    """The type in which PyTorch's backward of a LayerNorm reads mean and reciprocal deviation. Its kernels for
    accelerators have them in float32 for 16-bit inputs, that of the CPU as ``_group_statistics_type`` says."""
    if grad.device.type != "cpu" and grad.element_size() == 2:
        return torch.float32
    return _group_statistics_type(grad, weight)


def _group_statistics_type(grad: Tensor, weight: Tensor | None) -> torch.dtype:
    """The same of a GroupNorm, on every device: the parameters' type, the input's where there are none."""
    return grad.dtype if weight is None else weight.dtype


def _affine_sums(sums: list[Tensor | None], parts: list[Tensor | None], whole: bool) -> list[Tensor | None]:
    """The gradients of weight and bias, where they are asked for, with those of a chunk."""
    return [None if part is None else added(total, part, whole) for total, part in zip(sums, parts, strict=True)]


def _like_gradients(
    grad: Tensor, weight: Tensor | None, shape: tuple[int, ...], mask: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Tensors like the gradients of x, weight and bias, the last two of ``shape``, where ``mask`` asks for them."""
    dtype = grad.dtype if weight is None else weight.dtype
    sums = (grad.new_empty(shape, dtype=dtype) if need else None for need in mask[1:])
    return torch.empty_like(grad) if mask[0] else None, *sums


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def _fused_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float, bits: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, rstd with a row's dimensions kept as 1, what is stored) by one kernel that reads x once."""
    row = math.prod(shape)
    out, codes, scales, rstd = norm_forward(x.reshape(-1, row), _flat(weight), _flat(bias), eps, bits)
    stored = label_codes(codes, scales, x.shape[0])
    rstd = rstd.view(*x.shape[: -len(shape)], *(1 for _ in shape))
    return reshaped(out, x.shape), rstd, stored


def _fused_backward(
    grad: Tensor, weight: Tensor | None, rstd: Tensor, packed: Packed, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, where ``mask`` asks for them, by one kernel that reads the codes."""
    codes, scales = (part.view(rstd.numel(), -1) for part in packed.tensors)
    arguments = codes, scales.flatten(), rstd.flatten(), _flat(weight), packed.form.bits
    grad_x, *sums = norm_backward(grad.reshape(-1, packed.form.row), *arguments)
    if weight is not None:
        sums = [total.to(weight.dtype).view(weight.shape) for total in sums]
    return tuple(part if need else None for part, need in zip((reshaped(grad_x, grad.shape), *sums), mask, strict=True))


def _layer_gradient_shapes(
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    packed: Packed,
    shape: tuple[int, ...],
    mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    return _like_gradients(grad, weight, shape, mask)


@sealed(_layer_gradient_shapes)
def _layer_gradients(
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    packed: Packed,
    shape: tuple[int, ...],
    mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    statistics = _layer_statistics_type(grad, weight)
    sums = [accumulator(shape, grad) if need and not len(grad) else None for need in mask[1:]]
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format) if mask[0] else None
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part = grad[start:stop].contiguous()
        normalised = packed.unpack(start, stop, grad.dtype)
        scale = rstd[start:stop]
        # PyTorch's own kernel on the normalised input, whose mean is 0 and deviation 1 by definition
        zero, one = torch.zeros_like(scale, dtype=statistics), torch.ones_like(scale, dtype=statistics)
        part_x, *part_affine = torch.ops.aten.native_layer_norm_backward(
            part, normalised, shape, zero, one, weight, bias, mask
        )
        if mask[0]:
            write(grad_x[start:stop], torch.mul, part_x, scale.to(grad.dtype))
        sums = _affine_sums(sums, part_affine, stop - start == len(grad))
    dtype = grad.dtype if weight is None else weight.dtype
    return grad_x, *(None if total is None else total.to(dtype) for total in sums)


class _LayerNorm(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        codec: NormCodec,
        flag: Tensor,
    ) -> tuple[Tensor, ...]:
        if codec.bits is not None and fused_norm(x, math.prod(shape)):
            out, rstd, stored = _fused_forward(x, weight, bias, shape, eps, codec.bits)
        else:
            out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
            mean, rstd = mean.float(), rstd.float()
            stored = codec.pack(x, mean.flatten(1), rstd.flatten(1), flag).tensors
        return out, mark(rstd, DENSE, "reciprocal deviation"), *stored

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.normalised_shape, _, codec, _ = inputs
        _, rstd, *stored = output
        save_outputs(ctx, output[1:], weight, bias, rstd, packed_of(codec.form(x, rstd.numel()), stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, rstd, packed = load(ctx)
        mask = list(ctx.needs_input_grad[:3])
        if packed.form.bits is not None and fused_norm(grad, packed.form.row):
            return *_fused_backward(grad, weight, rstd, packed, mask), *(None,) * 4
        gradients = _layer_gradients(grad, weight, bias, rstd, packed, ctx.normalised_shape, tuple(mask))
        return *gradients, *(None,) * 4


@one_node
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, codec: NormCodec, flag: Tensor
) -> Tensor:
    """``F.group_norm`` of x (B, C, *); rows are groups, and the gradient is LayerNorm's per group (Wu and He,
    https://arxiv.org/abs/1803.08494)."""
    usual = needs_grad(x, weight, bias) and x.dim() > 1 and x.is_contiguous()
    if not usual or codec.kind == "dense" or x.shape[1] % groups or math.prod(x.shape[1:]) <= groups:
        return F.group_norm(x, groups, weight, bias, eps)
    x = _autocast(x)
    out, *_ = _GroupNorm.run(x, weight, bias, groups, eps, codec, flag)
    return out


def _group_gradient_shapes(
    grad: Tensor, weight: Tensor | None, rstd: Tensor, packed: Packed, groups: int, mask: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return _like_gradients(grad, weight, (grad.shape[1],), mask)


@sealed(_group_gradient_shapes)
def _group_gradients(
    grad: Tensor, weight: Tensor | None, rstd: Tensor, packed: Packed, groups: int, mask: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    channels, positions = grad.shape[1], math.prod(grad.shape[2:])
    statistics = _group_statistics_type(grad, weight)
    sums = [accumulator((channels,), grad) if need and not len(grad) else None for need in mask[1:]]
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format) if mask[0] else None
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part = grad[start:stop].contiguous()
        normalised = packed.unpack(start, stop, grad.dtype)
        scale = rstd[start:stop]
        zero, one = torch.zeros_like(scale, dtype=statistics), torch.ones_like(scale, dtype=statistics)
        part_x, *part_affine = torch.ops.aten.native_group_norm_backward(
            part, normalised, zero, one, weight, stop - start, channels, positions, groups, mask
        )
        if mask[0]:
            rows = part_x.view(stop - start, groups, -1)
            write(grad_x[start:stop].view(rows.shape), torch.mul, rows, scale.to(grad.dtype).unsqueeze(2))
        sums = _affine_sums(sums, part_affine, stop - start == len(grad))
    dtype = grad.dtype if weight is None else weight.dtype
    return grad_x, *(None if total is None else total.to(dtype) for total in sums)


class _GroupNorm(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        codec: NormCodec,
        flag: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, channels = x.shape[:2]
        positions = math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, positions, groups, eps)
        mean, rstd = mean.float(), rstd.float()
        stored = codec.pack(x, mean, rstd, flag).tensors
        return out, mark(rstd, DENSE, "reciprocal deviation"), *stored

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.groups, _, codec, _ = inputs
        _, rstd, *stored = output
        save_outputs(ctx, output[1:], weight, rstd, packed_of(codec.form(x, rstd.numel()), stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rstd, packed = load(ctx)
        mask = tuple(ctx.needs_input_grad[:3])
        return *_group_gradients(grad, weight, rstd, packed, ctx.groups, mask), *(None,) * 4
