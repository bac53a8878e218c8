"""An optimizer step: the gradients of its batches, clipped and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit import adapters, compiled, graph, optim
from lorakit.adapters import flat
from lorakit.config import Config
from lorakit.step import Step


class Update:
    """Calling it with 0, 1, 2, ... trains; nothing of it reads a value back from the device.

    Args:
        config: the whole config.
        step: what computes a batch's loss. Its adapter is attached and slim, and is flattened here.
        total: optimizer steps of the run, for the learning rate's schedule.
        say: takes a line for the person.

    Attributes:
        optimizer: of `optim.build`; its state is saved and loaded parameter by parameter.
    """

    def __init__(self, config: Config, step: Step, total: int, say: Callable[[str], Any]):
        self.config, self.step, self.total, self.say = config, step, total, say
        # Where memory comes first there are no copies.
        copies = not config.memory.gradient_checkpointing and config.memory.limit_gib is None
        self.flats = adapters.flatten(step.family, step.adapter, copies=copies)
        whole = config.optimizer.name in optim.BY_NUMBER
        groups = [(each.name, [each.weights] if whole else each.parameters) for each in self.flats]
        self.optimizer = optim.build(config.optimizer, groups)
        if whole:
            flat.save_apart(self.optimizer, self.flats)
        parameters = [parameter for each in self.flats for parameter in each.parameters]
        self._blocks = compiled.blocks(config, step.family, parameters, say)
        record, line = graph.recorder(config, step.family.device)
        weights = [each.weights for each in self.flats]
        self._replayed = None if record is None else graph.Replayed(self._backward, weights, record)
        if line:
            say(line)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `number`, counted from 0: (mean loss of its batches, norm of the gradients before clipping)."""
        train, parts = self.config.train, self.config.train.gradient_accumulation_steps
        optim.set_learning_rate(self.optimizer, self.config.optimizer, number, self.total)
        loss = torch.zeros((), device=self.step.family.device)
        for each in self.flats:
            if not each.hold() and self._replayed is not None:
                self._replayed.forget()
            each.gradient.zero_()
        for part in range(parts):
            loss += self._pass(number * parts + part)
        norm = flat.clip(self.flats, train.max_grad_norm)
        self.optimizer.step()
        return loss, norm

    def forget(self) -> bool:
        """Give back the memory of all CUDA graphs; whether there were any. The next steps record anew."""
        return self._replayed is not None and self._replayed.forget()

    def _pass(self, index: int) -> torch.Tensor:
        """Forward and backward of the `index`-th batch; its share of the step's loss."""
        if self._blocks is None:
            return self._issued(index)
        batch = self.step.batch(index)
        shape = batch.bucket, len(batch.entries)
        with self._blocks.compiled(shape, lambda: self._computed(lambda: self.step.loss(index))):
            return self._issued(index)

    def _issued(self, index: int) -> torch.Tensor:
        if self._replayed is not None:
            terms = self.step.terms(index)
            try:
                return self._replayed(terms)
            except graph.NotCaptured as problem:
                self.say(f"no CUDA graph, steps are issued one operation at a time: {problem}")
                self._replayed = None
        return self._computed(lambda: self.step.loss(index))

    def _backward(self, terms: Any) -> torch.Tensor:
        return self._computed(lambda: self.step.loss_of(terms))

    def _computed(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        with flat.computing(self.flats):
            loss = compute() / self.config.train.gradient_accumulation_steps
            loss.backward()
        return loss.detach()
