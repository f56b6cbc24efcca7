"""Top-K packing in plain PyTorch: the definition that the fast versions must equal bit for bit.

Of a sample's n elements the K of the largest magnitude are kept, ties by the lowest index. The order of magnitudes is
that of the bits without the sign, so infinity and NaN come first and are never hidden. Values are stored in the order
of their index.

Shape legend: B samples, n elements per sample, K kept, T = ceil(n / 256) tiles, V = ceil(K / 256) value tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivative.reference import pack_codes, unpack_codes
from .layout import INT4_LIMIT, INT8_LIMIT, INTEGERS, NON_FINITE, OVERFLOW, TILE, Stored, kept_of, stored_dtype

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def magnitude_order(x: Tensor) -> Tensor:
    """int64 keys, same shape: the bit patterns of |x|."""
    bits = x.view(_BITS[x.dtype])
    return (bits & torch.iinfo(bits.dtype).max).long()


def kept_indices(x: Tensor, keep: int) -> Tensor:
    """(B, n) -> (B, K) int64: indices of the kept elements, ascending."""
    order = torch.sort(magnitude_order(x), dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


def encode_values(kept: Tensor, values: str) -> tuple[Tensor, Tensor, int]:
    """(B, K) -> stored values (B, K), scales (B, V) bfloat16 (empty but for int8 and int4), status bits.

    int8: each run of 256 kept values shares a scale, its largest magnitude / 127 in bfloat16, which has the range
        of float32 (below 2^-126: zero); q = round(v / scale) to even, and rounding the scale moves no q past 127.
    int4: the same with 7 for 127; two codes per byte, (B, ceil(K / 2)) uint8.
    """
    status = 0 if bool(torch.isfinite(kept).all()) else NON_FINITE
    if values not in INTEGERS:
        stored = kept.to(stored_dtype(values))
        if stored.element_size() == 2:
            stored = stored.masked_fill(
                stored.isnan(), torch.nan
            )  # casts differ in the NaN they make: one form for all
        if bool((torch.isinf(stored) & torch.isfinite(kept)).any()):
            status |= OVERFLOW
        return stored, kept.new_empty(0, dtype=torch.bfloat16), status
    batch, keep = kept.shape
    tiles = -(-keep // TILE)
    padded = torch.nn.functional.pad(kept.float(), (0, tiles * TILE - keep)).view(batch, tiles, TILE)
    limit = INT8_LIMIT if values == "int8" else INT4_LIMIT
    largest = padded.abs().amax(dim=2)
    scales = (largest / limit).to(torch.bfloat16)
    scales = torch.where(scales < torch.finfo(torch.bfloat16).tiny, 0, scales)
    scale = scales.float().unsqueeze(2)
    usable = torch.isfinite(scale) & (scale != 0)
    inverse = torch.where(usable, 1 / scale, 0)
    quantised = torch.where(torch.isfinite(scale), torch.round(padded * inverse), 0).clamp(-limit, limit)
    codes = quantised.to(torch.int8).view(batch, tiles * TILE)[:, :keep].contiguous()
    return (codes if values == "int8" else pack_codes(codes.view(torch.uint8) & 15, 4)), scales, status


def decode_values(stored: Tensor, scales: Tensor, keep: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``encode_values`` up to rounding: (B, ``keep``) of ``dtype``."""
    if stored.dtype == torch.uint8:
        codes = unpack_codes(stored, keep, 4).to(torch.int8)
        stored = torch.where(codes >= 8, codes - 16, codes)
    elif stored.dtype != torch.int8:
        return stored.to(dtype)
    spread = scales.float().repeat_interleave(TILE, dim=1)[:, :keep]
    return (stored.float() * spread).to(dtype)


def pack_bits(mask: Tensor) -> Tensor:
    """bool (B, n) -> uint8 (B, ceil(n / 8)); element i is bit i % 8 of byte i // 8."""
    batch, n = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -n % 8)).view(batch, -(-n // 8), 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """The inverse of ``pack_bits``: bool (B, n)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(2) >> shifts) & 1).bool().flatten(1)[:, :n]


def pack(x: Tensor, keep: int, values: str, index: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """(B, n) -> stored values (B, K), scales, index, counts, full, status bits.

    index "none": nothing (K = n); "bitmap": (B, ceil(n / 8)) uint8; "tile": offsets in their 256-element tile (B, K)
    uint8, counts (B, T) uint8 and, since a count of 256 does not fit, one bit per tile that says "full" (B, ceil(T /
    8)) uint8.
    """
    batch, n = x.shape
    empty = x.new_empty(0, dtype=torch.uint8)
    at = kept_indices(x, keep)
    stored, scales, status = encode_values(x.gather(1, at), values)
    if index == "none":
        return stored, scales, empty, empty, empty, status
    if index == "bitmap":
        mask = torch.zeros(batch, n, dtype=torch.bool, device=x.device).scatter_(1, at, True)
        return stored, scales, pack_bits(mask), empty, empty, status
    tiles = -(-n // TILE)
    counts = torch.zeros(batch, tiles, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, at // TILE, torch.ones_like(at))
    return stored, scales, (at % TILE).to(torch.uint8), counts.to(torch.uint8), pack_bits(counts == TILE), status


def unpack(
    stored: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    n: int,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (B, n) of ``dtype``: kept values at their places, zero elsewhere."""
    keep = kept_of(Stored(stored, scales, index, counts, full), n, index_kind)
    values = decode_values(stored, scales, keep, dtype)
    if index_kind == "none":
        return values
    batch = stored.shape[0]
    if index_kind == "bitmap":
        kept = unpack_bits(index, n)
        values = values[:, : int(kept[0].sum()) if batch else 0].contiguous()  # int4 may have one more
        return values.new_zeros(batch, n).masked_scatter_(kept, values)
    sizes = counts.long() + TILE * unpack_bits(full, counts.shape[1]).long()
    ends = sizes.cumsum(1)
    position = torch.arange(keep, device=stored.device).expand(batch, keep).contiguous()
    tile = torch.searchsorted(ends, position, right=True)
    return values.new_zeros(batch, n).scatter_(1, tile * TILE + index.long(), values)


def normalise(rows: Tensor, mean: Tensor, rstd: Tensor, row: int) -> Tensor:
    """(B, n) and statistics (B, n / row) -> (x - mean) * rstd."""
    centred = rows.view(*mean.shape, row) - mean.unsqueeze(2)
    return centred.mul_(rstd.unsqueeze(2)).view(rows.shape)
