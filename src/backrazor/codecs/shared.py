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

from .packed import Packed
from .pruned import Pruned, pack

_SOURCES = WeakTensorKeyDictionary()  # a norm's output -> its version, what the norm keeps
_PACKED = WeakTensorKeyDictionary()  # an input -> codec and version, weak references to what was packed, its form


def remember_source(x: Tensor, packed: Packed) -> None:
    """Note that x, a norm's output, can be read from what the norm keeps."""
    if not torch.compiler.is_compiling():
        _SOURCES[x] = x._version, packed


def source_of(x: Tensor) -> Packed | None:
    """What the norm that x comes from keeps of it, or None."""
    version, packed = _SOURCES.get(x, (None, None))
    return packed if version == x._version else None


def _remember_packed(x: Tensor, codec: Pruned, packed: Packed) -> None:
    references = tuple(TensorWeakRef(tensor) for tensor in packed.tensors)
    _PACKED[x] = (codec, x._version), references, packed.form


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
    packed = source_of(x) or _packed_before(x, codec)
    if packed is None:
        packed = pack(x, codec, flag)
        _remember_packed(x, codec, packed)
    return packed
