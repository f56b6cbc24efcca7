"""The bounds in pyproject.toml are what scripts/lowest_versions.py installs, and its tests exist."""

from __future__ import annotations

from pathlib import Path

from packaging.version import Version

from backrazor.kernels.cpu import target
from scripts import lowest_versions

ROOT = Path(__file__).resolve().parents[2]


def test_every_dependency_of_the_library_has_a_lower_bound_that_is_met_here() -> None:
    from importlib.metadata import version

    pins = dict(pin.split("==") for pin in lowest_versions.lowest())
    assert set(pins) == {"torch", "numba", "numpy"}
    for name, bound in pins.items():
        assert Version(version(name)) >= Version(bound), name
    assert f"numba>={pins['numba']}" in Path(target.__file__).read_text()


def test_the_quick_tests_exist() -> None:
    assert [name for name in lowest_versions.QUICK if not (ROOT / name).is_file()] == []
