"""Make docs/images/ui.png: train on the bundled model through the front end, and look at the page of runs.

    python docs/screenshot.py [FOLDER OF PHOTOS] [--base FOLDER]

Needs the extras `ui` and `test` and Debian's Chromium. Takes as long as the run, a minute or two on a laptop.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from lorakit import guide, run_folder
from lorakit.ui import app
from lorakit.ui.desk import Desk

IMAGE = Path(__file__).parent / "images" / "ui.png"
CHROMIUM = "/usr/bin/chromium"
SUBJECT = "zib"


def main() -> None:
    """Train, then take the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", nargs="?", help="folder of photos (default: the demo's)")
    parser.add_argument("--name", help="trigger and name (default: the demo subject's)")
    parser.add_argument("--base", default="pocket", help="base model")
    parser.add_argument("--quality", default="balanced", choices=list(guide.QUALITIES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        photos = Path(args.photos).resolve() if args.photos else demo_photos(Path(room))
        desk = Desk(Path(room) / "runs", [photos])
        answers = {guide.PHOTOS: str(photos), guide.NAME: args.name or demo_name(), guide.BASE: args.base}
        job = desk.queue.train(guide.suggest(answers, args.quality))
        desk.queue.work()
        print(f"{job.folder}: {run_folder.read(job.folder).message}")
        served = app.serve(desk, app.parser().parse_args([]), block=False)
        IMAGE.parent.mkdir(exist_ok=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 980}, locale="en-US")
            page.goto(served)
            page.get_by_role("tab", name="Runs", exact=True).click()
            page.locator("#run-curves svg").first.wait_for()
            page.locator("#run-samples img").first.wait_for()
            page.wait_for_timeout(1500)
            page.screenshot(path=IMAGE)
            browser.close()
    print(IMAGE)


def demo_photos(room: Path) -> Path:
    """The bundled subject's pictures, as `lorakit demo` draws them."""
    from lorakit import demo

    folder = room / "photos"
    demo.write_photos(SUBJECT, folder)
    return folder


def demo_name() -> str:
    """The trigger that the demo uses, and what its subject is."""
    from lorakit import demo
    from lorakit.pocket import subjects

    return f"{demo.TRIGGER} {subjects.SUBJECTS[SUBJECT].kind}"


if __name__ == "__main__":
    main()
