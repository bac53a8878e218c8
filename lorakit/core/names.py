"""Names of files and folders."""

from __future__ import annotations

import re
from pathlib import Path


def step_name(step: int) -> str:
    """`step-000100`: the name of checkpoints and samples of a step. Names sort in the order of steps."""
    return f"step-{step:06d}"


def slug(text: str, limit: int = 40) -> str:
    """`text` as a name that is valid on every file system: letters and digits of any script, joined by hyphens."""
    return re.sub(r"[^\w]+|_+", "-", text.lower()).strip("-")[:limit].rstrip("-")


def unique_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
