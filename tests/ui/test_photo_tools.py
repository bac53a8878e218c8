"""The tools of the page of photos: turn, crop, mask, several folders. They write no file into a folder of photos."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.config import Config, DataConfig  # noqa: E402
from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.ui import form, language, texts  # noqa: E402
from lorakit.ui.pages.concepts import ConceptFolders  # noqa: E402
from lorakit.ui.pages.photos import PhotosPage  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY = texts.sayer("en")
T = language.Translations()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for place, size in (("toys/a.png", (90, 60)), ("toys/b.png", (60, 60)), ("cats/a.png", (40, 60))):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / place)
    return Workspace(tmp_path / "runs", [tmp_path / "toys", tmp_path / "cats"])


def config_of(workspace: Workspace, **data: object) -> Config:
    lines = form.values(Config()) | {"train.steps": "1", "data.folder": str(workspace.roots.paths[0])}
    config, problems = form.read(lines | {f"data.{key}": value for key, value in data.items()}, workspace.roots)
    assert config is not None, problems
    return config


def test_buttons_turn_and_crop_the_photos_of_the_page(workspace: Workspace) -> None:
    before = {path: path.read_bytes() for path in workspace.roots.paths[0].iterdir()}
    lines = PhotosPage.edit("", "a.png", "right")
    assert lines == '{"a.png" = "turn 90"}'
    lines = PhotosPage.edit(lines, "a.png", "crop", [50, 0, 100, 100])
    assert lines == '{"a.png" = "turn 90, crop 50 0 100 100"}'
    lines = PhotosPage.edit(lines, "b.png", "left")
    with gr.Blocks():
        page = PhotosPage(workspace, T)
    html = page.show(str(workspace.roots.paths[0]), 0, config_of(workspace, edits=lines), SAY)[1]
    assert "30 × 90" in html and html.count(">Reset<") == 2
    assert re.findall(r'data-edit="(\w+):b', html) == ["left", "right", "crop", "paint", "erase", "reset"]
    assert PhotosPage.edit(PhotosPage.edit(lines, "a.png", "reset"), "b.png", "right") == ""
    assert PhotosPage.edit("{broken", "a.png", "left") == '{"a.png" = "turn 270"}'
    assert {path: path.read_bytes() for path in workspace.roots.paths[0].iterdir()} == before


def test_a_mask_is_painted_shown_and_undone(workspace: Workspace) -> None:
    toys = workspace.roots.paths[0]
    before = {path: path.read_bytes() for path in toys.iterdir()}
    lines = PhotosPage.edit("", "a.png", "paint", [25, 50], (40, 1.5))
    assert lines == '{"a.png" = "paint 40 25 50"}'
    lines = PhotosPage.edit(PhotosPage.edit(lines, "a.png", "right"), "a.png", "erase", [50, 25, 50, 30], (10, 2 / 3))
    assert lines == '{"a.png" = "turn 90, paint 40 25 50, erase 10 25 50 30 50"}'
    with gr.Blocks():
        page = PhotosPage(workspace, T)

    def picture(edits: str) -> tuple[str, np.ndarray]:
        html = page.show(str(toys), 0, config_of(workspace, edits=edits), SAY)[1]
        source = re.search(r'src="data:image/webp;base64,([^"]+)" alt="a.png"', html)
        assert source is not None
        return html, np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))).convert("L")).astype(float)

    html, masked = picture(lines)
    assert ">Undo stroke<" in html and html.count("lk-brush") == 2
    plain = picture('{"a.png" = "turn 90"}')[1]
    bright = masked.sum() / plain.sum()
    assert masked.shape == (90, 60) and 0.35 < bright < 0.55
    assert masked[15:20, 20:25].mean() == pytest.approx(plain[15:20, 20:25].mean(), rel=0.15)
    assert masked[60:, :].mean() < 0.35 * plain[60:, :].mean()  # the mask excludes the lower half
    # The first stroke switches `train.masked_loss` on. Removing the last one switches it off if no mask file exists.
    config = config_of(workspace)
    assert page.uses_masks("", lines, False, config) is True and page.uses_masks(lines, lines, False, config) is False
    lines = PhotosPage.edit(PhotosPage.edit(lines, "a.png", "unpaint"), "a.png", "unpaint")
    assert (
        lines == '{"a.png" = "turn 90"}' and page.uses_masks('{"a.png" = "erase 9 1 2"}', lines, True, config) is False
    )
    Image.new("L", (60, 60), 255).save(toys / "b.mask.png")
    assert page.uses_masks('{"a.png" = "erase 9 1 2"}', lines, True, config) is True
    # Values that the page cannot send change nothing.
    assert PhotosPage.edit(lines, "a.png", "paint", [1, 2] * 3000, (10, 1)) == lines
    assert PhotosPage.edit(lines, "a.png", "paint", [1, 2], (-10, 1)) == lines
    assert {path: path.read_bytes() for path in before} == before


def test_a_photo_with_500_strokes_takes_no_more(workspace: Workspace) -> None:
    with gr.Blocks():
        page = PhotosPage(workspace, T)
    for count, acts in ((499, ["left", "right", "crop", "paint", "erase", "unpaint", "reset"]),
                        (500, ["left", "right", "crop", "unpaint", "reset"])):  # fmt: skip
        edits = f'{{"a.png" = "{", ".join(["paint 9 5 5"] * count)}"}}'
        html = page.show(str(workspace.roots.paths[0]), 0, config_of(workspace, edits=edits), SAY)[1]
        assert re.findall(r'data-edit="(\w+):a', html) == acts
        assert ("A photo can have 500 strokes. Undo one, or put name.mask.png beside" in html) == (count == 500)


def test_a_caption_that_somebody_else_changed_is_named(workspace: Workspace) -> None:
    with gr.Blocks():
        page = PhotosPage(workspace, T)
    photo = workspace.roots.paths[0] / "a.png"
    assert "lk-problem" not in page.save_caption(str(photo), "a cat", "", SAY)
    assert "lk-problem" not in page.save_caption(str(photo), "a dog", "a  cat", SAY)
    # Another page, which still shows no caption, saves one.
    message = page.save_caption(str(photo), "a toy", "", SAY)
    assert "It replaces “a dog”" in message and photo.with_suffix(".txt").read_text() == "a toy\n"
    assert "lk-problem" not in page.save_caption(str(photo), "a toy", "a horse", SAY), "the same text"
    for outside in ("/", "", "/etc/passwd", "x\0"):
        assert "lk-problem" in page.save_caption(outside, "x", "", SAY)


def test_folders_are_added_with_name_and_weight_and_taken_away(workspace: Workspace) -> None:
    cats = str(workspace.roots.paths[1])
    with gr.Blocks():
        part, page = ConceptFolders(workspace, T), PhotosPage(workspace, T)
    message, lines = part.add("", cats, " zib  cat ", 3.0, SAY)
    assert "zib cat: photos added: 1." in message and lines == f'{{"3_zib cat" = "{cats}"}}'
    for path, name, problem in (
        (cats, "Zib cat", "already has the name Zib cat"),
        ("", "x", "Enter a folder"),
        ("/etc", "ohwx", "is outside of"),
        (str(workspace.runs), "ohwx", "0 images in"),
    ):
        message, same = part.add(lines, path, name, 1, SAY)
        assert problem in message and same == lines
    config = config_of(workspace, more_folders=lines, concepts="folders", name="sks toy")
    summary, cards, *_, table = page.show(str(workspace.roots.paths[0]), 0, config, SAY)
    assert "Photos: 3" in summary and 'data-exclude="3_zib cat/a.png"' in cards
    assert " ".join(re.sub("<[^>]*>", " ", table).split()) == (
        "Name Weight Photos Folder on this machine sks toy × 1 2 toys zib cat × 3 1 cats Remove"
    )
    assert part.remove(lines, "3_zib cat") == "" and part.remove(lines, "other") == lines
    edits = '{"a.png" = "turn 90", "3_zib cat/a.png" = "turn 180"}'
    assert page.edits_elsewhere(edits, lines) == '{"3_zib cat/a.png" = "turn 180"}'
    assert page.exclude(config.data.folder, "", "3_zib cat/a.png", config) == "3_zib cat/a.png"
    with pytest.raises(LorakitError, match="is outside of"):
        workspace.photos(config.data.folder, DataConfig(more_folders={"x": "/etc"}))
