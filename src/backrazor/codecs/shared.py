"""Inputs that several layers consume, and inputs that a norm before has kept already.

Both are told by the tensor itself: what is known of it lies beside the tensor object, in a dictionary with weak keys,
and counts while its version is the same. What several layers share is held weakly, so that its memory belongs to the
autograd graph alone. What a norm has kept is held while its output lives: under activation checkpointing the graph
drops it at once, and the forward and its recomputation have to choose alike. While ``torch.compile`` traces, nothing is
shared: versions and identities of the tensors that it traces with say nothing of those that will run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .normalised import AffineLayout, read_affine
from .pruned import Packed, PackedLayout, Pruned, pack, unpack_pruned

Layout = PackedLayout | AffineLayout

_SOURCES = WeakTensorKeyDictionary()  # a norm's output -> its version, what the norm keeps
_PACKED = WeakTensorKeyDictionary()  # an input -> codec and version, weak references to what was packed, its layout


def remember_source(x: Tensor, tensors: tuple[Tensor, ...], layout: AffineLayout) -> None:
    """Note that x, a norm's output, can be read from what the norm keeps."""
    if not torch.compiler.is_compiling():
        _SOURCES[x] = x._version, Packed(tensors, layout)


def _source(x: Tensor) -> Packed | None:
    version, packed = _SOURCES.get(x, (None, None))
    return packed if version == x._version else None


def _remember_packed(x: Tensor, codec: Pruned, packed: Packed) -> None:
    references = tuple(TensorWeakRef(tensor) for tensor in packed.tensors)
    _PACKED[x] = (codec, x._version), references, packed.layout


def _packed_before(x: Tensor, codec: Pruned) -> Packed | None:
    known = _PACKED.get(x)
    if known is None or known[0] != (codec, x._version):
        return None
    tensors = tuple(reference() for reference in known[1])
    return None if any(tensor is None for tensor in tensors) else Packed(tensors, known[2])


def pack_shared(x: Tensor, codec: Pruned, flag: Tensor) -> Packed:
    """What stands for x (B, ...) in backward: the norm's codes if x comes straight from a quantised norm (no bytes at
    all), what an earlier consumer with the same codec has packed, or else ``pack``."""
    if torch.compiler.is_compiling():
        return pack(x, codec, flag)
    packed = _source(x) or _packed_before(x, codec)
    if packed is None:
        packed = pack(x, codec, flag)
        _remember_packed(x, codec, packed)
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
