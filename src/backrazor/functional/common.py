"""What the operators share: chunks of samples, autocast, elementwise rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.functional_tensor import FunctionalTensor

from ..codecs.layouts import reshaped
from ..codecs.shared import activation_of, remember_activation
from ..kernels.dispatch import on_cuda
from ..kernels.sealed import traced
from .transforms import is_wrapped, refuse_tracing, refuse_transforms

# Backward never holds more than this much of a dense copy at once (one sample where a sample is larger). 8 MiB keeps
# the matrix products of the weight gradients long enough to run at full speed and is small beside any activation worth
# pruning.
CHUNK_BYTES = 8 << 20
# The same on CUDA, where a chunk costs the host about ten launches, 120 microseconds whatever its size. The rule: as
# large as adds less than a tenth to the predicted peak of ViT-B/16 at batch 128 in bfloat16 (1.76 GB, 1.65 at 64 MiB).
CUDA_CHUNK_BYTES = 192 << 20


def sample_chunks(batch: int, sample_bytes: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) ranges over the samples, each at most ``CHUNK_BYTES`` of dense copy (``CUDA_CHUNK_BYTES`` on such a
    ``device``)."""
    return _ranges(batch, sample_bytes, CUDA_CHUNK_BYTES if on_cuda(device) else CHUNK_BYTES)


def _ranges(batch: int, sample_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    size = max(limit // max(sample_bytes, 1), 1)
    for start in range(0, batch, size):
        yield start, min(start + size, batch)


def accumulator(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros to add the chunks' gradients into: float32 where ``like`` has 16 bits, so that chunking costs no
    precision."""
    wide = torch.float32 if like.element_size() == 2 else like.dtype
    return like.new_zeros(shape, dtype=wide)


def added(total: Tensor | None, part: Tensor, whole: bool) -> Tensor:
    """``total`` + ``part``, in float32 where they have 16 bits; ``part`` itself where it is the ``whole`` sum."""
    if total is not None:
        return total.add_(part)
    return part if whole or part.element_size() != 2 else part.float()


def placed(total: Tensor | None, part: Tensor, start: int, batch: int) -> Tensor:
    """The samples of ``part`` put at ``start`` of ``total`` (made for the first); ``part`` itself where it is the whole
    ``batch``."""
    if len(part) == batch:
        dense = part.is_contiguous() or part.is_contiguous(memory_format=torch.channels_last)
        return part if dense else part.contiguous()  # what padding cut off would live on
    if total is None:
        total = part.new_empty(batch, *part.shape[1:])
    total[start : start + len(part)] = part
    return total


def with_product(total: Tensor | None, rows: Tensor, x_hat: Tensor, whole: bool) -> Tensor:
    """total (O, I) + rows^T x_hat for rows (t, O) and x_hat (t, I), in place where there is a total; in float32 where
    they have 16 bits, but for the ``whole`` sum, which a single product makes."""
    if total is not None and total.dtype == rows.dtype:
        return total.addmm_(rows.t(), x_hat)
    return added(total, rows.t() @ x_hat, whole)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that matrix products run in under the autocast of x's device, None outside autocast."""
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    if not cast or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return torch.get_autocast_dtype(kind)


def cast_to(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in ``dtype``, as autocast hands them to a matrix product; as they are where that is None.

    Inside an autograd Function, so that autograd keeps the parameter itself, which is resident, and not one lowered
    copy per call. Its own cast would be shared through autocast's cache, which a forward without recording must not
    fill.
    """
    return tuple(t if t is None or dtype is None else t.to(dtype) for t in tensors)


def needs_grad(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a backward is to come for x or any of ``tensors``. Not for what the dense operator may refuse: an x that
    is no floating-point tensor, is a nested one, or lies on another device than ``tensors``.

    Raises:
        RuntimeError: there is, and it is of a kind that pruned activations have no answer to (see ``transforms``).
    """
    tracing = traced()
    if not tracing:
        refuse_tracing(x)
    if not torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested:
        return False
    others = [t for t in tensors if t is not None]
    if not (x.requires_grad or any(t.requires_grad for t in others)) or any(t.device != x.device for t in others):
        return False
    if not tracing:
        refuse_transforms(x, *others)
    return True


def write(out: Tensor, operator: Callable[..., Tensor], *operands: Tensor) -> None:
    """``operator(*operands, out=out)``. The tensors of ``torch.func`` know no ``out``, there it costs a copy."""
    if is_wrapped(out):
        out.copy_(operator(*operands))
    else:
        operator(*operands, out=out)


def raise_flag(flag: Tensor, bits: Tensor) -> None:
    """Set ``bits`` (int32, no dimensions) in ``flag``, which belongs to no transform of ``torch.func``."""
    if not is_wrapped(bits):
        flag.bitwise_or_(bits)
        return
    while is_wrapped(bits):
        bits = _functorch.get_unwrapped(bits)
    with torch._C._DisableFuncTorch():
        flag.bitwise_or_(bits)


def computed(dense: Callable[[Tensor], Tensor], x: Tensor, inplace: bool = False) -> Tensor:
    """What ``dense`` makes of x, without recording; ``inplace``: of a copy, since it would overwrite x."""
    with torch.no_grad():
        return dense(x.detach().clone() if inplace else x.detach())


class _Overwritten(torch.autograd.Function):
    """``x`` with the values and the history of ``out``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        if not isinstance(x, FunctionalTensor):
            return x.copy_(out)
        # a copy would be a node that reads the values of before, which may be dead
        x.replace_(torch._from_functional_tensor(out.elem))
        x.commit_update()
        x.sync()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def overwritten(x: Tensor, out: Tensor) -> Tensor:
    """x, made what ``out`` is, as an operator in place would leave it."""
    known = activation_of(out)
    x = _Overwritten.apply(x, out)
    if known is not None:
        remember_activation(x, known.codes)
    return x


def not_a_view(fresh: Tensor) -> Tensor:
    """``fresh``, which nobody else holds, as a tensor that is no view of another.

    Operators such as ``F.linear`` return a view of their own work. As the output of an autograd Function it could not
    be modified in place, which the dense operator's output can.
    """
    return reshaped(fresh, fresh.shape) if fresh._is_view() else fresh
