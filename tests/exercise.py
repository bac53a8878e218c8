"""Helpers for the tests of adapters: run a base, train an adapter for a few steps, fill an adapter with noise."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from lorakit import families
from lorakit.adapters.adapter import Adapter
from lorakit.config import ADAPTER_SECTIONS
from lorakit.core.registry import adapter_methods
from lorakit.training import objective

METHODS = {
    name: functools.partial(section, method=name)
    for name, section in ADAPTER_SECTIONS.items()
    if name in adapter_methods()
}
TEXTS = ["a photo of sks toy", "a toy"]


@functools.cache
def _base(folder: Path, dtype: torch.dtype) -> Any:
    return families.load(families.describe(folder), "cpu", dtype)


def new_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return an unchanged base from a folder. It is a copy, because reading the base takes three times as long."""
    return copied(_base(folder, dtype))


def copied(family: Any) -> Any:
    """Return a copy of a base for an adapter. The copies share the VAE, half of the base, which has no adapter."""
    return copy.deepcopy(family, {id(family.vae): family.vae})


def predict(family: Any, grad: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    noisy = torch.randn((2, 4, 8, 8), generator=draw)
    condition = family.encode_tokens(family.tokens(TEXTS), grad=grad)
    condition = condition.with_sizes(family.size_conditions((64, 64), (0, 0), (64, 64)))
    with torch.set_grad_enabled(grad):
        return family.predict(noisy, torch.tensor([100, 700]), condition)


def train(family: Any, adapter: Adapter, steps: int = 2, rate: float = 1e-2) -> None:
    parameters = list(adapter.parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=rate)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        target = torch.randn((2, 4, 8, 8), generator=draw)
        optimizer.zero_grad()
        (objective.loss(predict(family, grad=True), target) * 100).backward()
        optimizer.step()


def randomize(adapter: Adapter, size: float = 0.1) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            noise = torch.randn(parameter.shape, generator=draw)
            if name.endswith(".magnitude"):
                parameter.mul_(1 + size * noise)
            else:
                parameter.copy_(size * noise)


def module_of(family: Any, name: str) -> torch.nn.Module:
    component, _, path = name.partition(".")
    part = family.modules()[component]
    names = dict(part.named_modules())
    return names[path] if path in names else names[path.removeprefix("text_model.")]
