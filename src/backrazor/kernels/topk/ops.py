"""Packing as operators: the K largest magnitudes of each sample, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from . import reference
from .layout import INTEGER_TYPES, Stored, allocate, cuda_scratch, stored_dtype


def _pack_fake(x, keep, values, index, flag):
    batch, n = x.shape[0], 1
    for size in x.shape[1:]:
        n *= size
    return tuple(allocate(batch, n, keep, stored_dtype(values), index, x.device))


@operator(
    "topk_pack(Tensor x, int keep, str values, str index, Tensor(a!) flag) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pack_fake,
    lambda x, keep, values, index, flag: cuda_scratch(x, keep, values, index),
)
def topk_pack(x: Tensor, keep: int, values: str, index: str, flag: Tensor) -> tuple[Tensor, ...]:
    """Keep the ``keep`` largest magnitudes of each sample of x (B, ...), any strides; see ``Stored``. Sets status bits
    in ``flag`` (int32, one element).

    Samples that do not lie contiguous in logical order are copied, some at a time, so that no dense copy of the batch
    arises: one on the CPU, up to 32 MiB on CUDA.
    """
    stored = Stored(*_pack_fake(x, keep, values, index, flag))
    batch = x.shape[0]
    if batch == 0 or stored.values.numel() == 0:
        return tuple(stored)
    fast = implementation("topk", x)
    dtype = stored.values.dtype
    if fast is not None and (x.dtype == torch.float32 or dtype in (x.dtype, *INTEGER_TYPES)):
        if x.is_contiguous():
            fast.pack(x.view(batch, -1), keep, index, stored, flag)
        else:
            together = max(fast.COPIED_BYTES // (x[:1].numel() * x.element_size()), 1)
            for start in range(0, batch, together):
                part = x[start : start + together].contiguous()
                rows = Stored(*(t[start : start + together] for t in stored))
                fast.pack(part.view(len(part), -1), keep, index, rows, flag)
        return tuple(stored)
    *packed, status = reference.pack(x.reshape(batch, -1), keep, values, index)
    if status:
        flag.bitwise_or_(status)
    return tuple(packed)


def _unpack_fake(values, scales, index, counts, full, n, index_kind, dtype):
    return values.new_empty((values.shape[0], n), dtype=dtype)


@operator(
    "topk_unpack(Tensor values, Tensor scales, Tensor index, Tensor counts, Tensor full, int n, str index_kind, "
    "ScalarType dtype) -> Tensor",
    _unpack_fake,
)
def topk_unpack(
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    n: int,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (B, n) of ``dtype``: kept values at their places, zero elsewhere. Rows of the stored tensors may be
    sliced beforehand."""
    stored = Stored(values, scales, index, counts, full)
    out = values.new_empty((values.shape[0], n), dtype=dtype)
    if out.numel() == 0:
        return out
    fast = implementation("topk", out)
    if fast is not None and values.dtype != torch.float64:
        fast.unpack(stored, n, index_kind, out)
        return out
    return reference.unpack(*stored, n, index_kind, dtype)


def _unpack_normalised_fake(values, scales, index, counts, full, mean, rstd, n, row, index_kind, dtype):
    return values.new_empty((values.shape[0], n), dtype=dtype)


@operator(
    "topk_unpack_normalised(Tensor values, Tensor scales, Tensor index, Tensor counts, Tensor full, Tensor mean, "
    "Tensor rstd, int n, int row, str index_kind, ScalarType dtype) -> Tensor",
    _unpack_normalised_fake,
)
def topk_unpack_normalised(
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    mean: Tensor,
    rstd: Tensor,
    n: int,
    row: int,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """``topk_unpack``, then (x_hat - mean) * rstd in float32 or wider, with mean and rstd (B, n / row) float32, a row
    each; (B, n) of ``dtype``."""
    out = values.new_empty((values.shape[0], n), dtype=dtype)
    fast = implementation("topk", out)
    fused = getattr(fast, "unpack_normalised", None)  # Triton's alone
    if out.numel() and fused is not None and values.dtype != torch.float64:
        fused(
            Stored(values, scales, index, counts, full), mean.contiguous(), rstd.contiguous(), n, row, index_kind, out
        )
        return out
    wide = torch.promote_types(dtype, torch.float32)
    x_hat = topk_unpack(values, scales, index, counts, full, n, index_kind, wide)
    return reference.normalise(x_hat, mean, rstd, row).to(dtype)
