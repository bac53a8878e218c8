"""Loss scaling for fp16: a step whose gradients overflow is skipped, and the scale is halved for the next ones.

The scale is a tensor on the device, where a CUDA graph reads and changes it. With a fused optimizer (adamw) the host
does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.training import optimizers

if TYPE_CHECKING:
    from lorakit.families import Family


class LossScale:
    """The gradient scale of a base in fp16.

    Attributes:
        scale: float32 scalar on the device; `Family.gradient_scale` is the same tensor.
    """

    def __init__(self, family: Family):
        self.scale = torch.tensor(float(family.gradient_scale), device=family.device)
        family.gradient_scale = self.scale

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Step the optimizer if `norm`, the norm of `gradients`, is finite. Otherwise leave weights and state and halve
        the scale.

        Args:
            gradients: filled with zeros where the step is skipped.
        """
        overflow = (~norm.isfinite()).float()
        skipped = overflow.bool()
        for gradient in gradients:
            gradient.masked_fill_(skipped, 0)
        if all(group.get("fused") for group in optimizer.param_groups):
            vars(optimizer)["found_inf"] = overflow  # torch's fused kernels skip the step where this is 1
            optimizers.step(optimizer)
        elif not skipped:  # other optimizers count steps on the host, so it waits for the norm
            optimizers.step(optimizer)
        self.scale.mul_(1 - overflow / 2)
