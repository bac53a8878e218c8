"""An exponential moving average (EMA) of an adapter's weights, which varies less than the last weights (Polyak and
Juditsky 1992, doi 10.1137/0330046; for diffusion models Ho et al. 2020, arXiv 2006.11239, appendix B)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Prefix of its tensors in a checkpoint.
PREFIX = "average."


class WeightAverage:
    """The moving average of parameters.

    Args:
        parameters: name -> trained parameter; the average starts with their values.
        decay: the weight of the old average in each step; smaller in the first steps, see `decay_at`.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self.parameters, self.decay, self._in_place = dict(parameters), decay, False
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after step `step`, counted from 0."""
        own: list[torch.Tensor] = list(self.tensors.values())
        weights: list[torch.Tensor] = list(self.parameters.values())
        torch._foreach_lerp_(own, weights, 1 - decay_at(self.decay, step))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the average. On exit their exact values are restored."""
        if self._in_place:
            yield
            return
        self._exchange()
        self._in_place = True
        try:
            yield
        finally:
            self._in_place = False
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            before = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(before)


class OptimizerAverage(WeightAverage):
    """The average that a schedule-free optimizer keeps and puts into the parameters in its eval mode (Defazio et al.
    2024, arXiv 2405.15682)."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        super().__init__(parameters, decay=0.0)
        self.optimizer: Any = optimizer

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Copy the average after step `step`; the parameters stay the same, to the bit."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer.eval()
        for name, parameter in self.parameters.items():
            self.tensors[name].copy_(parameter)
        self.optimizer.train()
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def decay_at(decay: float, step: int) -> float:
    """The decay at a step. It starts small, so that the average soon forgets the initial weights (TensorFlow's
    `ExponentialMovingAverage`)."""
    return min(decay, (1 + step) / (10 + step))


def averaged(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors of a checkpoint: averages where there are some, else the last weights."""
    return {name: state.get(PREFIX + name, last) for name, last in state.items() if not name.startswith(PREFIX)}
