"""Gradients in fp16: a step whose gradients overflow is skipped, and the next ones are scaled by half as much.

The scale lies on the device, where a CUDA graph reads and changes it; the host never waits for it.
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
        """Step the optimizer if `norm`, that of `gradients`, is finite; else leave weights and state, halve the scale.

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
        else:
            before = {key: tensor.clone() for key, tensor in _tensors(optimizer).items()}
            optimizers.step(optimizer)
            for key, tensor in _tensors(optimizer).items():
                # State that the first step makes of zeros is zeros, but for what counts steps.
                old = before[key] if key in before else torch.zeros_like(tensor)
                if tensor.device == skipped.device:  # torch keeps some counts of steps on the host
                    tensor.copy_(torch.where(skipped, old, tensor))
        self.scale.mul_(1 - overflow / 2)


def _tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """Weights and their state, by number and name."""
    result: dict[tuple[int, str], torch.Tensor] = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = {"": parameter.detach(), **optimizer.state.get(parameter, {})}
        result |= {(number, name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return result
