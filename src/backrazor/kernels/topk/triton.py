"""Top-K packing on CUDA: the host's side, which allocates scratch and launches. See ``_triton_pack`` and
``_triton_unpack`` for the kernels.

Nothing here waits for the device, and the launches and bytes depend on shapes alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import check_positions, chunks_of, launch
from ..guess import _triton_guess
from ..guess import reference as guess_reference
from ..guess.layout import FEATURES, NO_GUESS, ROWS, Guesses
from . import _triton_pack, _triton_unpack
from .layout import COPIED_BYTES as COPIED_BYTES  # read by the operator
from .layout import (
    DIGITS,
    INDEX,
    INTEGER_TYPES,
    SAMPLE_ELEMENTS,
    SCRATCH_BYTES,
    SLOTS,
    TILE,
    Stored,
    counter_bytes,
    kept_of,
)
from .reference import decode_values

BLOCK = 2048  # elements a program looks at together: eight tiles, so one byte of full flags
WARPS = 4
SCAN_WARPS = 8  # of the kernels that place values: at four warps they need over 128 registers per thread
SCAN_REGISTERS = 128  # of the same: left to itself the assembler makes do with fewer and spills
FEATURES_TOGETHER, TOKENS_TOGETHER = 64, 16  # that a program averages at a time
RUNS = 8  # runs of 256 that a program quantises
# Of a sample: up to here a program that unpacks a chunk counts what is kept before it from the index, at most 32 KiB.
COUNTED_ELEMENTS = {"bitmap": 1 << 18, "tile": 1 << 22}


class _Selection(NamedTuple):
    """What ``emit`` needs to know of a batch: the threshold of each sample, what each chunk holds above it and at
    it."""

    chunk: int
    chunks: int
    slot: int
    state: Tensor
    larger: Tensor
    equal: Tensor


def _kind(guesses: Guesses | None) -> int:
    """What the kernels are told of guesses as GUESS."""
    if guesses is None:
        return NO_GUESS
    return FEATURES if guesses.features else ROWS


def _limits(x: Tensor, guesses: Guesses) -> tuple[float, float, Tensor, Tensor]:
    """The limits, the known codes and what they stand for; x for what is never read."""
    known, levels = guesses.known, guesses.levels
    return guesses.low, guesses.high, x if known is None else known, x if levels is None else levels


def _told(x: Tensor, guesses: Guesses | None) -> tuple[Tensor, Tensor, int, float, float, Tensor, Tensor]:
    """What the kernels that read x are told of guesses; without such, never read."""
    if guesses is None:
        return x, x, 1, 0.0, 0.0, x, x
    return guesses.codes, guesses.scales, guesses.codes.shape[1], *_limits(x, guesses)


def _kinds(guesses: Guesses | None) -> dict[str, int]:
    """How they are compiled for guesses."""
    return {"GUESS": _kind(guesses), "KNOWN": 0 if guesses is None else guesses.known_bits}


def _scan_warps(guesses: Guesses | None) -> int:
    """Of the kernels that place values: with eight, what guesses need spills."""
    return SCAN_WARPS if guesses is None else 2 * SCAN_WARPS


def _select(x: Tensor, keep: int, guesses: Guesses | None) -> _Selection:
    """Thresholds for the contiguous (B, n) ``x``, less what is guessed."""
    batch, n = x.shape
    digits = DIGITS[x.element_size()]
    chunk, chunks = chunks_of(batch, n, BLOCK)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    state, larger, equal = new(batch, SLOTS, 2), new(batch, chunks), new(batch, chunks)
    per_chunk = new(batch, chunks, 1 << digits[-1])
    bins = [1 << bits for bits in digits]
    counts = torch.zeros(batch * sum(bins), dtype=torch.int32, device=x.device).split([batch * size for size in bins])
    shift = sum(digits)
    for digit, size in enumerate(bins):
        shift -= digits[digit]
        launch(
            _triton_pack.count_digits,
            batch * chunks,
            x,
            *_told(x, guesses),
            n,
            keep,
            chunk,
            chunks,
            state,
            counts[digit - 1],
            counts[digit],
            per_chunk,
            larger,
            DIGIT=digit,
            LAST=digit == len(bins) - 1,
            SHIFT=shift,
            BINS=size,
            BEFORE_BINS=bins[digit - 1],
            **_kinds(guesses),
            BLOCK=BLOCK,
            warps=WARPS,
        )
    arguments = state, counts[-1], per_chunk, larger, equal, chunks
    launch(_triton_pack.tally, batch * chunks, *arguments, DIGITS=len(bins), BINS=bins[-1], warps=WARPS)
    return _Selection(chunk, chunks, len(bins) - 1, state, larger, equal)


def _pack_samples(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor, guesses: Guesses | None) -> None:
    """Samples that one program packs each, in one launch."""
    integers = stored.values.dtype in INTEGER_TYPES
    kept = x.new_empty(x.shape[0], keep) if integers else stored.values
    high, *middle, low = DIGITS[x.element_size()]
    digits = {"HIGH": high, "MIDDLE": sum(middle), "LOW": low}
    launch(
        _triton_pack.pack_sample,
        x.shape[0],
        x,
        *_told(x, guesses),
        x.shape[1],
        keep,
        kept,
        *stored[2:],
        stored.values,
        stored.scales,
        flag,
        **digits,
        INTEGERS=integers,
        RUNS=RUNS,
        **_kinds(guesses),
        INDEX=INDEX[index_kind],
        BLOCK=BLOCK,
        warps=_scan_warps(guesses),
        registers=SCAN_REGISTERS,
    )


def _compact(
    x: Tensor, keep: int, index_kind: str, values: Tensor, stored: Stored, flag: Tensor, guesses: Guesses | None
) -> None:
    """Select and write the kept values, as the type of ``values``, and their index."""
    chosen = _select(x, keep, guesses)
    launch(
        _triton_pack.emit,
        x.shape[0] * chosen.chunks,
        x,
        *_told(x, guesses),
        x.shape[1],
        keep,
        chosen.chunk,
        chosen.chunks,
        chosen.state,
        chosen.larger,
        chosen.equal,
        values,
        stored.index,
        stored.counts,
        stored.full,
        flag,
        SLOT=chosen.slot,
        **_kinds(guesses),
        INDEX=INDEX[index_kind],
        BLOCK=BLOCK,
        warps=_scan_warps(guesses),
        registers=SCAN_REGISTERS,
    )


def _quantise(kept: Tensor, stored: Stored, flag: Tensor) -> None:
    batch, keep = kept.shape
    blocks = -(-keep // (RUNS * TILE))
    launch(
        _triton_pack.quantise_runs,
        batch * blocks,
        kept,
        stored.values,
        stored.scales,
        flag,
        keep,
        blocks,
        RUNS=RUNS,
        warps=WARPS,
    )


def _average(x: Tensor, guesses: Guesses, flag: Tensor) -> None:
    """Write the codes and scales of ``guesses``: the means of x (B, n)."""
    batch, rows = guesses.codes.shape
    length = x.shape[1] // rows
    means = torch.empty(batch, rows, dtype=torch.float32, device=x.device)
    limits, known = _limits(x, guesses), guesses.known_bits
    if guesses.features:
        blocks = -(-rows // FEATURES_TOGETHER)
        sizes = {"TOKENS": TOKENS_TOGETHER, "BLOCK": FEATURES_TOGETHER}
        arguments = x, means, *limits, length, rows, blocks
        launch(_triton_guess.average_features, batch * blocks, *arguments, **sizes, KNOWN=known, warps=WARPS)
    else:
        block = min(1 << max(length - 1, 1).bit_length(), BLOCK)
        arguments = x, means, *limits, length, rows
        warps = 1 if block < 512 else WARPS
        launch(_triton_guess.average_rows, batch * rows, *arguments, BLOCK=block, KNOWN=known, warps=warps)
    empty = guesses.codes.new_empty(0)
    _quantise(means, Stored(guesses.codes, guesses.scales, empty, empty, empty), flag)


def pack(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor, guesses: Guesses | None = None) -> None:
    """Pack the contiguous (B, n) ``x`` into the preallocated contiguous tensors of ``stored``; sets status bits in
    ``flag`` (int32). With ``guesses``: their codes are written, and x is packed less what they say.

    Raises:
        ValueError: a sample has 2^31 elements or nearly so.
    """
    batch, n = x.shape
    integers = stored.values.dtype in INTEGER_TYPES
    if guesses is not None:
        check_positions(n, "a sample")
        _average(x, guesses, flag)
    if keep == n and index_kind == "none":
        if guesses is not None:  # nobody's default: as the reference does it
            guess = decode_values(guesses.codes, guesses.scales, guesses.codes.shape[1], torch.float32)
            told = guess_reference.told(guesses, n)
            x = guess_reference.without(x, guess, guesses.features, guesses.low, guesses.high, told)
        if integers:
            _quantise(x, stored, flag)
        else:
            launch(
                _triton_pack.cast, -(-x.numel() // BLOCK), x, stored.values, flag, x.numel(), BLOCK=BLOCK, warps=WARPS
            )
        return
    staged = keep * x.element_size() if integers else 0
    counters = counter_bytes(n, x.element_size()) if n > SAMPLE_ELEMENTS else 0
    together = max(SCRATCH_BYTES // max(counters + staged, 1), 1)
    for start in range(0, batch, together):
        rows = Stored(*(tensor[start : start + together] for tensor in stored))
        guess = None if guesses is None else guesses.of_samples(start, start + together)
        if n <= SAMPLE_ELEMENTS:
            _pack_samples(x[start : start + together], keep, index_kind, rows, flag, guess)
            continue
        # a run of 256 kept values spans chunks, so its scale is known only once they lie side by side
        kept = x.new_empty(len(rows.values), keep) if integers else rows.values
        _compact(x[start : start + together], keep, index_kind, kept, rows, flag, guess)
        if integers:
            _quantise(kept, rows, flag)


def unpack(
    stored: Stored, n: int, index_kind: str, out: Tensor, guesses: Guesses | None = None, bits: Tensor | None = None
) -> None:
    """Fill the contiguous (B, n) ``out`` from the contiguous tensors of ``stored``, and with ``guesses`` from these,
    everywhere or where ``bits`` (B, ceil(n / 8)) are set."""
    if guesses is None:
        _unpack(stored, stored.values, stored.values, n, n, index_kind, out)  # no statistics: never read
    else:
        codes, scales = guesses.codes, guesses.scales
        known, width = (guesses.known, guesses.known_bits) if bits is None else (bits, 1)
        told = {"guess": _kind(guesses), "known": known, "levels": guesses.levels, "known_bits": width}
        _unpack(stored, codes, scales, n, codes.shape[1], index_kind, out, **told)


def unpack_normalised(
    stored: Stored, mean: Tensor, rstd: Tensor, n: int, row: int, index_kind: str, out: Tensor
) -> None:
    """As ``unpack``, with (x_hat - mean) * rstd for contiguous mean and rstd (B, n / row) float32."""
    _unpack(stored, mean, rstd, n, row, index_kind, out, normalise=True)


def _unpack(
    stored: Stored,
    mean: Tensor,
    rstd: Tensor,
    n: int,
    row: int,
    index_kind: str,
    out: Tensor,
    normalise: bool = False,
    guess: int = NO_GUESS,
    known: Tensor | None = None,
    levels: Tensor | None = None,
    known_bits: int = 0,
) -> None:
    """``known``: a mask of one bit per element, or codes of ``known_bits`` that stand for ``levels``."""
    batch, keep = stored.values.shape[0], kept_of(stored, n, index_kind)
    epilogue = {"NORMALISE": normalise, "GUESS": guess, "KNOWN": known_bits}
    known = stored.values if known is None else known  # never read
    levels = stored.values if levels is None else levels
    if index_kind == "none":
        check_positions(row if normalise else n if guess else 0, "a row to normalise" if normalise else "a sample")
        blocks = -(-keep // BLOCK)
        arguments = stored.values, stored.scales, mean, rstd, known, levels, out, keep, row, blocks
        launch(_triton_unpack.decode, batch * blocks, *arguments, **epilogue, BLOCK=BLOCK, warps=WARPS)
        return
    small = n <= SAMPLE_ELEMENTS  # one chunk: nothing lies before it, so nothing has to be counted
    chunk, chunks = (SAMPLE_ELEMENTS, 1) if small else chunks_of(batch, n, BLOCK)
    counted = n > COUNTED_ELEMENTS[index_kind]
    constants = {"INDEX": INDEX[index_kind], "BLOCK": BLOCK}
    counts = stored.counts  # never read
    if counted:
        counts = torch.empty(batch, chunks, dtype=torch.int32, device=out.device)
        launch(_triton_unpack.count, batch * chunks, *stored[2:], n, chunk, chunks, counts, **constants, warps=WARPS)
    arguments = *stored, mean, rstd, known, levels, out, n, keep, row, chunk, chunks, counts
    warps = 2 * SCAN_WARPS if normalise or guess else SCAN_WARPS  # with eight the epilogues spill
    constants |= epilogue | {"COUNTED": counted, "warps": warps, "registers": SCAN_REGISTERS}
    launch(_triton_unpack.expand, batch * chunks, *arguments, **constants)
