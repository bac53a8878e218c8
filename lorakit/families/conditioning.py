"""The denoiser's inputs from the texts: named tensors with one row per text, which can be indexed, concatenated and
moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from lorakit.core.messages import Message


class Conditioning:
    """Encoded texts: name -> tensor `[B, ...]`, one row per text. It is immutable: methods return a new one.

    A family adds the names that its denoiser needs. All have "encoder_hidden_states" `[B, T, D]`; some add "pooled"
    `[B, P]` and the names of `Family.size_conditions`.
    """

    __slots__ = ("_tensors",)

    def __init__(self, **tensors: torch.Tensor):
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            counts = {name: len(tensor) for name, tensor in tensors.items()}
            raise ValueError(Message("tensors of one conditioning need equally many rows, not {counts}", counts))
        self._tensors = tensors

    def __len__(self) -> int:
        """The number of texts."""
        return len(next(iter(self._tensors.values())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, or None."""
        return self._tensors.get(name)

    def index(self, rows: torch.Tensor) -> Conditioning:
        """The rows at an int64 index, which is on the same device."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device and, if given, cast to a dtype. Integers, such as sizes, keep their dtype."""
        return self._each(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def expand(self, count: int) -> Conditioning:
        """One row repeated `count` times, without copying."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def with_rows(self, **tensors: torch.Tensor) -> Conditioning:
        """The same texts with tensors added or replaced."""
        return Conditioning(**{**self._tensors, **tensors})

    def with_sizes(self, sizes: Mapping[str, Sequence[int]]) -> Conditioning:
        """The same texts, all with the size conditions of one picture (see `Family.size_conditions`)."""
        device = self["encoder_hidden_states"].device
        return self.with_rows(**{name: torch.tensor([row] * len(self), device=device) for name, row in sizes.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of several, in order.

        Raises:
            ValueError: their names differ.
        """
        if len({frozenset(part._tensors) for part in parts}) != 1:
            raise ValueError(
                Message("conditionings of one batch need the same names, not {parts}", [[*p._tensors] for p in parts])
            )
        return Conditioning(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]._tensors})

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self._tensors.items()})
