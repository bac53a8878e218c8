"""Tests that `output.notify` reports the end of a run once, with a real server and a real command."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorakit import config
from lorakit.core.errors import LorakitError, StopRequested
from lorakit.core.events import Event, Events
from lorakit.runs import results
from lorakit.runs.preflight import preflight
from lorakit.runs.queue import Queue
from lorakit.runs.run_folder import RunFolder, State
from lorakit.training import run as training
from lorakit.ui import form
from lorakit.ui.api import Api
from lorakit.ui.pages.run_tools import RunTools
from lorakit.ui.pages.train import TrainPage
from lorakit.ui.texts import sayer
from lorakit.ui.workspace import Workspace


class Receiver(BaseHTTPRequestHandler):
    """Records request bodies; /slow never answers, /wrong answers 500, and /moved and /accepted redirect."""

    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        if self.path == "/slow":
            time.sleep(3)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body | {"type": self.headers["Content-Type"]})
        self.send_response({"/wrong": 500, "/moved": 301, "/accepted": 303}.get(self.path, 204))
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Receiver.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield http
        http.shutdown()


def address(server: ThreadingHTTPServer, path: str = "/") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def run_in(path: Path, notify: str) -> RunFolder:
    options = {"data.folder": "photos", "data.name": "sks toy", "output.folder": str(path), "output.notify": notify}
    return RunFolder.create(config.load("subject-pocket", options))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "done", "done and checked"),
        (LorakitError("no memory"), "failed", "no memory"),
        (StopRequested(), "stopped", "stopped after step 7"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_a_server_is_notified_once_of_the_end_of_a_run(
    server: ThreadingHTTPServer, tmp_path: Path, error, state: str, message: str
):
    folder = run_in(tmp_path / "run", address(server, "/x?token=t"))
    try:
        with training._outcome(folder, address(server, "/x?token=t"), Events()):
            folder.update(state="running", step=7, steps=9, loss=float("nan"))
            if error is not None:
                raise error
            folder.update(state="done", adapter="sks-toy.safetensors", message="done and checked")
    except BaseException as raised:
        assert error is not None and (raised is error or state == "stopped")
    (body,) = Receiver.bodies
    assert message in body.pop("message") and body.pop("type") == "application/json"
    line = f"lorakit: run: {state}"
    expected = {"run": "run", "state": state, "step": 7, "steps": 9, "loss": None, "text": line, "content": line}
    assert body == expected | {"adapter": "sks-toy.safetensors" if state == "done" else ""}


def test_a_command_gets_folder_and_state_without_a_shell(tmp_path: Path):
    record = script(tmp_path / "tell me.sh", f'printf "%s\\n" "$@" "$LORAKIT_STATE $LORAKIT_STEP $LORAKIT_MESSAGE" '
                    f'"$LORAKIT_RUN" > {tmp_path}/record')  # fmt: skip
    folder = tmp_path / "a; touch $(echo x) `id` 'q"
    state = State(state="failed", step=3, message='"; touch injected; "')
    assert results.notify(f"'{record}' 'two words' '$HOME;'", folder, state) is None
    lines = (tmp_path / "record").read_text().splitlines()
    assert lines == ["two words", "$HOME;", str(folder), "failed", 'failed 3 "; touch injected; "', str(folder)]
    assert not list(Path.cwd().glob("injected")) and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_failed_notification_is_one_warning_within_the_time_limit(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "NOTIFY_SECONDS", 0.5)
    sleeper = script(tmp_path / "sleeper", "sleep 321")
    causes = {
        address(server, "/slow"): "no answer within 0.5 s",
        address(server, "/wrong"): "HTTP Error 500",
        address(server, "/moved"): "HTTP Error 301",
        "http://127.0.0.1:9/": "refused",
        f"{sleeper}": "no answer within 0.5 s",
        "false": "the command ended with code 1",
        str(tmp_path): "Permission denied",
    }
    for number, (target, cause) in enumerate(causes.items()):
        folder, events = run_in(tmp_path / str(number), target), list[Event]()
        begin = time.monotonic()
        with training._outcome(folder, target, Events(events.append)):
            folder.update(state="done")
        assert time.monotonic() - begin < 2.5
        (warning,) = events  # a POST that is redirected as a GET delivers nothing
        assert warning.kind == "warning" and cause in warning.facts["message"], target
        (line,) = folder.events("warning")
        assert line["message"] == warning.facts["message"] and folder.current.state == "done"
    assert results.notify(address(server, "/accepted"), tmp_path, State()) is None
    assert not any(process.info["cmdline"] == ["sleep", "321"] for process in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("no-such-program --loud", "there is no command 'no-such-program' here"),
        ("'open", "no closing quotation"),
        ("ftp://box.example/x", "no address of http:// or https://"),
        ("file:///etc/passwd", "no address of http:// or https://"),
        ("https://", "no address of http:// or https://"),
        ("http://me:secret@box.example", "without a user's name"),
        ("http://box.example:99999", "port out of range"),
        ("https://box.example/a b", "no address of"),
        ("https://box.example/ä", "letters beyond ASCII behind the server's name are written as %XX"),
        ("https://.../x", "it is not a valid name of a server"),
        ("https://secret:token/x", "it is not a valid address"),
        ("https://box.example/secret x", "no address of http:// or https://"),
    ],
)
def test_an_invalid_target_is_refused_before_the_run(target: str, problem: str, tmp_path: Path):
    settings = config.load("subject-pocket", {"data.folder": str(tmp_path), "data.name": "x", "output.notify": target})
    (line,) = [line for line in preflight(settings).problems if line.startswith("output.notify")]
    assert problem in line and "give the address of a server" in line and "secret" not in line
    assert sayer("zh-Hant").translate(line) != line
    with pytest.raises(LorakitError, match=r"output\.notify"):
        Workspace(tmp_path / "runs", [], (), target)
    assert all(results.notify_problem(right) is None for right in ("", " ", "true 'a b'", "https://box.example/?a=b"))


@pytest.mark.parametrize(
    ("ending", "state", "message"),
    [
        ("echo 'lorakit: no photos'; exit 1", "failed", "no photos"),
        ("kill -9 $$", "interrupted", ""),
        ("exit 0", "", ""),
    ],
)
def test_the_queue_notifies_for_a_run_that_cannot(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, state: str, message: str
):
    """The queue notifies for a run that never began or was killed. A run that ends normally notifies by itself."""
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "program", ending)))
    workspace = Workspace(tmp_path / "runs", [tmp_path], (), address(server))
    monkeypatch.setattr(workspace.queue, "start", lambda: None)
    job = workspace.train(config.load("subject-pocket", {"data.folder": str(tmp_path), "data.name": "sks toy"}))
    if state != "failed":
        folder = RunFolder.create(config.load(Path(job.arguments[2]), {"output.folder": job.folder}))
        folder.update(state="running" if state else "done")
        text = folder.state_file.read_text().replace(f'"pid": {folder.current.pid}', '"pid": 4000000')
        folder.state_file.write_text(text.replace('"updated": ', '"updated": 9'))
    Queue(tmp_path / "runs").work()
    assert [(body["state"], body["message"]) for body in Receiver.bodies] == ([(state, message)] if state else [])


def test_no_page_sets_or_shows_the_notify_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import gradio as gr

    assert "output.notify" not in form.fields()
    workspace = Workspace(tmp_path, [tmp_path], (), "https://box.example/secret")
    monkeypatch.setattr(workspace.queue, "start", lambda: None)
    with pytest.raises(LorakitError, match=r"output\.notify cannot be set from a page"):
        Api(workspace).start(str(tmp_path), "sks toy", options={"output.notify": "touch /tmp/x"})
    answers = form.values(config.load("subject-pocket", {"data.name": "x"})) | {"output.notify": "touch /tmp/x"}
    read, _ = form.read(answers | {"data.folder": str(tmp_path)}, workspace.roots)
    assert read is not None and read.output.notify == ""
    job = workspace.train(read)
    assert config.load(Path(job.arguments[2])).output.notify == "https://box.example/secret"
    preset = tmp_path / "mine.toml"
    preset.write_text("[train]\nsteps = 5\n[output]\nnotify = 'touch /tmp/x'\n")
    say, t = sayer("en"), gr.I18n()
    with gr.Blocks():
        page = TrainPage(workspace, t, gr.BrowserState())
        tools = RunTools(workspace, t, gr.BrowserState())
    assert "cannot be set from a page" in page.take_preset(str(preset), say)[0]
    run = run_in(tmp_path / "run", "https://box.example/secret")
    run.unlock()
    text = str(tools.show("run", say)) + str(Api(workspace).run("run"))
    assert "subject" in text and "secret" not in text
