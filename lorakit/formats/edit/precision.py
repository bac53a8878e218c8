"""What the precision of a merged model loses of an adapter, measured while it is merged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Precision:
    """The precision that weights are written in, and what is lost by it.

    Attributes:
        keep_fp8: write weights in 8 bits as they came; they become float16 otherwise.
        changed, survived: weights that the adapter changes, and those of them that still differ from the base's.
        change, error: sums of the squares of the change, and of what rounding adds to it.
    """

    keep_fp8: bool = False
    changed: int = 0
    survived: int = 0
    change: float = 0.0
    error: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)

    def dtype(self, of: torch.dtype) -> torch.dtype:
        """What weights of a dtype are written in: eight bits would round most of an adapter away."""
        return torch.float16 if of in FP8 and not self.keep_fp8 else of

    def measure(self, original: torch.Tensor, adapted: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count one weight: the base's and the adapted one in float32, and the latter as it is written."""
        differs = adapted != original
        self.dtypes.add(rounded.dtype)
        self.changed += int(differs.sum())
        self.survived += int((differs & (rounded.float() != original.to(rounded.dtype).float())).sum())
        self.change += float((adapted - original).double().square().sum())
        self.error += float((rounded.float() - adapted).double().square().sum())

    def require(self) -> None:
        """Raise LorakitError where nothing of the adapter is left."""
        if self.changed and not self.survived:
            hint = "leave out --keep-fp8" if self.keep_fp8 else "raise --strength"
            raise LorakitError(
                "in {names} none of the {changed:,} changed weights would differ: {hint}",
                self._names(),
                self.changed,
                hint,
            )

    def line(self) -> str:
        """What was lost, for a person."""
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
