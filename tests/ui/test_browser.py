"""The front end in a real browser, with real training processes of a tiny model."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from lorakit import run_folder
from lorakit.export import inspect

pytestmark = pytest.mark.slow
TIMEOUT = 60_000


class Person:
    """Somebody in front of a browser."""

    def __init__(self, chromium, address: str, **options):
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US"} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.hosts: set[str] = set()
        self.page.on("request", lambda r: self.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        self.open(address)

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.locator("#photos-folder input").wait_for()
        self.page.wait_for_timeout(700)  # what the browser kept is put back

    def tab(self, number: int) -> None:
        self.page.locator("#pages button[role=tab]").nth(number).click()

    def choose(self, element: str, text: str) -> None:
        """Type into a field with suggestions."""
        field = self.page.locator(f"#{element} input")
        field.fill(text)
        field.press("Enter")

    def fill(self, key: str, text: str) -> None:
        self.page.locator(f"#knob-{key.replace('.', '-')} :is(input, textarea)").first.fill(text)

    def options(self) -> None:
        self.page.locator("#train-options > button").click()
        self.page.locator("#knob-train-seed").wait_for()

    def says(self, element: str, text: str) -> None:
        self.page.locator(f"#{element}").get_by_text(text).first.wait_for()

    def start(self) -> str:
        """Press the button once it may be pressed; the name of the run."""
        self.page.wait_for_function("!document.querySelector('#train-start').disabled")
        self.page.locator("#train-start").click()
        self.page.locator("#run-status section").wait_for()
        return self.page.locator("#run-status h3").inner_text().split()[0]

    @property
    def shown(self) -> tuple[str, int]:
        """State and step on the page of runs."""
        panel = self.page.locator("#run-status section")
        return panel.get_attribute("data-state"), int(panel.get_attribute("data-step"))

    def wait_for_state(self, *states: str) -> None:
        wanted = ", ".join(f'#run-status section[data-state="{state}"]' for state in states)
        self.page.locator(wanted).wait_for(timeout=120_000)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: Path) -> Path:
    """A place with photos, a folder without, and a base."""
    room = tmp_path_factory.mktemp("room")
    (room / "photos").mkdir()
    (room / "empty").mkdir()
    shutil.copytree(tiny_sd1, room / "base")
    for number in range(4):
        picture = Image.effect_noise((96, 80), 60 + 20 * number).convert("RGB")
        picture.save(room / "photos" / f"{number}.png")
    return room


@pytest.fixture(scope="module")
def served(front_end, room: Path):
    """One front end for all tests here."""
    return front_end(room)


def wait_for(what, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def answer(person: Person, photos: Path, base: Path, steps: int) -> None:
    """The five questions, and the options that make a run short."""
    person.tab(1)
    person.choose("knob-data-folder", str(photos))
    person.fill("data.name", "sks toy")
    person.choose("knob-model-base", str(base))
    person.options()
    person.fill("data.resolution", "64")
    person.fill("train.steps", str(steps))
    person.fill("sample.steps", "1")
    person.fill("sample.prompts", "a photo of sks toy")
    person.fill("optimizer.learning_rate", "0.01")
    person.page.locator("#knob-train-prior input[value=none]").check()


def test_from_upload_to_exported_adapter_with_a_reload_and_a_second_browser(chromium, served, room: Path):
    person = Person(chromium, served.address)
    # Upload: two photos and something that is none.
    (room / "bad.jpg").write_text("not a picture")
    files = [room / "photos" / "0.png", room / "photos" / "1.png", room / "bad.jpg"]
    person.page.locator("#photos-upload input[type=file]").set_input_files(files)
    person.says("photos-message", "2 photos taken in.")
    person.says("photos-message", "bad.jpg: text, not a picture")
    assert person.page.locator(".lk-card").count() == 2
    (upload,) = (room / "runs" / "uploads").iterdir()
    # A caption, edited in place.
    caption = person.page.locator("textarea[data-photo='0.png']")
    caption.fill("sks toy <b>{{value}} ${1+1}</b>")
    caption.press("Control+Enter")
    person.says("photos-message", "Caption of 0.png saved.")
    assert (upload / "0.txt").read_text() == "sks toy <b>{{value}} ${1+1}</b>\n"
    person.page.locator("#photos-open").click()
    person.page.wait_for_timeout(500)
    assert caption.input_value() == "sks toy <b>{{value}} ${1+1}</b>"
    # Train.
    answer(person, upload, room / "base", 40)
    name = person.start()
    person.wait_for_state("running", "done")
    # Reload, and a second browser with another language: the same run at the same step.
    person.open(served.address)
    person.tab(2)
    person.page.locator("#run-status section").wait_for()
    other = Person(chromium, served.address, locale="zh-TW")
    other.page.get_by_role("tab", name="執行紀錄", exact=True).click()
    other.page.locator("#run-status section").wait_for()
    assert other.page.locator("#run-status h3").inner_text().split()[0] == name
    person.wait_for_state("done")
    other.wait_for_state("done")
    assert person.shown == other.shown == ("done", 40)
    other.page.locator("#run-status").get_by_text("完成", exact=True).wait_for()
    run = room / "runs" / name
    state = run_folder.read(run)
    assert inspect.inspect(run / state.adapter).trigger == "sks toy"
    assert person.page.locator("#run-samples img").count() == len(list((run / "samples").glob("*.png"))) > 2
    assert person.page.locator("#run-curves svg").count() >= 2
    # The answers were kept, too.
    person.tab(1)
    person.page.wait_for_function("document.querySelector('#knob-data-name :is(input,textarea)').value === 'sks toy'")
    # Download: the file itself.
    person.tab(2)
    with person.page.expect_download() as download:
        person.page.locator("#run-download").click()
    assert Path(download.value.path()).read_bytes() == (run / state.adapter).read_bytes()
    # Compare: mark, export.
    person.tab(3)
    person.page.locator("#compare-table td img").first.wait_for()
    assert person.page.locator("#compare-table tbody tr").count() == len(list((run / "samples").glob("*.png")))
    person.page.locator("#compare-mark").click()
    person.says("compare-message", "is marked as best")
    person.page.locator("#compare-export").click()
    person.page.locator("#compare-message [role=status], #compare-message [role=alert]").wait_for()
    # Draw a checkpoint beside the base.
    person.page.locator("#compare-draw > button").click()
    for checked in person.page.locator("#compare-files input:checked").all():
        checked.uncheck()
    person.page.locator("#compare-files label").filter(has_text="step-").last.locator("input").check()
    person.page.locator("#compare-strengths :is(input, textarea)").fill("0, 1")
    person.page.locator("#compare-go").click()
    person.page.locator("#compare-grids img").wait_for(timeout=180_000)
    # Adapter: inspect.
    person.tab(4)
    person.choose("adapter-path", str(run / state.adapter))
    person.page.locator("#adapter-inspect").click()
    person.says("adapter-report", "sks")
    person.choose("adapter-path", "/etc/passwd")
    person.page.locator("#adapter-inspect").click()
    person.says("adapter-report", "is outside of")
    # Nothing was asked of any other machine, and the photos are as they were.
    assert person.hosts == other.hosts == {served.address.split("/")[2]}


def test_a_run_outlives_the_program_is_killed_resumed_and_stopped(chromium, served, front_end, room: Path):
    first = front_end(room)
    person = Person(chromium, first.address)
    answer(person, room / "photos", room / "base", 20_000)
    name = person.start()
    run = room / "runs" / name
    person.wait_for_state("running")
    # The program is closed. The run goes on, and another front end shows it.
    first.stop()
    assert run_folder.status(run) == "running"
    person = Person(chromium, served.address)
    person.tab(2)
    person.wait_for_state("running")
    assert person.page.locator("#run-status h3").inner_text().split()[0] == name
    wait_for(lambda: run_folder.read(run).step >= 10 and list(run.glob("checkpoints/*/complete")))
    os.kill(run_folder.read(run).pid, signal.SIGKILL)
    person.wait_for_state("interrupted")
    person.page.locator("#run-resume").click()
    person.wait_for_state("running")
    person.page.locator("#run-stop").click()
    person.says("run-message", "It finishes its step, saves, exports and ends.")
    person.wait_for_state("stopped")
    stopped = run_folder.read(run)
    assert 0 < stopped.step < 20_000
    assert (run / "checkpoints" / run_folder.step_name(stopped.step) / "complete").is_file()
    assert inspect.inspect(run / "sks-toy.safetensors").trigger == "sks toy"
    person.page.locator("#run-resume").wait_for()
    # The list shows both runs, and either can be looked at.
    person.page.locator("#runs-list button").filter(has_text="100 %").click()
    person.wait_for_state("done")


def test_what_is_wrong_is_said_where_it_is_wrong(chromium, served, room: Path):
    person = Person(chromium, served.address)
    for path, message in (
        (room / "empty", "0 images in"),
        (room.parent, "is outside of"),
        (room / "nowhere", "does not exist"),
    ):
        person.choose("photos-folder", str(path))
        person.page.locator("#photos-open").click()
        person.says("photos-message", message)
    answer(person, room / "photos", room / "base", 10)
    person.fill("adapter.rank", "0")
    person.says("knob-adapter-rank", "must be between 1 and 1024")
    assert person.page.locator("#train-start").is_disabled()
    person.fill("adapter.rank", "4")
    person.says("knob-adapter-rank", "Changed from the preset")
    person.says("train-changed", "adapter.rank: 16 → 4")
    person.choose("knob-model-base", str(room / "photos"))
    person.says("knob-model-base", "not")
    person.choose("knob-data-folder", str(room / "empty"))
    # A preset's difference is shown before it is applied.
    person.choose("knob-model-base", str(room / "base"))
    person.page.locator("#preset input").click()
    person.page.get_by_role("option", name="style-sdxl", exact=True).click()
    person.says("preset-difference", "adapter.rank")
    person.page.locator("#preset-apply").click()
    person.says("preset-difference", "The preset changes nothing.")
    assert person.page.locator("#knob-adapter-rank input").input_value() != "4"


def test_everything_is_reached_by_keyboard_and_fits_a_phone(chromium, served):
    person = Person(chromium, served.address, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert person.page.evaluate("document.body.classList.contains('dark')")
    person.page.locator("#pages button[role=tab]").first.focus()
    reached = set()
    for _ in range(12):
        person.page.keyboard.press("Tab")
        reached.add(person.page.evaluate("document.activeElement.closest('[id^=photos]')?.id"))
    assert {"photos-folder", "photos-open"} <= reached


def test_only_this_machines_names_are_served(served):
    import urllib.error
    import urllib.request

    for path in ("/gradio_api/file=/etc/passwd", f"/gradio_api/file={served.room}/runs/.queue/000001.toml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(served.address + path.lstrip("/"))
        assert refused.value.code in (403, 404)
    request = urllib.request.Request(served.address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--share"], ["--host", "0.0.0.0", "--password", "short"]]
)
def test_others_are_not_let_in_without_a_password(arguments: list[str], tmp_path: Path):
    import subprocess
    import sys

    pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")
    command = [sys.executable, "-m", "lorakit", "ui", "--runs", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "password" in done.stderr and len(done.stderr.strip().splitlines()) == 1
