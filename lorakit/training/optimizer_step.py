"""An optimizer step: sum the gradients of its batches, clip them, and update the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit import adapters
from lorakit.config import Config
from lorakit.core import registry
from lorakit.core.messages import Message
from lorakit.engine import compile, cuda_graphs, flat_parameters
from lorakit.training import optimizers
from lorakit.training.loss_scale import LossScale
from lorakit.training.loss_step import LossStep
from lorakit.training.parallel import SINGLE, Processes

if TYPE_CHECKING:
    from lorakit.data.dataset import Batch


class OptimizerStep:
    """One optimizer step. Call it with 0, 1, 2, ...; it reads no value back from the device.

    Args:
        config: all options.
        loss_step: computes a batch's loss. Its adapter is attached. The constructor flattens the adapter's parameters,
            unless the base is plain.
        total: optimizer steps of the run, for the learning-rate schedule.
        say: takes a message for the user.
        processes: the processes that share the batches of each step.

    Attributes:
        flats: one flat tensor of parameters for each component; empty for a plain base.
        parameters: all trained parameters.
        loss_scale: the loss scale of a base in fp16, else None.
        limited: number of layers whose norm was above `train.max_weight_norm` in the last step; None without that
            option.
        optimizer: built by `optimizers.build`; its state is saved and loaded parameter by parameter.
    """

    def __init__(
        self,
        config: Config,
        loss_step: LossStep,
        total: int,
        say: Callable[[str], Any],
        processes: Processes = SINGLE,
    ):
        self.config, self.loss_step, self.total, self.say = config, loss_step, total, say
        self.processes = processes
        # Half-precision copies cost memory, so there are none where memory is limited.
        copies = not config.memory.gradient_checkpointing and config.memory.limit_gib is None
        plain = loss_step.family.plain
        groups, rates = optimizers.rate_groups(config.optimizer, loss_step.adapter.parameters())
        spec = registry.optimizer(config.optimizer.name)
        flatten = partial(adapters.flatten, groups=groups, copies=copies, block_size=spec.block_size)
        self.flats = [] if plain else flatten(loss_step.family, loss_step.adapter)
        self.parameters = [parameter for _, group in groups for parameter in group]
        if spec.elementwise and not plain:
            groups = [(each.name, [each.weights]) for each in self.flats]
        self.optimizer = optimizers.build(config.optimizer, groups, rates)
        if spec.elementwise and not plain:
            flat_parameters.save_per_parameter(self.optimizer, self.flats)
        self._blocks = None if plain else compile.blocks(config, loss_step.family, self.parameters, say)
        capture, line = (None, "") if plain else cuda_graphs.capturer(config, loss_step.family.device)
        weights, generators = [each.weights for each in self.flats], list(loss_step.generators.values())
        self.limited: torch.Tensor | None = None
        self.loss_scale = LossScale(loss_step.family) if loss_step.family.gradient_scale != 1 else None
        self._graphed_backward: cuda_graphs.GraphedBackward | None = None
        self._graphed_step: cuda_graphs.GraphedOptimizerStep | None = None
        if capture is not None:
            self._graphed_backward = cuda_graphs.GraphedBackward(self._backward, weights, capture, generators)
            if spec.capturable:
                self._graphed_step = cuda_graphs.GraphedOptimizerStep(self._clip_and_step, self._step_state, capture)
                line += ", and clipping with the optimizer step"
        if line:
            say(line)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `number`, counted from 0.

        Returns:
            (mean loss of its batches, norm of the gradients before clipping), scalars on the device
        """
        parts = self.config.train.gradient_accumulation_steps
        on_device = self._graphed_step is not None
        optimizers.set_learning_rate(self.optimizer, self.config.optimizer, number, self.total, on_device=on_device)
        loss = torch.zeros((), device=self.loss_step.family.device)
        for each in self.flats:
            if not each.ensure_views() and self._graphed_backward is not None:
                self._graphed_backward.discard_graphs()
            each.gradient.zero_()
        if not self.flats:
            self._zero_gradients()
        for part in self.processes.share(parts):
            loss += self._pass(number * parts + part)
        self.processes.add_up([*self._gradients(), loss])
        norm = self._optimizer_step()
        if self.config.train.max_weight_norm:
            self.limited = self.loss_step.adapter.limit_norms(self.config.train.max_weight_norm)
        if self.loss_step.adapter.average is not None:
            self.loss_step.adapter.average.update(number)
        return loss, norm

    def _gradients(self) -> list[torch.Tensor]:
        """All gradients: one tensor for each component if the parameters are flat, else one for each parameter."""
        if self.flats:
            return [each.gradient for each in self.flats]
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def discard_graphs(self) -> bool:
        """Free all CUDA graphs. Return whether there were any. Later steps capture new ones."""
        graphs = [each for each in (self._graphed_backward, self._graphed_step) if each is not None]
        return sum(each.discard_graphs() for each in graphs) > 0

    def _zero_gradients(self) -> None:
        """Set all gradients to zero, not to None. Parameters that no pass reaches then decay and have optimizer state
        too, as in `flat_parameters`."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def _pass(self, index: int) -> torch.Tensor:
        """Run forward and backward of the `index`-th batch. Return its share of the step's loss."""
        if self._blocks is None:
            return self._run_pass(index)
        batch = self.loss_step.batch(index)
        shape = batch.bucket, len(batch.entries)
        with self._blocks.compiled(shape, lambda: self._forward_backward(lambda: self.loss_step.loss(index))):
            return self._run_pass(index)

    def _run_pass(self, index: int) -> torch.Tensor:
        if self._graphed_backward is not None:
            try:
                with self.loss_step.scoped_rng():
                    return self._graphed_backward(lambda: self.loss_step.seed(index))
            except cuda_graphs.ReferenceNotFinite:
                pass  # a later step is captured
            except cuda_graphs.CaptureFailed as problem:
                self.say(Message("CUDA graphs are off, training continues without them: {problem}", problem))
                self._graphed_backward = None
        return self._forward_backward(lambda: self.loss_step.loss(index))

    def _backward(self, batch: Batch) -> torch.Tensor:
        return self._forward_backward(lambda: self.loss_step.loss_of(batch))

    def _forward_backward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        with flat_parameters.half_precision_pass(self.flats, self.loss_step.family.gradient_scale):
            loss = compute() / self.config.train.gradient_accumulation_steps
            loss.backward()
        return loss.detach()

    def _optimizer_step(self) -> torch.Tensor:
        """Clip the gradients and step the optimizer. Return the norm before clipping."""
        if self._graphed_step is not None:
            try:
                return self._graphed_step()
            except cuda_graphs.CaptureFailed as problem:
                self.say(Message("the optimizer step runs without a CUDA graph: {problem}", problem))
                self._graphed_step = None
        return self._clip_and_step()

    def _clip_and_step(self) -> torch.Tensor:
        max_norm = self.config.train.max_grad_norm
        if self.flats:
            norm = flat_parameters.clip(self.flats, max_norm)
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)
        if self.loss_scale is not None:
            gradients = [each.gradient for each in self.flats] or [
                p.grad for p in self.parameters if p.grad is not None
            ]
            self.loss_scale.step(self.optimizer, norm, gradients)
        else:
            optimizers.step(self.optimizer)
        return norm

    def _step_state(self) -> list[torch.Tensor]:
        """All tensors that `_clip_and_step` reads or changes."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        scales = [self.loss_scale.scale] if self.loss_scale is not None else []
        return [tensor for each in self.flats for tensor in (each.weights, each.gradient)] + states + rates + scales
