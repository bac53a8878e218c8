"""The pages' handlers, called as the browser calls them."""

from pathlib import Path

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit import guide  # noqa: E402
from lorakit.errors import LorakitError  # noqa: E402
from lorakit.ui import app, texts  # noqa: E402
from lorakit.ui.adapter import AdapterPage  # noqa: E402
from lorakit.ui.desk import Desk  # noqa: E402
from lorakit.ui.photos import PAGE, PhotosPage  # noqa: E402
from lorakit.ui.train import TrainPage  # noqa: E402

SAY = texts.sayer("en")
T = gr.I18n(**texts.tables())


@pytest.fixture
def desk(tmp_path: Path, tiny_sd1: Path) -> Desk:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((90, 64), 50 + 20 * number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    return Desk(tmp_path / "runs", [tmp_path / "photos", tiny_sd1])


@pytest.fixture
def train(desk: Desk) -> TrainPage:
    with gr.Blocks():
        return TrainPage(desk, T)


def answered(train: TrainPage, base: Path, **more: object) -> tuple[list[object], dict[str, object]]:
    """Values of all widgets, and what the page remembers, for somebody who answered the questions."""
    marks = dict(train.marks.value)
    shown = {key: marks["values"][key] for key in train.keys} | {
        guide.PHOTOS: str(train.desk.roots.paths[0]),
        guide.NAME: "sks toy",
        guide.BASE: str(base),
    }
    shown |= {key.replace("__", "."): value for key, value in more.items()}
    return [shown[key] for key in train.keys], marks


def test_the_whole_page_is_built(desk: Desk):
    page = app.build(desk, T)
    assert page.enable_queue


def test_answers_lead_to_a_plan(train: TrainPage, tiny_sd1: Path):
    values, marks = answered(train, tiny_sd1)
    first, last = list(train.refresh("balanced", marks, values, SAY))
    assert first[2]["interactive"] is False and last[2]["interactive"] is True
    assert "The plan" in last[0] and "3 photos" in last[0]
    # The base is another family's: every option went with its preset.
    assert first[3]["values"]["data.resolution"] == 512
    moved = dict(zip(train.keys, first[4:], strict=True))
    assert moved["data.resolution"]["value"] == 512


def test_what_was_changed_by_hand_stays(train: TrainPage, tiny_sd1: Path):
    values, marks = answered(train, tiny_sd1, data__resolution=128.0, train__steps="7")
    first = next(train.refresh("balanced", marks, values, SAY))
    updates = dict(zip(train.keys, first[4:], strict=True))
    assert "value" not in updates["data.resolution"] and "Changed from the preset" in updates["data.resolution"]["info"]
    assert updates["train.steps_per_image"]["value"] == ""
    assert "data.resolution: 512 → 128" in first[1]


def test_a_base_outside_of_the_roots_is_not_looked_at(train: TrainPage):
    values, marks = answered(train, Path("/etc"))
    (only,) = train.refresh("balanced", marks, values, SAY)
    assert "/etc is outside of" in only[0] and only[2]["interactive"] is False
    assert "is outside of" in train.difference_of("", "balanced", values, SAY)
    message, name = train.begin(values, SAY)
    assert name is None and "is outside of" in message


@pytest.mark.parametrize(
    "kept", [{}, None, [], {"values": 3}, {"values": {"no.such": 1}, "quality": "?", "preset": "?"}]
)
def test_what_a_browser_kept_may_be_anything(train: TrainPage, kept: object):
    assert len(train.restore(kept)) == 4 + len(train.keys)


def test_a_page_of_photos(desk: Desk, train: TrainPage, tiny_sd1: Path):
    for number in range(3, PAGE + 2):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(desk.roots.paths[0] / f"{number:03d}.png")
    with gr.Blocks():
        photos = PhotosPage(desk, T)
    values, _ = answered(train, tiny_sd1, data__resolution=64.0)
    config = train.config_of_photos(train.form_values(values))
    first, last = list(photos.show(str(desk.roots.paths[0]), 0, config, SAY))
    assert first[2].count("<li class=") == last[2].count('<li class="lk-card') == PAGE
    assert "photos" in first[1] and "trained at 64 × 64" in last[2]
    assert "lk-crop" in last[2], "a photo of 90 x 64 is cropped, and it is shown where"
    beyond = list(photos.show(str(desk.roots.paths[0]), 10 * PAGE, config, SAY))[-1]
    assert beyond[6] == PAGE and beyond[2].count('<li class="lk-card') == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x80\x02}q\x00.", "pickle"), (b"PK\x03\x04", "pickle"), (b"", "empty"), (b"hello world", "not a safetensors")],
)
def test_no_pickle_is_opened(desk: Desk, content: bytes, message: str):
    with gr.Blocks():
        page = AdapterPage(desk, T)
    file = desk.runs / "adapter.safetensors"
    file.write_bytes(content)
    report, inspected, *_ = page.look(str(file), None, SAY)
    assert message in report and inspected == ""
    report, *_ = page.look("", str(file), SAY)
    assert message in report and str(desk.runs) not in report, "where an upload lies is not told"


def test_a_base_is_described(desk: Desk, tiny_sd1: Path):
    with gr.Blocks():
        page = AdapterPage(desk, T)
    report, inspected, convertible, *_ = page.look(str(tiny_sd1), None, SAY)
    assert inspected == str(tiny_sd1) and convertible["visible"] is False
    assert "lk-panel" in report


def test_a_run_name_is_not_a_path(desk: Desk):
    with pytest.raises(LorakitError, match="is no run"):
        desk.run("../photos")
