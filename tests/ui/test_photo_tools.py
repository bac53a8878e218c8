"""The page of photos as a tool: turn, crop, several folders. Nothing is written into a folder of photos."""

import re
from pathlib import Path

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


def test_buttons_turn_and_crop_what_is_on_the_page(workspace: Workspace) -> None:
    before = {path: path.read_bytes() for path in workspace.roots.paths[0].iterdir()}
    lines = PhotosPage.edit("", "a.png", "right")
    assert lines == '{"a.png" = "turn 90"}'
    lines = PhotosPage.edit(lines, "a.png", "crop", [50, 0, 100, 100])
    assert lines == '{"a.png" = "turn 90, crop 50 0 100 100"}'
    lines = PhotosPage.edit(lines, "b.png", "left")
    with gr.Blocks():
        page = PhotosPage(workspace, T)
    html = page.show(str(workspace.roots.paths[0]), 0, config_of(workspace, edits=lines), SAY)[1]
    assert "30 × 90" in html and html.count(">As the file is<") == 2
    assert re.findall(r'data-edit="(\w+):b', html) == ["left", "right", "crop", "reset"]
    assert PhotosPage.edit(PhotosPage.edit(lines, "a.png", "reset"), "b.png", "right") == ""
    assert PhotosPage.edit("{broken", "a.png", "left") == '{"a.png" = "turn 270"}'
    assert {path: path.read_bytes() for path in workspace.roots.paths[0].iterdir()} == before


def test_folders_are_added_with_name_and_weight_and_taken_away(workspace: Workspace) -> None:
    cats = str(workspace.roots.paths[1])
    with gr.Blocks():
        part, page = ConceptFolders(workspace, T), PhotosPage(workspace, T)
    message, lines = part.add("", cats, " zib  cat ", 3.0, SAY)
    assert "zib cat: 1 photos." in message and lines == f'{{"3_zib cat" = "{cats}"}}'
    for path, name, problem in (
        (cats, "Zib cat", "has the name Zib cat already"),
        ("", "x", "Give the folder"),
        ("/etc", "ohwx", "is outside of"),
        (str(workspace.runs), "ohwx", "0 images in"),
    ):
        message, same = part.add(lines, path, name, 1, SAY)
        assert problem in message and same == lines
    config = config_of(workspace, more_folders=lines, concepts="folders", name="sks toy")
    summary, cards, *_, table = page.show(str(workspace.roots.paths[0]), 0, config, SAY)
    assert "3 photos" in summary and 'data-exclude="3_zib cat/a.png"' in cards
    assert " ".join(re.sub("<[^>]*>", " ", table).split()) == (
        "Name Weight Photos Folder on this machine sks toy × 1 2 toys zib cat × 3 1 cats Take away"
    )
    assert part.remove(lines, "3_zib cat") == "" and part.remove(lines, "other") == lines
    edits = '{"a.png" = "turn 90", "3_zib cat/a.png" = "turn 180"}'
    assert page.edits_elsewhere(edits, lines) == '{"3_zib cat/a.png" = "turn 180"}'
    assert page.exclude(config.data.folder, "", "3_zib cat/a.png", config) == "3_zib cat/a.png"
    with pytest.raises(LorakitError, match="is outside of"):
        workspace.photos(config.data.folder, DataConfig(more_folders={"x": "/etc"}))
