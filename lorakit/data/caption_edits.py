"""Write captions for photos, by a model or many at once, so that each such change can be undone.

A change is a file `.lorakit/captions-0001.jsonl` in the folder of photos, with a line for each caption file: its text
before and after. Each line is written to disk before its caption, so a kill loses nothing. Undoing renames the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from lorakit.config import DataConfig
from lorakit.core import atomic, foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.names import printable
from lorakit.data import captions
from lorakit.data.photo_folder import CAPTIONS, Photo

FOLDER = ".lorakit"
CHANGE = re.compile(r"captions-(\d{4,})\.jsonl")
UNDONE = ".undone"


class CaptionWriter:
    """Writes the captions of one change.

    Args:
        folder: the folder of photos.
        photos: all photos of the folder. If two have the same stem, each gets its own caption file.
    """

    def __init__(self, folder: Path, photos: Iterable[Photo]):
        self.folder = folder
        self.count = 0
        self._journal: TextIO | None = None
        self._stems: dict[tuple[Path, str], int] = {}
        for photo in photos:
            stem = photo.path.parent, photo.path.stem.casefold()
            self._stems[stem] = self._stems.get(stem, 0) + 1

    def __enter__(self) -> CaptionWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._journal is not None:
            self._journal.close()

    def file_of(self, photo: Photo) -> Path:
        """The file for the caption: the existing one, else `name.txt` (`name.jpg.txt` if another photo has the same
        stem)."""
        source = photo.path.parent / (photo.caption_source or "")
        if photo.caption_source and source.suffix.lower() in CAPTIONS and source.is_file():
            return source
        is_shared = self._stems.get((photo.path.parent, photo.path.stem.casefold()), 0) > 1
        return photo.path.with_name(f"{photo.path.name if is_shared else photo.path.stem}{CAPTIONS[0]}")

    def write(self, photo: Photo, text: str) -> Path:
        """Write the caption of a photo, or several captions as one line each. Return the file.

        Raises:
            LorakitError: it cannot be written.
        """
        target, content = self.file_of(photo), "".join(" ".join(line.split()) + "\n" for line in text.splitlines())
        try:
            before = target.read_bytes().decode("utf-8", "surrogateescape") if target.exists() else None
            name = os.path.relpath(target, self.folder).replace(os.sep, "/")
            self._note({"file": name, "before": before, "after": content})
            atomic.write(target, content)
        except OSError as error:
            raise LorakitError("{file}: cannot be written ({reason})", target, error.strerror or error) from None
        self.count += 1
        return target

    def _note(self, row: dict[str, str | None]) -> None:
        if self._journal is None:
            (self.folder / FOLDER).mkdir(exist_ok=True)
            number = max((int(match[1]) for match in _names(self.folder)), default=0) + 1
            path = self.folder / FOLDER / f"captions-{number:04d}.jsonl"
            self._journal = path.open("x", encoding="ascii")
        self._journal.write(json.dumps(row) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


@dataclass
class Undone:
    """The result of undoing the last change: files that were restored, and files that were edited since and are not
    changed. `remaining` further changes can be undone."""

    restored: list[str] = field(default_factory=list)
    changed_since: list[str] = field(default_factory=list)
    remaining: int = 0


def changes(folder: Path) -> list[Path]:
    """The changes that can be undone, the last one at the end."""
    open_changes = [match for match in _names(folder) if not (folder / FOLDER / f"{match[0]}{UNDONE}").exists()]
    return [folder / FOLDER / match[0] for match in sorted(open_changes, key=lambda match: int(match[1]))]


def _names(folder: Path) -> list[re.Match[str]]:
    place = folder / FOLDER
    names = [path.name.removesuffix(UNDONE) for path in place.iterdir()] if place.is_dir() else []
    return [match for name in dict.fromkeys(names) if (match := CHANGE.fullmatch(name))]


def undo(folder: Path) -> Undone:
    """Restore the captions that the last change replaced, and delete those that it added.

    Raises:
        LorakitError: there is no change to undo, its file is damaged, or a caption cannot be written.
    """
    if not folder.is_dir():
        raise LorakitError("folder {folder} does not exist", folder)
    journals = changes(folder)
    if not journals:
        raise LorakitError("{folder}: there is no change of captions to undo", folder)
    result = Undone(remaining=len(journals) - 1)
    try:
        for target, before, after in reversed(_rows(folder, journals[-1])):
            name = printable(target.relative_to(folder).as_posix())
            if (target.read_bytes() if target.exists() else None) != after:
                result.changed_since += [] if before is None and not target.exists() else [name]
            elif before is None:
                target.unlink()
                result.restored.append(name)
            else:
                atomic.write(target, before)
                result.restored.append(name)
        journals[-1].rename(journals[-1].with_name(journals[-1].name + UNDONE))
    except OSError as error:
        raise LorakitError(
            "{file}: cannot be written ({reason})", error.filename or folder, error.strerror or error
        ) from None
    result.restored.reverse()
    return result


def _rows(folder: Path, journal: Path) -> list[tuple[Path, bytes | None, bytes]]:
    """(caption file, its bytes before, its bytes after). The last line may be incomplete: its caption was not
    written."""
    result, lines = [], journal.read_text(encoding="ascii", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = foreign_json.loads(line)
            target = folder.joinpath(*row["file"].split("/"))
            before, after = (
                None if t is None else t.encode("utf-8", "surrogateescape") for t in (row["before"], row["after"])
            )
            is_inside = folder.resolve() in target.resolve().parents and target.suffix.lower() in CAPTIONS
            if after is None or not is_inside:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LorakitError("{file} line {line}: damaged; no caption was changed", journal, number) from None
        result.append((target, before, after))
    return result


# -- texts ------------------------------------------------------------------------------------------------------------


def with_name(text: str, config: DataConfig, is_tags: bool) -> str:
    """Add trigger and class to a caption: "a dog here" becomes "a sks dog here", and tags start with "sks dog".

    A text without the class gets the name in front, as in training.
    """
    if not config.name or captions.has_trigger(text, config):
        return text
    if is_tags:
        tags = [tag for tag in _tags(text) if tag.casefold() != config.noun.casefold()]
        return ", ".join([config.name, *tags])
    if config.kind == "subject" and config.noun:
        pattern = rf"(?:\b(an?)\s+)?(?<!\w){re.escape(config.noun)}(?!\w)"

        def name(match: re.Match[str]) -> str:
            phrase = captions.article(config.name) if match[1] else config.name
            return phrase[0].upper() + phrase[1:] if (match[1] or "")[:1].isupper() else phrase

        replaced = re.sub(pattern, name, text, count=1, flags=re.IGNORECASE)
        if replaced != text:
            return replaced
    return ", ".join(filter(None, [config.name, text]))


def without(text: str, phrases: Sequence[str], is_tags: bool) -> str:
    """Remove the unwanted words from a caption: complete tags, or words of a sentence."""
    if is_tags:
        absent = {phrase.replace("_", " ").casefold().strip() for phrase in phrases}
        return ", ".join(tag for tag in _tags(text) if tag.casefold() not in absent)
    before = text
    for phrase in filter(None, map(str.strip, phrases)):
        text = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", "", text, flags=re.IGNORECASE)
    return text if text == before else tidy(text)


def tidy(text: str) -> str:
    """Remove the gaps, doubled punctuation and outer commas that a removal leaves in a text."""
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    return re.sub(r"([,;:])[,.;:]+|\.[,;:.]+", lambda run: "." if "." in run[0] else run[1], text).strip(" ,;")


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def add(text: str, words: str, *, in_front: bool) -> str:
    """Add words as the first or last tag of the caption, unless it has them."""
    if not words or words.casefold() in [tag.casefold() for tag in _tags(text)]:
        return text
    return ", ".join(filter(None, [words, text] if in_front else [text, words]))


def trigger_first(text: str, config: DataConfig) -> str:
    """Move the tag with the trigger to the front of the caption. If no tag has it, add the name."""
    tags = _tags(text)
    own = [tag for tag in tags if config.trigger and captions.has_trigger(tag, config)][:1]
    return ", ".join([*(own or [config.name]), *(tag for tag in tags if tag not in own)]) if config.name else text


def replace(text: str, search: str, replacement: str) -> str:
    """Replace words in the caption, ignoring case. An empty replacement removes them."""
    if not search:
        return text
    pattern = re.compile(rf"(?<!\w){re.escape(search)}(?!\w)", re.IGNORECASE)
    return tidy(pattern.sub(lambda _: replacement, text)) if pattern.search(text) else text


def plan(photos: Iterable[Photo], edit: Callable[[str, Photo], str]) -> list[tuple[Photo, str]]:
    """The photos whose captions an edit changes, with the new captions, one line each if a photo has several."""
    result = []
    for photo in photos:
        lines = [" ".join(edit(line, photo).split()) for line in photo.caption_lines]
        if lines != list(photo.caption_lines) and any(lines):
            result.append((photo, "\n".join(filter(None, lines))))
    return result
