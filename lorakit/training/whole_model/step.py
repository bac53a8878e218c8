"""An optimizer step that clips, applies and frees each weight's gradient as soon as the backward pass has computed it.

So only one gradient of a large model exists at a time (Lv et al. 2023, arXiv 2306.09782; torch's tutorial "How to save
memory by fusing the optimizer step into the backward pass"). Weights in bfloat16 are updated in float32 and rounded
stochastically: with rounding to nearest, most updates would be lost (Zamirai et al. 2020, arXiv 2010.06192).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.config import Config
from lorakit.core import rng
from lorakit.training import optimizers
from lorakit.training.parallel import SINGLE, Processes

if TYPE_CHECKING:
    from lorakit.training.loss_step import LossStep


class LayerwiseStep:
    """As `optimizer_step.OptimizerStep`, one weight at a time: each gradient is clipped by its own norm.

    With several batches a step, gradients are accumulated first, so all of them exist together.

    Attributes:
        optimizer: over a float32 stand-in for each weight, which holds memory only while that weight is updated.
        limited, loss_scale: always None; neither exists here.
    """

    limited = None
    loss_scale = None

    def __init__(
        self,
        config: Config,
        loss_step: LossStep,
        total: int,
        say: Callable[[str], object],
        processes: Processes = SINGLE,
    ):
        self.config, self.loss_step, self.total, self.processes = config, loss_step, total, processes
        self.device = loss_step.family.device
        weights = loss_step.adapter.parameters()
        groups, rates = optimizers.rate_groups(config.optimizer, weights)
        self._empty = torch.empty(0, device=self.device)
        stand_ins = {id(weight): nn.Parameter(self._empty.clone()) for weight in weights.values()}
        own = [(name, [stand_ins[id(weight)] for weight in group]) for name, group in groups]
        self.optimizer = optimizers.build(config.optimizer, own, rates)
        # Name -> the weight, its stand-in and the number of its group.
        self._weights = {}
        number_of = {id(weight): number for number, (_, group) in enumerate(groups) for weight in group}
        for name, weight in weights.items():
            self._weights[name] = weight, stand_ins[id(weight)], number_of[id(weight)]
            weight.register_post_accumulate_grad_hook(functools.partial(self._accumulated, name))
        self._step, self._is_last = 0, False
        self._squares = torch.zeros((), device=self.device)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `number`, counted from 0.

        Returns:
            (mean loss of its batches, norm of the gradients before clipping), scalars on the device
        """
        parts = self.config.train.gradient_accumulation_steps
        optimizers.set_learning_rate(self.optimizer, self.config.optimizer, number, self.total)
        loss = torch.zeros((), device=self.device)
        self._step, self._squares = number, torch.zeros((), device=self.device)
        own = list(self.processes.share(parts))
        for part in own:
            self._is_last = part == own[-1]
            part_loss = self.loss_step.loss(number * parts + part) / parts
            part_loss.backward()
            loss += part_loss.detach()
        for name, (weight, _, _) in self._weights.items():
            if weight.grad is not None:  # the last batch did not reach it
                self._apply(name)
        self.processes.add_up([loss])
        if self.loss_step.adapter.average is not None:
            self.loss_step.adapter.average.update(number)
        return loss, self._squares.sqrt()

    def discard_graphs(self) -> bool:
        """Return False: there are no CUDA graphs."""
        return False

    def _accumulated(self, name: str, _: torch.Tensor) -> None:
        if self._is_last:
            self._apply(name)

    @torch.no_grad()
    def _apply(self, name: str) -> None:
        """Update one weight and free its gradient."""
        weight, stand_in, number = self._weights[name]
        assert weight.grad is not None, "a gradient has just been added to it"
        gradient, max_norm = weight.grad.float(), self.config.train.max_grad_norm
        weight.grad = None
        self.processes.add_up([gradient])
        norm = gradient.norm()
        self._squares += norm.square()
        if max_norm:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
        stand_in.data = weight.data.float()  # float() copies only other dtypes
        stand_in.grad = gradient
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**groups[number], "params": [stand_in]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        if weight.dtype is torch.bfloat16:
            draw = torch.Generator(self.device).manual_seed(
                rng.seed_for(self.config.train.seed, self._step, f"rounding {name}/{self.loss_step.retry}")
            )
            weight.copy_(round_at_random(stand_in.data, draw))
        stand_in.grad, stand_in.data = None, self._empty


def round_at_random(values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Round float32 to bfloat16 stochastically: up or down, with the probability that keeps the mean."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, generator=draw, device=values.device)
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(torch.isfinite(values), bits.view(torch.float32), values).bfloat16()
