"""Ahead-of-time compilation of every Triton kernel in every configuration, on a machine that needs no GPU.

The list of what to compile is not written by hand: the host code of each kernel runs on tensors without data, and what
it would launch is recorded, with the arguments specialised as Triton's own launcher does (pointers and sizes that are
multiples of 16, sizes that are 1). So what is compiled here is what a GPU is going to be handed.

    for binary in compile_all(configurations(), 90):
        print(binary.name, binary.registers, binary.shared_bytes, binary.occupancy)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from backrazor.kernels.guess.layout import Guesses
from backrazor.kernels.guess.layout import allocate as allocate_guesses
from backrazor.kernels.topk.layout import Stored, allocate

FAMILIES = ("topk", "bitmask", "derivative", "rowquant", "layernorm", "softmax")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched: argument types, constants and divisible arguments by number, warps, and a
    limit of registers where there is one."""

    family: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    warps: int
    registers: int | None

    @property
    def name(self) -> str:
        types = ",".join(kind.removeprefix("*") for _, kind in self.signature if kind.startswith("*"))
        constants = ",".join(f"{name}={value}" for name, value in self.constants if name.isupper())
        return f"{self.family}.{self.kernel.lstrip('_')}[{types}; {constants}; {self.warps} warps]"


@dataclass(frozen=True)
class Launch:
    """A configuration as it is launched: how many programs, and how often each goes through its loop over blocks."""

    configuration: Configuration
    programs: int
    passes: int


def _specialised(family: str, kernel, arguments: tuple, constants: dict, options: tuple) -> Configuration:
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | constants
    signature, fixed, divisible = [], [], []
    for number, name in enumerate(names):
        value = given[name]
        if name in constants or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, _POINTERS[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:  # PyTorch's blocks are aligned to 512 bytes
                divisible.append(number)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 1 << 31 else "i64"))
            if value % 16 == 0:
                divisible.append(number)
    parts = tuple(signature), tuple(fixed), tuple(divisible)
    return Configuration(family, kernel.fn.__module__, kernel.fn.__name__, *parts, *options)


def _passes(kernel, given: dict) -> int:
    """How often a program goes through its outer loop."""
    if "COLUMNS" in given:  # rows: of a row longer than a program holds, or of rows that few programs share
        sharing = given.get("programs")
        return -(-given["rows"] // (sharing * given["ROWS"])) if sharing else -(-given["m"] // given["COLUMNS"])
    if "chunk" in given:
        return -(-min(given["chunk"], given["n"]) // given["BLOCK"])
    return -(-given["n"] // given["BLOCK"]) if kernel.fn.__name__ == "pack_sample" else 1


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted, one after another, instead of run."""
    modules = {family: import_module(f"backrazor.kernels.{family}.triton") for family in FAMILIES}
    real = modules["topk"].launch
    launched: list[Launch] = []

    def recorder(family: str) -> Callable[..., None]:
        def note(kernel, programs: int, *arguments, warps: int, registers: int | None = None, **constants) -> None:
            configuration = _specialised(family, kernel, arguments, constants, (warps, registers))
            given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
            launched.append(Launch(configuration, programs, _passes(kernel, given)))

        return note

    try:
        for family, module in modules.items():
            module.launch = recorder(family)
        yield launched
    finally:
        for module in modules.values():
            module.launch = real


def configurations() -> list[Configuration]:
    """Every kernel with every configuration of its module, index, bit width and digit, and each type at least once in
    each place: even sizes and odd ones."""
    with recording() as launched:
        _topk()
        _guess()
        _elementwise()
        _rows()
        _slices()
    return list(dict.fromkeys(launch.configuration for launch in launched))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _topk() -> None:
    from backrazor.kernels.topk import triton as topk

    f32, f16, bf16, int8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
    flag = _meta(1, dtype=torch.int32)
    packs = [(f32, f32, "bitmap"), (f32, bf16, "tile"), (f32, f16, "bitmap"), (f16, f16, "tile")]
    packs += [(bf16, bf16, "bitmap"), (f32, int8, "tile"), (f16, int8, "bitmap"), (bf16, int8, "tile")]
    packs += [(f32, bf16, "none"), (bf16, int8, "none")]
    small = [(f32, f32, "tile"), (f32, bf16, "bitmap"), (bf16, bf16, "tile"), (f16, f16, "bitmap")]
    small += [(f32, int8, "bitmap"), (f32, int8, "tile"), (bf16, int8, "tile"), (f16, int8, "tile")]
    for number, (dtype, values, index) in enumerate(packs + small):
        n = 100_001 if number == 1 else 151_296 if number < len(packs) else topk.SAMPLE_ELEMENTS - number % 2
        keep = n if index == "none" else n // 10
        stored = allocate(8, n, keep, values, index, torch.device("meta"))
        topk.pack(_meta(8, n, dtype=dtype), keep, index, stored, flag)
    unpacks = [(f32, f32, "bitmap"), (bf16, f32, "tile"), (int8, bf16, "bitmap"), (f16, f16, "tile")]
    unpacks += [(int8, bf16, "none"), (bf16, f32, "none"), (int8, f32, "tile")]
    for number, (values, dtype, index) in enumerate(unpacks):
        n = 100_001 if number == 1 else 151_296 if number < len(unpacks) - 1 else topk.SAMPLE_ELEMENTS
        stored = allocate(8, n, n if index == "none" else n // 10, values, index, torch.device("meta"))
        topk.unpack(stored, n, index, _meta(8, n, dtype=dtype))
    for values, dtype, index, n in ((int8, f32, "bitmap", 500_000), (bf16, bf16, "tile", 5_000_001)):  # counted first
        stored = allocate(2, n, n // 10, values, index, torch.device("meta"))
        topk.unpack(stored, n, index, _meta(2, n, dtype=dtype))
    for values, dtype, index in ((f32, f32, "bitmap"), (int8, bf16, "tile"), (int8, f32, "none")):
        n = 151_296
        stored = allocate(8, n, n if index == "none" else n // 10, values, index, torch.device("meta"))
        statistics = _meta(8, 197), _meta(8, 197)
        topk.unpack_normalised(stored, *statistics, n, 768, index, _meta(8, n, dtype=dtype))


def _guess() -> None:
    from backrazor.kernels.guess import triton as guess

    f32, f16, bf16, int8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
    cases = [  # of every other one the mask is told; the last two have codes of 2 and 4 bits
        (f32, int8, "tile", 48, 3152, False),
        (bf16, int8, "bitmap", 768, 197, True),
        (f32, f32, "tile", 13, 999, True),
    ]
    cases += [
        (f16, f16, "bitmap", 96, 49, False),
        (bf16, bf16, "tile", 24, 784, False),
        (f32, int8, "none", 8, 64, False),
        (bf16, int8, "tile", 768, 197, True),
        (f32, int8, "bitmap", 96, 196, False),
    ]
    for number, (dtype, values, index, rows, length, features) in enumerate(cases):
        n = rows * length
        stored = allocate(8, n, n if index == "none" else n // 10, values, index, torch.device("meta"))
        guesses = allocate_guesses(8, rows, features, 0.0, 6.0, torch.device("meta"))
        x, mask = _meta(8, n, dtype=dtype), _meta(8, -(-n // 8), dtype=torch.uint8) if number % 2 else None
        bits = {len(cases) - 2: 2, len(cases) - 1: 4}.get(number)
        if bits:
            known = _meta(8, n * bits // 8, dtype=torch.uint8)
            guesses, mask = guesses._replace(known=known, levels=_meta(2**bits)), None
        guess.pack(
            x,
            stored.index.shape[1] if index == "tile" else n // 10 if index == "bitmap" else n,
            index,
            stored,
            _meta(1, dtype=torch.int32),
            guesses,
        )
        guess.unpack(stored, n, index, x, guesses, mask)


def _elementwise() -> None:
    from backrazor.kernels.bitmask import triton as bitmask
    from backrazor.kernels.derivative import triton as derivative

    for dtype, n in ((torch.float32, 150_528), (torch.float16, 100_001), (torch.bfloat16, 150_528)):
        x = _meta(8, n, dtype=dtype)
        bits = bitmask.encode(x, 0.0, 6.0)
        bitmask.apply(x, bits)
        bitmask.clamp_(x, 0.0, 6.0)
    for dtype, channels, positions in ((torch.float32, 96, 3136), (torch.bfloat16, 24, 49), (torch.float16, 13, 25)):
        x, norm = _meta(8, channels, positions, dtype=dtype), _meta(channels)
        bits = _meta(8, -(-channels * positions // 8), dtype=torch.uint8)
        bitmask.scaled(x, bits, norm, norm, 1e-3)
        bitmask.scaled(x, None, norm, norm.to(dtype) if channels == 24 else None, 1e-3)
    for dtype, bits, n in (
        (torch.float32, 2, 150_528),
        (torch.bfloat16, 2, 100_001),
        (torch.float16, 4, 150_528),
        (torch.float32, 8, 150_528),
    ):
        x = _meta(8, n, dtype=dtype)
        codes = derivative.encode(x, _meta(2**bits - 1), bits)
        derivative.apply(x, codes, _meta(2**bits), bits)


def _rows() -> None:
    from backrazor.kernels.layernorm import triton as layernorm
    from backrazor.kernels.rowquant import triton as rowquant
    from backrazor.kernels.softmax import triton as softmax

    dtypes = torch.float32, torch.bfloat16, torch.float16
    for number, (m, bits) in enumerate(((64, 4), (197, 8), (197, 4), (768, 4), (768, 8), (4096, 8), (5000, 4))):
        dtype = dtypes[number % 3]
        affine = (_meta(m), _meta(m)) if bits == 4 else (None, None)
        codes, scales = rowquant.encode(_meta(1576, m, dtype=dtype), _meta(1576), _meta(1576), bits)
        rowquant.decode(codes, scales, m, bits, dtype, *affine)
    for number, m in enumerate((64, 197, 768, 4096, 5000)):
        dropout = _meta(8, 12 * 197 * m // 8, dtype=torch.uint8) if number % 2 else None
        p = _meta(8, 12, 197, m, dtype=dtypes[number % 3])
        softmax.backward(p, p, dropout, 1.5, 0.125)
    for number, (m, bits) in enumerate(((256, 4), (1024, 8), (768, 4), (2048, 8), (layernorm.LONGEST_ROW, 4))):
        x, weight = _meta(25_216, m, dtype=dtypes[number % 3]), _meta(m)
        _, codes, scales, rstd = layernorm.forward(x, weight, weight, 1e-6, bits)
        layernorm.backward(x, codes, scales, rstd, weight, bits)


def _slices() -> None:
    """The samples of a backward's second chunk, or of a pack's second slab: their tensors begin where the first ones
    end, which need not be a multiple of 16 bytes."""
    from backrazor.kernels.bitmask import triton as bitmask
    from backrazor.kernels.derivative import triton as derivative
    from backrazor.kernels.rowquant import triton as rowquant
    from backrazor.kernels.softmax import triton as softmax
    from backrazor.kernels.topk import triton as topk

    def later(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[3:] if tensor.dim() > 1 else tensor for tensor in tensors)

    n, m, bf16 = 100_001, 197, torch.bfloat16
    for values, index in ((torch.int8, "tile"), (bf16, "bitmap")):
        for size in (n, 30_001):
            keep = size // 10 | 1
            stored = Stored(*later(*allocate(8, size, keep, values, index, torch.device("meta"))))
            (x,) = later(_meta(8, size, dtype=bf16))
            topk.pack(x, keep, index, stored, _meta(1, dtype=torch.int32))
            topk.unpack(stored, size, index, x)
            for rows, features in ((size // 7, False), (size // 49, True)):  # of as many elements as whole rows have
                of_rows = Stored(*later(*allocate(8, size // rows * rows, keep, values, index, torch.device("meta"))))
                codes, scales, *limits = allocate_guesses(8, rows, features, 0.0, 6.0, torch.device("meta"))
                guesses = Guesses(*later(codes, scales), *limits)
                (some,) = later(_meta(8, size // rows * rows, dtype=bf16))
                topk.pack(some, keep, index, of_rows, _meta(1, dtype=torch.int32), guesses)
                topk.unpack(of_rows, size // rows * rows, index, some, guesses)
    x, bits, codes = later(_meta(8, n, dtype=bf16), *(_meta(8, -(-n // per), dtype=torch.uint8) for per in (8, 4)))
    bitmask.clamp_(x, 0.0, 6.0)
    bitmask.encode(x, 0.0, 6.0)
    bitmask.apply(x, bits)
    bitmask.scaled(x.view(5, 1, n), bits, _meta(1), _meta(1), 1e-3)
    derivative.encode(x, _meta(3), 2)
    derivative.apply(x, codes, _meta(4), 2)
    rows, codes, grad = later(_meta(40, m, dtype=bf16), _meta(40, -(-m // 2), dtype=torch.uint8), _meta(8, 3, 5, m))
    scales = _meta(40, dtype=torch.float16)[3:]
    rowquant.encode(rows, _meta(40)[3:], _meta(40)[3:], 4)
    rowquant.decode(codes, scales, m, 4, bf16)
    softmax.backward(grad, grad, None, 1.0, 0.5)
