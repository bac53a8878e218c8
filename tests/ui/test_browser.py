"""The front end in a real browser, with real training processes of the bundled model."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import load, open_page
from PIL import Image
from waiting import SECONDS, wait_for

from lorakit.cli import demo
from lorakit.core import names
from lorakit.formats import inspect
from lorakit.runs import run_folder
from lorakit.ui import texts

pytestmark = pytest.mark.slow
TABS = ("photos", "train", "runs", "compare", "try", "adapter")


class Person:
    """A user with a browser. `requests` has the address of each request of the page."""

    def __init__(self, chromium, address: str, **options):
        self.requests: list[str] = []
        listeners = {"request": lambda request: self.requests.append(request.url)}
        self.page = open_page(chromium, address, listeners, **options)
        self.context = self.page.context

    def open(self, address: str) -> None:
        load(self.page, address)

    def tab(self, name: str) -> None:
        self.page.locator("#pages button[role=tab]").nth(TABS.index(name)).click()

    def choose(self, element: str, text: object) -> None:
        """Enter a text into a field with suggestions."""
        field = self.page.locator(f"#{element} input")
        field.fill(str(text))
        field.press("Enter")

    def fill(self, key: str, text: object) -> None:
        self.page.locator(f"#option-{key.replace('.', '-')} :is(input, textarea)").first.fill(str(text))

    def says(self, element: str, text: str) -> None:
        self.page.locator(f"#{element}").get_by_text(text).first.wait_for()

    def answer(self, **options: object) -> None:
        """Fill in options, and wait until the page lists each as changed."""
        if not self.page.locator("#option-train-seed").is_visible():
            self.page.locator("#train-options > button").click()
        for name, value in options.items():
            self.fill(name.replace("__", "."), value)
        for name in options:
            self.says("train-changed", texts.table("en")[f"option.{name.replace('__', '.')}"])

    def start(self) -> str:
        """Click the start button when it is enabled, and return the name of the new run."""
        before = set(self.runs())
        self.page.locator("#train-start:enabled").click()
        self.page.locator("#run-status section").wait_for()
        self.page.wait_for_function("known => document.querySelector('[data-run][aria-current]') && "
                                    "!known.includes(document.querySelector('[data-run][aria-current]').dataset.run)",
                                    arg=sorted(before))  # fmt: skip
        return self.page.locator("[data-run][aria-current]").get_attribute("data-run")

    def runs(self) -> list[str]:
        return [button.get_attribute("data-run") for button in self.page.locator("[data-run]").all()]

    @property
    def step(self) -> int:
        return int(self.page.locator("#run-status section").get_attribute("data-step"))

    def sees(self, state: str, step: str = "") -> None:
        """Wait for a state and a step on the page of runs. Fail at once if the run has failed."""
        selector = f'#run-status section[data-state="{state}"]' + (f'[data-step="{step}"]' if step else "")
        failed = '#run-status section[data-state="failed"]'
        self.page.locator(f"{selector}, {failed}").first.wait_for()
        assert self.page.locator(selector).count(), self.page.locator("#run-status").inner_text()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and an empty folder."""
    room = tmp_path_factory.mktemp("room")
    demo.write_photos("zib", room / "photos")
    for caption in (room / "photos").glob("*.txt"):
        caption.unlink()
    (room / "empty").mkdir()
    return room


@pytest.fixture(scope="module")
def served(front_end, room: Path):
    """The front end of all tests in this file."""
    return front_end(room, "--max-upload", "1")


@pytest.fixture(scope="class")
def person(chromium, served) -> Iterator[Person]:
    """A page, which the tests of a class share. It is closed after them, because an open page polls."""
    someone = Person(chromium, served.address)
    yield someone
    someone.context.close()


class TestWithoutRuns:
    """These come first: a process that the page of an adapter starts is then used by the test that exports one."""

    def test_errors_are_shown_at_their_fields(self, person: Person, room: Path):
        page = person.page
        for path, message in (
            (room / "empty", "0 images in"),
            (room.parent, "is outside of"),
            (room / "nowhere", "does not exist"),
        ):
            person.choose("photos-folder", path)
            page.locator("#photos-open").click()
            person.says("photos-summary", message)
        (room / "large.jpg").write_bytes(b"\xff" * 1_100_000)
        page.locator("#photos-upload input[type=file]").set_input_files(room / "large.jpg")
        page.get_by_text("exceed the maximum allowed size").first.wait_for()
        person.tab("train")
        person.choose("option-data-folder", room / "photos")
        person.fill("data.name", "sks toy")
        person.says("train-plan", "14 to train on")
        page.locator("#train-options > button").click()
        person.fill("adapter.rank", "0")
        person.says("option-adapter-rank", "must be between 1 and 1024")
        person.says("train-plan", "must be between 1 and 1024")
        assert page.locator("#train-start").is_disabled()
        person.fill("adapter.rank", "4")
        person.says("option-adapter-rank", "Changed from the preset")
        person.says("train-changed", "Rank: 8 → 4")
        # A reload restores the answers and opens the same page.
        person.open(page.url)
        page.locator("#option-data-name").wait_for()
        page.wait_for_function("document.querySelector('#option-data-name :is(input, textarea)').value === 'sks toy'")
        page.locator("#train-options > button").click()
        person.says("train-changed", "Rank: 8 → 4")
        person.says("train-plan", "rank 4")
        person.choose("option-model-base", room / "photos")
        person.says("option-model-base", "model_index.json")
        person.choose("option-model-base", "pocket")
        person.choose("option-data-folder", room / "empty")
        person.says("train-plan", "0 images in")
        # The page shows the changes of a preset before it is applied.
        page.locator("#preset input").click()
        page.get_by_role("option", name="style-sdxl", exact=True).click()
        person.says("preset-difference", "Rank")
        assert page.locator("#option-adapter-rank input").input_value() == "4"
        page.locator("#preset-apply").click()
        person.says("preset-difference", "The preset changes nothing.")
        assert page.locator("#option-adapter-rank input").input_value() != "4"
        person.tab("adapter")
        person.choose("adapter-path", "/etc/passwd")
        person.says("adapter-report", "is outside of")

    def test_a_caption_stays_with_its_photo_when_another_folder_comes(self, person: Person, room: Path):
        """A caption is saved for the photo for which it was typed, even if the page shows another folder by then."""
        for name, colour in (("A", "red"), ("B", "blue")):
            (room / name).mkdir()
            Image.new("RGB", (64, 64), colour).save(room / name / "00.png")
        person.tab("photos")
        field = person.page.locator("textarea[data-photo='00.png']")
        person.choose("photos-folder", room / "A")
        field.wait_for()
        field.fill("written for A")
        person.choose("photos-folder", room / "B")
        person.page.locator(f"textarea[data-file='{room}/B/00.png']").wait_for()
        assert field.input_value() == ""
        assert person.page.locator(".lk-save").is_hidden()
        person.choose("photos-folder", room / "A")
        person.page.locator(f"textarea[data-file='{room}/A/00.png']").wait_for()
        assert field.input_value() == "written for A"
        # The field names the other folder, but the page still shows the cards of the first one.
        person.page.locator("#photos-folder input").fill(str(room / "B"))
        person.page.locator(".lk-save").click()
        person.page.locator(f"textarea[data-file='{room}/B/00.png']").wait_for()
        person.says("photos-caption-message", "Caption of A/00.png saved.")
        assert (room / "A" / "00.txt").read_text() == "written for A\n" and not (room / "B" / "00.txt").exists()

    def test_an_upload_clears_the_refusal_of_an_older_folder_at_once(self, person: Person, room: Path):
        page = person.page
        person.tab("photos")
        person.choose("photos-folder", room / "nowhere")  # opens it; a second answer could come after the upload
        person.says("photos-summary", "does not exist")
        page.route("**/run/predict*", lambda route: None)  # the server's answer never comes
        page.locator("#photos-upload input[type=file]").set_input_files(room / "photos" / "01.png")
        page.wait_for_function("!document.querySelector('#photos-summary').innerText.trim()")
        assert page.locator("#photos-summary").inner_text().strip() == ""


def test_from_upload_to_a_converted_adapter(person: Person, served, room: Path):
    page = person.page
    # Upload photos and a file that is no picture.
    (room / "bad.jpg").write_text("not a picture")
    files = [*sorted((room / "photos").iterdir())[:4], room / "bad.jpg"]
    page.locator("#photos-upload input[type=file]").set_input_files(files)
    person.says("photos-message", "Photos added: 4.")
    person.says("photos-message", "bad.jpg: text, not a picture")
    page.locator(".lk-card img").nth(3).wait_for()
    (upload,) = (room / "runs" / "uploads").iterdir()
    # Edit a caption. The page shows HTML in it as text and does not run it.
    caption = page.locator("textarea[data-photo='01.png']")
    caption.fill("sks toy <b>{{value}} ${1+1}</b>")
    caption.blur()
    assert not (upload / "01.txt").exists(), "nothing is written until it is saved"
    caption.locator("+ .lk-save").click()
    person.says("photos-caption-message", f"Caption of {upload.name}/01.png saved.")
    assert (upload / "01.txt").read_text() == "sks toy <b>{{value}} ${1+1}</b>\n"
    # Answer the five questions, of which the page has filled in the photos, and shorten the run.
    page.locator("#photos-next").click()
    assert page.locator("#option-data-folder input").input_value() == str(upload)
    person.fill("data.name", "sks toy")
    page.locator("#quality input[value=quick]").check()
    page.locator("#train-options > button").click()
    page.locator("#option-train-prior input[value=none]").check()
    person.answer(train__steps=6, train__batch_size=2, sample__steps=2, sample__prompts="a photo of sks toy")
    person.says("train-plan", "6 steps of 2 photos")
    name = person.start()
    run = room / "runs" / name
    person.sees("done", "6")
    state = run_folder.read(run)
    assert inspect.inspect(run / state.adapter).trigger == "sks toy"
    samples = len(list((run / "samples").glob("*.png")))
    page.locator("#run-samples .lk-samples img").nth(samples - 1).wait_for()  # their thumbnails come later
    assert page.locator("#run-samples .lk-samples img").count() == samples > 2
    assert page.locator("#run-curves svg").count() >= 2
    with page.expect_download() as download:
        page.locator("#run-download").click()
    assert Path(download.value.path()).read_bytes() == (run / state.adapter).read_bytes()
    # The button beside the pictures of the last step offers the same file.
    page.locator("#run-samples button[data-take='6']").click()
    with page.expect_download() as download:
        page.locator("#run-file a").first.click()
    assert Path(download.value.path()).read_bytes() == (run / state.adapter).read_bytes()
    compare_and_export(person, run)
    # Inspect the adapter and convert it to another format.
    person.tab("adapter")
    person.choose("adapter-path", run / state.adapter)
    for fact in ("sks", "toy"):
        page.locator("#adapter-report .lk-facts").get_by_text(fact, exact=True).wait_for()
    page.locator("#adapter-format input[value=peft]").check()
    page.locator("#adapter-convert").click()
    person.says("adapter-message", "Written: ")
    (converted,) = (room / "runs" / "converted").glob("*/*")
    assert inspect.inspect(converted).format == "PEFT folder"
    # The page sent no request to another machine.
    assert len(person.requests) > 50
    assert [url for url in person.requests if not url.startswith((served.address, "data:", "blob:"))] == []


def compare_and_export(person: Person, run: Path) -> None:
    page = person.page
    person.tab("compare")
    page.locator("#compare-table td img").first.wait_for()
    assert page.locator("#compare-table tbody tr").count() == len(list((run / "samples").glob("*.png")))
    person.says("compare-table", "nearest photo")
    page.locator("#compare-mark").click()
    person.says("compare-message", "is marked as best")
    # The run wrote kohya's format itself; another one is a new file.
    page.locator("#compare-export").click()
    person.says("compare-message", f"Exported: {run_folder.read(run).adapter}")
    assert not (run / "exports").exists()
    page.locator("#compare-format input[value=diffusers]").check()
    page.locator("#compare-export").click()
    person.says("compare-message", "sks-toy-diffusers.safetensors")
    assert list((run / "exports").glob("**/*.safetensors"))
    # The queue draws a grid of prompts and strengths.
    page.locator("#compare-draw > button").click()
    page.locator("#compare-strengths :is(input, textarea)").fill("0, 1")
    page.locator("#compare-go").click()
    page.locator("#compare-grids img").wait_for()
    assert len(list((run / "compare").glob("*/grid.png"))) == 1


def test_a_run_outlives_the_front_end_and_is_killed_resumed_and_stopped(chromium, front_end, served, room: Path):
    first = front_end(room)
    options = {"train.steps": 50_000, "train.batch_size": 1, "train.prior": "none", "train.holdout": 0,
               "train.save_every": 5, "sample.steps": 1}  # fmt: skip
    name = ask(first.address, "start", str(room / "photos"), "sks toy", "pocket", "balanced", options)["run"]
    run = room / "runs" / name
    wait_for(lambda: list(run.glob("checkpoints/*/complete")) and run_folder.read(run).step >= 10)
    # While the run is suspended, the front end that started it, another one and two browsers show the same step.
    with suspended(run_folder.read(run).pid):
        step = str(run_folder.read(run).step)
        answer = ask(first.address, "run", name)
        assert (answer["state"], str(answer["step"])) == ("running", step)
        first.stop()
        person = Person(chromium, served.address)
        person.tab("runs")
        person.sees("running", step)
        assert person.page.locator("[data-run][aria-current]").get_attribute("data-run") == name
        sees_buttons(person, visible=("run-save-now", "run-sample-now", "run-notify"), hidden=("run-delete",))
        # Each run of the list can be opened.
        oldest = min(person.runs())
        person.page.locator(f'[data-run="{oldest}"]').click()
        person.page.locator("#run-status h2").get_by_text(oldest).wait_for()
        person.page.wait_for_url(lambda url: "tab=runs" in url and f"run={oldest}" in url)
        # The address is a link to that run and works in another browser.
        other = Person(chromium, person.page.url, locale="zh-TW")
        other.page.locator("#run-status h2").get_by_text(oldest).wait_for()
        for browser in (person, other):
            browser.page.locator(f'[data-run="{name}"]').click()
            browser.sees("running", step)
        other.page.get_by_role("tab", name="執行紀錄", exact=True).click()
        other.page.locator("#run-status").get_by_text("執行中", exact=True).wait_for()
    # The front end that started the run has ended, and the run continues. The log stays scrolled to its end.
    wait_for(lambda: run_folder.read(run).step > int(step))
    assert run_folder.status(run) == "running"
    person.page.wait_for_function(
        "(() => { const log = document.querySelector('#run-log pre'); "
        "return log && log.scrollHeight - log.scrollTop - log.clientHeight < 8; })()"
    )
    os.kill(run_folder.read(run).pid, signal.SIGKILL)
    person.sees("interrupted")
    other.sees("interrupted")
    person.page.locator("#run-resume").click()
    person.sees("running")
    other.sees("running")
    # The second browser stops the run that the first one started.
    other.page.locator("#run-stop").click()
    person.sees("stopped")
    stopped = run_folder.read(run)
    assert int(step) - 5 <= stopped.step < 50_000
    assert (run / "checkpoints" / names.step_name(stopped.step) / "complete").is_file()
    assert inspect.inspect(run / stopped.adapter).trigger == "sks toy"
    person.page.locator("#run-resume").wait_for()
    sees_buttons(person, visible=("run-delete",), hidden=("run-save-now", "run-sample-now", "run-notify"))
    for browser in (person, other):
        browser.context.close()


def ask(address: str, name: str, *values: object) -> Any:
    """Return the answer of an endpoint for other programs."""
    data = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/run/{name}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"][0]


def sees_buttons(person: Person, *, visible: tuple[str, ...], hidden: tuple[str, ...]) -> None:
    """Open "Settings, notes and more" of a run, and check which buttons are visible."""
    if not person.page.locator("#run-tools > button.open").count():
        person.page.locator("#run-tools > button").click()
    for name in visible:
        person.page.locator(f"#{name}").wait_for()
    for name in hidden:
        assert person.page.locator(f"#{name}").is_hidden(), name


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend the process in this context."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_each_page_works_with_the_keyboard_and_fits_a_phone(chromium, served, room: Path):
    person = Person(chromium, served.address, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = person.page
    assert page.evaluate("document.body.classList.contains('dark')")
    person.choose("photos-folder", room / "photos")
    page.locator(".lk-card img").first.wait_for()
    # A button opens another page and disappears; the focus moves to the tab of that page.
    page.locator("#photos-next").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.matches('#pages [role=tab][aria-selected=true]')")
    assert page.locator("#pages button[role=tab]").nth(1).get_attribute("aria-selected") == "true"
    for name in TABS:
        # The check can replace the cards, and their marks, while the keys go through them. Then try again.
        deadline = time.monotonic() + SECONDS
        missed = missed_by_keyboard(page, name)
        while missed and time.monotonic() < deadline:
            missed = missed_by_keyboard(page, name)
        assert missed == set(), name
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    boxes = page.locator("button.upload-container")  # their text is their accessible name
    assert boxes.count() >= 2 and page.locator("button.upload-container[aria-label]").count() == 0


def missed_by_keyboard(page, name: str) -> set[str]:
    """Return the elements of a page that the Tab key does not reach from the page's tab."""
    page.locator("#pages button[role=tab]").nth(TABS.index(name)).focus()
    page.keyboard.press("Enter")
    reachable = set(page.evaluate(REACHABLE))
    assert reachable, name
    missed, presses = reachable, 0
    while missed and presses < 3 * len(reachable) + 10:
        batch = max(5, len(missed))
        for _ in range(batch):
            page.keyboard.press("Tab")
        presses += batch
        missed = reachable - set(page.evaluate("window.reached"))
    return missed


# Marks all elements of the open page that a user can operate, and returns the marks. From then on, `reached` has the
# marks of the elements that get the focus.
REACHABLE = """() => {
  if (!window.reached) {
    document.addEventListener('focusin', ({target}) => window.reached.push(target.dataset.reach ?? ''));
  }
  window.reached = [];
  document.querySelectorAll('[data-reach]').forEach((one) => one.removeAttribute('data-reach'));
  const shown = [...document.querySelectorAll('#pages :is(button, input, textarea, select, summary)')].filter(
    (one) => one.checkVisibility({visibilityProperty: true}) && !one.disabled && one.type !== 'file'
      && one.tabIndex >= 0 && !(one.type === 'radio' && !one.checked));
  shown.forEach((one, number) => { one.dataset.reach = number; });
  return shown.map((one) => one.dataset.reach);
}"""


def test_only_offered_files_are_served(served):
    for path in ("gradio_api/file=/etc/passwd", f"gradio_api/file={served.room}/runs/.queue/000001.toml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{served.address}/{path}")
        assert refused.value.code in (403, 404)
    # DNS rebinding: the name of another site resolves to this machine's address.
    request = urllib.request.Request(served.address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    # An upload over --max-upload is refused.
    head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=cut"}
    for size, code in ((1000, 200), (1_100_000, 413)):
        body = head + bytes(size) + b"\r\n--cut--\r\n"
        request = urllib.request.Request(served.address + "/gradio_api/upload", body, form)
        try:
            assert urllib.request.urlopen(request).status == code
        except urllib.error.HTTPError as refused:
            assert refused.code == code


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--share"], ["--host", "::", "--password", "short"]])
def test_others_are_not_let_in_without_a_password(arguments: list[str], tmp_path: Path, capsys):
    pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")
    from lorakit.ui import app

    assert app.main(["--runs", str(tmp_path / "runs"), *arguments]) == 1
    err = capsys.readouterr().err
    assert "password" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_server_listens_on_this_machine_only(served):
    connections = psutil.Process(served.process.pid).net_connections()
    assert [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
