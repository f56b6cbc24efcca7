"""Argument blocks: the order of their fields means nothing, and a field that is missing or misspelt is an error."""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch
from torch import Tensor

from backrazor import kernels
from backrazor.codecs.smooth import quantiser
from backrazor.kernels.bitmask import cpu as bitmask
from backrazor.kernels.bitmask import reference as bitmask_reference
from backrazor.kernels.cpu import compiling, entries, kept
from backrazor.kernels.cpu.arguments import Arguments, arguments, struct
from backrazor.kernels.derivative import cpu as derivative
from backrazor.kernels.derivative import reference as derivative_reference
from backrazor.kernels.guess import cpu as guess
from backrazor.kernels.guess import reference as guess_reference
from backrazor.kernels.guess.layout import allocate as allocate_guesses
from backrazor.kernels.product import cpu as product
from backrazor.kernels.product import reference as product_reference
from backrazor.kernels.rowquant import cpu as rowquant
from backrazor.kernels.rowquant import reference as rowquant_reference
from backrazor.kernels.topk import cpu as topk
from backrazor.kernels.topk import reference as topk_reference
from backrazor.kernels.topk.layout import allocate
from tests.backrazor.compare import assert_close, assert_same_bits

X = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))


def permuted(block: type[Arguments]) -> type[Arguments]:
    """The same fields in another order."""
    kinds = {name: {ctypes.c_int64: int, ctypes.c_float: float}[kind] for name, kind in block._fields_}
    names = list(kinds)
    random.Random(0).shuffle(names)
    made = struct(block.__name__, {name: kinds[name] for name in names}, block.names)
    assert [name for name, _ in made._fields_] != [name for name, _ in block._fields_]
    return made


def _topk() -> list[tuple[str, Tensor, Tensor]]:
    flag, stored = torch.zeros(1, dtype=torch.int32), allocate(3, 300, 30, torch.int8, "tile", X.device)
    topk.pack(X, 30, "tile", stored, flag)
    out = torch.empty(3, 300)
    topk.unpack(stored, 300, "tile", out)
    *wanted, _ = topk_reference.pack(X, 30, "int8", "tile")
    found = list(zip(stored._fields, stored, wanted, strict=True))
    return [*found, ("x_hat", out, topk_reference.unpack(*wanted, 300, "tile", torch.float32)), *_guess()]


def _guess() -> list[tuple[str, Tensor, Tensor]]:
    """Its kernels are topk's, told of guesses."""
    flag, stored = torch.zeros(1, dtype=torch.int32), allocate(3, 300, 30, torch.int8, "tile", X.device)
    guesses = allocate_guesses(3, 10, False, 0.0, 1.5, X.device)
    guess.pack(X, 30, "tile", stored, flag, guesses)
    out = torch.empty(3, 300)
    guess.unpack(stored, 300, "tile", out, guesses)
    means = topk_reference.decode_values(guesses.codes, guesses.scales, 10, torch.float32)
    *wanted, _ = topk_reference.pack(guess_reference.without(X, means, False, 0.0, 1.5), 30, "int8", "tile")
    x_hat = topk_reference.unpack(*wanted, 300, "tile", torch.float32)
    guess_reference.add_(x_hat, means, None, False)
    found = list(zip(stored._fields, stored, wanted, strict=True))
    return [*found, ("x_hat with guesses", out, x_hat), *_told()]


def _told() -> list[tuple[str, Tensor, Tensor]]:
    """The same with what an activation's codes tell."""
    flag, stored = torch.zeros(1, dtype=torch.int32), allocate(3, 300, 30, torch.int8, "tile", X.device)
    thresholds, levels = quantiser("gelu", 4)
    guesses = allocate_guesses(3, 10, False, math.nan, math.nan, X.device)
    guesses = guesses._replace(known=derivative.encode(X, thresholds, 4), levels=levels)
    guess.pack(X, 30, "tile", stored, flag, guesses)
    out = torch.empty(3, 300)
    guess.unpack(stored, 300, "tile", out, guesses)
    factors = topk_reference.decode_values(guesses.codes, guesses.scales, 10, torch.float32)
    told = guess_reference.told(guesses, 300)
    *wanted, _ = topk_reference.pack(
        guess_reference.without(X, factors, False, math.nan, math.nan, told), 30, "int8", "tile"
    )
    x_hat = topk_reference.unpack(*wanted, 300, "tile", torch.float32)
    guess_reference.add_(x_hat, factors, None, False, told)
    found = list(zip(stored._fields, stored, wanted, strict=True))
    return [*found, ("x_hat with codes", out, x_hat)]


def _bitmask() -> list[tuple[str, Tensor, Tensor]]:
    bits = bitmask.encode(X, 0.0, 1.5)
    return [
        ("bits", bits, bitmask_reference.encode(X, 0.0, 1.5)),
        ("kept", bitmask.apply(X, bits), bitmask_reference.apply(X, bits)),
    ]


def _derivative() -> list[tuple[str, Tensor, Tensor]]:
    thresholds, levels = quantiser("gelu", 8)
    codes = derivative.encode(X, thresholds, 8)
    return [
        ("codes", codes, derivative_reference.encode(X, thresholds, 8)),
        ("product", derivative.apply(X, codes, levels, 8), derivative_reference.apply(X, codes, levels, 8)),
    ]


def _rowquant() -> list[tuple[str, Tensor, Tensor]]:
    mean, rstd = X.mean(1), 1 / X.std(1)
    codes, scales = rowquant.encode(X, mean, rstd, 4)
    wanted = rowquant_reference.encode(X, mean, rstd, 4)
    decoded = rowquant_reference.decode(*wanted, 300, 4, torch.float32)
    return [
        ("codes", codes, wanted[0]),
        ("scales", scales, wanted[1]),
        ("rows", rowquant.decode(codes, scales, 300, 4, torch.float32), decoded),
    ]


def _product() -> list[tuple[str, Tensor, Tensor]]:
    *packed, _ = topk_reference.pack(X, 30, "bfloat16", "bitmap")
    stored, found = kernels.Stored(*packed), []
    for name, depthwise, outputs in (("convolution", False, 7), ("depthwise convolution", True, 3)):
        window = kernels.Window((3, 10, 10), (3, 3), (1, 1), (1, 1), (1, 1), depthwise)
        grad = torch.randn(3, outputs, 10, 10, generator=torch.Generator().manual_seed(1))
        ours, plain = (torch.zeros(kernels.product_sums_shape(window, outputs)) for _ in range(2))
        product.conv(ours, grad, stored, "bitmap", window)
        product_reference.conv(plain, grad, stored, "bitmap", window)
        lanes = kernels.product_lanes(window, (10, 10)) if depthwise else range(outputs)
        found.append((name, ours[..., lanes], plain[..., lanes]))
    return found


FAMILIES = {topk: _topk, bitmask: _bitmask, derivative: _derivative, rowquant: _rowquant, product: _product}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda module: module.__name__.split(".")[-2])
def test_fields_in_another_order_change_nothing(family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "is_writable", lambda folder: False)
    blocks = {name: thing for name, thing in vars(family).items() if isinstance(thing, type(Arguments))}
    blocks = {name: block for name, block in blocks.items() if issubclass(block, Arguments)}
    assert len(blocks) >= 2
    for name, block in blocks.items():
        monkeypatch.setattr(family, name, permuted(block))
    for name, got, wanted in FAMILIES[family]():
        if family is product:
            assert_close(name, got, wanted, 1e-5)
        else:
            assert_same_bits(name, got, wanted)


def test_every_family_with_a_cpu_version_is_here() -> None:
    folders = {file.parent.name for file in kept.KERNELS.glob("*/cpu.py")} - {"guess"}  # topk's
    assert folders == {module.__name__.split(".")[-2] for module in FAMILIES}


@arguments
class _Pair:
    n: int
    factor: float


def test_fields_are_read_and_written_by_name() -> None:
    pair = _Pair(factor=0.5, n=7)
    assert (pair.n, pair.factor, pair.next_task, pair.next_thread) == (7, 0.5, 0, 0)
    record = compiling.record_of(_Pair)
    for name, _ in _Pair._fields_:
        assert record.offset(name) == getattr(_Pair, name).offset
    assert record.size == ctypes.sizeof(_Pair)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n": 1}, "factor"),
        ({"n": 1, "factor": 1.0, "m": 2}, "m"),
        ({"n": 1, "faktor": 1.0}, "faktor"),
        ({"n": 1, "factor": 1.0, "next_task": 1}, "next_task"),
    ],
)
def test_a_missing_or_unknown_field_is_named(given: dict[str, float], named: str) -> None:
    with pytest.raises(TypeError, match=f"'{named}'"):
        _Pair(**given)
    with pytest.raises(TypeError):
        _Pair(1, 2.0)
