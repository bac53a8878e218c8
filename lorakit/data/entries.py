"""The usable files of a folder of photos. Links that leave it are not followed; refused entries are reported."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorakit.core.messages import Message, some
from lorakit.core.names import printable

# Folders that operating systems create and do not show.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
DANGLING = "links to a file that does not exist; not read"
ABOVE = "links to a folder above them; not followed"
OUTSIDE = "links out of the folder of photos; not followed, copy the files into it"
NO_FILE = "cannot be opened: neither a file nor a folder"


def is_hidden(entry: Path) -> bool:
    """Whether a file or folder is hidden."""
    return entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS


def usable(level: Path, root: Path, warnings: list[str]) -> list[Path]:
    """The files and folders directly in `level`, in order of name.

    Args:
        root: the folder of photos.
        warnings: gets a message for each reason to refuse entries.
    """
    entries, refused = [], dict[str, list[str]]()
    real_root = root.resolve()
    for entry in sorted(level.iterdir(), key=lambda entry: entry.name):
        if is_hidden(entry):
            continue
        if cause := _refusal(entry, real_root):
            refused.setdefault(cause, []).append(printable(entry.relative_to(root).as_posix()))
        else:
            entries.append(entry)
    warnings += [Message("{names}: {cause}", some_names(names), cause) for cause, names in refused.items()]
    return entries


def _refusal(entry: Path, root: Path) -> str:
    """The reason why an entry is not used, or ""."""
    if not entry.is_symlink():
        return "" if entry.is_file() or entry.is_dir() else NO_FILE
    try:
        target = entry.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a link that leads to itself, before Python 3.13
        return DANGLING
    if target == root or target in root.parents:
        return ABOVE
    return "" if root in target.parents else OUTSIDE


class Names:
    """Finds a file by the name of its photo: the exact name first, then one with another case.

    Args:
        files: the files, by name or by stem.
        photos: the photos. A file with exactly the name of one photo belongs to no other.
    """

    def __init__(self, files: Mapping[str, Path], photos: Iterable[Path]):
        self._files = files
        self._loose: dict[str, list[str]] = {}
        self._owners = {name for photo in photos for name in (photo.name, photo.stem)}
        for name in files:
            self._loose.setdefault(_fold(name), []).append(name)

    def side_file(self, photo: Path, suffix: str) -> Path | None:
        """The file with the stem or the name of a photo, then `suffix`; or None."""
        return next(iter(self.every(photo, suffix)), None)

    def every(self, photo: Path, suffix: str) -> list[Path]:
        """The file with the stem of a photo plus `suffix`, and the one with its full name plus `suffix`."""
        matches = [self._match(stem, suffix) for stem in (photo.stem, photo.name)]
        return [self._files[name] for name in matches if name is not None]

    def _match(self, stem: str, suffix: str) -> str | None:
        name = stem + suffix
        if name in self._files:
            return name
        loose = self._loose.get(_fold(name), [])
        stems = ((name, name[: len(name) - len(suffix)]) for name in loose)  # "b.TXT" is of "b.png", not of "B.png"
        return next((name for name, own in stems if own == stem or own not in self._owners), None)


def _fold(name: str) -> str:
    """A name in lower case and composed form, because macOS decomposes accents."""
    return unicodedata.normalize("NFC", name).lower()


def some_names(names: Iterable[str], limit: int = 4) -> str:
    """The first `limit` names, and the number of the remaining ones."""
    return some(names, limit)
