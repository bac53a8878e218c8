"""LoRA layers that need fewer operations than PEFT's, in the base's precision.

PEFT casts the input to the adapter's float32, multiplies, scales, adds and casts back: at batch 1 the host cannot issue
these operations as fast as a GPU computes them. Here the small factors are cast to the input's precision instead
(parameters and gradients stay float32), and matrix products include scaling and additions. The classes derive from
PEFT's, so names, state dict and merging are PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional

from lorakit.engine import recompute
from lorakit.engine.onednn_linear import linear
from lorakit.engine.recompute import Geometry, Recompute, convolution_gradients

POINTWISE: Geometry = ((1, 1), (0, 0), (1, 1))


@dataclass
class CopiesSwitch:
    """Whether the layers of one component use their `HalfCopies` now."""

    on: bool = False


@dataclass(frozen=True)
class HalfCopies:
    """A and B in half precision, and buffers to which their gradients are added; see `FlatParameters`.

    Attributes:
        down, up: A `[r, in]` and B `[out, r]`, views; in a `FusedQKV` they have its shapes.
        to_down, to_up: their gradients, in the same shapes and precision.
        switch: whether to use the copies now.
    """

    down: Tensor
    up: Tensor
    to_down: Tensor
    to_up: Tensor
    switch: CopiesSwitch


class LoraLinear(torch.autograd.Function):
    """y = x (W + s B A)^T + b, W and b frozen; x `[N, in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`, s a number.

    The merged weight exists only during one product. This is for float32: in half precision, rounding would remove most
    of the small change. `x_recompute` returns x in its original shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        x_recompute: Recompute,
    ) -> Tensor:
        """`[N, out]`."""
        recompute.save_for_backward(ctx, x_recompute, weight, down, up)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, weight, down, up = recompute.load_for_backward(ctx)
        x, to_x = x.reshape(-1, x.shape[-1]), None
        if ctx.needs_input_grad[0]:
            to_x = linear(gradient, torch.addmm(weight, up, down, alpha=ctx.scale).t())
        # These products have one short axis. The long axis goes last, where kernels are up to ten times faster.
        scaled = gradient if ctx.scale == 1 else gradient * ctx.scale
        to_down = linear(linear(scaled, up.t()).t(), x.t())
        to_up = linear(linear(x, down).t(), scaled.t()).t()
        return to_x, None, None, to_down, to_up, None, None


class HalfLoraLinear(torch.autograd.Function):
    """`LoraLinear` as x W^T + b + s (x A^T) B^T, for x and W in half precision and A and B in float32.

    With `half_copies`, A and B are read from them and the gradients are added to them; autograd gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        x_recompute: Recompute,
        half_copies: HalfCopies | None,
    ) -> Tensor:
        """`[N, out]`."""
        down, up = (down.to(x.dtype), up.to(x.dtype)) if half_copies is None else (half_copies.down, half_copies.up)
        inner = x @ down.t()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        recompute.save_for_backward(ctx, x_recompute, inner, weight, down, up)
        ctx.scale, ctx.half_copies = scale, half_copies
        return y.addmm_(inner, up.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B; those of A and B are float32."""
        x, inner, weight, down, up = recompute.load_for_backward(ctx)
        x, scale, half_copies = x.reshape(-1, x.shape[-1]), ctx.scale, ctx.half_copies
        to_inner = gradient @ up
        to_x = (gradient @ weight).addmm_(to_inner, down, alpha=scale) if ctx.needs_input_grad[0] else None
        if half_copies is not None:
            half_copies.to_down.addmm_(to_inner.t(), x, alpha=scale)
            half_copies.to_up.addmm_(gradient.t(), inner, alpha=scale)
            return to_x, *[None] * 7
        to_down, to_up = (to_inner.t() @ x).float(), (gradient.t() @ inner).float()
        if scale != 1:
            to_down, to_up = to_down * scale, to_up * scale
        return to_x, None, None, to_down, to_up, None, None, None


class LoraConv2d(torch.autograd.Function):
    """y = x * (W + s B A) + b, a convolution, in float32; A `[r, in, k, k]`, B `[out, r, 1, 1]`; see `LoraLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        geometry: Geometry,
        x_recompute: Recompute,
    ) -> Tensor:
        """`[B, out, h', w']`; `geometry` is (stride, padding, dilation)."""
        recompute.save_for_backward(ctx, x_recompute, weight, down, up)
        ctx.scale, ctx.geometry = scale, geometry
        return functional.conv2d(x, _merge_weights(weight, down, up, scale), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, weight, down, up = recompute.load_for_backward(ctx)
        to_x = None
        if ctx.needs_input_grad[0]:
            merged = _merge_weights(weight, down, up, ctx.scale)
            to_x = convolution_gradients(gradient, x, merged, ctx.geometry, to_x=True)[0]
        scaled = gradient if ctx.scale == 1 else gradient * ctx.scale
        to_inner = functional.conv2d(scaled, up.transpose(0, 1))
        to_down = convolution_gradients(to_inner, x, down, ctx.geometry, to_weight=True)[1]
        inner = functional.conv2d(x, down, None, *ctx.geometry)
        to_up = convolution_gradients(scaled, inner, up, POINTWISE, to_weight=True)[1]
        return to_x, None, None, to_down, to_up, None, None, None


class HalfLoraConv2d(torch.autograd.Function):
    """`LoraConv2d` as x * W + b + s (x * A) * B, for x and W in half precision and A and B in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        geometry: Geometry,
        x_recompute: Recompute,
    ) -> Tensor:
        """`[B, out, h', w']`."""
        down, up = down.to(x.dtype), (up if scale == 1 else up * scale).to(x.dtype)
        inner = functional.conv2d(x, down, None, *geometry)
        recompute.save_for_backward(ctx, x_recompute, inner, weight, down, up)
        ctx.scale, ctx.geometry = scale, geometry
        return functional.conv2d(x, weight, bias, *geometry).add_(functional.conv2d(inner, up))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B; those of A and B are float32."""
        x, inner, weight, down, up = recompute.load_for_backward(ctx)
        wants_x = ctx.needs_input_grad[0]
        to_inner, to_up = convolution_gradients(gradient, inner, up, POINTWISE, to_x=True, to_weight=True)
        to_x, to_down = convolution_gradients(to_inner, x, down, ctx.geometry, to_x=wants_x, to_weight=True)
        if wants_x:
            to_x = to_x + convolution_gradients(gradient, x, weight, ctx.geometry, to_x=True)[0]
        to_down, to_up = to_down.float(), to_up.float()
        return to_x, None, None, to_down, to_up if ctx.scale == 1 else to_up * ctx.scale, None, None, None


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's linear LoRA layer with the forward of this file.

    Attributes:
        half_copies: set by `FlatParameters` for a base in half precision.
    """

    half_copies: HalfCopies | None = None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        base = self.base_layer
        name = None if args or kwargs or not isinstance(base, nn.Linear) else single_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self._disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if torch.compiler.is_compiling():
            return functional.linear(x, base.weight, base.bias) + lora_delta(x, down, up, self.scaling[name])
        rows = x.reshape(-1, x.shape[-1])
        arguments = (rows, base.weight, base.bias, down, up, self.scaling[name], recompute.get_recompute(x))
        # A "w8a8" weight, whose products are computed in int8, is not merged.
        if x.dtype is torch.float32 and getattr(base.weight, "scheme", "") != "w8a8":
            y = LoraLinear.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            y = HalfLoraLinear.apply(*arguments, active_copies(self.half_copies, x))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class FusedConv2d(Conv2d):  # type: ignore[misc]
    """PEFT's convolutional LoRA layer in the input's precision."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        base = self.base_layer
        name = None if args or kwargs or base.groups != 1 else single_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self._disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        geometry = (base.stride, base.padding, base.dilation)
        if torch.compiler.is_compiling():
            inner = functional.conv2d(x, down.to(x.dtype), None, *geometry)
            return base(x) + functional.conv2d(inner, (up if scale == 1 else up * scale).to(x.dtype))  # type: ignore[no-any-return]
        function = LoraConv2d if x.dtype is torch.float32 else HalfLoraConv2d
        result: Tensor = function.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, down, up, scale, geometry, recompute.get_recompute(x)
        )
        return result


def lora_delta(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """s x A^T B^T, `[..., in]` -> `[..., out]`, in the precision of x, in operations that a compiler can trace."""
    delta = functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return delta if scale == 1 else delta * scale


def active_copies(half_copies: HalfCopies | None, x: Tensor) -> HalfCopies | None:
    """The layer's half-precision copies if they are in use and have the dtype of x, else None."""
    active = half_copies is not None and half_copies.switch.on and half_copies.down.dtype is x.dtype
    return half_copies if active else None


def _merge_weights(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A of a convolution."""
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view(weight.shape)


def single_adapter(layer: Any, x: Tensor) -> str | None:
    """The name of the active adapter if the fused forward applies, else None.

    PEFT's forward handles several adapters, a merged or trained base, dropout and autocast.
    """
    active = layer._active_adapter
    name = active if isinstance(active, str) else active[0] if len(active) == 1 else None
    if name not in layer.lora_A or layer.merged_adapters or layer.base_layer.weight.requires_grad:
        return None
    if layer.lora_dropout[name].training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return None if torch.is_autocast_enabled(x.device.type) else name
