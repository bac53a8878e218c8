"""The progress of a drawing, the state of the GPU, and the end of a front end that another program started."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core.messages import Message, to_lines  # noqa: E402
from lorakit.runs import nvidia  # noqa: E402
from lorakit.ui import app, language, texts  # noqa: E402
from lorakit.ui.pages.runs import RunsPage  # noqa: E402
from lorakit.ui.pages.try_it import TryPage, drawing_line  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402


def test_a_drawing_shows_its_number_of_finished_pictures(tmp_path: Path) -> None:
    workspace, say = Workspace(tmp_path / "runs", [tmp_path]), texts.sayer("en")
    job = workspace.queue.command(["sample", "a.safetensors"], tmp_path / "runs" / "tries" / "one")
    assert drawing_line(workspace, job, say).startswith("<p class=lk-quiet>Loading the base model … (")
    log = workspace.queue.folder / "000001.log"
    log.write_text("base: pocket\npicture 1 of 4\npicture 2 of 4\n")
    assert workspace.queue.pictures(job.number) == (2, 4)
    assert "Drawing: 2 of 4 … (" in drawing_line(workspace, job, say)
    assert "第 2 張，共 4 張" in drawing_line(workspace, job, texts.sayer("zh-Hant"))


def test_a_drawing_without_a_base_names_the_field_of_the_page(tmp_path: Path) -> None:
    """The command says `--base`. A new embedding of another program names no base, so this is met with these."""
    workspace = Workspace(tmp_path / "runs", [tmp_path])
    with gr.Blocks():
        page = TryPage(workspace, language.Translations())
    job = workspace.queue.command(["sample", "cat.pt"], workspace.runs / "tries" / "one")
    problem = Message("{file} does not say what base it was trained on: give it with --base", "cat.pt")
    (workspace.queue.folder / "000001.log").write_text(to_lines(problem))
    workspace.queue._write(replace(job, state="failed"))
    for name, field in (("en", "“Base model”"), ("zh-Hant", "「基礎模型」"), ("ja", "「ベースモデル」")):
        text, is_going = page.status(texts.sayer(name))
        assert field in text and "cat.pt" in text and "--base" not in text and not is_going


@pytest.mark.slow
def test_a_front_end_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as parent:
        args = app.parser().parse_args(["--end-with", str(parent.pid), "--port", "7991"])
        server = app.serve(Workspace(tmp_path / "runs", [tmp_path]), args, block=False)
        waiter = threading.Thread(target=server.wait, args=(args.end_with,))
        waiter.start()
        waiter.join(1)
        assert waiter.is_alive() and server.thread.is_alive()
        parent.kill()
        waiter.join(20)
        assert not waiter.is_alive() and not server.thread.is_alive()


def test_a_card_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, say = Workspace(tmp_path / "runs", [tmp_path]), texts.sayer("en")
    with gr.Blocks():
        page = RunsPage(workspace, language.Translations(), gr.BrowserState())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert page._cards(say) == "", "without a driver there is no line"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Card A, 6144, 8192, 97, 71'\necho 'Card B, [N/A], 8192, [N/A], 40'\n")
    program.chmod(0o755)
    page._cards(say)
    deadline = time.monotonic() + 20
    while not workspace.cards.latest() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workspace.cards.latest()[0] == nvidia.Reading("Card A", 6144 << 20, 8192 << 20, 97, 71)
    html = page._cards(say)
    assert "Card A · 6.0 GiB / 8.0 GiB · 97 % busy · 71 °C<" in html and "Card B · 40 °C<" in html
    program.write_text("#!/bin/sh\nexit 9\n")
    workspace.cards._due = 0.0
    page._cards(say)
    while workspace.cards.latest() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert page._cards(say) == "", "a driver that is gone leaves no old line"
