"""Draw a grid and Try it in a browser, with an export, a worker and pictures that are slow: each says how far it is,
and no request is long."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import load, open_page
from PIL import Image
from waiting import REQUEST_SECONDS, SECONDS, wait_for

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from run_with_pictures import run_with_pictures  # noqa: E402

from lorakit.core import image_grid  # noqa: E402
from lorakit.runs.queue import Job, Queue  # noqa: E402
from lorakit.ui import app, commands  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

pytestmark = pytest.mark.slow
# Milliseconds that a request may take here, and how a line ends that has waited longer than that.
LONGEST, LONGER = 1000 * REQUEST_SECONDS, r" … ([6-9]|\d\d) s"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A run with pictures and a checkpoint. No worker runs: the test is the worker. No process converts adapters."""
    folder = tmp_path_factory.mktemp("drawings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queue, "start", lambda queue: None)
        patch.setattr(commands.EXPORTER, "prepare", lambda: None)
        workspace = Workspace(folder / "runs", [folder])
        run_with_pictures(workspace, folder, {step: [picture("a toy")] for step in (0, 4)}, ["a toy"])
        yield workspace


def picture(prompt: str) -> Image.Image:
    image = Image.new("RGB", (40, 30), "red")
    image.info["lorakit"] = json.dumps({"prompt": prompt})
    return image


@contextmanager
def blocked(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, result: Callable[..., Any], part: str = ""
) -> Iterator[None]:
    """Inside, calls of a function wait if `part` is in their first argument, and then return `result` of it."""
    gate = threading.Event()

    def slowly(*arguments: Any, **more: Any) -> Any:
        assert part not in str(arguments[0]) or gate.wait(SECONDS)
        return result(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, slowly)
        try:
            yield
        finally:
            gate.set()


class Worker:
    """Plays the process that draws."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def waiting(self) -> Job:
        wait_for(lambda: self.workspace.queue.waiting())
        return self.workspace.queue.waiting()[0]

    def draw(self, job: Job, count: int, total: int) -> None:
        process = psutil.Process()
        self.workspace.queue._write(replace(job, state="running", pid=os.getpid(), pid_start=process.create_time()))
        lines = [f"picture {number} of {total}\n" for number in range(1, count + 1)]
        self.workspace.queue._file(job.number, "log").write_text("".join(lines), encoding="utf-8")

    def finish(self, job: Job) -> None:
        folder = Path(job.folder)
        folder.mkdir(parents=True)
        for name in ("01-strength-1", "grid"):
            image_grid.save(picture("a toy"), folder / f"{name}.png")
        self.workspace.queue._write(replace(job, state="done"))


class Page:
    """A browser that shows the front end, and the length of the longest request so far."""

    def __init__(self, chromium: Any, address: str):
        self.longest, self.request = 0.0, ""
        self.page = open_page(chromium, address, {"requestfinished": self._record})

    def _record(self, request: Any) -> None:
        if request.timing["responseEnd"] > self.longest:
            self.longest, self.request = request.timing["responseEnd"], f"{request.url} {request.post_data}"[:300]

    def tab(self, number: int) -> None:
        self.page.locator("#pages button[role=tab]").nth(number).click()

    def says(self, element: str, text: str) -> None:
        self.page.locator(f"#{element}").get_by_text(re.compile(text)).first.wait_for()


@pytest.fixture(scope="module")
def page(chromium: Any, workspace: Workspace) -> Iterator[Page]:
    """The page of both tests."""
    server = app.serve(workspace, app.parser().parse_args([]), block=False)
    page = Page(chromium, server.address)
    yield page
    page.page.context.close()
    server.close()


def test_a_grid(page: Page, workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    worker, export = Worker(workspace), lambda *arguments, **more: [workspace.runs / "one" / "sks-toy.safetensors"]
    page.tab(3)
    page.page.locator("#compare-table td img").first.wait_for()
    page.page.locator("#compare-draw > button").click()
    page.page.locator("#compare-files").get_by_text("step-000004").click()
    with blocked(monkeypatch, commands, "export", export):
        page.page.locator("#compare-go").click()
        page.says("compare-drawing", "Working: 2 of 2" + LONGER)
    page.says("compare-drawing", "waiting")
    for count in (1, 2):
        job = worker.waiting()
        worker.draw(job, count, 3)
        page.says("compare-drawing", f"Drawing: {count} of 3")
        with blocked(monkeypatch, workspace.thumbnails, "get", workspace.thumbnails.get, "/compare/"):
            worker.finish(job)
            page.says("compare-grids", f"Working: 1 of {count}" + (LONGER if count == 2 else ""))
        page.page.locator("#compare-grids img").nth(count - 1).wait_for()
    assert 0 < page.longest < LONGEST, page.request


def test_a_trial(page: Page, workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    worker, export = Worker(workspace), lambda *arguments, **more: [workspace.runs / "one" / "sks-toy.safetensors"]
    page.tab(4)
    adapter = page.page.locator("#try-adapter input")
    adapter.fill("one/checkpoints/step-000004")
    adapter.press("Enter")
    page.page.locator("#try-prompts textarea").fill("a toy")
    with blocked(monkeypatch, commands, "export", export):
        page.page.locator("#try-draw").click()
        page.says("try-message", "Working" + LONGER)
    job = worker.waiting()
    worker.draw(job, 1, 2)
    page.says("try-message", "Drawing: 1 of 2")
    with blocked(monkeypatch, workspace.thumbnails, "get", workspace.thumbnails.get, "/tries/"):
        worker.finish(job)
        page.says("try-pictures", "Working: 1 of 1" + LONGER)
    page.page.locator("#try-pictures img").first.wait_for()
    # A browser that comes later waits for the pictures too.
    with blocked(monkeypatch, workspace.thumbnails, "get", workspace.thumbnails.get, "/tries/"):
        load(page.page, page.page.url)
        page.tab(4)
        page.says("try-pictures", "Working: 1 of 1" + LONGER)
    page.page.locator("#try-pictures img").first.wait_for()
    assert 0 < page.longest < LONGEST, page.request
