"""Read captions from files: text in any encoding, and the JSON, JSON Lines and CSV of other programs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lorakit.core import foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message

METADATA = "metadata.jsonl"
TABLES = (".jsonl", ".json", ".csv", ".tsv")
# The start of a document that a word processor or a browser saved.
MARKUP = re.compile(r"\s*(?:({)\\rtf|<!doctype html|<html)", re.IGNORECASE)
FILE_KEYS = ("file_name", "image_name", "filename", "file", "image", "image_path", "image_file", "path")
TEXT_KEYS = ("text", "caption", "prompt", "description", "tags", "tag_string")
# Characters of Chinese, Japanese and Korean text, and those that only Japanese has.
CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e]")
KANA = re.compile(r"[\u3040-\u30ff]")
# Characters of a guessed text that a message shows.
MAX_EXCERPT = 60


def decode(raw: bytes, name: str, warn: Callable[[str], object]) -> str:
    """Text in UTF-8, UTF-16 or UTF-32; another encoding is guessed, and a warning shows the text.

    Raises:
        LorakitError: it is not text in any of the encodings.
    """
    text, guess = _decode(raw)
    if text is not None and "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise LorakitError(
            "{file}: line {line} has a NUL character (U+0000): remove it, or write the text again", name, line
        )
    if text is None:
        raise LorakitError("{file}: not text in an encoding that lorakit reads; save it as UTF-8", name)
    if match := MARKUP.match(text):
        kind = "RTF" if match[1] == "{" else "HTML"
        raise LorakitError("{file}: a document in {kind}, not plain text; save it as plain text", name, kind)
    if guess:
        excerpt = " ".join(text.split())
        excerpt = excerpt if len(excerpt) <= MAX_EXCERPT else excerpt[:MAX_EXCERPT] + "…"
        warn(
            Message(
                '{file}: not UTF-8, read as {encoding}: "{text}"; if that is wrong, save it as UTF-8',
                name,
                guess,
                excerpt,
            )
        )
    return text


def _decode(raw: bytes) -> tuple[str | None, str]:
    """The text or None, and the encoding if it was guessed."""
    marks = (("utf-32", b"\xff\xfe\0\0"), ("utf-32", b"\0\0\xfe\xff"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"))
    for encoding, mark in marks:
        if raw.startswith(mark):
            return _try(raw, encoding), ""
    nuls = raw.count(0)
    if nuls and 4 * nuls < len(raw) and _try(raw, "utf-8") is not None:  # of UTF-16 every other byte would be 0
        return _try(raw, "utf-8"), ""
    if nuls:
        little = raw[1::2].count(0) >= raw[::2].count(0)
        text = _try(raw, "utf-16-le" if little else "utf-16-be")
        return text, "UTF-16 without a byte-order mark"
    if (text := _try(raw, "utf-8-sig")) is not None:
        return text, ""
    japanese = _try(raw, "cp932")
    if japanese is not None and KANA.search(japanese):
        return japanese, "Shift JIS"
    korean, cyrillic = _try(raw, "euc_kr"), _try(raw, "cp1251")
    if korean is not None and " " in korean and re.fullmatch(r"[\x00-\x7f\uac00-\ud7a3]+", korean):
        return korean, "EUC-KR"  # Korean has spaces between words; Chinese in GBK is read as other characters too
    if cyrillic is not None and _is_cyrillic(cyrillic):
        return cyrillic, "Windows-1251"
    for encoding, title in (("gb2312", "GBK"), ("big5", "Big5"), ("gb18030", "GBK"), ("euc_kr", "EUC-KR")):
        text = _try(raw, encoding)
        if text is not None and _is_east_asian(text):
            return text, title
    return _try(raw, "cp1252"), "Windows-1252"


def _is_cyrillic(text: str) -> bool:
    """Whether all letters beyond ASCII are Russian, most of them lower-case, and no word mixes them with Latin letters.

    Bytes of other encodings look like capitals and signs.
    """
    letters = re.findall(r"[^\W\d_a-zA-Z]", text)
    small = re.findall("[а-яё]", text)
    mixed = re.search("[a-zA-Z][а-яё]|[а-яё][a-zA-Z]", text)
    all_russian = all(re.match("[а-яё]", letter, re.IGNORECASE) for letter in letters)
    return len(small) >= 4 and len(small) >= 0.75 * len(letters) and all_russian and not mixed


def _is_east_asian(text: str) -> bool:
    """Whether nearly all characters beyond ASCII are CJK, some adjacent, and none is inside a Latin word as in
    "größe"."""
    others = [character for character in text if ord(character) > 127]
    cjk = CJK.pattern
    if not re.search(f"{cjk}{cjk}", text) or re.search(f"[a-zA-Z]{cjk}[a-zA-Z]", text):
        return False
    return len(CJK.findall("".join(others))) * 10 >= len(others) * 9


def _try(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def of_one_photo(content: str) -> str | None:
    """The caption in the JSON file of one photo, or None."""
    try:
        row = foreign_json.loads(content)
    except ValueError:
        return None
    return _text(row) if isinstance(row, Mapping) else _joined(row)


def rows(name: str, content: str) -> Iterator[tuple[int, str, str]]:
    """(line, name of a photo, text) of each row of a table: JSON Lines, CSV, or JSON such as kohya's metadata.

    Raises:
        LorakitError: the table is damaged, or has no names of photos or no texts.
    """
    for number, row in _json_lines(name, content) if name.endswith(".jsonl") else _table(name, content):
        row = row if isinstance(row, Mapping) else {}
        file = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), None)
        if file is None:
            raise LorakitError('{file} line {line}: needs "file_name", the name of a picture beside it', name, number)
        text = _text(row)
        if text is None:
            raise LorakitError("{file} line {line}: needs one of {keys}", name, number, ", ".join(TEXT_KEYS))
        yield number, file, text


def _json_lines(name: str, content: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield number, foreign_json.loads(line)
            except json.JSONDecodeError as error:
                raise LorakitError(
                    "{file} line {line}: not JSON ({why}); each line is one object", name, number, error.msg
                ) from None


def _table(name: str, content: str) -> Iterator[tuple[int, object]]:
    if not name.endswith(".json"):
        yield from _csv(content)
        return
    try:
        table = foreign_json.loads(content)
    except json.JSONDecodeError as error:
        raise LorakitError("{file} line {line}: not JSON ({problem})", name, error.lineno, error.msg) from None
    if isinstance(table, Mapping) and not any(isinstance(table.get(key), str) for key in FILE_KEYS):
        # kohya's metadata: {"folder/photo": {"caption": ..., "tags": ...}}; or {"photo.jpg": "text"}.
        table = [
            {"text": value, "file_name": file} if isinstance(value, str) else {**value, "file_name": file}
            for file, value in table.items()
            if isinstance(value, (str, Mapping))
        ]
    yield from enumerate(table if isinstance(table, list) else [table], 1)


def _csv(content: str) -> Iterator[tuple[int, object]]:
    first = content.splitlines()[0] if content.strip() else ""
    delimiter = max("\t;,", key=first.count)
    lines = [line for line in csv.reader(content.splitlines(), delimiter=delimiter) if any(line)]
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    has_header = any(key in header for key in FILE_KEYS)
    for number, line in enumerate(lines[1:] if has_header else lines, 2 if has_header else 1):
        columns = header if has_header else [FILE_KEYS[0], TEXT_KEYS[0]]
        yield number, dict(zip(columns, line, strict=False))


def _text(row: Mapping[str, object]) -> str | None:
    """The text of a row. Kohya's rows have a caption and tags; both are used, in that order."""
    texts = {key: _joined(row.get(key)) for key in TEXT_KEYS}
    if texts["caption"] and texts["tags"]:
        return f"{texts['caption']}, {texts['tags']}"
    return next((text for text in texts.values() if text is not None), None)


def _joined(value: object) -> str | None:
    if isinstance(value, Mapping) and value and all(isinstance(score, int | float) for score in value.values()):
        value = list(value)  # a tagger's output, with a score for each tag
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return " ".join(value.split()) if isinstance(value, str) else None


def photo_key(file: str, level: Path) -> str:
    """A photo's path relative to the table's folder, also from a Windows path or an absolute path of another
    machine."""
    parts = file.replace("\\", "/").removeprefix("./").split("/")
    is_absolute = len(parts) > 1 and (not parts[0] or parts[0].endswith(":"))
    if not is_absolute:
        return "/".join(parts)
    return "/".join(parts[-2:] if (level / parts[-2]).is_dir() and parts[-2] else parts[-1:])
