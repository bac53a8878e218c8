"""Import what a command needs in less time: a run needs some 4,000 modules before its first step."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Disable garbage collection during imports, and exclude all objects that exist afterwards from later collections.

    Only programs may call this, because `gc.freeze` applies to the process and not to one library.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def model_imports() -> Iterator[None]:
    """`quick_imports` of the libraries of models, where they are not imported yet."""
    if "transformers" in sys.modules:
        yield
        return
    with quick_imports():
        if importlib.util.find_spec("bitsandbytes"):
            import_bitsandbytes()
        yield


def import_bitsandbytes() -> None:
    """Import it, as diffusers and PEFT do, but without torch's compiler, which takes a second.

    It compiles functions for devices that it has no kernels for, and leaves them as they are where that fails.
    """
    torch: Any = importlib.import_module("torch")
    compile = torch.compile
    torch.compile = lambda function, **_: function
    try:
        with contextlib.suppress(Exception):  # a broken package is reported when a run needs it
            importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile
