"""Packing what differs from a guess, and back, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from ..topk.layout import INTEGER_TYPES, Stored, cuda_scratch, stored_dtype
from ..topk.layout import allocate as allocate_stored
from . import reference
from .layout import Guesses, allocate


def _pack_fake(x, keep, values, index, rows, features, low, high, known, levels, flag):
    stored = allocate_stored(x.shape[0], x[:1].numel(), keep, stored_dtype(values), index, x.device)
    guesses = allocate(x.shape[0], rows, features, low, high, x.device)
    return (*stored, guesses.codes, guesses.scales)


@operator(
    "guess_pack(Tensor x, int keep, str values, str index, int rows, bool features, float low, float high, "
    "Tensor? known, Tensor? levels, Tensor(a!) flag) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pack_fake,
    lambda x, keep, values, index, *_: cuda_scratch(x, keep, values, index),
)
def guess_pack(
    x: Tensor,
    keep: int,
    values: str,
    index: str,
    rows: int,
    features: bool,
    low: float,
    high: float,
    known: Tensor | None,
    levels: Tensor | None,
    flag: Tensor,
) -> tuple[Tensor, ...]:
    """``Stored`` of what differs from the guesses in each sample of x (B, ...), any strides, then the codes and scales
    of these ``Guesses``. Sets status bits in ``flag`` (int32, one element). For ``known`` and ``levels`` see
    ``Guesses``.

    Samples that do not lie contiguous in logical order are copied, some at a time.
    """
    made = _pack_fake(x, keep, values, index, rows, features, low, high, known, levels, flag)
    batch, whole = x.shape[0], Guesses(*made[5:], features, low, high, known, levels)
    fast = implementation("guess", x)
    if fast is None or not (x.dtype == torch.float32 or made[0].dtype in (x.dtype, *INTEGER_TYPES)):
        return reference.pack(x, keep, values, index, made, whole, flag)
    together = batch if x.is_contiguous() else max(fast.COPIED_BYTES // (x[:1].numel() * x.element_size()), 1)
    for start in range(0, batch, together):
        part = x[start : start + together].contiguous()
        some = [t[start : start + together] for t in made]
        guesses = whole.of_samples(start, start + together)
        fast.pack(part.view(len(part), -1), keep, index, Stored(*some[:5]), flag, guesses)
    return made


def _unpack_fake(values, scales, index, counts, full, codes, code_scales, bits, levels, n, features, index_kind, dtype):
    return values.new_empty((values.shape[0], n), dtype=dtype)


@operator(
    "guess_unpack(Tensor values, Tensor scales, Tensor index, Tensor counts, Tensor full, Tensor codes, "
    "Tensor code_scales, Tensor? bits, Tensor? levels, int n, bool features, str index_kind, ScalarType dtype) "
    "-> Tensor",
    _unpack_fake,
)
def guess_unpack(
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    codes: Tensor,
    code_scales: Tensor,
    bits: Tensor | None,
    levels: Tensor | None,
    n: int,
    features: bool,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (B, n) of ``dtype``: kept values at their places, on top of the guesses where ``bits``
    (B, ceil(n / 8)) uint8 are set, everywhere without them. With ``levels``, ``bits`` are the ``known`` codes of
    ``Guesses``. Rows of the stored tensors may be sliced beforehand."""
    stored, guesses = Stored(values, scales, index, counts, full), Guesses(codes, code_scales, features)
    out = values.new_empty((values.shape[0], n), dtype=dtype)
    if out.numel() == 0:
        return out
    bits = None if bits is None else bits.contiguous()
    if levels is not None:
        guesses, bits = guesses._replace(known=bits, levels=levels), None
    fast = implementation("guess", out)
    if fast is not None and values.dtype != torch.float64:
        fast.unpack(stored, n, index_kind, out, guesses, bits)
        return out
    return reference.unpack(stored, guesses, bits, n, index_kind, dtype)
