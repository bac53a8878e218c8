"""Atomic writes of files: temporary file, fsync, rename.

A reader never sees a partly written file, and a kill or a power cut leaves the previous version. After a kill a
temporary file remains; the next write to its folder removes old ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from pathlib import Path

# Age in seconds at which a temporary file is considered abandoned. Another container may share the folder, so process
# ids do not show whether its writer is alive.
STALE = 3600
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_swept: set[Path] = set()


def temporary_path(path: Path) -> Path:
    """A unique name in the folder of `path`, also unique across containers. Old temporary files are removed once per
    folder."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep(folder: Path, seconds: float = STALE) -> None:
    """Remove temporary files in a folder that were not written to for `seconds` seconds."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.lstat().st_mtime >= seconds:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, text as UTF-8. The old file is replaced atomically."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing it, and flush the rename to the disk."""
    for attempt in range(50):
        try:
            source.replace(target)
            break
        except PermissionError:
            # On Windows a file cannot be replaced while it is being read.
            if os.name != "nt" or attempt == 49:
                raise
            time.sleep(0.02)
    sync_folder(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`. An older folder there is removed only after that; if the rename fails, it
    is restored.

    Raises:
        OSError: `target` cannot be renamed or written; it is unchanged.
    """
    old = temporary_path(target).with_suffix(".old")
    try:
        if target.exists():
            target.rename(old)
        source.rename(target)
        sync_folder(target.parent)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk. Windows does not need this."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refusal(folder: Path) -> str:
    """The reason why no file can be written in a folder, or "". The folder need not exist; nothing is created."""
    try:
        if folder.is_symlink() and not folder.exists():  # a dangling link cannot be created as a folder
            return os.strerror(errno.ENOENT)
        parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        code = errno.ENOTDIR if not parent.is_dir() else 0 if os.access(parent, os.W_OK | os.X_OK) else errno.EACCES
    except OSError as error:
        code = error.errno or errno.EIO
    return os.strerror(code) if code else ""


def end_last_line(log: Path) -> None:
    """End the last line of a log. A kill may have truncated it, and the next line must not be appended to it."""
    if log.is_file() and log.stat().st_size:
        with log.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
