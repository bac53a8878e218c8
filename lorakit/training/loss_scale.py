"""Gradients in fp16: a step whose gradients overflow is skipped, and the next ones are scaled by half as much.

The scale lies on the device, where a CUDA graph reads and changes it; with a fused optimizer (adamw) the host waits for
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.training import optimizers

if TYPE_CHECKING:
    from lorakit.families import Family


class LossScale:
    """The scale of a base's gradients in fp16.

    Attributes:
        scale: float32 scalar on the device; `Family.gradient_scale` from here on.
    """

    def __init__(self, family: Family):
        self.scale = torch.tensor(float(family.gradient_scale), device=family.device)
        family.gradient_scale = self.scale

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Step the optimizer if `norm`, that of `gradients`, is finite. Otherwise keep weights and state and halve the
        scale.

        Args:
            gradients: set to zeros where the step is skipped.
        """
        overflow = (~norm.isfinite()).float()
        skipped = overflow.bool()
        for gradient in gradients:
            gradient.masked_fill_(skipped, 0)
        if all(group.get("fused") for group in optimizer.param_groups):
            vars(optimizer)["found_inf"] = overflow  # by which torch's fused kernels skip
            optimizers.step(optimizer)
        elif not skipped:  # the others count steps on the host, so it waits for the norm
            optimizers.step(optimizer)
        self.scale.mul_(1 - overflow / 2)
