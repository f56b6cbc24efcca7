"""Conv2d with a pruned input. Shape legend: B samples, C/D input/output channels, H/W height/width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import NOTHING, ConvProduct, Form, Packed, Pruned, Use, Window, load, pack_shared, packed_of, save
from ..kernels.dispatch import on_cuda
from ..kernels.sealed import sealed, traced
from .common import added, autocast_dtype, cast_to, needs_grad, not_a_view, placed, sample_chunks, write
from .recipes import ConvRecipe, remember_recipe
from .transforms import RazorFunction, differentiable_once, one_node

# Above it the forward of a convolution on CUDA runs some samples at a time too: what it makes on its way would be as
# large again.
CUDA_FORWARD_BYTES = 1 << 30


class ConvSpec(NamedTuple):
    """The settings of a convolution. ``pad`` (left, right, top, bottom) is applied first by ``F.pad`` in ``pad_mode``;
    then the plain convolution runs with ``padding``, numeric, "same" or "valid"."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    pad: tuple[int, int, int, int] | None = None
    pad_mode: str = "constant"


@one_node
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, codec: Pruned, flag: Tensor) -> Tensor:
    """``F.conv2d`` of x (B, C, H, W) with weight (D, C / groups, kh, kw); backward uses x_hat = unpack(pack(x)) for the
    weight's gradient.

    The input is packed before padding. The gradient of x is exact.
    """
    if not needs_grad(x, weight, bias) or x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * spec.groups:
        usual = isinstance(x, Tensor) and x.dim() == 4
        return _forward(x, weight, bias, spec)[0] if usual else forward_of_chunk(x, weight, bias, spec)
    cast = autocast_dtype(x)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    packed = pack_shared(batched, codec, Use.of(weight), flag, x).arguments if weight.requires_grad else NOTHING
    (batched,) = cast_to(cast, batched)
    out = _Conv2d.run(batched, weight, bias, spec, cast, *packed)
    if x.dim() == 3:
        return out.squeeze(0)
    if traced():
        remember_recipe(out, ConvRecipe(batched, weight, bias, spec, cast, packed))
    return out


def _pad(x: Tensor, spec: ConvSpec) -> Tensor:
    return x if spec.pad is None else F.pad(x, spec.pad, mode=spec.pad_mode)


@sealed(lambda x, weight, bias, spec: (forward_of_chunk(x, weight, bias, spec),))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> tuple[Tensor]:
    """The dense operator on x (B, C, H, W), some samples at a time: the convolution library copies input and output
    into a layout of its own, which for a whole batch would be the highest peak of the forward pass."""
    chunks = forward_chunks(x, weight, spec) if x.shape[1] and x.is_contiguous() else []
    if len(chunks) < 2:
        return (not_a_view(forward_of_chunk(x, weight, bias, spec)),)
    out = None
    for start, stop in chunks:
        out = placed(out, forward_of_chunk(x[start:stop], weight, bias, spec), start, x.shape[0])
    return (not_a_view(out),)


def forward_chunks(x: Tensor, weight: Tensor, spec: ConvSpec) -> list[tuple[int, int]]:
    """(start, stop) ranges over the samples of a forward; all of them at once where PyTorch would run a part on another
    backend than the whole batch (it has one of its own for single small images), which rounds differently.

    On CUDA the library makes no hidden copies and may pick its algorithm by the batch: there all samples run at once,
    up to ``CUDA_FORWARD_BYTES``.
    """
    sample_bytes = largest_sample_bytes(x, weight.shape[0], spec)
    if on_cuda(x.device) and x.shape[0] * sample_bytes <= CUDA_FORWARD_BYTES:
        return [(0, x.shape[0])]
    chunks = list(sample_chunks(x.shape[0], sample_bytes, x.device))
    if len(chunks) < 2:
        return chunks
    if weight.stride(3) != 1:  # channels_last: there the convolution library rounds otherwise for other batches
        return [(0, x.shape[0])]
    counts = {x.shape[0], *(stop - start for start, stop in chunks)}  # two or three, however many chunks there are
    return chunks if same_backend(counts, x, weight, spec) else [(0, x.shape[0])]


def same_backend(counts: set[int], x: Tensor, weight: Tensor, spec: ConvSpec) -> bool:
    """Whether PyTorch runs this convolution on the same backend for each of ``counts`` samples of x."""
    return len({_backend(count, x, weight, spec) for count in counts}) == 1


def _backend(samples: int, x: Tensor, weight: Tensor, spec: ConvSpec) -> object:
    """What PyTorch runs this convolution on for ``samples`` samples of x."""
    numeric = explicit(spec, weight.shape[2:])
    left, right, top, bottom = numeric.pad or (0, 0, 0, 0)
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    stand_in = x.detach().new_empty(()).expand(samples, x.shape[1], height, width)
    return torch._C._select_conv_backend(
        stand_in, weight, None, numeric.stride, numeric.padding, numeric.dilation, False, (0, 0), numeric.groups, None
    )


def explicit(spec: ConvSpec, kernel: torch.Size) -> ConvSpec:
    """The same convolution with numeric symmetric padding: what is uneven in "same" becomes a zero pad of its own."""
    if spec.padding == "valid":
        return spec._replace(padding=(0, 0))
    if spec.padding != "same":
        return spec
    total = [d * (k - 1) for d, k in zip(spec.dilation, kernel, strict=True)]
    if all(t % 2 == 0 for t in total):
        return spec._replace(padding=(total[0] // 2, total[1] // 2))
    (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    return spec._replace(padding=(0, 0), pad=(left, right, top, bottom), pad_mode="constant")


def _padded_backward(grad: Tensor, shape: torch.Size, spec: ConvSpec) -> Tensor:
    """The gradient through ``_pad``. Padding is linear: its transpose is the same at every point."""
    if spec.pad is None:
        return grad
    left, right, top, bottom = spec.pad
    if spec.pad_mode == "constant":
        return grad[..., top : grad.shape[-2] - bottom, left : grad.shape[-1] - right]
    with torch.enable_grad():
        point = grad.new_zeros(shape, requires_grad=True)
        return torch.autograd.grad(_pad(point, spec), point, grad)[0]


def forward_of_chunk(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """The dense operator on some samples."""
    return F.conv2d(_pad(x, spec), weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def backward_of_chunk(
    grad: Tensor, x_hat: Tensor | None, shape: tuple[int, ...], weight: Tensor, spec: ConvSpec, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x or None, gradient of the weight or None) for some samples of an ``explicit`` convolution.

    ``shape`` is that of the samples' input; x_hat is None where no weight gradient is asked for. The input's gradient
    needs only the shape of x, which an expanded scalar gives.
    """
    batch, channels, height, width = shape
    if spec.pad is not None:
        height, width = height + spec.pad[2] + spec.pad[3], width + spec.pad[0] + spec.pad[1]
    point = grad.new_empty(()).expand(batch, channels, height, width) if x_hat is None else _pad(x_hat, spec)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        point,
        weight,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        (0, 0),
        spec.groups,
        (need_x, x_hat is not None, False),
    )
    return _padded_backward(grad_x, shape, spec) if need_x else None, grad_weight


# From this many positions a sample on, the matrix products of a pointwise convolution's gradients are faster than the
# convolution library, which copies its operands into a layout of its own first.
MATRIX_POSITIONS = 128


def backward_in_chunks(
    grad: Tensor,
    part_of: Callable[[int, int], Tensor],
    packed: Packed | None,
    shape: tuple[int, ...],
    weight: Tensor,
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x or None, gradient of the weight or None) of an ``explicit`` convolution, some samples at a time.

    ``part_of(start, stop)`` is the gradient of the convolution's output for some samples, of the shape of ``grad``'s;
    ``packed`` holds its input, whose shape is ``shape``.
    """
    batch = grad.shape[0]
    grad_x = grad.new_empty(shape) if need_x and not batch else None
    grad_weight = torch.zeros_like(weight) if need_weight and not batch else None
    window = _window(shape, weight, spec) if need_weight and batch else None
    product = None if window is None else ConvProduct.of(packed, window, grad)
    for start, stop in sample_chunks(batch, backward_sample_bytes(shape, grad, spec), grad.device):
        part = part_of(start, stop)
        if product is not None:
            product.add(part, start, stop)
        dense = need_weight and product is None
        x_hat = packed.unpack(start, stop, grad.dtype) if dense else None
        if _is_matrix_product(part, spec, weight):
            if need_x:
                grad_x = part.new_empty(shape) if grad_x is None else grad_x
                rows = grad_x[start:stop].flatten(2)
                write(rows, torch.bmm, weight.flatten(1).t().expand(len(part), -1, -1), part.flatten(2))
            if x_hat is not None:
                grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
                for rows, x in zip(part.flatten(2), x_hat.flatten(2), strict=True):
                    grad_weight.flatten(1).addmm_(rows, x.t())
        elif need_x or dense:
            part_x, part_weight = backward_of_chunk(part, x_hat, (stop - start, *shape[1:]), weight, spec, need_x)
            if need_x:
                grad_x = placed(grad_x, part_x, start, batch)
            if x_hat is not None:
                grad_weight = added(grad_weight, part_weight, stop - start == batch)
            part_x = part_weight = None
        del part, x_hat  # or they would live on beside the next chunk's
    return grad_x, grad_weight if product is None else product.result()


def _window(shape: tuple[int, ...], weight: Tensor, spec: ConvSpec) -> Window | None:
    """An ``explicit`` convolution as products with its packed input see it; None where they do not: groups of several
    channels, padding by other than zeros."""
    left, _, top, _ = spec.pad or (0, 0, 0, 0)
    depthwise = spec.groups > 1 and spec.groups == shape[1] == weight.shape[0]
    if (spec.groups > 1 and not depthwise) or (spec.pad and (spec.pad_mode != "constant" or min(spec.pad) < 0)):
        return None
    padding = spec.padding[0] + top, spec.padding[1] + left
    return Window(tuple(shape[1:]), tuple(weight.shape[2:]), spec.stride, padding, spec.dilation, depthwise)


def _is_matrix_product(grad: Tensor, spec: ConvSpec, weight: Tensor) -> bool:
    """Whether both gradients are written in place by matrix products: a pointwise convolution in float32 on the CPU (in
    16 bits the sums over chunks are float32, which a product of 16-bit matrices is not; CUDA's library copies
    nothing)."""
    return (
        not on_cuda(grad.device)
        and grad.device.type == "cpu"
        and grad.dtype == torch.float32
        and torch.get_float32_matmul_precision() == "highest"  # convolutions do not follow that setting
        and weight.shape[2:] == (1, 1)
        and spec.stride == (1, 1)
        and spec.padding == (0, 0)
        and spec.groups == 1
        and spec.pad is None
        and grad.shape[2] * grad.shape[3] >= MATRIX_POSITIONS
    )


def largest_sample_bytes(x: Tensor, out_channels: int, spec: ConvSpec) -> int:
    """Bytes of one sample of the input or of the output, whichever is larger (the output taken at x's size over the
    stride)."""
    positions = x[0, 0].numel() // (spec.stride[0] * spec.stride[1]) if x.shape[0] else 0
    return max(x[:1].numel(), out_channels * positions) * x.element_size()


def backward_sample_bytes(shape: tuple[int, ...], grad: Tensor, spec: ConvSpec) -> int:
    """What a sample counts for in the chunks of a backward. A convolution by groups counts twice: it is one short sum a
    weight, which longer chunks do not speed up, and the convolution library copies all four of its tensors."""
    larger = max(math.prod(shape[1:]), grad[:1].numel()) * grad.element_size()
    return 2 * larger if spec.groups > 1 else larger


def gradient_shapes(
    grad: Tensor,
    packed: Packed | None,
    shape: tuple[int, ...],
    weight: Tensor,
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Tensors like the gradients of input and weight."""
    grad_x = grad.new_empty(shape) if need_x else None
    return grad_x, grad.new_empty(weight.shape) if need_weight else None


@sealed(gradient_shapes)
def _gradients(
    grad: Tensor,
    packed: Packed | None,
    shape: tuple[int, ...],
    weight: Tensor,
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    weight = weight.to(grad.dtype)
    grad_x, grad_weight = backward_in_chunks(
        grad, lambda start, stop: grad[start:stop], packed, shape, weight, spec, need_x, need_weight
    )
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


class _Conv2d(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ConvSpec,
        cast: torch.dtype | None,
        form: Form | None,
        *stored: Tensor,
    ) -> Tensor:
        return _forward(x, *cast_to(cast, weight, bias), spec)[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, _, spec, _, form, *stored = inputs
        ctx.spec, ctx.shape = explicit(spec, weight.shape[2:]), tuple(x.shape)
        save(ctx, weight, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed = load(ctx)
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x, grad_weight = _gradients(grad, packed, ctx.shape, weight, ctx.spec, need_x, need_weight)
        grad_bias = grad.sum((0, 2, 3)) if need_bias else None
        return grad_x, grad_weight, grad_bias, *(None for _ in rest)
