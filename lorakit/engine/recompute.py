"""A UNet's frozen layers, keeping as little for the backward pass as they can.

A convolution whose weight is not trained has no use for its input in the backward pass; autograd keeps it. Norms and
activations cost next to nothing beside the products around them: what they made is made again from their input, which
is kept in any case. Values and gradients stay what they are to the bit; a step of the UNets of Stable Diffusion keeps a
third less (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional

# (stride, padding, dilation) of a convolution, along both axes.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# A packet of overloads would be searched at each call.
_convolution_backward = torch.ops.aten.convolution_backward.default
_norm_backward = torch.ops.aten.native_group_norm_backward.default
_silu_backward = torch.ops.aten.silu_backward.default
_gelu_backward = torch.ops.aten.gelu_backward.grad_input


def spare(layer: nn.Module) -> None:
    """Let a frozen layer, if it is one of those below, keep less."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.groups == 1:
        layer.__class__ = FrozenConv2d
    elif type(layer) is nn.LayerNorm:
        layer.__class__ = FrozenLayerNorm
    elif type(layer) is GEGLU:
        layer.__class__ = FrugalGEGLU


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again, to the bit, from tensors that others keep.

    Attributes:
        make: gives the tensor; no gradient flows through it.
        given: what `make` takes.
    """

    make: Callable[..., Tensor]
    given: tuple[Tensor, ...]


def recipe(x: Tensor) -> Recipe:
    """How to make x again: as the layer below that made it has noted, or by keeping it."""
    return getattr(x, "recipe", None) or Recipe(_itself, (x,))


def noted(made: Tensor, make: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """`made`, with its recipe where it will be asked for."""
    if made.requires_grad:
        made.recipe = Recipe(make, given)  # type: ignore[attr-defined]
    return made


def keep(ctx: Any, how: Recipe, *others: Tensor | None) -> None:
    """Save for the backward pass what makes x again, and other tensors; instead of `ctx.save_for_backward`."""
    ctx.make, ctx.count = how.make, len(how.given)
    ctx.save_for_backward(*how.given, *others)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What was given to `keep`, with x in the place of its recipe."""
    saved = ctx.saved_tensors
    return ctx.make(*saved[: ctx.count]), *saved[ctx.count :]


class FrozenConv2d(nn.Conv2d):
    """A convolution whose weights are not trained."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        if not (torch.is_grad_enabled() and x.requires_grad) or self.weight.requires_grad or _autocast(x):
            return super().forward(x)
        geometry: Any = (self.stride, self.padding, self.dilation)
        made: Tensor = _FrozenConvolution.apply(x, self.weight, self.bias, geometry)
        return made


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return functional.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Of the input only the shape counts.
        x = gradient.new_empty(1).expand(ctx.shape)
        return convolution_gradients(gradient, x, weight, ctx.geometry, to_x=True)[0], None, None, None


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, to_x: bool = False, to_weight: bool = False
) -> tuple[Any, Any]:
    """The gradients of a convolution's input and weight, each where it is wanted, else None."""
    wanted = [to_x, to_weight, False]
    found = _convolution_backward(gradient, x, weight, None, *geometry, False, (0, 0), 1, wanted)
    return found[0], found[1]


class FrozenLayerNorm(nn.LayerNorm):
    """A layer norm that notes how its output is made."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        return noted(super().forward(x), super().forward, x)


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x)), keeping x alone; `[B, C, h, w]`."""
    if not (torch.is_grad_enabled() and x.requires_grad) or _autocast(x):
        return functional.silu(norm(x))
    x = x.contiguous()
    return noted(_NormSilu.apply(x, norm), lambda x: functional.silu(norm(x)), x)


class _NormSilu(torch.autograd.Function):
    """silu of a group norm whose weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        made, mean, rstd = _normed(x, norm)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm = norm
        return functional.silu(made, inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x, mean, rstd = ctx.saved_tensors
        norm = ctx.norm
        gradient = _silu_backward(gradient, _normed(x, norm)[0])
        found = _norm_backward(gradient, x, mean, rstd, norm.weight, *_size(x), norm.num_groups, [True, False, False])
        return found[0], None


class FrugalGEGLU(GEGLU):
    """diffusers' GEGLU, keeping what comes from its projection alone."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C']`."""
        projected = self.proj(x)
        if not (torch.is_grad_enabled() and projected.requires_grad) or _autocast(x):
            return _gated(projected)
        return noted(_Gated.apply(projected), _gated, projected)


class _Gated(torch.autograd.Function):
    """The first half of x times gelu of the second (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        made = torch.empty_like(x)
        to_value, to_gate = made.chunk(2, dim=-1)
        torch.mul(gradient, functional.gelu(gate), out=to_value)
        _gelu_backward(gradient * value, gate, grad_input=to_gate)
        return made


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _normed(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x `[B, C, h, w]`, and mean and 1 / standard deviation of its groups."""
    return torch.native_group_norm(x, norm.weight, norm.bias, *_size(x), norm.num_groups, norm.eps)


def _size(x: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width


def _itself(x: Tensor) -> Tensor:
    return x


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
