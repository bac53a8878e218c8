"""Handle a device that runs out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.engine import device
from lorakit.runs import memory_estimate

Value = TypeVar("Value")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means that a device is out of memory. Apple's devices have no error class for that."""
    apples = ("MPS backend out of memory", "Invalid buffer size")
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(apples)


def retry_after_freeing(free: Callable[[], bool], compute: Callable[[], Value]) -> Value:
    """Return `compute()`. If it runs out of memory and `free()` returns True, compute again."""
    try:
        return compute()
    except RuntimeError as error:
        if not (is_out_of_memory(error) and free()):
            raise
    # Outside of `except`: the error refers to tensors of the failed attempt.
    torch.cuda.empty_cache()
    return compute()


@contextlib.contextmanager
def explain_out_of_memory(doing: str, config: Config) -> Iterator[None]:
    """Replace an out-of-memory error inside by one that says what was running and which options to change.

    Raises:
        LorakitError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LorakitError(memory_estimate.advice(doing, config, device.device(config.memory).type)) from None
