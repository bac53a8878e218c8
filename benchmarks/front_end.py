"""What the front end takes with much to show: time and processor time of its pages, and what axe-core says of them.

    python benchmarks/front_end.py [--runs 500] [--photos 5000] [--steps 50000] [--axe axe.min.js] [--json FILE]

The photos are small JPEG files; the runs have a state and a log, and the one that is on display is under way. `--axe`
is the script of axe-core (`npm pack axe-core`); each page is then opened in Chromium at 1280 and 390 pixels.
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
from playwright.sync_api import sync_playwright

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
    """Make the runs and photos, look at the pages, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--photos", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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


def make_photos(folder: Path, count: int) -> Path:
    """So many small photos, no two alike."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        colours = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg")
    return folder


def make_runs(folder: Path, count: int, steps: int) -> None:
    """So many runs with a log of 100 steps; the newest is under way and has `steps`."""
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
    """Seconds and seconds of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def of_runs(workspace: Workspace) -> list[tuple[str, float, str]]:
    """The page of runs: opened first, and looked at again each second."""
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
    """The page of photos: the first cards, and all of it with the check."""
    with gr.Blocks():
        page = PhotosPage(workspace, language.Translations())
    config: Config = load("subject-pocket", {"data.folder": str(photos), "data.name": "sks toy"})
    first, _ = timed(lambda: page.show(str(photos), 0, config, SAY))
    checked, _ = timed(lambda: page.checked(str(photos), 0, config, SAY))
    later, _ = timed(lambda: page.show(str(photos), 48, config, SAY))
    return [("first 48 photos", first, "s"), ("with the check", checked, "s"), ("the next 48", later, "s")]


def of_page(address: str) -> list[tuple[str, float, str]]:
    """The page itself, as a browser asks for it."""
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
    """Elements that break each of axe-core's rules, over all pages and both widths."""
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
