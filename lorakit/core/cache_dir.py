"""Where things are kept that several runs share: latents, class images, compiled code. All of it may be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`LORAKIT_CACHE`, where `~` is the home folder, else ~/.cache/lorakit."""
    named = os.environ.get("LORAKIT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lorakit"
