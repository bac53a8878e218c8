"""Folder of files that several runs share: latents, class images, compiled code. All of it may be deleted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from lorakit.core import atomic

# A file that was changed less than this many seconds ago may change again within one tick of the file system's clock.
CLOCK_TICK = 2.0


def cache_dir() -> Path:
    """`LORAKIT_CACHE` (`~` is the home folder), else ~/.cache/lorakit."""
    folder = os.environ.get("LORAKIT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "lorakit"


def file_hash(path: Path) -> str:
    """SHA-256 of a file. It is cached by path, size and times, so a large file is read only once."""
    path = path.resolve()
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        # ctime, too: a copy over the file may restore its old mtime.
        facts = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        entry = cache_dir() / "file-hashes" / hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()
        with contextlib.suppress(OSError, ValueError):
            if re.fullmatch("[0-9a-f]{64}", cached := entry.read_text(encoding="ascii")):
                return cached
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > CLOCK_TICK:
        with contextlib.suppress(OSError):  # without a cache it is computed again
            entry.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(entry, digest)
    return digest
