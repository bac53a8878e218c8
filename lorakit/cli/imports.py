"""Import the libraries of a command faster. A run imports about 4,000 modules before its first step."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
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
