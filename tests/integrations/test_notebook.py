"""The notebook is its .py, and runs."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import lorakit

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def test_the_notebook_is_its_py_without_outputs() -> None:
    """Made by `jupytext --to ipynb notebooks/first_run.py`."""
    notebook = nbformat.read(FOLDER / "first_run.ipynb", 4)
    source = jupytext.read(FOLDER / "first_run.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    names = {name for cell in code for name in lorakit.__all__ if f"lorakit.{name}(" in cell.source}
    assert names >= {"load_config", "preflight", "train", "sample", "inspect"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch) -> None:
    for name, value in {"STEPS": "1", "FOLDER": str(tmp_path / "work")}.items():
        monkeypatch.setenv(f"LORAKIT_NOTEBOOK_{name}", value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled, and the compiler takes a second to import
    notebook = nbformat.read(FOLDER / "first_run.ipynb", 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "16 photos; the first caption: a photo of a sks toy" in text and "skipped: no GPU here" in text
    assert "who reads it" in text
    lines = [output.data.get("text/html", "") for output in outputs if output.output_type == "display_data"]
    assert "done: sks-toy.safetensors" in lines  # the listener's one line, as it was last
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3 + 1 + 1  # photos, the newest samples, base and adapter
    assert lorakit.load_adapter(tmp_path / "work" / "run" / "sks-toy.safetensors").layers
