"""examples/first_steps.ipynb runs from its first cell to its last, and says what it is there to say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that the cells print or show as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning")
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    said = texts(notebook)
    predicted, held = re.search(r"predicted ([\d,]+) bytes, held ([\d,]+) bytes", said).groups()
    assert predicted == held
    dense, razored = map(float, re.search(r"saved: ([\d.]+) MB dense, ([\d.]+) MB razored", said).groups())
    assert razored < dense / 5
    assert "the same output, to the bit: True" in said and "layers turned back" in said
    losses = re.search(r"'dense': ([\d.]+), 'razored': ([\d.]+)", said).groups()
    assert all(float(loss) < 2 for loss in losses), "ten steps from 2.3"
    assert pictures(notebook) == 3


def test_the_committed_outputs_are_those_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)) and pictures(notebook) == 3
    assert "Error" not in texts(notebook) and "Warning" not in texts(notebook)
