"""Commands of lorakit that a page waits for, each in its own process: torch never enters the front end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lorakit.core.errors import LorakitError
from lorakit.runs import quickstart

# Seconds after which a conversion is given up; the largest adapters take a fraction of it.
PATIENCE = 600
# The front end is off the network, whatever the user's HF_HUB_OFFLINE says; that holds for `fetch`, and is read here
# before app.py sets it.
OFFLINE, USERS = "1", os.environ.get("HF_HUB_OFFLINE", "0")


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """The environment without proxies, for the import of Gradio: it opens a client that a SOCKS proxy keeps from being
    made. The commands that reach the network get the variables as they are."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)


def export(source: Path, kind: str, folder: Path, dtype: str | None = None) -> list[Path]:
    """Write an adapter in another format; the files and folders that were written.

    Raises:
        LorakitError: what the command complained of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["export", str(source), "--to", kind, "--output", str(folder), "--json"]
    arguments += ["--dtype", dtype] if dtype else []
    try:
        result = subprocess.run(
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
    if result.returncode:
        raise LorakitError(_complaint(result) or f"{source.name}: the conversion ended with code {result.returncode}")
    return [Path(path) for path in json.loads(result.stdout).values()]


def fetch(base: str) -> None:
    """Fetch a base that is on the hub into the cache, where it takes no second time; as long as that takes.

    Raises:
        LorakitError: why it cannot be had.
    """
    result = subprocess.run(
        [sys.executable, "-m", "lorakit.ui.commands", base],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"HF_HUB_OFFLINE": USERS},
        check=False,
    )
    if result.returncode:
        raise LorakitError(_complaint(result) or f"{base}: the download ended with code {result.returncode}")


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    """What a command said was wrong."""
    lines = [line.removeprefix("lorakit: ") for line in result.stderr.splitlines() if line.startswith("lorakit: ")]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        quickstart.describe(sys.argv[1])
    except LorakitError as problem:
        sys.exit(f"lorakit: {problem}")
