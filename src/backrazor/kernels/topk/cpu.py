"""Top-K selection, packing and unpacking on the CPU: one thread a sample, vector blocks of 16 elements.

Selecting costs two passes over the sample. A small deterministic sample of magnitudes gives an interval [low, high]
that holds the K-th largest with near certainty; the first pass counts what lies above and collects what lies strictly
inside (a few per cent); the K-th largest follows exactly from those. The second pass emits. When the interval misses
(or ties flood it), an exact radix selection over the whole sample takes its place: the result never depends on the
guess.

Shape legend: n elements a sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.lanes import BF16, F16, F32
from ..cpu.launch import launch, threads_for
from ._cpu_pack import pack_bf16, pack_f16, pack_f32
from ._cpu_select import BUFFER_AT, INT8, MIN_SAMPLED
from ._cpu_unpack import unpack_bf16, unpack_f16, unpack_f32
from .layout import INDEX, Stored

# How kernels name types.
KIND = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.int8: INT8}
_PACK = {F32: pack_f32, F16: pack_f16, BF16: pack_bf16}
_UNPACK = {F32: unpack_f32, F16: unpack_f16, BF16: unpack_bf16}


def pack(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor) -> None:
    """Pack the contiguous (B, n) ``x`` into the preallocated contiguous tensors of ``stored``; sets status bits in
    ``flag`` (int32)."""
    batch, n = x.shape
    threads = threads_for(batch)
    capacity = n // 8 + 1024
    scratch_bytes = BUFFER_AT + (capacity * 4 if keep < n and n >= MIN_SAMPLED else 0)
    scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
    arguments = [
        0,  # the next free scratch slot
        batch,
        n,
        keep,
        KIND[stored.values.dtype],
        INDEX[index_kind],
        x.data_ptr(),
        *(tensor.data_ptr() for tensor in stored),
        flag.data_ptr(),
        scratch.data_ptr(),
        scratch_bytes,
        stored.index.stride(0) if stored.index.numel() else 0,
        capacity,
    ]
    launch(_PACK[KIND[x.dtype]], arguments, batch)


def unpack(stored: Stored, n: int, index_kind: str, out: Tensor) -> None:
    """Fill the contiguous (B, n) ``out`` from the contiguous tensors of ``stored``."""
    batch = out.shape[0]
    threads = threads_for(batch)
    scratch = torch.empty(threads * BUFFER_AT, dtype=torch.uint8)
    arguments = [
        0,
        batch,
        n,
        stored.values.shape[1],
        KIND[stored.values.dtype],
        INDEX[index_kind],
        out.data_ptr(),
        *(tensor.data_ptr() for tensor in stored),
        scratch.data_ptr(),
        BUFFER_AT,
        stored.index.stride(0) if stored.index.numel() else 0,
    ]
    launch(_UNPACK[KIND[out.dtype]], arguments, batch)
