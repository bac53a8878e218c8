"""Linear layers with frozen float32 weights on a CPU, computed by oneDNN.

torch uses MKL for float32 matrix products, which does not use AVX-512 on processors that are not Intel's. oneDNN, also
part of torch, does: on an EPYC of 2025 it is twice as fast.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Below this many multiply-accumulates oneDNN's overhead, about 13 microseconds per call, exceeds its gain.
MIN_MACS = 2**19


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: x `[..., in]`, weight `[out, in]` (may be a transposed view), bias `[out]` -> `[..., out]`.

    oneDNN's result has no gradient: call this inside a `torch.autograd.Function`, or call `frozen_linear`. A compiler
    traces torch's own operation.
    """
    large = x.numel() * len(weight) >= MIN_MACS
    if (
        large
        and x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and not torch.compiler.is_compiling()
        and _onednn_works()
    ):
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return functional.linear(x, weight, bias)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` with a gradient for x only."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        result: torch.Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
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


def use_onednn_linear(module: nn.Module) -> None:
    """Make the float32 linear layers of a frozen module on the CPU compute by `linear`. Only their class changes."""
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32:
            layer.__class__ = FrozenLinear


@functools.cache
def _onednn_works() -> bool:
    """Whether this build of torch has oneDNN's linear operation, which has no public name, with a correct result."""
    try:
        x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        result = torch.ops.mkldnn._linear_pointwise(x, weight.t().contiguous().t(), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(result, x @ weight.t())
