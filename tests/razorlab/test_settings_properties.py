"""Validation of a configuration takes any value whatever: it passes, or one line names the key."""

from __future__ import annotations

import copy
import math
from typing import Any

from conftest import compose_plain
from hypothesis import given, settings
from hypothesis import strategies as st

from razorlab.errors import UserError
from razorlab.settings import BY_PATH, validate

FIXED = settings(max_examples=200, derandomize=True, deadline=None, database=None)
CONFIG = compose_plain()
values = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([0, 1, 0.5, "auto", "full", "none", -1, 10**30, math.nan, math.inf]),
)


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *sections, leaf = path.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[leaf] = value
    return config


@FIXED
@given(st.sampled_from(sorted(BY_PATH)), values)
def test_any_value_passes_or_is_refused_under_the_key_s_name(path: str, value: Any) -> None:
    try:
        validate(changed(path, value))
    except UserError as error:
        assert str(error).splitlines()[0].startswith((path, "razor=", "method=", "trainer.micro_batch", "data.test_"))
    else:
        assert BY_PATH[path]._accepts(value)


@FIXED
@given(st.sampled_from(sorted(BY_PATH)), st.floats() | st.integers())
def test_no_number_out_of_range_passes(path: str, value: float) -> None:
    key = BY_PATH[path]
    if key.kind not in (int, float) or (key.kind is int and isinstance(value, float)):
        return
    inside = math.isfinite(value) and (key.low is None or value >= key.low) and (key.high is None or value <= key.high)
    assert not key._accepts(value) or inside


def test_every_number_has_a_largest_value() -> None:
    assert [path for path, key in BY_PATH.items() if key.kind in (int, float) and key.high is None] == []
