"""Folder of files that several runs share: latents, class images, compiled code. All of it may be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`LORAKIT_CACHE` (`~` is the home folder), else ~/.cache/lorakit."""
    folder = os.environ.get("LORAKIT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "lorakit"
