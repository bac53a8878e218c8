"""Import the libraries of a command faster. A run imports about 4,000 modules before its first step."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Disable garbage collection during imports. Later collections skip all objects that exist by then.

    Only programs may call this, because `gc.freeze` applies to the whole process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def model_imports() -> Iterator[None]:
    """`quick_imports` for torch, diffusers and transformers. Does nothing if transformers is imported already."""
    if "transformers" in sys.modules:
        yield
        return
    with quick_imports():
        if importlib.util.find_spec("bitsandbytes"):
            import_bitsandbytes()
        yield


def import_bitsandbytes() -> None:
    """Import bitsandbytes without importing torch's compiler, which takes a second. diffusers and PEFT import it too.

    bitsandbytes calls `torch.compile` only on functions for devices that it has no kernels for.
    """
    torch: Any = importlib.import_module("torch")
    compile = torch.compile
    torch.compile = lambda function, **_: function
    try:
        with contextlib.suppress(Exception):  # a run that needs the package reports the error
            importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile


def run_from_stdin(wait: float, unused: int) -> int:
    """Import what `lorakit export` needs, then run the command whose arguments come as one line of JSON.

    A program that expects an export starts this ahead of time, because the imports take seconds.

    Args:
        wait: seconds after which the process ends if no command came.
        unused: exit code if no command came.
    """
    timer = threading.Timer(wait, os._exit, [unused])
    timer.daemon = True
    timer.start()
    with quick_imports():
        importlib.import_module("lorakit.training.checkpoint_export")
        cli = importlib.import_module("lorakit.cli.main")
    line = sys.stdin.readline()
    timer.cancel()
    return int(cli.main(json.loads(line))) if line else unused


if __name__ == "__main__":
    sys.exit(run_from_stdin(float(sys.argv[1]), int(sys.argv[2])))
