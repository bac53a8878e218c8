"""Tests of the report: it has the measured figures and the pictures, and no facts about the user's machine."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from lorakit import config
from lorakit.core.messages import Message, key_of
from lorakit.data import checks
from lorakit.runs import lessons, report
from lorakit.runs.run_folder import RunFolder
from lorakit.training.selfcheck import Finding

HOSTILE = '<script>alert("x")</script>'
PROMPTS = ["a photo of sks toy", HOSTILE]
FINDINGS = [Finding("kohya: modules", True, "16 of 16"), Finding("unet effect", True, "12.3 % & more")]


def validation(step: int, mse: float, drift: float = 0.01) -> dict:
    bands = [{"timesteps": [250 * n, 250 * n + 249], "mse": mse * (n + 1) / 2} for n in range(4)]
    figures = {"mse": mse, "rmse": mse**0.5, "mae": mse, "r2": 0.5, "prior_drift": drift}
    return {"step": step, **figures, "bands": bands, "photos": 2, "source": "held-out photos"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A run folder after a run, and the arguments of `report.write`. It is shared: only read it."""
    tmp_path = tmp_path_factory.mktemp("private")
    photos = tmp_path / "secret-photos"
    photos.mkdir()
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        Image.new("RGB", (96, 64), colour).save(photos / f"{name}.png")
    (photos / "red.txt").write_text(f"sks toy {HOSTILE}", encoding="utf-8")
    tiny.save_tokenizer(tmp_path / "base" / "tokenizer")
    settings = config.load(
        None,
        {
            "train.steps": 30,
            "data.folder": str(photos),
            "data.name": "sks toy",
            "data.resolution": 64,
            "model.base": str(tmp_path / "base"),
            "output.folder": str(tmp_path / "run"),
        },
    )
    folder = RunFolder.create(settings)
    tokenizer = tmp_path / "base" / "tokenizer"
    base = SimpleNamespace(
        tokenizers={"tokenizer": tokenizer},
        downscale=8,
        bucket_multiple=64,
        max_tokens=77,
        chunked_texts=True,
        layers={},
    )
    report = checks.check(settings.data, base)
    folder.event("message", message="device: cpu, base in float32")
    for step in range(1, 31):
        folder.event("step", step=step, loss=1 / step, smoothed_loss=2 / step, gradient_norm=1.0, learning_rate=1e-4)
    history = [validation(10, 0.3), validation(20, 0.2), validation(30, 0.25)]
    for entry in history:
        folder.event("validation", **entry)
    folder.update(state="running")
    for step in (0, 30):
        images = [Image.new("RGB", (64, 64), colour) for colour in ((step, 99, 0), (0, 200, 99))]
        for image, prompt in zip(images, PROMPTS, strict=True):
            image.info["lorakit"] = json.dumps({"prompt": prompt})
        folder.save_samples(step, images, PROMPTS)
    plan = SimpleNamespace(base=f"base {HOSTILE}", steps=30, lines=lambda: ["length: 30 steps", HOSTILE])
    result = SimpleNamespace(folder=folder, config=settings, plan=plan, photos=report, history=history)
    result.page = html(result)
    return result


def html(run, findings=FINDINGS, **changes) -> str:
    values = vars(run) | changes
    return report.html(
        values["folder"], values["config"], values["plan"], values["photos"], values["history"], findings
    )


class Reader(HTMLParser):
    """Collects a page's tags, text and sources."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.sources, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta", "source", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_lessons_are_in_both_reports(run):
    lesson = Message(lessons.SHORT, 30, 0.8)
    path = report.write(run.folder, run.config, run.plan, run.photos, run.history, FINDINGS, [lesson])
    (line,) = json.loads(run.folder.report_file.read_text(encoding="utf-8"))["lessons"]
    assert line == {"message": lesson, **key_of(lesson)} and "was too short" in lesson
    assert str(lesson) in Reader(path.read_text(encoding="utf-8")).words


def test_the_page_is_complete_and_needs_no_other_file(run):
    path = report.write(run.folder, run.config, run.plan, run.photos, run.history, FINDINGS)
    assert path == run.folder.html_file and run.folder.curves_file.is_file() and run.folder.contact_sheet_file.is_file()
    read = Reader(path.read_text(encoding="utf-8"))
    assert read.open == []
    # Four samples and two photos; the curves are inside the page.
    assert (
        len(read.sources) == 4 + 2
        and read.tags.count("svg") == 4
        and all(source.startswith("data:image/") for source in read.sources)
    )
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert "url(" not in run.page and "prefers-color-scheme: dark" in run.page
    assert path.read_text(encoding="utf-8") == run.page


def test_all_user_texts_are_escaped(run):
    text = run.page
    assert "<script" not in text and text.count("&lt;script&gt;") >= 4


def test_the_page_contains_no_local_path(run):
    text = run.page
    assert (
        str(run.folder.path.parent) not in text and "secret-photos" not in text and str(Path.home()) + "/" not in text
    )
    assert "run run" in text


def test_the_page_states_the_self_checks_result(run):
    assert "Checked: all 2 checks of the exported file passed." in run.page
    assert "12.3 % &amp; more" in run.page
    failed = html(run, [*FINDINGS, Finding("unet effect", False, "no effect")])
    assert "The self-check failed: 1 of 3 checks." in failed and "checks of the exported file passed" not in failed
    assert "Not checked" in html(run, [])


def test_the_validations_are_reported_without_a_recommendation(run):
    words = " ".join(Reader(run.page).words)
    assert "Validation error (MSE): 0.2500 at step 30, the last; lowest 0.2000 at step 20." in words
    assert "1.00%" in words and "best" not in words.lower()
    for line in ("length: 30 steps", "cpu, base in float32", "torch"):
        assert line in words


def test_unmeasured_figures_are_omitted(run, tmp_path):
    empty = RunFolder.create(config.load(None, {"train.steps": 1, "output.folder": str(tmp_path / "empty")}))
    text = report.html(empty, run.config, run.plan, run.photos, [], FINDINGS)
    for title in ("Curves", "Samples", "Validation"):
        assert f"<h2>{title}" not in text
    assert "Validation error" not in text and report.contact_sheet(empty) is None


def test_photos_are_shown_as_cropped(run):
    sizes = [(item.bucket.width, item.bucket.height) for item in run.photos.items]
    text = run.page
    for width, height in sizes:
        assert f"{width}x{height}" in text


def test_a_missing_photo_does_not_fail_the_report(run):
    gone = [
        dataclasses.replace(
            item, photo=SimpleNamespace(path=Path("gone.png"), relative="gone.png", edit=item.photo.edit)
        )
        for item in run.photos.items[:1]
    ]
    photos = SimpleNamespace(**vars(run.photos) | {"items": [*gone, *run.photos.items[1:]]}, photos=run.photos.photos)
    assert len(Reader(html(run, photos=photos)).sources) == 4 + 1


def test_contact_sheet_has_a_row_for_each_step(run):
    sheet = report.contact_sheet(run.folder)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in ((0, 99, 0), (30, 99, 0)):
        assert (pixels == colour).all(1).sum() == (64 * 3) ** 2
    assert (pixels == (0, 200, 99)).all(1).sum() == 2 * (64 * 3) ** 2


def test_the_options_contain_no_path(run):
    match = re.search(r"<pre>(.*)</pre>", run.page, re.DOTALL)[1]
    assert "train.steps = 30" in match and "model.base" not in match and "data.folder" not in match
