"""Unpack photos, captions and caption tables from a zip: no other files, into one folder, within fixed limits."""

from __future__ import annotations

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lorakit.core.messages import Message
from lorakit.core.names import printable
from lorakit.data import concepts
from lorakit.data.caption_files import TABLES
from lorakit.data.decode import Unreadable, decode
from lorakit.data.photo_folder import CAPTIONS, FORMATS, MASK

# Maximum number of files in an archive, and maximum bytes of them unpacked. Without these limits, a small archive could
# fill the disk.
MAX_FILES, MAX_BYTES = 20_000, 4 << 30
USEFUL = (*(f".{kind}" for kind in FORMATS), *CAPTIONS, *TABLES)


def unpack(
    file: Path, place: Path, progress: Callable[[int, int], object] = lambda count, total: None
) -> tuple[int, list[str]]:
    """Unpack the usable files into `place`, a new folder, with the archive's folders. Return the number of photos, and
    a line for each other file.

    Folders that hold everything are left out; links and hidden files are passed over.

    Raises:
        Unreadable: it is no zip, is locked by a password, or is too large; nothing is left behind.
    """
    name = printable(file.name)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _entries(archive, name)
            common = _common_folders(list(entries))
            try:
                for count, (path, entry) in enumerate(entries.items(), 1):
                    progress(count, len(entries))
                    _write(archive, entry, place.joinpath(*path.parts[common:]))
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
    except OSError as error:
        raise Unreadable(name, Message("cannot be unpacked ({reason})", error.strerror or error)) from None
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        reason = "locked by a password" if "password" in str(error) else "damaged, or not a zip"
        raise Unreadable(name, Message("{problem}; unpack it yourself", reason)) from None
    return _checked(place)


def _entries(archive: zipfile.ZipFile, name: str) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files that can be used, by where they go."""
    entries = {}
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        is_link = entry.external_attr >> 28 == 0xA
        hidden = any(part.startswith((".", "__MACOSX")) or ":" in part for part in path.parts)
        if entry.is_dir() or is_link or hidden or path.is_absolute() or not path.name.lower().endswith(USEFUL):
            continue
        entries[path] = entry
    size = sum(entry.file_size for entry in entries.values())
    if len(entries) > MAX_FILES or size > MAX_BYTES:
        text = "more than {count} files or {size} GiB in it; unpack it yourself"
        raise Unreadable(name, Message(text, MAX_FILES, MAX_BYTES >> 30))
    return entries


def _common_folders(paths: list[PurePosixPath]) -> int:
    """How many folders above hold all of them; one as "20_sks dog" says what is in it and stays."""
    folders = [path.parts[:-1] for path in paths]
    depth = 0
    while folders and all(len(parts) > depth and parts[depth] == folders[0][depth] for parts in folders):
        if concepts.NUMBERED.fullmatch(folders[0][depth]):
            break
        depth += 1
    return depth


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # ZipFile reads no more of an entry than its header says.
    with archive.open(entry) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file)


def _checked(place: Path) -> tuple[int, list[str]]:
    """Take away what cannot be decoded: the number of photos that stay, and a line for each that does not."""
    count, refused = 0, []
    for path in sorted(place.rglob("*")) if place.is_dir() else []:
        if path.is_file() and path.name.lower().endswith(tuple(f".{kind}" for kind in FORMATS)):
            try:
                decode(path, path.relative_to(place).as_posix())
                count += not path.name.lower().endswith(MASK)
            except Unreadable as problem:
                refused.append(str(problem))
                path.unlink()
    return count, refused
