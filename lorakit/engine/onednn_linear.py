"""Products with frozen weights, by the kernel that is quickest where they run.

On a CPU in float32 torch hands matrix products to MKL, which leaves AVX-512 alone on processors that are not Intel's;
oneDNN, which is in torch too and does torch's convolutions, does not. On an EPYC of 2025 it is twice as fast.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Multiplications below which oneDNN's own overhead, about 13 microseconds a call, is more than it saves.
FEW = 2**19


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: x `[..., in]`, weight `[out, in]`, maybe a transpose, bias `[out]` -> `[..., out]`. On the quick path
    autograd does not see it: for use inside a `torch.autograd.Function`, or by `frozen_linear`. A compiler is shown
    torch's own."""
    quick = x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32 and x.numel() * len(weight) >= FEW
    if quick and not torch.compiler.is_compiling() and _onednn():
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return functional.linear(x, weight, bias)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `linear`, with a gradient for x, and for nothing else."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        made: torch.Tensor = _FrozenLinear.apply(x, weight, bias)
        return made
    return linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.t()), None, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weights are not trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return frozen_linear(x, self.weight, self.bias)


def quicken(module: nn.Module) -> None:
    """Let the linear layers of a frozen module compute by `linear`, where that is another kernel than torch's own."""
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32:
            layer.__class__ = FrozenLinear


@functools.cache
def _onednn() -> bool:
    """Whether this build of torch has oneDNN's linear layer, and it is right: it has no public name."""
    try:
        x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        found = torch.ops.mkldnn._linear_pointwise(x, weight.t().contiguous().t(), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, x @ weight.t())
