"""Tests of changes to many captions: the new texts, the files that get them, and undo."""

from pathlib import Path

import pytest
from PIL import Image

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.data import caption_edits, photo_folder
from lorakit.data.caption_edits import CaptionWriter

DOG, STYLE = DataConfig(name="sks dog"), DataConfig(name="sks style", kind="style")


@pytest.mark.parametrize(
    ("text", "config", "is_tags", "expected"),
    [
        ("a dog on a beach", DOG, False, "a sks dog on a beach"),
        ("A dog and a dog", DOG, False, "A sks dog and a dog"),
        ("the brown dog sleeps", DOG, False, "the brown sks dog sleeps"),
        ("an elephant", DataConfig(name="ohwx elephant"), False, "an ohwx elephant"),
        ("hotdogs on a plate", DOG, False, "sks dog, hotdogs on a plate"),
        ("a sks dog", DOG, False, "a sks dog"),
        ("dog, outdoors, grass", DOG, True, "sks dog, outdoors, grass"),
        ("a mug", STYLE, False, "sks style, a mug"),
        ("a dog", DataConfig(), False, "a dog"),
    ],
)
def test_the_name_is_inserted_at_its_usual_place(text, config, is_tags, expected):
    assert caption_edits.with_name(text, config, is_tags) == expected


@pytest.mark.parametrize(
    ("text", "phrases", "is_tags", "expected"),
    [
        ("a photo of a dog, blurry, with a watermark", ["a photo of", "blurry"], False, "a dog, with a watermark"),
        ("A dog. Blurry.", ["blurry"], False, "A dog."),
        ("long hair, hair, 1girl", ["hair", "1girl"], True, "long hair"),
        ("looking at viewer, smile", ["Looking_at_viewer"], True, "smile"),
        ("unblurry", ["blurry"], False, "unblurry"),
    ],
)
def test_listed_phrases_are_removed(text, phrases, is_tags, expected):
    assert caption_edits.without(text, phrases, is_tags) == expected


def test_trigger_first_add_and_replace_edit_a_text():
    assert caption_edits.trigger_first("outdoors, sks dog, grass", DOG) == "sks dog, outdoors, grass"
    assert caption_edits.trigger_first("outdoors", DOG) == "sks dog, outdoors"
    assert caption_edits.add("a, b", "c", in_front=False) == "a, b, c"
    assert caption_edits.add("a, b", "B", in_front=True) == "a, b"
    assert caption_edits.add("", "c", in_front=True) == "c"
    assert caption_edits.replace("a Dog, dogs", "dog", r"c\1at") == r"a c\1at, dogs"
    assert caption_edits.replace("a, b, c", "b", "") == "a, c" and caption_edits.replace("a,  b", "z", "") == "a,  b"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "a.jpg", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b.caption").write_bytes("caf\xe9".encode("latin-1"))
    return tmp_path


def test_each_photo_gets_its_own_file_and_undo_restores_all_bytes(photos):
    by_name = {photo.relative: photo for photo in photo_folder.scan(photos).photos}
    with CaptionWriter(photos, by_name.values()) as writer:
        names = [writer.write(by_name[name], f"text of {name}").name for name in ("a.png", "a.jpg", "b.png", "c.png")]
    assert names == ["a.png.txt", "a.jpg.txt", "b.caption", "c.txt"]
    folder = photo_folder.scan(photos)
    assert [photo.caption for photo in folder.photos] == [f"text of {photo.relative}" for photo in folder.photos]
    assert folder.warnings == []
    undone = caption_edits.undo(photos)
    assert undone.restored == ["a.png.txt", "a.jpg.txt", "b.caption", "c.txt"] and not undone.remaining
    assert (photos / "b.caption").read_bytes() == b"caf\xe9" and not (photos / "c.txt").exists()


def test_changes_are_undone_one_at_a_time(photos):
    (photo,) = (photo for photo in photo_folder.scan(photos).photos if photo.relative == "c.png")
    for text in ("first", "second"):
        with CaptionWriter(photos, [photo]) as writer:
            writer.write(photo, text)
    assert caption_edits.undo(photos).remaining == 1 and (photos / "c.txt").read_text() == "first\n"
    assert caption_edits.undo(photos).remaining == 0 and not (photos / "c.txt").exists()
    with CaptionWriter(photos, [photo]) as writer:
        writer.write(photo, "third")
    assert caption_edits.changes(photos)[0].name == "captions-0003.jsonl"


@pytest.mark.parametrize("row", ['{"file": "../out.txt", "before": null, "after": "x"}', '{"file": 3}', "no", "{}"])
def test_undo_refuses_a_damaged_list_of_changes(row, photos):
    (photos / ".lorakit").mkdir()
    (photos / ".lorakit" / "captions-0001.jsonl").write_text(row + "\n")
    with pytest.raises(LorakitError, match="line 1: damaged; no caption was changed"):
        caption_edits.undo(photos)


def test_undo_ignores_an_incomplete_last_line(photos):
    (photos / ".lorakit").mkdir()
    (photos / "c.txt").write_text("x\n")
    rows = '{"file": "c.txt", "before": null, "after": "x\\n"}\n{"file": "a.pn'
    (photos / ".lorakit" / "captions-0001.jsonl").write_text(rows)
    assert caption_edits.undo(photos).restored == ["c.txt"] and not (photos / "c.txt").exists()


def test_a_missing_or_read_only_folder_is_refused(photos, monkeypatch):
    with pytest.raises(LorakitError, match="does not exist"):
        caption_edits.undo(photos / "gone")
    (photos / ".lorakit").write_text("a file is in the way")
    (photo, *_) = photo_folder.scan(photos).photos
    with CaptionWriter(photos, [photo]) as writer, pytest.raises(LorakitError, match="cannot be written"):
        writer.write(photo, "x")
