"""Tests of captions from other programs: scores, documents, separate folders, and several files per photo."""

import json
import re
from pathlib import Path
from typing import Any

import marked
import pytest

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, abridge
from lorakit.data import caption_files, photo_folder


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (["a red ball"], "a red ball"),
        (["sks", "red ball"], "sks, red ball"),
        ({"tags": {"1girl": 0.99, "solo": 0.4}}, "1girl, solo"),
        ({"tags": ["1girl", "solo"]}, "1girl, solo"),
        ({"tags": {"general": ["solo"]}}, None),
        ({"tags": {}}, None),
        ([], None),
        ([1, 2], None),
        (7, None),
    ],
)
def test_a_json_beside_a_photo_gives_its_caption(row: Any, text: str | None) -> None:
    assert caption_files.of_one_photo(json.dumps(row)) == text


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"a toy\0 on grass", "line 1 has a NUL character (U+0000)"),
        (b"toy\n \0", "line 2 has a NUL character (U+0000)"),
        ("ein H\u00fcndchen auf der\0 Wiese".encode(), "line 1 has a NUL character (U+0000)"),
        ("a toy\0".encode("utf-16"), "line 1 has a NUL character (U+0000)"),
        (rb"{\rtf1\ansi a toy}", "a document in RTF, not plain text"),
        (b"\n<!DOCTYPE html><p>a toy", "a document in HTML, not plain text"),
        (b"<html><body>a toy", "a document in HTML, not plain text"),
    ],
)
def test_documents_are_refused_as_captions(raw: bytes, why: str) -> None:
    with pytest.raises(LorakitError, match=re.escape(why)):
        caption_files.decode(raw, "a.txt", print)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a toy", "a toy 玩具", "玩具 ok"])
def test_utf_16_without_a_mark_is_read(encoding: str, text: str) -> None:
    warnings: list[str] = []
    assert caption_files.decode(text.encode(encoding), "a.txt", warnings.append) == text
    assert "UTF-16 without a byte-order mark" in warnings[0]


def test_captions_in_a_separate_folder_and_renamed_tables_are_read(photos: Path) -> None:
    marked.save(photos / "a.png", marked.picture(0, 64, 64))
    (photos / "captions").mkdir()
    (photos / "captions" / "a.txt").write_text("a toy")
    (photos / "list.tsv").write_text("image_name\tcaption\na.png\ta red toy\n")
    folder = photo_folder.scan(DataConfig(folder=str(photos)).folder)
    assert folder.photos[0].caption == "a red toy"
    assert folder.warnings == [
        "captions/a.txt: captions or masks in a folder without photos, not used: put each beside its photo"
    ]


def test_many_similar_lines_are_abridged() -> None:
    lines = [Message("{file}: not read, it is {what}", f"{n}.txt", "empty") for n in range(200)]
    others = [Message("{names}: {cause}", f"{n}.png", f"cause {n}") for n in range(9)]
    result = abridge([*lines, "no base", *others])
    assert result[:5] == lines[:5] and result[6:] == ["no base", *others]
    assert result[5] == "lorakit check --json has the other lines like the last (195): not read, it is empty"
    assert abridge(lines[:6]) == lines[:6]
