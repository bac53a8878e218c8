"""Long events return at once, and the page polls them until they end."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

import gradio as gr
from waiting import SECONDS

from lorakit.ui import tasks as tasks_module, texts
from lorakit.ui.server import Server
from lorakit.ui.tasks import Steps, Tasks, polled

SAY = texts.sayer("en")


class Page:
    """A page whose button works until `gate` opens, and the plain requests that a browser sends to it."""

    def __init__(self) -> None:
        self.gate, self.result, self.progress = threading.Event(), ["<p>ready</p>", "two"], (0, 0)
        self.session = "one"
        with gr.Blocks(analytics_enabled=False) as page:
            first, second, button = gr.HTML(), gr.Textbox(), gr.Button()
            ends = polled(Tasks(), [(button.click, self.work)], {second}, [first, second])
            ends(lambda: None, None, None, queue=False)
        self.server = Server(page, "127.0.0.1", None)
        self.names = [d["api_name"] for d in page.config["dependencies"]]
        self.ids = {d["api_name"]: d["id"] for d in page.config["dependencies"]}

    def work(self, data: object, say: object, progress: Callable[[int, int], object]) -> list[str]:
        progress(*self.progress)
        self.gate.wait(30)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def call(self, name: str, *data: object) -> tuple[list[object], float]:
        body = {"data": list(data), "fn_index": self.ids[name], "session_hash": self.session}
        request = urllib.request.Request(
            f"{self.server.address}/gradio_api/run/predict",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begin = time.monotonic()
        answer = json.loads(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).read())
        return answer["data"], time.monotonic() - begin

    def end(self) -> list[object]:
        """Poll until the work has ended, and return the last answer."""
        until = time.monotonic() + SECONDS
        while active((answer := self.call("look", None)[0])[-1]):
            assert time.monotonic() < until
        return answer


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(tasks_module, "PATIENCE", 0.05)
    page = Page()
    page.server.start()
    yield page
    page.gate.set()
    page.server.close()


def active(timer: object) -> bool:
    return isinstance(timer, dict) and timer.get("active") is True


def test_a_long_event_returns_at_once_with_its_progress(page: Page):
    page.progress = (40, 300)
    (line, *_, timer), seconds = page.call("begin", None, None)
    assert "40 of 300" in line and active(timer) and seconds < 20  # the work would take 30 s
    (line, *_, timer), _ = page.call("look", None)
    assert "40 of 300" in line and active(timer)
    page.gate.set()
    first, second, *_, timer = page.end()
    assert (first, second) == ("<p>ready</p>", "two") and not active(timer)
    # The result is sent once. A later poll returns nothing new.
    late, _ = page.call("look", None)
    assert "ready" not in str(late) and not active(late[-1])


def test_an_error_is_reported_and_ends_the_work(page: Page, capsys: pytest.CaptureFixture[str]):
    page.result = ValueError("a reason")
    page.gate.set()
    page.call("begin", None, None)
    line, *_, timer = page.end()
    assert "ValueError" in line and "a reason" not in line and "lk-problem" in line and not active(timer)
    assert "ValueError: a reason" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "/runs/one/note.json"), "No space left on device: /runs/one/note.json"),
        (OSError("no answer"), "no answer"),
    ],
)
def test_an_error_of_the_system_says_which(page: Page, error: OSError, text: str):
    page.result = error
    page.gate.set()
    page.call("begin", None, None)
    assert f"The system refused this: {text}</p>" in page.end()[0]


def test_a_page_of_an_older_program_gets_an_answer(page: Page):
    page.session = "another"
    (line, *_, timer), _ = page.call("look", None)
    assert "was restarted" in line and not active(timer)


def test_work_of_unknown_length_shows_its_progress():
    tasks, gate = Tasks(), threading.Event()

    def work(progress: Callable[[int, int], object]) -> list[str]:
        progress(812, 0)
        gate.wait(30)
        return []

    result, line, more = tasks.look(tasks.start(work), SAY)
    gate.set()
    assert result is None and "812 MiB so far" in line and more


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Writing the file: step 3 of 3 …"),
        ("zh-Hant", "正在寫入檔案：第 3 步，共 3 步"),
        ("zh-Hans", "正在写入文件：第 3 步，共 3 步"),
        ("ja", "ファイルを書き込んでいます：3 / 3"),
    ],
)
def test_the_line_names_the_step(language: str, text: str):
    tasks, gate = Tasks(), threading.Event()

    def work(progress: Steps) -> list[str]:
        progress(3, 3, "convert.writing")
        gate.wait(SECONDS)
        return []

    _, line, _ = tasks.look(tasks.start(work), texts.sayer(language))
    gate.set()
    assert text in line
