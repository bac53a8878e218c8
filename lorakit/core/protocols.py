"""Shapes of objects that several rooms handle and none of them owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorakit.adapters.weights import AdapterWeights


Item = TypeVar("Item")
Value = TypeVar("Value")


class Map(Protocol):
    """Python's `map`, or one that shares the items out over the processes of a run."""

    def __call__(self, function: Callable[[Item], Value], items: Iterable[Item], /) -> Iterable[Value]:
        """What the function makes of each item, in their order."""


class Trainable(Protocol):
    """What the training loop trains: an adapter in a base.

    Attributes:
        dropout: share of inputs that it drops while it trains.
    """

    dropout: float

    def describe(self) -> dict[str, tuple[int, int]]:
        """Component -> numbers of modules and parameters that train."""

    def groups(self) -> list[tuple[str, list[torch.nn.Parameter]]]:
        """(name, parameters) of each group of parameters that share a learning rate."""

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the base computes as without it."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are replaced by their average over the steps, if there is one."""

    def weights(self) -> AdapterWeights:
        """A copy of the trained weights, or of their average, on the CPU, ready to be exported."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a checkpoint."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put the tensors of a checkpoint back."""

    def detach(self) -> None:
        """Take it out of the base."""


class Base(Protocol):
    """The facts of a base model that the check needs; `families.describe` returns them."""

    @property
    def tokenizers(self) -> Mapping[str, Path]: ...
    @property
    def downscale(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def bucket_multiple(self) -> int: ...
    @property
    def chunked_texts(self) -> bool: ...
