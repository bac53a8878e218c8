"""The notebook equals its .py, and it runs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import lorakit

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def test_the_notebook_is_its_py_without_outputs() -> None:
    """`jupytext --to ipynb notebooks/first_run.py` writes the notebook."""
    notebook = nbformat.read(FOLDER / "first_run.ipynb", 4)
    source = jupytext.read(FOLDER / "first_run.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    names = {name for cell in code for name in lorakit.__all__ if f"lorakit.{name}(" in cell.source}
    assert names >= {"load_config", "preflight", "train", "sample", "inspect"}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell that runs a notebook's cells in this process. A separate kernel would import torch again."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell replaces it
    monkeypatch.chdir(tmp_path)
    yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()


@pytest.mark.slow
@pytest.mark.usefixtures("short_validation")
def test_the_notebook_runs(shell: InteractiveShell, tmp_path: Path, monkeypatch) -> None:
    for name, value in {"STEPS": "1", "FOLDER": str(tmp_path / "work")}.items():
        monkeypatch.setenv(f"LORAKIT_NOTEBOOK_{name}", value)
    text, displays = "", dict[str, Any]()
    for cell in nbformat.read(FOLDER / "first_run.ipynb", 4).cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                result = shell.run_cell(cell.source)
            result.raise_error()
            text += captured.stdout
            for output in captured.outputs:  # an update replaces the output with the same id
                displays[(output.transient or {}).get("display_id", str(len(displays)))] = output.data
    skipped = "put photos into the folder my-photos" if torch.cuda.is_available() else "no GPU here"
    assert "16 photos; the first caption: a photo of a sks toy" in text and f"skipped: {skipped}" in text
    assert "who reads it" in text
    lines = [data.get("text/html", "") for data in displays.values()]
    assert "done: sks-toy.safetensors" in lines  # the last text in the listener's line
    pictures = [data for data in displays.values() if "image/png" in data]
    assert len(pictures) == 3 + 1 + 1  # three photos, the newest samples, and the comparison of base and adapter
    assert lorakit.load_adapter(tmp_path / "work" / "run" / "sks-toy.safetensors").layers
