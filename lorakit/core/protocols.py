"""Protocols of objects that several rooms use and none of them owns."""

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
    """Python's `map`, or a version that distributes the items over the processes of a run."""

    def __call__(self, function: Callable[[Item], Value], items: Iterable[Item], /) -> Iterable[Value]:
        """Apply the function to each item. The results are in the order of the items."""


class Trainable(Protocol):
    """The object of the training loop: an adapter in a base, or the weights of the base.

    Attributes:
        dropout: the largest dropout probability.
    """

    dropout: float

    def describe(self) -> dict[str, tuple[int, int]]:
        """Component -> (number of modules, number of trained parameters)."""

    def groups(self) -> list[tuple[str, list[torch.nn.Parameter]]]:
        """(name, parameters) of each group of parameters that share a learning rate."""

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the base computes as without the training."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are replaced by their moving average, if there is one."""

    def weights(self) -> AdapterWeights:
        """A copy of the trained weights, or of their average, on the CPU, for export."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a checkpoint."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load the tensors of a checkpoint."""

    def detach(self) -> None:
        """Restore the original base."""


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
