"""Changes of many captions on the page of photos: preview, change, undo, and captions by a model."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit import config  # noqa: E402
from lorakit.config import Config  # noqa: E402
from lorakit.core.names import unique_path  # noqa: E402
from lorakit.ui import language, texts  # noqa: E402
from lorakit.ui.pages.captions import ROWS, CaptionTools, Change  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY, ZH = texts.sayer("en"), texts.sayer("zh-Hant")
WISHES = {"model": "nowhere", "prompt": "", "without": "", "overwrite": False, "fetch": False}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> CaptionTools:
    place = tmp_path_factory.mktemp("pictures")
    with gr.Blocks():
        return CaptionTools(Workspace(place / "runs", [place]), language.Translations())


@pytest.fixture
def folder(tools: CaptionTools) -> Path:
    place = unique_path(tools.workspace.runs.parent / "photos")
    place.mkdir()
    for name, text in {"a": "a dog, grass", "b": "grass, sks dog", "c": "first\nsecond", "d": ""}.items():
        Image.new("RGB", (8, 8)).save(place / f"{name}.png")
        if text:
            (place / f"{name}.txt").write_text(text)
    return place


def settings(**options: object) -> Config:
    return config.load(None, {"train.steps": 1} | {key.replace("__", "."): value for key, value in options.items()})


def captions_of(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("trigger"), {"a": "sks dog, a dog, grass\n", "b": "sks dog, grass\n"}),
        (Change("front", "photo"), {"a": "photo, a dog, grass\n", "c": "photo, first\nphoto, second\n"}),
        (Change("behind", " grass "), {"a": "a dog, grass", "c": "first, grass\nsecond, grass\n"}),
        (
            Change("replace", "Grass", "a lawn"),
            {"a": "a dog, a lawn\n", "b": "a lawn, sks dog\n"},
        ),
        (Change("replace", "grass"), {"a": "a dog\n", "b": "sks dog\n"}),
    ],
    ids=lambda value: value.tool if isinstance(value, Change) else None,
)
def test_a_previewed_change_is_applied_and_undone(tools, folder, change, expected):
    before, named = captions_of(folder), settings(data__name="sks dog")
    message, table, button = tools.preview(str(folder), change, named, SAY)
    assert "Captions that would change" in message and button["interactive"] is True
    assert captions_of(folder) == before
    assert "Captions changed: " in tools.change_all(str(folder), change, named, SAY)
    after = captions_of(folder)
    assert {name: after[name] for name in expected} == expected and "d" not in after
    for name, text in after.items():
        assert (text == before[name]) is (f"<td>{name}.png</td>" not in table)
    assert "Captions restored: " in tools.undo_last(str(folder), SAY)
    assert captions_of(folder) == before
    assert "沒有可復原的說明文字修改" in tools.undo_last(str(folder), ZH)


def test_photos_that_are_left_out_keep_their_captions(tools, folder):
    change, some = Change("front", "photo"), settings(data__exclude=("a.png",))
    assert "a.png" not in tools.preview(str(folder), change, some, SAY)[1]
    tools.change_all(str(folder), change, some, SAY)
    assert captions_of(folder)["a"] == "a dog, grass" and captions_of(folder)["b"] == "photo, grass, sks dog\n"


def test_a_missing_input_is_named_and_no_caption_changes(tools, folder, tmp_path):
    assert "on the Train page" in tools.preview(str(folder), Change("trigger"), settings(), SAY)[0]
    assert "Enter the words first" in tools.change_all(str(folder), Change("front", " "), None, SAY)
    assert "No caption would change" in tools.preview(str(folder), Change("replace", "zebra"), None, SAY)[0]
    assert "No photos yet" in tools.preview("", Change("trigger"), None, SAY)[0]
    for message in (
        tools.preview(str(tmp_path), Change("front", "x"), None, SAY)[0],
        tools.change_all(str(tmp_path), Change("front", "x"), None, SAY),
        tools.undo_last(str(tmp_path), SAY),
        tools.write_all(str(tmp_path), WISHES, None, SAY),
    ):
        assert "role=alert" in message
    assert not (folder / ".lorakit").exists()


def test_a_long_list_is_cut_and_counted(tools, folder):
    for number in range(ROWS):
        Image.new("RGB", (8, 8)).save(folder / f"x{number}.png")
        (folder / f"x{number}.txt").write_text("grass & <b>")
    message, table, _ = tools.preview(str(folder), Change("replace", "grass", "lawn"), None, SAY)
    assert f"change: {ROWS + 2}." in message and "and 2 more" in table and "lawn &amp; &lt;b&gt;" in table


@pytest.mark.slow
def test_the_command_reports_captions_or_the_error_of_a_model(tools, folder):
    moves: list[tuple[int, int]] = []
    refusal = tools.write_all(str(folder), WISHES, None, ZH, lambda *move: moves.append(move))
    assert "沒有這個資料夾" in refusal and not moves
    (folder / "d.txt").write_text("now each has one")
    everything = settings(data__name="sks 'dog'", data__exclude=("b.png", 'a"b*'), memory__device="cpu")
    message = tools.write_all(str(folder), WISHES, everything, SAY)
    assert (
        "Captions written: 0. Photos that already had a caption and were not changed: 3." in message
        and not tools._processes
    )
    (folder / "d.txt").unlink()
    outside = str(Path(__file__).parent)
    assert "is outside of" in tools.write_all(str(folder), WISHES | {"model": outside}, None, SAY)


def test_a_model_at_work_is_stopped_and_not_started_twice(tools, folder):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        tools._processes[str(folder)] = process
        assert "already" in tools.write_all(str(folder), WISHES, None, SAY)
        tools.end("")
        assert process.poll() is None
        tools.end(str(folder))
        assert process.wait(20) != 0
