"""The notebooks run, with fewer epochs than their committed outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["quickstart", "figures"])
def test_notebook_runs(tmp_path, monkeypatch, name):
    monkeypatch.setenv("EPOCHS", "3")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CONFIGS", str(ROOT / "configs"))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any(shown), "it is committed with outputs"
    assert all(output.output_type != "error" for outputs in shown for output in outputs)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()


@pytest.mark.parametrize("name", ["quickstart", "figures"])
def test_notebook_is_small(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 1_000_000
