"""Adapters are converted by a process that has its libraries before anyone presses the button."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.formats import inspect  # noqa: E402
from lorakit.runs.run_folder import RunFolder  # noqa: E402
from lorakit.ui import app, commands, language, texts  # noqa: E402
from lorakit.ui.commands import Exporter  # noqa: E402
from lorakit.ui.pages.compare import export_step  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    """A new one in the place of the front end's own."""
    monkeypatch.setattr(commands, "EXPORTER", Exporter())
    yield commands.EXPORTER
    commands.EXPORTER.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (2, 768), "lora_up.weight": (320, 2)}
    save_file(
        {f"{layer}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "x.safetensors"
    )
    return tmp_path / "x.safetensors"


@pytest.mark.slow
def test_the_process_that_waits_converts_and_says_what_is_wrong(exporter: Exporter, file: Path, tmp_path: Path):
    exporter.prepare()
    first = exporter.ready
    exporter.prepare()
    assert exporter.ready is first is not None, "one waits"
    (path,) = commands.export(file, "diffusers", tmp_path / "a")
    assert path.name == "x-diffusers.safetensors" and inspect.inspect(path).readers["diffusers"].complete
    assert first.returncode == 0 and exporter.ready is None
    exporter.prepare()
    with pytest.raises(LorakitError, match="no such file"):
        commands.export(tmp_path / "none.safetensors", "peft", tmp_path / "b")


@pytest.mark.slow
def test_a_process_that_ended_before_its_conversion_is_replaced(
    exporter: Exporter, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(commands, "WAIT", 0)
        exporter.prepare()
    assert exporter.ready is not None and exporter.ready.wait() == commands.UNUSED
    assert commands.export(file, "peft", tmp_path / "a")[0].is_dir()


@pytest.mark.slow
def test_a_process_waits_as_soon_as_a_page_with_conversions_is_open(exporter: Exporter, tmp_path: Path):
    page = app.build(Workspace(tmp_path / "runs", [tmp_path]), language.Translations())
    visits = {event.fn.__qualname__: event.fn for event in page.fns.values() if event.fn}
    for name, values in (("ComparePage.wire.<locals>.runs", [None]), ("AdapterPage.wire.<locals>.visit", [])):
        visits[name](*values)
        assert exporter.ready is not None and exporter.ready.poll() is None
        process = exporter.ready
        exporter.close()
        assert exporter.ready is None and process.poll() is not None


def test_a_format_that_the_run_wrote_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands, "export", lambda *arguments: pytest.fail(f"converted: {arguments}"))
    workspace = Workspace(tmp_path / "runs", [])
    run = RunFolder(workspace.runs / "one")
    (run.path / "toy-peft").mkdir(parents=True)
    for name in ("toy.safetensors", "toy-diffusers.safetensors", "toy-peft/adapter_model.safetensors"):
        (run.path / name).write_text(name)
    run.update(state="done", step=6, steps=6, adapter="toy-diffusers.safetensors")
    for kind, name in (
        ("", "toy-diffusers.safetensors"),
        ("diffusers", "toy-diffusers.safetensors"),
        ("kohya", "toy.safetensors"),
        ("peft", "toy-peft"),
    ):
        message, file = export_step(workspace, "one", 6, kind, texts.sayer("en"))
        assert f"Exported: {name}" in message
        (path,) = file["value"]
        assert Path(path).read_text().startswith(name)
