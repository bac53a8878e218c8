"""Tiny bases, loaded once, and `attach` that is undone after each test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import adapters, families
from lorakit.adapters.adapter import Adapter


@pytest.fixture(scope="session")
def sd1(tiny_sd1: Path) -> Any:
    return families.load(families.describe(tiny_sd1), "cpu", torch.float32)


@pytest.fixture(scope="session")
def sdxl(tiny_sdxl: Path) -> Any:
    return families.load(families.describe(tiny_sdxl), "cpu", torch.float32)


@pytest.fixture
def attach() -> Iterator[Callable[..., Adapter]]:
    """`adapters.attach`, undone after the test: the bases are shared."""
    made: list[Adapter] = []

    def call(*args: Any, **options: Any) -> Adapter:
        made.append(adapters.attach(*args, **options))
        return made[-1]

    yield call
    for adapter in made:
        adapter.detach()
