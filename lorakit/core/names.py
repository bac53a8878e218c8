"""Names of files and folders."""

from __future__ import annotations

import re
from pathlib import Path


def step_name(step: int) -> str:
    """`step-000100`: what checkpoints and samples of a step are called, so that names sort as steps do."""
    return f"step-{step:06d}"


def slug(text: str, limit: int = 40) -> str:
    """`text` as a name that every file system takes: letters and digits of any script, joined by hyphens."""
    return re.sub(r"[^\w]+|_+", "-", text.lower()).strip("-")[:limit].rstrip("-")


def unused(path: Path) -> Path:
    """`path`, or `path-2`, `path-3` ... where that is taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
