"""Frozen layers that save fewer tensors for the backward pass.

A convolution with a frozen weight does not need its input in the backward pass, but autograd saves it. Outputs of norms
and activations are cheap: they are recomputed from their input, which is saved anyway. Values and gradients stay
identical to the bit. A step of Stable Diffusion's UNets then saves a third less (docs/memory.md).

A tensor carries the instructions to recompute it as its attribute `ATTRIBUTE`. Only `set_recompute` and `get_recompute`
access it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from lorakit.engine import kernels

# (stride, padding, dilation) of a convolution, along both axes.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# The attribute of a tensor that holds its `Recompute`.
ATTRIBUTE = "_lorakit_recompute"
# The overloads themselves: torch would search an overload packet in each call.
_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_norm_backward = torch.ops.aten.native_group_norm_backward.default
_silu_backward = torch.ops.aten.silu_backward.default
_gelu_backward = torch.ops.aten.gelu_backward.grad_input


def save_less(layer: nn.Module) -> None:
    """Make a frozen layer save less, if its class is one that this module replaces; else leave it unchanged."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.groups == 1:
        layer.__class__ = FrozenConv2d
    elif type(layer) is nn.LayerNorm:
        layer.__class__ = FrozenLayerNorm
    elif type(layer) is GEGLU:
        layer.__class__ = RecomputeGEGLU


@dataclass(frozen=True)
class Recompute:
    """How to recompute a tensor, to the bit, from tensors that are saved anyway.

    Attributes:
        function: returns the tensor; no gradient flows through it.
        inputs: the arguments of `function`.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def get_recompute(x: Tensor) -> Recompute:
    """How to recompute x, as set by the layer that made it; by default x itself is saved."""
    return getattr(x, ATTRIBUTE, None) or Recompute(_identity, (x,))


def set_recompute(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Record that `function(*inputs)` recomputes `result`, if it has a backward pass. Return `result`."""
    if result.requires_grad:
        setattr(result, ATTRIBUTE, Recompute(function, inputs))
    return result


def save_for_backward(ctx: Any, x: Recompute, *others: Tensor | None) -> None:
    """Save the inputs that recompute x, and other tensors. Use it instead of `ctx.save_for_backward`."""
    ctx.function, ctx.input_count = x.function, len(x.inputs)
    ctx.save_for_backward(*x.inputs, *others)


def load_for_backward(ctx: Any) -> tuple[Any, ...]:
    """Recompute x. Return it with the other tensors that were passed to `save_for_backward`."""
    tensors = ctx.saved_tensors
    return ctx.function(*tensors[: ctx.input_count]), *tensors[ctx.input_count :]


class FrozenConv2d(nn.Conv2d):
    """A convolution whose weights are not trained."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        if not (torch.is_grad_enabled() and x.requires_grad) or self.weight.requires_grad or _autocast_enabled(x):
            return super().forward(x)
        geometry: Any = (self.stride, self.padding, self.dilation)
        result: Tensor = _FrozenConv2dFunction.apply(x, self.weight, self.bias, geometry)  # type: ignore[no-untyped-call]
        return result


class _FrozenConv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return functional.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Only the shape of the input matters here.
        x = gradient.new_empty(1).expand(ctx.shape)
        return convolution_gradients(gradient, x, weight, ctx.geometry, to_x=True)[0], None, None, None


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, to_x: bool = False, to_weight: bool = False
) -> tuple[Any, Any]:
    """The gradients of a convolution's input and weight, each if requested, else None."""
    to_x_alone = gradient.is_cuda and to_x
    mask = [to_x and not to_x_alone, to_weight, False]
    gradients: tuple[Any, ...] = (None, None)
    if any(mask):
        gradients = _convolution_backward(gradient, x, weight, None, *geometry, False, (0, 0), 1, mask)
    return input_gradient(gradient, x.shape, weight, geometry) if to_x_alone else gradients[0], gradients[1]


def input_gradient(gradient: Tensor, shape: Sequence[int], weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's input `[B, in, h, w]`, in the memory layout of `gradient` `[B, out, h', w']`.

    It is a transposed convolution. `convolution_backward` takes the layout from input and weight instead. If both leave
    it open, as with a 1x1 kernel, it copies a channels_last gradient.
    """
    stride, padding, dilation = geometry
    left = [
        size - ((out - 1) * step - 2 * pad + spread * (kernel - 1) + 1)
        for size, out, kernel, step, pad, spread in zip(
            shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    result: Tensor = _convolution(gradient, weight, None, stride, padding, dilation, True, left, 1)
    return result


class FrozenLayerNorm(nn.LayerNorm):
    """A layer norm whose output is recomputed instead of saved."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        return set_recompute(super().forward(x), super().forward, x)


class FrozenGroupNorm(nn.GroupNorm):
    """A group norm whose output is recomputed instead of saved and has the memory layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, C, h, w]`."""
        return norm_silu(x, self, silu=False)


def norm_silu(x: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Tensor:
    """silu(norm(x)), or norm(x) without `silu`, saving only x; `[B, C, h, w]`."""
    if not (torch.is_grad_enabled() and x.requires_grad) or _autocast_enabled(x):
        result = nn.GroupNorm.forward(norm, x)
        return functional.silu(result) if silu else result
    x = x if _is_channels_last(x) else x.contiguous()
    return set_recompute(_NormSiluFunction.apply(x, norm, silu), lambda x: _norm_kernels(x)[0](x, norm, silu)[0], x)  # type: ignore[no-untyped-call]


class _NormSiluFunction(torch.autograd.Function):
    """A group norm whose weights are frozen, and silu of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
        normed = _norm_kernels(x)[0](x, norm, silu)
        ctx.save_for_backward(x, *normed[1:])
        ctx.norm, ctx.silu = norm, silu
        return normed[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        return _norm_kernels(x)[1](gradient, x, mean, rstd, ctx.norm, ctx.silu), None, None


def torch_norm(x: Tensor, norm: nn.GroupNorm, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output in the layout of x, and mean and 1 / standard deviation of the groups; reference for
    `triton_kernels.norm`."""
    result, mean, rstd = _normed(x.contiguous(), norm)
    return _like(functional.silu(result, inplace=True) if silu else result, x), mean, rstd


def torch_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: nn.GroupNorm, silu: bool
) -> Tensor:
    """The gradient of x in its layout; reference for `triton_kernels.norm_backward`."""
    # The kernels read both as contiguous NCHW. autograd's formula converts them, too.
    original, x, gradient = x, x.contiguous(), gradient.contiguous()
    if silu:
        gradient = _silu_backward(gradient, _normed(x, norm)[0])
    gradients = _norm_backward(gradient, x, mean, rstd, norm.weight, *_size(x), norm.num_groups, [True, False, False])
    return _like(gradients[0], original)


def _norm_kernels(x: Tensor) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """Forward and backward kernels: Triton's for channels_last tensors where they agree with torch's, else torch's."""
    if not _is_channels_last(x) or torch.compiler.is_compiling() or not kernels.uses_triton(x.device):
        return torch_norm, torch_norm_backward
    return _choose_norm(x.dtype, x.device)


@functools.lru_cache
def _choose_norm(
    dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    from lorakit.engine import triton_kernels

    norm = nn.GroupNorm(4, 24, device=device, dtype=dtype).requires_grad_(False)

    def sample() -> tuple[object, ...]:
        # On a GPU, enough positions that a program loops over several tiles.
        shape = (2, 24, 6, 6) if device.type == "cpu" else (2, 24, 512, 512)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last), norm, True

    def both(forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
            result, mean, rstd = forward(x, norm, silu)
            return torch.stack([result, backward(x.flip(0), x, mean, rstd, norm, silu)])

        return run

    reference, candidate = (
        both(torch_norm, torch_norm_backward),
        both(triton_kernels.norm, triton_kernels.norm_backward),
    )
    agrees = kernels.choose([candidate], reference, sample) is candidate
    return (triton_kernels.norm, triton_kernels.norm_backward) if agrees else (torch_norm, torch_norm_backward)


def use_channels_last(unet: nn.Module) -> None:
    """Keep the weights of frozen convolutions channels_last, so that feature maps become channels_last from the first
    one on. Replace norms and transformers whose output would have the other layout."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif type(module) is nn.GroupNorm:
            module.__class__ = FrozenGroupNorm
        elif type(module) is Transformer2DModel:
            module.__class__ = ChannelsLastTransformer


class ChannelsLastTransformer(Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer with a channels_last output, without a copy."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """`[B, h * w, C]` -> `[B, C, h, w]`."""
        hidden = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        hidden = hidden.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return (hidden if self.use_linear_projection else self.proj_out(hidden)) + residual


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _like(result: Tensor, x: Tensor) -> Tensor:
    return result.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else result


class RecomputeGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU that saves only the output of its projection."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C']`."""
        projected = self.proj(x)
        if not (torch.is_grad_enabled() and projected.requires_grad) or _autocast_enabled(x):
            return geglu(projected)
        return set_recompute(_GEGLUFunction.apply(projected), geglu, projected)  # type: ignore[no-untyped-call]


class _GEGLUFunction(torch.autograd.Function):
    """The first half of x times gelu of the second (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return geglu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return geglu_backward(gradient, x)


def geglu(x: Tensor) -> Tensor:
    """The first half of x times gelu of the second half, in one Triton kernel where available."""
    return (torch_geglu if torch.compiler.is_compiling() else _geglu_kernels(x)[0])(x)


def geglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    backward = torch_geglu_backward if torch.compiler.is_compiling() else _geglu_kernels(x)[1]
    return backward(gradient, x)


def torch_geglu(x: Tensor) -> Tensor:
    """Reference for `triton_kernels.geglu`."""
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def torch_geglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Reference for `triton_kernels.geglu_backward`."""
    value, gate = x.chunk(2, dim=-1)
    result = torch.empty_like(x)
    to_value, to_gate = result.chunk(2, dim=-1)
    torch.mul(gradient, functional.gelu(gate), out=to_value)
    _gelu_backward(gradient * value, gate, grad_input=to_gate)
    return result


def _geglu_kernels(x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return _choose_geglu(x.dtype, x.device) if kernels.uses_triton(x.device) else (torch_geglu, torch_geglu_backward)


@functools.lru_cache
def _choose_geglu(dtype: torch.dtype, device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Forward and backward by Triton where they agree with torch's on this device."""
    from lorakit.engine import triton_kernels

    def x() -> Tensor:
        return torch.linspace(-4, 4, 5 * 2 * 96, device=device).to(dtype).view(5, -1)

    return (
        kernels.choose([triton_kernels.geglu], torch_geglu, lambda: (x(),)),
        kernels.choose([triton_kernels.geglu_backward], torch_geglu_backward, lambda: (x()[:, :96].contiguous(), x())),
    )


def _normed(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The group norm of x `[B, C, h, w]`, and mean and 1 / standard deviation of its groups."""
    return torch.native_group_norm(x, norm.weight, norm.bias, *_size(x), norm.num_groups, norm.eps)


def _size(x: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width


def _identity(x: Tensor) -> Tensor:
    return x


def _autocast_enabled(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
