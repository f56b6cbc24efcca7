"""Convolution, frozen BatchNorm and activation as one operator, a few samples at a time.

Separately, each of the three makes a full tensor in forward and another in backward, and the convolution library makes
a hidden copy in its own layout of input and output. Here one output is allocated in forward and one input gradient in
backward; all else has the size of a chunk and stays in the cache. The forward of a chunk is the three dense operators
themselves.

Shape legend: B samples, C/D input/output channels, H/W height/width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import (
    NOTHING,
    Bits,
    Form,
    Packed,
    Pruned,
    Use,
    load,
    pack_shared,
    packed_of,
    remember_activation,
    save_outputs,
    times,
)
from ..kernels import mask_scale
from ..kernels.dispatch import on_cuda
from ..kernels.sealed import sealed
from .common import added, autocast_dtype, cast_to, needs_grad
from .conv import ConvSpec, backward_in_chunks, explicit, forward_chunks, forward_of_chunk, gradient_shapes
from .epilogue import (
    Epilogue,
    activate_,
    code_shape,
    encode,
    encode_and_activate_,
    joined,
    packed_epilogue,
    rounds_by_place,
)
from .recipes import ConvRecipe, remember_recipe
from .transforms import RazorFunction, differentiable_once, is_wrapped


class Norm(NamedTuple):
    """A BatchNorm on running statistics; none of its tensors requires a gradient."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ConvSpec,
    norm: Norm,
    act: Epilogue | None,
    codec: Pruned,
    flag: Tensor,
) -> Tensor:
    """act(batch_norm(conv2d(x))) of contiguous x (B, C, H, W), equal to the three operators: on the CPU bit for bit,
    on CUDA to rounding where it runs in chunks.

    Keeps x pruned and the activation's bits. Gradients: of x exact, of the weight at x_hat = unpack(pack(x)).
    """
    keeps = needs_grad(x, weight, bias) and x.shape[1] == weight.shape[1] * spec.groups
    cast = autocast_dtype(x)
    packed = pack_shared(x, codec, Use.of(weight), flag).arguments if keeps and weight.requires_grad else NOTHING
    (x,) = cast_to(cast, x)
    return _run(x, weight, bias, spec, norm, act, keeps, cast, packed)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ConvSpec,
    norm: Norm,
    act: Epilogue | None,
    keeps: bool,
    cast: torch.dtype | None,
    packed: tuple,
) -> Tensor:
    out, *codes = _ConvNormAct.run(x, weight, bias, spec, *norm, act, keeps, cast, *packed)
    if act is not None:
        remember_activation(out, packed_epilogue(codes[0], out.shape, act) if codes else None)
    return out


def normalised_convolution(recipe: ConvRecipe, norm: Norm) -> Tensor | None:
    """Convolution and norm of what made a convolution's output; None where they do not run as one."""
    channels, statistics = recipe.weight.shape[0], (t for t in norm[:4] if t is not None)
    fits = all(t.numel() == channels and t.device == recipe.weight.device for t in statistics)
    if recipe.norm is not None or not fits or not recipe.x.is_contiguous():
        return None
    out = _of_recipe(recipe._replace(norm=norm), None)
    remember_recipe(out, recipe._replace(norm=norm))
    return out


def activated_convolution(recipe: ConvRecipe, act: Epilogue) -> Tensor | None:
    """All three of what made a norm's output; None where there is none."""
    return None if recipe.norm is None else _of_recipe(recipe, act)


def _of_recipe(recipe: ConvRecipe, act: Epilogue | None) -> Tensor:
    x, weight, bias, spec, cast, packed, norm = recipe
    return _run(x, weight, bias, spec, norm, act, True, cast, packed)


def _normalise(y: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _normalise_into(y: Tensor, norm: Norm, out: Tensor) -> None:
    """``_normalise`` into ``out``; without a copy where PyTorch runs an operator that can (it goes by the layout of y
    alone, which is channels_last where the weight lies so)."""
    plain = y.is_contiguous() and out.is_contiguous()
    if on_cuda(y.device) or y.device.type != "cpu" or y.dtype != norm.running_mean.dtype or not plain:
        out.copy_(_normalise(y, norm))
        return
    unused = y.new_empty(0), y.new_empty(0)  # statistics of the batch
    torch.native_batch_norm(
        y, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps, out=(out, *unused)
    )


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, norm: Norm, act: Epilogue | None, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    out = forward_of_chunk(x, weight, bias, spec)
    return out, x.new_empty(code_shape(out.shape, act), dtype=torch.uint8) if act is not None and keeps else None


@sealed(_forward_shapes)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, norm: Norm, act: Epilogue | None, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    out, codes, late = None, [], False
    chunks = forward_chunks(x, weight, spec) or [(0, 0)]  # one for an empty batch, too
    for start, stop in chunks:
        y = forward_of_chunk(x[start:stop], weight, bias, spec)
        if len(chunks) == 1 and on_cuda(y.device):  # whose operator makes its output itself
            out = part = _normalise(y, norm)
        else:
            out = y.new_empty(x.shape[0], *y.shape[1:]) if out is None else out
            part = out[start:stop]
            _normalise_into(y, norm, part)
        del y
        if act is None:
            continue
        late = len(chunks) > 1 and rounds_by_place(act, math.prod(part.shape[1:]))
        if keeps:
            codes.append(encode(part, act) if late else encode_and_activate_(part, act))
        elif not late:
            activate_(part, act)
    if late:
        activate_(out, act)
    return out, joined(codes, act) if codes else None


def _gradient_shapes(
    grad: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor | None, float],
    derivative: Packed | None,
    packed: Packed | None,
    shape: tuple[int, ...],
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    gradients = gradient_shapes(grad, packed, shape, weight, spec, need_x, need_weight)
    return *gradients, grad.new_empty(len(weight)) if need_bias else None


@sealed(_gradient_shapes)
def _gradients(
    grad: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor | None, float],
    derivative: Packed | None,
    packed: Packed | None,
    shape: tuple[int, ...],
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias. ``norm``: running variance, weight, eps."""
    running_var, norm_weight, eps = norm
    weight = weight.to(grad.dtype)
    # On CUDA one kernel applies mask and scale to the gradient.
    fused = (
        on_cuda(grad.device)
        and not is_wrapped(grad)
        and (derivative is None or isinstance(derivative.form.codec, Bits))
    )
    folded, scale, scaled_weight = False, None, weight
    if not fused:
        scale = torch.rsqrt(running_var + eps)
        scale = (scale if norm_weight is None else scale * norm_weight).to(grad.dtype).view(-1, 1, 1, 1)
        # the norm's scale belongs to the output channels: the weight may carry it instead of the gradient, if
        # smaller. Not in float16, whose sums may overflow before they are scaled
        folded = weight.numel() < grad.numel() and grad.dtype != torch.float16
        scaled_weight = weight * scale if folded else weight
    grad_bias = weight.new_zeros(weight.shape[0]) if need_bias and not len(grad) else None

    def part_of(start: int, stop: int) -> Tensor:
        nonlocal grad_bias
        part = grad[start:stop]
        if fused:
            bits = None if derivative is None else derivative.tensors[0][start:stop]
            part = mask_scale(part, bits, running_var, norm_weight, eps)
        elif derivative is not None:
            part = times(part, derivative, start, stop)
        if not fused and not folded:
            part = part * scale.view(1, -1, 1, 1)
        if need_bias:
            wide = torch.float32 if part.element_size() == 2 else part.dtype
            grad_bias = added(grad_bias, part.sum((0, 2, 3), dtype=wide), stop - start == len(grad))
        return part

    grad_x, grad_weight = backward_in_chunks(grad, part_of, packed, shape, scaled_weight, spec, need_x, need_weight)
    if grad_weight is not None:
        grad_weight = (grad_weight.mul_(scale) if folded else grad_weight).to(weight.dtype)
    if grad_bias is not None:
        grad_bias = (grad_bias.mul_(scale.flatten()) if folded else grad_bias).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


class _ConvNormAct(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ConvSpec,
        running_mean: Tensor,
        running_var: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        act: Epilogue | None,
        keeps: bool,
        cast: torch.dtype | None,
        form: Form | None,
        *stored: Tensor,
    ) -> tuple[Tensor, ...]:
        norm = Norm(running_mean, running_var, norm_weight, norm_bias, eps)
        out, codes = _forward(x, *cast_to(cast, weight, bias), spec, norm, act, keeps)
        return (out,) if codes is None else (out, codes)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, _, spec, _, running_var, norm_weight, _, ctx.eps, act, _, _, form, *stored = inputs
        out, *codes = output
        derivative = packed_epilogue(codes[0], out.shape, act) if codes else None
        ctx.spec, ctx.shape = explicit(spec, weight.shape[2:]), x.shape
        save_outputs(ctx, codes, weight, norm_weight, running_var, derivative, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, norm_weight, running_var, derivative, packed = load(ctx)
        norm, needs = (running_var, norm_weight, ctx.eps), ctx.needs_input_grad
        gradients = _gradients(grad, weight, norm, derivative, packed, ctx.shape, ctx.spec, *needs[:3])
        return *gradients, *(None for _ in needs[3:])
