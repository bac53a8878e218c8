"""Choose a kernel instead of torch's own: one that is installed and agrees with a reference in plain torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Kernel = TypeVar("Kernel", bound=Callable[..., torch.Tensor])
# Largest difference between a kernel and its reference, relative to the largest value: a few roundings in half
# precision.
TOLERANCE = 2e-2
_allowed = {"triton": True}
_installed: dict[str, bool] = {}  # package -> whether Python finds it; a search for a missing one takes 0.2 ms


def allow_triton(allowed: bool) -> None:
    """Allow or forbid Triton kernels from now on (`memory.triton`)."""
    _allowed["triton"] = allowed


def uses_triton(device: torch.device) -> bool:
    """Whether Triton is allowed, installed, and runs on the device: CUDA, or a CPU with Triton's interpreter in
    tests."""
    interprets = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _allowed["triton"] and (device.type == "cuda" or interprets) and _is_installed("triton")


def choose(kernels: Sequence[Kernel], twin: Kernel, sample: Callable[[], tuple[object, ...]]) -> Kernel:
    """The first kernel whose result for the arguments `sample()` agrees with that of `twin`, else `twin`."""
    # A dispatch mode, which counts operations or traces shapes, must see the kernel but not its test.
    with _disable_current_modes():
        return next((kernel for kernel in kernels if _agrees(kernel, twin, sample)), twin)


def _agrees(kernel: Kernel, twin: Kernel, sample: Callable[[], tuple[object, ...]]) -> bool:
    try:
        arguments = sample()
        expected, actual = twin(*arguments).float(), kernel(*arguments).float()
        return (actual - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()
    except Exception:  # this GPU, driver or compiler cannot run the kernel
        return False


def _is_installed(package: str) -> bool:
    if package not in _installed:
        _installed[package] = importlib.util.find_spec(package) is not None
    return _installed[package]
