"""Unpack photos, captions and caption tables from a zip file into one folder, within fixed limits."""

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

# Maximum number of files in an archive, and maximum total size of the unpacked files in bytes. Without these limits, a
# small archive could fill the disk.
MAX_FILES, MAX_BYTES = 20_000, 4 << 30
USEFUL = (*(f".{kind}" for kind in FORMATS), *CAPTIONS, *TABLES)


def unpack(
    file: Path, place: Path, progress: Callable[[int, int], object] = lambda count, total: None
) -> tuple[int, list[str]]:
    """Unpack the photos, captions and caption tables of a zip file into the new folder `place`.

    The subfolders are kept, except top folders that contain all files. Links, hidden files and other kinds of files are
    skipped.

    Args:
        progress: called with the number of unpacked files and the number of all.

    Returns:
        The number of photos, and a message for each photo that cannot be decoded.

    Raises:
        Unreadable: the file is no zip, has a password, or is too large. `place` is removed.
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
    """The usable entries by their paths in the archive.

    Raises:
        Unreadable: they are too many or too large.
    """
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
    """Number of top folders that contain all paths. A folder such as "20_sks dog" is not one: it names a concept."""
    folders = [path.parts[:-1] for path in paths]
    depth = 0
    while folders and all(len(parts) > depth and parts[depth] == folders[0][depth] for parts in folders):
        if concepts.NUMBERED.fullmatch(folders[0][depth]):
            break
        depth += 1
    return depth


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # ZipFile reads at most the size in the entry's header.
    with archive.open(entry) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file)


def _checked(place: Path) -> tuple[int, list[str]]:
    """Delete photos that cannot be decoded. Return the number of the others, and a message for each deleted photo."""
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
