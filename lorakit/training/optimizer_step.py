"""An optimizer step: the gradients of its batches, clipped and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit import adapters
from lorakit.config import Config
from lorakit.engine import compile, cuda_graphs, flat_parameters
from lorakit.training import optimizers
from lorakit.training.loss_step import LossStep


class OptimizerStep:
    """Calling it with 0, 1, 2, ... trains; nothing of it reads a value back from the device.

    Args:
        config: the whole config.
        step: what computes a batch's loss. Its adapter is attached and slim, and is flattened here.
        total: optimizer steps of the run, for the learning rate's schedule.
        say: takes a line for the person.

    Attributes:
        optimizer: of `optim.build`; its state is saved and loaded parameter by parameter.
    """

    def __init__(self, config: Config, step: LossStep, total: int, say: Callable[[str], Any]):
        self.config, self.step, self.total, self.say = config, step, total, say
        # Where memory comes first there are no copies.
        copies = not config.memory.gradient_checkpointing and config.memory.limit_gib is None
        self.flats = adapters.flatten(step.family, step.adapter, copies=copies)
        whole = config.optimizer.name in optimizers.BY_NUMBER
        groups = [(each.name, [each.weights] if whole else each.parameters) for each in self.flats]
        self.optimizer = optimizers.build(config.optimizer, groups)
        if whole:
            flat_parameters.save_apart(self.optimizer, self.flats)
        parameters = [parameter for each in self.flats for parameter in each.parameters]
        self._blocks = compile.blocks(config, step.family, parameters, say)
        record, line = cuda_graphs.recorder(config, step.family.device)
        weights = [each.weights for each in self.flats]
        self._replayed, self._finished = None, None
        if record is not None:
            self._replayed = cuda_graphs.Replayed(self._backward, weights, record, list(step.generators.values()))
            if config.optimizer.name in optimizers.CAPTURED:
                self._finished = cuda_graphs.Finished(self._finish, self._held, record)
                line += "; clipping and the optimizer another"
        if line:
            say(line)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `number`, counted from 0: (mean loss of its batches, norm of the gradients before clipping)."""
        parts = self.config.train.gradient_accumulation_steps
        on_device = self._finished is not None
        optimizers.set_learning_rate(self.optimizer, self.config.optimizer, number, self.total, on_device=on_device)
        loss = torch.zeros((), device=self.step.family.device)
        for each in self.flats:
            if not each.hold() and self._replayed is not None:
                self._replayed.forget()
            each.gradient.zero_()
        for part in range(parts):
            loss += self._pass(number * parts + part)
        return loss, self._stepped()

    def forget(self) -> bool:
        """Give back the memory of all CUDA graphs; whether there were any. The next steps record anew."""
        graphs = [each for each in (self._replayed, self._finished) if each is not None]
        return sum(each.forget() for each in graphs) > 0

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
            try:
                with self.step.drawing():
                    return self._replayed(lambda: self.step.begin(index))
            except cuda_graphs.NotCaptured as problem:
                self.say(f"no CUDA graph, steps are issued one operation at a time: {problem}")
                self._replayed = None
        return self._computed(lambda: self.step.loss(index))

    def _backward(self, batch: Any) -> torch.Tensor:
        return self._computed(lambda: self.step.loss_of(batch))

    def _computed(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        with flat_parameters.computing(self.flats):
            loss = compute() / self.config.train.gradient_accumulation_steps
            loss.backward()
        return loss.detach()

    def _stepped(self) -> torch.Tensor:
        """Clip, and step the optimizer; the norm before."""
        if self._finished is not None:
            try:
                return self._finished()
            except cuda_graphs.NotCaptured as problem:
                self.say(f"no CUDA graph of the optimizer's step, it is issued one operation at a time: {problem}")
                self._finished = None
        return self._finish()

    def _finish(self) -> torch.Tensor:
        norm = flat_parameters.clip(self.flats, self.config.train.max_grad_norm)
        optimizers.step(self.optimizer)
        return norm

    def _held(self) -> list[torch.Tensor]:
        """All that `_finish` reads and changes."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [tensor for each in self.flats for tensor in (each.weights, each.gradient)] + states + rates
