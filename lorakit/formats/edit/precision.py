"""Measure, during a merge, how much of an adapter the output's precision loses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Precision:
    """The dtype of merged weights, and the loss from rounding.

    Attributes:
        keep_fp8: keep weights in 8 bits; by default they become float16.
        changed, survived: number of weights that the adapter changes, and of those that still differ from the base
            after rounding.
        change, error: sums of squares of the change, and of the rounding error.
    """

    keep_fp8: bool = False
    changed: int = 0
    survived: int = 0
    change: float = 0.0
    error: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)

    def dtype(self, of: torch.dtype) -> torch.dtype:
        """The output dtype for a weight: in eight bits, rounding would remove most of an adapter."""
        return torch.float16 if of in FP8 and not self.keep_fp8 else of

    def measure(self, original: torch.Tensor, adapted: torch.Tensor, rounded: torch.Tensor) -> None:
        """Measure one tensor: the base's and the adapted one in float32, and the latter after rounding."""
        differs = adapted != original
        self.dtypes.add(rounded.dtype)
        self.changed += int(differs.sum())
        self.survived += int((differs & (rounded.float() != original.to(rounded.dtype).float())).sum())
        self.change += float((adapted - original).double().square().sum())
        self.error += float((rounded.float() - adapted).double().square().sum())

    def require(self) -> None:
        """Raise LorakitError if no change survives."""
        if self.changed and not self.survived:
            hint = "leave out --keep-fp8" if self.keep_fp8 else "raise --strength"
            raise LorakitError(
                "in {names} none of the {changed:,} changed weights would differ: {hint}",
                self._names(),
                self.changed,
                hint,
            )

    def line(self) -> str:
        """A message about the loss."""
        if not self.changed:
            return "the adapter changes no weight of the base"
        error = (self.error / self.change) ** 0.5
        return Message(
            "precision {names}: {survived:.1%} of {changed:,} changed weights differ from the base's; "
            "rounding is {problem:.2%} of the change",
            self._names(),
            self.survived / self.changed,
            self.changed,
            error,
        )

    def _names(self) -> str:
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
