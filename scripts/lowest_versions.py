"""Install the lowest versions that pyproject.toml allows, in an environment of their own, and run the quick tests.

    python scripts/lowest_versions.py                # in a temporary folder: 6 GB, most of it PyTorch's CUDA build
    python scripts/lowest_versions.py --folder DIR   # keeps the environment, and takes it up again

The interpreter is the one that runs this script: run it with the lowest that pyproject.toml allows, too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "hypothesis")
QUICK = (  # what knows of no laboratory and no other package: kernels, operators, conversion, memory
    "tests/kernels/test_dispatch.py",
    "tests/backrazor/test_bitmask.py",
    "tests/backrazor/test_convert.py",
    "tests/backrazor/test_derivative.py",
    "tests/backrazor/test_fusion.py",
    "tests/backrazor/test_layer_norm.py",
    "tests/backrazor/test_memory.py",
    "tests/backrazor/test_norms_and_activations.py",
    "tests/backrazor/test_product.py",
    "tests/backrazor/test_rowquant.py",
    "tests/backrazor/test_topk.py",
)


def lowest() -> list[str]:
    """Each dependency of the library at its lower bound, as pip takes it.

    Raises:
        ValueError: a dependency states no lower bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = []
    for dependency in project["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\w.]+)", dependency)
        if found is None:
            raise ValueError(f"{dependency!r} in pyproject.toml states no lower bound: write it as name>=version")
        pins.append(f"{found[1]}=={found[2]}")
    return pins


def check(folder: Path, tests: Sequence[str]) -> int:
    """Install and test in ``folder``; the exit code of the tests."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *lowest(), *TOOLS], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    print(f"Python {sys.version.split()[0]}, {', '.join(lowest())}", flush=True)
    command = [python, "-m", "pytest", "-m", "not slow", "-k", "not timm", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environment is made and kept")
    parser.add_argument("tests", nargs="*", default=QUICK, help="files of tests; default: the quick ones")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        return check(options.folder.resolve(), options.tests)
    with tempfile.TemporaryDirectory() as temporary:
        return check(Path(temporary), options.tests)


if __name__ == "__main__":
    sys.exit(main())
