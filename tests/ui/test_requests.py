"""No request of the page takes long, because a proxy may close a connection that is silent for some seconds."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import open_page
from PIL import Image
from waiting import REQUEST_SECONDS, SECONDS

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from safetensors.numpy import save_file  # noqa: E402

from lorakit.data import checks  # noqa: E402
from lorakit.runs import quickstart  # noqa: E402
from lorakit.ui import app, commands, language, tasks as tasks_module, texts  # noqa: E402
from lorakit.ui.tasks import Tasks  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

# Events whose own request returns the result. They read or write files of some kilobytes, or only names.
PLAIN = {
    "add_folder", "answer", "apply", "choose", "difference", "edit", "end", "go_on", "grid_status",
    "handler", "keep", "look", "poll", "presets", "remedy", "remove_folder", "restore", "reuse", "runs",
    "save_caption", "show", "take", "visit",
}  # fmt: skip
# Time limit of a request in milliseconds, long enough for a busy machine.
LONGEST = 1000 * REQUEST_SECONDS


def is_polled(event: Any) -> bool:
    return event.fn is not None and event.fn.__qualname__.startswith("polled.")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 50 + 20 * number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    return Workspace(tmp_path / "runs", [tmp_path])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    """The front end of an empty folder. It is not served."""
    folder = tmp_path_factory.mktemp("page")
    return app.build(Workspace(folder / "runs", [folder]), language.Translations())


def test_every_event_that_can_be_long_is_polled(page: gr.Blocks):
    plain = {event.fn.__name__ for event in page.fns.values() if event.fn and not is_polled(event)}
    of_programs = {"start", "stop", "resume", "run", "captions", "samples"}
    assert plain - {"<lambda>"} - of_programs == PLAIN


def test_a_slow_task_holds_no_request_of_the_page(page: gr.Blocks, monkeypatch: pytest.MonkeyPatch):
    """The test sends each polled event, with work that does not end before all requests have returned."""
    gate, start = threading.Event(), Tasks.start
    monkeypatch.setattr(tasks_module, "PATIENCE", 0.01)

    def slowly(self: Tasks, work: Callable[..., Sequence[object]]) -> int:
        return start(self, lambda progress: [gate.wait(SECONDS)])

    monkeypatch.setattr(Tasks, "start", slowly)
    begins = [event for event in page.fns.values() if is_polled(event) and event.fn.__name__ == "begin"]
    assert len(begins) > 20
    request = SimpleNamespace(headers={})
    try:
        for event in begins:
            values = {component: getattr(component, "value", None) for component in event.inputs}
            begin = time.monotonic()
            line, *_, timer = event.fn(values, request)
            assert 1000 * (time.monotonic() - begin) < LONGEST
            assert "Working" in line and timer.active
    finally:
        gate.set()


@pytest.fixture
def gate(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Check, download, conversion and captions wait until this gate opens."""
    gate, file = threading.Event(), workspace.roots.paths[0] / "x.safetensors"
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (2, 768), "lora_up.weight": (320, 2)}
    save_file({f"{layer}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}, file)

    def slowly(result: Callable[..., Any]) -> Callable[..., Any]:
        def work(*arguments: Any, **more: Any) -> Any:
            assert gate.wait(SECONDS)
            return result(*arguments, **more)

        return work

    captions = {"captions": {}, "had_one": 3, "failed": {}, "stopped": False}
    monkeypatch.setattr(checks, "check", slowly(checks.check))
    monkeypatch.setattr(quickstart, "must_be_fetched", lambda name, vae=False: name == "owner/name")
    monkeypatch.setattr(commands.EXPORTER, "prepare", lambda: None)  # `export` below starts no process
    monkeypatch.setattr(commands, "fetch", slowly(lambda *arguments, **more: None))
    monkeypatch.setattr(commands, "export", slowly(lambda *arguments, **more: [file]))
    monkeypatch.setattr(commands, "caption", slowly(lambda *arguments, **more: captions))
    yield gate
    gate.set()


@pytest.mark.slow
def test_a_browser_shows_long_work_without_a_long_request(chromium: Any, workspace: Workspace, gate: threading.Event):
    root, lengths = workspace.roots.paths[0], dict[str, float]()
    server = app.serve(workspace, app.parser().parse_args([]), block=False)

    def record(request: Any) -> None:
        lengths[request.url] = max(lengths.get(request.url, 0.0), request.timing["responseEnd"])

    def choose(element: str, text: object) -> None:
        page.locator(f"#{element} input").fill(str(text))
        page.locator(f"#{element} input").press("Enter")

    def wait_for_line(element: str, text: str | re.Pattern[str] = "Working") -> None:
        page.locator(f"#{element}").get_by_text(text).first.wait_for()

    page = open_page(chromium, server.address, {"requestfinished": record})
    try:
        choose("photos-folder", root / "photos")
        page.locator("#photos-cards .lk-card").first.wait_for()
        # The check shows either the number of its photo or the seconds of its work.
        wait_for_line("photos-summary", re.compile(f"{re.escape(texts.sayer('en')('photos.checking'))}|Working"))
        page.locator("#captions > button").click()
        page.locator("#captions-write").click()
        wait_for_line("captions-message")
        page.locator("#pages button[role=tab]").nth(1).click()
        choose("option-model-base", "owner/name")
        page.locator("#base-fetch").click()
        wait_for_line("base-fetched")
        page.locator("#pages button[role=tab]").nth(5).click()
        choose("adapter-path", root / "x.safetensors")
        page.locator("#adapter-convert").click()
        wait_for_line("adapter-message", re.compile(r"([6-9]|\d\d) s"))  # longer than the limit of a request
        gate.set()
        page.locator("#adapter-file a").first.wait_for()
    finally:
        gate.set()
        page.context.close()
        server.close()
    assert len(lengths) > 3 and max(lengths.values()) < LONGEST, max(lengths.items(), key=lambda one: one[1])
