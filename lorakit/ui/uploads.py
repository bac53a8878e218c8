"""Move uploaded photos and captions into one folder.

A browser sends file names without folders. A caption is accepted only if exactly one photo has its name.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.core.messages import Message
from lorakit.data.caption_files import TABLES
from lorakit.data.decode import Unreadable, decode
from lorakit.data.photo_folder import CAPTIONS, FORMATS, MASK
from lorakit.ui import archives

ARCHIVE = ".zip"
# Suffixes of files that may be uploaded.
SUFFIXES = (*(f".{kind}" for kind in FORMATS), *CAPTIONS, *TABLES, ARCHIVE)
TWINS = "{file}: several files have the name {name}, so their captions are ambiguous; upload one folder at a time"


@dataclass
class Upload:
    """The result of an upload: the number of accepted photos, and a message for each rejected file."""

    photo_count: int = 0
    refused: list[str] = field(default_factory=list)


def take_in(
    files: Sequence[Path], place: Path, progress: Callable[[int, int], object] = lambda count, total: None
) -> Upload:
    """Move the usable files into the folder `place`, which is created if needed. No existing file is replaced.

    Each archive is unpacked into its own subfolder, unless it is the only file and `place` is new.

    Args:
        progress: called with the number of examined files and the number of all.
    """
    result = Upload()
    groups: dict[str, list[Path]] = {}
    tables: list[Path] = []
    for count, file in enumerate(files, 1):
        progress(count, len(files))
        try:
            if file.suffix.lower() == ARCHIVE:
                folder = place if len(files) == 1 and not place.exists() else place / _unused(place, _stem(file))
                photo_count, refused = archives.unpack(file, folder, progress)
                result.photo_count += photo_count
                result.refused += refused
                continue
            if _is_table(file):
                tables.append(file)
                continue
            if not _is_caption(file):
                decode(file, _name(file))
            groups.setdefault(_stem(file).casefold(), []).append(file)
        except Unreadable as problem:
            result.refused.append(str(problem))
    for group in groups.values():
        photos, captions = (_distinct([file for file in group if _is_caption(file) is kind]) for kind in (False, True))
        if len(captions) == 1 and not photos and _is_missing_in(place, captions[0]):
            shutil.move(captions[0], place / _name(captions[0]))
        elif captions and not photos:
            result.refused += [
                Message("{file}: the upload has no photo of this name", _name(file)) for file in captions
            ]
        elif captions and (twin := _twin(photos) or _twin(captions)):
            result.refused += [Message(TWINS, _name(file), twin) for file in captions]
            captions = []
        together = [[photo] for photo in photos] if _twin(photos) else [[*photos, *captions]] if photos else []
        for files_of_stem in together:
            stem = _unused(place, _stem(files_of_stem[0]))
            for file in files_of_stem:
                place.mkdir(parents=True, exist_ok=True)
                shutil.move(file, place / (stem + _name(file)[len(_stem(file)) :]))
        result.photo_count += sum(not _name(photo).lower().endswith(MASK) for photo in photos)
    for table in tables:
        reason = ""
        if not place.is_dir():
            reason = "the upload has no photo"
        elif (place / _name(table)).exists():
            reason = "a file of this name already exists"
        if reason:
            result.refused.append(Message("{file}: {problem}", _name(table), reason))
        else:
            shutil.move(table, place / _name(table))
    return result


def _name(file: Path) -> str:
    """The file's name without leading dots, which would hide it."""
    return file.name.lstrip(".") or "photo"


def _stem(file: Path) -> str:
    """The part of the name that a photo, its caption (`photo.txt`, `photo.jpg.txt`) and its mask share."""
    stem = Path(Path(_name(file)).stem)
    return stem.stem if stem.suffix.lower() == ".mask" or stem.suffix.lower()[1:] in FORMATS else str(stem)


def _is_caption(file: Path) -> bool:
    return file.suffix.lower() in CAPTIONS


def _is_missing_in(place: Path, caption: Path) -> bool:
    """Whether the folder has exactly one photo with the caption's name, and no caption for it."""
    there = [file for file in place.iterdir() if _stem(file) == _stem(caption)] if place.is_dir() else []
    photos = [file for file in there if not file.name.lower().endswith(MASK)]
    return len(photos) == 1 and not _is_caption(photos[0])


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in TABLES


def _distinct(files: Sequence[Path]) -> list[Path]:
    """The files without duplicates of the same name and content."""
    distinct: list[Path] = []
    for file in files:
        if not any(_name(one) == _name(file) and filecmp.cmp(one, file, shallow=False) for one in distinct):
            distinct.append(file)
    return distinct


def _twin(files: Sequence[Path]) -> str:
    """A name that several files share, or ""."""
    names = [_name(file).casefold() for file in files]
    return next((_name(file) for file in files if names.count(_name(file).casefold()) > 1), "")


def _unused(place: Path, stem: str) -> str:
    """The stem, with a number appended if a file in the folder has this stem."""
    stems = {_stem(file).casefold() for file in place.iterdir()} if place.is_dir() else set()
    number, name = 1, stem
    while name.casefold() in stems:
        number += 1
        name = f"{stem}-{number}"
    return name
