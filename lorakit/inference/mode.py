"""Inference mode that restores train flags, and interruption of long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


@contextlib.contextmanager
def inference(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, gradients are off and modules are in eval mode. On exit every submodule has its previous train flag."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextlib.contextmanager
def polled(modules: Iterable[torch.nn.Module], poll: Callable[[], object]) -> Iterator[None]:
    """Call `poll` before each forward pass of the modules. Its exceptions interrupt the work."""

    def before(module: torch.nn.Module, inputs: object) -> None:
        poll()

    hooks = [module.register_forward_pre_hook(before, prepend=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
