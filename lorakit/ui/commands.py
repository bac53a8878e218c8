"""Commands of lorakit that a page waits for, each in a process of its own: torch never enters the front end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lorakit.errors import LorakitError

# Seconds after which a conversion is given up; the largest adapters take a fraction of it.
PATIENCE = 600


def export(source: Path, kind: str, folder: Path, dtype: str | None = None) -> list[Path]:
    """Write an adapter in another format; the files and folders that were written.

    Raises:
        LorakitError: what the command complained of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["export", str(source), "--to", kind, "--output", str(folder), "--json"]
    arguments += ["--dtype", dtype] if dtype else []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LorakitError(f"{source.name}: not converted after {PATIENCE} s") from None
    if done.returncode:
        lines = [line.removeprefix("lorakit: ") for line in done.stderr.splitlines() if line.startswith("lorakit: ")]
        raise LorakitError("\n".join(lines) or f"{source.name}: the conversion ended with code {done.returncode}")
    return [Path(path) for path in json.loads(done.stdout).values()]
