"""Look at every page of the front end: train on the bundled model, then photograph each page, wide and narrow, light
and dark.

    python docs/screenshot.py FOLDER             # all of them, into FOLDER
    python docs/screenshot.py FOLDER --languages # in each language
    python docs/screenshot.py FOLDER --readme    # and the one that README shows, docs/front-end.png

Needs the extras `ui` and `test` and Debian's Chromium. The photos are renders of a bundled subject. Takes as long as
the run and a grid, some minutes on a laptop.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from lorakit.cli import demo
from lorakit.families.pocket import subjects
from lorakit.runs import quickstart, run_folder
from lorakit.ui import app, texts
from lorakit.ui.pages import try_it
from lorakit.ui.workspace import Workspace

README = Path(__file__).with_name("front-end.png")
CHROMIUM = "/usr/bin/chromium"
SUBJECT = "zib"
NAME = f"{demo.TRIGGER} {subjects.SUBJECTS[SUBJECT].kind}"
STEPS = 150
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
PATIENCE = 300_000


def main() -> None:
    """Train, then photograph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--languages", action="store_true", help="photograph each language, not only English")
    parser.add_argument("--readme", action="store_true", help=f"write {README.name} as well")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        room = Path(place) / "pictures"
        photos = demo_photos(room / SUBJECT)
        workspace = Workspace(room / "runs", [room])
        run = train(workspace, photos)
        served = app.serve(workspace, app.parser().parse_args([]), block=False).address
        languages = texts.LANGUAGES if args.languages else ("en",)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for language, scheme, size in itertools.product(languages, ("light", "dark"), SIZES):
                width, height = SIZES[size]
                look = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
                look["locale"] = texts.source(language).about.locale
                for name, page in pages(browser, served, photos, run, look):
                    page.screenshot(path=args.folder / f"{name}-{size}-{scheme}-{language}.png", full_page=True)
                    if args.readme and (name, size, scheme, language) == ("runs", "wide", "light", "en"):
                        page.screenshot(path=README)
            browser.close()
    print(args.folder)


def demo_photos(folder: Path) -> Path:
    """The bundled subject's pictures as `lorakit demo` draws them, some of them wider than high."""
    demo.write_photos(SUBJECT, folder)
    for path in sorted(folder.glob("*.png"))[::5]:
        with Image.open(path) as image:
            image.crop((0, 8, 64, 56)).save(path)
    (folder / "02.txt").unlink()
    return folder


def train(workspace: Workspace, photos: Path) -> Path:
    """A run that ended well, and one that failed."""
    answers = {quickstart.PHOTOS: str(photos), quickstart.NAME: NAME}
    changed = {"train.steps": STEPS, "train.prior": "none", "train.batch_size": 4}
    changed["sample.prompts"] = tuple(f"a photo of {NAME} {scene}" for scene in ("in snow", "on a beach", "at night"))
    wanted = workspace.queue.train(quickstart.config_for_answers(answers, "balanced", None, changed))
    workspace.queue.train(quickstart.config_for_answers(answers | {quickstart.PHOTOS: str(photos / "moved")}, "quick"))
    workspace.queue.work()
    run = Path(wanted.folder)
    print(f"{run}: {run_folder.read(run).message}")
    return run


def pages(browser: Browser, address: str, photos: Path, run: Path, look: dict[str, Any]) -> Iterator[tuple[str, Page]]:
    """Each page once it shows what it has to: (name, page)."""
    page = browser.new_context(**look).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator("body[data-ready]").wait_for()
    steps: dict[str, Callable[[Page, Path, Path], None]] = {
        "photos": show_photos, "train": show_train, "options": show_options, "runs": show_runs,
        "compare": show_compare, "try": show_try, "adapter": show_adapter,
    }  # fmt: skip
    for name, show in steps.items():
        show(page, photos, run)
        # Whatever still moves: fonts, the progress bar.
        page.wait_for_timeout(800)
        yield name, page
    page.context.close()


def open_tab(page: Page, number: int) -> None:
    """Open a page by its place in the row of tabs."""
    page.locator("#pages button[role=tab]").nth(number).click()


def choose(page: Page, element: str, text: object) -> None:
    """Type into a field with suggestions."""
    page.locator(f"#{element} input").fill(str(text))
    page.locator(f"#{element} input").press("Enter")


def show_photos(page: Page, photos: Path, run: Path) -> None:
    """Photos that were checked."""
    choose(page, "photos-folder", photos)
    page.locator(".lk-card .lk-crop").first.wait_for()


def show_train(page: Page, photos: Path, run: Path) -> None:
    """The five answers and the plan."""
    page.locator("#photos-next").click()
    page.locator("#option-data-name :is(input, textarea)").fill(NAME)
    page.locator("#train-plan .lk-facts").wait_for()


def show_options(page: Page, photos: Path, run: Path) -> None:
    """All options: one changed, one wrong, and what another preset would change."""
    page.locator("#train-options > button").click()
    page.locator("#option-adapter-rank input").fill("4")
    page.locator("#option-train-batch_size input").fill("0")
    page.locator("#preset input").click()
    page.get_by_role("option", name="style-pocket", exact=True).click()
    page.locator("#preset-difference table").wait_for()
    page.locator("#train-plan .lk-errors").wait_for()


def show_runs(page: Page, photos: Path, run: Path) -> None:
    """The run that ended, among others."""
    open_tab(page, 2)
    page.locator(f'[data-run="{run.name}"]').click()
    page.locator("#run-curves svg").first.wait_for()
    page.locator("#run-samples img").first.wait_for()


def show_compare(page: Page, photos: Path, run: Path) -> None:
    """Its checkpoints, one marked, and a grid."""
    open_tab(page, 3)
    page.locator("#compare-table td img").first.wait_for()
    page.locator("#compare-mark").click()
    page.locator("#compare-table .lk-marked").wait_for()
    page.locator("#compare-draw > button").click()


def show_try(page: Page, photos: Path, run: Path) -> None:
    """Pictures drawn with the adapter. The first visit draws them."""
    open_tab(page, 4)
    choose(page, "try-adapter", f"{run.name}/{run_folder.read(run).adapter}")
    if not any((run.parent / try_it.TRIES).glob("*/grid.png")):
        page.locator("#try-prompts textarea").fill(f"a photo of {NAME} on the moon")
        page.locator("#try-draw").click()
    page.locator("#try-pictures img").first.wait_for()


def show_adapter(page: Page, photos: Path, run: Path) -> None:
    """What the adapter is."""
    open_tab(page, 5)
    choose(page, "adapter-path", run / run_folder.read(run).adapter)
    page.locator("#adapter-report section").wait_for()


if __name__ == "__main__":
    main()
