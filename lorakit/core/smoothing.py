"""The smoothed loss: one formula for the progress bar, state.json, the report and the front end."""

from __future__ import annotations

import math
from collections.abc import Iterable

# Weight of the past; about the last 50 values count.
WEIGHT = 0.98


class RunningMean:
    """Exponentially weighted mean with bias correction: a constant stays that constant from the first value on."""

    def __init__(self, weight: float = WEIGHT):
        self.weight = weight
        self._sum = self._mass = 0.0

    @property
    def value(self) -> float:
        """Mean of the values so far, newer ones counting more; NaN before the first."""
        return self._sum / self._mass if self._mass else math.nan

    def add(self, value: float) -> float:
        """Take one more value in and return the mean. A value that is not finite changes nothing."""
        if math.isfinite(value):
            self._sum = self.weight * self._sum + (1 - self.weight) * value
            self._mass = self.weight * self._mass + (1 - self.weight)
        return self.value


def smooth(values: Iterable[float], weight: float = WEIGHT) -> list[float]:
    """The running mean after each value."""
    mean = RunningMean(weight)
    return [mean.add(value) for value in values]
