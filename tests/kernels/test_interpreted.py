"""Runs tests/kernels/interpreted under Triton's interpreter, in one process of its own, and reports file by file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(file.stem for file in FOLDER.glob("test_*.py"))

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ElementTree.Element]]:
    """Test cases of the inner run by file."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", str(FOLDER)]
    choice = {"BACKRAZOR_KERNELS": "interpret", "TRITON_INTERPRET": "1"}
    environment = os.environ | choice | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert report.exists(), ran.stdout + ran.stderr
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases.setdefault(case.attrib["classname"].split(".")[-1], []).append(case)
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_passes_in_the_interpreter(file: str, results: dict[str, list[ElementTree.Element]]) -> None:
    cases = results.get(file, [])
    assert cases, f"{file} did not run"
    wrong = [
        f"{case.attrib['name']}: {outcome.attrib.get('message', '')}\n{outcome.text}"
        for case in cases
        for outcome in case
        if outcome.tag in ("failure", "error", "skipped")
    ]
    assert not wrong, "\n".join(wrong)
