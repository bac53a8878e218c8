"""The page of runs: it shows the reason of each state, and a button's message disappears when the state changes."""

import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from waiting import REQUEST_SECONDS, SECONDS, wait_for

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core import atomic, foreign_json  # noqa: E402
from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.core.events import Event  # noqa: E402
from lorakit.core.messages import Message  # noqa: E402
from lorakit.runs import quickstart  # noqa: E402
from lorakit.runs.lessons import SHORT  # noqa: E402
from lorakit.runs.run_folder import LogReader, RunFolder  # noqa: E402
from lorakit.ui import address, language, texts, workspace as workspace_module  # noqa: E402
from lorakit.ui.pages import compare  # noqa: E402
from lorakit.ui.pages.runs import ENDED_SILENTLY, EVERY, EVERY_IDLE, RunsPage  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY = texts.sayer("en")


@pytest.fixture
def page(tmp_path: Path) -> RunsPage:
    workspace = Workspace(tmp_path / "runs", [])
    with gr.Blocks():
        return RunsPage(workspace, language.Translations(), gr.BrowserState())


@pytest.fixture
def run(page: RunsPage, tmp_path: Path) -> RunFolder:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "0.png")
    answers = {quickstart.PHOTOS: str(tmp_path / "photos"), quickstart.NAME: "sks toy"}
    config = quickstart.config_for_answers(answers, "quick")
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(page.workspace.runs / "one"))))
    (run.checkpoints / "step-000002").mkdir()
    run.update(state="running", step=2, steps=6)
    run.unlock()
    return run


def kill(run: RunFolder) -> None:
    """Change the state of a run to that of a killed process."""
    text = run.state_file.read_text()
    atomic.write(run.state_file, text.replace(f'"pid": {run._state.pid}', '"pid": 999999999'))


def look(page: RunsPage, hashes: dict[str, object] | None = None, say: texts.Say = SAY) -> dict[str, object]:
    names = ["run", "hashes", "list", "work", "status", "stop", "resume", "steps", "cancel", "download", "samples",
             "curves", "log", "message", "cards", "view", "timer"]  # fmt: skip
    return dict(zip([*names, *page.tools.parts], page.poll("one", hashes or {}, say), strict=True))


def test_the_page_reads_less_often_while_no_run_is_under_way(page: RunsPage, run: RunFolder):
    first = look(page)
    assert first["timer"]["value"] == EVERY and "value" not in look(page, first["hashes"])["timer"]
    run.update(state="done")
    then = look(page, first["hashes"])
    assert then["timer"]["value"] == EVERY_IDLE > EVERY
    page.workspace.queue.resume(run.path, 8)
    assert look(page, then["hashes"])["timer"]["value"] == EVERY, "a job waits"


def test_the_self_check_is_translated(page: RunsPage, run: RunFolder):
    detail = Message("modules present, finite and not zero: {some} of {count}", 147, 147)
    finding = {"name": "kohya file", "passed": True, "detail": detail}
    run.write_report([finding])
    assert "kohya 檔案：147 個模組中有 147 個，皆為有限且非零" in look(page, say=texts.sayer("zh-Hant"))["status"]
    assert "kohya file: modules present, finite and not zero: 147 of 147" in look(page)["status"]


@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_a_run_that_was_too_short_says_so(page: RunsPage, run: RunFolder, language: str):
    say, lesson = texts.sayer(language), Message(SHORT, 60, 0.8)
    run.write_report([], [lesson])
    run.update(state="done")
    status = look(page, say=say)["status"]
    assert f"<h3>{say('run.lessons')}</h3>" in status and f"<li>{escape(say.translate(lesson))}</li>" in status
    assert ("the run was too short; train at least twice as long" in status) == (language == "en")


def test_an_interrupted_run_says_why_and_what_to_do(page: RunsPage, run: RunFolder):
    assert ENDED_SILENTLY not in look(page)["status"]
    kill(run)
    status = look(page)["status"]
    assert 'data-state="interrupted"' in status and ENDED_SILENTLY in status
    assert "按「繼續」" in look(page, say=texts.sayer("zh-Hant"))["status"]


def test_the_message_of_a_button_disappears_when_the_state_changes(page: RunsPage, run: RunFolder):
    first = look(page)
    assert first["message"] == gr.skip()
    assert look(page, first["hashes"])["message"] == gr.skip(), "the same state: what was said stays"
    kill(run)
    assert look(page, first["hashes"])["message"] == ""


def test_a_stopped_run_can_be_queued_before_its_process_ends(page: RunsPage, run: RunFolder):
    queue = page.workspace.queue
    job = queue.command(["train"], run.path)
    queue._write(replace(job, state="running", pid=run._state.pid, pid_start=run._state.pid_start))
    with pytest.raises(LorakitError, match="one is in the queue already"):
        queue.resume(run.path)
    run.request_stop()  # the run still has to save before it ends
    assert queue.resume(run.path).state == "waiting"
    assert queue.cancel(queue.waiting()[0].number)
    run.stop_file.unlink()
    run.update(state="stopped", message="stopped")
    assert queue.resume(run.path).state == "waiting"
    with pytest.raises(LorakitError, match="one is in the queue already"):
        queue.resume(run.path)


def test_a_run_that_was_stopped_offers_its_file(page: RunsPage, run: RunFolder):
    assert look(page)["download"] == gr.update(visible=False, value=None, variant="secondary")
    (run.path / "sks-toy.safetensors").write_bytes(b"weights")
    run.update(state="stopped", adapter="sks-toy.safetensors")
    offered = look(page)["download"]
    assert offered["visible"] and Path(offered["value"]).read_bytes() == b"weights"
    assert offered["variant"] == "secondary"
    run.update(state="done", adapter="sks-toy.safetensors")
    assert look(page)["download"]["variant"] == "primary", "nothing is left to do but to take it"


def test_a_file_that_cannot_be_offered_says_why(page: RunsPage, run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """The page shows no button, but the error, its reason and a remedy. First it says that the file is being copied."""
    gate = threading.Event()

    def copy(source: Path, target: Path) -> None:
        assert gate.wait(SECONDS)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
    monkeypatch.setattr(shutil, "copyfile", copy)
    monkeypatch.setattr(workspace_module, "LINK_SECONDS", 0.01)
    (run.path / "sks-toy.safetensors").write_bytes(b"weights")
    run.update(state="done", adapter="sks-toy.safetensors")
    assert "sks-toy.safetensors is being copied for the download" in look(page)["status"]
    gate.set()
    wait_for(lambda: "is being copied" not in look(page)["status"])
    parts = look(page)
    assert not parts["download"]["visible"] and parts["download"]["value"] is None
    assert (
        "could be made (No space left on device); make room in" in parts["status"] and "role=alert" in parts["status"]
    )
    assert "請在" in look(page, say=texts.sayer("zh-Hant"))["status"]
    message, file = compare.export_step(page.workspace, "one", 2, "", SAY)
    assert "No space left on device" in message
    assert file == gr.update(visible=False)


def test_a_run_in_preparation_shows_its_phase_and_progress(page: RunsPage, run: RunFolder):
    run.update(state="preparing")
    run.record(Event("phase", None, {"phase": "loading the base"}))
    run.update(state="preparing")
    assert "<p>loading the base</p>" in look(page)["status"]
    run.record(Event("work", None, {"doing": "drawing the class images", "position": 12, "total": 42}))
    run.update(state="preparing")
    assert "drawing the class images: 12 of 42" in look(page)["status"]
    assert "正在繪製類別圖片：12 / 42" in look(page, say=texts.sayer("zh-Hant"))["status"]
    run.update(state="running")
    assert "12 of 42" not in look(page)["status"]


def test_the_page_does_not_wait_for_its_pictures(page: RunsPage, run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """A slow disk may take longer for a picture than a request may take."""
    gate, get = threading.Event(), page.workspace.thumbnails.get

    def slowly(*arguments: object) -> object:
        assert gate.wait(SECONDS)
        return get(*arguments)

    monkeypatch.setattr(page.workspace.thumbnails, "get", slowly)
    for step in (0, 2):
        run.save_samples(step, [Image.new("RGB", (16, 16))], ["a"])
    run.update(state="done")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(look, page)
        try:
            samples = first.result(REQUEST_SECONDS)["samples"]
        finally:
            gate.set()
    assert samples.count("data-picture=") == samples.count("lk-pending") == 4 and "<img" not in samples
    wait_for(lambda: "lk-pending" not in look(page)["samples"])
    assert look(page)["samples"].count('<img src="data:image/webp') == 4
    assert look(page, first.result()["hashes"])["samples"] != gr.skip(), "the next poll sends the pictures"


@pytest.mark.parametrize(
    ("referer", "run"),
    [
        ("http://127.0.0.1:7860/?tab=runs&run=2026-a%20b", "2026-a b"),
        ("http://127.0.0.1:7860/?tab=runs", ""),
        ("", ""),
        ("http://[", ""),
    ],
)
def test_the_address_names_the_run(referer: str, run: str):
    assert address.run_in(SimpleNamespace(headers={"referer": referer})) == run


def test_the_log_is_read_from_its_last_position(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    reader = LogReader(run.log_file, "step")
    run.event("step", step=1)
    assert [event["step"] for event in reader.events()] == [1]
    parsed = []
    monkeypatch.setattr(foreign_json, "loads", lambda text: parsed.append(text) or json.loads(text))
    with run.log_file.open("a") as file:
        file.write('{"event": "step", "step": 2}\nno event\n{"event": "st')
        file.flush()
        assert [event["step"] for event in reader.events()] == [1, 2] and len(parsed) == 2
        file.write('ep", "step": 3}\n')
    assert [event["step"] for event in reader.events()] == [1, 2, 3] and len(parsed) == 3
    run.log_file.write_text('{"event": "step", "step": 9}\n')
    assert [event["step"] for event in reader.events()] == [9], "another log of that name"


def test_states_that_did_not_change_are_not_read_again(page: RunsPage, run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    page.workspace.queue.command(["sample"], run.path / "x")
    page.workspace.runs_and_jobs()
    monkeypatch.setattr(foreign_json, "loads", None)
    (name, state) = page.workspace.runs_and_jobs()[0]
    assert (name, state.step) == ("one", 2)
    monkeypatch.undo()
    run.update(state="running", step=3)
    assert page.workspace.runs_and_jobs()[0][1].step == 3


def test_resume_is_a_large_button_only_after_an_interruption(page: RunsPage, run: RunFolder):
    assert look(page)["resume"] == gr.update(visible=False, variant="primary")
    run.update(state="stopped")
    assert look(page)["resume"] == gr.update(visible=True, variant="primary")
    run.update(state="done")
    assert look(page)["resume"] == gr.update(visible=True, variant="secondary")


def test_the_log_is_in_the_language_of_the_page(page: RunsPage, run: RunFolder):
    run.event("warning", message="blurred")
    run.event("done", adapter="sks-toy.safetensors")
    assert "! blurred" in look(page)["log"] and "done and checked" in look(page)["log"]
    log = look(page, say=texts.sayer("zh-Hant"))["log"]
    assert "! 模糊" in log and "完成，且已檢驗" in log and "done" not in log


def test_a_finished_run_shows_its_result_and_the_base(page: RunsPage, run: RunFolder):
    picture = Image.new("RGB", (16, 16))
    picture.info["lorakit"] = json.dumps({"prompt": "a <toy>"})
    run.save_samples(2, [picture, picture], ["a", "b"])
    run.update(state="done")
    assert "The result and the base model" not in look(page)["samples"], "the base drew none"
    run.save_samples(0, [picture, picture], ["a", "b"])
    samples = look(page)["samples"]
    assert samples.index("The result and the base model") < samples.index("Samples")
    assert samples.count("/01.png") == samples.count("/02.png") == 2
    assert samples.count("<th scope=col>a &lt;toy&gt;</th>") == 2
    assert "The pictures are of step" not in samples
    run.update(state="stopped", step=3)
    assert "The pictures are of step 2; the run ended at step 3." in look(page)["samples"]
    run.update(state="running")
    assert "The result" not in look(page)["samples"]
