"""The site builds without network and without a warning, and its reference has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backrazor as br
from backrazor import functional, memory, nn

ROOT = Path(__file__).resolve().parents[2]
NO_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise OSError("the site is built without network")

socket.socket.connect = socket.getaddrinfo = refuse
"""
PUBLIC = [
    *(f"backrazor.{name}" for name in br.__all__ if name != "memory"),
    *(f"backrazor.memory.{name}" for name in memory.__all__),
    *(f"backrazor.nn.{name}" for name in nn.__all__ if name not in br.__all__),
    *(f"backrazor.functional.{name}" for name in functional.__all__),
    "backrazor.integrations.transformers.RazorCallback",
    "backrazor.integrations.lightning.RazorCallback",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = tmp_path_factory.mktemp("python"), tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    run = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    assert [name for name in PUBLIC if name not in anchors] == []
    (razor,) = re.findall(r'id="backrazor\.razor_".*?id="backrazor\.unrazor_"', text, re.DOTALL)
    assert "Parameters:" in razor and "Raises:" in razor and "filter_fn" in razor


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'(?:src="|<link[^>]+href="|url\()(https?://[^")]+)', text)
        assert [url for url in fetched if "canonical" not in url] == [], page


def test_links_out_of_docs_lead_to_copies(site: Path) -> None:
    assert (site / "files/benchmarks/results/steps.csv").is_file()
    assert "def main" in (site / "files/examples/own_layer.py.txt").read_text(encoding="utf-8")
    assert 'href="files/benchmarks/results/steps.csv"' in (site / "performance.html").read_text(encoding="utf-8")
