"""What the denoiser is given of the texts: named row tensors that can be indexed, joined and moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Conditioning:
    """Encoded texts: name -> tensor `[B, ...]`, a row for each text. It never changes: methods return a new one.

    A family adds the names that its denoiser needs. All have "encoder_hidden_states" `[B, T, D]`; SDXL and SD3 add
    "pooled" `[B, P]`, and SDXL "time_ids" `[B, 6]`: original size, crop and target size.
    """

    __slots__ = ("_tensors",)

    def __init__(self, **tensors: torch.Tensor):
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            counts = {name: len(tensor) for name, tensor in tensors.items()}
            raise ValueError(f"tensors of one conditioning need equally many rows, not {counts}")
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
        """The rows of an int64 index on the same device."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved, and cast where a dtype is given; integers, such as time ids, keep their dtype."""
        return self._each(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def expand(self, count: int) -> Conditioning:
        """One row repeated `count` times, without copying."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def with_rows(self, **tensors: torch.Tensor | None) -> Conditioning:
        """The same texts with more tensors, or others of the same names; those that are None are left out."""
        new = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Conditioning(**{**self._tensors, **new})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of several, in order.

        Raises:
            ValueError: their names differ.
        """
        if len({frozenset(part._tensors) for part in parts}) != 1:
            raise ValueError(f"conditionings of one batch need the same names, not {[[*p._tensors] for p in parts]}")
        return Conditioning(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]._tensors})

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self._tensors.items()})
