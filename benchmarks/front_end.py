"""Measure the front end with many runs and photos: time of its pages, and axe-core's violations.

    python benchmarks/front_end.py [--runs 500] [--photos 5000] [--steps 50000] [--axe axe.min.js] [--json FILE]

The photos are small JPEG files. Each run has a state and a log; the page shows the newest run, which is still running.
`--axe` is the script of axe-core (`npm pack axe-core`). With it, Chromium also opens each page at 1280 and 390 pixels.

    python benchmarks/front_end.py --journey

counts the clicks, fields and seconds from five photos to an adapter, its file and a picture drawn with it. It trains
the bundled base with the shortest training that the page offers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import common
import gradio as gr
import numpy as np
import psutil
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lorakit.cli import demo
from lorakit.config import Config, load
from lorakit.runs.run_folder import RunFolder
from lorakit.ui import app, language, texts
from lorakit.ui.pages.photos import PhotosPage
from lorakit.ui.pages.runs import RunsPage
from lorakit.ui.workspace import Workspace

POLLS = 20
CHROMIUM = "/usr/bin/chromium"
LIMIT = 300_000
SAY = texts.sayer("en")


def main() -> None:
    """Create runs and photos, measure the pages, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=500, help="number of runs (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=5000, help="number of photos (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=50_000, help="steps in the log of the running run (default: %(default)s)"
    )
    parser.add_argument("--axe", type=Path, help="script of axe-core, axe.min.js")
    parser.add_argument("--journey", action="store_true", help="measure only the way from photos to an adapter")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    if args.journey:
        common.finish([common.row(*row) for row in journey()], args.json)
        return
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        photos = make_photos(room / "photos", args.photos)
        make_runs(room / "runs", args.runs, args.steps)
        workspace = Workspace(room / "runs", [room])
        rows = [*of_runs(workspace), *of_photos(workspace, photos)]
        server = app.serve(workspace, app.parser().parse_args([]), block=False)
        rows += of_page(server.address)
        rows += of_axe(server.address, args.axe.read_text(encoding="utf-8")) if args.axe else []
        server.close()
    common.finish([common.row(*row) for row in rows], args.json)


class Journey:
    """A user's path through the page, with the count of clicks and fields, and the seconds of each part."""

    def __init__(self, page: Page):
        self.page, self.clicks, self.fields, self.rows = page, 0, 0, list[tuple[str, float, str]]()
        self.start = self.last = time.perf_counter()

    def click(self, selector: str) -> None:
        """Click an element as soon as it is enabled."""
        self.page.locator(selector).click()
        self.clicks += 1

    def fill(self, selector: str, text: str) -> None:
        """Fill a field with text."""
        self.page.locator(selector).fill(text)
        self.fields += 1

    def arrive(self, what: str, selector: str) -> None:
        """Wait for an element and record the seconds since the last one."""
        self.page.locator(selector).first.wait_for()
        now = time.perf_counter()
        self.rows.append((f"journey: {what}", now - self.last, "s"))
        self.last = now


def journey() -> list[tuple[str, float, str]]:
    """Go from five photos to an adapter and a picture drawn with it."""
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        room = Path(place)
        demo.write_photos("zib", room / "all")
        photos = sorted((room / "all").glob("*.png"))[:5]
        server = app.serve(Workspace(room / "runs", [room]), app.parser().parse_args([]), block=False)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en")
        page.set_default_timeout(10 * LIMIT)
        person = Journey(page)
        page.goto(server.address)
        person.arrive("the page", "body[data-ready]")
        page.locator("#photos-upload input[type=file]").set_input_files(photos)
        person.clicks += 2  # one on the upload box and one in the system's file dialog
        person.arrive("cards of the photos", ".lk-card:nth-child(5) img")
        person.click("#photos-next")
        person.fill("#option-data-name :is(input, textarea)", "sks toy")
        person.click("#quality input[value=quick]")
        person.arrive("the plan", "#train-start:enabled")
        person.click("#train-start")
        person.arrive("the first step", "#run-status section:not([data-step='0'])")
        person.arrive("the adapter, checked", "#run-status section[data-state=done]")
        with page.expect_download() as file:
            person.click("#run-download:enabled")
        assert file.value.path().stat().st_size
        person.arrive("its file, downloaded", "#run-download")
        person.click("#pages button[role=tab]:nth-of-type(5)")
        page.wait_for_timeout(1500)  # the page loads the choices
        person.click("#try-adapter input")
        person.click("#try-adapter [role=option][data-index='0']")
        person.fill("#try-prompts textarea", "a photo of sks toy in the snow")
        person.click("#try-draw")
        person.arrive("a picture by it, beside the base's", "#try-pictures img")
        trained = sum(seconds for _, seconds, _ in person.rows[3:])
        person.rows.append(("journey: from Start training to that picture", trained, "s"))
        person.rows.append(("journey: from start to end", time.perf_counter() - person.start, "s"))
        browser.close()
        server.close()
    return [*person.rows, ("journey", person.clicks, "clicks"), ("journey", person.fields, "fields")]


def make_photos(folder: Path, count: int) -> Path:
    """Write `count` small photos, all different."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        colours = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg")
    return folder


def make_runs(folder: Path, count: int, steps: int) -> None:
    """Write `count` runs with a log of 100 steps. The last one is still running and has `steps` steps."""
    folder.mkdir()
    config = load("subject-pocket", {"data.folder": str(folder.parent / "photos"), "data.name": "sks toy"})
    for number in range(count):
        run = RunFolder(folder / f"run-{number:04d}")
        run.path.mkdir()
        length = steps if number == count - 1 else 100
        with run.log_file.open("w", encoding="utf-8") as log:
            for step in range(1, length + 1):
                loss = 0.2 / step**0.1
                event = {"event": "step", "step": step, "loss": loss, "smoothed_loss": loss, "learning_rate": 1e-4}
                log.write(json.dumps(event) + "\n")
        live = number == count - 1
        state = {"state": "running" if live else "done", "step": length, "steps": length, "updated": time.time()}
        own = psutil.Process()
        state |= {"pid": own.pid, "pid_start": own.create_time()} if live else {}
        run.state_file.write_text(json.dumps(state), encoding="utf-8")
        run.config_file.write_text(f"# {config.data.name}\n", encoding="utf-8")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall time and CPU time of a call in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def of_runs(workspace: Workspace) -> list[tuple[str, float, str]]:
    """Time the page of runs: its first state, and the update of each second."""
    with gr.Blocks():
        page = RunsPage(workspace, language.Translations(), gr.BrowserState())
    name = sorted(path.name for path in workspace.runs.glob("run-*"))[-1]
    hashes: dict[str, object] = {}

    def poll() -> None:
        answer = page.poll(name, hashes, SAY)[1]
        if isinstance(answer, dict):
            hashes.update(answer)

    first, _ = timed(poll)
    _, processor = timed(lambda: [poll() for _ in range(POLLS)])
    return [("page of runs, first", first, "s"), ("page of runs, each second", 1000 * processor / POLLS, "ms CPU")]


def of_photos(workspace: Workspace, photos: Path) -> list[tuple[str, float, str]]:
    """Time the page of photos: the first cards, the check of all photos, and the next cards."""
    with gr.Blocks():
        page = PhotosPage(workspace, language.Translations())
    config: Config = load("subject-pocket", {"data.folder": str(photos), "data.name": "sks toy"})
    first, _ = timed(lambda: page.show(str(photos), 0, config, SAY))
    checked, _ = timed(lambda: page.checked(str(photos), 0, config, SAY))
    later, _ = timed(lambda: page.show(str(photos), 48, config, SAY))
    return [("first 48 photos", first, "s"), ("with the check", checked, "s"), ("the next 48", later, "s")]


def of_page(address: str) -> list[tuple[str, float, str]]:
    """Time the request of the page, and measure its size."""
    request = urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start = time.perf_counter()
    body = opener.open(request).read()
    seconds = time.perf_counter() - start
    size = len(gzip.decompress(body)) if body[:2] == b"\x1f\x8b" else len(body)
    return [
        ("page, request", seconds, "s"),
        ("page", size / 1024, "KiB"),
        ("page, compressed", len(body) / 1024, "KiB"),
    ]


def of_axe(address: str, script: str) -> list[tuple[str, float, str]]:
    """Count the elements that violate each of axe-core's rules, over all pages and both widths."""
    counts: Counter[str] = Counter()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            page.set_default_timeout(LIMIT)
            page.goto(address)
            page.wait_for_selector("body[data-ready]")
            page.evaluate(script)
            for tab in page.locator("#pages button[role=tab]").all():
                tab.click()
                page.wait_for_timeout(1500)
                for violation in page.evaluate("async () => (await axe.run()).violations"):
                    counts[str(violation["id"])] += len(violation["nodes"])
            page.close()
        browser.close()
    return [("axe-core: " + rule, count, "elements") for rule, count in sorted(counts.items())] or [
        ("axe-core", 0, "elements")
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
