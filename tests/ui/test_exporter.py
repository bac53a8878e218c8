"""Adapters are converted by a process that has its libraries before anyone presses the button."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from waiting import wait_for

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.formats import inspect  # noqa: E402
from lorakit.runs.run_folder import RunFolder  # noqa: E402
from lorakit.ui import app, commands, language, texts  # noqa: E402
from lorakit.ui.commands import Exporter  # noqa: E402
from lorakit.ui.pages.adapter import AdapterPage  # noqa: E402
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
    shapes = {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4)}
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
    steps: list[object] = []
    (path,) = commands.export(file, "diffusers", tmp_path / "a", progress=lambda *facts: steps.append(facts))
    assert steps == [(1, 3, "convert.starting"), (2, 3, "convert.reading"), (3, 3, "convert.writing")]
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
def test_the_page_shows_the_step_of_a_conversion(exporter: Exporter, file: Path, tmp_path: Path):
    with gr.Blocks():
        page = AdapterPage(Workspace(tmp_path / "runs", [tmp_path]), language.Translations())
    tasks, say, lines = page.workspace.tasks, texts.sayer("en"), []
    number = tasks.start(lambda progress: page.write(str(file), "peft", "fp16", 0, say, progress))
    while (answer := tasks.look(number, say))[2]:
        lines.append(answer[1])
    assert any("Starting the conversion: step 1 of 3 …" in line for line in lines)
    assert answer[0] is not None and "lk-good" in answer[0][0]


@pytest.mark.slow
def test_the_page_reduces_the_rank(exporter: Exporter, file: Path, tmp_path: Path):
    with gr.Blocks():
        page = AdapterPage(Workspace(tmp_path / "runs", [tmp_path]), language.Translations())
    message, offered = page.write(str(file), "kohya", "fp16", 2, texts.sayer("en"))
    assert "lk-good" in message and "x-resized.safetensors" in message
    (component,) = inspect.inspect(Path(offered["value"][0])).components.values()
    assert component.ranks == [2] and inspect.inspect(file).components["unet"].ranks == [4]


@pytest.mark.slow
def test_the_page_combines_adapters(exporter: Exporter, file: Path, tmp_path: Path):
    with gr.Blocks():
        page = AdapterPage(Workspace(tmp_path / "runs", [tmp_path]), language.Translations())
    say = texts.sayer("en")
    message, offered = page.write(str(file), "kohya", "fp32", 0, say, others=[f"{file.name}=0.5", str(file)])
    assert "lk-good" in message and "combined.safetensors" in message
    before, after = load_file(file), load_file(offered["value"][0])
    layer = next(name for name in before if name.endswith("lora_up.weight"))
    down = layer.replace("lora_up", "lora_down")
    scale = float(after[layer.replace("lora_up.weight", "alpha")]) / len(after[down])
    # The first file at strength 1, and two copies of it at 0.5 and 1.
    assert np.allclose(scale * after[layer] @ after[down], 2.5 * before[layer] @ before[down], rtol=1e-4)


@pytest.mark.parametrize(
    ("others", "rank", "line"),
    [
        (["x.safetensors"], 2, "Combine first"),
        (["/etc/passwd"], 0, "is outside of"),
        (["/etc/passwd=0.5"], 0, "is outside of"),
        (["x.safetensors=much"], 0, "write ADAPTER=STRENGTH"),
        (["none.safetensors"], 0, "none.safetensors"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_combined_is_refused(
    exporter: Exporter, file: Path, tmp_path: Path, others: list[str], rank: int, line: str
):
    with gr.Blocks():
        page = AdapterPage(Workspace(tmp_path / "runs", [tmp_path]), language.Translations())
    message, _ = page.write(str(file), "kohya", "fp16", rank, texts.sayer("en"), others=others)
    assert "lk-problem" in message and line in message


def children() -> list[psutil.Process]:
    """The processes of this one that convert or wait."""
    matches = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # another test's has ended
            if "lorakit.cli.imports" in child.cmdline():
                matches.append(child)
    return matches


@pytest.mark.slow
def test_there_is_one_process_at_a_time(exporter: Exporter, file: Path, tmp_path: Path):
    counts = []

    def step(*facts: object) -> None:
        exporter.prepare()  # another page opens
        counts.append(len(children()))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: exporter.prepare(), range(8)))
        assert len(children()) == 1
        folders = [tmp_path / str(number) for number in range(3)]
        list(pool.map(lambda folder: commands.export(file, "peft", folder, progress=step), folders))
    assert counts == [1] * 9 and exporter.ready is None and not children()


SERVER = """
import subprocess, sys
from lorakit.ui import commands
commands.EXPORTER.prepare()
run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
print(commands.EXPORTER.ready.pid, run.pid, flush=True)
input()
"""


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_the_process_ends_with_a_killed_server():
    """The end of the server closes the pipe to the process, on each system."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        process, run = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
        assert not has_ended(process) and process.ppid() == server.pid
        server.kill()
        try:
            wait_for(lambda: has_ended(process))
            assert not has_ended(run), "a run goes on, and it does not keep the pipe open"
        finally:
            run.kill()


@pytest.mark.slow
def test_a_process_that_nobody_uses_ends(exporter: Exporter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands, "WAIT", 3)
    exporter.prepare()
    (process,) = children()
    wait_for(lambda: has_ended(process))
    assert exporter.ready is not None and exporter.ready.wait() == commands.UNUSED
    exporter.prepare()
    assert [child.pid for child in children()] == [exporter.ready.pid] != [process.pid]


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
    monkeypatch.setattr(commands, "export", lambda *arguments, **more: pytest.fail(f"converted: {arguments}"))
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
