"""LoRA's forward and backward with as few operations as they need, in the base's precision.

PEFT casts the input to the adapter's float32, multiplies, scales, adds and casts back: at batch 1 the host cannot
issue that as fast as a card computes it. Here the small factors are cast to the input's precision instead (the
parameters and their gradients stay float32), the scale is folded into B, and both additions happen inside matrix
products. To everyone outside these are PEFT's layers: names, state dict and merging are its own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn import functional


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) (s B)^T, W and b frozen; x `[N, in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`[N, out]`."""
        down, up = down.to(x.dtype), (up if scale == 1 else up * scale).to(x.dtype)
        inner = x @ down.t()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scale = scale
        return y.addmm_(inner, up.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; the factors' in float32."""
        x, inner, weight, down, up = ctx.saved_tensors
        to_inner = gradient @ up
        to_x = torch.addmm(to_inner @ down, gradient, weight) if ctx.needs_input_grad[0] else None
        to_down = (to_inner.t() @ x).float()
        to_up = (gradient.t() @ inner).float()
        return to_x, None, None, to_down, to_up if ctx.scale == 1 else to_up * ctx.scale, None


class FusedLinear(Linear):
    """PEFT's linear LoRA layer with the forward of this file."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        base = self.base_layer
        name = None if args or kwargs or type(base) is not nn.Linear else _plain_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        if self._disable_adapters:
            return base(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        y = LoraLinear.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, down, up, self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])


class FusedConv2d(Conv2d):
    """PEFT's convolutional LoRA layer, computing in the input's precision."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        base = self.base_layer
        name = None if args or kwargs or base.groups != 1 else _plain_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        if self._disable_adapters:
            return base(x)
        down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        inner = functional.conv2d(x, down.to(x.dtype), None, base.stride, base.padding, base.dilation)
        return base(x) + functional.conv2d(inner, (up if scale == 1 else up * scale).to(x.dtype))


def _plain_adapter(layer: Any, x: torch.Tensor) -> str | None:
    """Name of the active adapter where there is exactly one and nothing is out of the ordinary, else None.

    Several adapters, a merged or a trained base, dropout and autocast are left to PEFT's own forward.
    """
    active = layer._active_adapter
    name = active if isinstance(active, str) else active[0] if len(active) == 1 else None
    if name not in layer.lora_A or layer.merged_adapters or layer.base_layer.weight.requires_grad:
        return None
    if layer.lora_dropout[name].training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return None if torch.is_autocast_enabled(x.device.type) else name
