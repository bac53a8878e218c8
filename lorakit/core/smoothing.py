"""The smoothed loss: computed once, in the training loop, for the terminal, state.json, report and front end."""

from __future__ import annotations

# Weight of the past; about the last 50 values count.
WEIGHT = 0.98


class RunningMean:
    """Exponentially weighted mean with bias correction: a constant stays that constant from the first value on."""

    def __init__(self, weight: float = WEIGHT):
        self.weight = weight
        self._sum = self._mass = 0.0

    def add(self, value: float) -> float:
        """Take one more value in and return the mean of the values so far, newer ones counting more."""
        self._sum = self.weight * self._sum + (1 - self.weight) * value
        self._mass = self.weight * self._mass + (1 - self.weight)
        return self._sum / self._mass

    def state(self) -> list[float]:
        """Plain values for `load_state`."""
        return [self._sum, self._mass]

    def load_state(self, state: list[float]) -> None:
        """Continue as the mean whose `state` this was."""
        self._sum, self._mass = state
