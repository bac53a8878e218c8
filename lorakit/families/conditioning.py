"""What the UNet is told of the texts: a batch of embeddings that can be indexed, joined and moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Conditioning:
    """Encoded texts; a row for each.

    Attributes:
        encoder_hidden_states: `[B, T, D]`.
        pooled: `[B, P]`, or None where the family has none.
        time_ids: SDXL's six numbers of original size, crop and target size, `[B, 6]`, or None.
    """

    encoder_hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def index(self, rows: torch.Tensor) -> Conditioning:
        """The rows of an int64 index on the same device."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved, and cast where a dtype is given; time ids, whole numbers of four digits, stay as they are."""
        moved = self._each(lambda tensor: tensor.to(device, dtype))
        return replace(moved, time_ids=None if self.time_ids is None else self.time_ids.to(device))

    def expand(self, count: int) -> Conditioning:
        """One row repeated `count` times, without copying."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def with_sizes(self, time_ids: torch.Tensor) -> Conditioning:
        """The same texts with time ids `[B, 6]`."""
        return replace(self, time_ids=time_ids)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of several, in order. What one of them lacks, all must lack."""
        joined: dict[str, Any] = {}
        for f in fields(Conditioning):
            values = [getattr(part, f.name) for part in parts]
            joined[f.name] = None if values[0] is None else torch.cat(values)
        return Conditioning(**joined)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return Conditioning(**changed)
