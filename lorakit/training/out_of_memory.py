"""What to do when a device runs out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.engine import device
from lorakit.runs import memory_estimate


def with_room(make: Callable[[], bool], compute: Callable[[], Any]) -> Any:
    """What `compute` gives; where memory runs out, once more after `make`, which says whether it made room."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        if not make():
            raise
    # Not inside: the error holds on to what was computed so far.
    torch.cuda.empty_cache()
    return compute()


@contextlib.contextmanager
def enough(doing: str, config: Config) -> Iterator[None]:
    """Where memory runs out inside, say what was being done and what to change.

    Raises:
        LorakitError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise LorakitError(memory_estimate.advice(doing, config, device.device(config.memory).type)) from None
