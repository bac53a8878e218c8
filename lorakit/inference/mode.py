"""Inference mode: train flags and random state are put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def inference(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """No gradients and eval mode inside; afterwards every submodule has the train flag that it had."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag
