"""The choice of a kernel beside torch's own: one that is installed, and agrees with its twin in plain torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Kernel = TypeVar("Kernel", bound=Callable[..., torch.Tensor])
# How far a kernel may be from its twin, as a share of the largest value: a few roundings in half precision.
TOLERANCE = 2e-2
_allowed = {"triton": True}


def allow_triton(allowed: bool) -> None:
    """Whether kernels of Triton may be chosen from now on (`memory.triton`)."""
    _allowed["triton"] = allowed


def uses_triton(device: torch.device) -> bool:
    """Whether Triton is allowed, installed, and computes on the device: a card, or a CPU where it interprets, for
    tests."""
    interprets = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _allowed["triton"] and (device.type == "cuda" or interprets) and _is_installed("triton")


def choose(kernels: Sequence[Kernel], twin: Kernel, sample: Callable[[], tuple[object, ...]]) -> Kernel:
    """The first of the kernels that gives what `twin` gives for the arguments `sample()`, else `twin`."""
    # Someone who counts operations, or computes without numbers, asks for a kernel, not for its test.
    with _disable_current_modes():
        return next((kernel for kernel in kernels if _agrees(kernel, twin, sample)), twin)


def _agrees(kernel: Kernel, twin: Kernel, sample: Callable[[], tuple[object, ...]]) -> bool:
    try:
        arguments = sample()
        expected, actual = twin(*arguments).float(), kernel(*arguments).float()
        return (actual - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()
    except Exception:  # a kernel that this card, driver or compiler cannot run
        return False


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
