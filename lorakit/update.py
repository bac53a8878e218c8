"""An optimizer step: the gradients of its batches, clipped and applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lorakit import graph, optim
from lorakit.config import Config
from lorakit.step import Step


class Update:
    """Calling it with 0, 1, 2, ... trains; nothing of it reads a value back from the device.

    Args:
        config: the whole config.
        step: what computes a batch's loss.
        optimizer: of `optim.build`.
        parameters: all that is trained.
        total: optimizer steps of the run, for the learning rate's schedule.
        say: takes a line for the person.
    """

    def __init__(
        self,
        config: Config,
        step: Step,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        total: int,
        say: Callable[[str], Any],
    ):
        self.config, self.step, self.optimizer, self.parameters = config, step, optimizer, parameters
        self.total, self.say = total, say
        record, line = graph.recorder(config, step.family.device)
        self._replayed = None if record is None else graph.Replayed(self._backward, parameters, record)
        if line:
            say(line)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `number`, counted from 0: (mean loss of its batches, norm of the gradients before clipping)."""
        train, parts = self.config.train, self.config.train.gradient_accumulation_steps
        optim.set_learning_rate(self.optimizer, self.config.optimizer, number, self.total)
        loss = torch.zeros((), device=self.step.family.device)
        for part in range(parts):
            loss += self._pass(number * parts + part)
        # The norm comes back as it was before clipping and, unless asked, torch does not look at it.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._replayed is None)
        return loss, norm

    def _pass(self, index: int) -> torch.Tensor:
        """Forward and backward of the `index`-th batch; its share of the step's loss."""
        if self._replayed is not None:
            terms = self.step.terms(index)
            try:
                return self._replayed(terms)
            except graph.NotCaptured as problem:
                self.say(f"no CUDA graph, steps are issued one operation at a time: {problem}")
                self._replayed = None
        loss = self.step.loss(index) / self.config.train.gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def _backward(self, terms: Any) -> torch.Tensor:
        loss = self.step.loss_of(terms) / self.config.train.gradient_accumulation_steps
        loss.backward()
        return loss.detach()
