"""Inputs that several layers consume, and inputs that a norm before has kept already.

Both are told by the tensor itself: what is known of it hangs on the tensor object, holds only weak references, and
counts while its version is the same. The memory belongs to the autograd graph alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .normalised import AffineLayout, read_affine
from .pruned import Packed, PackedLayout, Pruned, pack, unpack_pruned

Layout = PackedLayout | AffineLayout


def _remember(x: Tensor, attribute: str, codec: Pruned | None, packed: Packed) -> None:
    references = tuple(TensorWeakRef(tensor) for tensor in packed.tensors)
    setattr(x, attribute, ((codec, x._version), references, packed.layout))


def _recall(x: Tensor, attribute: str, codec: Pruned | None) -> Packed | None:
    known = getattr(x, attribute, None)
    if known is None or known[0] != (codec, x._version):
        return None
    tensors = tuple(reference() for reference in known[1])
    return None if any(tensor is None for tensor in tensors) else Packed(tensors, known[2])


def remember_source(x: Tensor, tensors: tuple[Tensor, ...], layout: AffineLayout) -> None:
    """Note that x, a norm's output, can be read from what the norm keeps."""
    _remember(x, "_backrazor_source", None, Packed(tensors, layout))


def pack_shared(x: Tensor, codec: Pruned, flag: Tensor) -> Packed:
    """What stands for x (B, ...) in backward: the norm's codes if x comes straight from a quantised norm (no bytes at
    all), what an earlier consumer with the same codec has packed, or else ``pack``."""
    packed = _recall(x, "_backrazor_source", None) or _recall(x, "_backrazor_packed", codec)
    if packed is None:
        packed = pack(x, codec, flag)
        _remember(x, "_backrazor_packed", codec, packed)
    return packed


def unpack(
    tensors: tuple[Tensor, ...],
    layout: Layout,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_hat: samples start to stop of what ``pack_shared`` gave, dense (stop - start, ...) of ``dtype`` (default: the
    input's)."""
    stop = layout.shape[0] if stop is None else stop
    read = read_affine if isinstance(layout, AffineLayout) else unpack_pruned
    return read(tensors, layout, start, stop, dtype or layout.dtype)
