"""Files that are either whole or not there: temporary file, fsync, rename.

A reader never sees half a file, and a kill or a power cut leaves the version before.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Put `content` at `path`, text as UTF-8; what was there before is replaced in one instant."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Rename over `target`, and make the rename itself last."""
    for attempt in range(50):
        try:
            source.replace(target)
            break
        except PermissionError:
            # Windows does not let a file be replaced in the moment in which somebody reads it.
            if os.name != "nt" or attempt == 49:
                raise
            time.sleep(0.02)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last, where the system can (Windows does so by itself)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
