"""What holds for any input: packing and reading back, and which configurations there are.

Hypothesis draws the same examples every time.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import backrazor as br
from backrazor.codecs import Pruned, kept_count, pack

FIXED = settings(max_examples=80, derandomize=True, deadline=None, database=None)
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHOICES = {
    "values": ("float32", "float16", "bfloat16", "int8", "paper"),
    "index": ("auto", "bitmap", "tile"),
    "norm": ("dense", "pruned", "bfloat16", "int8", "int4"),
    "activation": ("dense", "float16", "int8", "int4", "int2"),
    "attention": ("dense", "pruned", "int8", "int4"),
}
shares = st.floats(0, 1, exclude_max=True)
numbers = st.floats(-10_000, 10_000, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0])  # some that tie


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """(B, n) float32: up to three samples of up to 600 elements, most of them repeats of a few numbers."""
    batch, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 8, 255, 256, 257, 600]))
    pool = torch.tensor(draw(st.lists(numbers, min_size=1, max_size=40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return pool[torch.randint(len(pool), (batch, n), generator=generator)]


def largest(x: Tensor, keep: int) -> Tensor:
    """Which elements of x (B, n) stay: the ``keep`` of the largest magnitude, the first of those that tie."""
    order = x.abs().argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :keep], True)


def read_back(x: Tensor, codec: Pruned) -> Tensor:
    return pack(x, codec, torch.zeros(1, dtype=torch.int32)).unpack()


@FIXED
@given(activations(), shares, st.sampled_from(list(TYPES)), st.sampled_from(["auto", "bitmap", "tile"]))
def test_the_largest_come_back_rounded_to_their_type_and_the_rest_as_zero(x, sparsity, values, index) -> None:
    kept = largest(x, kept_count(x.shape[1], sparsity))
    expected = torch.where(kept, x.to(TYPES[values]).float(), 0.0)
    assert torch.equal(read_back(x, Pruned(sparsity, values, index)), expected)


@FIXED
@given(activations(), shares, st.sampled_from(["bitmap", "tile"]))
def test_eight_bits_err_by_half_a_step_of_the_largest_value_at_most(x, sparsity, index) -> None:
    kept = largest(x, kept_count(x.shape[1], sparsity))
    got = read_back(x, Pruned(sparsity, "int8", index))
    assert not got[~kept].any()
    step = x.abs().amax(1, keepdim=True) / 127
    smallest = 2**-126  # a scale below the normal numbers is zero
    assert bool(((got - x).abs()[kept] <= (0.51 * step + 127 * smallest).expand_as(x)[kept]).all())


@FIXED
@given(activations(), shares, st.sampled_from([*TYPES, "int8"]), st.data())
def test_what_is_stored_depends_on_the_shape_alone(x, sparsity, values, data) -> None:
    codec, flag = Pruned(sparsity, values, "auto"), torch.zeros(1, dtype=torch.int32)
    packed, zeros = pack(x, codec, flag), pack(torch.zeros_like(x), codec, flag)
    assert [t.shape for t in packed.tensors] == [t.shape for t in zeros.tensors]
    assert [t.dtype for t in packed.tensors] == [t.dtype for t in zeros.tensors]
    start = data.draw(st.integers(0, len(x) - 1))
    stop = data.draw(st.integers(start + 1, len(x)))
    assert torch.equal(packed.unpack(start, stop), packed.unpack()[start:stop])


@FIXED
@given(activations(), shares)
def test_packing_what_came_back_changes_nothing(x, sparsity) -> None:
    once = read_back(x, Pruned(sparsity, "float32"))
    assert torch.equal(read_back(once, Pruned(sparsity, "float32")), once)


@FIXED
@given(st.integers(1, 10**9), shares)
def test_how_many_are_kept(n, sparsity) -> None:
    assert kept_count(n, sparsity) == n - max(math.floor(n * sparsity), 1) + 1
    assert 1 <= kept_count(n, sparsity) <= n


@FIXED
@given(shares, st.none() | shares, st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()}))
def test_a_configuration_in_range_is_a_value_of_its_own(sparsity, head, chosen) -> None:
    config = br.RazorConfig(sparsity, head, **chosen)
    assert config == dataclasses.replace(config) and hash(config) == hash(dataclasses.replace(config))
    assert all(f"{name}={value}" in config.describe() for name, value in chosen.items())


junk = st.one_of(
    st.floats(max_value=-1e-300) | st.floats(min_value=1) | st.just(math.nan),
    st.integers(max_value=-1) | st.integers(min_value=1),
    st.booleans() | st.text() | st.lists(st.floats(), max_size=2),
)


@FIXED
@given(st.sampled_from(["sparsity", "head_sparsity"]), junk)
def test_a_share_out_of_range_is_refused_by_name(name, value) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        br.RazorConfig(**{name: value})


@FIXED
@given(st.sampled_from(list(CHOICES)), st.text() | st.none() | st.integers() | st.lists(st.integers(), max_size=2))
def test_an_unknown_word_is_refused_by_name(name, value) -> None:
    if value in CHOICES[name]:
        return
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        dataclasses.replace(br.RazorConfig(), **{name: value})
    assert all(word in str(error.value) for word in CHOICES[name])
